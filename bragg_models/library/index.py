r"""A snapshot's patterns, compressed once, so that a library match takes milliseconds.

The square roots of all patterns are stored as a few principal components, in files that are built
when they are first needed. A query is compared with these; the best candidates of each phase are
simulated again, and the correlation with these patterns is the result, which equals that of
:func:`bragg_models.library.search.library_match` on the store.
"""

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices, Integers, Mask
from bragg_data.preprocessing import sqrt_unit
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store.schema import samples_of
from bragg_models.data.batches import Profiles, profiles_of
from bragg_models.data.cache import cached
from bragg_models.library.compressed import principal_components
from bragg_models.library.search import Matches, prepared_queries

COMPONENTS = 128  # principal components that are stored of each pattern
# Patterns of each phase that are compared in full. On noisy, miscalibrated pseudo-experiments the
# best pattern of the right phase was among the first 33 of 209,119.
CANDIDATES = 48
_VERSION = 2  # of the files
_SAMPLED = 24  # chunks from which the components are computed
_BINS = 32  # of the sums of squares, for profiles that cover a part of the window
_TOLERANCE = 1e-3  # between a stored pattern and its simulation, of the pattern's maximum
_CHECKED = 16  # patterns that are compared with their simulation
_BLOCK = 64  # queries that are compared at a time


class IndexUnavailableError(OSError):
    """An index that cannot be built or used here; the store itself can still be searched."""


@dataclass(frozen=True, eq=False)
class LibraryIndex:
    """See the module; from :func:`open_index`."""

    simulator: Simulator  # computes the data set's patterns
    phase: Integers  # (n,): labels of the data set
    cells: Array  # (n, 6)
    phases: int  # number of phases
    basis: Floats32  # (points, components)
    components: Floats32  # (n, components) of the patterns' square roots, of unit norm
    squares: Floats32  # (n, bins): sums of their squares over parts of the window
    candidates: int = CANDIDATES

    def match(self, queries: AnyFloats, covered: Mask | None = None) -> Matches:
        """Return the stored patterns that correlate best with some profiles.

        Arguments and errors as of :func:`bragg_models.library.search.library_match`.
        """
        roots, masks = prepared_queries(queries, covered, len(self.basis))
        row = np.full((len(roots), self.phases), -1, dtype=np.intp)
        correlation = np.full((len(roots), self.phases), -1.0)
        rows_of = [np.flatnonzero(self.phase == code) for code in range(self.phases)]
        for low in range(0, len(roots), _BLOCK):
            block = slice(low, low + _BLOCK)
            approximate = self.components @ (roots[block] @ self.basis).T
            # Points that were not measured do not count in a pattern's norm either.
            squared_norm = self.squares @ _binned(masks[block].astype(np.float32)).T
            approximate /= np.sqrt(np.maximum(squared_norm, np.finfo(np.float32).tiny))
            queries_of_block = zip(roots[block], masks[block], strict=True)
            for query, (root, mask) in enumerate(queries_of_block, low):
                for code, rows in enumerate(rows_of):
                    if not len(rows):
                        continue
                    estimates = approximate[rows, query - low]
                    count = min(self.candidates, len(rows))
                    chosen = rows[np.argpartition(estimates, len(rows) - count)[-count:]]
                    patterns = self._patterns(chosen) * mask
                    exact = patterns @ root / np.linalg.norm(patterns, axis=1)
                    best = int(exact.argmax())
                    row[query, code], correlation[query, code] = chosen[best], exact[best]
        cells = np.where((row >= 0)[..., None], self.cells[row], np.nan)
        return Matches(row, correlation, cells)

    def _patterns(self, rows: Indices) -> Floats32:
        simulated = self.simulator.simulate(self.phase[rows], self.cells[rows])
        return np.sqrt(np.maximum(simulated, 0))


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
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-basis.npy"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            basis = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError):
            _check(dataset, simulator)
            basis = _save_basis(path, roots)
        compressed = roots.mapped(lambda r: np.hstack([r @ basis, _sums(np.square(r))]))
        key = f"{key} {hashlib.sha256(basis.tobytes()).hexdigest()}"
        stored = cached(compressed, directory, key, on_chunk=on_batch).prepared
    except OSError as error:
        if isinstance(error, IndexUnavailableError):
            raise
        raise IndexUnavailableError(
            f"The library's index cannot be kept in {directory}: {error.strerror or error}"
        ) from error
    assert stored is not None  # a cache has it
    arrays = basis, stored[:, : basis.shape[1]], stored[:, basis.shape[1] :]
    return LibraryIndex(simulator, labels.phase, labels.cells, len(simulator.phases), *arrays)


def _check(dataset: xr.Dataset, simulator: Simulator) -> None:
    """Simulate some stored patterns again: the results of the index rely on it."""
    labels = samples_of(dataset)
    rows = np.unique(np.linspace(0, len(labels.phase) - 1, _CHECKED).astype(int))
    # Whole chunks are read for single rows: the first and the last of a few.
    stored = np.stack([dataset["intensity"][row].values for row in rows])
    simulated = simulator.simulate(labels.phase[rows], labels.cells[rows])
    difference = np.abs(simulated - stored).max(axis=1) / stored.max(axis=1)
    if not difference.max() < _TOLERANCE:
        raise IndexUnavailableError(
            f"The fast simulator does not reproduce the stored patterns: they differ by "
            f"{difference.max():.1e} of their maximum."
        )


def _save_basis(path: Path, roots: Profiles) -> Floats32:
    """Return the principal components of some chunks, which are written to a file."""
    every = np.ones(len(roots), dtype=bool)
    sampled = np.unique(np.linspace(0, len(roots.bounds) - 2, _SAMPLED).astype(int))
    sample = np.concatenate([roots.read(int(chunk), every)[0] for chunk in sampled])
    basis = principal_components(sample, COMPONENTS)
    partial = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.npy")
    try:
        np.save(partial, basis)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return basis


def _edges(points: int) -> Indices:
    return np.linspace(0, points, _BINS + 1).astype(np.intp)


def _sums(values: Floats32) -> Floats32:
    """Return sums over equal parts of the window, (n, points) to (n, bins)."""
    total = np.cumsum(values, axis=1, dtype=np.float64)
    total = np.concatenate([np.zeros((len(values), 1)), total], axis=1)
    return np.diff(total[:, _edges(values.shape[1])], axis=1).astype(np.float32)


def _binned(masks: Floats32) -> Floats32:
    """Return which share of each part of the window is covered, (n, points) to (n, bins)."""
    widths = np.maximum(np.diff(_edges(masks.shape[1])), 1)
    return np.asarray(_sums(masks) / widths, dtype=np.float32)
