"""Simulated measurements for an evaluation, and what a worker needs to predict and refine them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import PreprocessingError, prepare_measured
from bragg_data.refinement.result import RefinementError, RefinementResult
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    Draws,
    draw_labels,
    draw_profiles,
    effects_from_campaign,
    simulator_for,
)
from bragg_models.predictors import Prediction, Predictor
from pipelines.cluster.client import gather_with_progress
from pipelines.prediction.library import (
    INDEX_DIRECTORY,
    PatternLibrary,
    match_library,
    open_library,
)
from pipelines.registry.feature_views import RegisteredModel
from pipelines.registry.registration import load_version
from pipelines.simulation.draws import Purpose, random_stream

Start = tuple[int, NDArray[np.float64]]
"""A phase and a cell, shape (6,), that a refinement starts from."""


def task_sizes(count: int, per_task: int) -> list[int]:
    """Return the sizes of tasks that together have a number of draws."""
    return [min(per_task, count - low) for low in range(0, count, per_task)]


def run_tasks(
    client: Client,
    task: Callable[..., Any],
    arguments: Sequence[tuple[object, ...]],
    description: str,
    sizes: Sequence[int],
    unit: str,
) -> list[Any]:
    """Return the results of tasks, in their order."""
    futures = [client.submit(task, *values, pure=False) for values in arguments]
    return gather_with_progress(futures, sizes, description, unit)


@lru_cache(maxsize=1)
def predictor_and_simulator(model: RegisteredModel) -> tuple[Predictor, Simulator]:
    """Return a registered model, and the simulator of its campaign; the last one is cached."""
    predictor = load_version(model.tracking_uri, model.version)
    return predictor, simulator_for(predictor.campaign, cache=INDEX_DIRECTORY)


@lru_cache(maxsize=1)
def refiner_and_library(model: RegisteredModel) -> tuple[Refiner, PatternLibrary | None]:
    """Return the refiner of a model's campaign, and its library; the last ones are cached."""
    predictor, _ = predictor_and_simulator(model)
    return Refiner(predictor.campaign, cache=INDEX_DIRECTORY), open_library(predictor)


def draws_of_phases(model: RegisteredModel, purpose: Purpose, task: int, count: int) -> Draws:
    """Draw measured profiles of each phase, the same for the same purpose and task."""
    predictor, simulator = predictor_and_simulator(model)
    campaign = predictor.campaign
    generator = np.random.default_rng(random_stream(purpose, 0, task))
    phase, cells = draw_labels(campaign, count, generator)
    calibrated = purpose is not Purpose.DRIFTED_EVALUATION
    effects = effects_from_campaign(campaign)
    return draw_profiles(simulator, phase, cells, generator, effects, calibrated=calibrated)


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
    model: RegisteredModel, gridded: GriddedProfile, prepared: NDArray[np.float64]
) -> tuple[Prediction, list[Start], list[Start]]:
    """Return the model's prediction, and the starts from it and from the library."""
    predictor, _ = predictor_and_simulator(model)
    _, library = refiner_and_library(model)
    prediction = predictor.predict(prepared[None])
    from_model = [(int(prediction.phase[0]), prediction.cells[0])]
    if library is None:
        return prediction, from_model, []
    matches = match_library(library, prepared[None], gridded.covered[None])
    return prediction, from_model, matches.starts(0)


def refine_or_none(
    refiner: Refiner, gridded: GriddedProfile, starts: Sequence[Start]
) -> Sequence[RefinementResult]:
    """Return the refinements of a profile, the most plausible first; none if it is impossible."""
    try:
        return refiner.refine(gridded, list(starts))
    except RefinementError:
        return []
