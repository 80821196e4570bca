"""Score the registered models on three test sets, beside the paper's numbers and baselines."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import xarray as xr
from numpy.typing import NDArray

from bragg_data.campaign import Samples
from bragg_data.model_provenance import ModelProvenance
from bragg_data.provenance import code_commit
from bragg_data.splits import Part
from bragg_data.store.repository import DEFAULT_URI, Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.library.compressed import CompressedLibrary
from bragg_models.predictors import Predictor, load_predictor
from bragg_models.targets import Targets, targets_of
from catalog import registry
from catalog.model_files import downloaded_model
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import Progress, duration, next_commands, run, say
from pipelines.evaluation.scoring import (
    NEAREST,
    SPLIT,
    Answers,
    Cells,
    LibraryMatch,
    Phases,
    baselines,
    held_out_sets,
    part_of,
    score_set,
)
from pipelines.evaluation.summary import (
    BATCH,
    CLASS_CONDITIONAL,
    CLASSIFIER,
    INTEGER,
    LABELS,
    MODELS,
    ROBUST,
    Report,
    numbers_in,
    speed_of,
    train_command,
)
from pipelines.evaluation.tables import EQUATION_1, PAPER_CAMPAIGN

app = typer.Typer(add_completion=False)

OFF_GRID = "batio3-offgrid-v1"
"""Tag of the paper's campaign off its grid: cells drawn continuously in the same ranges."""


class EvaluateError(ValueError):
    """An evaluation that cannot be made as asked."""


@dataclass(frozen=True)
class Candidate:
    """A registered version that is to be scored."""

    version: registry.ModelVersion
    several: bool = False

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.version.tags.get("model", self.version.name)

    @property
    def split(self) -> str:
        """Name of the split whose training part it learnt from."""
        return self.version.tags.get("split", "random").partition(",")[0]

    @property
    def preset(self) -> str:
        """Name of the preset."""
        return self.version.tags.get("preset", "")

    @property
    def key(self) -> str:
        """What its scores are listed under."""
        return f"{self.model}-v{self.version.version}" if self.several else self.model

    @property
    def label(self) -> str:
        """What is shown."""
        label = LABELS.get(self.model, self.model)
        return f"{label} v{self.version.version}" if self.several else label


def candidates(
    tracking: Tracking, dataset: xr.Dataset, asked: Sequence[str] = ()
) -> list[Candidate]:
    """Choose the versions to score: of each model and split the newest one on this data set.

    Parameters
    ----------
    tracking
        Where they are registered: under the campaign's name, and that name with ``-classifier``.
    dataset
        Its content has to be what they were trained on, or the test samples were not kept from
        them.
    asked
        Names of models, or addresses of versions; all models if empty.

    Raises
    ------
    EvaluateError
        If a name is not known, a version was trained on other data, or there is nothing to score.
    ModelError
        If there is no such version.
    """
    campaign, content = dataset.attrs["campaign"], dataset.attrs["content_hash"]
    names = dict.fromkeys(registry.registered_name(campaign, model) for model in (*MODELS, ROBUST))
    registered = [v for name in names for v in registry.versions(tracking, name)]
    of_this = [Candidate(v) for v in registered if v.tags.get("content_hash") == content]
    newest: dict[tuple[str, str], Candidate] = {}
    for one in of_this:
        newest.setdefault((one.model, one.split), one)
    if not asked:
        chosen = sorted(newest.values(), key=lambda c: _order(c.model))
    else:
        chosen = []
        for name in asked:
            if name.startswith("models:"):
                version = registry.find(tracking, name)
                if version.tags.get("content_hash") != content:
                    raise EvaluateError(
                        f"{name} was trained on {version.tags.get('data', 'unknown data')}, whose "
                        f"content is not that of {dataset.attrs['tag']}. Name its own data set "
                        f"with --data."
                    )
                chosen.append(Candidate(version))
            elif name in MODELS or any(name == one.model for one in of_this):
                chosen += [one for one in newest.values() if one.model == name]
            else:
                raise EvaluateError(
                    f"There is no model '{name}'. Choose of {', '.join(MODELS)}, or give an "
                    f"address such as models:/{campaign}/1."
                )
    if not chosen:
        what = " or ".join(asked) if asked else "model"
        raise EvaluateError(
            f"No {what} trained on {dataset.attrs['tag']} is registered in {tracking.uri}. Train "
            f"one first: {train_command(asked[0] if asked else 'all', 'random')} --data "
            f"{dataset.attrs['tag']}"
        )
    chosen = list({one.version.uri: one for one in chosen}.values())
    places = [(one.model, one.split) for one in chosen]
    return [
        Candidate(one.version, places.count(place) > 1)
        for one, place in zip(chosen, places, strict=True)
    ]


def _order(model: str) -> int:
    return MODELS.index(model) if model in MODELS else len(MODELS)


@dataclass(frozen=True)
class Loaded:
    """A registered version, ready to answer, and its size on disk in bytes."""

    answers: Answers
    predictor: Predictor
    size: int


def load(
    candidate: Candidate,
    tracking: Tracking,
    targets: Targets,
    labels: Samples,
    training: NDArray[np.bool_],
) -> Loaded:
    """Fetch a registered version.

    Parameters
    ----------
    candidate, tracking
        Which, and where it is.
    targets, labels
        Of the data set, with n samples.
    training : shape (n,)
        What it may have learnt from.

    Raises
    ------
    EvaluateError
        If it has other phases, or may have learnt from the test samples.
    ModelError, PredictorError
        If it cannot be read.
    """
    with downloaded_model(tracking.uri, candidate.version) as directory:
        predictor = load_predictor(directory)
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    uri, split = candidate.version.uri, predictor.provenance.split
    if predictor.targets.names != targets.names:
        raise EvaluateError(
            f"{uri} knows the phases {', '.join(predictor.targets.names)}; the data set has "
            f"{', '.join(targets.names)}. Leave it out by naming others with --models."
        )
    if (part_of(candidate.split, labels, split.to_json()) != Part.test)[~training].any():
        raise EvaluateError(
            f"{uri} was trained on a split ({split.to_json()}) that does not keep these test "
            f"samples from it ({SPLIT}). Leave it out by naming others with --models."
        )
    return Loaded(answers_of(candidate, predictor), predictor, size)


def training_command(provenance: ModelProvenance) -> str:
    """Return the command that trains such a model again."""
    order = provenance.order
    options = [("--data", provenance.data.tag), ("--preset", provenance.preset),
               ("--seed", provenance.seed)]  # fmt: skip
    options += [("--extra-data", tag) for tag in provenance.extra_data]
    options += [(f"--{name.replace('_', '-')}", order[name])
                for name in ("epochs", "max_seconds") if order.get(name) is not None]  # fmt: skip
    # A part of the guided network is registered beside it under a name of its own.
    model = order.get("model", provenance.model)
    written = [f"{option} {shlex.quote(str(value))}" for option, value in options]
    return " ".join([train_command(model, provenance.split.name), *written])


def answers_of(candidate: Candidate, predictor: Predictor) -> Answers:
    """Return a registered version as one who answers."""

    def ask(profiles: NDArray[np.float32]) -> tuple[Phases, Cells | None]:
        prediction = predictor.predict(profiles)
        return prediction.phase, None if candidate.model == CLASSIFIER else prediction.cells

    def given(profiles: NDArray[np.float32], phase: Phases) -> Cells:
        return predictor.predict(profiles, phase=phase).cells

    return Answers(
        candidate.model, candidate.key, candidate.label, ask,
        given if candidate.model in CLASS_CONDITIONAL else None,
        candidate.version.uri, candidate.preset,
    )  # fmt: skip


def evaluate(
    dataset: xr.Dataset,
    offgrid: xr.Dataset | None,
    tracking: Tracking,
    chosen: Sequence[Candidate],
    *,
    wanted: Sequence[str] = MODELS,
    resamples: int = 1000,
    limit: int | None = None,
    library: bool = True,
    quiet: bool = False,
    command: str = "python -m pipelines.evaluate",
) -> Report:
    """Score registered versions and baselines on the test sets, and time them.

    Parameters
    ----------
    dataset, offgrid
        The data set whose splits are scored, and one of cells between its grid's points.
    tracking
        Where the versions are.
    chosen
        The versions.
    wanted
        Models that are missed where no version is among the chosen ones.
    resamples
        Of the bootstrap.
    limit
        Samples per test set.
    library
        Whether the library match is among the baselines.
    quiet
        Show no progress.
    command
        What to type to do this again.
    """
    labels = samples_of(dataset)
    targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
    tests = held_out_sets(dataset, offgrid, limit)
    report = Report(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": code_commit(),
            "campaign": dataset.attrs["campaign"],
            "data": _identity(dataset),
            "offgrid": None if offgrid is None else _identity(offgrid),
            "bootstrap": resamples,
            "limit": limit,
            "command": command,
        },
        titles={test.name: test.title for test in tests},
    )
    have = {(one.model, one.split) for one in chosen}
    for split in ("random", "blocked"):
        report.missing += [
            (model, split, train_command(model, split))
            for model in wanted
            if model != INTEGER and (model, split) not in have
        ]
    profiles = dataset["intensity"][:BATCH].values
    profiles = np.resize(profiles, (BATCH, profiles.shape[1]))
    with tempfile.TemporaryDirectory(prefix="bragg-library-") as temporary:
        stored = _library(dataset, Path(temporary), quiet=quiet) if library else None
        # The models of one split at a time: all forests together would fill the memory.
        for split in ("random", "blocked"):
            of_split = [test for test in tests if test.split == split]
            loaded = [
                load(one, tracking, targets, labels, of_split[0].training)
                for one in chosen if one.split == split
            ]  # fmt: skip
            report.commands |= {
                one.answers.uri: training_command(one.predictor.provenance) for one in loaded
            }
            for test in of_split:
                match = None if stored is None else LibraryMatch(
                    stored.only(test.training), labels
                )  # fmt: skip
                first = baselines(labels, match, test)
                asked = [*first, *(one.answers for one in loaded)]
                scores = score_set(test, asked, targets, resamples=resamples, quiet=quiet)
                report.scores[test.name] = {
                    one.key: score for one, score in zip(asked, scores, strict=True)
                }
                if match is not None:
                    report.proven[test.name] = match.proven / match.asked
            known = {speed.model for speed in report.speed}
            if stored is not None and NEAREST not in known:
                nearest = next(one for one in first if one.model == NEAREST)
                size = stored.full.nbytes + stored.compressed.nbytes
                report.speed.append(speed_of(nearest, profiles, size, (0, 0)))
            report.speed += [
                speed_of(one.answers, profiles, one.size, numbers_in(one.predictor))
                for one in loaded if one.answers.model not in known
            ]  # fmt: skip
    # In the order in which they are read.
    report.scores = {t: report.scores[t] for t in ("random", "blocked", "off-grid")
                     if t in report.scores}  # fmt: skip
    return report


def _identity(dataset: xr.Dataset) -> dict[str, str]:
    return {key: str(dataset.attrs[key]) for key in ("tag", "snapshot_id", "content_hash")}


def _library(dataset: xr.Dataset, directory: Path, *, quiet: bool) -> CompressedLibrary:
    every = np.ones(dataset.sizes["sample"], dtype=bool)
    with Progress("Reading the library", len(every), "patterns", quiet=quiet) as bar:
        return CompressedLibrary.build(dataset, every, directory, on_batch=bar.advance)


def data_tag(store: Store, tracking: Tracking) -> str:
    """Return the newest tag of a store that a registered model was trained on.

    Raises
    ------
    EvaluateError
        If there is none.
    """
    trained = {
        version.tags.get("data") for name in registry.names(tracking)
        for version in registry.versions(tracking, name)
    }  # fmt: skip
    tags = [tag for tag in store.tags() if tag.name in trained]
    if not tags:
        raise EvaluateError(
            f"No model in {tracking.uri} was trained on a data set of {store.uri}. Train one "
            f"first: python -m pipelines.train"
        )
    return max(tags, key=lambda tag: tag.written_at).name


@app.command()
def main(
    data: Annotated[
        str | None,
        typer.Option(help="Tag of the data set; the newest that a model was trained on."),
    ] = None,
    offgrid: Annotated[
        str | None,
        typer.Option(help=f"Tag of a data set of cells between; {OFF_GRID} if it is there."),
    ] = None,
    models_: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="NAME_OR_URI",
            help="A model's name (its newest version of each split) or models:/NAME/VERSION; "
            "again for more. All by default.",
        ),
    ] = None,
    store: Annotated[str, typer.Option(help="Path or file:// URI of the store.")] = DEFAULT_URI,
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else, for scripts.")
    ] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown, too.")
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=2, help="Resamples of the samples, for 95 % intervals.")
    ] = 1000,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many samples of each test set.")
    ] = None,
    library: Annotated[
        bool, typer.Option(help="Compare with the library match, which takes a few minutes.")
    ] = True,
) -> None:
    """Score the registered models on three test sets, beside the paper's numbers and baselines.

    The test sets are the paper's random fifth, a fifth held out in blocks, and cells between the
    grid's points. Of each model the newest version of each split is scored.
    """
    began = time.monotonic()
    repository, place = Store(store), Tracking(tracking)
    dataset = repository.open(data or data_tag(repository, place))
    if offgrid is None and OFF_GRID in {tag.name for tag in repository.tags()}:
        offgrid = OFF_GRID if dataset.attrs["campaign"] == PAPER_CAMPAIGN else None
    between = None if offgrid is None else repository.open(offgrid)
    asked = tuple(dict.fromkeys(models_ or ()))
    chosen = candidates(place, dataset, asked)
    named = [("--data", dataset.attrs["tag"]), ("--offgrid", offgrid), ("--limit", limit)]
    named += [("--models", name) for name in asked] + [("--bootstrap", bootstrap)]
    command = " ".join(
        ["python -m pipelines.evaluate"]
        + [f"{option} {shlex.quote(str(value))}" for option, value in named if value is not None]
        + ([] if library else ["--no-library"])
    )
    if not as_json:
        for one in chosen:
            say(f"{one.version.uri}: {one.label}, preset {one.preset}, {one.split} split")
        if between is None:
            say("No data set off the grid: give its tag with --offgrid.")
    name = f"evaluation {datetime.now(UTC).strftime('%Y-%m-%d %H:%M')}"
    tags = {"data": dataset.attrs["tag"], "snapshot_id": dataset.attrs["snapshot_id"],
            "content_hash": dataset.attrs["content_hash"], "code_commit": code_commit(),
            "mlflow.source.name": "pipelines.evaluate"}  # fmt: skip
    with place.run(dataset.attrs["campaign"], name, tags) as run_:
        run_.log_parameters(
            {"models": [c.version.uri for c in chosen], "bootstrap": bootstrap, "limit": limit,
             "cores": os.cpu_count() or 0}
        )  # fmt: skip
        run_.log_dataset(dataset, "test")
        if between is not None:
            run_.log_dataset(between, "test off the grid")
        report = evaluate(
            dataset, between, place, chosen,
            wanted=[m for m in MODELS if not asked or m in asked],
            resamples=bootstrap, limit=limit, library=library, quiet=as_json, command=command,
        )  # fmt: skip
        labels = samples_of(dataset)
        targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
        text = report.markdown(targets)
        if markdown is not None:
            markdown.write_text(text, encoding="utf-8")
        run_.log_metrics(report.metrics())
        run_.log_text(text, "results.md")
    if as_json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
        return
    for sheet in report.sheets(targets):
        say()
        sheet.show()
    say(
        f"{EQUATION_1} In brackets: 95 % of {bootstrap:,} bootstrap resamples of the samples, in "
        f"the power of ten of the number before. Of each model the newest version of each split."
    )
    say(f"Run {run_.id} in {place.uri}, after {duration(time.monotonic() - began)}")
    next_commands([("make ui", "look at runs and models in a browser")])


if __name__ == "__main__":
    run(app)
