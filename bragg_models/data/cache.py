"""A cache of prepared profiles that is mapped into memory, and rebuilt when it is missing.

Reading and preparing takes processor time from a fast network in every epoch.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
from filelock import FileLock

from bragg_data.arrays import Floats32
from bragg_models.data.batches import Profiles, in_order, prefetched

_WORKERS = 2  # read and prepare chunks


class CacheError(OSError):
    """A cache that cannot be built here; the profiles themselves can still be read."""


def cached(
    profiles: Profiles,
    directory: Path,
    key: str,
    *,
    on_chunk: Callable[[int], None] | None = None,
    spare: int = 1 << 30,
) -> Profiles:
    """Return the same prepared profiles, from a file that is mapped into memory.

    The file, ``<hash of the key>.npy``, is built if there is none of this key, or if it is
    incomplete or damaged, by one process at a time, with a few chunks in memory. It can be deleted
    at any time. Whenever it is opened all of it is compared with its hashes, and when it is built
    each chunk of a snapshot with the snapshot's. Its batches are those of the profiles themselves
    to the last bit.

    The key identifies the content: the data set and its preparation. ``on_chunk`` is called with
    the number of profiles of every chunk that is written. The cache leaves ``spare`` bytes of the
    disk free; raises `CacheError` if the disk is nearly full, or the file cannot be written: read
    the profiles themselves.
    """
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            values = _opened(path, key, profiles)
            if values is None:
                try:
                    _build(path, key, profiles, on_chunk, spare)
                finally:
                    path.with_suffix(".partial").unlink(missing_ok=True)
                values = _opened(path, key, profiles)
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(
            f"Profiles cannot be cached in {directory}: {error.strerror or error}. Choose another "
            f"directory, or go without a cache."
        ) from error
    if values is None:
        raise CacheError(
            f"The cache {path} was written, but reads otherwise: its disk cannot be trusted. "
            f"Choose another directory, or go without a cache."
        )
    intensity = xr.DataArray(values, dims=profiles.intensity.dims)
    rows = profiles.rows_per_chunk
    return Profiles(intensity, rows, lambda ready: ready, values, profiles.dtype)


def _opened(path: Path, key: str, profiles: Profiles) -> Floats32 | None:
    """Map a cache that is complete, of this key, and undamaged in all of its chunks."""
    rows = profiles.rows_per_chunk
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        # Copied on write, which never happens: torch warns of arrays that cannot be written.
        values = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
        hashes = about["sha256"]
        stored = about["key"], about["rows_per_chunk"], about["shape"], len(hashes)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    if (
        stored != (key, rows, list(values.shape), -(-len(values) // rows))
        or values.dtype != profiles.dtype
        or len(values) != len(profiles)
    ):
        return None

    def is_intact(chunk: int) -> bool:
        content = values[chunk * rows : (chunk + 1) * rows].data
        return bool(hashlib.sha256(content).hexdigest() == hashes[chunk])

    with prefetched(is_intact, range(len(hashes)), depth=2 * _WORKERS, workers=_WORKERS) as chunks:
        return values if all(chunks) else None


def _build(
    path: Path, key: str, profiles: Profiles, on_chunk: Callable[[int], None] | None, spare: int
) -> None:
    about, partial = path.with_suffix(".json"), path.with_suffix(".partial")
    for old in (about, path):  # its space is needed
        old.unlink(missing_ok=True)
    hashes: list[str] = []
    shape: tuple[int, ...] = ()
    # Written, not mapped: a full disk is an error then, and not the end of the process.
    with partial.open("wb") as file:
        for batch in in_order(profiles, np.ones(len(profiles), dtype=bool), workers=_WORKERS):
            if not shape:
                shape = (len(profiles), *batch.profiles.shape[1:])
                dtype = np.dtype(profiles.dtype)
                size, free = dtype.itemsize * math.prod(shape), shutil.disk_usage(path.parent).free
                if free < size + spare:
                    raise CacheError(
                        f"A cache of {size / 1e9:.1f} GB does not fit on the disk of "
                        f"{path.parent}, which has {free / 1e9:.1f} GB free. Choose another "
                        f"directory, or go without a cache."
                    )
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            hashes.append(hashlib.sha256(batch.profiles.data).hexdigest())
            file.write(batch.profiles.data)
            if on_chunk is not None:
                on_chunk(len(batch.rows))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    content = {
        "key": key,
        "shape": shape,
        "dtype": np.dtype(profiles.dtype).name,
        "rows_per_chunk": profiles.rows_per_chunk,
        "sha256": hashes,
    }
    # Last, and at once: without it the cache is not complete.
    partial.write_text(json.dumps(content))
    partial.replace(about)
