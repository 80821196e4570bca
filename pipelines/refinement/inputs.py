"""From files to banks that are refined together: profiles, their calibrations, structures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from bragg_data.campaign import load_campaign
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.cif import file_and_block, read_text, structure_names
from bragg_data.crystallography.structure import Phase, phase_from_cif
from bragg_data.errors import first_line
from bragg_data.instrument.conversion import OriginalBank
from bragg_data.instrument.instprm import InstrumentError, read_banks
from bragg_data.measurement.readers import AS_USUAL, Profile, ProfileError, Reading, read_profiles
from bragg_data.measurement.resampling import (
    match_bank,
    text_of_calibration,
    with_bins_of_calibration,
)
from bragg_data.refinement.calibration_uncertainty import (
    CalibrationKind,
    calibration_su,
    explanation,
)
from bragg_data.refinement.measured_bank import MeasuredBank, measured_bank
from bragg_data.refinement.result import RefinementError
from pipelines.cli.refinement_options import NO_CAN, BankOptions


@dataclass(frozen=True, eq=False)
class Sample:
    """The banks of one sample, which are refined together."""

    files: tuple[Path, ...]
    banks: tuple[MeasuredBank, ...]
    kind: CalibrationKind
    warnings: tuple[str, ...]
    standard: str | None = None  # name of the phase whose cell calibrates the banks

    @property
    def calibration_su(self) -> tuple[float, ...]:
        """Relative standard uncertainty of every length by the calibration of each bank."""
        return tuple(calibration_su(bank, self.kind) for bank in self.banks)

    @property
    def explanations(self) -> tuple[str, ...]:
        """A sentence on each of these uncertainties."""
        if self.standard:
            return (f"Lengths are relative to the cell of {self.standard}, which gave each difC.",)
        return tuple(explanation(bank, self.kind) for bank in self.banks)


@dataclass(frozen=True)
class Request:
    """Profiles, and what is known of their banks."""

    files: tuple[Path, ...]
    instrument: Path
    banks: tuple[int, ...] = ()
    calibration: Path | None = None  # of the same cycle: its positions replace the instrument's
    two_theta: float | None = None
    reading: Reading = AS_USUAL
    d_range: tuple[float, float] = (0.0, float("inf"))
    cans: tuple[str, ...] | None = None  # structures of what holds the sample; None: unknown
    standard: str | None = None  # structure in the sample whose cell is certified

    def with_cans(self, structures: Sequence[str]) -> list[str]:
        """Return the files of a sample's structures with those of what is known to hold it."""
        return [*structures, *(self.cans or ())]

    def inputs(self, structures: Sequence[str]) -> list[Path]:
        """Return all files that are read, with those of a sample's structures."""
        known = [*self.with_cans(structures), *filter(None, [self.standard])]
        of_structures = (file_and_block(structure)[0] for structure in known)
        return [*self.files, self.instrument, *filter(None, [self.calibration]), *of_structures]


def request_of(
    files: Sequence[Path], instrument: Path, options: BankOptions, standard: str | None = None
) -> Request:
    """Return the request that a command's options make."""
    d_range = options.d_min, float("inf") if options.d_max is None else options.d_max
    reading = Reading(None, options.x_unit, options.bin_edges)
    of_cycle, banks = options.calibration, tuple(options.bank)
    of_profiles = tuple(files), instrument, banks, of_cycle, options.two_theta, reading, d_range
    cans = tuple(can for can in options.can if can != NO_CAN) if options.can else None
    return Request(*of_profiles, cans, standard)


def read_known_structures(places: Sequence[Path]) -> tuple[list[Phase], list[str]]:
    """Read all structures of folders, campaign files and CIFs; and why some cannot be used.

    Phases of the same name are numbered. A CrystalError is raised if there are none.
    """
    phases: list[Phase] = []
    problems: list[str] = []
    for place in places:
        if place.suffix == ".toml":
            phases += load_campaign(place).phases
            continue
        for file in sorted(place.rglob("*.[cC][iI][fF]")) if place.is_dir() else [place]:
            try:
                text = read_text(file)
                blocks = structure_names(text, str(file))
            except CrystalError as error:
                problems.append(first_line(error))
                continue
            for block in blocks if len(blocks) > 1 else [None]:
                name = file.stem if block is None else block
                try:
                    phases.append(phase_from_cif(text, name, block, str(file)))
                except CrystalError as error:
                    problems.append(first_line(error))
    if not phases:
        where = ", ".join(map(str, places))
        raise CrystalError(f"{where}: no structure can be read. {' '.join(problems[:3])}".strip())
    names: set[str] = set()
    for k, phase in enumerate(phases):
        free = (f"{phase.name}-{number}" for number in count(2))
        name = phase.name if phase.name not in names else next(n for n in free if n not in names)
        names.add(name)
        phases[k] = replace(phase, name=name)
    return phases, problems


def read_structures(files: Sequence[str]) -> tuple[list[Phase], list[str]]:
    """Read structures, FILE.cif or FILE.cif:BLOCK, and what was assumed of them, in sentences.

    A CrystalError is raised for what cannot be read.
    """
    phases: list[Phase] = []
    warnings: list[str] = []
    for file in files:
        path, block = file_and_block(file)
        name = block or path.stem
        if any(phase.name == name for phase in phases):
            name = f"{name}-{len(phases) + 1}"
        phase = phase_from_cif(read_text(path), name, block, str(path))
        phases.append(phase)
        warnings += [f"{path}: {assumption}" for assumption in phase.assumptions]
    if not phases:
        raise CrystalError("No structure is given: name one with --cif.")
    return phases, warnings


def read_samples(request: Request, *, exact: bool = True) -> list[Sample]:
    """Read the banks of all files: one sample, or one of each file where banks are repeated.

    A bank without a calibration, or without points, is left out with a warning, unless it was asked
    for, or is the only one. Without ``exact`` peaks are those of a .instprm file, also where the
    instrument has a moderator's pulse. Raises ProfileError, InstrumentError or RefinementError.
    """
    of_files = _profiles(request)
    instruments = read_banks(request.instrument)
    positions = read_banks(request.calibration) if request.calibration else None
    texts = [text_of_calibration(request.instrument)]
    texts += [text_of_calibration(request.calibration)] if request.calibration else []
    kind = CalibrationKind.SAME if positions else CalibrationKind.OTHER
    banks: list[tuple[Path, MeasuredBank]] = []
    warnings: list[str] = []
    errors: list[Exception] = []
    for file, profile in of_files:
        try:
            for text in texts:
                profile = with_bins_of_calibration(profile, text)
            if positions is None:
                original = matched_bank(profile, instruments)
            else:  # banks may be numbered differently in both files: the angle decides
                at = matched_bank(profile, positions)
                like = replace(profile, two_theta=at.instrument.two_theta, difc=None)
                original = _with_positions(matched_bank(like, instruments), at)
            calibration = original.exact if exact else original.instrument
            bank = measured_bank(
                profile,
                calibration,
                window=original.window,
                incident=original.incident,
                d_range=request.d_range,
            )
        except (ProfileError, InstrumentError, RefinementError) as error:
            errors.append(error)
            warnings.append(f"Left out: {error}")
            continue
        # Here the incident spectrum is used.
        of_bank = [w for w in calibration.warnings if "(ICOFF) was not used" not in w]
        warnings += [*profile.warnings, *of_bank]
        banks.append((file, bank))
    if errors and (request.banks or not banks):
        raise errors[0]
    known = tuple(dict.fromkeys(warnings))
    repeated = are_repeated([bank for _, bank in banks])
    files = list(dict.fromkeys(file for file, _ in banks))
    if not repeated:
        return [Sample(tuple(files), tuple(bank for _, bank in banks), kind, known)]
    return [
        Sample((path,), tuple(bank for file, bank in banks if file == path), kind, known)
        for path in files
    ]


def are_repeated(banks: Sequence[MeasuredBank]) -> bool:
    """Return whether some of the banks are the same bank of the instrument."""
    constants = [bank.instrument for bank in banks]
    return len({(i.bank, i.difc) for i in constants}) < len(constants)


def _profiles(request: Request) -> list[tuple[Path, Profile]]:
    """Return the profiles that are asked for; a bank of each file where files state none."""
    profiles = [(f, p) for f in request.files for p in read_profiles(f, None, request.reading)]
    if request.two_theta is not None:
        if len(profiles) != 1:
            raise ProfileError("--two-theta is of a single profile: name its file and its bank.")
        return [(f, replace(p, two_theta=request.two_theta, difc=None)) for f, p in profiles]
    if not request.banks:
        return profiles
    if len(profiles) == len(request.files) == len(request.banks):
        return [
            (file, replace(profile, bank=bank))
            for (file, profile), bank in zip(profiles, request.banks, strict=True)
        ]
    chosen = [(f, p) for f, p in profiles if p.bank in request.banks]
    missing = set(request.banks) - {p.bank for _, p in chosen}
    if missing:
        present = ", ".join(str(p.bank) for _, p in profiles)
        raise ProfileError(
            f"{', '.join(map(str, request.files))}: no bank {min(missing)}; there are {present}. "
            f"Of files without bank numbers give one --bank for each file."
        )
    return chosen


def matched_bank(profile: Profile, banks: Sequence[OriginalBank]) -> OriginalBank:
    """Return the bank of an instrument file that a profile is of; a ProfileError if there is none.

    It is chosen as by :func:`bragg_data.measurement.resampling.match_bank`.
    """
    instruments = [bank.instrument for bank in banks]
    instrument = match_bank(profile, instruments)
    return banks[next(k for k, i in enumerate(instruments) if i is instrument)]


def _with_positions(bank: OriginalBank, calibration: OriginalBank) -> OriginalBank:
    """Return a bank with the positions of another calibration, and its own widths.

    The positions that belong to a moderator's pulse come with it.
    """
    c = calibration.exact
    of_both = replace(
        bank if c.moderator is None else calibration,
        incident=bank.incident or calibration.incident,
        window=calibration.window or bank.window,
    )
    if c.moderator is not None:
        return of_both
    instrument = bank.instrument.with_parameters(
        difc=c.difc, difa=c.difa, difb=c.difb, tzero=c.tzero
    )
    return replace(of_both, instrument=instrument, reference=None)
