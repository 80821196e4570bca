"""Feature views of the data sets: list them, show one, materialise one, tell what is stale."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from bragg_data.store.repository import DEFAULT_URI, Store
from catalog import features, registry
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from catalog.views import VIEWS, FeatureError, view_of
from pipelines.cli.console import console, next_commands, run, say
from pipelines.cluster.client import open_client
from pipelines.cluster.options import SlurmOptions, check_cluster
from pipelines.registry.feature_views import RegisteredModel, materialise
from pipelines.simulation.datasets import default_tag

app = typer.Typer(add_completion=False, no_args_is_help=True)

StoreOption = Annotated[str, typer.Option(help="Path or file:// URI of the store.")]
TrackingOption = Annotated[
    str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
]
DataOption = Annotated[
    str | None, typer.Option(help="Tag of the data set; by default the largest, newest one.")
]


# ---- commands ----------------------------------------------------------------------------------


@app.callback()
def _main() -> None:
    """Feature views: named, versioned functions of profiles, and what models make of profiles.

    Pure views are computed as they are read; any view can be materialised beside the data.
    """


@app.command("list")
def list_(store: StoreOption = DEFAULT_URI) -> None:
    """List the views, and where they are materialised."""
    there: dict[str, list[str]] = {}
    if Path(store).exists() or "://" in store:
        for one in features.materialised(Store(store)):
            state = "" if one.complete else f", {one.done / one.total:.0%}"
            there.setdefault(one.view, []).append(f"{one.tag} ({decimal(one.bytes)}{state})")
    table = Table("view", "computed by", "materialised for", "what it is", box=None)
    for view in VIEWS.values():
        by = f"a registered {view.model}" if view.model else "a function, as it is read"
        table.add_row(view.key, by, ", ".join(there.get(view.key, ())), view.description)
    console.print(table)
    next_commands(
        [
            ("python -m pipelines.features show VIEW", "definition and lineage of one"),
            ("python -m pipelines.features materialise VIEW", "compute one for a data set"),
        ]
    )


@app.command()
def show(
    view: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME for the newest.")],
    store: StoreOption = DEFAULT_URI,
) -> None:
    """Show the definition of a view, and the lineage of its values."""
    chosen = view_of(view)
    rows = {
        "view": chosen.key,
        "what it is": chosen.description,
        "definition": chosen.definition_hash,
        "computed by": f"a registered {chosen.model}" if chosen.function is None else
        f"{chosen.function.__module__}.{chosen.function.__qualname__}",
    }  # fmt: skip
    _print(rows)
    if Path(store).exists() or "://" in store:
        for one in features.materialised(Store(store)):
            if one.view == chosen.key:
                say()
                size = f"{one.done:,} of {one.total:,} samples, {decimal(one.bytes)}"
                kept = {k: v for k, v in one.lineage.items() if v and k not in _INNER}
                _print({"data set": one.tag, "size": size, "snapshot": one.snapshot_id, **kept})
    say(f'\nIn Python: catalog.features.load("{chosen.name}", dataset=TAG)')


_INNER = ("view", "description", "rows_per_chunk", "failures")


def _print(rows: dict[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)


@app.command("materialise")
def materialise_(
    view: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME for the newest.")],
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
    cluster: Annotated[
        str, typer.Option(help="local, slurm, or the address of a Dask scheduler.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of local.")] = None,
    jobs: Annotated[str, typer.Option(metavar="MIN:MAX", help="Jobs of slurm.")] = "1:8",
    queue: Annotated[str | None, typer.Option(help="Partition of slurm.")] = None,
    walltime: Annotated[str | None, typer.Option(help="Time limit of a job of slurm.")] = None,
) -> None:
    """Compute a view for all samples of a data set and commit it beside them.

    Interrupted, the same command goes on; done, it does nothing.
    """
    check_cluster(cluster, workers)
    chosen = view_of(view)
    repository = Store(store)
    dataset = repository.open(data or default_tag(repository))
    registered = None
    if chosen.model:
        place = Tracking(tracking)
        version = (
            features.model_of_view(place, chosen, dataset)
            if model is None
            else registry.find(place, model)
        )
        if version.tags.get("model") != chosen.model:
            raise FeatureError(
                f"{version.uri} is a {version.tags.get('model', 'model of another project')}; "
                f"{chosen.key} is computed by a {chosen.model}."
            )
        say(f"Computed by {version.uri}")
        registered = RegisteredModel(place.uri, version)
    slurm = SlurmOptions(jobs=jobs, queue=queue, walltime=walltime)
    with open_client(cluster, workers=workers, slurm=slurm) as client:
        done = materialise(client, repository, dataset, chosen, registered)
    say(
        f"[bold]{done.view}[/] of {done.tag}: {done.total:,} samples, {decimal(done.bytes)}, "
        f"snapshot {done.snapshot_id}"
    )
    given = "" if store == DEFAULT_URI else f" --store {shlex.quote(store)}"
    next_commands(
        [
            (f"python -m pipelines.features show {chosen.key}{given}", "its lineage"),
            (f"python -m pipelines.features stale{given}", "what is out of date"),
        ]
    )


@app.command()
def stale(
    store: StoreOption = DEFAULT_URI, tracking: TrackingOption = DEFAULT_TRACKING_URI
) -> None:
    """Tell what a newer tag, definition or model has made out of date, and what mends it."""
    found = features.stale(Store(store), Tracking(tracking))
    if not found:
        say("Nothing is out of date.")
        return
    for one in found:
        say(f"[bold]{one.view}[/] of {one.tag}: {one.reason}")
    next_commands([(o.command, f"mend {o.view} of {o.tag}") for o in found if o.command])


if __name__ == "__main__":
    run(app)
