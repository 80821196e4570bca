"""The schema: what it is, spelled out once more, and what it refuses."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import xarray as xr

from bragg_data.store import schema
from bragg_data.store.schema import SchemaError, validate
from tests.tiny_campaign import tiny_campaign

SYSTEMS = "cubic tetragonal trigonal hexagonal orthorhombic monoclinic triclinic"

# Scripts read these names, units and codes: change them only together with the schema's version.
GOLDEN = {
    "tof": (("tof",), "float64", {"units": "us", "long_name": "time of flight"}),
    "parameter": (
        ("parameter",),
        "int8",
        {
            "long_name": "cell parameter",
            "flag_values": [0, 1, 2, 3, 4, 5],
            "flag_meanings": "a b c alpha beta gamma",
        },
    ),
    "intensity": (
        ("sample", "tof"),
        "float32",
        {"units": "us-1", "long_name": "neutron counts per time of flight, in an arbitrary scale"},
    ),
    "a": (("sample",), "float64", {"units": "angstrom", "long_name": "cell length a"}),
    "b": (("sample",), "float64", {"units": "angstrom", "long_name": "cell length b"}),
    "c": (("sample",), "float64", {"units": "angstrom", "long_name": "cell length c"}),
    "alpha": (("sample",), "float64", {"units": "degree", "long_name": "cell angle alpha"}),
    "beta": (("sample",), "float64", {"units": "degree", "long_name": "cell angle beta"}),
    "gamma": (("sample",), "float64", {"units": "degree", "long_name": "cell angle gamma"}),
    "crystal_system": (
        ("sample",),
        "int8",
        {
            "long_name": "crystal system",
            "flag_values": [0, 1, 2, 3, 4, 5, 6],
            "flag_meanings": SYSTEMS,
        },
    ),
    "phase": (
        ("sample",),
        "int8",
        {
            "long_name": "phase of the campaign",
            "flag_values": [0, 1, 2],
            "flag_meanings": "cubic tetragonal trigonal",
        },
    ),
    "free_parameter": (
        ("sample", "parameter"),
        "bool",
        {"long_name": "cell parameters that the space group leaves free"},
    ),
    "status": (
        ("sample",),
        "int8",
        {
            "long_name": "state of the simulation",
            "flag_values": [-1, 0, 1],
            "flag_meanings": "failed pending done",
        },
    ),
    "block_sha256": (
        ("block", "digest_byte"),
        "uint8",
        {"long_name": "SHA-256 of each block's labels and intensities"},
    ),
}
GOLDEN_ATTRIBUTES = {
    "schema_version": int,
    "campaign": str,
    "simulator": str,
    "simulator_version": str,
    "code_commit": str,
    "campaign_sha256": str,
    "cif_sha256": str,
    "instrument_sha256": str,
    "campaign_toml": str,
    "cifs": str,
    "instrument_instprm": str,
    "identity": str,
    "rows_per_chunk": int,
    "content_hash": str,
}


@pytest.fixture
def campaign(tmp_path):
    return tiny_campaign(tmp_path)


@pytest.fixture
def dataset(campaign):
    """A complete data set, without a store behind it."""
    samples = campaign.samples
    dataset = schema.labelled(campaign, samples, "kinematic", "0", "abc")
    rows = 8
    intensity = np.ones((len(samples), 256), np.float32)
    blocks = [slice(start, start + rows) for start in range(0, len(samples), rows)]
    digests = [schema.block_digest(samples[b], intensity[b]) for b in blocks]
    bookkeeping = {
        "intensity": (schema.INTENSITY, intensity),
        "status": (schema.BOOKKEEPING["status"], np.ones(len(samples), np.int8)),
        "block_sha256": (
            schema.BOOKKEEPING["block_sha256"],
            np.array([list(digest) for digest in digests], np.uint8),
        ),
    }
    for name, (spec, values) in bookkeeping.items():
        dataset[name] = (spec.dims, values, dict(spec.attrs))
    dataset.intensity.encoding["chunks"] = (rows, 256)
    identity = campaign.identity("kinematic", "0")
    return dataset.assign_attrs(
        identity=identity,
        rows_per_chunk=rows,
        content_hash=schema.content_hash(identity, dataset.block_sha256.values),
    )


def test_golden_schema(dataset):
    layout = {
        name: (variable.dims, str(variable.dtype), dict(variable.attrs))
        for name, variable in dataset.variables.items()
    }
    assert layout == GOLDEN
    assert set(dataset.coords) == {"tof", "parameter"}
    assert {name: type(value) for name, value in dataset.attrs.items()} == GOLDEN_ATTRIBUTES
    assert schema.SCHEMA_VERSION == 1
    validate(dataset)


def test_labels_say_what_they_mean(dataset):
    meanings = dataset.crystal_system.flag_meanings.split()
    phases = dataset.phase.flag_meanings.split()
    for sample in (0, 30, 66):
        labels = dataset.isel(sample=sample)
        system, phase = meanings[int(labels.crystal_system)], phases[int(labels.phase)]
        assert system == phase  # so they are named in this campaign
        free = [
            name
            for name, is_free in zip(
                dataset.parameter.flag_meanings.split(), labels.free_parameter.values, strict=True
            )
            if is_free
        ]
        assert free == {"cubic": ["a"], "tetragonal": ["a", "c"], "trigonal": ["a", "alpha"]}[phase]
    assert schema.counts_per_system(dataset) == {"cubic": 21, "tetragonal": 25, "trigonal": 21}


def test_hashes_are_those_of_the_texts(dataset, campaign):
    attrs = dataset.attrs
    assert attrs["campaign_sha256"] == hashlib.sha256(attrs["campaign_toml"].encode()).hexdigest()
    cifs, hashes = json.loads(attrs["cifs"]), json.loads(attrs["cif_sha256"])
    assert cifs.keys() == hashes.keys() == {"cubic", "tetragonal", "trigonal"}
    for name, text in cifs.items():
        assert hashes[name] == hashlib.sha256(text.encode()).hexdigest()
    assert schema.campaign_of(dataset).samples.cells.tolist() == campaign.samples.cells.tolist()


def test_every_byte_counts_in_a_digest(campaign):
    samples = campaign.samples[0:3]
    intensity = np.zeros((3, 4), np.float32)
    digests = {schema.block_digest(samples, intensity)}
    for changed in (
        dataclasses.replace(samples, cells=samples.cells + 1e-12),
        dataclasses.replace(samples, phase=samples.phase + np.int8(1)),
        dataclasses.replace(samples, crystal_system=samples.crystal_system + np.int8(1)),
    ):
        digests.add(schema.block_digest(changed, intensity))
    intensity[2, 3] = np.nextafter(np.float32(0), np.float32(1))
    digests.add(schema.block_digest(samples, intensity))
    assert len(digests) == 5
    # Neither memory layout nor byte order of the arrays matters.
    again = schema.block_digest(samples, np.asfortranarray(intensity.astype(">f4")))
    assert again in digests


def _set(name: str, index: object, value: object):
    def change(dataset: xr.Dataset) -> xr.Dataset:
        dataset[name].values[index] = value
        return dataset

    return change


def _attrs(**attrs: object):
    return lambda dataset: dataset.assign_attrs(attrs)


def _unit(dataset: xr.Dataset) -> xr.Dataset:
    dataset.a.attrs["units"] = "nm"
    return dataset


def _chunks(dataset: xr.Dataset) -> xr.Dataset:
    dataset.intensity.encoding["chunks"] = (16, 256)
    return dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("beta"), "variables differ from the schema's: beta"),
        (lambda d: d.assign(extra=("sample", np.zeros(67))), "differ from the schema's: extra"),
        (
            lambda d: d.assign(a=d.a.astype("float32")),
            "'a' has dtype float32; the schema requires float64",
        ),
        (_unit, r"'a' has attributes .*nm.*the schema requires .*angstrom"),
        (_chunks, r"stored in chunks \(16, 256\); \(8, 256\) is expected"),
        (lambda d: d.isel(tof=slice(0, 255)), "sizes .* are expected"),
        (lambda d: d.isel(sample=slice(0, 60)), "sizes .* are expected"),
        (_set("status", 5, 0), "1 of 67 samples are pending or failed. Run the same command again"),
        (_set("status", 5, -1), "1 of 67 samples are pending or failed"),
        (_set("a", 3, np.nan), "not a finite number"),
        (_set("a", slice(None), 0.4), "contradicts its campaign: Cell"),
        (_set("alpha", 3, 91.0), "contradicts its campaign: Cell"),
        (_set("phase", 3, 7), "phase code is outside 0 to 2"),
        (_set("crystal_system", 3, 6), "another crystal system"),
        (_set("free_parameter", (3, 5), True), "other free parameters"),
        (_set("block_sha256", (0, 0), 0), "content_hash is .* own contents give"),
        (_attrs(identity="0" * 64), "identity is 000.* own contents give"),
        (_attrs(campaign_sha256="0"), "campaign_sha256 is 0, but"),
        (_attrs(simulator="gsas2"), "identity is .* own contents give"),
        (_attrs(schema_version=2), "Use the code that wrote it: abc"),
        (lambda d: d.assign_attrs(cifs="{"), "contradicts its campaign"),
    ],
)
def test_what_breaks_the_schema_is_refused(dataset, change, message):
    # A digest may begin with a zero byte; then setting it changes nothing.
    assert dataset.block_sha256.values[0, 0] != 0
    changed = change(dataset.copy(deep=True))
    changed.intensity.encoding.setdefault("chunks", (8, 256))
    with pytest.raises(SchemaError, match=message):
        validate(changed)


@pytest.mark.parametrize("name", list(GOLDEN_ATTRIBUTES))
def test_a_missing_attribute_is_refused(dataset, name):
    del dataset.attrs[name]
    with pytest.raises(SchemaError, match=rf"lacks the attribute\(s\) {name}"):
        validate(dataset)


def test_another_grid_is_refused(dataset):
    changed = dataset.assign_coords(tof=("tof", dataset.tof.values + 1e-9, dataset.tof.attrs))
    changed.intensity.encoding["chunks"] = (8, 256)
    with pytest.raises(SchemaError, match="grid is not the campaign's"):
        validate(changed)


def test_a_data_set_without_its_campaign_is_refused():
    with pytest.raises(SchemaError, match=r"lacks the attribute 'campaign_toml'.*simulate"):
        schema.campaign_of(xr.Dataset())
