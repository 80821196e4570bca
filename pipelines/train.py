"""Train models on a snapshot of the store, score them, and register them in MLflow."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bragg_data.store.measured import SIMULATOR
from bragg_data.store.repository import DEFAULT_URI, Store
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import duration, next_commands, run, say
from pipelines.cluster.options import SlurmOptions, check_cluster
from pipelines.training.presets import ALL, TRAINABLE, TrainError, check_preset
from pipelines.training.run import STATE, Order, Place, kept_order, train_model

app = typer.Typer(add_completion=False)

_FORESTS = "Forests"


@app.command()
def main(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL…",
            help=f"What to train: {', '.join(TRAINABLE)}, or all of them: all.",
            show_default="multitask",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Tag of the data set; by default the largest, newest one.")
    ] = None,
    store: Annotated[str, typer.Option(help="Path or file:// URI of the store.")] = DEFAULT_URI,
    preset: Annotated[
        str,
        typer.Option(
            help="quick (minutes), standard (good results on two cores), or paper (its settings to "
            "the letter: a GPU, or days)."
        ),
    ] = "quick",
    seed: Annotated[
        int, typer.Option(min=0, help="Of the initial weights and of the samples' order.")
    ] = 0,
    split: Annotated[
        str, typer.Option(metavar="random|blocked", help="Which samples are kept for testing.")
    ] = "random",
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG", help="Learn from this data set, too (guided)."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on with an interrupted run; nothing else is asked."),
    ] = None,
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="End a fit after this time; 0 for no limit."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    promote: Annotated[
        bool, typer.Option("--promote", help="Make it the champion even if the present is better.")
    ] = False,
    state: Annotated[
        Path, typer.Option(help="Directory of checkpoints and cached profiles.")
    ] = STATE,
    cache: Annotated[bool, typer.Option(help="Keep prepared profiles on disk, for speed.")] = True,
    grow: Annotated[
        str,
        typer.Option(
            metavar="search|joined",
            rich_help_panel=_FORESTS,
            help="Dask-ML's grid search, or a few trees per task, joined.",
        ),
    ] = "search",
    cluster: Annotated[
        str,
        typer.Option(
            rich_help_panel=_FORESTS,
            help="Where forests are grown: local, slurm, or the address of a Dask scheduler.",
        ),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_FORESTS, help="Processes of local.")
    ] = None,
    jobs: Annotated[
        str, typer.Option(metavar="MIN:MAX", rich_help_panel=_FORESTS, help="Jobs of slurm.")
    ] = "1:8",
    queue: Annotated[
        str | None, typer.Option(rich_help_panel=_FORESTS, help="Partition of slurm.")
    ] = None,
    walltime: Annotated[
        str | None, typer.Option(rich_help_panel=_FORESTS, help="Time limit of a job.")
    ] = None,
) -> None:
    """Train models on a snapshot of the store, score them, and register them in MLflow.

    The paper's: classifier; on top of it, a regressor for each crystal system: forest, transfer,
    deep; all at once: multitask, integrated-forest, caenn. Ours: guided, and robust for measured
    profiles, which is registered as CAMPAIGN-measured: where there is one, predict asks its
    champion. The first model of a name becomes its champion; a later one does if it has a lower
    error on the same test samples, or with --promote. An interrupted training goes on at its last
    epoch with --resume RUN.
    """
    began = time.monotonic()
    check_cluster(cluster, workers)
    slurm = SlurmOptions(jobs=jobs, queue=queue, walltime=walltime)
    place = Place(Tracking(tracking), state, cache, cluster, slurm, workers)
    if resume is not None:
        order, dataset = kept_order(place, resume)
        trained = [train_model(dataset, place, order, promote=promote, resume=resume)]
    else:
        asked = _asked(model or ["multitask"])
        if split not in ("random", "blocked"):
            raise TrainError(f"There is no split '{split}'. Choose random or blocked.")
        if grow not in ("search", "joined"):
            raise TrainError(f"Forests are not grown by '{grow}'. Choose search or joined.")
        for one in asked:
            check_preset(one, preset)
        repository = Store(store)
        dataset = repository.open(data or default_tag(repository))
        trained = []
        for one in asked:
            order = Order(
                one, preset, seed, device, split,
                tuple(beside or ()) if one == "guided" else (), epochs, max_seconds,
                "joined" if grow == "joined" else "search",
            )  # fmt: skip
            trained.append(train_model(dataset, place, order, promote=promote))
    for done in trained:
        crowned = ", champion" if done.is_champion else ""
        say(
            f"Registered: [bold]{done.version.name}[/] version {done.version.version}{crowned} "
            f"({done.version.tags['model']}), run {done.run_id} in {place.tracking.uri}"
        )
    say(f"After {duration(time.monotonic() - began)}")
    given = "" if tracking == DEFAULT_TRACKING_URI else f" --tracking {shlex.quote(tracking)}"
    where = "" if store == DEFAULT_URI else f" --store {shlex.quote(store)}"
    next_commands(
        [
            (f"python -m pipelines.predict FILE{given}", "ask the champion about a profile"),
            (f"python -m pipelines.evaluate{where}{given}", "compare all models, and the paper's"),
            ("make ui", "look at runs and models in a browser"),
        ]
    )


def _asked(names: Sequence[str]) -> list[str]:
    """Return which models to train, each once.

    Raises
    ------
    TrainError
        If there is no such model.
    """
    asked: list[str] = []
    for name in names:
        if name != "all" and name not in TRAINABLE:
            raise TrainError(
                f"There is no model '{name}'. Choose among {', '.join(TRAINABLE)}, or all."
            )
        asked += ALL if name == "all" else (name,)
    return list(dict.fromkeys(asked))


def default_tag(store: Store) -> str:
    """Return the tag of the largest data set of a store, of several the newest.

    Raises
    ------
    TrainError
        If there is none.
    """
    tags = {tag: store.open(tag.name) for tag in store.tags()}
    tags = {tag: one for tag, one in tags.items() if one.attrs["simulator"] != SIMULATOR}
    if not tags:
        raise TrainError(
            f"The store {store.uri} holds no finished data set yet. Make one with: "
            f"python -m pipelines.simulate"
        )
    return max(tags, key=lambda tag: (tags[tag].sizes["sample"], tag.written_at)).name


if __name__ == "__main__":
    run(app)
