"""List feature views, show one, materialise one, list values that are out of date."""

from typing import Annotated

import typer
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say

app = typer.Typer(add_completion=False, no_args_is_help=True)

ViewArgument = Annotated[str, Argument(help="NAME@VERSION, or NAME for the newest.")]


@app.callback()
def _main() -> None:
    """Feature views: named, versioned functions of profiles, and features that models compute.

    Pure views are computed as they are read; any view can be materialised in the store.
    """


@app.command("list")
def list_(store: options.StoreOption = options.DEFAULT_URI) -> None:
    """List the views, and where they are materialised."""
    from pipelines.registry.feature_views import print_views

    print_views(store)
    next_commands(
        (command_line("features", "show", "VIEW", store=store), "definition and lineage"),
        (command_line("features", "materialise", "VIEW", store=store), "compute a view"),
    )


@app.command()
def show(view: ViewArgument, store: options.StoreOption = options.DEFAULT_URI) -> None:
    """Show the definition of a view, and the lineage of its values."""
    from catalog.views import view_of
    from pipelines.registry.feature_views import print_view

    chosen = view_of(view)
    print_view(chosen, store)
    say(f'\nIn Python: catalog.features.load("{chosen.name}", dataset=TAG)')


@app.command("materialise")
@options.expand_options
def materialise_(
    view: ViewArgument,
    data: options.DataOption = None,
    model: Annotated[
        str | None, Option(metavar="URI", help="Model; by default the newest of the data set.")
    ] = None,
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    *,
    cluster: options.ClusterOptions,
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
    dataset = repository.open(data or options.default_tag(repository))
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
        (command_line("features", "show", chosen.key, store=store), "its lineage"),
        (command_line("features", "stale", store=store), "what is out of date"),
    )


@app.command()
def stale(
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
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
    if commands := [(v.command, f"update {v.view} of {v.tag}") for v in outdated if v.command]:
        next_commands(*commands)


if __name__ == "__main__":
    run(app)
