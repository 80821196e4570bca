r"""A snapshot's patterns, compressed once, so that a library match takes milliseconds.

The square roots of all patterns are stored as a few principal components, in files that are built
when they are first needed. A query is compared with these; the best candidates of each phase are
simulated again, and the correlation with these patterns is the result, which equals that of
:func:`bragg_models.library.search.library_match` on the store.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from filelock import FileLock

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices, Integers, Mask
from bragg_data.preprocessing import sqrt_unit
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store.schema import samples_of
from bragg_models.data.batches import Profiles, in_order, profiles_of
from bragg_models.library.compressed import principal_components
from bragg_models.library.search import Matches, prepared_queries

COMPONENTS = 128  # principal components that are stored of each pattern
# Patterns of each phase that are compared in full. On noisy, miscalibrated pseudo-experiments the
# best pattern of the right phase was among the first 33 of 209,119.
CANDIDATES = 48
_VERSION = 1  # of the files
_SAMPLED = 24  # chunks from which the components are computed
_BINS = 32  # of the sums of squares, for profiles that cover a part of the window
_TOLERANCE = 1e-3  # between a stored pattern and its simulation, of the pattern's maximum
_CHECKED = 16  # patterns that are compared with their simulation
_BLOCK = 64  # queries that are compared at a time
_FILES = ("basis", "components", "squares")


class IndexUnavailableError(OSError):
    """An index that cannot be built or used here; the store itself can still be searched."""


@dataclass(frozen=True, eq=False)
class LibraryIndex:
    """See the module; from :func:`open_index` and :func:`build_index`."""

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


def open_index(dataset: xr.Dataset, simulator: Simulator, directory: Path) -> LibraryIndex | None:
    """Open the index of a snapshot; None if :func:`build_index` has not built it there yet.

    The simulator is that of the snapshot's campaign; the fast one reproduces patterns of GSAS-II as
    well. The directory has all indices, each named by the hash of its contents; they can be deleted
    at any time.
    """
    labels = samples_of(dataset)
    place, key = _place(dataset, directory)
    try:
        if json.loads((place / "index.json").read_text(encoding="utf-8"))["key"] != key:
            return None
        basis, components, squares = (
            np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FILES
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    expected = (len(labels.phase), basis.shape[1]), (len(labels.phase), _BINS)
    if (components.shape, squares.shape) != expected:
        return None
    arrays = basis, components, squares
    return LibraryIndex(simulator, labels.phase, labels.cells, len(simulator.phases), *arrays)


def build_index(
    dataset: xr.Dataset,
    simulator: Simulator,
    directory: Path,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> LibraryIndex:
    """Build the index of a snapshot, which reads all patterns once, and open it.

    ``on_batch`` is called with the number of patterns of every chunk that is done. Raises
    `IndexUnavailableError` if the index cannot be written there, or the simulator does not
    reproduce the stored patterns.
    """
    place, key = _place(dataset, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            index = open_index(dataset, simulator, directory)  # another process may have built it
            if index is None:
                _check(dataset, simulator)
                _build(place, key, profiles_of(dataset, sqrt_unit), on_batch)
                index = open_index(dataset, simulator, directory)
    except OSError as error:
        if isinstance(error, IndexUnavailableError):
            raise
        raise IndexUnavailableError(
            f"The library's index cannot be kept in {directory}: {error.strerror or error}."
        ) from error
    if index is None:
        raise IndexUnavailableError(
            f"The library's index {place} was written, but reads otherwise."
        )
    return index


def _place(dataset: xr.Dataset, directory: Path) -> tuple[Path, str]:
    key = f"{dataset.attrs['content_hash']} {_VERSION} {COMPONENTS} {_BINS}"
    return directory / hashlib.sha256(key.encode()).hexdigest()[:16], key


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


def _build(
    place: Path, key: str, profiles: Profiles, on_batch: Callable[[int], None] | None
) -> None:
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        every = np.ones(len(profiles), dtype=bool)
        bounds = profiles.bounds
        sampled = np.unique(np.linspace(0, len(bounds) - 2, _SAMPLED).astype(int))
        sample = np.concatenate([profiles.read(int(chunk), every)[0] for chunk in sampled])
        basis = principal_components(sample, COMPONENTS)
        components = np.empty((len(profiles), basis.shape[1]), dtype=np.float32)
        squares = np.empty((len(profiles), _BINS), dtype=np.float32)
        for batch in in_order(profiles, every):
            components[batch.rows] = batch.profiles @ basis
            squares[batch.rows] = _sums(np.square(batch.profiles))
            if on_batch is not None:
                on_batch(len(batch.rows))
        for name, values in zip(_FILES, (basis, components, squares), strict=True):
            # Written, not mapped: a full disk is an error then, and not the end of the process.
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())
        about = json.dumps({"key": key, "patterns": len(profiles)})
        (partial / "index.json").write_text(about, encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        partial.replace(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
