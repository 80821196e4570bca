"""Care of a store over the years: what it holds, what nothing refers to, copies, its schema."""

import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import zarr

from bragg_data.store import schema
from bragg_data.store.block_writer import array_of
from bragg_data.store.place import DATA, REFERENCES, place_of
from bragg_data.store.reading import StoreError, open_dataset, storage_errors
from bragg_data.store.repository import REWRITE, Snapshot, Store, groups_of

_DAYS_TO_COMMIT = 7  # in object storage: older chunks that nothing refers to were left behind
_LEFT_BEHIND = timedelta(hours=1)  # age of a scratch file that no running process can have
_MAIN = "main"


@dataclass(frozen=True)
class Contents:
    """What a tagged or unfinished data set of a store holds."""

    name: str  # tag or branch
    samples: int
    blocks: int
    bytes: int  # on the disk
    schema_version: int
    checksums: bool  # whether its chunks have one each
    complete: bool


@dataclass(frozen=True)
class Garbage:
    """What nothing refers to: counts of chunks, of other files, of scratch files, and bytes."""

    chunks: int = 0
    files: int = 0
    scratch: int = 0
    bytes: int = 0


def contents(store: Store) -> list[Contents]:
    """Return what a store holds: its tags, then its unfinished data sets."""
    with storage_errors(f"reading the data sets of {store.uri}"):
        return [_contents(store, snapshot) for snapshot, _ in store.snapshots()]


def _contents(store: Store, snapshot: Snapshot) -> Contents:
    session = store.repository.readonly_session(snapshot_id=snapshot.snapshot_id)
    opened = zarr.open_group(session.store, path=snapshot.group, mode="r")
    arrays = dict(opened.arrays())
    version = int(str(opened.attrs["schema_version"]))
    checksums = all("crc32c" in str(array.metadata.to_dict()) for array in arrays.values())
    size = sum(array.nbytes_stored() for array in arrays.values())
    blocks = array_of(opened, "block_sha256").shape[0]
    samples = array_of(opened, "status").shape[0]
    tagged = snapshot.tag is not None
    return Contents(snapshot.name, samples, blocks, size, version, checksums, tagged)


def size_on_disk(store: Store) -> int:
    """Return the bytes of all files of a store."""
    return sum(int(file.size) for file in store.place.listed([""], below=True))


def collect_garbage(store: Store, *, dry_run: bool, days: float | None = None) -> Garbage:
    """Delete what neither a tag nor a branch refers to, and scratch files that were left behind.

    Raises `StoreError` if a data set is being written: its chunks belong to nothing yet. In object
    storage that cannot be seen: there, what is younger than 7 days stays. ``days`` is another age.
    """
    if days is None:
        days = 0 if store.place.directory else _DAYS_TO_COMMIT
    limit = datetime.now(UTC) - timedelta(days=days)
    with storage_errors(f"collecting garbage in {store.uri}"), _nobody_writes(store):
        for file in store.place.listed([REFERENCES], below=True):
            branch = str(file.path).split("/")[1].removeprefix("branch.")
            # Of a repair that died: in object storage another may be running.
            if branch.startswith(REWRITE) and file.mtime < limit and not dry_run:
                store.repository.delete_branch(branch)
        gone = store.repository.garbage_collect(limit, dry_run=dry_run)
        scratch = list(_scratch(store))
        size = sum(_size(path) for path in scratch)
        if not dry_run:
            for path in scratch:
                _delete(path)
    files = gone.manifests_deleted + gone.snapshots_deleted + gone.transaction_logs_deleted
    return Garbage(gone.chunks_deleted, files, len(scratch), gone.bytes_deleted + size)


def expire(store: Store, days: float, *, dry_run: bool) -> int:
    """Forget snapshots of the branches' histories older than ``days``, but tags and newest ones.

    Returns how many; their files are deleted by :func:`collect_garbage`.
    """
    limit = datetime.now(UTC) - timedelta(days=days)
    repository = store.repository
    with storage_errors(f"expiring snapshots of {store.uri}"), _nobody_writes(store):
        named = {repository.lookup_tag(tag) for tag in repository.list_tags()}
        named |= {repository.lookup_branch(branch) for branch in repository.list_branches()}
        first = repository.lookup_branch(_MAIN)
        old = set()
        for branch in repository.list_branches():
            for info in repository.ancestry(branch=branch):
                if info.written_at < limit and info.id not in named | {first}:
                    old.add(info.id)
        if not dry_run:
            repository.expire_snapshots(limit)
        return len(old)


@contextmanager
def _nobody_writes(store: Store) -> Iterator[None]:
    """Hold the locks of all data sets, and that of commits."""
    names = sorted(str(file.base_name) for file in store.place.listed(["locks"]))
    names = [name.removesuffix(".lock") for name in names if name.endswith(".lock")]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(store.locked(name, f"a data set ({name})"))
        yield


def _scratch(store: Store) -> Iterator[Path]:
    """Yield what processes that died have left in the store and next to it."""
    if (directory := store.place.directory) is None:
        return
    places = directory.glob(".repair-*"), directory.glob("verified/.*")
    # Of an interrupted copy, by its whole name: a neighbour may well begin alike.
    partial = re.compile(re.escape(f".{directory.name}-") + "[0-9a-f]{32}")
    next_to = (p for p in directory.parent.glob(".*") if partial.fullmatch(p.name))
    for paths in (*places, next_to):
        for path in paths:
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND.total_seconds():
                    yield path


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def copy(
    store: Store, target: str | Path, on_file: Callable[[int], object] = lambda _: None
) -> Store:
    """Copy a store, with content hashes and tags as they are, while others may write to it.

    To a path or URI, where the copy appears when it is complete. ``on_file`` is called with the
    bytes of each file that is copied. Raises `StoreError` if something is there, or the copy cannot
    be written.
    """
    place = place_of(target)
    place.check_reachable()
    directory = place.directory
    # In object storage an interrupted copy is no store yet, as it has no main, and is continued.
    main = f"{REFERENCES}/branch.{_MAIN}/"
    if directory.exists() if directory else place.listed([main]):
        raise StoreError(f"{place.uri} is there already. Name a place where nothing is yet.")
    partial = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}") if directory else None
    to = place_of(partial) if partial else place
    with storage_errors(f"copying {store.uri} to {place.uri}"):
        try:
            # Read first, so that what they refer to is among the files, which never change.
            references = [(f.path, store.place.read(f.path)) for f in _references(store)]
            for file in store.place.listed(DATA):
                to.write(file.path, store.place.read(file.path), ".copy")
                on_file(file.size)
            for name, content in sorted(references, key=lambda file: file[0].startswith(main)):
                to.write(name, content, ".copy")
            if partial and directory:
                partial.rename(directory)
        finally:
            if partial:
                shutil.rmtree(partial, ignore_errors=True)
    return Store(place.uri)


def _references(store: Store) -> list[Any]:
    top = [file for file in store.place.listed([""]) if not file.base_name.startswith(".")]
    return top + store.place.listed([REFERENCES], below=True)


def bytes_to_copy(store: Store) -> int:
    """Return the bytes that :func:`copy` copies."""
    return sum(int(file.size) for file in store.place.listed(DATA))


def give_up(store: Store, branch: str) -> None:
    """Begin an unfinished data set again, which cannot be resumed as too little of it can be read.

    One that grows begins with the data set that it grows from. Raises `StoreError` if there is no
    such branch, it has a tag, it can be resumed, or it is being written.
    """
    repository = store.repository
    action = f"giving up {branch} of {store.uri}"

    def reset() -> None:
        start = repository.lookup_branch(_MAIN)
        tags = {tag.snapshot_id: tag.name for tag in store.tags()}
        for info in repository.ancestry(branch=branch):
            if info.id in tags:
                if store.branch_of(store.open(tags[info.id])) == branch:
                    raise StoreError(f"{branch} has a tag: repair that instead.")
                start = info.id  # it grows from this one
                break
        if _can_be_resumed(store, branch):
            raise StoreError(
                f"{branch} can be read: run its simulate command again, which completes it and "
                f"computes damaged blocks by itself."
            )
        repository.reset_branch(branch, start)

    with storage_errors(action), store.locked(branch, branch):
        store.committed(reset)


def _can_be_resumed(store: Store, branch: str) -> bool:
    """Whether labels, bookkeeping and the index of the blocks of a branch can be read."""
    try:
        with storage_errors(f"reading {branch}"):
            session = store.repository.readonly_session(branch=branch)
            for group in groups_of(session):
                open_dataset(session, group.basename).drop_vars("intensity").load()
                array_of(group, "intensity").nchunks_initialized  # noqa: B018
    except StoreError:
        return False
    return True


def outdated(store: Store) -> list[Contents]:
    """Return the tagged data sets that are not stored as this version does.

    Raises `StoreError` if one has a schema that only a newer version knows.
    """
    tagged = [known for known in contents(store) if known.complete]
    for known in tagged:
        if known.schema_version > schema.SCHEMA_VERSION:
            raise StoreError(
                f"{known.name} has schema version {known.schema_version}, and this version knows "
                f"{schema.SCHEMA_VERSION}: install the version of bragg that wrote it."
            )
    current = schema.SCHEMA_VERSION
    return [known for known in tagged if known.schema_version < current or not known.checksums]
