"""The fit loop on profiles whose answer is plain to see."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from bragg_data.crystallography.cell import lattice_from_space_group
from bragg_models.data.batches import Profiles
from bragg_models.metrics import summary
from bragg_models.networks.build import build
from bragg_models.targets import Targets, targets_of
from bragg_models.training import fit as module
from bragg_models.training.fit import (
    FitSettings,
    Labelled,
    Step,
    TrainingError,
    choose_device,
    fit,
    full_precision,
    multitask_objective,
)
from bragg_models.training.inference import Samples, evaluate, outputs

N, POINTS = 1200, 64

torch.set_num_threads(1)  # on small arrays more threads only wait for each other

SETTINGS = FitSettings(epochs=6, batch_size=32, learning_rate=3e-3, schedule="one_cycle",
                       buffer_chunks=4)  # fmt: skip


class _Phase:
    def __init__(self, symbol: str) -> None:
        self.name = symbol.replace(" ", "")
        self.lattice = lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol))


@pytest.fixture(scope="module")
def task() -> tuple[Targets, Samples, np.ndarray, np.ndarray]:
    """One bump at a for a cubic sample; bumps at a and, smaller, at c for a tetragonal one."""
    generator = np.random.default_rng(0)
    phases = [_Phase("P m -3 m"), _Phase("P 4 m m")]
    phase = generator.integers(2, size=N).astype(np.int8)
    a, c = generator.uniform(3.5, 4.5, (2, N))
    cells = np.empty((N, 6))
    for code, one in enumerate(phases):
        rows = phase == code
        free = np.stack([a, c], axis=1)[rows, : len(one.lattice.free_parameters)]
        cells[rows] = one.lattice.cells(free)
    place = np.linspace(3.3, 4.7, POINTS)

    def bump(x: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((place - x[:, None]) / 0.06) ** 2)

    values = bump(a) + 0.5 * (phase == 1)[:, None] * bump(c)
    intensity = xr.DataArray(values.astype(np.float32), dims=("sample", "tof"))
    samples = Samples(Profiles(intensity, 100, lambda x: x), phase, cells)
    part = generator.random(N)
    return targets_of(phases, phase, cells), samples, part < 0.8, part >= 0.8


def network(seed: int = 0) -> nn.Module:
    return build("multitask", {"points": POINTS, "phases": 2, "parameters": 2}, seed=seed)


def weights(one: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in one.parameters()]).numpy().copy()


def test_it_learns(task: tuple) -> None:
    targets, samples, training, validation = task
    one = network()
    results = list(fit(one, targets, samples, training, validation, SETTINGS, seed=0))
    assert [r.epoch for r in results] == [1, 2, 3, 4, 5, 6]
    assert results[-1].training["loss"] < 0.1 * results[0].training["loss"]
    scores = results[-1].validation
    assert scores["all"]["accuracy"] > 0.98
    assert scores["cubic"]["mae_a"] < 0.03  # the mean of 3.5 to 4.5 would be 0.25 off
    assert scores["tetragonal"]["mae_c"] < 0.15


def test_same_seed_same_weights_to_the_last_bit(task: tuple) -> None:
    targets, samples, training, validation = task

    def train(seed: int, settings: FitSettings) -> tuple[np.ndarray, list[dict]]:
        one = network(seed)
        results = list(fit(one, targets, samples, training, validation, settings, seed=seed))
        return weights(one), [{**r.training, **r.validation["all"]} for r in results]

    balanced = FitSettings(epochs=2, batch_size=32, balance=0.0, buffer_chunks=4)
    for settings in (SETTINGS, balanced):
        first, metrics = train(1, settings)
        again, same_metrics = train(1, settings)
        np.testing.assert_array_equal(first, again)
        assert metrics == same_metrics
        assert not np.array_equal(first, train(2, settings)[0])


def test_the_best_weights_are_kept_not_the_last(task: tuple) -> None:
    targets, samples, training, validation = task
    one = network()
    # Far too fast: the error goes up and down from epoch to epoch.
    wild = FitSettings(epochs=8, batch_size=32, learning_rate=0.06, buffer_chunks=4)
    after = []
    for result in fit(one, targets, samples, training, validation, wild, seed=0):
        after.append((result.validation["all"]["mse_paper"], result.is_best, weights(one)))
    errors = [error for error, _, _ in after]
    best = int(np.argmin(errors))
    assert best < len(errors) - 1
    assert [flag for _, flag, _ in after] == [
        e == min(errors[: k + 1]) for k, e in enumerate(errors)
    ]
    np.testing.assert_array_equal(weights(one), after[best][2])


def test_leaving_early_keeps_the_best_so_far(task: tuple) -> None:
    targets, samples, training, validation = task
    one = network()
    epochs = fit(one, targets, samples, training, validation, SETTINGS, seed=0)
    next(epochs)
    first = weights(one)
    epochs.close()
    np.testing.assert_array_equal(weights(one), first)


def test_the_time_limit_ends_it_with_the_learning_rate_run_down(
    task: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, samples, training, validation = task
    clock = iter(range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    results = list(
        fit(network(), targets, samples, training, validation, SETTINGS, seed=0, max_seconds=50.0)
    )
    assert results[-1].out_of_time
    assert results[-1].step <= 50
    assert results[-1].training["learning_rate"] < 0.01 * SETTINGS.learning_rate


def test_steps_are_told_as_they_come(task: tuple) -> None:
    targets, samples, training, validation = task
    told = []
    list(fit(network(), targets, samples, training, validation, SETTINGS, seed=0,
             on_step=told.append))  # fmt: skip
    assert sum(step.samples for step in told) == SETTINGS.epochs * training.sum()
    assert {step.step for step in told if step.epoch == 2} == set(range(1, told[0].steps + 1))


def test_a_loss_that_is_no_number_ends_the_training(task: tuple) -> None:
    targets, samples, training, validation = task
    settings = FitSettings(epochs=5, batch_size=32, learning_rate=1e30)
    with pytest.raises(TrainingError, match="smaller learning rate"):
        list(fit(network(), targets, samples, training, validation, settings, seed=0))


def test_objective_validation_and_score_can_be_ones_own(task: tuple) -> None:
    """A regressor of the first parameter alone, with other scores that choose the best."""
    targets, samples, training, validation = task
    one = network()
    seen: list[Labelled] = []

    def objective(
        network: nn.Module, batch: Labelled, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert isinstance(generator, torch.Generator)
        seen.append(batch)
        _, found = network(batch.profiles)
        with full_precision(batch):
            loss = (found.float() - batch.values)[:, 0].abs().mean()
        return {"loss": loss, "twice": 2 * loss}

    scores = iter([5.0, 3.0, 4.0])

    def validate(validated: nn.Module) -> dict[str, dict[str, float]]:
        assert validated is one
        return {"a": {"error": next(scores)}}

    results, after = [], []
    for result in fit(one, targets, samples, training, validation,
                      FitSettings(3, 100, buffer_chunks=4), seed=0, objective=objective,
                      validate=validate, score=lambda scores: scores["a"]["error"]):  # fmt: skip
        results.append(result)
        after.append(weights(one))
    assert [r.is_best for r in results] == [True, True, False]
    np.testing.assert_array_equal(weights(one), after[1])
    assert results[0].training.keys() == {"loss", "twice", "learning_rate"}
    assert results[0].training["twice"] == pytest.approx(2 * results[0].training["loss"])
    batch = seen[0]
    assert (batch.profiles.dtype, batch.phase.dtype) == (torch.float32, torch.int64)
    assert (batch.values.dtype, batch.free.dtype) == (torch.float32, torch.bool)
    values, free = targets.encode(samples.phase, samples.cells)
    np.testing.assert_array_equal(batch.values, values[batch.rows])
    np.testing.assert_array_equal(batch.free, free[batch.rows])
    np.testing.assert_array_equal(batch.phase, samples.phase[batch.rows])
    np.testing.assert_array_equal(batch.profiles, samples.profiles.intensity.values[batch.rows])


def test_frozen_weights_stay(task: tuple) -> None:
    one = network()
    one.features.requires_grad_(False)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    settings = FitSettings(1, 64, weight_decay=0.1, buffer_chunks=4)
    list(fit(one, *task, settings, seed=0))
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("features.")
    one.requires_grad_(False)
    with pytest.raises(TrainingError, match="all are frozen"):
        list(fit(one, *task, settings, seed=0))


def test_sgd_with_momentum_learns_and_steps_down(task: tuple) -> None:
    settings = FitSettings(
        5, 32, 0.02, optimizer="sgd", momentum=0.9, weight_decay=1e-4, schedule="steps",
        milestones=(2, 4), decay=0.1, buffer_chunks=4,
    )  # fmt: skip
    results = list(fit(network(), *task, settings, seed=0))
    rates = [r.training["learning_rate"] for r in results]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])
    assert results[-1].training["loss"] < 0.8 * results[0].training["loss"]


def test_an_epoch_of_the_paper_is_so_many_samples_of_each_phase(task: tuple) -> None:
    targets, samples, training, validation = task
    rows = []

    def objective(
        network: nn.Module, batch: Labelled, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        rows.append(batch.rows)
        return multitask_objective(1.0)(network, batch, generator)

    told: list[Step] = []
    settings = FitSettings(2, 50, balance=0.0, samples_per_epoch=2 * 150, buffer_chunks=3)
    list(fit(network(), targets, samples, training, validation, settings, seed=0,
             objective=objective, on_step=told.append))  # fmt: skip
    assert [(s.epoch, s.step, s.steps) for s in told] == [
        (epoch, step, 6) for epoch in (1, 2) for step in range(1, 7)
    ]
    for epoch in (rows[:6], rows[6:]):
        assert np.bincount(samples.phase[np.concatenate(epoch)]).tolist() == [150, 150]


class Dropping(nn.Module):
    """Draws from torch's own generator while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.network = nn.Dropout(0.2), network()

    def forward(self, profiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, values = self.network(self.drop(profiles))
        return logits, values


def test_dropout_is_seeded_and_the_callers_generator_left_alone(task: tuple) -> None:
    def train() -> np.ndarray:
        one = Dropping()
        list(fit(one, *task, FitSettings(1, 64, buffer_chunks=4), seed=0))
        return weights(one)

    torch.manual_seed(1)
    first = train()
    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(first, train())
    assert torch.equal(torch.random.get_rng_state(), state)


class Told(nn.Module):
    """Is told the phase, and gives it back."""

    def forward(
        self, profiles: torch.Tensor, phase: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.functional.one_hot(phase, 3).float(), profiles[:, :1]


def test_a_network_may_be_told_the_phase() -> None:
    phase = np.random.default_rng(0).integers(3, size=300).astype(np.int8)
    profiles = np.random.default_rng(0).random((300, POINTS)).astype(np.float32)
    probabilities, values = outputs(Told(), profiles, phase=phase)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), phase)
    np.testing.assert_array_equal(values, profiles[:, :1])


def test_evaluation_by_chunks_equals_all_at_once(task: tuple) -> None:
    targets, samples, training, validation = task
    one = network()
    list(fit(one, targets, samples, training, validation, FitSettings(1), seed=0))
    by_chunk = summary(targets, evaluate(one, targets, samples, validation))
    whole = Samples(Profiles(samples.profiles.intensity, N, lambda x: x), samples.phase,
                    samples.cells)  # fmt: skip
    at_once = summary(targets, evaluate(one, targets, whole, validation))
    for group, scores in at_once.items():
        for name, value in scores.items():
            # Not to the last bit: a network's output varies with the batch's shape.
            assert by_chunk[group][name] == pytest.approx(value, rel=1e-5)


def test_probabilities_are_probabilities() -> None:
    profiles = np.random.default_rng(0).random((300, POINTS)).astype(np.float32)
    probabilities, values = outputs(network(), profiles)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert values.shape == (300, 2)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(TrainingError, match="Use cpu"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="Use cpu"):
            choose_device("cuda")
