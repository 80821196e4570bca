"""Patterns of samples that each have widths of their own, by a basis of peak shapes.

On a logarithmic grid the profile of a reflection at u depends on x − u, and only slowly on u and on
the sample's widths. In each zone of the window a few shapes φ_k therefore reproduce all profiles,

    P(x; u) = Σ_k c_k(u) φ_k(x − u),

with coefficients c that are smooth in u. Reflections are deposited once; the deposit, as impulses
on the source grid, is multiplied by the coefficients, and each φ_k is a convolution: near the peak
on the source grid, further out on two coarser grids. Each finer level corrects what interpolation
from the coarser ones gets wrong (a multilevel sum: A. Brandt & A. A. Lubrecht, J. Comput. Phys. 90
(1990) 348). Blocks of points share their matrices, so that nearly all of it is products of small
matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bragg_data.arrays import Array, Floats32
from bragg_data.kernels import kernel
from bragg_data.simulation.peak_operator import lagrange_polynomials, outside, spline_coefficients

BLOCK = 64  # points that are handled together
MARGIN = 64  # points before the window, as the stencil of the coarsest grid reaches
COARSE = (4, 32)  # spacings of the coarser grids, in points
ZONE = 8  # blocks
STATIONS = 7  # Chebyshev nodes of a zone, between which coefficients are polynomials
_TAPS = 6  # of interpolation from a coarser grid: the nodes cell − 2 … cell + 3
_RING = 20  # nodes after which the inverse of the spline's filter is below single precision

Profiles = Callable[[Array, Array], tuple[Array, Array]]
"""From positions (n,) and offsets (m,) in points to profiles in 1/µs: those that the basis has to
reproduce, (…, n, m), and the members of which all are combinations, (members, n, m)."""


@dataclass(frozen=True)
class ShapeBasis:
    """The matrices of all zones; see the module.

    Source node j stands at (j / oversampling − MARGIN) points; windows are padded to whole blocks.
    """

    oversampling: int
    points: int
    members: Floats32  # (members, zones, stations, K) their coefficients
    to_nodes: Floats32  # (stations, nodes of a zone) polynomials
    near: Floats32  # (zones, K · BLOCK · oversampling, BLOCK + 2 · reach)
    middle: Floats32  # (zones, K · BLOCK / 4, BLOCK / 4 + 2 · reach): all in their level's nodes
    far: Floats32  # (zones, K, 2 · n): by offset, n far nodes
    down: tuple[Floats32, Floats32]  # restriction of a block to the next coarser grid
    up: tuple[Floats32, Floats32]  # interpolation of a block from it

    @property
    def n_source(self) -> int:
        """Nodes of the source grid."""
        return n_blocks_of(self.points) * BLOCK * self.oversampling

    def convolve(self, deposits: Floats32, coefficients: Floats32) -> Floats32:
        """Return the patterns (n, points) of deposits, (n, n_source) coefficients of B-splines.

        ``coefficients`` (n, zones, stations, K) are those of each sample's profiles.
        """
        n, rank, blocks = len(deposits), coefficients.shape[-1], n_blocks_of(self.points)
        # Blocks first: those of a zone are the rows of a product, in one piece of memory.
        levels = [_impulses(deposits, self.oversampling)]
        for matrix in self.down:
            levels.append(_overlapped(levels[-1] @ matrix, _TAPS - 1, 2))
        matrices = self.near, self.middle
        results = [np.empty((blocks, n, m.shape[2]), np.float32) for m in matrices]
        far = np.zeros((n, blocks * levels[2].shape[2]), np.float32)
        strides = [1, *(spacing * self.oversampling for spacing in COARSE)]
        shape = min(ZONE, blocks), n, rank
        slabs = [np.empty((*shape, level.shape[2]), np.float32) for level in levels]
        n_far = self.far.shape[2] // 2
        for zone, low in enumerate(range(0, blocks, ZONE)):
            high = min(low + ZONE, blocks)
            first = (low - _zone_starts(blocks)[zone]) * BLOCK * self.oversampling
            last = first + (high - low) * BLOCK * self.oversampling
            shares = coefficients[:, zone].transpose(0, 2, 1) @ self.to_nodes[:, first:last]
            products = []
            for stride, level, room in zip(strides, levels, slabs, strict=True):
                slab = room[: high - low]
                _modulate(level[low:high], shares, stride, slab)
                products.append(slab.reshape(-1, rank * slab.shape[3]))
            for product, matrix, result in zip(products[:2], matrices, results, strict=True):
                np.matmul(product, matrix[zone], out=result[low:high].reshape(len(product), -1))
            for block, product in enumerate(products[2].reshape(high - low, n, -1), start=low):
                start = n_far - block * levels[2].shape[2]
                for node, of_node in enumerate(product.reshape(n, rank, -1).transpose(2, 0, 1)):
                    far += of_node @ self.far[zone][:, start - node : start - node + far.shape[1]]
        near, middle = (
            _overlapped(result, result.shape[2] - size, (result.shape[2] - size) // 2)
            for result, size in zip(results, (BLOCK, BLOCK // COARSE[0]), strict=True)
        )
        middle += _interpolated(far.reshape(n, blocks, -1).transpose(1, 0, 2), self.up[1])
        near += _interpolated(middle, self.up[0])
        patterns = near.transpose(1, 0, 2).reshape(n, -1)
        return patterns[:, MARGIN : MARGIN + self.points]


@kernel(fastmath=True)
def _modulate(level, shares, stride, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """Fill ``out`` (blocks, n, K, size): a level (blocks, n, size) times shares (n, K, nodes)."""
    blocks, n, rank, size = out.shape
    for block in range(blocks):
        for i in range(n):
            values = level[block, i]
            for k in range(rank):
                share = shares[i, k, block * size * stride : (block + 1) * size * stride]
                row = out[block, i, k]
                if stride == 1:
                    for j in range(size):
                        row[j] = values[j] * share[j]
                else:
                    for j in range(size):
                        row[j] = values[j] * share[j * stride]


def build_basis(
    profiles: Profiles, points: int, oversampling: int, bands: tuple[int, int], tolerance: float
) -> ShapeBasis:
    """Build the basis of the profiles all over a window.

    ``bands`` are distances in points beyond which profiles are smooth enough for each coarser grid;
    the ``tolerance`` is relative to the maximum of each profile.
    """
    s1, s2 = COARSE
    n_blocks = n_blocks_of(points)
    reach, n_far = -(-bands[1] // s1), n_blocks * BLOCK // s2
    fine = np.arange(-(bands[0] + BLOCK) * oversampling, (bands[0] + BLOCK) * oversampling + 1)
    on_1 = np.arange(-reach - BLOCK // s1, reach + BLOCK // s1 + 1)
    on_2 = np.arange(-n_far, n_far)
    offsets = np.concatenate([fine / oversampling, on_1 * s1, on_2 * s2]).astype(np.float64)
    bounds = [len(fine), len(fine) + len(on_1)]
    of_zones = []
    for position in stations(n_blocks):
        needed, members = profiles(position, offsets)
        needed = needed.reshape(-1, len(offsets))
        needed = needed / needed.max(axis=1, keepdims=True)
        of_zones.append((members, needed, np.linalg.svd(needed, full_matrices=False)[2]))
    rank = max(_rank(needed, shapes, tolerance) for _, needed, shapes in of_zones)
    coefficients = np.stack([m @ shapes[:rank].T for m, _, shapes in of_zones], axis=1)
    near, middle, far = [], [], []
    for _, _, shapes in of_zones:
        exact, on_middle, on_far = np.split(shapes[:rank], bounds, axis=1)
        on_far = on_far * outside(np.abs(on_2 * s2) / bands[1], 0.75)
        beyond = on_middle * outside(np.abs(on_1 * s1) / bands[0], 0.75)
        near.append(_level(exact, beyond, (s1 * oversampling, s1), BLOCK, bands[0]))
        middle.append(_level(beyond, on_far, (s2 // s1, s2 // s1), BLOCK // s1, reach))
        far.append(on_far)
    nodes = np.arange(ZONE * BLOCK * oversampling) / oversampling
    return ShapeBasis(
        oversampling=oversampling,
        points=points,
        members=coefficients.astype(np.float32),
        to_nodes=lagrange_polynomials(nodes, stations(1)[0] + MARGIN).T.astype(np.float32),
        near=np.stack(near).astype(np.float32),
        middle=np.stack(middle).astype(np.float32),
        far=np.stack(far).astype(np.float32),
        down=(_between(BLOCK * oversampling, s1 * oversampling), _between(BLOCK // s1, s2 // s1)),
        up=(_between(BLOCK, s1).T, _between(BLOCK // s1, s2 // s1).T),
    )


def n_blocks_of(points: int) -> int:
    """Return the blocks of a padded window."""
    return -(-(points + 3 * MARGIN) // BLOCK)


def stations(n_blocks: int) -> Array:
    """Return the positions (zones, stations), in points, at which coefficients are computed."""
    angle = (2 * np.arange(STATIONS) + 1) * np.pi / (2 * STATIONS)
    within = 0.5 * ZONE * BLOCK * (1 - np.cos(angle))
    return _zone_starts(n_blocks)[:, None] * BLOCK + within - MARGIN


def _zone_starts(n_blocks: int) -> NDArray[np.intp]:
    """Return the blocks at which the stations of zones begin: the last ones end with the window."""
    return np.minimum(np.arange(0, n_blocks, ZONE), max(n_blocks - ZONE, 0))


def _rank(profiles: Array, shapes: Array, tolerance: float) -> int:
    """Return how many of the shapes reproduce all profiles, of height 1, to the tolerance."""
    residual = profiles.copy()
    for rank, shape in enumerate(shapes):
        if np.abs(residual).max() < tolerance:
            return rank
        residual -= np.outer(profiles @ shape, shape)
    return len(shapes)


def _level(exact: Array, coarse: Array, ratios: tuple[int, int], block: int, reach: int) -> Array:
    """Return the matrix (K · nodes, block + 2 · reach) of a level: what the coarser one lacks.

    ``exact`` (K, m) are values by offset in nodes, ``coarse`` those of the coarser level in its
    nodes, both around 0. A coarse cell holds ``ratios`` of nodes and of targets.
    """
    per_node, per_target = ratios
    step = per_node // per_target
    node = np.arange(block * step)[:, None]
    target = np.arange(-reach, block + reach)[None, :]
    matrix = exact[:, exact.shape[1] // 2 + target * step - node]
    of_nodes, of_targets = _lagrange(per_node), _lagrange(per_target)
    apart = target // per_target - node // per_node + coarse.shape[1] // 2
    padded = np.pad(coarse, ((0, 0), (_TAPS, _TAPS)))
    for a in range(_TAPS):
        for b in range(_TAPS):
            weight = of_nodes[node % per_node, a] * of_targets[target % per_target, b]
            index = np.clip(apart + b - a + _TAPS, 0, padded.shape[1] - 1)
            matrix -= weight * padded[:, index]
    return np.asarray(matrix.reshape(-1, matrix.shape[2]))


def _between(nodes: int, ratio: int) -> Floats32:
    """Return the weights (nodes, nodes / ratio + 5) of a block's nodes on the coarser grid."""
    weights = np.zeros((nodes, nodes // ratio + _TAPS - 1))
    node, of_cell = np.arange(nodes), _lagrange(ratio)
    for tap in range(_TAPS):
        weights[node, node // ratio + tap] = of_cell[node % ratio, tap]
    return weights.astype(np.float32)


def _lagrange(ratio: int) -> Array:
    """Return the weights (ratio, 6) of coarse nodes, cell − 2 … cell + 3, for nodes of a cell."""
    return lagrange_polynomials(2 + np.arange(ratio) / ratio, np.arange(_TAPS))


def _overlapped(parts: Floats32, beyond: int, before: int) -> Floats32:
    """Return the sum (blocks, n, size) of parts (blocks, n, size + beyond), ``before`` early."""
    count, n, wide = parts.shape
    size = wide - beyond
    total = np.zeros((count, n, size), np.float32)
    first = -(-before // size)
    for shift in range(-first, -(-(wide - before) // size)):
        low, high = max(shift * size + before, 0), min((shift + 1) * size + before, wide)
        at = low - shift * size - before
        source = slice(max(-shift, 0), count - max(shift, 0))
        target = slice(max(shift, 0), count - max(-shift, 0))
        total[target, :, at : at + high - low] += parts[source, :, low:high]
    return total


def _interpolated(coarse: Floats32, matrix: Floats32) -> Floats32:
    """Return values (blocks, n, …) on the finer grid, of coarse ones (blocks, n, size)."""
    blocks, n, size = coarse.shape
    flat = np.zeros((n, (blocks + 6) * size), np.float32)
    flat[:, 3 * size : -3 * size] = coarse.transpose(1, 0, 2).reshape(n, -1)
    view = np.lib.stride_tricks.sliding_window_view(flat, size + _TAPS - 1, axis=1)
    windows = view[:, 3 * size - 2 :: size][:, :blocks].transpose(1, 0, 2)
    return np.asarray(np.ascontiguousarray(windows) @ matrix)


# From spline coefficients (BLOCK + 2 · _RING) to the impulses of a block: the inverse of the
# quintic B-spline's filter is symmetric.
_INVERSE = spline_coefficients(np.eye(BLOCK + 2 * _RING))[:, _RING:-_RING].astype(np.float32)


def _impulses(deposits: Floats32, oversampling: int) -> Floats32:
    """Return impulses (blocks, n, nodes) that draw what the splines of deposits draw."""
    padded = np.pad(deposits, ((0, 0), (_RING, _RING)))
    size = BLOCK + 2 * _RING
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=1)[:, ::BLOCK]
    pieces = np.ascontiguousarray(windows.transpose(1, 0, 2)) @ _INVERSE
    parts = pieces.reshape(-1, oversampling, len(deposits), BLOCK).transpose(0, 2, 1, 3)
    return parts.reshape(len(parts), len(deposits), -1)
