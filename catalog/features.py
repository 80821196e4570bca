"""Feature views: named, versioned definitions, and their values beside the data they are made of.

A view is a pure function on the profiles of a data set, the same function object in training and in
inference; or what a registered model makes of them. Cheap views are computed as they are read;
the others are materialised block by block, on the data set's own branch under
``features/VIEW/VERSION``, aligned with its samples, and carry their lineage.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
import zarr
from icechunk.session import ForkSession
from numpy.typing import NDArray

from bragg_data.preprocessing import PREPROCESSING, prepare_measured
from bragg_data.store import schema
from bragg_data.store.block_writer import (
    BlockResult,
    BlockWriter,
    array_of,
    create_group,
    empty_bookkeeping,
    write_chunk,
)
from bragg_data.store.repository import (
    DEFAULT_URI,
    FEATURES,
    Store,
    StoreError,
    open_dataset,
    storage_errors,
)
from catalog import registry
from catalog.tracking import Tracking

Function = Callable[..., NDArray[Any]]

# Values that agree in these are the same.
_DECISIVE = ("view", "definition_hash", "content_hash", "model_digest")
_NOT_LABELS = ("intensity", "sigma", "covered", *schema.BOOKKEEPING)


class FeatureError(LookupError):
    """A feature view that is not known, or whose values are not there."""


@dataclass(frozen=True)
class View:
    """The definition of a feature view.

    Attributes
    ----------
    name, version
        Together its key. Another definition is another version, beside the old one.
    description
        One sentence.
    function
        From profiles (n, points), on the last axis, to features (n, m); None if a model makes them.
    model
        The kind of registered model that computes it: ``classifier`` or ``caenn``. It prepares the
        profiles itself.
    size
        Number of features, where it does not depend on the grid.
    inputs
        Variables of the data set that the function takes, each of shape (n, points).
    """

    name: str
    version: int
    description: str
    function: Function | None = None
    model: str = ""
    size: int | None = None
    inputs: tuple[str, ...] = ("intensity",)

    @property
    def key(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def virtual(self) -> bool:
        """Whether it can be computed as it is read."""
        return self.function is not None

    @property
    def definition_hash(self) -> str:
        """SHA-256 (16 hexadecimal digits) of what computes it: changed code is told by it."""
        source = self.model if self.function is None else inspect.getsource(self.function)
        return hashlib.sha256(json.dumps([self.key, source]).encode()).hexdigest()[:16]


VIEWS: dict[str, View] = {
    **{
        key: View(entry.name, entry.version, entry.description, entry.function)
        for key, entry in PREPROCESSING.items()
    },
    "measured_aligned@1": View(
        "measured_aligned", 1, "A measured profile, background off, between 0 and 1.",
        prepare_measured, inputs=("intensity", "sigma", "covered"),
    ),
    "classifier_256@1": View(
        "classifier_256", 1, "Activations of the classifier's dense layer.", model="classifier",
        size=256,
    ),
    "cae_latent@1": View(
        "cae_latent", 1, "Latent representation of the convolutional auto-encoder.", model="caenn"
    ),
}  # fmt: skip
"""The views by ``name@version``. The functions are those of :mod:`bragg_data.preprocessing`."""


def view_of(name: str) -> View:
    """Return a view by ``name@version``, or the newest version of a name.

    Raises
    ------
    FeatureError
        If there is none, naming the known ones.
    """
    if name in VIEWS:
        return VIEWS[name]
    versions = [view for view in VIEWS.values() if view.name == name]
    if not versions:
        raise FeatureError(f"There is no feature view '{name}'. Known: {', '.join(VIEWS)}.")
    return max(versions, key=lambda view: view.version)


@dataclass(frozen=True)
class ViewModel:
    """The registered model that computes a view: its address and what it consists of.

    Attributes
    ----------
    uri
        ``models:/NAME/VERSION``.
    digest
        SHA-256 of its files.
    """

    uri: str = ""
    digest: str = ""


def model_of_view(tracking: Tracking, view: View, dataset: xr.Dataset) -> registry.ModelVersion:
    """Return the newest registered model that computes a view of a data set.

    Raises
    ------
    FeatureError
        If none was trained on it.
    """
    content = dataset.attrs["content_hash"]
    found = [
        version
        for name in registry.names(tracking)
        for version in registry.versions(tracking, name)
        if version.tags.get("model") == view.model and version.tags.get("content_hash") == content
    ]
    if not found:
        raise FeatureError(
            f"{view.key} is computed by a registered {view.model}, and none was trained on "
            f"{dataset.attrs['tag']}. Train one: python -m pipelines.train {view.model} --data "
            f"{dataset.attrs['tag']}"
        )
    return max(found, key=lambda version: int(version.version))


# ---- writing -----------------------------------------------------------------------------------


class FeatureWriter(BlockWriter):
    """The values of a view that are being written; see :class:`BlockWriter`.

    What is there of the same definition, model and data is kept; what is there of another is
    replaced (the old values stay in the repository's history).

    Parameters
    ----------
    store, dataset
        The data set, opened by its tag, and where it is.
    view
        What.
    size
        Number of features.
    computer
        The model that computes it, if one does.
    code_commit
        Commit of the code that runs.
    """

    def __init__(
        self,
        store: Store,
        dataset: xr.Dataset,
        view: View,
        size: int,
        *,
        computer: ViewModel | None = None,
        code_commit: str = "unknown",
    ) -> None:
        self.view, self.size = view, size
        self._rows = int(dataset.attrs["rows_per_chunk"])
        branch = store.branch_of(dataset)
        self.lineage = lineage_of(view, dataset, computer or ViewModel())
        super().__init__(
            store, branch, group_of(view), dataset.sizes["sample"],
            lock=f"{branch}-{view.key}", how={"code_commit": code_commit},
        )  # fmt: skip

    def _create(self) -> None:
        session = self.store.repository.writable_session(self.branch)
        root = zarr.open_group(session.store, mode="a")
        if self.group in root:
            attrs = dict(root[self.group].attrs)
            if all(attrs.get(name) == self.lineage[name] for name in _DECISIVE):
                return
            del root[self.group]
        attrs = {
            **self.lineage,
            **self._how,
            "description": self.view.description,
            "rows_per_chunk": self._rows,
        }
        dataset = xr.Dataset(empty_bookkeeping(self.count, self._rows), attrs=attrs)
        create_group(
            session, self.group, dataset, "values", (self.count, self.size), ("sample", "feature"),
            {"long_name": self.view.description},
        )  # fmt: skip
        session.commit(f"create {self.group}: {self.count} samples, {self.size} features")

    def _check(self, dataset: xr.Dataset) -> None:
        if dataset.sizes != {
            "sample": self.count, "feature": self.size, "block": len(dataset.block_sha256),
            "digest_byte": schema.DIGEST_BYTES,
        }:  # fmt: skip
            raise StoreError(
                f"{self.group} on branch {self.branch} has the sizes {dict(dataset.sizes)}; "
                f"{self.count} samples of {self.size} features are wanted. The definition changed "
                f"without a new version: give {self.view.name} another one."
            )


def group_of(view: View) -> str:
    """Return where a view's values are on a data set's branch."""
    return f"{FEATURES}/{view.name}/{view.version}"


def lineage_of(view: View, dataset: xr.Dataset, computer: ViewModel) -> dict[str, str]:
    """Return where the values of a view come from."""
    return {
        "view": view.key,
        "definition_hash": view.definition_hash,
        "content_hash": str(dataset.attrs["content_hash"]),
        "model": computer.uri,
        "model_digest": computer.digest,
        "source": ", ".join(view.inputs),
        "source_tag": str(dataset.attrs["tag"]),
        "source_snapshot_id": str(dataset.attrs["snapshot_id"]),
    }


def write_features(
    fork: ForkSession, group: str, block: int, values: NDArray[np.float32]
) -> BlockResult:
    """Write the features (n, m) of one block through a fork; this is what workers do.

    Raises
    ------
    DiskFullError, StoreError
        See :func:`bragg_data.store.block_writer.write_chunk`.
    """
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        status = np.where(bad, schema.FAILED, schema.PENDING).astype(np.int8)
        return BlockResult(block, status, reason=f"The features of {bad.sum()} are not finite.")
    write_chunk(fork, group, "values", block, values)
    digest = hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").data).digest()
    return BlockResult(block, np.full(len(values), schema.DONE, np.int8), fork, digest)


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Materialised:
    """What is in the store of a view.

    Attributes
    ----------
    view
        Key.
    tag
        Of the data set.
    done, total
        Samples.
    bytes
        On the disk.
    lineage
        The group's attributes.
    snapshot_id
        Of the branch, that holds it now.
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
    """Return what is in the store of all views, of one data set or of all."""
    found = []
    for one in store.tags():
        if tag is None or one.name == tag:
            found += list(_materialised(store, store.open(one.name)))
    return found


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
                    str(version.attrs["view"]), str(dataset.attrs["tag"]),
                    int((status == schema.DONE).sum()), len(status),
                    sum(array.nbytes_stored() for _, array in version.arrays()),
                    dict(version.attrs), session.snapshot_id,
                )  # fmt: skip


def load(view: str | View, dataset: str, uri: str = DEFAULT_URI) -> xr.Dataset:
    """Open the features of a data set beside its labels, lazily.

    Parameters
    ----------
    view
        A view, its key, or its name for the newest version.
    dataset
        Tag of the data set.
    uri
        Of the store.

    Returns
    -------
    The labels of :mod:`bragg_data.store.schema`, and a variable with the view's name over (sample,
    feature). Where the values are materialised it reads them, its attributes hold their lineage;
    elsewhere a pure view is computed as it is read, by Dask, a chunk at a time.

    Raises
    ------
    FeatureError
        If there is no such view, or its values are not there and cannot be computed as they are
        read; the command that materialises them is told.
    StoreError
        If there is no such data set.
    """
    chosen = view if isinstance(view, View) else view_of(view)
    store = Store(uri)
    source = store.open(dataset)
    labels = source.drop_vars(_NOT_LABELS, errors="ignore")
    for one in _materialised(store, source):
        if one.view == chosen.key and one.complete:
            session = store.repository.readonly_session(snapshot_id=one.snapshot_id)
            values = open_dataset(session, group_of(chosen))["values"]
            attrs = {**one.lineage, "snapshot_id": one.snapshot_id}
            return labels.assign({chosen.name: values.assign_attrs(attrs)})
    if chosen.function is None:
        raise FeatureError(
            f"{chosen.key} of {dataset} is not materialised. Make it with: "
            f"{materialise_command(chosen.key, dataset)}"
        )
    return labels.assign({chosen.name: _as_read(chosen, source)})


def _as_read(view: View, source: xr.Dataset) -> xr.DataArray:
    assert view.function is not None
    rows = int(source.attrs["rows_per_chunk"])
    size = view.function(*inputs_of(view, source, slice(1))).shape[1]
    values: xr.DataArray = xr.apply_ufunc(
        view.function,
        *(source[name].drop_vars("tof").chunk(sample=rows) for name in view.inputs),
        input_core_dims=[["tof"]] * len(view.inputs),
        output_core_dims=[["feature"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": {"feature": size}},
    )
    return values.assign_attrs(lineage_of(view, source, ViewModel()))


def inputs_of(view: View, source: xr.Dataset, rows: slice) -> list[NDArray[Any]]:
    """Return what a view's function takes of some samples, each of shape (n, points).

    Raises
    ------
    FeatureError
        If the data set does not have it.
    """
    missing = [name for name in view.inputs if name not in source]
    if missing:
        raise FeatureError(
            f"{view.key} is made of {', '.join(view.inputs)}, and {source.attrs['tag']} has no "
            f"{', '.join(missing)}: it is a view of measured data sets, which python -m "
            f"pipelines.ingest writes."
        )
    return [source[name].isel(sample=rows).values for name in view.inputs]


def materialise_command(view: str, tag: str) -> str:
    """Return the command that makes, or makes again, the values of a view."""
    return f"python -m pipelines.features materialise {view} --data {tag}"


# ---- what is out of date -----------------------------------------------------------------------


@dataclass(frozen=True)
class Stale:
    """Values that something newer has made out of date: what, why, and what to type."""

    view: str
    tag: str
    reason: str
    command: str


def stale(store: Store, tracking: Tracking) -> list[Stale]:
    """Return what a newer tag, definition or model has made out of date.

    A view that is not known any more is told as well; its values cannot be made again.
    """
    found = []
    tags = {tag.name: store.open(tag.name) for tag in store.tags()}
    there = materialised(store)
    for one in there:
        view = VIEWS.get(one.view)
        command = materialise_command(one.view, one.tag)
        if view is None:
            found.append(Stale(one.view, one.tag, "its definition is gone", ""))
            continue
        if not one.complete:
            reason = f"{one.done:,} of {one.total:,} samples are done"
            found.append(Stale(one.view, one.tag, reason, command))
        if one.lineage["definition_hash"] != view.definition_hash:
            found.append(Stale(one.view, one.tag, "its definition changed", command))
        newer = [v for v in VIEWS.values() if v.name == view.name and v.version > view.version]
        if newer and not any(m.view == newer[-1].key and m.tag == one.tag for m in there):
            command = materialise_command(newer[-1].key, one.tag)
            found.append(Stale(one.view, one.tag, f"{newer[-1].key} is newer", command))
        if view.model:
            try:
                model = model_of_view(tracking, view, tags[one.tag]).uri
            except FeatureError:
                model = ""
            if model not in ("", one.lineage["model"]):
                reason = f"{model} is newer than {one.lineage['model']}"
                found.append(
                    Stale(one.view, one.tag, reason, materialise_command(one.view, one.tag))
                )
        for tag in _newer_tags(one.tag, tags):
            if not any(m.view == one.view and m.tag == tag for m in there):
                reason = f"{tag} is newer and has none"
                found.append(Stale(one.view, one.tag, reason, materialise_command(one.view, tag)))
    return found


def _newer_tags(tag: str, tags: Mapping[str, xr.Dataset]) -> list[str]:
    """Return the last of the tags of the same campaign that come after one, if there is any."""
    same = [n for n, d in tags.items() if d.attrs["campaign"] == tags[tag].attrs["campaign"]]
    return [same[-1]] if same.index(tag) < len(same) - 1 else []
