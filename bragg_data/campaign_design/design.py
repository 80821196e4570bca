"""Design a campaign: choose bank, window, grid, broadening and the number of samples."""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from bragg_data.arrays import Array, Floats32
from bragg_data.campaign import Campaign
from bragg_data.campaign_design.cells import PhaseRanges, phases_of, ranges_text, with_ranges
from bragg_data.campaign_design.options import DesignError, DesignOptions
from bragg_data.campaign_design.text import Broadening, Choices, campaign_name, campaign_text
from bragg_data.campaign_design.window import Window, best_window, grid_of, lines_of, window_of
from bragg_data.instrument.band import SHORTEST, Band, band_of, fwhm, spacings_of, where_peaks_are
from bragg_data.instrument.conversion import OriginalBank
from bragg_data.instrument.facilities import diffractometer_of_file
from bragg_data.instrument.instprm import TofGrid, read_banks
from bragg_data.measurement.readers import Profile, ProfileError, read_profiles
from bragg_data.measurement.resampling import (
    in_time_of_flight,
    match_bank,
    text_of_calibration,
    with_bins_of_calibration,
)
from bragg_data.simulation.kinematic import Simulator

SIMULATION_SHARE = 0.1  # of the budget
_SAMPLES = 1024, 16_384  # of each phase
_STORED = 3e7  # intensities per second that the store compresses and writes
_TIMED = 128  # patterns of each phase: a batch of the simulator


@dataclass(frozen=True, eq=False)
class Example:
    """Patterns of a phase as they will be simulated."""

    cells: Array  # (3, 6) the smallest, the largest and the CIF's, in Å and degrees
    patterns: Floats32  # (3, points)
    d_spacings: Array  # (n,) of the lines of the CIF's cell in the window, in Å


@dataclass(frozen=True, eq=False)
class CampaignDesign:
    """A campaign file that was designed, and what was assumed."""

    name: str
    toml: str  # commented; paths are relative to the directory that it was designed for
    assumptions: tuple[str, ...]  # what was chosen and why, in sentences
    warnings: tuple[str, ...]  # doubts about the files and options, in sentences
    campaign: Campaign  # the same, loaded
    examples: tuple[Example, ...]  # of each phase
    measured: Profile | None = None  # of ``like``, over times of flight


def design_campaign(options: DesignOptions, directory: Path) -> CampaignDesign:
    """Design a campaign for some structures on an instrument, as a file in a directory.

    ``design_campaign(DesignOptions(cifs=("A.cif",), instrument=Path("X.instprm")), Path("."))``
    returns a :class:`CampaignDesign`; its ``toml`` belongs into ``directory / (name + ".toml")``,
    and nothing is written here. The same options give the same text, but for the number of samples,
    which depends on how fast this machine simulates.

    Raises a DesignError, CrystalError, InstrumentError, ProfileError or CampaignError, of one
    sentence, if a file cannot be read, a range is impossible, or no bank sees the structures.
    """
    if not 0 < options.budget < math.inf:
        raise DesignError(f"A budget of {options.budget:g} minutes is too short: give at least 1.")
    phases = with_ranges(phases_of(options.cifs), options.ranges)
    notes = [f"Phase '{p.phase.name}': {text}" for p in phases for text in p.phase.assumptions]
    notes += [text for p in phases for text in p.notes]
    window, profile, chosen = _chosen_window(options, phases)
    i = window.band.instrument
    notes += [*i.warnings, *filter(None, [i.geometry_doubt])]
    broadening = _broadening(window)
    of_sample = {"size": broadening.size, "microstrain": broadening.microstrain}
    d = np.geomspace(window.shortest, window.longest, 60)
    width = float((fwhm(i, d, **of_sample) / i.tof_from_d_spacing(d)).min())
    grid, every = grid_of(window, width, None if profile is None else profile.tof)
    examples, rate, of_simulator = _simulated(phases, window, grid, broadening)
    samples = samples_within(options.budget, rate, len(phases))
    name = campaign_name(options.name, phases, options.instrument)
    assumptions = (
        *(f"Phase '{p.phase.name}' ({p.phase.space_group}): {ranges_text(p)}." for p in phases),
        chosen,
        "Lines in the window: "
        + ", ".join(f"{n} of '{p.phase.name}'" for n, p in zip(window.lines, phases, strict=True))
        + (
            "; those of longest d are inside."
            if window.complete
            else f"; it ends by {window.band.origin}."
        ),
        f"Grid: {grid.points:,} points from {grid.start:g} to {grid.stop:.0f} µs "
        f"({window.shortest:.3f} to {window.longest:.3f} Å), {width / grid.relative_step:.1f} to "
        f"the narrowest peak's width of {100 * width:.2g} % of T" + _of_file(profile, every),
        f"Samples: {samples:,} of each phase ({rate:,.0f} patterns/s; "
        f"{100 * SIMULATION_SHARE:.0f} % of {options.budget:g} minutes).",
    )
    choices = Choices(phases, window, grid, broadening, samples)
    toml = campaign_text(name, options, choices, directory)
    campaign = Campaign(
        toml, {p.phase.name: p.phase.cif for p in phases}, window.band.instrument.text
    )
    _ = campaign.samples  # refuses cells that do not belong to their phase
    doubts = tuple(dict.fromkeys([*notes, *of_simulator]))
    return CampaignDesign(name, toml, assumptions, doubts, campaign, examples, profile)


def design_each_bank(
    options: DesignOptions, directory: Path
) -> tuple[list[CampaignDesign], list[str]]:
    """Design a campaign for each bank of an instrument file, named NAME-bankN.

    Each gets the same share of the budget. Returns them, and why banks are left out, in sentences.
    Errors are those of :func:`design_campaign`, if it refuses all banks.
    """
    base = campaign_name(options.name, phases_of(options.cifs), options.instrument)
    numbers = dict.fromkeys(bank.instrument.bank for bank in read_banks(options.instrument))
    designs, refused = [], []
    for number in numbers:
        name, budget = f"{base}-bank{number}", options.budget / len(numbers)
        of_bank = replace(options, bank=number, name=name, budget=budget)
        try:
            designs.append(design_campaign(of_bank, directory))
        except DesignError as error:
            refused.append(error)
    if not designs:
        raise refused[0]
    return designs, [str(error) for error in refused]


def _chosen_window(
    options: DesignOptions, phases: Sequence[PhaseRanges]
) -> tuple[Window, Profile | None, str]:
    """Return the window on a bank, the measured profile, and why this bank, in a sentence."""
    banks, file = read_banks(options.instrument), options.instrument
    text = banks[0].instrument.text
    diffractometer = diffractometer_of_file(file.name, text_of_calibration(file) or text)
    numbers = [b.instrument.bank for b in banks]
    known = ", ".join(f"{b.instrument.bank} (2θ {b.instrument.two_theta:g}°)" for b in banks)
    if options.bank is not None and options.bank not in numbers:
        raise DesignError(f"{file} holds no bank {options.bank}. It holds: {known}.")
    # A campaign names its bank by the number.
    unique = [b for b in banks if numbers.count(b.instrument.bank) == 1]
    usable = [b for b in unique if options.bank in (None, b.instrument.bank)]
    if not usable:
        raise DesignError(
            f"{file} gives several banks the same number ({known}), so that a campaign cannot "
            f"choose one: renumber them."
        )
    measured = _measured_banks(options, usable)
    bands = [(band_of(bank, diffractometer), profile) for bank, profile in measured]
    tables = {}
    windows = []
    for band, profile in bands:
        if band is None:
            continue
        angle = abs(band.instrument.two_theta)
        if angle not in tables:
            tables[angle] = [lines_of(phase, angle) for phase in phases]
        if profile is not None:
            band = _within_profile(band, profile)
        window = window_of(band, tables[angle]) if band is not None else None
        windows += [(window, profile)] if window is not None else []
    if not windows:
        names = ", ".join(f"'{p.phase.name}'" for p in phases)
        raise DesignError(
            f"No bank of {file} sees lines of every structure ({names}): check the cells (in Å), "
            f"difC and the angles of the banks {known}."
        )
    window = best_window([w for w, _ in windows])
    profile = next(profile for w, profile in windows if w is window)
    reason = _reason(window, [w for w, _ in windows], options)
    if len(unique) < len(banks):
        repeated = sorted({n for n in numbers if numbers.count(n) > 1})
        reason += f" Several banks have the number {str(repeated)[1:-1]}: renumber them to use one."
    return window, profile, reason


def _measured_banks(
    options: DesignOptions, banks: Sequence[OriginalBank]
) -> list[tuple[OriginalBank, Profile | None]]:
    """Return the banks with their measured profiles: without a file all, and no profiles."""
    if options.like is None:
        return [(bank, None) for bank in banks]
    text = text_of_calibration(options.instrument)
    instruments = [bank.instrument for bank in banks]
    matched: list[tuple[OriginalBank, Profile | None]] = []
    reasons = []
    profiles = read_profiles(options.like)
    numbers = [profile.bank for profile in profiles]
    if (
        len(profiles) > 1
        and numbers.count(options.bank) == 1
        and not any(p.difc or p.two_theta for p in profiles)
    ):  # nothing but the number of the bank chooses
        profiles = [profiles[numbers.index(options.bank)]]
    for profile in profiles:
        try:
            bank = match_bank(profile, instruments)
            profile = in_time_of_flight(with_bins_of_calibration(profile, text), bank)
        except ProfileError as error:
            known = profile.difc or profile.two_theta or profile.bank or len(instruments) == 1
            also = "" if known else f"{profile.name} does not name its bank: give it with --bank."
            reasons.append(also or str(error))
            continue
        if (profile.sigma > 0).sum() > 2:
            matched.append((banks[instruments.index(bank)], profile))
    if not matched:
        raise DesignError(
            reasons[0] if reasons else f"{options.like} holds no points with information."
        )
    return matched


def _within_profile(band: Band, profile: Profile) -> Band | None:
    """Return the part of a band that a profile covers; None if that is nothing."""
    i, tof = band.instrument, profile.tof[profile.sigma > 0]
    first, last = spacings_of(i, float(tof[0]), float(tof[-1]))
    wider = Band(i, max(first, SHORTEST / 2), last, f"the last point of {profile.source}")
    return where_peaks_are(wider)


def _reason(window: Window, windows: Sequence[Window], options: DesignOptions) -> str:
    i, file = window.band.instrument, options.instrument
    bank = f"Bank {i.bank} (2θ {i.two_theta:g}°) of {file.name}"
    if len(windows) == 1:
        return f"{bank}: " + (
            "its only bank." if options.bank is None and options.like is None else "as requested."
        )
    also = ", ".join(
        f"{w.band.instrument.bank} ({100 * float(np.median(w.widths)):.2g} %, {min(w.lines)})"
        for w in windows
        if w is not window
    )
    return (
        f"{bank}: peaks are {100 * float(np.median(window.widths)):.2g} % of T wide there, and it "
        f"sees at least {min(window.lines)} lines of each phase; other banks: {also}. --bank N "
        f"chooses another one."
    )


def _of_file(profile: Profile | None, every: int) -> str:
    """Return the end of a sentence: what of a measured file the grid has."""
    if profile is None:
        return "."
    if every:
        points = "points" if every == 1 else f"each point of {every}"
        return f"; range and {points} of {profile.source} where structures have lines."
    return (
        f"; range of {profile.source} where structures have lines, but not its points, which are "
        f"not logarithmic, or too coarse."
    )


def _broadening(window: Window) -> Broadening:
    """Return broadening by the sample from negligible to twice the instrument's width.

    Within the values of the paper's campaign, which are those for NOMAD's bank 4 (0.5 % of T).
    """
    width = float(window.widths.min())
    d = math.sqrt(window.shortest * window.longest)
    of_size = 1e-4 * d / width  # µm, of a broadening as large as the instrument's width
    smallest = min(max(of_size / 2, 0.3), 3.0)
    largest = min(max(of_size / 0.01, 3.0), 10.0)
    return Broadening(
        size=_two_digits(largest / 3),
        microstrain=_two_digits(min(0.21e6 * width, 1000.0)),
        sizes=(_two_digits(smallest), _two_digits(largest)),
        microstrains=(
            _two_digits(min(0.052e6 * width, 250.0)),
            _two_digits(min(2e6 * width, 3000.0)),
        ),
        tzero=_two_digits(8e-5 * window.tof[1]),
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _simulated(
    phases: Sequence[PhaseRanges], window: Window, grid: TofGrid, broadening: Broadening
) -> tuple[tuple[Example, ...], float, list[str]]:
    """Return examples, patterns stored per second on average over phases, and warnings."""
    i, of_sample = window.band.instrument, (broadening.size, broadening.microstrain)
    random = np.random.default_rng(0)
    examples, seconds = [], 0.0
    # Workers compute in one thread each.
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(1):
        warnings.simplefilter("always")
        simulator = Simulator([p.phase for p in phases], i, grid, *of_sample)
        for code, p in enumerate(phases):
            shown = np.concatenate([p.phase.lattice.cells([p.low, p.high]), p.phase.cell[None]])
            patterns = simulator.simulate(np.full(len(shown), code), shown)
            if not patterns.max() > 0:
                raise DesignError(f"Phase '{p.phase.name}' scatters nothing in the window.")
            d = lines_of(p, i.two_theta).within(window.shortest, window.longest)
            examples.append(Example(shown, patterns, d))
            cells = p.phase.lattice.cells(random.uniform(p.low, p.high, (_TIMED, len(p.low))))
            times = []
            for _ in range(3):  # the first one builds what is built once
                began = time.process_time()  # however busy this machine is with other work
                simulator.simulate(np.full(_TIMED, code), cells)
                times.append(time.process_time() - began)
            seconds += min(times) / _TIMED + grid.points / _STORED
    return tuple(examples), len(phases) / seconds, [str(w.message) for w in caught]


def samples_within(budget: float, rate: float, phases: int) -> int:
    """Return the number of samples of each phase that a budget in minutes allows: a power of 2."""
    affordable = SIMULATION_SHARE * 60 * budget * rate / phases
    return int(2 ** math.floor(math.log2(min(max(affordable, _SAMPLES[0]), _SAMPLES[1]))))
