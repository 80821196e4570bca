"""Promote a registered model if it passes the gate, or take the last promotion back."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import typer
import xarray as xr
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from bragg_data.splits import Part
from bragg_data.store.repository import DEFAULT_URI, Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.data.batches import in_order, profiles_of
from bragg_models.metrics import calibration_error, errors, summary
from bragg_models.predictors import Predictor
from catalog import promotion, registry
from catalog.promotion import Gate, PromotionError, VersionScores
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import console, next_commands, run, say
from pipelines.evaluation.scoring import answered, in_batches, part_of
from pipelines.registry.registration import load_version
from pipelines.simulation.draws import Drawn, pinned_draws

app = typer.Typer(add_completion=False)

_ANSWERS = 30  # timed ones


def evaluation_rows(
    dataset: xr.Dataset, predictors: Mapping[str, Predictor], count: int
) -> NDArray[np.bool_]:
    """Return the pinned samples that versions are compared on, shape (n,), the same every time.

    Of a data set that a version was trained on they are test samples of its split; of another one
    all may be among them.

    Parameters
    ----------
    dataset
        An opened snapshot.
    predictors
        The versions, by their addresses.
    count
        How many.

    Raises
    ------
    PromotionError
        If a version learnt from what is a test sample to another.
    """
    labels, content = samples_of(dataset), dataset.attrs["content_hash"]
    allowed = np.ones(len(labels), dtype=bool)
    for uri, predictor in predictors.items():
        provenance = predictor.provenance
        if provenance.data.content_hash == content:
            split = provenance.split
            allowed &= part_of(split.name, labels, split.to_json()) == Part.test
        elif dataset.attrs["tag"] in provenance.extra_data:
            raise PromotionError(
                f"{uri} was trained on {dataset.attrs['tag']}: name another --data."
            )
    rows = np.flatnonzero(allowed)
    if len(rows) < min(count, 100):
        raise PromotionError(
            f"Only {len(rows)} samples of {dataset.attrs['tag']} are test samples to all versions. "
            f"Compare on a data set that none was trained on: --data TAG"
        )
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[rows[:count]] = True  # the stored order is a shuffled one: any part is a fair sample
    return chosen


def evaluation_set(
    dataset: xr.Dataset,
    name: str,
    predictors: Mapping[str, Predictor],
    count: int,
    *,
    quiet: bool = False,
) -> Drawn:
    """Return the pinned profiles that versions of a registered model are compared on.

    Versions for measured profiles are compared on draws of them, for the data set's campaign;
    others on :func:`evaluation_rows`.

    Raises
    ------
    PromotionError
        If a version learnt from what is a test sample to another.
    """
    if registry.is_measured(name):
        campaign = campaign_of(dataset)
        return pinned_draws(campaign, -(-count // len(campaign.phases)), quiet=quiet)
    rows = evaluation_rows(dataset, predictors, count)
    batches = in_order(profiles_of(dataset, lambda values: values), rows)
    labels = samples_of(dataset)
    profiles = np.concatenate([batch.profiles for batch in batches])
    return Drawn(profiles, labels.phase[rows].astype(np.intp), labels.cells[rows])


def judge(predictor: Predictor, pinned: Drawn, *, quiet: bool = False) -> VersionScores:
    """Score a version on the pinned profiles, and time it."""
    phase, given, probabilities = answered(
        predictor, in_batches(pinned.profiles), len(pinned.phase), doing="Evaluating", quiet=quiet
    )
    truth, target = pinned.phase, pinned.cells
    tells_cells = bool(np.isfinite(given).all())
    scores = summary(
        predictor.targets,
        errors(predictor.targets, truth, target, phase, given if tells_cells else target),
    )
    taken = []
    for _ in range(_ANSWERS):
        began = time.perf_counter()
        predictor.predict(pinned.profiles[:1])
        taken.append(time.perf_counter() - began)
    return VersionScores(
        scores["all"]["mse_paper"] if tells_cells else math.nan,
        scores["all"]["accuracy"],
        calibration_error(probabilities, truth),
        statistics.median(taken),
        {k: v["mse_paper"] for k, v in scores.items() if k != "all"} if tells_cells else {},
    )


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="Of the registered model, such as batio3-nomad.")],
    version: Annotated[
        str | None, typer.Argument(help="Number of the version; the candidate if left out.")
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Make the previous champion answer again.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Tag of the data set to compare on; by default the candidate's own."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of its samples.")] = 2000,
    error_ratio: Annotated[
        float, typer.Option(min=0, help="Gate: mse_paper over the champion's, at most.")
    ] = Gate.error_ratio,
    accuracy_drop: Annotated[
        float, typer.Option(min=0, help="Gate: accuracy lower by at most.")
    ] = Gate.accuracy_drop,
    calibration_rise: Annotated[
        float, typer.Option(min=0, help="Gate: calibration error higher by at most.")
    ] = Gate.calibration_rise,
    seconds: Annotated[
        float, typer.Option(min=0, help="Gate: time of one answer, unless the champion's is more.")
    ] = Gate.seconds,
    force: Annotated[
        bool, typer.Option("--force", help="Promote whatever the gate says; needs --reason.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why; recorded with the version.")] = "",
    store: Annotated[str, typer.Option(help="Path or file:// URI of the store.")] = DEFAULT_URI,
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare a version with the champion on the same samples; promote it if it passes the gate.

    Versions for measured profiles are compared on draws of them. The comparison is a run in
    MLflow; the version keeps when, how and why it was promoted. The exit code is 1 if the gate was
    not passed. --rollback takes the last promotion back.
    """
    place = Tracking(tracking)
    given = "" if tracking == DEFAULT_TRACKING_URI else f" --tracking {shlex.quote(tracking)}"
    if rollback:
        now, before = promotion.rollback(place, name, reason=reason or "rolled back")
        say(f"[bold]{now.uri}[/] answers again; {before.uri} is the previous one.")
        return
    if force and not reason:
        raise PromotionError("--force overrules the gate: say why with --reason TEXT.")
    where = f"/{version}" if version else f"@{promotion.CANDIDATE}"
    candidate = registry.find(place, f"models:/{name}{where}")
    champion = registry.champion(place, name)
    if champion is not None and champion.version == candidate.version:
        say(f"{candidate.uri} is the champion already: nothing to do.")
        return
    versions = [candidate] + ([champion] if champion else [])
    predictors = {v.uri: load_version(place.uri, v) for v in versions}
    own = predictors[candidate.uri].provenance.data
    repository = Store(own.uri if data is None and store == DEFAULT_URI else store)
    dataset = repository.open(data or own.tag)
    pinned = evaluation_set(dataset, name, predictors, samples, quiet=as_json)
    judged = {uri: judge(one, pinned, quiet=as_json) for uri, one in predictors.items()}
    against = judged[champion.uri] if champion else None
    gate = Gate(error_ratio, accuracy_drop, calibration_rise, seconds)
    objections = gate.objections(judged[candidate.uri], against)
    _log(place, dataset, candidate, champion, judged, gate, objections, len(pinned.phase))
    passed = not objections
    if passed or force:
        promotion.promote(
            place, candidate, reason=reason or "passed the gate", forced=not passed,
            expected=champion.version if champion else None,
        )  # fmt: skip
    if as_json:
        told = {
            "candidate": candidate.uri, "champion": champion.uri if champion else None,
            "passed": passed, "promoted": passed or force, "objections": objections,
            "judged": {uri: asdict(j) for uri, j in judged.items()},
        }  # fmt: skip
        print(json.dumps(_plain(told), indent=2))
    else:
        _show(dataset, candidate, champion, judged, len(pinned.phase))
        for objection in objections:
            say(f"The gate objects to {candidate.uri}: {objection}.")
        if passed or force:
            say(f"[bold]{candidate.uri}[/] is the champion{'' if passed else ', by force'}.")
            next_commands(
                [
                    (f"python -m pipelines.predict FILE{given}", "ask it"),
                    (f"python -m pipelines.promote {name} --rollback{given}", "take it back"),
                ]
            )
        else:
            say("The champion stays.")
    raise typer.Exit(0 if passed or force else 1)


def _log(
    place: Tracking,
    dataset: xr.Dataset,
    candidate: registry.ModelVersion,
    champion: registry.ModelVersion | None,
    judged: Mapping[str, VersionScores],
    gate: Gate,
    objections: list[str],
    count: int,
) -> None:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    title = f"promotion of version {candidate.version} {started}"
    tags = {"mlflow.source.name": "pipelines.promote", "data": dataset.attrs["tag"],
            "verdict": "; ".join(objections) or "passed"}  # fmt: skip
    with place.run(candidate.name, title, tags) as run_:
        run_.log_parameters(
            {"candidate": candidate.uri, "champion": champion.uri if champion else "",
             "samples": count, "gate": asdict(gate)}
        )  # fmt: skip
        run_.log_dataset(dataset, "evaluation")
        for who, version in (("candidate", candidate), ("champion", champion)):
            if version is not None:
                run_.log_metrics({who: _finite(asdict(judged[version.uri]))})


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: _finite(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    return {k: v for k, v in found.items() if isinstance(v, dict) or math.isfinite(v)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(
    dataset: xr.Dataset,
    candidate: registry.ModelVersion,
    champion: registry.ModelVersion | None,
    judged: Mapping[str, VersionScores],
    count: int,
) -> None:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left",
        title=f"{count:,} "
        + ("draws of measured-looking profiles for the campaign of "
           if registry.is_measured(candidate.name) else "test samples of ")
        + str(dataset.attrs["tag"]),
    )  # fmt: skip
    systems = list(judged[candidate.uri].by_system)
    for heading in ("", "model", "mse_paper", *systems, "accuracy", "calibration error", "ms"):
        table.add_column(heading, justify="left" if heading in ("", "model") else "right")
    for who, version in (("candidate", candidate), ("champion", champion)):
        if version is not None:
            j = judged[version.uri]
            table.add_row(
                f"{who}, version {version.version}", version.tags.get("model", ""),
                f"{j.mse_paper:.3g}", *(f"{j.by_system.get(s, math.nan):.3g}" for s in systems),
                f"{j.accuracy:.4%}", f"{j.calibration_error:.4f}", f"{1e3 * j.seconds:.1f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    run(app)
