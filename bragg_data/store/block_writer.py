"""Writing an array into the store block by block: many workers write, one process commits.

A block is the samples of one chunk. Workers write their chunk through a fork of the session. A
single committer, under a lock, merges the forks and writes the status of their samples in the same
commit: whatever dies, the store records exactly which samples it holds.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np
import xarray as xr
import zarr
from icechunk.session import ForkSession, Session
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from bragg_data.arrays import Integers8
from bragg_data.errors import first_line
from bragg_data.store import schema
from bragg_data.store.reading import RESTORE
from bragg_data.store.repository import (
    PART,
    Snapshot,
    Store,
    StoreError,
    open_dataset,
    storage_errors,
)

# The low bits of a pattern are noise to any compressor: zstd takes twice the time for 3 % less.
# The checksum makes a changed byte an error for whoever reads it; no compressor here has its own.
COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec())


@dataclass(frozen=True)
class BlockResult:
    """The result of one block."""

    block: int
    status: Integers8  # (n,): done; failed, or pending where another sample failed
    fork: ForkSession | None = None  # holds the written chunk; None unless all are done
    sha256: bytes = b""  # of the chunk
    reason: str = ""  # why the block failed
    final: bool = False  # another attempt is useless
    copied: Mapping[Snapshot, int] = field(default_factory=dict)  # samples from other data sets


class BlockWriter(ABC):
    """A group of the store that is being written: the one committer, holding the group's lock.

    A context manager. On the first run it creates the group; on the next ones it resumes it. It
    shares ``shared_lock`` with others. The group has ``status`` (sample) and ``block_sha256``
    (block, digest_byte) next to the array.
    ``provenance`` are attributes of this run, such as the code's commit; if they differ from those
    of earlier runs, all are recorded. The attribute ``reused_from`` is a JSON list of the snapshots
    from which samples were copied, and of how many; ``copied`` has those of this run. Entering
    raises `StoreError` if another process writes it.
    """

    array: str  # name of the one that is written block by block
    remedy = RESTORE  # sentence of what to do where the group cannot be read

    def __init__(
        self,
        store: Store,
        branch: str,
        group: str,
        count: int,
        *,
        lock: str,
        shared_lock: str = "",
        provenance: dict[str, str],
    ) -> None:
        self.store, self.branch, self.group, self.count = store, branch, group, count
        self.failures: dict[int, str] = {}
        self.copied: Counter[Snapshot] = Counter()
        self._session: Session | None = None  # a clean one, to fork from
        self._provenance, self._lock, self._shared_lock = provenance, lock, shared_lock

    def __enter__(self) -> Self:
        with ExitStack() as held:
            with storage_errors(f"locking {self.group} in {self.store.uri}"):
                what = f"this data set ({self.group} on branch {self.branch})"
                if self._shared_lock:
                    held.enter_context(self.store.locked(self._shared_lock, what, shared=True))
                held.enter_context(self.store.locked(self._lock, what))
            with storage_errors(f"creating {self.group} in {self.store.uri}"):
                self.store.committed(self._create)
                self._resume()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @abstractmethod
    def _create(self) -> None:
        """Create the branch and the group, if they do not exist; within `Store.committed`."""

    @abstractmethod
    def _check(self, dataset: xr.Dataset) -> None:
        """Refuse an existing group if it is not the one to be written."""

    def _resume(self) -> None:
        session = self.store.repository.readonly_session(branch=self.branch)
        dataset = open_dataset(session, self.group, self.remedy)
        self._check(dataset)
        attrs = dataset.attrs
        self.rows_per_chunk = int(attrs["rows_per_chunk"])
        self._status = dataset.status.values
        self._digests = dataset.block_sha256.values
        self.failures = {int(b): reason for b, reason in attrs.get("failures", {}).items()}
        self._provenance = {
            name: " ".join(dict.fromkeys([*attrs.get(name, "").split(), value]))
            for name, value in self._provenance.items()
        }

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the group."""
        return len(self._digests)

    @property
    def n_done(self) -> int:
        """Number of samples that are committed."""
        return int((self._status == schema.DONE).sum())

    def rows(self, block: int) -> slice:
        """Return the samples of a block."""
        start = block * self.rows_per_chunk
        return slice(start, min(start + self.rows_per_chunk, self.count))

    def missing(self) -> list[int]:
        """Return the blocks that are still to be done, those that failed before at the end."""
        starts = np.arange(self.n_blocks) * self.rows_per_chunk
        undone = np.logical_or.reduceat(self._status != schema.DONE, starts)
        return sorted((int(b) for b in np.flatnonzero(undone)), key=self.failures.__contains__)

    @abstractmethod
    def _digest(self, block: int, values: NDArray[Any], /) -> bytes:
        """Return the SHA-256 of a block, from the values (n, m) of the array."""

    def recheck(self, on_block: Callable[[int], object] = lambda _: None) -> list[int]:
        """Read the blocks that are done, and return those that are not what was written.

        They are missing from now on, as if they had never been written. ``on_block`` is called
        with the number of samples of each block that is read.
        """
        session = self.store.repository.readonly_session(branch=self.branch)
        damaged = []
        for block in sorted(set(range(self.n_blocks)) - set(self.missing())):
            rows = self.rows(block)
            try:
                with storage_errors(f"reading block {block}"):
                    group = zarr.open_group(session.store, path=self.group, mode="r")
                    array = array_of(group, self.array)
                    digest = self._digest(block, np.asarray(array[rows]))
            except StoreError:
                digest = b""
            if digest != self._digests[block].tobytes():
                damaged.append(block)
                self._status[rows] = schema.PENDING
            on_block(rows.stop - rows.start)
        return damaged

    def fork(self) -> ForkSession:
        """Return a fork for a worker. It may outlive commits of other blocks."""
        with storage_errors(f"opening {self.group} in {self.store.uri}"):
            if self._session is None:
                self._session = self.store.repository.writable_session(self.branch)
            return self._session.fork()

    def commit(self, results: Sequence[BlockResult]) -> None:
        """Commit the results of some blocks: chunks, status, digests and reasons together.

        Raises `StoreError` or `DiskFullError` if that fails; the store is then as it was before.
        """
        if not results:
            return
        with storage_errors(f"committing to {self.store.uri}"):
            self.store.committed(lambda: self._commit(results))
        # After a commit that fails this object still describes the store.
        self._enter(results, self._status, self._digests, self.failures)
        self.copied += _copied(results)
        self._session = None

    def _enter(
        self,
        results: Sequence[BlockResult],
        status: Integers8,
        digests: NDArray[np.uint8],
        failures: dict[int, str],
    ) -> None:
        """Enter results into the status and the digests of all blocks."""
        for result in results:
            status[self.rows(result.block)] = result.status
            if result.fork is None:
                failures[result.block] = result.reason
            else:
                digests[result.block] = np.frombuffer(result.sha256, np.uint8)
                failures.pop(result.block, None)

    def _commit(self, results: Sequence[BlockResult]) -> None:
        session = self.store.repository.writable_session(self.branch)
        session.merge(*(result.fork for result in results if result.fork is not None))
        group = zarr.open_group(session.store, path=self.group, mode="r+")
        # As they are now: in object storage another process may write the same data set. Only of
        # these blocks and those between: few parts of the arrays are written again.
        status, digests = array_of(group, "status"), array_of(group, "block_sha256")
        numbers = [result.block for result in results]
        blocks = slice(min(numbers), max(numbers) + 1)
        rows = slice(self.rows(min(numbers)).start, self.rows(max(numbers)).stop)
        new_status, new_digests = self._status.copy(), self._digests.copy()
        new_status[rows], new_digests[blocks] = status[rows], digests[blocks]
        attrs: dict[str, Any] = dict(group.attrs) | self._provenance
        failures = {int(b): reason for b, reason in attrs.pop("failures", {}).items()}
        self._enter(results, new_status, new_digests, failures)
        status[rows], digests[blocks] = new_status[rows], new_digests[blocks]
        if failures:
            attrs["failures"] = {str(block): reason for block, reason in failures.items()}
        if copied := _copied(results):
            attrs["reused_from"] = _lineage(str(attrs.get("reused_from", "[]")), copied)
        group.attrs.put(attrs)
        n_done = int((new_status == schema.DONE).sum())
        session.commit(f"{n_done} of {self.count} samples of {self.group}")


def _copied(results: Sequence[BlockResult]) -> Counter[Snapshot]:
    written = (result for result in results if result.fork is not None)
    return sum((Counter(result.copied) for result in written), Counter[Snapshot]())


def _lineage(known: str, copied: Counter[Snapshot]) -> str:
    """Add the samples that were copied to those of earlier commits."""
    entries = json.loads(known)
    counts = [entry.pop("patterns") for entry in entries]
    earlier = (Snapshot(**entry) for entry in entries)
    total = Counter(dict(zip(earlier, counts, strict=True))) + copied
    return json.dumps([s._asdict() | {"patterns": count} for s, count in total.items()])


def create_group(
    session: Session,
    group: str,
    dataset: xr.Dataset,
    name: str,
    shape: tuple[int, int],
    variable: schema.Variable,
) -> None:
    """Write a group's variables, the status of nothing being done, and an array still empty."""
    rows = int(dataset.attrs["rows_per_chunk"])
    digests = np.zeros((-(-shape[0] // rows), schema.DIGEST_BYTES), np.uint8)
    pending = schema.bookkeeping(np.full(shape[0], schema.PENDING, np.int8), digests)
    write_variables(session, group, dataset.assign(pending))
    zarr.open_group(session.store, path=group).create_array(
        name,
        shape=shape,
        chunks=(rows, shape[1]),
        dtype=variable.dtype,
        fill_value=np.nan,
        compressors=COMPRESSORS,
        dimension_names=variable.dims,
        attributes=dict(variable.attrs),
    )


def extend_group(session: Session, group: str, dataset: xr.Dataset, name: str) -> None:
    """Make a complete group longer: ``dataset`` is what :func:`create_group` takes, of all samples.

    Chunks are kept as they are and so shared with the snapshot that the session began with; of the
    last block, if it was not full, all samples are pending again. Its array ``name`` is as long.
    """
    opened = zarr.open_group(session.store, path=group, mode="r+")
    status, rows = array_of(opened, "status"), int(dataset.attrs["rows_per_chunk"])
    n_before, n = status.shape[0], dataset.sizes["sample"]
    for label, variable in dataset.variables.items():
        if variable.dims[:1] == ("sample",):
            array = array_of(opened, str(label))
            array.resize((n, *array.shape[1:]))
            array[n_before:] = variable.values[n_before:]
    n_full = n_before // rows
    for other, size in ((name, n), ("status", n), ("block_sha256", -(-n // rows))):
        array = array_of(opened, other)
        array.resize((size, *array.shape[1:]))
    array_of(opened, "block_sha256")[n_full:] = 0
    array_of(opened, "status")[n_full * rows :] = schema.PENDING
    of_parent = {k: v for k, v in opened.attrs.items() if k not in ("content_hash", "failures")}
    opened.attrs.put(of_parent | dict(dataset.attrs))


def write_variables(session: Session, group: str, dataset: xr.Dataset) -> None:
    """Write a group, with its profiles in chunks of its attribute ``rows_per_chunk``.

    Each other variable becomes one chunk, so that a query reads few and small files, but for those
    that every commit changes.
    """
    rows = int(dataset.attrs["rows_per_chunk"])
    at_most = {"status": PART * rows, "block_sha256": PART}
    encoding = {}
    for name, v in dataset.variables.items():
        chunks = (rows, *v.shape[1:]) if v.dims == ("sample", "tof") else v.shape
        if name in at_most:
            chunks = (min(at_most[str(name)], v.shape[0]), *v.shape[1:])
        encoding[name] = {"chunks": chunks, "compressors": COMPRESSORS, "_FillValue": None}
    dataset.to_zarr(session.store, group=group, consolidated=False, encoding=encoding)


def write_chunk(fork: ForkSession, group: str, name: str, block: int, values: NDArray[Any]) -> None:
    """Write one chunk of an array, its ``values`` (n, m), through a fork.

    Raises `DiskFullError` if there is no room: the other blocks would find none either; and
    `StoreError` if the chunk has another shape, or cannot be written for another reason.
    """
    with storage_errors(f"writing block {block}"):
        array = array_of(zarr.open_group(fork.store, path=group, mode="r+"), name)
        rows = array.chunks[0]
        start = block * rows
        chunk = min(rows, array.shape[0] - start), array.shape[1]
        # Two forks that write parts of one chunk would silently lose rows.
        if values.shape != chunk:
            raise StoreError(f"Block {block} is {values.shape}; a block is one chunk, {chunk}.")
        array[start : start + rows] = values


def failed_block(block: int, count: int, error: Exception) -> BlockResult:
    """Return the result of a block of some samples that an error stopped."""
    status = np.full(count, schema.FAILED, np.int8)
    return BlockResult(block, status, reason=f"{type(error).__name__}: {first_line(error)}")


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array of a group."""
    return cast("zarr.Array[Any]", group[name])
