"""Check a data set: schema, labels, profiles, splits, and drift from measured profiles."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.table import Table

from bragg_data.measurement.load import load_measurements
from bragg_data.store.checks import Finding, check, drift
from bragg_data.store.repository import DEFAULT_URI, Store
from bragg_data.store.schema import campaign_of
from pipelines.cli.console import Progress, console, next_commands, run, say
from pipelines.train import default_tag

app = typer.Typer(add_completion=False)


@app.command()
def main(
    tag: Annotated[
        str | None, typer.Argument(help="Of the data set; by default the largest, newest one.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A measured profile to compare with; again for more."),
    ] = None,
    instrument: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Calibration of the measured profiles.")
    ] = None,
    bank: Annotated[int | None, typer.Option(help="Bank of the measured profiles.")] = None,
    peaks: Annotated[
        int, typer.Option(min=1, help="Profiles that are compared with their labels.")
    ] = 256,
    store: Annotated[str, typer.Option(help="Path or file:// URI of the store.")] = DEFAULT_URI,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else, for scripts.")
    ] = False,
) -> None:
    """Check a data set, and print what was found. The exit code is 1 if a hard check failed.

    The same checks stand before every tag: what fails a hard one is not tagged.
    """
    repository = Store(store)
    dataset = repository.open(tag or default_tag(repository))
    with Progress("Reading", dataset.sizes["sample"], "profiles", quiet=as_json) as bar:
        findings = check(dataset, peaks=peaks, on_chunk=bar.advance)
    if measured:
        campaign = campaign_of(dataset)
        profiles = [
            m.prepared for f in measured for m in load_measurements(f, campaign, instrument, bank)
        ]
        findings.append(drift(dataset, np.stack(profiles)))
    failed = [one for one in findings if one.hard and not one.passed]
    if as_json:
        # "found" is the deprecated name of "message".
        results = [asdict(one) | {"found": one.message} for one in findings]  # deprecated
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        name = dataset.attrs["tag"]
        _show(name, findings)
        given = "" if store == DEFAULT_URI else f" --store {shlex.quote(store)}"
        next_commands(
            [
                (f"python -m pipelines.inspect {dataset.attrs['tag']}{given}", "see what is in it"),
                (
                    f"python -m pipelines.train --data {dataset.attrs['tag']}{given}",
                    "learn from it",
                ),
            ]
        )
    raise typer.Exit(1 if failed else 0)


def _show(tag: str, findings: list[Finding]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=tag, title_justify="left")
    for heading in ("check", "", "found"):
        table.add_column(heading)
    for one in findings:
        verdict = "[green]passed[/]" if one.passed else (
            "[bold red]failed[/]" if one.hard else "[yellow]warning[/]"
        )  # fmt: skip
        table.add_row(one.name, verdict, one.message)
    console.print(table)
    hard = sum(one.hard and not one.passed for one in findings)
    say(f"{hard} hard checks failed." if hard else "All hard checks passed.")


if __name__ == "__main__":
    run(app)
