"""Check a data set: schema, labels, profiles, splits, and drift from measured profiles."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import Progress, command_line, next_commands, print_json, run


def main(
    profile: options.ProfileOptions,
    tag: Annotated[str | None, Argument(help="Data set; by default the largest, newest.")] = None,
    measured: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="Measured profile to compare with; again for more."),
    ] = None,
    peaks: Annotated[int, Option(min=1, help="Profiles whose peaks are checked.")] = 256,
    store: options.StoreOption = options.DEFAULT_URI,
    as_json: options.JsonOption = False,
) -> None:
    """Check a data set, and print the findings. The exit code is 1 if a hard check failed.

    The same checks run before every tag: a data set that fails a hard check is not tagged.
    """
    import numpy as np

    from bragg_data.store import schema
    from bragg_data.store.checks import check, drift
    from bragg_data.store.repository import Store
    from pipelines.snapshots.tables import print_findings, read_measurements

    repository = Store(store)
    dataset = repository.open(tag or options.default_tag(repository))
    with Progress("Reading", dataset.sizes["sample"], "profiles", quiet=as_json) as bar:
        findings = check(dataset, peaks=peaks, on_chunk=bar.advance)
    if measured:
        campaign = schema.campaign_of(dataset)
        read = read_measurements(measured, campaign, profile, quiet=as_json)
        findings.append(drift(dataset, np.stack([m.prepared for m in read])))
    if as_json:
        print_json([asdict(f) | {"found": f.message} for f in findings])  # deprecated: found
    else:
        name = dataset.attrs["tag"]
        print_findings(name, findings)
        next_commands(
            (command_line("inspect", name, store=store), "see what is in it"),
            (command_line("train", "--data", name, store=store), "train a model on it"),
        )
    failed = any(finding.hard and not finding.passed for finding in findings)
    raise typer.Exit(1 if failed else 0)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
