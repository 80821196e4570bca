"""Any material on any instrument, end to end: from a campaign to a champion, and to its results.

A search from known cells needs no training: it is calibrated and tested first. Only where it
confuses phases, and time is left, a network is trained to propose them; the better of the two on
the same held-out profiles becomes the champion.
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr
from rich.markup import escape

from bragg_data.campaign import load_campaign
from bragg_data.campaign_design import (
    CampaignDesign,
    DesignOptions,
    design_campaign,
    design_each_bank,
)
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of
from catalog import banks, registry
from catalog.registry import ModelVersion
from catalog.tracking import Tracking
from pipelines.cli.console import say
from pipelines.cli.options import ClusterOptions, OutputError, ProfileOptions
from pipelines.end_to_end.paper import champion_of_data, head
from pipelines.evaluation.names import ROBUST, SEARCH
from pipelines.inspection.designs import draw_design
from pipelines.prediction import distributed
from pipelines.prediction.interface import load_model
from pipelines.prediction.render import print_results
from pipelines.prediction.result import PredictionResult, to_json
from pipelines.registry.registration import load_version
from pipelines.report.page import render_report
from pipelines.simulation.campaign import SimulationJob, simulate_campaign
from pipelines.training.expectation import EXPECTED, Expectation
from pipelines.training.presets import SEARCH_NETWORK, Presets
from pipelines.training.run import train_model
from pipelines.training.task import TrainingEnvironment, TrainingTask

# Profiles of all phases together that a model is calibrated on, and tested on: of the most, which
# are twice as many for four phases, coverage of the intervals is known to 1 %, in minutes.
_DRAWS, _DRAWS_PER_MINUTE, _DRAWS_OF_PHASE = (300, 1000), 250, 500
_FEWEST_DRAWS = 100  # of each phase
_FOREIGN_DRAWS = 100  # of each compound
_TRAINING_DRAWS = 60_000  # of all phases together
# Share of profiles with the right phase above which a network is not trained.
_CLEAR = 0.99
# Share of the budget after which a network is not begun: it takes longer than the search did.
_LAST_BEGIN = 0.45


@dataclass(frozen=True)
class Places:
    """Where data, models and the state of a training are, and where tasks run."""

    store: str
    tracking: str
    state: Path
    cluster: ClusterOptions


@dataclass(frozen=True)
class Outcome:
    """What a run made."""

    campaign: str
    tag: str
    version: ModelVersion
    champion: bool
    expected: Expectation | None  # None of a model that was registered without one

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "campaign": self.campaign,
            "tag": self.tag,
            "model": self.version.uri,
            "champion": self.champion,
            "expected": None if self.expected is None else self.expected.to_json(),
        }


@dataclass(frozen=True)
class RunResult:
    """The models of a run, one for each bank, and what they predict."""

    outcomes: tuple[Outcome, ...]
    results: tuple[PredictionResult, ...] = ()
    seconds: float = 0.0

    @property
    def best(self) -> Outcome:
        """The one of the smallest expected errors."""
        return min(
            self.outcomes, key=lambda o: (o.expected and o.expected.relative_mae) or math.inf
        )

    @property
    def model(self) -> str:
        """The address of the model, or of those of all banks."""
        of_banks = banks.address_of([outcome.campaign for outcome in self.outcomes])
        return of_banks if of_banks and len(self.outcomes) > 1 else self.best.version.uri

    @property
    def name(self) -> str:
        """The name of the campaign, of several banks without the bank."""
        name = self.outcomes[0].campaign
        return name if len(self.outcomes) == 1 else re.sub(r"-bank\d+$", "", name)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, of several banks first those of the smallest errors."""
        return {
            **self.best.to_json(),
            "seconds": round(self.seconds, 1),
            "answers": [to_json(result) for result in self.results],
            "banks": [outcome.to_json() for outcome in self.outcomes],
        }


def write_campaign(design: CampaignDesign, directory: Path) -> Path:
    """Write a designed campaign with its figure; return its file.

    A file of the same design stays, also where the number of samples, which depends on how busy
    the machine is, differs. Raises `OutputError` if the file is there and another.
    """
    path = directory / f"{design.name}.toml"
    if path.exists():
        texts = (path.read_text(encoding="utf-8", errors="replace"), design.toml)
        present, designed = (re.sub(r"(?m)^samples\b.*|#.*", "", text) for text in texts)
        if present == designed:
            return path
        raise OutputError(
            f"{path} exists and is another campaign: run it by its name (bragg run {path}), or "
            f"name the new one (--name)."
        )
    path.write_text(design.toml, encoding="utf-8")
    draw_design(design, path.with_suffix(".png"))
    return path


def designed_campaigns(stated: DesignOptions, directory: Path, *, each_bank: bool) -> list[Path]:
    """Design a campaign, or one for each bank, print what was assumed, and return the files.

    Errors are the design's, and those of :func:`write_campaign`.
    """
    head("Design the campaign")
    refused: list[str] = []
    if each_bank:
        designs, refused = design_each_bank(stated, directory)
    else:
        designs = [design_campaign(stated, directory)]
    paths = []
    for design in designs:
        path = write_campaign(design, directory)
        for assumption in design.assumptions:
            say(f"  • {escape(assumption)}")
        for warning in design.warnings:
            say(f"  [yellow]• {escape(warning)}[/]")
        say(f"Campaign {escape(str(path))}, figure {escape(str(path.with_suffix('.png')))}")
        paths.append(path)
    for reason in refused:
        say(f"[yellow]Left out: {escape(reason)}[/]")
    return paths


def run_campaigns(
    paths: Sequence[str],
    places: Places,
    budget: float,
    limit: int | None,
    presets: Presets | None = None,
) -> RunResult:
    """Simulate campaigns, find the best model of each for its measured profiles, and register it.

    What exists is used again. ``budget`` is in minutes, for all of them; ``presets`` are by default
    such that training takes minutes. Errors are those of the steps.
    """
    campaigns = [load_campaign(path) for path in paths]
    repository, share = Store(places.store, create=True), budget / len(campaigns)
    outcomes = []
    for campaign in campaigns:
        began = time.monotonic()
        of = f" {escape(campaign.name)}" if len(campaigns) > 1 else ""
        head(f"Simulate{of}")
        job = SimulationJob(campaign, "kinematic", limit=limit, cluster=places.cluster)
        tag = simulate_campaign(job, repository)
        dataset = repository.open(tag.name)
        head(f"Calibrate and test a model{of}")
        outcome = _best_model(dataset, places, began, share, presets)
        outcomes.append(Outcome(campaign.name, tag.name, *outcome))
    return RunResult(tuple(outcomes))


def expected_of(version: ModelVersion, tracking: Tracking) -> Expectation | None:
    """Return what a registered model's test showed; None if that was not recorded."""
    facts = load_version(tracking.uri, version).provenance.facts
    values = facts.get(EXPECTED)
    return None if values is None else Expectation.from_json(values)


def _best_model(
    dataset: xr.Dataset, places: Places, began: float, budget: float, presets: Presets | None
) -> tuple[ModelVersion, bool, Expectation | None]:
    """Return the best model for measured profiles, whether it is the champion, what to expect."""
    tracking = Tracking(places.tracking)
    name = registry.registered_name(str(dataset.attrs["campaign"]), SEARCH)
    champion = champion_of_data(tracking, name, dataset)
    if champion is not None:
        say(f"{champion.uri} was made for this data set: it stays.")
        return champion, True, expected_of(champion, tracking)
    presets = presets or _presets(len(campaign_of(dataset).phases), budget)
    environment = TrainingEnvironment(tracking, places.state, True, places.cluster, presets)
    begun = time.monotonic()
    # A champion of other data cannot be compared with this model.
    task = TrainingTask(SEARCH, "quick")
    version, is_champion = train_model(dataset, environment, task, promotion="replace")
    expected = expected_of(version, tracking)
    taken, left = time.monotonic() - begun, began + 60 * budget - time.monotonic()
    if expected is None or expected.accuracy >= _CLEAR:
        say("The search alone identifies the phases: no network is trained.")
    elif left < taken * (1 - _LAST_BEGIN) / _LAST_BEGIN:
        say("A network might identify the phases better; there is no time left for one (--budget).")
    else:
        say("Some phases are confused: a network is trained to propose them, and compared.")
        notes = {"compared_with": {version.uri: expected.to_json()}}
        task = replace(task, model=ROBUST)
        second, better = train_model(dataset, environment, task, notes=notes)
        if better:
            return second, True, expected_of(second, tracking)
    return version, is_champion, expected


def _presets(n_phases: int, budget: float) -> Presets:
    fewest, most = _DRAWS
    most = min(max(most, _DRAWS_OF_PHASE * n_phases), 2 * most)
    draws = min(max(round(_DRAWS_PER_MINUTE * budget), fewest), most)
    count = max(draws // n_phases, _FEWEST_DRAWS)
    networks = {model: dict(presets) for model, presets in Presets().networks.items()}
    for model in (SEARCH, ROBUST):
        preset = networks[model]["quick"]
        settings = {**SEARCH_NETWORK, "pooling": preset.network["pooling"]}
        networks[model]["quick"] = replace(
            preset,
            network=settings,
            calibration_draws=count,
            training_draws=_TRAINING_DRAWS // n_phases if preset.stages else 0,
        )
    return Presets(networks=networks, test_draws=count, foreign_draws=_FOREIGN_DRAWS)


def predict_profiles(
    result: RunResult, files: Sequence[Path], profile: ProfileOptions, places: Places, page: Path
) -> tuple[RunResult, dict[Path, Exception]]:
    """Predict and refine profiles with the models of a run, print the results, write a report.

    Returned are the run with its results, and the errors of files that have none.
    """
    head("Predict and refine")
    models = [
        load_model(o.version.uri, tracking=places.tracking, store=places.store, progress=True)
        for o in result.outcomes
    ]
    cluster = replace(places.cluster, cluster=None)
    results, profiles, failures = distributed.predict_anywhere(
        files, profile, models, cluster, refine=True, draw=True
    )
    if results:
        print_results(results)
        predictors = [model.predictor for model in models]
        page.write_text(render_report(profiles, *predictors, total=len(results)), encoding="utf-8")
        say(f"Report in [bold]{escape(str(page))}[/]")
    return replace(result, results=tuple(results)), failures
