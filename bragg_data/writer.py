"""Writing a data set into the store: blocks by many workers, commits by one.

The unit of work is a block: the samples of one chunk of the intensities. Workers write their
block's chunk through a fork of the session, and nothing else. One committer, under a lock, merges
the forks and writes what became of their samples in the same commit. Whatever dies, the store says
exactly what is in it, and the rest is still to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import zarr
from filelock import Timeout
from icechunk.session import ForkSession, Session
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from bragg_data import schema
from bragg_data.campaign import Campaign, Samples
from bragg_data.store import Store, StoreError, Tag, errors_told, open_dataset

# The low bits of a pattern are noise to any compressor: zstd takes twice the time for 3 % less.
_COMPRESSOR = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")


@dataclass(frozen=True)
class BlockResult:
    """What became of one block.

    Attributes
    ----------
    block
        Its number.
    status : shape (n,), int8
        Of each sample: done, failed, or pending (it was well, but another one failed).
    fork
        Holds the written chunk; None unless all samples are done.
    sha256
        Digest of labels and intensities (:func:`bragg_data.schema.block_digest`).
    reason
        Why it failed.
    final
        Whether trying it again makes no sense.
    """

    block: int
    status: NDArray[np.int8]
    fork: ForkSession | None = None
    sha256: bytes = b""
    reason: str = ""
    final: bool = False


class Writer:
    """A data set that is being written: the one committer, holding the data set's lock.

    A context manager. On the first run it creates the data set; on the next ones it takes up what
    is there.

    Parameters
    ----------
    store
        Where.
    campaign, simulator, version, limit
        What; see :meth:`bragg_data.campaign.Campaign.identity`.
    code_commit
        Commit of the code that runs. If it is not the first run's, both are recorded.
    call_path
        How GSAS-II is called, if it is; recorded in the same way.

    Raises
    ------
    StoreError
        On entering, if another process is writing the same data set.
    """

    def __init__(
        self,
        store: Store,
        campaign: Campaign,
        simulator: str,
        version: str,
        *,
        limit: int | None = None,
        code_commit: str = "unknown",
        call_path: str = "",
    ) -> None:
        self.store = store
        self.campaign = campaign
        self.samples = campaign.samples[slice(limit)]
        self.identity = campaign.identity(simulator, version, limit)
        self.group = campaign.name
        self.branch = f"{campaign.name}-{self.identity[:12]}"
        self.failures: dict[int, str] = {}
        self._session: Session | None = None  # a clean one, to fork from
        self._simulator, self._version, self._code_commit = simulator, version, code_commit
        self._how = {"code_commit": code_commit} | ({"call_path": call_path} if call_path else {})

    def __enter__(self) -> Self:
        with errors_told(f"locking the data set in {self.store.uri}"):
            self._lock = self.store.lock(self.branch)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise StoreError(
                    f"Another process is writing this data set (branch {self.branch} of "
                    f"{self.store.uri}). Wait until it ends, then run the same command again."
                ) from error
        try:
            with errors_told(f"creating the data set in {self.store.uri}"):
                with self.store.committing():
                    self._create()
                self._resume()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()

    def _create(self) -> None:
        repository = self.store.repository
        if self.branch not in repository.list_branches():
            # main is never committed to, so that each branch begins empty.
            repository.create_branch(self.branch, repository.lookup_branch("main"))
        session = repository.writable_session(self.branch)
        if self.group in zarr.open_group(session.store, mode="a"):
            return
        rows = self.campaign.rows_per_chunk(self._simulator)
        n, points = len(self.samples), self.campaign.grid.points
        dataset = schema.labelled(
            self.campaign, self.samples, self._simulator, self._version, self._code_commit
        ).assign_attrs(identity=self.identity, rows_per_chunk=rows)
        empty = {
            "status": np.full(n, schema.PENDING, np.int8),
            "block_sha256": np.zeros((-(-n // rows), schema.DIGEST_BYTES), np.uint8),
        }
        for name, values in empty.items():
            spec = schema.BOOKKEEPING[name]
            dataset[name] = (spec.dims, values, dict(spec.attrs))
        # One chunk for each label, so that a query reads few and small files.
        encoding = {
            name: {"chunks": variable.shape, "compressors": (_COMPRESSOR,), "_FillValue": None}
            for name, variable in dataset.variables.items()
        }
        dataset.to_zarr(session.store, group=self.group, consolidated=False, encoding=encoding)
        zarr.open_group(session.store, path=self.group).create_array(
            "intensity",
            shape=(n, points),
            chunks=(rows, points),
            dtype=schema.INTENSITY.dtype,
            fill_value=np.nan,
            compressors=_COMPRESSOR,
            dimension_names=schema.INTENSITY.dims,
            attributes=dict(schema.INTENSITY.attrs),
        )
        session.commit(f"create {self.group}: {n} samples, {self._simulator} {self._version}")

    def _resume(self) -> None:
        session = self.store.repository.readonly_session(branch=self.branch)
        dataset = open_dataset(session, self.group)
        attrs = dataset.attrs
        stored = schema.samples_of(dataset)
        if attrs["identity"] != self.identity or not (
            np.array_equal(stored.cells, self.samples.cells)
            and np.array_equal(stored.phase, self.samples.phase)
        ):
            raise StoreError(
                f"The cells on branch {self.branch} of {self.store.uri} are not those that this "
                f"installation draws for the same campaign. Use the package versions that began "
                f"it, or another store."
            )
        self.rows_per_chunk = int(attrs["rows_per_chunk"])
        self._status = dataset.status.values
        self._digests = dataset.block_sha256.values
        self.failures = {int(b): reason for b, reason in attrs.get("failures", {}).items()}
        self._how = {
            name: " ".join(dict.fromkeys([*attrs.get(name, "").split(), now]))
            for name, now in self._how.items()
        }

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the data set."""
        return len(self._digests)

    @property
    def n_done(self) -> int:
        """Number of samples that are committed."""
        return int((self._status == schema.DONE).sum())

    def rows(self, block: int) -> slice:
        """Return the samples of a block."""
        start = block * self.rows_per_chunk
        return slice(start, min(start + self.rows_per_chunk, len(self.samples)))

    def missing(self) -> list[int]:
        """Return the blocks that are still to be simulated, those that failed before at the end."""
        starts = np.arange(self.n_blocks) * self.rows_per_chunk
        undone = np.logical_or.reduceat(self._status != schema.DONE, starts)
        return sorted((int(b) for b in np.flatnonzero(undone)), key=self.failures.__contains__)

    def fork(self) -> ForkSession:
        """Return a fork for a worker. It may outlive commits of other blocks."""
        with errors_told(f"opening the data set in {self.store.uri}"):
            if self._session is None:
                self._session = self.store.repository.writable_session(self.branch)
            return self._session.fork()

    def commit(self, results: Sequence[BlockResult]) -> None:
        """Commit the results of some blocks: chunks, status, digests and reasons together.

        Raises
        ------
        StoreError, DiskFullError
            If that fails; the store is then as it was before.
        """
        if not results:
            return
        for result in results:
            self._status[self.rows(result.block)] = result.status
            if result.fork is None:
                self.failures[result.block] = result.reason
            else:
                self._digests[result.block] = np.frombuffer(result.sha256, np.uint8)
                self.failures.pop(result.block, None)
        with errors_told(f"committing to {self.store.uri}"), self.store.committing():
            session = self.store.repository.writable_session(self.branch)
            session.merge(*(result.fork for result in results if result.fork is not None))
            group = zarr.open_group(session.store, path=self.group, mode="r+")
            _array(group, "status")[:] = self._status
            _array(group, "block_sha256")[:] = self._digests
            attrs = dict(group.attrs) | self._how
            attrs.pop("failures", None)
            if self.failures:
                attrs["failures"] = {str(block): self.failures[block] for block in self.failures}
            group.attrs.put(attrs)
            session.commit(f"{self.n_done} of {len(self.samples)} samples")
        self._session = None

    def finish(self, tag: str | None = None) -> Tag:
        """Validate the complete data set and tag it.

        Parameters
        ----------
        tag
            Name of the tag; the next free NAME-vN by default.

        Raises
        ------
        bragg_data.schema.SchemaError
            If something is missing or wrong; then nothing is tagged.
        StoreError
            If the tag exists.
        """
        repository = self.store.repository
        with errors_told(f"tagging in {self.store.uri}"), self.store.committing():
            session = repository.writable_session(self.branch)
            group = zarr.open_group(session.store, path=self.group, mode="r+")
            known = group.attrs.get("content_hash")
            group.attrs["content_hash"] = schema.content_hash(self.identity, self._digests)
            schema.validate(open_dataset(session, self.group))
            name = tag or self.store.next_tag(self.campaign.name)
            self.store.check_new_tag(name)
            if known == group.attrs["content_hash"]:
                # A run before this one died between its last commit and the tag.
                snapshot = repository.lookup_branch(self.branch)
            else:
                snapshot = session.commit(f"finish {self.group}: {len(self.samples)} samples")
            repository.create_tag(name, snapshot)
        return next(made for made in self.store.tags() if made.name == name)


def write_block(
    fork: ForkSession, group: str, block: int, samples: Samples, intensity: NDArray[np.float32]
) -> BlockResult:
    """Write one block through a fork; this is what workers do.

    Parameters
    ----------
    fork
        From :meth:`Writer.fork`; it is returned in the result, to be committed there.
    group
        :attr:`Writer.group`.
    block
        Its number.
    samples
        Its n samples.
    intensity : shape (n, points), float32
        Their patterns. If a pattern is not finite its sample has failed, and nothing is written.

    Raises
    ------
    DiskFullError
        If there is no room: the other blocks would find none either.
    StoreError
        If the chunk cannot be written for another reason.
    """
    bad = ~np.isfinite(intensity).all(axis=1)
    if bad.any():
        status = np.where(bad, schema.FAILED, schema.PENDING).astype(np.int8)
        cell = ", ".join(f"{value:g}" for value in samples.cells[int(np.flatnonzero(bad)[0])])
        reason = f"{bad.sum()} patterns are not finite, the first one that of cell ({cell})."
        return BlockResult(block, status, reason=reason)
    with errors_told(f"writing block {block}"):
        array = _array(zarr.open_group(fork.store, path=group, mode="r+"), "intensity")
        rows = array.chunks[0]
        start = block * rows
        stop = min(start + rows, array.shape[0])
        # Two forks that write parts of one chunk would silently lose rows.
        if intensity.shape != (stop - start, array.shape[1]):
            raise StoreError(
                f"Block {block} has shape {intensity.shape}; a block is one chunk, here of shape "
                f"{(stop - start, array.shape[1])}."
            )
        array[start:stop] = intensity
    status = np.full(len(samples), schema.DONE, np.int8)
    return BlockResult(block, status, fork, schema.block_digest(samples, intensity))


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    return cast("zarr.Array[Any]", group[name])
