"""Our network: what it knows of diffraction, by the project's own functions, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.crystal import d_spacing
from bragg_data.kinematic import Simulator
from bragg_data.preprocessing import sqrt_unit
from bragg_data.schema import samples_of
from bragg_data.splits import Part, random_split
from bragg_models.batches import profiles_of
from bragg_models.guided import Guided, fill_tables, guided_config
from bragg_models.metrics import summary
from bragg_models.networks import build
from bragg_models.predictors import Predictor, load_predictor
from bragg_models.targets import Targets, targets_of
from bragg_models.training import FitSettings, Samples, evaluate, fit

torch.set_num_threads(1)

pytest_plugins = ("tests.small_store",)
STRUCTURES = Path(__file__).parent / "data" / "structures" / "structures.toml"


def made(campaign: Campaign, seed: int = 0, **changes: object) -> tuple[Guided, Targets]:
    samples = campaign.samples
    targets = targets_of(campaign.phases, samples.phase, samples.cells)
    network = build("guided", guided_config(campaign, targets, **changes), seed=seed)
    fill_tables(network, campaign, targets)
    assert isinstance(network, Guided)
    return network, targets


def simulated(campaign: Campaign, rows: np.ndarray) -> torch.Tensor:
    c = campaign
    simulator = Simulator(c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain)
    samples = c.samples[rows]
    patterns = simulator.simulate(samples.phase, samples.cells)
    return torch.from_numpy(np.asarray(sqrt_unit(patterns), dtype=np.float32))


@pytest.fixture(scope="module")
def structures() -> Campaign:
    return load_campaign(STRUCTURES)


def test_peaks_stand_where_bragg_s_law_puts_them(structures: Campaign) -> None:
    """In all seven crystal systems, of which six are in the structures, and rhombohedral axes."""
    network, targets = made(structures)
    for code, phase in enumerate(structures.phases):
        sample = structures.samples[np.flatnonzero(structures.samples.phase == code)[:1]]
        values, _ = targets.encode(sample.phase, sample.cells)
        physical = network._physical(torch.from_numpy(values).double())
        position, _ = network.look._positions(code, physical)
        hkl = np.array(
            [[1, 1, 1], [2, 0, 0], [3, 1, 2], [0, 1, 3], [2, 2, 0], [4, 0, 0], [1, 0, 2]]
        )
        tof = structures.instrument.tof_from_d_spacing(d_spacing(hkl, sample.cells)[0])
        wanted = np.log(tof / structures.grid.start) / structures.grid.relative_step
        wanted = wanted[wanted > network.config.lowest]
        distance = np.abs(position.numpy()[0][:, None] - wanted).min(axis=0)
        # Some of these reflections are absent by symmetry; float32 carries the scaled cell.
        assert (distance < 1e-3).sum() >= 2, phase.name


def test_expected_patterns_resemble_simulated_ones(small_campaign: Campaign) -> None:
    network, targets = made(small_campaign)
    rows = np.arange(30)
    profiles = simulated(small_campaign, rows)
    samples = small_campaign.samples[rows]
    values, _ = targets.encode(samples.phase, samples.cells)
    with torch.no_grad():
        for code in range(3):
            own = np.flatnonzero(samples.phase == code)
            physical = network._physical(torch.from_numpy(values[own]).double())
            expected = network.look.expected(code, physical)
            alike = torch.cosine_similarity(profiles[own], expected, dim=1)
            assert alike.min() > 0.9  # the shape of peaks is still to be learnt
            others = torch.cosine_similarity(profiles[own], expected.roll(20, dims=1), dim=1)
            assert others.max() < alike.min()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_even_an_untrained_look_steps_towards_the_truth(code: int) -> None:
    """On the instrument whose widths its peak shapes begin with."""
    campaign = load_campaign("batio3-offgrid")
    network, targets = made(campaign)
    rows = np.flatnonzero(campaign.samples.phase == code)[:20]
    profiles = simulated(campaign, rows)
    samples = campaign.samples[rows]
    true = torch.from_numpy(targets.encode(samples.phase, samples.cells)[0]).double()
    free = list(network.config.phases[code].free)
    wrong = torch.zeros_like(true)
    wrong[:, free] = 0.005 * torch.randn(
        len(rows), len(free), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    before = wrong[:, free].abs().median()
    guess = true + wrong
    with torch.no_grad():
        for _ in range(3):
            guess = guess + network._step(code, 1, profiles, guess)
    assert (guess - true)[:, free].abs().median() < 0.5 * before
    tied = [column for column in range(true.shape[1]) if column not in free]
    assert (guess - true)[:, tied].abs().sum() == 0


def test_it_answers_for_all_crystal_systems(structures: Campaign) -> None:
    network, targets = made(structures)
    rows = np.arange(14)
    network.eval()
    with torch.inference_mode():
        logits, values = network(simulated(structures, rows))
    assert logits.shape == (14, 7)
    assert values.shape == (14, 6)
    assert torch.isfinite(values).all()
    answered = logits.argmax(dim=1).numpy()
    cells = targets.decode(values.numpy(), answered)
    for code, phase in enumerate(structures.phases):
        phase.lattice.check_tied(cells[answered == code])


def test_description_is_plain_json(small_campaign: Campaign) -> None:
    network, targets = made(small_campaign, hidden=32)
    described = json.loads(json.dumps(guided_config(small_campaign, targets, hidden=32)))
    again = build("guided", described)
    again.load_state_dict(network.state_dict())
    assert again.config == network.config


@pytest.fixture(scope="module")
def task(small_dataset: xr.Dataset) -> tuple[Samples, np.ndarray]:
    labels = samples_of(small_dataset)
    profiles = profiles_of(small_dataset, sqrt_unit)
    part = random_split(labels.crystal_system, seed=0)
    return Samples(profiles, labels.phase, labels.cells), part


def trained(
    campaign: Campaign, task: tuple[Samples, np.ndarray], epochs: int
) -> tuple[Guided, Targets, dict[str, float]]:
    network, targets = made(campaign, hidden=128)
    samples, part = task
    settings = FitSettings(
        epochs=epochs, batch_size=32, learning_rate=3e-3, schedule="one_cycle", balance=1 / 3,
        regression_weight=10.0, buffer_chunks=4, mixed_precision=False,
    )  # fmt: skip
    list(
        fit(
            network, targets, samples, part == Part.training, part == Part.validation, settings,
            seed=0,
        )
    )  # fmt: skip
    total = evaluate(network, targets, samples, part == Part.test)
    return network, targets, summary(targets, total)["all"]


def test_it_learns_and_is_the_same_again(
    small_campaign: Campaign, task: tuple[Samples, np.ndarray]
) -> None:
    torch.set_num_threads(1)
    one, targets, scores = trained(small_campaign, task, epochs=8)
    again, _, other = trained(small_campaign, task, epochs=8)
    assert scores == other
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    # Without a look it is a perceptron that has seen a few hundred patterns.
    glance = Guided(replace(one.config, rounds=()))
    glance.load_state_dict(one.state_dict())
    samples, part = task
    blind = summary(targets, evaluate(glance, targets, samples, part == Part.test))["all"]
    assert scores["accuracy"] == blind["accuracy"] > 0.7
    profiles = torch.from_numpy(np.asarray(sqrt_unit(samples.profiles.intensity.values)))
    rows = np.flatnonzero(part == Part.test)
    true = targets.encode(samples.phase[rows], samples.cells[rows])[0]
    mistakes = []
    for network in (glance, one):
        network.eval()
        with torch.inference_mode():
            logits, values = network(profiles[rows])
        right = logits.argmax(dim=1).numpy() == samples.phase[rows]
        mistakes.append(np.median(np.abs(values.numpy() - true)[right, 0]))
    assert mistakes[1] < 0.6 * mistakes[0]


def test_saved_it_answers_as_before(small_campaign: Campaign, tmp_path: Path) -> None:
    network, targets = made(small_campaign, hidden=32)
    network.eval()
    points = small_campaign.grid.points
    provenance = {"campaign_toml": small_campaign.toml}
    predictor = Predictor("guided", network, targets, "profile_sqrt_unit@1", points, provenance)
    predictor.save(tmp_path)
    profiles = simulated(small_campaign, np.arange(5)).numpy() ** 2
    before, after = predictor.predict(profiles), load_predictor(tmp_path).predict(profiles)
    np.testing.assert_array_equal(before.cells, after.cells)
    np.testing.assert_array_equal(before.probabilities, after.probabilities)
