"""Factors on the intensities of lines."""

import numpy as np

from bragg_data.refinement.line_factors import laue_extinction


def test_extinction_has_no_step_and_exact_derivatives() -> None:
    """It is next to Sabine's two series where each is exact, and between them where they end."""
    x = np.array([0.01, 30.0])
    small = 1 - x[0] / 2 + x[0] ** 2 / 4 - 5 * x[0] ** 3 / 48
    large = np.sqrt(2 / (np.pi * x[1])) * (1 - 1 / (8 * x[1]) - 3 / (128 * x[1] ** 2))
    np.testing.assert_allclose(laue_extinction(x), [small, large], rtol=1e-6)
    near = np.linspace(0.9, 1.1, 2001)
    values = laue_extinction(near)
    assert abs(values[1000] - 0.67367) < 1e-5  # (I0(1) + I1(1)) / e
    assert 0 < -np.diff(values).min() < 1e-4
    slopes = laue_extinction(near + 1e-20j).imag / 1e-20
    np.testing.assert_allclose(slopes, np.gradient(values, near, edge_order=2), rtol=1e-5)
