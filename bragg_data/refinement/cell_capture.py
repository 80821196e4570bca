"""Cells near enough to the minimum for a refinement, from cells a few per cent away.

Blurred, peaks that are apart still overlap: cells are refined on profiles blurred to several times
the width of their peaks, then less and less. Where this fails, cells all over the range are
compared on blurred profiles first, and the best ones are refined.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import itemgetter

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.joint_model import BankModel, JointModel
from bragg_data.refinement.joint_parameters import cell_parameters
from bragg_data.refinement.levenberg_marquardt import minimise
from bragg_data.refinement.time_limit import check_time

BLURS = (12.0, 4.0, 1.5)
"""Full widths over the peaks', to which profiles are blurred."""

_SURE = 0.9  # share of the signal explained from which a cell needs no other start
_ENOUGH = 0.75  # share of the signal explained from which a cell counts as near
_RANGE = 0.03  # relative, of lengths, that is searched; angles in rad
_MANY, _SURE_OF_MANY = 4, 0.985  # free cell parameters, and the share for as many
_STARTS = 8  # of those that are sampled
_STEPS = 15  # of each search


def captured_cells(
    levels: Mapping[float, Sequence[BankModel]], phases: Sequence[Phase], starts: Sequence[Array]
) -> tuple[float, list[Array]]:
    """Return a cell (6,) of each phase near the minimum of χ², from starts a few per cent away.

    Before it, the share of the signal that they explain as they are.
    ``levels`` are the banks' models as they are, blur 0, and at each of :data:`BLURS`.
    """
    best = refined_cells(levels, phases, starts, ())
    if best[0] >= (_SURE_OF_MANY if len(phases[0].lattice.free_columns) >= _MANY else _SURE):
        return best
    best = max(best, refined_cells(levels, phases, starts, BLURS), key=itemgetter(0))
    # Where many lines overlap, cells with many parameters explain much at wrong minima, too.
    many = len(phases[0].lattice.free_columns) >= _MANY
    enough = _SURE_OF_MANY if many else _ENOUGH
    if best[0] >= enough or len(phases) > 1:
        return best
    for start in _sampled(levels[BLURS[1]], phases[0], starts[0]):
        with suppress(CrystalError):
            best = max(best, refined_cells(levels, phases, [start], BLURS[1:]), key=itemgetter(0))
        if best[0] >= enough:
            break
    return best


def refined_cells(
    levels: Mapping[float, Sequence[BankModel]],
    phases: Sequence[Phase],
    starts: Sequence[Array],
    blurs: Sequence[float],
) -> tuple[float, list[Array]]:
    """Return the share of the signal that cells explain, and the cells (6,), all else fixed.

    They are refined at some blurs, one after the other, then as they are.
    """
    cells = [np.asarray(start) for start in starts]
    explained = 0.0
    for blur in (*blurs, 0.0):
        parameters = tuple(
            p
            for code, (phase, cell) in enumerate(zip(phases, cells, strict=True))
            for p in cell_parameters(code, phase, cell)
        )
        here = JointModel(tuple(levels[blur]), tuple(phases), parameters)
        n = here.n_points
        minimum = minimise(
            here.evaluate, here.start, here.bounds, partial(_tolerance, n), steps=_STEPS
        )
        cells = [here.cell(code, minimum.point) for code in range(len(phases))]
        explained = here.explained(minimum.residual[:n])
    return explained, cells


def _tolerance(n: int, chi2: float) -> float:
    return 3.0 * max(chi2 / n, 1.0)


def _sampled(banks: Sequence[BankModel], phase: Phase, start: Array) -> list[Array]:
    """Return the cells of a phase that fit blurred profiles best, the best first."""
    from scipy.stats import qmc  # here alone, because it takes half a second

    names, columns = phase.lattice.free_parameters, phase.lattice.free_columns
    free = start[columns]
    is_length = np.array([name in "abc" for name in names])
    reach = np.where(is_length, _RANGE * free, np.degrees(_RANGE) / 2)
    count = 2 ** min(6 + 2 * (len(free) - 1), 11)
    cube = qmc.Sobol(len(free), rng=np.random.default_rng(0)).random(count)
    cells = phase.lattice.cells(free + (2 * cube - 1) * reach)
    left = np.zeros(count)
    for bank in banks:
        for first in range(0, count, 64):
            check_time()
            rows = slice(first, min(first + 64, count))
            codes = np.zeros(rows.stop - rows.start, dtype=int)
            patterns = bank.weighted(bank.simulators[0].simulate(codes, cells[rows]))
            scale = np.maximum(bank.y @ patterns, 0) ** 2 / np.maximum((patterns**2).sum(0), 1e-300)
            left[rows] -= scale
    return [cells[k] for k in np.argsort(left)[:_STARTS]]
