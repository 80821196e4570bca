"""Our network: its physics against the simulator, and the cells that it refines."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.crystallography.cell import d_spacing
from bragg_data.model_provenance import ModelProvenance
from bragg_data.preprocessing import sqrt_unit
from bragg_data.simulation.kinematic import Simulator
from bragg_models.networks.guided import Guided, fill_physics_tables, guided_config
from bragg_models.networks.paper import NetworkError
from bragg_models.predictors import DESCRIPTION, FORMAT, WEIGHTS, Predictor, build, load_predictor
from bragg_models.targets import Targets, targets_of

torch.set_num_threads(1)
STRUCTURES = Path(__file__).parents[2] / "data" / "structures" / "structures.toml"


def guided_network(campaign: Campaign) -> tuple[Guided, Targets]:
    samples = campaign.samples
    targets = targets_of(campaign.phases, samples.phase, samples.cells)
    network = build("guided", guided_config(campaign, targets), seed=0)
    fill_physics_tables(network, campaign, targets)
    assert isinstance(network, Guided)
    return network.eval(), targets


def simulated(campaign: Campaign, phase: np.ndarray, cells: np.ndarray) -> np.ndarray:
    c = campaign
    simulator = Simulator(c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain)
    return simulator.simulate(phase, cells)


def propose(network: Guided, code: int, values: np.ndarray) -> None:
    """Make the proposal the same for every profile."""
    proposal = network.proposal
    with torch.no_grad():
        for head in (proposal.phase, proposal.cell):
            head.weight.zero_()
            head.bias.zero_()
        proposal.phase.bias[code] = 3.0
        proposal.cell.bias.copy_(torch.from_numpy(values))


@pytest.fixture(scope="module")
def structures() -> Campaign:
    return load_campaign(STRUCTURES)


@pytest.fixture(scope="module")
def known(structures: Campaign) -> tuple[Guided, Targets]:
    return guided_network(structures)


@pytest.fixture(scope="module")
def paper() -> Campaign:
    return load_campaign("batio3-nomad")


@pytest.fixture(scope="module")
def network(paper: Campaign) -> tuple[Guided, Targets]:
    return guided_network(paper)


def test_peaks_are_at_the_positions_of_bragg_s_law(
    structures: Campaign, known: tuple[Guided, Targets]
) -> None:
    guided, targets = known
    for code, phase in enumerate(structures.phases):
        sample = structures.samples[np.flatnonzero(structures.samples.phase == code)[:1]]
        values, _ = targets.encode(sample.phase, sample.cells)
        physical = guided.physical(torch.from_numpy(values).double(), code)
        position, _ = guided.pattern.line_positions(code, physical)
        hkl = np.array(
            [[1, 1, 1], [2, 0, 0], [3, 1, 2], [0, 1, 3], [2, 2, 0], [4, 0, 0], [1, 0, 2]]
        )
        tof = structures.instrument.tof_from_d_spacing(d_spacing(hkl, sample.cells)[0])
        expected = np.log(tof / structures.grid.start) / structures.grid.relative_step
        expected = expected[expected > guided.config.pattern.first]
        distance = np.abs(position.numpy()[0][:, None] - expected).min(axis=0)
        # Some of these reflections are absent by symmetry; float32 carries the scaled cell.
        assert (distance < 1e-3).any(), phase.name


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2])
def test_patterns_are_the_simulator_s(
    code: int, paper: Campaign, network: tuple[Guided, Targets]
) -> None:
    guided, targets = network
    rows = np.flatnonzero(paper.samples.phase == code)
    rows = np.random.default_rng(code).choice(rows, 8, replace=False)
    phase, cells = paper.samples.phase[rows], paper.samples.cells[rows]
    columns = [("a", "b", "c", "alpha", "beta", "gamma").index(p) for p in targets.parameters]
    pattern, slopes = guided.pattern(code, torch.from_numpy(cells[:, columns]))
    exact = simulated(paper, phase, cells)[:, guided.config.pattern.first :]
    computed = pattern.numpy()
    scale = (computed * exact).sum(axis=1) / (computed * computed).sum(axis=1)
    difference = np.abs(computed * scale[:, None] - exact).max(axis=1) / exact.max(axis=1)
    assert difference.max() < 1e-3
    # The derivatives are those of the pattern, apart from changes of amplitudes.
    for column, parameter in enumerate(guided.config.pattern.phases[code].free):
        step = torch.zeros(len(rows), len(targets.parameters), dtype=torch.float64)
        step[:, parameter] = 1e-5
        parameters = torch.from_numpy(cells[:, columns])
        above, _ = guided.pattern(code, parameters + step)
        below, _ = guided.pattern(code, parameters - step)
        numeric = (above - below) / 2e-5
        similarity = torch.cosine_similarity(numeric, slopes[:, column], dim=1)
        assert similarity.min() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_wrong_cell_is_refined(
    code: int, paper: Campaign, network: tuple[Guided, Targets]
) -> None:
    guided, targets = network
    truth = {0: (3.91, 3.91, 90.0), 1: (3.951, 3.957, 90.0), 2: (4.03, 4.03, 88.7)}[code]
    cell = np.array([[truth[0], truth[0], truth[1], *[truth[2]] * 3]])
    values, _ = targets.encode(np.array([code]), cell)
    wrong = {0: (0.006, 0, 0), 1: (0.004, -0.004, 0), 2: (0.003, 0, 0.2)}[code]
    propose(guided, code, values[0] + np.array(wrong) / targets.half_range[code])
    profile = np.asarray(sqrt_unit(simulated(paper, np.array([code]), cell)), dtype=np.float32)
    with torch.inference_mode():
        logits, scaled = guided(torch.from_numpy(profile))
        no_logits, no_values = guided(torch.from_numpy(profile[:0]))
    assert logits.argmax() == code
    np.testing.assert_allclose(
        targets.decode(scaled.numpy(), np.array([code])), cell, atol=1e-4 if code < 2 else 1e-3
    )
    assert no_logits.shape == (0, 3)
    assert no_values.shape == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2])
def test_cells_far_from_the_proposal_are_refined(
    code: int, paper: Campaign, network: tuple[Guided, Targets]
) -> None:
    """All over the range, where a hundredth of a degree moves peaks by their width, too."""
    guided, targets = network
    rows = np.flatnonzero(paper.samples.phase == code)
    rows = np.random.default_rng(code).choice(rows, 24, replace=False)
    if code == 2:
        rows[0] = np.flatnonzero((paper.samples.phase == 2) & (paper.samples.cells[:, 3] > 119.4))[
            0
        ]
    phase, cells = paper.samples.phase[rows], paper.samples.cells[rows]
    propose(guided, code, np.full(len(targets.parameters), 0.9))
    profiles = np.asarray(sqrt_unit(simulated(paper, phase, cells)), dtype=np.float32)
    with torch.inference_mode():
        logits, scaled = guided(torch.from_numpy(profiles))
    assert (logits.argmax(dim=1) == code).all()
    refined = targets.decode(scaled.numpy(), phase)
    np.testing.assert_allclose(refined[:, :3], cells[:, :3], atol=1e-3)
    np.testing.assert_allclose(refined[:, 3:], cells[:, 3:], atol=0.02)


@pytest.mark.slow
def test_a_wrongly_proposed_phase_is_corrected(
    paper: Campaign, network: tuple[Guided, Targets]
) -> None:
    guided, targets = network
    cell = np.array([[3.93, 3.93, 4.05, 90.0, 90.0, 90.0]])
    values, _ = targets.encode(np.array([1]), cell)
    propose(guided, 0, values[0])  # cubic
    profile = np.asarray(sqrt_unit(simulated(paper, np.array([1]), cell)), dtype=np.float32)
    with torch.inference_mode():
        logits, scaled = guided(torch.from_numpy(profile))
        _, known = guided(torch.from_numpy(profile), torch.tensor([1]))
    assert logits.argmax() == 1
    # The logits stay those of the proposal; two of them are swapped.
    assert sorted(logits[0].tolist()) == [0.0, 0.0, 3.0]
    np.testing.assert_allclose(targets.decode(scaled.numpy(), np.array([1])), cell, atol=1e-4)
    np.testing.assert_allclose(targets.decode(known.numpy(), np.array([1])), cell, atol=1e-4)


@pytest.mark.slow
def test_cells_of_every_crystal_system_are_refined(
    structures: Campaign, known: tuple[Guided, Targets]
) -> None:
    """From slightly wrong cells, up to the six parameters of a triclinic one."""
    guided, targets = known
    for code, phase in enumerate(structures.phases):
        sample = structures.samples[np.flatnonzero(structures.samples.phase == code)[:1]]
        values, free = targets.encode(sample.phase, sample.cells)
        propose(guided, code, values[0] + 0.02 * free[0])
        intensity = simulated(structures, sample.phase, sample.cells)
        profile = np.asarray(sqrt_unit(intensity), dtype=np.float32)
        with torch.inference_mode():
            _, scaled = guided(torch.from_numpy(profile), torch.tensor([code]))
        cells = targets.decode(scaled.numpy(), np.array([code]))
        np.testing.assert_allclose(cells[:, :3], sample.cells[:, :3], atol=2e-3, err_msg=phase.name)
        np.testing.assert_allclose(cells[:, 3:], sample.cells[:, 3:], atol=0.05, err_msg=phase.name)


@pytest.mark.slow
def test_a_saved_model_predicts_as_before(
    paper: Campaign, network: tuple[Guided, Targets], tmp_path: Path
) -> None:
    guided, targets = network
    cell = np.array([[3.93, 3.93, 4.05, 90.0, 90.0, 90.0]])
    values, _ = targets.encode(np.array([1]), cell)
    propose(guided, 1, values[0])
    intensity = simulated(paper, np.array([1]), cell)
    predictor = Predictor(
        "guided", guided, targets, "profile_sqrt_unit@1", paper.grid.points, ModelProvenance()
    )
    predictor.save(tmp_path / "saved")
    again = load_predictor(tmp_path / "saved")
    before, after = predictor.predict(intensity), again.predict(intensity)
    np.testing.assert_array_equal(before.cells, after.cells)
    np.testing.assert_allclose(before.cells, cell, atol=1e-4)


def test_a_model_saved_by_the_previous_version_predicts_the_same(
    paper: Campaign, network: tuple[Guided, Targets], tmp_path: Path
) -> None:
    guided, targets = network
    cell = np.array([[3.93, 3.93, 4.05, 90.0, 90.0, 90.0]])
    values, _ = targets.encode(np.array([1]), cell)
    propose(guided, 1, values[0])
    predictor = Predictor(
        "guided", guided, targets, "profile_sqrt_unit@1", paper.grid.points, ModelProvenance()
    )
    predictor.save(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text(encoding="utf-8"))
    assert (description["format"], FORMAT) == (2, 2)
    description["format"] = 1
    config = description["network"]
    config["glance"] = config.pop("proposal")  # deprecated key
    config["nuisance"] = config.pop("sample_parameters")  # deprecated key
    (tmp_path / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    weights = {
        name.replace("proposal.", "glance."): value  # deprecated name
        for name, value in load_file(tmp_path / WEIGHTS).items()
    }
    assert sum(name.startswith("glance.") for name in weights) == 8  # deprecated name
    save_file(weights, tmp_path / WEIGHTS)
    again = load_predictor(tmp_path)
    assert asdict(again.model.config) == asdict(guided.config)
    intensity = simulated(paper, np.array([1]), cell)
    before, after = predictor.predict(intensity), again.predict(intensity)
    np.testing.assert_array_equal(before.cells, after.cells)
    np.testing.assert_array_equal(before.probabilities, after.probabilities)


def test_a_damaged_configuration_is_refused(network: tuple[Guided, Targets]) -> None:
    described = json.loads(json.dumps(asdict(network[0].config)))
    del described["pattern"]["phases"][0]["terms"]
    with pytest.raises(NetworkError, match="is invalid"):
        build("guided", described)
