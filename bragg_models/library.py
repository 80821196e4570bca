"""Library match: the stored pattern that looks most like a profile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from bragg_models.batches import profiles_of


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
        masks, mask_of = np.unique(mask, axis=0, return_inverse=True)
        return cls(
            np.ascontiguousarray((rooted / length).T, dtype=np.float32),
            np.ascontiguousarray(masks.T, dtype=np.float32),
            mask_of,
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
