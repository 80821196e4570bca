"""Levenberg–Marquardt minimisation within bounds.

Levenberg, Quarterly of Applied Mathematics 2 (1944) 164; Marquardt, SIAM Journal on Applied
Mathematics 11 (1963) 431; the damping follows how well a step was predicted (H. B. Nielsen,
Technical University of Denmark, report IMM-REP-1999-05). Not scipy's nor lmfit's: a fit that cannot
win is given up on the way, a step to a point that has no pattern is rejected instead of ending the
fit, and a pattern comes with its derivatives, for little more than without them.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.refinement.time_limit import check_time

_MOST_STEPS = 60
_LEAST_DAMPING, _MOST_DAMPING = 1e-5, 1e6
_LEAST_AFTER = 0.1  # after a step uphill: less hardly makes another step
_NO_DAMPING = 1e-9  # keeps what the data do not determine where it is
_PATIENCE = 10  # steps, after which one that leads uphill has the weak directions looked at
_WEAK = 0.02  # eigenvalue of the normal matrix with 1 on its diagonal
_SHORT = 0.1  # of an undamped step, along which curvature is measured


class Evaluation(NamedTuple):
    """Weighted differences (n,) of a model at a point, and their derivatives (n, k)."""

    residual: Array
    jacobian: Array
    of_model: Any = None  # whatever else a model keeps of the point


class Minimum(NamedTuple):
    """Where a minimisation ended."""

    point: Array  # (k,)
    residual: Array  # (n,) weighted differences there
    jacobian: Array  # (n, k) their derivatives there
    of_model: Any  # whatever else the model keeps of the point
    converged: bool  # whether the gradient test was passed


def minimise(
    evaluate: Callable[[Array], Evaluation],
    start: Array,
    bounds: tuple[Array, Array],
    tolerance: Callable[[float], float],
    give_up: Callable[[float, float], bool] = lambda chi2, predicted: False,  # noqa: ARG005
    *,
    steps: int = _MOST_STEPS,
    longest: Callable[[Array], Array] = lambda point: np.full(len(point), np.inf),
) -> Minimum:
    """Minimise the sum of squared residuals of a model, from a point (k,) where it is defined.

    ``evaluate`` raises a CrystalError where the model is not defined. It converges by its gradient
    alone: where the part of the residual that lies along the derivatives, which is the decrease of
    χ² that an undamped step within the bounds predicts, is below ``tolerance`` of χ². Steps that
    damping makes short prove nothing. ``give_up`` is called before each step with χ² and its
    predicted decrease; it ends the minimisation where it returns True. So does the number of
    ``steps``. No parameter changes by more than ``longest`` of the point (k,) in a step. A
    TimeLimitError is raised where the time is over.
    """
    low, high = bounds
    x, here = start, evaluate(start)
    # Where one step after the other leads uphill, damping rises faster and faster.
    damping, rise, converged = 1e-3, 10.0, False
    further = np.zeros((len(x), len(x)))
    for number in range(steps):
        check_time()
        normal, right = here.jacobian.T @ here.jacobian, -(here.jacobian.T @ here.residual)
        if not np.trace(normal) > 0:
            break  # nothing of the pattern is in the measurement
        chi2 = float(here.residual @ here.residual)
        far = longest(x)
        ends = np.maximum(low - x, -far), np.minimum(high - x, far)
        if number >= _PATIENCE and rise > 10.0:
            further = _further_curvature(evaluate, x, chi2, normal, right, ends)
            here = evaluate(x)  # shapes may have been prepared again for where that looked
            chi2 = float(here.residual @ here.residual)
        normal += further
        undamped = _bounded_step(_damped(normal, _NO_DAMPING), right, low - x, high - x)
        if _predicted(normal, right, undamped) < tolerance(chi2):
            converged = True
            break
        step = _bounded_step(_damped(normal, damping), right, *ends)
        predicted = _predicted(normal, right, step)
        if give_up(chi2, predicted):
            break
        decrease = -np.inf
        with suppress(CrystalError):  # no pattern there
            trial = evaluate(x + step)
            decrease = chi2 - float(trial.residual @ trial.residual)
        if decrease > 0:
            x, here = x + step, trial
            change = max(0.1, 1 - (2 * decrease / predicted - 1) ** 3)
            damping, rise = max(change * damping, _LEAST_DAMPING), 10.0
        elif damping >= _MOST_DAMPING:
            break  # not even the shortest step leads downhill: the derivatives are not the model's
        else:
            damping = min(max(rise * damping, _LEAST_AFTER), _MOST_DAMPING)
            rise *= 10
    return Minimum(x, *here, converged)


def _further_curvature(
    evaluate: Callable[[Array], Evaluation],
    x: Array,
    chi2: float,
    normal: Array,
    right: Array,
    ends: tuple[Array, Array],
) -> Array:
    """Return what the normal matrix (k, k) lacks of χ²'s curvature in directions it leaves open.

    The pattern changes there by the square of the parameters' changes, as where two sites of equal
    scattering exchange their displacement parameters, and undamped steps promise what they cannot
    keep.
    """
    scale = np.sqrt(_diagonal(normal))
    values, vectors = np.linalg.eigh(normal / np.outer(scale, scale))
    further = np.zeros_like(normal)
    for value, vector in zip(values, vectors.T, strict=True):
        slope = float(right @ (vector / scale))
        if value > _WEAK or slope == 0:
            continue
        move = _SHORT * slope / max(value, _NO_DAMPING) * vector / scale
        move = np.clip(move, *ends)
        step = float(move * scale @ vector)
        with suppress(CrystalError):
            residual = evaluate(x + move).residual
            change = float(residual @ residual) - chi2 + 2 * right @ move
            if step and change > value * step**2:
                further += (change / step**2 - value) * np.outer(vector * scale, vector * scale)
    return further


def _predicted(normal: Array, right: Array, step: Array) -> float:
    """Return the decrease of χ² that a step predicts; in a bound's corner, hardly below zero."""
    return float(2 * right @ step - step @ normal @ step)


def _damped(normal: Array, damping: float) -> Array:
    """Return the normal matrix (k, k) with a factor on its diagonal."""
    return np.asarray(normal + damping * np.diag(_diagonal(normal)))


def _diagonal(normal: Array) -> Array:
    """Return the diagonal (k,), above zero where the data do not see a parameter."""
    return np.asarray(np.diag(normal) + 1e-12 * np.trace(normal))


def _bounded_step(system: Array, right: Array, low: Array, high: Array) -> Array:
    """Return the minimum of the quadratic form of a system of equations (k, k) within bounds.

    By an active set: what meets a bound is held there until the form falls inwards (P. B. Stark &
    R. L. Parker, Computational Statistics 10 (1995) 129). All that an unbounded step takes beyond
    its bound may not be held at once: such a step may well lead uphill.
    """
    step = np.linalg.solve(system, right)
    if ((low <= step) & (step <= high)).all():
        return np.asarray(step)
    step, held = np.zeros(len(right)), np.zeros(len(right), dtype=bool)
    for _ in range(3 * len(right)):
        free = ~held
        move = np.zeros(len(right))
        slope = right - system @ step
        move[free] = np.linalg.solve(system[np.ix_(free, free)], slope[free])
        room = np.where(move > 0, high - step, low - step)
        beyond = np.abs(move) > np.abs(room)
        if beyond.any():
            share = np.where(beyond, room / np.where(beyond, move, 1.0), np.inf)
            first = int(share.argmin())
            step += share[first] * move
            step[first] = high[first] if move[first] > 0 else low[first]
            held[first] = True
            continue
        step += move
        slope = right - system @ step
        inwards = held * np.where(step >= high, -slope, slope) / np.sqrt(np.diag(system))
        if not inwards.max() > 0:
            break
        held[inwards.argmax()] = False
    return step
