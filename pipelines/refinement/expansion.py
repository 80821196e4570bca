"""Thermal expansion: a smooth curve through the cells of a series, and its mean coefficient.

A polynomial, weighted by the standard uncertainties, whose degree is chosen by Schwarz's criterion
(Annals of Statistics 6 (1978) 461).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from bragg_data.arrays import Array
from pipelines.refinement.frames import FrameResult

TEMPERATURES = ("temperature", "kelvin", "celsius", "t", "k", "temp")
"""Names of an axis along which coefficients of thermal expansion mean something."""

_FEWEST = 6  # points of a curve
_HIGHEST = 7  # degree


class Expansion(NamedTuple):
    """A length of a phase along a series."""

    phase: str
    length: str  # a, b or c
    x: Array  # (n,) where the curve is drawn
    curve: Array  # (n,) Å
    coefficient: float  # mean of d ln(length) / dx over the range, in 1/unit of x
    su: float


def expansions(frames: Sequence[FrameResult]) -> list[Expansion]:
    """Return the smooth curves of all lengths of all phases that have enough frames."""
    names = dict.fromkeys(p.name for f in frames if f.result for p in f.result.phases)
    curves = []
    for phase in names:
        of_phase = [
            (frame.value, p)
            for frame in frames
            if frame.result and frame.result.accepted
            for p in frame.result.phases
            if p.name == phase and p.cell and p.su
        ]
        free = dict.fromkeys(n for _, p in of_phase for n in p.free_parameters if n in "abc")
        for length in free:
            points = sorted(
                (x, p.cell.values()[length] or np.nan, p.su.values()[length] or 0.0)
                for x, p in of_phase
                if p.cell and p.su
            )
            x, y, su = np.array(points, dtype=np.float64).reshape(-1, 3).T
            if len(np.unique(x)) >= _FEWEST and (su > 0).all():
                curves.append(_expansion(phase, length, x, y, su))
    return curves


def _expansion(phase: str, length: str, x: Array, y: Array, su: Array) -> Expansion:
    middle, half = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
    best: tuple[float, Array, Array] | None = None
    for degree in range(1, min(_HIGHEST, len(np.unique(x)) - 3) + 1):
        columns = chebyshev.chebvander((x - middle) / half, degree)
        weighted = columns / su[:, None]
        coefficients = np.linalg.lstsq(weighted, y / su)[0]
        chi2 = float(np.square((y - columns @ coefficients) / su).sum())
        noise = max(chi2 / (len(x) - degree - 1), 1.0)
        criterion = chi2 + degree * np.log(len(x))
        if best is None or criterion < best[0]:
            covariance = np.linalg.inv(weighted.T @ weighted) * noise
            best = float(criterion), np.asarray(coefficients), np.asarray(covariance)
    assert best is not None
    _, coefficients, covariance = best
    ends = chebyshev.chebvander(np.array([-1.0, 1.0]), len(coefficients) - 1)
    first, last = ends @ coefficients
    slope = (ends[1] / last - ends[0] / first) / (2 * half)
    at = np.linspace(x[0], x[-1], 200)
    curve = chebyshev.chebval((at - middle) / half, coefficients)
    mean, error = float(np.log(last / first)) / (2 * half), float(slope @ covariance @ slope)
    return Expansion(phase, length, at, curve, mean, error**0.5)
