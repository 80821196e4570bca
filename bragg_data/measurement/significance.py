"""Whether a profile has peaks at all: noise alone would be predicted as some cell, too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter, uniform_filter1d

from bragg_data.preprocessing import background_subtracted

_WIDTHS = (1, 3, 9)  # points over which the signal is averaged: peaks may be finely sampled
_NOISE_WINDOW = 401  # points over which the scatter of neighbours is estimated

# Of noise alone, in profiles of 2,800 points and 0.05 to 10,000 counts, the largest values are 5.2
# and 5.0; of measured profiles (NOMAD, GEM, POWGEN, iMATERIA, HIPPO, WISH, VULCAN, SEPD) the
# smallest are 16 and 14. Lower limits accept noise, higher ones refuse weak samples.
_ABOVE_NOISE = 6.5
_ABOVE_SCATTER = 8.0


def has_significant_peaks(intensity: NDArray[np.float64], sigma: NDArray[np.float64]) -> bool:
    """Return whether anything stands significantly above the background of a profile.

    Averaged over 1, 3 or 9 points, the highest value has to be 6.5 standard deviations above the
    background. The standard deviation is the given one or that of the scatter of neighbours,
    whichever is larger, as it may have been calculated from scaled counts. Where it is far too
    large, for the same reason, 8 times the spread of the lower half of the values is enough.

    Parameters
    ----------
    intensity, sigma : shape (n,)
        As measured, because resampling makes the noise of neighbours alike; ``sigma`` is 0 where a
        point holds no information.
    """
    informative = sigma > 0
    signal = background_subtracted(intensity, sigma)[informative]
    deviation = sigma[informative]
    if len(signal) < 3:
        return False
    noise = np.maximum(deviation, _scatter(intensity[informative]))
    for width in _WIDTHS:
        mean = uniform_filter1d(signal / noise, width, mode="constant")
        if mean.max() * np.sqrt(width) > _ABOVE_NOISE:
            return True
        mean = uniform_filter1d(signal / deviation, width, mode="nearest")
        low, middle = np.quantile(mean, [0.1587, 0.5])  # a standard deviation of normal values
        spread = middle - low
        # Of few counts most are equal: their spread means nothing.
        if spread > 1e-6 and mean.max() - middle > _ABOVE_SCATTER * spread:
            return True
    return False


def _scatter(intensity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the local standard deviation from second differences, which peaks hardly change."""
    second = np.abs(np.convolve(intensity, [1.0, -2.0, 1.0], mode="valid"))
    # The median of |N(0, s)| is 0.6745 s, and a second difference has 6 times the variance.
    local = median_filter(second, size=min(_NOISE_WINDOW, len(second)), mode="reflect")
    return np.asarray(np.pad(local, 1, mode="edge") / (0.6745 * np.sqrt(6)))
