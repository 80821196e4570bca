"""The versioned store of labelled patterns: create it, list, open and verify its snapshots.

An Icechunk repository in a directory or in object storage. Each data set has a branch and a group;
a tag names a finished one permanently. :mod:`bragg_data.store.simulated` writes data sets.
"""

import errno
import fcntl
import itertools
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import icechunk
import numpy as np
import xarray as xr
import zarr
from filelock import FileLock, Timeout
from icechunk.session import Session
from zarr.errors import GroupNotFoundError

from bragg_data.campaign import Campaign
from bragg_data.defaults import DEFAULT_URI as DEFAULT_URI
from bragg_data.store import schema
from bragg_data.store.place import place_of
from bragg_data.store.reading import RESTORE, is_conflict, remedy_of
from bragg_data.store.reading import DiskFullError as DiskFullError
from bragg_data.store.reading import StoreError as StoreError
from bragg_data.store.reading import open_dataset as open_dataset
from bragg_data.store.reading import storage_errors as storage_errors

# Groups on the branch of a data set: what is computed from it, measured profiles as they were read.
_OTHER_GROUPS = FEATURES, NATIVE, SERIES = "features", "native", "series"
REWRITE = "rewrite-"  # of the branches on which data sets are written again
SERIES_PREFIX = "series."  # of the tags of refined series, which are no data sets of profiles
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATIENCE = 300.0  # seconds for a commit, while others commit to the same branch in object storage
_PAUSE = 2.0  # seconds between two attempts, at most
_T = TypeVar("_T")

PART = 4096  # blocks, in a part of the list of chunks: a commit writes the parts that it changes
# Kept in memory: places of chunks, of 100 bytes, and arrays of snapshots, with all attributes. Each
# commit makes a snapshot.
_CACHED_CHUNKS, _CACHED_ARRAYS = 300_000, 2_000
_SIMULATORS = "kinematic", "gsas2"

# Icechunk warns that commits side by side to a local directory are unsafe; ours are under a lock.
# Its sessions raise what they log.
icechunk.set_logs_filter("error,icechunk::session=off")


@dataclass(frozen=True)
class Tag:
    """A finished data set: its name, its snapshot, and when that was written."""

    name: str
    snapshot_id: str
    written_at: datetime


class Snapshot(NamedTuple):
    """A data set at one time: its tag, or the branch that it is on yet."""

    snapshot_id: str
    group: str
    tag: str | None = None
    branch: str | None = None

    @property
    def name(self) -> str:
        """The tag, or the branch."""
        return str(self.tag or self.branch)


@dataclass(frozen=True)
class DataSet:
    """A data set: its simulator, how many samples are done, its tag, or the branch it is on yet."""

    simulator: str
    version: str
    done: int
    total: int
    tag: str | None
    branch: str | None = None
    failed_blocks: int = 0


def _config() -> icechunk.RepositoryConfig:
    by_blocks: dict[Any, int] = {icechunk.ManifestSplitDimCondition.Axis(0): PART}
    split = {icechunk.ManifestSplitCondition.AnyArray(): by_blocks}
    parts = icechunk.ManifestConfig(splitting=icechunk.ManifestSplittingConfig.from_dict(split))
    cache = icechunk.CachingConfig(num_chunk_refs=_CACHED_CHUNKS, num_snapshot_nodes=_CACHED_ARRAYS)
    return icechunk.RepositoryConfig(manifest=parts, caching=cache)


class Store:
    """An Icechunk repository, by the path or file:// URI of its directory, or an s3:// URI.

    ``create`` makes the repository if there is none. Raises a StoreError if the URI is none of
    these, object storage cannot be reached, or nothing is there or no store. ``path`` is the
    directory, None of one in object storage.
    """

    def __init__(self, uri: str | Path = DEFAULT_URI, *, create: bool = False) -> None:
        self.place = place_of(uri)
        self.path, self.uri = self.place.directory, self.place.uri
        self.place.check_reachable()
        with storage_errors(f"opening the store {self.uri}"):
            if create:
                self._create()
            if not self._exists():
                directory = self.place.directory
                if not (directory.exists() if directory else self.place.listed([""], below=True)):
                    raise StoreError(
                        f"There is no store at {self.uri}. Make one with: python -m "
                        f"pipelines.simulate"
                    )
                raise StoreError(
                    f"{self.uri} is there, but it is no store. Name the directory of a store or, "
                    f"for a new one, a directory that is empty or not there yet."
                )
            self.repository = icechunk.Repository.open(self.place.storage, config=_config())

    def _exists(self) -> bool:
        directory = self.place.directory
        is_place = directory is None or directory.is_dir()
        return is_place and icechunk.Repository.exists(self.place.storage)

    def _create(self) -> None:
        """Create the repository if there is nothing."""
        directory = self.place.directory
        if directory is None:
            if not self._exists():
                # Who was faster has made it; what else may be there is looked at next.
                with suppress(icechunk.IcechunkError):
                    icechunk.Repository.create(self.place.storage)
        elif not directory.exists():
            _create_directory(directory)
        elif directory.is_dir() and not any(directory.iterdir()):
            icechunk.Repository.create(self.place.storage)

    def tags(self) -> list[Tag]:
        """Return the tags, in the order of their names (v2 before v10)."""

        def in_order(name: str) -> list[tuple[str, int]]:
            return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]

        with storage_errors(f"reading the tags of {self.uri}"):
            tags = self.repository.list_tags()
            names = sorted((t for t in tags if not t.startswith(SERIES_PREFIX)), key=in_order)
        snapshots = []
        for name in names:
            with storage_errors(f"reading snapshot '{name}' of {self.uri}", RESTORE):
                snapshots.append(self.repository.lookup_snapshot(self.repository.lookup_tag(name)))
        return [Tag(n, s.id, s.written_at) for n, s in zip(names, snapshots, strict=True)]

    def tag(self, name: str) -> Tag:
        """Return a tag by its name; a StoreError that names the known ones if there is none."""
        known = {tag.name: tag for tag in self.tags()}
        if name not in known:
            names = ", ".join(known) or "none"
            raise StoreError(f"Snapshot '{name}' not found in {self.uri}. Known tags: {names}.")
        return known[name]

    def open(self, tag: str) -> xr.Dataset:
        """Open a tagged data set; see :func:`open_snapshot`."""
        snapshot_id = self.tag(tag).snapshot_id
        remedy = remedy_of({"tag": tag, "uri": self.uri})
        with storage_errors(f"opening snapshot '{tag}' of {self.uri}", remedy):
            session = self.repository.readonly_session(tag=tag)
            dataset = open_dataset(session, self.group_of(tag).basename, remedy)
        return dataset.assign_attrs(tag=tag, snapshot_id=snapshot_id, uri=self.uri)

    def size(self, tag: str) -> int:
        """Return the bytes that a tagged data set takes on the disk."""
        with storage_errors(f"measuring snapshot '{tag}' of {self.uri}"):
            return sum(array.nbytes_stored() for _, array in self.group_of(tag).arrays())

    def data_sets_of(self, campaign: Campaign, limit: int | None = None) -> list[DataSet]:
        """Return the data sets of a campaign (its first samples), by whichever simulator."""
        with storage_errors(f"reading the data sets of {self.uri}", RESTORE):
            return [
                self._data_set(group, snapshot.tag, snapshot.branch)
                for snapshot, group in self._snapshots()
                if _simulator_of(group)[0] in _SIMULATORS
                and campaign.identity(*_simulator_of(group), limit) == group.attrs["identity"]
            ]

    def snapshots(self) -> list[tuple[Snapshot, Mapping[str, Any]]]:
        """Return the snapshots of all data sets, those without a tag last, and their attributes."""
        with storage_errors(f"reading the data sets of {self.uri}", RESTORE):
            return [(snapshot, dict(group.attrs)) for snapshot, group in self._snapshots()]

    def _snapshots(self) -> Iterator[tuple[Snapshot, zarr.Group]]:
        # A tag stays when its branch goes on.
        for id_, tag in {tag.snapshot_id: tag.name for tag in self.tags()}.items():
            group = self.group_of(tag)
            yield Snapshot(id_, group.basename, tag=tag), group
        for branch, group in self._open_branches():
            id_ = self.repository.lookup_branch(branch)
            yield Snapshot(id_, group.basename, branch=branch), group

    def unfinished(self) -> list[DataSet]:
        """Return the data sets that have no tag yet."""
        with storage_errors(f"reading the branches of {self.uri}", RESTORE):
            return [self._data_set(group, branch=b) for b, group in self._open_branches()]

    def _open_branches(self) -> Iterator[tuple[str, zarr.Group]]:
        """Yield branch and group of data sets without a tag; after a tag, features may follow."""
        tagged = {self.group_of(tag.name).attrs.get("content_hash") for tag in self.tags()}
        for branch in sorted(self.repository.list_branches() - {"main"}):
            groups = list(groups_of(self.repository.readonly_session(branch=branch)))
            if not any(group.attrs.get("content_hash", "") in tagged for group in groups):
                yield from ((branch, group) for group in groups)

    def _data_set(
        self, group: zarr.Group, tag: str | None = None, branch: str | None = None
    ) -> DataSet:
        status = cast("zarr.Array[Any]", group["status"])
        (total,) = status.shape
        done = total
        # Whatever has a tag is complete; there, a status that cannot be read does not matter.
        if tag is None:
            remedy = remedy_of({"tag": branch, "uri": self.uri})
            with storage_errors(f"reading the unfinished data set {branch}", remedy):
                done = int((np.asarray(status[:]) == schema.DONE).sum())
        failed = len(cast("dict[str, str]", group.attrs.get("failures", {})))
        return DataSet(*_simulator_of(group), done, total, tag, branch, failed)

    def branch_of(self, dataset: xr.Dataset) -> str:
        """Return the branch of an opened data set."""
        return branch_name(dataset.attrs["campaign"], dataset.attrs["identity"])

    def group_of(self, tag: str) -> zarr.Group:
        """Return the group of a tagged data set."""
        return next(groups_of(self.repository.readonly_session(tag=tag)))

    def next_tag(self, name: str) -> str:
        """Return the next free tag NAME-vN."""
        matches = (re.fullmatch(re.escape(name) + r"-v(\d+)", tag.name) for tag in self.tags())
        return f"{name}-v{max((int(match[1]) for match in matches if match), default=0) + 1}"

    def check_new_tag(self, tag: str) -> None:
        """Raise a StoreError if a tag has this name already, or if it cannot be one."""
        if not _TAG.fullmatch(tag):
            raise StoreError(f"'{tag}' is no tag: use letters, digits, dots, dashes, underscores.")
        known = [known.name for known in self.tags()]
        if tag in known:
            raise StoreError(
                f"Tag '{tag}' exists already in {self.uri} with other contents, and a tag never "
                f"changes. Choose another name with --tag. Known tags: {', '.join(known)}."
            )

    def lock(self, name: str) -> FileLock:
        """Return a lock among all processes that share the file system; a kill releases it."""
        if self.place.directory is None:
            raise StoreError(f"{self.uri} is in object storage, where nothing can be locked.")
        directory = self.place.directory / "locks"
        directory.mkdir(exist_ok=True)
        return FileLock(directory / f"{name}.lock", mode=0o664, fallback_to_soft=False)

    @contextmanager
    def locked(self, name: str, what: str, *, shared: bool = False) -> Iterator[None]:
        """Hold a lock by its name, alone or with all who share it; else a `StoreError`, at once.

        In object storage there is none. Who writes the same there writes it twice, to the same
        result; a repair that writes a data set again loses the features that are written meanwhile.
        """
        if self.place.directory is None:
            yield
            return
        lock = self.lock(name)
        with ExitStack() as stack:
            try:
                if shared:
                    stack.enter_context(_shared(lock))
                else:
                    stack.enter_context(lock.acquire(timeout=0))
            except (Timeout, BlockingIOError) as error:
                raise StoreError(
                    f"Another process is writing {what} in {self.uri}. Wait until it ends, then "
                    f"run this again."
                ) from error
            yield

    def committed(self, work: Callable[[], _T], *, synced: bool = False) -> _T:
        """Do what opens a session and commits it, or changes branches and tags.

        In a directory under a lock, as concurrent commits lose changes there. In object storage a
        commit is refused where another was first: then it is all done again, with a new session.
        All that was written before is on the disk before others have to wait, if ``synced``.
        """
        if synced:
            self.place.sync()
        if self.place.directory is not None:
            with self.lock("commit"):
                return work()
        with storage_errors(f"committing to {self.uri}"):
            return retried(work)

    def create_tag(self, name: str, snapshot_id: str) -> None:
        """Name a snapshot for good, when all that it refers to is on the disk."""
        self.place.sync()
        self.repository.create_tag(name, snapshot_id)
        self.place.sync()


@contextmanager
def _shared(lock: FileLock) -> Iterator[None]:
    """Share a lock with others who do; a BlockingIOError if a process holds it alone."""
    descriptor = os.open(lock.lock_file, os.O_RDWR | os.O_CREAT)
    try:
        with suppress(PermissionError):  # of another user, who has done it
            os.fchmod(descriptor, 0o664)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # FileLock's own, but shared
        yield
    finally:
        os.close(descriptor)


def retried(work: Callable[[], _T]) -> _T:
    """Do what commits, and again, in full, as long as another process commits first."""
    end = time.monotonic() + _PATIENCE
    for attempt in itertools.count():
        try:
            return work()
        except (icechunk.ConflictError, icechunk.IcechunkError) as error:
            if not is_conflict(error):
                raise
            if time.monotonic() > end:
                raise StoreError(
                    f"Other processes have been committing to the same branch for {_PATIENCE:g} s "
                    f"without a pause. Run the same command again."
                ) from error
        time.sleep(random.uniform(0, min(_PAUSE, 0.05 * 2**attempt)))
    raise AssertionError


def branch_name(campaign: str, identity: str) -> str:
    """Return the branch on which a data set of a campaign is written."""
    return f"{campaign}-{identity[:12]}"


def open_snapshot(tag: str, uri: str | Path = DEFAULT_URI) -> xr.Dataset:
    """Open a tagged data set as an ordinary lazy xarray data set.

    By its tag, for example ``batio3-nomad-v1``, and the path or file:// URI of the store. It is
    what :mod:`bragg_data.store.schema` describes, with the attributes ``tag``, ``snapshot_id`` and
    ``uri`` in addition. Raises a StoreError if there is no such store or tag.
    """
    return Store(uri).open(tag)


def _simulator_of(group: zarr.Group) -> tuple[str, str]:
    return str(group.attrs["simulator"]), str(group.attrs["simulator_version"])


def groups_of(session: Session) -> Iterator[zarr.Group]:
    """Yield the groups of data sets of a session: one, or none yet."""
    # A branch has nothing at all on it between its creation and its first commit.
    with suppress(GroupNotFoundError):
        root = zarr.open_group(session.store, mode="r")
        yield from (group for name, group in root.groups() if name not in _OTHER_GROUPS)


def _create_directory(directory: Path) -> None:
    """Create the repository under another name and rename it: it is never incomplete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    new.mkdir()  # Icechunk would panic if it cannot be made
    try:
        icechunk.Repository.create(icechunk.local_filesystem_storage(str(new)))
        new.rename(directory)
    except OSError as error:
        # Another process was faster: its store is used.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
