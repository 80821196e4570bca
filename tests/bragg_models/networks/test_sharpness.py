"""Intervals hold for sharp measurements as for others; models saved before that get them, too."""

import numpy as np
import pytest
import torch

from bragg_models.networks.calibration import calibrate
from bragg_models.networks.robust import PhaseFits, Robust, sharpness_features
from bragg_models.predictors import load_predictor
from catalog.packages import directory_of

FREE = np.array([[True, False, False], [True, True, False], [True, False, True]])
COUNT = 4000


@pytest.fixture
def network() -> Robust:
    model = load_predictor(directory_of("batio3-nomad")).model
    assert isinstance(model, Robust)
    return model


def fits_of(seed: int, power: float) -> tuple[PhaseFits, np.ndarray, np.ndarray]:
    """Fits whose uncertainties shrink with the root of the misfit, and errors by its power."""
    generator = np.random.default_rng(seed)
    phase = generator.integers(0, 3, COUNT)
    misfit = np.exp(generator.uniform(np.log(0.003), np.log(0.1), COUNT))
    free = FREE[phase]
    spread = free * (1e-3 * misfit**0.5)[:, None]
    error = free * generator.normal(size=(COUNT, 3)) * (1e-3 * misfit**power)[:, None]
    values = torch.zeros(COUNT, 3, dtype=torch.float64)
    misfits = torch.full((COUNT, 3), 0.5, dtype=torch.float64)
    misfits[torch.arange(COUNT), torch.from_numpy(phase)] = torch.from_numpy(misfit)
    logits = torch.from_numpy(10.0 * np.eye(3)[phase])
    fits = PhaseFits(logits, values, torch.from_numpy(spread), misfits, logits.log_softmax(dim=1))
    return fits, phase, error


def coverage(network: Robust, fits: PhaseFits, phase: np.ndarray, error: np.ndarray) -> list[float]:
    """The share inside the intervals, by quintile of the misfit."""
    half = network.stretch[0, torch.from_numpy(phase)] * network.error_unit(
        fits, torch.ones(COUNT, dtype=torch.bool)
    )
    inside = np.abs(error) <= half.numpy()
    misfit = fits.misfit.numpy()[np.arange(COUNT), phase]
    groups = np.array_split(np.argsort(misfit), 5)
    return [float(inside[rows][FREE[phase[rows]]].mean()) for rows in groups]


@pytest.mark.parametrize("power", [0.0, 0.2, 0.5])
def test_calibrated_intervals_hold_whatever_the_misfit(network: Robust, power: float) -> None:
    fits, phase, error = fits_of(0, power)
    calibrate(network, fits, phase, error, FREE, np.ones(COUNT, dtype=bool))
    shares = coverage(network, *fits_of(1, power))
    assert shares == pytest.approx([0.9] * 5, abs=0.03)
    of_misfit, of_uncertainty = network.sharpness[1, 1, :, 0].tolist()
    assert of_misfit + of_uncertainty / 2 == pytest.approx(power - 0.5, abs=0.1)


def test_from_few_draws_no_powers_are_fitted(network: Robust) -> None:
    fits, phase, error = fits_of(0, 0.2)
    few = PhaseFits(*(values[:150] for values in fits))
    calibrate(network, few, phase[:150], error[:150], FREE, np.ones(150, dtype=bool))
    assert not network.sharpness.any()


def test_a_model_saved_without_powers_gets_the_usual_power(network: Robust) -> None:
    state = dict(network.state_dict())
    del state["sharpness"]
    again = Robust(network.config)
    again.load_state_dict(state)
    fits, *_ = fits_of(2, 0.2)
    calibrated = torch.ones(COUNT, dtype=torch.bool)
    logarithm, ratio = sharpness_features(fits)[..., 0], again.error_unit(fits, calibrated)
    ratio = ratio / fits.spread
    limit = float(network.limit)
    middle, length, angle = np.log(limit / 12), 0, 2
    usual = torch.exp(-0.3 * (logarithm.clamp(np.log(limit / 30), np.log(limit)) - middle))
    np.testing.assert_allclose(ratio[:, length], usual[:, length], rtol=1e-6)
    trigonal = fits.spread[:, angle] > 0
    np.testing.assert_allclose(ratio[trigonal, angle], 1.0, rtol=1e-9)
    # Intervals of sharp measurements are wider, by less than the uncertainty shrinks.
    order = logarithm[:, 0].argsort()
    assert 1 < ratio[order[0], length] < (12 / 30) ** -0.5
