"""Library match: the stored patterns that correlate best with a profile.

:func:`library_match` compares a few profiles with all stored patterns; for tens of thousands of
profiles see :mod:`bragg_models.library.compressed`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices, Mask
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.threads import single_threaded
from bragg_models.data.batches import prefetched, profiles_of


class LibraryError(ValueError):
    """A query that cannot be compared with the stored patterns."""


@dataclass(frozen=True)
class Matches:
    """The best stored pattern of each phase for each of q queries."""

    row: Indices  # (q, n_phases): in the data set; -1 for a phase without patterns
    correlation: Array  # (q, n_phases): at most 1; -1 for a phase without patterns
    cells: Array  # (q, n_phases, 6), in Å and degrees; NaN without patterns

    @property
    def phase(self) -> Indices:
        """The phase of each query's best match of all, shape (q,)."""
        return np.asarray(self.correlation.argmax(axis=1))

    @property
    def best_cells(self) -> Array:
        """The cell of each query's best match of all, shape (q, 6)."""
        return self.cells[np.arange(len(self.cells)), self.phase]

    def starts(self, query: int) -> list[tuple[int, Array]]:
        """Return phase codes and cells (6,) of a query's matches, of the phases that have one."""
        matches = zip(self.row[query], self.cells[query], strict=True)
        return [(code, cell) for code, (row, cell) in enumerate(matches) if row >= 0]


def library_match(
    dataset: xr.Dataset,
    queries: AnyFloats,
    covered: Mask | None = None,
    *,
    workers: int = 2,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Matches:
    r"""Find the stored patterns that correlate best with some profiles.

    With s the square roots of a stored pattern's intensities and q those of a query, over the
    points that the query covers,

    .. math:: r = \frac{\sum_i s_i q_i}{\sqrt{\sum_i s_i^2 \sum_i q_i^2}} .

    The square root gives weight to the many weak peaks, and makes counting noise uniform. The
    scales of both do not matter; negative values count as zero. (Subtracting the means first makes
    nearly cubic cells harder to distinguish from cubic ones.) Each chunk of the data set is read
    once, whatever the number of queries, and a few chunks are in memory at a time.

    Queries (q, points) are profiles on the data set's grid without background, not yet
    square-rooted; ``covered`` (q, points) are the points that were measured. That many ``workers``
    read and multiply chunks; ``on_chunk`` is called with the number of chunks done, and of all
    chunks. Raises `LibraryError` if a query has another number of points, is not finite where
    covered, covers fewer than three points, or is nowhere positive.
    """
    profiles = profiles_of(dataset, lambda values: values)
    roots, mask = prepared_queries(queries, covered, int(profiles.intensity.sizes["tof"]))
    masks, mask_of = np.unique(mask, axis=0, return_inverse=True)
    roots = np.ascontiguousarray(roots.T)
    masks = np.ascontiguousarray(masks.T, dtype=np.float32)
    phase = dataset["phase"].values
    n_phases = len(str(dataset["phase"].attrs.get("flag_meanings", "")).split())
    n_phases = max(n_phases, int(phase.max()) + 1)
    every = np.ones(len(profiles), dtype=bool)
    chunks = range(len(profiles.bounds) - 1)

    def compare(chunk: int) -> tuple[Indices, Array]:
        """Return rows of the data set, and their correlation with the queries, (n, q)."""
        intensity, rows = profiles.read(chunk, every)
        positive = np.maximum(intensity, 0)
        # The square of a square root is the intensity itself. One product gives all sums.
        squares = np.maximum(positive @ masks, np.finfo(np.float32).tiny)
        return rows, np.asarray((np.sqrt(positive) @ roots) / np.sqrt(squares)[:, mask_of])

    row = np.full((len(queries), n_phases), -1, dtype=np.intp)
    correlation = np.full((len(queries), n_phases), -1.0)
    # One thread of linear algebra per worker: more would only wait for each other.
    with (
        single_threaded(),
        prefetched(compare, chunks, depth=workers + 1, workers=workers) as results,
    ):
        for done, (rows, correlations) in enumerate(results, start=1):
            for code in np.unique(phase[rows]):
                of_phase = np.flatnonzero(phase[rows] == code)
                best = correlations[of_phase].argmax(axis=0)
                value = correlations[of_phase[best], np.arange(len(queries))]
                better = value > correlation[:, code]
                correlation[better, code] = value[better]
                row[better, code] = rows[of_phase[best[better]]]
            if on_chunk is not None:
                on_chunk(done, len(chunks))
    cells = np.stack([dataset[name].values for name in CELL_PARAMETERS], axis=1)
    return Matches(row, correlation, np.where((row >= 0)[..., None], cells[row], np.nan))


def check_shape(queries: AnyFloats, points: int) -> None:
    """Raise a LibraryError if queries are not on a grid of this length."""
    if queries.ndim != 2 or queries.shape[1] != points:
        raise LibraryError(
            f"The queries have shape {queries.shape}; the library's patterns have {points} "
            f"points: bring the profiles to the library's grid first."
        )


def prepared_queries(
    queries: AnyFloats, covered: Mask | None, points: int
) -> tuple[Floats32, Mask]:
    """Return queries (q, points) as square roots of unit norm, and the covered points.

    They are zero where not covered; raises `LibraryError` as :func:`library_match`.
    """
    check_shape(queries, points)
    mask = np.ones(queries.shape, dtype=bool) if covered is None else covered
    if (mask.sum(axis=1) < 3).any():
        raise LibraryError("A profile covers fewer than three points of the library's grid.")
    values = np.where(mask, queries, 0.0)
    if not np.isfinite(values).all():
        raise LibraryError("A profile contains values that are not finite numbers.")
    rooted = np.sqrt(np.maximum(values, 0.0))
    length = np.linalg.norm(rooted, axis=1, keepdims=True)
    if not (length > 0).all():
        raise LibraryError("A profile is nowhere positive on the library's grid: no peak.")
    return np.asarray(rooted / length, dtype=np.float32), mask
