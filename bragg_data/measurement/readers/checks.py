"""What every reader does last: unit, bins, the checks that every profile has to pass, and warnings.

The warnings are signs of damage: what contradicts the rest of the file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.instrument.diffractometer import DIFC_PER_METRE
from bragg_data.measurement.readers import axis
from bragg_data.measurement.readers.common import MINIMUM_POINTS, Profile, ProfileError, Unit

_LARGEST = 1e30  # beyond this sums of squares overflow: no detector counts so much
_LARGEST_TOF = 1e7  # µs; ten seconds
_SMALLEST_STEP = 1e-6  # µs; no clock is finer, and a density over less overflows
_SMALLEST_STEP_OF_D = 1e-9  # Å
_STEP = 0.05  # of a step: times that are off by less are rounded
_NEIGHBOURS = 4  # steps on each side with which one is compared
# Share of odd steps, and usual difference of steps, beyond which an axis has no regularity.
_IRREGULAR, _ROUGH = 0.25, 0.1
_OF_COUNTS = 0.02  # relative difference of a variance from a constant times the intensity
_NEARLY_ALL = 0.9
_NEGATIVE = 5.0  # standard deviations
_LONGEST = 1e6  # µs: no diffractometer's slowest neutrons need a second
_SHORTEST = 1e3  # µs: nor are all of its neutrons so fast
_BELOW = 6.0  # standard deviations below all of the four nearest points: peaks only stand out
_BINS = 4.0  # by which the first time may be off its record, where Mantid rounds
_GROWTH = 0.02  # relative difference of steps from those of the record
_NOMINAL = 0.02  # relative difference of difC from path and angle, from which it was calculated


@dataclass(frozen=True, eq=False)
class RawProfile:
    """The columns of a file, each of shape (n,), and what the file says of them."""

    path: Path
    x: Array
    intensity: Array
    sigma: Array | None  # standard deviation; None: to be estimated
    bank: int | None = None
    title: str = ""
    header: dict[str, str] = field(default_factory=dict)
    format: str = "arrays"  # as the reader calls it
    sigma_known: bool = True  # whether `sigma`, if there is one, is the file's
    declared: axis.Declared | None = None  # by names and header
    counts: bool = False  # in bins, not points of a density
    edges: bool = False  # x are the lower edges of bins
    maybe_edges: bool = False  # x were taken as centres, but may be edges
    maybe_centres: bool = False  # x were taken as lower edges, but may be centres
    computed: bool = False  # x are not in the file, but follow from a rule in it
    warnings: tuple[str, ...] = ()


def histogram(raw: RawProfile, x: Array, values: Array, errors: Array | None) -> RawProfile:
    """Return a spectrum over points, or over the n + 1 edges of its bins."""
    good = np.isfinite(x)  # spectra of unequal lengths are padded
    edges = len(x) == len(values) + 1
    if edges:
        x, n = x[good], max(int(good.sum()) - 1, 0)
        # The last of n + 1 lower edges has no bin behind it.
        values = np.append(values[:n], 0.0)
        errors = None if errors is None else np.append(errors[:n], 0.0)
    else:
        x, values = x[good], values[good]
        errors = None if errors is None else errors[good]
    return replace(raw, x=x, intensity=values, sigma=errors, edges=edges)


def checked_profile(raw: RawProfile, requested: Unit | None = None) -> Profile:
    """Return the columns of a file as a :class:`Profile`, or raise a ProfileError.

    Times become those of bin centres in µs, Q becomes d (intensities stay as they are), and counts
    are divided by the width of their bins. ``requested`` is the unit that replaces the file's.
    """
    intensity, sigma = raw.intensity, raw.sigma
    where = str(raw.path) if raw.bank is None else f"{raw.path}, bank {raw.bank},"
    if len(raw.x) < MINIMUM_POINTS:
        raise ProfileError(f"{where} has {len(raw.x)} points; it needs at least {MINIMUM_POINTS}.")
    unit, inferred = axis.unit_of(raw.x, raw.declared, requested, where)
    with np.errstate(over="ignore"):  # refused below
        x = raw.x * axis.MICROSECONDS.get(unit, 1.0)
    if problem := _problem_of_axis(x, unit):
        raise ProfileError(f"{where} {problem}")
    missing = ~np.isfinite(intensity)
    if sigma is not None:
        missing |= ~np.isfinite(sigma)
    if missing.mean() > 0.5:
        raise ProfileError(
            f"{where} has no number as intensity (or its standard deviation) at {missing.sum()} of "
            f"{len(x)} points."
        )
    doubts = warnings_of_values(x, intensity, sigma)
    if not raw.computed:
        doubts += warnings_of_axis(x, "µs" if unit in axis.MICROSECONDS else unit)
    if unit in axis.MICROSECONDS and x[-1] < _SHORTEST:
        doubts.append(f"Times of flight end at {x[-1]:g} µs: check the unit of the axis.")
    doubts += warnings_of_header(raw.header)
    intensity = np.where(missing, 0.0, intensity)
    if not intensity.any():
        raise ProfileError(f"{where} holds no intensity: all {len(x)} values are zero.")
    if sigma is not None and not (sigma > 0).any():
        doubts.append("All standard deviations are zero: those of counting statistics are used.")
        sigma = None
    sigma_known = raw.sigma_known and sigma is not None
    if sigma is None:
        positive = intensity[intensity > 0]
        if not len(positive):
            raise ProfileError(f"{where} holds no positive intensity.")
        sigma = np.sqrt(np.maximum(intensity, positive.min()))
    sigma = np.where(missing | (sigma < 0), 0.0, sigma)
    if max(np.abs(intensity).max(), sigma.max()) > _LARGEST:
        raise ProfileError(f"{where} has an intensity over {_LARGEST:g}: no detector reaches it.")
    by_d = 2 * np.pi / x if unit == "Q" else x  # widths of d make counts the density of a peak
    if raw.edges:
        width = np.abs(np.diff(by_d))
        x, intensity, sigma = x[:-1] + np.diff(x) / 2, intensity[:-1], sigma[:-1]
    elif raw.counts:
        width = np.abs(np.gradient(by_d))
    if raw.counts:
        intensity, sigma = intensity / width, sigma / width
    if unit == "Q":  # descending with d
        x, intensity, sigma = 2 * np.pi / x[::-1], intensity[::-1], sigma[::-1]
    return Profile(
        tof=x,
        intensity=intensity,
        sigma=sigma,
        bank=raw.bank,
        title=raw.title,
        two_theta=_number_of(raw.header, "two_theta", 180.0, signed=True),
        difc=_number_of(raw.header, "difc", 1e6),
        header=raw.header,
        source=str(raw.path),
        unit="d" if unit in ("d", "Q") else "us",
        format=raw.format,
        axis=unit,
        sigma_known=sigma_known,
        maybe_edges=raw.maybe_edges,
        maybe_centres=raw.maybe_centres,
        warnings=(*raw.warnings, *inferred, *doubts),
    )


def _number_of(
    header: dict[str, str], key: str, largest: float, *, signed: bool = False
) -> float | None:
    try:
        value = float(header[key])
    except (KeyError, ValueError):
        return None
    return value if 0 < (abs(value) if signed else value) < largest else None


def _problem_of_axis(x: Array, unit: Unit) -> str:
    if not np.isfinite(x).all():
        return "has a time of flight that is not a number."
    name, smallest = ("", _SMALLEST_STEP_OF_D) if unit in ("d", "Q") else (" µs", _SMALLEST_STEP)
    ends = f"runs from {x.min():g} to {x.max():g}"
    if name and x.max() < 100:
        return f"{ends}: time of flight in µs is expected (not ms, Å or degrees)."
    if name and (x.min() <= 0 or x.max() > _LARGEST_TOF):
        return f"{ends} µs; times of flight lie between 0 and {_LARGEST_TOF:g} µs."
    if not name and (x.min() <= 0 or x.max() > 500):
        return f"{ends}; {unit} lies between 0 and 500."
    row = int(np.argmin(np.diff(x) > smallest))
    if x[row + 1] - x[row] > smallest:
        return ""
    kind = "times of flight" if name else f"values of {unit}"
    return f"has {kind} that do not ascend: {x[row + 1]:g}{name} follows {x[row]:g}{name} at " + (
        f"point {row + 2}."
    )


def profile_from_arrays(
    tof: Array,
    intensity: Array,
    sigma: Array | None = None,
    *,
    bank: int | None = None,
    two_theta: float | None = None,
) -> Profile:
    """Return a profile from arrays (n,), checked and completed as the columns of a file.

    Times of flight in µs, ascending; density per µs; its standard deviation, estimated from
    counting statistics if left out; scattering angle in degrees. A ProfileError is raised if the
    arrays differ in length, or are no profile.
    """
    columns = (tof, intensity) if sigma is None else (tof, intensity, sigma)
    if {column.shape for column in columns} != {(len(tof),)}:
        shapes = ", ".join(str(column.shape) for column in columns)
        raise ProfileError(f"A profile needs arrays of one length and dimension; got {shapes}.")
    header = {} if two_theta is None else {"two_theta": repr(two_theta)}
    raw = RawProfile(Path("arrays"), tof, intensity, sigma, bank=bank, header=header)
    return checked_profile(raw, "us")


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
        with np.errstate(over="ignore"):  # of a damaged deviation of 1e308
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
    odd = False
    if binning == "RALF" and c[0] == c[2]:  # its first step is given, too, and no bin is cut off
        first = c[0] * c[3]
        odd = abs(c[1] - first) > max(1.0, 0.05 * first) or abs(steps[-1] / step - 1) > 0.08
    expected = growth or c[1]
    off = odd or abs(times[0] - start) > _BINS * (step if growth == 0 else step * times[0])
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
