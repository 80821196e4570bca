"""Values of feature views in the store: writing and reading them, and which are out of date.

Cheap views are computed as they are read; the others are materialised block by block, on the data
set's branch under ``features/VIEW/VERSION``, aligned with its samples, and carry their lineage.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr
from icechunk.session import ForkSession
from numpy.typing import NDArray

from bragg_data.arrays import Floats32
from bragg_data.provenance import code_commit
from bragg_data.store import block_writer, schema
from bragg_data.store.block_writer import BlockResult
from bragg_data.store.repository import DEFAULT_URI, FEATURES, Store, open_dataset, storage_errors
from catalog import registry
from catalog.tracking import Tracking
from catalog.views import VIEWS, FeatureError, View, inputs_of, view_of

_NOT_LABELS = ("intensity", "sigma", "covered", *schema.BOOKKEEPING)
# Stored values are current if they agree in these, and in an accepted definition hash.
_IDENTITY = ("view", "content_hash", "model_digest")


class FeatureWriter(block_writer.BlockWriter):
    """Writes the values of a view; see :class:`~bragg_data.store.block_writer.BlockWriter`.

    Stored values of the same definition, model and data stay; others are replaced (they remain in
    the repository's history).

    `size` is the number of features, `model` address and digest of the registered model that
    computes them, if one does.
    """

    array = "values"

    def __init__(
        self,
        store: Store,
        dataset: xr.Dataset,
        view: View,
        size: int,
        model: tuple[str, str] = ("", ""),
    ) -> None:
        self.view, self.size = view, size
        self._rows = int(dataset.attrs["rows_per_chunk"])
        branch = store.branch_of(dataset)
        self.lineage = lineage_of(view, dataset, *model)
        where = store, branch, group_of(view), dataset.sizes["sample"]
        # Views are written side by side, and not while the data set itself is.
        super().__init__(
            *where,
            lock=f"{branch}-{view.key}",
            shared_lock=branch,
            provenance={"code_commit": code_commit()},
        )

    def _create(self) -> None:
        session = self.store.repository.writable_session(self.branch)
        root = zarr.open_group(session.store, mode="a")
        if self.group in root:
            attrs = dict(root[self.group].attrs)
            same = all(attrs.get(name) == self.lineage[name] for name in _IDENTITY)
            if same and attrs.get("definition_hash") in self.view.accepted_hashes:
                return
            del root[self.group]
        described = {"description": self.view.description, "rows_per_chunk": self._rows}
        dataset = xr.Dataset(attrs={**self.lineage, **self._provenance, **described})
        values = schema.variable("sample feature", "float32", self.view.description)
        shape = self.count, self.size
        block_writer.create_group(session, self.group, dataset, "values", shape, values)
        session.commit(f"create {self.group}: {self.count} samples, {self.size} features")

    def _digest(self, _block: int, values: NDArray[Any], /) -> bytes:
        return _digest_of(values)

    def _check(self, dataset: xr.Dataset) -> None:
        """Accept it: :meth:`_create` has compared its identity."""


def group_of(view: View) -> str:
    """Return the path of a view's values on a data set's branch."""
    return f"{FEATURES}/{view.name}/{view.version}"


def lineage_of(view: View, dataset: xr.Dataset, uri: str = "", digest: str = "") -> dict[str, str]:
    """Return the lineage of the values of a view, as attributes of their group.

    `uri` and `digest` are those of the registered model that computes them, if one does.
    """
    return {
        "view": view.key,
        "definition_hash": view.definition_hash,
        "content_hash": str(dataset.attrs["content_hash"]),
        "model": uri,
        "model_digest": digest,
        "source": ", ".join(view.inputs),
        "source_tag": str(dataset.attrs["tag"]),
        "source_snapshot_id": str(dataset.attrs["snapshot_id"]),
    }


def write_features(fork: ForkSession, group: str, block: int, values: Floats32) -> BlockResult:
    """Write the features (n, m) of one block through a fork; this is what workers do.

    Raises what :func:`bragg_data.store.block_writer.write_chunk` raises.
    """
    invalid = ~np.isfinite(values).all(axis=1)
    if invalid.any():
        status = np.where(invalid, schema.FAILED, schema.PENDING).astype(np.int8)
        reason = f"The features of {invalid.sum()} samples are not finite."
        return BlockResult(block, status, reason=reason)
    block_writer.write_chunk(fork, group, "values", block, values)
    done = np.full(len(values), schema.DONE, np.int8)
    return BlockResult(block, done, fork, _digest_of(values))


def _digest_of(values: NDArray[Any]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").data).digest()


@dataclass(frozen=True)
class Materialised:
    """Values of a view in the store."""

    view: str  # key of the view
    tag: str  # of the data set
    done: int  # number of samples that have values
    total: int  # number of all samples
    bytes: int  # on the disk
    lineage: Mapping[str, Any]  # attributes of the group
    snapshot_id: str  # present snapshot of the branch

    @property
    def complete(self) -> bool:
        """Whether all samples have their features."""
        return self.done == self.total


def materialised(store: Store, tag: str | None = None) -> list[Materialised]:
    """Return the values of all views in the store, of one data set or of all."""
    tags = [known.name for known in store.tags() if tag in (None, known.name)]
    return [values for name in tags for values in _materialised(store, store.open(name))]


def _materialised(store: Store, dataset: xr.Dataset) -> Iterator[Materialised]:
    branch, tag = store.branch_of(dataset), str(dataset.attrs["tag"])
    with storage_errors(f"reading the features of {tag} in {store.uri}"):
        session = store.repository.readonly_session(branch=branch)
        if FEATURES not in zarr.open_group(session.store, mode="r"):
            return
        views = zarr.open_group(session.store, path=FEATURES, mode="r")
        for _, name in views.groups():
            for _, group in name.groups():
                attrs = dict(group.attrs)
                status = np.asarray(block_writer.array_of(group, "status")[:])
                done, total = int((status == schema.DONE).sum()), len(status)
                size = sum(array.nbytes_stored() for _, array in group.arrays())
                view = str(attrs["view"])
                yield Materialised(view, tag, done, total, size, attrs, session.snapshot_id)


def load(view: str | View, dataset: str, uri: str = DEFAULT_URI) -> xr.Dataset:
    """Open the features of a data set with its labels, lazily.

    Of a view, its key, or its name for the newest version; the tag of the data set; and the path or
    ``file://`` URI of the store. Returned are the labels of :mod:`bragg_data.store.schema`, and a
    variable with the view's name over (sample, feature), whose attributes hold the lineage.
    Materialised values are read from the store; otherwise a pure view is computed as it is read, by
    Dask, a chunk at a time.

    Raises a FeatureError if there is no such view, or its values are not materialised and cannot be
    computed as they are read: the message has the command that materialises them. A StoreError if
    there is no such data set.
    """
    chosen = view if isinstance(view, View) else view_of(view)
    store = Store(uri)
    source = store.open(dataset)
    labels = source.drop_vars(_NOT_LABELS, errors="ignore")
    for stored in _materialised(store, source):
        if stored.view == chosen.key and stored.complete:
            session = store.repository.readonly_session(snapshot_id=stored.snapshot_id)
            remedy = f"Compute it again with: {_command(chosen.key, dataset)}"
            values = open_dataset(session, group_of(chosen), remedy)["values"]
            attrs = {**stored.lineage, "snapshot_id": stored.snapshot_id}
            return labels.assign({chosen.name: values.assign_attrs(attrs)})
    if chosen.function is None:
        raise FeatureError(
            f"{chosen.key} of {dataset} is not materialised. Compute it with: "
            f"{_command(chosen.key, dataset)}"
        )
    rows = int(source.attrs["rows_per_chunk"])
    size = chosen.function(*inputs_of(chosen, source, slice(1))).shape[1]
    computed: xr.DataArray = xr.apply_ufunc(
        chosen.function,
        *(source[name].drop_vars("tof").chunk(sample=rows) for name in chosen.inputs),
        input_core_dims=[["tof"]] * len(chosen.inputs),
        output_core_dims=[["feature"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": {"feature": size}},
    )
    return labels.assign({chosen.name: computed.assign_attrs(lineage_of(chosen, source))})


def _command(view: str, tag: str) -> str:
    return f"python -m pipelines.features materialise {view} --data {tag}"


def model_of_view(tracking: Tracking, view: View, dataset: xr.Dataset) -> registry.ModelVersion:
    """Return the newest registered model that computes a view, trained on a data set.

    Raises `FeatureError` if there is none.
    """
    attrs = dataset.attrs
    versions = [
        version
        for name in registry.names(tracking)
        for version in registry.versions(tracking, name)
        if version.tags.get("model") == view.model
        and version.tags.get("content_hash") == attrs["content_hash"]
    ]
    if not versions:
        raise FeatureError(
            f"{view.key} is computed by a registered {view.model}, and none was trained on "
            f"{attrs['tag']}. Train one: python -m pipelines.train {view.model} --data "
            f"{attrs['tag']}"
        )
    return max(versions, key=lambda version: int(version.version))


class Stale(NamedTuple):
    """Values that are out of date: view, data set, reason, and remedy (empty if there is none)."""

    view: str
    tag: str
    reason: str
    command: str


def stale(store: Store, tracking: Tracking, views: Mapping[str, View] = VIEWS) -> list[Stale]:
    """Return the values that a newer tag, definition or model has made out of date.

    `views` are the present definitions by their keys. Values of a view that is not known any more
    are among them; they cannot be computed again.
    """
    datasets = {tag.name: store.open(tag.name) for tag in store.tags()}
    stored = {(values.view, values.tag): values for values in materialised(store)}

    def reasons(values: Materialised) -> Iterator[tuple[str, str]]:
        view = views.get(values.view)
        if view is None:
            yield "its definition is gone", ""
            return
        command = _command(values.view, values.tag)
        if not values.complete:
            yield f"{values.done:,} of {values.total:,} samples are done", command
        if values.lineage["definition_hash"] not in view.accepted_hashes:
            yield "its definition changed", command
        newest = max((v for v in views.values() if v.name == view.name), key=lambda v: v.version)
        if newest.version > view.version and (newest.key, values.tag) not in stored:
            yield f"{newest.key} is newer", _command(newest.key, values.tag)
        if view.model:
            used = model = values.lineage["model"]
            with suppress(FeatureError):
                model = model_of_view(tracking, view, datasets[values.tag]).uri
            if model != used:
                yield f"{model} is newer than {used}", command
        campaign = datasets[values.tag].attrs["campaign"]
        tag = [tag for tag, d in datasets.items() if d.attrs["campaign"] == campaign][-1]
        if tag != values.tag and (values.view, tag) not in stored:
            yield f"{tag} is newer and has none", _command(values.view, tag)

    return [
        Stale(values.view, values.tag, *outdated)
        for values in stored.values()
        for outdated in reasons(values)
    ]
