"""What every training has in common: its context, prepared profiles, and a stage of fitting."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from bragg_data.arrays import AnyFloats, Integers8, Mask
from bragg_data.preprocessing import preprocessing
from bragg_data.splits import Part
from bragg_data.store.repository import Store
from bragg_models.data.batches import Joined, Profiles, joined
from bragg_models.data.cache import CacheError, cached
from bragg_models.forest import ForestModel
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from bragg_models.training import settings as fitting
from bragg_models.training.fit import fit
from bragg_models.training.inference import Samples, transformed
from bragg_models.training.settings import EpochResult, FitSettings
from catalog import features
from catalog.tracking import Run
from catalog.views import view_of
from pipelines.cli.console import Progress, duration, say
from pipelines.training.presets import Preset
from pipelines.training.task import TrainingEnvironment, TrainingTask

_REPORTED = ("mse_paper", "accuracy", "mae", "wrong")  # scores in the line of an epoch


@dataclass(frozen=True)
class TrainingContext:
    """The data of a training, and where it computes and logs."""

    dataset: xr.Dataset  # an opened snapshot
    # Its n profiles, not prepared, and labels, with those of further data sets.
    samples: Samples
    targets: Targets
    part: Integers8  # the Part of each sample, shape (n,)
    contents: tuple[str, ...]  # names the contents of each data set in the cache
    device: torch.device
    task: TrainingTask
    environment: TrainingEnvironment
    run: Run
    parent: Predictor | None = None  # the model from whose weights the training continues


@dataclass
class FittedModel:
    """A trained model and the record of its training."""

    kind: str  # as the predictor names it
    model: nn.Module | ForestModel
    preprocessing: str  # name and version of the function that prepares the profiles
    classifier: Predictor | None = None  # that a class-conditional forest builds on
    histories: dict[str, list[EpochResult]] = field(default_factory=dict)  # by stage
    facts: dict[str, object] = field(default_factory=dict)  # JSON values for the provenance


@dataclass(frozen=True)
class Stage:
    """A network to fit, on which samples, and how."""

    name: str  # in the log and of the checkpoint
    network: nn.Module
    samples: Samples  # prepared
    settings: FitSettings
    criteria: fitting.Criteria = fitting.Criteria()  # noqa: RUF009 - frozen
    subset: Mask | None = None  # samples to use, shape (n,); None for all


def fit_stage(context: TrainingContext, fitted: FittedModel, preset: Preset, stage: Stage) -> None:
    """Fit a network with a progress bar, log every epoch, and save a checkpoint after each."""
    name = stage.name
    training, validation = context.part == Part.training, context.part == Part.validation
    if stage.subset is not None:
        training, validation = training & stage.subset, validation & stage.subset
    # With a single stage the metrics have no prefix, as is usual in MLflow.
    prefix = f"{name}/" if len(preset.stages) > 1 or name.startswith("regressor_") else ""
    settings, per_epoch = _epoch_size(stage.settings, int(training.sum()), preset)
    history: list[EpochResult] = []
    with Progress(f"Training {name}", settings.epochs * per_epoch, "profiles") as progress:

        def on_step(step: fitting.Step) -> None:
            note = f"epoch {step.epoch} of {settings.epochs}, loss {step.loss:.2g}"
            progress.advance(step.samples, note)

        results = fit(
            stage.network,
            fitting.TrainingData(context.targets, stage.samples, training, validation),
            settings,
            seed=context.task.seed,
            criteria=stage.criteria,
            execution=fitting.Execution(
                device=context.device,
                max_seconds=preset.max_seconds,
                checkpoint=context.environment.run_state(context.run.id) / f"{name}.safetensors",
                on_step=on_step,
            ),
        )
        for result in results:
            history.append(result)
            if not result.restored:
                context.run.log_metrics(
                    {f"{prefix}train": result.training, f"{prefix}validation": result.validation},
                    step=result.epoch,
                )
            if settings.epochs <= 12 or result.epoch % 10 == 0 or result.epoch == settings.epochs:
                say(_epoch_line(name, result))
    fitted.histories[name] = history
    if history[-1].out_of_time:
        say(
            f"The time limit of {duration(preset.max_seconds or 0)} ended the training: another "
            f"run, on a machine with other work, gives other weights. Without limit: "
            f"--max-seconds 0"
        )


def _epoch_size(settings: FitSettings, count: int, preset: Preset) -> tuple[FitSettings, int]:
    """Return the settings with a limited epoch of ``count`` samples, and its size."""
    if settings.samples_per_epoch is not None:
        most = min(settings.samples_per_epoch, preset.max_passes * count)
        settings = replace(settings, samples_per_epoch=most)
    count = settings.samples_per_epoch or count
    if settings.balance is not None:
        count = -(-count // settings.batch_size) * settings.batch_size
    return settings, count


def _epoch_line(name: str, result: EpochResult) -> str:
    scores = ", ".join(
        f"{key} {value:.2%}" if key == "accuracy" else f"{key} {value:.2e}"
        for key, value in result.validation["all"].items()
        if key in _REPORTED
    )
    time = ", from the checkpoint" if result.restored else f", {duration(result.seconds)}"
    best = ", best so far" if result.is_best else ""
    return (
        f"{name}, epoch {result.epoch}: loss {result.training['loss']:.3g}, on validation samples "
        f"{scores}{time}{best}"
    )


def prepared_samples(context: TrainingContext, prepared_by: str) -> Samples:
    """Return the samples with profiles prepared by a named function, cached where possible."""
    function = preprocessing(prepared_by).function
    return _mapped(context, context.samples, function, prepared_by)


def encoded_samples(
    context: TrainingContext, samples: Samples, network: nn.Module, name: str
) -> Samples:
    """Return prepared samples with the features (n, m) of a frozen network instead of profiles.

    The name is that of the features in the cache.
    """
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    encode = partial(transformed, network, device=context.device)
    return _mapped(context, samples, encode, f"{name} {digest.hexdigest()[:16]}")


def _mapped(
    context: TrainingContext, samples: Samples, function: Callable[[Any], AnyFloats], name: str
) -> Samples:
    """Return the samples with a function applied to their profiles, cached under a name."""
    profiles, cache = samples.profiles.mapped(function), context.environment.cache_directory
    if cache is None:
        return replace(samples, profiles=profiles)
    parts = profiles.parts if isinstance(profiles, Joined) else (profiles,)
    try:
        with Progress(f"Caching {name}", len(profiles), "profiles") as progress:
            stored = [
                cached(part, cache, f"{content} {name}", on_chunk=progress.advance)
                for part, content in zip(parts, context.contents, strict=True)
            ]
    except CacheError as error:
        say(f"{error} Continuing without a cache.")
        return replace(samples, profiles=profiles)
    return replace(samples, profiles=joined(stored))


def samples_from_view(context: TrainingContext, name: str, uri: str) -> Samples | None:
    """Return the samples with a view's features, if a registered model (``uri``) materialised it.

    None where there is no such view, or further data sets are used, which it does not cover.
    """
    if isinstance(context.samples.profiles, Joined):
        return None
    attrs = context.dataset.attrs
    view = view_of(name)
    for stored in features.materialised(Store(attrs["uri"]), attrs["tag"]):
        if stored.view == view.key and stored.complete and stored.lineage["model"] == uri:
            values = features.load(view, attrs["tag"], attrs["uri"])[view.name]
            say(f"Features from the view {view.key}, snapshot {stored.snapshot_id}")
            context.run.log_parameters({"view": view.key, "view_snapshot_id": stored.snapshot_id})
            profiles = Profiles(values, int(attrs["rows_per_chunk"]), np.asarray)
            return replace(context.samples, profiles=profiles)
    return None


def choose_samples(context: TrainingContext, count: int | None) -> Mask | None:
    """Choose ``count`` training samples at random, rare phases whole, and all validation samples.

    Return which samples, shape (n,), are chosen; None stands for all.
    """
    if count is None:
        return None
    training = context.part == Part.training
    chosen = np.zeros(len(training), dtype=bool)
    phase = context.samples.phase
    sizes = np.bincount(phase[training], minlength=len(context.targets.names))
    for code in np.flatnonzero(sizes < count / 10):
        chosen |= training & (phase == code)
    rest = np.flatnonzero(training & ~chosen)
    share = max(count - int(chosen.sum()), 0)
    generator = np.random.default_rng(np.random.SeedSequence([context.task.seed, 2]))
    chosen[generator.permutation(rest)[:share]] = True
    return np.asarray(chosen | (context.part == Part.validation))
