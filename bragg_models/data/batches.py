"""Profiles of a snapshot as batches: whole chunks read in the background, shuffled, balanced.

Reading and preparing takes processor time from a fast network in every epoch. A copy of the
prepared profiles (:func:`bragg_models.data.cache.cached`) is mapped into memory instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_models.data.prefetch import prefetched


class BatchError(ValueError):
    """Samples from which no batch can be made."""


@dataclass(frozen=True)
class Profiles:
    """The profiles of a data set, read and prepared one stored chunk at a time.

    Attributes
    ----------
    intensity : dims (sample, tof)
        Lazy.
    rows_per_chunk
        Rows per stored chunk; whole chunks are read, each decompressed once.
    prepare
        Preparation of the profiles of each chunk, from shape (n, points) to (n, m).
    prepared : shape (n, m)
        All prepared profiles, if they are in memory or mapped into it; read instead.
    """

    intensity: xr.DataArray
    rows_per_chunk: int
    prepare: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    prepared: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return int(self.intensity.sizes["sample"])

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self) // self.rows_per_chunk)

    def chunks_with(self, selected: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the numbers of the chunks that hold a selected sample, in stored order."""
        return np.unique(np.flatnonzero(selected) // self.rows_per_chunk)

    def count(self, chunks: NDArray[np.intp], selected: NDArray[np.bool_]) -> int:
        """Return how many selected samples some chunks hold."""
        rows = self.rows_per_chunk
        return sum(int(selected[c * rows : (c + 1) * rows].sum()) for c in chunks)

    def read(
        self, chunk: int, selected: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Return the prepared profiles of a chunk's selected samples, and their row numbers."""
        low = chunk * self.rows_per_chunk
        rows = slice(low, low + self.rows_per_chunk)
        inside = np.flatnonzero(selected[rows])
        if self.prepared is not None:
            values = self.prepared[rows]
            return values if len(inside) == len(values) else values[inside], inside + low
        values = self.intensity.isel(sample=rows).values
        if len(inside) < len(values):
            values = values[inside]
        return np.ascontiguousarray(self.prepare(values), dtype=np.float32), inside + low

    def mapped(self, function: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> Profiles:
        """Return the profiles with a further function applied to them."""
        prepare = self.prepare
        return Profiles(
            self.intensity,
            self.rows_per_chunk,
            lambda values: np.asarray(function(prepare(values)), dtype=np.float32),
        )


def profiles_of(
    dataset: xr.Dataset, prepare: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> Profiles:
    """Return the profiles of an opened snapshot (or of any data set with ``intensity``)."""
    intensity = dataset["intensity"]
    chunks = intensity.encoding.get("chunks") or intensity.encoding.get("preferred_chunks")
    rows = chunks[intensity.dims.index("sample")] if isinstance(chunks, tuple) else 512
    return Profiles(intensity, int(rows), prepare)


@dataclass(frozen=True)
class Joined(Profiles):
    """The profiles of several data sets, in sequence; see :func:`joined`."""

    parts: tuple[Profiles, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def chunks_with(self, selected: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the numbers of the chunks that hold a selected sample, in stored order."""
        return np.concatenate(
            [first + p.chunks_with(selected[rows]) for p, first, rows in self._places()]
        )

    def count(self, chunks: NDArray[np.intp], selected: NDArray[np.bool_]) -> int:
        """Return how many selected samples some chunks hold."""
        return sum(
            p.count(chunks[(chunks >= first) & (chunks < first + p.chunks)] - first, selected[rows])
            for p, first, rows in self._places()
        )

    def read(
        self, chunk: int, selected: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Return the prepared profiles of a chunk's selected samples, and their row numbers."""
        part, first, rows = next(p for p in self._places() if chunk < p[1] + p[0].chunks)
        values, numbers = part.read(chunk - first, selected[rows])
        return values, numbers + rows.start

    def mapped(self, function: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> Profiles:
        """Return the profiles with a further function applied to them."""
        return joined([part.mapped(function) for part in self.parts])

    def _places(self) -> Iterator[tuple[Profiles, int, slice]]:
        """Yield each part with the number of its first chunk, and its rows."""
        chunk = row = 0
        for part in self.parts:
            yield part, chunk, slice(row, row + len(part))
            chunk, row = chunk + part.chunks, row + len(part)


def joined(parts: Sequence[Profiles]) -> Profiles:
    """Return the profiles of several data sets, in sequence."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Joined(first.intensity, first.rows_per_chunk, first.prepare, None, tuple(parts))


@dataclass(frozen=True)
class Batch:
    """Samples: prepared profiles of shape (n, points), and row numbers of shape (n,)."""

    profiles: NDArray[np.float32]
    rows: NDArray[np.intp]


def in_order(profiles: Profiles, selected: NDArray[np.bool_]) -> Iterator[Batch]:
    """Yield the selected samples chunk by chunk, in stored order.

    Parameters
    ----------
    profiles
        What is read.
    selected : shape (n,)
        Which samples; chunks without any are not read.
    """
    chunks = profiles.chunks_with(selected)
    with prefetched((Batch(*profiles.read(int(c), selected)) for c in chunks), depth=2) as items:
        yield from items


@dataclass(frozen=True)
class BatchSettings:
    """Size of batches and epochs.

    Attributes
    ----------
    batch_size
        Samples per batch. In an epoch without balance the last batch may be smaller.
    buffer_chunks
        Chunks in the shuffle buffer.
    samples
        Samples per epoch, by default the number of selected ones; with balance rounded up to whole
        batches. No more buffers are read than needed; if fewer are selected, their chunks are
        repeated in another order.
    """

    batch_size: int
    buffer_chunks: int = 32
    samples: int | None = None


@dataclass(frozen=True, eq=False)
class Balance:
    """Composition of each batch by phase.

    Within a buffer the samples of a phase are drawn without replacement until all were used, then
    again: samples of a rare phase are repeated, some of a common one left out. The number of
    batches of an epoch does not change.

    Attributes
    ----------
    phase : shape (n,)
        Phase of each sample.
    shares : length n_phases
        Share of each phase in a batch, on any scale.
    """

    phase: NDArray[np.integer]
    shares: Sequence[float]


def shuffled(
    profiles: Profiles,
    selected: NDArray[np.bool_],
    settings: BatchSettings,
    generator: np.random.Generator,
    balance: Balance | None = None,
) -> Generator[Batch]:
    """Yield one epoch of shuffled batches.

    Chunks are read in random order, several at a time into a buffer, while the previous buffer is
    in use; batches are drawn from all samples of a buffer. At most two buffers are in memory,
    whatever the size of the data set. All random numbers are drawn in the caller's thread, so that
    they do not depend on timing.

    Parameters
    ----------
    profiles
        Profiles to read.
    selected : shape (n,)
        Which samples to train on.
    settings
        Size of batches and epochs.
    generator
        Source of all random numbers.
    balance
        Composition of the batches; by default every selected sample comes exactly once.

    Raises
    ------
    BatchError
        If nothing is selected, or no phase with a share has samples.
    """
    chunks = generator.permutation(profiles.chunks_with(selected))
    if not len(chunks):
        raise BatchError("There is no sample to train on. Choose a larger part of the data set.")
    present = int(selected.sum())
    remaining = present if settings.samples is None else settings.samples
    rounds = [chunks]
    rounds += [generator.permutation(chunks) for _ in range(-(-remaining // present) - 1)]
    groups = [
        chunks_of_round[low : low + settings.buffer_chunks]
        for chunks_of_round in rounds
        for low in range(0, len(chunks_of_round), settings.buffer_chunks)
    ]
    enough = np.cumsum([profiles.count(group, selected) for group in groups]) >= remaining
    groups = groups[: int(enough.argmax()) + 1]
    buffers = (_read_together(profiles, group, selected) for group in groups)
    size = settings.batch_size
    with prefetched(buffers, depth=1) as items:
        if balance is None:
            batches = _complete(items, size, generator)
        else:
            remaining = -(-remaining // size) * size
            batches = _balanced(items, size, generator, balance)
        for batch in batches:
            if len(batch.rows) <= remaining:
                yield batch
            else:
                yield Batch(batch.profiles[:remaining], batch.rows[:remaining])
            remaining -= len(batch.rows)
            if remaining <= 0:
                return


@dataclass(frozen=True)
class _Buffer:
    """Samples to draw from: profiles, the index of each sample in them, and its row number."""

    profiles: NDArray[np.float32]
    index: NDArray[np.intp] | None
    rows: NDArray[np.intp]

    def take(self, chosen: NDArray[np.intp]) -> Batch:
        index = chosen if self.index is None else self.index[chosen]
        return Batch(np.take(self.profiles, index, axis=0), self.rows[chosen])


def _read_together(
    profiles: Profiles, chunks: NDArray[np.intp], selected: NDArray[np.bool_]
) -> _Buffer:
    per_chunk = profiles.rows_per_chunk
    if profiles.prepared is not None:
        # Nothing is copied, but every page is read here, in the background, if it is not yet.
        parts = []
        for chunk in chunks:
            low = chunk * per_chunk
            profiles.prepared[low : low + per_chunk].reshape(-1)[::1024].sum()
            parts.append(np.flatnonzero(selected[low : low + per_chunk]) + low)
        rows = np.concatenate(parts)
        return _Buffer(profiles.prepared, rows, rows)
    count = profiles.count(chunks, selected)
    values, rows = profiles.read(int(chunks[0]), selected)
    # Filled in place: concatenating the parts afterwards would take twice the memory.
    together = np.empty((count, values.shape[1]), dtype=np.float32)
    row_numbers = np.empty(count, dtype=np.intp)
    filled = 0
    for number, chunk in enumerate(chunks):
        if number:
            values, rows = profiles.read(int(chunk), selected)
        together[filled : filled + len(rows)] = values
        row_numbers[filled : filled + len(rows)] = rows
        filled += len(rows)
    return _Buffer(together, None, row_numbers)


def _complete(
    buffers: Iterable[_Buffer], batch_size: int, generator: np.random.Generator
) -> Iterator[Batch]:
    rest: Batch | None = None
    for buffer in buffers:
        order = generator.permutation(len(buffer.rows))
        start = 0
        if rest is not None:
            start = batch_size - len(rest.rows)
            first = buffer.take(order[:start])
            rest = Batch(
                np.concatenate([rest.profiles, first.profiles]),
                np.concatenate([rest.rows, first.rows]),
            )
            if len(rest.rows) < batch_size:
                continue
            yield rest
            rest = None
        for low in range(start, len(order), batch_size):
            batch = buffer.take(order[low : low + batch_size])
            if len(batch.rows) < batch_size:
                rest = batch
            else:
                yield batch
    if rest is not None:
        yield rest


def _balanced(
    buffers: Iterable[_Buffer], batch_size: int, generator: np.random.Generator, balance: Balance
) -> Iterator[Batch]:
    shares = np.asarray(balance.shares, dtype=np.float64)
    due = 1.0  # batches; from one on, so that even less than a batch of samples makes one
    for buffer in buffers:
        phase = balance.phase[buffer.rows]
        rows_by_phase = [np.flatnonzero(phase == code) for code in range(len(shares))]
        present = np.where([len(rows) > 0 for rows in rows_by_phase], shares, 0.0)
        if not present.sum():
            raise BatchError("No sample to train on belongs to a phase that has a share.")
        counts = _largest_remainder(present / present.sum(), batch_size)
        due += len(buffer.rows) / batch_size
        batches = max(math.ceil(due) - 1, 0)
        due -= batches
        orders = [
            _repeated_permutations(rows, batches * count, generator)
            for rows, count in zip(rows_by_phase, counts, strict=True)
        ]
        for number in range(batches):
            chosen = np.concatenate(
                [o[number * n : (number + 1) * n] for o, n in zip(orders, counts, strict=True)]
            )
            yield buffer.take(chosen)


def _repeated_permutations(
    rows: NDArray[np.intp], count: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    if count == 0:
        return rows[:0]
    return np.concatenate([generator.permutation(rows) for _ in range(-(-count // len(rows)))])


def _largest_remainder(shares: NDArray[np.float64], total: int) -> list[int]:
    exact = shares * total
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[largest] += 1
    return [int(count) for count in counts]
