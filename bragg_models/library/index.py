r"""A snapshot's patterns, compressed once, so that a library match takes milliseconds.

The square roots of all patterns are stored as a few hundred principal components, in files that are
built when they are first needed. A query is compared with all patterns by the first of these, in
eight bits; with the best few hundred of each phase by all of them; the best of those are simulated
again, and the correlation with these patterns is the result, which equals that of
:func:`bragg_models.library.search.library_match` on the store.
"""

import hashlib
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices, Integers, Integers8, Mask
from bragg_data.kernels import kernel
from bragg_data.preprocessing import sqrt_unit
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store.schema import samples_of
from bragg_data.threads import single_threaded
from bragg_models.data.batches import prefetched, profiles_of
from bragg_models.data.cache import cached
from bragg_models.library.compressed import principal_components
from bragg_models.library.search import Matches, prepared_queries

# Of 150 measured-looking draws against 209,119 patterns, the best pattern of each phase is the
# store's in 431 of 450 (correlations lost: 3e-3 at most), that of all phases in 149 (3e-5).
COMPONENTS = 384  # principal components that are stored of each pattern, in half precision
COARSE = 96  # of which all patterns are compared by, in 8 bits
SHORTLIST = 512  # patterns of each phase that are compared by all components
CANDIDATES = 8  # patterns of each phase that are compared in full
_VERSION = 3  # of the files
_SAMPLED = 24  # chunks from which the components are computed
_BINS = 32  # of the sums of squares, for profiles that cover a part of the window
_TOLERANCE = 1e-3  # between a stored pattern and its simulation, of the pattern's maximum
_BLOCK = 16  # queries that are compared at a time
_ROWS = 8192  # patterns that are compared with all of these while they are in a core's cache


class IndexUnavailableError(OSError):
    """An index that cannot be built or used here; the store itself can still be searched."""


@dataclass(frozen=True, eq=False)
class LibraryIndex:
    """See the module; from :func:`open_index`."""

    simulator: Simulator  # computes the data set's patterns
    phase: Integers  # (n,): labels of the data set
    cells: Array  # (n, 6)
    basis: Floats32  # (points, components)
    components: NDArray[np.float16]  # (n, components) of the patterns' square roots, of unit norm
    order: Indices  # (n,): rows of the data set, phase by phase
    bounds: Indices  # (n_phases + 1,) of the phases in this order
    coarse: Integers8  # (coarse, n): the first components in this order, on any scale
    squares: Floats32  # (bins, n): sums of squares over parts of the window in this order
    shortlist: int = SHORTLIST
    candidates: int = CANDIDATES

    def match(self, queries: AnyFloats, covered: Mask | None = None) -> Matches:
        """Return the stored patterns that correlate best with some profiles.

        Arguments and errors as of :func:`bragg_models.library.search.library_match`.
        """
        with single_threaded():  # its matrices are small: threads would only wait
            return self._match(*prepared_queries(queries, covered, len(self.basis)))

    def _match(self, roots: Floats32, masks: Mask) -> Matches:
        row = np.full((len(roots), len(self.bounds) - 1), -1, dtype=np.intp)
        correlation = np.full(row.shape, -1.0)
        for low in range(0, len(roots), _BLOCK):
            block = slice(low, low + _BLOCK)
            of_block = (roots[block], masks[block])
            chosen = self._candidates(*of_block)
            for code, rows in enumerate(chosen):
                if rows.shape[1]:
                    best = self._compare(code, rows, *of_block)
                    row[block, code], correlation[block, code] = best
        cells = np.where((row >= 0)[..., None], self.cells[row], np.nan)
        return Matches(row, correlation, cells)

    def _candidates(self, roots: Floats32, masks: Mask) -> list[Indices]:
        """Return rows of the data set to compare in full, (q, candidates) of each phase."""
        components = roots @ self.basis
        # Points that were not measured do not count in a pattern's norm either.
        missing = 1 - _binned(masks)
        bins = np.flatnonzero(missing.any(axis=0))
        estimates = 1 - missing[:, bins] @ self.squares[bins]
        first = np.ascontiguousarray(components[:, : len(self.coarse)])
        _correlate(self.coarse, first, estimates)
        sizes = np.diff(self.bounds)
        lengths = np.minimum(sizes, self.shortlist)
        counts = np.minimum(sizes, self.candidates)
        chosen = [np.empty((len(roots), count), dtype=np.intp) for count in counts]
        ends = np.cumsum(lengths)[:-1]
        for query, mask in enumerate(masks):
            parts = np.split(estimates[query], self.bounds[1:-1])
            of_parts = zip(parts, lengths, self.bounds[:-1], strict=True)
            shortlist = [low + _largest(part, length) for part, length, low in of_parts]
            rows = self.order[np.concatenate(shortlist)]
            patterns = self.components[rows].astype(np.float32)
            values = patterns @ components[query] / self._norms(patterns, mask)
            of_phases = zip(np.split(values, ends), np.split(rows, ends), counts, strict=True)
            for code, (of_phase, rows_of_phase, count) in enumerate(of_phases):
                chosen[code][query] = rows_of_phase[_largest(of_phase, count)]
        return chosen

    def _norms(self, patterns: Floats32, mask: Mask) -> Floats32:
        """Return the norms of patterns (n, components) over the points of a mask (points,)."""
        if mask.all():
            return np.ones(len(patterns), dtype=np.float32)
        few = mask if mask.sum() < len(mask) / 2 else ~mask
        squares = np.square(patterns @ self.basis[few].T).sum(axis=1)
        squares = squares if few is mask else 1 - squares
        return np.asarray(np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny)))

    def _compare(
        self, code: int, rows: Indices, roots: Floats32, masks: Mask
    ) -> tuple[Indices, Array]:
        """Return the best of the candidates of a phase, (q, n), and its correlation, both (q,)."""
        flat, place = np.unique(rows, return_inverse=True)
        simulated = self.simulator.simulate(np.full(len(flat), code), self.cells[flat])
        patterns = np.sqrt(np.maximum(simulated, 0))
        row, correlation = np.empty(len(rows), dtype=np.intp), np.empty(len(rows))
        for query, places in enumerate(place.reshape(rows.shape)):
            of_query = patterns[places] * masks[query]
            values = of_query @ roots[query] / np.linalg.norm(of_query, axis=1)
            best = int(values.argmax())
            row[query], correlation[query] = rows[query, best], values[best]
        return row, correlation


@kernel()
def _correlate(patterns, queries, values):  # type: ignore[no-untyped-def] # pragma: no cover
    """Turn squared norms (q, n) into products of patterns (m, n) and queries (q, m) over norms."""
    room = np.empty(_ROWS, dtype=np.float32)
    for low in range(0, patterns.shape[1], _ROWS):
        part = slice(low, min(low + _ROWS, patterns.shape[1]))
        for q in range(len(queries)):
            total = room[: part.stop - low]
            total[:] = np.float32(0.0)
            for k in range(0, len(patterns), 4):
                _add(total, patterns[k : k + 4, part], queries[q, k : k + 4])
            of_query = values[q, part]
            for i in range(len(total)):
                of_query[i] = total[i] / math.sqrt(max(of_query[i], np.float32(1e-30)))


@kernel()
def _add(total, values, factors):  # type: ignore[no-untyped-def] # pragma: no cover
    if len(values) < 4:
        for k in range(len(values)):
            row, factor = values[k], factors[k]
            for i in range(len(total)):
                total[i] += np.float32(row[i]) * factor
        return
    # Four at a time: fewer loads and stores of the sums.
    a, b, c, d = values[0], values[1], values[2], values[3]
    f, g, h, e = factors[0], factors[1], factors[2], factors[3]
    for i in range(len(total)):
        left = np.float32(a[i]) * f + np.float32(b[i]) * g
        total[i] += left + (np.float32(c[i]) * h + np.float32(d[i]) * e)


def _largest(values: AnyFloats, count: int) -> Indices:
    """Return the indices of the largest values, in any order."""
    return np.asarray(np.argpartition(values, len(values) - count)[len(values) - count :])


def open_index(
    dataset: xr.Dataset,
    simulator: Simulator,
    directory: Path,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> LibraryIndex:
    """Open the index of a snapshot, which is built if there is none: that reads all patterns once.

    The simulator is that of the snapshot's campaign; the fast one reproduces patterns of GSAS-II as
    well. The directory has all indices, named by hashes of their contents; they can be deleted at
    any time. ``on_batch`` is called with the number of patterns of every chunk that is done. Raises
    `IndexUnavailableError` if the index cannot be written there, or the simulator does not
    reproduce the stored patterns.
    """
    labels, roots = samples_of(dataset), profiles_of(dataset, sqrt_unit)
    key = f"{dataset.attrs['content_hash']} {_VERSION} {COMPONENTS} {_BINS}"
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-basis.npz"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with np.load(path, allow_pickle=False) as file:  # which has a checksum
                basis = file["basis"]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile):
            basis = principal_components(_sample(dataset, simulator), COMPONENTS)
            _save(path, basis)
        compressed = roots.mapped(lambda r: np.hstack([r @ basis, _sums(np.square(r))]), np.float16)
        key = f"{key} {hashlib.sha256(basis.tobytes()).hexdigest()}"
        # One thread of linear algebra for each chunk that is read at a time.
        with single_threaded():
            stored = cached(compressed, directory, key, on_chunk=on_batch).prepared
    except OSError as error:
        if isinstance(error, IndexUnavailableError):
            raise
        raise IndexUnavailableError(
            f"The library's index cannot be kept in {directory}: {error.strerror or error}"
        ) from error
    assert stored is not None  # a cache has it
    order = np.argsort(labels.phase, kind="stable")
    bounds = np.searchsorted(labels.phase[order], np.arange(len(simulator.phases) + 1))
    components, squares = np.split(np.asarray(stored, np.float16), [basis.shape[1]], axis=1)
    first = np.ascontiguousarray(components[:, :COARSE][order].T, dtype=np.float32)
    coarse = np.rint(first * (127 / np.abs(first).max())).astype(np.int8)
    in_order = np.ascontiguousarray(squares[order].T, dtype=np.float32)
    arrays = (basis, components, order, bounds, coarse, in_order)
    return LibraryIndex(simulator, labels.phase, labels.cells, *arrays)


def _sample(dataset: xr.Dataset, simulator: Simulator) -> Floats32:
    """Return the square roots of the patterns of some chunks, to compute the components from.

    One of each chunk is simulated again: the results of the index rely on it.
    """
    labels, profiles = samples_of(dataset), profiles_of(dataset, lambda values: values)
    every = np.ones(len(profiles), dtype=bool)
    chunks = np.unique(np.linspace(0, len(profiles.bounds) - 2, _SAMPLED).astype(int))

    def read(chunk: int) -> tuple[int, Floats32]:
        values, rows = profiles.read(chunk, every)
        return int(rows[-1]), values

    roots = []
    with prefetched(read, chunks.tolist(), depth=3, workers=2) as results:
        for row, values in results:
            simulated = simulator.simulate(labels.phase[[row]], labels.cells[[row]])[0]
            difference = np.abs(simulated - values[-1]).max() / values[-1].max()
            if not difference < _TOLERANCE:
                raise IndexUnavailableError(
                    f"The fast simulator does not reproduce the stored patterns: they differ by "
                    f"{difference:.1e} of their maximum."
                )
            roots.append(sqrt_unit(values))
    return np.concatenate(roots)


def _save(path: Path, basis: Floats32) -> None:
    """Write a file at once."""
    partial = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.npz")
    try:
        np.savez(partial, basis=basis)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _edges(points: int) -> Indices:
    return np.linspace(0, points, _BINS + 1).astype(np.intp)


def _sums(values: AnyFloats) -> Floats32:
    """Return sums over equal parts of the window, (n, points) to (n, bins)."""
    return np.asarray(np.add.reduceat(values, _edges(values.shape[1])[:-1], axis=1))


def _binned(masks: Mask) -> Floats32:
    """Return which share of each part of the window is covered, (n, points) to (n, bins)."""
    widths = np.diff(_edges(masks.shape[1]))
    return np.asarray(_sums(masks.astype(np.float32)) / widths, dtype=np.float32)
