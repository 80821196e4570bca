"""Baselines of many profiles at a time, against equations that scipy solves one by one."""

import numpy as np
import pytest
from scipy.linalg import solveh_banded

from bragg_data.kernels import exponential
from bragg_data.smooth_baseline import STIFFNESS, smooth_baselines

POINTS = 400


def reference(profile: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return the baseline by the method's equations, all points with information."""
    typical = np.median(sigma)
    deviation = np.clip(sigma, 0.01 * typical, 100 * typical)
    precision = (typical / deviation) ** 2
    differences = np.diff(np.eye(len(profile)), n=2, axis=0)
    penalty = STIFFNESS * differences.T @ differences
    bands = np.zeros((3, len(profile)))
    for offset in range(3):
        bands[2 - offset, offset:] = np.diagonal(penalty, offset)
    weight = np.ones(len(profile))
    for _ in range(50):
        total = weight * precision + 1e-9
        baseline = solveh_banded(bands + [[0], [0], [1]] * total, total * profile)
        residual = (profile - baseline) / deviation
        below = residual[residual < 0]
        argument = 2 * (residual - (2 * below.std() - below.mean())) / below.std()
        updated = 1 / (1 + np.exp(np.clip(argument, -50, 50)))
        change = np.linalg.norm(updated - weight) / np.linalg.norm(weight)
        weight = updated
        if change < 1e-3:
            break
    return np.asarray(baseline)


@pytest.fixture(scope="module")
def profiles() -> tuple[np.ndarray, np.ndarray]:
    """Return 21 profiles, more than share a loop, of noise, background and peaks."""
    generator = np.random.default_rng(0)
    x = np.arange(POINTS)
    sigma = 10 ** generator.uniform(-2, 0, (21, 1)) * np.exp(-x / 200)
    y = 5 + np.sin(x / 80 + generator.uniform(0, 6, (21, 1)))
    for centre in generator.uniform(0, POINTS, 6):
        y = y + 8 * np.exp(-(((x - centre) / 4) ** 2))
    return y + sigma * generator.standard_normal(y.shape), sigma


def test_baselines_solve_the_equations(profiles: tuple[np.ndarray, np.ndarray]) -> None:
    for result, *row in zip(smooth_baselines(*profiles), *profiles, strict=True):
        np.testing.assert_allclose(result, reference(*row), rtol=3e-6)


def test_rows_do_not_depend_on_each_other(profiles: tuple[np.ndarray, np.ndarray]) -> None:
    together = smooth_baselines(*profiles)
    for row in (0, 7, 20):
        alone = smooth_baselines(*(values[row : row + 1] for values in profiles))
        np.testing.assert_array_equal(together[row], alone[0])


def test_only_the_span_with_information_counts(profiles: tuple[np.ndarray, np.ndarray]) -> None:
    y, sigma = (values.copy() for values in profiles)
    sigma[3, :50] = sigma[3, 350:] = sigma[4] = sigma[5, 2:] = 0
    y[3, :50] = y[3, 350:] = 1e6
    result = smooth_baselines(y, sigma)
    cut = smooth_baselines(y[3:4, 50:350], sigma[3:4, 50:350])
    np.testing.assert_array_equal(result[3, 50:350], cut[0])
    assert (result[3, :50] == 0).all()
    assert (result[4:6] == 0).all()
    np.testing.assert_array_equal(result[6:], smooth_baselines(*profiles)[6:])


def test_the_exponential_is_that_of_numpy() -> None:
    x = np.linspace(-50, 50, 1001)
    np.testing.assert_allclose([exponential(value) for value in x], np.exp(x), rtol=1e-10)
