"""A training that was killed continues as if nothing had happened."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from torch import Tensor, nn

from bragg_data.crystallography.cell import lattice_from_space_group
from bragg_models.data.batches import Profiles
from bragg_models.predictors import build
from bragg_models.targets import targets_of
from bragg_models.training.fit import CheckpointError, fit
from bragg_models.training.inference import Samples
from bragg_models.training.settings import (
    Criteria,
    EpochResult,
    Execution,
    FitSettings,
    Step,
    TrainingData,
)

torch.set_num_threads(1)  # on small arrays more threads only wait for each other

N, POINTS = 400, 32
# So fast that the best epoch is not the last one.
ADAM = FitSettings(
    epochs=5, batch_size=32, learning_rate=0.03, schedule="one_cycle", balance=0.5, buffer_chunks=2
)
SGD = FitSettings(
    epochs=5,
    batch_size=32,
    learning_rate=0.03,
    optimizer="sgd",
    momentum=0.9,
    weight_decay=1e-3,
    schedule="steps",
    milestones=(2, 4),
    samples_per_epoch=200,
    buffer_chunks=2,
)


class _Phase:
    def __init__(self, symbol: str) -> None:
        self.name = symbol.replace(" ", "")
        self.lattice = lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol))


class Dropping(nn.Module):
    """The paper's network behind layers with random numbers and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(POINTS))
        shape = {"points": POINTS, "phases": 2, "parameters": 1}
        self.network = build("multitask", shape, seed=0)

    def forward(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        logits, values = self.network(self.first(profiles))
        return logits, values


def training_data() -> TrainingData:
    generator = np.random.default_rng(0)
    phases = [_Phase("P m -3 m"), _Phase("F m -3 m")]
    phase = generator.integers(2, size=N).astype(np.int8)
    a = generator.uniform(3.5, 4.5, N)
    cells = np.concatenate([np.tile(a[:, None], 3), np.full((N, 3), 90.0)], axis=1)
    position = np.linspace(3.3, 4.7, POINTS)
    values = np.exp(-0.5 * ((position - a[:, None]) / (0.06 + 0.06 * phase[:, None])) ** 2)
    intensity = xr.DataArray(values.astype(np.float32), dims=("sample", "tof"))
    part = generator.random(N)
    samples = Samples(Profiles(intensity, 50, lambda x: x), phase, cells)
    return TrainingData(targets_of(phases, phase, cells), samples, part < 0.8, part >= 0.8)


def train(
    checkpoint: Path | None,
    settings: FitSettings,
    epochs: int | None = None,
    criteria: Criteria = Criteria(),  # noqa: B008 - frozen
    **execution: object,
) -> tuple[dict[str, np.ndarray], list[EpochResult]]:
    """Train, leaving after some epochs; return the weights then, and the results."""
    network = Dropping()
    results = []
    running = fit(
        network,
        training_data(),
        settings,
        seed=3,
        criteria=criteria,
        execution=Execution(checkpoint=checkpoint, **execution),
    )
    for result in running:
        results.append(result)
        if len(results) == epochs:
            running.close()
    return {name: value.numpy() for name, value in network.state_dict().items()}, results


def without_times(results: list[EpochResult]) -> list[dict]:
    return [{**asdict(r), "seconds": 0, "restored": False} for r in results]


def assert_same(first: tuple, second: tuple) -> None:
    for name, value in first[0].items():
        np.testing.assert_array_equal(second[0][name], value)
    assert without_times(first[1]) == without_times(second[1])


def wait_in_the_middle(step: Step) -> None:
    if (step.epoch, step.step) == (3, 4):
        print("in the middle", flush=True)
        time.sleep(600)


@pytest.mark.slow
def test_a_training_killed_within_an_epoch_continues_to_the_same_weights(tmp_path: Path) -> None:
    undisturbed = train(None, ADAM)
    assert not undisturbed[1][-1].is_best  # or the best weights would not be put to the test
    path = tmp_path / "fit.safetensors"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.bragg_models.training.test_checkpoints", path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in the middle\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    with safe_open(path, "pt") as file:
        history = json.loads(file.metadata()["about"])["history"]
    assert [result["epoch"] for result in history] == [1, 2]
    resumed = train(path, ADAM)
    assert [r.restored for r in resumed[1]] == [True, True, False, False, False]
    assert_same(undisturbed, resumed)


@pytest.mark.parametrize("settings", [ADAM, SGD, replace(SGD, optimizer="adam")])
@pytest.mark.parametrize("after", [1, 4])
def test_a_training_left_after_an_epoch_continues(
    tmp_path: Path, settings: FitSettings, after: int
) -> None:
    path = tmp_path / "fit.safetensors"
    train(path, settings, epochs=after)
    assert_same(train(None, settings), train(path, settings))
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_training_restores_its_best_weights(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    finished = train(path, ADAM)
    written = path.read_bytes()
    steps: list[Step] = []
    again = train(path, ADAM, on_step=steps.append)
    assert_same(finished, again)
    assert all(result.restored for result in again[1])
    assert not steps
    assert path.read_bytes() == written


def test_time_before_the_interruption_counts(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    train(path, ADAM, epochs=2)
    _, results = train(path, ADAM, max_seconds=1e-9)
    assert [r.epoch for r in results] == [1, 2]
    _, results = train(path, ADAM, max_seconds=600.0)
    assert [r.epoch for r in results] == [1, 2, 3, 4, 5]


def test_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    train(path, ADAM, epochs=1)
    with pytest.raises(CheckpointError, match=r"differs in settings\..*delete it"):
        train(path, replace(ADAM, epochs=6))
    data = training_data()

    def start(network: nn.Module, seed: int = 3, data: TrainingData = data) -> None:
        next(fit(network, data, ADAM, seed=seed, execution=Execution(checkpoint=path)))

    start(Dropping())
    with pytest.raises(CheckpointError, match="differs in seed"):
        start(Dropping(), seed=4)
    with pytest.raises(CheckpointError, match="differs in samples"):
        start(Dropping(), data=replace(data, training=data.training & (np.arange(N) > 0)))
    with pytest.raises(CheckpointError, match="differs in network"):
        start(Dropping().network)
    frozen = Dropping()
    frozen.first.requires_grad_(False)
    with pytest.raises(CheckpointError, match="differs in network"):
        start(frozen)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    train(path, ADAM, epochs=1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="Delete it to start again"):
        train(path, ADAM)


def test_scores_that_are_not_finite_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    scores = {"all": {"mse_paper": math.nan, "count": np.float32(2)}}
    criteria = Criteria(validate=lambda _: scores)
    train(path, ADAM, epochs=2, criteria=criteria)
    _, results = train(path, ADAM, criteria=criteria)
    assert len(results) == ADAM.epochs
    assert math.isnan(results[0].validation["all"]["mse_paper"])
    assert results[0].validation["all"]["count"] == 2
    assert not any(result.is_best for result in results)


if __name__ == "__main__":
    train(Path(sys.argv[1]), ADAM, on_step=wait_in_the_middle)
