"""What a file was recognised as: plain values, as JSON describes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, cast

from pydantic import Field, JsonValue, TypeAdapter

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.diffractometer import Instrument
from bragg_data.measurement.plausibility import profile_doubts, tof_range
from bragg_data.measurement.readers import Unit
from bragg_data.recognition import Kind, MeasuredBank, RecognisedFile
from pipelines.cli.style import finite_or_null

_SCHEMA = "inspected-file.schema.json"


@dataclass(frozen=True)
class BankReport:
    """A measured profile."""

    points: int
    unit: Annotated[Unit, Field(description="Of the axis in the file.")]
    sigma_known: Annotated[bool, Field(description="Whether σ is the file's, or estimated.")]
    bank: Annotated[int | None, Field(description="Its number in the file.")] = None
    tof_first: Annotated[
        float | None, Field(description="µs; omitted if d has no calibration.")
    ] = None
    tof_last: Annotated[float | None, Field(description="µs.")] = None
    two_theta: Annotated[float | None, Field(description="Degrees.")] = None
    difc: Annotated[float | None, Field(description="µs/Å, of the calibration.")] = None
    calibration: Annotated[str | None, Field(description="Where it comes from.")] = None


@dataclass(frozen=True)
class InstrumentReport:
    """A bank of an instrument file."""

    bank: int
    two_theta: Annotated[float, Field(description="Degrees.")]
    difc: Annotated[float, Field(description="µs/Å.")]
    difa: Annotated[float, Field(description="µs/Å².")]
    difb: Annotated[float, Field(description="µs·Å.")]
    tzero: Annotated[float, Field(description="µs.")]
    flight_path: Annotated[float | None, Field(description="m.")] = None


@dataclass(frozen=True)
class PhaseReport:
    """A crystal structure."""

    name: str
    space_group: str
    crystal_system: str
    cell: Annotated[dict[str, float], Field(description="a, b, c in Å; angles in degrees.")]
    sites: Annotated[int, Field(description="Of the asymmetric unit.")]
    atoms_in_cell: int


@dataclass(frozen=True)
class FileReport:
    """What a file was recognised as, and what it holds. Keys that do not apply are omitted."""

    kind: Kind
    format: str
    facility: str | None = None
    banks: tuple[BankReport, ...] | None = None
    instruments: tuple[InstrumentReport, ...] | None = None
    phases: tuple[PhaseReport, ...] | None = None
    warnings: Annotated[
        tuple[str, ...], Field(description="What was assumed, or is suspicious, in sentences.")
    ] = ()


_ADAPTER = TypeAdapter(FileReport)


def report_of(file: RecognisedFile) -> FileReport:
    """Return the report of a file."""
    return FileReport(
        kind=file.kind,
        format=file.format,
        facility=file.diffractometer.facility or None,
        banks=tuple(_bank(bank) for bank in file.banks) or None,
        instruments=tuple(_instrument(bank.instrument) for bank in file.instruments) or None,
        phases=tuple(_phase(phase) for phase in file.phases) or None,
        warnings=tuple(dict.fromkeys(_warnings(file))),
    )


def to_json(report: FileReport) -> dict[str, JsonValue]:
    """Return a report as plain JSON values, described by :func:`json_schema`."""
    values = _ADAPTER.dump_python(report, exclude_none=True)
    return cast("dict[str, JsonValue]", finite_or_null(values))


def json_schema() -> dict[str, JsonValue]:
    """Return the JSON schema of what :func:`to_json` writes, as it is published."""
    schema = _ADAPTER.json_schema(mode="serialization")
    identity = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": _SCHEMA}
    return cast("dict[str, JsonValue]", identity | schema)


def _bank(bank: MeasuredBank) -> BankReport:
    profile, calibration = bank.profile, bank.calibration
    ends = tof_range(profile, calibration)
    angle = profile.two_theta
    if angle is None and calibration is not None and not bank.nominal:
        angle = calibration.two_theta
    return BankReport(
        points=len(profile.tof),
        unit=profile.axis,
        sigma_known=profile.sigma_known,
        bank=profile.bank,
        tof_first=None if ends is None else round(ends[0], 6),
        tof_last=None if ends is None else round(ends[1], 6),
        two_theta=angle,
        difc=profile.difc if calibration is None else calibration.difc,
        calibration=bank.origin or None,
    )


def _instrument(instrument: Instrument) -> InstrumentReport:
    i = instrument
    path = i.flight_path if i.flight_path > 0 else None
    return InstrumentReport(i.bank, i.two_theta, i.difc, i.difa, i.difb, i.tzero, path)


def _phase(phase: Phase) -> PhaseReport:
    cell = (round(float(value), 9) for value in phase.cell)
    return PhaseReport(
        name=phase.name,
        space_group=phase.space_group,
        crystal_system=phase.crystal_system.name,
        cell=dict(zip(CELL_PARAMETERS, cell, strict=True)),
        sites=len(phase.sites),
        atoms_in_cell=len(phase.positions),
    )


def _warnings(file: RecognisedFile) -> Iterator[str]:
    yield from file.warnings
    texts = [set(bank.profile.warnings) for bank in file.banks]
    of_all = set.intersection(*texts) if texts else set()
    for bank in file.banks:
        for text in bank.profile.warnings:
            alone = len(file.banks) == 1 or text in of_all
            yield text if alone else f"Bank {bank.profile.bank}: {text}"
        if bank.calibration is not None and not bank.nominal:
            yield from (f"Instrument file, {text}" for text in bank.calibration.warnings)
        yield from profile_doubts(bank.profile, bank.calibration)
    for original in file.instruments:
        yield from original.instrument.warnings
        if doubt := original.instrument.geometry_doubt:
            yield doubt
    uncalibrated = [b for b in file.banks if b.calibration is None and b.profile.unit == "us"]
    if uncalibrated and file.kind == "profile":
        yield (
            "There is no calibration, in the file or next to it, so that its d-spacings are not "
            "known: give one with --instrument."
        )
