"""The exponential integral of complex arguments, times the exponential, for arrays of profiles."""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import exp1

from bragg_data.arrays import Array
from bragg_data.kernels import kernel

_ASYMPTOTIC = 40.0  # |z| from which ten terms of the asymptotic series are good to 10!/40¹⁰ = 3e-10
_STEP = 0.1  # of ln z between the points of expansion: a term of a series adds 0.07 as much
_TERMS = 13  # 0.07¹³ = 1e-15


def scaled_exp1(z: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Return e^z E1(z) for z of any shape, without overflow, to 3e-10 of its modulus.

    Far out by the asymptotic series (Abramowitz & Stegun 5.1.51), which near the negative axis
    misses a Stokes term of the order e^(-|z|), at the switch below double precision. Nearer by
    Taylor series about the points of a grid of ln z, within |z| = 1 as scipy does it: elsewhere
    scipy's sum and continued fraction take five times as long.
    """
    flat = np.ascontiguousarray(z).ravel()
    result = np.empty(len(flat), dtype=complex)
    _fill(flat.real, flat.imag, *_expansions(), result)
    small = np.abs(flat) < 1
    result[small] = np.exp(flat[small]) * exp1(flat[small])
    return result.reshape(z.shape)


@cache
def _expansions() -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
    """Return points (distances, angles) in the upper half-plane, and the coefficients there.

    Those of f = e^z E1(z) follow from f' = f - 1/z. The angles end beyond the negative axis, over
    which the values continue those of above.
    """
    distances = np.exp(np.arange(0.5 * _STEP, np.log(_ASYMPTOTIC) + _STEP, _STEP))
    angles = np.arange(0.5 * _STEP, np.pi + 0.5 * _STEP, _STEP)
    points = distances[:, None] * np.exp(1j * angles)
    values = np.empty((*points.shape, _TERMS), dtype=complex)
    values[..., 0] = np.exp(points) * (exp1(points) - 2j * np.pi * (points.imag < 0))
    for n in range(_TERMS - 1):
        values[..., n + 1] = (values[..., n] - (-1) ** n / points ** (n + 1)) / (n + 1)
    return points, values


@kernel()
def _fill(
    real: Array,
    imag: Array,
    points: NDArray[np.complex128],
    coefficients: NDArray[np.complex128],
    result: NDArray[np.complex128],
) -> None:
    """Write the values for |z| ≥ 1; below the real axis they are minus those above."""
    for k in range(len(real)):
        x, y = real[k], abs(imag[k])
        square = x * x + y * y
        if square >= _ASYMPTOTIC**2:
            u, v = x / square, -y / square  # 1/z
            a, b = 1.0, 0.0
            for n in range(10, 0, -1):
                a, b = 1.0 - n * (u * a - v * b), -n * (u * b + v * a)
            real_part, value = u * a - v * b, u * b + v * a
        elif square >= 1.0:
            row = int(0.5 * np.log(square) / _STEP)
            column = min(int(np.arctan2(y, x) / _STEP), points.shape[1] - 1)
            u, v = x - points[row, column].real, y - points[row, column].imag
            last = coefficients[row, column, _TERMS - 1]
            a, b = last.real, last.imag
            for n in range(_TERMS - 2, -1, -1):
                c = coefficients[row, column, n]
                a, b = a * u - b * v + c.real, a * v + b * u + c.imag
            real_part, value = a, b
        else:
            real_part, value = 0.0, 0.0
        result[k] = complex(real_part, value if imag[k] >= 0 else -value)
