"""Instrument files: the banks of a ``.instprm`` file of GSAS-II."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bragg_data.instrument.diffractometer import (
    Instrument,
    InstrumentError,
    TofGrid,
    instrument_of_entries,
)

__all__ = ["Instrument", "InstrumentError", "TofGrid", "read_instrument", "read_instruments"]

# "#Bank 4: GSAS-II instrument parameter file …", also without "#", or "#GSAS-II instrument …"
_BANK_LINE = re.compile(r"#?\s*Bank\s+(\d+)\s*(?::|$)", re.IGNORECASE)
_FILE_LINE = re.compile(r"(?:#|GSAS).*instrument parameter")
_QUOTES = '"""', "'''"
_NEEDED = {"2-theta", "difC"}  # of every bank


class _Section(NamedTuple):
    bank: str  # of its heading; may be empty
    entries: list[tuple[str, str]]


def read_instrument(instprm: Path | str, bank: int | None = None) -> Instrument:
    """Read one bank of a GSAS-II ``.instprm`` file, or of the text of one.

    The bank's number may be left out where the file holds one bank only. Raises an InstrumentError
    if the file cannot be read, is no time-of-flight (PNT) file, lacks a needed value, or does not
    hold the bank.
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
    """Read all banks of a GSAS-II ``.instprm`` file, or of the text of one, in its order.

    Numbers may occur twice. Errors are those of :func:`read_instrument`.
    """
    where, text = "Instrument file", str(instprm)
    if isinstance(instprm, Path):
        where = text
        try:
            text = instprm.read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise InstrumentError(
                f"Instrument file {instprm} not found. Give the path of a GSAS-II .instprm file."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise InstrumentError(f"Instrument file {instprm} cannot be read: {error}.") from error
    banks = [bank for section in _sections(text) for bank in _banks(section, where)]
    if not banks:
        raise InstrumentError(
            f"{where} is no GSAS-II instrument parameter file: it has no 'key:value' lines."
        )
    return tuple(instrument_of_entries(b, number, where) for number, b in enumerate(banks, start=1))


def _sections(text: str) -> Iterator[_Section]:
    """Yield the sections that have headings, or all of the text."""
    section = _Section("", [])
    lines = map(str.strip, text.splitlines())
    for line in lines:
        heading = _BANK_LINE.match(line)
        if heading or _FILE_LINE.match(line):
            if any(key != "Bank" for key, _ in section.entries):
                yield section
            section = _Section(heading[1] if heading else "", [])
        elif quote := next((q for q in _QUOTES if q in line and line[0] != "#"), None):
            # A value of several lines.
            value = line
            while value.count(quote) < 2 and (following := next(lines, None)) is not None:
                value += f"\n{following}"
            key, _, value = value.partition(":")
            section.entries.append((key.strip(), value.replace(quote, "")))
        elif not line.startswith("#"):
            parts = (entry.partition(":") for entry in line.split(";"))
            section.entries.extend((k.strip(), v.strip()) for k, colon, v in parts if colon)
    if any(key != "Bank" for key, _ in section.entries):
        yield section


def _banks(section: _Section, where: str) -> list[dict[str, str]]:
    """Return the banks of a section: several where their headings are missing.

    Then all keys occur again for each bank. A single key that occurs again is refused unless it
    has the same value.
    """
    heading = {"Bank": section.bank} if section.bank else {}
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
