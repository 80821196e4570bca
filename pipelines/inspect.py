"""Show what a store holds: snapshots, counts, ranges, sizes, provenance, pictures of patterns."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import xarray as xr
from numpy.typing import NDArray
from rich import box
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase
from bragg_data.store import schema
from bragg_data.store.repository import (
    DEFAULT_URI,
    Store,
    StoreError,
    Tag,
    campaign_of,
    storage_errors,
    verify,
)
from pipelines.cli.console import console, next_commands, run, say
from pipelines.cli.style import SYMBOLS, SYSTEM_COLORS, UNITS


def summary(store: Store, tag: Tag) -> dict[str, Any]:
    """Return what is worth knowing of a tag, as JSON values.

    Returns
    -------
    tag, snapshot, samples (crystal system to count), simulator and content_hash, on which scripts
    may depend, and more. Ranges are those of the free parameters, by phase, in ångström and
    degrees.
    """
    dataset = store.open(tag.name)
    attrs = dataset.attrs
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
        "ranges": _ranges(dataset, campaign_of(dataset)),
        "simulator": attrs["simulator"],
        "simulator_version": attrs["simulator_version"],
        "call_path": attrs.get("call_path", ""),
        "code_commit": attrs["code_commit"],
        "schema_version": attrs["schema_version"],
        "identity": attrs["identity"],
        "content_hash": attrs["content_hash"],
    }


def _ranges(dataset: xr.Dataset, campaign: Campaign) -> dict[str, dict[str, tuple[float, float]]]:
    samples = schema.samples_of(dataset)
    ranges = {
        phase.name: schema.free_ranges(
            samples.cells[samples.phase == code], phase.lattice.free_parameters
        )
        for code, phase in enumerate(campaign.phases)
    }
    return {name: of_phase for name, of_phase in ranges.items() if of_phase}


def _show_tags(summaries: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tag", "written (UTC)", "patterns", "of them", "simulator", "on disk"):
        table.add_column(heading, justify="right" if heading in ("patterns", "on disk") else "left")
    table.add_column("content hash", overflow="ellipsis", no_wrap=True)
    for one in summaries:
        table.add_row(
            f"[bold]{one['tag']}[/]",
            one["written_at"][:16].replace("T", " "),
            f"{one['total_samples']:,}",
            ", ".join(f"{count:,} {system}" for system, count in one["samples"].items()),
            f"{one['simulator']} {one['simulator_version']}",
            decimal(one["bytes_stored"]),
            one["content_hash"][:12],
        )
    console.print(table)


def _show_tag(one: dict[str, Any], dataset: xr.Dataset) -> None:
    campaign = campaign_of(dataset)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=one["tag"], title_justify="left")
    for heading in ("phase", "crystal system", "space group", "patterns", "free parameters"):
        table.add_column(heading, justify="right" if heading == "patterns" else "left")
    for code, phase in enumerate(campaign.phases):
        free = one["ranges"].get(phase.name, {})
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
    console.print(table)
    instrument, grid = campaign.instrument, campaign.grid
    facts = Table.grid(padding=(0, 2, 0, 0))
    for name, value in (
        ("campaign", f"{campaign.name}: {campaign.description}"),
        (
            "grid",
            f"{grid.points:,} points, {grid.start / 1e3:g} to {grid.stop / 1e3:.5g} ms, "
            f"ΔT/T = {grid.relative_step:g}",
        ),
        (
            "instrument",
            f"bank {instrument.bank}, 2θ {instrument.two_theta:g}°, difC {instrument.difc:g} µs/Å",
        ),
        ("broadening", f"size {campaign.size:g} µm, microstrain {campaign.microstrain:g}e-6"),
        (
            "simulator",
            f"{one['simulator']}, version {one['simulator_version']}"
            + (f", call path {one['call_path']}" if one["call_path"] else ""),
        ),
        ("code commit", one["code_commit"]),
        ("snapshot", f"{one['snapshot']}, written {one['written_at']}"),
        ("chunks", f"{one['rows_per_chunk']:,} patterns, {one['points']:,} points"),
        ("on disk", decimal(one["bytes_stored"])),
        ("identity", one["identity"]),
        ("content hash", one["content_hash"]),
    ):
        facts.add_row(name, value)
    console.print(facts)


def draw_patterns(dataset: xr.Dataset, file: Path) -> None:
    """Draw two patterns of each phase: the cell nearest to the CIF's, and the first one stored."""
    # Without pyplot no display is looked for.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    campaign = campaign_of(dataset)
    samples = schema.samples_of(dataset)
    present = [code for code in range(len(campaign.phases)) if (samples.phase == code).any()]
    figure = Figure(figsize=(10, 1.0 + 2.2 * len(present)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(present), sharex=True))
    time_of_flight = dataset.tof.values / 1000
    for axis, code in zip(axes, present, strict=True):
        phase = campaign.phases[code]
        rows = np.flatnonzero(samples.phase == code)
        nearest = rows[np.argmin(np.linalg.norm(samples.cells[rows] - phase.cell, axis=1))]
        color = SYSTEM_COLORS[phase.crystal_system]
        for row in dict.fromkeys((rows[0], nearest)):
            intensity = dataset.intensity[int(row)].values
            main = row == nearest
            axis.plot(
                time_of_flight,
                intensity,
                color=color if main else "0.65",
                linewidth=1.0 if main else 0.7,
                label=free_text(samples.cells[row], phase),
            )
            if main:
                axis.fill_between(time_of_flight, intensity, color=color, alpha=0.12, linewidth=0)
        # Few and weak peaks at short times leave room there.
        axis.legend(
            loc="upper left",
            title=f"{phase.name}, {phase.space_group}",
            title_fontproperties={"weight": "bold", "size": 10},
            alignment="left",
            frameon=False,
            fontsize=9,
        )
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlim(time_of_flight[0], time_of_flight[-1])
    axes[-1].set_xlabel("time of flight / ms")
    figure.supylabel("intensity per µs (arbitrary scale)", fontsize=10)
    figure.suptitle(f"{dataset.attrs['tag']}  ({dataset.sizes['sample']:,} patterns)", fontsize=11)
    scale = axes[0].twiny()
    to_d, to_tof = campaign.instrument.d_spacing_from_tof, campaign.instrument.tof_from_d_spacing
    low, high = to_d(dataset.tof.values[[0, -1]])
    ticks = MaxNLocator(10).tick_values(low, high)
    ticks = ticks[(ticks > low) & (ticks < high)]
    scale.set_xlim(axes[-1].get_xlim())
    scale.set_xticks(to_tof(ticks) / 1000, [f"{tick:.3g}" for tick in ticks], fontsize=8)
    scale.set_xlabel("d / Å")
    scale.spines["right"].set_visible(False)
    figure.savefig(file, format="png", dpi=150)


def free_text(cell: NDArray[np.float64], phase: Phase) -> str:
    """Write the free parameters of a cell: a = 4 Å, α = 89.8°."""
    values = zip(CELL_PARAMETERS, cell, strict=True)
    return ", ".join(
        f"{SYMBOLS[name]} = {value:g}{' Å' if name in 'abc' else '°'}"
        for name, value in values
        if name in phase.lattice.free_parameters
    )


app = typer.Typer(add_completion=False)


@app.command()
def main(
    tag: Annotated[
        str | None, typer.Argument(help="One snapshot; all of them if left out.")
    ] = None,
    store: Annotated[
        str, typer.Option(metavar="URI", help="Directory of the store.")
    ] = DEFAULT_URI,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list, one for each tag.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a few patterns (of the last tag).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Read everything and compare the content hash.")
    ] = False,
) -> None:
    """Show what a store holds: snapshots, counts, ranges, sizes, provenance, a few patterns."""
    repository = Store(store)
    tags = repository.tags()
    if tag is not None:
        repository.open(tag)  # refuses one that is not there
        tags = [known for known in tags if known.name == tag]
    if png is not None:
        if not tags:
            raise StoreError(f"{repository.uri} has no tags yet, so there is nothing to draw.")
        with storage_errors(f"writing {png}"):
            draw_patterns(repository.open(tags[-1].name), png)
    summaries = [summary(repository, one) for one in tags]
    if check:
        for one in tags:
            verify(repository.open(one.name))
    if as_json:
        # Not by rich, which would break long lines.
        print(json.dumps(summaries, indent=2))
        return
    say(f"Store {escape(repository.uri)}")
    if tag is not None:
        _show_tag(summaries[0], repository.open(tag))
    else:
        if summaries:
            _show_tags(summaries)
        else:
            say("No snapshots yet. Make one with: python -m pipelines.simulate")
        _show_unfinished(repository)
    if check:
        names = ", ".join(one.name for one in tags) or "no snapshot"
        say(f"Verified, byte for byte what was written: {names}")
    if png is not None:
        say(f"Drawn: patterns of {tags[-1].name} in {escape(str(png))}")
    where = "" if store == DEFAULT_URI else f" --store {shlex.quote(store)}"
    if tags and tag is None:
        name = tags[-1].name
        next_commands(
            [
                (f"python -m pipelines.inspect {name}{where}", "its ranges and provenance"),
                (f"python -m pipelines.inspect {name}{where} --verify", "read and check it all"),
            ]
        )


def _show_unfinished(store: Store) -> None:
    for one in store.unfinished():
        failed = f", {one.failed_blocks} blocks failed" if one.failed_blocks else ""
        say(
            f"Unfinished: branch {one.branch}, {one.done:,} of {one.total:,} patterns{failed}. "
            f"The command that began it completes it."
        )


if __name__ == "__main__":
    run(app)
