"""Writing a data set into the store: its labels at once, its patterns block by block."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr
from icechunk.session import ForkSession
from numpy.typing import NDArray

from bragg_data.arrays import Floats32
from bragg_data.campaign import Campaign, Samples
from bragg_data.store import repository, schema
from bragg_data.store.block_writer import (
    BlockResult,
    BlockWriter,
    create_group,
    extend_group,
    write_chunk,
)
from bragg_data.store.reading import remedy_of
from bragg_data.store.repository import Store, StoreError, Tag, storage_errors


class Writer(BlockWriter):
    """A data set that is being written; see :class:`~bragg_data.store.block_writer.BlockWriter`.

    It is that of :meth:`bragg_data.campaign.Campaign.identity`. ``provenance`` is of this run:
    ``code_commit``, and ``call_path``, which is how GSAS-II is called.
    """

    array = "intensity"

    def __init__(
        self,
        store: Store,
        campaign: Campaign,
        simulator: str,
        version: str,
        *,
        limit: int | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        self.campaign = campaign
        self.samples = campaign.samples[slice(limit)]
        self.identity = campaign.identity(simulator, version, limit)
        self._simulator, self._version = simulator, version
        branch = repository.branch_name(campaign.name, self.identity)
        self.remedy = remedy_of({"tag": branch, "uri": store.uri})
        where = store, branch, campaign.name, len(self.samples)
        known = {"code_commit": "unknown", **(provenance or {})}
        super().__init__(*where, lock=branch, provenance=known)

    def _create(self) -> None:
        repo = self.store.repository
        if self.branch not in repo.list_branches():
            # main is never committed to, so that each branch begins empty.
            start = self._parent() if self.campaign.growths else repo.lookup_branch("main")
            repo.create_branch(self.branch, start)
        session = repo.writable_session(self.branch)
        root = zarr.open_group(session.store, mode="a")
        if self.group in root and root[self.group].attrs["identity"] == self.identity:
            return
        rows = self.campaign.rows_per_chunk(self._simulator)
        n, points = len(self.samples), self.campaign.grid.points
        commit = self._provenance["code_commit"]
        dataset = schema.labelled(
            self.campaign, self.samples, self._simulator, self._version, commit
        ).assign_attrs(identity=self.identity, rows_per_chunk=rows)
        if self.group in root:  # of the parent, whose branch this one continues
            self._check_simulator(str(root[self.group].attrs["simulator_version"]))
            extend_group(session, self.group, dataset, "intensity")
        else:
            create_group(session, self.group, dataset, "intensity", (n, points), schema.INTENSITY)
        session.commit(f"create {self.group}: {n} samples, {self._simulator} {self._version}")

    def _check_simulator(self, version: str) -> None:
        if version != self._version:
            raise StoreError(
                f"{self.campaign.growths[-1].parent} was simulated with {self._simulator} "
                f"{version}, and {self._version} is installed; the patterns of two versions never "
                f"mix under one tag. Install that version, or simulate the campaign again."
            )

    def _parent(self) -> str:
        """Return the snapshot of the data set that grows."""
        growth = self.campaign.growths[-1]
        content = self.store.open(growth.parent).attrs["content_hash"]
        if content != growth.parent_content_hash:
            raise StoreError(
                f"Tag {growth.parent} of {self.store.uri} has other contents than the data set "
                f"that is to grow ({content}, not {growth.parent_content_hash})."
            )
        return self.store.tag(growth.parent).snapshot_id

    def _check(self, dataset: xr.Dataset) -> None:
        stored = schema.samples_of(dataset)
        if dataset.attrs["identity"] != self.identity or not (
            np.array_equal(stored.cells, self.samples.cells)
            and np.array_equal(stored.phase, self.samples.phase)
        ):
            raise StoreError(
                f"The cells on branch {self.branch} of {self.store.uri} are not those that this "
                f"installation draws for the same campaign. Use the package versions that began "
                f"it, or another store."
            )

    def _digest(self, block: int, values: NDArray[Any], /) -> bytes:
        return schema.block_digest(self.samples[self.rows(block)], values)

    def finish(self, tag: str | None = None) -> Tag:
        """Validate the complete data set and tag it, as the next free NAME-vN by default.

        Raises `SchemaError` if something is missing or wrong, `StoreError` if the tag exists; then
        nothing is tagged.
        """
        with storage_errors(f"tagging in {self.store.uri}"):
            return self.store.tag(self.store.committed(lambda: self._finish(tag), synced=True))

    def _finish(self, tag: str | None) -> str:
        repo = self.store.repository
        session = repo.writable_session(self.branch)
        group = zarr.open_group(session.store, path=self.group, mode="r+")
        known = group.attrs.get("content_hash")
        group.attrs["content_hash"] = schema.content_hash(self.identity, self._digests)
        # Imported here, as workers never check and start a second sooner without pandera.
        from bragg_data.store.checks import check

        # Workers have checked the intensities.
        dataset = repository.open_dataset(session, self.group)
        for finding in check(dataset, intensities=False):
            if finding.hard and not finding.passed:
                raise schema.SchemaError(finding.message)
        name = tag or self.store.next_tag(self.campaign.name)
        self.store.check_new_tag(name)
        if known == group.attrs["content_hash"]:
            # A run before this one died between its last commit and the tag.
            snapshot = repo.lookup_branch(self.branch)
        else:
            snapshot = session.commit(f"finish {self.group}: {len(self.samples)} samples")
        if tag is None:  # another process that wrote the same may have tagged it meanwhile
            name = next((t.name for t in self.store.tags() if t.snapshot_id == snapshot), name)
        if name not in repo.list_tags():
            self.store.create_tag(name, snapshot)
        return name


def write_block(
    fork: ForkSession, group: str, block: int, samples: Samples, intensity: Floats32
) -> BlockResult:
    """Write the samples and patterns (n, points) of a block through a fork, as workers do.

    The result holds the fork, to be committed. Nothing is written if a pattern is not finite.

    Raises what :func:`~bragg_data.store.block_writer.write_chunk` raises.
    """
    bad = ~np.isfinite(intensity).all(axis=1)
    if bad.any():
        status = np.where(bad, schema.FAILED, schema.PENDING).astype(np.int8)
        cell = ", ".join(f"{value:g}" for value in samples.cells[int(np.flatnonzero(bad)[0])])
        reason = f"{bad.sum()} patterns are not finite, the first one that of cell ({cell})."
        return BlockResult(block, status, reason=reason)
    write_chunk(fork, group, "intensity", block, intensity)
    status = np.full(len(samples), schema.DONE, np.int8)
    return BlockResult(block, status, fork, schema.block_digest(samples, intensity))
