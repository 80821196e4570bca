"""Print how a data set differs from an older one."""

from __future__ import annotations

import difflib
from dataclasses import asdict

import xarray as xr
from rich import box
from rich.markup import escape
from rich.table import Table

from bragg_data.store.diff import SAME_INTENSITY, Changes
from pipelines.cli.console import console, say


def changes_to_json(old: xr.Dataset, new: xr.Dataset, difference: Changes) -> dict[str, object]:
    """Return the changes, and what identifies the two data sets, as JSON values."""
    return {"old": _identity(old), "new": _identity(new)} | asdict(difference)


def _identity(dataset: xr.Dataset) -> dict[str, str | int]:
    attrs = {name: dataset.attrs[name] for name in ("tag", "snapshot_id", "content_hash")}
    return attrs | {"samples": dataset.sizes["sample"]}


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
            table.add_row(escape(row.what), *(escape(text or "–") for text in (row.old, row.new)))
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
    _print_campaigns(old, new)


def _table(title: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    return table


def _print_samples(tags: tuple[str, str], difference: Changes) -> None:
    counted = ("in both", f"only {tags[0]}", f"only {tags[1]}")
    table = _table("Samples", "phase", "crystal system", *counted)
    for column in table.columns[2:]:
        column.justify = "right"
    counts = [(phase.both, phase.only_old, phase.only_new) for phase in difference.phases]
    for phase, row in zip(difference.phases, counts, strict=True):
        table.add_row(phase.phase, phase.crystal_system, *(f"{count:,}" for count in row))
    totals = (f"{sum(column):,}" for column in zip(*counts, strict=True))
    table.add_row("[bold]all[/]", "", *(f"[bold]{total}[/]" for total in totals))
    console.print(table)
    table = _table("Ranges of the free parameters", "phase", "parameter", *tags)
    for phase in difference.phases:
        for name in phase.old_ranges | phase.new_ranges:
            unit = "Å" if name in "abc" else "°"
            ranges = (
                f"{side[name][0]:g} to {side[name][1]:g} {unit}" if name in side else "–"
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


def _print_campaigns(old: xr.Dataset, new: xr.Dataset) -> None:
    """Print the differences of the campaign files, including comments."""
    before, after = (d.attrs["campaign_toml"].splitlines() for d in (old, new))
    names = [f"campaign of {d.attrs['tag']}" for d in (old, new)]
    lines = list(difflib.unified_diff(before, after, names[0], names[1], lineterm=""))
    if lines:
        say("\nCampaign files")
    for line in lines:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[0], "default")
        say(f"[{style}]{escape(line)}[/]")
