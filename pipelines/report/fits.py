"""Calculated patterns of predictions and their neighbours, and where they misfit the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, maximum_filter, median_filter

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CrystalError, encloses_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import (
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)
from bragg_data.refinement.result import PatternFit, RefinementError
from pipelines.prediction.workflow import PredictedProfile

SIGNIFICANCE = 5.0
"""Standard deviations over a peak's width from which a difference is listed."""

_DRIFT_WIDTHS = 20  # peak widths over which the difference's median is subtracted as background
_FAINT = 1e-6  # of the strongest reflection: a weaker one explains nothing


@dataclass(frozen=True, eq=False)
class Candidate:
    """A phase and a cell that may explain a profile.

    Attributes
    ----------
    source
        ``refined``, ``model`` or ``library``.
    code, phase, cell : cell of shape (6,)
        Code and structure of the phase; cell in ångström and degrees.
    probability
        The model's probability of this phase.
    """

    source: str
    code: int
    phase: Phase
    cell: NDArray[np.float64]
    probability: float


@dataclass(frozen=True, eq=False)
class CandidateFit:
    """The calculated pattern of a candidate, fitted to the measurement, and its reflections.

    Attributes
    ----------
    candidate
        Phase and cell.
    tof : shape (n,)
        Positions of the visible reflections, in µs of the campaign's instrument.
    hkl : shape (n, 3)
        Their Miller indices.
    pattern_fit
        None where no pattern could be calculated, or it cannot be fitted to the measurement.
    correlation
        Of the calculated pattern with the prepared profile, as in the library match; None where
        no pattern could be calculated.
    """

    candidate: Candidate
    tof: NDArray[np.float64]
    hkl: NDArray[np.int64]
    pattern_fit: PatternFit | None = None
    correlation: float | None = None

    @property
    def source(self) -> str:
        """``refined``, ``model`` or ``library``."""
        return self.candidate.source

    @property
    def phase(self) -> Phase:
        """The phase."""
        return self.candidate.phase

    @property
    def cell(self) -> NDArray[np.float64]:
        """The cell, shape (6,)."""
        return self.candidate.cell


@dataclass(frozen=True)
class Misfit:
    """A place where measurement and calculation differ by more than their noise.

    Attributes
    ----------
    tof, d
        On the campaign's axis in µs; in ångström.
    width
        Full width of a peak there, in µs.
    sigmas
        Measured minus calculated over that width, in its standard deviations.
    kind
        ``excess``, ``deficit``, or ``displaced`` where an excess is next to a deficit.
    share
        The difference in units of the calculated peak intensity there; None where that is hardly
        more than nothing.
    hkl
        Reflections of the cell within a peak's width, the nearest first.
    """

    tof: float
    d: float
    width: float
    sigmas: float
    kind: str
    share: float | None
    hkl: tuple[tuple[int, ...], ...]


def candidate_fits(
    profiles: Sequence[PredictedProfile], campaign: Campaign
) -> list[list[CandidateFit]]:
    """Fit the patterns of predicted cells and of library matches to the measurements.

    The best refinement of a profile comes first, as it was refined, then the model's cell, then
    the library's by their correlations.
    """
    fits = [_refined(profile) for profile in profiles]
    candidates = [(row, c) for row, profile in enumerate(profiles) for c in _candidates(profile)]
    # Without a volume there is no pattern, and it must not cost the others theirs.
    possible = [
        number for number, (_, c) in enumerate(candidates) if encloses_volume(c.cell[None])[0]
    ]
    patterns: dict[int, NDArray[np.float32]] = {}
    if possible:
        codes = np.array([candidates[number][1].code for number in possible])
        cells = np.stack([candidates[number][1].cell for number in possible])
        simulated = simulator_of(campaign).simulate(codes, cells)
        patterns = dict(zip(possible, simulated, strict=True))
    for number, (row, candidate) in enumerate(candidates):
        fits[row].append(_fit(profiles[row], candidate, patterns.get(number)))
    return fits


def _candidates(profile: PredictedProfile) -> list[Candidate]:
    """Return the predicted cell, and the library's by their correlations."""
    row, matches = profile.row, profile.matches
    probabilities = profile.prediction.probabilities[row]
    cells = [("model", int(profile.prediction.phase[row]), profile.cell)]
    if matches is not None:
        cells += [
            ("library", int(code), matches.cells[row, code])
            for code in np.argsort(-matches.correlation[row])
            if matches.row[row, code] >= 0
        ]
    return [
        Candidate(source, code, profile.phases[code], cell, float(probabilities[code]))
        for source, code, cell in cells
        if np.isfinite(cell).all()
    ]


def _fit(
    profile: PredictedProfile, candidate: Candidate, pattern: NDArray[np.float32] | None
) -> CandidateFit:
    tof, hkl = np.empty(0), np.empty((0, 3), dtype=np.int64)
    if pattern is None:
        return CandidateFit(candidate, tof, hkl)
    measurement = profile.measurement
    gridded = measurement.gridded
    try:
        tof, hkl = reflection_positions(candidate.phase, candidate.cell, profile.campaign)
        pattern_fit = fit_scale_and_background(gridded, pattern)
    except (CrystalError, RefinementError):
        return CandidateFit(candidate, tof, hkl)  # a cell far off everything: the page says so
    calculated = np.sqrt(np.maximum(pattern, 0) * gridded.covered, dtype=np.float64)
    measured = np.sqrt(measurement.prepared * gridded.covered)
    norm = float(np.linalg.norm(calculated) * np.linalg.norm(measured))
    correlation = float(calculated @ measured) / norm if norm else None
    return CandidateFit(candidate, tof, hkl, pattern_fit, correlation)


def _refined(profile: PredictedProfile) -> list[CandidateFit]:
    """Return the best refinement of a profile, if there is one, as the first of its fits."""
    if not profile.refined:
        return []
    best = profile.refined[0]
    phase = profile.phases[best.phase]
    probability = float(profile.prediction.probabilities[profile.row, best.phase])
    tof, hkl = reflection_positions(phase, best.cell, profile.campaign)
    candidate = Candidate("refined", best.phase, phase, best.cell, probability)
    return [CandidateFit(candidate, tof, hkl, best.pattern_fit)]


def runner_up(profile: PredictedProfile, fits: Sequence[CandidateFit]) -> CandidateFit | None:
    """Return the fit of the second crystal system, where the library has a cell of it.

    That is the most probable one apart from the predicted one; among those of probability zero,
    the one that correlates best.
    """
    rivals = [
        fit
        for fit in fits
        if fit.source == "library" and fit.phase.crystal_system != profile.phase.crystal_system
    ]
    key = [(round(fit.candidate.probability, 3), fit.correlation or 0.0) for fit in rivals]
    return rivals[max(range(len(rivals)), key=key.__getitem__)] if rivals else None


def find_misfits(fit: CandidateFit, gridded: GriddedProfile, campaign: Campaign) -> list[Misfit]:
    """Return the places where the difference is significant over a peak's width, the worst first.

    The difference is summed over the full width of a peak at that place, after subtraction of slow
    drifts, which are due to the background. What lies within one and a half widths of a worse place
    is part of that one.

    Parameters
    ----------
    fit
        Fit of a calculated pattern.
    gridded
        The measurement that it was fitted to.
    campaign
        Campaign of the grid and the instrument.
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

    def within(values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return np.asarray(total[high] - total[low])

    noise = np.sqrt(within(np.where(known, gridded.sigma, 0.0) ** 2))
    excess = within(difference)
    sigmas = np.divide(excess, noise, out=np.zeros_like(excess), where=known & (noise > 0))
    peak = within(np.where(known, pattern_fit.calculated - pattern_fit.background, 0.0))
    at, hkl = reflection_positions(fit.phase, fit.cell, campaign, visible=_FAINT)
    places: list[Misfit] = []
    # The flank of a peak is part of its place.
    reach = 2 * int(np.median(width / spacing)) + 1
    summit = np.abs(sigmas) == maximum_filter(np.abs(sigmas), reach)
    # At the ends of the measured range neither a peak nor the drift is complete.
    summit &= binary_erosion(known, np.ones(2 * reach + 1, dtype=bool))
    for i in np.argsort(-np.abs(sigmas)):
        if abs(sigmas[i]) < SIGNIFICANCE:
            break
        if not summit[i]:
            continue
        if any(abs(tof[i] - worse.tof) < 1.5 * width[i] for worse in places):
            continue
        nearby = sigmas[np.abs(tof - tof[i]) < 1.5 * width[i]] * np.sign(sigmas[i])
        # An equally strong difference of the opposite sign: the peak is displaced.
        displaced = -nearby.min() > max(SIGNIFICANCE, abs(sigmas[i]) / 2)
        near = np.flatnonzero(np.abs(at - tof[i]) < width[i])
        near = near[np.argsort(np.abs(at[near] - tof[i]))]
        places.append(
            Misfit(
                tof=float(tof[i]),
                d=float(d[i]),
                width=float(width[i]),
                sigmas=float(sigmas[i]),
                kind="displaced" if displaced else "excess" if sigmas[i] > 0 else "deficit",
                share=float(excess[i] / peak[i]) if peak[i] > noise[i] else None,
                hkl=tuple(tuple(map(int, hkl[k])) for k in near),
            )
        )
    return places


def _full_width(d: NDArray[np.float64], campaign: Campaign) -> NDArray[np.float64]:
    """Return about the full width at half maximum of a peak at d, in µs."""
    shape = peak_shape(campaign.instrument, d, size=campaign.size, microstrain=campaign.microstrain)
    width, _ = mixing(shape.variance, shape.fwhm)
    return np.asarray(width + np.log(2) * (1 / shape.rise + 1 / shape.decay))
