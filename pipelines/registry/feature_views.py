"""Feature views on a cluster: compute the values of a view block by block, and commit them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client, Future
from icechunk.session import ForkSession
from numpy.typing import NDArray

from bragg_data.provenance import code_commit
from bragg_data.store.block_writer import BlockResult, failed_block
from bragg_data.store.repository import DiskFullError, Store, open_snapshot
from catalog import features, registry
from catalog.features import VIEWS, FeatureError, FeatureWriter, View, ViewModel
from catalog.model_files import downloaded_model
from pipelines.cli.console import duration, say, three_digits
from pipelines.cluster.blocks import do_blocks
from pipelines.registry.registration import load_version


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model that computes a view: the version, and the tracking URI of its files.

    Workers fetch the files by themselves; of a server they need HTTP alone.
    """

    tracking_uri: str
    version: registry.ModelVersion

    @property
    def computer(self) -> ViewModel:
        """What the lineage keeps of it."""
        return ViewModel(self.version.uri, digest_of(self))


def materialise(
    client: Client,
    store: Store,
    dataset: xr.Dataset,
    view: View,
    model: RegisteredModel | None = None,
) -> features.Materialised:
    """Compute a view for all samples of a data set, block by block, and commit it.

    What is there of the same definition, model and data is kept.

    Parameters
    ----------
    client
        Of the cluster.
    store, dataset
        The data set, opened by its tag, and where it is.
    view
        What.
    model
        The registered model that computes it, for views that need one.

    Raises
    ------
    FeatureError
        If the view needs a model and there is none, or blocks failed.
    ModelError, PredictorError
        If the model cannot be read.
    BlocksError, StoreError
        If the cluster or the store do not do their part.
    """
    if view.model and model is None:
        raise FeatureError(f"{view.key} is computed by a registered {view.model}: name one.")
    computer = ViewModel() if model is None else model.computer
    size = features_of(view, model, *features.inputs_of(view, dataset, slice(1))).shape[1]
    with FeatureWriter(
        store, dataset, view, size, computer=computer, code_commit=code_commit()
    ) as writer:
        source = str(dataset.attrs["tag"]), str(dataset.attrs["uri"])
        say(
            f"View [bold]{view.key}[/] of {source[0]}: {size:,} features of {writer.count:,} "
            f"samples, {len(writer.missing()):,} of {writer.n_blocks:,} blocks to do"
        )

        def submit(block: int, fork: ForkSession) -> Future:
            return client.submit(
                _do_block, source, view.key, model, writer.group, block, writer.rows(block), fork,
                pure=False,
            )  # fmt: skip

        if writer.missing():
            done = do_blocks(client, writer, submit, doing="Materialising", unit="samples")
            say(
                f"Materialised {done.count:,} samples in {duration(done.seconds)}, "
                f"{three_digits(done.rate)} samples/s"
            )
        if writer.failures:
            block, reason = min(writer.failures.items())
            raise FeatureError(
                f"{len(writer.failures)} of {writer.n_blocks} blocks failed; the others are in the "
                f"store. Block {block} failed with {reason.rstrip('.')}. Run the same command "
                f"again to retry."
            )
    return next(m for m in features.materialised(store, source[0]) if m.view == view.key)


def features_of(
    view: View, model: RegisteredModel | None, *inputs: NDArray[Any]
) -> NDArray[np.float32]:
    """Return a view's features (n, m) of its inputs (n, points), by its function or its model."""
    if view.function is not None:
        return np.asarray(view.function(*inputs), dtype=np.float32)
    assert model is not None
    (profiles,) = inputs
    return _loaded(model.tracking_uri, model.version).features(profiles)


def digest_of(model: RegisteredModel) -> str:
    """Return the SHA-256 (16 hexadecimal digits) of a registered model's files."""
    digest = hashlib.sha256()
    with downloaded_model(model.tracking_uri, model.version) as directory:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(directory)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# The blocks of a process all ask for the same ones.
_opened = lru_cache(maxsize=1)(open_snapshot)
_loaded = lru_cache(maxsize=1)(load_version)


def _do_block(
    source: tuple[str, str],
    view: str,
    model: RegisteredModel | None,
    group: str,
    block: int,
    rows: slice,
    fork: ForkSession,
) -> BlockResult | DiskFullError:
    """Compute and write one block: the task of a worker."""
    try:
        inputs = features.inputs_of(VIEWS[view], _opened(*source), rows)
        return features.write_features(fork, group, block, features_of(VIEWS[view], model, *inputs))
    except DiskFullError as error:
        return error
    except Exception as error:
        return failed_block(block, rows.stop - rows.start, error)
