"""Repairing a tagged data set: damaged blocks are computed again, to the same content hash.

A damaged file of a chunk is replaced by the bytes that it had: snapshot, tag, and all that refers
to them stay as they are. Where the store's index of the chunks (a manifest) is lost, the data set
is written again, its intact blocks copied, and its tag is pointed at the new snapshot.
"""

import asyncio
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import xarray as xr
import zarr
from icechunk.session import Session
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from bragg_data.arrays import Floats32
from bragg_data.campaign import Campaign, Samples
from bragg_data.store import schema
from bragg_data.store.block_writer import array_of, create_group
from bragg_data.store.reading import RESTORE, StoreError, reason_of, storage_errors
from bragg_data.store.repository import Store, branch_name
from bragg_data.store.verification import OnBlock, read_block, verify

Simulate = Callable[[Samples], Floats32]  # the patterns (n, points) of a block's samples

_CHUNK_ID = re.compile(r"chunks?[/_](?:id=)?([0-9A-Z]{20})")


class _NotInPlaceError(Exception):
    """A chunk whose file is not known, as the manifest that names it is lost."""


@dataclass(frozen=True)
class Definition:
    """What a tagged data set is, from its snapshot alone, whatever else is damaged."""

    campaign: Campaign
    samples: Samples
    attrs: Mapping[str, Any]
    group: str

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return -(-len(self.samples) // self.rows_per_chunk)

    @property
    def rows_per_chunk(self) -> int:
        """Samples of a block."""
        return int(self.attrs["rows_per_chunk"])

    def rows(self, block: int) -> slice:
        """Return the samples of a block."""
        start = block * self.rows_per_chunk
        return slice(start, min(start + self.rows_per_chunk, len(self.samples)))

    @property
    def branch(self) -> str:
        """The branch that it was written on."""
        return branch_name(self.campaign.name, self.attrs["identity"])

    @property
    def labelled(self) -> xr.Dataset:
        """The data set without intensities, status and hashes of blocks."""
        by = self.attrs["simulator"], self.attrs["simulator_version"], self.attrs["code_commit"]
        return schema.labelled(self.campaign, self.samples, *by)


@dataclass(frozen=True)
class Repaired:
    """What was done to a data set."""

    blocks: tuple[int, ...]  # that were computed again
    arrays: tuple[str, ...]  # of labels and hashes that were written again
    rewritten: bool  # whether the data set got a new snapshot


def definition_of(store: Store, tag: str) -> Definition:
    """Return what a tagged data set is.

    Raises `StoreError` if it is unknown, holds measured profiles, or its snapshot is lost.
    """
    store.tag(tag)
    with storage_errors(f"opening snapshot '{tag}' of {store.uri}", RESTORE):
        group = store.group_of(tag)
        attrs: dict[str, Any] = dict(group.attrs)
        count = array_of(group, "status").shape[0]
    if attrs["simulator"] == "measured":
        raise StoreError(
            f"{tag} holds measured profiles, which nothing can compute again. {RESTORE}"
        )
    campaign = schema.campaign_of(xr.Dataset(attrs=attrs))
    limit = None if count == len(campaign.samples) else count
    if attrs["identity"] != campaign.identity(
        attrs["simulator"], attrs["simulator_version"], limit
    ):
        raise StoreError(
            f"The campaign of {tag} is not the one that it was simulated from. {RESTORE}"
        )
    return Definition(campaign, campaign.samples[:count], attrs, group.basename)


def repair(
    store: Store,
    tag: str,
    simulate: Simulate,
    *,
    blocks: Sequence[int] | None = None,
    on_block: OnBlock = lambda _: None,
) -> Repaired:
    """Repair a tagged data set, which has the same content hash afterwards.

    All of its blocks are read, or only those that are named. ``simulate`` is its own simulator;
    ``on_block`` is called with the number of samples of each block that was looked at. Raises
    `StoreError` if what is computed is not what was written, or the data set cannot be written.
    """
    definition = definition_of(store, tag)
    _check_blocks(definition, blocks)
    action = f"repairing {tag} of {store.uri}"
    with storage_errors(action), store.exclusive(definition.branch, tag):
        try:
            repaired = _in_place(store, tag, definition, simulate, blocks, on_block)
        except _NotInPlaceError:
            repaired = None
        if repaired is None or not _is_intact(store, tag, repaired.blocks):
            return _rewritten(store, tag, definition, simulate, lambda _: None)
    return repaired


def _is_intact(store: Store, tag: str, blocks: Sequence[int]) -> bool:
    """Read back what was repaired, as any other process would."""
    try:
        dataset = Store(store.path).open(tag)
        samples = schema.samples_of(dataset)
        for block in blocks:
            read_block(dataset, samples, block)
    except StoreError:
        return False
    return True


def _check_blocks(definition: Definition, blocks: Sequence[int] | None) -> None:
    for block in blocks or ():
        if not 0 <= block < definition.n_blocks:
            raise StoreError(f"There is no block {block}: they are 0 to {definition.n_blocks - 1}.")


def _in_place(
    store: Store,
    tag: str,
    definition: Definition,
    simulate: Simulate,
    blocks: Sequence[int] | None,
    on_block: OnBlock,
) -> Repaired:
    session = store.repository.readonly_session(tag=tag)
    chunks = _Chunks(store, session, definition.group)
    arrays = []
    for name, variable in definition.labelled.variables.items():
        if chunks.replace_if_damaged(str(name), variable.values):
            arrays.append(str(name))
    done = np.full(len(definition.samples), schema.DONE, np.int8)
    if chunks.replace_if_damaged("status", done):
        arrays.append("status")
    digests = chunks.read_all("block_sha256")
    attrs = definition.attrs
    if digests is not None:
        content = schema.content_hash(attrs["identity"], digests)
        digests = digests if content == attrs["content_hash"] else None
    repaired, known = [], []
    for block in range(definition.n_blocks) if blocks is None or digests is None else blocks:
        rows = definition.rows(block)
        samples = definition.samples[rows]
        values = chunks.read("intensity", block)
        digest = b"" if values is None else schema.block_digest(samples, values)
        if digests is None or digest != digests[block].tobytes():
            computed = simulate(samples)
            again = schema.block_digest(samples, computed)
            if digests is not None and again != digests[block].tobytes():
                raise StoreError(_other_patterns(tag, block))
            if again != digest:
                chunks.replace("intensity", block, computed)
                repaired.append(block)
            digest = again
        known.append(digest)
        on_block(rows.stop - rows.start)
    if digests is None:
        digests = np.frombuffer(b"".join(known), np.uint8).reshape(-1, schema.DIGEST_BYTES)
        if schema.content_hash(attrs["identity"], digests) != attrs["content_hash"]:
            raise StoreError(_other_patterns(tag))
        chunks.replace_if_damaged("block_sha256", digests)
        arrays.append("block_sha256")
    return Repaired(tuple(repaired), tuple(arrays), rewritten=False)


def _other_patterns(tag: str, block: int | None = None) -> str:
    which = "its blocks" if block is None else f"block {block}"
    return (
        f"{tag} cannot be repaired here: this installation computes {which} otherwise than they "
        f"were written, in the last bits at least. Use the package versions and the kind of "
        f"processor that wrote it, or restore the store from a copy."
    )


class _Chunks:
    """The chunks of a group in a snapshot, and the files that hold them."""

    def __init__(self, store: Store, session: Session, group: str) -> None:
        self._directory, self._session, self._group = store.path / "chunks", session, group

    def _get(self, key: str) -> bytes | None:
        prototype = default_buffer_prototype()
        stored = asyncio.run(self._session.store.get(f"{self._group}/{key}", prototype))
        return None if stored is None else stored.to_bytes()

    def read(self, name: str, index: int) -> NDArray[Any] | None:
        """Return the values of a chunk, without what is beyond the array; None if damaged."""
        try:
            group = zarr.open_group(self._session.store, path=self._group, mode="r")
            array = array_of(group, name)
            rows = array.chunks[0]
            with storage_errors(f"reading {name}"):
                return np.asarray(array[index * rows : (index + 1) * rows])
        except StoreError:
            return None

    def _rows(self, name: str) -> list[tuple[int, slice]]:
        """Return the number and the rows of each chunk of an array."""
        group = zarr.open_group(self._session.store, path=self._group, mode="r")
        array = array_of(group, name)
        starts = enumerate(range(0, array.shape[0], array.chunks[0]))
        return [(index, slice(start, start + array.chunks[0])) for index, start in starts]

    def read_all(self, name: str) -> NDArray[Any] | None:
        """Return the values of an array; None if a chunk is damaged."""
        parts = [self.read(name, index) for index, _ in self._rows(name)]
        intact = [part for part in parts if part is not None]
        return np.concatenate(intact) if len(intact) == len(parts) else None

    def replace_if_damaged(self, name: str, values: NDArray[Any]) -> bool:
        """Replace the chunks that do not hold an array's values; return whether there are any."""
        damaged = False
        for index, rows in self._rows(name):
            stored = self.read(name, index)
            if stored is None or not np.array_equal(stored, values[rows]):
                self.replace(name, index, values[rows])
                damaged = True
        return damaged

    def replace(self, name: str, index: int, values: NDArray[Any]) -> None:
        """Give the file of a chunk the bytes that hold these values, at once."""
        key, content = self._encoded(name, index, values)
        file = self._directory / self._file(key)
        partial = self._directory.parent / f".repair-{uuid.uuid4().hex}"
        try:
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    def _encoded(self, name: str, index: int, values: NDArray[Any]) -> tuple[str, bytes]:
        """Return the key of a chunk, and its bytes by the codecs of its array."""
        memory = MemoryStore()
        metadata = self._get(f"{name}/zarr.json")
        if metadata is None:
            raise _NotInPlaceError(name)
        prototype = default_buffer_prototype()
        asyncio.run(memory.set("zarr.json", prototype.buffer.from_bytes(metadata)))
        array = zarr.open_array(memory, mode="r+")
        rows = array.chunks[0]
        array[index * rows : index * rows + len(values)] = values
        key = array.metadata.encode_chunk_key((index, *[0] * (array.ndim - 1)))
        stored = asyncio.run(memory.get(key, prototype))
        if stored is None:  # all of it is the fill value
            raise _NotInPlaceError(name)
        return f"{name}/{key}", stored.to_bytes()

    def _file(self, key: str) -> str:
        """Return the name of the file that holds a chunk."""
        try:
            content = self._get(key)
        except icechunk.IcechunkError as error:
            match = _CHUNK_ID.search(str(error))
            if match is None:
                raise _NotInPlaceError(reason_of(error)) from error
            return match[1]
        files = (f for f in self._directory.iterdir() if f.stat().st_size == len(content or b""))
        names = [file.name for file in files if file.read_bytes() == content]
        if len(names) != 1:
            raise _NotInPlaceError(key)
        return names[0]


def rewrite(
    store: Store, tag: str, simulate: Simulate, *, on_block: OnBlock = lambda _: None
) -> Repaired:
    """Write a tagged data set again as this version does, with the same content hash.

    Intact blocks are copied, the others computed. The tag names the new snapshot afterwards, and
    nothing refers to the old one any more. Feature views of it have to be materialised again.
    """
    definition = definition_of(store, tag)
    action = f"writing {tag} of {store.uri} again"
    with storage_errors(action), store.exclusive(definition.branch, tag):
        return _rewritten(store, tag, definition, simulate, on_block)


def _rewritten(
    store: Store, tag: str, definition: Definition, simulate: Simulate, on_block: OnBlock
) -> Repaired:
    repository, temporary = store.repository, f"rewrite-{tag}"
    with store.committing():
        if temporary in repository.list_branches():  # of a process that died
            repository.delete_branch(temporary)
        repository.create_branch(temporary, repository.lookup_branch("main"))
    try:
        session = repository.writable_session(temporary)
        computed = _write_again(store, tag, definition, session, simulate, on_block)
        with store.committing():
            snapshot = session.commit(f"rewrite {definition.group}")
            _point(store.path, f"tag.{tag}", snapshot)
            if definition.branch in repository.list_branches():
                repository.reset_branch(definition.branch, snapshot)
    finally:
        with store.committing():
            repository.delete_branch(temporary)
    verify(Store(store.path).open(tag))
    return Repaired(computed, (), rewritten=True)


def _write_again(
    store: Store,
    tag: str,
    definition: Definition,
    session: Session,
    simulate: Simulate,
    on_block: OnBlock,
) -> tuple[int, ...]:
    """Write all blocks into a session; return those that were computed."""
    old = _Chunks(store, store.repository.readonly_session(tag=tag), definition.group)
    stored = old.read_all("block_sha256")
    group, n = definition.group, len(definition.samples)
    shape = n, definition.campaign.grid.points
    dataset = definition.labelled.assign_attrs(definition.attrs)
    create_group(session, group, dataset, "intensity", shape, schema.INTENSITY)
    opened = zarr.open_group(session.store, path=group, mode="r+")
    digests, computed = np.zeros((definition.n_blocks, schema.DIGEST_BYTES), np.uint8), []
    for block in range(definition.n_blocks):
        rows = definition.rows(block)
        samples = definition.samples[rows]
        values = old.read("intensity", block)
        digest = b"" if values is None else schema.block_digest(samples, values)
        if values is None or stored is None or digest != stored[block].tobytes():
            values = simulate(samples)
            digest = schema.block_digest(samples, values)
            computed.append(block)
        array_of(opened, "intensity")[rows] = values
        digests[block] = np.frombuffer(digest, np.uint8)
        on_block(rows.stop - rows.start)
    if (
        schema.content_hash(definition.attrs["identity"], digests)
        != definition.attrs["content_hash"]
    ):
        raise StoreError(_other_patterns(tag))
    array_of(opened, "block_sha256")[:] = digests
    array_of(opened, "status")[:] = schema.DONE
    return tuple(computed)


def _point(path: Path, reference: str, snapshot: str) -> None:
    """Point a tag at another snapshot, at once; Icechunk itself never changes a tag."""
    file = path / "refs" / reference / "ref.json"
    if json.loads(file.read_text(encoding="utf-8")).keys() != {"snapshot"}:
        raise StoreError(f"{file} is not a reference of this version of Icechunk. {RESTORE}")
    partial = path / f".repair-{uuid.uuid4().hex}"
    partial.write_text(json.dumps({"snapshot": snapshot}, separators=(",", ":")), encoding="utf-8")
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)
