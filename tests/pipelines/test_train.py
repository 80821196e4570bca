"""Training from the command line: from a store to a registered model that answers."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from mlflow.entities import Run

from bragg_data.splits import Part, random_split
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.schema import samples_of
from bragg_models.metrics import errors, summary
from bragg_models.predictors import Predictor
from catalog import registry
from catalog.model_files import downloaded_model
from catalog.tracking import Tracking
from pipelines.evaluation.scoring import SPLIT
from pipelines.registry.registration import load_version
from pipelines.training.names import TrainError
from pipelines.training.presets import DEFAULT_PRESETS, Preset, Presets
from tests.small_bench import short_presets, train_here

pytestmark = pytest.mark.training

torch.set_num_threads(1)  # on small arrays more threads only wait for each other


def command(
    store: Store, tracking: Tracking, *more: str, presets: Presets = DEFAULT_PRESETS, **how: bool
) -> str:
    state = Path(tracking.uri.removeprefix("sqlite:///")).parent / "state"
    arguments = [*more, "--store", store.uri, "--tracking", tracking.uri, "--state", str(state)]
    if "--epochs" not in more:
        arguments += ["--epochs", "2"]
    return train_here(*arguments, presets=presets, **how)


@pytest.fixture(scope="module")
def tracking(
    tmp_path_factory: pytest.TempPathFactory, tracking_in: Callable[[Path], Tracking]
) -> Tracking:
    return tracking_in(tmp_path_factory.mktemp("tracking"))


@pytest.fixture(scope="module")
def output(small_store: Store, tracking: Tracking) -> str:
    return command(small_store, tracking)


@pytest.fixture(scope="module")
def predictor(output: str, tracking: Tracking) -> Predictor:
    assert "champion" in output
    champion = registry.find(tracking, "models:/small@champion")
    return load_version(tracking.uri, champion)


def run_of(tracking: Tracking, version: int = 1) -> Run:
    return tracking.client.get_run(registry.find(tracking, f"models:/small/{version}").run_id)


def test_the_loaded_champion_has_the_scores_of_the_run(
    predictor: Predictor, tracking: Tracking, small_dataset: xr.Dataset
) -> None:
    samples = samples_of(small_dataset)
    test = random_split(samples.crystal_system, seed=SPLIT["seed"]) == Part.test
    answer = predictor.predict(small_dataset.intensity.values[test])
    scores = summary(
        predictor.targets,
        errors(
            predictor.targets, samples.phase[test], samples.cells[test], answer.phase, answer.cells
        ),
    )
    logged = run_of(tracking).data.metrics
    for group, values in scores.items():
        for name, value in values.items():
            # A network's output varies in the last bits with the shape of the batch.
            assert logged[f"test/{group}/{name}"] == pytest.approx(value, rel=1e-4), (group, name)


def test_the_model_alone_names_its_origin(predictor: Predictor, small_dataset: xr.Dataset) -> None:
    attrs = small_dataset.attrs
    assert predictor.provenance.data.snapshot_id == attrs["snapshot_id"]
    assert predictor.provenance.data.content_hash == attrs["content_hash"]
    assert predictor.provenance.split.seed == SPLIT["seed"]
    assert predictor.campaign.toml == attrs["campaign_toml"]
    np.testing.assert_array_equal(predictor.campaign.grid.tof, small_dataset.tof.values)
    assert predictor.targets.names == ("cubic", "tetragonal", "trigonal")


def test_the_run_records_data_settings_and_losses(
    output: str, tracking: Tracking, small_dataset: xr.Dataset
) -> None:
    run = run_of(tracking)
    assert run.info.run_id in output
    assert run.data.tags["snapshot_id"] == small_dataset.attrs["snapshot_id"]
    assert run.data.tags["preset"] == "quick"
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", run.data.tags["code_commit"])
    assert run.data.params["seed"] == "0"
    assert run.data.params["settings.stages.multitask.epochs"] == "2"
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.name == "small-v1"
    losses = tracking.client.get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in losses] == [1, 2]
    assert losses[1].value < losses[0].value


def test_the_card_describes_the_model_and_its_limits(
    predictor: Predictor, tracking: Tracking
) -> None:
    version = registry.find(tracking, "models:/small@champion")
    entity = tracking.client.get_model_version("small", version.version)
    card = entity.description
    p = predictor.provenance
    for words in (
        "# multitask for small",
        "| `a` | Å | cell of the predicted phase |",
        "| `alpha` | ° |",
        f"snapshot `{p.data.snapshot_id}`",
        "## Limits",
        "| trigonal | trigonal | R 3 m:R | a 3.9 to 4.1 by 0.01 Å, alpha 80 to 88 by 1 ° |",
        f"| {p.test['all']['mse_paper']:.3g} |",
    ):
        assert words in card, card
    with downloaded_model(tracking.uri, version) as directory:
        assert (directory / "model_card.md").read_text() == card
        described = yaml.safe_load((directory.parents[1] / "MLmodel").read_text())
    assert described["metadata"]["units"]["alpha"] == "°"
    assert described["metadata"]["units"]["p_cubic"] == "1"
    run = run_of(tracking)
    assert "model_card.md" in [f.path for f in tracking.client.list_artifacts(run.info.run_id)]
    assert "@champion predicts" in tracking.client.get_registered_model("small").description


def test_the_output_shows_the_scores_and_what_to_type_next(output: str) -> None:
    assert "142" in output  # test samples: a fifth of 710
    words = (
        "cubic",
        "tetragonal",
        "trigonal",
        "mse_paper",
        "always the mean cell",
        "Registered: small version 1, champion",
        "python -m pipelines.predict FILE",
    )
    for word in words:
        assert word in output


def test_the_same_seed_gives_the_same_metrics_and_the_champion_stays(
    output: str, small_store: Store, tracking: Tracking
) -> None:
    assert "champion" in output
    again = command(small_store, tracking)
    assert "version 1 has a lower error there" in again
    first, second = run_of(tracking, 1).data.metrics, run_of(tracking, 2).data.metrics
    # How long it took and how busy the machine was is nothing a seed decides.
    names = {n for n in first if not n.endswith("seconds") and not n.startswith("system/")}
    assert {n: first[n] for n in names} == {n: second[n] for n in names}
    assert registry.champion(tracking, "small").version == "1"
    other = command(small_store, tracking, "--seed", "1", "--promote")
    assert "version 3, champion" in other
    assert registry.champion(tracking, "small").version == "3"
    assert run_of(tracking, 3).data.metrics["test/all/mse_paper"] != first["test/all/mse_paper"]


def test_scores_on_other_samples_are_not_compared(
    small_store: Store, tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    tracking = tracking_in(tmp_path)
    command(small_store, tracking)
    # As if the champion had been tested on another split.
    tracking.client.set_model_version_tag("small", "1", "test_set", "another")
    assert "tested on other samples" in command(small_store, tracking)
    assert registry.champion(tracking, "small").version == "1"


def test_what_cannot_be_trained_is_refused(
    small_store: Store, tracking: Tracking, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="Choose one of quick, standard, paper"):
        command(small_store, tracking, "--preset", "slow")
    with pytest.raises(StoreError, match="Known tags: small-v1"):
        command(small_store, tracking, "--data", "large-v1")
    with pytest.raises(StoreError, match=r"pipelines\.simulate"):
        command(Store(tmp_path / "empty", create=True), tracking)


def test_presets_take_other_values() -> None:
    def preset(name: str, epochs: int | None = None, max_seconds: float | None = None) -> Preset:
        return DEFAULT_PRESETS.network("multitask", name, epochs, max_seconds)

    assert preset("quick", epochs=7).stages["multitask"].epochs == 7
    assert preset("quick", max_seconds=0).max_seconds is None
    assert preset("quick", max_seconds=5).max_seconds == 5
    paper = preset("paper")
    settings = paper.stages["multitask"]
    assert (settings.epochs, settings.batch_size) == (500, 512)
    assert paper.preprocessing == "profile_minmax@1"


@pytest.mark.usefixtures("output")
def test_a_blocked_split_is_scored_but_does_not_answer(
    small_store: Store, tracking: Tracking
) -> None:
    before = registry.champion(tracking, "small")
    models = "classifier", "transfer"
    how = {"presets": short_presets(), "figures": True}
    output = command(small_store, tracking, *models, "--split", "blocked", **how)
    after = registry.champion(tracking, "small")
    assert before is not None
    assert after is not None
    assert before.version == after.version
    assert registry.champion(tracking, "small-classifier") is None
    newest = registry.versions(tracking, "small")[0]
    assert newest.tags["model"] == "transfer"
    assert newest.tags["split"].startswith("blocked")
    assert "blocked split" in output
    run = tracking.client.get_run(newest.run_id)
    assert {"regressor_cubic/train/loss", "test_true_system/all/mse_paper"} <= set(run.data.metrics)
    drawn = {file.path for file in tracking.client.list_artifacts(newest.run_id, "figures")}
    names = ("learning_curves", "confusion", "parity", "error_map")
    assert drawn == {f"figures/{name}.png" for name in names}


def test_a_missing_classifier_is_trained_and_networks_use_extra_data(
    small_store: Store, tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    tracking = tracking_in(tmp_path)
    extra = ("--epochs", "1", "--extra-data", "small-v1")
    short = short_presets()
    output = command(small_store, tracking, "deep", *extra, presets=short)
    assert "needs a classifier" in output
    assert registry.versions(tracking, "small-classifier")[0].tags["model"] == "classifier"
    # The old name of the option still works.
    old_name = "--beside"  # deprecated
    command(
        small_store, tracking, "multitask", "--epochs", "1", old_name, "small-v1", presets=short
    )
    for version in registry.versions(tracking, "small"):
        assert load_version(tracking.uri, version).provenance.extra_data == ("small-v1",)
        inputs = tracking.client.get_run(version.run_id).inputs.dataset_inputs
        contexts = {i.tags[0].value for i in inputs}
        assert "training, extra data" in contexts, version


def test_unknown_models_and_runs_are_refused(small_store: Store, tracking: Tracking) -> None:
    with pytest.raises(TrainError, match="There is no model 'transformer'"):
        command(small_store, tracking, "transformer")
    with pytest.raises(TrainError, match="Choose random or blocked"):
        command(small_store, tracking, "--split", "odd")
    with pytest.raises(TrainError, match="no checkpoint"):
        command(small_store, tracking, "--resume", "0123")
