"""Many frames of one sample, refined one after the other, and what happens between them.

Every frame is refined from its neighbour's cells and, independently, from those of the CIFs; the
better minimum counts, so that a sudden change is not dragged along. Where a frame holds one of
several structures, the one with the most evidence is chosen.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.evidence import schwarz_evidence
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult, RefinedPhaseResult
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.result import RefinementError

_SUDDEN = 6.0  # times the usual scatter between neighbours, …
_SIGNIFICANT = 5.0  # … and times the uncertainty of a difference: a jump
_SCALE = 1.5  # ratio of the signals of neighbours
_NO_PEAKS = "No peak of the phases stands out of the noise."
_UNREADABLE = "The frame cannot be read or refined."
_LASTING = 2  # frames that a phase or unexplained lines have to stay for


@dataclass(frozen=True)
class Event:
    """What happened at a frame; frames are counted from 0."""

    frame: int
    kind: (
        str  # blank, not accepted, phase appears, phase disappears, transition, jump, scale, lines
    )
    text: str


class SeriesRefiner:
    """Refines frame after frame; it remembers the cells of the last one that was accepted.

    With ``single`` a frame holds one of the phases, otherwise any of them; in both cases in cans.
    """

    def __init__(
        self, phases: Sequence[Phase], cans: Sequence[Phase] = (), *, single: bool = False
    ) -> None:
        self._choices = [[p, *cans] for p in phases] if single else [[*phases, *cans]]
        self._cells: dict[str, Array] = {}

    def refine(self, banks: Sequence[MeasuredBank], options: JointOptions) -> JointResult:
        """Return the refinement of the next frame; a RefinementError if it has no pattern."""
        began = time.perf_counter()
        chosen, errors = [], list[RefinementError]()
        for phases in self._choices:
            try:
                chosen.append(self._best(banks, phases, options))
            except RefinementError as error:
                errors.append(error)
        if not chosen:
            raise errors[0]
        best = chosen[int(np.argmax(schwarz_evidence(chosen)))] if len(chosen) > 1 else chosen[0]
        if best.accepted:
            self._cells |= {phase.name: phase.cell for phase in best.phases if phase.present}
        return replace(best, seconds=time.perf_counter() - began)

    def _best(
        self, banks: Sequence[MeasuredBank], phases: Sequence[Phase], options: JointOptions
    ) -> JointResult:
        refiner = JointRefiner(banks, phases)
        starts = [[np.array(phase.cell, dtype=np.float64) for phase in phases]]
        if self._cells.keys() & {phase.name for phase in phases}:
            starts.append([self._cells.get(p.name, np.array(p.cell)) for p in phases])
        results, errors = [], list[RefinementError]()
        for cells in starts:
            try:
                results.append(refiner.refine(options, cells))
            except RefinementError as error:
                errors.append(error)
        if not results:
            raise errors[0]
        return min(results, key=lambda result: result.chi2)


def events(results: Sequence[JointResult | None]) -> list[Event]:
    """Return what happens in a series, in the order of its frames.

    None are frames that cannot be read or refined.
    """
    blank = [not any(phase.present for phase in _of_sample(r)) for r in results]
    listed = [
        Event(k, "blank", _UNREADABLE if results[k] is None else _NO_PEAKS)
        for k in np.flatnonzero(blank).tolist()
    ]
    frames = [(k, r) for k, r in enumerate(results) if r is not None and not blank[k]]
    listed += [Event(k, "not accepted", " ".join(r.reasons)) for k, r in frames if r.reasons]
    numbers = [k for k, _ in frames]
    changes: dict[int, list[tuple[str, bool]]] = {}
    for name in dict.fromkeys(phase.name for _, r in frames for phase in _of_sample(r)):
        phases = [
            next((p for p in r.phases if p.name == name and p.present), None) for _, r in frames
        ]
        seen = np.array([phase is not None for phase in phases], dtype=bool)
        for place, begins in _changes(seen):
            changes.setdefault(numbers[place], []).append((name, begins))
        accepted = zip(numbers, phases, frames, strict=True)
        listed += _jumps([(k, p) for k, p, (_, r) in accepted if p is not None and r.accepted])
    for frame, of_frame in changes.items():
        begun = [name for name, begins in of_frame if begins]
        ended = [name for name, begins in of_frame if not begins]
        if begun and ended:
            text = f"{', '.join(ended)} turns into {', '.join(begun)}."
            listed.append(Event(frame, "transition", text))
            continue
        listed += [Event(frame, "phase appears", f"{name} appears.") for name in begun]
        listed += [Event(frame, "phase disappears", f"{name} disappears.") for name in ended]
    signals = [sum(float((b.calculated - b.background).sum()) for b in r.banks) for _, r in frames]
    for place in range(1, len(frames)):
        ratio = signals[place] / max(signals[place - 1], 1e-300)
        alike = len(frames[place][1].banks) == len(frames[place - 1][1].banks)
        if alike and not 1 / _SCALE < ratio < _SCALE:
            text = f"The signal changes by a factor of {ratio:.3g}."
            listed.append(Event(numbers[place], "scale", text))
    unexplained = np.array([bool(r.unexplained_lines) for _, r in frames], dtype=bool)
    for place, begins in _changes(unexplained):
        lines = ", ".join(f"{d:.3f}" for d in frames[place][1].unexplained_lines)
        text = (
            f"Lines at d = {lines} Å are not explained." if begins else "All lines are explained."
        )
        listed.append(Event(numbers[place], "lines", text))
    return sorted(listed, key=lambda event: event.frame)


def _of_sample(result: JointResult | None) -> list[RefinedPhaseResult]:
    """Return the phases of the sample, without what holds it."""
    phases = () if result is None else result.phases
    return [phase for phase in phases if not np.isnan(phase.weight_percent)]


def _changes(states: Mask) -> Iterator[tuple[int, bool]]:
    """Yield the places where a state that lasts begins (True) or ends, but for the first frame."""
    state = bool(states[0]) if len(states) else False
    for place in range(1, len(states)):
        ahead = states[place : place + _LASTING]
        if len(ahead) == _LASTING and (ahead != state).all():
            state = not state
            yield place, state


def _jumps(frames: Sequence[tuple[int, RefinedPhaseResult]]) -> Iterator[Event]:
    """Yield where a cell parameter changes far more than between other neighbours."""
    if len(frames) < 2:
        return
    phases = [phase for _, phase in frames]
    for name in phases[0].free_parameters:
        column = CELL_PARAMETERS.index(name)
        values = np.array([phase.cell[column] for phase in phases])
        su = np.array([phase.su[column] for phase in phases])
        steps = np.diff(values)
        usual = float(np.median(steps))
        scatter = 1.4826 * float(np.median(np.abs(steps - usual)))
        limit = np.maximum(_SUDDEN * scatter, _SIGNIFICANT * np.hypot(su[1:], su[:-1]))
        for k in np.flatnonzero(np.abs(steps - usual) > limit).tolist():
            text = f"{phases[0].name}: {name} jumps from {values[k]:.5f} to {values[k + 1]:.5f}."
            yield Event(frames[k + 1][0], "jump", text)
