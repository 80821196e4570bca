"""What every reader does last: unit, bins, and the checks that every profile has to pass."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array
from bragg_data.measurement.readers import axis, consistency
from bragg_data.measurement.readers.common import MINIMUM_POINTS, Profile, ProfileError, Unit

_LARGEST = 1e30  # beyond this sums of squares overflow: no detector counts so much
_LARGEST_TOF = 1e7  # µs; ten seconds
_SMALLEST_STEP = 1e-6  # µs; no clock is finer, and a density over less overflows
_SMALLEST_STEP_OF_D = 1e-9  # Å


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
        raise ProfileError(
            f"{where} has {len(raw.x)} points; a profile needs at least {MINIMUM_POINTS}."
        )
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
    doubts = consistency.warnings_of_values(x, intensity, sigma)
    if not raw.computed:
        doubts += consistency.warnings_of_axis(x, "µs" if unit in axis.MICROSECONDS else unit)
    doubts += consistency.warnings_of_header(raw.header)
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
        raise ProfileError(
            f"{where} has an intensity beyond {_LARGEST:g}: no detector counts so much."
        )
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
        raise ProfileError(
            f"A profile needs one-dimensional arrays of one length; their shapes are {shapes}."
        )
    header = {} if two_theta is None else {"two_theta": repr(two_theta)}
    raw = RawProfile(Path("arrays"), tof, intensity, sigma, bank=bank, header=header)
    return checked_profile(raw, "us")
