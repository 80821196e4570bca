"""Repairing a tagged data set: damaged blocks are computed again, to the same content hash.

A damaged file of a chunk is replaced by the bytes that it had: snapshot, tag, and all that refers
to them stay as they are. Where the store's index of the chunks (a manifest) is lost, the data set
is written again, its intact blocks copied, and its tag is pointed at the new snapshot.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import icechunk
import numpy as np
import xarray as xr
import zarr
from icechunk.session import Session
from numpy.typing import NDArray

from bragg_data.arrays import Floats32
from bragg_data.campaign import Campaign, Samples
from bragg_data.store import schema
from bragg_data.store.block_writer import array_of, create_group
from bragg_data.store.chunk_files import ChunkFiles, NotInPlaceError
from bragg_data.store.reading import RESTORE, StoreError, storage_errors
from bragg_data.store.repository import REWRITE, Store, branch_name
from bragg_data.store.verification import OnBlock, read_block, verify

Simulate = Callable[[Samples], Floats32]  # the patterns (n, points) of a block's samples


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

    def samples_of(self, block: int) -> Samples:
        """Return the labels of a block."""
        return self.samples[self.rows(block)]

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
    with storage_errors(action), store.locked(definition.branch, tag):
        try:
            repaired = _in_place(store, tag, definition, simulate, blocks, on_block)
        except NotInPlaceError:
            repaired = None
        if repaired is None or not _is_intact(store, tag, repaired.blocks):
            return _rewritten(store, tag, definition, simulate, lambda _: None)
    return repaired


def _is_intact(store: Store, tag: str, blocks: Sequence[int]) -> bool:
    """Read back what was repaired, as any other process would."""
    try:
        dataset = Store(store.uri).open(tag)
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
    chunks = ChunkFiles(store, session, definition.group)
    attrs = definition.attrs
    digests = chunks.read_all("block_sha256")
    recovered = digests is None or not _is_content(digests, attrs)
    # Nothing is written before it is known to be what was there.
    if recovered or digests is None:
        digests, blocks = _recovered_digests(chunks, definition, simulate, tag), None
    _check_samples(chunks, definition, simulate, digests, tag)
    arrays = []
    for name, variable in definition.labelled.variables.items():
        if chunks.replace_if_damaged(str(name), variable.values):
            arrays.append(str(name))
    done = np.full(len(definition.samples), schema.DONE, np.int8)
    if chunks.replace_if_damaged("status", done):
        arrays.append("status")
    repaired = []
    for block in range(definition.n_blocks) if blocks is None else blocks:
        rows = definition.rows(block)
        samples = definition.samples[rows]
        values = chunks.read("intensity", block)
        digest = b"" if values is None else schema.block_digest(samples, values)
        if digest != digests[block].tobytes():
            computed = simulate(samples)
            if schema.block_digest(samples, computed) != digests[block].tobytes():
                raise StoreError(_other_patterns(tag, block))
            chunks.replace("intensity", block, computed)
            repaired.append(block)
        on_block(rows.stop - rows.start)
    if recovered:
        chunks.replace_if_damaged("block_sha256", digests)
        arrays.append("block_sha256")
    return Repaired(tuple(repaired), tuple(arrays), rewritten=False)


def _is_content(digests: NDArray[np.uint8], attrs: Mapping[str, Any]) -> bool:
    return bool(schema.content_hash(attrs["identity"], digests) == attrs["content_hash"])


def _recovered_digests(
    chunks: ChunkFiles, definition: Definition, simulate: Simulate, tag: str
) -> NDArray[np.uint8]:
    """Return the digests of all blocks as stored or, where these are damaged, computed again.

    A StoreError is raised if neither are those of the data set.
    """
    stored, computed = [], []
    for block in range(definition.n_blocks):
        values = chunks.read("intensity", block)
        samples = definition.samples_of(block)
        stored.append(
            bytes(schema.DIGEST_BYTES) if values is None else schema.block_digest(samples, values)
        )
    digests = np.frombuffer(b"".join(stored), np.uint8).reshape(-1, schema.DIGEST_BYTES)
    if _is_content(digests, definition.attrs):
        return digests
    for block in range(definition.n_blocks):
        samples = definition.samples_of(block)
        computed.append(schema.block_digest(samples, simulate(samples)))
    digests = np.frombuffer(b"".join(computed), np.uint8).reshape(-1, schema.DIGEST_BYTES)
    if not _is_content(digests, definition.attrs):
        raise StoreError(_other_patterns(tag))
    return digests


def _check_samples(
    chunks: ChunkFiles,
    definition: Definition,
    simulate: Simulate,
    digests: NDArray[np.uint8],
    tag: str,
) -> None:
    """Raise a StoreError unless a block, stored or computed again, has the samples drawn here."""
    for block in range(definition.n_blocks):
        values = chunks.read("intensity", block)
        samples = definition.samples_of(block)
        if values is not None and schema.block_digest(samples, values) == digests[block].tobytes():
            return
    samples = definition.samples_of(0)
    if schema.block_digest(samples, simulate(samples)) != digests[0].tobytes():
        raise StoreError(_other_patterns(tag))


def _other_patterns(tag: str, block: int | None = None) -> str:
    which = "its blocks" if block is None else f"block {block}"
    return (
        f"{tag} cannot be repaired here: this installation computes {which} otherwise than they "
        f"were written, in the last bits at least. Use the package versions and the kind of "
        f"processor that wrote it, or restore the store from a copy."
    )


def rewrite(
    store: Store, tag: str, simulate: Simulate, *, on_block: OnBlock = lambda _: None
) -> Repaired:
    """Write a tagged data set again as this version does, with the same content hash.

    Intact blocks are copied, the others computed. The tag names the new snapshot afterwards, and
    nothing refers to the old one any more. Feature views of it have to be materialised again.
    """
    definition = definition_of(store, tag)
    action = f"writing {tag} of {store.uri} again"
    with storage_errors(action), store.locked(definition.branch, tag):
        return _rewritten(store, tag, definition, simulate, on_block)


def _rewritten(
    store: Store, tag: str, definition: Definition, simulate: Simulate, on_block: OnBlock
) -> Repaired:
    # Of this process alone: in object storage another may do the same.
    repository, temporary = store.repository, f"{REWRITE}{tag}-{uuid.uuid4().hex}"
    main = repository.lookup_branch("main")
    has_branch = definition.branch in repository.list_branches()
    tip = repository.lookup_branch(definition.branch) if has_branch else None
    store.committed(lambda: repository.create_branch(temporary, main))
    try:
        session = repository.writable_session(temporary)
        computed = _write_again(store, tag, definition, session, simulate, on_block)
        # Apart from what may be done again: a session is committed once.
        snapshot = store.committed(lambda: session.commit(f"rewrite {definition.group}"))

        def point() -> None:
            now = repository.lookup_branch(definition.branch) if has_branch else None
            if now not in (tip, snapshot):
                raise StoreError(  # in object storage there are no locks
                    f"{tag} was not written again: features of it, or another repair, were written "
                    f"meanwhile. Run it again when they are finished."
                )
            if has_branch and now != snapshot:
                repository.reset_branch(definition.branch, snapshot, from_snapshot_id=tip)
            _point(store, f"tag.{tag}", snapshot)

        store.committed(point, synced=True)
        store.place.sync()
    finally:
        # An error here would hide why the repair failed; gc deletes what is left behind.
        with suppress(StoreError, icechunk.IcechunkError):
            store.committed(lambda: repository.delete_branch(temporary))
    verify(Store(store.uri).open(tag))
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
    old = ChunkFiles(store, store.repository.readonly_session(tag=tag), definition.group)
    stored = old.read_all("block_sha256")
    group, n = definition.group, len(definition.samples)
    shape = n, definition.campaign.grid.points
    dataset = definition.labelled.assign_attrs(
        {**definition.attrs, "schema_version": schema.SCHEMA_VERSION}
    )
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


def _point(store: Store, reference: str, snapshot: str) -> None:
    """Point a tag at another snapshot, at once; Icechunk itself never changes a tag."""
    file = f"refs/{reference}/ref.json"
    if json.loads(store.place.read(file)).keys() != {"snapshot"}:
        raise StoreError(f"{file} is not a reference of this version of Icechunk. {RESTORE}")
    content = json.dumps({"snapshot": snapshot}, separators=(",", ":")).encode()
    store.place.write(file, content, f".repair-{uuid.uuid4().hex}")
