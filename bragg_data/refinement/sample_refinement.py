"""A sample as it is measured: in a can, and with lines that no model describes to their noise.

The weak lines of cans and furnaces are in most profiles. Without them phases mend their own lines
by them, and weight fractions are wrong by a per cent; the metals are looked for by the evidence
that counts for phases. In mixtures, errors contain those of the calculated lines.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase, phase_on_orthogonal_axes
from bragg_data.refinement.candidate_phase import left_by, refined_on
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.phase_evidence import CAUTION, coincides, earned, errors, unlikely_phases
from bragg_data.refinement.retrieval import pattern_library
from bragg_data.threads import single_threaded

_IMPERFECT = 1.03  # noise of a fit, from which something may be missing
_FARTHEST = 0.03  # relative, of a cell from its CIF's: the range that is searched
_EXPLAINED = 0.6  # share of the signal, below which the sample itself is not known
_STRAIN = 0.012  # relative, of a metal between the temperature of helium and that of a furnace
# Space group, cell in Å and displacement parameter in Å² near room temperature (Wyckoff, Crystal
# Structures 1 (1963)).
_METALS = {
    "vanadium": ("I m -3 m", 3.024, "V1 V 0 0 0 0.0073"),
    "aluminium": ("F m -3 m", 4.0496, "Al1 Al 0 0 0 0.0108"),
    "niobium": ("I m -3 m", 3.3004, "Nb1 Nb 0 0 0 0.0055"),
}


def other_metals(phases: Sequence[Phase]) -> list[Phase]:
    """Return the structures of what usually holds samples: "can vanadium", ….

    Not those that are among some phases.
    """
    return [metal for metal in _metals() if not any(_is_like(phase, metal) for phase in phases)]


def is_vanadium(phase: Phase) -> bool:
    """Return whether a structure is that of vanadium."""
    return _is_like(phase, _metals()[0])


@lru_cache(maxsize=1)
def _metals() -> tuple[Phase, ...]:
    return tuple(
        phase_on_orthogonal_axes(f"can {name}", group, (a, a, a), atoms)
        for name, (group, a, atoms) in _METALS.items()
    )


def _is_like(phase: Phase, metal: Phase) -> bool:
    return set(phase.symbols) == set(metal.symbols) and _is_near(phase.cell, metal)


@single_threaded()
def refine_sample(
    banks: Sequence[MeasuredBank],
    phases: Sequence[Phase],
    options: JointOptions,
    cells: Sequence[Array] | None = None,
    *,
    metals: Sequence[Phase] = (),
) -> JointResult:
    """Refine phases, and metals around the sample as far as the data show them.

    Arguments and errors are those of :class:`JointRefiner` and its ``refine``. Metals are phases of
    the result without a weight fraction.
    """
    began = time.perf_counter()
    refiner = JointRefiner(banks, phases)
    state = refiner.captured_roughly(options, cells)
    if len(phases) > 1 and _shows_more(state):
        state = _with_lost_phases(banks, refiner, state, options)
    state, options = _with_metals(banks, state, metals, options)
    several = len({phase.name for phase in phases} - set(options.cans)) > 1
    if several and _shows_more(state):
        state = _with_errors_of_model(state)
    state = refiner.completed(state, options)
    result = refiner.summarised(state, options, time.perf_counter() - began)
    clear = [phase for k, phase in enumerate(state.model.phases) if not state.is_trace(k)]
    reasons = unlikely_phases(result, clear, _FARTHEST) if result.accepted else ()
    return replace(result, reasons=(*result.reasons, *reasons))


def _with_lost_phases(
    banks: Sequence[MeasuredBank], refiner: JointRefiner, state: State, options: JointOptions
) -> State:
    """Return the minimum with each trace where it explains most of what the others leave.

    All cells at once may end with a weak phase between its lines, where strong ones hide it.
    """
    for code, phase in enumerate(state.model.phases):
        if not state.is_trace(code):
            continue
        left = left_by(banks, state)
        library, _ = pattern_library([phase], left)
        scales = {1.0, *(scale for _, scale in library.candidates(left, 1))}
        candidates = [c for scale in scales if (c := refined_on(left, phase, code, scale))]
        if not candidates:
            continue
        cells = [state.model.cell(k, state.model.start) for k in range(len(state.model.phases))]
        cells[code] = max(candidates, key=attrgetter("worth")).cell
        with suppress(CrystalError):
            state = min(state, refiner.near(cells, options), key=attrgetter("chi2"))
    return state


def _with_errors_of_model(state: State) -> State:
    """Return the state with errors that contain those of the calculated lines' shapes.

    By statistical errors alone the tops of the strongest lines, which no model describes within
    them, decide on all phases: weak ones mend the lines of strong ones.
    """
    model, places = state.model, np.cumsum([len(m.y) for m in state.model.banks])[:-1]
    error, _ = errors(state)
    weighted = zip(model.banks, np.split(error, places), strict=True)
    of_banks = tuple(replace(of_bank, error=of_points) for of_bank, of_points in weighted)
    return State(replace(model, banks=of_banks)).searched_again()


def _with_metals(
    banks: Sequence[MeasuredBank], state: State, metals: Sequence[Phase], options: JointOptions
) -> tuple[State, JointOptions]:
    """Return the minimum with the metals that are worth their parameters; these are cans."""
    left: Sequence[MeasuredBank] = ()  # by the phases so far
    for metal in metals:
        if not _shows_more(state):
            break
        left = left or left_by(banks, state)
        extended = _with_metal(banks, left, state, metal, options)
        if extended is not None:
            state, options = extended, replace(options, cans=(*options.cans, metal.name))
            left = ()
    return state, options


def _with_metal(
    banks: Sequence[MeasuredBank],
    left: Sequence[MeasuredBank],
    state: State,
    metal: Phase,
    options: JointOptions,
) -> State | None:
    """Return the minimum with a metal, if it is worth its parameters, from what is ``left``."""
    model = state.model
    candidate = refined_on(left, metal, 0, 1.0)
    if candidate is None or candidate.decrease < CAUTION or not _is_near(candidate.cell, metal):
        return None
    cells = [model.cell(code, model.start) for code in range(len(model.phases))]
    with suppress(CrystalError):
        extended = JointRefiner(banks, [*model.phases, metal]).near(
            [*cells, candidate.cell], options
        )
        if (
            _is_near(extended.model.cell(len(cells), extended.model.start), metal)
            and not coincides(extended, -1)
            and earned(extended, state, -1)
        ):
            return extended
    return None


def _is_near(cell: Array, metal: Phase) -> bool:
    return bool(np.abs(np.log(np.array(cell[:3]) / np.array(metal.cell[:3]))).max() < _STRAIN)


def _shows_more(state: State) -> bool:
    """Return whether a sample that is known leaves more than noise."""
    return state.model.noise >= _IMPERFECT and state.explained >= _EXPLAINED
