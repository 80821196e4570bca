"""Calculated patterns of predictions and their neighbours, and where they misfit the data."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import binary_erosion, maximum_filter, median_filter

from bragg_data.arrays import Array, Integers
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement import linear_fit
from bragg_data.refinement.result import PatternFit, RefinementError
from pipelines.prediction.workflow import PredictedProfile

SIGNIFICANCE = 5.0  # standard deviations over a peak's width from which a difference is listed
_DRIFT_WIDTHS = 20  # peak widths over which the difference's median is subtracted as background
_FAINT = 1e-6  # of the strongest reflection: a weaker one explains nothing


@dataclass(frozen=True, eq=False)
class CandidateFit:
    """A cell that may explain a profile, its reflections, and its pattern fitted to the profile."""

    source: str  # refined, model or library
    code: int
    phase: Phase
    cell: Array  # shape (6,), in ångström and degrees
    probability: float  # the model's, of this phase
    # Visible reflections, shape (n,), in µs of the campaign's instrument; indices, shape (n, 3).
    tof: Array = field(default_factory=lambda: np.empty(0))
    hkl: Integers = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    pattern_fit: PatternFit | None = None  # None where none could be calculated, or fitted
    correlation: float | None = None  # with the prepared profile, as in the library match


@dataclass(frozen=True)
class Misfit:
    """A place where measurement and calculation differ by more than their noise."""

    tof: float  # µs on the campaign's axis
    d: float  # Å
    width: float  # full width of a peak there, µs
    sigmas: float  # measured minus calculated over that width, in its standard deviations
    kind: str  # excess, deficit, or displaced: an excess next to a deficit
    # In units of the calculated peak intensity there; None where that is hardly more than nothing.
    share: float | None
    hkl: tuple[tuple[int, ...], ...]  # reflections within a peak's width, the nearest first


def candidate_fits(profile: PredictedProfile) -> list[CandidateFit]:
    """Fit the patterns of the predicted cell and of the library matches to the measurement.

    The best refinement comes first, as it was refined, then the model's cell, then the library's
    by their correlations. A cell with values that are not finite is left out.
    """
    row, matches, phases = profile.row, profile.matches, profile.phases
    probabilities = profile.prediction.probabilities[row].tolist()
    cells = [("model", int(profile.prediction.phase[row]), profile.cell)]
    if matches is not None:
        cells += [
            ("library", int(code), matches.cells[row, code])
            for code in np.argsort(-matches.correlation[row])
            if matches.row[row, code] >= 0
        ]
    fits = [
        _fitted(CandidateFit(source, code, phases[code], cell, probabilities[code]), profile)
        for source, code, cell in cells
        if np.isfinite(cell).all()
    ]
    if (best := profile.fit) is not None:
        code = best.phase
        reflections = linear_fit.reflection_positions(phases[code], best.cell, profile.campaign)
        refined = phases[code], best.cell, probabilities[code], *reflections, best.pattern_fit
        fits.insert(0, CandidateFit("refined", code, *refined))
    return fits


def _fitted(candidate: CandidateFit, profile: PredictedProfile) -> CandidateFit:
    phase, cell, campaign = candidate.phase, candidate.cell, profile.campaign
    gridded, prepared = profile.measurement.gridded, profile.measurement.prepared
    simulator = linear_fit.simulator_of(campaign)
    try:
        (pattern,) = simulator.simulate(np.array([candidate.code]), cell[None])
        pattern_fit = linear_fit.fit_scale_and_background(gridded, pattern)
    except (CrystalError, RefinementError):
        return candidate  # without a volume, or far off everything: the page says so
    tof, hkl = linear_fit.reflection_positions(phase, cell, campaign)
    calculated = np.sqrt(np.maximum(pattern, 0) * gridded.covered, dtype=np.float64)
    measured = np.sqrt(prepared * gridded.covered)
    norm = float(np.linalg.norm(calculated) * np.linalg.norm(measured))
    correlation = float(calculated @ measured) / norm if norm else None
    return replace(candidate, tof=tof, hkl=hkl, pattern_fit=pattern_fit, correlation=correlation)


def runner_up(profile: PredictedProfile, fits: Sequence[CandidateFit]) -> CandidateFit | None:
    """Return the fit of the second crystal system, where the library has a cell of it.

    That is the most probable one apart from the predicted one; among those of probability zero,
    the one that correlates best.
    """
    predicted = profile.phase.crystal_system
    rivals = (f for f in fits if f.source == "library" and f.phase.crystal_system != predicted)
    return max(rivals, key=lambda f: (round(f.probability, 3), f.correlation or 0.0), default=None)


def find_misfits(fit: CandidateFit, gridded: GriddedProfile, campaign: Campaign) -> list[Misfit]:
    """Return the places where the difference is significant over a peak's width, the worst first.

    The difference is summed over the full width of a peak at that place, after subtraction of slow
    drifts, which are due to the background. What lies within one and a half widths of a worse place
    is part of that one.
    """
    pattern_fit = fit.pattern_fit
    if pattern_fit is None:
        return []
    tof, spacing = campaign.grid.tof, np.gradient(campaign.grid.tof)
    d = campaign.instrument.d_spacing_from_tof(tof)
    width = _full_width(d, campaign)
    known = np.isfinite(pattern_fit.difference)
    difference = np.where(known, pattern_fit.difference, 0.0)
    points = int(np.median(width / spacing) * _DRIFT_WIDTHS) | 1
    difference = np.where(known, difference - median_filter(difference, points), 0.0)
    half = np.maximum(np.rint(width / spacing / 2), 1).astype(int)
    index = np.arange(len(tof))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(tof))

    def within(values: Array) -> Array:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return np.asarray(total[high] - total[low])

    noise = np.sqrt(within(np.where(known, gridded.sigma, 0.0) ** 2))
    excess = within(difference)
    sigmas = np.divide(excess, noise, out=np.zeros_like(excess), where=known & (noise > 0))
    peak = within(np.where(known, pattern_fit.calculated - pattern_fit.background, 0.0))
    at, hkl = linear_fit.reflection_positions(fit.phase, fit.cell, campaign, visible=_FAINT)
    places: list[Misfit] = []
    # The flank of a peak is part of its place.
    reach = 2 * int(np.median(width / spacing)) + 1
    summit = np.abs(sigmas) == maximum_filter(np.abs(sigmas), reach)
    # At the ends of the measured range neither a peak nor the drift is complete.
    summit &= binary_erosion(known, np.ones(2 * reach + 1, dtype=bool))
    for i in np.argsort(-np.abs(sigmas)):
        if abs(sigmas[i]) < SIGNIFICANCE:
            break
        if not summit[i] or any(abs(tof[i] - worse.tof) < 1.5 * width[i] for worse in places):
            continue
        nearby = sigmas[np.abs(tof - tof[i]) < 1.5 * width[i]] * np.sign(sigmas[i])
        # An equally strong difference of the opposite sign: the peak is displaced.
        displaced = -nearby.min() > max(SIGNIFICANCE, abs(sigmas[i]) / 2)
        near = np.flatnonzero(np.abs(at - tof[i]) < width[i])
        near = near[np.argsort(np.abs(at[near] - tof[i]))]
        kind = "displaced" if displaced else "excess" if sigmas[i] > 0 else "deficit"
        share = float(excess[i] / peak[i]) if peak[i] > noise[i] else None
        reflections = tuple(tuple(map(int, hkl[k])) for k in near)
        at_d, full, by = float(d[i]), float(width[i]), float(sigmas[i])
        places.append(Misfit(float(tof[i]), at_d, full, by, kind, share, reflections))
    return places


def _full_width(d: Array, campaign: Campaign) -> Array:
    """Return about the full width at half maximum of a peak at d, in µs."""
    shape = peak_shape(campaign.instrument, d, size=campaign.size, microstrain=campaign.microstrain)
    width, _ = mixing(shape.variance, shape.fwhm)
    return np.asarray(width + np.log(2) * (1 / shape.rise + 1 / shape.decay))
