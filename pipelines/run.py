"""The main job, end to end: simulate, train, register, and predict the bundled examples."""

import time
from typing import Annotated

import typer
from rich.rule import Rule
from typer import Option

from pipelines.cli import options
from pipelines.cli.console import (
    command_line,
    console,
    duration,
    next_commands,
    print_rows,
    run,
    say,
)

_MODEL = "guided"  # its physics finds the cell after any training


def main(
    context: typer.Context,
    limit: Annotated[int | None, Option(min=1, help="Only the first samples.")] = None,
    workers: options.WorkersOption = None,
    preset: Annotated[str, Option(help="How the model is trained.")] = "quick",
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
) -> None:
    """Simulate the paper's campaign, train and register a first model, predict two examples.

    Existing results are used again; after an interruption the same command continues.
    """
    from bragg_data.campaign import load_campaign
    from bragg_data.store.repository import Store
    from bragg_data.store.schema import counts_per_system
    from catalog import registry
    from catalog.tracking import Tracking
    from pipelines.prediction.examples import comparison_table, predict_examples
    from pipelines.simulation.campaign import SimulationJob, simulate_campaign
    from pipelines.training.presets import DEFAULT_PRESETS, Presets
    from pipelines.training.run import train_model
    from pipelines.training.task import TrainingEnvironment, TrainingTask

    began = time.monotonic()
    DEFAULT_PRESETS.check(_MODEL, preset)
    place = Tracking(tracking)
    repository = Store(store, create=True)

    _head("1  Simulate the campaign")
    campaign = load_campaign(options.DEFAULT_CAMPAIGN)
    cluster = options.ClusterOptions(workers=workers)
    job = SimulationJob(campaign, "kinematic", limit=limit, cluster=cluster)
    tag = simulate_campaign(job, repository)
    dataset = repository.open(tag.name)
    simulated = time.monotonic()

    _head("2  Train and register a first model")
    name = str(dataset.attrs["campaign"])
    uri = f"models:/{name}@{registry.CHAMPION}"
    champion = registry.champion(place, name)
    # The contents decide: a store that was made again holds the same data under a new snapshot.
    if champion is not None and champion.tags.get("content_hash") == dataset.attrs["content_hash"]:
        say(
            f"{champion.uri} was trained on this data set: it stays. "
            f"python -m pipelines.train trains another."
        )
    else:
        # A champion of other data cannot be compared with this model.
        task = TrainingTask(_MODEL, preset)
        presets = context.find_object(Presets) or DEFAULT_PRESETS
        version, is_champion = train_model(
            dataset, TrainingEnvironment(place, presets=presets), task, promotion="replace"
        )
        if not is_champion:
            uri = version.uri
    trained = time.monotonic()

    _head("3  Predict the bundled examples")
    predictions = predict_examples(place, uri)
    for prediction, example in predictions:
        console.print(comparison_table(prediction, example))
    finished = time.monotonic()

    _head("What exists now")
    counts = ", ".join(f"{n:,} {system}" for system, n in counts_per_system(dataset).items() if n)
    print_rows(
        {
            "Data set": f"[bold]{tag.name}[/] ({counts}) in {repository.uri}",
            "Model": f"[bold]{predictions[0][0].model}[/] in {place.uri}",
            "Time": f"{duration(finished - began)}: simulation {duration(simulated - began)}, "
            f"training {duration(trained - simulated)}, prediction {duration(finished - trained)}",
        }
    )
    calibrated = command_line("predict", "FILE", "--instrument", "YOURS.instprm")
    robust = command_line("train", "robust", "--preset", "standard")
    next_commands(
        ("make ui", "compare runs and models in a browser"),
        (command_line("inspect", tag.name, "--png", "patterns.png"), "look into the data"),
        (calibrated, "predict your profiles"),
        (robust, "the network for measured profiles"),
        ("python -m pipelines", "list all commands"),
    )
    say("(in the virtual environment: source .venv/bin/activate)")


def _head(text: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{text}[/]", align="left"))


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
