"""Instrument files of FullProf: ``.irf``, and the instrument in a ``.pcr`` file.

Of the profile functions the back-to-back exponentials with a pseudo-Voigt (NPROF 9) are converted.
FullProf manual, time of flight: T = Zero + Dtt1 d + Dtt2 d² + Dtt_1overd/d, rise alph0 + alph1/d,
decay beta0 + beta1/d⁴, variance Sigma-2 d⁴ + Sigma-1 d² + Sigma-0, width Gamma-2 d² + Gamma-1 d +
Gamma-0.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bragg_data.instrument.conversion import (
    OriginalBank,
    back_to_back,
    bank_of_table,
    fitted_bank,
    spacings_between,
    with_warnings,
)
from bragg_data.instrument.diffractometer import InstrumentError, instrument_of_entries
from bragg_data.instrument.peak_shape import PeakShape

_IRF = re.compile(r"^[ \t]*NPROF[ \t]+\d", re.MULTILINE)
_PCR = re.compile(r"^!\s*Job\s+Npr\b", re.MULTILINE)
_BANK = re.compile(r"^!.*\bBank\s+(\d+)", re.MULTILINE)
_CONVERTED = 9
_OTHER_FUNCTIONS = {10: "double exponentials of Jirák", 13: "Ikeda-Carpenter"}
_POSITIONS = {  # in which order, if no comment names them
    "ZD2TOF": ("zero", "dtt1", "dtt2", "dtt_1overd"),
    "D2TOF": ("dtt1", "dtt2", "zero"),
}
_SHAPES = {
    "SIGMA": ("sigma-2", "sigma-1", "sigma-0"),
    "GAMMA": ("gamma-2", "gamma-1", "gamma-0"),
    "ALFBE": ("alph0", "beta0", "alph1", "beta1"),
}
_ENTRIES = {  # of a .instprm file
    "2-theta": "2thetabank",
    "difC": "dtt1",
    "difA": "dtt2",
    "difB": "dtt_1overd",
    "Zero": "zero",
    "beta-0": "beta0",
    "beta-1": "beta1",
    "sig-0": "sigma-0",
    "sig-1": "sigma-1",
    "sig-2": "sigma-2",
    "X": "gamma-1",
    "Y": "gamma-2",
    "Z": "gamma-0",
}
_WITHOUT_COUNTERPART = "sigma-q", "alphq", "betaq"

_Values = dict[str, float]


def recognised(text: str) -> bool:
    """Return whether a text is a file of FullProf, by its keywords and comments."""
    return bool(_IRF.search(text) or _PCR.search(text))


def read_fullprof_banks(text: str, where: str) -> list[OriginalBank]:
    """Read the banks of a file of FullProf; errors name it as ``where``.

    The banks of a ``.pcr`` file are its patterns, with the widths of its first phase. Raises an
    InstrumentError if it is of constant wavelength, lacks a value, or has a profile function that
    is not converted.
    """
    if _IRF.search(text):
        blocks = re.split(r"(?m)^(?=[ \t]*NPROF[ \t])", text)[1:]
        numbers = [int(n) for n in _BANK.findall(text)]
        if len(numbers) != len(blocks):
            numbers = list(range(1, len(blocks) + 1))
        return [_irf_bank(*pair, where) for pair in zip(numbers, blocks, strict=True)]
    patterns = _patterns(text, where)
    return [_bank_of_values(number, v, where) for number, v in enumerate(patterns, start=1)]


def _irf_bank(number: int, block: str, where: str) -> OriginalBank:
    values, table, comment = _Values(), list[list[float]](), list[str]()
    for line in block.splitlines():
        words = line.split()
        if line.lstrip().startswith("!"):
            comment = line.lower().replace("!", " ").split()
        elif words and words[0][0].isalpha():
            key, numbers = words[0].upper(), _numbers(words[1:])
            names = _POSITIONS.get(key, _SHAPES.get(key, (key.lower(),)))
            if key in _POSITIONS and len(comment) == len(numbers) and "dtt1" in comment:
                names = tuple(comment)
            if key in _POSITIONS and len(numbers) > len(names):
                raise InstrumentError(
                    f"{where}, bank {number}, gives {len(numbers)} values for {key} without a "
                    f"comment that names them (! Dtt1 Dtt2 Dtt_1overd Zero)."
                )
            values |= dict(zip(names, numbers, strict=False))
            if key == "TOFRG" and len(numbers) == 3:
                values |= {"tof-min": numbers[0], "tof-max": numbers[2]}
        elif words:
            table.append(_numbers(words))
    values["2thetabank"] = values.pop("twoth", values.get("2thetabank", 0.0))
    values["npr"] = values.pop("nprof")
    return _bank_of_values(number, values, where, table)


def _patterns(text: str, where: str) -> list[_Values]:
    """Return the values of each pattern of a ``.pcr`` file, by the comments that name them."""
    named: dict[str, list[_Values]] = defaultdict(list)
    for values in _named_values(text):
        for name in ("dtt1", "sigma-2", "gamma-2", "alph0", "npr", "tof-min", "lambda1"):
            if name in values:
                named[name].append(values)
    if not named["dtt1"]:
        reason = (
            "constant wavelength; only time of flight is supported"
            if named["lambda1"]
            else "no comment names Zero and Dtt1, so the calibration cannot be read"
        )
        raise InstrumentError(f"{where}: {reason}.")
    patterns = []
    of_phase = [v for v in named["npr"] if "job" not in v] or named["npr"]
    for k, position in enumerate(named["dtt1"]):
        values = dict(position)
        for lines in (named["sigma-2"], named["gamma-2"], named["alph0"], of_phase):
            if len(lines) <= k:
                raise InstrumentError(
                    f"{where}, pattern {k + 1}: no comment names the profile parameters (Sigma-2 "
                    f"…, Gamma-2 …, alph0 …), as FullProf writes them."
                )
            values |= lines[k]
        if len(named["tof-min"]) > k:
            values |= {key: named["tof-min"][k][key] for key in ("tof-min", "tof-max")}
        patterns.append(values)
    return patterns


def _named_values(text: str) -> Iterator[_Values]:
    """Yield the numbers of each line that follows a comment, by the words of the comment."""
    for heading, line in pairwise(text.splitlines()):
        if heading.startswith("!") and not line.startswith("!"):
            yield dict(zip(heading[1:].lower().split(), _numbers(line.split()), strict=False))


def _bank_of_values(
    number: int, values: Mapping[str, float], where: str, table: list[list[float]] | None = None
) -> OriginalBank:
    here = f"{where}, bank {number}"
    function = int(values["npr"])
    if function in _OTHER_FUNCTIONS:
        raise InstrumentError(
            f"{here}: NPROF {function} ({_OTHER_FUNCTIONS[function]}) is not converted; only "
            f"profile function 9 is. Give an instrument file of GSAS-II (.instprm)."
        )
    if function != _CONVERTED:
        raise InstrumentError(
            f"{here}: NPROF {function} is of constant wavelength; only time of flight is supported."
        )
    for name in _WITHOUT_COUNTERPART:
        if values.get(name, 0.0):
            raise InstrumentError(
                f"{here}: {name} is {values[name]:g}, and this term is not converted. Refine with "
                f"it fixed to zero."
            )
    entries = {"Bank": f"{number}", "Type": "PNT"}
    entries |= {key: repr(values.get(name, 0.0)) for key, name in _ENTRIES.items()}
    rise, alpha_0 = values.get("alph1", 0.0), values.get("alph0", 0.0)
    if table:
        rise, alpha_0 = 1.0, 0.0
    entries["alpha"] = repr(rise if rise > 0 else 1.0)
    start = instrument_of_entries(entries, number, where)
    if table:
        return bank_of_table(start, *_columns(table, here), "FullProf's table of peak shapes")
    if "sigma-1" not in values or "alph0" not in values:
        raise InstrumentError(f"{here} has no peak shape (SIGMA and ALFBE, or a table).")
    original = back_to_back(start.with_parameters(alpha=rise), alpha_0)
    window = np.array([values.get("tof-min", 0.0), values.get("tof-max", 0.0)])
    d = spacings_between(window / start.difc, start.two_theta)
    decay = start.beta_0 + start.beta_1 / d**4
    if (alpha_0 + rise / d).min() <= 0 or decay.min() <= 0:
        raise InstrumentError(f"{here}: rise or decay are not positive over its times of flight.")
    if alpha_0:
        return fitted_bank(original, start, d, "FullProf's profile function 9 with alph0")
    return with_warnings(OriginalBank(start, original, d), ())


def _columns(table: list[list[float]], here: str) -> tuple[NDArray[np.float64], PeakShape]:
    if len(table) < 4 or {len(row) for row in table} != {6}:
        raise InstrumentError(
            f"{here}: a table of peak shapes needs four lines or more, of six numbers (d, Sigma^2, "
            f"Gamma, Alpha, Beta, Shift)."
        )
    d, variance, fwhm, rise, decay, shift = np.array(sorted(table)).T
    if shift.any():
        raise InstrumentError(f"{here}: the table shifts peaks, which is not converted.")
    if min(d[0], *variance, *rise, *decay) <= 0 or (np.diff(d) <= 0).any():
        raise InstrumentError(
            f"{here}: d, Sigma^2, Alpha and Beta of the table have to be positive, and d different."
        )
    return d, PeakShape(rise, decay, variance, fwhm)


def _numbers(words: list[str]) -> list[float]:
    """Return the numbers that a line begins with."""
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            break
    return numbers
