"""Profiles of a snapshot as batches: whole chunks read in the background, shuffled, balanced.

Reading and preparing takes processor time from a fast network in every epoch. A copy of the
prepared profiles (:func:`bragg_models.data.cache.cached`) is mapped into memory instead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import TypeVar

import numpy as np
import xarray as xr

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices, Integers, Mask
from bragg_data.store import schema
from bragg_data.store.repository import storage_errors
from bragg_data.store.verification import check_block

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")


class BatchError(ValueError):
    """Samples from which no batch can be made."""


@contextmanager
def prefetched(
    function: Callable[[_Argument], _Result],
    arguments: Iterable[_Argument],
    depth: int,
    *,
    workers: int = 1,
) -> Iterator[Iterator[_Result]]:
    """Compute a function of some arguments in background threads, at most ``depth`` results ahead.

    The target is an iterator over the results, in order. An exception is raised in place of its
    result. Leaving the context ends the threads.
    """
    remaining = iter(arguments)
    pool = ThreadPoolExecutor(workers)

    def results() -> Iterator[_Result]:
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(function, argument) for argument in islice(remaining, 1))
            yield result
            del result  # so that it is freed once used

    try:
        ahead = deque(pool.submit(function, argument) for argument in islice(remaining, depth))
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Profiles:
    """The profiles of a data set, read and prepared one stored chunk at a time."""

    intensity: xr.DataArray  # (sample, tof), lazy
    rows_per_chunk: int  # whole chunks are read, each decompressed once
    prepare: Callable[[Floats32], Floats32]  # of a chunk: (n, points), (n, m)
    prepared: Floats32 | None = None  # (n, m), if in memory or mapped; read instead
    dtype: type[np.floating] = np.float32  # of prepared profiles
    check: Callable[[int, Floats32], object] | None = None  # of a chunk as read; raises if damaged
    _checked: set[int] = field(default_factory=set, compare=False)

    def __len__(self) -> int:
        return int(self.intensity.sizes["sample"])

    @cached_property
    def bounds(self) -> Indices:
        """First row of each chunk, and the number of rows."""
        return np.append(np.arange(0, len(self), self.rows_per_chunk), len(self))

    def chunks_with(self, selected: Mask) -> Indices:
        """Return the numbers of the chunks that hold a selected sample, in stored order."""
        return np.unique(np.searchsorted(self.bounds, np.flatnonzero(selected), "right") - 1)

    def count(self, chunks: Indices, selected: Mask) -> int:
        """Return how many selected samples some chunks hold."""
        return sum(int(selected[self.bounds[c] : self.bounds[c + 1]].sum()) for c in chunks)

    def read(self, chunk: int, selected: Mask) -> tuple[Floats32, Indices]:
        """Return the prepared profiles of a chunk's selected samples, and their row numbers."""
        low = chunk * self.rows_per_chunk
        rows = slice(low, low + self.rows_per_chunk)
        inside = np.flatnonzero(selected[rows])
        stored = self.intensity.isel(sample=rows) if self.prepared is None else self.prepared[rows]
        with storage_errors(f"reading block {chunk}"):
            values = np.asarray(stored)
        if self.check is not None and chunk not in self._checked:
            self.check(chunk, values)
            self._checked.add(chunk)
        if len(inside) < len(values):
            values = values[inside]
        if self.prepared is None:
            values = np.ascontiguousarray(self.prepare(values), dtype=self.dtype)
        return values, inside + low

    def mapped(
        self, function: Callable[[Floats32], AnyFloats], dtype: type[np.floating] = np.float32
    ) -> Profiles:
        """Return the profiles with a further function applied to them."""
        prepare = self.prepare
        return Profiles(
            self.intensity,
            self.rows_per_chunk,
            lambda values: np.asarray(function(prepare(values)), dtype=dtype),
            dtype=dtype,
            check=self.check,
        )


def profiles_of(dataset: xr.Dataset, prepare: Callable[[Floats32], Floats32]) -> Profiles:
    """Return the profiles of an opened snapshot (or of any data set with ``intensity``).

    Each chunk of a whole snapshot is compared with its stored hash when it is first read, so that
    nothing is computed from damaged profiles: a `StoreError` is raised then.
    """
    intensity = dataset["intensity"]
    chunks = intensity.encoding.get("chunks") or intensity.encoding.get("preferred_chunks")
    rows = chunks[intensity.dims.index("sample")] if isinstance(chunks, tuple) else 512
    blocks = dataset.sizes.get("block")  # of a selection of samples more than it has chunks
    check = None
    if blocks == -(-len(intensity) // rows) and dataset.attrs.get("rows_per_chunk") == rows:
        check = partial(check_block, dataset, schema.samples_of(dataset))
    return Profiles(intensity, int(rows), prepare, check=check)


@dataclass(frozen=True)
class Joined(Profiles):
    """The profiles of several data sets, in sequence; see :func:`joined`."""

    parts: tuple[Profiles, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @cached_property
    def bounds(self) -> Indices:
        """First row of each chunk, and the number of rows."""
        bounds, n = [], 0
        for part in self.parts:
            bounds.append(part.bounds[:-1] + n)
            n += len(part)
        return np.append(np.concatenate(bounds), n)

    def read(self, chunk: int, selected: Mask) -> tuple[Floats32, Indices]:
        """Return the prepared profiles of a chunk's selected samples, and their row numbers."""
        row = 0
        for part in self.parts:
            chunks = len(part.bounds) - 1
            if chunk < chunks:
                break
            chunk, row = chunk - chunks, row + len(part)
        values, rows = part.read(chunk, selected[row : row + len(part)])
        return values, rows + row

    def mapped(
        self, function: Callable[[Floats32], AnyFloats], dtype: type[np.floating] = np.float32
    ) -> Profiles:
        """Return the profiles with a further function applied to them."""
        return joined([part.mapped(function, dtype) for part in self.parts])


def joined(parts: Sequence[Profiles]) -> Profiles:
    """Return the profiles of several data sets, in sequence."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    of_first = (first.intensity, first.rows_per_chunk, first.prepare)
    return Joined(*of_first, dtype=first.dtype, parts=tuple(parts))


@dataclass(frozen=True)
class Batch:
    """Samples: prepared profiles of shape (n, points), and row numbers of shape (n,)."""

    profiles: Floats32
    rows: Indices


def in_order(profiles: Profiles, selected: Mask, *, workers: int = 1) -> Iterator[Batch]:
    """Yield the selected samples (n,) chunk by chunk, in stored order; others are not read.

    That many ``workers`` read and prepare chunks ahead.
    """

    def read(chunk: int) -> Batch:
        return Batch(*profiles.read(chunk, selected))

    chunks = profiles.chunks_with(selected).tolist()
    with prefetched(read, chunks, depth=workers + 1, workers=workers) as batches:
        yield from batches


@dataclass(frozen=True)
class BatchSettings:
    """Size of batches and epochs.

    By default an epoch has the selected samples once; a last batch may be smaller. With balance the
    number of ``samples`` is rounded up to whole batches. No more buffers are read than needed; if
    fewer samples are selected, their chunks are repeated in another order.
    """

    batch_size: int
    buffer_chunks: int = 32  # in the shuffle buffer
    samples: int | None = None


@dataclass(frozen=True, eq=False)
class Balance:
    """Composition of each batch by phase.

    Within a buffer the samples of a phase are drawn without replacement until all were used, then
    again: samples of a rare phase are repeated, some of a common one left out. The number of
    batches of an epoch does not change.
    """

    phase: Integers  # (n,), of each sample
    shares: Sequence[float]  # of each phase in a batch, on any scale


def shuffled(
    profiles: Profiles,
    selected: Mask,
    settings: BatchSettings,
    generator: np.random.Generator,
    balance: Balance | None = None,
) -> Generator[Batch]:
    """Yield one epoch of shuffled batches of the selected samples (n,).

    Chunks are read in random order, several at a time into a buffer, while the previous buffer is
    in use; batches are drawn from all samples of a buffer. At most two buffers are in memory,
    whatever the size of the data set. All random numbers are drawn in the caller's thread, so that
    they do not depend on timing. Raises `BatchError` if nothing is selected, or no phase with a
    share has samples.
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
    size = settings.batch_size

    def read(group: Indices) -> _Buffer:
        return _read_together(profiles, group, selected)

    with prefetched(read, groups, depth=1) as buffers:
        if balance is None:
            batches = _complete(buffers, size, generator)
        else:
            remaining = -(-remaining // size) * size
            batches = _balanced(buffers, size, generator, balance)
        for batch in batches:
            yield Batch(batch.profiles[:remaining], batch.rows[:remaining])
            remaining -= len(batch.rows)
            if remaining <= 0:
                return


@dataclass(frozen=True)
class _Buffer:
    """Samples to draw from: profiles, the index of each sample in them, and its row number."""

    profiles: Floats32
    index: Indices
    rows: Indices

    def take(self, chosen: Indices) -> Batch:
        return Batch(np.take(self.profiles, self.index[chosen], axis=0), self.rows[chosen])


def _read_together(profiles: Profiles, chunks: Indices, selected: Mask) -> _Buffer:
    if profiles.prepared is not None:
        # Nothing is copied, but every page is read here, in the background, if it is not yet.
        parts = []
        for low, high in zip(profiles.bounds[chunks], profiles.bounds[chunks + 1], strict=True):
            profiles.prepared[low:high].reshape(-1)[::1024].sum()
            parts.append(np.flatnonzero(selected[low:high]) + low)
        rows = np.concatenate(parts)
        return _Buffer(profiles.prepared, rows, rows)
    count = profiles.count(chunks, selected)
    row_numbers = np.empty(count, dtype=np.intp)
    together = np.empty((0, 0), dtype=np.float32)
    filled = 0
    for chunk in chunks.tolist():
        values, rows = profiles.read(chunk, selected)
        if not filled:
            # Filled in place: concatenating the parts afterwards would take twice the memory.
            together = np.empty((count, values.shape[1]), dtype=np.float32)
        together[filled : filled + len(rows)] = values
        row_numbers[filled : filled + len(rows)] = rows
        filled += len(rows)
    return _Buffer(together, np.arange(count), row_numbers)


def _complete(
    buffers: Iterable[_Buffer], batch_size: int, generator: np.random.Generator
) -> Iterator[Batch]:
    """Yield every sample once; what is left of a buffer begins the first batch of the next."""
    rest: Batch | None = None
    for buffer in buffers:
        order = generator.permutation(len(buffer.rows))
        first = batch_size - (0 if rest is None else len(rest.rows))
        for chosen in np.split(order, range(first, len(order), batch_size)):
            batch = buffer.take(chosen)
            if rest is not None:
                batch = Batch(
                    np.concatenate([rest.profiles, batch.profiles]),
                    np.concatenate([rest.rows, batch.rows]),
                )
            rest = batch if len(batch.rows) < batch_size else None
            if rest is None:
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
        orders = []
        for rows, count in zip(rows_by_phase, counts, strict=True):
            turns = -(-batches * count // max(len(rows), 1))
            permutations = [generator.permutation(rows) for _ in range(turns)]
            orders.append(np.concatenate([rows[:0], *permutations]))
        for number in range(batches):
            chosen = [
                order[number * n : (number + 1) * n]
                for order, n in zip(orders, counts, strict=True)
            ]
            yield buffer.take(np.concatenate(chosen))


def _largest_remainder(shares: Array, total: int) -> list[int]:
    exact = shares * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return [int(count) for count in counts]
