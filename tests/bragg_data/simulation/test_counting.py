"""Counts of simulated profiles: Poisson, and on the scale of the pattern."""

import numpy as np
import pytest

from bragg_data.simulation.counting import TERMS, Measurements, count_neutrons

POINTS = 100_000
TOF = np.geomspace(1000.0, 20_000.0, POINTS)


def measured(count: int, **values: float) -> Measurements:
    """Return measurements without any effect but those that are named."""
    defaults = {"counts": 1e4, "impurity": 0.0, "background": 0.0, "summit": 0.5, "fall": 0.0}
    rows = {name: np.full(count, value) for name, value in (defaults | values).items()}
    terms = np.zeros((count, TERMS))
    return Measurements(**rows, background_terms=terms, error_terms=terms)


@pytest.mark.parametrize("mean", [3.0, 29.0, 31.0, 100.0, 1e5])
def test_counts_have_the_moments_of_a_poisson_distribution(mean: float) -> None:
    flat = np.ones((4, POINTS), dtype=np.float32)
    counts, sigma = count_neutrons(flat, TOF, measured(4, counts=mean), np.random.default_rng(0))
    np.testing.assert_array_equal(counts, np.round(counts))
    np.testing.assert_allclose(sigma, np.sqrt(np.maximum(counts, 1)))
    deviation = counts - mean
    error = np.sqrt(mean / counts.size)
    assert abs(deviation.mean()) < 4 * error
    assert (deviation**2).mean() == pytest.approx(mean, rel=0.02)
    # The third cumulant is λ too; its own scatter is √6 λ^1.5 / √n.
    third = (deviation**3).mean()
    assert abs(third - mean) < 0.05 * mean + 4 * np.sqrt(6 / counts.size) * mean**1.5


def test_profiles_are_patterns_with_background_and_impurity() -> None:
    patterns = np.zeros((2, POINTS), dtype=np.float32)
    patterns[0, 10], patterns[1, 20] = 4.0, 7.0
    effects = measured(2, counts=1e12, impurity=0.1, background=0.2, fall=2.0)
    intensity, sigma = count_neutrons(patterns, TOF, effects, np.random.default_rng(0))
    expected = np.full((2, POINTS), 0.2)
    expected[0, [10, 20]] += [1.0, 0.1]
    expected[1, [20, 10]] += [1.0, 0.1]
    np.testing.assert_allclose(intensity / 1e12, expected, rtol=4e-5)
    # Fewer neutrons at the ends of the spectrum: less precise intensities of the same size.
    spectrum = np.exp(-2.0 * (np.linspace(-1, 1, POINTS)) ** 2)
    np.testing.assert_allclose(sigma, np.sqrt(intensity / spectrum), rtol=1e-5)
