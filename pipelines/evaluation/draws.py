"""Models on simulated measurements: predictions, and the starts that a refinement converges from.

The draws have streams of random numbers of their own, which no model was trained or calibrated on.
Functions that take the number of a task run on a worker.
"""

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import PreprocessingError, prepare_measured
from bragg_data.refinement.result import RefinementError, RefinementResult
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation import measurement_effects
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import Draws
from bragg_models.predictors import Prediction
from pipelines.cluster.client import gather_with_progress
from pipelines.evaluation.calibration import DrawPredictions
from pipelines.evaluation.tables import ResultTable
from pipelines.prediction.library import INDEX_DIRECTORY, match_library
from pipelines.prediction.workflow import LoadedModel
from pipelines.registry.feature_views import RegisteredModel
from pipelines.registry.registration import load_version
from pipelines.simulation.draws import Purpose, random_stream

_PREDICTED_PER_TASK = 50  # draws of each phase
_REFINED_PER_TASK = 4
_SAME_MINIMUM = 1.001, 1.0  # factor and addend on χ² of the fit from the truth

STARTS = {  # starts of refinements
    "both": "the model's cell and the library's",
    "model": "the model's cell alone",
    "library": "the library's cells of each phase",
    "centre": "the middle of the campaign's ranges",
    "random": "a cell of the campaign at random",
}

# A phase and a cell, shape (6,), that a refinement starts from.
Start = tuple[int, NDArray[np.float64]]


def task_sizes(count: int, per_task: int) -> list[int]:
    """Return the sizes of tasks that together have a number of draws."""
    return [min(per_task, count - low) for low in range(0, count, per_task)]


@lru_cache(maxsize=1)
def model_and_simulator(model: RegisteredModel) -> tuple[LoadedModel, Simulator]:
    """Return a registered model, and the simulator of its campaign; the last one is cached."""
    predictor = load_version(model.tracking_uri, model.version)
    simulator = measurement_effects.simulator_for(predictor.campaign, cache=INDEX_DIRECTORY)
    return LoadedModel(predictor, model.version, model.tracking_uri), simulator


def _draws_of_phases(
    model: RegisteredModel, purpose: Purpose, task: int, count: int
) -> tuple[LoadedModel, Draws]:
    """Draw measured profiles of each phase, the same for the same purpose and task."""
    loaded, simulator = model_and_simulator(model)
    campaign = loaded.predictor.campaign
    generator = np.random.default_rng(random_stream(purpose, 0, task))
    labels = measurement_effects.draw_labels(campaign, count, generator)
    calibrated = purpose is not Purpose.DRIFTED_EVALUATION
    effects = campaign.measurement_effects
    return loaded, measurement_effects.draw_profiles(
        simulator, *labels, generator, effects, calibrated=calibrated
    )


def prepared_profiles(
    draws: Draws,
) -> Iterator[tuple[int, GriddedProfile, NDArray[np.float64] | None]]:
    """Yield row, profile, and the input of models; None where the profile has no signal."""
    for row, values in enumerate(zip(draws.intensity, draws.sigma, draws.covered, strict=True)):
        try:
            prepared = prepare_measured(*values)
        except PreprocessingError:
            prepared = None
        yield row, GriddedProfile(*values), prepared


def starts_of(
    model: LoadedModel, gridded: GriddedProfile, prepared: NDArray[np.float64]
) -> tuple[Prediction, list[Start], list[Start]]:
    """Return the model's prediction, and the starts from it and from the library."""
    prediction = model.predictor.predict(prepared[None])
    from_model = [(int(prediction.phase[0]), prediction.cells[0])]
    if model.library is None:
        return prediction, from_model, []
    matches = match_library(model.library, prepared[None], gridded.covered[None])
    return prediction, from_model, matches.starts(0)


def refine_or_none(
    refiner: Refiner, gridded: GriddedProfile, starts: Sequence[Start]
) -> Sequence[RefinementResult]:
    """Return the refinements of a profile, the most plausible first; none if it is impossible."""
    try:
        return refiner.refine(gridded, list(starts))
    except RefinementError:
        return []


def predict_draws(client: Client, model: RegisteredModel, count: int) -> dict[str, DrawPredictions]:
    """Predict draws of each phase, of calibrated and of drifted instruments."""
    predictions = {}
    sizes = task_sizes(count, _PREDICTED_PER_TASK)
    purposes = {"calibrated": Purpose.EVALUATION, "drifted": Purpose.DRIFTED_EVALUATION}
    for name, purpose in purposes.items():
        futures = [
            client.submit(_predict_task, model, purpose, task, size, pure=False)
            for task, size in enumerate(sizes)
        ]
        parts = gather_with_progress(futures, sizes, f"Predicting, {name}", "draws")
        predictions[name] = DrawPredictions(*map(np.concatenate, zip(*parts, strict=True)))
    return predictions


def _predict_task(
    model: RegisteredModel, purpose: Purpose, task: int, count: int
) -> tuple[Any, ...]:
    loaded, draws = _draws_of_phases(model, purpose, task, count)
    prepared = draws.prepared()
    rows = prepared.max(axis=1) > 0
    calibrated = np.full(rows.sum(), purpose is not Purpose.DRIFTED_EVALUATION)
    p = loaded.predictor.predict(prepared[rows], calibrated=calibrated)
    return p.probabilities, draws.phase[rows], draws.cells[rows], p.intervals, p.accepted


class Convergence(NamedTuple):
    """Where a refinement ended."""

    start: str  # a key of STARTS; empty where the draw has no fit from the truth to compare with
    phase: int  # the true one
    converged: bool = False  # it fits as well as from the truth
    first: bool = False  # the true phase is the most plausible one
    seconds: float = 0.0


def convergence_table(
    client: Client, model: RegisteredModel, count: int, phases: Sequence[Phase]
) -> ResultTable:
    """Refine draws of each phase, and return where that ends, from which start, and how fast."""
    sizes = task_sizes(count, _REFINED_PER_TASK)
    futures = [
        client.submit(_refine_task, model, task, size, pure=False)
        for task, size in enumerate(sizes)
    ]
    n_draws = [size * len(phases) for size in sizes]
    parts = gather_with_progress(futures, n_draws, "Refining", "draws")
    return summarise([row for part in parts for row in part], count, phases)


def summarise(rows: Sequence[Convergence], count: int, phases: Sequence[Phase]) -> ResultTable:
    """Return a table of the refinements of ``count`` draws of each phase."""
    table = ResultTable(
        f"Correct minimum reached by the refinement, {count} draws of each phase",
        ("from", *(p.name for p in phases), "all", "correct phase\nfirst", "median s", "95 % s"),
        notes=[
            f"The correct minimum fits as well as the one that the truth itself leads to. From "
            f"other starts than the first, one draw in {_REFINED_PER_TASK}."
        ],
    )
    if without_fit := sum(not row.start for row in rows):
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
    loaded, draws = _draws_of_phases(model, Purpose.REFINEMENT, task, count)
    refiner, samples = loaded.refiner, loaded.predictor.campaign.samples
    generator = np.random.default_rng(random_stream(Purpose.REFINEMENT_STARTS, 0, task))
    codes = range(len(loaded.predictor.campaign.phases))
    cells = [samples.cells[samples.phase == code] for code in codes]
    factor, addend = _SAME_MINIMUM
    results = []
    for row, gridded, prepared in prepared_profiles(draws):
        if prepared is None:
            continue
        phase = int(draws.phase[row])
        _, from_model, from_library = starts_of(loaded, gridded, prepared)
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
                began = time.perf_counter()
                fits = refine_or_none(refiner, gridded, start)
                seconds = time.perf_counter() - began
                chi2 = [fit.chi2 for fit in fits if fit.phase == phase]
                converged = bool(chi2) and chi2[0] < factor * truth[0].chi2 + addend
                first = bool(fits) and fits[0].phase == phase
                results.append(Convergence(name, phase, converged, first, seconds))
    return results
