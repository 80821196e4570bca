"""Care of a store over the years: what it holds, what nothing refers to, copies, its schema."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import zarr

from bragg_data.store import schema
from bragg_data.store.block_writer import array_of
from bragg_data.store.reading import StoreError, storage_errors
from bragg_data.store.repository import Snapshot, Store

_DATA = ("chunks", "manifests", "snapshots", "transactions")
_REFERENCES = "refs"
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
    return sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())


def collect_garbage(store: Store, *, dry_run: bool) -> Garbage:
    """Delete what neither a tag nor a branch refers to, and scratch files that were left behind.

    Raises `StoreError` if a data set is being written: its chunks belong to nothing yet.
    """
    with storage_errors(f"collecting garbage in {store.uri}"), _nobody_writes(store):
        for branch in store.repository.list_branches():
            if branch.startswith("rewrite-") and not dry_run:  # of a repair that died
                store.repository.delete_branch(branch)
        gone = store.repository.garbage_collect(datetime.now(UTC), dry_run=dry_run)
        scratch = list(_scratch(store))
        size = sum(_size(path) for path in scratch)
        if not dry_run:
            for path in scratch:
                _delete(path)
    files = gone.manifests_deleted + gone.snapshots_deleted + gone.transaction_logs_deleted
    return Garbage(gone.chunks_deleted, files, len(scratch), gone.bytes_deleted + size)


def expire(store: Store, older_than: timedelta, *, dry_run: bool) -> int:
    """Forget snapshots of the branches' histories that are older, except tags and newest ones.

    Returns how many; their files are deleted by :func:`collect_garbage`.
    """
    limit = datetime.now(UTC) - older_than
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
    directory = store.path / "locks"
    names = sorted(file.stem for file in directory.glob("*.lock")) if directory.exists() else []
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(store.exclusive(name, f"a data set ({name})"))
        yield


def _scratch(store: Store) -> Iterator[Path]:
    """Yield what processes that died have left in the store and next to it."""
    places = store.path.glob(".repair-*"), store.path.glob("verified/.*")
    # Of an interrupted copy, by its whole name: a neighbour may well begin alike.
    partial = re.compile(re.escape(f".{store.path.name}-") + "[0-9a-f]{32}")
    next_to = (p for p in store.path.parent.glob(".*") if partial.fullmatch(p.name))
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


def copy(store: Store, target: Path, on_file: Callable[[int], object] = lambda _: None) -> Store:
    """Copy a store, with content hashes and tags as they are, while others may write to it.

    The copy appears at ``target`` when it is complete. ``on_file`` is called with the bytes of each
    file that is copied. Raises `StoreError` if something is there, or the copy cannot be written.
    """
    if target.exists():
        raise StoreError(f"{target} is there already. Name a directory that does not exist yet.")
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    with storage_errors(f"copying {store.uri} to {target}"):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # First, so that what they refer to is among the files, which never change.
            shutil.copytree(store.path / _REFERENCES, partial / _REFERENCES)
            files = [f for f in store.path.iterdir() if f.is_file() and not f.name.startswith(".")]
            data = [f for name in _DATA for f in (store.path / name).glob("*") if f.is_file()]
            for file in (*files, *data):
                place = partial / file.relative_to(store.path)
                place.parent.mkdir(exist_ok=True)
                shutil.copy2(file, place)
                with place.open("rb") as stream:
                    os.fsync(stream.fileno())
                on_file(place.stat().st_size)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Store(target)


def give_up(store: Store, branch: str) -> None:
    """Begin an unfinished data set, of which nothing can be read any more, from its start.

    Raises `StoreError` if there is no such branch, a tag depends on it, or it is being written.
    """
    repository = store.repository
    action = f"giving up {branch} of {store.uri}"
    with storage_errors(action), store.exclusive(branch, branch), store.committing():
        history = {info.id for info in repository.ancestry(branch=branch)}
        if history & {tag.snapshot_id for tag in store.tags()}:
            raise StoreError(f"{branch} has a tag: repair that instead.")
        repository.reset_branch(branch, repository.lookup_branch(_MAIN))


def bytes_to_copy(store: Store) -> int:
    """Return the bytes that :func:`copy` copies."""
    files = (f for name in _DATA for f in (store.path / name).glob("*") if f.is_file())
    return sum(file.stat().st_size for file in files)


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
