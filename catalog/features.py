"""Values of feature views: which are in the store, reading them, and which are out of date.

Cheap views are computed as they are read; the others are materialised block by block, on the data
set's branch under ``features/VIEW/VERSION``, aligned with its samples, and carry their lineage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
import zarr

from bragg_data.store import schema
from bragg_data.store.block_writer import array_of
from bragg_data.store.repository import DEFAULT_URI, FEATURES, Store, open_dataset, storage_errors
from catalog import registry
from catalog.feature_writer import ViewModel, group_of, lineage_of
from catalog.tracking import Tracking
from catalog.views import VIEWS, FeatureError, Function, View, inputs_of, view_of

_NOT_LABELS = ("intensity", "sigma", "covered", *schema.BOOKKEEPING)


def model_of_view(tracking: Tracking, view: View, dataset: xr.Dataset) -> registry.ModelVersion:
    """Return the newest registered model that computes a view of a data set.

    Raises
    ------
    FeatureError
        If none was trained on it.
    """
    content = dataset.attrs["content_hash"]
    versions = [
        version
        for name in registry.names(tracking)
        for version in registry.versions(tracking, name)
        if version.tags.get("model") == view.model and version.tags.get("content_hash") == content
    ]
    if not versions:
        raise FeatureError(
            f"{view.key} is computed by a registered {view.model}, and none was trained on "
            f"{dataset.attrs['tag']}. Train one: python -m pipelines.train {view.model} --data "
            f"{dataset.attrs['tag']}"
        )
    return max(versions, key=lambda version: int(version.version))


@dataclass(frozen=True)
class Materialised:
    """Values of a view in the store.

    Attributes
    ----------
    view
        Key of the view.
    tag
        Tag of the data set.
    done, total
        Number of samples that have values, and of all samples.
    bytes
        Size on the disk.
    lineage
        Attributes of the group.
    snapshot_id
        Present snapshot of the branch.
    """

    view: str
    tag: str
    done: int
    total: int
    bytes: int
    lineage: Mapping[str, Any] = field(default_factory=dict)
    snapshot_id: str = ""

    @property
    def complete(self) -> bool:
        """Whether all samples have their features."""
        return self.done == self.total


def materialised(store: Store, tag: str | None = None) -> list[Materialised]:
    """Return the values of all views in the store, of one data set or of all."""
    return [
        values
        for known in store.tags()
        if tag is None or known.name == tag
        for values in _materialised(store, store.open(known.name))
    ]


def _materialised(store: Store, dataset: xr.Dataset) -> Iterator[Materialised]:
    branch = store.branch_of(dataset)
    with storage_errors(f"reading the features of {dataset.attrs['tag']} in {store.uri}"):
        session = store.repository.readonly_session(branch=branch)
        root = zarr.open_group(session.store, mode="r")
        if FEATURES not in root:
            return
        views = zarr.open_group(session.store, path=FEATURES, mode="r")
        for _, name in views.groups():
            for _, version in name.groups():
                status = np.asarray(array_of(version, "status")[:])
                yield Materialised(
                    str(version.attrs["view"]),
                    str(dataset.attrs["tag"]),
                    int((status == schema.DONE).sum()),
                    len(status),
                    sum(array.nbytes_stored() for _, array in version.arrays()),
                    dict(version.attrs),
                    session.snapshot_id,
                )


def load(view: str | View, dataset: str, uri: str = DEFAULT_URI) -> xr.Dataset:
    """Open the features of a data set with its labels, lazily.

    Parameters
    ----------
    view
        A view, its key, or its name for the newest version.
    dataset
        Tag of the data set.
    uri
        Path or ``file://`` URI of the store.

    Returns
    -------
    The labels of :mod:`bragg_data.store.schema`, and a variable with the view's name over (sample,
    feature), whose attributes hold the lineage. Materialised values are read from the store;
    otherwise a pure view is computed as it is read, by Dask, a chunk at a time.

    Raises
    ------
    FeatureError
        If there is no such view, or its values are not materialised and cannot be computed as they
        are read; the message has the command that materialises them.
    StoreError
        If there is no such data set.
    """
    chosen = view if isinstance(view, View) else view_of(view)
    store = Store(uri)
    source = store.open(dataset)
    labels = source.drop_vars(_NOT_LABELS, errors="ignore")
    for stored in _materialised(store, source):
        if stored.view == chosen.key and stored.complete:
            session = store.repository.readonly_session(snapshot_id=stored.snapshot_id)
            values = open_dataset(session, group_of(chosen))["values"]
            attrs = {**stored.lineage, "snapshot_id": stored.snapshot_id}
            return labels.assign({chosen.name: values.assign_attrs(attrs)})
    if chosen.function is None:
        raise FeatureError(
            f"{chosen.key} of {dataset} is not materialised. Compute it with: "
            f"{materialise_command(chosen.key, dataset)}"
        )
    return labels.assign({chosen.name: _lazy_values(chosen, chosen.function, source)})


def _lazy_values(view: View, function: Function, source: xr.Dataset) -> xr.DataArray:
    """Return the values of a pure view, computed by Dask when they are read."""
    rows = int(source.attrs["rows_per_chunk"])
    size = function(*inputs_of(view, source, slice(1))).shape[1]
    values: xr.DataArray = xr.apply_ufunc(
        function,
        *(source[name].drop_vars("tof").chunk(sample=rows) for name in view.inputs),
        input_core_dims=[["tof"]] * len(view.inputs),
        output_core_dims=[["feature"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": {"feature": size}},
    )
    return values.assign_attrs(lineage_of(view, source, ViewModel()))


def materialise_command(view: str, tag: str) -> str:
    """Return the command that computes the values of a view."""
    return f"python -m pipelines.features materialise {view} --data {tag}"


# ---- what is out of date -----------------------------------------------------------------------


@dataclass(frozen=True)
class Stale:
    """Values that are out of date.

    Attributes
    ----------
    view, tag
        Key of the view, and tag of the data set.
    reason
        Why they are out of date.
    command
        The command that computes them again; empty if nothing can.
    """

    view: str
    tag: str
    reason: str
    command: str


def stale(store: Store, tracking: Tracking, views: Mapping[str, View] = VIEWS) -> list[Stale]:
    """Return the values that a newer tag, definition or model has made out of date.

    Values of a view that is not known any more are among them; they cannot be computed again.

    Parameters
    ----------
    store
        The store with the values.
    tracking
        Where the models that compute views are registered.
    views
        The present definitions, by their keys.
    """
    datasets = {tag.name: store.open(tag.name) for tag in store.tags()}
    stored = materialised(store)
    keys = {(values.view, values.tag) for values in stored}
    return [
        Stale(values.view, values.tag, reason, command)
        for values in stored
        for reason, command in _reasons(values, keys, datasets, tracking, views)
    ]


def _reasons(
    values: Materialised,
    stored: Set[tuple[str, str]],
    datasets: Mapping[str, xr.Dataset],
    tracking: Tracking,
    views: Mapping[str, View],
) -> Iterator[tuple[str, str]]:
    """Yield why values are out of date, and the command that computes them again."""
    view = views.get(values.view)
    if view is None:
        yield "its definition is gone", ""
        return
    command = materialise_command(values.view, values.tag)
    if not values.complete:
        yield f"{values.done:,} of {values.total:,} samples are done", command
    if values.lineage["definition_hash"] not in view.accepted_hashes:
        yield "its definition changed", command
    newest = max((v for v in views.values() if v.name == view.name), key=lambda v: v.version)
    if newest.version > view.version and (newest.key, values.tag) not in stored:
        yield f"{newest.key} is newer", materialise_command(newest.key, values.tag)
    if view.model:
        try:
            model = model_of_view(tracking, view, datasets[values.tag]).uri
        except FeatureError:
            model = values.lineage["model"]
        if model != values.lineage["model"]:
            yield f"{model} is newer than {values.lineage['model']}", command
    for tag in _newer_tags(values.tag, datasets):
        if (values.view, tag) not in stored:
            yield f"{tag} is newer and has none", materialise_command(values.view, tag)


def _newer_tags(tag: str, datasets: Mapping[str, xr.Dataset]) -> list[str]:
    """Return the newest tag of the same campaign, if it is newer than this one."""
    campaign = datasets[tag].attrs["campaign"]
    same = [name for name, d in datasets.items() if d.attrs["campaign"] == campaign]
    return [same[-1]] if same.index(tag) < len(same) - 1 else []
