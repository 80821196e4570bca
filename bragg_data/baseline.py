"""The paper's preprocessing of measured profiles, to the letter (its section V-C1).

Kept so that the paper can be repeated; the program itself uses
:func:`bragg_data.preprocessing.prepare_measured`. docs/explanation/paper.md compares them.
"""

from typing import NamedTuple

import numpy as np
from numpy.polynomial.chebyshev import chebvander

from bragg_data.arrays import Array, Indices, Mask
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.measurement.readers.common import MINIMUM_POINTS, Profile
from bragg_data.measurement.resampling import measured_tof, resample_to_grid
from bragg_data.preprocessing import minmax

DEGREE = 2  # of the Chebyshev polynomial (section V-C1 of the paper)
AREA_TOLERANCE = 1e-4  # of the areas' difference, relative to that under the profile (V-C1)

# A threshold leaves at least this share of the points below it, and as many above: at either end
# the condition is met for no reason.
LEAST_SHARE = 0.05

_REMEDY = "Use prepare_measured, whose background follows the profile."


class BackgroundError(ValueError):
    """A profile for which the paper's background does not exist."""


class PaperBackground(NamedTuple):
    """The background of one profile, by the paper's condition, in the profile's units."""

    background: Array  # the Chebyshev polynomial at the points, shape (n,)
    threshold: float  # the signal threshold t: the polynomial is fitted to points below it


def paper_background(tof: Array, intensity: Array) -> PaperBackground:
    r"""Return the background by the paper: a parabola with the area of the clipped profile.

    .. math:: p_t = \arg\min_{p} \sum_{i:\, y_i < t} (y_i - p(T_i))^2, \quad
              p(T) = \sum_{k=0}^2 c_k T_k(x(T)), \qquad
              \Big|\int \min(y, t) - \int p_t\Big| < 10^{-4} \int \min(y, t)

    with Chebyshev polynomials of the first kind, the window mapped to x of −1 … 1, and both areas
    over the whole window by the trapezoidal rule (section V-C1); of several thresholds the highest
    that leaves :data:`LEAST_SHARE` of the points on either side. docs/explanation/paper.md explains
    this reading, and why half of all profiles have no such threshold.

    Times of flight (n,) ascend, in µs; at least 20. The window is their span: leave out points that
    hold no information (dead detectors), over which the areas then go in straight lines. Raises a
    BackgroundError if no threshold makes the areas agree, saying how close they come, or the
    profile is constant, too short, or no numbers.
    """
    tof, y = np.asarray(tof, dtype=np.float64), np.asarray(intensity, dtype=np.float64)
    _refuse(tof, y)
    step = np.diff(tof)
    width = (np.append(step, 0.0) + np.append(0.0, step)) / 2  # of the trapezoidal rule
    unit = float(np.abs(y).max())
    basis = chebvander(2 * (tof - tof[0]) / (tof[-1] - tof[0]) - 1, DEGREE)
    scaled = y / unit
    lower, upper, difference = _pieces(basis, width, scaled)
    crosses = difference[:, 0] * difference[:, 1] < 0
    closest = np.where(crosses, 0.0, np.abs(difference).min(axis=1, initial=np.inf))
    # With some slack, as these come from normal equations; bisection looks closely.
    for piece in np.flatnonzero(closest < 1.01 * AREA_TOLERANCE)[::-1]:
        low, high = float(lower[piece]), float(upper[piece])
        for _ in range(60):
            threshold = (low + high) / 2
            if not low < threshold < high:
                break
            below = scaled < threshold
            polynomial = basis @ np.linalg.lstsq(basis[below], scaled[below], rcond=None)[0]
            area = width @ np.minimum(scaled, threshold)
            error = float(_relative(area - width @ polynomial, area))
            if abs(error) < AREA_TOLERANCE:
                return PaperBackground(polynomial * unit, threshold * unit)
            low, high = (low, threshold) if error > 0 else (threshold, high)
    raise BackgroundError(_why_none(closest, difference, upper * unit, y))


def _pieces(basis: Array, width: Array, y: Array) -> tuple[Array, Array, Array]:
    """Return the pieces of the threshold's axis between neighbouring data, ascending.

    On a piece the points below t are the same, so the polynomial is fixed and the area under
    min(y, t) grows linearly. Returned are the lower and upper end of each piece that leaves enough
    points on either side, (pieces,), and the areas' relative difference at both ends, (pieces, 2).
    """
    n, whole = len(y), width @ basis
    order = np.argsort(y, kind="stable")
    y, width, basis = y[order], width[order], basis[order]
    least = max(DEGREE + 1, int(np.ceil(LEAST_SHARE * n)))
    count = np.arange(least, n - least + 1)
    count = count[y[count] > y[count - 1]]
    # All fits at once: normal equations, summed up along the sorted points.
    products = np.cumsum(basis[:, :, None] * basis[:, None, :], axis=0)[count - 1]
    moments = np.cumsum(basis * y[:, None], axis=0)[count - 1]
    # Least norm instead of an error where the points below leave the parabola open.
    coefficients = (np.linalg.pinv(products, hermitian=True) @ moments[..., None])[..., 0]
    polynomial = coefficients @ whole
    below = np.cumsum(width * y)[count - 1]
    above = width.sum() - np.cumsum(width)[count - 1]
    ends = np.stack([y[count - 1], y[count]], axis=1)
    area = below[:, None] + above[:, None] * ends
    return ends[:, 0], ends[:, 1], _relative(area - polynomial[:, None], area)


def _relative(difference: Array, area: Array) -> Array:
    """Divide by |area|; infinite where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = difference / np.abs(area)
    return np.where(np.isfinite(ratio), ratio, np.inf)


def _why_none(closest: Array, difference: Array, threshold: Array, y: Array) -> str:
    if not len(closest) or not np.isfinite(closest).any():
        return (
            f"No threshold leaves {LEAST_SHARE:.0%} of the {len(y)} points on either side: the "
            f"intensities are nearly all equal. {_REMEDY}"
        )
    best = int(np.argmin(closest))
    if difference.min() < 0 < difference.max():
        reason = "their difference changes sign only in a jump, where a point enters the fit"
    else:
        side = "larger" if difference.max() > 0 else "smaller"
        reason = f"that under the clipped profile is {side} at every threshold"
    return (
        f"No signal threshold makes the areas under the clipped profile and under the Chebyshev "
        f"polynomial agree to {AREA_TOLERANCE:g}: {reason}. At best they differ by "
        f"{closest[best]:.1e}, at {threshold[best]:.4g} with "
        f"{(y < threshold[best]).mean():.0%} of the points below. {_REMEDY}"
    )


def _refuse(tof: Array, y: Array) -> None:
    if tof.shape != y.shape or tof.ndim != 1 or len(tof) < MINIMUM_POINTS:
        raise BackgroundError(
            f"A background needs times and intensities of one profile, at least {MINIMUM_POINTS} "
            f"points; found shapes {tof.shape} and {y.shape}."
        )
    if not (np.isfinite(tof).all() and np.isfinite(y).all() and (np.diff(tof) > 0).all()):
        raise BackgroundError(
            "A background needs finite numbers and ascending times of flight. Leave out points "
            "that hold no information."
        )
    if y.min() == y.max():
        raise BackgroundError(
            f"The profile is constant ({y[0]:g}), so no threshold parts signal and background. "
            f"Check the file and its bank."
        )


def nearest_points(tof: Array, grid_tof: Array) -> Indices:
    """Return the measured point nearest to each time of flight of a grid, shape (points,) (V-C1).

    Both in µs, ``tof`` ascending. Of two points that are equally near, the earlier; beyond the ends
    the last point, however far: the caller checks the distance.
    """
    right = np.clip(np.searchsorted(tof, grid_tof), 1, len(tof) - 1)
    return np.where(grid_tof - tof[right - 1] <= tof[right] - grid_tof, right - 1, right)


def paper_preprocessed(
    profile: Profile, grid: TofGrid, instrument: Instrument, calibration: Instrument | None
) -> tuple[Array, Mask]:
    """Return a measured profile as the paper gives it to its models, and where it is covered.

    The background (:func:`paper_background`) is subtracted on the measured axis; each point of the
    grid takes the nearest measured point; minimum and maximum become 0 and 1, and the rest is
    clipped to that. Both results have shape (points,); values that are not covered are 0. Points
    with ``sigma`` 0 (dead or masked detectors) take no part: the window of the areas is the span of
    the others. The other arguments are those of
    :func:`bragg_data.measurement.resampling.resample_to_grid`.

    Raises a BackgroundError if the paper's condition has no answer on this profile, a ProfileError
    if it covers too little of the grid or the calibration does not grow with d, a
    PreprocessingError if nothing but the background is left on the grid.
    """
    known = profile.sigma > 0
    # The same refusals and the same coverage as for the project's own preprocessing.
    gridded = resample_to_grid(profile, grid, instrument, calibration)
    try:
        result = paper_background(profile.tof[known], profile.intensity[known])
    except BackgroundError as error:
        raise BackgroundError(f"{profile.name}: {error}") from error
    signal = np.zeros(len(profile.tof))
    signal[known] = profile.intensity[known] - result.background
    nearest = nearest_points(profile.tof, measured_tof(grid.tof, instrument, calibration))
    covered = gridded.covered & known[nearest]
    values = np.zeros(grid.points)
    values[covered] = np.clip(minmax(signal[nearest][covered]), 0.0, 1.0)
    return values, covered
