"""Joint refinement: phases of known structure against measured banks, on the measured points.

From coarse to fine: cells on blurred profiles, then broadening, displacement parameters and
calibrations, then what the data show to be needed (:mod:`bragg_data.refinement.additions`).
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.pseudosymmetry import pseudosymmetric_cells
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.additions import with_additions
from bragg_data.refinement.cell_capture import BLURS, captured_cells, refined_cells
from bragg_data.refinement.joint_model import JointModel, bank_model, blurred
from bragg_data.refinement.joint_parameters import (
    Parameter,
    broadening,
    cell_parameters,
    displacements,
    intensities,
    offsets,
    with_site_groups,
)
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.joint_state import NEARBY, ROUGHLY, State
from bragg_data.refinement.joint_summary import summarise
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.result import RefinementError
from bragg_data.threads import single_threaded

_FIRST_TERMS = 10  # of the background, before the data decide
_HOPELESS = 0.3  # share of the signal that cells have to explain to be refined further
_IMPERFECT = 1.03  # noise from which the misfit may be that of a wrong minimum
_TWIN = 1.0  # relative change of a cell over the width of a peak, towards another minimum
_UNKNOWN = 0.03  # relative, what no calibration is off by
_LEAST_STANDARD = 0.05  # share of the signal


@dataclass(frozen=True)
class JointOptions:
    """What a joint refinement is asked for."""

    calibration_su: tuple[float, ...]  # relative, of each bank's difC
    evidence: bool = True  # whether more parameters are added where the data show the need
    cans: tuple[str, ...] = ()  # names of phases that are no part of the sample's weight
    offsets: tuple[float, ...] | None = None  # relative errors of each bank's difC, if known
    free_lines: int = 0  # of each phase and bank, whose intensities are free
    standard: str | None = None  # name of a phase whose cell is certified, and calibrates

    @property
    def certain(self) -> tuple[str | None, ...]:
        """Names of what is in the sample or around it without any doubt."""
        return (*self.cans, self.standard)


Before = tuple[State, Sequence[int | None]]
"""An earlier state, and the places that phases had there."""


class JointRefiner:
    """Some phases on some banks. Building it takes a second for each bank."""

    def __init__(self, banks: Sequence[MeasuredBank], phases: Sequence[Phase]) -> None:
        if not banks or not phases:
            raise RefinementError("A refinement needs at least one bank and one phase.")
        self.phases = tuple(with_site_groups(phase) for phase in phases)
        self.models = tuple(bank_model(bank, self.phases, _FIRST_TERMS) for bank in banks)
        self._levels = {blur: blurred(self.models, blur) for blur in (0.0, *BLURS)}

    def refine(self, options: JointOptions, cells: Sequence[Array] | None = None) -> JointResult:
        """Refine from the cells of the CIFs, or from others (6,), one for each phase.

        A RefinementError is raised if no phase has a pattern on the banks.
        """
        began = time.perf_counter()
        state = self.searched(options, cells)
        return self.summarised(state, options, time.perf_counter() - began)

    def searched(
        self, options: JointOptions, cells: Sequence[Array] | None = None, *, twins: bool = True
    ) -> State:
        """Return the minimum that :meth:`refine` summarises.

        Without ``twins`` lines that hardly split may be split the wrong way.
        """
        return self.completed(self.captured_roughly(options, cells, twins=twins), options)

    def captured_roughly(
        self, options: JointOptions, cells: Sequence[Array] | None = None, *, twins: bool = True
    ) -> State:
        """Return the minimum with few parameters; with cells alone where they explain little.

        Arguments and errors are those of :meth:`refine`.
        """
        starts = [np.asarray(c) for c in cells or [phase.cell for phase in self.phases]]
        with single_threaded(), _as_refinement_error():
            explained, cells = captured_cells(self._levels, self.phases, starts)
            if explained < _HOPELESS:
                state = State(self._model(options, cells, cells_alone=True))
                return state.minimised(ROUGHLY)
            state = State(self._model(options, cells)).minimised(ROUGHLY).searched_again()
            return _with_twins(state) if twins else state

    def completed(self, state: State, options: JointOptions) -> State:
        """Return the minimum with all parameters that the data need, from where a search ended."""
        if all(p.keys[0].startswith("cell_") for p in state.model.parameters):
            return state  # hopeless
        with single_threaded(), _as_refinement_error():
            if options.evidence:
                state = with_additions(state)
            state = state.with_terms().finished()
            return _calibrated(state, options.standard) if options.standard else state

    def near(
        self, cells: Sequence[Array], options: JointOptions, before: Before | None = None
    ) -> State:
        """Return the minimum next to cells (6,) that are nearly right, without any search.

        All but cells starts where it was ``before``. A CrystalError is raised without a pattern.
        """
        model = self._model(options, cells)
        if before is not None:
            model = _started(model, before[0].model, before[1])
        with single_threaded():
            return State(model).minimised(ROUGHLY).searched_again()

    def continued(
        self,
        options: JointOptions,
        values: Mapping[str, float],
        terms: Sequence[int],
        held: Collection[str] = (),
    ) -> State:
        """Return the minimum next to known values of parameters, by their names.

        With these numbers of background terms of each bank; broadening and displacement parameters
        that are ``held`` stay as usual. A CrystalError is raised if there is no pattern.
        """
        cells = []
        for phase in self.phases:
            free = np.array(phase.cell, dtype=np.float64)[phase.lattice.free_columns]
            for k, name in enumerate(phase.lattice.free_parameters):
                free[k] = values.get(f"{phase.name}: {name}", free[k])
            cells.append(phase.lattice.cells(free[None])[0])
        model = self._model(options, cells)
        parameters = (
            replace(p, start=values.get(p.name, p.start))
            for p in model.parameters
            if p.name not in held
        )
        banks = (replace(b, terms=t) for b, t in zip(model.banks, terms, strict=True))
        model = replace(model, banks=tuple(banks), parameters=tuple(parameters))
        with single_threaded():
            return State(model).minimised(NEARBY)

    def captured(self, cells: Sequence[Array]) -> list[Array]:
        """Return cells (6,) nearer to the minimum, on blurred profiles; a CrystalError if none."""
        with single_threaded():
            return refined_cells(self._levels, self.phases, cells, BLURS[1:])[1]

    def summarised(self, state: State, options: JointOptions, seconds: float = 0.0) -> JointResult:
        """Return the result of a state whose search has ended."""
        assert state.minimum is not None
        su, cans = options.calibration_su, options.cans
        if options.standard:  # no calibration is assumed
            su = (_UNKNOWN,) * len(self.models)
        return summarise(state.model, state.minimum, su, cans, seconds)

    def _model(
        self, options: JointOptions, cells: Sequence[Array], *, cells_alone: bool = False
    ) -> JointModel:
        parameters: list[Parameter] = []
        measured = [model.bank for model in self.models]
        for code, (phase, cell) in enumerate(zip(self.phases, cells, strict=True)):
            parameters += cell_parameters(code, phase, cell)
            if cells_alone:
                continue
            parameters += broadening(code, phase, measured)
            parameters += displacements(code, phase)
            parameters += intensities(code, phase, measured, options.free_lines)
        if len(self.models) > 1 and not cells_alone and options.offsets is None:
            parameters += offsets(measured, options.calibration_su)
        return JointModel(self.models, self.phases, tuple(parameters), offsets=options.offsets)


def _started(model: JointModel, before: JointModel, codes: Sequence[int | None]) -> JointModel:
    """Return a model whose parameters but cells, and background, start where they were before."""
    places = [None if p.phase is None else codes[p.phase] for p in model.parameters]
    moved = (p for p in before.parameters if not p.keys[0].startswith("cell_"))
    known = {(p.keys, p.phase, p.bank): p.start for p in moved}
    parameters = (
        replace(p, start=known.get((p.keys, place, p.bank), p.start))
        for p, place in zip(model.parameters, places, strict=True)
    )
    banks = (replace(b, terms=was.terms) for b, was in zip(model.banks, before.banks, strict=True))
    return replace(model, banks=tuple(banks), parameters=tuple(parameters))


@contextmanager
def _as_refinement_error() -> Iterator[None]:
    try:
        yield
    except CrystalError as error:
        raise RefinementError(f"These phases cannot be refined: {error}") from error


def _calibrated(state: State, standard: str) -> State:
    """Return the minimum with a phase's cell as it is certified, and the difC of each bank free.

    A RefinementError is raised where the phase gives little of the signal.
    """
    model = state.model
    code = next(k for k, phase in enumerate(model.phases) if phase.name == standard)
    _check_standard(state, code)
    refined, certified = (
        np.array(c[:3]) for c in (model.cell(code, model.start), model.phases[code].cell)
    )
    longer = float(np.exp(np.log(refined / certified).mean()))
    cell = _of_cell(model, code)
    parameters: list[Parameter] = []
    for k, p in enumerate(model.parameters):
        if k not in cell and p.keys[0] != "offset":
            is_length = p.keys[0].startswith("cell_") and p.name.split()[-1] in ("a", "b", "c")
            parameters.append(replace(p, start=p.start / longer) if is_length else p)
    known = {p.bank: p.start for p in model.parameters if p.keys[0] == "offset"}
    free = offsets([of_bank.bank for of_bank in model.banks], [np.inf] * len(model.banks))
    parameters += [replace(p, start=(1 + known.get(p.bank, 0.0)) * longer - 1) for p in free]
    calibrated = State(replace(model, parameters=tuple(parameters))).finished()
    _check_standard(calibrated, code)  # other phases may have taken its place
    return calibrated


def _check_standard(state: State, code: int) -> None:
    if (share := state.share(code)) < _LEAST_STANDARD:
        raise RefinementError(
            f"The standard {state.model.phases[code].name} gives {100 * share:.1f} % of the "
            f"signal; at least {100 * _LEAST_STANDARD:.0f} % are needed."
        )


def _with_twins(state: State) -> State:
    """Return the state, or the better one on the other side of a higher symmetry.

    Lines that hardly split may be split either way: both are minima. The other one lies along the
    combinations of a phase's cell parameters that are determined worst, about a peak width away, or
    where an operation of the lattice, but for a small distortion, puts the cell. It is looked for
    where the fit is not perfect.
    """
    if state.model.noise < _IMPERFECT:
        return state
    best = state
    for start in [*_along_worst_directions(state), *_rotated_cells(state)]:
        with suppress(CrystalError):
            best = min(best, State(start).minimised(ROUGHLY), key=attrgetter("chi2"))
    return best


def _along_worst_directions(state: State) -> Iterator[JointModel]:
    """Yield models with the cell of a phase moved along its least certain combinations."""
    covariance = state.covariance
    width = min(float(np.median(m.bank.full_width / m.bank.tof)) for m in state.model.banks)
    for code in range(len(state.model.phases)):
        cell = _of_cell(state.model, code)
        if len(cell) < 2 or state.is_trace(code):
            continue
        values = state.model.start[cell]
        of_cell = covariance[np.ix_(cell, cell)] / np.outer(values, values)
        worst = np.linalg.eigh(of_cell)[1][:, -min(len(cell) - 1, 2) :].T
        for direction in (*worst, *-worst):
            yield _moved(state.model, cell, values * (1 + _TWIN * width * direction))


def _rotated_cells(state: State) -> Iterator[JointModel]:
    """Yield models with the cell of a phase as other axes of a nearly more symmetric lattice."""
    for code, phase in enumerate(state.model.phases):
        cell = _of_cell(state.model, code)
        for free in pseudosymmetric_cells(phase, state.model.start[cell]):
            yield _moved(state.model, cell, free)


def _of_cell(model: JointModel, code: int) -> list[int]:
    """Return the places of a phase's cell parameters."""
    return [
        k
        for k, p in enumerate(model.parameters)
        if p.phase == code and p.keys[0].startswith("cell_")
    ]


def _moved(model: JointModel, cell: Sequence[int], values: Array) -> JointModel:
    moved = dict(zip(cell, values.tolist(), strict=True))
    parameters = (replace(p, start=moved.get(k, p.start)) for k, p in enumerate(model.parameters))
    return replace(model, parameters=tuple(parameters))
