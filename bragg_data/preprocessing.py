"""Named, versioned pure functions on profiles, the same ones in training and in inference.

Each takes profiles on the last axis, shape (n, points), and returns shape (n, points) (another
number of points where it crops). A model records the ``name@version`` of what it was trained on; a
change of a function's numbers is a new version; the old one stays.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_opening, median_filter

from bragg_data.arrays import Array, Mask
from bragg_data.smooth_baseline import smooth_baselines

# Points cut off the ends (section IV-B of the paper: 2,496 of 2,807 points remain).
CROP_SHORT_TOF, CROP_LONG_TOF = 256, 55

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
    """Subtract a smooth baseline (:mod:`bragg_data.smooth_baseline`) from each profile.

    Standard deviations have the shape of the profiles, (n, points) or (points,), and are 0 where a
    point holds no information. None estimates them from the scatter of neighbours, and takes runs
    of zeros (dead detectors) as without information: any at either end, of 20 points elsewhere.
    Points without information become 0, and so do all if fewer than three have any; nothing is
    clipped: noise stays on both sides of 0.
    """
    rows = np.atleast_2d(np.asarray(profiles, dtype=np.float64))
    if sigma is None:
        deviations = np.stack([_estimated_sigma(row) for row in rows])
    else:
        deviations = np.atleast_2d(np.asarray(sigma, dtype=np.float64))
    known = deviations > 0
    known &= known.sum(axis=1, keepdims=True) >= 3
    result = np.where(known, rows - smooth_baselines(rows, deviations), 0.0)
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


def prepare_measured(intensity: Array, sigma: Array, covered: Mask) -> Array:
    """Make measured profiles look like simulated ones: background off, between 0 and 1.

    The background is subtracted (:func:`background_subtracted`), the highest point that stands five
    standard deviations above it becomes 1 (where nothing does, the highest point), and the rest is
    clipped to [0, 1]. Points that are not covered are 0. All arrays have shape (points,), or (n,
    points), as :func:`bragg_data.measurement.resampling.resample_to_grid` returns them. Raises a
    PreprocessingError if nothing stands above the background.
    """
    prepared = prepare_or_zero(intensity, sigma, covered)
    if not prepared.any(axis=-1).all():
        raise PreprocessingError("The profile has no signal above background. Check file and bank.")
    return prepared


def prepare_or_zero(intensity: Array, sigma: Array, covered: Mask) -> Array:
    """As :func:`prepare_measured`; profiles with nothing above their background become 0."""
    known = covered & (sigma > 0)
    signal = background_subtracted(intensity, np.where(known, sigma, 0.0))
    clear = known & (signal > 5 * sigma)
    counted = np.where(clear.any(axis=-1, keepdims=True), clear, known)
    highest = np.max(signal, axis=-1, keepdims=True, where=counted, initial=0.0)
    scaled = signal / np.where(highest > 0, highest, np.inf)
    return np.where(known, np.clip(scaled, 0.0, 1.0), 0.0)


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
            f"No preprocessing is called '{key}'. Known: {', '.join(PREPROCESSING)}."
        )
    return PREPROCESSING[key]
