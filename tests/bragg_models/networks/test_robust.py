"""Our network for measured profiles: accurate on draws, calibrated, and able to reject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bragg_data.campaign_file import MeasurementEffects
from bragg_data.simulation.measurement_effects import draw_cells, draw_profiles, simulator_for
from bragg_models.networks.robust import Robust
from bragg_models.predictors import Prediction, Predictor, load_predictor
from catalog import registry
from pipelines import promote, validate
from pipelines.evaluation.names import EvaluateError
from pipelines.evaluation.rejection import foreign_task
from pipelines.prediction.acceptance import assess_acceptance, estimate_intervals
from pipelines.registry.feature_views import RegisteredModel

if TYPE_CHECKING:
    from bragg_data.store.repository import Store
    from catalog.tracking import Tracking
    from tests.small_bench import Bench

# Trained in seconds, on few draws: the bounds are wider than those of the real model.
COUNT = 40


@pytest.fixture(scope="module")
def robust_bench(empty_bench: Bench) -> Bench:
    return empty_bench


@pytest.fixture(scope="module")
def predictor(robust_bench: Bench) -> Predictor:
    output = robust_bench("robust")
    assert "Calibrated: " in output
    (version,) = robust_bench.versions("robust")
    assert version.uri == "models:/small-measured/1"
    assert version.tags["model"] == "robust"
    assert "Simulated measurements" in output
    assert "models:/small-measured" in registry.champion_uri(robust_bench.tracking)
    return robust_bench.predictor("robust")


@pytest.fixture(scope="module")
def draws(predictor: Predictor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    campaign = predictor.campaign
    generator = np.random.default_rng(99)
    phase = np.repeat(np.arange(3), COUNT)
    cells = np.concatenate([draw_cells(campaign, code, COUNT, generator) for code in range(3)])
    profiles = draw_profiles(simulator_for(campaign), phase, cells, generator)
    return profiles.prepared(), phase, cells


@pytest.fixture(scope="module")
def prediction(predictor: Predictor, draws: tuple[np.ndarray, ...]) -> Prediction:
    return predictor.predict(draws[0])


def test_predictions_of_noisy_draws(prediction: Prediction, draws: tuple[np.ndarray, ...]) -> None:
    _, phase, cells = draws
    right = prediction.phase == phase
    assert right.mean() > 0.7
    # Confident predictions are correct.
    confident = prediction.probabilities.max(axis=1) > 0.95
    assert confident.sum() > COUNT
    assert right[confident].mean() > 0.95
    error = np.abs(prediction.cells - cells)[right]
    assert np.median(error[:, [0, 2]]) < 2e-3
    np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1, atol=1e-6)


def test_intervals_cover_the_errors(prediction: Prediction, draws: tuple[np.ndarray, ...]) -> None:
    _, phase, cells = draws
    assert prediction.intervals is not None
    right = prediction.phase == phase
    low, high = prediction.intervals[right, :, 0], prediction.intervals[right, :, 1]
    free = np.isfinite(low)
    np.testing.assert_array_equal(free[:, 0], np.ones(right.sum(), dtype=bool))
    inside = (cells[right] >= low) & (cells[right] <= high)
    assert 0.75 < inside[free].mean() < 0.99


def test_intervals_of_an_uncalibrated_instrument_are_wider(
    predictor: Predictor, draws: tuple[np.ndarray, ...], prediction: Prediction
) -> None:
    drifted = predictor.predict(draws[0], calibrated=np.zeros(len(draws[0]), dtype=bool))
    np.testing.assert_array_equal(drifted.cells, prediction.cells)
    assert drifted.intervals is not None
    assert prediction.intervals is not None
    widths = [np.median(np.diff(i[:, 0])) for i in (drifted.intervals, prediction.intervals)]
    assert widths[0] > 1.2 * widths[1]


def test_profiles_of_none_of_the_phases_are_rejected(
    predictor: Predictor, draws: tuple[np.ndarray, ...], prediction: Prediction
) -> None:
    assert prediction.accepted is not None
    assert prediction.accepted.mean() > 0.9
    generator = np.random.default_rng(0)
    shuffled = generator.permuted(draws[0][::4], axis=1)
    foreign = predictor.predict(shuffled)
    assert foreign.accepted is not None
    assert foreign.accepted.mean() < 0.05
    rejected = assess_acceptance(foreign, int(np.argmin(foreign.accepted)))
    assert rejected.accepted is False
    assert rejected.reasons is not None
    assert "No cell of the model's phases explains the profile" in rejected.reasons[0]
    row = int(np.flatnonzero(prediction.accepted)[0])
    accepted = assess_acceptance(prediction, row)
    assert accepted.accepted is True
    assert accepted.reasons == ()
    intervals = estimate_intervals(prediction, row, predictor.campaign)
    assert intervals is not None
    assert set(intervals.ends) <= {"a", "c", "alpha"}
    assert all(ends is None or ends.low < ends.high for ends in intervals.ends.values())


def test_a_saved_model_predicts_the_same(
    predictor: Predictor, draws: tuple[np.ndarray, ...], prediction: Prediction, tmp_path: Path
) -> None:
    predictor.save(tmp_path / "model")
    again = load_predictor(tmp_path / "model").predict(draws[0])
    np.testing.assert_array_equal(again.cells, prediction.cells)
    np.testing.assert_array_equal(again.intervals, prediction.intervals)
    assert again.limit == prediction.limit


def test_rows_do_not_depend_on_each_other(
    predictor: Predictor, draws: tuple[np.ndarray, ...], prediction: Prediction
) -> None:
    for rows in (slice(5, 8), slice(30, 31), slice(40, 120)):
        some, part = predictor.predict(draws[0][rows]), prediction[rows]
        # On some processors products of matrices round a row as the number of rows wants it, and
        # a search ends elsewhere within its tolerance: far from the ends of the intervals.
        width = np.nanmin(np.ptp(part.intervals, axis=2))
        np.testing.assert_allclose(some.cells, part.cells, rtol=0, atol=0.01 * width)
        np.testing.assert_allclose(some.intervals, part.intervals, rtol=0, atol=0.05 * width)
        np.testing.assert_allclose(some.probabilities, part.probabilities, rtol=0, atol=1e-5)


def test_clean_patterns_are_explained(predictor: Predictor, robust_bench: Bench) -> None:
    dataset = robust_bench.store.open("small-v1")
    rows = np.arange(0, dataset.sizes["sample"], 23)
    clean = predictor.predict(dataset.intensity[rows].values)
    assert (clean.phase == dataset.phase.values[rows]).mean() > 0.95
    truth = np.stack([dataset[n].values[rows] for n in ("a", "b", "c")], axis=1)
    assert np.median(np.abs(clean.cells[:, :3] - truth)) < 1e-4


def test_a_known_phase_is_used(predictor: Predictor, draws: tuple[np.ndarray, ...]) -> None:
    known = np.full(6, 1)
    with_phase = predictor.predict(draws[0][:6], phase=known)
    np.testing.assert_array_equal(with_phase.phase, known)
    assert with_phase.intervals is None


def test_ranges_are_plain_values() -> None:
    assert MeasurementEffects().to_json()["counts"] == [1500.0, 200_000.0]
    assert issubclass(Robust, torch.nn.Module)


def test_versions_for_measured_profiles_are_compared_on_pinned_draws(
    robust_bench: Bench, predictor: Predictor
) -> None:
    (version,) = robust_bench.versions("robust")
    copied = robust_bench.tracking.client.copy_model_version(version.uri, version.name)
    result = CliRunner().invoke(
        promote.app,
        [
            version.name,
            str(copied.version),
            "--samples",
            "30",
            "--json",
            "--seconds",
            "10",
            "--store",
            robust_bench.store.uri,
            "--tracking",
            robust_bench.tracking.uri,
        ],
        catch_exceptions=False,
    )
    report = json.loads(result.stdout)
    assert (report["champion"], report["passed"]) == (version.uri, True), report["objections"]
    first, second = report["judged"].values()
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in second.items() if k != "seconds"
    }
    # The noise is in it: on clean patterns the error would be a hundredth.
    assert first["mse_paper"] > 1e-8
    assert predictor.provenance.split.test_draws > 0
    registry.rollback(robust_bench.tracking, version.name, reason="only a copy")
    robust_bench.tracking.client.delete_model_version(version.name, str(copied.version))


def test_it_is_compared_with_constants_and_the_library_match(
    robust_bench: Bench, predictor: Predictor
) -> None:
    provenance = predictor.provenance
    assert provenance.baselines is not None
    assert set(provenance.baselines) == {
        "constant (mean cell)",
        "constant (CIF's cell)",
        "library match",
    }
    assert provenance.draws is not None
    metrics = robust_bench.metrics("robust")
    # Numbers on draws are not among those on clean test samples.
    assert metrics["draws/all/mse_paper"] == pytest.approx(provenance.draws["all"]["mse_paper"])
    assert not [name for name in metrics if name.startswith("test/")]


def test_rejected_profiles_are_counted_alike_whatever_becomes_of_them(
    robust_bench: Bench, predictor: Predictor
) -> None:
    (version,) = robust_bench.versions("robust")
    assert predictor.has_intervals
    model = RegisteredModel(robust_bench.tracking.uri, version)
    for kind in ("background alone", "genuine"):
        outcomes = foreign_task(model, kind, 0, 7, None)
        refined = [row for row, outcome in enumerate(outcomes) if outcome.refined is not None]
        assert refined == [0, 5], kind


@pytest.mark.slow
def test_evaluation_on_new_draws(robust_bench: Bench, predictor: Predictor, tmp_path: Path) -> None:
    """By the command: calibration, rejection, and results of refinements."""
    (version,) = robust_bench.versions("robust")
    assert predictor.has_intervals
    written = tmp_path / "draws.md"
    result = CliRunner().invoke(
        validate.app,
        [
            "--models",
            version.uri,
            "--draws",
            "12",
            "--foreign",
            "2",
            "--refined-draws",
            "1",
            "--store",
            robust_bench.store.uri,
            "--tracking",
            robust_bench.tracking.uri,
            "--trained-on",
            "small-v1",
            "--markdown",
            str(written),
            "--figures",
            str(tmp_path / "figures"),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    text = written.read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    for kind in ("silicon", "diamond", "rutile", "shuffled points"):
        # The model was trained for seconds; the refinement does not depend on that.
        assert rows[kind].rstrip("| ").endswith("100.0%"), rows[kind]
    assert "0.0%" in rows["**genuine**"]
    assert {"calibrated", "drifted", "the middle of the campaign's ranges"} <= set(rows)
    best = rows["**the model's cell and the library's**"]
    assert best.count("100.0%") >= 2, best
    (figure,) = (tmp_path / "figures").rglob("*.png")
    assert figure.stat().st_size > 20_000


@pytest.mark.training
def test_models_without_intervals_cannot_be_evaluated_on_draws(
    small_store: Store, trained: Tracking
) -> None:
    (version,) = registry.versions(trained, "small")
    with pytest.raises(EvaluateError, match="None of these models has intervals"):
        CliRunner().invoke(
            validate.app,
            [
                "--models",
                version.uri,
                "--draws",
                "1",
                "--store",
                small_store.uri,
                "--tracking",
                trained.uri,
                "--trained-on",
                "small-v1",
            ],
            catch_exceptions=False,
        )
