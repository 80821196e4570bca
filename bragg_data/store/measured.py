"""Measured data sets: profiles of a campaign's instrument in the store, native and on its grid.

They look like simulated ones: samples on the campaign's grid with labels where they are known (a
phase code of -1 and NaN elsewhere). ``sigma`` and ``covered`` are next to ``intensity``, which
still has its background; the feature view ``measured_aligned`` subtracts it. The group ``native``
on the same branch holds each profile as it was read, under SAMPLE-RUN-BANK.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from bragg_data.campaign import Campaign, Samples
from bragg_data.crystallography.cell import check_volume
from bragg_data.measurement.load import Label, Measurement
from bragg_data.measurement.readers import Profile
from bragg_data.store import schema
from bragg_data.store.block_writer import COMPRESSORS, write_variables
from bragg_data.store.repository import NATIVE, Store, StoreError, Tag, branch_name, storage_errors

# Where a measured profile comes from: an entry of the attribute ``measurements``.
MeasurementRecord = Mapping[str, Any]

SIMULATOR = "measured"  # instead of a simulator's name
_ROWS = 64
_UNKNOWN = -1
_VERSION = "1"
# In titles and comments, as Mantid and ISIS write them.
_RUN = re.compile(r"\brun\s*(?:number)?\s*:?\s*(\d+)", re.IGNORECASE)
_TEMPERATURE = re.compile(r"(?:temperature[ :=]*|\()(\d+(?:\.\d+)?) ?(K|°?C)\b", re.IGNORECASE)


def measured_dataset(
    name: str,
    campaign: Campaign,
    measurements: Sequence[Measurement],
    labels: Sequence[Label | None],
    code_commit: str,
) -> xr.Dataset:
    """Return measurements on a campaign's grid as a data set of :mod:`bragg_data.store.schema`.

    With ``sigma`` and ``covered`` over (sample, tof), and the attribute ``measurements``: JSON, one
    record for each sample. A label is None where nothing is known.
    """
    count = len(measurements)
    phases = np.array([label.phase if label else _UNKNOWN for label in labels], np.int8)
    # Of an unknown phase, -1, the last one.
    systems = np.array([*(phase.crystal_system for phase in campaign.phases), _UNKNOWN], np.int8)
    cells = np.array([label.cell if label else [np.nan] * 6 for label in labels], np.float64)
    samples = Samples(phase=phases, crystal_system=systems[phases], cells=cells)
    dataset = schema.labelled(campaign, samples, SIMULATOR, _VERSION, code_commit)
    known = samples.phase >= 0
    dataset["free_parameter"] = dataset.free_parameter & xr.DataArray(known, dims="sample")
    gridded = [measurement.gridded for measurement in measurements]
    intensity = np.stack([g.intensity for g in gridded]).astype(np.float32)
    records = [_record(row, m) for row, m in enumerate(measurements)]
    text = json.dumps(records, ensure_ascii=False)
    identity = hashlib.sha256(
        json.dumps([name, campaign.definition, text], default=str).encode()
    ).hexdigest()
    blocks = [slice(low, low + _ROWS) for low in range(0, count, _ROWS)]
    sha256 = b"".join(schema.block_digest(samples[rows], intensity[rows]) for rows in blocks)
    digests = np.frombuffer(sha256, np.uint8).reshape(-1, schema.DIGEST_BYTES)
    sigma = np.stack([g.sigma for g in gridded]).astype(np.float32)
    covered = np.stack([g.covered for g in gridded])
    on_grid, attrs = ("sample", "tof"), dict(schema.INTENSITY.attrs)
    deviation = {**attrs, "long_name": "standard deviation of intensity"}
    information = {"long_name": "where the measurement holds information"}
    dataset = dataset.assign(schema.bookkeeping(np.full(count, schema.DONE, np.int8), digests))
    return dataset.assign(
        intensity=(on_grid, intensity, attrs),
        sigma=(on_grid, sigma, deviation),
        covered=(on_grid, covered, information),
    ).assign_attrs(
        campaign=name,
        grid_campaign=campaign.name,
        identity=identity,
        rows_per_chunk=_ROWS,
        content_hash=schema.content_hash(identity, digests),
        measurements=text,
    )


def _record(row: int, measurement: Measurement) -> MeasurementRecord:
    """Return where a measured profile comes from, and the group in which it is stored."""
    profile = measurement.profile
    header = dict(profile.header)
    comments = "; ".join([profile.title, *(f"{key}: {value}" for key, value in header.items())])
    run = _RUN.search(comments)
    temperature = _TEMPERATURE.search(comments)
    constants = None
    if measurement.calibration is not None:
        names = ("bank", "two_theta", "difc", "difa", "difb", "tzero")
        constants = {name: getattr(measurement.calibration, name) for name in names}
    return {
        "file": Path(profile.source).name,
        "sha256": hashlib.sha256(Path(profile.source).read_bytes()).hexdigest(),
        "bank": profile.bank,
        "title": profile.title,
        "run": run[1] if run else "",
        "temperature": f"{temperature[1]} {temperature[2]}" if temperature else "",
        "two_theta": profile.two_theta,
        "header_difc": profile.difc,
        "header": header,
        "calibration": constants,
        "nominal": measurement.nominal,
        "warnings": list(measurement.warnings),
        "native": f"{NATIVE}/{row:05d}-{run[1] if run else 'run'}-{profile.bank or 'bank'}",
    }


def write_measured(
    store: Store, dataset: xr.Dataset, measurements: Sequence[Measurement], tag: str | None = None
) -> Tag:
    """Write a measured data set, with the profiles as they were read, and tag it.

    The same measurements under the same name are written once. ``tag`` is the next free NAME-vN
    by default; raises `StoreError` if it exists with other contents.
    """
    name = str(dataset.attrs["campaign"])
    for known in store.tags():
        if store.open(known.name).attrs["content_hash"] == dataset.attrs["content_hash"]:
            return known
    new_tag = tag or store.next_tag(name)
    store.check_new_tag(new_tag)
    repository = store.repository
    branch = branch_name(name, dataset.attrs["identity"])

    def write() -> None:
        if branch not in repository.list_branches():
            repository.create_branch(branch, repository.lookup_branch("main"))
        session = repository.writable_session(branch)
        root = zarr.open_group(session.store, mode="a")
        if name not in root:  # else a process died between commit and tag
            write_variables(session, name, dataset)
            records = json.loads(dataset.attrs["measurements"])
            for measurement, record in zip(measurements, records, strict=True):
                group = root.create_group(record["native"])
                group.attrs.update(record)
                for key in ("tof", "intensity", "sigma"):
                    values = getattr(measurement.profile, key)
                    group.create_array(
                        key, data=values, chunks=values.shape, compressors=COMPRESSORS
                    )
            session.commit(f"ingest {name}: {len(measurements)} profiles")
        store.create_tag(new_tag, repository.lookup_branch(branch))

    with storage_errors(f"writing {new_tag} in {store.uri}"):
        store.committed(write, synced=True)
    return store.tag(new_tag)


def measurement_records(dataset: xr.Dataset) -> list[MeasurementRecord]:
    """Return where each sample of a measured data set is from; a StoreError if it is simulated."""
    text = dataset.attrs.get("measurements")
    if text is None:
        raise StoreError(
            f"{dataset.attrs.get('tag', 'The data set')} is simulated; a measured one is expected, "
            f"as python -m pipelines.ingest writes it."
        )
    records: list[MeasurementRecord] = json.loads(text)
    return records


def native_profile(store: Store, tag: str, record: MeasurementRecord) -> Profile:
    """Return a profile as it was read, from its entry in :func:`measurement_records`."""
    session = store.repository.readonly_session(tag=tag)
    with storage_errors(f"reading {record['native']} of {tag}"):
        group = zarr.open_group(session.store, path=record["native"], mode="r")
        tof, intensity, sigma = (np.asarray(group[key][:]) for key in ("tof", "intensity", "sigma"))  # type: ignore[index]
    bank = record["bank"], record["title"], record["two_theta"], record["header_difc"]
    return Profile(tof, intensity, sigma, *bank, dict(record["header"]), record["file"])


def labels_from(
    rows: Sequence[Mapping[str, Any]], measurements: Sequence[Measurement], campaign: Campaign
) -> list[Label | None]:
    """Match lines of a table of labels to measurements.

    A line has ``file`` (its name), optionally ``bank``; ``phase`` or ``crystal_system``; and the
    free parameters of the phase in ångström and degrees. Raises `StoreError` if it names no
    measurement or no phase, or its cell is none of that phase.
    """
    labels: list[Label | None] = [None] * len(measurements)
    for line, row in enumerate(rows, start=2):
        file, bank = Path(str(row["file"])).name, row.get("bank")
        any_bank = bank in (None, "")
        samples = [
            sample
            for sample, profile in enumerate(measurement.profile for measurement in measurements)
            if Path(profile.source).name == file
            and (any_bank or profile.bank is None or str(bank).strip() == str(profile.bank))
        ]
        if not samples:
            named = f"{row['file']}, bank {row['bank']}," if row.get("bank") else row["file"]
            raise StoreError(f"Line {line} of the labels: no profile {named} is among these.")
        named = str(row.get("phase") or row.get("crystal_system") or "")
        codes = [
            code
            for code, phase in enumerate(campaign.phases)
            if named in (phase.name, phase.crystal_system.name)
        ]
        if len(codes) != 1:
            raise StoreError(
                f"Line {line} of the labels: '{named}' is none of the campaign's phases, or "
                f"several. Known: {', '.join(phase.name for phase in campaign.phases)}."
            )
        lattice = campaign.phases[codes[0]].lattice
        missing = [n for n in lattice.free_parameters if row.get(n) in (None, "")]
        if missing:
            raise StoreError(f"Line {line} of the labels lacks {', '.join(missing)}.")
        try:
            free = np.array([[float(row[n]) for n in lattice.free_parameters]])
            cells = lattice.cells(free)
            check_volume(cells)
            lattice.check(cells)
        except ValueError as error:  # CrystalError is one
            raise StoreError(f"Line {line} of the labels: {error}".rstrip(".") + ".") from error
        for sample in samples:
            labels[sample] = Label(codes[0], tuple(cells[0].tolist()))
    return labels
