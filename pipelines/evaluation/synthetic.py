"""Evaluation of registered models on synthetic test sets: the paper's Tables II and III."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from bragg_data.arrays import Mask
from bragg_data.campaign import Samples
from bragg_data.provenance import code_commit
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.library.compressed import CompressedLibrary, Neighbours, mean_of_nearest
from bragg_models.targets import targets_of
from catalog.tracking import Tracking
from pipelines.cli.console import Progress, command_line, say
from pipelines.evaluation import candidates, scoring
from pipelines.evaluation import names as known
from pipelines.evaluation.scoring import SPLITS, EvaluatedModel
from pipelines.evaluation.summary import BATCH, EvaluationReport, speed_of

# Tag of the paper's campaign off its grid: cells drawn continuously in the same ranges.
OFF_GRID = "batio3-offgrid-v1"

_NEIGHBOURS = 4  # nearest patterns whose cells are averaged, of those with the nearest's phase


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and how."""

    data: str | None = None  # tag; None for the newest that a model was trained on
    offgrid: str | None = None  # tag of cells between the grid's points; None for OFF_GRID
    models: tuple[str, ...] = ()  # names or addresses; all models if empty
    bootstrap: int = 1000  # resamples of the samples, for 95 % intervals
    limit: int | None = None  # largest number of samples of each test set
    library: bool = True  # whether the library match is among the baselines

    def command(self, tag: str) -> str:
        """Return the command that repeats the evaluation of a data set's tag."""
        options = [("--data", tag), ("--offgrid", self.offgrid), ("--limit", self.limit)]
        options += [("--models", name) for name in self.models] + [("--bootstrap", self.bootstrap)]
        words = [word for option in options if option[1] is not None for word in option]
        return command_line("evaluate", *words, *([] if self.library else ["--no-library"]))


def run_evaluation(
    store: Store, tracking: Tracking, settings: EvaluationSettings, *, quiet: bool = False
) -> EvaluationReport:
    """Evaluate registered models on a data set of a store, and log the results to MLflow.

    Raises `EvaluateError` if there is nothing to evaluate, and `StoreError` or `ModelError` if a
    data set or a model does not exist.
    """
    dataset = store.open(settings.data or candidates.newest_trained_tag(store, tracking))
    tag = settings.offgrid
    if tag is None and dataset.attrs["campaign"] == known.PAPER_CAMPAIGN:
        tag = OFF_GRID if OFF_GRID in {t.name for t in store.tags()} else None
    offgrid = None if tag is None else store.open(tag)
    chosen = candidates.choose_candidates(tracking, dataset, settings.models)
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
    chosen: Sequence[candidates.Candidate],
    settings: EvaluationSettings,
    *,
    quiet: bool = False,
) -> EvaluationReport:
    """Score registered versions and baselines on the test sets, and time them."""
    labels = samples_of(dataset)
    targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
    tests = scoring.held_out_sets(dataset, offgrid, settings.limit)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "campaign": str(dataset.attrs["campaign"]),
        "data": _reference(dataset),
        "offgrid": None if offgrid is None else _reference(offgrid),
        "bootstrap": settings.bootstrap,
        "limit": settings.limit,
        "command": settings.command(str(dataset.attrs["tag"])),
    }
    titles = {test.name: test.title for test in tests}
    report = EvaluationReport(facts, targets, titles, _missing(chosen, settings.models))
    profiles = dataset["intensity"][:BATCH].values
    profiles = np.resize(profiles, (BATCH, profiles.shape[1]))
    with tempfile.TemporaryDirectory(prefix="bragg-library-") as temporary:
        library = _library(dataset, Path(temporary), quiet=quiet) if settings.library else None
        # The models of one split at a time: all forests together would fill the memory.
        for split in SPLITS:
            of_split = [test for test in tests if test.split == split]
            training = of_split[0].training
            loaded = [
                candidates.load_candidate(c, tracking, targets, labels, training)
                for c in chosen
                if c.split == split
            ]
            report.commands |= {model.uri: model.command for model in loaded}
            for test in of_split:
                match = LibraryMatch(library, labels, test.training) if library else None
                models = [*_baselines(labels, match, test.training), *loaded]
                resamples = settings.bootstrap
                scores = scoring.score_set(test, models, targets, resamples=resamples, quiet=quiet)
                report.scores[test.name] = {
                    model.key: score for model, score in zip(models, scores, strict=True)
                }
                if match is not None:
                    report.proven[test.name] = match.n_proven / match.n_queries
            timed = {speed.model for speed in report.speed}
            report.speed += [
                speed_of(model, profiles)
                for model in models
                if model.model not in timed and (model.uri or model.model == known.NEAREST)
            ]
    # In the order in which they are read.
    report.scores = {name: report.scores[name] for name in titles}
    return report


class LibraryMatch:
    """The patterns that the models of a test set may be trained on, as a baseline.

    ``library`` and ``labels`` are all patterns of a data set, of which ``training`` (n,) are used.
    """

    def __init__(self, library: CompressedLibrary, labels: Samples, training: Mask) -> None:
        self.library, self.labels = library.only(training), labels
        self.size = library.full.nbytes + library.compressed.nbytes
        self.n_queries = self.n_proven = 0
        self._last: tuple[scoring.Profiles, Neighbours] | None = None

    def predict(
        self, profiles: scoring.Profiles, *, count: int
    ) -> tuple[scoring.Phases, scoring.Cells]:
        """Return the phases of the nearest patterns, and the mean cells of ``count`` of them."""
        # Different counts are evaluated on the same profiles in turn.
        if self._last is None or self._last[0] is not profiles:
            nearest = self.library.nearest(profiles, min(_NEIGHBOURS, len(self.library.rows)))
            self._last = profiles, nearest
            self.n_queries += len(profiles)
            self.n_proven += int(nearest.proven.sum())
        return mean_of_nearest(self._last[1], self.labels.phase, self.labels.cells, count)


def _baselines(labels: Samples, match: LibraryMatch | None, training: Mask) -> list[EvaluatedModel]:
    """Return the baselines: a constant, and the nearest stored patterns if there is a match."""
    answer = scoring.constant_answer(labels.phase[training], labels.cells[training])
    models = [scoring.constant_model(known.CONSTANT, "always the mean cell", *answer)]
    if match is not None:
        for key, label, count in (
            (known.NEAREST, "library, nearest", 1),
            (known.NEAREST_MEAN, f"library, mean of {_NEIGHBOURS}", _NEIGHBOURS),
        ):
            predict = partial(match.predict, count=count)
            models.append(EvaluatedModel(key, key, label, predict, size=match.size))
    return models


def _missing(chosen: Sequence[candidates.Candidate], names: Sequence[str]) -> list[dict[str, str]]:
    """Return the models that are requested and not registered, and the commands to train them."""
    registered = {(c.model, c.split) for c in chosen}
    return [
        {"model": model, "split": split, "command": known.train_command(model, split)}
        for split in SPLITS
        for model in known.MODELS
        if model != known.INTEGER and (not names or model in names)
        if (model, split) not in registered
    ]


def _reference(dataset: xr.Dataset) -> dict[str, str]:
    return {key: str(dataset.attrs[key]) for key in ("tag", "snapshot_id", "content_hash")}


def _library(dataset: xr.Dataset, directory: Path, *, quiet: bool) -> CompressedLibrary:
    every = np.ones(dataset.sizes["sample"], dtype=bool)
    with Progress("Reading the library", len(every), "patterns", quiet=quiet) as bar:
        return CompressedLibrary.build(dataset, every, directory, on_batch=bar.advance)
