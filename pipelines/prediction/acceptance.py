"""What is said of an answer beside it: intervals, whether it is accepted, and why not.

A model that knows how sure it is refuses a profile of which its best cell leaves too much. A
refinement knows more: displacements, widths and coordinates are the sample's own there. Of 150
draws of genuine samples refinements explain at least 98.9 % of the signal, of silicon, diamond,
rutile and shuffled points at most 74 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.refinement.linear_fit import explained_fraction
from bragg_data.refinement.result import RefinementResult
from bragg_models.predictors import Prediction

EXPLAINED = 0.85
"""Share of the signal that a refinement of a genuine sample explains at least."""

_DOUBTED = 0.95  # the same where the model has refused the profile
_SIGNAL = 5.0  # standard deviations, above which peaks stand out of the noise


def explains(fit: RefinementResult, share: float = EXPLAINED) -> bool:
    """Tell whether a refinement explains the signal, if there is one."""
    return _signal(fit) >= _SIGNAL and explained_fraction(fit.pattern_fit) >= share


def _signal(fit: RefinementResult) -> float:
    """Return the weighted square above the background, in standard deviations of the noise's."""
    above = fit.chi2 / max(fit.pattern_fit.rwp_background**2, 1e-12)
    return float((above - fit.n_points) / np.sqrt(2 * fit.n_points))


def verdict_json(
    prediction: Prediction, row: int, refined: Sequence[RefinementResult] = ()
) -> dict[str, Any]:
    """Return intervals and verdict of one answer as plain JSON values; None without them.

    Parameters
    ----------
    prediction, row
        The model's answers, and which of them.
    refined
        Refinements of the profile, the most plausible one first.
    """
    intervals = accepted = reasons = None
    if prediction.intervals is not None:
        intervals = {
            name: [float(low), float(high)]
            for name, (low, high) in zip(CELL_PARAMETERS, prediction.intervals[row], strict=True)
            if np.isfinite(low)
        }
    if prediction.accepted is not None and prediction.unexplained is not None:
        accepted, reasons = bool(prediction.accepted[row]), []
        if not accepted:
            reasons.append(
                f"No cell of the model's phases explains the profile: "
                f"{100 * prediction.unexplained[row]:.0f} % of it is left, of samples that it "
                f"knows at most {100 * (prediction.limit or 0):.0f} %. The sample, the bank or the "
                f"calibration is another than those it was trained for, or there are no peaks."
            )
    if refined:
        doubted = accepted is False
        of_fit = _reasons(refined[0], _DOUBTED if doubted else EXPLAINED)
        # What the model alone could not explain a refinement may.
        reasons = [*(reasons or []), *of_fit] if of_fit else []
        accepted = not reasons
    return {"intervals": intervals, "accepted": accepted, "reasons": reasons}


def _reasons(fit: RefinementResult, share: float) -> list[str]:
    """Return what speaks against a refinement."""
    if _signal(fit) < _SIGNAL:
        return ["No peaks stand above the background: there is nothing to refine on."]
    explained = explained_fraction(fit.pattern_fit)
    if fit.intensities == "free":
        return [
            f"The peaks stand where a lattice of the model has lines ({100 * explained:.0f} % of "
            f"the signal), but are not as high as its structures make them: another compound with "
            f"such a lattice. The refined cell is from the positions alone."
        ]
    if explained < share:
        return [
            f"The best refinement explains {100 * explained:.0f} % of the signal above the "
            f"background, of samples that the model knows at least {100 * share:.0f} %."
        ]
    return []
