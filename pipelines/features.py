"""List feature views, show one, materialise one, list values that are out of date."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.console import console, next_commands, run, say
from pipelines.cli.options import (
    DEFAULT_TRACKING_URI,
    DEFAULT_URI,
    ClusterOptions,
    DataOption,
    StoreOption,
    TrackingOption,
    command_line,
    default_tag,
    expand_options,
)

app = typer.Typer(add_completion=False, no_args_is_help=True)

ViewArgument = Annotated[str, typer.Argument(help="NAME@VERSION, or NAME for the newest.")]


@app.callback()
def _main() -> None:
    """Feature views: named, versioned functions of profiles, and features that models compute.

    Pure views are computed as they are read; any view can be materialised in the store.
    """


@app.command("list")
def list_(store: StoreOption = DEFAULT_URI) -> None:
    """List the views, and where they are materialised."""
    from catalog.views import VIEWS
    from pipelines.registry.feature_views import views_table

    console.print(views_table(VIEWS.values(), store))
    next_commands(
        [
            (command_line("features", "show", "VIEW", store=store), "definition and lineage"),
            (command_line("features", "materialise", "VIEW", store=store), "compute a view"),
        ]
    )


@app.command()
def show(view: ViewArgument, store: StoreOption = DEFAULT_URI) -> None:
    """Show the definition of a view, and the lineage of its values."""
    from catalog.views import view_of
    from pipelines.registry.feature_views import definition_table, lineage_tables

    chosen = view_of(view)
    console.print(definition_table(chosen))
    for table in lineage_tables(chosen, store):
        say()
        console.print(table)
    say(f'\nIn Python: catalog.features.load("{chosen.name}", dataset=TAG)')


@app.command("materialise")
@expand_options
def materialise_(
    view: ViewArgument,
    data: DataOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="models:/NAME/VERSION that computes it; by default the newest trained on the "
            "data set.",
        ),
    ] = None,
    store: StoreOption = DEFAULT_URI,
    tracking: TrackingOption = DEFAULT_TRACKING_URI,
    *,
    cluster: ClusterOptions,
) -> None:
    """Compute a view for all samples of a data set and commit it to the store.

    Interrupted, the same command completes what is missing; completed, it does nothing.
    """
    from rich.filesize import decimal

    from bragg_data.store.repository import Store
    from catalog.tracking import Tracking
    from catalog.views import view_of
    from pipelines.cluster.client import open_cluster
    from pipelines.registry.feature_views import materialise, model_for_view

    chosen = view_of(view)
    repository = Store(store)
    dataset = repository.open(data or default_tag(repository))
    registered = None
    if chosen.model:
        registered = model_for_view(Tracking(tracking), chosen, dataset, model)
        say(f"Computed by {registered.version.uri}")
    with open_cluster(cluster) as client:
        values = materialise(client, repository, dataset, chosen, registered)
    say(
        f"[bold]{values.view}[/] of {values.tag}: {values.total:,} samples, "
        f"{decimal(values.bytes)}, snapshot {values.snapshot_id}"
    )
    next_commands(
        [
            (command_line("features", "show", chosen.key, store=store), "its lineage"),
            (command_line("features", "stale", store=store), "what is out of date"),
        ]
    )


@app.command()
def stale(
    store: StoreOption = DEFAULT_URI, tracking: TrackingOption = DEFAULT_TRACKING_URI
) -> None:
    """List values that a newer tag, definition or model has made out of date, and the remedy."""
    from bragg_data.store.repository import Store
    from catalog import features
    from catalog.tracking import Tracking

    outdated = features.stale(Store(store), Tracking(tracking))
    if not outdated:
        say("Nothing is out of date.")
        return
    for values in outdated:
        say(f"[bold]{values.view}[/] of {values.tag}: {values.reason}")
    next_commands([(v.command, f"update {v.view} of {v.tag}") for v in outdated if v.command])


if __name__ == "__main__":
    run(app)
