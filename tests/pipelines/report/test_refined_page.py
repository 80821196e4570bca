"""The report of a refined prediction with intervals, and of one that is not accepted."""

from dataclasses import replace

import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.measurement.load import Measurement
from bragg_data.measurement.readers import Profile
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import prepare_measured
from bragg_data.refinement.linear_fit import simulator_of
from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Prediction, Predictor
from catalog.tracking import Tracking
from pipelines.prediction.interface import load_model
from pipelines.prediction.workflow import PredictedProfile, refine_predictions
from pipelines.report.page import render_report

CELL = np.array([3.99, 3.99, 4.03, 90, 90, 90])
URI = "models:/small/1"


@pytest.fixture(scope="module")
def predictor(trained: Tracking) -> Predictor:
    return load_model(tracking=trained.uri).predictor


@pytest.fixture(scope="module")
def profile(small_campaign: Campaign) -> PredictedProfile:
    tof = small_campaign.grid.tof
    pattern = simulator_of(small_campaign).simulate(np.array([1]), CELL[None])[0].astype(float)
    counts = np.random.default_rng(3).poisson(4000 * pattern / pattern.max() + 300).astype(float)
    sigma, covered = np.sqrt(counts), np.ones(len(tof), dtype=bool)
    measured = Profile(tof, counts, sigma, None, "", None, None, {}, "mine.xye")
    gridded = GriddedProfile(counts, sigma, covered)
    prepared = prepare_measured(counts, sigma, covered)
    measurement = Measurement(measured, gridded, small_campaign.instrument, False, [], prepared)
    intervals = np.full((1, 6, 2), np.nan)
    intervals[0, 0], intervals[0, 2] = (3.9893, 3.9911), (4.0288, 4.0304)
    prediction = Prediction(
        np.array([[0.02, 0.97, 0.01]]),
        np.array([1]),
        CELL[None] + 1e-3 * (np.arange(6) < 3),
        intervals,
        np.array([True]),
        np.array([0.02]),
        0.15,
    )
    predicted = PredictedProfile(measurement, prediction, 0, small_campaign, URI, "small-v1")
    return refine_predictions([predicted], Refiner(small_campaign))[0]


def test_refined_cell_and_intervals_are_shown(
    profile: PredictedProfile, predictor: Predictor
) -> None:
    page = render_report([profile], predictor)
    assert "90 % intervals:" in page
    assert "3.9893–3.9911" in page
    assert '<span class="label">Refined</span>' in page
    best = profile.refined[0]
    assert best.phase == 1
    assert np.abs(best.cell - CELL)[:3].max() < 3e-3
    assert "The refined pattern" in page
    assert "refined, tetragonal" in page
    assert "Not accepted" not in page


def test_rejection_is_stated_first(profile: PredictedProfile, predictor: Predictor) -> None:
    rejected = replace(profile.prediction, accepted=np.array([False]), unexplained=np.array([0.6]))
    page = render_report([replace(profile, prediction=rejected, refined=())], predictor)
    assert "<b>Not accepted.</b> No cell of the model&#39;s phases explains the profile" in page
    assert "the predicted phase leaves 60 % of it" in page
    assert page.index("Not accepted") < page.index("Evidence for and against")
