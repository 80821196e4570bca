"""Instrument files of FullProf: ``.irf``, and the instrument in a ``.pcr`` file.

FullProf manual, time of flight: T = Zero + Dtt1 d + Dtt2 d² + Dtt_1overd/d, variance Sigma-2 d⁴ +
Sigma-1 d² + Sigma-0, Lorentzian width Gamma-2 d² + Gamma-1 d + Gamma-0, and

* NPROF 9, back-to-back exponentials: rise alph0 + alph1/d, decay beta0 + beta1/d⁴;
* NPROF 10, which passes from epithermal to thermal neutrons by n = erfc(Width (x-cross − 1/d))/2:
  T = n (Zero + Dtt1 d) + (1 − n)(Zerot + Dtt1t d − Dtt2t/d),
  1/rise = n (alph0 + alph1 d) + (1 − n)(alph0t − alph1t/d), and 1/decay with beta in the same way;
* NPROF 13, Ikeda & Carpenter: 1/α = alph0 + alph1 λ, 1/β = beta0, share exp(−81.799/(kappa λ²)).

All are exact convolutions with a pseudo-Voigt; of the Lorentzian part GSAS-II computes another one.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfc

from bragg_data.instrument.conversion import (
    OriginalBank,
    back_to_back,
    bank_of_functions,
    bank_of_moderator,
    bank_of_table,
    fitted_bank,
    fitted_if_different,
    spacings_between,
    with_warnings,
)
from bragg_data.instrument.diffractometer import Instrument, InstrumentError, instrument_of_entries
from bragg_data.instrument.peak_shape import PeakShape, peak_shape

_IRF = re.compile(r"^[ \t]*NPROF[ \t]*[ \t=][ \t]*\d", re.MULTILINE)
_PCR = re.compile(r"^!\s*Job\s+Npr\b", re.MULTILINE)
_BANK = re.compile(r"^!.*\bBank\s+(\d+)", re.MULTILINE)
_FUNCTIONS = {9: "back-to-back exponentials", 10: "epithermal and thermal", 13: "Ikeda-Carpenter"}
_POSITIONS = {  # in which order, if no comment names them
    "ZD2TOF": ("zero", "dtt1", "dtt2", "dtt_1overd"),
    "D2TOF": ("dtt1", "dtt2", "zero"),
    "ZD2TOT": ("zerot", "dtt1t", "dtt2t", "x-cross", "width"),
    "D2TOT": ("dtt1t", "dtt2t", "x-cross", "width", "zerot"),
}
_CROSSINGS = {"xcross": "x-cross", "tcross": "x-cross", "t-cross": "x-cross"}  # other spellings
_SHAPES = {
    "SIGMA": ("sigma-2", "sigma-1", "sigma-0"),
    "GAMMA": ("gamma-2", "gamma-1", "gamma-0"),
    "ALFBE": ("alph0", "beta0", "alph1", "beta1"),  # beta1 is kappa in NPROF 13
    "ALFBT": ("alph0t", "beta0t", "alph1t", "beta1t"),
}
_OF_TWO_KINDS = (*_POSITIONS["ZD2TOT"], *_SHAPES["ALFBT"])
_OF_PATTERN = "dtt1", "sigma-2", "gamma-2", "alph0"  # each names a line of a .pcr file
_OF_EPITHERMAL = "dtt1t", "alph0t"  # only with NPROF 10
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
_SAME_PATH = 0.4  # relative difference from which the flight paths of two banks contradict

_Values = dict[str, float]


def recognised(text: str) -> bool:
    """Return whether a text is a file of FullProf, by its keywords and comments."""
    return bool(_IRF.search(text) or _PCR.search(text))


def read_fullprof_banks(text: str, where: str) -> list[OriginalBank]:
    """Read the banks of a file of FullProf; errors name it as ``where``.

    The banks of a ``.pcr`` file are its patterns, with the widths of its first phase. Raises an
    InstrumentError if it is of constant wavelength, lacks a value, or has peaks that cannot be
    converted.
    """
    if _IRF.search(text):
        blocks = re.split(r"(?m)^(?=[ \t]*NPROF[ \t=])", text)[1:]
        numbers = [int(n) for n in _BANK.findall(text)]
        if not len(set(numbers)) == len(numbers) == len(blocks):
            numbers = list(range(1, len(blocks) + 1))
        banks = [_irf_bank(*pair, where) for pair in zip(numbers, blocks, strict=True)]
    else:
        patterns = _patterns(text, where)
        banks = [_bank_of_values(number, v, where) for number, v in enumerate(patterns, start=1)]
    return [_with_doubt(bank, banks) for bank in banks]


def _with_doubt(bank: OriginalBank, banks: list[OriginalBank]) -> OriginalBank:
    """Return a bank with a warning if its flight path, by difC and 2θ, is not the others'.

    FullProf's files give no flight path to check against.
    """
    path = bank.instrument.flight_path_of_difc
    usual = float(np.median([b.instrument.flight_path_of_difc for b in banks]))
    if abs(path - usual) <= _SAME_PATH * usual:
        return bank
    i = bank.instrument
    doubt = (
        f"bank {i.bank}: Dtt1 {i.difc:g} and 2θ {i.two_theta:g}° give a flight path of {path:.1f} m"
        f", and the median of the banks is {usual:.1f} m. The angle is a default or wrong; lengths "
        f"depend on Dtt1 alone."
    )
    return with_warnings(bank, (*i.warnings, doubt))


def _irf_bank(number: int, block: str, where: str) -> OriginalBank:
    values, table, comment = _Values(), list[list[float]](), list[str]()
    for line in block.splitlines():
        words = line.split()
        if line.lstrip().startswith("!"):
            comment = [_CROSSINGS.get(w, w) for w in line.lower().replace("!", " ").split()]
        elif words and words[0][0].isalpha():
            key, *rest = line.replace("=", " ").split()
            key, numbers = key.upper(), _numbers(rest)
            names = _POSITIONS.get(key, _SHAPES.get(key, (key.lower(),)))
            named = "dtt1" in comment or "dtt1t" in comment
            if key in _POSITIONS and len(comment) == len(numbers) and named:
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
    values["npr"] = values.pop("nprof", -1.0)
    return _bank_of_values(number, values, where, table)


def _patterns(text: str, where: str) -> list[_Values]:
    """Return the values of each pattern of a ``.pcr`` file, by the comments that name them."""
    named: dict[str, list[_Values]] = defaultdict(list)
    for values in _named_values(text):
        for name in (*_OF_PATTERN, *_OF_EPITHERMAL, "npr", "tof-min", "lambda1"):
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
        for name in _OF_EPITHERMAL:
            values |= named[name][k] if len(named[name]) > k else {}
        for lines in (named["sigma-2"], named["gamma-2"], named["alph0"], of_phase):
            if len(lines) <= k:
                raise InstrumentError(
                    f"{where}, pattern {k + 1}: no comment names the profile parameters (Sigma-2 "
                    f"…, Gamma-2 …, alph0 …), as FullProf writes them."
                )
            values |= lines[k]
        if len(named["tof-min"]) > k:
            window = named["tof-min"][k]
            values |= {key: window[key] for key in ("tof-min", "tof-max") if key in window}
        patterns.append(values)
    return patterns


def _named_values(text: str) -> Iterator[_Values]:
    """Yield the numbers of each line that follows a comment, by the words of the comment."""
    for heading, line in pairwise(text.splitlines()):
        if heading.startswith("!") and not line.startswith("!"):
            names = (_CROSSINGS.get(w, w) for w in heading[1:].lower().split())
            yield dict(zip(names, _numbers(line.split()), strict=False))


def _bank_of_values(
    number: int, values: Mapping[str, float], where: str, table: list[list[float]] | None = None
) -> OriginalBank:
    here = f"{where}, bank {number}"
    if not 0 <= values["npr"] < 100:
        raise InstrumentError(f"{here}: NPROF is no number of a profile function (9, 10 or 13).")
    function = int(values["npr"])
    if function not in _FUNCTIONS:
        raise InstrumentError(
            f"{here}: NPROF {function} is of constant wavelength; only time of flight is supported."
        )
    if table and function != 9:
        raise InstrumentError(
            f"{here}: a table of peak shapes is converted of NPROF 9 only, not of {function}. Give "
            f"the coefficients (ALFBE), or an instrument file of GSAS-II (.instprm)."
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
    if function != 9:
        entries |= {"beta-0": "0.0", "beta-1": "0.0"}
    entries["alpha"] = repr(rise if rise > 0 and function == 9 else 1.0)
    start = instrument_of_entries(entries, number, where)
    if table:
        columns = _columns(table, here)
        return bank_of_table(start, *columns, "FullProf's table of peak shapes", "textbook")
    if "sigma-1" not in values or "alph0" not in values:
        raise InstrumentError(f"{here} has no peak shape (SIGMA and ALFBE, or a table).")
    window = np.array([values.get("tof-min", 0.0), values.get("tof-max", 0.0)])
    d = spacings_between(window / start.difc, start.two_theta)
    name = f"FullProf's profile function {function} ({_FUNCTIONS[function]})"
    if function == 13:
        kappa = values.get("kappa", values.get("beta1", 0.0))
        return bank_of_moderator(start, (alpha_0, rise, values.get("beta0", 0.0), kappa), d, name)
    if function == 10:
        return _bank_of_two_kinds(start, values, d, here, name)
    decay = start.beta_0 + start.beta_1 / d**4
    if (alpha_0 + rise / d).min() <= 0 or decay.min() <= 0:
        raise InstrumentError(f"{here}: rise or decay are not positive over its times of flight.")
    original = back_to_back(start.with_parameters(alpha=rise), alpha_0, "textbook")
    if alpha_0:
        return fitted_bank(original, start, d, name)
    return fitted_if_different(OriginalBank(start, original, d), name)


def _bank_of_two_kinds(
    start: Instrument, v: Mapping[str, float], d: NDArray[np.float64], here: str, name: str
) -> OriginalBank:
    """Return the bank of profile function 10, of epithermal and thermal neutrons."""
    if missing := [key for key in _OF_TWO_KINDS if key not in v]:
        raise InstrumentError(f"{here}: NPROF 10 needs {', '.join(missing)} (ZD2TOT and ALFBT).")

    def mean(
        x: NDArray[np.float64], epithermal: NDArray[np.float64], thermal: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        share = erfc(v["width"] * (v["x-cross"] - 1 / x)) / 2
        return np.asarray(share * epithermal + (1 - share) * thermal)

    def tof(x: NDArray[np.float64]) -> NDArray[np.float64]:
        thermal = v["zerot"] + v["dtt1t"] * x - v["dtt2t"] / x
        return mean(x, v.get("zero", 0.0) + v["dtt1"] * x, thermal)

    def shape(x: NDArray[np.float64]) -> PeakShape:
        rise, decay = (
            mean(x, v[zero] + v.get(linear, 0.0) * x, v[f"{zero}t"] - v[f"{linear}t"] / x)
            for zero, linear in (("alph0", "alph1"), ("beta0", "beta1"))
        )
        widths = peak_shape(start, x, size=np.inf, microstrain=0.0)
        return widths._replace(rise=1 / rise, decay=1 / decay)

    if not (min(tof(d).min(), shape(d).rise.min(), shape(d).decay.min()) > 0):
        raise InstrumentError(f"{here}: rise or decay are not positive over its times of flight.")
    return bank_of_functions(start, d, (tof, shape), name, "textbook")


def _columns(table: list[list[float]], here: str) -> tuple[NDArray[np.float64], PeakShape]:
    if len(table) < 4 or {len(row) for row in table} != {6}:
        raise InstrumentError(
            f"{here}: a table of peak shapes needs four lines or more, of six numbers (d, Sigma^2, "
            f"Gamma, Alpha, Beta, Shift)."
        )
    d, variance, fwhm, rise, decay, shift = np.array(sorted(table)).T
    if shift.any():
        raise InstrumentError(f"{here}: the table shifts peaks, which is not converted.")
    positive = np.array([d, variance, rise, decay])
    if not (np.isfinite(table).all() and positive.min() > 0 and (np.diff(d) > 0).all()):
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
