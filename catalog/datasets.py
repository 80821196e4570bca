"""Snapshots of the store as MLflow data sets: which data a run used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset, DatasetInput, InputTag

from bragg_data.store.repository import open_snapshot

# MLflow shows this much of the digest in its tables and takes no more than 36 characters.
_DIGEST_LENGTH = 36


class SnapshotSource(DatasetSource):  # type: ignore[misc]
    """A tagged snapshot of a store.

    Parameters
    ----------
    uri
        Of the store.
    tag, snapshot_id
        The snapshot's name and its immutable identity.
    content_hash
        SHA-256 over labels and intensities.
    """

    def __init__(self, uri: str, tag: str, snapshot_id: str, content_hash: str) -> None:
        self.uri = uri
        self.tag = tag
        self.snapshot_id = snapshot_id
        self.content_hash = content_hash

    @staticmethod
    def _get_source_type() -> str:
        return "icechunk"

    def load(self, **_: Any) -> xr.Dataset:
        """Open the snapshot; see :func:`bragg_data.store.repository.open_snapshot`."""
        return open_snapshot(self.tag, self.uri)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:  # noqa: ARG004 - never guessed from a string
        return False

    @classmethod
    def _resolve(cls, raw_source: Any) -> SnapshotSource:
        raise NotImplementedError(f"{raw_source!r} does not identify a snapshot.")

    def to_dict(self) -> dict[str, str]:
        """Return the values from which :meth:`from_dict` makes an equal source."""
        return {
            "uri": self.uri,
            "tag": self.tag,
            "snapshot_id": self.snapshot_id,
            "content_hash": self.content_hash,
        }

    @classmethod
    def from_dict(cls, source_dict: Mapping[str, str]) -> SnapshotSource:
        """Return the source that :meth:`to_dict` described."""
        return cls(**source_dict)


def source_of(dataset: xr.Dataset) -> SnapshotSource:
    """Return the source of an opened snapshot, from its attributes."""
    attrs = dataset.attrs
    return SnapshotSource(
        attrs["uri"], attrs["tag"], attrs["snapshot_id"], attrs.get("content_hash", "")
    )


def dataset_input(source: SnapshotSource, context: str) -> DatasetInput:
    """Return a snapshot as MLflow logs it for a run, for a purpose such as "training"."""
    # The snapshot's identity is the digest: hashing gigabytes again would add nothing.
    dataset = MetaDataset(source, name=source.tag, digest=source.snapshot_id[:_DIGEST_LENGTH])
    entity = Dataset(
        name=dataset.name,
        digest=dataset.digest,
        source_type=source._get_source_type(),
        source=source.to_json(),
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", context)])
