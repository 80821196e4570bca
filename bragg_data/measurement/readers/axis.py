"""The axis of a profile: its unit, as a file names it or as its values show, and angles.

Angles are refused: they are of constant wavelength, and read as time of flight they would give
some cell without any sign that it is wrong.
"""

import re
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from bragg_data.arrays import Array
from bragg_data.measurement.readers.common import ProfileError, Unit

Declared = Literal["us", "ms", "s", "d", "Q", "time", "angle", "other"]
"""What a file calls its axis: a unit, a time, an angle, or what cannot be converted."""

MICROSECONDS = {"us": 1.0, "ms": 1e3, "s": 1e6}
_UNITS: dict[str, Unit] = {unit: unit for unit in get_args(Unit)}
_SHORTEST_END = 1000.0  # µs: every measured range of time of flight ends later

_BASES: dict[str, Declared] = {
    **dict.fromkeys(("tof", "t", "time", "timeofflight", "flighttime"), "time"),
    **dict.fromkeys(("tofus", "timeus", "tofmus", "tofµs", "us", "µs", "microseconds"), "us"),
    **dict.fromkeys(("tofms", "timems", "ms", "msec", "milliseconds"), "ms"),
    **dict.fromkeys(("tofs", "seconds", "sec"), "s"),
    **dict.fromkeys(("d", "dspacing", "dspace", "dvalue", "da"), "d"),
    **dict.fromkeys(("q", "momentumtransfer", "qa1"), "Q"),
    **dict.fromkeys(
        ("2theta", "twotheta", "2th", "tth", "2thetadeg", "angle", "scatteringangle", "2θ"), "angle"
    ),
    **dict.fromkeys(("degree", "degrees", "deg", "centidegrees", "theta"), "angle"),
    **dict.fromkeys(("wavelength", "lambda", "energy", "energymev", "ev", "channel"), "other"),
}
_TIMES: dict[str, Declared] = {
    **dict.fromkeys(("us", "µs", "usec", "musec", "microsec", "microsecond", "microseconds"), "us"),
    **dict.fromkeys(("ms", "msec", "millisec", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("s", "sec", "second", "seconds"), "s"),
}
_NAMED_AXIS = re.compile(
    r"(?:x[ _-]?axis(?: unit)?(?: is)?|x[ _-]?units?|scattering variable)\s*[:=]\s*([^,;]+)",
    re.IGNORECASE,
)
_OF_TIME = re.compile(
    r"time[ -]?of[ -]?flight|\btof\b|\bdifc\b|flight path|\busec\b|microsec", re.IGNORECASE
)


def declared_by_name(name: str) -> Declared | None:
    """Return what the name of a column is, with its unit in brackets or after a slash, if any."""
    # Files are decoded as Latin-1: UTF-8's µ, θ and Å appear as two characters.
    text = name.strip("\"' ").lower()
    for garbled, letter in (("âµ", "µ"), ("î¼", "µ"), ("î¸", "θ")):
        text = text.replace(garbled, letter)
    match = re.fullmatch(r"([^\[\](){}/]*)(?:[\[({/]\s*([^\])}]*)[\])}]?)?\s*", text)
    if match is None:
        return None
    base = _BASES.get(re.sub(r"[\s_.-]+", "", match[1]))
    unit = re.sub(r"[\s.]+", "", match[2] or "")
    return _TIMES.get(unit, base) if base == "time" else base


def declared_by_header(lines: Iterable[str]) -> Declared | None:
    """Return what a header's lines say of the axis."""
    declared: Declared | None = None
    for line in lines:
        if match := _NAMED_AXIS.search(line):
            declared = declared_by_name(match[1]) or declared
        elif declared is None and _OF_TIME.search(line):
            declared = "time"
    return declared


def unit_of(
    x: Array, declared: Declared | None, requested: Unit | None, where: str
) -> tuple[Unit, tuple[str, ...]]:
    """Return the unit of an axis, and warnings on how it was inferred.

    ``declared`` is the file's, ``requested`` the user's, which has precedence. A ProfileError is
    raised for angles, and where several units are possible.
    """
    if requested is not None:
        return requested, ()
    low, high = float(x.min()), float(x.max())
    if declared == "other":
        raise ProfileError(
            f"{where} is over neither time of flight nor d-spacing nor Q; time of flight in µs is "
            f"expected. If its axis has another name, give the unit with --x-unit."
        )
    if declared == "angle":
        scale = 0.01 if high > 180 else 1.0
        raise _constant_wavelength(where, scale * low, scale * high)
    if declared is not None and declared in _UNITS:
        return _UNITS[declared], ()
    if declared is None and (degree := _degrees(x)) is not None:
        raise _constant_wavelength(
            where,
            degree * low,
            degree * high,
            " Its regular steps show it; if the axis is another one, name it with --x-unit.",
        )
    if not high < _SHORTEST_END:  # nor where it is not a number, which is refused later
        return "us", ()
    unit: Unit | None = None
    if high < 0.5:
        unit = "s"
    elif high > 100 or (declared == "time" and high > 1):
        unit = "ms"
    if unit is None:
        raise ProfileError(
            f"{where} runs from {low:g} to {high:g}: time of flight in µs is expected. Name the "
            f"unit of the axis with --x-unit (ms, s, d or Q)."
        )
    return unit, (
        f"The file does not name the unit of its times: from {low:g} to {high:g} they were taken "
        f"as {unit}, as times of flight in µs end beyond {_SHORTEST_END:g}. Name another --x-unit.",
    )


def _constant_wavelength(where: str, low: float, high: float, reason: str = "") -> ProfileError:
    return ProfileError(
        f"{where} is constant wavelength, 2θ {low:.4g}–{high:.4g}°; only time of flight is "
        f"supported.{reason}"
    )


def _degrees(x: Array) -> float | None:
    """Return the size in degrees of an axis's unit, where its values look like scattering angles.

    In regular steps of at most 1°, over at least 20° and up to 180°, in degrees or hundredths (as
    GSAS has them). Binnings of time of flight are nearly all logarithmic, and those in regular
    steps end beyond 18,000 µs; a file that does not is read with --x-unit us.
    """
    if not (np.abs(x) < 1e9).all():
        return None
    low, high = x[0], x[-1]
    step = (high - low) / (len(x) - 1)
    regular = np.abs(x - np.linspace(low, high, len(x))).max() <= max(0.6 * step, 1e-9)
    if not regular or step <= 0:
        return None
    for scale in (1.0, 0.01):
        if scale * high <= 180 and scale * (high - low) >= 20 and scale * step <= 1:
            return scale
    return None
