"""Feature views on a cluster: compute the values of a view block by block, and commit them."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client, Future
from icechunk.session import ForkSession
from numpy.typing import NDArray
from rich.filesize import decimal
from rich.table import Table

from bragg_data.arrays import Floats32
from bragg_data.store.block_writer import BlockResult, failed_block
from bragg_data.store.repository import DiskFullError, Store, open_snapshot
from catalog import features, registry, views
from catalog.features import FeatureWriter, Materialised, group_of, write_features
from catalog.model_files import downloaded_model
from catalog.tracking import Tracking
from catalog.views import VIEWS, FeatureError, View
from pipelines.cli.console import console, print_rows, say
from pipelines.cluster.blocks import do_blocks, failures_text
from pipelines.registry.registration import load_version
from pipelines.snapshots.verification import verify_snapshot

_NOT_SHOWN = ("view", "description", "rows_per_chunk", "failures")  # of the lineage


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model: the version, and the tracking URI of its files.

    Workers fetch the files by themselves; of a server they need HTTP alone.
    """

    tracking_uri: str
    version: registry.ModelVersion


def materialise(
    client: Client,
    store: Store,
    dataset: xr.Dataset,
    view: View,
    model: RegisteredModel | None = None,
) -> Materialised:
    """Compute a view for all samples of a data set, opened by its tag, and commit it by blocks.

    Stored blocks of the same definition, model and data are not computed again. Raises
    `FeatureError` if the view needs a model and none is given, or blocks failed, `ModelError` or
    `PredictorError` if the model cannot be read, and `BlocksError` or `StoreError` if the cluster
    or the store fails.
    """
    verify_snapshot(dataset)
    size = features_of(view, model, *views.inputs_of(view, dataset, slice(1))).shape[1]
    identity = ("", "") if model is None else (model.version.uri, _digest_of(model))
    with FeatureWriter(store, dataset, view, size, identity) as writer:
        source = str(dataset.attrs["tag"]), str(dataset.attrs["uri"])
        if damaged := writer.recheck():
            say(f"{len(damaged)} finished blocks are damaged: they are computed again")
        missing = len(writer.missing())
        say(
            f"View [bold]{view.key}[/] of {source[0]}: {size:,} features of {writer.count:,} "
            f"samples, {missing:,} of {writer.n_blocks:,} blocks to do"
        )

        def submit(block: int, fork: ForkSession) -> Future:
            task = fork, source, view.key, model, block, writer.rows(block)
            return client.submit(_write_block, *task, pure=False)

        if missing:
            done = do_blocks(client, writer, submit, doing="Materialising", unit="samples")
            say(f"Materialised {done.summary}")
        if writer.failures:
            raise FeatureError(f"{failures_text(writer)}.")
    stored = features.materialised(store, source[0])
    return next(values for values in stored if values.view == view.key)


def model_for_view(
    tracking: Tracking, view: View, dataset: xr.Dataset, uri: str | None
) -> RegisteredModel:
    """Return the registered model that computes a view, by its address or the newest one.

    Raises `FeatureError` if it is a model of another kind, or none was trained on the data set, and
    `ModelError` if there is no model at the address.
    """
    if uri is None:
        version = features.model_of_view(tracking, view, dataset)
    else:
        version = registry.find(tracking, uri)
    kind = version.tags.get("model", "model of another project")
    if kind != view.model:
        raise FeatureError(f"{version.uri} is a {kind}; {view.key} is computed by a {view.model}.")
    return RegisteredModel(tracking.uri, version)


def features_of(view: View, model: RegisteredModel | None, *inputs: NDArray[Any]) -> Floats32:
    """Return a view's features (n, m) of its inputs (n, points), by its function or its model."""
    if view.function is not None:
        return np.asarray(view.function(*inputs), dtype=np.float32)
    if model is None:
        raise FeatureError(f"{view.key} is computed by a registered {view.model}: name one.")
    (profiles,) = inputs
    return _loaded(model.tracking_uri, model.version).features(profiles)


def _digest_of(model: RegisteredModel) -> str:
    """Return the SHA-256 (16 hexadecimal digits) of a registered model's files."""
    digest = hashlib.sha256()
    with downloaded_model(model.tracking_uri, model.version) as directory:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(directory)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# All blocks of a process need the same data set and model.
_opened = lru_cache(maxsize=1)(open_snapshot)
_loaded = lru_cache(maxsize=1)(load_version)


def _write_block(
    fork: ForkSession,
    source: tuple[str, str],
    key: str,
    model: RegisteredModel | None,
    block: int,
    rows: slice,
) -> BlockResult | DiskFullError:
    """Compute and write one block of a view of a data set (tag and store): the task of a worker."""
    try:
        view = VIEWS[key]
        values = features_of(view, model, *views.inputs_of(view, _opened(*source), rows))
        return write_features(fork, group_of(view), block, values)
    except DiskFullError as error:
        return error
    except Exception as error:
        return failed_block(block, rows.stop - rows.start, error)


def print_views(store: str) -> None:
    """Print the views, and the data sets that they are materialised for."""
    tags: dict[str, list[str]] = {}
    for values in _stored(store):
        state = "" if values.complete else f", {values.done / values.total:.0%}"
        tags.setdefault(values.view, []).append(f"{values.tag} ({decimal(values.bytes)}{state})")
    table = Table("view", "computed by", "materialised for", "description", box=None)
    for view in VIEWS.values():
        source = f"a registered {view.model}" if view.model else "a function, as it is read"
        table.add_row(view.key, source, ", ".join(tags.get(view.key, ())), view.description)
    console.print(table)


def print_view(view: View, store: str) -> None:
    """Print the definition of a view, and the lineage of its values for each data set."""
    function: Any = view.function
    source = f"{function.__module__}.{function.__qualname__}" if function else ""
    rows = {
        "view": view.key,
        "description": view.description,
        "definition": view.definition_hash,
        "computed by": source or f"a registered {view.model}",
    }
    print_rows(rows)
    for values in _stored(store):
        if values.view == view.key:
            size = f"{values.done:,} of {values.total:,} samples, {decimal(values.bytes)}"
            shown = {k: v for k, v in values.lineage.items() if v and k not in _NOT_SHOWN}
            rows = {"data set": values.tag, "size": size, "snapshot": values.snapshot_id, **shown}
            say()
            print_rows({name.replace("_", " "): str(value) for name, value in rows.items()})


def _stored(store: str) -> list[Materialised]:
    """Return the stored values of all views; none if there is no store yet."""
    exists = "://" in store or Path(store).exists()
    return features.materialised(Store(store)) if exists else []
