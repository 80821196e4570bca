"""Feature views of the data sets: list them, show one, materialise one, tell what is stale."""

from __future__ import annotations

import hashlib
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import xarray as xr
from distributed import Client, Future
from icechunk.session import ForkSession
from numpy.typing import NDArray
from rich.filesize import decimal
from rich.table import Table

from bragg_data.block_writer import BlockResult, failed_block
from bragg_data.store import DEFAULT_URI, DiskFullError, Store, open_snapshot
from bragg_models.predictors import Predictor, load_predictor
from catalog import features, models, runs
from catalog.features import VIEWS, Computer, FeatureError, FeatureWriter, View
from pipelines.blocks import do_blocks
from pipelines.cluster import check_cluster, open_client
from pipelines.cluster_options import SlurmOptions, parse_jobs
from pipelines.console import console, duration, next_commands, run, say, three_digits
from pipelines.registration import LOADER
from pipelines.simulate import code_commit
from pipelines.train import default_tag

app = typer.Typer(add_completion=False, no_args_is_help=True)

StoreOption = Annotated[str, typer.Option(help="Path or file:// URI of the store.")]
TrackingOption = Annotated[
    str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
]
DataOption = Annotated[
    str | None, typer.Option(help="Tag of the data set; by default the largest, newest one.")
]


def materialise(
    client: Client,
    store: Store,
    dataset: xr.Dataset,
    view: View,
    *,
    model: tuple[str, Path] | None = None,
) -> features.Materialised:
    """Compute a view for all samples of a data set, block by block, and commit it.

    What is there of the same definition, model and data is kept.

    Parameters
    ----------
    client
        Of the cluster.
    store, dataset
        The data set, opened by its tag, and where it is.
    view
        What.
    model
        Address and files of the registered model that computes it, for views that need one. The
        workers have to see the files.

    Raises
    ------
    FeatureError
        If the view needs a model and there is none, or blocks failed.
    BlocksError, StoreError
        If the cluster or the store do not do their part.
    """
    if view.model and model is None:
        raise FeatureError(f"{view.key} is computed by a registered {view.model}: name one.")
    directory = None if model is None else model[1]
    computer = Computer() if model is None else Computer(model[0], digest_of(model[1]))
    size = features_of(view, directory, dataset.intensity[:1].values).shape[1]
    with FeatureWriter(
        store, dataset, view, size, computer=computer, code_commit=code_commit()
    ) as writer:
        source = str(dataset.attrs["tag"]), str(dataset.attrs["uri"])
        say(
            f"View [bold]{view.key}[/] of {source[0]}: {size:,} features of {writer.count:,} "
            f"samples, {len(writer.missing()):,} of {writer.n_blocks:,} blocks to do"
        )

        def submit(block: int, fork: ForkSession) -> Future:
            return client.submit(
                _do_block, source, view.key, directory, writer.group, block,
                writer.rows(block), fork, pure=False,
            )  # fmt: skip

        if writer.missing():
            done = do_blocks(client, writer, submit, doing="Materialising", unit="samples")
            say(
                f"Materialised {done.count:,} samples in {duration(done.seconds)}, "
                f"{three_digits(done.rate)} samples/s"
            )
        if writer.failures:
            block, reason = min(writer.failures.items())
            raise FeatureError(
                f"{len(writer.failures)} of {writer.n_blocks} blocks failed; the others are in the "
                f"store. Block {block} failed with {reason.rstrip('.')}. Run the same command "
                f"again to retry."
            )
    return next(m for m in features.materialised(store, source[0]) if m.view == view.key)


def features_of(
    view: View, directory: Path | None, profiles: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return a view's features (n, m) of profiles (n, points), by its function or its model."""
    if view.function is not None:
        return np.asarray(view.function(profiles), dtype=np.float32)
    assert directory is not None
    return _loaded(directory, digest_of(directory)).features(profiles)


def digest_of(directory: Path) -> str:
    """Return the SHA-256 (16 hexadecimal digits) of a saved model's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(directory)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def _loaded(directory: Path, digest: str) -> Predictor:  # noqa: ARG001 - a new one is read again
    return load_predictor(directory)


_opened = lru_cache(maxsize=1)(open_snapshot)


def _do_block(
    source: tuple[str, str],
    view: str,
    directory: Path | None,
    group: str,
    block: int,
    rows: slice,
    fork: ForkSession,
) -> BlockResult | DiskFullError:
    """Compute and write one block: the task of a worker."""
    try:
        profiles = _opened(*source)["intensity"].isel(sample=rows).values
        return features.write_features(
            fork, group, block, features_of(VIEWS[view], directory, profiles)
        )
    except DiskFullError as error:
        return error
    except Exception as error:
        return failed_block(block, rows.stop - rows.start, error)


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
    chosen = features.view_of(view)
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
    tracking: TrackingOption = runs.DEFAULT_URI,
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
    chosen = features.view_of(view)
    repository = Store(store)
    dataset = repository.open(data or default_tag(repository))
    files = None
    if chosen.model:
        place = runs.Tracking(tracking)
        version = (
            features.computer_of(place, chosen, dataset)
            if model is None
            else models.find(place, model)
        )
        if version.tags.get("model") != chosen.model:
            raise FeatureError(
                f"{version.uri} is a {version.tags.get('model', 'model of another project')}; "
                f"{chosen.key} is computed by a {chosen.model}."
            )
        say(f"Computed by {version.uri}")
        files = version.uri, models.fetch(place, version, LOADER)
    slurm = SlurmOptions(jobs=parse_jobs(jobs), queue=queue, walltime=walltime)
    with open_client(cluster, workers=workers, slurm=slurm) as client:
        done = materialise(client, repository, dataset, chosen, model=files)
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
def stale(store: StoreOption = DEFAULT_URI, tracking: TrackingOption = runs.DEFAULT_URI) -> None:
    """Tell what a newer tag, definition or model has made out of date, and what mends it."""
    found = features.stale(Store(store), runs.Tracking(tracking))
    if not found:
        say("Nothing is out of date.")
        return
    for one in found:
        say(f"[bold]{one.view}[/] of {one.tag}: {one.reason}")
    next_commands([(o.command, f"mend {o.view} of {o.tag}") for o in found if o.command])


if __name__ == "__main__":
    run(app)
