"""The steps of a search for the phases of a sample: candidates, attempts, what is superfluous."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.candidate_phase import Candidate, left_by, refined_on
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.phase_evidence import CAUTION, earned, reduced, worth
from bragg_data.refinement.retrieval import PatternLibrary

_MANY = 6  # of each blur of the retrieval, that are refined
_LEAST_SHARE = 0.004  # of the calculated signal, below which nothing is sure
_ATTEMPTS = 3  # candidates that are refined with the phases so far, the best one and …
_WORTH_A_TRIAL = 0.6  # … those that are worth so much of it
_OF_CAN = 0.01  # relative, of the cell of what holds the sample
_MINOR, _OF_MINOR = 0.25, 0.02  # share of the signal of a phase, and relative, of its cell
_MOST_ALIKE = 20  # structures with the pattern of a phase, that are compared with it
_OF_COPY = 0.004  # relative, of the start of a phase's copy's cell that takes its lines' tails
_OF_DUPLICATE = 0.015  # relative, of the cell of a structure with the pattern of a phase
_ALIKE = 0.9  # correlation of blurred patterns, from which structures are compared in detail
_NEARLY = 0.5  # of what a structure leaves: further that leave no more explain nearly as much


@dataclass(frozen=True, eq=False)
class PhaseSearch:
    """The banks that are searched, the library of structures, and how these are refined.

    Phases are meant by their places in the library.
    """

    banks: Sequence[MeasuredBank]
    library: PatternLibrary
    options: JointOptions

    def duplicates(self, phase: Candidate) -> dict[int, float]:
        """Return structures with a phase's pattern: places, and factors on their lengths."""
        scale = _scale(phase.cell, self.library.phases[phase.place])
        return dict(self.library.similar(phase.place, scale, self.banks, _ALIKE))

    def candidates(self, state: State | None, refused: set[int]) -> list[Candidate]:
        """Return the few structures that explain most of what is left, the best first."""
        left = left_by(self.banks, state)
        refined = [
            refined_on(left, self.library.phases[place], place, scale)
            for place, scale in self.library.candidates(left, _MANY, refused)
        ]
        likely = [c for c in refined if c is not None and c.decrease > CAUTION]
        likely.sort(key=attrgetter("worth"), reverse=True)
        return [c for c in likely[:_ATTEMPTS] if c.worth > _WORTH_A_TRIAL * likely[0].worth]

    def attempts(
        self,
        likely: Sequence[Candidate],
        present: tuple[Sequence[int], Sequence[Array], State | None],
    ) -> list[tuple[Candidate, State]]:
        """Return some candidates, each refined with the phases so far, the best one first.

        Where structures explain as much, as those of metals, the one whose cell is least changed.
        """
        places, cells, before = present
        attempts = [
            (c, state)
            for c in likely
            if (state := self.refined([*places, c.place], [*cells, c.cell], (places, before)))
        ]
        noise = min((reduced(state) for _, state in attempts), default=1.0)
        return sorted(attempts, key=lambda trial: trial[1].chi2 / noise + trial[0].penalty)

    def with_copy(self, places: Sequence[int], state: State) -> State | None:
        """Return the strongest phase a second time, next to itself, if that explains a good deal.

        It takes what its lines have around the profile function, in which others would be seen.
        """
        strongest, cells = strongest_of(places, state), cells_of(state)
        lengths = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        best = state
        for by in (-_OF_COPY, _OF_COPY):
            copy = cells[places.index(strongest)] * (1 + by * lengths)
            both = [*places, strongest], [*cells, copy]
            trial = self.refined(*both, (places, state))
            best = min(best, trial or state, key=attrgetter("chi2"))
        return best if (state.chi2 - best.chi2) / reduced(best) > 3 * CAUTION else None

    def without_copy(self, places: Sequence[int], state: State) -> tuple[list[int], State]:
        """Return the phases once each, and their state."""
        once = list(dict.fromkeys(places))
        if len(once) == len(places):
            return once, state
        cells = cells_of(state)
        codes = [places.index(place) for place in once]
        refiner = JointRefiner(self.banks, [self.library.phases[place] for place in once])
        return once, refiner.near([cells[code] for code in codes], self.options, (state, codes))

    def with_alternatives(
        self, places: Sequence[int], state: State, duplicates: Mapping[int, Mapping[int, float]]
    ) -> tuple[list[int], State, dict[str, tuple[str, ...]]]:
        """Return the phases, or likelier ones of the same patterns, and their state.

        And the names of those that explain what a phase explains nearly as well, by phase.
        """
        chosen = list(places)
        alternatives: dict[str, tuple[str, ...]] = {}
        for code, place in enumerate(places):
            phase, cells = self.library.phases[place], cells_of(state)
            if phase.name in self.options.certain:
                continue
            scale = _scale(cells[code], phase)
            left = []
            for bank, fit in zip(self.banks, state.fits, strict=True):
                share_of_phase = fit.residual + fit.scales[code] * fit.columns[:, code]
                left.append(replace(bank, intensity=share_of_phase * bank.sigma))
            similar = self.library.similar(place, scale, left, _ALIKE)[: _MOST_ALIKE + 1]
            refined = [refined_on(left, self.library.phases[k], k, s) for k, s in similar]
            best = refined[0]
            if best is None:
                continue
            taken = set(chosen).union(
                *(near_in_cifs({k: d}) for k, d in duplicates.items() if k != place)
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
                trial = self.refined(swapped, moved, (chosen, state))
                if trial is None:
                    continue
                gain = (state.chi2 - trial.chi2) / min(reduced(state), reduced(trial))
                if gain + best.penalty - candidate.penalty > 0:
                    chosen, state, best = swapped, trial, candidate
            alike = [c.place for c in like if c is not best]
            alternatives[self.library.phases[best.place].name] = tuple(
                self.library.phases[k].name for k in alike
            )
        return chosen, state, alternatives

    def refined(
        self,
        places: Sequence[int],
        cells: Sequence[Array],
        before: tuple[Sequence[int], State | None] = ((), None),
    ) -> State | None:
        """Return phases refined together from cells; None where they have no pattern.

        All but cells starts where it was ``before``, with the phases at some places.
        """
        refiner = JointRefiner(self.banks, [self.library.phases[place] for place in places])
        earlier, state = before
        codes = [earlier.index(place) if place in earlier else None for place in places]
        with suppress(CrystalError):
            return refiner.near(cells, self.options, (state, codes) if state else None)
        return None

    def pruned(
        self, places: Sequence[int], state: State, *, strictly: bool = False
    ) -> tuple[list[int], State]:
        """Return the phases without those that further have made superfluous."""
        remaining, cells = list(places), cells_of(state)
        for place in places if strictly else places[:-1]:
            k = remaining.index(place)
            if (
                remaining.count(place) > 1
                or self.library.phases[place].name in self.options.certain
            ):
                continue
            if len(remaining) == 1 or (not strictly and worth(state, k) > 10 * CAUTION):
                continue
            fewer = remaining[:k] + remaining[k + 1 :]
            rest = cells[:k] + cells[k + 1 :]
            without = self.refined(fewer, rest, (remaining, state))
            if without is None:
                continue
            lost = strictly and (state.share(k) < _LEAST_SHARE or is_strange(state, k))
            if lost or not earned(state, without, k, strictly=strictly):
                remaining, state = fewer, without
                cells = cells_of(state)
        return remaining, state


def near_in_cifs(duplicates: Mapping[int, Mapping[int, float]]) -> set[int]:
    """Return the structures that could but stand for a second cell of a phase."""
    pairs = [pair for of_phase in duplicates.values() for pair in of_phase.items()]
    return {place for place, scale in pairs if abs(np.log(scale)) < _OF_DUPLICATE}


def _scale(cell: Array, phase: Phase) -> float:
    """Return the mean factor on the lengths of the CIF's cell."""
    return float(np.cbrt(np.prod(cell[:3]) / np.prod(phase.cell[:3])))


def is_near(cell: Array, phase: Phase) -> bool:
    """Return whether a can is in its cell: among lines of unknown phases it may run away."""
    return bool(np.abs(cell[:3] / phase.cell[:3] - 1).max() < _OF_CAN)


def strongest_of(places: Sequence[int], state: State) -> int:
    """Return the place in the library of the phase with most of the signal."""
    return places[int(np.argmax([state.share(code) for code in range(len(places))]))]


def cells_of(state: State) -> list[Array]:
    """Return the cells (6,) of the phases of a state."""
    return [state.model.cell(code, state.model.start) for code in range(len(state.model.phases))]


def is_strange(state: State, code: int) -> bool:
    """Return whether a minor phase is in a cell far from its CIF's.

    Somewhere in the range of cells lines of many structures are where shapes of further misfit.
    """
    scale = _scale(state.model.cell(code, state.model.start), state.model.phases[code])
    return state.share(code) < _MINOR and abs(np.log(scale)) > _OF_MINOR


def is_second_cell(
    state: State, code: int, place: int, duplicates: Mapping[int, Mapping[int, float]]
) -> bool:
    """Return whether a phase has the pattern of another one, in nearly its cell.

    As what strong lines have around the profile function, its tails.
    """
    scale = _scale(state.model.cell(code, state.model.start), state.model.phases[code])
    same = [of_phase[place] for of_phase in duplicates.values() if place in of_phase]
    return any(abs(np.log(scale / of_other)) < _OF_DUPLICATE for of_other in same)
