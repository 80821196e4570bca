"""Writing the values of feature views into the store, block by block, with their lineage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import xarray as xr
import zarr
from icechunk.session import ForkSession
from numpy.typing import NDArray

from bragg_data.store import schema
from bragg_data.store.block_writer import BlockResult, BlockWriter, create_group, write_chunk
from bragg_data.store.repository import FEATURES, Store, StoreError
from catalog.views import View

# Stored values are current if they agree in these, and in an accepted definition hash.
_IDENTITY = ("view", "content_hash", "model_digest")


@dataclass(frozen=True)
class ViewModel:
    """The registered model that computes a view: its address and the digest of its files.

    Attributes
    ----------
    uri
        ``models:/NAME/VERSION``.
    digest
        SHA-256 of its files.
    """

    uri: str = ""
    digest: str = ""


class FeatureWriter(BlockWriter):
    """Writes the values of a view; see :class:`BlockWriter`.

    Stored values of the same definition, model and data stay; others are replaced (they remain in
    the repository's history).

    Parameters
    ----------
    store, dataset
        The data set, opened by its tag, and the store that it is in.
    view
        The view.
    size
        Number of features.
    model
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
        model: ViewModel | None = None,
        code_commit: str = "unknown",
    ) -> None:
        self.view, self.size = view, size
        self._rows = int(dataset.attrs["rows_per_chunk"])
        branch = store.branch_of(dataset)
        self.lineage = lineage_of(view, dataset, model or ViewModel())
        super().__init__(
            store,
            branch,
            group_of(view),
            dataset.sizes["sample"],
            lock=f"{branch}-{view.key}",
            provenance={"code_commit": code_commit},
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
        attrs = {
            **self.lineage,
            **self._provenance,
            "description": self.view.description,
            "rows_per_chunk": self._rows,
        }
        shape = self.count, self.size
        values = schema.variable("sample feature", "float32", self.view.description)
        create_group(session, self.group, xr.Dataset(attrs=attrs), "values", shape, values)
        session.commit(f"create {self.group}: {self.count} samples, {self.size} features")

    def _check(self, dataset: xr.Dataset) -> None:
        expected = {
            "sample": self.count,
            "feature": self.size,
            "block": len(dataset.block_sha256),
            "digest_byte": schema.DIGEST_BYTES,
        }
        if dataset.sizes != expected:
            raise StoreError(
                f"{self.group} on branch {self.branch} has the sizes {dict(dataset.sizes)}; "
                f"{self.count} samples of {self.size} features are expected. The definition "
                f"changed without a new version: give {self.view.name} another version."
            )


def group_of(view: View) -> str:
    """Return the path of a view's values on a data set's branch."""
    return f"{FEATURES}/{view.name}/{view.version}"


def lineage_of(view: View, dataset: xr.Dataset, model: ViewModel) -> dict[str, str]:
    """Return the lineage of the values of a view, as attributes of their group."""
    return {
        "view": view.key,
        "definition_hash": view.definition_hash,
        "content_hash": str(dataset.attrs["content_hash"]),
        "model": model.uri,
        "model_digest": model.digest,
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
    invalid = ~np.isfinite(values).all(axis=1)
    if invalid.any():
        status = np.where(invalid, schema.FAILED, schema.PENDING).astype(np.int8)
        reason = f"The features of {invalid.sum()} samples are not finite."
        return BlockResult(block, status, reason=reason)
    write_chunk(fork, group, "values", block, values)
    digest = hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").data).digest()
    return BlockResult(block, np.full(len(values), schema.DONE, np.int8), fork, digest)
