"""Whether a phase is in a sample: what it explains, over what it costs and what lines misfit."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import maximum_filter1d

from bragg_data.arrays import Array, Mask
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.joint_summary import increases_of_chi2
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.result import serial_correlation

CAUTION = 30.0
"""Decrease of χ² over noise, beyond what Schwarz's criterion asks for."""

MOSTLY = 0.97
"""Share of the signal explained, from which the rest may well be misfit."""

DISTINCT = 3.0
"""Relative errors of other phases' lines, above which a signal is not lost in them."""

_MEDIAN = 0.455  # of squares of normal residuals over their errors
_PART = 0.1  # of other phases' signal, below which that of a phase is lost in it
_LOST = 10.0  # relative errors of other phases' lines, below which a signal is lost in them
_COINCIDE = 0.9  # share of a phase's signal that is lost
_SHAPE = 1.5  # full widths about a line that misfits usually, within which others are lost
_IDENTIFIED = 0.85  # share of the signal that the right structures explain, at least
_STRANGE = 0.02  # relative, of the lengths of a cell
_WIDE = 0.1  # Å², of displacement parameters
_SMALL_PART = 0.25  # of what is left; phases of 40 mixtures of two to five explained 0.37 and more
_USUAL_MISFIT = 0.05  # relative, of the shapes and intensities of lines


def earned(state: State, before: State | None, code: int, *, strictly: bool = False) -> bool:
    """Return whether a state with another phase, at place ``code``, is worth its parameters.

    Where lines are, only what exceeds their usual misfit counts, and half of it has to be where
    the phase's lines are not lost in those of the others.
    """
    assert state.minimum is not None
    # Broadening and displacements are restrained: they hardly count.
    added = _cell_parameters(state) - (_cell_parameters(before) if before else 0)
    n = state.model.n_points
    penalty = np.log(n) * (added + len(state.model.banks)) + CAUTION
    error, distinct = errors(state, code)
    after, earlier = state.minimum.residual[:n] / error, _residual(state, before) / error
    # What other phases still have to explain makes neighbouring residuals alike; only where little
    # is left this is a misfit of the phases that there are.
    noise = max(float(after @ after) / n, 1.0)
    if strictly or state.explained > MOSTLY:
        noise *= serial_correlation(after)
    decrease = (earlier**2 - after**2) / noise
    return bool(decrease.sum() > penalty and decrease[distinct].sum() > penalty / 2)


def is_small_part(state: State, before: State | None) -> bool:
    """Return whether a further phase explains little of what was left.

    Of n phases that are missing the strongest one explains about 1/n; structures that imitate a
    foreign one explain less. By statistical errors, or those with the usual misfit of lines.
    """
    assert state.minimum is not None
    n = state.model.n_points
    after, earlier, error = state.minimum.residual[:n], _residual(state, before), errors(state)[0]
    parts = []
    for e in (np.ones(n), error):
        a, b = (max(float((r / e) @ (r / e)) - n, 0.0) for r in (after, earlier))
        parts.append(1 - a / max(b, 1e-9))
    return max(parts) < _SMALL_PART


def coincides(state: State, code: int) -> bool:
    """Return whether nearly all of a phase's signal is lost in that of the others.

    What it seems to explain is then their misfit. Where little is left to explain, but shapes of
    lines misfit, this reaches beyond their widths.
    """
    misfit, widths = _usual_misfit(state), 0.0
    if state.explained > MOSTLY:
        widths = 2 * _SHAPE * misfit / _USUAL_MISFIT
    part = max(_PART, _LOST * misfit)
    below = total = 0.0
    for model, fit in zip(state.model.banks, state.fits, strict=True):
        signal = np.abs(fit.columns[:, code]) * fit.scales[code]
        rest = np.abs(fit.columns @ fit.scales - fit.columns[:, code] * fit.scales[code])
        rest = maximum_filter1d(rest, 1 + int(widths * _points_of_width(model.bank)))
        below, total = (
            below + float(signal[part * rest > signal].sum()),
            total + float(signal.sum()),
        )
    return below > _COINCIDE * total


def _points_of_width(bank: MeasuredBank) -> int:
    return max(int(np.median(bank.full_width / np.gradient(bank.tof))), 1)


def errors(state: State, code: int = -1, times: float = 1.0) -> tuple[Array, Mask]:
    r"""Return the error of each point (n,), over its statistical one, with the model's.

    :math:`\sqrt{1 + f^2 S^2/\sigma^2}` with the calculated signal S, and the relative error f of
    shapes and intensities that makes most residuals as large as they are; it is no larger than
    usual, whatever phases are still missing. Also where the signal of a phase is
    no small part of that of the others. ``times`` enlarges f.
    """
    overlap, separate = [], []
    for model, fit in zip(state.model.banks, state.fits, strict=True):
        width = _points_of_width(model.bank)
        mine = fit.columns[:, code] * fit.scales[code]
        overlap.append(maximum_filter1d(np.abs(fit.columns @ fit.scales - mine), width))
        separate.append(np.abs(mine))
    s, f = _signal(state), _usual_misfit(state)
    part = max(_PART, DISTINCT * f)
    return np.sqrt(1 + (times * f * s) ** 2), np.concatenate(separate) > part * np.concatenate(
        overlap
    )


def _signal(state: State) -> Array:
    """Return the highest calculated signal within a width of each point, (n,)."""
    fits = zip(state.model.banks, state.fits, strict=True)
    return np.concatenate(
        [
            maximum_filter1d(np.abs(fit.columns @ fit.scales), _points_of_width(model.bank))
            for model, fit in fits
        ]
    )


def _usual_misfit(state: State) -> float:
    """Return the relative error of lines that makes residuals as large as they are, at most 5 %.

    By the median of the points where it would show: lines of phases that are missing are elsewhere,
    or on fewer points.
    """
    assert state.minimum is not None
    s = _signal(state)
    shows = _USUAL_MISFIT * s > 1
    if not shows.any():
        return 0.0
    s, square = s[shows], np.square(state.minimum.residual[: len(s)])[shows]

    def excess(f: float) -> float:
        return float(np.median(square / (1 + (f * s) ** 2))) - _MEDIAN

    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, _USUAL_MISFIT
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def doubts(result: JointResult, phases: Sequence[Phase]) -> tuple[str, ...]:
    """Return in sentences why phases that were identified among ``phases`` may be wrong ones.

    Several structures imitate much of another one's pattern, in cells and with displacements that
    are not theirs.
    """
    reasons = []
    if result.explained < _IDENTIFIED:
        reasons.append(
            f"The phases explain {100 * max(result.explained, 0):.0f} % of the signal; what is "
            f"identified explains {100 * _IDENTIFIED:.0f} %."
        )
    return *reasons, *unlikely_phases(result, phases, _STRANGE)


def unlikely_phases(
    result: JointResult, phases: Sequence[Phase], farthest: float
) -> tuple[str, ...]:
    """Return in sentences which of some phases are in states that hardly are theirs.

    Lengths of cells further than ``farthest``, relative, from the CIFs', and large displacements.
    """
    reasons = []
    cells = {phase.name: phase.cell for phase in phases}
    for phase in result.phases:
        if phase.name not in cells:
            continue
        strain = np.abs(phase.cell / cells[phase.name] - 1)[:3].max()
        if strain > farthest:
            reasons.append(
                f"{phase.name} is in a cell {100 * strain:.1f} % from its CIF's, as would be "
                f"another structure with such lines."
            )
        if any(site.u_iso - site.su_u_iso > _WIDE for site in phase.sites):
            reasons.append(f"{phase.name} has displacements above {_WIDE} Å², as no atom has.")
    return tuple(reasons)


def worth(state: State, code: int) -> float:
    """Return the increase of χ² over the noise if a phase were left out and all else stayed."""
    return float(increases_of_chi2(state.fits)[code]) / state.model.noise


def _cell_parameters(state: State) -> int:
    return sum(len(phase.lattice.free_columns) for phase in state.model.phases)


def reduced(state: State) -> float:
    """Return χ² over the number of points, at least 1."""
    return max(state.chi2 / state.model.n_points, 1.0)


def _residual(state: State, before: State | None) -> Array:
    """Return the weighted residual (n,) of an earlier state: without phases, the measurement."""
    if before is None:
        return np.concatenate([bank.y for bank in state.model.banks])
    assert before.minimum is not None
    return before.minimum.residual[: state.model.n_points]
