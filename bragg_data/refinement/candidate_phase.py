"""Another phase for what the phases so far leave of a profile."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.cell_capture import BLURS, refined_cells
from bragg_data.refinement.joint_model import JointModel, bank_model, blurred
from bragg_data.refinement.joint_parameters import cell_parameters, with_site_groups
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.phase_evidence import DISTINCT, errors

_TERMS = 10  # of the background
_USUAL_STRAIN = 0.005  # relative, between a sample and the CIF of its structure


class Candidate(NamedTuple):
    """A structure, refined on what other phases leave of a profile."""

    place: int  # among those it was taken from
    cell: Array  # (6,) Å and degrees
    decrease: float  # of χ²
    worth: float  # that decrease of χ² over what it leaves, less the penalty
    penalty: float  # for a cell that is far from the CIF's


def with_errors_of_model(
    banks: Sequence[MeasuredBank], state: State, times: float = 1.0
) -> list[MeasuredBank]:
    """Return banks whose errors contain those of the calculated lines, ``times`` as large."""
    error, _ = errors(state, times=times)
    places = np.cumsum([len(bank.tof) for bank in banks])[:-1]
    of_banks = zip(banks, np.split(error, places), strict=True)
    return [replace(bank, sigma=bank.sigma * of_points) for bank, of_points in of_banks]


def left_by(banks: Sequence[MeasuredBank], state: State | None) -> list[MeasuredBank]:
    """Return banks of what the phases so far leave of the intensities."""
    if state is None:
        return list(banks)
    left = zip(banks, with_errors_of_model(banks, state, DISTINCT), state.fits, strict=True)
    return [replace(b, intensity=fit.residual * bank.sigma) for bank, b, fit in left]


def refined_on(
    left: Sequence[MeasuredBank], phase: Phase, place: int, scale: float
) -> Candidate | None:
    """Return a structure in the cell that explains most of what is left; None if it has none."""
    phase = with_site_groups(phase)
    start = np.array(phase.cell, dtype=np.float64)
    start[:3] *= scale
    models = tuple(bank_model(bank, (phase,), _TERMS) for bank in left)
    levels = {blur: blurred(models, blur) for blur in (0.0, *BLURS)}
    with suppress(CrystalError):
        _, (cell,) = refined_cells(levels, [phase], [start], BLURS[1:])
        there = JointModel(models, (phase,), tuple(cell_parameters(0, phase, cell)))
        remaining = there.residual(there.start)
        total, misfit = sum(float(m.y @ m.y) for m in models), float(remaining @ remaining)
        strain = float(np.abs(np.log(cell[:3] / np.array(phase.cell[:3]))).max())
        penalty = (strain / _USUAL_STRAIN) ** 2
        worth = len(remaining) * (total - misfit) / max(misfit, 1e-300) - penalty
        return Candidate(place, cell, total - misfit, worth, penalty)
    return None
