"""Damaged, moved, locked and emptied registries: cause and remedy, in a sentence."""

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import xarray as xr

from bragg_data.store.repository import Store
from catalog import database, model_files, registry
from catalog.registry import ModelError, ModelVersion
from catalog.tracking import Tracking, TrackingError
from pipelines import predict
from pipelines import tracking as tracking_command
from pipelines.cli.console import run as run_command
from pipelines.prediction.library import open_library
from pipelines.registry.packages import version_that_predicts
from pipelines.registry.registration import load_version
from tests.catalog.test_shared_registry import add_version
from tests.damage import flip
from tests.small_bench import train_multitask

NAME = "small"


@pytest.fixture(scope="module")
def original(
    small_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    tracking_in: Callable[[Path], Tracking],
) -> Path:
    """A folder with a store, and a registry with a model that was trained on it; not to change."""
    folder = tmp_path_factory.mktemp("original") / "check out"
    shutil.copytree(small_store.path, folder / "data" / "store")
    train_multitask(Store(folder / "data" / "store"), tracking_in(folder / "data"))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """The folder, moved: nothing is where it was when it was trained."""
    hidden = original.with_name("hidden")
    shutil.copytree(original, tmp_path / "moved")
    original.rename(hidden)
    yield tmp_path / "moved"
    hidden.rename(original)


def tracking_of(folder: Path) -> Tracking:
    return Tracking(f"sqlite:///{folder}/data/mlflow.db")


def champion_of(tracking: Tracking) -> ModelVersion:
    return registry.versions(tracking, NAME)[0]


def test_a_moved_folder_predicts_as_before(folder: Path, small_dataset: xr.Dataset) -> None:
    tracking = tracking_of(folder)
    version = champion_of(tracking)
    assert not Path(unquote(urlsplit(version.source).path)).exists()
    predictor = load_version(tracking.uri, version)
    prediction = predictor.predict(small_dataset.intensity[:5].values)
    assert np.isfinite(prediction.cells).all()
    store = str(folder / "data" / "store")
    library = open_library(predictor, store)
    assert library is not None
    assert library.dataset.attrs["uri"].endswith("/moved/data/store")


def test_relocate_lets_a_moved_folder_train(folder: Path) -> None:
    tracking, store = tracking_of(folder), Store(folder / "data" / "store")
    with pytest.raises(TrackingError, match=r"was moved: .*pipelines\.tracking relocate"):
        tracking.experiment(NAME)
    assert database.relocate(folder / "data" / "mlflow.db") > 4
    assert database.relocate(folder / "data" / "mlflow.db") == 0
    source = Path(unquote(urlsplit(champion_of(tracking_of(folder)).source).path))
    assert source.is_relative_to(folder)
    assert source.exists()
    train_multitask(store, tracking_of(folder))
    assert len(registry.versions(tracking_of(folder), NAME)) == 2
    before = Path(str(folder)).parent / "check out"
    assert not before.exists()


def weights_and_description(version: ModelVersion) -> dict[str, Path]:
    directory = Path(unquote(urlsplit(version.source).path))
    return {path.name: path for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["weights.safetensors", "model.json", "model_card.md"])
def test_a_changed_bit_of_a_model_is_refused(folder: Path, file: str) -> None:
    database.relocate(folder / "data" / "mlflow.db")
    tracking = tracking_of(folder)
    version = champion_of(tracking)
    files = weights_and_description(version)
    path = next((p for name, p in files.items() if name == file), None)
    assert path is not None, sorted(files)
    if file == "model.json":  # a number in it
        text = path.read_text()
        place = next(i for i, c in enumerate(text) if c.isdigit() and i > len(text) // 2)
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    else:
        flip(path)
    with pytest.raises(ModelError, match=rf"models:/small/1 is damaged: {file} is not what"):
        load_version(tracking.uri, version)
    if file == "model.json":
        with pytest.raises(ModelError, match=r"is damaged: model\.json"):
            model_files.read_model_json(tracking.uri, version, file)
    else:
        assert model_files.read_model_json(tracking.uri, version, "model.json")["provenance"]


def test_predict_refuses_a_damaged_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracking = tracking_of(folder)
    database.relocate(folder / "data" / "mlflow.db")
    version = champion_of(tracking)
    registry.set_alias(tracking, version, registry.CHAMPION)
    flip(weights_and_description(version)["weights.safetensors"])
    profile = folder / "profile.xye"
    profile.write_text("".join(f"{t} 1.0 1.0\n" for t in range(6000, 15000, 10)))
    with pytest.raises(SystemExit) as exit_:
        run_command(predict.app, [str(profile), "--tracking", tracking.uri])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "is damaged: weights.safetensors is not what was registered. Restore a backup" in err
    assert "Traceback" not in err


def test_models_without_hashes_load_and_get_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database.relocate(folder / "data" / "mlflow.db")
    tracking = tracking_of(folder)
    tracking.client.delete_model_version_tag(NAME, "1", "bragg.sha256")
    load_version(tracking.uri, champion_of(tracking))
    with pytest.raises(SystemExit) as exit_:
        run_command(tracking_command.app, ["hashes", "--tracking", tracking.uri])
    assert not exit_.value.code
    assert "Recorded for 1 of 1 versions" in capsys.readouterr().out
    version = champion_of(tracking)
    load_version(tracking.uri, version)
    flip(weights_and_description(version)["weights.safetensors"])
    with pytest.raises(ModelError, match="is damaged"):
        load_version(tracking.uri, version)


def test_an_empty_file_does_not_become_a_registry(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.touch()
    with pytest.raises(TrackingError, match=r"is empty: .* lost\. Restore a backup.*, or delete"):
        Tracking(f"sqlite:///{path}")
    assert path.stat().st_size == 0
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(TrackingError, match=r"is damaged \(file is not a database\)\. Restore"):
        Tracking(f"sqlite:///{path}")


def test_a_locked_database_is_named_within_seconds(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    tracking = tracking_in(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(TrackingError, match=r"is locked: another program.*End it or wait"):
            Tracking(tracking.uri)
        assert time.monotonic() - began < 60  # it waits for five
    Tracking(tracking.uri)


def test_a_champion_that_was_deleted(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking], capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = tracking_in(tmp_path)
    entry = registry.RegistryEntry("zircon", registry.ModelKind.CELL, "zircon")
    add_version(tracking, "zircon", {"test_set": "x"}, entry.tags)
    tracking.client.create_model_version("zircon", source="file:///x", tags={"test_set": "x"})
    tracking.client.delete_model_version("zircon", "1")
    message = r"has no champion: .* Promote a version \(2\): python -m pipelines\.promote zircon 2"
    with pytest.raises(ModelError, match=message):
        registry.find(tracking, "models:/zircon@champion")
    assert version_that_predicts(tracking, None).packaged
    assert "No version of zircon is the champion (deleted, or" in capsys.readouterr().err
    tracking.client.delete_model_version("zircon", "2")
    with pytest.raises(ModelError, match=r"zircon has no versions: all of them were deleted\. Res"):
        registry.find(tracking, "models:/zircon@champion")
