"""Library match: the stored patterns that look most like a profile.

:func:`library_match` compares a few profiles with everything that is stored; :class:`Library` is
for tens of thousands of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from numba import njit
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from bragg_data.preprocessing import sqrt_unit
from bragg_models.data.batches import in_order, profiles_of

COMPONENTS = 256
"""Principal components in which a :class:`Library` searches."""

CANDIDATES = 24
"""Patterns per query whose correlation a :class:`Library` computes in full, at first."""

_SUBSAMPLE = 6000  # patterns that the components are found from
_QUERIES, _TILE = 512, 8192  # a block of products: 16 MiB
_MORE = 8  # times as many candidates, where the first ones prove nothing
_SLACK = 2e-6  # rounding of the bounds, in single precision


class LibraryError(ValueError):
    """A query that cannot be compared with a library."""


@dataclass(frozen=True)
class Matches:
    """The best stored pattern of each phase for each of q queries.

    Attributes
    ----------
    row : shape (q, n_phases)
        Row in the data set; -1 for a phase without patterns.
    correlation : shape (q, n_phases)
        At most 1; -1 for a phase without patterns.
    cells : shape (q, n_phases, 6)
        Cells of those rows, in ångström and degrees; NaN where there is none.
    """

    row: NDArray[np.intp]
    correlation: NDArray[np.float64]
    cells: NDArray[np.float64]

    @property
    def phase(self) -> NDArray[np.intp]:
        """The phase of each query's best match of all, shape (q,)."""
        return np.asarray(self.correlation.argmax(axis=1))

    @property
    def best_cells(self) -> NDArray[np.float64]:
        """The cell of each query's best match of all, shape (q, 6)."""
        return self.cells[np.arange(len(self.cells)), self.phase]

    def starts(self, query: int) -> list[tuple[int, NDArray[np.float64]]]:
        """Return phase codes and cells (6,) of a query's matches, of the phases that have one."""
        found = zip(self.row[query], self.cells[query], strict=True)
        return [(code, cell) for code, (row, cell) in enumerate(found) if row >= 0]


def library_match(
    dataset: xr.Dataset,
    queries: NDArray[np.floating],
    covered: NDArray[np.bool_] | None = None,
    *,
    wanted: NDArray[np.bool_] | None = None,
    workers: int = 2,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Matches:
    r"""Find the stored patterns that correlate best with some profiles.

    With s the square roots of a stored pattern's intensities and q those of a query, over the
    points that the query covers,

    .. math:: r = \frac{\sum_i s_i q_i}{\sqrt{\sum_i s_i^2 \sum_i q_i^2}} .

    The square root lifts the weak peaks, of which there are many, and makes counting noise equal
    everywhere. The scale of either side does not matter; negative values count as zero. (Taking
    means off first makes nearly cubic cells harder to tell from cubic ones.) Each chunk of the data
    set is read once, whatever the number of queries, and a few chunks are in memory at a time.

    Parameters
    ----------
    dataset
        An opened snapshot: ``intensity``, ``phase`` and the six cell parameters.
    queries : shape (q, points)
        Profiles on the data set's grid without background, not yet square-rooted.
    covered : shape (q, points)
        Which points were measured; all if left out.
    wanted : shape (n,)
        Which rows of the data set to compare with; all if left out.
    workers
        Chunks read and multiplied at the same time.
    on_chunk
        Called with the numbers of chunks done and of all.

    Raises
    ------
    LibraryError
        If a query has another number of points, is not finite where covered, covers fewer than
        three points, or is nowhere positive.
    """
    profiles = profiles_of(dataset, lambda values: values)
    query = _Query.of(queries, covered, int(profiles.intensity.sizes["tof"]))
    phase = dataset["phase"].values
    n_phases = len(str(dataset["phase"].attrs.get("flag_meanings", "")).split())
    n_phases = max(n_phases, int(phase.max()) + 1)
    if wanted is None:
        wanted = np.ones(len(profiles), dtype=bool)
    chunks = profiles.chunks_with(wanted)

    def compare(chunk: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        intensity, rows = profiles.read(chunk, wanted)
        return rows, query.correlation(intensity)

    row = np.full((query.count, n_phases), -1, dtype=np.intp)
    correlation = np.full((query.count, n_phases), -1.0)
    # One thread of linear algebra per worker: more would only wait for each other.
    with threadpool_limits(limits=1, user_api="blas"):
        for done, (rows, found) in enumerate(_in_threads(compare, chunks, workers), start=1):
            for code in np.unique(phase[rows]):
                own = np.flatnonzero(phase[rows] == code)
                best = found[own].argmax(axis=0)
                value = found[own[best], np.arange(query.count)]
                better = value > correlation[:, code]
                correlation[better, code] = value[better]
                row[better, code] = rows[own[best[better]]]
            if on_chunk is not None:
                on_chunk(done, len(chunks))
    cells = np.stack(
        [dataset[name].values for name in ("a", "b", "c", "alpha", "beta", "gamma")], axis=1
    )
    found_cells = np.where((row >= 0)[..., None], cells[row], np.nan)
    return Matches(row, correlation, found_cells)


def prepared_queries(
    queries: NDArray[np.floating], covered: NDArray[np.bool_] | None, points: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return queries as square roots of unit length, zero where not covered, and what is covered.

    Both have shape (q, points).

    Raises
    ------
    LibraryError
        As :func:`library_match`.
    """
    if queries.ndim != 2 or queries.shape[1] != points:
        raise LibraryError(
            f"The queries have shape {queries.shape}; the library's patterns have {points} "
            f"points: bring the profiles to the library's grid first."
        )
    mask = np.ones(queries.shape, dtype=bool) if covered is None else covered
    if (mask.sum(axis=1) < 3).any():
        raise LibraryError("A profile covers fewer than three points of the library's grid.")
    values = np.where(mask, queries, 0.0)
    if not np.isfinite(values).all():
        raise LibraryError("A profile holds values that are not finite numbers.")
    rooted = np.sqrt(np.maximum(values, 0.0))
    length = np.linalg.norm(rooted, axis=1, keepdims=True)
    if not (length > 0).all():
        raise LibraryError("A profile is nowhere positive on the library's grid: no peak.")
    return np.asarray(rooted / length, dtype=np.float32), mask


@dataclass(frozen=True)
class _Query:
    """Queries, made ready so that one product with a chunk gives all sums that are needed.

    ``profiles`` (points, q) are square-rooted, zero where not covered, and of unit length;
    ``masks`` (points, m) are the different sets of covered points, ``mask_of`` (q,) tells which is
    whose.
    """

    profiles: NDArray[np.float32]
    masks: NDArray[np.float32]
    mask_of: NDArray[np.intp]

    @classmethod
    def of(
        cls, queries: NDArray[np.floating], covered: NDArray[np.bool_] | None, points: int
    ) -> _Query:
        roots, mask = prepared_queries(queries, covered, points)
        masks, mask_of = np.unique(mask, axis=0, return_inverse=True)
        return cls(
            np.ascontiguousarray(roots.T), np.ascontiguousarray(masks.T, dtype=np.float32), mask_of
        )

    @property
    def count(self) -> int:
        return int(self.profiles.shape[1])

    def correlation(self, intensity: NDArray[np.float32]) -> NDArray[np.float64]:
        """Correlation of n stored patterns with the queries, shape (n, q)."""
        positive = np.maximum(intensity, 0)
        # The square of a square root is the intensity itself.
        squares = np.maximum(positive @ self.masks, np.finfo(np.float32).tiny)
        return np.asarray((np.sqrt(positive) @ self.profiles) / np.sqrt(squares)[:, self.mask_of])


def _in_threads(
    compare: Callable[[int], tuple[NDArray[np.intp], NDArray[np.float64]]],
    chunks: NDArray[np.intp],
    workers: int,
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """Yield the result of every chunk in order, a few chunks in flight."""
    with ThreadPoolExecutor(workers) as pool:
        flying: deque[Future[tuple[NDArray[np.intp], NDArray[np.float64]]]] = deque()
        try:
            for chunk in chunks:
                flying.append(pool.submit(compare, int(chunk)))
                if len(flying) > workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()


class Neighbours(NamedTuple):
    """The k nearest stored patterns of each of q queries, the nearest first.

    Attributes
    ----------
    row : shape (q, k)
        Row in the data set.
    correlation : shape (q, k)
        At most 1.
    proven : shape (q,)
        Whether no pattern that was left out can be nearer than the last of the k.
    """

    row: NDArray[np.intp]
    correlation: NDArray[np.float64]
    proven: NDArray[np.bool_]


@dataclass(frozen=True)
class Library:
    r"""Stored patterns, made ready to be compared with very many profiles.

    The measure is that of :func:`library_match` where everything is covered: with patterns as unit
    vectors of square roots, r = s · q. All products of 40,000 queries with 170,000 patterns are
    40 Tflop. So vectors are split into their part z in the span of some principal components and
    the length ρ of the rest; by the inequality of Cauchy and Schwarz

    .. math:: r = s \cdot q \le z_s \cdot z_q + \rho_s \rho_q .

    The patterns with the largest bounds are candidates, and their r is computed in full, as
    1 - abs(s - q)² / 2, which tells near twins apart in single precision. Where the k-th r is not
    below the smallest bound among the candidates, the answer is proven to be the exact one; where
    it is, more candidates are looked at. Apart from a block of products, the compressed vectors
    alone (about 1 KiB for each pattern) are in memory; the full ones are in a file.

    Attributes
    ----------
    rows : shape (n,)
        Rows in the data set, in ascending order.
    basis : shape (points, components)
    compressed : shape (n, components + 1)
        z and ρ.
    full : shape (stored, points)
        Mapped from the file.
    place : shape (n,)
        Of each row in ``full``.
    """

    rows: NDArray[np.intp]
    basis: NDArray[np.float32]
    compressed: NDArray[np.float32]
    full: NDArray[np.float32]
    place: NDArray[np.intp]

    @classmethod
    def build(
        cls,
        dataset: xr.Dataset,
        wanted: NDArray[np.bool_],
        directory: Path,
        *,
        components: int = COMPONENTS,
        seed: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> Library:
        """Read the wanted patterns once and compress them.

        Parameters
        ----------
        dataset
            An opened snapshot.
        wanted : shape (n,)
            Which of its rows.
        directory
            Where the file with the full vectors goes, 4 bytes a point. It is to be deleted when
            the library is no longer used.
        components
            Fewer where there are fewer patterns or points.
        seed
            Of the patterns that the components are found from, and of the way they are found. More
            patterns would change which candidates are chosen a little, and nothing else.
        on_batch
            Called with the number of patterns of every chunk that is done.

        Raises
        ------
        LibraryError
            If nothing is wanted.
        """
        rows = np.flatnonzero(wanted)
        if not len(rows):
            raise LibraryError("A library needs at least one pattern. Choose a larger part.")
        profiles = profiles_of(dataset, sqrt_unit)
        points = int(profiles.intensity.sizes["tof"])
        file = directory / "library.npy"
        full = np.lib.format.open_memmap(file, "w+", np.float32, (len(rows), points))
        filled = 0
        for batch in in_order(profiles, wanted):
            full[filled : filled + len(batch.rows)] = batch.profiles
            filled += len(batch.rows)
            if on_batch is not None:
                on_batch(len(batch.rows))
        generator = np.random.default_rng(seed)
        some = generator.choice(len(rows), min(_SUBSAMPLE, len(rows)), replace=False)
        sample = full[np.sort(some)]
        _, _, directions = randomized_svd(
            sample, min(components, *sample.shape), n_iter=2, random_state=seed
        )
        basis = np.ascontiguousarray(directions.T, dtype=np.float32)
        compressed = np.empty((len(rows), basis.shape[1] + 1), dtype=np.float32)
        for low in range(0, len(rows), _TILE):
            compressed[low : low + _TILE] = _compressed(full[low : low + _TILE], basis)
        return cls(rows, basis, compressed, full, np.arange(len(rows)))

    def only(self, wanted: NDArray[np.bool_]) -> Library:
        """Return the part of the library with these rows of the data set, shape (n,)."""
        kept = np.flatnonzero(wanted[self.rows])
        if not len(kept):
            raise LibraryError("A library needs at least one pattern. Choose a larger part.")
        return replace(
            self, rows=self.rows[kept], compressed=self.compressed[kept], place=self.place[kept]
        )

    def nearest(
        self,
        profiles: NDArray[np.floating],
        k: int = 1,
        *,
        candidates: int = CANDIDATES,
        workers: int = 2,
    ) -> Neighbours:
        """Find the patterns that correlate best with some profiles.

        Parameters
        ----------
        profiles : shape (q, points)
            On the library's grid, without background, not yet square-rooted.
        k
            How many.
        candidates
            How many correlations are computed in full for each profile, at least k; eight times
            as many for those whose answer that does not prove.
        workers
            Threads.

        Raises
        ------
        LibraryError
            If the profiles have another length, or the library has fewer than k patterns.
        bragg_data.preprocessing.PreprocessingError
            If a profile has no positive value.
        """
        points = self.full.shape[1]
        if profiles.ndim != 2 or profiles.shape[1] != points:
            raise LibraryError(
                f"The queries have shape {profiles.shape}; the library's patterns have {points} "
                f"points: bring the profiles to the library's grid first."
            )
        if k > len(self.rows):
            raise LibraryError(
                f"The library has {len(self.rows)} patterns, fewer than the {k} asked for."
            )
        count = min(max(candidates, k), len(self.rows))
        queries = np.ascontiguousarray(sqrt_unit(profiles), dtype=np.float32)
        blocks = [queries[low : low + _QUERIES] for low in range(0, len(queries), _QUERIES)]
        # One thread of linear algebra per worker: more would only wait for each other.
        with (
            threadpool_limits(limits=1, user_api="blas"),
            ThreadPoolExecutor(workers) as pool,
        ):
            found = list(pool.map(lambda block: self._proven(block, k, count), blocks))
        return Neighbours(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _proven(self, queries: NDArray[np.float32], k: int, count: int) -> Neighbours:
        found = self._nearest(queries, k, count)
        doubtful = np.flatnonzero(~found.proven)
        if len(doubtful):
            again = self._nearest(queries[doubtful], k, min(_MORE * count, len(self.rows)))
            for all_, some in zip(found, again, strict=True):
                all_[doubtful] = some
        return found

    def _nearest(self, queries: NDArray[np.float32], k: int, count: int) -> Neighbours:
        bounds = np.full((len(queries), count), -np.inf, dtype=np.float32)
        chosen = np.zeros((len(queries), count), dtype=np.int64)
        compressed = _compressed(queries, self.basis)
        for low in range(0, len(self.rows), _TILE):
            _keep_largest(compressed @ self.compressed[low : low + _TILE].T, low, bounds, chosen)
        squared = _squared_distances(queries, self.full, self.place[chosen])
        order = np.argsort(squared, axis=1, kind="stable")[:, :k]
        best = 1.0 - np.take_along_axis(squared, order, axis=1).astype(np.float64) / 2
        proven = best[:, -1] >= bounds.min(axis=1) + _SLACK
        if count == len(self.rows):
            proven[:] = True
        return Neighbours(self.rows[np.take_along_axis(chosen, order, axis=1)], best, proven)


def mean_of_nearest(
    neighbours: Neighbours, phase: NDArray[np.integer], cells: NDArray[np.float64], k: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the nearest pattern's phase, and the mean cell of the k nearest of that phase.

    Parameters
    ----------
    neighbours
        Of q queries, as many of each as are known; fewer than k may be of the nearest's phase.
    phase, cells : shapes (n,), (n, 6)
        Labels of the data set.
    k
        1 for the nearest pattern's own cell.

    Returns
    -------
    shapes (q,), (q, 6)
    """
    of_neighbour = phase[neighbours.row]
    alike = of_neighbour == of_neighbour[:, :1]
    alike &= alike.cumsum(axis=1) <= k
    total = (cells[neighbours.row] * alike[..., None]).sum(axis=1)
    return of_neighbour[:, 0].astype(np.intp), total / alike.sum(axis=1)[:, None]


def _compressed(vectors: NDArray[np.float32], basis: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the components of n unit vectors and the length of the rest, (n, components + 1)."""
    inside = vectors @ basis
    # Taken as a difference of vectors: 1 - |z|² would lose half of the digits.
    rest = np.linalg.norm(vectors - inside @ basis.T, axis=1, keepdims=True)
    return np.concatenate([inside, rest], axis=1)


@njit(nogil=True, cache=True)
def _keep_largest(values, first, best, chosen):  # type: ignore[no-untyped-def] # pragma: no cover
    """Merge a tile of values, whose first column is number ``first``, into the largest so far.

    ``best`` and ``chosen`` (both n, count) hold the largest values of each row and their column
    numbers, in no order. In shuffled patterns a new value is rarely among them.
    """
    for i in range(values.shape[0]):
        lowest = np.argmin(best[i])
        bar = best[i, lowest]
        for j in range(values.shape[1]):
            if values[i, j] > bar:
                best[i, lowest] = values[i, j]
                chosen[i, lowest] = first + j
                lowest = np.argmin(best[i])
                bar = best[i, lowest]


@njit(nogil=True, cache=True, fastmath=True)
def _squared_distances(queries, full, places):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return the squared distances of each query (n, points) from some rows of ``full``, (n, m)."""
    found = np.empty(places.shape, dtype=np.float32)
    for i in range(places.shape[0]):
        for j in range(places.shape[1]):
            row = places[i, j]
            total = np.float32(0.0)
            for point in range(queries.shape[1]):
                difference = queries[i, point] - full[row, point]
                total += difference * difference
            found[i, j] = total
    return found
