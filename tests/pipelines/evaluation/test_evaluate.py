"""Evaluation from the command line: registered models, baselines and the paper side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from typer.testing import CliRunner

from bragg_data.splits import Part, random_split
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.metrics import errors, summary
from bragg_models.targets import Targets, targets_of
from catalog import registry
from catalog.registry import ModelError
from catalog.tracking import Tracking
from pipelines import evaluate
from pipelines.evaluation.candidates import Candidate, load_candidate
from pipelines.evaluation.names import EvaluateError
from pipelines.evaluation.scoring import EvaluatedModel, held_out_sets, score_set
from pipelines.evaluation.tables import PaperTables, number, with_interval
from pipelines.registry.registration import load_version
from tests.small_bench import short_presets, train_here

pytestmark = pytest.mark.training

TAG = "small-v1"

torch.set_num_threads(1)  # on small arrays more threads only wait for each other


def run(store: Store, tracking: Tracking, *more: str) -> str:
    arguments = ["--store", store.uri, "--tracking", tracking.uri, "--bootstrap", "50", *more]
    result = CliRunner().invoke(evaluate.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def targets_of_all(dataset: xr.Dataset) -> Targets:
    labels = samples_of(dataset)
    return targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)


@pytest.fixture(scope="module")
def tracking(
    small_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    tracking_in: Callable[[Path], Tracking],
) -> Tracking:
    """Two multitask models, and a transfer learner on a classifier of its own."""
    place = tracking_in(tmp_path_factory.mktemp("tracking"))
    common = ["--store", small_store.uri, "--tracking", place.uri, "--epochs", "1", "--data", TAG]
    common += ["--no-cache", "--state", str(tmp_path_factory.mktemp("state"))]
    for model, seed in (("multitask", "0"), ("multitask", "1"), ("transfer", "0")):
        train_here(model, "--seed", seed, *common, presets=short_presets())
    return place


@pytest.fixture(scope="module")
def markdown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "results.md"


@pytest.fixture(scope="module")
def report(small_store: Store, tracking: Tracking, markdown: Path) -> dict[str, Any]:
    more = ("--json", "--offgrid", TAG, "--markdown", str(markdown))
    values: dict[str, Any] = json.loads(run(small_store, tracking, *more))
    return values


def test_json_holds_every_test_set_and_model(report: dict[str, Any]) -> None:
    assert report["data"]["tag"] == TAG
    assert list(report["test_sets"]) == ["random", "blocked", "off-grid"]
    random = report["test_sets"]["random"]["models"]
    assert list(random) == [
        "constant",
        "library",
        "library-mean",
        "classifier",
        "transfer",
        "multitask",
    ]
    assert list(report["test_sets"]["blocked"]["models"]) == ["constant", "library", "library-mean"]
    scores = random["multitask"]["groups"]
    assert set(scores) == {"all", "cubic", "tetragonal", "trigonal"}
    for values in scores.values():
        assert values["mse_paper_low"] <= values["mse_paper"] <= values["mse_paper_high"]
        assert values["wrong"] == pytest.approx((1 - values["accuracy"]) * values["n"])
    assert random["constant"]["groups"]["cubic"]["accuracy"] == 0.0
    missing = {
        (model["model"], model["split"]): model["command"] for model in report["not_trained"]
    }
    assert missing["guided", "blocked"] == "python -m pipelines.train guided --split blocked"
    assert ("multitask", "random") not in missing
    # Results are what was measured; what was aimed at is none of them.
    assert "bars" not in report


def test_a_class_conditional_model_is_scored_end_to_end_and_with_the_true_system(
    report: dict[str, Any], tracking: Tracking
) -> None:
    random = report["test_sets"]["random"]["models"]
    groups, given = random["transfer"]["groups"], random["transfer"]["true_system"]
    assert random["multitask"]["true_system"] is None
    assert set(random["classifier"]["groups"]["all"]) == {
        "n",
        "accuracy",
        "accuracy_phase",
        "wrong",
    }
    # It asks the classifier which system it is.
    assert groups["all"]["wrong"] == random["classifier"]["groups"]["all"]["wrong"]
    assert given["all"]["wrong"] == 0
    for system, values in given.items():
        if groups[system]["wrong"] == 0:
            assert values["mse_paper"] == pytest.approx(groups[system]["mse_paper"])
    (run_,) = tracking.client.search_runs(
        [tracking.experiment("small")], "metrics.`evaluate/blocked/constant/all/n` > 0"
    )
    key = "evaluate/random/transfer/cubic_true_system/mse_paper"
    assert run_.data.metrics[key] == given["cubic"]["mse_paper"]


def test_the_newest_version_is_scored_as_by_hand(
    report: dict[str, Any], tracking: Tracking, small_dataset: xr.Dataset
) -> None:
    score = report["test_sets"]["random"]["models"]["multitask"]
    assert score["uri"] == "models:/small/2"
    version = registry.find(tracking, score["uri"])
    predictor = load_version(tracking.uri, version)
    samples = samples_of(small_dataset)
    test = random_split(samples.crystal_system, seed=0) == Part.test
    answer = predictor.predict(small_dataset.intensity.values[test])
    expected = summary(
        predictor.targets,
        errors(
            predictor.targets, samples.phase[test], samples.cells[test], answer.phase, answer.cells
        ),
    )
    for group, values in expected.items():
        for name, value in values.items():
            assert score["groups"][group][name] == pytest.approx(value, rel=1e-4), (group, name)


def test_a_library_that_holds_the_samples_finds_them(report: dict[str, Any]) -> None:
    # What stands for the off-grid set here is the data set itself: only what was kept out of the
    # library has an error.
    all_of_it = report["test_sets"]["off-grid"]["models"]["library"]["groups"]["all"]
    held_out = report["test_sets"]["random"]["models"]["library"]["groups"]["all"]
    assert all_of_it["n"] == 710
    total = held_out["mse_paper"] * held_out["n"]
    assert all_of_it["mse_paper"] * 710 == pytest.approx(total, rel=1e-4)


def test_speed_and_size_are_measured(report: dict[str, Any], tracking: Tracking) -> None:
    speed = {model["model"]: model for model in report["speed"]}
    assert set(speed) == {"library", "classifier", "transfer", "multitask"}
    version = registry.find(tracking, "models:/small/2")
    network = load_version(tracking.uri, version).model
    assert isinstance(network, nn.Module)
    assert speed["multitask"]["weights"] == sum(p.numel() for p in network.parameters())
    assert speed["multitask"]["bytes"] > 4 * speed["multitask"]["weights"]
    assert 0 < speed["multitask"]["one"] < speed["multitask"]["batch"]


def test_the_run_has_it_too(report: dict[str, Any], tracking: Tracking) -> None:
    (run_,) = tracking.client.search_runs(
        [tracking.experiment("small")], "metrics.`evaluate/blocked/constant/all/n` > 0"
    )
    score = report["test_sets"]["random"]["models"]["multitask"]["groups"]["all"]
    metrics = run_.data.metrics
    assert metrics["evaluate/random/multitask/all/mse_paper"] == score["mse_paper"]
    assert metrics["evaluate/blocked/library/cubic/mse_paper_low"] > 0
    assert run_.data.tags["content_hash"] == report["data"]["content_hash"]
    assert {i.dataset.name for i in run_.inputs.dataset_inputs} == {TAG}


def test_markdown_is_enough_to_make_it_again(report: dict[str, Any], markdown: Path) -> None:
    text = markdown.read_text(encoding="utf-8")
    for expected in (
        report["date"],
        report["commit"],
        TAG,
        report["data"]["snapshot_id"],
        f"python -m pipelines.train multitask --data {TAG} --preset quick --seed 1 --epochs 1",
        f"python -m pipelines.evaluate --data {TAG} --offgrid {TAG} --bootstrap 50",
        "Not trained: python -m pipelines.train integrated-forest caenn guided\n",
        "pipelines.train integrated-forest multitask caenn guided --split blocked",
        "### Table II, class-conditional models: random split, 142 samples",
        "### Table III, integrated models: off the grid, 710 samples",
    ):
        assert expected in text, expected
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert not any("1.90e-5" in row for row in rows)  # the paper's numbers are for its campaign
    headings = [line.count("|") for line in rows]
    assert all(count > 4 for count in headings)


def test_tables_are_printed_for_versions_by_address(small_store: Store, tracking: Tracking) -> None:
    more = ["--models", "models:/small/1", "--models", "models:/small/2"]
    output = run(small_store, tracking, *more, "--limit", "30", "--no-library")
    assert "multitask v1" in output
    assert "multitask v2" in output
    assert "random split, 30 samples" in output
    assert "give its tag with --offgrid" in output
    assert "library, nearest" not in output


def test_what_cannot_be_evaluated_is_refused(
    small_store: Store, tracking: Tracking, tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    with pytest.raises(EvaluateError, match=r"no model 'alexnet'\. Choose of classifier"):
        run(small_store, tracking, "--models", "alexnet")
    with pytest.raises(EvaluateError, match="train guided --data small-v1"):
        run(small_store, tracking, "--models", "guided")
    with pytest.raises(ModelError, match="versions 1, 2"):
        run(small_store, tracking, "--models", "models:/small/9")
    with pytest.raises(StoreError, match="Known tags: small-v1"):
        run(small_store, tracking, "--data", "large-v1")
    empty = tracking_in(tmp_path)
    with pytest.raises(EvaluateError, match=r"first: python -m pipelines\.train"):
        run(small_store, empty)
    with pytest.raises(EvaluateError, match=r"first: python -m pipelines\.train all --data"):
        run(small_store, empty, "--data", TAG)


def test_a_model_that_may_be_trained_on_the_test_samples_is_refused(
    tracking: Tracking, small_dataset: xr.Dataset
) -> None:
    labels = samples_of(small_dataset)
    part = random_split(labels.crystal_system, seed=3)
    version = registry.find(tracking, "models:/small/2")
    targets = targets_of_all(small_dataset)
    with pytest.raises(EvaluateError, match="does not keep these test samples from it"):
        load_candidate(Candidate(version), tracking, targets, labels, part != Part.test)
    loaded = load_candidate(
        Candidate(version),
        tracking,
        targets,
        labels,
        random_split(labels.crystal_system, seed=0) != Part.test,
    )
    assert loaded.uri == version.uri


def test_another_grid_off_the_grid_is_refused(small_dataset: xr.Dataset) -> None:
    shorter = small_dataset.isel(tof=slice(700))
    with pytest.raises(EvaluateError, match="Name another data set with --offgrid"):
        held_out_sets(small_dataset, shorter)


def test_the_true_system_replaces_a_wrong_system(small_dataset: xr.Dataset) -> None:
    test = held_out_sets(small_dataset, None, limit=60)[0]
    labels = samples_of(small_dataset)
    rows = np.flatnonzero(test.selected)
    calls: list[int] = []

    def ask(profiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The truth, but for a cubic cell everywhere.
        return np.zeros(len(profiles), dtype=int), labels.cells[rows]

    def given(profiles: np.ndarray, _: np.ndarray) -> np.ndarray:
        calls.append(len(profiles))
        return labels.cells[rows[labels.phase[rows] != 0]] + [0.1, 0, 0, 0, 0, 0]

    targets = targets_of_all(small_dataset)
    model = EvaluatedModel("forest", "forest", "forest", ask, given)
    (score,) = score_set(test, [model], targets, resamples=20, quiet=True)
    other = int((labels.phase[rows] != 0).sum())
    assert calls == [other]
    assert score.groups["all"]["wrong"] == other
    assert score.groups["all"]["mse_paper"] == 0
    assert score.true_system is not None
    assert score.true_system["all"]["wrong"] == 0
    assert score.true_system["trigonal"]["mse_paper"] == pytest.approx(0.01)
    assert score.true_system["cubic"]["mse_paper"] == 0


def test_a_classifier_is_scored_on_systems_alone(small_dataset: xr.Dataset) -> None:
    test = held_out_sets(small_dataset, None, limit=60)[0]
    targets = targets_of_all(small_dataset)
    model = EvaluatedModel(
        "classifier",
        "classifier",
        "classifier",
        lambda profiles: (np.zeros(len(profiles), dtype=int), None),
    )
    (score,) = score_set(test, [model], targets, resamples=20, quiet=True)
    assert set(score.groups["all"]) == {"n", "accuracy", "accuracy_phase", "wrong"}
    assert score.groups["cubic"]["wrong"] == 0
    assert score.groups["trigonal"]["wrong"] == score.groups["trigonal"]["n"]
    sheet = PaperTables("some", targets, with_paper=True).class_conditional([score])
    sheet.show()
    assert "| classifier | 0 |" in sheet.markdown()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (4.3649e-6, "4.36e-6"), (0.0123, "0.0123"), (12345.0, "1.23e4"), (None, "")],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_an_interval_shares_the_power_of_ten() -> None:
    values = {"x": 4.36e-6, "x_low": 0.5e-6, "x_high": 1.2e-5}
    assert with_interval(values, "x") == "4.36e-6 (0.50–12.00)"
    assert with_interval({"x": 4.36e-6}, "x") == "4.36e-6"
    assert with_interval({}, "x") == ""
