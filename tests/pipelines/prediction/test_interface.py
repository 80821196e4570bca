"""The Python interface; command, service and Python give the same prediction."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from typer.testing import CliRunner

from bragg_data.campaign import Campaign
from bragg_data.measurement.readers import ProfileError
from catalog.tracking import Tracking
from pipelines import predict as predict_command
from pipelines import prediction
from pipelines.prediction.files import PredictError
from pipelines.prediction.workflow import LoadedModel
from tests.pipelines.prediction.samples import TRUE_CELL, clean_pattern, write_noisy_file
from tests.servers import ROOT, serving


@pytest.fixture(scope="module")
def model(trained: Tracking) -> LoadedModel:
    return prediction.load_model(tracking=trained.uri)


@pytest.fixture(scope="module")
def file(small_campaign: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("measured")
    return write_noisy_file(directory, small_campaign, clean_pattern(small_campaign))


def flat(document: object, path: str = "") -> dict[str, object]:
    """All values of a JSON document by their paths."""
    if isinstance(document, dict):
        parts = [flat(value, f"{path}/{key}") for key, value in document.items()]
    elif isinstance(document, list):
        parts = [flat(value, f"{path}/{number}") for number, value in enumerate(document)]
    else:
        return {path: document}
    return {key: value for part in parts for key, value in part.items()}


def assert_same(first: dict, second: dict) -> None:
    """Equal values; numbers as far as the order of sums on other threads allows."""
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, float):
            assert second[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key
        else:
            assert second[key] == value, key


@pytest.mark.slow
def test_command_service_and_python_predict_the_same(
    model: LoadedModel, trained: Tracking, file: Path
) -> None:
    calibration = file.with_name("own.instprm")
    by_python = prediction.to_json(prediction.predict(file, model, instrument=calibration))
    arguments = [str(file), "--instrument", str(calibration), "--json", "--tracking", trained.uri]
    output = CliRunner().invoke(predict_command.app, arguments, catch_exceptions=False)
    (by_command,) = json.loads(output.stdout)
    assert_same(by_python, by_command)
    body = {"text": file.read_text(), "name": str(file), "instrument": calibration.read_text()}
    with serving(
        "pipelines.serve", "--tracking", trained.uri, "--workers", "0", answers="ready"
    ) as address:
        response = requests.post(f"{address}/predict/file", json=body, timeout=60).json()
    (by_service,) = response["predictions"]
    assert response["answers"] == response["predictions"]  # deprecated
    # The service compares with no library.
    assert by_command["library_match"] is not None
    alone = CliRunner().invoke(predict_command.app, [*arguments, "--no-library"])
    assert_same(by_service, json.loads(alone.stdout)[0])
    of_model = [document["evidence"][0] for document in (by_service, by_command)]
    assert_same(*(part | {"weight": 1.0} for part in of_model))


def test_arrays_are_predicted_as_their_file(model: LoadedModel, file: Path) -> None:
    calibration = file.with_name("own.instprm")
    columns = np.loadtxt(file, unpack=True)
    from_file = prediction.to_json(prediction.predict(file, model, instrument=calibration))
    result = prediction.predict(tuple(columns), model, instrument=str(calibration))
    assert result.file == "arrays"
    assert_same(from_file | {"file": "arrays"}, prediction.to_json(result))
    # Without sigma counting statistics are assumed, which is what this file has.
    result = prediction.predict(list(columns[:2]), model, instrument=calibration)
    assert_same(from_file | {"file": "arrays"}, prediction.to_json(result))


def test_the_refined_cell_is_true(model: LoadedModel, file: Path) -> None:
    result = prediction.refine(file, model, instrument=file.with_name("own.instprm"))
    assert result.refined is not None
    best = result.refined.best
    assert best.phase == "trigonal"
    assert best.cell.a == pytest.approx(TRUE_CELL[0], abs=2e-3)
    assert best.cell.alpha == pytest.approx(TRUE_CELL[3], abs=0.1)
    assert "<table>" in result._repr_html_()


def test_bad_arrays_are_refused(model: LoadedModel) -> None:
    tof = np.linspace(6000.0, 15_000.0, 500)
    with pytest.raises(PredictError, match="got 1 arrays"):
        prediction.predict([tof], model)
    with pytest.raises(ProfileError, match="of one length"):
        prediction.predict((tof, tof[1:]), model)
    with pytest.raises(ProfileError, match="do not ascend"):
        prediction.predict((tof[::-1], tof), model)


@pytest.mark.slow
def test_names_are_imported_on_first_use_only() -> None:
    program = (
        "import sys, pipelines.prediction as p; "
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules; "
        "assert callable(p.predict) and callable(p.refine); print(sorted(p.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "'PredictionResult'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = prediction.nothing
