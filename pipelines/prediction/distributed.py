"""Predictions of many files, a part of them at a time on each worker of a cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from bragg_data.arrays import Floats32, Mask
from bragg_data.crystallography.structure import Phase
from bragg_data.errors import first_line
from catalog import registry
from catalog.lineage_events import LineageDataset, LineageRun
from pipelines.cli.options import ClusterOptions, ProfileOptions
from pipelines.cluster.client import gather_with_progress, open_cluster
from pipelines.prediction.banks import predict_banks
from pipelines.prediction.combination import with_combined
from pipelines.prediction.decision import decide
from pipelines.prediction.files import PredictError
from pipelines.prediction.joint import with_banks
from pipelines.prediction.library import match_library, match_result
from pipelines.prediction.mixture import with_mixtures
from pipelines.prediction.result import PredictionResult
from pipelines.prediction.workflow import LoadedModel, PredictedProfile, predict_files
from pipelines.registry.registration import load_version

MAX_LOCAL_FILES = 100  # files that are predicted in this process, with a library match by default
_FILES_PER_TASK = 32
_MAX_REASONS = 10  # failures that are listed in full
_MAX_NAMED = 1000  # files that lineage events name
_MAX_DRAWN = 20  # files that are predicted again for figures

_Query = tuple[Floats32, Mask]  # a profile and what of it was measured


def predict_with_lineage(
    files: Sequence[Path],
    options: ProfileOptions,
    models: Sequence[LoadedModel],
    cluster: ClusterOptions,
    *,
    further: Sequence[Phase],
    **how: bool,
) -> tuple[list[PredictionResult], list[PredictedProfile], dict[Path, Exception]]:
    """As :func:`predict_anywhere`, with lineage events that name the models and the files."""
    inputs = [registry.lineage_of(model.tracking_uri, model.version) for model in models]
    inputs += [LineageDataset(str(file.absolute())) for file in files[:_MAX_NAMED]]
    with LineageRun("predict", inputs) as run:
        predicted = predict_anywhere(files, options, models, cluster, further=further, **how)
        run.error = next((first_line(error) for error in predicted[2].values()), "")
    return predicted


def predict_anywhere(
    files: Sequence[Path],
    options: ProfileOptions,
    models: Sequence[LoadedModel],
    cluster: ClusterOptions,
    *,
    refine: bool = False,
    draw: bool = False,
    further: Sequence[Phase] = (),
    same_sample: bool = False,
) -> tuple[list[PredictionResult], list[PredictedProfile], dict[Path, Exception]]:
    """Predict files in this process, or many of them and on request on a cluster.

    If no cluster is named, this process predicts up to :data:`MAX_LOCAL_FILES` files. Workers have
    to be able to read the files. Returned are the results in the order of the files; the same, or
    of many the first to ``draw``, as arrays; and the errors of files, which name their file. Of
    several models each predicts the profiles of its bank, in this process, where all banks of
    ``same_sample`` are predicted, too. Refined samples that no phase explains by itself are
    searched for several; with ``further`` all are, for these, too.
    """
    few = cluster.cluster is None and len(files) <= MAX_LOCAL_FILES
    if few or same_sample or len(models) > 1:
        profiles, failures = predict_here(
            files, options, models, refine=refine, further=further, same_sample=same_sample
        )
        return [profile.result() for profile in profiles], profiles, failures
    (model,) = models
    absolute = {path.absolute(): path for path in files}
    paths = [path.absolute() for path in files]
    parts = [paths[low : low + _FILES_PER_TASK] for low in range(0, len(files), _FILES_PER_TASK)]
    # Of refinements the workers open the library for the starts themselves.
    where = model.tracking_uri, model.version, model.store, refine and model.has_store
    with open_cluster(cluster) as client:
        futures = client.map(
            _predict_on_worker,
            parts,
            options=options,
            where=where,
            refine=refine,
            further=tuple(further),
            pure=False,
        )
        sizes, quiet = [len(part) for part in parts], not model.progress
        computed = gather_with_progress(futures, sizes, "Predicting", "files", quiet=quiet)
    results: list[PredictionResult] = []
    queries: list[_Query] = []
    failures = {}
    for of_part, queries_of_part, failures_of_part in computed:
        results += [replace(r, file=str(absolute[Path(str(r.file))])) for r in of_part]
        failures |= {absolute[path]: error for path, error in failures_of_part.items()}
        queries += queries_of_part
    # The library match is one pass over the store, in this process.
    if results and not refine and model.library is not None:
        prepared, covered = map(np.stack, zip(*queries, strict=True))
        matches = match_library(model.library, prepared, covered, progress=model.progress)
        predictor = model.predictor
        tag, phases = predictor.provenance.data.tag, tuple(predictor.campaign.phases)
        results = [
            decide(result, match_result(matches, row, phases, tag))
            for row, result in enumerate(results)
        ]
    drawn = [file for file in files if file not in failures][:_MAX_DRAWN] if draw else []
    profiles, _ = predict_files(drawn, options, model, refine=refine)
    profiles = _with_sample(profiles, options.instrument, further, refine=refine)
    return with_combined(results), profiles, failures


def predict_here(
    files: Sequence[Path],
    options: ProfileOptions,
    models: Sequence[LoadedModel],
    *,
    refine: bool,
    further: Sequence[Phase] = (),
    same_sample: bool = False,
) -> tuple[list[PredictedProfile], dict[Path, Exception]]:
    """As :func:`predict_anywhere`, in this process; the profiles as arrays, and the errors."""
    if len(models) > 1:
        profiles, failures = predict_banks(files, options, models, refine=refine)
    else:
        profiles, failures = predict_files(files, options, models[0], refine=refine)
    if same_sample and len(files) > 1:
        name = " + ".join(map(str, files))
        profiles = [replace(profile, of_sample=name) for profile in profiles]
    return _with_sample(profiles, options.instrument, further, refine=refine), failures


def _with_sample(
    profiles: Sequence[PredictedProfile],
    instrument: Path | None,
    further: Sequence[Phase],
    *,
    refine: bool,
) -> list[PredictedProfile]:
    """Return profiles with what all banks of their samples show."""
    complete = with_banks(profiles, instrument, refine=refine)
    return with_mixtures(complete, instrument, further) if refine else complete


def raise_failures(failures: Mapping[Path, Exception], n_files: int) -> None:
    """Raise a `PredictError` for the files without a prediction, or that of the only file."""
    if len(failures) == n_files == 1:
        raise next(iter(failures.values()))
    if failures:
        reasons = [str(error) for error in failures.values()]
        rest = len(reasons) - _MAX_REASONS
        more = f" (and {rest:,} more)" if rest > 0 else ""
        raise PredictError(
            f"{len(reasons):,} of {n_files:,} files have no prediction; those of the further are "
            f"complete. {' '.join(reasons[:_MAX_REASONS])}{more}"
        )


@lru_cache(maxsize=1)  # a worker's files all belong to one model
def _model_of_worker(
    tracking_uri: str, version: registry.ModelVersion, store: str | None, use_library: bool
) -> LoadedModel:
    predictor = load_version(tracking_uri, version)
    return LoadedModel(predictor, version, tracking_uri, store, use_library)


def _predict_on_worker(
    files: Sequence[Path],
    options: ProfileOptions,
    where: tuple[str, registry.ModelVersion, str | None, bool],
    refine: bool,
    further: Sequence[Phase],
) -> tuple[list[PredictionResult], list[_Query], dict[Path, Exception]]:
    """Return predictions of some files, the profiles for the library match, and the failures."""
    model = _model_of_worker(*where)
    profiles, failures = predict_files(files, options, model, refine=refine)
    if refine:  # otherwise the library match, which comes later, has a part in it
        profiles = _with_sample(profiles, options.instrument, further, refine=True)
    measurements = [profile.measurement for profile in profiles]
    queries = [(m.prepared.astype(np.float32), m.gridded.covered) for m in measurements]
    return [profile.result() for profile in profiles], queries, failures
