"""Named, versioned pure functions on profiles, the same ones in training and in inference.

Each takes profiles on the last axis, shape (n, points), and returns shape (n, points) (another
number of points where it crops). A model records the ``name@version`` of what it was trained on; a
change of a function's numbers is a new version; the old one stays.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from scipy.ndimage import binary_opening, median_filter

from bragg_data.arrays import Array, Mask

# Points cut off the ends (section IV-B of the paper: 2,496 of 2,807 points remain).
CROP_SHORT_TOF, CROP_LONG_TOF = 256, 55

# Weight of the baseline's curvature: it follows nothing shorter than 200 points (2π·λ^¼). A peak of
# the campaign's instrument is 5 to 10 points wide, incident spectra bend over 1,000. On NOMAD's
# Si 640e (bank 4) the baseline agrees with GSAS-II's refined background to 0.17 % of the peak
# maximum (root mean square), at 1e5 to 0.20 %, at 1e7 to 0.16 %.
STIFFNESS = 1e6

BINS = 280  # of equal width, into which `smoothed` cuts a grid; at NOMAD's bank 4 of 10 points
SMOOTHING = 8  # width, in bins, of the running mean that `smoothed` takes three times

Profiles = NDArray[np.floating[Any]]
"""Profiles on the last axis, single or double precision; a function keeps the precision."""


class PreprocessingError(ValueError):
    """A profile without signal, too short for a step, or a name that is not known."""


def minmax(profiles: Profiles) -> Profiles:
    """Scale each profile to [0, 1], as the paper does; a PreprocessingError if one is constant."""
    low = profiles.min(axis=-1, keepdims=True)
    span = profiles.max(axis=-1, keepdims=True) - low
    _refuse_flat(span)
    return np.asarray((profiles - low) / span)


def cropped(profiles: Profiles) -> Profiles:
    """Scale as :func:`minmax`, then cut 256 points off the short end and 55 off the long one.

    The paper's input to its forests: of 2,807 points 2,496 remain. Raises a PreprocessingError if a
    profile is constant, or no longer than the cuts.
    """
    points = profiles.shape[-1]
    if points <= CROP_SHORT_TOF + CROP_LONG_TOF:
        raise PreprocessingError(
            f"Profiles of {points} points are shorter than what is cut off: {CROP_SHORT_TOF} and "
            f"{CROP_LONG_TOF} points. Use profile_minmax@1 on this grid."
        )
    return minmax(profiles)[..., CROP_SHORT_TOF : points - CROP_LONG_TOF]


def sqrt_unit(profiles: Profiles) -> Profiles:
    """Clip at 0, take the square root, and scale to unit Euclidean norm.

    The library match compares profiles in this form where a whole grid is covered: the product of
    two profiles is their similarity, 1 for equal ones. The square root makes counting noise even
    and lowers the weight of effects on intensities (displacement parameters, texture, incident
    spectrum). Raises a PreprocessingError if a profile has no positive value.
    """
    roots = np.sqrt(np.maximum(profiles, 0))
    norm = np.sqrt(np.square(roots).sum(axis=-1, keepdims=True))
    _refuse_flat(norm)
    return np.asarray(roots / norm)


def smoothed(profiles: Profiles) -> Profiles:
    """Clip at 0, smooth over 4 % of the grid, and scale to unit sum.

    The grid is cut into 280 bins of equal width. Their contents are smoothed by a running mean over
    8 bins, three times over (nearly a Gaussian of 4 bins' standard deviation, 4 % in time of flight
    on the campaign's grid), and every second one is kept: shape (n, 140), numbers that change
    smoothly with the cell, while a narrow peak gives no information away from its few points.
    Raises a PreprocessingError if a profile has no positive value or fewer than 280 points.
    """
    points = profiles.shape[-1]
    if points < BINS:
        raise PreprocessingError(
            f"Profiles of {points} points cannot be cut into {BINS} bins. Use profile_minmax@1 on "
            f"this grid."
        )
    total = np.zeros((*profiles.shape[:-1], points + 1))
    np.cumsum(np.maximum(profiles, 0), axis=-1, dtype=np.float64, out=total[..., 1:])
    _refuse_flat(total[..., -1:])
    edge = np.linspace(0, points, BINS + 1)
    below = np.minimum(edge.astype(np.intp), points - 1)
    # In C order, so that a row's sums do not depend on how many rows there are.
    low, high = (np.ascontiguousarray(total[..., k]) for k in (below, below + 1))
    bins = np.diff(low + (edge - below) * (high - low), axis=-1)
    before, after = SMOOTHING // 2, SMOOTHING - SMOOTHING // 2
    sides = [(0, 0)] * (bins.ndim - 1)
    for _ in range(3):
        mirrored = np.pad(bins, [*sides, (before, after - 1)], mode="symmetric")
        sums = np.pad(np.cumsum(mirrored, axis=-1), [*sides, (1, 0)])
        bins = sums[..., SMOOTHING:] - sums[..., :-SMOOTHING]
    features = np.ascontiguousarray(bins[..., ::2])
    return np.asarray(features / features.sum(axis=-1, keepdims=True), dtype=profiles.dtype)


def background_subtracted(profiles: Profiles, sigma: Profiles | None = None) -> Profiles:
    """Subtract a smooth baseline from each profile.

    The baseline minimises weighted squared residuals plus :data:`STIFFNESS` times its squared
    second differences; points above it by more than the scatter of those below lose their weight,
    until the weights converge: asymmetrically reweighted penalised least squares (Baek, Park, Ahn &
    Choo, Analyst 140 (2015) 250), with residuals here in units of each point's standard deviation,
    as noise is many times larger at short times of flight than at long ones.

    Standard deviations have the shape of the profiles, (n, points) or (points,), and are 0 where a
    point holds no information. None estimates them from the scatter of neighbours, and takes runs
    of zeros (dead detectors) as without information: any at either end, of 20 points elsewhere.
    Points without information become 0; nothing is clipped: noise stays on both sides of 0.
    """
    rows = np.atleast_2d(np.asarray(profiles, dtype=np.float64))
    deviations = None if sigma is None else np.atleast_2d(np.asarray(sigma, dtype=np.float64))
    result = np.zeros_like(rows)
    for i, row in enumerate(rows):
        deviation = _estimated_sigma(row) if deviations is None else deviations[i]
        known = np.flatnonzero(deviation > 0)
        if len(known) < 3:
            continue
        span = slice(known[0], known[-1] + 1)
        corrected = row[span] - _baseline(row[span], deviation[span])
        result[i, span] = np.where(deviation[span] > 0, corrected, 0.0)
    return result.reshape(profiles.shape).astype(profiles.dtype)


def noise_from_scatter(
    profile: Array, window: int, beyond: Literal["nearest", "reflect"] = "nearest"
) -> Array:
    """Return the local noise (n,) from second differences, which a signal hardly has.

    ``beyond`` is the mode of scipy's median filter, over ``window`` points, at the ends.
    """
    second = np.abs(np.convolve(profile, [1.0, -2.0, 1.0], mode="valid"))
    # The median of |N(0, s)| is 0.6745 s, and a second difference has 6 times the variance.
    local = median_filter(second, size=min(window, len(second)), mode=beyond)
    return np.asarray(np.pad(local, 1, mode="edge") / (0.6745 * np.sqrt(6)))


def _estimated_sigma(profile: Array) -> Array:
    sigma = np.zeros_like(profile)
    signal = np.flatnonzero(profile)
    if len(signal) < 3:
        return sigma
    span = slice(signal[0], signal[-1] + 1)
    noise = noise_from_scatter(profile[span], window=101)
    sigma[span] = np.maximum(noise, 1e-4 * np.abs(profile).max())
    return np.where(binary_opening(profile == 0, np.ones(20, dtype=bool)), 0.0, sigma)


# pybaselines' Baseline.arpls replaces the weights in each step: standard deviations and dead
# detectors have no lasting effect on it, and predictions would change with its baseline.
def _baseline(profile: Array, sigma: Array) -> Array:
    known = sigma > 0
    typical = np.median(sigma[known])
    # Deviations far from the typical one, or below what doubles resolve, say nothing more.
    floor = max(0.01 * typical, 1e-9 * np.abs(profile).max(), 1e-300)
    typical = max(typical, floor)
    deviation = np.where(known, np.clip(sigma, floor, 100 * typical), np.inf)
    precision = (typical / deviation) ** 2
    # STIFFNESS · DᵀD of second differences, upper bands
    points = len(profile)
    penalty = np.zeros((3, points))
    differences = np.array([1.0, -2.0, 1.0])
    for offset in range(3):
        for k in range(3 - offset):
            start = k + offset
            penalty[2 - offset, start : start + points - 2] += differences[k] * differences[start]
    penalty *= STIFFNESS
    # A tiny weight everywhere keeps the equations solvable across long gaps.
    weight = np.ones(points)
    for _ in range(50):
        total = weight * precision + 1e-9
        bands = penalty.copy()
        bands[2] += total
        baseline = solveh_banded(bands, total * profile)
        residual = ((profile - baseline) / deviation)[known]
        below = residual[residual < 0]
        if len(below) < 3 or below.std() == 0:
            break
        mean, spread = below.mean(), below.std()
        updated = np.zeros(points)
        argument = 2 * (residual - (2 * spread - mean)) / spread
        updated[known] = 1 / (1 + np.exp(np.clip(argument, -50, 50)))
        change = np.linalg.norm(updated - weight) / np.linalg.norm(weight)
        weight = updated
        if change < 1e-3:
            break
    return np.asarray(baseline)


def prepare_measured(intensity: Array, sigma: Array, covered: Mask) -> Array:
    """Make measured profiles look like simulated ones: background off, between 0 and 1.

    The background is subtracted (:func:`background_subtracted`), the highest point that stands five
    standard deviations above it becomes 1 (where nothing does, the highest point), and the rest is
    clipped to [0, 1]. Points that are not covered are 0. All arrays have shape (points,), or (n,
    points), as :func:`bragg_data.measurement.resampling.resample_to_grid` returns them. Raises a
    PreprocessingError if nothing stands above the background.
    """
    if intensity.ndim > 1:
        return np.stack(
            [prepare_measured(*row) for row in zip(intensity, sigma, covered, strict=True)]
        )
    known = covered & (sigma > 0)
    signal = background_subtracted(intensity, np.where(known, sigma, 0.0))
    clear = known & (signal > 5 * sigma)
    highest = signal[clear if clear.any() else known].max(initial=0.0)
    if highest <= 0:
        raise PreprocessingError(
            "The profile has no signal above its background. Check the file and its bank."
        )
    return np.where(known, np.clip(signal / highest, 0.0, 1.0), 0.0)


def _refuse_flat(scale: Profiles) -> None:
    flat = ~(scale > 0)
    if flat.any():
        row = int(np.flatnonzero(flat.ravel())[0])
        raise PreprocessingError(
            f"Profile {row} of {flat.size} has no signal (a constant), so it cannot be scaled. "
            f"Leave failed samples out."
        )


class Preprocessing(NamedTuple):
    """One version of a function on profiles; a model records its ``name@version``."""

    name: str
    version: int
    function: Callable[[Profiles], Profiles]  # from (n, points) to (n, points or features)
    description: str


_SUBTRACTED = "A smooth baseline subtracted; for measured profiles."
PREPROCESSING: dict[str, Preprocessing] = {
    f"{name}@{version}": Preprocessing(name, version, function, description)
    for name, version, function, description in (
        ("profile_minmax", 1, minmax, "Each profile scaled to [0, 1]."),
        ("profile_cropped", 1, cropped, "Scaled to [0, 1]; 256 and 55 points cut off the ends."),
        ("profile_sqrt_unit", 1, sqrt_unit, "Square root of the positive part, norm 1."),
        ("profile_smoothed", 1, smoothed, "Smoothed over 4 % of the grid, 140 numbers, sum 1."),
        ("profile_background_subtracted", 1, background_subtracted, _SUBTRACTED),
    )
}


def preprocessing(key: str) -> Preprocessing:
    """Return a preprocessing by its ``name@version``; a PreprocessingError if it is unknown."""
    if key not in PREPROCESSING:
        raise PreprocessingError(
            f"Preprocessing '{key}' is not known. Known: {', '.join(PREPROCESSING)}."
        )
    return PREPROCESSING[key]
