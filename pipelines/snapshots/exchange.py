"""A snapshot's labels as Parquet, and its description in Croissant, for tools of others."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from bragg_data.files import write_whole
from bragg_data.store.schema import LABELS

_LABELS, _CROISSANT = "labels.parquet", "croissant.json"
_IDENTITY = ("tag", "snapshot_id", "content_hash", "campaign", "simulator", "simulator_version")
# The context that version 1.0 of Croissant's specification prescribes, less the vocabularies.
_TERMS = """citeAs column equivalentProperty extract field fileProperty fileObject fileSet format
includes isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace
samplingRate separator source subField transform"""
_CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS.split()},
}


def write_labels(dataset: xr.Dataset, file: Path) -> None:
    """Write the labels of a snapshot as Parquet, a row for each sample in the store's order.

    The columns are a, b, c (Å), alpha, beta, gamma (degrees), ``crystal_system`` and ``phase``,
    these by name; units and meanings are metadata of the columns, what identifies the snapshot is
    metadata of the table. A phase that is not known is missing.
    """
    names = [name for name, spec in LABELS.items() if spec.dims == ("sample",)]
    frame = dataset[names].to_dataframe()
    for name in ("crystal_system", "phase"):
        attrs = dataset[name].attrs
        values, meanings = attrs["flag_values"], attrs["flag_meanings"].split()
        codes = pd.Categorical(frame[name], categories=values)
        frame[name] = codes.rename_categories(meanings)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    fields = [
        field.with_metadata(
            {key: dataset[field.name].attrs.get(key, "") for key in ("units", "long_name")}
        )
        for field in table.schema
    ]
    identity = {name: str(dataset.attrs[name]) for name in _IDENTITY}
    table = table.cast(pa.schema(fields, metadata={**table.schema.metadata, **identity}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_whole(file, sink.getvalue().to_pybytes())


def write_croissant(dataset: xr.Dataset, directory: Path) -> None:
    """Write the labels of a snapshot, and a description of it in Croissant, into a directory.

    The description names the store, which holds the patterns, and each column of the labels. It
    states no licence, author or date of publication: these are for the owner to add.
    """
    directory.mkdir(parents=True, exist_ok=True)
    labels = directory / _LABELS
    write_labels(dataset, labels)
    attrs = dataset.attrs
    columns = pq.read_schema(labels)
    patterns = (
        f"{dataset.sizes['sample']:,} patterns of {dataset.sizes['tof']:,} points, in an Icechunk "
        f"repository: bragg_data.open_snapshot(TAG, URI)"
    )
    description = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": attrs["tag"],
        "description": (
            f"Neutron time-of-flight diffraction patterns of the campaign {attrs['campaign']}, by "
            f"{attrs['simulator']} {attrs['simulator_version']}, with crystal system, phase and "
            f"cell of each."
        ),
        "url": attrs["uri"],
        "identifier": attrs["snapshot_id"],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": _LABELS,
                "name": _LABELS,
                "description": "The labels, in the order of the patterns.",
                "contentUrl": _LABELS,
                "encodingFormat": "application/x-parquet",
                "sha256": hashlib.sha256(labels.read_bytes()).hexdigest(),
            },
            {
                "@type": "cr:FileObject",
                "@id": "patterns",
                "name": "patterns",
                "description": f"{patterns}. The hash is that of identity, labels and patterns.",
                "contentUrl": attrs["uri"],
                "encodingFormat": "application/vnd.zarr",
                "sha256": attrs["content_hash"],
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "labels",
                "name": "labels",
                "field": [_field(columns.field(name)) for name in columns.names],
            }
        ],
    }
    text = json.dumps(description, indent=1, ensure_ascii=False)
    write_whole(directory / _CROISSANT, text.encode())


def _field(column: pa.Field) -> dict[str, object]:
    meaning = {key.decode(): value.decode() for key, value in column.metadata.items()}
    unit = f" ({meaning['units']})" if meaning["units"] else ""
    return {
        "@type": "cr:Field",
        "@id": f"labels/{column.name}",
        "name": f"labels/{column.name}",
        "description": meaning["long_name"] + unit,
        "dataType": "sc:Float" if pa.types.is_floating(column.type) else "sc:Text",
        "source": {"fileObject": {"@id": _LABELS}, "extract": {"column": column.name}},
    }
