"""Scale and background of a pattern come back, and reflections lie where the peaks are."""

import numpy as np
import pytest
from scipy.signal import find_peaks

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import (
    fit_cells,
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)
from bragg_data.refinement.result import RefinementError

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
    with pytest.raises(RefinementError, match="no peak in the covered part"):
        fit_scale_and_background(gridded, np.zeros(len(pattern)))


def test_cells_without_volume_have_no_fit(campaign: Campaign, pattern: np.ndarray) -> None:
    gridded = measured(campaign, pattern, 0)
    flat = np.array([4.0, 4.0, 4.0, 125.0, 125.0, 125.0])
    cells = np.stack([flat, CELL, np.full(6, np.nan), np.array([0.1] * 3 + [90.0] * 3)])
    fits = fit_cells(campaign, [2, 1, 0, 0], cells, [gridded] * 4)
    assert [fit is None for fit in fits] == [True, False, True, True]
    assert fits[1] is not None
    expected = fit_scale_and_background(gridded, pattern)
    assert fits[1].rwp == pytest.approx(expected.rwp, rel=1e-4)
    np.testing.assert_allclose(fits[1].calculated, expected.calculated, rtol=1e-4)
    assert fit_cells(campaign, [2], flat[None], [gridded]) == [None]
    tof, hkl = reflection_positions(campaign.phases[2], flat, campaign)
    assert tof.shape == (0,)
    assert hkl.shape == (0, 3)


def test_too_few_points_are_refused(campaign: Campaign, pattern: np.ndarray) -> None:
    gridded = measured(campaign, pattern, 0)
    few = GriddedProfile(gridded.intensity, gridded.sigma, np.arange(len(pattern)) < 34)
    with pytest.raises(RefinementError, match="34 points are covered, too few"):
        fit_scale_and_background(few, pattern)


def test_reflections_lie_where_peaks_are(campaign: Campaign, pattern: np.ndarray) -> None:
    tof, hkl = reflection_positions(campaign.phases[1], CELL, campaign, visible=0.05)
    assert (np.diff(tof) >= 0).all()
    (maxima, _) = find_peaks(pattern, prominence=0.1 * pattern.max())
    assert len(maxima) > 5
    step = np.gradient(campaign.grid.tof)
    for index in maxima:
        # Peaks lean to long times by their exponential tails.
        assert np.abs(tof - campaign.grid.tof[index]).min() < 6 * step[index], index
    assert [2, 1, 1] in np.sort(np.abs(hkl), axis=1)[:, ::-1].tolist()
