"""Every model from the command line on a small data set, and what interruptions may not change."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.store.repository import Store
from bragg_models.forest import ForestModel
from bragg_models.networks.guided import Guided
from bragg_models.networks.paper import Caenn, Conditional, Multitask
from bragg_models.predictors import build
from catalog import registry
from catalog.tracking import Tracking, TrackingError
from pipelines.training import presets
from pipelines.training.names import ALL, MODELS, TrainError
from tests.small_bench import PROPOSAL_EPOCHS, Bench, short_presets

TESTED = 142


def test_all_models_are_trained_and_registered(everything: str, bench: Bench) -> None:
    for model in MODELS:
        (version,) = bench.versions(model)
        assert version.tags["data"] == "small-v1"
        assert f"({model}), run {version.run_id}" in everything
        run = bench.tracking.client.get_run(version.run_id)
        assert run.data.tags["code_commit"]
        assert run.info.run_name == f"{model} quick s0"
    # In their order, the classifier once, and the proposal network as a model of its own.
    order = [v.tags["model"] for v in reversed(registry.versions(bench.tracking, "small"))]
    networks = [name for name in ALL if name != "classifier"]
    assert order == [*networks, "perceptron", "multitask-integer"]
    assert everything.count("Training classifier (preset quick)") == 1
    assert not list((bench.state / "runs").iterdir())
    champion = registry.champion(bench.tracking, "small")
    assert champion is not None
    assert champion.tags["model"] == "guided"


def test_each_model_is_scored_on_the_test_samples(everything: str, bench: Bench) -> None:
    assert everything
    for model in MODELS:
        metrics = bench.metrics(model)
        assert metrics["test/all/n"] == TESTED, model
        accuracy = metrics["test/all/accuracy"]
        assert metrics["test/all/wrong"] == pytest.approx(TESTED * (1 - accuracy))
        if model == "classifier":
            assert "test/all/mse_paper" not in metrics
            score = metrics["test/all/wrong"] / TESTED
        else:
            score = metrics["test/all/mse_paper"]
        tag = float(bench.versions(model)[0].tags["score"])
        assert tag == pytest.approx(score, rel=1e-5)  # six digits, for people
    for model in ("forest", "transfer", "deep"):
        metrics = bench.metrics(model)
        assert metrics["test_true_system/all/accuracy"] == 1
        assert metrics["test_true_system/all/mse_paper"] >= 0
        # The phases are the classifier's.
        accuracy = bench.metrics("classifier")["test/all/accuracy"]
        assert metrics["test/all/accuracy"] == accuracy
    # Little can be trained here; the guided network has the physics.
    metrics = bench.metrics("guided")
    assert metrics["test/all/wrong"] == 0
    assert metrics["test/all/mse_paper"] < 1e-8
    assert metrics["test_proposal/all/mse_paper"] == pytest.approx(
        float(bench.versions("perceptron")[0].tags["score"]), rel=1e-5
    )
    assert 1e-5 < metrics["test_proposal/all/mse_paper"] < 0.1


def test_all_models_are_scored_on_the_same_simulated_measurements(
    everything: str, bench: Bench
) -> None:
    assert everything
    numbers = {}
    for model in MODELS:
        metrics = bench.metrics(model)
        draws = bench.predictor(model).provenance.draws
        assert draws is not None
        for group, scores in draws.items():
            for name, value in scores.items():
                assert metrics[f"draws/{group}/{name}"] == pytest.approx(value), (model, name)
        groups = ("all", "cubic", "tetragonal", "trigonal")
        numbers[model] = tuple(metrics[f"draws/{group}/n"] for group in groups)
        assert 0 <= metrics["draws/all/accuracy"] <= 1
    # The same two of each phase for all, also for those that are made for clean profiles.
    assert set(numbers.values()) == {(6, 2, 2, 2)}
    assert bench.metrics("guided")["draws_proposal/all/n"] == 6


def test_a_model_that_does_not_beat_the_constants_stays_a_candidate(
    bench: Bench, tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    quick = bench.presets.networks["multitask"]["quick"]
    untrained = {n: replace(s, learning_rate=1e-12) for n, s in quick.stages.items()}
    presets = short_presets(multitask=replace(quick, stages=untrained))
    other = replace(bench, presets=presets, tracking=tracking_in(tmp_path))
    output = other("multitask", "--epochs", "1")
    (version,) = other.versions("multitask")
    assert registry.champion(other.tracking, "small") is None
    assert registry.find(other.tracking, "models:/small@candidate").version == version.version
    provenance = other.predictor("multitask").provenance
    assert provenance.score is not None
    assert provenance.baselines is not None
    assert set(provenance.baselines) == {"constant (mean cell)", "constant (CIF's cell)"}
    assert provenance.score.value > min(provenance.baselines.values())
    assert "--force --reason" in output
    other("multitask", "--epochs", "1", "--seed", "1", "--promote")
    champion = registry.champion(other.tracking, "small")
    assert champion is not None
    assert champion.version == "2"


def test_epochs_are_logged_by_stage(everything: str, bench: Bench) -> None:
    assert everything
    regressors = [f"regressor_{name}/" for name in ("cubic", "tetragonal", "trigonal")]
    prefixes = {
        "classifier": [""],
        "multitask": [""],
        "multitask-integer": [""],
        "guided": [""],
        "transfer": regressors,
        "deep": regressors,
        "caenn": ["autoencoder/", "regressor/"],
    }
    for model, stages in prefixes.items():
        run = bench.versions(model)[0].run_id
        logged = bench.metrics(model)
        for stage in stages:
            for name in ("train/loss", "train/learning_rate"):
                history = bench.tracking.client.get_metric_history(run, f"{stage}{name}")
                expected = PROPOSAL_EPOCHS if model == "guided" else 1
                assert [m.step for m in history] == list(range(1, expected + 1)), (model, stage)
            assert any(n.startswith(f"{stage}validation/all/") for n in logged), (model, stage)
        logged_names = {name for name in logged if "/train/" in f"/{name}"}
        assert logged_names == {
            n for n in logged_names if any(n == f"{s}train/{n.split('/')[-1]}" for s in stages)
        }


def test_figures_are_drawn(everything: str, bench: Bench) -> None:
    assert everything
    always = {"confusion.png"}
    cells = {"parity.png", "error_map.png"}
    curves = {"learning_curves.png"}
    assert bench.figures("classifier") == always | curves
    for model in ("multitask", "multitask-integer", "transfer", "deep", "guided"):
        assert bench.figures(model) == always | cells | curves, model
    assert bench.figures("caenn") == always | cells | curves | {"reconstructions.png"}
    for model in ("forest", "integrated-forest"):
        assert bench.figures(model) == always | cells, model


def test_what_is_registered_predicts(everything: str, bench: Bench) -> None:
    assert everything
    profiles = bench.store.open("small-v1").intensity[:5].values
    kinds = {
        "multitask": Multitask,
        "multitask-integer": Multitask,
        "transfer": Conditional,
        "deep": Conditional,
        "caenn": Caenn,
        "guided": Guided,
        "forest": ForestModel,
        "integrated-forest": ForestModel,
    }
    for model, kind in kinds.items():
        predictor = bench.predictor(model)
        assert isinstance(predictor.model, kind), model
        assert predictor.provenance.model == model
        assert predictor.provenance.preset == "quick"
        prediction = predictor.predict(profiles)
        np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1, rtol=1e-5)
        for code in range(3):
            cells = prediction.cells[prediction.phase == code]
            predictor.targets.lattices[code].check_tied(cells)
    assert np.isnan(bench.predictor("classifier").predict(profiles).cells).all()


def test_frozen_features_stay_the_classifier_s(everything: str, bench: Bench) -> None:
    assert everything
    classifier = bench.predictor("classifier")
    assert isinstance(classifier.model, Multitask)
    for model in ("transfer", "deep"):
        predictor = bench.predictor(model)
        assert isinstance(predictor.model, Conditional)
        assert predictor.preprocessing == classifier.preprocessing
        for name, value in predictor.model.classifier.state_dict().items():
            assert torch.equal(value, classifier.model.state_dict()[name]), (model, name)
    uri = bench.versions("classifier")[0].uri
    assert predictor.provenance.classifier_uri == uri
    features = predictor.model.features[1].state_dict()
    assert not torch.equal(features["dense.0.weight"], classifier.model.features.dense[0].weight)


def test_the_deep_regressors_begin_with_the_classifier_s_weights(
    everything: str, bench: Bench
) -> None:
    assert everything
    quick = bench.presets.networks["deep"]["quick"]
    still = {stage: replace(s, learning_rate=1e-9) for stage, s in quick.stages.items()}
    presets = short_presets(deep=replace(quick, stages=still))
    output = replace(bench, presets=presets)("deep", "--seed", "5")
    assert f"The classifier {bench.versions('classifier')[0].uri} decides the phase" in output
    network, classifier = bench.predictor("deep").model, bench.predictor("classifier").model
    assert isinstance(network, Conditional)
    assert isinstance(classifier, Multitask)
    for features in network.features:
        for name, value in features.state_dict().items():
            expected = classifier.features.state_dict()[name]
            assert (value - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize("model", ["caenn", "transfer", "classifier"])
def test_the_same_seed_gives_the_same_metrics(everything: str, bench: Bench, model: str) -> None:
    assert everything
    shutil.rmtree(bench.state / "cache")
    bench(model)
    assert bench.metrics(model, 0) == bench.metrics(model, 1)
    bench(model, "--seed", "9")
    first, other = bench.metrics(model, 0), bench.metrics(model, 1)
    assert {k for k in first if first[k] != other[k]}


# ---- extra data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(
    bench: Bench,
    small_store: Store,
    campaign_file: Path,
    simulate_into: Callable[[Store, Campaign, str], None],
    tmp_path_factory: pytest.TempPathFactory,
    tracking_in: Callable[[Path], Tracking],
) -> Bench:
    """A store with cells between those of the small data set, and with other data sets."""
    directory = tmp_path_factory.mktemp("several")
    shutil.copytree(small_store.uri.removeprefix("file://"), directory / "store")
    store = Store(directory / "store")
    path = shutil.copytree(campaign_file.parent, directory / "campaign") / campaign_file.name
    text = path.read_text(encoding="utf-8")
    between = text.replace("3.90,", "3.905,").replace("4.10,", "4.095,").replace("0.002", "0.01")
    campaigns = {
        "between-v1": between.replace('"small"', '"between"'),
        "two-v1": text[: text.rindex("[[phases]]")].replace('"small"', '"two"'),
        "coarse-v1": text.replace("0.0012", "0.00121").replace('"small"', '"coarse"'),
    }
    for tag, changed in campaigns.items():
        path.write_text(changed, encoding="utf-8")
        simulate_into(store, load_campaign(path), tag)
    return replace(bench, store=store, tracking=tracking_in(directory), state=directory / "state")


def test_our_network_uses_extra_data_with_a_blocked_split(several: Bench) -> None:
    output = several("guided", "--extra-data", "between-v1", "--split", "blocked")
    assert ", champion" not in output
    assert registry.champion(several.tracking, "small") is None
    (version,) = several.versions("guided")
    assert version.tags["split"].startswith("blocked")
    run = several.tracking.client.get_run(version.run_id)
    used = {entry.dataset.name: entry.tags[0].value for entry in run.inputs.dataset_inputs}
    assert used == {"small-v1": "training", "between-v1": "training, extra data"}
    assert several.predictor("guided").provenance.extra_data == ("between-v1",)
    assert several.metrics("guided")["test/all/mse_paper"] < 1e-8


@pytest.mark.parametrize("tag", ["two-v1", "coarse-v1"])
def test_extra_data_of_another_campaign_is_refused(several: Bench, tag: str) -> None:
    with pytest.raises(TrainError, match=f"{tag} has other phases or another time-of-flight grid"):
        several("guided", "--extra-data", tag)


# ---- refused -----------------------------------------------------------------------------------


def test_impossible_requests_are_refused_before_anything_is_done(bench: Bench) -> None:
    wrong = {
        ("multitask", "guidde"): "There is no model 'guidde'",
        ("multitask", "guided", "--preset", "paper"): "There is no preset 'paper' of guided",
        ("caenn", "--preset", "fast"): "There is no preset 'fast' of caenn",
        ("forest", "--preset", "fast"): "There is no preset 'fast' of forest",
        ("multitask", "--split", "halves"): "There is no split 'halves'. Choose random or blocked",
        ("forest", "--extra-data", "small-v1"): "forest cannot be trained on further data sets",
        ("all", "--extra-data", "small-v1"): "forest cannot be trained on further data sets",
        ("robust", "--extra-data", "small-v1"): "robust cannot be trained on further data sets",
        ("--resume", "0" * 32): "has no checkpoint in",
    }
    before = len(bench.tracking.client.search_runs(["1"]))
    for arguments, message in wrong.items():
        with pytest.raises(TrainError) as refused:
            bench(*arguments)
        text = str(refused.value)
        assert message in text
        assert "\n" not in text
    assert len(bench.tracking.client.search_runs(["1"])) == before


def test_a_finished_run_is_not_resumed(everything: str, bench: Bench) -> None:
    assert everything
    run = bench.versions("multitask")[0].run_id
    with pytest.raises(TrainError, match=rf"'{run}' has no checkpoint.*There is none"):
        bench("--resume", run)
    with pytest.raises(TrackingError, match="is finished"), bench.tracking.resumed(run):
        pass


# ---- killed ------------------------------------------------------------------------------------

CHILD = "from tests.small_bench import short_presets, train; train.app(obj=short_presets())"


def killed(bench: Bench, stage: str, *arguments: str) -> str:
    """Start a training in a process of its own, kill it after the first epoch of a stage."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD,
            *arguments,
            "--store",
            bench.store.uri,
            "--data",
            "small-v1",
            *bench.places,
        ],
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with child:
        end = time.monotonic() + 120
        while not (checkpoints := list(bench.state.glob(f"runs/*/{stage}.safetensors"))):
            assert child.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    return checkpoints[0].parent.name


def as_the_version_before_saved_it(directory: Path) -> None:
    saved = json.loads((directory / "task.json").read_text())
    task = saved.pop("task")
    names = {"extra_data": "beside"}  # deprecated
    saved["order"] = {names.get(name, name): value for name, value in task.items()}
    saved["order"]["how"] = "search"
    (directory / "order.json").write_text(json.dumps(saved))
    (directory / "task.json").unlink()


@pytest.mark.parametrize(
    ("model", "stage", "epochs"), [("multitask", "multitask", 6), ("caenn", "regressor", 6)]
)
def test_killed_and_resumed_it_comes_to_the_same_scores(
    bench: Bench,
    tmp_path: Path,
    tracking_in: Callable[[Path], Tracking],
    model: str,
    stage: str,
    epochs: int,
) -> None:
    arguments = (model, "--seed", "3", "--epochs", str(epochs))
    other = replace(bench, tracking=tracking_in(tmp_path), state=tmp_path / "state")
    run = killed(other, stage, *arguments)
    client = other.tracking.client
    assert client.get_run(run).info.status == "RUNNING"
    assert not registry.versions(other.tracking, "small")
    prefix = f"{stage}/" if model == "caenn" else ""
    history_before = client.get_metric_history(run, f"{prefix}train/loss")
    assert len(history_before) < epochs
    with pytest.raises(TrainError, match=rf"Unfinished runs: {run}\."):
        other("--resume", "0" * 32)
    if model == "multitask":
        as_the_version_before_saved_it(other.state / "runs" / run)
    output = other("--resume", run)
    assert "from the checkpoint" in output
    assert client.get_run(run).info.status == "FINISHED"
    assert not list((other.state / "runs").iterdir())
    (version,) = other.versions(model)
    assert version.run_id == run
    history = client.get_metric_history(run, f"{prefix}train/loss")
    bench(*arguments)
    undisturbed = bench.metrics(model)
    resumed = other.metrics(model)
    final = {name for name in undisturbed if name.startswith("test/")}
    assert len(final) > 10
    assert {n: resumed[n] for n in final} == {n: undisturbed[n] for n in final}
    assert resumed == undisturbed
    whole = bench.tracking.client.get_metric_history(
        bench.versions(model)[0].run_id, f"{prefix}train/loss"
    )
    assert {m.step: m.value for m in history}.items() <= {m.step: m.value for m in whole}.items()
    network, resumed_network = bench.predictor(model).model, other.predictor(model).model
    assert isinstance(network, torch.nn.Module)
    assert isinstance(resumed_network, torch.nn.Module)
    for name, value in network.state_dict().items():
        assert torch.equal(value, resumed_network.state_dict()[name])


def test_presets_build_networks() -> None:
    """Whatever a preset says of its network has to fit the description."""
    shape = {"points": 2807, "phases": 3, "parameters": 3}
    for model in ("multitask", "multitask-integer", "caenn"):
        for preset in presets.PRESETS[model].values():
            build("caenn" if model == "caenn" else "multitask", {**shape, **preset.network})


def test_a_chosen_part_of_the_samples_leaves_all_for_validation(
    everything: str, bench: Bench
) -> None:
    assert everything
    quick = replace(bench.presets.networks["caenn"]["quick"], training_samples=200)
    replace(bench, presets=short_presets(caenn=quick))("caenn", "--seed", "11")
    metrics = bench.metrics("caenn")
    assert metrics["regressor/validation/all/n"] > 20
    assert metrics["autoencoder/validation/all/mae"] > 0
