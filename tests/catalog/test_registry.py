"""Runs, data sets and models in a real MLflow on sqlite."""

import base64
import json
import multiprocessing
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import xarray as xr

from bragg_data.model_provenance import ModelProvenance, SnapshotReference
from bragg_data.store.repository import Store, open_snapshot
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.predictors import (
    DESCRIPTION,
    FORMAT,
    WEIGHTS,
    Predictor,
    PredictorError,
    build,
    load_predictor,
    output_columns,
)
from bragg_models.targets import targets_of
from catalog import banks, model_files, registry
from catalog.experiment_view import configure_experiment, experiment_url
from catalog.model_files import ModelPackage
from catalog.registry import ModelError, ModelKind, ModelVersion, RegistryEntry
from catalog.tracking import Run, Tracking, TrackingError
from pipelines.registry.registration import load_version
from tests.servers import open_experiment

SMALL = RegistryEntry("small", ModelKind.CELL, "small", "all of them")


@pytest.fixture(scope="module")
def tracking(
    tmp_path_factory: pytest.TempPathFactory, tracking_in: Callable[[Path], Tracking]
) -> Tracking:
    return tracking_in(tmp_path_factory.mktemp("tracking"))


@pytest.fixture(scope="module")
def predictor(small_dataset: xr.Dataset) -> Predictor:
    attrs = small_dataset.attrs
    campaign, samples = campaign_of(small_dataset), samples_of(small_dataset)
    points = small_dataset.sizes["tof"]
    network = build("multitask", {"points": points, "phases": 3, "parameters": 3}, seed=1)
    provenance = ModelProvenance(
        campaign_toml=campaign.toml,
        cifs=dict(campaign.cifs),
        instrument_instprm=campaign.instprm,
        data=SnapshotReference.from_attrs(attrs),
    )
    targets = targets_of(campaign.phases, samples.phase, samples.cells)
    return Predictor("multitask", network, targets, "profile_minmax@1", points, provenance)


@pytest.fixture(scope="module")
def profiles(small_dataset: xr.Dataset) -> np.ndarray:
    return small_dataset.intensity[:20].values


def registered(
    run: Run, predictor: Predictor, directory: Path, entry: RegistryEntry = SMALL
) -> ModelVersion:
    predictor.save(directory)
    package = ModelPackage(
        directory, predictor.points, outputs=output_columns(predictor.targets), units={"a": "Å"}
    )
    return model_files.register(
        run, entry, package, description="a test", tags={"mse_paper": "0.5", "test_set": "x"}
    )


def directory_of(version: ModelVersion) -> Path:
    return Path(unquote(urlsplit(version.source).path))


@pytest.fixture(scope="module")
def version(
    tracking: Tracking, predictor: Predictor, tmp_path_factory: pytest.TempPathFactory
) -> ModelVersion:
    with tracking.run("small", "a run", {}) as run:
        return registered(run, predictor, tmp_path_factory.mktemp("model") / "predictor")


def test_a_run_holds_what_was_logged(tracking: Tracking, small_dataset: xr.Dataset) -> None:
    with tracking.run("small", "logging", {"preset": "quick"}) as run:
        run.log_parameters(
            {"seed": 3, "network": {"hidden": 256}, **{f"p{k}": k for k in range(150)}}
        )
        for step in (1, 2):
            run.log_metrics({"validation": {"all": {"accuracy": 0.1 * step}}}, step=step)
        run.log_dataset(small_dataset, "training")
        run.log_text("hello", "notes/one.txt")
    logged = tracking.client.get_run(run.id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["seed"] == "3"
    assert logged.data.params["network.hidden"] == "256"
    assert logged.data.params["p149"] == "149"
    assert logged.data.tags["preset"] == "quick"
    assert logged.data.tags["version.torch"]
    history = tracking.client.get_metric_history(run.id, "validation/all/accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2)]
    assert [a.path for a in tracking.client.list_artifacts(run.id, "notes")] == ["notes/one.txt"]


def test_the_snapshot_of_a_run_opens_again(
    tracking: Tracking, small_dataset: xr.Dataset, small_store: Store
) -> None:
    with tracking.run("small", "data", {}) as run:
        run.log_dataset(small_dataset, "training")
    (entry,) = tracking.client.get_run(run.id).inputs.dataset_inputs
    assert entry.dataset.name == "small-v1"
    assert entry.dataset.digest == small_dataset.attrs["snapshot_id"]
    assert {t.key: t.value for t in entry.tags} == {"mlflow.data.context": "training"}
    assert entry.dataset.source_type == "icechunk"
    source = json.loads(entry.dataset.source)
    names = ("uri", "tag", "snapshot_id", "content_hash")
    assert source == {name: small_dataset.attrs[name] for name in names}
    assert source["uri"] == small_store.uri
    again = open_snapshot(source["tag"], source["uri"])
    assert again.attrs["content_hash"] == small_dataset.attrs["content_hash"]
    np.testing.assert_array_equal(again.a.values, small_dataset.a.values)


def test_a_run_that_breaks_is_marked_so(tracking: Tracking) -> None:
    with pytest.raises(ZeroDivisionError), tracking.run("small", "broken", {}) as run:
        raise ZeroDivisionError
    assert tracking.client.get_run(run.id).info.status == "FAILED"
    with pytest.raises(KeyboardInterrupt), tracking.run("small", "stopped", {}) as run:
        raise KeyboardInterrupt
    assert tracking.client.get_run(run.id).info.status == "KILLED"


def test_a_model_is_loaded_by_its_alias_and_predicts_as_before(
    tracking: Tracking, version: ModelVersion, predictor: Predictor, profiles: np.ndarray
) -> None:
    registry.set_alias(tracking, version, registry.CHAMPION)
    # As another process would find it.
    elsewhere = Tracking(tracking.uri)
    champion = registry.find(elsewhere, "models:/small@champion")
    assert champion.uri == version.uri == "models:/small/1"
    assert champion.aliases == ("champion",)
    assert registry.champion(elsewhere, "small") == champion
    loaded = load_version(elsewhere.uri, champion)
    before, after = predictor.predict(profiles), loaded.predict(profiles)
    np.testing.assert_array_equal(before.probabilities, after.probabilities)
    np.testing.assert_array_equal(before.phase, after.phase)
    np.testing.assert_array_equal(before.cells, after.cells)
    assert loaded.targets.names == ("cubic", "tetragonal", "trigonal")
    assert loaded.campaign.grid == predictor.campaign.grid
    assert loaded.campaign.instrument == predictor.campaign.instrument
    assert loaded.provenance == predictor.provenance
    # Whatever the scale of the intensities.
    scaled = loaded.predict(profiles * 1024)
    np.testing.assert_allclose(scaled.probabilities, after.probabilities, atol=1e-5)


def test_a_version_that_was_copied_in_mlflow_predicts_too(
    tmp_path: Path,
    tracking_in: Callable[[Path], Tracking],
    predictor: Predictor,
    profiles: np.ndarray,
) -> None:
    place = tracking_in(tmp_path)
    with place.run("small", "a run", {}) as run:
        version = registered(run, predictor, tmp_path / "predictor")
    again = [("small-measured", version.uri), ("twice", "models:/small-measured/1")]
    for name, source in again:
        place.client.copy_model_version(source, name)
        copied = registry.find(place, f"models:/{name}/1")
        assert copied.source == version.source
        prediction = load_version(place.uri, copied).predict(profiles)
        np.testing.assert_array_equal(prediction.cells, predictor.predict(profiles).cells)


def test_the_champion_for_measured_profiles_is_the_default(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking], predictor: Predictor
) -> None:
    place = tracking_in(tmp_path)
    with place.run("small", "a run", {}) as run:
        version = registered(run, predictor, tmp_path / "predictor")
    registry.set_alias(place, version, registry.CHAMPION)
    name = registry.registered_name("small", "robust")
    place.client.copy_model_version(version.uri, name)
    place.client.copy_model_version(version.uri, registry.registered_name("small", "classifier"))
    # Nobody has made it the champion yet.
    assert registry.champion_uri(place) == "models:/small@champion"
    registry.set_alias(place, registry.find(place, f"models:/{name}/1"), registry.CHAMPION)
    assert registry.champion_uri(place) == "models:/small-measured@champion"
    place.client.copy_model_version(version.uri, "large")
    with pytest.raises(ModelError, match="registered: large, small-measured"):
        registry.champion_uri(place)


def test_the_champions_of_several_banks(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking], predictor: Predictor
) -> None:
    place = tracking_in(tmp_path)
    with place.run("small", "a run", {}) as run:
        entry = RegistryEntry("x-bank10-measured", ModelKind.MEASURED, "x-bank10")
        version = registered(run, predictor, tmp_path / "predictor", entry)
    assert banks.champions(place, None) == []  # no champion
    registry.set_alias(place, version, registry.CHAMPION)
    assert banks.champions(place, None) == []  # one model, which is found by its name
    for name in ("x-bank2", "x-bank3", "y"):
        place.client.copy_model_version(version.uri, f"{name}-measured")
    registry.set_alias(place, registry.find(place, "models:/x-bank2-measured/1"), "champion")
    of_banks = "models:/x-bank*-measured@champion"
    names = ["x-bank2-measured", "x-bank10-measured"]  # of the third there is a candidate alone
    assert [v.name for v in banks.champions(place, of_banks)] == names
    assert [v.name for v in banks.champions(place, None)] == names
    assert banks.champions(place, "models:/x-bank2-measured@champion") == []
    registry.set_alias(place, registry.find(place, "models:/y-measured/1"), "champion")
    assert banks.champions(place, None) == []
    for address in ("models:/z-bank*@champion", "models:/x-bank*-measured/1"):
        with pytest.raises(ModelError, match=r"No champion in .* matches"):
            banks.champions(place, address)
    assert banks.address_of(["x-bank1", "x-bank2"]) == of_banks
    assert banks.address_of(["x-bank1", "y-bank2"]) is None
    assert banks.address_of(["x", "x-bank2"]) is None


def test_tools_of_mlflow_read_it_too(
    version: ModelVersion, predictor: Predictor, profiles: np.ndarray
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about itself
        from mlflow.pyfunc import load_model

    table = load_model(version.source).predict(profiles)
    answer = predictor.predict(profiles)
    np.testing.assert_array_equal(table[["a", "b", "c", "alpha", "beta", "gamma"]], answer.cells)
    assert table["phase"].tolist() == [predictor.targets.names[k] for k in answer.phase]
    assert list(table.columns) == list(output_columns(predictor.targets))


def test_pickles_and_other_formats_are_refused(
    tracking: Tracking, predictor: Predictor, tmp_path: Path
) -> None:
    with tracking.run("small", "bad", {}) as run:
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "network.pt2").write_bytes(b"")
        with pytest.raises(ModelError, match=r"network\.pt2.*can run any code"):
            registered(run, predictor, tmp_path / "bad")
        # Slipped in after it was registered.
        good = registered(run, predictor, tmp_path / "good", replace(SMALL, name="slipped"))
    (directory_of(good) / "python_model.pkl").write_bytes(b"cos\nsystem\n")
    with (
        pytest.raises(ModelError, match=r"python_model\.pkl.*can run any code"),
        model_files.downloaded_model(tracking.uri, good),
    ):
        pass


def test_a_model_of_another_project_is_refused(
    tracking: Tracking, predictor: Predictor, tmp_path: Path
) -> None:
    with tracking.run("small", "foreign", {}) as run:
        foreign = registered(run, predictor, tmp_path / "model", replace(SMALL, name="foreign"))
    described = directory_of(foreign) / "MLmodel"
    ours = described.read_text()
    assert model_files.LOADER in ours
    described.write_text(ours.replace(model_files.LOADER, "json"))
    with (
        pytest.raises(ModelError, match="not a model of this project"),
        model_files.downloaded_model(tracking.uri, foreign),
    ):
        pass
    described.write_text(ours.replace("data: data/model", "data: ../.."))
    assert described.read_text() != ours
    with (
        pytest.raises(ModelError, match="outside its own files"),
        model_files.downloaded_model(tracking.uri, foreign),
    ):
        pass


def test_an_unknown_address_is_refused_with_the_known_ones(
    tracking: Tracking, version: ModelVersion
) -> None:
    with pytest.raises(ModelError, match=r"Registered models:.* small"):
        registry.find(tracking, "models:/large@champion")
    with pytest.raises(ModelError, match="It has the versions 1"):
        registry.find(tracking, "models:/small/99")
    with pytest.raises(ModelError, match="models:/NAME@champion"):
        registry.find(tracking, "small")
    assert registry.champion(tracking, "large") is None
    assert version.name in registry.names(tracking)


def test_an_empty_registry_is_refused_with_the_remedy(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    with pytest.raises(ModelError, match=r"pipelines\.train"):
        registry.find(tracking_in(tmp_path), "models:/small@champion")


def test_a_tracking_uri_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(TrackingError, match="--tracking"):
        Tracking(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(TrackingError, match="--tracking"):
        Tracking("nonsense://somewhere")


@pytest.mark.slow
def test_processes_that_make_the_database_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(open_experiment, [uri] * 2, chunksize=1))) == 1


def test_the_shared_view_is_written_once(tracking: Tracking) -> None:
    experiment = tracking.experiment("arranged")
    configure_experiment(tracking, experiment)
    tags = tracking.client.get_experiment(experiment).tags
    kind, _, packed = tags["mlflow.sharedViewState.models"].partition(";")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert kind == "deflate"
    assert state["orderByKey"] == "metrics.`draws/all/mse_paper`"
    # Runs of an earlier version have no metrics but those under test/.
    for column in ("draws/all/mse_paper", "test/all/mse_paper", "measured/all/mse_paper"):
        assert f"metrics.`{column}`" in state["selectedColumns"]
        assert column in tags["mlflow.note.content"]
    assert "mse_paper" in tags["mlflow.note.content"]
    configure_experiment(tracking, experiment)
    assert tracking.client.get_experiment(experiment).tags == tags
    assert experiment_url("http://here", experiment).endswith("&viewStateShareKey=models")


@pytest.mark.slow
def test_nothing_is_printed(tmp_path: Path) -> None:
    code = (
        "from catalog.tracking import Tracking\n"
        f"tracking = Tracking('sqlite:///{tmp_path}/deep/mlflow.db')\n"
        "with tracking.run('quiet', 'one', {}) as run: run.log_metrics({'a': 1.0})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_a_damaged_model_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    predictor.save(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(PredictorError, match="incomplete or damaged"):
        load_predictor(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(weights)
    load_predictor(tmp_path)
    described = (tmp_path / DESCRIPTION).read_text()
    (tmp_path / DESCRIPTION).write_text(described.replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(PredictorError, match="Use the code that wrote it"):
        load_predictor(tmp_path)
    (tmp_path / DESCRIPTION).write_text(described.replace("profile_minmax@1", "profile_magic@7"))
    with pytest.raises(PredictorError, match="profile_magic@7"):
        load_predictor(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    with pytest.raises(PredictorError, match="incomplete or damaged"):
        load_predictor(tmp_path)


def test_profiles_that_do_not_fit_are_refused(predictor: Predictor) -> None:
    with pytest.raises(PredictorError, match="800 points"):
        predictor.predict(np.ones((2, 2807)))
    with pytest.raises(PredictorError, match="not finite"):
        predictor.predict(np.full((1, 800), np.nan))


@pytest.mark.slow
def test_a_watched_run_logs_system_metrics(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = tracking_in(tmp_path)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with tracking.run("small", "watched", {}, watch=True) as watched:
        end = time.monotonic() + 20
        while not any(n.startswith("system/") for n in metrics_of(tracking, watched.id)):
            assert time.monotonic() < end
            time.sleep(0.05)
    assert metrics_of(tracking, watched.id)["system/system_memory_usage_megabytes"] > 0
    with tracking.run("small", "alone", {}) as alone:
        time.sleep(0.3)
    assert metrics_of(tracking, alone.id) == {}


def metrics_of(tracking: Tracking, run: str) -> dict[str, float]:
    return dict(tracking.client.get_run(run).data.metrics)


def test_a_description_edited_by_a_person_stays(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking], predictor: Predictor
) -> None:
    place = tracking_in(tmp_path)
    with place.run("small", "a run", {}) as run:
        registered(run, predictor, tmp_path / "first")
        assert place.client.get_registered_model("small").description == SMALL.description
        place.client.update_registered_model("small", "Edited by a person.")
        newer = replace(SMALL, description="written again")
        version = registered(run, predictor, tmp_path / "second", newer)
    assert version.version == "2"
    model = place.client.get_registered_model("small")
    assert model.description == "Edited by a person."
    assert model.tags == {"bragg.kind": "cell", "bragg.campaign": "small"}


def test_a_model_of_an_earlier_version_gets_its_tags(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking], predictor: Predictor
) -> None:
    place = tracking_in(tmp_path)
    place.client.create_registered_model("small")
    with place.run("small", "a run", {}) as run:
        registered(run, predictor, tmp_path / "first")
    model = place.client.get_registered_model("small")
    assert model.tags == {"bragg.kind": "cell", "bragg.campaign": "small"}
    assert model.description == SMALL.description
