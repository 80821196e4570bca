"""Validation of registered models on measured profiles, and on simulated measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from bragg_data.campaign import Campaign, Samples
from bragg_data.provenance import code_commit
from bragg_data.refinement.rietveld import Refiner
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets, targets_of
from catalog.tracking import MEASURED_METRICS, Tracking
from pipelines.cli.console import say
from pipelines.cli.options import default_tag
from pipelines.cluster.client import open_client
from pipelines.evaluation.candidates import Candidate, candidates, evaluated_model
from pipelines.evaluation.draw_options import DrawOptions
from pipelines.evaluation.draws import DrawCounts, evaluate_on_draws
from pipelines.evaluation.measured import (
    FROM_LIBRARY,
    LabelledProfiles,
    RefinedProfiles,
    Validation,
    library_matches,
    measured_baselines,
    profiles_from_dataset,
    profiles_from_file,
    refine_profiles,
    validate,
    with_paper_preprocessing,
)
from pipelines.evaluation.measured_tables import (
    interval_table,
    preprocessing_table,
    refinement_table,
    samples_table,
    slug,
    validation_figures,
    validation_json,
    validation_metrics,
    validation_tables,
)
from pipelines.evaluation.paper_numbers import EQUATION_1
from pipelines.evaluation.rejection import find_other_bank
from pipelines.evaluation.scoring import EvaluatedModel
from pipelines.evaluation.tables import ResultTable
from pipelines.prediction.library import INDEX_DIRECTORY, PatternLibrary, index_library
from pipelines.registry.feature_views import RegisteredModel
from pipelines.registry.registration import load_version

DRAWS = "fresh draws"
"""Name of the figures of simulated measurements."""


class ValidateError(ValueError):
    """A validation that is not possible as requested."""


@dataclass(frozen=True)
class ValidationSettings:
    """What is validated, and how.

    Attributes
    ----------
    data
        Tags of measured data sets, or NPZ files of pseudo-experiments; None for all measured data
        sets with labels, or for none if simulated measurements are requested.
    models
        Names or addresses; all models if empty.
    trained_on
        Tag of the data set of the models and the library; None for the default one.
    library, refine
        Whether the library match, and the refinement from it, are among the baselines.
    paper_preprocessing
        Add the results after the paper's preprocessing (its section V-C1).
    bootstrap
        Resamples of the samples, for 95 % intervals.
    on_draws
        Evaluation on simulated measurements.
    """

    data: tuple[str, ...] | None = None
    models: tuple[str, ...] = ()
    trained_on: str | None = None
    library: bool = True
    refine: bool = True
    paper_preprocessing: bool = False
    bootstrap: int = 1000
    on_draws: DrawOptions = field(default_factory=DrawOptions)


@dataclass
class ValidationReport:
    """The result of a validation.

    Attributes
    ----------
    text
        Facts and tables, as Markdown.
    results
        For each set of profiles, plain JSON values.
    metrics
        Nested numbers, by set.
    figures
        By set, and by model.
    run_id
        The MLflow run.
    """

    text: str
    results: list[Mapping[str, Any]] = field(default_factory=list)
    metrics: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    run_id: str = ""

    def add(self, *tables: ResultTable | None, show: bool = True) -> None:
        """Print tables, and add them to the text."""
        for table in tables:
            if table is not None:
                if show:
                    table.show()
                self.text += "\n" + table.markdown()


@dataclass(frozen=True)
class _Models:
    """The data set and models of a validation."""

    dataset: xr.Dataset
    campaign: Campaign
    labels: Samples
    targets: Targets
    chosen: list[Candidate]
    predictors: Mapping[str, Predictor]

    @property
    def evaluated(self) -> list[EvaluatedModel]:
        return [evaluated_model(c, self.predictors[c.label]) for c in self.chosen]

    @property
    def with_intervals(self) -> Mapping[str, Predictor]:
        return {label: p for label, p in self.predictors.items() if p.has_intervals}


def run_validation(
    store: Store, tracking: Tracking, settings: ValidationSettings
) -> ValidationReport:
    """Validate registered models, print the tables, and log them to MLflow.

    Parameters
    ----------
    store, tracking
        The data sets, and the models.
    settings
        What is validated.

    Raises
    ------
    ValidateError
        If there are no labelled profiles, they are on another grid, or no model has intervals.
    EvaluateError
        If there is no such model.
    """
    models = _load_models(store, tracking, settings)
    options, bank = settings.on_draws, None
    if options.bank_file is not None:
        bank = find_other_bank(options.bank_file, models.campaign)
    sets = []
    if settings.data is not None or not options.requested:
        sets = _labelled_sets(settings.data, store, models.campaign)
    report = ValidationReport(_facts(models.dataset, settings))
    if sets:
        _validate_sets(report, sets, models, settings)
        say(EQUATION_1)
    if options.requested:
        counts = DrawCounts(options.draws, options.foreign, options.refined_draws, bank)
        _evaluate_draws(report, models, tracking, options.cluster, counts)
    _log(report, models, tracking, sets)
    return report


def _load_models(store: Store, tracking: Tracking, settings: ValidationSettings) -> _Models:
    dataset = store.open(settings.trained_on or default_tag(store))
    campaign, labels = campaign_of(dataset), samples_of(dataset)
    targets = targets_of(campaign.phases, labels.phase, labels.cells)
    chosen = candidates(tracking, dataset, settings.models)
    if not settings.models:
        chosen = [c for c in chosen if c.split == "random"]
    predictors = {c.label: load_version(tracking.uri, c.version) for c in chosen}
    return _Models(dataset, campaign, labels, targets, chosen, predictors)


def _validate_sets(
    report: ValidationReport,
    sets: Sequence[LabelledProfiles],
    models: _Models,
    settings: ValidationSettings,
) -> None:
    """Add the results on labelled profiles to a report."""
    campaign = models.campaign
    library = None
    if settings.library:
        library = index_library(models.dataset, campaign, progress=True)
    matches = [None] * len(sets) if library is None else library_matches(library, sets)
    fits: list[dict[str, RefinedProfiles]] = [{} for _ in sets]
    if library is not None and settings.refine:
        refiner = Refiner(campaign, cache=INDEX_DIRECTORY)
        starts: dict[str, Predictor | None] = {FROM_LIBRARY: None}
        starts |= {f"{label} and {FROM_LIBRARY}": p for label, p in models.with_intervals.items()}
        fits = [
            {label: refine_profiles(labelled, m, refiner, p) for label, p in starts.items()}
            for labelled, m in zip(sets, matches, strict=True)
            if m is not None
        ]
    for labelled, m, fit in zip(sets, matches, fits, strict=True):
        baselines = measured_baselines(campaign, models.labels, m, fit)
        evaluated = [*baselines, *models.evaluated]
        labels = {model.key: model.label for model in evaluated}
        result = validate(labelled, models.targets, evaluated, resamples=settings.bootstrap)
        report.add(*validation_tables(result, models.targets, campaign.name))
        report.add(interval_table(labelled, models.targets, models.predictors))
        if fit:
            report.add(refinement_table(labelled, models.targets, fit))
        report.add(samples_table(result, models.targets, labels), show=False)
        report.results.append(validation_json(result, models.targets))
        report.metrics[slug(labelled.name)] = validation_metrics(result)
        report.figures[labelled.name] = validation_figures(result, campaign, labels)
        if settings.paper_preprocessing:
            _add_paper_preprocessing(report, labelled, models, library, settings)


def _add_paper_preprocessing(
    report: ValidationReport,
    labelled: LabelledProfiles,
    models: _Models,
    library: PatternLibrary | None,
    settings: ValidationSettings,
) -> None:
    """Add Tables IV and V after the paper's preprocessing, and a comparison with the project's."""
    n, campaign, targets = len(labelled.samples), models.campaign, models.targets
    selected = with_paper_preprocessing(labelled, campaign)
    if selected is None:
        note = (
            f"{labelled.name}: the paper's preprocessing is not possible for any of the {n} "
            f"profiles: its background (section V-C1) does not exist for them."
        )
        say(note)
        report.text += f"\n{note}\n"
        return
    paper, rows = selected

    def result_of(profiles: LabelledProfiles) -> Validation:
        matches = None if library is None else library_matches(library, [profiles])[0]
        baselines = measured_baselines(campaign, models.labels, matches)
        evaluated = [*baselines, *models.evaluated]
        return validate(profiles, targets, evaluated, resamples=settings.bootstrap)

    after_paper, after_ours = result_of(paper), result_of(labelled.select(rows))
    suffix = f" of {n}, the paper's preprocessing"
    report.add(*validation_tables(after_paper, targets, campaign.name, suffix))
    report.add(preprocessing_table(after_paper, after_ours, n, campaign.name))
    name = f"{labelled.name}, paper's preprocessing"
    report.results.append({**validation_json(after_paper, targets), "name": name})
    report.metrics[slug(name)] = validation_metrics(after_paper)


def _evaluate_draws(
    report: ValidationReport,
    models: _Models,
    tracking: Tracking,
    cluster: str,
    counts: DrawCounts,
) -> None:
    """Add the results on simulated measurements to a report."""
    registered = {
        c.label: RegisteredModel(tracking.uri, c.version)
        for c in models.chosen
        if c.label in models.with_intervals
    }
    if not registered:
        raise ValidateError(
            "None of these models has intervals, so there is nothing to evaluate on draws. Train "
            "one with python -m pipelines.train robust, or name it with --models."
        )
    with open_client(cluster) as client:
        for label, model in registered.items():
            tables, figure = evaluate_on_draws(client, model, models.campaign.phases, label, counts)
            report.add(*tables, show=False)
            if figure is not None:
                report.figures.setdefault(DRAWS, {})[label] = figure


def _log(
    report: ValidationReport,
    models: _Models,
    tracking: Tracking,
    sets: Sequence[LabelledProfiles],
) -> None:
    attrs = models.dataset.attrs
    tags = {
        "data": str(attrs["tag"]),
        "snapshot_id": str(attrs["snapshot_id"]),
        "code_commit": code_commit(),
        "mlflow.source.name": "pipelines.validate",
    }
    with tracking.run(str(attrs["campaign"]), "validation", tags) as run:
        report.run_id = run.id
        run.log_dataset(models.dataset, "library")
        run.log_parameters(
            {
                "sets": [labelled.name for labelled in sets],
                "models": [c.version.uri for c in models.chosen],
            }
        )
        run.log_metrics({MEASURED_METRICS: report.metrics})
        run.log_text(report.text, "validation.md")
        for name, pages in report.figures.items():
            for label, figure in pages.items():
                run.log_figure(figure, f"figures/{slug(name)}/{slug(label)}.png")


def _labelled_sets(
    data: Sequence[str] | None, store: Store, campaign: Campaign
) -> list[LabelledProfiles]:
    sets: list[LabelledProfiles] = []
    if data is None:
        for tag in store.tags():
            dataset = store.open(tag.name)
            if "measurements" in dataset.attrs and (dataset.phase.values >= 0).any():
                sets.append(_profiles_on_grid(dataset, store, campaign))
        if not sets:
            raise ValidateError(
                f"{store.uri} holds no measured data set with labels. Make one with python -m "
                f"pipelines.ingest FILE… --labels CSV --into NAME, or name one with --data."
            )
    for name in data or ():
        if name.endswith(".npz"):
            sets += profiles_from_file(Path(name), campaign)
        else:
            sets.append(_profiles_on_grid(store.open(name), store, campaign))
    return sets


def _profiles_on_grid(dataset: xr.Dataset, store: Store, campaign: Campaign) -> LabelledProfiles:
    of_dataset = campaign_of(dataset)
    names = [[p.name for p in c.phases] for c in (of_dataset, campaign)]
    if of_dataset.grid != campaign.grid or names[0] != names[1]:
        raise ValidateError(
            f"{dataset.attrs['tag']} is on the grid of campaign {of_dataset.name}, the models on "
            f"that of {campaign.name}. Name the models' data set with --trained-on, or ingest the "
            f"profiles with --campaign {campaign.name}."
        )
    return profiles_from_dataset(dataset, store, campaign)


def _facts(dataset: xr.Dataset, settings: ValidationSettings) -> str:
    attrs = dataset.attrs
    return (
        f"# Measured profiles\n\n"
        f"- date: {datetime.now(UTC).isoformat(timespec='seconds')}\n"
        f"- commit: {code_commit()}\n"
        f"- models and library: `{attrs['tag']}`, snapshot {attrs['snapshot_id']}\n"
        f"- intervals: 95 %, bootstrap over samples, {settings.bootstrap} resamples, in the power "
        f"of ten of the number before them\n- {EQUATION_1}\n"
    )
