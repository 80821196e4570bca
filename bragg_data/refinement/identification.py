"""Which of many structures are in a sample: from a measured profile to phases and their fractions.

One phase after the other: the structures that would explain most of what is left are retrieved
(:mod:`bragg_data.refinement.retrieval`), their cells are refined on what is left, and the best one
is refined together with the phases so far. It stays if it earns its parameters by Schwarz's
criterion (Annals of Statistics 6 (1978) 461); phases that no longer do are dropped.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.candidate_phase import Candidate, left_by, refined_on
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.joint_summary import unexplained
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.phase_evidence import CAUTION, coincides, doubts, earned, reduced, worth
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.retrieval import PatternLibrary
from bragg_data.refinement.sample_refinement import refine_sample
from bragg_data.threads import single_threaded

_MANY = 6  # of each blur of the retrieval, that are refined
_BANKS = 2  # with most information, on which candidates are refined
_MOST_PHASES = 12
_LEAST_SHARE = 0.004  # of the calculated signal, below which nothing is sure
_ATTEMPTS = 3  # candidates that are refined with the phases so far, the best one and …
_WORTH_A_TRIAL = 0.6  # … those that are worth so much of it
_MOST_REFUSED = 5  # candidates that are not needed, and times that the best one mends shapes
_OF_CAN = 0.01  # relative, of the cell of what holds the sample
_MINOR, _OF_MINOR = 0.25, 0.02  # share of the signal of a phase, and relative, of its cell
_OF_COPY = 0.004  # relative, of the start of a phase's copy's cell that takes its lines' tails
_OF_DUPLICATE = 0.015  # relative, of the cell of a structure with the pattern of a phase
_ALIKE = 0.9  # correlation of blurred patterns, from which structures are compared in detail
_NEARLY = 0.5  # of what a structure leaves: further that leave no more explain nearly as much


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
    refused, failures, informative = set[int](), 0, informative_banks(banks)
    alternatives: dict[str, tuple[str, ...]] = {}
    searched = [banks[b] for b in informative]
    near = replace(options, calibration_su=tuple(options.calibration_su[b] for b in informative))
    state = _refined(searched, library, places, cells, near) if options.standard else None
    duplicates: dict[int, dict[int, float]] = {
        place: _duplicates(searched, library, Candidate(place, cell, 0.0, 0.0, 0.0))
        for place, cell in zip(places, cells, strict=True)
        if library.phases[place].name == options.standard
    }
    with single_threaded():
        while len(places) < _MOST_PHASES and failures < _MOST_REFUSED:
            excluded = refused.union(places, _near_in_cifs(duplicates))
            likely = [
                candidate
                for candidate in _candidates(searched, state, library, excluded)
                if (phase := library.phases[candidate.place]).name not in metals
                or _is_near(candidate.cell, phase)
            ]
            if not likely:
                break
            attempts = _attempts(searched, library, likely, (places, cells), near)
            distinct = [
                (candidate, trial)
                for candidate, trial in attempts
                if not coincides(trial, -1)
                and not _is_strange(trial, len(places))
                and not _is_second_cell(trial, len(places), candidate.place, duplicates)
            ]
            mend = bool(attempts) and not distinct
            once = len(set(places)) == len(places)
            if mend and once and state:
                copied = _with_copy(searched, library, places, state, near)
                if copied is not None:
                    report(f"{copied.model.phases[-1].name}: its lines have tails")
                    places, state = [*places, _strongest(places, state)], copied
                    cells = _cells(state)
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
            failures = 0
            duplicates[best.place] = _duplicates(searched, library, best)
            places, state = _pruned(searched, library, [*places, best.place], trial, near)
            cells = [
                cell if phase.name not in options.cans or _is_near(cell, phase) else phase.cell
                for phase, cell in zip(
                    (library.phases[p] for p in places), _cells(state), strict=True
                )
            ]
        if state is not None:
            places, state = _pruned(searched, library, places, state, near, strictly=True)
            places, state = _without_copy(searched, library, places, state, near)
            places, state, alternatives = _with_alternatives(
                searched, library, places, state, near, duplicates
            )
            cells = _cells(state)
        options, near = (replace(o, cans=(*o.cans, *metals)) for o in (options, near))
        phases = tuple(library.phases[place] for place in places)
        names = {phase.name for phase in phases}
        further = [p for p in library.phases if p.name in metals and p.name not in names]
        result = _refined_on_all(banks, searched, (phases, further), cells, (options, near))
    seconds = time.perf_counter() - began
    reasons = *result.reasons, *(doubts(result, (*phases, *further)) if result.accepted else ())
    return Identification(replace(result, reasons=reasons, seconds=seconds), alternatives)


def _duplicates(
    banks: Sequence[MeasuredBank], library: PatternLibrary, phase: Candidate
) -> dict[int, float]:
    """Return structures with a phase's pattern: places, and factors on lengths of their cells."""
    scale = _scale(phase.cell, library.phases[phase.place])
    return dict(library.similar(phase.place, scale, banks, _ALIKE))


def _near_in_cifs(duplicates: Mapping[int, Mapping[int, float]]) -> set[int]:
    """Return the structures that could but stand for a second cell of a phase."""
    pairs = [pair for of_phase in duplicates.values() for pair in of_phase.items()]
    return {place for place, scale in pairs if abs(np.log(scale)) < _OF_DUPLICATE}


def _is_second_cell(
    state: State, code: int, place: int, duplicates: Mapping[int, Mapping[int, float]]
) -> bool:
    """Return whether a phase has the pattern of another one, in nearly its cell.

    As what strong lines have around the profile function, its tails.
    """
    scale = _scale(state.model.cell(code, state.model.start), state.model.phases[code])
    same = [of_phase[place] for of_phase in duplicates.values() if place in of_phase]
    return any(abs(np.log(scale / of_other)) < _OF_DUPLICATE for of_other in same)


def _scale(cell: Array, phase: Phase) -> float:
    """Return the mean factor on the lengths of the CIF's cell."""
    return float(np.cbrt(np.prod(cell[:3]) / np.prod(phase.cell[:3])))


def _is_near(cell: Array, phase: Phase) -> bool:
    """Return whether a can's cell is its own: among lines of unknown phases it may run away."""
    return bool(np.abs(cell[:3] / phase.cell[:3] - 1).max() < _OF_CAN)


def _is_strange(state: State, code: int) -> bool:
    """Return whether a minor phase is in a cell far from its CIF's.

    Somewhere in the range of cells lines of many structures are where shapes of further misfit.
    """
    scale = _scale(state.model.cell(code, state.model.start), state.model.phases[code])
    return state.share(code) < _MINOR and abs(np.log(scale)) > _OF_MINOR


def _refined_on_all(
    banks: Sequence[MeasuredBank],
    searched: Sequence[MeasuredBank],
    phases: tuple[Sequence[Phase], Sequence[Phase]],
    cells: Sequence[Array],
    options: tuple[JointOptions, JointOptions],
) -> JointResult:
    """Return the refinement of all banks; of those alone that were searched if that cannot be.

    A phase may have no line on another bank. ``options`` are for all and for these; the second ones
    of ``phases`` are metals that were not identified.
    """
    identified, metals = phases
    if not identified:
        return unexplained(banks)
    try:
        return refine_sample(banks, identified, options[0], cells, metals=metals)
    except RefinementError as error:
        if len(searched) == len(banks):
            raise
        result = refine_sample(searched, identified, options[1], cells)
        remark = f"Refined on the banks that were searched alone: {error}"
        return replace(result, remarks=(*result.remarks, remark))


def informative_banks(banks: Sequence[MeasuredBank]) -> list[int]:
    """Return the places of the banks that structures are searched on, for which a library is made.

    Those that stand out of the noise most clearly, and have narrow peaks.
    """
    information = [
        float(((b.intensity - b.intensity.mean()) / b.sigma).std() / b.grid.relative_step)
        for b in banks
    ]
    return sorted(np.argsort(information)[::-1][:_BANKS].tolist())


def _candidates(
    banks: Sequence[MeasuredBank], state: State | None, library: PatternLibrary, refused: set[int]
) -> list[Candidate]:
    """Return the few structures that explain most of what is left, in refined cells, best first."""
    left = left_by(banks, state)
    refined = [
        refined_on(left, library.phases[place], place, scale)
        for place, scale in library.candidates(left, _MANY, refused)
    ]
    likely = [c for c in refined if c is not None and c.decrease > CAUTION]
    likely.sort(key=attrgetter("worth"), reverse=True)
    return [c for c in likely[:_ATTEMPTS] if c.worth > _WORTH_A_TRIAL * likely[0].worth]


def _attempts(
    banks: Sequence[MeasuredBank],
    library: PatternLibrary,
    likely: Sequence[Candidate],
    present: tuple[Sequence[int], Sequence[Array]],
    options: JointOptions,
) -> list[tuple[Candidate, State]]:
    """Return some candidates, each refined with the phases so far, the best one first.

    Where structures explain as much, as those of metals, the one whose cell is least changed.
    """
    places, cells = present
    attempts = [
        (c, state)
        for c in likely
        if (state := _refined(banks, library, [*places, c.place], [*cells, c.cell], options))
    ]
    noise = min((reduced(state) for _, state in attempts), default=1.0)
    return sorted(attempts, key=lambda trial: trial[1].chi2 / noise + trial[0].penalty)


def _strongest(places: Sequence[int], state: State) -> int:
    return places[int(np.argmax([state.share(code) for code in range(len(places))]))]


def _with_copy(
    banks: Sequence[MeasuredBank],
    library: PatternLibrary,
    places: Sequence[int],
    state: State,
    options: JointOptions,
) -> State | None:
    """Return the strongest phase a second time, next to itself, if that explains a good deal.

    It takes what its lines have around the profile function, in which others would be seen.
    """
    strongest, cells = _strongest(places, state), _cells(state)
    lengths = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    best = state
    for by in (-_OF_COPY, _OF_COPY):
        copy = cells[places.index(strongest)] * (1 + by * lengths)
        trial = _refined(banks, library, [*places, strongest], [*cells, copy], options)
        best = min(best, trial or state, key=attrgetter("chi2"))
    return best if (state.chi2 - best.chi2) / reduced(best) > 3 * CAUTION else None


def _without_copy(
    banks: Sequence[MeasuredBank],
    library: PatternLibrary,
    places: Sequence[int],
    state: State,
    options: JointOptions,
) -> tuple[list[int], State]:
    """Return the phases once each, and their state."""
    once = list(dict.fromkeys(places))
    if len(once) == len(places):
        return once, state
    cells = _cells(state)
    refiner = JointRefiner(banks, [library.phases[place] for place in once])
    return once, refiner.near([cells[places.index(place)] for place in once], options)


def _with_alternatives(
    banks: Sequence[MeasuredBank],
    library: PatternLibrary,
    places: Sequence[int],
    state: State,
    options: JointOptions,
    duplicates: Mapping[int, Mapping[int, float]],
) -> tuple[list[int], State, dict[str, tuple[str, ...]]]:
    """Return the phases, with likelier ones of the same patterns in their stead, and their state.

    And the names of those that explain what a phase explains nearly as well, by phase.
    """
    chosen = list(places)
    alternatives: dict[str, tuple[str, ...]] = {}
    for code, place in enumerate(places):
        phase, cells = library.phases[place], _cells(state)
        if phase.name in options.certain:
            continue
        scale = _scale(cells[code], phase)
        left = []
        for bank, fit in zip(banks, state.fits, strict=True):
            share_of_phase = fit.residual + fit.scales[code] * fit.columns[:, code]
            left.append(replace(bank, intensity=share_of_phase * bank.sigma))
        similar = library.similar(place, scale, left, _ALIKE)[: _MANY + 1]
        refined = [refined_on(left, library.phases[k], k, s) for k, s in similar]
        best = refined[0]
        if best is None:
            continue
        taken = set(chosen).union(
            *(_near_in_cifs({k: d}) for k, d in duplicates.items() if k != place)
        )
        rest = [c for c in refined[1:] if c and c.place not in taken]
        total = sum(float((b.intensity / b.sigma) @ (b.intensity / b.sigma)) for b in left)
        most = max(c.decrease for c in [best, *rest])
        least = most - _NEARLY * (total - most) - CAUTION
        near = sorted((c for c in rest if c.decrease > least), key=attrgetter("penalty"))
        like = [best, *near]
        for candidate in near[: _ATTEMPTS - 1]:
            swapped = [*chosen[:code], candidate.place, *chosen[code + 1 :]]
            moved = [*cells[:code], candidate.cell, *cells[code + 1 :]]
            trial = _refined(banks, library, swapped, moved, options)
            if trial is None:
                continue
            gain = (state.chi2 - trial.chi2) / min(reduced(state), reduced(trial))
            if gain + best.penalty - candidate.penalty > 0:
                chosen, state, best = swapped, trial, candidate
        alike = [c.place for c in like if c is not best]
        alternatives[library.phases[best.place].name] = tuple(library.phases[k].name for k in alike)
    return chosen, state, alternatives


def _refined(
    banks: Sequence[MeasuredBank],
    library: PatternLibrary,
    places: Sequence[int],
    cells: Sequence[Array],
    options: JointOptions,
) -> State | None:
    """Return phases refined together from cells; None where they have no pattern."""
    refiner = JointRefiner(banks, [library.phases[place] for place in places])
    with suppress(CrystalError):
        return refiner.near(cells, options)
    return None


def _pruned(
    banks: Sequence[MeasuredBank],
    library: PatternLibrary,
    places: Sequence[int],
    state: State,
    options: JointOptions,
    *,
    strictly: bool = False,
) -> tuple[list[int], State]:
    """Return the phases without those that further have made superfluous."""
    remaining, cells = list(places), _cells(state)
    for place in places if strictly else places[:-1]:
        k = remaining.index(place)
        if remaining.count(place) > 1 or library.phases[place].name in options.certain:
            continue
        if len(remaining) == 1 or (not strictly and worth(state, k) > 10 * CAUTION):
            continue
        fewer = remaining[:k] + remaining[k + 1 :]
        without = _refined(banks, library, fewer, cells[:k] + cells[k + 1 :], options)
        if without is None:
            continue
        lost = strictly and (state.share(k) < _LEAST_SHARE or _is_strange(state, k))
        if lost or not earned(state, without, k, strictly=strictly):
            remaining, state = fewer, without
            cells = _cells(state)
    return remaining, state


def _cells(state: State) -> list[Array]:
    """Return the cells (6,) of the phases of a state."""
    return [state.model.cell(code, state.model.start) for code in range(len(state.model.phases))]
