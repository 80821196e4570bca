"""Which of many structures are in a sample: from a measured profile to phases and their fractions.

One phase after the other: the structures that would explain most of what is left are retrieved
(:mod:`bragg_data.refinement.retrieval`), their cells are refined on what is left, and the best one
is refined together with the phases so far. It stays if it earns its parameters by Schwarz's
criterion (Annals of Statistics 6 (1978) 461); phases that no longer do are dropped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.candidate_phase import Candidate
from bragg_data.refinement.joint_refinement import JointOptions
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.joint_summary import unexplained
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.phase_evidence import (
    MOSTLY,
    coincides,
    doubts,
    earned,
    is_small_part,
    reduced,
)
from bragg_data.refinement.phase_search import (
    PhaseSearch,
    cells_of,
    is_near,
    is_second_cell,
    is_strange,
    near_in_cifs,
    strongest_of,
)
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.retrieval import PatternLibrary
from bragg_data.refinement.sample_refinement import refine_sample
from bragg_data.threads import single_threaded

_BANKS = 2  # with most information, on which candidates are refined
_MOST_PHASES = 12
_MOST_REFUSED = 5  # candidates that are not needed, and times that the best one mends shapes
_MOST_SMALL = 2  # phases one after the other that explain small parts of what is left


class Identification(NamedTuple):
    """The phases that were identified, and structures that would explain them nearly as well."""

    result: JointResult  # of no phases where none was identified; its time is the whole search's
    alternatives: dict[str, tuple[str, ...]]  # names of structures, by phase


def identify(
    banks: Sequence[MeasuredBank],
    library: PatternLibrary,
    options: JointOptions,
    report: Callable[[str], None] = lambda text: None,  # noqa: ARG005
    *,
    metals: Sequence[str] = (),
) -> Identification:
    """Find the phases of a sample among those of a library that was made for its banks.

    Cans are among them, and ``metals``, of which cans may be: they are identified like the further.
    ``report`` is called with a sentence on each step. Without the standard: a RefinementError.
    """
    began = time.perf_counter()
    if options.standard and options.standard not in {phase.name for phase in library.phases}:
        raise RefinementError(f"The standard {options.standard} has no lines on these banks.")
    # What holds the sample is there from the start, and so is a standard.
    places = [k for k, phase in enumerate(library.phases) if phase.name in options.certain]
    cells = [np.array(library.phases[place].cell, dtype=np.float64) for place in places]
    refused, failures, small, informative = set[int](), 0, 0, informative_banks(banks)
    alternatives: dict[str, tuple[str, ...]] = {}
    alone: State | None = None  # the last one whose lines have no tails that a copy explains
    searched = [banks[b] for b in informative]
    near = replace(options, calibration_su=tuple(options.calibration_su[b] for b in informative))
    search = PhaseSearch(searched, library, near)
    state = search.refined(places, cells) if options.standard else None
    duplicates: dict[int, dict[int, float]] = {
        place: search.duplicates(Candidate(place, cell, 0.0, 0.0, 0.0))
        for place, cell in zip(places, cells, strict=True)
        if library.phases[place].name == options.standard
    }
    with single_threaded():
        while len(places) < _MOST_PHASES and failures < _MOST_REFUSED and small < _MOST_SMALL:
            excluded = refused.union(places, near_in_cifs(duplicates))
            likely = [
                candidate
                for candidate in search.candidates(state, excluded)
                if (phase := library.phases[candidate.place]).name not in metals
                or is_near(candidate.cell, phase)
            ]
            if not likely:
                break
            attempts = search.attempts(likely, (places, cells, state))
            distinct = [
                (candidate, trial)
                for candidate, trial in attempts
                if not coincides(trial, -1)
                and not is_strange(trial, len(places))
                and not is_second_cell(trial, len(places), candidate.place, duplicates)
            ]
            mend = bool(attempts) and not distinct
            once = len(set(places)) == len(places)
            if mend and once and state and state is not alone:
                alone, copied = state, search.with_copy(places, state)
                if copied is not None:
                    report(f"{copied.model.phases[-1].name}: its lines have tails")
                    places, state = [*places, strongest_of(places, state)], copied
                    cells = cells_of(state)
                    continue
            best, trial = distinct[0] if distinct else (likely[0], None)
            name = library.phases[best.place].name
            if trial is None or not earned(trial, state, -1):
                refused |= {candidate.place for candidate in likely}
                failures += 1 if mend else len(likely)
                report(f"{name} is not needed")
                continue
            report(f"{name}: reduced χ² {reduced(trial):.3g}")
            refused.clear()
            little = is_small_part(trial, state)
            failures = failures if little else 0
            small = small + 1 if little and trial.explained < MOSTLY else 0
            duplicates[best.place] = search.duplicates(best)
            places, state = search.pruned([*places, best.place], trial)
            cells = [
                cell if phase.name not in options.cans or is_near(cell, phase) else phase.cell
                for phase, cell in zip(
                    (library.phases[p] for p in places), cells_of(state), strict=True
                )
            ]
        if state is not None:
            places, state = search.pruned(places, state, strictly=True)
            places, state = search.without_copy(places, state)
            places, state, alternatives = search.with_alternatives(places, state, duplicates)
            cells = cells_of(state)
        options, near = (replace(o, cans=(*o.cans, *metals)) for o in (options, near))
        phases = tuple(library.phases[place] for place in places)
        names = {phase.name for phase in phases}
        further = [p for p in library.phases if p.name in metals and p.name not in names]
        result = _refined_on_all(banks, searched, (phases, further), cells, (options, near))
    seconds = time.perf_counter() - began
    reasons = *result.reasons, *(doubts(result, (*phases, *further)) if result.accepted else ())
    return Identification(replace(result, reasons=reasons, seconds=seconds), alternatives)


def _refined_on_all(
    banks: Sequence[MeasuredBank],
    searched: Sequence[MeasuredBank],
    phases: tuple[Sequence[Phase], Sequence[Phase]],
    cells: Sequence[Array],
    options: tuple[JointOptions, JointOptions],
) -> JointResult:
    """Return the refinement of all banks; of those alone that were searched if that cannot be.

    A phase may have no line on another bank. ``options`` are for all and for these; the second ones
    of ``phases`` are metals that were not identified. Phases without a signal are left out.
    """
    identified, metals = phases
    if not identified:
        return unexplained(banks)
    try:
        result = refine_sample(banks, identified, options[0], cells, metals=metals)
    except RefinementError as error:
        if len(searched) == len(banks):
            raise
        result = refine_sample(searched, identified, options[1], cells)
        remark = f"Refined on the banks that were searched alone: {error}"
        result = replace(result, remarks=(*result.remarks, remark))
    refined = result.phases[: len(identified)]
    here = [k for k, p in enumerate(refined) if p.present or p.name in options[0].certain]
    if not here or len(here) == len(identified):
        return result
    rest = [identified[k] for k in here], metals
    return _refined_on_all(banks, searched, rest, [refined[k].cell for k in here], options)


def informative_banks(banks: Sequence[MeasuredBank]) -> list[int]:
    """Return the places of the banks that structures are searched on, for which a library is made.

    Those that stand out of the noise most clearly, and have narrow peaks.
    """
    information = [
        float(((b.intensity - b.intensity.mean()) / b.sigma).std() / b.grid.relative_step)
        for b in banks
    ]
    return sorted(np.argsort(information)[::-1][:_BANKS].tolist())
