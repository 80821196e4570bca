"""The paper's campaign, end to end: simulate, train, register, and predict bundled examples."""

import time
from collections.abc import Sequence

import xarray as xr
from rich.rule import Rule

from bragg_data.campaign import load_campaign
from bragg_data.store.repository import Store
from bragg_data.store.schema import counts_per_system
from catalog import registry
from catalog.tracking import Tracking
from pipelines.cli import options
from pipelines.cli.console import command_line, console, duration, next_commands, print_rows, say
from pipelines.prediction.examples import comparison_table, predict_examples
from pipelines.simulation.campaign import SimulationJob, simulate_campaign
from pipelines.training.presets import DEFAULT_PRESETS, Presets
from pipelines.training.run import train_model
from pipelines.training.task import TrainingEnvironment, TrainingTask

_MODEL = "robust"  # the network for measured profiles
_FALLBACK = "guided"  # for clean profiles, where the other is no better than simple baselines
_MEASURED = (
    f"{_FALLBACK}, made for clean ones, predicts them: train {_MODEL} on the whole campaign",
    f"{_MODEL}, made for them, predicts them",
)


def run_paper(
    places: tuple[str, str],
    cluster: options.ClusterOptions,
    limit: int | None,
    preset: str,
    presets: Presets,
) -> None:
    """Simulate the paper's campaign, train a first model, predict and refine two examples.

    ``places`` are the addresses of the store and of the tracking; ``limit`` are the first samples
    of the campaign. Errors are those of the steps.
    """
    began = time.monotonic()
    DEFAULT_PRESETS.check(_MODEL, preset)
    store, tracking = places
    place = Tracking(tracking)
    repository = Store(store, create=True)

    head("1  Simulate the campaign")
    campaign = load_campaign(options.DEFAULT_CAMPAIGN)
    job = SimulationJob(campaign, "kinematic", limit=limit, cluster=cluster)
    tag = simulate_campaign(job, repository)
    dataset = repository.open(tag.name)
    simulated = time.monotonic()

    head("2  Train and register a first model")
    environment = TrainingEnvironment(place, presets=presets)
    # The cells of a few samples do not cover the ranges that measured profiles are drawn from.
    models = (_MODEL, _FALLBACK) if limit is None else (_FALLBACK,)
    model, uri = train_first(dataset, environment, preset, models)
    trained = time.monotonic()

    head("3  Predict the bundled examples")
    predictions = predict_examples(place, uri)
    for prediction, example in predictions:
        console.print(comparison_table(prediction, example))
    finished = time.monotonic()

    head("What exists now")
    counts = ", ".join(f"{n:,} {system}" for system, n in counts_per_system(dataset).items() if n)
    print_rows(
        {
            "Data set": f"[bold]{tag.name}[/] ({counts}) in {repository.uri}",
            "Model": f"[bold]{predictions[0][0].model}[/] ({model}) in {place.uri}",
            "Measured profiles": _MEASURED[model == _MODEL],
            "Time": f"{duration(finished - began)}: simulation {duration(simulated - began)}, "
            f"training {duration(trained - simulated)}, prediction {duration(finished - trained)}",
        }
    )
    calibrated = command_line("predict", "FILE", "--instrument", "YOURS.instprm")
    longer = command_line("train", _MODEL, "--preset", "standard")
    next_commands(
        ("make ui", "compare runs and models in a browser"),
        (command_line("inspect", tag.name, "--png", "patterns.png"), "look into the data"),
        (calibrated, "predict your profiles"),
        (longer, "train the network for measured profiles longer"),
        ("python -m pipelines", "list all commands"),
    )
    say("(in the virtual environment: source .venv/bin/activate)")


def champion_of_data(
    tracking: Tracking, name: str, dataset: xr.Dataset
) -> registry.ModelVersion | None:
    """Return the champion of a name if it was trained on contents like a data set's, or None."""
    champion = registry.champion(tracking, name)
    if champion is None or champion.tags.get("content_hash") != dataset.attrs["content_hash"]:
        return None
    return champion


def train_first(
    dataset: xr.Dataset, environment: TrainingEnvironment, preset: str, models: Sequence[str]
) -> tuple[str, str]:
    """Train models until one is the champion of its kind; return the last and its address.

    A champion that was trained on the same contents stays, also where a store was made again.
    """
    for model in models:
        name = registry.registered_name(str(dataset.attrs["campaign"]), model)
        uri = f"models:/{name}@{registry.CHAMPION}"
        champion = champion_of_data(environment.tracking, name, dataset)
        if champion is not None:
            say(
                f"{champion.uri} was trained on this data set: it stays. "
                f"python -m pipelines.train trains another."
            )
            break
        # A champion of other data cannot be compared with this model.
        task = TrainingTask(model, preset)
        version, is_champion = train_model(dataset, environment, task, promotion="replace")
        if is_champion:
            break
        uri = version.uri
    return model, uri


def head(text: str) -> None:
    """Print the heading of a step."""
    console.print()
    console.print(Rule(f"[bold]{text}[/]", align="left"))
