"""Quick looks at a frame: has it peaks, does another phase show, which structures are alike."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter1d

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.identification import informative_banks
from bragg_data.refinement.joint_model import simulator_of
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.measured_bank import MeasuredBank

_STANDS_OUT = 15.0  # decrease of χ² over the noise from which a phase is looked for
_REACH = 0.012  # relative, of the cell of a phase that appears
_ALIKE = 0.9  # correlation of patterns, blurred by …
_BLUR = 0.012  # … this (σ, relative), from which structures exclude each other
_NO_PEAKS = 5.0  # times the scatter of χ² of noise


def has_peaks(state: State) -> bool:
    """Return whether there is more than a background on any bank."""
    return any(
        float(model.y @ model.y) - (n := len(model.y)) > _NO_PEAKS * np.sqrt(2 * n)
        for model in state.model.banks
    )


def emerging_cell(state: State, phase: Phase, known: tuple[float, ...] | None) -> Array | None:
    """Return the cell (6,) in which a phase would explain what is left; None if nothing shows it.

    Its pattern in the cell that is known of it, or in that of the CIF, stretched a little, is
    compared with the residual on all banks.
    """
    assert state.minimum is not None
    cell = np.array(known or phase.cell, dtype=np.float64)
    width = min(float(np.median(m.bank.full_width / m.bank.tof)) for m in state.model.banks)
    half = int(np.ceil(_REACH / (0.4 * width)))
    stretches = np.linspace(-_REACH, _REACH, 2 * half + 1)
    decrease = np.zeros(len(stretches))
    for number, (model, fit) in enumerate(zip(state.model.banks, state.fits, strict=True)):
        bank = model.bank
        offset = 0.0 if state.model.offsets is None else state.model.offsets[number]
        try:
            pattern = _pattern(phase, bank, tuple(cell.tolist()))
        except CrystalError:
            continue
        nodes = np.arange(bank.grid.points)
        moved = [
            np.interp(nodes - (s + offset) / bank.grid.relative_step, nodes, pattern)
            for s in stretches
        ]
        columns = model.weighted(np.stack(moved))
        q = np.linalg.qr(fit.columns)[0]
        columns -= q @ (q.T @ columns)
        along = np.maximum(columns.T @ fit.residual, 0.0)
        decrease += along**2 / np.maximum((columns**2).sum(axis=0), 1e-300)
    best = int(np.argmax(decrease))
    if decrease[best] < _STANDS_OUT * state.model.noise:
        return None
    cell[:3] *= np.exp(stretches[best])
    return cell


_patterns: dict[tuple[object, ...], Array] = {}


def _pattern(phase: Phase, bank: MeasuredBank, cell: tuple[float, ...]) -> Array:
    """Return the pattern of a phase on the grid of a bank; the last ones are kept."""
    key = phase, bank.instrument, bank.grid, cell
    if key not in _patterns:
        if len(_patterns) > 200:
            _patterns.clear()
        simulator = simulator_of(phase, bank.instrument, bank.grid)
        (pattern,) = simulator.simulate(np.zeros(1, dtype=int), np.array([cell]))
        _patterns[key] = np.asarray(pattern, dtype=np.float64)
    return _patterns[key]


def exclude_each_other(first: Phase, second: Phase, banks: Sequence[MeasuredBank]) -> bool:
    """Return whether structures are distortions of each other: one composition, the same lines."""

    def composition(phase: Phase) -> dict[str, float]:
        total = float(phase.occupancies.sum())
        symbols = np.array(phase.symbols)
        return {
            s: round(float(phase.occupancies[symbols == s].sum()) / total, 2)
            for s in sorted(set(phase.symbols))
        }

    if composition(first) != composition(second):
        return False
    bank = banks[informative_banks(banks)[-1]]
    curves = []
    for phase in (first, second):
        pattern = _pattern(phase, bank, tuple(map(float, phase.cell)))
        sigma = _BLUR / bank.grid.relative_step
        curve = gaussian_filter1d(pattern, sigma) - gaussian_filter1d(pattern, 6 * sigma)
        curves.append(curve / max(float(np.linalg.norm(curve)), 1e-300))
    return float(curves[0] @ curves[1]) > _ALIKE
