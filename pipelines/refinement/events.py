"""What happens in a series of frames: phases come and go, cells jump, frames are blank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bragg_data.arrays import Array, Mask
from pipelines.refinement.result import JointPhase, JointRefinement

_SUDDEN = 6.0  # times the usual scatter between neighbours, …
_SIGNIFICANT = 5.0  # … and times the uncertainty of a difference: a jump
_SCALE = 1.5  # ratio of the signals of neighbours
_NO_PEAKS = "No peak of the phases stands out of the noise."
_UNREADABLE = "The frame cannot be read or refined."
_LASTING = 2  # frames that a phase, unexplained lines or another broadening have to stay for
_BROADENING = {"1/size": "1/µm", "microstrain": "1e-6"}


@dataclass(frozen=True)
class Event:
    """What happened at a frame; frames are counted from 0.

    Its kind is blank, not accepted, phase appears, phase disappears, transition, jump, scale, lines
    or broadening.
    """

    frame: int
    kind: str
    text: str


def events(results: Sequence[JointRefinement | None]) -> list[Event]:
    """Return what happens in a series, in the order of its frames.

    None are frames that cannot be read or refined.
    """
    blank = [not any(phase.cell for phase in _of_sample(r)) for r in results]
    listed = [
        Event(k, "blank", _UNREADABLE if results[k] is None else _NO_PEAKS)
        for k in np.flatnonzero(blank).tolist()
    ]
    frames = [(k, r) for k, r in enumerate(results) if r is not None and not blank[k]]
    listed += [Event(k, "not accepted", " ".join(r.reasons)) for k, r in frames if r.reasons]
    numbers = [k for k, _ in frames]
    changes: dict[int, list[tuple[str, bool]]] = {}
    for name in dict.fromkeys(phase.name for _, r in frames for phase in _of_sample(r)):
        phases = [next((p for p in r.phases if p.name == name and p.cell), None) for _, r in frames]
        seen = np.array([phase is not None for phase in phases], dtype=bool)
        for place, begins in _changes(seen):
            changes.setdefault(numbers[place], []).append((name, begins))
        present = [
            (k, p) for p, (k, r) in zip(phases, frames, strict=True) if p is not None and r.accepted
        ]
        listed += [*_jumps(present), *_broadened(present)]
    for frame, of_frame in changes.items():
        begun = [name for name, begins in of_frame if begins]
        ended = [name for name, begins in of_frame if not begins]
        if begun and ended:
            text = f"{', '.join(ended)} turns into {', '.join(begun)}."
            listed.append(Event(frame, "transition", text))
            continue
        listed += [Event(frame, "phase appears", f"{name} appears.") for name in begun]
        listed += [Event(frame, "phase disappears", f"{name} disappears.") for name in ended]
    signals = [sum(bank.signal or 0.0 for bank in r.of_banks) for _, r in frames]
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


def _of_sample(result: JointRefinement | None) -> list[JointPhase]:
    """Return the phases of the sample, without what holds it."""
    phases = () if result is None else result.phases
    return [phase for phase in phases if phase.weight_percent is not None]


def _changes(states: Mask) -> Iterator[tuple[int, bool]]:
    """Yield the places where a state that lasts begins (True) or ends, but for the first frame."""
    state = bool(states[0]) if len(states) else False
    for place in range(1, len(states)):
        ahead = states[place : place + _LASTING]
        if len(ahead) == _LASTING and (ahead != state).all():
            state = not state
            yield place, state


def _jumps(frames: Sequence[tuple[int, JointPhase]]) -> Iterator[Event]:
    """Yield where a cell parameter changes far more than between other neighbours."""
    for name in frames[0][1].free_parameters if frames else ():
        values, su = (
            np.array([cell.values()[name] if cell else None for cell in cells], dtype=np.float64)
            for cells in ([p.cell for _, p in frames], [p.su for _, p in frames])
        )
        for k in _sudden(values, su, [number for number, _ in frames]):
            text = f"{frames[0][1].name}: {name} jumps from {values[k]:.5f} to {values[k + 1]:.5f}."
            yield Event(frames[k + 1][0], "jump", text)


def _broadened(frames: Sequence[tuple[int, JointPhase]]) -> Iterator[Event]:
    """Yield where size or strain of a phase change for good, far more than between others."""
    texts: dict[int, list[str]] = {}
    for name, unit in _BROADENING.items():
        of_frames = [phase.parameters.get(name) for _, phase in frames]
        if None in of_frames:
            continue
        values = np.array([v.value for v in of_frames if v], dtype=np.float64)
        su = np.array([v.su for v in of_frames if v], dtype=np.float64)
        for k in _sudden(values, su, [number for number, _ in frames]):
            ahead = values[k + 1 : k + 1 + _LASTING] - values[k]
            half = 0.5 * (values[k + 1] - values[k])
            if len(ahead) == _LASTING and (ahead / half > 1).all():
                text = f"{name} changes from {values[k]:.3g} to {values[k + 1]:.3g} {unit}"
                texts.setdefault(frames[k + 1][0], []).append(text)
    for frame, of_frame in texts.items():
        yield Event(frame, "broadening", f"{frames[0][1].name}: {', '.join(of_frame)}.")


def _sudden(values: Array, su: Array, numbers: Sequence[int]) -> list[int]:
    """Return the places before steps beyond their uncertainty and the usual scatter.

    A step over frames that are missing is as many usual ones.
    """
    if len(values) < 2:
        return []
    steps, frames = np.diff(values), np.diff(numbers)
    off = steps - frames * float(np.median(steps / frames))
    scatter = 1.4826 * float(np.median(np.abs(off)))
    limit = np.maximum(_SUDDEN * scatter, _SIGNIFICANT * np.hypot(su[1:], su[:-1]))
    return [int(k) for k in np.flatnonzero(np.abs(off) > limit)]
