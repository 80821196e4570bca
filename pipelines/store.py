"""Care of a store: verify and repair data sets, collect garbage, copy, show sizes, migrate."""

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import Progress, command_line, next_commands, print_json, run, say

app = typer.Typer(add_completion=False, no_args_is_help=True)

DryRunOption = Annotated[bool, Option("--dry-run", help="Only state what would be done.")]


@app.callback()
def _main() -> None:
    """Care of a store: verify and repair data sets, collect garbage, copy, show sizes, migrate."""


@app.command("verify")
def verify_(
    tag: Annotated[str | None, Argument(help="Data set; by default all of them.")] = None,
    store: options.StoreOption = options.DEFAULT_URI,
) -> None:
    """Read data sets and compare all hashes. The exit code is 1 if something is damaged."""
    from bragg_data.store.repository import Store
    from pipelines.snapshots.verification import damage_of

    repository = Store(store)
    tags = [tag] if tag else [known.name for known in repository.tags()]
    damage = {name: damage_of(repository, name) for name in tags}
    for name, problems in damage.items():
        state = f"[red]{len(problems)} damaged[/]" if problems else "byte for byte what was written"
        say(f"[bold]{name}[/]: {state}")
        for problem in problems:
            say(f"  {escape(problem)}")
    if damaged := [command_line("store", "repair", t, store=store) for t in tags if damage[t]]:
        next_commands(*((command, "compute the damaged blocks again") for command in damaged))
        raise typer.Exit(1)


@app.command("repair")
@options.expand_options
def repair_(
    tag: Annotated[str, Argument(help="Data set.")],
    block: Annotated[
        list[int] | None, Option(help="Only this block (repeatable); by default all are read.")
    ] = None,
    store: options.StoreOption = options.DEFAULT_URI,
    *,
    gsas2: options.Gsas2Command,
) -> None:
    """Compute the damaged blocks of a data set again; its content hash stays as it was.

    An unfinished data set, by its branch, begins again: `simulate` finds damaged blocks by itself.
    """
    from bragg_data.store.repository import Store
    from pipelines.simulation.repair import repair_data_set
    from pipelines.simulation.simulators import gsas2_options

    where = gsas2_options(gsas2.gsas2_path, gsas2.pattern_limit)
    say(repair_data_set(Store(store), tag, where, block))
    next_commands((command_line("store", "gc", store=store), "delete what nothing refers to"))


@app.command()
def gc(
    days: Annotated[
        float | None, Option(min=0, help="Age; by default 0, in object storage 7.")
    ] = None,
    dry_run: DryRunOption = False,
    store: options.StoreOption = options.DEFAULT_URI,
) -> None:
    """Delete what no tag and no branch refers to, and what processes that died left behind."""
    from bragg_data.store.care import collect_garbage
    from bragg_data.store.repository import Store

    garbage = collect_garbage(Store(store), dry_run=dry_run, days=days)
    say(
        f"{'To delete' if dry_run else 'Deleted'}: {garbage.chunks:,} chunks, {garbage.files:,} "
        f"files of the index, {garbage.scratch:,} scratch files, {decimal(garbage.bytes)}"
    )


@app.command()
def expire(
    days: Annotated[float, Option(min=0, help="Age of the snapshots.")] = 30.0,
    dry_run: DryRunOption = False,
    store: options.StoreOption = options.DEFAULT_URI,
) -> None:
    """Forget old snapshots of the history; tags and the newest of each data set stay."""
    from bragg_data.store.care import expire as expire_snapshots
    from bragg_data.store.repository import Store

    count = expire_snapshots(Store(store), days, dry_run=dry_run)
    say(f"{'To expire' if dry_run else 'Expired'}: {count:,} snapshots")
    next_commands((command_line("store", "gc", store=store), "delete their files"))


@app.command()
def copy(
    target: Annotated[str, Argument(help="Path or URI where nothing is yet.")],
    store: options.StoreOption = options.DEFAULT_URI,
) -> None:
    """Copy a store with its tags and content hashes, and verify the copy."""
    from bragg_data.store import care
    from bragg_data.store.repository import Store
    from pipelines.snapshots.verification import verify_snapshot

    repository = Store(store)
    with Progress("Copying", care.bytes_to_copy(repository), "bytes") as progress:
        copied = care.copy(repository, target, progress.advance)
    for tag in copied.tags():
        verify_snapshot(copied.open(tag.name))
    say(f"[bold]{escape(copied.uri)}[/]: {len(copied.tags())} data sets, verified")


@app.command()
def stats(
    as_json: options.JsonOption = False, store: options.StoreOption = options.DEFAULT_URI
) -> None:
    """Show what a store holds: data sets, samples, blocks, bytes, and what nothing refers to."""
    from bragg_data.store.repository import Store
    from pipelines.snapshots.stats import print_stats, stats_of

    values = stats_of(Store(store))
    print_json(values) if as_json else print_stats(values)


@app.command()
def migrate(
    dry_run: DryRunOption = False, store: options.StoreOption = options.DEFAULT_URI
) -> None:
    """Write data sets of earlier versions as this one does; content hashes and tags stay."""
    from bragg_data.simulation.gsas2 import Gsas2Options
    from bragg_data.store.repository import Store
    from bragg_data.store.schema import SCHEMA_VERSION
    from pipelines.simulation.repair import migrate_data_sets

    tags = migrate_data_sets(Store(store), Gsas2Options(), dry_run=dry_run)
    what = f"{'To write' if dry_run else 'Written'} again: {', '.join(tags)}"
    say(f"Schema version {SCHEMA_VERSION}. {what if tags else 'Nothing to do.'}")


if __name__ == "__main__":
    run(app)
