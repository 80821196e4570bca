"""Tasks of training: saved, read again, also as the version before wrote them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr

from catalog.tracking import Tracking
from pipelines.training.names import TrainError
from pipelines.training.presets import DEFAULT_PRESETS
from pipelines.training.task import (
    TrainingEnvironment,
    TrainingTask,
    load_task,
    save_task,
    tasks_for,
)

TASK = TrainingTask("guided", "standard", 3, "cpu", "blocked", ("small-v1",), 4, 2.5, "models:/x/1")


@pytest.fixture
def environment(tmp_path: Path, tracking_in: Callable[[Path], Tracking]) -> TrainingEnvironment:
    return TrainingEnvironment(tracking_in(tmp_path), tmp_path / "state")


def test_a_saved_task_is_read_again(
    environment: TrainingEnvironment, small_dataset: xr.Dataset
) -> None:
    save_task(environment.run_state("r"), TASK, small_dataset)
    task, dataset = load_task(environment, "r")
    assert task == TASK
    assert dataset.attrs["content_hash"] == small_dataset.attrs["content_hash"]


def test_a_task_that_the_version_before_saved_is_read(
    environment: TrainingEnvironment, small_dataset: xr.Dataset
) -> None:
    saved = {
        "order": {
            "model": "guided",
            "preset": "standard",
            "seed": 3,
            "device": "cpu",
            "split": "blocked",
            "beside": ["small-v1"],  # deprecated
            "epochs": 4,
            "max_seconds": 2.5,
            "how": "joined",
            "classifier": "models:/x/1",
        },
        "store": small_dataset.attrs["uri"],
        "tag": small_dataset.attrs["tag"],
    }
    directory = environment.run_state("r")
    directory.mkdir(parents=True)
    (directory / "order.json").write_text(json.dumps(saved), encoding="utf-8")
    (directory / "glance.safetensors").write_bytes(b"weights")  # deprecated name
    assert load_task(environment, "r")[0] == TASK
    assert (directory / "proposal.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("text", ["", "[]", '{"task": {"model": "guided"}}', '{"task": 1}'])
def test_a_damaged_task_is_refused(environment: TrainingEnvironment, text: str) -> None:
    directory = environment.run_state("r")
    directory.mkdir(parents=True)
    (directory / "task.json").write_text(text, encoding="utf-8")
    with pytest.raises(TrainError, match=r"is damaged .*train the model again"):
        load_task(environment, "r")


def test_extra_data_is_refused_where_it_would_not_be_used() -> None:
    extra = TrainingTask(extra_data=("more-v1",))
    for model in ("robust", "forest", "integrated-forest", "all"):
        with pytest.raises(TrainError, match="cannot be trained on further data sets"):
            tasks_for([model], extra, DEFAULT_PRESETS)
    networks = ["classifier", "multitask", "transfer", "deep", "caenn", "guided"]
    tasks = tasks_for(networks, extra, DEFAULT_PRESETS)
    assert [task.model for task in tasks] == networks
    assert {task.extra_data for task in tasks} == {("more-v1",)}
