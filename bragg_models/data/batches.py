"""Profiles of a snapshot as batches: whole chunks read in the background, shuffled, balanced.

Reading and preparing costs a fast network a part of its processors, in every epoch again. A
:func:`cached` copy of the prepared profiles is mapped into memory instead of read.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

Item = TypeVar("Item")


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
        Reading anything but whole chunks decompresses the same chunk again and again.
    prepare
        What is done to the profiles of each chunk, shape (n, points) to (n, m).
    prepared : shape (n, m)
        All of them prepared, if they lie in memory or are mapped into it: read instead.
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

    def chunks_with(self, wanted: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the numbers of the chunks that hold a wanted sample, in stored order."""
        return np.unique(np.flatnonzero(wanted) // self.rows_per_chunk)

    def count(self, chunks: NDArray[np.intp], wanted: NDArray[np.bool_]) -> int:
        """Return how many wanted samples some chunks hold."""
        rows = self.rows_per_chunk
        return sum(int(wanted[c * rows : (c + 1) * rows].sum()) for c in chunks)

    def read(
        self, chunk: int, wanted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Return the prepared profiles of a chunk's wanted samples, and their row numbers."""
        low = chunk * self.rows_per_chunk
        rows = slice(low, low + self.rows_per_chunk)
        inside = np.flatnonzero(wanted[rows])
        if self.prepared is not None:
            values = self.prepared[rows]
            return values if len(inside) == len(values) else values[inside], inside + low
        values = self.intensity.isel(sample=rows).values
        if len(inside) < len(values):
            values = values[inside]
        return np.ascontiguousarray(self.prepare(values), dtype=np.float32), inside + low

    def mapped(self, function: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> Profiles:
        """Return the profiles with one more thing done to them."""
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
    """The profiles of several data sets, one after the other; see :func:`joined`."""

    parts: tuple[Profiles, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def chunks_with(self, wanted: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the numbers of the chunks that hold a wanted sample, in stored order."""
        return np.concatenate(
            [first + p.chunks_with(wanted[rows]) for p, first, rows in self._places()]
        )

    def count(self, chunks: NDArray[np.intp], wanted: NDArray[np.bool_]) -> int:
        """Return how many wanted samples some chunks hold."""
        return sum(
            p.count(chunks[(chunks >= first) & (chunks < first + p.chunks)] - first, wanted[rows])
            for p, first, rows in self._places()
        )

    def read(
        self, chunk: int, wanted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Return the prepared profiles of a chunk's wanted samples, and their row numbers."""
        part, first, rows = next(p for p in self._places() if chunk < p[1] + p[0].chunks)
        values, own = part.read(chunk - first, wanted[rows])
        return values, own + rows.start

    def mapped(self, function: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> Profiles:
        """Return the profiles with one more thing done to them."""
        return joined([part.mapped(function) for part in self.parts])

    def _places(self) -> Iterator[tuple[Profiles, int, slice]]:
        """Yield each part with the number of its first chunk, and its rows."""
        chunk = row = 0
        for part in self.parts:
            yield part, chunk, slice(row, row + len(part))
            chunk, row = chunk + part.chunks, row + len(part)


def joined(parts: Sequence[Profiles]) -> Profiles:
    """Return the profiles of several data sets, one after the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Joined(first.intensity, first.rows_per_chunk, first.prepare, None, tuple(parts))


@dataclass(frozen=True)
class Batch:
    """Some samples: prepared profiles of shape (n, points), and row numbers of shape (n,)."""

    profiles: NDArray[np.float32]
    rows: NDArray[np.intp]


def in_order(profiles: Profiles, wanted: NDArray[np.bool_]) -> Iterator[Batch]:
    """Yield the wanted samples chunk by chunk, in stored order.

    Parameters
    ----------
    profiles
        What is read.
    wanted : shape (n,)
        Which samples; chunks without any are not read.
    """
    chunks = profiles.chunks_with(wanted)
    with prefetched((Batch(*profiles.read(int(c), wanted)) for c in chunks), depth=2) as items:
        yield from items


def shuffled(
    profiles: Profiles,
    wanted: NDArray[np.bool_],
    batch_size: int,
    generator: np.random.Generator,
    *,
    phase: NDArray[np.integer] | None = None,
    shares: Sequence[float] | None = None,
    buffer_chunks: int = 32,
    samples: int | None = None,
) -> Generator[Batch]:
    """Yield one epoch of shuffled batches.

    Chunks are read in random order, some at a time into a buffer, while the buffer before is in
    use; batches are drawn from all samples of the buffer. At most two buffers are in memory,
    whatever the size of the data set. All draws are made in the caller's thread, so that they do
    not depend on timing.

    Parameters
    ----------
    profiles
        What is read.
    wanted : shape (n,)
        Which samples to train on.
    batch_size
        Samples per batch. Without ``shares`` the last batch may be smaller.
    generator
        Source of all random draws.
    phase : shape (n,)
        Phase of each sample; needed with ``shares``.
    shares : length n_phases
        Composition of each batch by phase. Within a buffer the samples of a phase are drawn
        without replacement until all had their turn, then again: a rare phase repeats, of a common
        one some are left out, and the epoch has as many batches as without. Without shares every
        wanted sample comes exactly once.
    buffer_chunks
        Chunks per buffer.
    samples
        How many the epoch has, if not as many as are wanted; with ``shares`` rounded up to whole
        batches. No more buffers are read than that takes; if the wanted samples are fewer, their
        chunks come again in another order.

    Raises
    ------
    BatchError
        If nothing is wanted, or no phase with a share has samples.
    """
    chunks = generator.permutation(profiles.chunks_with(wanted))
    if not len(chunks):
        raise BatchError("There is no sample to train on. Choose a larger part of the data set.")
    present = int(wanted.sum())
    left = present if samples is None else samples
    turns = [chunks]
    turns += [generator.permutation(chunks) for _ in range(-(-left // present) - 1)]
    groups = [
        turn[low : low + buffer_chunks]
        for turn in turns
        for low in range(0, len(turn), buffer_chunks)
    ]
    enough = np.cumsum([profiles.count(group, wanted) for group in groups]) >= left
    groups = groups[: int(enough.argmax()) + 1]
    buffers = (_read_together(profiles, group, wanted) for group in groups)
    with prefetched(buffers, depth=1) as items:
        if shares is None:
            batches = _complete(items, batch_size, generator)
        else:
            if phase is None:
                raise BatchError("Balanced batches need the phase of each sample.")
            left = -(-left // batch_size) * batch_size
            batches = _balanced(items, batch_size, generator, phase, np.asarray(shares, float))
        for batch in batches:
            yield (
                batch
                if len(batch.rows) <= left
                else Batch(batch.profiles[:left], batch.rows[:left])
            )
            left -= len(batch.rows)
            if left <= 0:
                return


@dataclass(frozen=True)
class _Buffer:
    """Samples to draw from: profiles, where in them each sample is, and its row number."""

    profiles: NDArray[np.float32]
    at: NDArray[np.intp] | None
    rows: NDArray[np.intp]

    def take(self, some: NDArray[np.intp]) -> Batch:
        at = some if self.at is None else self.at[some]
        return Batch(np.take(self.profiles, at, axis=0), self.rows[some])


def _read_together(
    profiles: Profiles, chunks: NDArray[np.intp], wanted: NDArray[np.bool_]
) -> _Buffer:
    per_chunk = profiles.rows_per_chunk
    if profiles.prepared is not None:
        # Nothing is copied, but here, in the background, every page is read if it is not yet.
        parts = []
        for chunk in chunks:
            low = chunk * per_chunk
            profiles.prepared[low : low + per_chunk].reshape(-1)[::1024].sum()
            parts.append(np.flatnonzero(wanted[low : low + per_chunk]) + low)
        rows = np.concatenate(parts)
        return _Buffer(profiles.prepared, rows, rows)
    count = profiles.count(chunks, wanted)
    together: NDArray[np.float32] | None = None
    row_numbers = np.empty(count, dtype=np.intp)
    filled = 0
    for chunk in chunks:
        values, rows = profiles.read(int(chunk), wanted)
        if together is None:
            # Filled in place: joining the parts afterwards would take twice the memory.
            together = np.empty((count, values.shape[1]), dtype=np.float32)
        together[filled : filled + len(rows)] = values
        row_numbers[filled : filled + len(rows)] = rows
        filled += len(rows)
    assert together is not None  # there is at least one chunk
    return _Buffer(together, None, row_numbers)


def _complete(
    buffers: Iterable[_Buffer], batch_size: int, generator: np.random.Generator
) -> Iterator[Batch]:
    left: Batch | None = None
    for buffer in buffers:
        order = generator.permutation(len(buffer.rows))
        start = 0
        if left is not None:
            start = batch_size - len(left.rows)
            first = buffer.take(order[:start])
            left = Batch(
                np.concatenate([left.profiles, first.profiles]),
                np.concatenate([left.rows, first.rows]),
            )
            if len(left.rows) < batch_size:
                continue
            yield left
            left = None
        for low in range(start, len(order), batch_size):
            batch = buffer.take(order[low : low + batch_size])
            if len(batch.rows) < batch_size:
                left = batch
            else:
                yield batch
    if left is not None:
        yield left


def _balanced(
    buffers: Iterable[_Buffer],
    batch_size: int,
    generator: np.random.Generator,
    phase: NDArray[np.integer],
    shares: NDArray[np.float64],
) -> Iterator[Batch]:
    owed = 1.0  # so that even less than a batch of samples makes one
    for buffer in buffers:
        of_phase = [np.flatnonzero(phase[buffer.rows] == code) for code in range(len(shares))]
        here = np.where([len(rows) > 0 for rows in of_phase], shares, 0.0)
        if not here.sum():
            raise BatchError("No sample to train on belongs to a phase that has a share.")
        counts = _largest_remainder(here / here.sum(), batch_size)
        owed += len(buffer.rows) / batch_size
        batches = max(math.ceil(owed) - 1, 0)
        owed -= batches
        turns = [
            _in_turns(rows, batches * count, generator)
            for rows, count in zip(of_phase, counts, strict=True)
        ]
        for number in range(batches):
            some = np.concatenate(
                [t[number * n : (number + 1) * n] for t, n in zip(turns, counts, strict=True)]
            )
            yield buffer.take(some)


def _in_turns(
    rows: NDArray[np.intp], count: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    if count == 0:
        return rows[:0]
    return np.concatenate([generator.permutation(rows) for _ in range(-(-count // len(rows)))])


def _largest_remainder(shares: NDArray[np.float64], total: int) -> list[int]:
    exact = shares * total
    counts = np.floor(exact).astype(int)
    most_owed = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[most_owed] += 1
    return [int(count) for count in counts]


class prefetched(Generic[Item]):  # noqa: N801 - used like a function
    """Compute the items of an iterable in a background thread, a few ahead.

    A context manager that gives an iterator. No more than ``depth`` items are computed, or being
    computed, before they are asked for. An exception of the iterable is raised where its item
    would have been. Leaving the context ends the thread.
    """

    def __init__(self, iterable: Iterable[Item], depth: int) -> None:
        self._iterable = iterable
        self._ready: queue.SimpleQueue[tuple[bool, Item | BaseException | None]]
        self._ready = queue.SimpleQueue()
        self._permits = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._consume()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._permits.release()
        self._thread.join()

    def _produce(self) -> None:
        try:
            iterator = iter(self._iterable)
            while True:
                self._permits.acquire()
                if self._stopped.is_set():
                    return
                item = next(iterator)
                self._ready.put((True, item))
                del item  # the queue alone keeps it, so that it is freed once used
        except StopIteration:
            self._ready.put((False, None))
        except BaseException as error:  # raised again in the caller's thread
            self._ready.put((False, error))

    def _consume(self) -> Iterator[Item]:
        while True:
            is_item, value = self._ready.get()
            if not is_item:
                if value is not None:
                    raise value  # type: ignore[misc]
                return
            self._permits.release()
            yield value  # type: ignore[misc]
            del value
