"""Calibration of a bank on a standard: difC, and difA and Zero where the data show them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from bragg_data.refinement.additions import gains
from bragg_data.refinement.joint_model import JointModel
from bragg_data.refinement.joint_parameters import Parameter, broadening, displacements
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.measured_bank import MeasuredBank

_NOTE = "calibrated on {}: every length is known to {:.1e}"
_STATED = re.compile(r"calibrated on (\S+): every length is known to ([0-9.e+-]+)")
_ZERO, _DIFA = 100.0, 50.0  # µs and µs/Å², about the file's


@dataclass(frozen=True, eq=False)
class Calibration:
    """A bank's constants on a standard."""

    instrument: Instrument
    covariance: Array  # (3, 3) of difC, difA, Zero
    su: float  # relative, of every length: by counting, by the standard, and by what is left
    result: JointResult  # the fit, with the standard's cell fixed
    d: Array  # (n,) Å, of lines
    before: Array  # (n,) measured position of each line over the file's calibration, less 1
    after: Array  # (n,) the same over the new calibration


def calibrate(bank: MeasuredBank, phase: Phase, name: str, su: float) -> Calibration:
    """Refine the constants of a bank on a standard in its certified cell, ``phase.cell``.

    ``su`` is the relative standard uncertainty of the certified cell. Raises a RefinementError if
    the profile is not the standard's.
    """
    refiner = JointRefiner([bank], [phase])
    first = refiner.refine(JointOptions((1.0,), evidence=False))
    offset = float(first.phases[0].cell[0] / phase.cell[0]) - 1
    structure, old = refiner.phases[0], bank.instrument
    base = [
        *broadening(0, structure, [bank]),
        *displacements(0, structure),
        Parameter("difC", ("offset",), offset, offset - 0.02, offset + 0.02, None, 0),
    ]
    state = State(JointModel(refiner.models, refiner.phases, tuple(base)))
    state = state.minimised(1.0).with_terms().minimised(1.0)
    zero = Parameter("Zero", ("tzero",), old.tzero, old.tzero - _ZERO, old.tzero + _ZERO)
    difa = Parameter("difA", ("difa",), old.difa, old.difa - _DIFA, old.difa + _DIFA)
    groups: list[Sequence[Parameter]] = [[zero], [difa], [zero, difa]]
    worth = [
        gain / state.model.noise - len(group) * np.log(state.model.n_points)
        for gain, group in zip(gains(state.model, groups), groups, strict=True)
    ]
    if max(worth) > 0:
        added = groups[int(np.argmax(worth))]
        model = replace(state.model, parameters=(*state.model.parameters, *added))
        state = State(model).minimised(1.0)
    state = state.minimised(0.02)
    result = refiner.summarised(state, JointOptions((su,)))
    new, covariance = _constants(state, old)
    d, shift = _positions(bank, result)
    drawn = new.tof_from_d_spacing(d)
    # Lines of another sample lie elsewhere on what no calibration of three constants removes.
    left = float(np.mean((shift / drawn) ** 2)) if len(d) else 0.0
    relative = float(np.sqrt(_mean_variance(bank, covariance) + left + su**2))
    note = _NOTE.format(name, relative)
    remaining = tuple(w for w in old.warnings if not _STATED.search(w))
    return Calibration(
        instrument=replace(new, warnings=(*remaining, note)),
        covariance=covariance,
        su=relative,
        result=result,
        d=d,
        before=(drawn + shift) / old.tof_from_d_spacing(d) - 1,
        after=shift / drawn,
    )


def stated_su(instrument: Instrument) -> float | None:
    """Return the relative uncertainty of lengths that a calibrated instrument file states."""
    for warning in instrument.warnings:
        if match := _STATED.search(warning):
            return float(match[2])
    return None


def _constants(state: State, old: Instrument) -> tuple[Instrument, Array]:
    """Return the refined constants, and the covariance (3, 3) of difC, difA and Zero."""
    assert state.minimum is not None
    model, covariance = state.model, state.covariance
    place = {p.keys[0]: k for k, p in enumerate(model.parameters)}
    values = {key: float(state.minimum.point[k]) for key, k in place.items()}
    new = old.with_parameters(
        difc=old.difc * (1 + values["offset"]),
        difa=values.get("difa", old.difa),
        tzero=values.get("tzero", old.tzero),
    )
    of_three = np.zeros((3, 3))
    scale = {"offset": old.difc, "difa": 1.0, "tzero": 1.0}
    for row, first in enumerate(scale):
        for column, second in enumerate(scale):
            if first in place and second in place:
                value = covariance[place[first], place[second]]
                of_three[row, column] = value * scale[first] * scale[second]
    return new, of_three


def _mean_variance(bank: MeasuredBank, covariance: Array) -> float:
    d = np.geomspace(float(bank.d.min()), float(bank.d.max()), 50)
    by_constant = np.stack([d, d**2, np.ones(len(d))]) / bank.instrument.tof_from_d_spacing(d)
    return float(np.einsum("in,ij,jn->n", by_constant, covariance, by_constant).mean())


def _positions(bank: MeasuredBank, result: JointResult) -> tuple[Array, Array]:
    """Return d-spacings of strong lines, and where they are measured less where calculated (µs)."""
    (fit,) = result.banks
    peaks = fit.calculated - fit.background
    slope = np.gradient(peaks, bank.tof)
    difference = bank.intensity - fit.calculated
    top = [k for k in range(1, len(peaks) - 1) if peaks[k - 1] < peaks[k] >= peaks[k + 1]]
    spacings, shifts = [], []
    for k in top:
        near = np.abs(bank.tof - bank.tof[k]) < 1.5 * bank.full_width[k]
        weight = (slope[near] / bank.sigma[near]) @ (slope[near] / bank.sigma[near])
        if peaks[k] < 0.03 * peaks.max() or not weight > 0:
            continue
        moved = -(slope[near] / bank.sigma[near]) @ (difference[near] / bank.sigma[near]) / weight
        spacings.append(float(bank.d[k]))
        shifts.append(float(moved))
    return np.array(spacings), np.array(shifts)
