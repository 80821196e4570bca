"""The peak shape as a linear operator: amplitudes on a source grid become a pattern.

With one instrument and one broadening the profile of a reflection depends on its position alone.
Between neighbouring positions it changes smoothly, so it is a quintic spline in the position, and
the pattern is a fixed matrix applied to the spline coefficients that the reflections deposit. Near
a peak the matrix is stored in tiles; its far tails are smooth, and go through a coarse grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.linalg import solve_banded

from bragg_data.arrays import Array, Indices
from bragg_data.kernels import kernel

Kernel = Callable[[Array, slice], Array]
"""From grid positions (in steps of the pattern's grid, shape (m,)) and a range of the pattern's
points to the profile of a peak at each position, shape (m, number of points), in 1/µs."""

PAD = 24  # source nodes beyond either end of the window: the spline's ringing has died out there
_TILE = 128  # points of the pattern per tile
_TAPS = 6
QUINTIC = BSpline.basis_element(np.arange(7.0))  # the quintic B-spline on [0, 6]


@dataclass(frozen=True)
class PeakOperator:
    """A matrix (n_source, points), stored as near tiles and a far field."""

    # First source node, first point, and matrix of shape (nodes, points of the tile).
    tiles: tuple[tuple[int, int, NDArray[np.float32]], ...]
    # Shapes (n_source,), (n_source, 6): Lagrange weights that carry a source node to the coarse
    # grid.
    coarse_first: NDArray[np.int32]
    coarse_weights: NDArray[np.float32]
    far: NDArray[np.float32]  # (n_coarse, points) tails of peaks on the coarse grid

    def add(self, deposits: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Add the pattern of deposits, shape (n, n_source), to ``out``, shape (n, points)."""
        coarse = np.zeros((len(deposits), len(self.far)), dtype=np.float32)
        _coarsen(deposits, self.coarse_first, self.coarse_weights, coarse)
        out += coarse @ self.far
        for node, point, matrix in self.tiles:
            nodes, points = matrix.shape
            out[:, point : point + points] += deposits[:, node : node + nodes] @ matrix


@kernel(finite=True)
def _coarsen(deposits, first, weights, coarse):  # type: ignore[no-untyped-def] # pragma: no cover
    for i in range(len(deposits)):
        for j in range(deposits.shape[1]):
            amplitude = deposits[i, j]
            if amplitude != 0.0:
                c = first[j]
                for k in range(_TAPS):
                    coarse[i, c + k] += amplitude * weights[j, k]


def build_operator(kernel: Kernel, points: int, oversampling: int, band: int) -> PeakOperator:
    """Build the operator of a peak shape, with ``oversampling`` source nodes per step of the grid.

    ``band`` is the distance, in steps of the pattern's grid, beyond which a peak is smooth enough
    for the coarse grid of a sixth of this spacing.
    """
    n_source = (points - 1) * oversampling + 1 + 2 * PAD
    position = (np.arange(n_source) - PAD) / oversampling
    spacing = max(band // 6, 1)
    # Six coarse nodes around every source node, those in the padding included.
    beyond = math.ceil(PAD / oversampling) + 4 * spacing
    coarse = np.arange(-beyond, points + beyond, spacing)
    first, weights = _lagrange(position, coarse[0], spacing)
    far = np.empty((len(coarse), points), dtype=np.float32)
    for begin in range(0, len(coarse), 64):
        rows = slice(begin, begin + 64)
        distance = np.abs(coarse[rows, None] - np.arange(points))
        peaks = kernel(coarse[rows].astype(np.float64), slice(0, points))
        far[rows] = outside(distance / band, 1.0) * peaks
    tiles = []
    margin = band + math.ceil(PAD / oversampling)
    for point in range(0, points, _TILE):
        targets = slice(point, min(point + _TILE, points))
        low = max((point - margin) * oversampling + PAD, 0)
        high = min((targets.stop - 1 + margin) * oversampling + PAD + 1, n_source)
        near = kernel(position[low:high], targets)
        for k in range(_TAPS):
            near -= weights[low:high, k, None] * far[first[low:high] + k, targets]
        tiles.append((low, point, spline_coefficients(near).astype(np.float32)))
    return PeakOperator(tuple(tiles), first, weights, far)


def outside(x: Array, end: float) -> Array:
    """Return the share of a peak that a coarser grid takes: 0 up to x = 1/4, 1 from the end on."""
    z = np.clip((x - 0.25) / (end - 0.25), 0.0, 1.0)
    return np.asarray(z**4 * (35 + z * (-84 + z * (70 - 20 * z))))


def _lagrange(
    position: Array, start: float, spacing: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    x = (position - start) / spacing
    first = np.floor(x).astype(np.int32) - 2
    return first, lagrange_polynomials(x - first, np.arange(_TAPS)).astype(np.float32)


def lagrange_polynomials(x: Array, nodes: Indices | Array) -> Array:
    """Return the Lagrange polynomials of some nodes at x (n,), shape (n, nodes)."""
    weights = np.ones((len(x), len(nodes)))
    for k in range(len(nodes)):
        for m in range(len(nodes)):
            if m != k:
                weights[:, k] *= (x - nodes[m]) / (nodes[k] - nodes[m])
    return weights


def spline_coefficients(values: Array) -> Array:
    """Return quintic B-spline coefficients of values at nodes (zero beyond), along axis 0."""
    centre, next_, second = (float(QUINTIC(3.0 + k)) for k in range(3))
    bands = np.tile(np.array([second, next_, centre, next_, second])[:, None], (1, len(values)))
    return np.asarray(solve_banded((2, 2), bands, values))
