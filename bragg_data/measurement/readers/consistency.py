"""Signs of damage in a profile: what contradicts the rest of the file, as warnings."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.instrument.diffractometer import DIFC_PER_METRE

_STEP = 0.05  # of a step: times that are off by less are rounded
_NEIGHBOURS = 4  # steps on each side with which one is compared
# Share of odd steps, and usual difference of steps, beyond which an axis has no regularity.
_IRREGULAR, _ROUGH = 0.25, 0.1
_OF_COUNTS = 0.02  # relative difference of a variance from a constant times the intensity
_NEARLY_ALL = 0.9
_NEGATIVE = 5.0  # standard deviations
_LONGEST = 1e6  # µs: no diffractometer's slowest neutrons need a second
_BELOW = 6.0  # standard deviations below all of the four nearest points: peaks only stand out
_BINS = 4.0  # by which the first time may be off its record, where Mantid rounds
_GROWTH = 0.02  # relative difference of steps from those of the record
_NOMINAL = 0.02  # relative difference of difC from path and angle, from which it was calculated


def warnings_of_axis(x: Array, unit: str) -> list[str]:
    """Warn of steps (ascending values, (n,)) that differ from those on both of their sides.

    Binnings are linear, logarithmic, or change from one to another: a step is like its neighbours
    on one side at least. An axis without such regularity is not checked.
    """
    steps = np.diff(x)
    if len(steps) < 4 * _NEIGHBOURS or steps.min() <= 0:
        return []
    n, warnings = len(x), []
    if unit == "µs" and x[-1] > _LONGEST:
        warnings.append(f"Times of flight reach {x[-1] / 1e6:.2g} s: check the unit of the axis.")
    for ideal in (np.linspace(x[0], x[-1], n), np.geomspace(x[0], x[-1], n)):
        if (np.abs(x - ideal)[:-1] < _STEP * steps).all():
            return warnings
    log = np.log(steps)
    padded = np.pad(log, _NEIGHBOURS, mode="reflect")
    windows = np.median(np.lib.stride_tricks.sliding_window_view(padded, _NEIGHBOURS), axis=1)
    before, after = windows[: len(log)], windows[_NEIGHBOURS + 1 :]
    of_sides = [log - before, log - after, log - (before + after) / 2]
    apart = np.min(np.abs(of_sides), axis=0)
    usual = float(np.median(apart))
    odd = (apart > max(_STEP, 8 * usual)) & (usual < _ROUGH)
    odd[-1] &= log[-1] > before[-1]  # the last bin of a binning may be cut off
    if not odd.any() or odd.mean() > _IRREGULAR:
        return warnings
    first = int(np.argmax(odd))
    return [
        *warnings,
        f"Steps of the axis are irregular at {odd.sum()} of {len(steps)} places, first between "
        f"{x[first]:.6g} and {x[first + 1]:.6g} {unit}: are lines missing or damaged?",
    ]


def warnings_of_values(x: Array, y: Array, sigma: Array | None) -> list[str]:
    """Warn of values (n,) that are no numbers, too negative, or contradict the counting statistics.

    Where variances are proportional to intensities nearly everywhere, others are odd.
    """
    missing = ~np.isfinite(y)
    if sigma is not None:
        missing |= ~np.isfinite(sigma) | (sigma < 0)
    warnings = []
    if missing.any():
        warnings.append(
            f"{_points(missing, x)} have no number as intensity or a negative standard deviation: "
            f"they were left out."
        )
    if sigma is None:
        sigma = np.sqrt(np.abs(y))
    with np.errstate(all="ignore"):
        negative = (y < -_NEGATIVE * sigma) & (sigma > 0) & ~missing
        counted = (y > 0) & (sigma > 0) & ~missing
        ratio = sigma**2 / y
    if negative.any():
        warnings.append(
            f"{_points(negative, x)} are negative by more than {_NEGATIVE:g} standard deviations: "
            f"check whether their signs are right."
        )
    if len(y) > 2 * _NEIGHBOURS:
        low = np.full(len(y), np.inf)
        noise = np.zeros(len(y))
        for shift in (-2, -1, 1, 2):
            low = np.minimum(low, np.roll(y, shift))
            noise = np.maximum(noise, np.roll(sigma, shift))
        below = (y < low - _BELOW * noise) & (noise > 0) & ~missing & (sigma > 0)
        below[[0, 1, -2, -1]] = False
        if below.any():
            warnings.append(
                f"{_points(below, x)} lie far below all of their neighbours: digits may be missing."
            )
    if counted.any():
        usual = float(np.median(ratio[counted]))
        odd = counted & (np.abs(ratio / usual - 1) > _OF_COUNTS)
        if 0 < odd.sum() <= (1 - _NEARLY_ALL) * counted.sum():
            warnings.append(
                f"{_points(odd, x)} have standard deviations that are not the roots of their "
                f"counts, as those of all others are: check these lines of the file."
            )
    return warnings


def _points(rows: Mask, x: Array) -> str:
    first = f"{x[int(np.argmax(rows))]:.6g}"
    return f"{rows.sum()} of {len(x)} points (the first one at {first})"


@np.errstate(all="ignore")
def warnings_of_binning(times: Array, binning: str, c: Sequence[float]) -> list[str]:
    """Warn of times (n,) in µs that are not those of their ``BANK`` record's coefficients c."""
    if len(times) < 3 or not 0 < times[0] < times[-1]:
        return []
    times = times * next((f for f in (1.0, 1e3, 1e6) if times[-1] * f > 1000), 1.0)  # ms, s
    if binning == "SLOG" and len(c) > 2:
        start, growth, stop = c[0], float(np.log1p(c[2])), c[1]
    elif binning == "RALF" and len(c) > 3:
        start, growth, stop = c[0] / 32, float(np.log1p(c[3])), 0.0
    elif binning in ("CONS", "CONST", "COND") and len(c) > 1:
        start, growth, stop = c[0], 0.0, 0.0
    else:
        return []
    steps = np.diff(times) if growth == 0 else np.diff(np.log(times))
    step = float(np.median(steps))
    expected = growth or c[1]
    off = abs(times[0] - start) > _BINS * (step if growth == 0 else step * times[0])
    off |= not abs(step - expected) < _GROWTH * abs(expected)
    if stop:
        off |= not abs(np.log(times[-1] / stop)) <= 3 * step  # nor where it is no number
    if not off:
        return []
    return [
        f"Times from {times[0]:.6g} to {times[-1]:.6g} µs are not those of the bank's record "
        f"({binning} {' '.join(f'{v:g}' for v in c)}): check that the file is complete."
    ]


def warnings_of_header(header: Mapping[str, str]) -> list[str]:
    """Warn of flight path, angle and difC of a header that contradict each other."""
    try:
        path, angle, difc = (float(header[k]) for k in ("total flight path", "two_theta", "difc"))
    except (KeyError, ValueError):
        return []
    expected = DIFC_PER_METRE * path * abs(math.sin(math.radians(angle / 2)))
    if abs(difc - expected) <= _NOMINAL * expected:
        return []
    return [
        f"The header contradicts itself: a flight path of {path:g} m and 2θ {angle:g}° give difC "
        f"{expected:.1f}, and it has {difc:g}."
    ]
