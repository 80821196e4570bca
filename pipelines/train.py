"""Train a model on a snapshot of the store, score it, and register it in MLflow."""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import xarray as xr
from numpy.typing import NDArray

from bragg_data.crystal import CELL_PARAMETERS
from bragg_data.preprocessing import preprocessing
from bragg_data.schema import campaign_of, samples_of
from bragg_data.splits import Part, random_split
from bragg_data.store import DEFAULT_URI, Store
from bragg_models.batches import profiles_of
from bragg_models.guided import fill_tables, guided_config
from bragg_models.metrics import summary
from bragg_models.networks import build
from bragg_models.predictors import Predictor, output_columns
from bragg_models.targets import Targets, targets_of
from bragg_models.training import (
    EpochResult,
    Samples,
    Step,
    choose_device,
    evaluate,
    fit,
)
from catalog import models, runs
from pipelines.console import Progress, duration, next_commands, run, say
from pipelines.presets import PRESETS, Preset, TrainError, preset_of
from pipelines.scores import constant_scores, print_scores
from pipelines.simulate import code_commit

app = typer.Typer(add_completion=False)

SPLIT_SEED = 0
"""The split is the same for every run, so that all models are scored on the same test samples."""

_LOADER = "bragg_models.predictors"
_REQUIREMENTS = ("torch", "numpy", "pandas", "safetensors", "pydantic", "gemmi", "periodictable")


class Model(StrEnum):
    """What can be trained."""

    multitask = "multitask"
    guided = "guided"


@dataclass(frozen=True)
class Trained:
    """A model that was trained, scored and registered.

    Attributes
    ----------
    version
        Its place in the registry.
    run_id
        Its run.
    scores
        Of the test samples, as :func:`bragg_models.metrics.summary` gives them.
    is_champion
        Whether it answers from now on.
    champion
        Address of the version that answers from now on.
    fit_seconds
        Time that the fit took, reading included.
    """

    version: models.ModelVersion
    run_id: str
    scores: Mapping[str, Mapping[str, float]]
    is_champion: bool
    champion: str
    fit_seconds: float


def train_model(
    dataset: xr.Dataset,
    tracking: runs.Tracking,
    *,
    model: str = "multitask",
    preset: Preset,
    preset_name: str,
    seed: int = 0,
    device: str = "auto",
    promote: bool = False,
) -> Trained:
    """Train, score on the test samples, log to MLflow and register.

    Parameters
    ----------
    dataset
        An opened snapshot.
    tracking
        Where the run and the model go.
    model, preset, preset_name
        What is trained, and how.
    seed
        Of the initial weights and of the order of the samples.
    device
        ``auto``, ``cpu``, ``cuda`` …
    promote
        Make it the champion even if the present one did better.
    """
    name = str(dataset.attrs["campaign"])
    task = _Task.of(dataset, preset.preprocessing)
    training, validation, test = (task.part == p for p in Part)
    if not (training.any() and validation.any() and test.any()):
        raise TrainError(
            f"Data set {dataset.attrs['tag']} has {len(task.part)} samples, too few to train, "
            f"validate and test on. Simulate more: python -m pipelines.simulate --limit 2000"
        )
    where = choose_device(device)
    network = _network(model, dataset, task.targets, seed)
    provenance = _provenance(dataset, model, preset, preset_name, seed, where)
    weights = sum(p.numel() for p in network.parameters())
    say(
        f"Training [bold]{model}[/] ({weights:,} weights) on {dataset.attrs['tag']}: "
        f"{training.sum():,} samples to learn from, {validation.sum():,} to choose the best "
        f"weights on, {test.sum():,} to test"
    )
    tags = _run_tags(provenance)
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    with tracking.run(name, f"{model} {preset_name} seed {seed} {started}", tags) as run_:
        run_.log_parameters(
            {"model": model, "network": asdict(network.config), "preset": preset_name,
             **asdict(preset),
             "seed": seed, "split": provenance["split"], "device": str(where),
             "threads": torch.get_num_threads(), "cores": os.cpu_count() or 0}
        )  # fmt: skip
        run_.log_dataset(dataset, "training")
        began = time.monotonic()
        _fit(network, task, training, validation, preset, seed, where, run_)
        fit_seconds = time.monotonic() - began
        with Progress("Testing", int(test.sum()), "profiles") as progress:
            total = evaluate(
                network, task.targets, task.samples, test, where, on_batch=progress.advance
            )
        scores = summary(task.targets, total)
        run_.log_metrics({"test": scores, "fit_seconds": fit_seconds})
        say()
        print_scores(
            name,
            model,
            scores,
            constant_scores(task.targets, task.samples, training, test),
            task.targets,
        )
        provenance["test"] = scores
        predictor = Predictor(
            model, network, task.targets, preset.preprocessing, dataset.sizes["tof"], provenance
        )
        version = _register(run_, predictor, name, provenance)
    is_champion, champion = _crown(tracking, version, promote)
    return Trained(version, run_.id, scores, is_champion, champion, fit_seconds)


def _network(model: str, dataset: xr.Dataset, targets: Targets, seed: int) -> Any:
    if model == "guided":
        campaign = campaign_of(dataset)
        guided = build(model, guided_config(campaign, targets), seed=seed)
        fill_tables(guided, campaign, targets)
        return guided
    config = {
        "points": dataset.sizes["tof"],
        "phases": len(targets.names),
        "parameters": len(targets.parameters),
    }
    return build(model, config, seed=seed)


@dataclass(frozen=True)
class _Task:
    samples: Samples
    targets: Targets
    part: NDArray[np.int8]

    @classmethod
    def of(cls, dataset: xr.Dataset, prepared_by: str) -> _Task:
        labels = samples_of(dataset)
        targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
        profiles = profiles_of(dataset, preprocessing(prepared_by).function)
        part = random_split(labels.crystal_system, seed=SPLIT_SEED)
        return cls(Samples(profiles, labels.phase, labels.cells), targets, part)


def _fit(
    network: torch.nn.Module,
    task: _Task,
    training: NDArray[np.bool_],
    validation: NDArray[np.bool_],
    preset: Preset,
    seed: int,
    device: torch.device,
    run_: runs.Run,
) -> None:
    settings = preset.settings
    with Progress("Training", int(training.sum()) * settings.epochs, "profiles") as progress:

        def on_step(step: Step) -> None:
            progress.advance(
                step.samples, f"epoch {step.epoch} of {settings.epochs}, loss {step.loss:.2g}"
            )

        results: list[EpochResult] = []
        for result in fit(
            network, task.targets, task.samples, training, validation, settings,
            seed=seed, device=device, max_seconds=preset.max_seconds, on_step=on_step,
        ):  # fmt: skip
            results.append(result)
            metrics = {"train": result.training, "validation": result.validation}
            run_.log_metrics(metrics, step=result.epoch)
            scores = result.validation["all"]
            say(
                f"Epoch {result.epoch}: loss {result.training['loss']:.3g}, on validation samples "
                f"mse_paper {scores['mse_paper']:.2e}, accuracy {scores['accuracy']:.2%}, "
                f"{duration(result.seconds)}{', best so far' if result.is_best else ''}"
            )
    if results[-1].out_of_time:
        say(
            f"The time limit of {duration(preset.max_seconds or 0)} ended the training: another "
            f"run, on a machine with other work, gives other weights. Without limit: "
            f"--max-seconds 0"
        )


def _provenance(
    dataset: xr.Dataset, model: str, preset: Preset, preset_name: str, seed: int, device: object
) -> dict[str, Any]:
    campaign = campaign_of(dataset)
    attrs = dataset.attrs
    split = {"name": "random", "seed": SPLIT_SEED, "test": 0.2, "validation": 0.05}
    return {
        "model": model,
        "campaign": campaign.name,
        "campaign_toml": campaign.toml,
        "cifs": dict(campaign.cifs),
        "instrument_instprm": campaign.instprm,
        "units": {p: "Å" if p in "abc" else "degree" for p in CELL_PARAMETERS},
        "data": {
            key: str(attrs[key])
            for key in ("tag", "snapshot_id", "uri", "content_hash", "identity", "simulator",
                        "simulator_version", "code_commit")
        },
        "split": split,
        # What the test scores of two models have in common if they may be compared.
        "test_set": _digest(attrs["content_hash"], split, "test"),
        "preset": preset_name,
        "preset_values": asdict(preset),
        "seed": seed,
        "device": str(device),
        "code_commit": code_commit(),
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _run_tags(provenance: Mapping[str, Any]) -> dict[str, str]:
    commit, _, dirty = provenance["code_commit"].partition("-")
    return {
        "model": provenance["model"],
        "preset": provenance["preset"],
        "seed": str(provenance["seed"]),
        "data": provenance["data"]["tag"],
        "snapshot_id": provenance["data"]["snapshot_id"],
        "content_hash": provenance["data"]["content_hash"],
        "simulator": provenance["data"]["simulator"],
        "split": f"random, seed {provenance['split']['seed']}",
        "test_set": provenance["test_set"],
        "code_commit": commit,
        "code_dirty": str(bool(dirty)).lower(),
        "mlflow.source.name": "pipelines.train",
        "mlflow.source.git.commit": commit,
    }


def _register(
    run_: runs.Run, predictor: Predictor, name: str, provenance: Mapping[str, Any]
) -> models.ModelVersion:
    score = provenance["test"]["all"]
    tags = _run_tags(provenance)
    kept = (
        "model", "preset", "seed", "data", "snapshot_id", "content_hash", "test_set", "code_commit",
    )  # fmt: skip
    description = (
        f"{provenance['model']}, preset {provenance['preset']}, trained on "
        f"{provenance['data']['tag']}. Test samples (random split): mse_paper "
        f"{score['mse_paper']:.3e}, accuracy {score['accuracy']:.4%}. Input: profiles without "
        f"background on the campaign's time-of-flight grid; {predictor.preprocessing} is applied "
        f"inside. Output: a, b, c in Å, alpha, beta, gamma in degrees, a probability per phase."
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "predictor"
        predictor.save(directory)
        return models.register(
            run_, name, directory,
            loader_module=_LOADER,
            points=predictor.points,
            outputs=output_columns(predictor.targets),
            requirements=_REQUIREMENTS,
            description=description,
            tags={**{key: tags[key] for key in kept}, "mse_paper": repr(score["mse_paper"])},
        )  # fmt: skip


def _crown(
    tracking: runs.Tracking, version: models.ModelVersion, promote: bool
) -> tuple[bool, str]:
    """Make a version the champion if there is none, if it is better, or if told to."""
    present = models.champion(tracking, version.name)
    own = float(version.tags["mse_paper"])
    reason = None
    if present is not None and not promote:
        theirs = float(present.tags.get("mse_paper", "nan"))
        if present.tags.get("test_set") != version.tags["test_set"]:
            reason = f"version {present.version} was tested on other samples"
        elif not own < theirs:
            reason = f"version {present.version} did better there ({theirs:.2e})"
    if reason is None:
        models.set_alias(tracking, version, models.CHAMPION)
        return True, version.uri
    assert present is not None
    say(
        f"The champion stays: {reason}. To have this one answer instead, train with --promote, or "
        f"name it: --model {version.uri}"
    )
    return False, present.uri


@app.command()
def main(
    model: Annotated[Model, typer.Argument(help="What to train.")] = Model.multitask,
    data: Annotated[
        str | None, typer.Option(help="Tag of the data set; the newest by default.")
    ] = None,
    store: Annotated[str, typer.Option(help="Path or file:// URI of the store.")] = DEFAULT_URI,
    preset: Annotated[
        str,
        typer.Option(
            help=" ".join(
                f"{model}: "
                + ", ".join(f"{n} ({p.description})" for n, p in of_model.items())
                + "."
                for model, of_model in PRESETS.items()
            )
        ),
    ] = "quick",
    seed: Annotated[
        int, typer.Option(min=0, help="Of the initial weights and of the samples' order.")
    ] = 0,
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = runs.DEFAULT_URI,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="End the fit after this time; 0 for no limit."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    promote: Annotated[
        bool, typer.Option("--promote", help="Make it the champion even if the present is better.")
    ] = False,
) -> None:
    """Train a model on a snapshot of the store, score it, and register it in MLflow.

    The first model of a campaign becomes its champion, the one that predict asks; a later one does
    if it has a lower error on the same test samples, or with --promote.
    """
    began = time.monotonic()
    chosen = preset_of(preset, epochs, max_seconds, model=model.value)
    repository = Store(store)
    tag = data or newest_tag(repository)
    dataset = repository.open(tag)
    place = runs.Tracking(tracking)
    trained = train_model(
        dataset, place, model=model.value, preset=chosen, preset_name=preset, seed=seed,
        device=device, promote=promote,
    )  # fmt: skip
    crowned = ", champion" if trained.is_champion else ""
    say(
        f"Registered: [bold]{trained.version.name}[/] version {trained.version.version}{crowned}, "
        f"run {trained.run_id} in {place.uri}, after {duration(time.monotonic() - began)}"
    )
    given = "" if tracking == runs.DEFAULT_URI else f" --tracking {shlex.quote(tracking)}"
    next_commands(
        [
            (f"python -m pipelines.predict FILE{given}", "ask it about a measured profile"),
            ("make ui", "look at runs and models in a browser"),
        ]
    )


def newest_tag(store: Store) -> str:
    """Return the tag of a store that was written last.

    Raises
    ------
    TrainError
        If there is none.
    """
    tags = store.tags()
    if not tags:
        raise TrainError(
            f"The store {store.uri} holds no finished data set yet. Make one with: "
            f"python -m pipelines.simulate"
        )
    return max(tags, key=lambda tag: tag.written_at).name


if __name__ == "__main__":
    run(app)
