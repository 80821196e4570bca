"""Refinements to hand over: a mixture on two banks, with everything that a model may contain."""

from dataclasses import replace
from functools import cache

import numpy as np

from bragg_data.refinement.joint_model import JointModel, bank_model
from bragg_data.refinement.joint_parameters import (
    broadening,
    cell_parameters,
    coordinates,
    displacements,
    factor,
    offsets,
    with_site_groups,
)
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.joint_summary import summarise
from bragg_data.refinement.measured_bank import MeasuredBank
from tests.measured_banks import bank_of, bins, nomad, structure

_SU = (2e-4, 3e-4)


@cache
def mixture() -> JointResult:
    """Return silicon and SrTiO3 (free coordinate) at 154° and 90°, with factors on lines."""
    first = nomad().with_parameters(bank=1)
    sine = np.sin(np.radians(45)) / np.sin(np.radians(first.two_theta / 2))
    second = first.with_parameters(bank=2, two_theta=90.0, difc=first.difc * sine)
    phases = tuple(with_site_groups(structure(name)) for name in ("silicon", "srtio3"))
    sample = [
        (phases[0], [5.4331], {"size": 2.0, "microstrain": 900.0, "amount": 1.0}),
        (phases[1], [5.511, 7.805], {"size": 0.3, "microstrain": 200.0, "amount": 0.7}),
    ]
    banks: list[MeasuredBank] = []
    for bank, step in ((first, 1.5e-3), (second, 2.5e-3)):
        tof = bins(4500.0, 16_000.0, step) * (sine if bank.bank == 2 else 1.0)
        banks.append(bank_of(sample, bank, tof, seed=bank.bank))
    models = tuple(bank_model(bank, phases, 8) for bank in banks)
    parameters = [
        *(p for k, ph in enumerate(phases) for p in cell_parameters(k, ph, np.array(ph.cell))),
        *(p for k, phase in enumerate(phases) for p in broadening(k, phase, banks)),
        *(p for k, phase in enumerate(phases) for p in displacements(k, phase)),
        *coordinates(1, phases[1]),
        replace(factor("orientation 0 0 1", 1, "srtio3"), start=0.9, low=0.89, high=0.91),
        replace(factor("extinction", 0, "silicon"), start=2.0, low=1.9, high=2.1),
        replace(factor("absorption", None, "sample"), start=0.1, low=0.099, high=0.101),
        *offsets(banks, _SU),
    ]
    state = State(JointModel(models, phases, tuple(parameters))).minimised(1.0)
    assert state.minimum is not None
    return summarise(state.model, state.minimum, _SU, (), 0.0)
