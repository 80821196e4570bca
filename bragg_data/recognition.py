"""What a file is, by its content: measured profiles, an instrument, structures or a campaign."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.cif import read_text, structure_names
from bragg_data.crystallography.structure import Phase, phase_from_cif
from bragg_data.instrument import instprm
from bragg_data.instrument.conversion import OriginalBank
from bragg_data.instrument.diffractometer import angles_apart
from bragg_data.instrument.facilities import UNNAMED, Diffractometer, diffractometer_named
from bragg_data.measurement.load import profiles_at_angle
from bragg_data.measurement.readers import AS_USUAL, Profile, ProfileError, Reading, read_profiles
from bragg_data.measurement.readers.pdcif import is_cif
from bragg_data.measurement.resampling import (
    match_bank,
    nominal_calibration,
    text_of_calibration,
    with_bins_of_calibration,
)

Kind = Literal["profile", "instrument", "structure", "campaign"]

_POINTS = re.compile(  # of a loop: a tag alone on its line
    r"^[ \t]*_pd_(?:meas|proc)[._](?:counts|intensity)_\w+[ \t]*\r?$", re.MULTILINE | re.IGNORECASE
)
_NAMED_FILE = "instrument parameter file"  # of a profile's header: the calibration that GSAS took


@dataclass(frozen=True, eq=False)
class MeasuredBank:
    """A profile as read, and what is known of its calibration."""

    profile: Profile
    calibration: instprm.Instrument | None  # the bank of an instrument file, or of the header alone
    origin: str  # where the calibration comes from; empty where there is none
    nominal: bool = False  # whether it is the header's difC alone


@dataclass(frozen=True, eq=False)
class RecognisedFile:
    """A file, what it was recognised as, and what it holds."""

    path: Path
    kind: Kind
    format: str  # of the reader that recognised it
    diffractometer: Diffractometer = UNNAMED
    banks: tuple[MeasuredBank, ...] = ()
    instruments: tuple[OriginalBank, ...] = ()
    phases: tuple[Phase, ...] = ()
    campaign: Campaign | None = None
    instrument_file: Path | None = None  # which the calibration of the banks comes from
    warnings: tuple[str, ...] = ()  # of the file, in sentences


@dataclass(frozen=True)
class Choice:
    """What to take of a file that holds several, and the calibration of its profiles."""

    bank: int | None = None
    two_theta: float | None = None  # degrees
    reading: Reading = AS_USUAL
    instrument: Path | None = None


def recognise(path: Path, choice: Choice | None = None) -> RecognisedFile:
    """Read a file of any kind that the commands take.

    HDF5 files are profiles, ``.toml`` files campaigns; of texts the content decides. A CIF with a
    measured profile is one, and reports its structures as well. Raises the error of the reader that
    the file belongs to: ProfileError, InstrumentError, CrystalError or CampaignError.
    """
    choice = choice or Choice()
    if path.is_dir():
        raise ProfileError(f"{path} is a folder: name one of its files.")
    if path.suffix.lower() == ".toml":
        return _campaign(path)
    text = ""
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(4096)
        if b"\0" not in begin or begin.startswith((b"\xff\xfe", b"\xfe\xff")):  # not binary
            text = read_text(path)
    if form := instprm.instrument_format(text):
        return _instrument(path, text, form, choice)
    if is_cif(text):
        return _cif(path, text, choice)
    return _profiles(path, choice)


def _campaign(path: Path) -> RecognisedFile:
    with warnings.catch_warnings():  # they are in the campaign's assumptions
        warnings.simplefilter("ignore")
        campaign = load_campaign(path)
    return RecognisedFile(
        path,
        "campaign",
        "TOML",
        diffractometer_named(campaign.instprm),
        instruments=instprm.read_banks(campaign.instprm),
        phases=tuple(campaign.phases),
        campaign=campaign,
        warnings=campaign.assumptions,
    )


def _instrument(path: Path, text: str, form: str, choice: Choice) -> RecognisedFile:
    banks = instprm.read_banks(path)
    numbers = [b.instrument.bank for b in banks]
    chosen = tuple(b for b in banks if choice.bank in (None, b.instrument.bank))
    if not chosen:
        known = ", ".join(map(str, numbers))
        raise instprm.InstrumentError(f"{path} holds no bank {choice.bank}. It holds: {known}.")
    repeated = ", ".join(str(n) for n in dict.fromkeys(numbers) if numbers.count(n) > 1)
    note = f"Several banks have the number {repeated}: their angle or difC has to choose."
    return RecognisedFile(
        path,
        "instrument",
        form,
        diffractometer_named(text),
        instruments=chosen,
        warnings=(note,) if repeated else (),
    )


def _cif(path: Path, text: str, choice: Choice) -> RecognisedFile:
    """Return the profiles of a CIF with its structures, or these alone."""
    measured = bool(_POINTS.search(text))
    names = structure_names(text, str(path))
    block = choice.reading.block
    if block is not None:
        names = tuple(n for n in names if n.lower() == block.removeprefix("data_").lower())
    phases, notes = ((), []) if measured and not names else _structures(path, text, names, choice)
    alone = RecognisedFile(path, "structure", "CIF", phases=phases, warnings=tuple(notes))
    if not measured:
        return alone
    try:
        profile = _profiles(path, choice)
    except ProfileError as error:
        if not phases:
            raise
        return replace(alone, warnings=(*notes, f"Its profile cannot be used: {error}"))
    return replace(profile, phases=phases, warnings=(*profile.warnings, *notes))


def _structures(
    path: Path, text: str, names: Sequence[str], choice: Choice
) -> tuple[tuple[Phase, ...], list[str]]:
    """Return the structures of a CIF, or that of one of its data blocks, and what was assumed."""
    block = choice.reading.block
    if block is not None or len(names) < 2:
        phase = phase_from_cif(text, block or "".join(names), block, str(path))
        return (phase,), list(phase.assumptions)
    phases: list[Phase] = []
    notes = []
    for name in names:
        try:
            phase = phase_from_cif(text, name, name, str(path))
        except CrystalError as error:
            notes.append(str(error))
        else:
            phases.append(phase)
            notes += [f"data_{name}: {assumption}" for assumption in phase.assumptions]
    if names and not phases:
        raise CrystalError(notes[0])
    if names:
        notes.insert(
            0,
            f"The file holds {len(names)} structures: a campaign takes each by the name of its "
            f"data block (block = …), and --block shows it alone.",
        )
    return tuple(phases), notes


def _profiles(path: Path, choice: Choice) -> RecognisedFile:
    profiles = read_profiles(path, choice.bank, choice.reading)
    if choice.two_theta is not None:
        profiles = _at_angle(profiles, choice.two_theta)
    first = profiles[0]
    header = "\n".join([first.title, *(f"{key}: {text}" for key, text in first.header.items())])
    file, instruments, notes = _calibration(path, first, choice.instrument)
    if file is not None and instruments:
        text = text_of_calibration(file)
        profiles = [with_bins_of_calibration(profile, text) for profile in profiles]
    banks = []
    for profile in profiles:
        bank, note = _measured(profile, file, instruments)
        banks.append(bank)
        notes += [note] if note else []
    numbers = [p.bank for p in profiles]
    if repeated := sorted({n for n in numbers if n is not None and numbers.count(n) > 1}):
        notes.append(
            f"Several banks have the number {', '.join(map(str, repeated))}: choose one by its "
            f"place in the file (--position) or its angle (--two-theta)."
        )
    forms = dict.fromkeys(p.format for p in profiles)
    return RecognisedFile(
        path,
        "profile",
        ", ".join(forms),
        diffractometer_named(header),
        tuple(banks),
        instrument_file=file if instruments else None,
        warnings=tuple(notes),
    )


def _at_angle(profiles: list[Profile], two_theta: float) -> list[Profile]:
    """Return the banks at an angle; those of a file that names none are taken to be there."""
    stated = [p for p in profiles if p.two_theta is not None]
    if len(profiles) == 1 or not stated:
        return [replace(p, two_theta=two_theta, difc=None) for p in profiles]
    chosen = profiles_at_angle(stated, two_theta)
    if not chosen:
        angles = ", ".join(f"{p.two_theta:g}" for p in stated)
        raise ProfileError(
            f"{profiles[0].source} has no bank at 2θ {two_theta:g}°; its banks stand at {angles}°."
        )
    return chosen


def _calibration(
    path: Path, profile: Profile, requested: Path | None
) -> tuple[Path | None, Sequence[instprm.Instrument], list[str]]:
    """Return an instrument file and its banks: requested, or named in the header and next to it."""
    if requested is not None:
        return requested, instprm.read_instruments(requested), []
    name = re.split(r"[\\/]", profile.header.get(_NAMED_FILE, "").strip())[-1]
    if not name:
        return None, (), []
    neighbours = [f for f in path.absolute().parent.iterdir() if f.name.lower() == name.lower()]
    if not neighbours:
        return None, (), [f"The file names the instrument file {name}, which is not next to it."]
    file = path.parent / neighbours[0].name
    try:
        return file, instprm.read_instruments(file), []
    except instprm.InstrumentError as error:
        return None, (), [f"The file names an instrument file that cannot be used: {error}"]


def _nearly_equal(
    profile: Profile, bank: instprm.Instrument, instruments: Sequence[instprm.Instrument]
) -> str:
    """Return a doubt where other banks fit a profile's difC or angle as well as the chosen one."""
    if profile.difc is None and profile.two_theta is None:
        return ""  # chosen by its number
    rivals = [
        str(i.bank)
        for i in instruments
        if angles_apart(i.two_theta, bank.two_theta) < 1 and abs(i.difc / bank.difc - 1) < 0.01
    ]
    if len(rivals) < 2:
        return ""
    return (
        f"{profile.name}: banks {', '.join(rivals)} of the instrument file stand at the same angle "
        f"with nearly the same difC; bank {bank.bank} was taken. If they are settings of another "
        f"wavelength, give a file with the right one alone."
    )


def _measured(
    profile: Profile, file: Path | None, instruments: Sequence[instprm.Instrument]
) -> tuple[MeasuredBank, str]:
    """Return a profile with the bank of the calibration that it belongs to, and a doubt if any."""
    note = ""
    if file is not None and instruments:
        try:
            bank = match_bank(profile, instruments)
        except ProfileError as error:
            note = str(error)
        else:
            by = "difC" if profile.difc else "angle" if profile.two_theta else "number"
            by = "its only bank" if len(instruments) == 1 else f"by its {by}"
            origin = f"{file.name}, bank {bank.bank}, {by}"
            return MeasuredBank(profile, bank, origin), _nearly_equal(profile, bank, instruments)
    nominal = nominal_calibration(profile, instprm.Instrument(profile.bank or 1, 90.0, 1.0))
    if nominal is None:
        return MeasuredBank(profile, None, ""), note
    return MeasuredBank(profile, nominal, "difC of the header", nominal=True), note
