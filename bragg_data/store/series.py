"""Refined series in the store: each a group on a branch of its own, under a tag that never changes.

Their tags begin with ``series.``: lists of data sets of profiles leave them out.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import xarray as xr

from bragg_data.defaults import DEFAULT_URI
from bragg_data.store.block_writer import write_variables
from bragg_data.store.reading import storage_errors
from bragg_data.store.repository import (
    SERIES,
    SERIES_PREFIX,
    Store,
    StoreError,
    branch_name,
    open_dataset,
)

_LISTS = ("phase", "site", "file", "event_frame", "event_kind", "event_text")
"""Coordinates and variables of texts, and events: JSON in the attributes of what is stored."""


def write_series(store: Store, name: str, dataset: xr.Dataset) -> str:
    """Write a series and return its tag, series.NAME-vN; the same series is written once.

    Its variables are those of :func:`open_series`. A `StoreError` is raised if the name cannot be
    one of a tag.
    """
    dataset = dataset.assign_attrs(
        {n: json.dumps(dataset[n].values.tolist(), ensure_ascii=False) for n in _LISTS}
    ).drop_vars(_LISTS)
    digest = hashlib.sha256(json.dumps(dataset.attrs, sort_keys=True).encode())
    for variable in sorted(map(str, dataset.variables)):
        digest.update(variable.encode() + np.ascontiguousarray(dataset[variable]).tobytes())
    identity = digest.hexdigest()
    check_name(store, name)
    group, repository = f"{SERIES_PREFIX}{name}", store.repository
    branch = branch_name(group, identity)
    written = dataset.assign_attrs(content_hash=identity, rows_per_chunk=1)

    def write() -> str:
        if branch not in repository.list_branches():
            repository.create_branch(branch, repository.lookup_branch("main"))
        snapshot = repository.lookup_branch(branch)
        if snapshot == repository.lookup_branch("main"):
            session = repository.writable_session(branch)
            write_variables(session, f"{SERIES}/{name}", written)
            snapshot = session.commit(f"series {name}: {dataset.sizes['frame']} frames")
        tags = [tag for tag in repository.list_tags() if tag.startswith(SERIES_PREFIX)]
        for tag in tags:
            if repository.lookup_tag(tag) == snapshot:
                return tag
        numbers = [int(tag.rpartition("-v")[2]) for tag in tags if tag.rpartition("-v")[0] == group]
        tag = f"{group}-v{max(numbers, default=0) + 1}"
        store.create_tag(tag, snapshot)
        return tag

    with storage_errors(f"writing {group} in {store.uri}"):
        return store.committed(write, synced=True)


def check_name(store: Store, name: str) -> None:
    """Raise a `StoreError` if a series cannot have this name."""
    store.check_new_tag(f"{SERIES_PREFIX}{name}-v0")


def open_series(tag: str, uri: str | Path = DEFAULT_URI) -> xr.Dataset:
    """Open a refined series by its tag, as ``series.steel-v1``, and the store's path or URI.

    Dimensions: ``frame``, ``phase``, ``site`` (of the displacement parameters), ``bank`` and
    ``event``. Variables have ``units`` and ``long_name``; ``su_`` are standard uncertainties of the
    measurement, ``su_calibration_`` those of the calibration, NaN where there is no value. Cells
    are over (frame, phase), or (frame, bank, phase) where banks were refined apart. The attributes
    hold structures, instrument file, options, SHA-256 of the frames' files, and the code's commit.
    A StoreError is raised if there is no such store or tag.
    """
    store = Store(uri)
    known = [t for t in store.repository.list_tags() if t.startswith(SERIES_PREFIX)]
    if tag not in known:
        names = ", ".join(sorted(known)) or "none"
        raise StoreError(f"Series '{tag}' not found in {store.uri}. Known ones: {names}.")
    with storage_errors(f"opening '{tag}' of {store.uri}"):
        session = store.repository.readonly_session(tag=tag)
        name = tag.removeprefix(SERIES_PREFIX).rpartition("-v")[0]
        dataset = open_dataset(session, f"{SERIES}/{name}")
    texts = {n: json.loads(dataset.attrs.pop(n)) for n in _LISTS}
    dims = {"phase": "phase", "site": "site", "file": "frame"}
    dataset = dataset.assign_coords(
        {n: (dim, np.array(texts[n], dtype=str)) for n, dim in dims.items()}
    )
    kinds = {"event_frame": np.int64, "event_kind": np.str_, "event_text": np.str_}
    of_events = {n: xr.Variable("event", np.array(texts[n], dtype=k)) for n, k in kinds.items()}
    return dataset.assign(of_events).assign_attrs(tag=tag, uri=store.uri)
