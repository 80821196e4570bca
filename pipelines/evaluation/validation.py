"""Validation of registered models on measured profiles, and on simulated measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from bragg_data.campaign import Campaign, Samples
from bragg_data.instrument.instprm import Instrument
from bragg_data.provenance import code_commit
from bragg_data.refinement.rietveld import Refiner
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.library.search import Matches
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets, targets_of
from catalog.tracking import MEASURED_METRICS, Tracking
from pipelines.cli.console import say
from pipelines.cli.options import DrawOptions, default_tag
from pipelines.cluster.client import open_client
from pipelines.evaluation import draws, measured, measured_tables
from pipelines.evaluation.candidates import Candidate, choose_candidates, evaluated_model
from pipelines.evaluation.names import EQUATION_1, EvaluateError
from pipelines.evaluation.rejection import find_other_bank, rejection_table
from pipelines.evaluation.tables import ResultTable
from pipelines.prediction.library import PatternLibrary, index_library
from pipelines.registry.feature_views import RegisteredModel
from pipelines.registry.registration import load_version
from pipelines.snapshots.verification import verify_snapshot


@dataclass(frozen=True)
class ValidationSettings:
    """What is validated, and how."""

    # Tags of measured data sets, or NPZ files of pseudo-experiments; None for all measured data
    # sets with labels, or for none if simulated measurements are requested.
    data: tuple[str, ...] | None = None
    models: tuple[str, ...] = ()  # names or addresses; all models if empty
    trained_on: str | None = None  # data set of the models and the library; None: the default one
    library: bool = True  # add the library match to the baselines
    refine: bool = True  # add the refinement from it
    paper_preprocessing: bool = False  # add results after the paper's preprocessing (section V-C1)
    bootstrap: int = 1000  # resamples of the samples, for 95 % intervals
    on_draws: DrawOptions = field(default_factory=DrawOptions)


@dataclass
class ValidationReport:
    """The result of a validation."""

    text: str  # facts and tables, as Markdown
    results: list[Mapping[str, Any]] = field(default_factory=list)  # JSON values of each set
    metrics: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # nested numbers, by set
    figures: dict[str, Figure] = field(default_factory=dict)  # by file, in a folder for each set
    run_id: str = ""

    def add(self, *tables: ResultTable) -> None:
        """Print tables, and add them to the text."""
        for table in tables:
            table.show()
            self.text += "\n" + table.markdown()

    def add_scores(self, result: measured.Validation, name: str) -> None:
        """Add the scores and predictions of a set of profiles, under its name."""
        self.results.append(measured_tables.validation_json(result, name))
        self.metrics[measured_tables.slug(name)] = measured_tables.validation_metrics(result)

    def add_figure(self, name: str, label: str, figure: Figure) -> None:
        """Add the figure of a model for a set of profiles."""
        slug = measured_tables.slug
        self.figures[f"{slug(name)}/{slug(label)}.png"] = figure


def run_validation(
    store: Store, tracking: Tracking, settings: ValidationSettings
) -> ValidationReport:
    """Validate registered models, print the tables, and log them to MLflow.

    Raises `EvaluateError` if there is no such model, there are no labelled profiles, they are on
    another grid, or no model has intervals.
    """
    dataset = store.open(settings.trained_on or default_tag(store))
    campaign, labels = campaign_of(dataset), samples_of(dataset)
    targets = targets_of(campaign.phases, labels.phase, labels.cells)
    chosen = choose_candidates(tracking, dataset, settings.models)
    if not settings.models:
        chosen = [c for c in chosen if c.split == "random"]
    predictors = {c.label: load_version(tracking.uri, c.version) for c in chosen}
    options, bank = settings.on_draws, None
    if options.bank_file is not None:
        bank = find_other_bank(options.bank_file, campaign)
    sets = []
    if settings.data is not None or not options.requested:
        sets = _labelled_sets(settings.data, store, campaign)
    attrs = dataset.attrs
    report = ValidationReport(
        f"# Measured profiles\n\n"
        f"- date: {datetime.now(UTC).isoformat(timespec='seconds')}\n"
        f"- commit: {code_commit()}\n"
        f"- models and library: `{attrs['tag']}`, snapshot {attrs['snapshot_id']}\n"
        f"- intervals: 95 %, bootstrap over samples, {settings.bootstrap} resamples, in the power "
        f"of ten of the number before them\n- {EQUATION_1}\n"
    )
    validator = _Validator(settings, report, dataset, labels, targets, chosen, predictors)
    results = validator.validate_sets(sets) if sets else []
    if options.requested:
        validator.evaluate_draws(tracking, bank)
    tags = {"data": str(attrs["tag"]), "snapshot_id": str(attrs["snapshot_id"])}
    tags |= {"code_commit": code_commit(), "mlflow.source.name": "pipelines.validate"}
    with tracking.run(str(attrs["campaign"]), "validation", tags) as run:
        report.run_id = run.id
        run.log_dataset(dataset, "library")
        models = [c.version.uri for c in chosen]
        run.log_parameters({"sets": [labelled.name for labelled in sets], "models": models})
        run.log_metrics({MEASURED_METRICS: report.metrics})
        run.log_text(report.text, "validation.md")
        for file, figure in report.figures.items():
            run.log_figure(figure, f"figures/{file}")
    if results:
        _log_to_training_runs(tracking, chosen, results)
    return report


@dataclass(frozen=True)
class _Validator:
    """Adds the results of models to a report; labels and targets are those of the data set."""

    settings: ValidationSettings
    report: ValidationReport
    dataset: xr.Dataset
    labels: Samples
    targets: Targets
    chosen: list[Candidate]
    predictors: Mapping[str, Predictor]

    @cached_property
    def campaign(self) -> Campaign:
        return campaign_of(self.dataset)

    @cached_property
    def with_intervals(self) -> Mapping[str, Predictor]:
        return {label: p for label, p in self.predictors.items() if p.has_intervals}

    def result_of(
        self,
        labelled: measured.LabelledProfiles,
        matches: Matches | None,
        fits: Mapping[str, measured.RefinedProfiles] | None = None,
    ) -> measured.Validation:
        models = measured.measured_baselines(self.campaign, self.labels, matches, fits)
        models += [evaluated_model(c, self.predictors[c.label]) for c in self.chosen]
        return measured.validate(labelled, self.targets, models, self.settings.bootstrap)

    def validate_sets(self, sets: Sequence[measured.LabelledProfiles]) -> list[measured.Validation]:
        """Add the results on labelled profiles, and return them."""
        campaign, report, library = self.campaign, self.report, None
        matches: Sequence[Matches | None] = [None] * len(sets)
        # All refinements come before the tables.
        fits: list[dict[str, measured.RefinedProfiles]] = [{} for _ in sets]
        if self.settings.library:
            verify_snapshot(self.dataset)
            library = index_library(self.dataset, campaign, progress=True)
            matches = searched = measured.library_matches(library, sets)
            if self.settings.refine:
                refiner = Refiner(campaign)
                starts: dict[str, Predictor | None] = {measured.FROM_LIBRARY: None}
                for label, predictor in self.with_intervals.items():
                    starts[f"{label} and {measured.FROM_LIBRARY}"] = predictor
                fits = [
                    {
                        label: measured.refine_profiles(labelled, m, refiner, model)
                        for label, model in starts.items()
                    }
                    for labelled, m in zip(sets, searched, strict=True)
                ]
        results = []
        for labelled, m, fit in zip(sets, matches, fits, strict=True):
            result = self.result_of(labelled, m, fit)
            report.add(*measured_tables.validation_tables(result, campaign.name))
            if self.with_intervals:
                predictors = self.with_intervals
                report.add(measured_tables.interval_table(labelled, self.targets, predictors))
            if fit:
                report.add(measured_tables.refinement_table(labelled, self.targets, fit))
            report.text += "\n" + measured_tables.samples_table(result).markdown()
            report.add_scores(result, labelled.name)
            for label, figure in measured_tables.validation_figures(result, campaign).items():
                report.add_figure(labelled.name, label, figure)
            if self.settings.paper_preprocessing:
                self.add_paper_preprocessing(labelled, library)
            results.append(result)
        say(EQUATION_1)
        return results

    def add_paper_preprocessing(
        self, labelled: measured.LabelledProfiles, library: PatternLibrary | None
    ) -> None:
        """Add Tables IV and V after the paper's preprocessing, compared with the project's."""
        n, campaign, report = len(labelled.samples), self.campaign, self.report
        selected = measured.with_paper_preprocessing(labelled, campaign)
        if selected is None:
            note = (
                f"{labelled.name}: the paper's preprocessing is not possible for any of the {n} "
                f"profiles: its background (section V-C1) does not exist for them."
            )
            say(note)
            report.text += f"\n{note}\n"
            return
        after_paper, after_ours = (
            self.result_of(p, measured.library_matches(library, [p])[0] if library else None)
            for p in (selected[0], labelled.select(selected[1]))
        )
        suffix = f" of {n}, the paper's preprocessing"
        report.add(*measured_tables.validation_tables(after_paper, campaign.name, suffix))
        report.add(measured_tables.preprocessing_table(after_paper, after_ours, n, campaign.name))
        report.add_scores(after_paper, f"{labelled.name}, paper's preprocessing")

    def evaluate_draws(self, tracking: Tracking, bank: Instrument | None) -> None:
        chosen = [c for c in self.chosen if c.label in self.with_intervals]
        if not chosen:
            raise EvaluateError(
                "None of these models has intervals, so there is nothing to evaluate on draws. "
                "Train one with python -m pipelines.train robust, or name it with --models."
            )
        phases, options = self.campaign.phases, self.settings.on_draws
        with open_client(options.cluster) as client:
            for c in chosen:
                model = RegisteredModel(tracking.uri, c.version)
                tables = []
                if options.draws:
                    predictions = draws.predict_draws(client, model, options.draws)
                    tables += draws.calibration_tables(predictions, phases)
                    figure = draws.calibration_figure(predictions, phases)
                    self.report.add_figure("fresh draws", c.label, figure)
                if options.foreign:
                    tables.append(rejection_table(client, model, options.foreign, bank))
                if count := options.refined_draws:
                    tables.append(draws.convergence_table(client, model, count, phases))
                for table in tables:
                    self.report.add(replace(table, title=f"{c.label}: {table.title}"))


def _log_to_training_runs(
    tracking: Tracking, models: Sequence[Candidate], results: Sequence[measured.Validation]
) -> None:
    """Log the models' scores to the runs that trained them, where they can be compared.

    The sets count as one; those without a calibration are left out, unless there are no others.
    """
    pooled = [r for r in results if r.labelled.calibrated] or results
    for c in models:
        run = tracking.training_run(c.version.run_id, c.model)
        if run is not None:
            run.log_metrics({MEASURED_METRICS: measured_tables.pooled_metrics(pooled, c.label)})
            names = ", ".join(r.labelled.name for r in pooled)
            tracking.client.set_tag(run.id, MEASURED_METRICS, names)


def _labelled_sets(
    data: Sequence[str] | None, store: Store, campaign: Campaign
) -> list[measured.LabelledProfiles]:
    if data is None:
        datasets = [store.open(tag.name) for tag in store.tags()]
        measurements = [d for d in datasets if "measurements" in d.attrs]
        data = [d.attrs["tag"] for d in measurements if (d.phase.values >= 0).any()]
        if not data:
            raise EvaluateError(
                f"{store.uri} holds no measured data set with labels. Make one with python -m "
                f"pipelines.ingest FILE… --labels CSV --into NAME, or name one with --data."
            )
    sets: list[measured.LabelledProfiles] = []
    for name in data:
        if name.endswith(".npz"):
            sets += measured.profiles_from_file(Path(name), campaign)
            continue
        dataset = store.open(name)
        of_dataset = campaign_of(dataset)
        names, expected = ([phase.name for phase in c.phases] for c in (of_dataset, campaign))
        if of_dataset.grid != campaign.grid or names != expected:
            raise EvaluateError(
                f"{name} is on the grid of campaign {of_dataset.name}, the models on that of "
                f"{campaign.name}. Name the models' data set with --trained-on, or ingest the "
                f"profiles with --campaign {campaign.name}."
            )
        sets.append(measured.profiles_from_dataset(dataset, store, campaign))
    return sets
