"""Tables of what a store holds or gets: snapshots, checks, changes, and measured profiles."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from rich import box
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from bragg_data.campaign import Campaign
from bragg_data.measurement.load import Measurement, load_measurements
from bragg_data.store import schema
from bragg_data.store.checks import Finding
from bragg_data.store.diff import SAME_INTENSITY, Changes
from bragg_data.store.repository import Store, Tag
from bragg_data.store.schema import campaign_of
from pipelines.cli.console import Progress, console, print_rows, say
from pipelines.cli.options import ProfileOptions
from pipelines.cli.style import SYMBOLS, UNITS

_NUMBERS = ("patterns", "on disk", "in both")  # headings of columns that are aligned to the right


def summary_of(store: Store, tag: Tag) -> dict[str, Any]:
    """Return contents and provenance of a tagged snapshot, as JSON values.

    Among them are the number of samples of each crystal system, the range of each free parameter
    by phase (Å and degrees), the way to call the simulator, empty where there is only one, and the
    snapshots from which patterns were copied.
    """
    dataset = store.open(tag.name)
    attrs = dataset.attrs
    simulated = ("simulator", "simulator_version", "code_commit", "schema_version", "identity")
    return {
        "tag": tag.name,
        "snapshot": tag.snapshot_id,
        "written_at": tag.written_at.isoformat(timespec="seconds"),
        "campaign": attrs["campaign"],
        "samples": schema.counts_per_system(dataset),
        "total_samples": dataset.sizes["sample"],
        "points": dataset.sizes["tof"],
        "rows_per_chunk": attrs["rows_per_chunk"],
        "bytes_stored": store.size(tag.name),
        "ranges": _ranges(dataset),
        **{name: attrs[name] for name in simulated},
        "structure_assumptions": json.loads(attrs.get("structure_assumptions", "[]")),
        "call_path": attrs.get("call_path", ""),
        "reused_from": json.loads(attrs.get("reused_from", "[]")),
        "content_hash": attrs["content_hash"],
    }


def _ranges(dataset: xr.Dataset) -> dict[str, dict[str, tuple[float, float]]]:
    samples = schema.samples_of(dataset)
    ranges = {
        phase.name: schema.free_ranges(
            samples.cells[samples.phase == code], phase.lattice.free_parameters
        )
        for code, phase in enumerate(campaign_of(dataset).phases)
    }
    return {name: of_phase for name, of_phase in ranges.items() if of_phase}


def _table(title: str | None, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in headings:
        number = heading in _NUMBERS or heading.startswith("only ")
        table.add_column(heading, justify="right" if number else "left")
    return table


def print_tags(summaries: Sequence[dict[str, Any]]) -> None:
    """Print a line for each snapshot."""
    headings = ("tag", "written (UTC)", "patterns", "of them", "simulator", "on disk")
    table = _table(None, *headings)
    table.add_column("content hash", overflow="ellipsis", no_wrap=True)
    for summary in summaries:
        table.add_row(
            f"[bold]{summary['tag']}[/]",
            summary["written_at"][:16].replace("T", " "),
            f"{summary['total_samples']:,}",
            ", ".join(f"{count:,} {system}" for system, count in summary["samples"].items()),
            f"{summary['simulator']} {summary['simulator_version']}",
            decimal(summary["bytes_stored"]),
            summary["content_hash"][:12],
        )
    console.print(table)


def print_unfinished(store: Store) -> None:
    """Print a line for each data set that is not complete."""
    for data_set in store.unfinished():
        failed = f", {data_set.failed_blocks} blocks failed" if data_set.failed_blocks else ""
        say(
            f"Unfinished: branch {data_set.branch}, {data_set.done:,} of {data_set.total:,} "
            f"patterns{failed}. The command that began it completes it."
        )


def print_snapshot(summary: dict[str, Any], dataset: xr.Dataset) -> None:
    """Print phases, instrument, grid and provenance of a snapshot."""
    campaign = campaign_of(dataset)
    headings = ("phase", "crystal system", "space group", "patterns", "free parameters")
    table = _table(summary["tag"], *headings)
    for code, phase in enumerate(campaign.phases):
        free = summary["ranges"].get(phase.name, {})
        ranges = (
            f"{SYMBOLS[name]} {low:g} to {high:g} {UNITS[name]}"
            for name, (low, high) in free.items()
        )
        patterns = f"{int((dataset.phase == code).sum()):,}"
        names = phase.name, phase.crystal_system.name, phase.space_group
        table.add_row(*names, patterns, ", ".join(ranges))
    console.print(table)
    instrument, grid = campaign.instrument, campaign.grid
    window = f"{grid.start / 1e3:g} to {grid.stop / 1e3:.5g} ms"
    call_path = f", call path {summary['call_path']}" if summary["call_path"] else ""
    rows = {
        "campaign": f"{campaign.name}: {campaign.description}",
        "grid": f"{grid.points:,} points, {window}, ΔT/T = {grid.relative_step:g}",
        "instrument": f"bank {instrument.bank}, 2θ {instrument.two_theta:g}°, "
        f"difC {instrument.difc:g} µs/Å",
        "broadening": f"size {campaign.size:g} µm, microstrain {campaign.microstrain:g}e-6",
        "simulator": f"{summary['simulator']}, version {summary['simulator_version']}{call_path}",
        "code commit": summary["code_commit"],
        "snapshot": f"{summary['snapshot']}, written {summary['written_at']}",
        "chunks": f"{summary['rows_per_chunk']:,} patterns, {summary['points']:,} points",
        "on disk": decimal(summary["bytes_stored"]),
        "identity": summary["identity"],
        "content hash": summary["content_hash"],
    }
    for donor in summary["reused_from"]:
        name = f"{donor['tag'] or donor['branch']} ({donor['snapshot_id']})"
        rows[f"copied from {name}"] = f"{donor['patterns']:,} patterns"
    print_rows(rows)
    for assumption in summary["structure_assumptions"]:
        say(f"[yellow]{escape(assumption)}[/]")


def print_findings(tag: str, findings: Sequence[Finding]) -> None:
    """Print a line for each check, and how many hard checks failed."""
    table = _table(tag, "check", "", "result")
    for finding in findings:
        failure = "[bold red]failed[/]" if finding.hard else "[yellow]warning[/]"
        outcome = "[green]passed[/]" if finding.passed else failure
        table.add_row(finding.name, outcome, finding.message)
    console.print(table)
    hard = sum(finding.hard and not finding.passed for finding in findings)
    say(f"{hard} hard checks failed." if hard else "All hard checks passed.")


def changes_to_json(old: xr.Dataset, new: xr.Dataset, difference: Changes) -> dict[str, object]:
    """Return the changes, and what identifies the two data sets, as JSON values."""
    names = ("tag", "snapshot_id", "content_hash")
    old_id, new_id = (
        {name: d.attrs[name] for name in names} | {"samples": d.sizes["sample"]} for d in (old, new)
    )
    return {"old": old_id, "new": new_id} | asdict(difference)


def print_changes(old: xr.Dataset, new: xr.Dataset, difference: Changes) -> None:
    """Print how a data set differs from an older one."""
    tags = old.attrs["tag"], new.attrs["tag"]
    say(f"[bold]{tags[0]}[/] to [bold]{tags[1]}[/]")
    if difference.identical:
        say(f"Identical contents: the content hash of both is {new.attrs['content_hash']}.")
    else:
        hashes = [dataset.attrs["content_hash"][:12] for dataset in (old, new)]
        say(f"The contents differ: content hashes {hashes[0]}… and {hashes[1]}….")
    if difference.definition:
        table = _table("Definition and provenance", "what", *tags)
        for row in difference.definition:
            table.add_row(*(escape(text or "–") for text in (row.what, row.old, row.new)))
        console.print(table)
    else:
        say("Their definitions and provenance are the same.")
    _print_samples(tags, difference)
    say(_intensities_text(difference))
    if difference.same_blocks and not difference.identical:
        say(
            f"Blocks of {tags[1]} that are in {tags[0]} byte for byte, by their SHA-256: "
            f"{difference.same_blocks:,} of {difference.blocks:,}."
        )
    before, after = (d.attrs["campaign_toml"].splitlines() for d in (old, new))
    names = [f"campaign of {tag}" for tag in tags]
    lines = list(difflib.unified_diff(before, after, names[0], names[1], lineterm=""))
    if lines:
        say("\nCampaign files")
    for line in lines:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[0], "default")
        say(f"[{style}]{escape(line)}[/]")


def _print_samples(tags: tuple[str, str], difference: Changes) -> None:
    counted = ("in both", f"only {tags[0]}", f"only {tags[1]}")
    table = _table("Samples", "phase", "crystal system", *counted)
    counts = [(phase.both, phase.only_old, phase.only_new) for phase in difference.phases]
    for phase, row in zip(difference.phases, counts, strict=True):
        table.add_row(phase.phase, phase.crystal_system, *(f"{count:,}" for count in row))
    totals = (f"{sum(column):,}" for column in zip(*counts, strict=True))
    table.add_row("[bold]all[/]", "", *(f"[bold]{total}[/]" for total in totals))
    console.print(table)
    table = _table("Ranges of the free parameters", "phase", "parameter", *tags)
    for phase in difference.phases:
        for name in phase.old_ranges | phase.new_ranges:
            ranges = (
                f"{side[name][0]:g} to {side[name][1]:g} {UNITS[name]}" if name in side else "–"
                for side in (phase.old_ranges, phase.new_ranges)
            )
            table.add_row(phase.phase, name, *ranges)
    console.print(table)


def _intensities_text(difference: Changes) -> str:
    if difference.identical:
        return "Intensities: identical, since the content hashes are."
    if not difference.same_grid:
        return "Intensities: not compared, because the time-of-flight grids differ."
    total = difference.intensities
    if total is None:
        return "Intensities: not compared, because no sample is in both."
    text = f"Intensities: {total.compared:,} of {total.common:,} common samples compared, "
    if total.largest == 0:
        return f"{text}all are equal."
    text += (
        f"{total.differing:,} differ by more than {SAME_INTENSITY:g} of the pattern's maximum; "
        f"the largest difference is {total.largest:.2g} of it."
    )
    parts = [
        f"{phase.phase} {part.differing:,} of {part.compared:,}, up to {part.largest:.2g}"
        for phase in difference.phases
        for part in (phase.intensities,)
        if part is not None and part.differing
    ]
    return f"{text} By phase: {'; '.join(parts)}." if parts else text


# ---- measured profiles on their way into the store ----------------------------------------------


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
