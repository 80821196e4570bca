"""Many frames of one sample, refined one after the other.

A frame is refined from all parameters of its neighbour. Where this fit is surprising, as at a
transition, it is refined independently of its neighbours too, from the CIFs, and the better fit
counts: a sudden change is not dragged along. Structures that can hardly be distinguished, as those
before and after a transition, exclude each other: the one with the most evidence is chosen, and
they are compared after some frames in any case. Others are in a frame or not, each by itself.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.evidence import schwarz_evidence
from bragg_data.refinement.identification import informative_banks
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult, RefinedPhaseResult, RefinedSite
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.measured_bank import MeasuredBank, with_wide_bins
from bragg_data.refinement.phase_screening import emerging_cell, exclude_each_other, has_peaks
from bragg_data.refinement.result import RefinementError

EVERY = 32
"""Frames after which a series is compared with the other structures in any case."""

_SURPRISING = 8.0  # uncertainties of a cell parameter off the trend of its neighbours, …
_WORSE = 0.03, 6.0  # … relative increase of the reduced χ², and in units of its scatter
_GOOD = 1.1  # noise up to which a fit needs no search for lines that split the other way
_CLEARLY = 2.0  # ln of the ratio of evidence, from which an earlier frame is changed
_UNDETERMINED = 0.7  # of the uncertainty that is expected before anything is measured


@dataclass(frozen=True)
class Neighbour:
    """What is known from the frames before."""

    choice: int = 0  # which structures a frame holds
    present: tuple[str, ...] = ()  # names of the phases that are refined
    values: Mapping[str, float] = field(default_factory=dict)  # of parameters, by their names
    terms: tuple[int, ...] = ()  # of the background of each bank
    reduced_chi2: float = np.inf
    steps: Mapping[str, float] = field(default_factory=dict)  # of cell parameters, to this frame
    su: Mapping[str, float] = field(default_factory=dict)  # of cell parameters
    held: tuple[str, ...] = ()  # names of parameters that the data do not determine
    age: int = 0  # frames since the structures were compared
    seen: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # latest cells (6,)


class _Fit(NamedTuple):
    """A refined frame: which structures it holds, and where the search ended."""

    choice: int
    state: State
    result: JointResult


class SeriesRefiner:
    """Refines frame after frame; :attr:`before` is what it knows from those that were accepted.

    ``single``: a frame holds one of the phases, True, or any of them, False; None: structures of
    one composition with nearly the same lines exclude each other. In all cases in cans.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        cans: Sequence[Phase] = (),
        *,
        single: bool | None = None,
        before: Neighbour | None = None,
    ) -> None:
        self._phases, self._cans, self._single = list(phases), list(cans), single
        self._choices: list[list[Phase]] = []
        self.before = before

    def refine_all(
        self, frames: Sequence[tuple[Sequence[MeasuredBank], JointOptions]]
    ) -> list[JointResult | RefinementError]:
        """Refine some frames; where the structures change in their midst, find the first one."""
        results: list[JointResult | RefinementError] = []
        for banks, options in frames:
            before = self.before
            try:
                results.append(self.refine(banks, options))
            except RefinementError as error:
                results.append(error)
                continue
            if before is None or self.before is None or before is self.before:
                continue
            better = self.before.reduced_chi2 < before.reduced_chi2 * (1 - _WORSE[0])
            if better or before.choice != self.before.choice:
                self._change_earlier(frames[: len(results) - 1], results)
        return results

    def refine(self, banks: Sequence[MeasuredBank], options: JointOptions) -> JointResult:
        """Return the refinement of the next frame; a RefinementError if it has no pattern."""
        began = time.perf_counter()
        banks = [with_wide_bins(bank) for bank in banks]
        if not self._choices:
            self._choices = self._grouped(banks)
        before = self.before
        fit: _Fit | None = None
        if before is not None and len(before.terms) == len(banks):
            with suppress(CrystalError, RefinementError):
                fit = self._continued(banks, options, before)
        if fit is None or before is None:
            fit = self._independent(banks, options)
        elif self._is_surprising(fit.result, before):
            if not has_peaks(fit.state):
                return self._completed(fit, began)
            with suppress(RefinementError):
                fit = self._independent(banks, options, fit)
            before = replace(before, age=0)
        elif before.age >= EVERY and len(self._choices) > 1:
            fit = self._compared(banks, options, fit)
            before = replace(before, age=0)
        if fit.result.accepted:
            self._remember(fit, before)
        return self._completed(fit, began)

    def _grouped(self, banks: Sequence[MeasuredBank]) -> list[list[Phase]]:
        """Return the structures that a frame may hold together, one list for each possibility."""
        groups: list[list[Phase]] = []
        for phase in self._phases:
            for group in groups:
                if self._single or (
                    self._single is None and exclude_each_other(phase, group[0], banks)
                ):
                    group.append(phase)
                    break
            else:
                groups.append([phase])
        return [[*chosen, *self._cans] for chosen in product(*groups)]

    def _independent(
        self, banks: Sequence[MeasuredBank], options: JointOptions, fit: _Fit | None = None
    ) -> _Fit:
        """Refine a frame from the CIFs' cells; the structures are chosen on two banks.

        A fit from elsewhere stays where its structures are chosen, and it is the better one.
        """
        if len(self._choices) == 1:
            refiner = JointRefiner(banks, self._choices[0])
            state = refiner.searched(options)
            independent = _Fit(0, state, refiner.summarised(state, options))
            return min(fit or independent, independent, key=lambda fit: fit.result.chi2)
        of_some, near = _informative(banks, options)
        best: _Fit | None = None
        for twins in (False, True):  # which take most of the time
            fits: list[_Fit] = []
            for choice, phases in enumerate(self._choices):
                starts: list[list[Array] | None] = [None]
                if fit is not None and fit.choice == choice:
                    known = {phase.name: phase.cell for phase in fit.result.phases}
                    starts.append([known.get(p.name, np.array(p.cell)) for p in phases])
                refiner = JointRefiner(of_some, phases)
                for cells in starts:
                    with suppress(RefinementError):
                        state = refiner.searched(near, cells, twins=twins)
                        fits.append(_Fit(choice, state, refiner.summarised(state, near)))
            if not fits:
                raise RefinementError("None of the phases has a pattern on the banks.")
            evidence = schwarz_evidence([candidate.result for candidate in fits])
            best = fits[int(np.argmax(evidence))]
            if best.state.model.noise < _GOOD:
                break
        assert best is not None
        refiner = JointRefiner(banks, self._choices[best.choice])
        state = refiner.searched(options, [p.cell for p in best.result.phases], twins=False)
        independent = _Fit(best.choice, state, refiner.summarised(state, options))
        if fit is None or fit.choice != best.choice:
            return independent
        return min(fit, independent, key=lambda fit: fit.result.chi2)

    def _continued(
        self, banks: Sequence[MeasuredBank], options: JointOptions, before: Neighbour
    ) -> _Fit:
        """Refine a frame from its neighbour; phases that were not there only where they show."""
        phases = self._choices[before.choice]
        there = [phase for phase in phases if phase.name in before.present]
        refiner = JointRefiner(banks, there or phases)
        state = refiner.continued(options, before.values, before.terms, before.held)
        result = refiner.summarised(state, options)
        values = dict(before.values)
        for phase in phases if there else ():
            if (
                phase not in there
                and (cell := emerging_cell(state, phase, before.seen.get(phase.name))) is not None
            ):
                values |= _named(phase, cell)
                there.append(phase)
        if there and len(there) > len(state.model.phases):
            refiner = JointRefiner(banks, [phase for phase in phases if phase in there])
            trial = refiner.continued(options, values, before.terms, before.held)
            with_more = refiner.summarised(trial, options)
            if sum(p.present for p in with_more.phases) > sum(p.present for p in result.phases):
                return _Fit(before.choice, trial, with_more)
        return _Fit(before.choice, state, result)

    def _compared(self, banks: Sequence[MeasuredBank], options: JointOptions, fit: _Fit) -> _Fit:
        """Return the fit of the structures with most evidence, the present ones or others.

        They are compared on two banks, from what is known of them.
        """
        assumed = self.before
        assert assumed is not None
        of_some, near = _informative(banks, options)
        terms = [assumed.terms[banks.index(bank)] for bank in of_some]
        results: dict[int, JointResult] = {}
        for choice, phases in enumerate(self._choices):
            there = [p for p in phases if p.name in assumed.present or p not in self._shared]
            refiner = JointRefiner(of_some, there)
            starts = [np.array(assumed.seen.get(p.name, tuple(p.cell))) for p in there]
            with suppress(CrystalError, RefinementError):
                values = _transferred(assumed.values, there)
                cells = starts if choice == fit.choice else refiner.captured(starts)
                for phase, cell in zip(refiner.phases, cells, strict=True):
                    values |= _named(phase, cell)
                state = refiner.continued(near, values, terms)
                results[choice] = refiner.summarised(state, near)
        if not results:
            return fit
        best = list(results)[int(np.argmax(schwarz_evidence(list(results.values()))))]
        return fit if best == fit.choice else self._independent(banks, options, fit)

    def _change_earlier(
        self,
        frames: Sequence[tuple[Sequence[MeasuredBank], JointOptions]],
        results: list[JointResult | RefinementError],
    ) -> None:
        """Refine the frames before a change from the one after it, as long as that is better."""
        after = self.before
        assert after is not None
        for place in range(len(frames) - 1, -1, -1):
            banks, options = frames[place]
            result = results[place]
            if isinstance(result, RefinementError) or not result.accepted:
                continue
            if len(banks) != len(after.terms):  # one of them has no points here
                return
            with suppress(CrystalError, RefinementError):
                began = time.perf_counter()
                other = self._continued([with_wide_bins(bank) for bank in banks], options, after)
                gain = float(np.diff(schwarz_evidence([result, other.result]))[0])
                if other.result.accepted and gain > _CLEARLY:
                    results[place] = self._completed(other, began)
                    continue
            return

    @property
    def _shared(self) -> list[Phase]:
        """The phases that all choices have in common."""
        return [p for p in self._choices[0] if all(p in choice for choice in self._choices)]

    @staticmethod
    def _is_surprising(result: JointResult, before: Neighbour) -> bool:
        """Return whether a fit that continues its neighbour's is unlike what came before."""
        there = {phase.name: phase for phase in result.phases if phase.present}
        if not result.accepted or not set(before.present) <= there.keys():
            return True
        allowed = max(_WORSE[0], _WORSE[1] * np.sqrt(2 / result.n_points))
        if result.reduced_chi2 > before.reduced_chi2 * (1 + allowed):
            return True
        for phase in there.values():
            for name in phase.free_parameters:
                key, column = f"{phase.name}: {name}", CELL_PARAMETERS.index(name)
                if key not in before.values:
                    continue
                step = phase.cell[column] - before.values[key]
                off = step - before.steps.get(key, 0.0)
                # Where a cell becomes more symmetric, its uncertainty grows.
                su = min(phase.su[column], before.su.get(key, np.inf))
                if min(abs(off), 2 * abs(step)) > _SURPRISING * np.sqrt(2) * su:
                    return True
        return False

    def _remember(self, fit: _Fit, before: Neighbour | None) -> None:
        choice, state, result = fit
        present = tuple(phase.name for phase in result.phases if phase.present)
        assert state.minimum is not None
        values = {
            parameter.name: value
            for parameter, value in zip(
                state.model.parameters, state.minimum.point.tolist(), strict=True
            )
            if parameter.phase is None or state.model.phases[parameter.phase].name in present
        }
        cells = {p.name: tuple(p.cell.tolist()) for p in result.phases if p.present}
        known = before or Neighbour()
        steps = {
            f"{p.name}: {name}": values[f"{p.name}: {name}"] - known.values[f"{p.name}: {name}"]
            for p in result.phases
            for name in p.free_parameters
            if f"{p.name}: {name}" in known.values.keys() & values.keys()
        }
        age = known.age + 1 if known.choice == choice else 0
        su = np.sqrt(np.maximum(np.diag(state.covariance), 0.0))
        held = [
            p.name
            for p, u in zip(state.model.parameters, su.tolist(), strict=True)
            if u > _UNDETERMINED * p.su
        ]
        self.before = Neighbour(
            choice=choice,
            present=present,
            values=values,
            terms=tuple(bank.terms for bank in state.model.banks),
            reduced_chi2=result.reduced_chi2,
            steps=steps,
            su={
                f"{p.name}: {name}": float(p.su[CELL_PARAMETERS.index(name)])
                for p in result.phases
                if p.present
                for name in p.free_parameters
            },
            held=tuple(sorted({*held, *(known.held if age else ())})),
            age=age,
            seen={**known.seen, **cells},
        )

    def _completed(self, fit: _Fit, began: float) -> JointResult:
        """Return a result with the phases that were not looked for, in the order of the choice."""
        result = fit.result
        known = {phase.name: phase for phase in result.phases}
        names = {can.name for can in self._cans}
        phases = tuple(
            known.get(phase.name) or _absent(phase, is_can=phase.name in names)
            for phase in self._choices[fit.choice]
        )
        missing = tuple(f"{p.name} was not found." for p in phases if p.name not in known)
        seconds = time.perf_counter() - began
        return replace(result, phases=phases, remarks=(*result.remarks, *missing), seconds=seconds)


def _informative(
    banks: Sequence[MeasuredBank], options: JointOptions
) -> tuple[list[MeasuredBank], JointOptions]:
    """Return the banks on which structures are compared, and the options for these."""
    places = informative_banks(banks)
    su = tuple(options.calibration_su[b] for b in places)
    offsets = options.offsets and tuple(options.offsets[b] for b in places)
    return [banks[b] for b in places], replace(options, calibration_su=su, offsets=offsets)


def _absent(phase: Phase, *, is_can: bool) -> RefinedPhaseResult:
    nothing = np.zeros(6)
    return RefinedPhaseResult(
        name=phase.name,
        space_group=phase.space_group,
        free_parameters=phase.lattice.free_parameters,
        cell=np.array(phase.cell),
        su=nothing,
        su_calibration=nothing,
        weight_percent=np.nan if is_can else 0.0,
        su_weight_percent=np.nan if is_can else 0.0,
        sites=tuple(
            RefinedSite(
                site.label or site.symbol,
                site.symbol,
                np.array(site.position),
                np.zeros(3),
                site.occupancy,
                site.u_iso,
                0.0,
            )
            for site in phase.sites
        ),
        structure=phase,
        parameters={},
        present=False,
    )


def _named(phase: Phase, cell: Array) -> dict[str, float]:
    """Return the free parameters of a cell by the names that a refinement gives them."""
    free = cell[phase.lattice.free_columns].tolist()
    return {
        f"{phase.name}: {n}": v for n, v in zip(phase.lattice.free_parameters, free, strict=True)
    }


def _transferred(values: Mapping[str, float], phases: Sequence[Phase]) -> dict[str, float]:
    """Return values with those of other phases for the ones that have none, but for cells.

    Broadening and displacements hardly change where a structure is slightly distorted.
    """
    transferred: dict[str, float] = {}
    for name, value in values.items():
        what = name.partition(": ")[2]
        if what and what not in CELL_PARAMETERS:
            transferred |= {f"{phase.name}: {what}": value for phase in phases}
    return transferred | dict(values)
