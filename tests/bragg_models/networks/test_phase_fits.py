"""Fits of all phases by the robust network: always finite, and calibrated with what is predicted.

Nothing is trained: the proposals are set by hand.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.model_provenance import ModelProvenance
from bragg_data.simulation.kinematic import Simulator
from bragg_models.networks.calibration import calibrate
from bragg_models.networks.cell_search import Observed
from bragg_models.networks.guided import fill_physics_tables, guided_config
from bragg_models.networks.paper import NetworkError
from bragg_models.networks.robust import ACCEPTED, PhaseFits, Robust
from bragg_models.predictors import Predictor, build
from bragg_models.targets import Targets, targets_of
from tests.bragg_models.networks.test_guided import propose
from tests.tiny_campaign import tiny_campaign

torch.set_num_threads(1)


def robust_network(campaign: Campaign, targets: Targets) -> Robust:
    config = guided_config(campaign, targets, sample_parameters=True, draws=32, starts=8)
    network = build("robust", config, seed=0)
    assert isinstance(network, Robust)
    fill_physics_tables(network, campaign, targets)
    return network.eval()


@pytest.fixture
def predictor(campaign: Campaign, targets: Targets) -> Predictor:
    network, points = robust_network(campaign, targets), campaign.grid.points
    return Predictor("robust", network, targets, "profile_sqrt_unit@1", points, ModelProvenance())


def exact_profiles(network: Robust, code: int, values: np.ndarray) -> np.ndarray:
    """Return profiles, (n, points), that are patterns of the network's own layer."""
    layer = network.pattern
    with torch.no_grad():
        physical = network.physical(torch.from_numpy(values), code)
        pattern = layer(code, physical, slopes=False)[0].numpy()
    profiles = np.zeros((len(values), layer.config.points), dtype=np.float32)
    profiles[:, layer.config.first :] = pattern
    return profiles


def assert_finite(predictor: Predictor, profiles: np.ndarray) -> None:
    prediction = predictor.predict(profiles)
    assert np.isfinite(prediction.probabilities).all()
    np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1, atol=1e-9)
    assert np.isfinite(prediction.cells).all()
    assert np.isfinite(prediction.unexplained).all()
    columns = [CELL_PARAMETERS.index(name) for name in predictor.targets.parameters]
    free = predictor.targets.free[prediction.phase]
    assert np.isfinite(prediction.intervals[:, columns][free]).all()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_starts_that_are_exact_give_finite_predictions(
    code: int, predictor: Predictor, targets: Targets
) -> None:
    """The misfit of an exact start is zero to rounding, and may be negative."""
    network = predictor.model
    generator = np.random.default_rng(code)
    scaled = generator.uniform(-0.9, 0.9, (20, len(targets.parameters))) * targets.free[code]
    negative = 0
    for values in scaled:
        propose(network, code, values)
        profiles = exact_profiles(network, code, values[None])
        prepared = torch.from_numpy(np.sqrt(profiles))
        compared = (prepared / prepared.norm())[:, network.config.pattern.first :]
        with torch.inference_mode():
            _, misfit = network._starts(compared, torch.from_numpy(values)[None])
        negative += bool(misfit.amin() <= 0)
        assert_finite(predictor, profiles)
        prediction = predictor.predict(profiles)
        assert prediction.phase.tolist() == [code]
        assert prediction.unexplained[0] < 1e-5
        assert prediction.accepted.all()
    assert negative  # the case occurred


@settings(max_examples=25)
@given(
    code=st.integers(0, 2),
    values=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    proposed=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    exact=st.booleans(),
)
def test_predictions_of_simulated_profiles_are_finite(
    code: int, values: list[float], proposed: list[float], exact: bool
) -> None:
    predictor, simulator = shared_predictor()
    propose(predictor.model, code, np.array(values if exact else proposed))
    cells = predictor.targets.decode(np.array([values]), np.array([code]))
    assert_finite(predictor, simulator.simulate(np.array([code]), cells))


@cache
def shared_predictor() -> tuple[Predictor, Simulator]:
    """Return the same predictor for all examples, as function-scoped fixtures are not reset."""
    with tempfile.TemporaryDirectory() as directory:
        c = tiny_campaign(Path(directory))
        samples = c.samples
    targets = targets_of(c.phases, samples.phase, samples.cells)
    predictor = Predictor(
        "robust",
        robust_network(c, targets),
        targets,
        "profile_sqrt_unit@1",
        c.grid.points,
        ModelProvenance(),
    )
    simulator = Simulator(c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain)
    return predictor, simulator


def test_nothing_is_explained_where_nothing_is_compared(predictor: Predictor) -> None:
    """A profile may have all its signal before the compared points."""
    network = predictor.model
    empty = torch.zeros(2, network.config.pattern.points - network.config.pattern.first)
    misfit, step, gain, _ = network.normal_equations(
        Observed(0, empty, torch.ones_like(empty)),
        torch.zeros(2, 5, dtype=torch.float64),
        torch.full((2,), 1e-9, dtype=torch.float64),
    )
    assert misfit.tolist() == [1.0, 1.0]
    assert torch.isfinite(step).all()
    assert torch.isfinite(gain).all()


def test_unexplained_is_that_of_the_predicted_phase(predictor: Predictor) -> None:
    network = predictor.model
    values = np.array([0.3, -0.4, 0.0])
    propose(network, 1, values)
    profiles = exact_profiles(network, 1, values[None])
    assert predictor.predict(profiles).phase.tolist() == [1]
    # Make the cubic phase the most probable one, although the tetragonal one fits better.
    head = network.head.clone()
    head[3] = 1e5
    network.head = head
    prediction = predictor.predict(profiles)
    assert prediction.phase.tolist() == [0]
    prepared = np.sqrt(profiles) / np.linalg.norm(np.sqrt(profiles))
    with torch.inference_mode():
        misfit = network.fit_phases(torch.from_numpy(prepared.astype(np.float32))).misfit
    assert prediction.unexplained[0] == misfit[0, 0] > 10 * misfit[0, 1]
    network.limit = (misfit[:, 0] + misfit[:, 1]) / 2
    assert not predictor.predict(profiles).accepted[0]


def test_the_drift_of_an_instrument_widens_lengths_and_not_angles(
    campaign: Campaign, targets: Targets
) -> None:
    """Also those of a lattice with long axes and a sharp angle: 40 Å and 20°."""
    network = robust_network(campaign, targets)
    assert targets.parameters == ("a", "c", "alpha")
    assert network.config.pattern.is_length == (True, True, False)
    network.middle = torch.tensor([[40.0, 10.0, 20.0]] * 3, dtype=torch.float64)
    network.half_range = torch.ones(3, 3, dtype=torch.float64)
    spread = torch.full((1, 3), 1e-3, dtype=torch.float64)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    fits = PhaseFits(zero, zero, spread, zero, zero)
    unit = network.error_unit(fits, torch.tensor([False]))[0].numpy()
    expected = np.hypot(1e-3, 3e-4 * np.array([40.0, 10.0, 0.0]))
    np.testing.assert_allclose(unit, expected, rtol=1e-12)
    calibrated = network.error_unit(fits, torch.tensor([True]))[0].numpy()
    np.testing.assert_allclose(calibrated, 1e-3, rtol=1e-12)


def fits_with_errors(scores: np.ndarray, phases: int) -> PhaseFits:
    """Return fits of phase 0 with these errors of all parameters, and unit uncertainty."""
    n = len(scores)
    logits = torch.zeros(n, phases, dtype=torch.float64)
    logits[:, 0] = 5.0
    misfit = torch.full((n, phases), 0.5, dtype=torch.float64)
    misfit[:, 0] = torch.from_numpy(scores / 1e4)
    values = torch.from_numpy(np.tile(scores[:, None], 3))
    return PhaseFits(logits, values, torch.ones(n, 3).double(), misfit, logits.log_softmax(dim=1))


@pytest.mark.parametrize(("n", "rank"), [(29, 27), (19, 18), (99, 90), (9, 9), (5, 5)])
def test_conformal_quantiles_are_order_statistics(
    n: int, rank: int, campaign: Campaign, targets: Targets
) -> None:
    """The ⌈(n + 1) · 0.9⌉-th smallest score, not a value between two; the largest of few."""
    network = robust_network(campaign, targets)
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    free = np.ones((3, 3), dtype=bool)
    result = calibrate(
        network,
        fits_with_errors(scores, 3),
        np.zeros(n, dtype=int),
        np.zeros((n, 3)),
        free,
        np.ones(n, dtype=bool),
    )
    assert network.stretch[0, 0].tolist() == [float(rank)] * 3
    highest = min(int(np.ceil((n + 1) * ACCEPTED)), n)
    assert result["limit"] == float(network.limit) == highest / 1e4
    assert result["accuracy"] == 1.0


def test_the_limit_is_calibrated_with_the_predicted_phase(
    campaign: Campaign, targets: Targets
) -> None:
    network = robust_network(campaign, targets)
    n = 40
    fits = fits_with_errors(np.arange(1.0, n + 1), 3)
    # The second phase fits better, but it is never right, and never predicted.
    fits.misfit[:, 1] = fits.misfit[:, 0] * 0.9
    logits = fits.logits.clone()
    logits[:, 0] = 50.0
    fits = PhaseFits(logits, fits.values, fits.spread, fits.misfit, logits.log_softmax(dim=1))
    result = calibrate(
        network,
        fits,
        np.zeros(n, dtype=int),
        np.zeros((n, 3)),
        np.ones((3, 3), dtype=bool),
        np.ones(n, dtype=bool),
    )
    assert result["accuracy"] == 1.0
    assert result["limit"] == pytest.approx(n / 1e4)


def test_wrong_predictions_do_not_widen_the_limit(campaign: Campaign, targets: Targets) -> None:
    network = robust_network(campaign, targets)
    n = 40
    fits = fits_with_errors(np.arange(1.0, n + 1), 3)
    truth = np.zeros(n, dtype=int)
    truth[-8:] = 2  # predicted as phase 0, with the largest misfits
    result = calibrate(
        network, fits, truth, np.zeros((n, 3)), np.ones((3, 3), dtype=bool), np.ones(n, dtype=bool)
    )
    assert result["accuracy"] == 0.8
    assert result["limit"] == pytest.approx((n - 8) / 1e4)


def test_a_network_with_a_table_that_would_not_be_filled_is_refused(
    campaign: Campaign, targets: Targets
) -> None:
    config = dict(guided_config(campaign, targets, draws=32))
    phases = config["pattern"]["phases"]
    config["pattern"] = {**config["pattern"], "phases": (*phases, phases[-1])}
    config["proposal"] = {**config["proposal"], "phases": len(phases) + 1}
    network = build("guided", config)
    with pytest.raises(NetworkError, match=r"products_3.*same campaign"):
        fill_physics_tables(network, campaign, targets)
    network = build("guided", guided_config(campaign, targets, draws=32))
    fill_physics_tables(network, campaign, targets)
    assert network.half_range.tolist() == targets.half_range.tolist()
    for name, table in network.pattern.named_buffers():
        assert not bool((table == 1).all()), name
