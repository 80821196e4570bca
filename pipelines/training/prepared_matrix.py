"""Prepared profiles in a file that all workers map into memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xarray as xr
from distributed import Client, as_completed
from numpy.typing import NDArray

from bragg_data.preprocessing import preprocessing
from bragg_data.store.repository import open_snapshot
from bragg_models.data.batches import Profiles, profiles_of
from pipelines.cli.console import Progress

_CHUNKS_PER_TASK = 8


@dataclass(frozen=True)
class PreparedMatrix:
    """Prepared profiles in a file.

    Attributes
    ----------
    path
        A .npy file of shape (n, n_features), single precision.
    rows
        By the name of a group of samples, its rows in the file.
    """

    path: Path
    rows: Mapping[str, NDArray[np.intp]]


@contextmanager
def prepared_matrix(
    client: Client,
    dataset: xr.Dataset,
    groups: Mapping[str, NDArray[np.intp]],
    prepared_by: str,
    directory: Path,
) -> Iterator[PreparedMatrix]:
    """Write the prepared profiles of groups of samples; the file is removed at the end.

    The workers read and prepare the profiles, each a part of the file.

    Parameters
    ----------
    client
        Client of the cluster.
    dataset
        An opened snapshot; the workers open it themselves, by its address.
    groups
        Numbers of samples, by the name of the group; they may overlap.
    prepared_by, directory
        Name and version of the preprocessing; a directory that this machine and the workers share.
    """
    samples = np.unique(np.concatenate(list(groups.values())))
    profiles = profiles_of(dataset, preprocessing(prepared_by).function)
    features = profiles.prepare(dataset["intensity"][samples[:1]].values).shape[1]
    source = (str(dataset.attrs["tag"]), str(dataset.attrs["uri"]), prepared_by)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / f"profiles-{uuid.uuid4().hex}.npy"
    try:
        np.lib.format.open_memmap(path, "w+", np.float32, (len(samples), features)).flush()
        with Progress("Preparing profiles", len(samples), "profiles") as progress:
            futures = []
            for first, part in _parts(samples, profiles.rows_per_chunk * _CHUNKS_PER_TASK):
                futures.append(client.submit(_write_rows, source, path, first, part, pure=False))
            for future in as_completed(futures):
                progress.advance(future.result())
        rows = {name: np.searchsorted(samples, group) for name, group in groups.items()}
        yield PreparedMatrix(path, rows)
    finally:
        path.unlink(missing_ok=True)


def _parts(samples: NDArray[np.intp], size: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield the parts of ascending samples that share chunks, each with its first row."""
    for low in range(0, int(samples[-1]) + 1, size):
        first, last = np.searchsorted(samples, (low, low + size)).tolist()
        if last > first:
            yield first, samples[first:last]


@lru_cache(maxsize=1)
def _profiles(tag: str, uri: str, prepared_by: str) -> Profiles:
    return profiles_of(open_snapshot(tag, uri), preprocessing(prepared_by).function)


def _write_rows(
    source: tuple[str, str, str], path: Path, first: int, samples: NDArray[np.intp]
) -> int:
    """On a worker: prepare the profiles of samples, and write them from a row of the file on."""
    profiles = _profiles(*source)
    selected = np.zeros(len(profiles), dtype=bool)
    selected[samples] = True
    with path.open("r+b") as file:
        for chunk in profiles.chunks_with(selected):
            values, numbers = profiles.read(int(chunk), selected)
            row = first + int(np.searchsorted(samples, numbers[0]))
            file.seek(np.load(path, mmap_mode="r").offset + row * values[0].nbytes)
            file.write(values.data)
    return len(samples)
