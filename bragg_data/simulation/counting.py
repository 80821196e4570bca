"""Counts of neutrons in simulated profiles, with background and incident spectrum."""

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev

from bragg_data.arrays import Array, Floats32
from bragg_data.kernels import exponential, kernel

TERMS = 5  # of the smooth functions over the window: Chebyshev polynomials of degree 1 to 5
# Below this mean counts are drawn as they are. From here on a normal deviate z makes them, by the
# expansion of Cornish and Fisher to the third cumulant: λ + √λ z + (z² - 1)/6, rounded.
_FEW = 30.0


@dataclass(frozen=True, eq=False)
class Measurements:
    """What differs between n measured profiles; each entry has shape (n,) or (n, TERMS)."""

    counts: Array  # at the highest peak
    impurity: Array  # highest peak of the impurity, in units of the highest of all
    background: Array  # mean, in units of the highest peak
    background_terms: Array  # of the logarithm of its variation
    error_terms: Array  # of the logarithm of the error of the incident spectrum
    # ln of the incident spectrum falls from 0 at its summit, a share of the window in ln T, by this
    # at the end further away.
    summit: Array
    fall: Array


def count_neutrons(
    patterns: Floats32, tof: Array, measured: Measurements, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Return intensities and standard deviations, (n, points), of measurements of patterns.

    The impurity of each profile is the sample of the one before: its peaks are as sharp, at other
    places. Patterns (n, points) are on any scale; times of flight (points,) in µs.
    """
    share = np.log(tof / tof[0]) / np.log(tof[-1] / tof[0])
    terms = np.ascontiguousarray(chebyshev.chebvander(2 * share - 1, TERMS)[:, 1:].T)
    noise = generator.standard_normal(patterns.shape, dtype=np.float32)
    highest = np.maximum(patterns.max(axis=1), 1e-30).astype(np.float64)
    far = np.maximum(measured.summit, 1 - measured.summit)
    scale, other = 1 / highest, measured.impurity / np.roll(highest, 1)
    rows = scale, other, measured.counts, measured.background, measured.summit
    coefficients = measured.error_terms, measured.background_terms
    steepness = measured.fall / far**2
    mean, spectrum = np.empty(patterns.shape), np.empty(patterns.shape)
    _fill_means(patterns, share, terms, *rows, steepness, *coefficients, mean, spectrum)
    few = mean < _FEW
    drawn = generator.poisson(mean[few])
    _fill_counts(mean, noise)
    mean[few] = drawn
    _fill_profiles(mean, spectrum)
    return mean, spectrum


@kernel(finite=True)
def _fill_means(  # type: ignore[no-untyped-def] # pragma: no cover
    patterns,
    share,
    terms,
    scale,
    other,
    counts,
    background,
    summit,
    steepness,
    error_terms,
    background_terms,
    mean,
    spectrum,
):
    """Fill the mean counts and the incident spectra, (n, points)."""
    for i in range(len(patterns)):
        e, b = error_terms[i], background_terms[i]
        for j in range(len(share)):
            error, ground = 0.0, 0.0
            for t in range(TERMS):
                error += e[t] * terms[t, j]
                ground += b[t] * terms[t, j]
            distance = share[j] - summit[i]
            incident = exponential(-steepness[i] * distance * distance)
            signal = scale[i] * patterns[i, j] + other[i] * patterns[i - 1, j]
            signal *= exponential(error)
            signal += background[i] * exponential(ground)
            mean[i, j] = counts[i] * incident * signal
            spectrum[i, j] = incident


@kernel(finite=True)
def _fill_counts(mean, noise):  # type: ignore[no-untyped-def] # pragma: no cover
    """Replace means of many counts by counts."""
    for i in range(len(mean)):
        for j in range(mean.shape[1]):
            z = noise[i, j]
            count = np.floor(mean[i, j] + np.sqrt(mean[i, j]) * z + (z * z - 1) / 6 + 0.5)
            mean[i, j] = max(count, 0.0)


@kernel(finite=True)
def _fill_profiles(counts, spectrum):  # type: ignore[no-untyped-def] # pragma: no cover
    """Replace counts by intensities, and incident spectra by standard deviations."""
    for i in range(len(counts)):
        for j in range(counts.shape[1]):
            sigma = np.sqrt(max(counts[i, j], 1.0)) / spectrum[i, j]
            counts[i, j] /= spectrum[i, j]
            spectrum[i, j] = sigma
