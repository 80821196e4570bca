"""What the data show to be needed in a joint refinement, by Schwarz's criterion.

Annals of Statistics 6 (1978) 461: displacement parameters of sites, coordinates, widths of banks,
absorption, extinction, preferred orientation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from bragg_data.refinement.joint_model import JointModel
from bragg_data.refinement.joint_parameters import (
    Parameter,
    coordinates,
    factor,
    site_displacements,
    widths,
)
from bragg_data.refinement.joint_state import ROUGHLY, State
from bragg_data.refinement.line_factors import ABSORPTION, EXTINCTION, ORIENTATION

_ROUNDS = 6  # of additions by evidence
# Share of χ² that other widths than the calibration's have to explain. With less they make up for
# small errors of the shape, and move positions: 10 % for diamond on NOMAD, 1e-4 of the length.
_OF_WIDTHS = 0.15
_AXES = tuple(f"{ORIENTATION} {hkl}" for hkl in ("0 0 1", "1 0 0", "1 1 0", "1 1 1"))


def with_additions(state: State) -> State:
    """Return the state with the parameters that the data need, the most needed ones first.

    Those that a linear estimate promises to be worth while are added, and stay if they are.
    """
    refused: set[str] = set()
    for _ in range(_ROUNDS):
        groups = [g for g in _candidates(state) if g[0].name not in refused]
        penalties = [_penalty(state, group) for group in groups]
        worth = [
            decrease / state.model.noise - penalty
            for decrease, penalty in zip(gains(state.model, groups), penalties, strict=True)
        ]
        if not worth or max(worth) <= 0:
            return state
        best = int(np.argmax(worth))
        extended = State(_extended(state.model, groups[best])).minimised(ROUGHLY)
        decrease = state.chi2 - extended.chi2
        assert extended.minimum is not None
        if extended.minimum.converged and decrease / state.model.noise > penalties[best]:
            state = extended
        else:
            refused.add(groups[best][0].name)
    return state


def _penalty(state: State, group: Sequence[Parameter]) -> float:
    """Return the decrease of χ² over the noise that a group of parameters has to bring."""
    needed = _OF_WIDTHS * state.chi2 / state.model.noise if group[0].keys[0] == "width_scale" else 0
    return float(np.log(state.model.n_points) * len(group) + needed)


def _candidates(state: State) -> Iterator[list[Parameter]]:
    """Yield groups of parameters that might be needed.

    A trace has none of its own: what they explain is the misfit of other phases' lines.
    """
    model = state.model
    used = {(p.phase, key) for p in model.parameters for key in p.keys}
    names = {p.name for p in model.parameters}
    for code, phase in enumerate(model.phases):
        if state.is_trace(code):
            continue
        sites = site_displacements(code, phase)
        if sites and sites[0].name not in names:
            yield sites
        if (code, "shift_1") not in used and (shifts := coordinates(code, phase)):
            yield shifts
        if not any((code, axis) in used for axis in _AXES):
            yield from ([factor(axis, code, phase.name)] for axis in _AXES)
        if (code, EXTINCTION) not in used:
            yield [factor(EXTINCTION, code, phase.name)]
    if (None, "width_scale") not in used:
        yield widths([of_bank.bank for of_bank in model.banks])
    if (None, ABSORPTION) not in used:
        yield [factor(ABSORPTION, None, "sample")]


def gains(model: JointModel, groups: Sequence[Sequence[Parameter]]) -> list[float]:
    """Return the decreases of χ² that undamped steps with more parameters predict.

    None where a step is at once against a bound, or too long to mean anything.
    """
    added = [parameter for group in groups for parameter in group]
    extended = _extended(model, added)
    here = extended.evaluate(extended.start)
    present = len(model.parameters)
    basis, _ = np.linalg.qr(here.jacobian[:, :present])
    residual = here.residual - basis @ (basis.T @ here.residual)
    columns = here.jacobian[:, present:]
    columns = columns - basis @ (basis.T @ columns)
    low, high = extended.bounds
    decreases: list[float] = []
    place = 0
    for group in groups:
        mine = slice(place, place + len(group))
        place += len(group)
        step, *_ = np.linalg.lstsq(columns[:, mine], -residual, rcond=1e-10)
        reached = extended.start[present:][mine] + step
        here_low, here_high = low[present:][mine], high[present:][mine]
        if len(group) == 1 and not here_low[0] < reached[0] < here_high[0]:
            decreases.append(0.0)
            continue
        left = residual + columns[:, mine] @ step
        decreases.append(float(residual @ residual - left @ left))
    return decreases


def _extended(model: JointModel, added: Sequence[Parameter]) -> JointModel:
    return replace(model, parameters=(*model.parameters, *added))
