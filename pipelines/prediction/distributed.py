"""Predictions of many files, a part of them at a time on each worker of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Predictor
from catalog import registry
from pipelines.cli.options import ClusterOptions, ProfileOptions
from pipelines.cluster.client import gather_with_progress, open_cluster
from pipelines.prediction.library import (
    INDEX_DIRECTORY,
    PatternLibrary,
    match_library,
    match_result,
    open_library,
)
from pipelines.prediction.refinement import refine_predictions
from pipelines.prediction.result import PredictionResult
from pipelines.prediction.workflow import PredictedProfile, PredictError, predict_files
from pipelines.registry.registration import load_version

MAX_LOCAL_FILES = 100
"""Files that are predicted in this process, with a library match by default."""

_FILES_PER_TASK = 32
_MAX_REASONS = 10  # failures that are listed in full
_MAX_DRAWN = 20  # files that are predicted again for figures


@dataclass(frozen=True)
class PredictionTask:
    """What a worker computes for each file.

    Attributes
    ----------
    tracking_uri, version
        The model.
    options
        How files are read.
    refine
        Whether predictions are refined; workers then open the library for the starts themselves.
    store
        Address of the library; None for where the model was trained.
    draw
        Whether profiles are needed as arrays afterwards, for figures.
    """

    tracking_uri: str
    version: registry.ModelVersion
    options: ProfileOptions
    refine: bool = False
    store: str | None = None
    draw: bool = False


@dataclass(frozen=True, eq=False)
class WorkerPredictions:
    """Predictions of a worker's files.

    Attributes
    ----------
    results
        One per profile, in the order of the files.
    prepared, covered : shape (n, points)
        The profiles as the library match needs them.
    failures
        Errors by file.
    """

    results: list[PredictionResult] = field(default_factory=list)
    prepared: list[NDArray[np.float32]] = field(default_factory=list)
    covered: list[NDArray[np.bool_]] = field(default_factory=list)
    failures: dict[Path, Exception] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of files.

    Attributes
    ----------
    results
        One per profile, in the order of the files.
    failures
        Errors by file; each message names it.
    profiles
        The results as arrays, or the first of them, for figures; empty if they are not needed.
    """

    results: list[PredictionResult]
    failures: dict[Path, Exception]
    profiles: list[PredictedProfile] = field(default_factory=list)


def predict_anywhere(
    files: Sequence[Path],
    task: PredictionTask,
    model: Predictor,
    library: PatternLibrary | None,
    cluster: ClusterOptions,
    *,
    progress: bool = True,
) -> Predictions:
    """Predict files in this process, or many of them and on request on a cluster.

    Parameters
    ----------
    files, task
        Files, and what is computed for each.
    model
        The model, loaded in this process.
    library
        Stored patterns to compare the profiles with, or None to leave that out.
    cluster
        The cluster; without a name this process predicts up to :data:`MAX_LOCAL_FILES` files.
    progress
        Show a progress bar.
    """
    if cluster.cluster is None and len(files) <= MAX_LOCAL_FILES:
        return predict_here(files, task, model, library, progress=progress)
    with open_cluster(cluster) as client:
        predictions = predict_on_cluster(client, files, task, model, library, progress=progress)
    if not task.draw:
        return predictions
    readable = [file for file in files if file not in predictions.failures][:_MAX_DRAWN]
    profiles = predict_here(readable, task, model, library, progress=False).profiles
    return replace(predictions, profiles=profiles)


def predict_here(
    files: Sequence[Path],
    task: PredictionTask,
    model: Predictor,
    library: PatternLibrary | None = None,
    *,
    progress: bool = True,
) -> Predictions:
    """Predict files in this process; parameters as for :func:`predict_anywhere`."""
    predictions = predict_files(
        files, task.options, model, task.version.uri, library, progress=progress
    )
    profiles = predictions.profiles
    if task.refine and profiles:
        refiner = Refiner(model.campaign, cache=INDEX_DIRECTORY)
        profiles = refine_predictions(profiles, refiner, progress=progress)
    results = [profile.result() for profile in profiles]
    return Predictions(results, predictions.failures, profiles)


def raise_failures(failures: Mapping[Path, Exception], n_files: int) -> None:
    """Raise one error for the files without a prediction, out of ``n_files``.

    Raises
    ------
    PredictError
        Naming the files and reasons; of a single file its own error.
    """
    if len(failures) == n_files == 1:
        raise next(iter(failures.values()))
    if failures:
        reasons = [str(error) for error in failures.values()]
        rest = len(reasons) - _MAX_REASONS
        more = f" (and {rest:,} more)" if rest > 0 else ""
        raise PredictError(
            f"{len(reasons):,} of {n_files:,} files have no prediction; those of the others are "
            f"complete. {' '.join(reasons[:_MAX_REASONS])}{more}"
        )


def predict_on_cluster(
    client: Client,
    files: Sequence[Path],
    task: PredictionTask,
    model: Predictor,
    library: PatternLibrary | None = None,
    *,
    progress: bool = True,
) -> Predictions:
    """Predict files on a cluster; the library match is one pass over the store, in this process.

    Parameters as for :func:`predict_anywhere`; the workers have to be able to read the files.
    """
    absolute = {path.absolute(): path for path in files}
    paths = [path.absolute() for path in files]
    parts = [paths[low : low + _FILES_PER_TASK] for low in range(0, len(files), _FILES_PER_TASK)]
    futures = client.map(predict_on_worker, parts, task=task, pure=False)
    per_task: list[WorkerPredictions] = gather_with_progress(
        futures, [len(part) for part in parts], "Predicting", "files", quiet=not progress
    )
    results = [
        replace(result, file=str(absolute[Path(str(result.file))]))
        for predictions in per_task
        for result in predictions.results
    ]
    failures = {
        absolute[path]: error
        for predictions in per_task
        for path, error in predictions.failures.items()
    }
    if library is not None and results and not task.refine:
        prepared = [profile for predictions in per_task for profile in predictions.prepared]
        covered = [mask for predictions in per_task for mask in predictions.covered]
        matches = match_library(library, np.stack(prepared), np.stack(covered), progress=progress)
        tag, phases = model.provenance.data.tag, tuple(model.campaign.phases)
        results = [
            replace(result, library_match=match_result(matches, row, phases, tag))
            for row, result in enumerate(results)
        ]
    return Predictions(results, failures)


# A worker's files all belong to one model.
_loaded = lru_cache(maxsize=1)(load_version)


@lru_cache(maxsize=1)
def _refiner(tracking_uri: str, version: registry.ModelVersion) -> Refiner:
    return Refiner(_loaded(tracking_uri, version).campaign, cache=INDEX_DIRECTORY)


def predict_on_worker(files: Sequence[Path], task: PredictionTask) -> WorkerPredictions:
    """Predict some files: the task of a worker."""
    model = _loaded(task.tracking_uri, task.version)
    library = open_library(model, task.store) if task.refine else None
    predictions = predict_files(files, task.options, model, task.version.uri, library)
    profiles = predictions.profiles
    if task.refine:
        profiles = refine_predictions(profiles, _refiner(task.tracking_uri, task.version))
    return WorkerPredictions(
        [profile.result() for profile in profiles],
        [profile.measurement.prepared.astype(np.float32) for profile in profiles],
        [profile.measurement.gridded.covered for profile in profiles],
        predictions.failures,
    )
