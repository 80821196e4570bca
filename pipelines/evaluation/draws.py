"""Evaluation of models on simulated measurements: calibration, rejection, refinement.

The draws have streams of random numbers of their own, which no model was trained or calibrated on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from matplotlib.figure import Figure

from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from bragg_data.refinement.result import RefinementResult
from pipelines.evaluation import draw_tasks
from pipelines.evaluation.calibration import DrawPredictions, calibration_figure, calibration_tables
from pipelines.evaluation.draw_options import DrawOptions
from pipelines.evaluation.rejection import rejection_table
from pipelines.evaluation.tables import ResultTable
from pipelines.registry.feature_views import RegisteredModel
from pipelines.simulation.draws import Purpose, random_stream

_PREDICTED_PER_TASK = 50  # draws of each phase
_REFINED_PER_TASK = 4
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
    phase, converged, first
        The true phase, whether it fits as well as from the truth, and whether it is the most
        plausible one.
    seconds
        Time of the refinement.
    """

    start: str
    phase: int
    converged: bool = False
    first: bool = False
    seconds: float = 0.0


def evaluate_on_draws(
    client: Client,
    model: RegisteredModel,
    phases: Sequence[Phase],
    label: str,
    options: DrawOptions,
    other_bank: Instrument | None,
) -> tuple[list[ResultTable], Figure | None]:
    """Evaluate a model on simulated measurements; print the tables, and return them.

    Parameters
    ----------
    client, model
        The cluster, and the model.
    phases, label
        Of the campaign, and the model's name for a reader.
    options, other_bank
        Numbers of draws, and a bank whose profiles are foreign to the campaign.
    """
    tables: list[ResultTable] = []
    figure = None
    if options.draws:
        predictions = _predict_draws(client, model, options.draws)
        tables += calibration_tables(predictions, phases)
        figure = calibration_figure(predictions, phases)
    if options.foreign:
        tables.append(rejection_table(client, model, options.foreign, other_bank=other_bank))
    if options.refined_draws:
        count = options.refined_draws
        sizes = draw_tasks.task_sizes(count, _REFINED_PER_TASK)
        tasks = [(model, task, size) for task, size in enumerate(sizes)]
        n_draws = [size * len(phases) for size in sizes]
        parts = draw_tasks.run_tasks(client, _refine_task, tasks, "Refining", n_draws, "draws")
        tables.append(summarise([row for part in parts for row in part], count, phases))
    tables = [replace(table, title=f"{label}: {table.title}") for table in tables]
    for table in tables:
        table.show()
    return tables, figure


def _predict_draws(
    client: Client, model: RegisteredModel, count: int
) -> dict[str, DrawPredictions]:
    """Predict draws of each phase, of calibrated and of drifted instruments."""
    predictions = {}
    purposes = {"calibrated": Purpose.EVALUATION, "drifted": Purpose.DRIFTED_EVALUATION}
    for name, purpose in purposes.items():
        sizes = draw_tasks.task_sizes(count, _PREDICTED_PER_TASK)
        tasks = [(model, purpose, task, size) for task, size in enumerate(sizes)]
        title = f"Predicting, {name}"
        parts = draw_tasks.run_tasks(client, _predict_task, tasks, title, sizes, "draws")
        columns = zip(*parts, strict=True)
        predictions[name] = DrawPredictions(*(np.concatenate(values) for values in columns))
    return predictions


def _predict_task(
    model: RegisteredModel, purpose: Purpose, task: int, count: int
) -> tuple[Any, ...]:
    draws = draw_tasks.draws_of_phases(model, purpose, task, count)
    prepared = draws.prepared()
    rows = prepared.max(axis=1) > 0
    calibrated = np.full(rows.sum(), purpose is not Purpose.DRIFTED_EVALUATION)
    predictor, _ = draw_tasks.predictor_and_simulator(model)
    p = predictor.predict(prepared[rows], calibrated=calibrated)
    return p.probabilities, draws.phase[rows], draws.cells[rows], p.intervals, p.accepted


def summarise(rows: Sequence[Convergence], count: int, phases: Sequence[Phase]) -> ResultTable:
    """Return a table of where refinements end, from which start, and how fast.

    Parameters
    ----------
    rows, count, phases
        The refinements, the number of draws of each phase, and the phases of the campaign.
    """
    without_fit = sum(not row.start for row in rows)
    table = ResultTable(
        f"Correct minimum reached by the refinement, {count} draws of each phase",
        ("from", *(p.name for p in phases), "all", "correct phase\nfirst", "median s", "95 % s"),
        notes=[
            f"The correct minimum fits as well as the one that the truth itself leads to. From "
            f"other starts than the first, one draw in {_REFINED_PER_TASK}."
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


def _refine_task(model: RegisteredModel, task: int, count: int) -> list[Convergence]:
    """Refine draws from all starts, and compare with the fit from the truth."""
    refiner, _ = draw_tasks.refiner_and_library(model)
    draws = draw_tasks.draws_of_phases(model, Purpose.REFINEMENT, task, count)
    campaign = draw_tasks.predictor_and_simulator(model)[0].campaign
    generator = np.random.default_rng(random_stream(Purpose.REFINEMENT_STARTS, 0, task))
    samples = campaign.samples
    codes = range(len(campaign.phases))
    cells = [samples.cells[samples.phase == code] for code in codes]
    results = []
    for row, gridded, prepared in draw_tasks.prepared_profiles(draws):
        if prepared is None:
            continue
        phase = int(draws.phase[row])
        _, from_model, from_library = draw_tasks.starts_of(model, gridded, prepared)
        starts = {
            "both": from_model + from_library,
            "model": from_model,
            "library": from_library,
            "centre": [(c, np.median(cells[c], axis=0)) for c in codes],
            "random": [(c, cells[c][generator.integers(len(cells[c]))]) for c in codes],
        }
        truth = draw_tasks.refine_or_none(refiner, gridded, [(phase, draws.cells[row])])
        if not truth:
            results.append(Convergence("", phase))
            continue
        for name, start in starts.items():
            if start and (name == "both" or row % count == 0):  # one of each phase in a task
                began = time.perf_counter()
                fits = draw_tasks.refine_or_none(refiner, gridded, start)
                seconds = time.perf_counter() - began
                results.append(_converged(name, fits, truth[0], seconds))
    return results


def _converged(
    start: str, fits: Sequence[RefinementResult], truth: RefinementResult, seconds: float
) -> Convergence:
    of_phase = [fit for fit in fits if fit.phase == truth.phase]
    factor, addend = _SAME_MINIMUM
    converged = bool(of_phase) and of_phase[0].chi2 < factor * truth.chi2 + addend
    first = bool(fits) and fits[0].phase == truth.phase
    return Convergence(start, truth.phase, converged, first, seconds)
