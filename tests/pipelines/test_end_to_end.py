"""The main job as a user starts it, on a small part of the campaign."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import xarray as xr

from bragg_data.store.repository import open_snapshot
from catalog import registry
from catalog.tracking import Tracking
from pipelines import predict
from pipelines import run as main_job
from pipelines.cli.console import run
from pipelines.end_to_end.paper import train_first
from pipelines.training.task import TrainingEnvironment
from tests.conftest import FIRST_COMMAND
from tests.small_bench import short_presets

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "pipelines" / "examples"


@pytest.fixture(scope="module")
def home(first_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(
        first_run, tmp_path_factory.mktemp("home"), symlinks=True, dirs_exist_ok=True
    )


def test_run_simulates_trains_and_predicts(home: Path) -> None:
    output = (home / "printed.txt").read_text(encoding="utf-8")
    assert "models:/batio3-nomad/1" in output
    assert "guided, made for clean ones, predicts them" in output
    assert "refined" in output
    assert "noisy pseudo-experiment" in output
    assert "make ui" in output
    dataset = open_snapshot("batio3-nomad-v1", home / "data" / "store")
    assert dataset.intensity.sizes == {"sample": 640, "tof": 2807}


def test_again_makes_nothing_twice(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as exit_:
        run(main_job.app, FIRST_COMMAND.split()[2:])
    again = capfd.readouterr()
    assert exit_.value.code == 0, again.err
    assert "nothing to do" in again.out
    assert "it stays" in again.out
    assert "models:/batio3-nomad/2" not in again.out


@pytest.mark.training
def test_a_model_that_does_not_pass_leaves_another_champion(
    small_dataset: xr.Dataset,
    tmp_path: Path,
    tracking_in: Callable[[Path], Tracking],
    capfd: pytest.CaptureFixture[str],
) -> None:
    presets = short_presets()
    quick = presets.networks["robust"]["quick"]
    poor = replace(
        quick, training_draws=50, calibration_draws=30, network={"draws": 8, "starts": 1}
    )
    presets = short_presets(robust=poor)
    tracking = tracking_in(tmp_path)
    environment = TrainingEnvironment(tracking, state=tmp_path, presets=presets)
    models = ("robust", "guided")
    result = train_first(small_dataset, environment, "quick", models)
    assert result == ("guided", registry.champion_uri(tracking))
    assert registry.champion(tracking, registry.registered_name("small", "robust")) is None
    assert "stays a candidate" in capfd.readouterr().out


def test_predict_answers_afterwards(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    instrument = str(EXAMPLES / "pseudo_experiment.instprm")
    profile = str(EXAMPLES / "pseudo_experiment.xye")
    with pytest.raises(SystemExit) as exit_:
        run(predict.app, [profile, "--instrument", instrument, "--json"])
    done = capfd.readouterr()
    assert exit_.value.code == 0, done.err
    (answer,) = json.loads(done.out)
    truth = json.loads((EXAMPLES / "examples.json").read_text())["pseudo_experiment.xye"]
    # However few its training samples, our network finds the cell of a noisy profile.
    assert answer["phase"] == "tetragonal"
    assert answer["cell"]["a"] == pytest.approx(truth["a"], abs=0.003)
    assert answer["cell"]["c"] == pytest.approx(truth["c"], abs=0.003)
    tetragonal = [c for c in answer["library_match"]["candidates"] if c["phase"] == "tetragonal"]
    # some 480 of 160,400 tetragonal cells are there: neighbours stand about 0.02 Å apart
    assert tetragonal[0]["cell"]["a"] == pytest.approx(truth["a"], abs=0.03)
    assert tetragonal[0]["cell"]["c"] == pytest.approx(truth["c"], abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("pipelines.predict", "missing.xye"), "missing.xye"),
        (("pipelines.train", "--data", "batio3-nomad-v9"), "Known tags: batio3-nomad-v1"),
        (("pipelines.inspect", "batio3-nomad-v9"), "Known tags: batio3-nomad-v1"),
        (("pipelines.simulate", "--campaign", "nowhere.toml"), "nowhere.toml"),
        (("pipelines.simulate", "--cluster", "cloud"), "local"),
        (("pipelines.simulate", "--limit", "0"), "limit"),
    ],
)
def test_mistakes_get_a_sentence(
    home: Path,
    arguments: tuple[str, ...],
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", [*arguments])
    with pytest.raises(SystemExit) as exit_:
        run(import_module(arguments[0]).app)
    assert exit_.value.code == 2
    error = capfd.readouterr().err
    assert remedy in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
