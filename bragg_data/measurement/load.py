"""Measured files and pseudo-experiments on a campaign's grid, prepared for predictions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from scipy.ndimage import median_filter, uniform_filter1d
from scipy.signal import find_peaks

from bragg_data import preprocessing
from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.errors import first_line
from bragg_data.instrument.diffractometer import ANGLE_TOLERANCE, angles_apart
from bragg_data.instrument.instprm import Instrument, InstrumentError, read_instruments
from bragg_data.measurement import resampling
from bragg_data.measurement.readers import AS_USUAL, Profile, ProfileError, Reading, read_profiles

# Significant peaks: noise or a smooth curve alone would be predicted as some cell, too.
_WIDTHS = (1, 3, 9)  # points over which the signal is averaged: peaks may be finely sampled
_NOISE_WINDOW = 401  # points over which the scatter of neighbours is estimated
_BROADEST = 1 / 16  # share of the points; smooth backgrounds have no maxima as narrow as that

# In units of the noise. Of noise and smooth curves, in profiles of 600 to 12,000 points and 0.05 to
# 1e7 counts, at most 0.87 of these; of measured profiles (NOMAD, GEM, POWGEN, iMATERIA, HIPPO,
# WISH, VULCAN, SEPD) at least 2.4, of simulated ones with peaks of 60 over 100 counts 1.2. Lower
# limits accept noise, higher ones refuse weak samples.
_HEIGHT, _PROMINENCE = 6.5, 10.0
_LEAST_PROMINENCE = 0.05  # of the range of 96 % of the intensities: smooth maxima near the ends


@dataclass(frozen=True)
class Label:
    """Known phase (its code in the campaign) and cell (Å and degrees) of a measured sample."""

    phase: int
    cell: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """A profile on a campaign's grid, ready for predictions."""

    profile: Profile  # as read, over time of flight
    gridded: resampling.GriddedProfile  # on the campaign's grid, with its background
    # Used for resampling; None if times were taken as those of the campaign's instrument.
    calibration: Instrument | None
    nominal: bool  # whether the calibration is the header's, or none
    warnings: list[str]  # what a user has to know, in sentences
    # (points,) Background subtracted, between 0 and 1: the view measured_aligned.
    prepared: Array
    # Relative, of every length: half a bin where edges and centres are unclear, else 0. Predicted
    # intervals are wider by it; the standard uncertainties of a refinement are not.
    half_bin: float = 0.0


def load_measurements(
    path: Path,
    campaign: Campaign,
    calibration: Path | None = None,
    bank: int | None = None,
    two_theta: float | None = None,
    reading: Reading = AS_USUAL,
) -> list[Measurement]:
    """Read the profiles of a file and bring them to a campaign's grid.

    With the measurement's ``.instprm`` file, or as :func:`measurement_from_profile` without it.
    Only the given bank, by default those at the angle of the model's instrument. The scattering
    angle in degrees chooses among several banks by their headers, and replaces what a single one
    says or does not say. Raises ProfileError or InstrumentError if the file cannot be read, fits
    neither the grid nor the calibration, has no significant peaks, the instrument is one of
    constant wavelength, or several banks could be meant.
    """
    profiles, instruments = _read(path, calibration, bank, reading)
    if two_theta is not None and len(profiles) > 1 and any(p.two_theta for p in profiles):
        at_angle = profiles_at_angle(profiles, two_theta)
        if len(at_angle) != 1:
            raise ProfileError(_several(at_angle or profiles))
        profiles, two_theta = at_angle, None
    elif bank is None and len(profiles) > 1:
        profiles = _at_the_models_angle(profiles, campaign.instrument)
    repeated = len({p.bank for p in profiles}) < len(profiles)
    if repeated or (two_theta is not None and len(profiles) > 1):
        raise ProfileError(_several(profiles))
    if two_theta is not None:
        # The header's nominal difC would decide otherwise, where it is of use for nothing else.
        difc = profiles[0].difc if instruments is None else None
        profiles = [replace(profiles[0], two_theta=two_theta, difc=difc)]
    return [measurement_from_profile(profile, campaign, instruments) for profile in profiles]


def _read(
    path: Path, calibration: Path | None, bank: int | None, reading: Reading
) -> tuple[list[Profile], Sequence[Instrument] | None]:
    """Return a file's profiles, and the banks of the measurement's calibration."""
    profiles = read_profiles(path, bank, reading)
    if calibration is None:
        return profiles, None
    text = resampling.text_of_calibration(calibration)
    instruments = read_instruments(calibration)
    return [resampling.with_bins_of_calibration(p, text) for p in profiles], instruments


def load_each_bank(
    path: Path,
    campaigns: Sequence[Campaign],
    calibration: Path | None = None,
    bank: int | None = None,
    reading: Reading = AS_USUAL,
) -> list[tuple[int, Measurement]]:
    """Read the profiles of a file and bring each to the grid of its bank's campaign.

    Returned are the numbers among ``campaigns``, which are of different banks of one instrument,
    and the measurements. The bank is that of the header's difC, angle or number, or else of the
    calibration that these choose. Profiles that cannot be used, and those of banks without a
    campaign, are named in the warnings of the others; if that are all, the first one's ProfileError
    or InstrumentError is raised.
    """
    profiles, instruments = _read(path, calibration, bank, reading)
    banks = [campaign.instrument for campaign in campaigns]
    measured: list[tuple[int, Measurement]] = []
    errors: list[ProfileError | InstrumentError] = []
    for profile in profiles:
        try:
            number = _number_of_bank(profile, banks, instruments)
            measurement = measurement_from_profile(profile, campaigns[number], instruments)
        except (ProfileError, InstrumentError) as error:
            errors.append(error)
        else:
            measured.append((number, measurement))
    if not measured:
        raise errors[0]
    notes = [f"Another bank was left out: {error}" for error in errors]
    return [(n, replace(m, warnings=[*m.warnings, *notes])) for n, m in measured]


def _number_of_bank(
    profile: Profile, banks: Sequence[Instrument], instruments: Sequence[Instrument] | None
) -> int:
    """Return which of some banks a profile is of."""
    if instruments is not None:
        same_bank = resampling.match_bank(profile, instruments)
        known = replace(
            profile, bank=same_bank.bank, difc=same_bank.difc, two_theta=same_bank.two_theta
        )
    else:
        known = profile
    try:
        bank = resampling.match_bank(known, banks)
    except ProfileError as error:
        angles = ", ".join(f"{i.bank} (2θ {i.two_theta:g}°)" for i in banks)
        raise ProfileError(
            f"{profile.name} is of no bank that has a model; these have: {angles}."
        ) from error
    return next(number for number, i in enumerate(banks) if i is bank)


def _several(profiles: Sequence[Profile]) -> str:
    banks = "; ".join(
        f"bank {p.bank}"
        + ("" if p.two_theta is None else f", 2θ {p.two_theta:g}°")
        + f", {p.tof[0]:.6g}–{p.tof[-1]:.6g}"
        for p in profiles
    )
    return (
        f"{profiles[0].source} has {len(profiles)} banks that could be meant: {banks}. --two-theta "
        f"is the angle of one: name it with --bank, or its place in the file with --position."
    )


def profiles_at_angle(profiles: Sequence[Profile], two_theta: float) -> list[Profile]:
    """Return the profiles whose headers state an angle within 2° of this."""
    return [p for p in profiles if p.two_theta is not None and abs(p.two_theta - two_theta) < 2.0]


def measurement_from_profile(
    profile: Profile, campaign: Campaign, instruments: Sequence[Instrument] | None = None
) -> Measurement:
    """Bring a profile to a campaign's grid, with the calibration of its bank.

    ``instruments`` are calibrations of the measurement, one of which is the bank's; None for the
    nominal difC of the profile's header, or its times of flight as they are, with a warning. Raises
    ProfileError or InstrumentError if the profile fits neither the grid nor a calibration, or has
    no significant peaks.
    """
    instrument, nominal = campaign.instrument, instruments is None
    if instruments is None:
        calibration = resampling.nominal_calibration(profile, instrument)
    else:
        calibration = resampling.match_bank(profile, instruments)
    size = resampling.half_bin(profile)
    as_read, profile = profile, resampling.in_time_of_flight(profile, calibration or instrument)
    doubts = resampling.doubt_of_d_spacings(profile, calibration or instrument)
    gridded = resampling.resample_to_grid(profile, campaign.grid, instrument, calibration)
    window = resampling.measured_tof(campaign.grid.tof[[0, -1]], instrument, calibration)
    inside = (profile.tof >= window[0]) & (profile.tof <= window[1])
    if not has_significant_peaks(profile.intensity[inside], profile.sigma[inside]):
        raise ProfileError(
            f"{profile.name} has no significant peaks between {window[0]:.0f} and {window[1]:.0f} "
            f"µs: no narrow peak stands out of its background and noise, so there is nothing to "
            f"determine a cell from. Check the file and its bank, or measure longer."
        )
    warnings = resampling.measurement_warnings(
        as_read, gridded, instrument, calibration, nominal=nominal
    )
    warnings += doubts
    try:
        prepared = preprocessing.prepare_measured(gridded.intensity, gridded.sigma, gridded.covered)
    except preprocessing.PreprocessingError as error:  # nothing stands above the background
        raise ProfileError(f"{profile.name}: {error}") from error
    return Measurement(profile, gridded, calibration, nominal, warnings, prepared, size)


def _at_the_models_angle(profiles: list[Profile], instrument: Instrument) -> list[Profile]:
    known = ", ".join(
        f"{p.bank}" + ("" if p.two_theta is None else f" ({p.two_theta:g}°)") for p in profiles
    )
    chosen = [
        p
        for p in profiles
        if p.two_theta is not None
        and angles_apart(p.two_theta, instrument.two_theta) < ANGLE_TOLERANCE
    ]
    if not chosen and all(p.two_theta is None for p in profiles):
        chosen = [p for p in profiles if p.bank == instrument.bank]
    if not chosen:
        raise ProfileError(
            f"{profiles[0].source} holds banks {known}, none at the angle of the model's "
            f"instrument ({instrument.two_theta:g}°). Name one with --bank, or another model."
        )
    return chosen


def has_significant_peaks(intensity: Array, sigma: Array) -> bool:
    """Return whether a narrow peak stands significantly above the background of a profile.

    Averaged over 1, 3 or 9 points, it has to be 6.5 standard deviations above the background and 10
    above the lowest points next to it. The standard deviation is the neighbourhood's usual one or
    that of its scatter, whichever is larger, as it may have been calculated from scaled counts.
    Where it is too large, for the same reason, the spread of the lower half of the values replaces
    it, or the noise of a count if that is larger: of few counts most are equal.

    Both arrays, (n,), are as measured, because resampling correlates the noise of neighbours;
    ``sigma`` is 0 where a point holds no information.
    """
    informative = sigma > 0
    y, deviation, n = intensity[informative], sigma[informative], int(informative.sum())
    if n < 3 or np.ptp(y) == 0:
        return False
    signal = preprocessing.background_subtracted(intensity, sigma)[informative]
    # That of a peak itself, the root of its counts, is larger than that of the background.
    usual = median_filter(deviation, size=max(n // 16, 1), mode="reflect")
    scatter = preprocessing.noise_from_scatter(y, _NOISE_WINDOW, "reflect")
    noise = np.maximum(np.minimum(usual, deviation), scatter)
    least = _LEAST_PROMINENCE * np.ptp(np.quantile(y, [0.02, 0.98]))
    a_count = np.sqrt(np.diff(np.unique(y)).min())  # over the root of its intensity
    for width in _WIDTHS:
        in_noise = uniform_filter1d(signal / noise, width, mode="nearest") * np.sqrt(width)
        low, middle = np.quantile(in_noise, [0.1587, 0.5])  # a standard deviation of normal values
        factor = min(max(middle - low, a_count), 1.0)
        peaks, _ = find_peaks(
            uniform_filter1d(y, width, mode="nearest"),
            prominence=np.maximum(_PROMINENCE * factor * noise / np.sqrt(width), least),
            width=(None, _BROADEST * n),
            wlen=max(n // 5, 3),
        )
        if (in_noise[peaks] > _HEIGHT * factor).any():
            return True
    return False


class PseudoExperiment(NamedTuple):
    """A pseudo-experiment on a campaign's grid, its label, and its truth."""

    measurement: Measurement
    label: Label
    truth: Mapping[str, Any]  # displacement and broadening parameters, difC, Zero …


def read_pseudo_experiments(
    path: Path, campaign: Campaign, *, calibrated: bool
) -> list[PseudoExperiment]:
    """Read pseudo-experiments: an NPZ file with ``tof``, ``y``, ``sigma``, and a JSON file.

    The truth is in the file of the same name that ends with .json. With ``calibrated`` each
    profile's true difC and Zero are used, as a calibrated instrument has them; otherwise its times
    are taken as those of the campaign's instrument. The campaign has one phase of each system.
    Raises a ProfileError if the files do not exist, or hold something else.
    """
    experiments = []
    try:
        with np.load(path, allow_pickle=False) as file:
            tof, intensity, sigma = (np.asarray(file[k], float) for k in ("tof", "y", "sigma"))
        truths = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for row, (y, deviation, truth) in enumerate(zip(intensity, sigma, truths, strict=True)):
            title = f"pseudo-experiment {truth['index']}"
            profile = Profile(tof, y, deviation, title=title, source=f"{path}#{row}")
            instruments = None
            if calibrated:
                difc, tzero = truth["difC"], truth["Zero"]
                instruments = [campaign.instrument.with_parameters(difc=difc, tzero=tzero)]
            measurement = measurement_from_profile(profile, campaign, instruments)
            code = [p.crystal_system.name for p in campaign.phases].index(truth["crystal_system"])
            lattice = campaign.phases[code].lattice
            cell = lattice.cells([[truth[name] for name in lattice.free_parameters]])[0]
            label = Label(code, tuple(cell.tolist()))
            experiments.append(PseudoExperiment(measurement, label, truth))
    except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(
            f"{path} holds no pseudo-experiments with their truth ({first_line(error)}). Expected: "
            f"an NPZ file with tof (n,), y and sigma (m, n), and a JSON file of the same name."
        ) from error
    return experiments
