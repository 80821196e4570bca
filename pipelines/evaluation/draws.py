"""Evaluation of models on simulated measurements: calibration, rejection, refinement.

The draws have streams of random numbers of their own, which no model was trained or calibrated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from matplotlib.figure import Figure

from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from pipelines.evaluation.calibration import (
    DrawPredictions,
    calibration_figure,
    calibration_tables,
)
from pipelines.evaluation.convergence import convergence_table
from pipelines.evaluation.draw_tasks import (
    draws_of_phases,
    predictor_and_simulator,
    run_tasks,
    task_sizes,
)
from pipelines.evaluation.rejection import rejection_table
from pipelines.evaluation.tables import ResultTable
from pipelines.registry.feature_views import RegisteredModel
from pipelines.simulation.draws import Purpose

_PER_TASK = 50  # draws of each phase


class DrawCounts(NamedTuple):
    """Size of an evaluation.

    Attributes
    ----------
    draws
        Simulated measurements of each phase, for the calibration.
    foreign
        Profiles of each foreign kind.
    refined
        Draws of each phase to refine.
    other_bank
        A bank that is not the campaign's, whose profiles are foreign too.
    """

    draws: int = 0
    foreign: int = 0
    refined: int = 0
    other_bank: Instrument | None = None


def evaluate_on_draws(
    client: Client, model: RegisteredModel, phases: Sequence[Phase], label: str, counts: DrawCounts
) -> tuple[list[ResultTable], Figure | None]:
    """Evaluate a model on simulated measurements; print the tables, and return them.

    Parameters
    ----------
    client, model
        The cluster, and the model.
    phases
        Of the campaign.
    label
        The model's name for a reader.
    counts
        Numbers of draws.
    """
    tables: list[ResultTable] = []
    figure = None

    def add(*new: ResultTable) -> None:
        for table in new:
            tables.append(replace(table, title=f"{label}: {table.title}"))
            tables[-1].show()

    if counts.draws:
        predictions = predict_draws(client, model, counts.draws)
        add(*calibration_tables(predictions, phases))
        figure = calibration_figure(predictions, phases)
    if counts.foreign:
        add(rejection_table(client, model, counts.foreign, other_bank=counts.other_bank))
    if counts.refined:
        add(convergence_table(client, model, counts.refined, phases))
    return tables, figure


def predict_draws(client: Client, model: RegisteredModel, count: int) -> dict[str, DrawPredictions]:
    """Predict draws of each phase, of calibrated and of drifted instruments."""
    predictions = {}
    purposes = {"calibrated": Purpose.EVALUATION, "drifted": Purpose.DRIFTED_EVALUATION}
    for name, purpose in purposes.items():
        sizes = task_sizes(count, _PER_TASK)
        tasks = [(model, purpose, task, size) for task, size in enumerate(sizes)]
        parts = run_tasks(client, _predict_task, tasks, f"Predicting, {name}", sizes, "draws")
        columns = zip(*parts, strict=True)
        predictions[name] = DrawPredictions(*(np.concatenate(values) for values in columns))
    return predictions


def _predict_task(
    model: RegisteredModel, purpose: Purpose, task: int, count: int
) -> tuple[Any, ...]:
    draws = draws_of_phases(model, purpose, task, count)
    prepared = draws.prepared()
    rows = prepared.max(axis=1) > 0
    calibrated = np.full(rows.sum(), purpose is not Purpose.DRIFTED_EVALUATION)
    prediction = predictor_and_simulator(model)[0].predict(prepared[rows], calibrated=calibrated)
    return (
        prediction.probabilities,
        draws.phase[rows],
        draws.cells[rows],
        prediction.intervals,
        prediction.accepted,
    )
