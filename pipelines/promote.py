"""Promote a registered model if it passes the gate, or take the last promotion back."""

from functools import partial
from typing import Annotated

import typer
from typer import Argument, Option

from catalog.gate import Gate
from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, print_json, run, say

_limit = partial(Option, min=0, rich_help_panel="Gate")


def main(
    name: Annotated[str, Argument(help="Of the registered model, such as batio3-nomad.")],
    version: Annotated[str | None, Argument(help="Number; by default the candidate.")] = None,
    rollback: Annotated[bool, Option("--rollback", help="Take the last promotion back.")] = False,
    data: Annotated[str | None, Option(help="Data set; by default the candidate's.")] = None,
    samples: Annotated[int, Option(min=1, help="Number of its samples.")] = 2000,
    error_ratio: Annotated[
        float, _limit(help="Limit of mse_paper / champion's.")
    ] = Gate.error_ratio,
    accuracy_drop: Annotated[float, _limit(help="Accuracy lower by at most.")] = Gate.accuracy_drop,
    calibration_rise: Annotated[
        float, _limit(help="Calibration error higher by at most.")
    ] = Gate.calibration_rise,
    seconds: Annotated[
        float, _limit(help="Time of a prediction, or the champion's if longer.")
    ] = Gate.seconds,
    force: Annotated[bool, Option("--force", help="Overrule the gate; needs --reason.")] = False,
    reason: Annotated[str, Option(help="Why; recorded with the version.")] = "",
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    as_json: options.JsonOption = False,
) -> None:
    """Compare a version with the champion on the same samples; promote it if it passes the gate.

    Versions for measured profiles are compared on draws of them. The comparison is a run in
    MLflow; the version records when, how and why it was promoted. The exit code is 1 if the gate
    was not passed. --rollback takes the last promotion back.
    """
    from catalog import registry
    from catalog.registry import PromotionError
    from catalog.tracking import Tracking
    from pipelines.evaluation import version_comparison as versions

    place = Tracking(tracking)
    if rollback:
        if version is not None:
            raise PromotionError(
                f"--rollback restores the previous champion and takes no VERSION, got {version}. "
                f"Promote that version instead: python -m pipelines.promote {name} {version}"
            )
        champion, previous = registry.rollback(place, name, reason=reason or "rolled back")
        say(f"[bold]{champion.uri}[/] is the champion again; {previous.uri} is the previous one.")
        return
    if force and not reason:
        raise PromotionError("--force overrules the gate: say why with --reason TEXT.")
    where = f"/{version}" if version else f"@{registry.CANDIDATE}"
    candidate = registry.find(place, f"models:/{name}{where}")
    present = registry.champion(place, name)
    if present is not None and present.version == candidate.version:
        say(f"{candidate.uri} is the champion already: nothing to do.")
        return
    gate = Gate(error_ratio, accuracy_drop, calibration_rise, seconds)
    on = versions.EvaluationData(store, data, samples)
    comparison = versions.compare_versions(place, candidate, present, gate, on, quiet=as_json)
    versions.log_comparison(place, comparison, gate)
    passed = not comparison.objections
    promoted = passed or force
    if promoted:
        expected, why = present.version if present else None, reason or "passed the gate"
        registry.promote(place, candidate, reason=why, expected=expected, forced=not passed)
    if as_json:
        print_json(comparison.to_json(promoted=promoted))
    else:
        versions.comparison_table(comparison).show()
        for objection in comparison.objections:
            say(f"The gate objects to {candidate.uri}: {objection}.")
        if promoted:
            say(f"[bold]{candidate.uri}[/] is the champion{'' if passed else ', by force'}.")
            take_back = command_line("promote", name, "--rollback", tracking=tracking)
            next_commands(
                (command_line("predict", "FILE", tracking=tracking), "predict with it"),
                (take_back, "take it back"),
            )
        else:
            say("The champion stays." if present else "It stays a candidate: there is no champion.")
    raise typer.Exit(0 if promoted else 1)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
