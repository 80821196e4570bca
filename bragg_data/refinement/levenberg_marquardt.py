"""Levenberg–Marquardt minimisation within bounds, for models of which each pattern is expensive.

Levenberg, Quarterly of Applied Mathematics 2 (1944) 164; Marquardt, SIAM Journal on Applied
Mathematics 11 (1963) 431. Not scipy's nor lmfit's: a Jacobian costs as much as ten patterns and is
reused here as long as it predicts the steps well, a fit that cannot win is given up on the way, and
a step to a point that has no pattern is rejected instead of ending the fit.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError

_MOST_STEPS = 60
_RELIABLE = 0.5  # fraction of the predicted decrease below which the Jacobian is calculated again


class Evaluation(NamedTuple):
    """Weighted differences (n,) of a model at a point, and its weighted pattern (points,)."""

    residual: Array
    pattern: Array


class Minimum(NamedTuple):
    """Where a minimisation ended."""

    point: Array  # (k,)
    residual: Array  # (n,) weighted differences there
    jacobian: Array  # (n, k) their derivatives there, or a few steps before
    converged: bool  # whether no step promised more


def minimise(
    evaluate: Callable[[Array], Evaluation],
    derivatives: Callable[[Array, Evaluation], Array],
    start: Array,
    bounds: tuple[Array, Array],
    tolerance: Callable[[float], float],
    give_up: Callable[[float, float, bool], bool],
) -> Minimum:
    """Minimise the sum of squared residuals of a model, from a point (k,) where it is defined.

    ``evaluate`` raises a CrystalError where the model is not defined; ``derivatives`` returns those
    of the residuals at an evaluated point, (n, k).
    ``tolerance`` maps χ² to the predicted decrease of χ² below which a step is not worth while.
    ``give_up`` is called before each step with χ², its predicted decrease, and whether the Jacobian
    was calculated at this point; it ends the minimisation where it returns True.
    """
    low, high = bounds
    x, here = start, evaluate(start)
    jacobian, fresh = derivatives(x, here), True
    # Where one step after the other leads uphill, damping rises faster and faster.
    damping, rise, converged = 1e-3, 10.0, False
    for _ in range(_MOST_STEPS):
        normal, right = jacobian.T @ jacobian, -(jacobian.T @ here.residual)
        if not np.trace(normal) > 0:
            break  # nothing of the pattern is in the measurement
        step = _bounded_step(normal, right, damping, low - x, high - x)
        predicted = float(2 * right @ step - step @ normal @ step)
        chi2 = float(here.residual @ here.residual)
        if predicted < tolerance(chi2):  # in a bound's corner, hardly below zero
            converged = fresh
            if fresh:
                break
            jacobian, fresh = derivatives(x, here), True
            continue
        if give_up(chi2, predicted, fresh):
            break
        decrease = -np.inf
        with suppress(CrystalError):  # no pattern there
            trial = evaluate(x + step)
            decrease = chi2 - float(trial.residual @ trial.residual)
        if decrease > 0:
            x, here = x + step, trial
            damping, rise = max(0.1 * damping, 1e-5), 10.0
            fresh = False
        if not decrease >= _RELIABLE * predicted:
            if fresh:
                damping, rise = min(rise * damping, 1e6), 10 * rise
            else:
                jacobian, fresh = derivatives(x, here), True
    return Minimum(x, here.residual, jacobian, converged)


def _bounded_step(normal: Array, right: Array, damping: float, low: Array, high: Array) -> Array:
    """Return a damped step within bounds: parameters that meet one stay, the others are solved for.

    A step of all parameters that is clipped to the bounds may well lead uphill.
    """
    diagonal = np.diag(normal) + 1e-12 * np.trace(normal)
    system = normal + damping * np.diag(diagonal)
    step = np.zeros(len(right))
    free = np.ones(len(right), dtype=bool)
    while free.any():
        rest = right[free] - normal[np.ix_(free, ~free)] @ step[~free]
        step[free] = np.linalg.solve(system[np.ix_(free, free)], rest)
        beyond = free & ((step < low) | (step > high))
        if not beyond.any():
            break
        step = np.clip(step, low, high)
        free &= ~beyond
    return step
