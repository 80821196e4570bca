"""Instrument files: ``.instprm`` of GSAS-II, and those of other programs by their content."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bragg_data.files import read_bounded
from bragg_data.instrument import consistency, conversion, fullprof, gsas_iparm, topas
from bragg_data.instrument.diffractometer import (
    KEYS,
    NOTE,
    Instrument,
    InstrumentError,
    TofGrid,
    instrument_of_entries,
)
from bragg_data.instrument.peak_shape import PeakShape

MOST_BYTES = 10_000_000  # of a file; with tables of many banks a few hundred kB

__all__ = [
    "Instrument",
    "InstrumentError",
    "TofGrid",
    "instrument_format",
    "read_banks",
    "read_instrument",
    "read_instruments",
]

# "#Bank 4: GSAS-II instrument parameter file …", also without "#", or "#GSAS-II instrument …"
_BANK_LINE = re.compile(r"#?\s*Bank\s+(\d+)\s*(?::|$)", re.IGNORECASE)
_FILE_LINE = re.compile(r"(?:#|GSAS).*instrument parameter")
_FILE_LINE_OF_BANK = re.compile(r"#?\s*GSAS")
_QUOTES = '"""', "'''"
_NEEDED = {"2-theta", "difC"}  # of every bank
_KEY = re.compile(
    r"(?:^|;)[ \t]*"
    r"(Type|Bank|Lam1?|Zero|fltPath|2-theta|dif[ABC]|alpha|beta-[01q]|sig-[012q]|[UVWXYZ])[ \t]*:",
    re.MULTILINE,
)
_KEYS_OF_A_FILE = 3  # of different names, from which a text is a .instprm file
_TABLE = "pdabc"  # a table of peak shapes: d, T, alpha, beta and variance, separated by commas


class _Section(NamedTuple):
    bank: str  # of its heading; may be empty
    entries: list[tuple[str, str]]
    notes: list[str]


def read_instrument(instprm: Path | str, bank: int | None = None) -> Instrument:
    """Read one bank of an instrument file, or of the text of one; see :func:`read_banks`.

    The bank's number may be left out where the file holds one bank only. Raises an InstrumentError
    if the file cannot be read, is of no time-of-flight instrument, or lacks a value or the bank.
    """
    banks = read_instruments(instprm)
    where = str(instprm) if isinstance(instprm, Path) else "Instrument file"
    known = ", ".join(f"{b.bank} (2θ {b.two_theta:g}°)" for b in banks)
    chosen = [b for b in banks if bank in (None, b.bank)]
    if not chosen:
        raise InstrumentError(f"{where} holds no bank {bank}. It holds: {known}.")
    if len(chosen) > 1 and bank is None:
        raise InstrumentError(f"{where} holds the banks {known}: name one of them.")
    if len(chosen) > 1:
        raise InstrumentError(
            f"{where} holds several banks of the number {bank}: {known}. Renumber one of them."
        )
    return chosen[0]


def read_instruments(instprm: Path | str) -> tuple[Instrument, ...]:
    """Read all banks of an instrument file, or of the text of one, in its order.

    Numbers may occur twice. Errors are those of :func:`read_instrument`.
    """
    return tuple(bank.instrument for bank in read_banks(instprm))


def read_banks(file: Path | str, widths: Path | None = None) -> tuple[conversion.OriginalBank, ...]:
    """Read all banks of an instrument file, with the peaks as the file defines them.

    ``.instprm`` of GSAS-II, ``.prm``, ``.iparm`` and ``.EXP`` of GSAS, ``.irf`` and ``.pcr`` of
    FullProf, recognised by content. ``.inp`` of TOPAS gives positions; ``widths`` is the instrument
    file from which 2θ and peak shape are taken then. Errors are those of :func:`read_instrument`.
    """
    where, text = _named_text(file)
    if not topas.recognised(text):
        if widths is not None:
            raise InstrumentError(
                f"{where} has peak widths itself: leave {widths} out, which is for files of TOPAS."
            )
        return _banks_of_text(text, where)
    if widths is None:
        raise topas.without_widths(text, where)
    return tuple(topas.banks_with_positions(text, where, read_banks(widths), str(widths)))


def _named_text(file: Path | str) -> tuple[str, str]:
    """Return the name of a file for messages, and its text."""
    where, text = "Instrument file", str(file)
    if isinstance(file, Path):
        where = text
        try:
            text = _decoded(read_bounded(file, MOST_BYTES))
        except FileNotFoundError as error:
            raise InstrumentError(
                f"Instrument file {file} not found. Give the path of a GSAS-II .instprm file."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InstrumentError(f"Instrument file {file} cannot be read: {reason}.") from error
    return where, text


@lru_cache(maxsize=16)  # a fit takes up to seconds
def _banks_of_text(text: str, where: str) -> tuple[conversion.OriginalBank, ...]:
    for program, read in (
        (gsas_iparm, gsas_iparm.read_gsas_banks),
        (fullprof, fullprof.read_fullprof_banks),
    ):
        if program.recognised(text):
            try:
                return tuple(read(text, where))
            except InstrumentError as error:
                if where in str(error):
                    raise
                raise InstrumentError(f"{where}: {error}") from error
    sections = list(_sections(text))
    if sections and all(key == "Bank" for key, _ in sections[-1].entries):
        raise InstrumentError(
            f"{where} ends behind the heading of bank {sections[-1].bank or '?'}: it is cut off."
        )
    banks = [(entries, section.notes) for section in sections for entries in _banks(section, where)]
    if not banks:
        raise InstrumentError(f"{where} is no GSAS-II instrument file: no line is 'key:value'.")
    keys = dict.fromkeys(key for entries, _ in banks for key in entries)
    return tuple(_bank(*bank, keys, number, where) for number, bank in enumerate(banks, start=1))


def instrument_format(text: str) -> str:
    """Return what kind of instrument file a text is; empty if it is none."""
    if topas.recognised(text):
        return "TOPAS .inp"
    if gsas_iparm.recognised(text):
        return "GSAS .EXP" if re.search(r"^ *EXPR ", text, re.MULTILINE) else "GSAS .prm"
    if fullprof.recognised(text):
        return "FullProf .pcr" if re.search(r"^!\s*Job\b", text, re.MULTILINE) else "FullProf .irf"
    return "GSAS-II .instprm" if len(set(_KEY.findall(text))) >= _KEYS_OF_A_FILE else ""


def _decoded(content: bytes) -> str:
    """Return text in UTF-8, or in Latin-1 where an older program wrote it."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
        if gsas_iparm.recognised(text) or fullprof.recognised(text):
            return text
        raise


def _bank(
    entries: dict[str, str], notes: list[str], of_file: Iterable[str], number: int, where: str
) -> conversion.OriginalBank:
    bank = _bank_of_entries(entries, notes, number, where)
    doubts = consistency.doubts_of_entries(entries, KEYS, of_file, f"{bank.instrument.bank}")
    warnings = dict.fromkeys([*bank.instrument.warnings, *doubts])
    return replace(bank, instrument=replace(bank.instrument, warnings=tuple(warnings)))


def _bank_of_entries(
    entries: dict[str, str], notes: list[str], number: int, where: str
) -> conversion.OriginalBank:
    table = entries.pop(_TABLE, "")
    instrument = instrument_of_entries(entries, number, where, notes)
    if not table:
        d = conversion.usual_spacings(instrument.two_theta)
        return conversion.OriginalBank(instrument, conversion.peaks_of(instrument), d)
    try:
        rows = np.array([row.split(",") for row in table.split("\n") if row.strip()], dtype=float)
        d, _, rise, decay, variance = rows[np.argsort(rows[:, 0])].T
    except (ValueError, IndexError) as error:
        raise InstrumentError(
            f"{where}, bank {instrument.bank}: the table pdabc needs five numbers in each line (d, "
            f"T, alpha, beta, variance)."
        ) from error
    i = instrument
    # GSAS-II adds the table's variance to that of the coefficients.
    variance = variance + i.sig_0 + i.sig_1 * d**2 + i.sig_2 * d**4 + i.sig_q * d
    if not (len(d) > 3 and min(d[0], *rise, *decay, *variance) > 0 and (np.diff(d) > 0).all()):
        raise InstrumentError(
            f"{where}, bank {instrument.bank}: the table pdabc needs four lines or more of "
            f"different d, with positive values."
        )
    start = i.with_parameters(beta_q=0.0, sig_q=0.0)
    shape = PeakShape(rise, decay, variance, i.x * d + i.y * d**2 + i.z)
    return conversion.bank_of_table(start, d, shape, "GSAS-II's table pdabc")


def _sections(text: str) -> Iterator[_Section]:
    """Yield the sections that have headings, or all of the text."""
    section = _Section("", [], [])
    lines = map(str.strip, text.splitlines())
    for line in lines:
        heading = _BANK_LINE.match(line)
        if heading or _FILE_LINE.match(line):
            notes = []
            if any(key != "Bank" for key, _ in section.entries):
                yield section
            elif heading and section.bank:
                notes = [f"The heading of bank {section.bank} has no entries below it."]
            if not heading and not _FILE_LINE_OF_BANK.match(line):
                notes.append(f"The heading '{line[:20]}' numbers no bank (#Bank 1:).")
            section = _Section(heading[1] if heading else "", [], notes)
        elif line.startswith(NOTE):
            section.notes.append(line.removeprefix(NOTE))
        elif quote := next((q for q in _QUOTES if q in line and line[0] != "#"), None):
            # A value of several lines.
            value = line
            while value.count(quote) < 2 and (following := next(lines, None)) is not None:
                value += f"\n{following}"
            key, _, value = value.partition(":")
            section.entries.append((key.strip(), value.replace(quote, "")))
        elif not line.startswith("#"):
            parts = [entry.partition(":") for entry in line.split(";") if entry.strip()]
            section.entries.extend((k.strip(), v.strip()) for k, colon, v in parts if colon)
            stray = [k for k, colon, _ in parts if not colon]
            section.notes.extend(f"'{k.strip()[:40]}' is no entry (key:value)." for k in stray)
    if section.entries or section.bank:
        yield section


def _banks(section: _Section, where: str) -> list[dict[str, str]]:
    """Return the banks of a section: several where their headings are missing.

    Then all keys occur again for each bank. A single key that occurs again needs the same value.
    """
    heading = {"Bank": section.bank} if section.bank else {}
    number = dict(section.entries).get("Bank", section.bank)
    if (
        section.bank
        and re.fullmatch(r"\d{1,9}(\.0*)?", number)
        and int(float(number)) != int(section.bank)
    ):
        section.notes.append(
            f"Its heading names bank {section.bank}, and its entry bank {number}, which is used."
        )
    banks: list[dict[str, str]] = [{}]
    for key, value in section.entries:
        if key in banks[-1]:
            banks.append({})
        banks[-1][key] = value
    if all(bank.keys() >= _NEEDED for bank in banks):
        return [heading | banks[0], *banks[1:]]
    for key in dict.fromkeys(key for key, _ in section.entries):
        values = list(dict.fromkeys(v for k, v in section.entries if k == key))
        if len(values) > 1:
            raise InstrumentError(
                f"{where} gives '{key}' several times for one bank ({values[0][:20]} and "
                f"{values[1][:20]}): keep one, or begin each bank with a line '#Bank N:'."
            )
    return [heading | dict(section.entries)]
