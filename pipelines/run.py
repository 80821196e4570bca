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
from pipelines.new_campaign import BankOption, BudgetOption, LikeOption, RangeOption, bank_number
from pipelines.training.names import DEFAULT_STATE

if TYPE_CHECKING:
    from pipelines.end_to_end.material import RunResult


class RunError(ValueError):
    """Options that contradict each other."""


def main(
    context: typer.Context,
    campaigns: Annotated[
        list[str] | None,
        Argument(metavar="[CAMPAIGN.toml]...", help="Several: of the banks of one instrument."),
    ] = None,
    cif: Annotated[
        list[str] | None, Option("--cif", metavar="FILE.cif", help="A structure (repeatable).")
    ] = None,
    bank: BankOption = None,
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
    reading: options.ReadingOptions,
    cluster: options.ClusterOptions,
) -> None:
    """Simulate, calibrate, test and register a model, and predict your profiles with it.

    From a campaign file; or from structures (--cif) and an instrument (--instrument, --bank), for
    which a campaign is designed and written. With --bank all each bank of the instrument gets a
    campaign and a model, and predictions of a sample's banks are combined. What to expect of the
    model is printed: its errors on simulated measurements that it was not calibrated on. Without
    any of these the paper's campaign is run, and bundled examples are predicted. Existing results
    are used again; after an interruption the same command continues.
    """
    from pipelines.training.presets import DEFAULT_PRESETS, Presets

    if not campaigns and not cif:
        if files or as_json:
            raise RunError("Name a campaign file, or structures with --cif and --instrument.")
        from pipelines.end_to_end.paper import run_paper

        of_paper = context.find_object(Presets) or DEFAULT_PRESETS
        run_paper((store, tracking), cluster, limit, preset, of_paper)
        return
    if campaigns and cif:
        raise RunError("Name a campaign file, or structures (--cif), not both.")
    if cif and reading.instrument is None:
        raise RunError("Structures (--cif) need an instrument file: --instrument FILE.")
    from pipelines.end_to_end import material
    from pipelines.prediction.distributed import raise_failures
    from pipelines.prediction.files import find_profiles

    began, number = time.monotonic(), bank_number(bank)
    paths = find_profiles(files or [])
    places = material.Places(store, tracking, state, cluster)
    # With --json nothing else is on standard output.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if cif and reading.instrument is not None:
            from bragg_data.campaign_design import DesignOptions

            stated = DesignOptions(
                tuple(cif), reading.instrument, number, like, tuple(ranges), budget, name
            )
            designed = material.designed_campaigns(stated, Path(), each_bank=bank == "all")
            campaigns = [str(path) for path in designed]
        presets = context.find_object(Presets)
        result = material.run_campaigns(campaigns or (), places, budget, limit, presets)
        failures: dict[Path, Exception] = {}
        if paths:
            # A designed campaign is of the bank that was named, and its profiles by their headers.
            profile = options.ProfileOptions(**vars(reading), bank=None if cif else number)
            page = Path(f"{result.name}-report.html")
            result, failures = material.predict_profiles(result, paths, profile, places, page)
        result = replace(result, seconds=time.monotonic() - began)
        _print_result(result, reading, store, tracking)
    if as_json:
        print_json(result.to_json())
    raise_failures(failures, len(paths))


def _print_result(
    result: RunResult, reading: options.ReadingOptions, store: str, tracking: str
) -> None:
    for outcome in result.outcomes:
        champion = "champion" if outcome.champion else "a candidate: it did not pass the gate"
        say(f"\n[bold]{outcome.version.uri}[/], {champion}, from {outcome.tag} in {escape(store)}")
        if outcome.expected is not None:
            say(f"Expect {outcome.expected}.")
    say(f"After {duration(result.seconds)}")
    instrument, model = reading.instrument or "YOURS.instprm", result.model
    predict = command_line(
        *("predict", "FILE", "--instrument", instrument, "--refine", "--model", model),
        tracking=tracking,
    )
    version = result.best.version.uri
    next_commands(
        (predict, "predict and refine a profile"),
        (command_line("lineage", version, tracking=tracking), "where it comes from"),
        ("make ui", "compare runs and models in a browser"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
