"""Train models on a snapshot of the store, score them, and register them in MLflow."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, duration, next_commands, run, say
from pipelines.training.names import DEFAULT_STATE, TRAINABLE

_MODELS = f"Which models to train: {', '.join(TRAINABLE)}, or all of them: all."


def main(
    context: typer.Context,
    model: Annotated[
        list[str] | None, Argument(metavar="MODEL…", help=_MODELS, show_default="multitask")
    ] = None,
    data: options.DataOption = None,
    store: options.StoreOption = options.DEFAULT_URI,
    preset: Annotated[
        str,
        Option(
            help="quick (minutes), standard (good results on two cores), or paper (its settings to "
            "the letter: a GPU, or days)."
        ),
    ] = "quick",
    seed: Annotated[int, Option(min=0, help="Seed of weights and order of samples.")] = 0,
    split: Annotated[
        str, Option(metavar="random|blocked", help="How test samples are held out.")
    ] = "random",
    extra_data: Annotated[
        list[str] | None, Option(metavar="TAG", help="Train networks on it too; again for more.")
    ] = None,
    extra_share: Annotated[
        list[float] | None,
        Option(metavar="SHARE", help="Of the loss that each has; by default by its samples."),
    ] = None,
    beside: Annotated[list[str] | None, Option(hidden=True)] = None,  # deprecated
    continue_from: Annotated[
        str | None,
        Option(metavar="URI|VERSION", help="Start from the weights of this registered version."),
    ] = None,
    resume: Annotated[
        str | None, Option(metavar="RUN", help="Continue this run; needs no other option.")
    ] = None,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    max_seconds: Annotated[float | None, Option(min=0, help="Ends a fit; 0 for no limit.")] = None,
    epochs: Annotated[int | None, Option(min=1, help="Replaces the preset's.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda …")] = "auto",
    promote: Annotated[bool, Option("--promote", help="Make it the champion by force.")] = False,
    state: Annotated[Path, Option(help="Directory of checkpoints and caches.")] = DEFAULT_STATE,
    cache: Annotated[bool, Option(help="Cache prepared profiles on disk, for speed.")] = True,
    *,
    cluster: options.ClusterOptions,
) -> None:
    """Train models on a snapshot of the store, score them, and register them in MLflow.

    The paper's: classifier; on top of it, a regressor for each crystal system: forest, transfer,
    deep; all at once: multitask, integrated-forest, caenn. Ours: guided; and for measured profiles
    robust, and search, which starts from known cells in place of a network and is only calibrated.
    These two are registered as CAMPAIGN-measured: where there is one, predict uses its champion. A
    model becomes the champion of its name if it beats the constant answers (robust and search: the
    library match too) and has a lower error than the champion on the same test samples, or
    with --promote. An interrupted training continues at its last epoch with --resume RUN.
    """
    from bragg_data.store.repository import Store
    from catalog.tracking import Tracking
    from pipelines.registry.registration import PromotionPolicy
    from pipelines.training.presets import DEFAULT_PRESETS, Presets
    from pipelines.training.run import train_model
    from pipelines.training.task import TrainingEnvironment, TrainingTask, load_task, tasks_for

    began = time.monotonic()
    presets = context.find_object(Presets) or DEFAULT_PRESETS
    environment = TrainingEnvironment(Tracking(tracking), state, cache, cluster, presets)
    if resume is not None:
        task, dataset = load_task(environment, resume)
        tasks = [task]
    else:
        extra = (*(extra_data or ()), *(beside or ()))  # deprecated: beside
        common = TrainingTask("all", preset, seed, device, split, extra, epochs, max_seconds)
        shares = tuple(extra_share or ())
        common = replace(common, parent=continue_from, extra_shares=shares)
        tasks = tasks_for(model or ["multitask"], common, presets)
        repository = Store(store)
        dataset = repository.open(data or options.default_tag(repository))
    promotion: PromotionPolicy = "force" if promote else "if better"
    trained = [
        train_model(dataset, environment, task, promotion=promotion, resume=resume)
        for task in tasks
    ]
    for version, is_champion in trained:
        champion = ", champion" if is_champion else ""
        say(
            f"Registered: [bold]{version.name}[/] version {version.version}{champion} "
            f"({version.tags['model']}), run {version.run_id} in {environment.tracking.uri}"
        )
    say(f"After {duration(time.monotonic() - began)}")
    predict = command_line("predict", "FILE", tracking=tracking)
    evaluate = command_line("evaluate", store=store, tracking=tracking)
    next_commands(
        (predict, "predict a profile with the champion"),
        (evaluate, "compare all models, and the paper's"),
        ("make ui", "look at runs and models in a browser"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
