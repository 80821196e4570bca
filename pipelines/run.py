"""The main job, end to end: simulate, train, register, and predict the bundled examples."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.rule import Rule
from rich.table import Table

from bragg_data.campaign import BUILT_IN, load_campaign
from bragg_data.measurement.load import load_measurements
from bragg_data.store.repository import DEFAULT_URI, Store
from bragg_data.store.schema import counts_per_system
from catalog import registry
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import console, duration, next_commands, run, say
from pipelines.cluster.options import ClusterOptions
from pipelines.prediction.library import open_library
from pipelines.prediction.workflow import PredictedProfile, load_model, predict_measurements
from pipelines.simulation.campaign import SimulationJob, simulate_campaign
from pipelines.training.presets import DEFAULT_PRESETS
from pipelines.training.run import train_model
from pipelines.training.task import TrainingEnvironment, TrainingTask

app = typer.Typer(add_completion=False)

EXAMPLES = Path(__file__).parent / "examples"
"""Profiles that ship with the project; ``examples.json`` holds what they are and their truth."""

_FIRST = "guided"  # finds the cell however little it has learnt
_SHOWN = ("a", "c", "alpha")


@app.command()
def main(
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first samples of the campaign.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    preset: Annotated[str, typer.Option(help="How the model is trained.")] = "quick",
    store: Annotated[str, typer.Option(metavar="URI", help="Directory of the store.")] = (
        DEFAULT_URI
    ),
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
) -> None:
    """Simulate the paper's campaign, train and register a first model, predict two examples.

    What is there already is not made again; whatever interrupts it, the same command goes on.
    """
    began = time.monotonic()
    DEFAULT_PRESETS.check(_FIRST, preset)
    place = Tracking(tracking)
    repository = Store(store, create=True)

    _head("1  Simulate the campaign")
    job = SimulationJob(
        load_campaign("batio3-nomad"),
        "kinematic",
        limit=limit,
        cluster=ClusterOptions(workers=workers),
    )
    tag = simulate_campaign(job, repository)
    dataset = repository.open(tag.name)
    simulated = time.monotonic()

    _head("2  Train and register a first model")
    name = str(dataset.attrs["campaign"])
    champion = registry.champion(place, name)
    # The contents decide: a store that was made again holds the same data under a new snapshot.
    if champion is not None and champion.tags.get("content_hash") == dataset.attrs["content_hash"]:
        say(
            f"{champion.uri} was trained on this data set: it stays. "
            f"python -m pipelines.train trains another."
        )
    else:
        # A champion of other data cannot be compared with this one, and is not what was asked for.
        train_model(dataset, TrainingEnvironment(place), TrainingTask(_FIRST, preset), promote=True)
    trained = time.monotonic()

    _head("3  Predict the bundled examples")
    answers = _predict_examples(place, name)
    for found, example in answers:
        _compare(found, example)
    finished = time.monotonic()

    _head("What exists now")
    version = answers[0][0].model
    counts = ", ".join(f"{n:,} {system}" for system, n in counts_per_system(dataset).items() if n)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("Data set", f"[bold]{tag.name}[/] ({counts}) in {repository.uri}")
    table.add_row("Model", f"[bold]{version}[/], alias {registry.CHAMPION}, in {place.uri}")
    table.add_row(
        "Time",
        f"{duration(finished - began)}: simulation {duration(simulated - began)}, training "
        f"{duration(trained - simulated)}, prediction {duration(finished - trained)}",
    )
    console.print(table)
    next_commands(
        [
            ("make ui", "compare runs and models in a browser"),
            (f"python -m pipelines.inspect {tag.name} --png patterns.png", "look into the data"),
            ("python -m pipelines.predict FILE --instrument YOURS.instprm", "ask about your data"),
            (
                "python -m pipelines.train robust --preset standard",
                "the network for measured profiles",
            ),
            ("python -m pipelines", "list all commands"),
        ]
    )
    say("(in the virtual environment: source .venv/bin/activate)")


def _head(text: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{text}[/]", align="left"))


def _predict_examples(place: Tracking, name: str) -> list[tuple[PredictedProfile, dict[str, Any]]]:
    predictor, version = load_model(f"models:/{name}@{registry.CHAMPION}", place)
    examples = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
    measurements = [
        load_measurements(
            EXAMPLES / file,
            predictor.campaign,
            EXAMPLES / example["instrument"]
            if example["instrument"]
            else BUILT_IN / "nomad_bank4.instprm",
        )[0]
        for file, example in examples.items()
    ]
    answers = predict_measurements(
        measurements, predictor, version.uri, open_library(predictor, progress=True), progress=True
    )
    return list(zip(answers, examples.values(), strict=True))


def _compare(found: PredictedProfile, example: dict[str, Any]) -> None:
    """Print an answer beside the truth, with its errors."""
    name = Path(found.measurement.profile.source).name
    table = Table(title=f"{example['what']} ({name})", title_justify="left")
    table.add_column("")
    table.add_column("crystal system")
    for parameter in _SHOWN:
        table.add_column(f"{parameter} ({'°' if parameter == 'alpha' else 'Å'})", justify="right")
        table.add_column("error", justify="right")
    truth = [example[parameter] for parameter in _SHOWN]
    cells = [f(v) for v in truth for f in (_value, lambda _: "")]
    table.add_row("true", example["crystal_system"], *cells, style="bold")
    rows = [("model", found.phase.crystal_system.name, [found.cell[k] for k in (0, 2, 3)])]
    library = found.result().library_match
    if library:
        best = library.candidates[0]
        cell = best.cell.to_array()
        rows.append(("library match", best.crystal_system, [cell[k] for k in (0, 2, 3)]))
    for label, system, values in rows:
        right = "green" if system == example["crystal_system"] else "red"
        cells = []
        for value, true in zip(values, truth, strict=True):
            cells += [_value(value), f"{value - true:+.4f}" if np.isfinite(value) else ""]
        table.add_row(label, f"[{right}]{system}[/]", *cells)
    console.print(table)


def _value(value: float) -> str:
    return f"{value:.4f}"


if __name__ == "__main__":
    run(app)
