"""What answers and neighbours would look like over a measurement, and where that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, maximum_filter, median_filter

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CrystalError, check_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import (
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)
from bragg_data.refinement.result import PatternFit, RefinementError
from pipelines.prediction.predict import Answer

SIGNIFICANT = 5.0
"""Standard deviations over a peak's width from which a difference is listed."""

_DRIFT = 20  # peak widths over which the difference's median is taken off as background
_FAINT = 1e-6  # of the strongest reflection: a weaker one explains nothing


@dataclass(frozen=True, eq=False)
class Fit:
    """A cell, what it would look like over the measurement, and where it has reflections.

    Attributes
    ----------
    source
        ``refined``, ``model`` or ``library``.
    code, phase, cell : cell of shape (6,)
        Code and structure of the phase; cell in ångström and degrees.
    probability
        The model's, of this phase.
    correlation
        Of the calculated pattern with the prepared profile, as the library match has it; None where
        nothing could be calculated.
    overlay
        None where nothing could be calculated, or it cannot be laid over the measurement.
    tof : shape (n,)
        Of the visible reflections, in µs of the campaign's instrument.
    hkl : shape (n, 3)
    """

    source: str
    code: int
    phase: Phase
    cell: NDArray[np.float64]
    probability: float
    correlation: float | None
    overlay: PatternFit | None
    tof: NDArray[np.float64]
    hkl: NDArray[np.int64]


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
        Measured less calculated over that width, in its standard deviations.
    kind
        ``excess``, ``deficit``, or ``displaced`` where one stands beside the other.
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


def fits_of(answers: Sequence[Answer], campaign: Campaign) -> list[list[Fit]]:
    """Lay the cells of answers and of their library matches over the measurements.

    What was refined comes first, as it was fitted.
    """
    wanted: list[tuple[int, str, int, NDArray[np.float64]]] = []
    for number, answer in enumerate(answers):
        wanted.append((number, "model", int(answer.prediction.phase[answer.row]), answer.cell))
        if answer.matches is not None:
            order = np.argsort(-answer.matches.correlation[answer.row])
            wanted += [
                (number, "library", int(code), answer.matches.cells[answer.row, code])
                for code in order
                if answer.matches.row[answer.row, code] >= 0
            ]
    wanted = [one for one in wanted if np.isfinite(one[3]).all()]
    possible = [one for one in wanted if _encloses_volume(one[3])]
    patterns = (
        simulator_of(campaign).simulate(
            np.array([code for _, _, code, _ in possible]), np.stack([one[3] for one in possible])
        )
        if possible
        else ()
    )
    pattern_of = {id(one[3]): p for one, p in zip(possible, patterns, strict=True)}
    fits = [_refined(answer, campaign) for answer in answers]
    for number, source, code, cell in wanted:
        fits[number].append(
            _fit(answers[number], source, code, cell, pattern_of.get(id(cell)), campaign)
        )
    return fits


def _fit(
    answer: Answer,
    source: str,
    code: int,
    cell: NDArray[np.float64],
    pattern: NDArray[np.float32] | None,
    campaign: Campaign,
) -> Fit:
    overlay = correlation = None
    tof, hkl = np.empty(0), np.empty((0, 3), dtype=np.int64)
    if pattern is not None:
        gridded = answer.measurement.gridded
        try:
            tof, hkl = reflection_positions(campaign.phases[code], cell, campaign)
            overlay = fit_scale_and_background(gridded, pattern)
        except (CrystalError, RefinementError):
            pass  # a cell far off everything: the page says so
        else:
            one = np.sqrt(np.maximum(pattern, 0) * gridded.covered, dtype=np.float64)
            other = np.sqrt(answer.measurement.prepared * gridded.covered)
            norm = float(np.linalg.norm(one) * np.linalg.norm(other))
            correlation = float(one @ other) / norm if norm else None
    return Fit(
        source, code, campaign.phases[code], cell,
        float(answer.prediction.probabilities[answer.row, code]), correlation, overlay, tof, hkl,
    )  # fmt: skip


def _refined(answer: Answer, campaign: Campaign) -> list[Fit]:
    """Return the best refinement of an answer, if there is one, as the first of its fits."""
    if not answer.refined:
        return []
    best = answer.refined[0]
    phase = campaign.phases[best.phase]
    probability = float(answer.prediction.probabilities[answer.row, best.phase])
    tof, hkl = reflection_positions(phase, best.cell, campaign)
    return [
        Fit("refined", best.phase, phase, best.cell, probability, None, best.pattern_fit, tof, hkl)
    ]


def _encloses_volume(cell: NDArray[np.float64]) -> bool:
    try:
        check_volume(cell[None])
    except CrystalError:
        return False
    return True


def runner_up(answer: Answer, fits: Sequence[Fit]) -> Fit | None:
    """Return the fit of the crystal system that comes second, where the library has a cell of it.

    That is the most probable one beside the answer's; among those with a probability of nothing,
    the one that correlates best.
    """
    others = [
        f for f in fits
        if f.source == "library" and f.phase.crystal_system != answer.phase.crystal_system
    ]  # fmt: skip
    key = [(round(f.probability, 3), f.correlation or 0.0) for f in others]
    return others[max(range(len(others)), key=key.__getitem__)] if others else None


def misfits(fit: Fit, gridded: GriddedProfile, campaign: Campaign) -> list[Misfit]:
    """Return the places where the difference stands out over a peak's width, the worst first.

    The difference is summed over the full width that a peak has there. Slow drifts, which are the
    background's affair, are taken off before. What lies within a width and a half of a worse place
    belongs to that one.

    Parameters
    ----------
    fit
        With an overlay.
    gridded
        What it was laid over.
    campaign
        Whose grid.
    """
    overlay = fit.overlay
    if overlay is None:
        return []
    tof, spacing = campaign.grid.tof, np.gradient(campaign.grid.tof)
    d = campaign.instrument.d_spacing_from_tof(tof)
    width = _full_width(d, campaign)
    known = np.isfinite(overlay.difference)
    difference = np.where(known, overlay.difference, 0.0)
    points = int(np.median(width / spacing) * _DRIFT) | 1
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
    peak = within(np.where(known, overlay.calculated - overlay.background, 0.0))
    at, hkl = reflection_positions(fit.phase, fit.cell, campaign, visible=_FAINT)
    found: list[Misfit] = []
    # The flank of a peak is no place of its own.
    around = 2 * int(np.median(width / spacing)) + 1
    summit = np.abs(sigmas) == maximum_filter(np.abs(sigmas), around)
    # At the ends of what was measured neither a peak nor the drift is whole.
    summit &= binary_erosion(known, np.ones(2 * around + 1, dtype=bool))
    for i in np.argsort(-np.abs(sigmas)):
        if abs(sigmas[i]) < SIGNIFICANT:
            break
        if not summit[i]:
            continue
        if any(abs(tof[i] - other.tof) < 1.5 * width[i] for other in found):
            continue
        beside = sigmas[np.abs(tof - tof[i]) < 1.5 * width[i]] * np.sign(sigmas[i])
        # As strong a difference of the other sign: what is there stands elsewhere.
        displaced = -beside.min() > max(SIGNIFICANT, abs(sigmas[i]) / 2)
        near = np.flatnonzero(np.abs(at - tof[i]) < width[i])
        near = near[np.argsort(np.abs(at[near] - tof[i]))]
        found.append(
            Misfit(
                float(tof[i]), float(d[i]), float(width[i]), float(sigmas[i]),
                "displaced" if displaced else "excess" if sigmas[i] > 0 else "deficit",
                float(excess[i] / peak[i]) if peak[i] > noise[i] else None,
                tuple(tuple(map(int, hkl[k])) for k in near),
            )
        )  # fmt: skip
    return found


def _full_width(d: NDArray[np.float64], campaign: Campaign) -> NDArray[np.float64]:
    """Return about the full width at half maximum of a peak at d, in µs."""
    shape = peak_shape(campaign.instrument, d, size=campaign.size, microstrain=campaign.microstrain)
    width, _ = mixing(shape.variance, shape.fwhm)
    return np.asarray(width + np.log(2) * (1 / shape.rise + 1 / shape.decay))
