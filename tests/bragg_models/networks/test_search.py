"""The search without a proposal network: very different compounds in one campaign."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bragg_data.campaign import BUILT_IN, Campaign, load_campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.model_provenance import ModelProvenance
from bragg_data.preprocessing import preprocessing
from bragg_data.simulation.measurement_effects import draw_labels, draw_profiles, simulator_for
from bragg_models.networks.calibration import calibrate
from bragg_models.networks.guided import fill_physics_tables, guided_config
from bragg_models.networks.robust import Robust
from bragg_models.predictors import Predictor, build
from bragg_models.targets import targets_of
from pipelines.simulation.foreign import foreign_profiles
from pipelines.training.presets import SEARCH_NETWORK

torch.set_num_threads(1)

STRUCTURES = Path(__file__).parents[2] / "data" / "structures"
CELLS = {
    "silicon": {"a": 5.431},
    "rutile": {"a": 4.5937, "c": 2.9587},
    "hydroxyapatite": {"a": 9.4166, "c": 6.8745},
    "kyanite": {
        "a": 7.1262,
        "b": 7.852,
        "c": 5.5724,
        "alpha": 89.99,
        "beta": 101.11,
        "gamma": 106.03,
    },
}


def search_campaign(directory: Path, *names: str, more: str = "") -> Campaign:
    """A campaign of some structures on NOMAD's bank 4: lengths ± 2 %, angles ± 1°."""
    text = (
        f'name = "several"\nseed = 1\nsampling = "sobol"\n[instrument]\n'
        f'file = "{BUILT_IN}/nomad_bank4.instprm"\n'
        f"[tof]\nstart = 6333.1\nrelative_step = 0.0011\npoints = 991\n{more}"
    )
    for name in names:
        text += f'[[phases]]\nname = "{name}"\ncif = "{STRUCTURES}/{name}.cif"\nsamples = 256\n'
        text += "[phases.cell]\n"
        for parameter, value in CELLS[name].items():
            half = 0.02 * value if parameter in "abc" else 1.0
            text += f"{parameter} = {{ low = {value - half:.4f}, high = {value + half:.4f} }}\n"
    path = directory / "several.toml"
    path.write_text(text, encoding="utf-8")
    return load_campaign(path)


def search_predictor(campaign: Campaign, **changes: object) -> Predictor:
    samples = campaign.samples
    targets = targets_of(campaign.phases, samples.phase, samples.cells)
    config = guided_config(
        campaign, targets, sample_parameters=True, **{**SEARCH_NETWORK, **changes}
    )
    network = build("robust", config)
    fill_physics_tables(network, campaign, targets)
    points = campaign.grid.points
    return Predictor(
        "robust", network.eval(), targets, "profile_sqrt_unit@1", points, ModelProvenance()
    )


@pytest.fixture(scope="module")
def rutile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Campaign, Predictor]:
    campaign = search_campaign(tmp_path_factory.mktemp("rutile"), "rutile")
    return campaign, search_predictor(campaign)


def without_skew(predictor: Predictor) -> Predictor:
    network = predictor.model
    assert isinstance(network, Robust)
    config = replace(network.config, pattern=replace(network.config.pattern, skew=(1.0, 0.0, 0.0)))
    same = Robust(config)
    same.load_state_dict(network.state_dict())
    return replace(predictor, model=same.eval())


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_microstrain_does_not_shift_the_cell(
    factor: float, rutile: tuple[Campaign, Predictor]
) -> None:
    """GSAS-II's peaks shift as they broaden; the search allows for it."""
    campaign, predictor = rutile
    cells, phase = campaign.samples.cells[5:8], np.zeros(3, dtype=int)
    microstrain, size = np.full(3, factor * campaign.microstrain), np.full(3, campaign.size)
    profiles = simulator_for(campaign).simulate(phase, cells, microstrain=microstrain, size=size)

    def error(of: Predictor) -> float:
        prediction = of.predict(profiles)
        assert prediction.unexplained.max() < 5e-4
        return float(np.abs(prediction.cells[:, :3] / cells[:, :3] - 1).max())

    assert error(predictor) < 2e-5
    if factor != 1:
        assert error(without_skew(predictor)) > 6e-5


def test_derivatives_with_respect_to_the_broadening(rutile: tuple[Campaign, Predictor]) -> None:
    campaign, predictor = rutile
    network = predictor.model
    assert isinstance(network, Robust)
    columns = [CELL_PARAMETERS.index(name) for name in predictor.targets.parameters]
    cells = torch.from_numpy(campaign.samples.cells[5:8][:, columns])

    def pattern(u: float, width: float) -> tuple[torch.Tensor, torch.Tensor]:
        sample = torch.tensor([[u, width]]).expand(3, 2)
        with torch.no_grad():
            return network.pattern(0, cells, sample_parameters=sample, lorentzian=True)

    for width in (-0.5, 0.0, 3.0):
        slopes = pattern(0.2, width)[1]
        assert slopes.shape[1] == 4  # a, c, displacement, width
        # That of the displacement uses fewer basis shapes.
        for number, (u, w, limit) in enumerate(((0.01, 0.0, 0.02), (0.0, 0.02, 2e-3))):
            high, low = pattern(0.2 + u, width + w)[0], pattern(0.2 - u, width - w)[0]
            expected = (high - low) / (2 * (u + w))
            difference = (slopes[:, 2 + number] - expected).norm(dim=1) / expected.norm(dim=1)
            assert difference.max() < limit


def draws_of(campaign: Campaign, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Return prepared profiles with measurement effects, their phases and cells."""
    generator = np.random.default_rng(seed)
    labels = draw_labels(campaign, count, generator)
    simulator = simulator_for(campaign)
    draws = draw_profiles(simulator, *labels, generator, campaign.measurement_effects)
    return draws.prepared(), draws.phase, draws.cells


CLEAN = """[measurement_effects]
counts = [100000, 200000]
background = [0.01, 0.03]
impurity = 0.0
spectrum_error = 0.02
shift = 0.005
"""


@pytest.mark.slow
def test_very_different_compounds_are_identified_and_refined(tmp_path: Path) -> None:
    names = "silicon", "rutile", "kyanite"
    campaign = search_campaign(tmp_path, *names, more=CLEAN)
    predictor = search_predictor(campaign)
    network, targets = predictor.model, predictor.targets
    assert isinstance(network, Robust)
    assert network.proposal is None
    profiles, phase, cells = draws_of(campaign, 4, 1)
    fits = network.fit_profiles(preprocessing(predictor.preprocessing).function(profiles))
    values, _ = targets.encode(phase, cells)
    calibrated = np.ones(len(phase), dtype=bool)
    assert calibrate(network, fits, phase, values, targets.free, calibrated)["accuracy"] == 1.0
    assert float(network.limit) < 0.1

    profiles, phase, cells = draws_of(campaign, 4, 2)
    prediction = predictor.predict(profiles)
    assert prediction.phase.tolist() == phase.tolist()
    error = np.abs(prediction.cells / cells - 1)[:, :3].max(axis=1)
    assert (error[phase < 2] < 5e-4).all(), error
    # Of kyanite, with six parameters and overlapping peaks, one search in six ends elsewhere.
    assert np.median(error[phase == 2]) < 2e-3, error
    free = np.array([lattice.free_mask for lattice in targets.lattices])[phase]
    assert np.isfinite(prediction.intervals).all(axis=2).tolist() == free.tolist()
    assert (np.diff(prediction.intervals, axis=2)[free] > 0).all()
    assert np.median(prediction.unexplained) < 0.1

    foreign = predictor.predict(foreign_profiles(campaign, 2))
    assert not foreign.accepted.any(), foreign.unexplained
    assert np.isfinite(foreign.cells).all()
    assert np.isfinite(foreign.probabilities).all()


@pytest.mark.slow
def test_overlapping_peaks_are_not_biased_by_the_background(tmp_path: Path) -> None:
    """Most of the 386 lines overlap, and the subtracted background contains a part of them."""
    campaign = search_campaign(tmp_path, "hydroxyapatite", more=CLEAN)
    profiles, _, cells = draws_of(campaign, 12, 1)

    def errors(**changes: int) -> np.ndarray:
        predicted = search_predictor(campaign, draws=256, **changes).predict(profiles).cells
        return np.asarray(predicted[:, [0, 2]] / cells[:, [0, 2]] - 1)

    alone, with_terms = errors(background_terms=0), errors()
    assert np.abs(with_terms).mean() < 1e-4
    assert np.abs(alone).mean() > 3 * np.abs(with_terms).mean()
    assert abs(with_terms.mean()) < 3e-5


def test_noise_of_a_subtracted_background_does_not_bias_a_search(tmp_path: Path) -> None:
    effects = "[measurement_effects]\ncounts = [1500, 5000]\nbackground = [0.5, 1.5]\n"
    campaign = search_campaign(tmp_path, "rutile", more=effects)
    profiles, _, cells = draws_of(campaign, 30, 1)

    def error(**changes: int) -> float:
        changes = {"background_terms": 0, **changes}
        predicted = search_predictor(campaign, draws=256, **changes).predict(profiles)
        relative = predicted.cells[:, [0, 2]] / cells[:, [0, 2]] - 1
        return float((relative**2).mean())

    assert error(intensities=True) < 0.5 * error()


def test_old_weights_with_a_common_scale_give_the_same(tmp_path: Path) -> None:
    """As models were saved before phases had scales of their own."""
    campaign = search_campaign(tmp_path, "rutile")
    predictor = search_predictor(campaign)
    state = predictor.model.state_dict()
    for name in ("middle", "half_range"):
        assert state[name].shape == (1, 2)
        state[name] = state[name][0]
    older = Robust(predictor.model.config)
    older.load_state_dict(state)
    assert older.half_range.tolist() == predictor.targets.half_range.tolist()
    profiles = draws_of(campaign, 2, 3)[0]
    first, second = (
        replace(predictor, model=model.eval()).predict(profiles)
        for model in (predictor.model, older)
    )
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(second, name), value, err_msg=name)
