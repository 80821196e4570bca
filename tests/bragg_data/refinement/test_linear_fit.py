"""A pattern laid over a measurement: what was put in comes out, and peaks stand on their ticks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import find_peaks

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import (
    PatternFitError,
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)

CELL = np.array([3.99, 3.99, 4.03, 90, 90, 90.0])


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return load_campaign("batio3-nomad")


@pytest.fixture(scope="module")
def pattern(campaign: Campaign) -> np.ndarray:
    return simulator_of(campaign).simulate(np.array([1]), CELL[None])[0].astype(float)


def measured(campaign: Campaign, pattern: np.ndarray, seed: int) -> GriddedProfile:
    x = np.linspace(-1, 1, campaign.grid.points)
    expected = 40 * pattern / pattern.max() * 100 + 300 + 80 * x - 60 * x**3
    covered = campaign.grid.tof < 17_500
    counts = np.random.default_rng(seed).poisson(expected).astype(float)
    sigma = np.sqrt(np.maximum(counts, 1))
    return GriddedProfile(np.where(covered, counts, 0), np.where(covered, sigma, 0), covered)


def test_scale_and_background_come_back(campaign: Campaign, pattern: np.ndarray) -> None:
    chi2 = []
    for seed in range(5):
        gridded = measured(campaign, pattern, seed)
        fit = fit_scale_and_background(gridded, pattern)
        assert fit.scale == pytest.approx(4000 / pattern.max(), rel=0.02)
        known = gridded.covered
        np.testing.assert_array_equal(np.isfinite(fit.calculated), known)
        np.testing.assert_allclose(
            fit.calculated[known] + fit.difference[known], gridded.intensity[known]
        )
        assert 0 < fit.rwp < fit.rwp_background < 1
        chi2.append(fit.reduced_chi2)
    # Weights from the counts themselves bias it by about one part in the counts.
    assert np.mean(chi2) == pytest.approx(1, abs=0.06)


def test_a_wrong_cell_fits_worse_and_peaks_that_point_down_are_none(
    campaign: Campaign, pattern: np.ndarray
) -> None:
    gridded = measured(campaign, pattern, 0)
    other = simulator_of(campaign).simulate(np.array([1]), CELL[None] + [[0.01, 0.01, 0, 0, 0, 0]])
    assert (
        fit_scale_and_background(gridded, other[0]).reduced_chi2
        > 5 * fit_scale_and_background(gridded, pattern).reduced_chi2
    )
    upside = GriddedProfile(
        np.where(gridded.covered, 5000 - gridded.intensity, 0), gridded.sigma, gridded.covered
    )
    assert fit_scale_and_background(upside, pattern).scale == 0
    with pytest.raises(PatternFitError, match="cannot be laid"):
        fit_scale_and_background(gridded, np.zeros(len(pattern)))


def test_ticks_stand_where_peaks_are(campaign: Campaign, pattern: np.ndarray) -> None:
    tof, hkl = reflection_positions(campaign.phases[1], CELL, campaign, visible=0.05)
    assert (np.diff(tof) >= 0).all()
    (found, _) = find_peaks(pattern, prominence=0.1 * pattern.max())
    assert len(found) > 5
    step = np.gradient(campaign.grid.tof)
    for index in found:
        # Peaks lean to long times by their exponential tails.
        assert np.abs(tof - campaign.grid.tof[index]).min() < 6 * step[index], index
    assert [2, 1, 1] in np.sort(np.abs(hkl), axis=1)[:, ::-1].tolist()
