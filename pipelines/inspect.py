"""Show what a store holds: snapshots, counts, ranges, sizes, provenance, pictures of patterns."""

import json
from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say


def main(
    tag: Annotated[str | None, Argument(help="A snapshot; by default all are listed.")] = None,
    store: options.StoreOption = options.DEFAULT_URI,
    as_json: options.JsonOption = False,
    png: Annotated[Path | None, Option(metavar="FILE", help="Draw patterns (last tag).")] = None,
    check: Annotated[bool, Option("--verify", help="Read all and compare the hashes.")] = False,
) -> None:
    """Show what a store holds: snapshots, counts, ranges, sizes, provenance, a few patterns.

    JSON is a list with an object for each tag.
    """
    from bragg_data.store.repository import Store, StoreError, storage_errors, verify
    from pipelines.snapshots import tables

    repository = Store(store)
    tags = repository.tags()
    if tag is not None:
        repository.open(tag)  # refuses an unknown tag
        tags = [known for known in tags if known.name == tag]
    if png is not None:
        if not tags:
            raise StoreError(f"{repository.uri} has no tags yet, so there is nothing to draw.")
        from pipelines.snapshots.figures import draw_patterns

        with storage_errors(f"writing {png}"):
            draw_patterns(repository.open(tags[-1].name), png)
    summaries = [tables.summary_of(repository, known) for known in tags]
    if check:
        for known in tags:
            verify(repository.open(known.name))
    if as_json:
        print(json.dumps(summaries, indent=2))
        return
    say(f"Store {escape(repository.uri)}")
    if tag is not None:
        tables.print_snapshot(summaries[0], repository.open(tag))
    else:
        if summaries:
            tables.print_tags(summaries)
        else:
            say(f"No snapshots yet. Make one with: {command_line('simulate')}")
        tables.print_unfinished(repository)
    if check:
        names = ", ".join(known.name for known in tags) or "no snapshot"
        say(f"Verified, byte for byte what was written: {names}")
    if png is not None:
        say(f"Drawn: patterns of {tags[-1].name} in {escape(str(png))}")
    if tags and tag is None:
        newest = "inspect", tags[-1].name
        next_commands(
            (command_line(*newest, store=store), "its ranges and provenance"),
            (command_line(*newest, "--verify", store=store), "read and check it all"),
        )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
