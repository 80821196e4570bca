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

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from bragg_data.arrays import AnyFloats, Array, Floats32
from bragg_data.kernels import kernel
from bragg_data.simulation.block_matrices import Members, blocks_of, products_of_sample
from bragg_data.simulation.peak_operator import lagrange_polynomials, outside, spline_coefficients

BLOCK = 64  # points that are handled together on the coarser grids
NEAR = 32  # and on the finest one: products with a band, of which a larger block has less
MARGIN = 64  # points before the window, as the stencil of the coarsest grid reaches
COARSE = (4, 32)  # spacings of the coarser grids, in points
ZONE = 6  # blocks, at most
STATIONS = 6  # Chebyshev nodes of a zone, between which coefficients are polynomials
_TAPS = 6  # of interpolation from a coarser grid: the nodes cell − 2 … cell + 3
RING = 20  # nodes after which the inverse of the spline's filter is below single precision

Profiles = Callable[[Array, Array], tuple[Array, Array]]
"""From positions (n,) and offsets (m,) in points to profiles in 1/µs: those that the basis has to
reproduce, (…, n, m), and the members of which all are combinations, (members, n, m)."""


@dataclass(frozen=True)
class ShapeBasis:
    """The matrices of all zones; see the module.

    Source node j stands at (j / oversampling − MARGIN) points; windows are padded to whole zones.
    """

    oversampling: int
    points: int
    ranks: tuple[int, ...]  # shapes that each zone needs, of K
    members: AnyFloats  # (members, zones, stations, K) their coefficients
    to_nodes: AnyFloats  # (stations, nodes of a zone) polynomials
    near: AnyFloats  # (zones, K · NEAR · oversampling, NEAR + 2 · reach)
    middle: AnyFloats  # (zones, K · BLOCK / 4, BLOCK / 4 + 2 · reach): all in their level's nodes
    far: AnyFloats  # (zones, K · nodes, n): from a zone's nodes to those of the window
    down: tuple[AnyFloats, AnyFloats]  # restriction of a block to the next coarser grid
    up: tuple[AnyFloats, AnyFloats]  # interpolation of a block from it

    @property
    def n_source(self) -> int:
        """Nodes of the source grid."""
        return int(len(self.near) * self.to_nodes.shape[1])

    def as_double(self) -> "ShapeBasis":
        """Return the same matrices in double precision, for checks of derivatives."""
        names = ("members", "to_nodes", "near", "middle", "far")
        double = {name: getattr(self, name).astype(np.float64) for name in names}
        down, up = ((a.astype(np.float64), b.astype(np.float64)) for a, b in (self.down, self.up))
        return replace(self, down=down, up=up, **double)

    def convolve(self, deposits: AnyFloats, coefficients: AnyFloats) -> AnyFloats:
        """Return the patterns (n, points) of deposits, (n, n_source) coefficients of B-splines.

        ``coefficients`` (n, zones, stations, K) are those of each sample's profiles.
        """
        return self._drawn(*self._products(self._levels(deposits), coefficients))

    def linearise(self, deposits: AnyFloats, coefficients: AnyFloats) -> AnyFloats:
        """Return the pattern of one sample, and its derivatives: (1 + n, points).

        The first rows of ``deposits`` and ``coefficients`` are the sample's, as for
        :meth:`convolve`; the others are their derivatives. Where rows of ``coefficients`` are
        zero, profiles do not depend on the parameter.
        """
        if len(deposits) == 1:
            return self.convolve(deposits, coefficients)
        changed = np.flatnonzero(coefficients.any(axis=(1, 2, 3)))[1:]
        of_sample, drawn = coefficients[[0, *changed]], []
        for level, stride, matrix, cell in zip(
            self._levels(deposits), self._strides, self._matrices, self._cells, strict=True
        ):
            members = Members(matrix, self.ranks, self.to_nodes[:, ::stride], *cell)
            drawn.append(products_of_sample(level, members, of_sample, changed))
        return self._drawn(*drawn)

    def _levels(self, deposits: AnyFloats) -> list[AnyFloats]:
        """Return deposits on all grids, (blocks, n, nodes) each; a block of the last is a zone."""
        # Blocks first: those of a zone are the rows of a product, in one piece of memory.
        near = _impulses(deposits, self.oversampling)
        on_middle = _overlapped(_times(near, self.down[0]), _TAPS - 1, 2)
        middle = _in_blocks(on_middle, BLOCK // COARSE[0])
        on_far = _overlapped(_times(middle, self.down[1]), _TAPS - 1, 2)
        return [near, middle, _in_blocks(on_far, on_far.shape[1] // len(self.near))]

    def _products(self, levels: Sequence[AnyFloats], coefficients: AnyFloats) -> list[AnyFloats]:
        """Return what the blocks of each grid draw, (blocks, n, nodes): parts that overlap."""
        n, zones, dtype = levels[0].shape[1], len(self.near), levels[0].dtype
        results = [
            np.empty((len(level), n, matrix.shape[2]), dtype)
            for level, matrix in zip(levels, self._matrices, strict=True)
        ]
        room = np.empty(n * coefficients.shape[-1] * self.to_nodes.shape[1], dtype)
        to_nodes = [np.ascontiguousarray(self.to_nodes[:, ::stride]) for stride in self._strides]
        for zone, rank in enumerate(self.ranks):
            of_zone = np.ascontiguousarray(coefficients[:, zone, :, :rank].transpose(0, 2, 1))
            for level, polynomials, matrix, result in zip(
                levels, to_nodes, self._matrices, results, strict=True
            ):
                here, size = blocks_of(level, zone, zones), level.shape[2]
                shares = of_zone @ polynomials
                slab = room[: len(here) * n * rank * size].reshape(len(here), n, rank, size)
                _modulate(here, shares, slab)
                rows = slab.reshape(len(here) * n, -1)
                out = blocks_of(result, zone, zones).reshape(len(rows), -1)
                np.matmul(rows, matrix[zone, : rows.shape[1]], out=out)
        return results

    @property
    def _matrices(self) -> tuple[AnyFloats, AnyFloats, AnyFloats]:
        return self.near, self.middle, self.far

    @property
    def _cells(self) -> tuple[tuple[int, int], ...]:
        """Nodes of a cell, after which matrices repeat, and by how many targets they are moved."""
        ratio = COARSE[1] // COARSE[0]
        of_zone = self.to_nodes.shape[1] // self._strides[2]
        return (COARSE[0] * self.oversampling, COARSE[0]), (ratio, ratio), (of_zone, 0)

    @property
    def _strides(self) -> tuple[int, ...]:
        return 1, *(spacing * self.oversampling for spacing in COARSE)

    def _drawn(self, near: AnyFloats, middle: AnyFloats, far: AnyFloats) -> AnyFloats:
        """Return the patterns (n, points) of what blocks draw on all grids."""
        total = far.sum(axis=0)
        for parts, size, matrix in (
            (middle, BLOCK // COARSE[0], self.up[1]),
            (near, NEAR, self.up[0]),
        ):
            beyond = parts.shape[2] - size
            coarser, total = total, _overlapped(parts, beyond, beyond // 2)
            total += _interpolated(coarser, matrix)
        return np.asarray(total[:, MARGIN : MARGIN + self.points])


@kernel(finite=True)
def _modulate(level, shares, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """Fill ``out`` (blocks, n, K, size): a level (blocks, n, size) times shares (n, K, nodes).

    One sample's ``shares`` (1, K, nodes) serve all rows.
    """
    blocks, n, rank, size = out.shape
    for block in range(blocks):
        for i in range(n):
            values = level[block, i]
            for k in range(rank):
                share = shares[i if len(shares) > 1 else 0, k, block * size :]
                row = out[block, i, k]
                for j in range(size):
                    row[j] = values[j] * share[j]


def build_basis(
    profiles: Profiles, points: int, oversampling: int, bands: tuple[int, int], tolerance: float
) -> ShapeBasis:
    """Build the basis of the profiles all over a window.

    ``bands`` are distances in points beyond which profiles are smooth enough for each coarser grid;
    the ``tolerance`` is relative to the maximum of each profile.
    """
    (s1, s2), (zones, of_zone) = COARSE, zones_of(points)
    reach, n_far = -(-bands[1] // s1), zones * of_zone * BLOCK // s2
    fine = np.arange(-(bands[0] + NEAR) * oversampling, (bands[0] + NEAR) * oversampling + 1)
    on_1 = np.arange(-reach - BLOCK // s1, reach + BLOCK // s1 + 1)
    on_2 = np.arange(-n_far, n_far)
    offsets = np.concatenate([fine / oversampling, on_1 * s1, on_2 * s2]).astype(np.float64)
    bounds = [len(fine), len(fine) + len(on_1)]

    def of_zone_at(position: Array) -> tuple[Array, Array]:
        needed, members = profiles(position, offsets)
        shapes = _shapes(needed.reshape(-1, len(offsets)), tolerance)
        return shapes, members @ shapes.T

    def levels_of(shapes: Array) -> tuple[Floats32, Floats32, Array]:
        exact, on_middle, on_far = np.split(shapes, bounds, axis=1)
        on_far = on_far * outside(np.abs(on_2 * s2) / bands[1], 0.75)
        beyond = on_middle * outside(np.abs(on_1 * s1) / bands[0], 0.75)
        near = _level(exact, beyond, (s1 * oversampling, s1), NEAR, bands[0])
        middle = _level(beyond, on_far, (s2 // s1, s2 // s1), BLOCK // s1, reach)
        return near, middle, on_far

    # Nearly all of it is done without the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        of_zones = list(pool.map(of_zone_at, stations(points)))
        ranks = tuple(len(shapes) for shapes, _ in of_zones)
        rank = max(ranks)
        levels = pool.map(levels_of, (_widened(shapes.T, rank).T for shapes, _ in of_zones))
        near, middle, far = zip(*levels, strict=True)
    coefficients = np.stack([_widened(shares, rank) for _, shares in of_zones], axis=1)
    nodes = np.arange(of_zone * BLOCK * oversampling) / oversampling - MARGIN
    return ShapeBasis(
        oversampling=oversampling,
        points=points,
        ranks=ranks,
        members=coefficients.astype(np.float32),
        to_nodes=lagrange_polynomials(nodes, stations(points)[0]).T.astype(np.float32),
        near=np.stack(near),
        middle=np.stack(middle),
        far=_of_nodes(np.stack(far), of_zone * BLOCK // s2),
        down=(_between(NEAR * oversampling, s1 * oversampling), _between(BLOCK // s1, s2 // s1)),
        up=(_between(BLOCK, s1).T, _between(BLOCK // s1, s2 // s1).T),
    )


def zones_of(points: int) -> tuple[int, int]:
    """Return the zones of a padded window, and the blocks of each."""
    blocks = -(-(points + 3 * MARGIN) // BLOCK)
    zones = -(-blocks // ZONE)
    return zones, -(-blocks // zones)


def stations(points: int) -> Array:
    """Return the positions (zones, stations), in points, at which coefficients are computed."""
    zones, of_zone = zones_of(points)
    angle = (2 * np.arange(STATIONS) + 1) * np.pi / (2 * STATIONS)
    within = 0.5 * of_zone * BLOCK * (1 - np.cos(angle))
    return np.arange(zones)[:, None] * of_zone * BLOCK + within - MARGIN


def _shapes(profiles: Array, tolerance: float) -> Array:
    """Return the first singular vectors (K, m), which reproduce profiles (n, m) to a tolerance.

    From products of profiles of height 1, whose rounding is far below such a tolerance.
    """
    profiles = profiles / profiles.max(axis=1, keepdims=True)
    squares, mixtures = np.linalg.eigh(profiles @ profiles.T)
    squares, mixtures = squares[::-1], mixtures[:, ::-1]
    # Nothing that is left is larger than the first singular value which is left out.
    rank = max(int(np.count_nonzero(squares > tolerance**2)), 1)
    shapes = (mixtures[:, :rank].T @ profiles) / np.sqrt(squares[:rank, None])
    shares = profiles @ shapes.T
    residual = profiles - shares @ shapes
    while rank > 1:
        residual += np.outer(shares[:, rank - 1], shapes[rank - 1])
        if np.abs(residual).max() >= tolerance:
            break
        rank -= 1
    return np.asarray(shapes[:rank])


def _widened(values: Array, size: int) -> Array:
    """Return values (…, K) with zeros up to a size of the last axis."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])])


def _level(
    exact: Array, coarse: Array, ratios: tuple[int, int], block: int, reach: int
) -> Floats32:
    """Return the matrix (K · nodes, block + 2 · reach) of a level: what the coarser one lacks.

    ``exact`` (K, m) are values by offset in nodes, ``coarse`` those of the coarser level in its
    nodes, both around 0. A coarse cell holds ``ratios`` of nodes and of targets.
    """
    per_node, per_target = ratios
    step = per_node // per_target
    node = np.arange(block * step)[:, None]
    target = np.arange(-reach, block + reach)[None, :]
    matrix = exact[:, exact.shape[1] // 2 + target * step - node]
    # What the coarser level draws: from each node to the coarse grid, and from there to targets.
    of_nodes, of_targets = _lagrange(per_node), _lagrange(per_target)
    first, last = -reach // per_target, (block + reach - 1) // per_target + _TAPS - 1
    on_coarse = np.arange(first, last + 1)
    middle = coarse.shape[1] // 2 + _TAPS
    padded = np.pad(coarse, ((0, 0), (_TAPS, _TAPS)))
    drawn = np.zeros((len(coarse), len(node), len(on_coarse)))
    for a in range(_TAPS):
        index = np.clip(on_coarse - node // per_node - a + middle, 0, padded.shape[1] - 1)
        drawn += of_nodes[node % per_node, a] * padded[:, index]
    to_targets = np.zeros((len(on_coarse), target.shape[1]))
    for b in range(_TAPS):
        cell = target[0] // per_target - first + b
        to_targets[cell, np.arange(target.shape[1])] = of_targets[target[0] % per_target, b]
    matrix -= drawn @ to_targets
    # Where a peak is smooth enough for the coarser grid, nothing is left but its rounding.
    matrix[:, np.abs(target * step - node) > reach * step] = 0.0
    return matrix.reshape(-1, matrix.shape[2]).astype(np.float32)


def _of_nodes(shapes: Array, of_zone: int) -> Floats32:
    """Return the matrices (zones, K · nodes, n) of shapes (zones, K, 2 · n) by offset."""
    zones, rank, wide = shapes.shape
    n = wide // 2
    node = np.arange(n).reshape(zones, 1, of_zone, 1)
    zone, k = np.ogrid[:zones, :rank]
    values = shapes[zone[..., None, None], k[..., None, None], n + np.arange(n) - node]
    return np.asarray(values.reshape(zones, rank * of_zone, n), dtype=np.float32)


def _between(nodes: int, ratio: int) -> AnyFloats:
    """Return the weights (nodes, nodes / ratio + 5) of a block's nodes on the coarser grid."""
    weights = np.zeros((nodes, nodes // ratio + _TAPS - 1))
    node, of_cell = np.arange(nodes), _lagrange(ratio)
    for tap in range(_TAPS):
        weights[node, node // ratio + tap] = of_cell[node % ratio, tap]
    return weights.astype(np.float32)


def _lagrange(ratio: int) -> Array:
    """Return the weights (ratio, 6) of coarse nodes, cell − 2 … cell + 3, for nodes of a cell."""
    return lagrange_polynomials(2 + np.arange(ratio) / ratio, np.arange(_TAPS))


def _times(parts: AnyFloats, matrix: AnyFloats) -> AnyFloats:
    """Return the product of parts (blocks, n, k) with a matrix, as one product."""
    blocks, n, size = parts.shape
    return np.asarray((parts.reshape(-1, size) @ matrix).reshape(blocks, n, -1))


def _in_blocks(values: AnyFloats, size: int) -> AnyFloats:
    """Return values (n, nodes) as blocks, (blocks, n, size)."""
    return np.ascontiguousarray(values.reshape(len(values), -1, size).transpose(1, 0, 2))


def _overlapped(parts: AnyFloats, beyond: int, before: int) -> AnyFloats:
    """Return the sum (n, nodes) of parts (blocks, n, size + beyond), each ``before`` early."""
    blocks, n, wide = parts.shape
    total = np.zeros((n, blocks * (wide - beyond)), parts.dtype)
    _add_parts(parts, before, total)
    return total


@kernel(finite=True)
def _add_parts(parts, before, total):  # type: ignore[no-untyped-def] # pragma: no cover
    blocks, n, wide = parts.shape
    size = total.shape[1] // blocks
    for i in range(n):
        for block in range(blocks):
            start = block * size - before
            first, last = max(-start, 0), min(wide, total.shape[1] - start)
            row, part = total[i, start + first : start + last], parts[block, i, first:last]
            for x in range(last - first):
                row[x] += part[x]


def _padded(values: AnyFloats, before: int, after: int) -> AnyFloats:
    """Return values (n, nodes) between zeros; np.pad takes ten times as long."""
    zeros = (np.zeros((len(values), n), values.dtype) for n in (before, after))
    return np.hstack([next(zeros), values, next(zeros)])


def _interpolated(coarse: AnyFloats, matrix: AnyFloats) -> AnyFloats:
    """Return values (n, nodes) on the finer grid, of coarse ones, by the matrix of a block."""
    padded, size = _padded(coarse, 2, _TAPS - 3), len(matrix) - _TAPS + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(matrix), axis=1)[:, ::size]
    fine = windows.reshape(-1, len(matrix)) @ matrix
    return np.asarray(fine.reshape(len(coarse), -1))


# From spline coefficients (NEAR + 2 · RING) to the impulses of a block: the inverse of the
# quintic B-spline's filter is symmetric.
IMPULSES = spline_coefficients(np.eye(NEAR + 2 * RING))[:, RING:-RING]


def _impulses(deposits: AnyFloats, oversampling: int) -> AnyFloats:
    """Return impulses (blocks, n, nodes) that draw what the splines of deposits draw."""
    padded = _padded(deposits, RING, RING)
    size = NEAR + 2 * RING
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=1)[:, ::NEAR]
    pieces = np.ascontiguousarray(windows.transpose(1, 0, 2)) @ IMPULSES.astype(deposits.dtype)
    parts = pieces.reshape(-1, oversampling, len(deposits), NEAR).transpose(0, 2, 1, 3)
    return parts.reshape(len(parts), len(deposits), -1)
