"""Verification: whether a snapshot is what was written, block by block, once and remembered.

Each block of a data set has a SHA-256 over its labels and intensities. A snapshot that was found
intact is recorded next to the store's data, or, where that cannot be written, in the user's cache;
the record holds as long as the store's files are the same by name, size and time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import xarray as xr

from bragg_data.arrays import Floats32
from bragg_data.campaign import Samples
from bragg_data.files import user_cache, write_whole
from bragg_data.store import schema
from bragg_data.store.place import Place, place_of
from bragg_data.store.reading import StoreError, remedy_of, storage_errors

OnBlock = Callable[[int], object]  # called with the number of samples of every block that is read
State = tuple[int, str]  # time of the newest file of a store (ns), digest of all that there are

_READERS = 2  # blocks that are read and hashed at a time
_DIRECTORY = "verified"  # of the records, in the store
_COVERED = ("chunks", "manifests", "snapshots")  # directories of the store that a record covers
_in_memory: set[tuple[str, str]] = set()  # where no record can be written


def rows_of(dataset: xr.Dataset, block: int) -> slice:
    """Return the samples of a block."""
    rows = int(dataset.attrs["rows_per_chunk"])
    return slice(block * rows, min((block + 1) * rows, dataset.sizes["sample"]))


def check_block(dataset: xr.Dataset, samples: Samples, block: int, intensity: Floats32) -> None:
    """Raise a StoreError if the intensities (n, points) of a block are not what was written.

    ``samples`` are the labels of the whole data set.
    """
    rows = rows_of(dataset, block)
    digest = schema.block_digest(samples[rows], intensity)
    if digest != dataset.block_sha256.values[block].tobytes():
        raise StoreError(
            f"Block {block} (samples {rows.start} to {rows.stop - 1}) of "
            f"{dataset.attrs.get('tag', dataset.attrs['campaign'])} is not what was written: its "
            f"SHA-256 differs from the stored one. {remedy_of(dataset.attrs)}"
        )


def read_block(dataset: xr.Dataset, samples: Samples, block: int) -> Floats32:
    """Return the intensities of a block (n, points) of a data set, whose labels are ``samples``.

    Raises a StoreError if labels and intensities are not what was written.
    """
    with storage_errors(f"reading block {block}", remedy_of(dataset.attrs)):
        intensity: Floats32 = dataset.intensity[rows_of(dataset, block)].values
    check_block(dataset, samples, block, intensity)
    return intensity


def damaged_blocks(dataset: xr.Dataset, on_block: OnBlock | None = None) -> Iterator[StoreError]:
    """Read and hash all blocks of an opened data set; yield an error for each that is damaged.

    Where all blocks are what their hashes are of, these may be damaged: that is an error as well.
    """
    with storage_errors("reading labels and hashes", remedy_of(dataset.attrs)):
        dataset.drop_vars("intensity").load()
        dataset.block_sha256.load()  # once, before the threads
    samples = schema.samples_of(dataset)

    def error_of(block: int) -> StoreError | None:
        try:
            read_block(dataset, samples, block)
        except StoreError as error:
            return error
        return None

    blocks = range(dataset.sizes["block"])
    pool, intact = ThreadPoolExecutor(_READERS), True
    try:
        for block, error in enumerate(pool.map(error_of, blocks)):
            if on_block is not None:
                rows = rows_of(dataset, block)
                on_block(rows.stop - rows.start)
            if error is not None:
                intact = False
                yield error
        if intact:
            try:
                _check_content(dataset)
            except StoreError as error:
                yield error
    finally:
        pool.shutdown(cancel_futures=True)


def verify(dataset: xr.Dataset, on_block: OnBlock | None = None) -> str:
    """Return the content hash of a data set, recomputed from its labels and intensities.

    Raises `StoreError` if the contents of a block, or of the whole, are not what was written.
    """
    for error in damaged_blocks(dataset, on_block):
        raise error
    return str(dataset.attrs["content_hash"])


def _check_content(dataset: xr.Dataset) -> None:
    content = schema.content_hash(dataset.attrs["identity"], dataset.block_sha256.values)
    if content != dataset.attrs["content_hash"]:
        raise StoreError(
            f"The contents hash to {content}, but the data set's attribute is "
            f"{dataset.attrs['content_hash']}. {remedy_of(dataset.attrs)}"
        )


def verify_once(dataset: xr.Dataset, on_block: OnBlock | None = None) -> None:
    """Verify a snapshot, opened by its tag, unless a record states that it was found intact.

    Raises as :func:`verify` does.
    """
    # Of before: what changes while it is read is read again.
    state = state_of(dataset)
    if not _is_recorded(_place(dataset), str(dataset.attrs["snapshot_id"])):
        verify(dataset, on_block)
        remember(dataset, state)


def state_of(dataset: xr.Dataset) -> State:
    """Return the state of the files of an opened snapshot's store."""
    return _state(_place(dataset), None)


def remember(dataset: xr.Dataset, state: State) -> None:
    """Record that a snapshot was found intact, in a state from before it was read."""
    store, snapshot = _place(dataset), str(dataset.attrs["snapshot_id"])
    text = json.dumps({"snapshot": snapshot, "newest": state[0], "state": state[1]})
    for directory in _directories(store):
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(directory / f"{snapshot}.json", text.encode())
            return
    _in_memory.add((snapshot, state[1]))


def _place(dataset: xr.Dataset) -> Place:
    return place_of(str(dataset.attrs["uri"]))


def _is_recorded(store: Place, snapshot: str) -> bool:
    for directory in _directories(store):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((directory / f"{snapshot}.json").read_text(encoding="utf-8"))
            if record["state"] == _state(store, int(record["newest"]))[1]:
                return True
    return (snapshot, _state(store, None)[1]) in _in_memory


def _directories(store: Place) -> Iterator[Path]:
    """Yield where a record may be: in the store, and in the cache of a user who only reads it."""
    if store.directory is not None:
        yield store.directory / _DIRECTORY
    if (cache := user_cache()) is not None:
        name = str(store.directory or store.uri)
        yield cache / _DIRECTORY / hashlib.sha256(name.encode()).hexdigest()[:16]


def _state(store: Place, newest: int | None) -> State:
    """Return the time of the newest file (ns), and a digest of all that are not newer.

    Files that are added later do not count; one that is changed or deleted does.
    """
    files = [(file.mtime_ns, file.base_name, file.size) for file in store.listed(_COVERED)]
    newest = max((time for time, *_ in files), default=0) if newest is None else newest
    counted = sorted(file for file in files if file[0] <= newest)
    return newest, hashlib.sha256(repr(counted).encode()).hexdigest()
