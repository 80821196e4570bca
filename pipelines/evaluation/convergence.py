"""Convergence of refinements from several starts to the correct minimum."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from distributed import Client

from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.result import RefinementResult
from bragg_data.refinement.rietveld import Refiner
from pipelines.evaluation.draw_tasks import (
    Start,
    draws_of_phases,
    predictor_and_simulator,
    prepared_profiles,
    refine_or_none,
    refiner_and_library,
    run_tasks,
    starts_of,
    task_sizes,
)
from pipelines.evaluation.tables import ResultTable
from pipelines.registry.feature_views import RegisteredModel
from pipelines.simulation.draws import Purpose, random_stream

_PER_TASK = 4  # draws of each phase
_SAME_MINIMUM = 1.001, 1.0  # factor and addend on χ² of the fit from the truth

STARTS = {
    "both": "the model's cell and the library's",
    "model": "the model's cell alone",
    "library": "the library's cells of each phase",
    "centre": "the middle of the campaign's ranges",
    "random": "a cell of the campaign at random",
}
"""Starts of refinements."""


class Convergence(NamedTuple):
    """Where a refinement ended.

    Attributes
    ----------
    start
        A key of :data:`STARTS`; empty where the draw has no fit from the truth to compare with.
    phase
        The true phase.
    converged
        Whether the true phase fits as well as from the truth.
    first
        Whether the true phase is the most plausible one.
    seconds
        Time of the refinement.
    """

    start: str
    phase: int
    converged: bool = False
    first: bool = False
    seconds: float = 0.0


def convergence_table(
    client: Client, model: RegisteredModel, count: int, phases: Sequence[Phase]
) -> ResultTable:
    """Return where refinements of draws of each phase end, from which start, and how fast."""
    sizes = task_sizes(count, _PER_TASK)
    tasks = [(model, task, size) for task, size in enumerate(sizes)]
    n_draws = [size * len(phases) for size in sizes]
    parts = run_tasks(client, refinement_task, tasks, "Refining", n_draws, "draws")
    return summarise([row for part in parts for row in part], count, phases)


def summarise(rows: Sequence[Convergence], count: int, phases: Sequence[Phase]) -> ResultTable:
    """Return a table of refinements.

    Parameters
    ----------
    rows
        The refinements.
    count
        Number of draws of each phase.
    phases
        Of the campaign.
    """
    without_fit = sum(not row.start for row in rows)
    table = ResultTable(
        f"Correct minimum reached by the refinement, {count} draws of each phase",
        ("from", *(p.name for p in phases), "all", "correct phase\nfirst", "median s", "95 % s"),
        notes=[
            f"The correct minimum fits as well as the one that the truth itself leads to. From "
            f"other starts than the first, one draw in {_PER_TASK}."
        ],
    )
    if without_fit:
        table.notes.append(
            f"{without_fit} draws are left out: no fit is possible even from the truth."
        )
    for start, label in STARTS.items():
        of_start = [row for row in rows if row.start == start]
        if not of_start:
            continue
        by_phase = [[r.converged for r in of_start if r.phase == c] for c in range(len(phases))]
        seconds = [row.seconds for row in of_start]
        table.add(
            label,
            *(f"{np.mean(values):.1%}" if values else "" for values in by_phase),
            f"{np.mean([row.converged for row in of_start]):.1%}",
            f"{np.mean([row.first for row in of_start]):.1%}",
            f"{np.median(seconds):.2f}",
            f"{np.percentile(seconds, 95):.2f}",
            style="bold" if start == "both" else "",
        )
    return table


def refinement_task(model: RegisteredModel, task: int, count: int) -> list[Convergence]:
    """Refine draws from all starts, and compare with the fit from the truth."""
    refiner, _ = refiner_and_library(model)
    draws = draws_of_phases(model, Purpose.REFINEMENT, task, count)
    campaign = predictor_and_simulator(model)[0].campaign
    generator = np.random.default_rng(random_stream(Purpose.REFINEMENT_STARTS, 0, task))
    samples = campaign.samples
    codes = range(len(campaign.phases))
    cells = [samples.cells[samples.phase == code] for code in codes]
    results = []
    for row, gridded, prepared in prepared_profiles(draws):
        if prepared is None:
            continue
        phase = int(draws.phase[row])
        _, from_model, from_library = starts_of(model, gridded, prepared)
        starts = {
            "both": from_model + from_library,
            "model": from_model,
            "library": from_library,
            "centre": [(c, np.median(cells[c], axis=0)) for c in codes],
            "random": [(c, cells[c][generator.integers(len(cells[c]))]) for c in codes],
        }
        truth = refine_or_none(refiner, gridded, [(phase, draws.cells[row])])
        if not truth:
            results.append(Convergence("", phase))
            continue
        for name, start in starts.items():
            if start and (name == "both" or row % count == 0):  # one of each phase in a task
                results.append(_converged(refiner, gridded, start, truth[0], name))
    return results


def _converged(
    refiner: Refiner,
    gridded: GriddedProfile,
    starts: Sequence[Start],
    truth: RefinementResult,
    name: str,
) -> Convergence:
    began = time.perf_counter()
    fits = refine_or_none(refiner, gridded, starts)
    seconds = time.perf_counter() - began
    of_phase = [fit for fit in fits if fit.phase == truth.phase]
    factor, addend = _SAME_MINIMUM
    converged = bool(of_phase) and of_phase[0].chi2 < factor * truth.chi2 + addend
    first = bool(fits) and fits[0].phase == truth.phase
    return Convergence(name, truth.phase, converged, first, seconds)
