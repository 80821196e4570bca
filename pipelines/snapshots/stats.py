"""Sizes of a store and of what it holds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from bragg_data.store import care
from bragg_data.store.repository import Store, StoreError
from pipelines.cli.console import console, say


def stats_of(store: Store) -> Mapping[str, Any]:
    """Return, as plain JSON values, what a store holds and what nothing refers to.

    The garbage is None while a data set is being written, as nothing refers to its blocks yet.
    """
    try:
        garbage = asdict(care.collect_garbage(store, dry_run=True))
    except StoreError:
        garbage = None
    return {
        "store": store.uri,
        "bytes": care.size_on_disk(store),
        "data_sets": [asdict(known) for known in care.contents(store)],
        "garbage": garbage,
    }


def print_stats(stats: Mapping[str, Any]) -> None:
    """Print what :func:`stats_of` returns."""
    say(f"Store {stats['store']}, {decimal(stats['bytes'])}")
    table = Table("data set", "samples", "blocks", "on disk", "schema", "checksums", box=None)
    for known in stats["data_sets"]:
        name = known["name"] if known["complete"] else f"{known['name']} (unfinished)"
        counts = f"{known['samples']:,}", f"{known['blocks']:,}", decimal(known["bytes"])
        version, checksums = str(known["schema_version"]), "yes" if known["checksums"] else "no"
        table.add_row(name, *counts, version, checksums)
    console.print(table)
    garbage = stats["garbage"]
    if garbage is None:
        say("A data set is being written: what nothing refers to is not counted.")
    else:
        files = garbage["chunks"] + garbage["files"] + garbage["scratch"]
        say(f"Nothing refers to {files:,} files, {decimal(garbage['bytes'])}")
