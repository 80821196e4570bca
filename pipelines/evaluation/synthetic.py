"""Evaluation of registered models on synthetic test sets: the paper's Tables II and III."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import xarray as xr

from bragg_data.campaign import Samples
from bragg_data.provenance import code_commit
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.library.compressed import CompressedLibrary
from bragg_models.targets import Targets, targets_of
from catalog.tracking import Tracking
from pipelines.cli.console import Progress, say
from pipelines.evaluation.baselines import LibraryMatch, baseline_models
from pipelines.evaluation.candidates import (
    Candidate,
    LoadedModel,
    candidates,
    load_candidate,
    newest_trained_tag,
    training_command,
)
from pipelines.evaluation.model_names import INTEGER, MODELS, NEAREST, train_command
from pipelines.evaluation.paper_numbers import PAPER_CAMPAIGN
from pipelines.evaluation.scoring import EvaluatedModel, score_set
from pipelines.evaluation.summary import (
    BATCH,
    DatasetReference,
    EvaluationFacts,
    EvaluationReport,
    MissingModel,
    count_numbers,
    speed_of,
)
from pipelines.evaluation.test_sets import held_out_sets

OFF_GRID = "batio3-offgrid-v1"
"""Tag of the paper's campaign off its grid: cells drawn continuously in the same ranges."""

_SPLITS = ("random", "blocked")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and how.

    Attributes
    ----------
    data
        Tag of the data set; None for the newest that a model was trained on.
    offgrid
        Tag of a data set of cells between the grid's points; None for :data:`OFF_GRID`.
    models
        Names or addresses; all models if empty.
    bootstrap
        Resamples of the samples, for 95 % intervals.
    limit
        Largest number of samples of each test set.
    library
        Whether the library match is among the baselines.
    """

    data: str | None = None
    offgrid: str | None = None
    models: tuple[str, ...] = ()
    bootstrap: int = 1000
    limit: int | None = None
    library: bool = True

    def command(self, tag: str) -> str:
        """Return the command that repeats the evaluation of a data set's tag."""
        options = [("--data", tag), ("--offgrid", self.offgrid), ("--limit", self.limit)]
        options += [("--models", name) for name in self.models] + [("--bootstrap", self.bootstrap)]
        texts = [
            f"{name} {shlex.quote(str(value))}" for name, value in options if value is not None
        ]
        return " ".join(
            ["python -m pipelines.evaluate", *texts, *([] if self.library else ["--no-library"])]
        )


@dataclass(frozen=True)
class LoggedEvaluation:
    """A finished evaluation: the report, its phases and parameters, and the MLflow run's id."""

    report: EvaluationReport
    targets: Targets
    run_id: str


def run_evaluation(
    store: Store, tracking: Tracking, settings: EvaluationSettings, *, quiet: bool = False
) -> LoggedEvaluation:
    """Evaluate registered models on a data set of a store, and log the results to MLflow.

    Parameters
    ----------
    store, tracking
        The data sets, and the models.
    settings
        What is evaluated.
    quiet
        Print nothing.

    Raises
    ------
    EvaluateError
        If there is nothing to evaluate.
    StoreError, ModelError
        If a data set or a model does not exist.
    """
    dataset = store.open(settings.data or newest_trained_tag(store, tracking))
    tag = settings.offgrid
    if tag is None and dataset.attrs["campaign"] == PAPER_CAMPAIGN:
        tag = OFF_GRID if OFF_GRID in {t.name for t in store.tags()} else None
    offgrid = None if tag is None else store.open(tag)
    chosen = candidates(tracking, dataset, settings.models)
    if not quiet:
        for c in chosen:
            say(f"{c.version.uri}: {c.label}, preset {c.preset}, {c.split} split")
        if offgrid is None:
            say("No data set off the grid: give its tag with --offgrid.")
    name = f"evaluation {datetime.now(UTC).strftime('%Y-%m-%d %H:%M')}"
    tags = {key: str(dataset.attrs[key]) for key in ("snapshot_id", "content_hash")}
    tags |= {
        "data": str(dataset.attrs["tag"]),
        "code_commit": code_commit(),
        "mlflow.source.name": "pipelines.evaluate",
    }
    with tracking.run(str(dataset.attrs["campaign"]), name, tags) as run:
        run.log_parameters(
            {
                "models": [c.version.uri for c in chosen],
                "bootstrap": settings.bootstrap,
                "limit": settings.limit,
                "cores": os.cpu_count() or 0,
            }
        )
        run.log_dataset(dataset, "test")
        if offgrid is not None:
            run.log_dataset(offgrid, "test off the grid")
        report = evaluate(dataset, offgrid, tracking, chosen, settings, quiet=quiet)
        targets = _targets(dataset, samples_of(dataset))
        run.log_metrics(report.metrics())
        run.log_text(report.markdown(targets), "results.md")
    return LoggedEvaluation(report, targets, run.id)


def evaluate(
    dataset: xr.Dataset,
    offgrid: xr.Dataset | None,
    tracking: Tracking,
    chosen: Sequence[Candidate],
    settings: EvaluationSettings,
    *,
    quiet: bool = False,
) -> EvaluationReport:
    """Score registered versions and baselines on the test sets, and time them.

    Parameters
    ----------
    dataset, offgrid
        The data set whose splits are scored, and one of cells between its grid's points.
    tracking
        Where the versions are registered.
    chosen
        The versions.
    settings
        Size of the test sets and of the bootstrap.
    quiet
        Show no progress.
    """
    labels = samples_of(dataset)
    targets = _targets(dataset, labels)
    tests = held_out_sets(dataset, offgrid, settings.limit)
    report = EvaluationReport(
        EvaluationFacts(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=code_commit(),
            campaign=str(dataset.attrs["campaign"]),
            data=DatasetReference.of(dataset),
            offgrid=None if offgrid is None else DatasetReference.of(offgrid),
            bootstrap=settings.bootstrap,
            limit=settings.limit,
            command=settings.command(str(dataset.attrs["tag"])),
        ),
        titles={test.name: test.title for test in tests},
        missing=list(_missing(chosen, settings.models)),
    )
    with tempfile.TemporaryDirectory(prefix="bragg-library-") as temporary:
        library = _library(dataset, Path(temporary), quiet=quiet) if settings.library else None
        # The models of one split at a time: all forests together would fill the memory.
        for split in _SPLITS:
            of_split = [test for test in tests if test.split == split]
            training = of_split[0].training
            loaded = [
                load_candidate(c, tracking, targets, labels, training)
                for c in chosen
                if c.split == split
            ]
            report.commands |= {
                m.evaluated.uri: training_command(m.predictor.provenance) for m in loaded
            }
            for test in of_split:
                match = None
                if library is not None:
                    match = LibraryMatch(library.only(test.training), labels)
                baselines = baseline_models(labels, match, test)
                models = [*baselines, *(m.evaluated for m in loaded)]
                scores = score_set(test, models, targets, resamples=settings.bootstrap, quiet=quiet)
                report.scores[test.name] = {
                    model.key: score for model, score in zip(models, scores, strict=True)
                }
                if match is not None:
                    report.proven[test.name] = match.n_proven / match.n_queries
            _time(report, dataset, loaded, baselines, library)
    # In the order in which they are read.
    report.scores = {
        test: report.scores[test] for test in (*_SPLITS, "off-grid") if test in report.scores
    }
    return report


def _time(
    report: EvaluationReport,
    dataset: xr.Dataset,
    loaded: Sequence[LoadedModel],
    baselines: Sequence[EvaluatedModel],
    library: CompressedLibrary | None,
) -> None:
    """Time the models that are not timed yet."""
    profiles = dataset["intensity"][:BATCH].values
    profiles = np.resize(profiles, (BATCH, profiles.shape[1]))
    timed = {speed.model for speed in report.speed}
    if library is not None and NEAREST not in timed:
        nearest = next(model for model in baselines if model.model == NEAREST)
        size = library.full.nbytes + library.compressed.nbytes
        report.speed.append(speed_of(nearest, profiles, size, (0, 0)))
    report.speed += [
        speed_of(m.evaluated, profiles, m.size, count_numbers(m.predictor))
        for m in loaded
        if m.evaluated.model not in timed
    ]


def _missing(chosen: Sequence[Candidate], names: Sequence[str]) -> Iterator[MissingModel]:
    """Yield the models that are not registered, of those that are requested."""
    registered = {(c.model, c.split) for c in chosen}
    for split in _SPLITS:
        for model in MODELS:
            requested = model != INTEGER and (not names or model in names)
            if requested and (model, split) not in registered:
                yield MissingModel(model, split, train_command(model, split))


def _targets(dataset: xr.Dataset, labels: Samples) -> Targets:
    return targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)


def _library(dataset: xr.Dataset, directory: Path, *, quiet: bool) -> CompressedLibrary:
    every = np.ones(dataset.sizes["sample"], dtype=bool)
    with Progress("Reading the library", len(every), "patterns", quiet=quiet) as bar:
        return CompressedLibrary.build(dataset, every, directory, on_batch=bar.advance)
