"""The training loop on profiles whose labels are easy to read from them."""

import gemmi
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from bragg_data.crystallography.cell import lattice_from_space_group
from bragg_models.data.batches import Profiles
from bragg_models.metrics import summary
from bragg_models.predictors import build
from bragg_models.targets import targets_of
from bragg_models.training.fit import TrainingError, fit
from bragg_models.training.inference import DeviceError, Samples, choose_device, evaluate, outputs
from bragg_models.training.settings import (
    Criteria,
    Execution,
    FitSettings,
    LabelledBatch,
    Step,
    TrainingData,
    full_precision,
    multitask_objective,
)

N, POINTS = 1200, 64

torch.set_num_threads(1)  # on small arrays more threads only wait for each other

SETTINGS = FitSettings(
    epochs=6, batch_size=32, learning_rate=3e-3, schedule="one_cycle", buffer_chunks=4
)


class _Phase:
    def __init__(self, symbol: str) -> None:
        self.name = symbol.replace(" ", "")
        self.lattice = lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol))


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """One bump at a for a cubic sample; bumps at a and, smaller, at c for a tetragonal sample."""
    generator = np.random.default_rng(0)
    phases = [_Phase("P m -3 m"), _Phase("P 4 m m")]
    phase = generator.integers(2, size=N).astype(np.int8)
    a, c = generator.uniform(3.5, 4.5, (2, N))
    cells = np.empty((N, 6))
    for code, model_phase in enumerate(phases):
        rows = phase == code
        free = np.stack([a, c], axis=1)[rows, : len(model_phase.lattice.free_parameters)]
        cells[rows] = model_phase.lattice.cells(free)
    position = np.linspace(3.3, 4.7, POINTS)

    def bump(x: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((position - x[:, None]) / 0.06) ** 2)

    values = bump(a) + 0.5 * (phase == 1)[:, None] * bump(c)
    intensity = xr.DataArray(values.astype(np.float32), dims=("sample", "tof"))
    samples = Samples(Profiles(intensity, 100, lambda x: x), phase, cells)
    part = generator.random(N)
    return TrainingData(targets_of(phases, phase, cells), samples, part < 0.8, part >= 0.8)


def new_network(seed: int = 0) -> nn.Module:
    return build("multitask", {"points": POINTS, "phases": 2, "parameters": 2}, seed=seed)


def weights(network: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).numpy().copy()


def test_the_loss_decreases_and_the_labels_are_predicted(data: TrainingData) -> None:
    network = new_network()
    results = list(fit(network, data, SETTINGS, seed=0))
    assert [r.epoch for r in results] == [1, 2, 3, 4, 5, 6]
    assert results[-1].training["loss"] < 0.1 * results[0].training["loss"]
    scores = results[-1].validation
    assert scores["all"]["accuracy"] > 0.98
    assert scores["cubic"]["mae_a"] < 0.03  # the mean of 3.5 to 4.5 would be 0.25 off
    assert scores["tetragonal"]["mae_c"] < 0.15


@pytest.mark.slow
def test_same_seed_same_weights_to_the_last_bit(data: TrainingData) -> None:

    def train(seed: int, settings: FitSettings) -> tuple[np.ndarray, list[dict]]:
        network = new_network(seed)
        results = list(fit(network, data, settings, seed=seed))
        return weights(network), [{**r.training, **r.validation["all"]} for r in results]

    balanced = FitSettings(epochs=2, batch_size=32, balance=0.0, buffer_chunks=4)
    for settings in (SETTINGS, balanced):
        first, metrics = train(1, settings)
        again, same_metrics = train(1, settings)
        np.testing.assert_array_equal(first, again)
        assert metrics == same_metrics
        assert not np.array_equal(first, train(2, settings)[0])


@pytest.mark.slow
def test_the_best_weights_are_restored_not_the_last(data: TrainingData) -> None:
    network = new_network()
    # Far too fast: the error goes up and down from epoch to epoch.
    wild = FitSettings(epochs=8, batch_size=32, learning_rate=0.06, buffer_chunks=4)
    after = []
    for result in fit(network, data, wild, seed=0):
        after.append((result.validation["all"]["mse_paper"], result.is_best, weights(network)))
    errors = [error for error, _, _ in after]
    best = int(np.argmin(errors))
    assert best < len(errors) - 1
    assert [flag for _, flag, _ in after] == [
        e == min(errors[: k + 1]) for k, e in enumerate(errors)
    ]
    np.testing.assert_array_equal(weights(network), after[best][2])


def test_closing_early_restores_the_best_so_far(data: TrainingData) -> None:
    network = new_network()
    epochs = fit(network, data, SETTINGS, seed=0)
    next(epochs)
    first = weights(network)
    epochs.close()
    np.testing.assert_array_equal(weights(network), first)


def test_the_time_limit_completes_the_schedule_of_the_learning_rate(data: TrainingData) -> None:
    clock = iter(range(10_000))
    execution = Execution(max_seconds=50.0, clock=lambda: float(next(clock)))
    results = list(fit(new_network(), data, SETTINGS, seed=0, execution=execution))
    assert results[-1].out_of_time
    assert results[-1].step <= 50
    assert results[-1].training["learning_rate"] < 0.01 * SETTINGS.learning_rate


def test_every_step_is_reported(data: TrainingData) -> None:
    steps: list[Step] = []
    list(fit(new_network(), data, SETTINGS, seed=0, execution=Execution(on_step=steps.append)))
    assert sum(step.samples for step in steps) == SETTINGS.epochs * data.training.sum()
    assert {step.step for step in steps if step.epoch == 2} == set(range(1, steps[0].steps + 1))


def test_a_loss_that_is_not_finite_ends_the_training(data: TrainingData) -> None:
    settings = FitSettings(epochs=5, batch_size=32, learning_rate=1e30)
    with pytest.raises(TrainingError, match="smaller learning rate"):
        list(fit(new_network(), data, settings, seed=0))


def test_objective_validation_and_score_can_be_replaced(data: TrainingData) -> None:
    """A regressor of the first parameter alone, with other scores for the best weights."""
    network = new_network()
    seen: list[LabelledBatch] = []

    def objective(
        network: nn.Module, batch: LabelledBatch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert isinstance(generator, torch.Generator)
        seen.append(batch)
        _, values = network(batch.profiles)
        with full_precision(batch):
            loss = (values.float() - batch.values)[:, 0].abs().mean()
        return {"loss": loss, "twice": 2 * loss}

    scores = iter([5.0, 3.0, 4.0])

    def validate(validated: nn.Module) -> dict[str, dict[str, float]]:
        assert validated is network
        return {"a": {"error": next(scores)}}

    results, after = [], []
    criteria = Criteria(objective, validate, lambda scores: scores["a"]["error"])
    for result in fit(
        network, data, FitSettings(3, 100, buffer_chunks=4), seed=0, criteria=criteria
    ):
        results.append(result)
        after.append(weights(network))
    assert [r.is_best for r in results] == [True, True, False]
    np.testing.assert_array_equal(weights(network), after[1])
    assert results[0].training.keys() == {"loss", "twice", "learning_rate"}
    assert results[0].training["twice"] == pytest.approx(2 * results[0].training["loss"])
    batch = seen[0]
    assert (batch.profiles.dtype, batch.phase.dtype) == (torch.float32, torch.int64)
    assert (batch.values.dtype, batch.free.dtype) == (torch.float32, torch.bool)
    values, free = data.targets.encode(data.samples.phase, data.samples.cells)
    np.testing.assert_array_equal(batch.values, values[batch.rows])
    np.testing.assert_array_equal(batch.free, free[batch.rows])
    np.testing.assert_array_equal(batch.phase, data.samples.phase[batch.rows])
    np.testing.assert_array_equal(
        batch.profiles, data.samples.profiles.intensity.values[batch.rows]
    )


def test_frozen_weights_stay(data: TrainingData) -> None:
    network = new_network()
    network.features.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    settings = FitSettings(1, 64, weight_decay=0.1, buffer_chunks=4)
    list(fit(network, data, settings, seed=0))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("features.")
    network.requires_grad_(False)
    with pytest.raises(TrainingError, match="all are frozen"):
        list(fit(network, data, settings, seed=0))


def test_sgd_with_momentum_and_a_stepped_learning_rate(data: TrainingData) -> None:
    settings = FitSettings(
        5,
        32,
        0.02,
        optimizer="sgd",
        momentum=0.9,
        weight_decay=1e-4,
        schedule="steps",
        milestones=(2, 4),
        decay=0.1,
        buffer_chunks=4,
    )
    results = list(fit(new_network(), data, settings, seed=0))
    rates = [r.training["learning_rate"] for r in results]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])
    assert results[-1].training["loss"] < 0.8 * results[0].training["loss"]


def test_an_epoch_of_the_paper_has_equally_many_samples_of_each_phase(data: TrainingData) -> None:
    rows = []

    def objective(
        network: nn.Module, batch: LabelledBatch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        rows.append(batch.rows)
        return multitask_objective(network, batch, generator)

    steps: list[Step] = []
    settings = FitSettings(2, 50, balance=0.0, samples_per_epoch=2 * 150, buffer_chunks=3)
    execution = Execution(on_step=steps.append)
    list(
        fit(
            new_network(), data, settings, seed=0, criteria=Criteria(objective), execution=execution
        )
    )
    assert [(s.epoch, s.step, s.steps) for s in steps] == [
        (epoch, step, 6) for epoch in (1, 2) for step in range(1, 7)
    ]
    for epoch in (rows[:6], rows[6:]):
        assert np.bincount(data.samples.phase[np.concatenate(epoch)]).tolist() == [150, 150]


class Dropping(nn.Module):
    """Draws from torch's own generator while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.network = nn.Dropout(0.2), new_network()

    def forward(self, profiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, values = self.network(self.drop(profiles))
        return logits, values


def test_dropout_is_seeded_and_leaves_the_global_generator_unchanged(data: TrainingData) -> None:
    def train() -> np.ndarray:
        network = Dropping()
        list(fit(network, data, FitSettings(1, 64, buffer_chunks=4), seed=0))
        return weights(network)

    torch.manual_seed(1)
    first = train()
    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(first, train())
    assert torch.equal(torch.random.get_rng_state(), state)


class KnownPhase(nn.Module):
    """Takes the phase as an input, and returns it."""

    def forward(
        self, profiles: torch.Tensor, phase: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.functional.one_hot(phase, 3).float(), profiles[:, :1]


def test_a_network_may_take_the_phase_as_an_input() -> None:
    phase = np.random.default_rng(0).integers(3, size=300).astype(np.int8)
    profiles = np.random.default_rng(0).random((300, POINTS)).astype(np.float32)
    probabilities, values = outputs(KnownPhase(), profiles, phase=phase)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), phase)
    np.testing.assert_array_equal(values, profiles[:, :1])


def test_evaluation_by_chunks_equals_evaluation_at_once(data: TrainingData) -> None:
    network = new_network()
    list(fit(network, data, FitSettings(1), seed=0))
    samples = data.samples
    by_chunk = summary(data.targets, evaluate(network, data.targets, samples, data.validation))
    profiles = Profiles(samples.profiles.intensity, N, lambda x: x)
    whole = Samples(profiles, samples.phase, samples.cells)
    at_once = summary(data.targets, evaluate(network, data.targets, whole, data.validation))
    for group, scores in at_once.items():
        for name, value in scores.items():
            # Not to the last bit: a network's output varies with the batch's shape.
            assert by_chunk[group][name] == pytest.approx(value, rel=1e-5)


def test_probabilities_are_probabilities() -> None:
    profiles = np.random.default_rng(0).random((300, POINTS)).astype(np.float32)
    probabilities, values = outputs(new_network(), profiles)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert values.shape == (300, 2)


def test_a_device_that_does_not_exist_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="Use cpu"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="Use cpu"):
            choose_device("cuda")
