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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import takewhile

import numpy as np
from scipy.special import erfc

from bragg_data.arrays import Array
from bragg_data.instrument import conversion
from bragg_data.instrument.diffractometer import Instrument, InstrumentError, instrument_of_entries
from bragg_data.instrument.peak_shape import PeakShape, peak_shape

_IRF = re.compile(r"^[ \t]*NPROF[ \t]*[ \t=][ \t]*\d", re.MULTILINE)
_PCR = re.compile(r"^!\s*Job\s+Npr\b", re.MULTILINE)
_BANK = re.compile(r"^!.*\bBank\s+(\d+)(?![.\w])", re.MULTILINE)
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
_KEYWORDS = _SHAPES | {"NPROF": ("npr",), "TWOTH": ("2thetabank",)}
_KEYWORDS["TOFRG"] = "tof-min", "step", "tof-max"
_UNREAD = re.compile(r"LIST_|NPOINTS$|(WAVE|GEOM|ASYM|ABS|MUR)$")
_ORDERS = (  # of names, in comments and lines; a code may follow each of the positions
    ("dtt1", "dtt2", "dtt_1overd", "zero"),
    ("zero", "dtt1", "dtt2", "dtt_1overd", "2thetabank"),
    ("dtt1t", "dtt2t", "x-cross", "width", "zerot"),
    _POSITIONS["ZD2TOT"],
    *_SHAPES.values(),
    ("alph0", "beta0", "alph1", "kappa"),
)
_NAMES = {"code", *(name for order in _ORDERS for name in order)}
_OF_EVERY_PATTERN = {
    *(_ORDERS[1][:3] + _ORDERS[1][4:] + _SHAPES["SIGMA"] + _SHAPES["GAMMA"] + _SHAPES["ALFBE"]),
    *("tof-min", "tof-max"),
}
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[EDed][-+]?\d+)?", re.ASCII)
_LEAST_CODE = 10  # of a refined parameter: ten times its number, and a factor
_OF_PATTERN = "dtt1", "sigma-2", "gamma-2", "alph0"  # each names a line of a .pcr file
_OF_EPITHERMAL = "dtt1t", "alph0t"  # only with NPROF 10
_NAMED_LINES = {*_OF_PATTERN, *_OF_EPITHERMAL, "npr", "tof-min", "scale"}
_FAMILIES = re.compile(r"sigma-|gamma-|alpha?|beta|dtt")
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
_USED = _NAMES | {"npr", "tof-min", "tof-max", "sigma-q", "alphq", "betaq"}
_WITHOUT_COUNTERPART = "sigma-q", "alphq", "betaq"
_SAME_PATH = 0.4  # relative difference from which the flight paths of two banks contradict

_Values = dict[str, float]
_Notes = list[str]


def recognised(text: str) -> bool:
    """Return whether a text is a file of FullProf, by its keywords and comments."""
    return bool(_IRF.search(text) or _PCR.search(text))


def read_fullprof_banks(text: str, where: str) -> list[conversion.OriginalBank]:
    """Read the banks of a file of FullProf; errors name it as ``where``.

    The banks of a ``.pcr`` file are its patterns, with the widths of its first phase. Raises an
    InstrumentError if it is of constant wavelength, lacks a value, or has peaks that cannot be
    converted.
    """
    if _IRF.search(text):
        head, *blocks = re.split(r"(?m)^(?=[ \t]*NPROF[ \t=])", text)
        numbers = [int(n) for n in _BANK.findall(text)]
        notes = []
        if not len(set(numbers)) == len(numbers) == len(blocks):
            numbers = list(range(1, len(blocks) + 1))
            notes = ["no comment numbers each bank (! Bank 1): they are numbered in their order."]
        if not re.fullmatch(r"\s*[^!\s].*\n([^\S\n]*(!.*)?\n)*", head):
            notes.append("one title has to be in the first line: the file may be cut off.")
        banks = [_irf_bank(*pair, where, notes) for pair in zip(numbers, blocks, strict=True)]
    else:
        patterns = _patterns(text, where)
        banks = [
            _with_notes(_bank_of_values(number, values, where), notes)
            for number, (values, notes) in enumerate(patterns, start=1)
        ]
    return [_with_doubt(bank, banks) for bank in banks]


def _with_doubt(
    bank: conversion.OriginalBank, banks: list[conversion.OriginalBank]
) -> conversion.OriginalBank:
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
    return conversion.with_warnings(bank, (*i.warnings, doubt))


def _irf_bank(number: int, block: str, where: str, notes: _Notes) -> conversion.OriginalBank:
    values, table, comment = _Values(), list[list[float]](), list[str]()
    here, notes = f"{where}, bank {number}", [*notes]
    points, seen = -1, []
    for at, line in enumerate(lines := [x for x in block.splitlines() if x.strip()]):
        words = line.split()
        if line.lstrip().startswith("!"):
            comment = [_CROSSINGS.get(w, w) for w in line.lower().replace("!", " ").split()]
        elif words and words[0][0].isalpha():
            key, *rest = re.sub(r"^(\s*\w+)\s*=", r"\1 ", line.partition("!")[0]).split()
            key, numbers = key.upper(), _numbers(rest)
            seen.append(key)
            if key == "END":
                if {*_KEYWORDS, "END"} & {x.upper().split()[0] for x in lines[at + 1 :] if x}:
                    notes.append(f"bank {number} has lines behind END, which are not read.")
                break
            if _UNREAD.match(key):
                points = int(min(numbers[0], 1e6)) if numbers and key[0] in "LN" else points
                continue
            names = _POSITIONS.get(key, _KEYWORDS.get(key, ()))
            if not names:
                notes.append(f"bank {number}: the keyword '{key[:20]}' is unknown, and not read.")
                continue
            if len(numbers) < len(rest) and not (key == "NPROF" and not numbers):
                bad = rest[len(numbers)][:20]
                raise InstrumentError(f"{here}: {bad!r} of {key} is no number.")
            named = "dtt1" in comment or "dtt1t" in comment
            if key in _POSITIONS and named and len(comment) != len(numbers):
                notes.append(f"bank {number}: {key} has {len(numbers)} of {len(comment)} values.")
            if key in _POSITIONS and len(comment) == len(numbers) and named:
                names = tuple(comment)
                _check_order(names, here)
            if key in _POSITIONS and len(numbers) > len(names):
                raise InstrumentError(
                    f"{where}, bank {number}, gives {len(numbers)} values for {key} without a "
                    f"comment that names them (! Dtt1 Dtt2 Dtt_1overd Zero)."
                )
            if (n := len(numbers)) != len(names) and key not in _POSITIONS:
                notes.append(f"bank {number}: {key} has {n} values where {len(names)} are read.")
            values |= dict(zip(names, numbers, strict=False))
        elif words:
            table.append(_numbers(words))
    needed = ("TOFRG", "TWOTH", "END", *(() if table else _SHAPES))[:6]
    if missing := [key for key in needed if key not in seen]:
        notes.append(f"bank {number} lacks {', '.join(missing)}: the file may be cut off.")
    if len(set(seen)) < len(seen):
        notes.append(f"bank {number} has a keyword twice: the last one was used.")
    if table and points not in (-1, len(table)):
        notes.append(f"bank {number} announces {points} points and has {len(table)}.")
    values.setdefault("npr", -1.0)
    return _with_notes(_bank_of_values(number, values, where, table), notes)


def _with_notes(bank: conversion.OriginalBank, notes: _Notes) -> conversion.OriginalBank:
    return conversion.with_warnings(bank, (*bank.instrument.warnings, *notes)) if notes else bank


def _check_order(names: Sequence[str], where: str) -> None:
    """Raise an InstrumentError if a comment names values that are unknown, or in another order."""
    read = [name for name in names if name != "code"]
    if not any(read == [name for name in order if name in read] for order in _ORDERS):
        raise InstrumentError(
            f"{where}: the comment '{' '.join(names)[:60]}' names the values unlike FullProf."
        )


def _patterns(text: str, where: str) -> list[tuple[_Values, _Notes]]:
    """Return the values of each pattern of a ``.pcr`` file, by the comments that name them."""
    named: dict[str, list[_Values]] = defaultdict(list)
    notes: _Notes = []
    for values in _named_values(text, where, notes):
        for name in (*_NAMED_LINES, "lambda1"):
            if name in values:
                named[name].append(values)
    if not named["dtt1"]:
        reason = "no comment names Zero and Dtt1, so the calibration cannot be read"
        if named["lambda1"]:
            reason = "constant wavelength; only time of flight is supported"
        raise InstrumentError(f"{where}: {reason}.")
    if not any("job" in values for values in named["npr"]):
        notes.append("no line of numbers follows the comment that names Job.")
    if len(named["scale"]) != len(named["sigma-2"]):
        notes.append("lines of Scale and of Sigma-2 differ in number.")
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
        for window in named["tof-min"][k : k + 1]:
            values |= {key: window[key] for key in ("tof-min", "tof-max") if key in window}
        missing = _OF_EVERY_PATTERN - {"beta1" if "kappa" in values else "", *values}
        lacks = f"bank {k + 1} lacks {', '.join(sorted(missing))}: zero, or what is usual, is used."
        patterns.append((values, [*notes, lacks] if missing else notes))
    return patterns


def _named_values(text: str, where: str, notes: _Notes) -> Iterator[_Values]:
    """Yield the numbers of each line that follows a comment, by the words of the comment.

    Doubts are added to ``notes``. Raises an InstrumentError if names are in another order.
    """
    lines = text.splitlines()
    for heading, line, codes in zip(lines, lines[1:], [*lines[2:], ""], strict=False):
        if not heading.startswith("!"):
            continue
        names = [_CROSSINGS.get(w, w) for w in heading[1:].partition("->")[0].lower().split()]
        if line.startswith("!"):
            if _NAMED_LINES & set(names):
                notes.append(f"no line of numbers follows '{heading[:60].strip()}'.")
            continue
        numbers = _numbers(line.split())
        over = len(numbers) - len(names)
        if {*_OF_PATTERN, *_OF_EPITHERMAL} & set(names):
            position = {"dtt1", "dtt1t"} & set(names)
            if position and "code" in names[::2]:
                raise InstrumentError(f"{where}: a code stands before its value: {heading[:60]}.")
            known = [index for index, name in enumerate(names) if name in _NAMES]
            _check_order(names[known[0] : known[-1] + 1], where)
            words = [] if position or codes.startswith("!") else codes.split()
            of_codes = _numbers(words)
            small = len(of_codes) < len(words) or any(0 < abs(c) < _LEAST_CODE for c in of_codes)
            given = [] if position else [number for number in numbers if number]
            unknown = [n for n in names if _FAMILIES.match(n) and n not in _USED]
            codes_only = given and all(n > _LEAST_CODE and n % 10 == 1 for n in given)
            if unknown or over or small or codes_only:
                notes.append(f"values and codes below '{heading[:60].strip()}' do not fit.")
        if ("npr" in names and over > 0) or ("scale" in names and over):
            notes.append(f"other values than names below '{heading[:60].strip()}'.")
        yield dict(zip(names, numbers, strict=False))


def _bank_of_values(
    number: int, values: Mapping[str, float], where: str, table: list[list[float]] | None = None
) -> conversion.OriginalBank:
    used = {name: value for name, value in values.items() if name in _USED}
    rows = tuple(map(tuple, table or []))
    window = values.get("tof-min", 0.0), values.get("tof-max", 0.0)
    bank = _converted(number, tuple(sorted(used.items())), rows, where)
    return replace(bank, window=window if 0 < window[0] < window[1] else None)


@lru_cache(maxsize=64)  # programs write other things of a refinement again than its instrument
def _converted(
    number: int,
    entries_read: tuple[tuple[str, float], ...],
    table: tuple[tuple[float, ...], ...],
    where: str,
) -> conversion.OriginalBank:
    values = dict(entries_read)
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
        return conversion.bank_of_table(start, *columns, "FullProf's table of shapes", "textbook")
    if "sigma-1" not in values or "alph0" not in values:
        raise InstrumentError(f"{here} has no peak shape (SIGMA and ALFBE, or a table).")
    window = np.array([values.get(name, 0.0) for name in ("tof-min", "tof-max")])
    d = conversion.spacings_between(window / start.difc, start.two_theta)
    name = f"FullProf's profile function {function} ({_FUNCTIONS[function]})"
    if function == 13:
        kappa = values.get("kappa", values.get("beta1", 0.0))
        moderator = alpha_0, rise, values.get("beta0", 0.0), kappa
        return conversion.bank_of_moderator(replace(start, moderator=moderator), d, name)
    if function == 10:
        return _bank_of_two_kinds(start, values, d, here, name)
    decay = start.beta_0 + start.beta_1 / d**4
    if (alpha_0 + rise / d).min() <= 0 or decay.min() <= 0:
        raise InstrumentError(f"{here}: rise or decay are not positive over its times of flight.")
    original = conversion.peaks_of(start.with_parameters(alpha=rise), alpha_0, "textbook")
    if alpha_0:
        return conversion.fitted_bank(original, start, d, name)
    return conversion.fitted_if_different(conversion.OriginalBank(start, original, d), name)


def _bank_of_two_kinds(
    start: Instrument, v: Mapping[str, float], d: Array, here: str, name: str
) -> conversion.OriginalBank:
    """Return the bank of profile function 10, of epithermal and thermal neutrons."""
    if missing := [key for key in _OF_TWO_KINDS if key not in v]:
        raise InstrumentError(f"{here}: NPROF 10 needs {', '.join(missing)} (ZD2TOT and ALFBT).")

    def mean(x: Array, epithermal: Array, thermal: Array) -> Array:
        share = erfc(v["width"] * (v["x-cross"] - 1 / x)) / 2
        return np.asarray(share * epithermal + (1 - share) * thermal)

    def tof(x: Array) -> Array:
        thermal = v["zerot"] + v["dtt1t"] * x - v["dtt2t"] / x
        return mean(x, v.get("zero", 0.0) + v["dtt1"] * x, thermal)

    def shape(x: Array) -> PeakShape:
        rise, decay = (
            mean(x, v[zero] + v.get(linear, 0.0) * x, v[f"{zero}t"] - v[f"{linear}t"] / x)
            for zero, linear in (("alph0", "alph1"), ("beta0", "beta1"))
        )
        widths = peak_shape(start, x, size=np.inf, microstrain=0.0)
        return widths._replace(rise=1 / rise, decay=1 / decay)

    if not (min(tof(d).min(), shape(d).rise.min(), shape(d).decay.min()) > 0):
        raise InstrumentError(f"{here}: rise or decay are not positive over its times of flight.")
    return conversion.bank_of_functions(start, d, (tof, shape), name, "textbook")


def _columns(table: tuple[tuple[float, ...], ...], here: str) -> tuple[Array, PeakShape]:
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
    plain = takewhile(_NUMBER.fullmatch, words)
    return [float(word.upper().replace("D", "E")) for word in plain]
