"""The minimiser: minima within bounds, at the edge of a model's domain, and fits given up."""

import numpy as np
import pytest
from scipy.optimize import least_squares, lsq_linear

from bragg_data.crystallography.cell import CrystalError
from bragg_data.refinement.levenberg_marquardt import Evaluation, Minimum, minimise

X = np.linspace(0, 3, 40)
TRUTH = np.array([2.0, 1.3])
NOISE = np.random.default_rng(0).normal(0, 0.1, len(X))


class Decay:
    """a · exp(-b x) against noisy values, in units of the noise; undefined above a limit of b."""

    def __init__(self, limit: float = np.inf) -> None:
        self.limit = limit
        self.y = TRUTH[0] * np.exp(-TRUTH[1] * X) + NOISE

    def residual(self, point: np.ndarray) -> np.ndarray:
        return (self.y - point[0] * np.exp(-point[1] * X)) / 0.1

    def evaluate(self, point: np.ndarray) -> Evaluation:
        if not point[1] < self.limit:
            raise CrystalError("beyond the limit")
        decay = np.exp(-point[1] * X)
        jacobian = np.stack([-decay, point[0] * X * decay], axis=1) / 0.1
        return Evaluation(self.residual(point), jacobian)


def minimum(
    model: Decay, start: np.ndarray, high: float = np.inf, hopeless: float = np.inf
) -> Minimum:
    bounds = np.array([-np.inf, -np.inf]), np.array([np.inf, high])
    return minimise(model.evaluate, start, bounds, lambda _: 1e-9, lambda chi2, _: chi2 > hopeless)


def test_the_minimum_is_that_of_scipy() -> None:
    model, start = Decay(), np.array([0.5, 0.2])
    result = minimum(model, start)
    assert result.converged
    np.testing.assert_allclose(result.point, least_squares(model.residual, start).x, rtol=1e-5)
    np.testing.assert_array_equal(result.residual, model.residual(result.point))


def test_a_bound_holds_and_other_parameters_are_refined() -> None:
    model = Decay()
    result = minimum(model, np.array([0.5, 0.2]), high=1.0)
    expected = least_squares(lambda a: model.residual(np.array([a[0], 1.0])), [0.5]).x[0]
    assert result.point[1] == 1.0
    assert result.point[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_linear_problems_within_bounds_are_those_of_scipy(seed: int) -> None:
    """Parameters that depend on each other and all want to leave their bounds."""
    generator = np.random.default_rng(seed)
    columns = generator.normal(size=(30, 1)) + 0.1 * generator.normal(size=(30, 5))
    y, high = generator.normal(size=30), generator.uniform(0.01, 1.0, 5)

    def evaluate(point: np.ndarray) -> Evaluation:
        return Evaluation(columns @ point - y, columns)

    result = minimise(evaluate, high / 2, (0 * high, high), lambda _: 1e-9)
    assert result.converged
    expected = lsq_linear(columns, y, (0, high), method="bvls", tol=1e-14)
    np.testing.assert_allclose(result.point, expected.x, atol=1e-6)


def test_points_without_a_pattern_are_rejected() -> None:
    """The minimum lies outside of the model's domain: the search ends within it."""
    model = Decay(limit=1.0)
    result = minimum(model, np.array([0.5, 0.2]))
    assert 0.9 < result.point[1] < 1.0
    assert np.isfinite(result.residual).all()
    start = model.residual(np.array([0.5, 0.2]))
    assert result.residual @ result.residual < 0.1 * (start @ start)


def test_a_hopeless_fit_ends_at_its_start() -> None:
    start = np.array([0.5, 0.2])
    result = minimum(Decay(), start, hopeless=1)
    np.testing.assert_array_equal(result.point, start)
    assert not result.converged


def test_parameters_of_which_only_the_square_of_a_difference_counts() -> None:
    """Such as displacement parameters of two sites that may be exchanged."""
    evaluations = []

    def evaluate(point: np.ndarray) -> Evaluation:
        evaluations.append(point)
        apart = point[0] - point[1]
        slope = 0.1 + 100 * apart
        residual = np.array([10 * (point.sum() - 2), 20 + 0.1 * apart + 50 * apart**2])
        return Evaluation(residual, np.array([[10.0, 10.0], [slope, -slope]]))

    bounds = np.full(2, -9.0), np.full(2, 9.0)
    result = minimise(evaluate, np.array([1.5, 1.1]), bounds, lambda _: 1e-4)
    assert result.converged
    assert len(evaluations) < 40  # 61, where only the products of derivatives count
    np.testing.assert_allclose(result.point, [1 - 0.0005, 1 + 0.0005], atol=1e-3)
    assert result.residual @ result.residual < 20**2 + 1e-3
