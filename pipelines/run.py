"""Everything with one command: from a campaign, or structures and an instrument, to a model."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, duration, next_commands, print_json, run, say
from pipelines.new_campaign import BudgetOption, LikeOption, RangeOption
from pipelines.training.names import DEFAULT_STATE

if TYPE_CHECKING:
    from pipelines.end_to_end.material import Outcome


class RunError(ValueError):
    """Options that contradict each other."""


def main(
    context: typer.Context,
    campaign: Annotated[
        str | None, Argument(metavar="[CAMPAIGN.toml]", help="By default the paper's.")
    ] = None,
    cif: Annotated[
        list[str] | None, Option("--cif", metavar="FILE.cif", help="A structure (repeatable).")
    ] = None,
    like: LikeOption = None,
    ranges: RangeOption = [],  # noqa: B006 (Typer's default of a repeatable option)
    name: Annotated[str | None, Option(help="Name of the campaign.")] = None,
    files: Annotated[
        list[Path] | None,
        Option("--profile", metavar="FILE", help="Measured, to predict and refine (repeatable)."),
    ] = None,
    budget: BudgetOption = 8.0,
    limit: Annotated[int | None, Option(min=1, help="Only the first samples.")] = None,
    preset: Annotated[str, Option(help="Of the paper's campaign: how it is trained.")] = "quick",
    as_json: options.JsonOption = False,
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    state: Annotated[Path, Option(help="Directory of checkpoints and caches.")] = DEFAULT_STATE,
    *,
    profile: options.ProfileOptions,
    cluster: options.ClusterOptions,
) -> None:
    """Simulate, calibrate, test and register a model, and predict your profiles with it.

    From a campaign file; or from structures (--cif) and an instrument (--instrument, --bank), for
    which a campaign is designed and written. What to expect of the model is printed: its errors on
    simulated measurements that it was not calibrated on. Without any of these the paper's campaign
    is run, and bundled examples are predicted. Existing results are used again; after an
    interruption the same command continues.
    """
    from pipelines.training.presets import DEFAULT_PRESETS, Presets

    if campaign is None and not cif:
        if files or as_json:
            raise RunError("Name a campaign file, or structures with --cif and --instrument.")
        from pipelines.end_to_end.paper import run_paper

        of_paper = context.find_object(Presets) or DEFAULT_PRESETS
        run_paper((store, tracking), cluster, limit, preset, of_paper)
        return
    if campaign is not None and cif:
        raise RunError("Name a campaign file, or structures (--cif), not both.")
    if cif and profile.instrument is None:
        raise RunError("Structures (--cif) need an instrument file: --instrument FILE.")
    from pipelines.end_to_end import material
    from pipelines.prediction.distributed import raise_failures
    from pipelines.prediction.files import find_profiles

    began = time.monotonic()
    paths = find_profiles(files or [])
    places = material.Places(store, tracking, state, cluster)
    # With --json nothing else is on standard output.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if cif and profile.instrument is not None:
            from bragg_data.campaign_design import DesignOptions

            stated = DesignOptions(
                tuple(cif), profile.instrument, profile.bank, like, tuple(ranges), budget, name
            )
            campaign = str(material.designed_campaign(stated, Path()))
        presets = context.find_object(Presets)
        outcome = material.run_campaign(str(campaign), places, budget, limit, presets)
        failures: dict[Path, Exception] = {}
        if paths:
            page = Path(f"{outcome.campaign}-report.html")
            reading = replace(profile, bank=None) if cif else profile
            outcome, failures = material.predict_profiles(outcome, paths, reading, places, page)
        outcome = replace(outcome, seconds=time.monotonic() - began)
        _print_outcome(outcome, profile, store, tracking)
    if as_json:
        print_json(outcome.to_json())
    raise_failures(failures, len(paths))


def _print_outcome(
    outcome: Outcome, profile: options.ProfileOptions, store: str, tracking: str
) -> None:
    champion = "champion" if outcome.champion else "a candidate: it did not pass the gate"
    say(f"\n[bold]{outcome.version.uri}[/], {champion}, from {outcome.tag} in {escape(store)}")
    if outcome.expected is not None:
        say(f"Expect {outcome.expected}.")
    say(f"After {duration(outcome.seconds)}")
    instrument = profile.instrument or "YOURS.instprm"
    model = ("--model", outcome.version.uri)
    predict = command_line(
        "predict", "FILE", "--instrument", instrument, "--refine", *model, tracking=tracking
    )
    next_commands(
        (predict, "predict and refine a profile"),
        (command_line("lineage", outcome.version.uri, tracking=tracking), "where it comes from"),
        ("make ui", "compare runs and models in a browser"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
