"""Exact nearest stored patterns of tens of thousands of profiles, by compressed vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from sklearn.utils.extmath import randomized_svd

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices, Integers, Mask
from bragg_data.preprocessing import sqrt_unit
from bragg_models.data.batches import in_order, profiles_of
from bragg_models.library.search import LibraryError, check_shape

COMPONENTS = 256  # principal components of the compressed vectors
CANDIDATES = 24  # patterns per query whose correlation is computed in full, at first
_QUERIES = 256  # at a time: with 170,000 patterns their bounds are 170 MB
_SUBSAMPLE = 6000  # patterns from which the components are computed
_BLOCK = 8192  # patterns that are compressed at a time
_SLACK = 2e-6  # rounding of the bounds, in single precision


class Neighbours(NamedTuple):
    """The k nearest stored patterns of each of q queries, the nearest first."""

    row: Indices  # (q, k), in the data set
    correlation: Array  # (q, k), at most 1
    proven: Mask  # (q,): no other pattern can be nearer than the last of the k


# faiss would need all full vectors in memory (1.9 GB for 170,000 patterns), or, compressed, could
# not prove that a result is exact; here they stay in a file, and the bound below proves it.
@dataclass(frozen=True)
class CompressedLibrary:
    """Stored patterns, prepared for an exact comparison with very many profiles.

    The measure is that of :func:`~bragg_models.library.search.library_match` where everything is
    covered; docs/explanation/models.md has the bound by which most patterns are passed over. Apart
    from a block of products, only the compressed vectors (about 1 KiB for each pattern) are in
    memory; the full ones are in a file.
    """

    rows: Indices  # (n,), in the data set, in ascending order
    basis: Floats32  # (points, components)
    compressed: Floats32  # (n, components + 1): z and ρ of each pattern
    full: Floats32  # (stored, points), mapped from the file
    position: Indices  # (n,): index of each row in ``full``

    @classmethod
    def build(
        cls,
        dataset: xr.Dataset,
        selected: Mask,
        directory: Path,
        *,
        components: int = COMPONENTS,
        on_batch: Callable[[int], None] | None = None,
    ) -> CompressedLibrary:
        """Read the selected patterns (n,) once, and compress them; a `LibraryError` if none is.

        The directory gets the file of full vectors, 4 bytes per point; it is to be deleted when the
        library is no longer used. There are fewer ``components`` if there are fewer patterns or
        points. ``on_batch`` is called with the number of patterns of every chunk that is done.
        """
        rows = np.flatnonzero(selected)
        if not len(rows):
            raise LibraryError("A library needs at least one pattern. Choose a larger part.")
        profiles = profiles_of(dataset, sqrt_unit)
        points = int(profiles.intensity.sizes["tof"])
        file = directory / "library.npy"
        full = np.lib.format.open_memmap(file, "w+", np.float32, (len(rows), points))
        filled = 0
        for batch in in_order(profiles, selected):
            full[filled : filled + len(batch.rows)] = batch.profiles
            filled += len(batch.rows)
            if on_batch is not None:
                on_batch(len(batch.rows))
        basis = principal_components(full, components)
        compressed = np.empty((len(rows), basis.shape[1] + 1), dtype=np.float32)
        for low in range(0, len(rows), _BLOCK):
            compressed[low : low + _BLOCK] = compress(full[low : low + _BLOCK], basis)
        return cls(rows, basis, compressed, full, np.arange(len(rows)))

    def only(self, selected: Mask) -> CompressedLibrary:
        """Return the part of the library with these rows of the data set, shape (n,)."""
        part = np.flatnonzero(selected[self.rows])
        if not len(part):
            raise LibraryError("A library needs at least one pattern. Choose a larger part.")
        rows, compressed = self.rows[part], self.compressed[part]
        return replace(self, rows=rows, compressed=compressed, position=self.position[part])

    def nearest(
        self, profiles: AnyFloats, k: int = 1, *, candidates: int = CANDIDATES, widening: int = 8
    ) -> Neighbours:
        """Return the k patterns that correlate best with each of some profiles (q, points).

        These are on the library's grid, without background, not yet square-rooted. Where the result
        is not proven by the first ``candidates``, ``widening`` times as many are compared. Raises
        `LibraryError` if the profiles have another length, or the library has fewer than k
        patterns, and `PreprocessingError` if a profile has no positive value.
        """
        check_shape(profiles, self.full.shape[1])
        if k > len(self.rows):
            raise LibraryError(f"The library has {len(self.rows)} patterns, fewer than {k}.")
        queries = np.ascontiguousarray(sqrt_unit(profiles), dtype=np.float32)
        count = max(candidates, k)
        parts = []
        for low in range(0, len(queries), _QUERIES):
            block = queries[low : low + _QUERIES]
            neighbours = self._nearest(block, k, count)
            if len(doubtful := np.flatnonzero(~neighbours.proven)):
                improved = self._nearest(block[doubtful], k, widening * count)
                for values, new_values in zip(neighbours, improved, strict=True):
                    values[doubtful] = new_values
            parts.append(neighbours)
        return Neighbours(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _nearest(self, queries: Floats32, k: int, count: int) -> Neighbours:
        count = min(count, len(self.rows))
        bounds = torch.from_numpy(compress(queries, self.basis) @ self.compressed.T)
        largest, indices = bounds.topk(count, dim=1)
        chosen = np.sort(indices.numpy(), axis=1)  # of equal ones the first is the nearest
        squared = np.empty(chosen.shape)
        for query, position, result in zip(queries, self.position[chosen], squared, strict=True):
            np.square(self.full[position] - query).sum(axis=1, out=result)
        order = np.argsort(squared, axis=1, kind="stable")[:, :k]
        best = 1.0 - np.take_along_axis(squared, order, axis=1) / 2
        proven = best[:, -1] >= largest[:, -1].numpy() + _SLACK
        proven |= count == len(self.rows)
        return Neighbours(self.rows[np.take_along_axis(chosen, order, axis=1)], best, proven)


def mean_of_nearest(
    neighbours: Neighbours, phase: Integers, cells: Array, k: int
) -> tuple[Indices, Array]:
    """Return the phase (q,) of the nearest pattern and the mean cell (q, 6) of its k nearest.

    Fewer than k of the neighbours may be of that phase. ``phase`` (n,) and ``cells`` (n, 6) are the
    labels of the data set.
    """
    phases = phase[neighbours.row]
    counted = phases == phases[:, :1]
    counted &= counted.cumsum(axis=1) <= k
    total = (cells[neighbours.row] * counted[..., None]).sum(axis=1)
    return phases[:, 0].astype(np.intp), total / counted.sum(axis=1)[:, None]


def principal_components(patterns: Floats32, count: int) -> Floats32:
    """Return the principal components (points, m) of patterns (n, points), at most ``count``.

    They are computed from a random part of the patterns, which affects slightly which candidates of
    a search are chosen, and nothing else.
    """
    size = min(_SUBSAMPLE, len(patterns))
    chosen = np.random.default_rng(0).choice(len(patterns), size, replace=False)
    sample = patterns[np.sort(chosen)]
    _, _, directions = randomized_svd(sample, min(count, *sample.shape), n_iter=2, random_state=0)
    return np.ascontiguousarray(directions.T, dtype=np.float32)


def compress(vectors: Floats32, basis: Floats32) -> Floats32:
    """Return the components of n unit vectors and the length of the rest, (n, components + 1)."""
    inside = vectors @ basis
    # Computed as a difference of vectors: 1 - |z|² would lose half of the digits.
    rest = np.linalg.norm(vectors - inside @ basis.T, axis=1, keepdims=True)
    return np.concatenate([inside, rest], axis=1)
