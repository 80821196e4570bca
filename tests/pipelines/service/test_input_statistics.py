"""Statistics of profiles against what the profiles were made of."""

import numpy as np
import pytest

from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import prepare_measured
from pipelines.recording.input_statistics import statistics_of

STEP, POINTS = 1e-3, 2000


def peaks(sigma: float, seed: int = 1) -> np.ndarray:
    """Sixty Gaussian peaks of standard deviation sigma, in points; some overlap."""
    rng = np.random.default_rng(seed)
    x = np.arange(POINTS)
    places, heights = rng.uniform(100, 1900, 60), rng.uniform(0.1, 1, 60)
    return np.exp(-(((x - places[:, None]) / sigma) ** 2) / 2).T @ heights


@pytest.mark.parametrize("sigma", [2.0, 4.0, 8.0])
def test_the_width_is_that_of_the_peaks_whatever_scale_and_noise(sigma: float) -> None:
    profile = 300 * peaks(sigma)
    noisy = profile + np.random.default_rng(0).normal(0, 3, POINTS)
    rows = statistics_of(np.stack([profile, noisy]), STEP)
    expected = np.sqrt(8 * np.log(2)) * sigma * STEP
    assert [row["width"] for row in rows] == pytest.approx([expected] * 2, rel=0.12)
    assert rows[0]["counts"] is None
    assert rows[0]["background"] is None
    # The sides of narrow peaks look like noise.
    expected = 3 / noisy.max()
    assert rows[1]["noise"] == pytest.approx(expected, rel={2.0: 0.35, 4.0: 0.15, 8.0: 0.1}[sigma])


def test_background_counts_and_window_are_those_of_the_measurement() -> None:
    clean = peaks(4.0)
    clean *= 10_000 / clean.max()
    mean = clean + 2500.0  # a quarter of the highest peak
    counts = np.random.default_rng(2).poisson(mean).astype(float)
    covered = np.arange(POINTS) >= 200
    profile = GriddedProfile(counts * covered, np.sqrt(counts) * covered, covered)
    prepared = prepare_measured(profile.intensity, profile.sigma, profile.covered)
    (row,) = statistics_of(prepared[None], STEP, [profile])
    assert row["background"] == pytest.approx(0.25, rel=0.05)
    assert row["counts"] == pytest.approx(12_500, rel=0.05)
    assert row["noise"] == pytest.approx(50 / 10_000, rel=0.05)
    assert row["start"] == pytest.approx(0.1, abs=0.01)
    assert row["end"] == pytest.approx(1.0, abs=0.01)


def test_a_profile_without_peaks_has_no_width() -> None:
    (row,) = statistics_of(np.ones((1, POINTS)), STEP)
    assert row["width"] is None
