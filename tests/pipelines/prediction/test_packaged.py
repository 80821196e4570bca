"""The packaged model predicts where no model is registered, and creates nothing."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from bragg_models.predictors import Predictor
from catalog import packages, registry
from catalog.packages import Manifest, PackageError, check_package, directory_of
from catalog.registry import ModelError
from catalog.tracking import Tracking, open_existing
from pipelines import lineage, package, predict
from pipelines.prediction import load_model
from pipelines.prediction.examples import EXAMPLES
from pipelines.prediction.files import PredictError
from pipelines.prediction.result import json_schema
from pipelines.registry.registration import load_version
from pipelines.service.batching import ModelHolder

torch.set_num_threads(1)
ADDRESS = "packaged:batio3-nomad"
PROFILE, CALIBRATION = EXAMPLES / "pseudo_experiment.xye", EXAMPLES / "pseudo_experiment.instprm"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, as after installation."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(predict.app, [str(argument) for argument in arguments])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package, to be damaged."""
    return shutil.copytree(directory_of("batio3-nomad"), tmp_path / "mine")


def test_it_is_small_complete_and_names_no_machine() -> None:
    directory = directory_of("batio3-nomad")
    check_package(directory)
    files = list(directory.iterdir())
    assert sum(file.stat().st_size for file in files) < 5e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    manifest = Manifest.read(directory)
    assert manifest.model == "robust"
    assert manifest.data["tag"] == "batio3-nomad-v1"
    assert len(manifest.code_commit) == len(manifest.data["code_commit"]) == 40
    assert manifest.scores["mse_paper"] < manifest.scores["baselines"]["library match"]
    assert manifest.command.startswith("python -m pipelines.package models:/")
    texts = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".json"]
    assert not any(
        place in text for text in texts for place in ("/tmp", "/home", "file:", "sqlite")
    )


def test_an_example_is_predicted_and_refined_from_an_empty_folder(empty: Path) -> None:
    result = run(PROFILE, "--instrument", CALIBRATION, "--refine", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("\n") == 1
    assert "No model is registered here: the packaged model of batio3-nomad" in result.stderr
    assert "python -m pipelines.run --cif YOURS.cif --instrument YOURS.instprm" in result.stderr
    (prediction,) = json.loads(result.stdout)
    jsonschema.validate(prediction, json_schema())
    truth = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))[PROFILE.name]
    assert prediction["model"] == ADDRESS
    assert prediction["crystal_system"] == truth["crystal_system"]
    assert prediction["accepted"]
    assert prediction["library_match"] is None
    for name in ("a", "c"):
        assert abs(prediction["cell"][name] - truth[name]) < 1e-3
        assert abs(prediction["refined"]["cell"][name] - truth[name]) < 2e-4
    assert list(empty.iterdir()) == []


def test_a_library_needs_a_store(empty: Path) -> None:
    result = run(PROFILE, "--model", ADDRESS, "--library", "--json")
    assert result.exit_code == 0
    assert "The library match is left out" in result.stderr
    assert "registered" not in result.stderr  # it was named
    assert list(empty.iterdir()) == []


def test_python_and_command_choose_the_same(empty: Path, tracking_in) -> None:
    assert load_model().version.uri == ADDRESS
    (empty / "data").mkdir()
    tracking_in(empty / "data")  # a database without models
    model = load_model()
    assert model.version.uri == ADDRESS
    assert model.library is None
    with pytest.raises(ModelError, match="is not registered: there is no MLflow database"):
        load_model("models:/mine@champion", tracking="sqlite:///elsewhere.db")


@pytest.mark.training
def test_a_champion_is_preferred(trained: Tracking) -> None:
    assert load_model(tracking=trained.uri).version.uri == "models:/small/1"
    assert load_model(ADDRESS, tracking=trained.uri).version.uri == ADDRESS


@pytest.mark.training
def test_the_service_takes_the_first_champion_and_never_goes_back(
    trained: Tracking, empty: Path
) -> None:
    holder = ModelHolder("sqlite:///mlflow.db", None)
    holder.refresh()
    assert holder.loaded.info.uri == ADDRESS
    assert list(empty.iterdir()) == []
    shutil.copy(trained.uri.removeprefix("sqlite:///"), empty)
    holder.refresh()
    assert holder.loaded.info.uri == "models:/small/1"
    copy = open_existing("sqlite:///mlflow.db")
    assert copy is not None
    copy.client.delete_registered_model_alias("small", registry.CHAMPION)
    holder.refresh()
    assert holder.loaded.info.uri == "models:/small/1"
    assert "small@champion" in holder.error


def test_damage_is_refused(copied: Path) -> None:
    weights = copied / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run(PROFILE, "--model", f"packaged:{copied}")
    assert isinstance(result.exception, PackageError)
    assert "weights.safetensors missing, changed or not of its manifest" in str(result.exception)
    weights.unlink()
    with pytest.raises(PackageError, match=r"damaged: weights\.safetensors missing"):
        check_package(copied)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "name": "x"}'])
def test_a_damaged_manifest_is_refused(copied: Path, text: str) -> None:
    (copied / packages.MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(PackageError, match=r"holds no packaged model|this code reads 1"):
        registry.packaged_version(str(copied))


def test_more_files_than_the_manifest_names_are_refused(copied: Path) -> None:
    (copied / "classifier").mkdir()
    (copied / "classifier" / "model.json").touch()
    with pytest.raises(PackageError, match=r"classifier/model\.json"):
        load_version("", registry.packaged_version(str(copied)))


def test_a_name_that_is_not_installed_is_refused() -> None:
    with pytest.raises(PackageError, match=r"'zircon'. Installed: batio3-nomad; a folder"):
        registry.packaged_version("zircon")


@pytest.mark.training
@pytest.mark.parametrize("commit", ["0" * 40, "0" * 40 + "-dirty", "unknown"])
def test_a_registered_model_is_packaged_with_its_lineage(
    trained: Tracking, empty: Path, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    registered = load_model(tracking=trained.uri).predictor
    by_commit = replace(registered, provenance=replace(registered.provenance, code_commit=commit))
    load = partial(_loaded_as, by_commit)
    monkeypatch.setattr("pipelines.registry.packages.load_version", load)
    arguments = ["models:/small/1", "--out", "mine", "--tracking", trained.uri]
    result = CliRunner().invoke(package.app, arguments)
    if len(commit) != 40:
        assert "Commit the code, and train the model again." in str(result.exception)
        assert list(empty.iterdir()) == []
        return
    assert result.exit_code == 0, result.output
    model = load_model("packaged:./mine")
    assert model.predictor.provenance.data.uri == ""
    assert model.predictor.provenance.data.content_hash == registered.provenance.data.content_hash
    profile = np.zeros((1, registered.points), dtype=np.float32)
    profile[:, 400] = 1.0
    predictions = [of.predict(profile).probabilities for of in (registered, model.predictor)]
    np.testing.assert_array_equal(*predictions)
    again = CliRunner().invoke(package.app, arguments)
    assert "mine is not empty" in str(again.exception)


def _loaded_as(predictor: Predictor, uri: str, version: registry.ModelVersion) -> Predictor:
    """Load a package; of the registered version return a predictor of a certain commit."""
    return load_version(uri, version) if version.packaged else predictor


def test_its_lineage_needs_no_database(empty: Path) -> None:
    result = CliRunner().invoke(lineage.app, [ADDRESS, "--json"])
    chain = json.loads(result.stdout)
    assert chain["name"] == ADDRESS
    assert chain["packaged version"] == Manifest.read(directory_of("batio3-nomad")).version
    view = chain["made_from"][0]["made_from"][0]
    assert view["made_from"][0]["name"] == "batio3-nomad-v1"
    assert list(empty.iterdir()) == []


def test_paths_are_checked_first(tmp_path: Path) -> None:
    result = run(tmp_path / "none.xye", tmp_path / "no.gsa")
    assert isinstance(result.exception, PredictError)
    assert "none.xye, " in str(result.exception)
    assert "not found. Give the path of a file." in str(result.exception)
    result = run(PROFILE, "--instrument", tmp_path / "no.instprm")
    assert "no.instprm not found. Give the path" in str(result.exception)
