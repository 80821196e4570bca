"""Summaries of the snapshots of a store: contents, ranges, size and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xarray as xr
from rich import box
from rich.filesize import decimal
from rich.table import Table

from bragg_data.campaign import Campaign
from bragg_data.store import schema
from bragg_data.store.repository import Store, Tag
from bragg_data.store.schema import campaign_of
from pipelines.cli.console import console, say
from pipelines.cli.style import SYMBOLS, UNITS


@dataclass(frozen=True)
class SnapshotSummary:
    """Contents and provenance of a snapshot; the fields are the keys of the JSON output.

    Attributes
    ----------
    tag, snapshot, written_at
        Name, id and time (ISO 8601, UTC).
    campaign
        Name of the campaign.
    samples
        Number of samples of each crystal system.
    total_samples, points, rows_per_chunk, bytes_stored
        Size.
    ranges
        Lowest and highest value of each free parameter, by phase, in ångström and degrees.
    simulator, simulator_version, call_path
        The simulator; the way to call it is empty where there is only one.
    code_commit, schema_version, identity, content_hash
        Provenance.
    """

    tag: str
    snapshot: str
    written_at: str
    campaign: str
    samples: dict[str, int]
    total_samples: int
    points: int
    rows_per_chunk: int
    bytes_stored: int
    ranges: dict[str, dict[str, tuple[float, float]]]
    simulator: str
    simulator_version: str
    call_path: str
    code_commit: str
    schema_version: int
    identity: str
    content_hash: str


def summary_of(store: Store, tag: Tag) -> SnapshotSummary:
    """Return the summary of a tagged snapshot."""
    dataset = store.open(tag.name)
    attrs = dataset.attrs
    return SnapshotSummary(
        tag=tag.name,
        snapshot=tag.snapshot_id,
        written_at=tag.written_at.isoformat(timespec="seconds"),
        campaign=attrs["campaign"],
        samples=schema.counts_per_system(dataset),
        total_samples=dataset.sizes["sample"],
        points=dataset.sizes["tof"],
        rows_per_chunk=attrs["rows_per_chunk"],
        bytes_stored=store.size(tag.name),
        ranges=_ranges(dataset, campaign_of(dataset)),
        simulator=attrs["simulator"],
        simulator_version=attrs["simulator_version"],
        call_path=attrs.get("call_path", ""),
        code_commit=attrs["code_commit"],
        schema_version=attrs["schema_version"],
        identity=attrs["identity"],
        content_hash=attrs["content_hash"],
    )


def _ranges(dataset: xr.Dataset, campaign: Campaign) -> dict[str, dict[str, tuple[float, float]]]:
    samples = schema.samples_of(dataset)
    ranges = {
        phase.name: schema.free_ranges(
            samples.cells[samples.phase == code], phase.lattice.free_parameters
        )
        for code, phase in enumerate(campaign.phases)
    }
    return {name: of_phase for name, of_phase in ranges.items() if of_phase}


def print_tags(summaries: Sequence[SnapshotSummary]) -> None:
    """Print a line for each snapshot."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tag", "written (UTC)", "patterns", "of them", "simulator", "on disk"):
        table.add_column(heading, justify="right" if heading in ("patterns", "on disk") else "left")
    table.add_column("content hash", overflow="ellipsis", no_wrap=True)
    for summary in summaries:
        table.add_row(
            f"[bold]{summary.tag}[/]",
            summary.written_at[:16].replace("T", " "),
            f"{summary.total_samples:,}",
            ", ".join(f"{count:,} {system}" for system, count in summary.samples.items()),
            f"{summary.simulator} {summary.simulator_version}",
            decimal(summary.bytes_stored),
            summary.content_hash[:12],
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


def print_snapshot(summary: SnapshotSummary, dataset: xr.Dataset) -> None:
    """Print phases, instrument, grid and provenance of a snapshot."""
    campaign = campaign_of(dataset)
    console.print(_phases(summary, dataset, campaign))
    instrument, grid = campaign.instrument, campaign.grid
    window = f"{grid.start / 1e3:g} to {grid.stop / 1e3:.5g} ms"
    call_path = f", call path {summary.call_path}" if summary.call_path else ""
    rows = {
        "campaign": f"{campaign.name}: {campaign.description}",
        "grid": f"{grid.points:,} points, {window}, ΔT/T = {grid.relative_step:g}",
        "instrument": f"bank {instrument.bank}, 2θ {instrument.two_theta:g}°, "
        f"difC {instrument.difc:g} µs/Å",
        "broadening": f"size {campaign.size:g} µm, microstrain {campaign.microstrain:g}e-6",
        "simulator": f"{summary.simulator}, version {summary.simulator_version}{call_path}",
        "code commit": summary.code_commit,
        "snapshot": f"{summary.snapshot}, written {summary.written_at}",
        "chunks": f"{summary.rows_per_chunk:,} patterns, {summary.points:,} points",
        "on disk": decimal(summary.bytes_stored),
        "identity": summary.identity,
        "content hash": summary.content_hash,
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _phases(summary: SnapshotSummary, dataset: xr.Dataset, campaign: Campaign) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=summary.tag, title_justify="left")
    for heading in ("phase", "crystal system", "space group", "patterns", "free parameters"):
        table.add_column(heading, justify="right" if heading == "patterns" else "left")
    for code, phase in enumerate(campaign.phases):
        free = summary.ranges.get(phase.name, {})
        table.add_row(
            phase.name,
            phase.crystal_system.name,
            phase.space_group,
            f"{int((dataset.phase == code).sum()):,}",
            ", ".join(
                f"{SYMBOLS[name]} {low:g} to {high:g} {UNITS[name]}"
                for name, (low, high) in free.items()
            ),
        )
    return table
