"""The reaction to a drift: other draws, a training, the gate, and a promotion, or why not."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from bragg_data.arrays import Floats32, Mask
from bragg_data.model_provenance import ModelProvenance
from bragg_data.store.repository import Store
from bragg_models.predictors import Predictor
from bragg_models.training.settings import FitSettings
from catalog import registry
from catalog.gate import Gate
from catalog.tracking import Tracking
from pipelines.end_to_end.material import Places
from pipelines.evaluation import version_comparison as versions
from pipelines.monitoring.monitor import Observation
from pipelines.monitoring.plan import Plan, plan_of, with_difc
from pipelines.recording.record import Record
from pipelines.recording.recorded_files import FILES
from pipelines.registry.registration import load_version
from pipelines.service.requests import FILE, PreparedRequest, prepare
from pipelines.simulation.campaign import SimulationJob, simulate_campaign
from pipelines.training.presets import Preset, Presets
from pipelines.training.run import train_model
from pipelines.training.task import TrainingEnvironment, TrainingTask

# Share of the recorded profiles of the present state that a candidate has to accept. Genuine ones
# are accepted in 97 to 99 %; of 50, at least this share in all but one case in a thousand.
_LEAST_ACCEPTED = 0.85
_TOML = "campaign_toml"  # attribute of a data set


@dataclass(frozen=True)
class ReactionPlaces(Places):
    """Where data, models and the state of a training are, and how long a delta campaign is."""

    samples: int = 2000


@dataclass
class Reaction:
    """What was done about the alarms of a model."""

    model: str  # address of the version that predicts
    alarms: Sequence[str]
    changes: Sequence[str] = ()
    candidate: str | None = None
    promoted: bool = False
    objections: list[str] = field(default_factory=list)
    accepted: Mapping[str, float] = field(default_factory=dict)  # of the recorded, by model
    scores: Mapping[str, Any] = field(default_factory=dict)  # on held-out draws, by model
    calibration: str | None = None  # instrument file with the present difC
    seconds: float = 0.0
    run: str | None = None  # id in MLflow

    def to_json(self) -> Mapping[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """Return the report, a sentence each."""
        lines = [f"Alarm: {text}" for text in self.alarms] or ["No alarm: nothing to do."]
        lines += [f"Change: {text}" for text in self.changes]
        lines += [
            f"{uri} accepts {v:.0%} of the recorded profiles" for uri, v in self.accepted.items()
        ]
        lines += [f"Not promoted: {text}" for text in self.objections]
        if self.promoted:
            lines.append(f"{self.candidate} is the champion, in place of {self.model}")
        if self.calibration is not None:
            lines.append(f"Calibration for profiles from now on: {self.calibration}")
        return lines


def react(
    seen: Observation, record: Record, places: ReactionPlaces, *, dry_run: bool = False
) -> Reaction:
    """Turn the alarms of an observation into a new champion, or state why not.

    Everything is a run of the registered model's experiment, and the candidate's provenance records
    alarms and changes. Errors are those of the steps.
    """
    began = time.monotonic()
    reaction = Reaction(seen.version.uri, [alarm.text for alarm in seen.alarms])
    if not seen.alarms:
        return reaction
    plan = plan_of(seen)
    reaction.changes = plan.changes
    if not plan.changes:
        reaction.objections.append(
            "no measurement effect and no calibration explains the alarms: the profiles are of "
            "another sample, or of an instrument that changed in another way"
        )
    if plan.changes and not dry_run:
        provenance = seen.predictor.provenance
        tracking = Tracking(places.tracking)
        name = registry.registered_name(plan.campaign.name, provenance.model)
        title = f"reaction {datetime.now(UTC):%Y-%m-%d %H:%M}"
        tags = {"mlflow.source.name": "pipelines.react", "model": provenance.model}
        with tracking.run(name, title, tags) as run:
            reaction.run = run.id
            run.log_parameters({"champion": reaction.model, "record": str(record.folder)})
            _train_and_judge(seen, record, plan, places, tracking, reaction)
            run.log_parameters({"candidate": reaction.candidate, "promoted": reaction.promoted})
            run.log_dataset(_dataset(seen, plan, places), "training")
            reaction.seconds = time.monotonic() - began
            run.log_metrics({"seconds": reaction.seconds})
            run.log_text("\n".join(reaction.lines()), "reaction.txt")
            run.log_text(json.dumps(reaction.to_json(), default=str), "reaction.json")
    reaction.seconds = time.monotonic() - began
    return reaction


def _train_and_judge(
    seen: Observation,
    record: Record,
    plan: Plan,
    places: ReactionPlaces,
    tracking: Tracking,
    reaction: Reaction,
) -> None:
    dataset = _dataset(seen, plan, places)
    provenance = seen.predictor.provenance
    presets = presets_of(provenance)
    environment = TrainingEnvironment(tracking, places.state, True, places.cluster, presets)
    parent = None if seen.version.packaged or provenance.model == "search" else seen.version.uri
    task = TrainingTask(provenance.model, provenance.preset, provenance.seed, parent=parent)
    notes = {
        "reaction": {
            "run": reaction.run,
            "champion": reaction.model,
            "record": str(record.folder),
            "alarms": list(reaction.alarms),
            "changes": list(plan.changes),
        }
    }
    candidate, _ = train_model(dataset, environment, task, promotion="never", notes=notes)
    reaction.candidate = candidate.uri
    gate, champion = Gate(), seen.version
    on = versions.EvaluationData(
        str(dataset.attrs["uri"]), dataset.attrs["tag"], 900, plan.campaign
    )
    comparison = versions.compare_versions(tracking, candidate, champion, gate, on)
    versions.log_comparison(tracking, comparison, gate)
    versions.comparison_table(comparison).show()
    reaction.scores = comparison.to_json(promoted=False)["scores"]
    reaction.objections += comparison.objections
    predictors = {
        champion.uri: seen.predictor,
        candidate.uri: load_version(tracking.uri, candidate),
    }
    reaction.accepted = _accepted(predictors, record, seen, plan)
    share = reaction.accepted.get(candidate.uri)
    if share is not None and share < _LEAST_ACCEPTED:
        reaction.objections.append(
            f"it accepts {share:.0%} of the recorded profiles since the drift, and "
            f"{_LEAST_ACCEPTED:.0%} are needed: they are of another sample, the instrument "
            f"changed in another way, or no answer is of a single profile"
        )
    if reaction.objections:
        return
    present = registry.champion(tracking, candidate.name)
    registry.promote(
        tracking,
        candidate,
        reason=f"reaction to drift: {'; '.join(plan.changes)}",
        expected=present.version if present else None,
    )
    reaction.promoted = True
    if plan.difc_factor != 1:
        file = record.folder.absolute() / f"{plan.campaign.name}-{candidate.version}.instprm"
        file.write_text(plan.campaign.instprm, encoding="utf-8")
        reaction.calibration = str(file)


def _dataset(seen: Observation, plan: Plan, places: ReactionPlaces) -> xr.Dataset:
    """Return the snapshot that a candidate is trained on, with the changed measurement effects.

    Effects do not change patterns: the champion's snapshot serves where it is at hand. Another
    difC, or a packaged champion, needs a delta campaign.
    """
    data = seen.predictor.provenance.data
    if data.uri and plan.difc_factor == 1:
        dataset = Store(data.uri).open(data.tag)
    else:
        store = Store(places.store, create=True)
        job = SimulationJob(
            plan.campaign, "kinematic", limit=places.samples, cluster=places.cluster, confirmed=True
        )
        dataset = store.open(simulate_campaign(job, store).name)
    dataset.attrs[_TOML] = plan.campaign.toml
    return dataset


def presets_of(provenance: ModelProvenance) -> Presets:
    """Return presets of which that of a model is what it was trained with."""
    values = dict(provenance.preset_values)
    stages = {
        name: FitSettings(**{**fit, "milestones": tuple(fit.get("milestones", ()))})
        for name, fit in values.pop("stages").items()
    }
    usual = Presets()
    of_model = {**usual.networks[provenance.model], provenance.preset: Preset(stages, **values)}
    draws = provenance.split.test_draws or usual.test_draws
    return replace(usual, networks={**usual.networks, provenance.model: of_model}, test_draws=draws)


def _accepted(
    predictors: Mapping[str, Predictor], record: Record, seen: Observation, plan: Plan
) -> Mapping[str, float]:
    """Return the share of the recorded profiles since the drift that each model accepts."""
    shares = {}
    for uri, predictor in predictors.items():
        profiles: list[Floats32] = []
        calibrated: list[Mask] = []
        requests: dict[str, PreparedRequest] = {}
        for answer in seen.signals.answers[plan.since :]:
            if answer.route == FILES or "banks" in record.origin(answer.origin):
                continue
            if answer.request not in requests:
                stored = record.input(answer.request)
                if stored is None:
                    continue
                route, body = stored
                factor = plan.difc_factor if predictor is not seen.predictor else 1.0
                body = _calibrated(body, factor) if route == FILE else body
                requests[answer.request] = prepare(route, body, predictor, uri)
            only = requests[answer.request].only(answer.row)
            profiles.append(only.profiles)
            calibrated.append(only.calibrated)
        if not profiles:
            shares[uri] = 0.0  # what cannot be asked is not known to be accepted
            continue
        together = np.concatenate(profiles), None, np.concatenate(calibrated)
        accepted = predictor.predict(*together).accepted
        if accepted is not None:
            shares[uri] = float(accepted.mean())
    return shares


def _calibrated(body: bytes, factor: float) -> bytes:
    """Return the body of a file's request with the present difC in its calibration."""
    request = json.loads(body)
    if factor != 1 and request.get("instrument"):
        request["instrument"] = with_difc(request["instrument"], factor)
    return json.dumps(request).encode()
