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

from bragg_data.provenance import code_commit
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.library.compressed import CompressedLibrary
from bragg_models.targets import targets_of
from catalog.tracking import Tracking
from pipelines.cli.console import Progress, say
from pipelines.evaluation import summary
from pipelines.evaluation.baselines import LibraryMatch, baseline_models
from pipelines.evaluation.candidates import (
    Candidate,
    candidates,
    load_candidate,
    newest_trained_tag,
)
from pipelines.evaluation.names import INTEGER, MODELS, NEAREST, PAPER_CAMPAIGN, train_command
from pipelines.evaluation.scoring import EvaluatedModel, score_set
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
    bootstrap, limit
        Resamples of the samples, for 95 % intervals; largest number of samples of each test set.
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


def run_evaluation(
    store: Store, tracking: Tracking, settings: EvaluationSettings, *, quiet: bool = False
) -> summary.EvaluationReport:
    """Evaluate registered models on a data set of a store, and log the results to MLflow.

    Parameters
    ----------
    store, tracking
        The data sets, and the models.
    settings, quiet
        What is evaluated; print nothing.

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
        report = _evaluate(dataset, offgrid, tracking, chosen, settings, quiet=quiet)
        report.run_id = run.id
        run.log_metrics(report.metrics())
        run.log_text(report.markdown(), "results.md")
    return report


def _evaluate(
    dataset: xr.Dataset,
    offgrid: xr.Dataset | None,
    tracking: Tracking,
    chosen: Sequence[Candidate],
    settings: EvaluationSettings,
    *,
    quiet: bool = False,
) -> summary.EvaluationReport:
    """Score registered versions and baselines on the test sets, and time them."""
    labels = samples_of(dataset)
    targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
    tests = held_out_sets(dataset, offgrid, settings.limit)
    report = summary.EvaluationReport(
        summary.EvaluationFacts(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=code_commit(),
            campaign=str(dataset.attrs["campaign"]),
            data=_reference(dataset),
            offgrid=None if offgrid is None else _reference(offgrid),
            bootstrap=settings.bootstrap,
            limit=settings.limit,
            command=settings.command(str(dataset.attrs["tag"])),
        ),
        targets,
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
            report.commands |= {model.uri: model.command for model in loaded}
            for test in of_split:
                match = LibraryMatch(library, labels, test.training) if library else None
                baselines = baseline_models(labels, match, test)
                models = [*baselines, *loaded]
                scores = score_set(test, models, targets, resamples=settings.bootstrap, quiet=quiet)
                report.scores[test.name] = {
                    model.key: score for model, score in zip(models, scores, strict=True)
                }
                if match is not None:
                    report.proven[test.name] = match.n_proven / match.n_queries
            _time(report, dataset, [*baselines, *loaded])
    # In the order in which they are read.
    report.scores = {
        test: report.scores[test] for test in (*_SPLITS, "off-grid") if test in report.scores
    }
    return report


def _time(
    report: summary.EvaluationReport, dataset: xr.Dataset, models: Sequence[EvaluatedModel]
) -> None:
    """Time the library match and the registered models that are not timed yet."""
    profiles = dataset["intensity"][: summary.BATCH].values
    profiles = np.resize(profiles, (summary.BATCH, profiles.shape[1]))
    timed = {speed.model for speed in report.speed}
    report.speed += [
        summary.speed_of(model, profiles)
        for model in models
        if model.model not in timed and (model.uri or model.model == NEAREST)
    ]


def _missing(chosen: Sequence[Candidate], names: Sequence[str]) -> Iterator[summary.MissingModel]:
    """Yield the models that are not registered, of those that are requested."""
    registered = {(c.model, c.split) for c in chosen}
    for split in _SPLITS:
        for model in MODELS:
            requested = model != INTEGER and (not names or model in names)
            if requested and (model, split) not in registered:
                yield summary.MissingModel(model, split, train_command(model, split))


def _reference(dataset: xr.Dataset) -> summary.DatasetReference:
    return summary.DatasetReference(
        *(str(dataset.attrs[name]) for name in summary.DatasetReference._fields)
    )


def _library(dataset: xr.Dataset, directory: Path, *, quiet: bool) -> CompressedLibrary:
    every = np.ones(dataset.sizes["sample"], dtype=bool)
    with Progress("Reading the library", len(every), "patterns", quiet=quiet) as bar:
        return CompressedLibrary.build(dataset, every, directory, on_batch=bar.advance)
