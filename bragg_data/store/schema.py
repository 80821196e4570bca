"""What a data set looks like: dimensions, dtypes, units, chunks and attributes."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.arrays import Array, Floats32, Integers8
from bragg_data.campaign import Campaign, CampaignError, Samples
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalError, CrystalSystem
from bragg_data.growth import ATTRIBUTE, growths_of
from bragg_data.store.reading import remedy_of, storage_errors

SCHEMA_VERSION = 1  # changes whenever a reader of the old layout would misread the new one
PENDING, DONE, FAILED = 0, 1, -1  # values of ``status``
DIGEST_BYTES = 32  # of SHA-256


class SchemaError(ValueError):
    """A data set that breaks the schema."""


class Variable(NamedTuple):
    """What a variable looks like in a data set."""

    dims: tuple[str, ...]
    dtype: str
    attrs: Mapping[str, Any]


def variable(
    dims: str, dtype: str, long_name: str, units: str = "", flags: Mapping[str, Any] | None = None
) -> Variable:
    """Return a variable over dimensions that are separated by blanks."""
    attrs = {"units": units} if units else {}
    return Variable(tuple(dims.split()), dtype, {**attrs, "long_name": long_name, **(flags or {})})


def _flags(values: Iterable[int], meanings: Iterable[str]) -> dict[str, list[int] | str]:
    """Name integer codes the way of the CF conventions (section 3.5)."""
    return {"flag_values": [int(v) for v in values], "flag_meanings": " ".join(meanings)}


_CODES = _flags(range(6), CELL_PARAMETERS)
_SYSTEMS = _flags(CrystalSystem, CrystalSystem.__members__)
_STATES = _flags((FAILED, PENDING, DONE), ("failed", "pending", "done"))
_LENGTHS, _ANGLES = CELL_PARAMETERS[:3], CELL_PARAMETERS[3:]

COORDINATES = {
    "tof": variable("tof", "float64", "time of flight", "us"),
    "parameter": variable("parameter", "int8", "cell parameter", flags=_CODES),
}
_FREE = "cell parameters that the space group leaves free"
LABELS = {
    **{n: variable("sample", "float64", f"cell length {n}", "angstrom") for n in _LENGTHS},
    **{n: variable("sample", "float64", f"cell angle {n}", "degree") for n in _ANGLES},
    "crystal_system": variable("sample", "int8", "crystal system", flags=_SYSTEMS),
    # The meanings of its codes are the campaign's phases.
    "phase": variable("sample", "int8", "phase of the campaign"),
    "free_parameter": variable("sample parameter", "bool", _FREE),
}
_INTENSITY = "neutron counts per time of flight, in an arbitrary scale"
INTENSITY = variable("sample tof", "float32", _INTENSITY, "us-1")
_SHA256 = "SHA-256 of each block's labels and intensities"
BOOKKEEPING = {
    "status": variable("sample", "int8", "state of the simulation", flags=_STATES),
    "block_sha256": variable("block digest_byte", "uint8", _SHA256),
}
_TEXTS = ("campaign", "campaign_toml", "cifs", "instrument_instprm")
_HASHES = ("campaign_sha256", "cif_sha256", "instrument_sha256")
_PROVENANCE = ("simulator", "simulator_version", "code_commit")
_STORED = ("identity", "rows_per_chunk", "content_hash")
_ATTRIBUTES = ("schema_version", *_TEXTS, *_HASHES, *_PROVENANCE, *_STORED)


def labelled(
    campaign: Campaign, samples: Samples, simulator: str, version: str, code_commit: str
) -> xr.Dataset:
    """Return a data set that has everything but its intensities, which a simulator computes.

    Coordinates and labels are over the dimensions sample (n), tof and parameter (6).
    """
    masks = np.array([phase.lattice.free_mask for phase in campaign.phases])
    values: dict[str, NDArray[Any]] = {
        "tof": campaign.grid.tof,
        "parameter": np.arange(6),
        **dict(zip(CELL_PARAMETERS, samples.cells.T, strict=True)),
        "crystal_system": samples.crystal_system,
        "phase": samples.phase,
        "free_parameter": masks[samples.phase],
    }
    variables = {
        name: (spec.dims, np.ascontiguousarray(values[name], dtype=spec.dtype), dict(spec.attrs))
        for name, spec in (COORDINATES | LABELS).items()
    }
    variables["phase"][2].update(_phase_flags(campaign))
    attrs = {
        "schema_version": SCHEMA_VERSION,
        "campaign": campaign.name,
        "simulator": simulator,
        "simulator_version": version,
        "code_commit": code_commit,
        **_hashes(campaign),
        "campaign_toml": campaign.toml,
        # JSON in a string: an attribute of NetCDF cannot be a mapping.
        "cifs": json.dumps(dict(campaign.cifs)),
        "instrument_instprm": campaign.instprm,
    }
    if campaign.growth:
        attrs[ATTRIBUTE] = campaign.growth
    if campaign.assumptions:
        attrs["structure_assumptions"] = json.dumps(campaign.assumptions, ensure_ascii=False)
    return xr.Dataset(variables, attrs=attrs)


def bookkeeping(status: Integers8, digests: NDArray[np.uint8]) -> dict[str, xr.Variable]:
    """Return the variables ``status`` (sample) and ``block_sha256`` (block, digest_byte)."""
    values = zip(BOOKKEEPING.items(), (status, digests), strict=True)
    return {name: xr.Variable(spec.dims, v, dict(spec.attrs)) for (name, spec), v in values}


def _phase_flags(campaign: Campaign) -> dict[str, list[int] | str]:
    names = [phase.name for phase in campaign.phases]
    return _flags(range(len(names)), names)


def _hashes(campaign: Campaign) -> dict[str, str]:
    cifs = {name: _sha256(text.encode()) for name, text in campaign.cifs.items()}
    return {
        "campaign_sha256": _sha256(campaign.toml.encode()),
        "cif_sha256": json.dumps(cifs),
        "instrument_sha256": _sha256(campaign.instprm.encode()),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def campaign_of(dataset: xr.Dataset) -> Campaign:
    """Return the campaign of a data set, rebuilt from its attributes.

    Raises `SchemaError` if an attribute that it needs is missing.
    """
    try:
        texts = [dataset.attrs[name] for name in _TEXTS[1:]]
    except KeyError as error:
        raise SchemaError(
            f"The data set lacks the attribute {error}, so its campaign is not known. Use one that "
            f"pipelines.simulate wrote."
        ) from error
    return Campaign(texts[0], json.loads(texts[1]), texts[2], dataset.attrs.get(ATTRIBUTE, ""))


def block_digest(samples: Samples, intensity: Floats32) -> bytes:
    """Return the SHA-256 of one block of n samples.

    Little-endian bytes, in C order: cells (n, 6) as float64 in the order a, b, c, alpha, beta,
    gamma; crystal_system (n) as int8; phase (n) as int8; intensity (n, points) as float32.
    """
    digest = hashlib.sha256(np.ascontiguousarray(samples.cells, dtype="<f8").data)
    for codes in (samples.crystal_system, samples.phase):
        digest.update(np.ascontiguousarray(codes, dtype="i1").data)
    digest.update(np.ascontiguousarray(intensity, dtype="<f4").data)
    return digest.digest()


def content_hash(identity: str, digests: NDArray[np.uint8]) -> str:
    """Return the SHA-256 (hex) of a whole data set.

    Of its identity, 64 hexadecimal characters, and the :func:`block_digest` of each block, shape
    (n_blocks, 32), in sample order.
    """
    return _sha256(identity.encode("ascii") + np.ascontiguousarray(digests, np.uint8).tobytes())


def samples_of(dataset: xr.Dataset) -> Samples:
    """Return the labels of a data set as samples; a `StoreError` if they are damaged."""
    with storage_errors("reading the labels", remedy_of(dataset.attrs)):
        cells = np.stack([dataset[name].values for name in CELL_PARAMETERS], axis=1)
        codes = dataset.phase.values, dataset.crystal_system.values
    growths = growths_of(dataset.attrs.get(ATTRIBUTE, ""))
    return Samples(*codes, cells, growths[0].parent_samples if growths else None)


def free_ranges(cells: Array, free_parameters: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest value of each free parameter of some cells, shape (n, 6).

    In ångström and degrees; empty without cells.
    """
    if not len(cells):
        return {}
    columns = {name: cells[:, CELL_PARAMETERS.index(name)] for name in free_parameters}
    return {name: (float(v.min()), float(v.max())) for name, v in columns.items()}


def counts_per_system(dataset: xr.Dataset) -> dict[str, int]:
    """Return how many samples there are of each crystal system that has any, by its name."""
    codes = dataset.crystal_system.values
    counts = np.bincount(codes[codes >= 0], minlength=len(CrystalSystem))
    known = {system.name: int(counts[system]) for system in CrystalSystem if counts[system]}
    unknown = int((codes < 0).sum())  # measured ones
    return known | ({"unknown": unknown} if unknown else {})


def validate(dataset: xr.Dataset) -> None:
    """Raise a SchemaError at the first breach of the schema of a tag; intensities are not read."""
    attrs = dataset.attrs
    missing = [name for name in _ATTRIBUTES if name not in attrs]
    if missing:
        raise SchemaError(f"The data set lacks the attribute(s) {', '.join(missing)}.")
    if attrs["schema_version"] != SCHEMA_VERSION:
        raise SchemaError(
            f"The data set has schema version {attrs['schema_version']}; this code knows "
            f"{SCHEMA_VERSION}. Use the code that wrote it: {attrs['code_commit']}."
        )
    try:
        campaign = campaign_of(dataset)
        _check_layout(dataset, campaign)
        _check_provenance(dataset, campaign)
        _check_values(dataset, campaign)
    except (CampaignError, CrystalError, json.JSONDecodeError) as error:
        raise SchemaError(f"The data set contradicts its campaign: {error}") from error


def _check_layout(dataset: xr.Dataset, campaign: Campaign) -> None:
    expected = {**COORDINATES, **LABELS, **BOOKKEEPING, "intensity": INTENSITY}
    if set(dataset.variables) != set(expected):
        odd = ", ".join(sorted(set(map(str, dataset.variables)) ^ set(expected)))
        raise SchemaError(f"The data set's variables differ from the schema's: {odd}.")
    for name, spec in expected.items():
        stored = dataset.variables[name]
        attrs = dict(spec.attrs) | (_phase_flags(campaign) if name == "phase" else {})
        actual = stored.dims, str(stored.dtype), dict(stored.attrs)
        required = spec.dims, spec.dtype, attrs
        for what, is_, should in zip(
            ("dimensions", "dtype", "attributes"), actual, required, strict=True
        ):
            if is_ != should:
                raise SchemaError(f"'{name}' has {what} {is_}; the schema requires {should}.")
    rows, n = int(dataset.attrs["rows_per_chunk"]), dataset.sizes["sample"]
    points = campaign.grid.points
    sizes = {"sample": n, "tof": points, "parameter": 6}
    sizes |= {"block": -(-n // rows), "digest_byte": DIGEST_BYTES}
    if dict(dataset.sizes) != sizes or n == 0:
        raise SchemaError(f"The data set has sizes {dict(dataset.sizes)}; {sizes} are expected.")
    chunks = dataset.variables["intensity"].encoding.get("chunks")
    if chunks != (rows, points):
        raise SchemaError(
            f"'intensity' is stored in chunks {chunks}; {(rows, points)} is expected, because a "
            f"chunk is the unit of work."
        )


def _check_provenance(dataset: xr.Dataset, campaign: Campaign) -> None:
    attrs, n = dataset.attrs, dataset.sizes["sample"]
    expected = {
        "campaign": campaign.name,
        **_hashes(campaign),
        "identity": campaign.identity(attrs["simulator"], attrs["simulator_version"], n),
        "content_hash": content_hash(attrs["identity"], dataset.block_sha256.values),
    }
    for name, value in expected.items():
        if attrs[name] != value:
            raise SchemaError(
                f"Attribute {name} is {attrs[name]}, but the data set's own contents give {value}."
            )


def _check_values(dataset: xr.Dataset, campaign: Campaign) -> None:
    unfinished = int((dataset.status != DONE).sum())
    if unfinished:
        raise SchemaError(
            f"{unfinished} of {dataset.sizes['sample']} samples are pending or failed. Run the "
            f"same command again to complete them."
        )
    if not np.array_equal(dataset.tof.values, campaign.grid.tof):
        raise SchemaError("The time-of-flight grid is not the campaign's.")
    if not np.array_equal(dataset.parameter.values, np.arange(6)):
        raise SchemaError("The codes of the cell parameters are not 0 to 5.")
    samples = samples_of(dataset)
    if not np.isfinite(samples.cells).all():
        raise SchemaError("A cell parameter is not a finite number.")
    if samples.phase.min() < 0 or samples.phase.max() >= len(campaign.phases):
        raise SchemaError(f"A phase code is outside 0 to {len(campaign.phases) - 1}.")
    for code, phase in enumerate(campaign.phases):
        rows = samples.phase == code
        phase.lattice.check(samples.cells[rows])
        if (samples.crystal_system[rows] != phase.crystal_system).any():
            raise SchemaError(f"A sample of phase '{phase.name}' has another crystal system.")
        if (dataset.free_parameter.values[rows] != phase.lattice.free_mask).any():
            raise SchemaError(f"A sample of phase '{phase.name}' has other free parameters.")
