"""Measured profiles on their way into the store: read files and labels, print what was read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.markup import escape
from rich.table import Table

from bragg_data.campaign import Campaign
from bragg_data.measurement.load import Measurement, load_measurements
from pipelines.cli.console import Progress, console, say
from pipelines.cli.options import ProfileOptions


class IngestError(ValueError):
    """Measured profiles that cannot be stored."""


def read_measurements(
    files: Sequence[Path], campaign: Campaign, options: ProfileOptions, *, quiet: bool = False
) -> list[Measurement]:
    """Read profiles, which need significant peaks, and resample them on a campaign's grid."""
    calibration = options.instrument, options.bank, options.two_theta, options.reading
    measurements: list[Measurement] = []
    with Progress("Reading", len(files), "files", quiet=quiet) as bar:
        for file in files:
            measurements += load_measurements(file, campaign, *calibration)
            bar.advance()
    return measurements


def read_labels(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with labels of measured profiles; raise an IngestError if it is none."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise IngestError(f"The labels {path} cannot be read: {error}.") from error
    if "file" not in table:
        raise IngestError(f"The labels {path} have no column 'file'; it has {list(table)}.")
    if not isinstance(table.index, pd.RangeIndex):  # pandas makes row names of additional values
        raise IngestError(
            f"The labels {path} have more values in a line than columns; is it a decimal comma?"
        )
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def print_measurements(
    records: Sequence[Mapping[str, object]], measurements: Sequence[Measurement]
) -> None:
    """Print a line for each stored profile, and the warnings."""
    table = Table("sample", "file", "bank", "run", "points", "covered", "calibration", box=None)
    for number, (record, measured) in enumerate(zip(records, measurements, strict=True)):
        calibration = "none"
        if measured.calibration is not None:
            nominal = " (nominal)" * measured.nominal
            calibration = f"difC {measured.calibration.difc:g}{nominal}"
        source = escape(str(record["file"])), str(record["bank"] or ""), str(record["run"])
        points, covered = len(measured.profile.tof), measured.gridded.covered.mean()
        table.add_row(str(number), *source, f"{points:,}", f"{covered:.0%}", calibration)
    console.print(table)
    for warning in dict.fromkeys(w for measured in measurements for w in measured.warnings):
        say(f"[yellow]![/] {escape(warning)}")
