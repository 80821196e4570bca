"""Whether a predicted phase is accepted, and which of its cell parameters are determined.

A model that knows its confidence rejects a profile of which its best cell leaves too much. A
refinement knows more: see docs/explanation/intervals.md.
"""

from collections.abc import Sequence

import numpy as np

from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.refinement.linear_fit import explained_fraction
from bragg_data.refinement.result import RefinementResult
from bragg_models.predictors import Prediction
from pipelines.cli.style import UNITS
from pipelines.prediction.result import Acceptance, Interval, Intervals
from pipelines.refinement.result import JointPhase

NORMAL_90 = 1.645  # standard deviations on either side that nine in ten normal values are within
EXPLAINED = 0.85  # fraction of the signal that a refinement of a genuine sample explains at least
_EXPLAINED_IF_REJECTED = 0.95  # the same where the model has rejected the profile
_TRAIN = "Use a model that was trained for longer, or refine."
_MEASURE = "Measure for longer, or a bank with more of the peaks."
_SIGNIFICANCE = 5.0  # standard deviations by which the signal has to exceed the noise


def explains(fit: RefinementResult, fraction: float = EXPLAINED) -> bool:
    """Return whether there is a signal, and a refinement explains this fraction of it."""
    return _significance(fit) >= _SIGNIFICANCE and explained_fraction(fit.pattern_fit) >= fraction


def _significance(fit: RefinementResult) -> float:
    """Return the weighted square above the background, in standard deviations of the noise's."""
    above = fit.chi2 / max(fit.pattern_fit.rwp_background**2, 1e-12)
    return float((above - fit.n_points) / np.sqrt(2 * fit.n_points))


def assess_acceptance(
    prediction: Prediction, row: int, refined: Sequence[RefinementResult] = ()
) -> Acceptance:
    """Return whether a profile is accepted as one of the phases, and why not.

    ``refined`` are refinements of the profile, the most plausible phase first.
    """
    reasons: list[str] | None = None
    unexplained = limit = None
    if prediction.accepted is not None and prediction.unexplained is not None:
        reasons = []
        unexplained, limit = float(prediction.unexplained[row]), prediction.limit
        if not prediction.accepted[row]:
            reasons.append(
                f"No cell of the model's phases explains the profile: the predicted phase leaves "
                f"{100 * unexplained:.0f} % of it, genuine samples leave at most "
                f"{100 * (limit or 0):.0f} %. The sample, the bank or the calibration differs from "
                f"those the model was trained for, or there are no peaks."
            )
    if refined:
        # A refinement may explain what the model alone could not.
        objection = _objection(refined[0], _EXPLAINED_IF_REJECTED if reasons else EXPLAINED)
        reasons = [*(reasons or []), objection] if objection else []
    if reasons is None:
        return Acceptance()
    return Acceptance(not reasons, tuple(reasons), unexplained, limit)


def _objection(fit: RefinementResult, fraction: float) -> str | None:
    if _significance(fit) < _SIGNIFICANCE:
        return "No peaks stand above the background: there is nothing to refine on."
    explained = explained_fraction(fit.pattern_fit)
    if fit.intensities == "free":
        return (
            f"The peaks are where a lattice of the model has reflections ({100 * explained:.0f} % "
            f"of the signal), but their intensities are not those of its structures: another "
            f"compound with such a lattice. The refined cell is from the peak positions alone."
        )
    if explained < fraction:
        return (
            f"The best refinement explains {100 * explained:.0f} % of the signal above the "
            f"background; of genuine samples it explains at least {100 * fraction:.0f} %."
        )
    return None


def estimate_intervals(prediction: Prediction, row: int, campaign: Campaign) -> Intervals | None:
    """Return the 90 % intervals of the free cell parameters, or None from a model without them.

    An interval that is as wide as all of the range of the campaign that the model was trained on
    carries no information: the parameter is not determined.
    """
    if prediction.intervals is None:
        return None
    code = int(prediction.phase[row])
    return _intervals(prediction.intervals[row], code, campaign, _TRAIN)


def refined_intervals(
    fit: RefinementResult, campaign: Campaign, half_bin: float, drift: float
) -> Intervals:
    """Return the 90 % intervals of a refined cell's free parameters.

    Its standard uncertainties, combined with the ``drift`` of an instrument that was not
    calibrated for the measurement, a relative standard deviation of lengths; and wider by
    ``half_bin``, the relative error of lengths where bin edges and centres are unclear.
    """
    is_length = np.arange(6) < 3
    spread = np.hypot(fit.su, drift * fit.cell * is_length)
    half = NORMAL_90 * spread + half_bin * fit.cell * is_length
    return _intervals(fit.cell[:, None] + half[:, None] * [-1, 1], fit.phase, campaign, _MEASURE)


def joint_intervals(phase: JointPhase, code: int, campaign: Campaign) -> Intervals:
    """Return the 90 % intervals of a cell that was refined against several banks at once.

    The uncertainties of the measurement and of the calibration are added in quadrature.
    """
    assert phase.cell is not None
    assert phase.su is not None
    assert phase.su_calibration is not None
    cell = phase.cell.to_array()
    half = NORMAL_90 * np.hypot(phase.su.to_array(), phase.su_calibration.to_array())
    return _intervals(cell[:, None] + half[:, None] * [-1, 1], code, campaign, _MEASURE)


def _intervals(intervals: Array, code: int, campaign: Campaign, remedy: str) -> Intervals:
    """Return the intervals (6, 2) of a phase's free parameters, where they are determined."""
    ends: dict[str, Interval | None] = {}
    not_determined = {}
    ranges = campaign.parameter_ranges(code)
    for name in campaign.phases[code].lattice.free_parameters:
        low, high = map(float, intervals[CELL_PARAMETERS.index(name)])
        lowest = min((low_end for low_end, _ in ranges.get(name, ())), default=-np.inf)
        highest = max((high_end for _, high_end in ranges.get(name, ())), default=np.inf)
        unit, ends[name] = UNITS[name], None
        if not np.isfinite([low, high]).all():
            not_determined[name] = "There is no finite interval."
        elif highest > lowest and high - low >= highest - lowest:
            not_determined[name] = (
                f"The 90 % interval (± {(high - low) / 2:,.4g} {unit}) is as wide as the range of "
                f"the training data ({lowest:g} to {highest:g} {unit}). {remedy}"
            )
        else:
            ends[name] = Interval(low, high)
    return Intervals(ends, not_determined)
