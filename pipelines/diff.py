"""Tell what changed between two tags: definition, samples, ranges, intensities."""

from __future__ import annotations

import difflib
import json
import shlex
from dataclasses import asdict
from typing import Annotated

import typer
import xarray as xr
from rich import box
from rich.markup import escape
from rich.table import Table

from bragg_data.store.diff import SAME_INTENSITY, Changes, changes
from bragg_data.store.repository import DEFAULT_URI, Store, storage_errors
from pipelines.cli.console import console, next_commands, run, say

app = typer.Typer(add_completion=False)


@app.command()
def main(
    old: Annotated[str, typer.Argument(metavar="TAG1", help="The data set to compare with.")],
    new: Annotated[str, typer.Argument(metavar="TAG2", help="The one that may have changed.")],
    store: Annotated[str, typer.Option(metavar="URI", help="Directory of the store.")] = (
        DEFAULT_URI
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else, for scripts.")
    ] = False,
) -> None:
    """Tell what changed from one tagged data set to another, of the same campaign or not.

    Samples are the same if they have the same phase and cell. All labels are compared, but the
    intensities of a few hundred samples only; the content hash and the blocks' tell of them all.
    """
    repository = Store(store)
    first, second = repository.open(old), repository.open(new)
    with storage_errors(f"comparing '{old}' with '{new}'"):
        found = changes(first, second)
    if as_json:
        sides = {"old": _side(first), "new": _side(second)}
        print(json.dumps(sides | asdict(found), indent=2, ensure_ascii=False))
        return
    _show(first, second, found)
    given = "" if store == DEFAULT_URI else f" --store {shlex.quote(store)}"
    next_commands(
        [
            (f"python -m pipelines.inspect {new}{given}", "its ranges and provenance"),
            (f"python -m pipelines.check {new}{given}", "check it before learning from it"),
            (f"python -m pipelines.features stale{given}", "what newer tags put out of date"),
        ]
    )


def _side(dataset: xr.Dataset) -> dict[str, str | int]:
    attrs = dataset.attrs
    told = {name: attrs[name] for name in ("tag", "snapshot_id", "content_hash")}
    return told | {"samples": dataset.sizes["sample"]}


def _show(old: xr.Dataset, new: xr.Dataset, found: Changes) -> None:
    tags = old.attrs["tag"], new.attrs["tag"]
    say(f"[bold]{tags[0]}[/] to [bold]{tags[1]}[/]")
    if found.identical:
        say(f"Identical contents: the content hash of both is {new.attrs['content_hash']}.")
    else:
        hashes = [one.attrs["content_hash"][:12] for one in (old, new)]
        say(f"The contents differ: content hashes {hashes[0]}… and {hashes[1]}….")
    if found.definition:
        table = _table("Definition and provenance", "what", *tags)
        for row in found.definition:
            table.add_row(escape(row.what), *(escape(text or "–") for text in (row.old, row.new)))
        console.print(table)
    else:
        say("Their definitions and provenance are the same.")
    _show_samples(tags, found)
    say(_intensities_told(found))
    if found.same_blocks and not found.identical:
        say(
            f"Blocks of {tags[1]} that are in {tags[0]} byte for byte, by their SHA-256: "
            f"{found.same_blocks:,} of {found.blocks:,}."
        )
    _show_campaigns(old, new)


def _table(title: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    return table


def _show_samples(tags: tuple[str, str], found: Changes) -> None:
    counted = ("in both", f"only {tags[0]}", f"only {tags[1]}")
    table = _table("Samples", "phase", "crystal system", *counted)
    for column in table.columns[2:]:
        column.justify = "right"
    counts = [(phase.both, phase.only_old, phase.only_new) for phase in found.phases]
    for phase, row in zip(found.phases, counts, strict=True):
        table.add_row(phase.phase, phase.crystal_system, *(f"{count:,}" for count in row))
    totals = (f"{sum(column):,}" for column in zip(*counts, strict=True))
    table.add_row("[bold]all[/]", "", *(f"[bold]{total}[/]" for total in totals))
    console.print(table)
    table = _table("Ranges of the free parameters", "phase", "parameter", *tags)
    for phase in found.phases:
        for name in phase.old_ranges | phase.new_ranges:
            unit = "Å" if name in "abc" else "°"
            ranges = (
                f"{side[name][0]:g} to {side[name][1]:g} {unit}" if name in side else "–"
                for side in (phase.old_ranges, phase.new_ranges)
            )
            table.add_row(phase.phase, name, *ranges)
    console.print(table)


def _intensities_told(found: Changes) -> str:
    if found.identical:
        return "Intensities: identical, as the content hash says."
    if not found.same_grid:
        return "Intensities: not compared, because the time-of-flight grids differ."
    total = found.intensities
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
        for phase in found.phases
        for part in (phase.intensities,)
        if part is not None and part.differing
    ]
    return f"{text} By phase: {'; '.join(parts)}." if parts else text


def _show_campaigns(old: xr.Dataset, new: xr.Dataset) -> None:
    """Print how the campaign files differ, comments and all."""
    before, after = (one.attrs["campaign_toml"].splitlines() for one in (old, new))
    names = [f"campaign of {one.attrs['tag']}" for one in (old, new)]
    lines = list(difflib.unified_diff(before, after, names[0], names[1], lineterm=""))
    if lines:
        say("\nCampaign files")
    for line in lines:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[0], "default")
        say(f"[{style}]{escape(line)}[/]")


if __name__ == "__main__":
    run(app)
