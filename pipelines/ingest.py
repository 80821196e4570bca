"""Bring measured profiles into the store: as they were read, on a campaign's grid, and tagged."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.markup import escape
from rich.table import Table

from bragg_data.campaign import load_campaign
from bragg_data.measurement.load import Measurement, load_measurements
from bragg_data.preprocessing import PreprocessingError
from bragg_data.provenance import code_commit
from bragg_data.store.measured import (
    labels_from,
    measured_dataset,
    measurement_records,
    write_measured,
)
from bragg_data.store.repository import DEFAULT_URI, Store
from pipelines.cli.console import Progress, console, next_commands, run, say
from pipelines.prediction.distributed import files_of

app = typer.Typer(add_completion=False)


class IngestError(ValueError):
    """Measured profiles that cannot be taken in."""


@app.command()
def main(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Profiles, and folders of them, as python -m pipelines.predict."
        ),
    ],
    into: Annotated[str, typer.Option(metavar="NAME", help="Name of the measured data set.")],
    instrument: Annotated[
        Path | None,
        typer.Option(metavar="FILE.instprm", help="The measurement's own calibration. Do give it."),
    ] = None,
    bank: Annotated[int | None, typer.Option(help="Only this bank of the files.")] = None,
    two_theta: Annotated[
        float | None,
        typer.Option(min=0, max=180, help="Scattering angle (°), if FILE does not say it."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="What is known: file, phase (or crystal_system), and its free parameters.",
        ),
    ] = None,
    campaign: Annotated[
        str, typer.Option(metavar="NAME|FILE.toml", help="Whose grid and instrument.")
    ] = "batio3-nomad",
    store: Annotated[str, typer.Option(metavar="URI", help="Directory of the store.")] = (
        DEFAULT_URI
    ),
    tag: Annotated[str | None, typer.Option(help="Snapshot's name; by default NAME-vN.")] = None,
) -> None:
    """Put measured profiles into the versioned store, as a measured data set with a tag.

    Each profile is kept as it was read (group native/…), with its file's SHA-256, header and
    calibration, and brought to the campaign's grid, where it looks like a simulated one:
    catalog.features.load("measured_aligned", dataset=TAG) is what a model is asked about.
    """
    chosen = load_campaign(campaign)
    meant = files_of(files)
    measurements: list[Measurement] = []
    with Progress("Reading", len(meant), "files") as bar:
        for file in meant:
            found = load_measurements(file, chosen, instrument, bank, two_theta)
            for one in found:
                try:
                    _ = one.prepared
                except PreprocessingError as error:
                    raise IngestError(f"{one.profile.name}: {error}") from error
            measurements += found
            bar.advance()
    rows = [] if labels is None else _rows(labels)
    dataset = measured_dataset(
        into, chosen, measurements, labels_from(rows, measurements, chosen), code_commit()
    )
    repository = Store(store, create=True)
    made = write_measured(repository, dataset, measurements, tag)
    _show(measurement_records(dataset), measurements)
    say(f"Tag [bold]{made.name}[/], snapshot {made.snapshot_id}, in {escape(repository.uri)}")
    given = "" if store == DEFAULT_URI else f" --store {shlex.quote(store)}"
    next_commands(
        [
            (f"python -m pipelines.features materialise measured_aligned --data {made.name}{given}",
             "keep what a model sees of it"),
            (f"python -m pipelines.validate --data {made.name}{given}", "ask models about it"),
            (f"python -m pipelines.inspect {made.name}{given}", "what is in it"),
        ]
    )  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise IngestError(f"The labels {path} cannot be read: {error}.") from error
    if "file" not in table:
        raise IngestError(f"The labels {path} have no column 'file'; it has {list(table)}.")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what is too many for row names
        raise IngestError(
            f"The labels {path} have more values in a line than columns; is it a decimal comma?"
        )
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _show(told: list[dict[str, object]], measurements: list[Measurement]) -> None:
    table = Table(box=None)
    for heading in ("sample", "file", "bank", "run", "points", "covered", "calibration"):
        table.add_column(heading)
    for number, (one, measured) in enumerate(zip(told, measurements, strict=True)):
        own = measured.calibration
        table.add_row(
            str(number), escape(str(one["file"])), str(one["bank"] or ""), str(one["run"]),
            f"{len(measured.profile.tof):,}", f"{measured.gridded.covered.mean():.0%}",
            "none" if own is None else f"difC {own.difc:g}" + (" (nominal)" * measured.nominal),
        )  # fmt: skip
    console.print(table)
    for warning in dict.fromkeys(w for one in measurements for w in one.warnings):
        say(f"[yellow]![/] {escape(warning)}")


if __name__ == "__main__":
    run(app)
