"""How each model is made from a data set: the stages of its training, one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from distributed import Client
from numpy.typing import NDArray
from torch import Tensor, nn

from bragg_data.preprocessing import preprocessing
from bragg_data.simulation.measurement_effects import effects_from_campaign
from bragg_data.splits import Part
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of
from bragg_models.data.batches import Joined, Profiles, in_order, joined
from bragg_models.data.cache import CacheError, cached
from bragg_models.forest import ForestModel
from bragg_models.metrics import Errors, errors, summary
from bragg_models.networks.build import build
from bragg_models.networks.guided import fill_physics_tables, guided_config
from bragg_models.networks.paper import Caenn, Conditional, Encoding, Multitask
from bragg_models.networks.robust import Robust, calibrate, concatenate_fits
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from bragg_models.training.fit import fit
from bragg_models.training.inference import Samples, outputs, transformed
from bragg_models.training.objectives import (
    LabelledBatch,
    Objective,
    Validation,
    full_precision,
    paper_score,
)
from bragg_models.training.settings import (
    Criteria,
    EpochResult,
    Execution,
    FitSettings,
    Step,
    TrainingData,
)
from catalog import features
from catalog.tracking import Run
from catalog.views import view_of
from pipelines.cli.console import Progress, duration, say
from pipelines.simulation.draws import Drawn, drawn
from pipelines.training.forests import FOREST_PRESETS, How, grow
from pipelines.training.presets import Preset


@dataclass(frozen=True)
class Task:
    """What a model is trained for, and where.

    Attributes
    ----------
    dataset
        An opened snapshot.
    samples
        Its profiles, not prepared, and labels; those of further data sets may follow.
    targets, part
        The campaign's phases; what each of the n samples is for.
    seed
        Of weights, orders and choices.
    device
        Where torch computes.
    cache
        Directory for prepared profiles, or None.
    contents
        Names the contents of each data set, for the cache.
    checkpoints
        Directory for the state of unfinished stages.
    run
        Where progress is logged.
    """

    dataset: xr.Dataset
    samples: Samples
    targets: Targets
    part: NDArray[np.int8]
    seed: int
    device: torch.device
    cache: Path | None
    contents: tuple[str, ...]
    checkpoints: Path
    run: Run


@dataclass
class Made:
    """A trained model, and what there is to tell about its training."""

    kind: str
    model: nn.Module | ForestModel
    preprocessing: str
    classifier: Predictor | None = None
    histories: dict[str, list[EpochResult]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def make_multitask(task: Task, preset: Preset, *, classifier: bool = False) -> Made:
    """Train the paper's multitask network, or only its classifier (section IV-A, IV-C1)."""
    parameters = 0 if classifier else len(task.targets.parameters)
    network = build("multitask", _config(task, preset, parameters=parameters), seed=task.seed)
    made = Made("multitask", network, preset.preprocessing)
    ((name, settings),) = preset.stages.items()
    samples = prepared(task, preset.preprocessing)
    integer = bool(preset.network.get("integer"))
    if classifier:
        _stage(task, made, name, network, samples, preset, settings, _classify,
               validate=lambda n: _error_rate(task, n, samples), score=_wrong)  # fmt: skip
    elif integer:
        _stage(task, made, name, network, samples, preset, settings,
               _integer_objective(settings.regression_weight))  # fmt: skip
    else:
        _stage(task, made, name, network, samples, preset, settings)
    return made


def make_conditional(
    task: Task, preset: Preset, classifier: Predictor, uri: str, *, deep: bool
) -> Made:
    """Train a regressor for each phase on a classifier's features (sections IV-B2, IV-B3).

    The deep ones begin with the classifier's weights and learn all; otherwise the features stay:
    those of the view ``classifier_256`` where it is materialised by this classifier, whose address
    is given; elsewhere they are computed, which comes to the same to the last bit.
    """
    told = classifier.model
    if not isinstance(told, Multitask):
        raise TypeError(f"A {type(told).__name__} has no features to build on.")
    free = [np.flatnonzero(row).tolist() for row in task.targets.free]
    config = {
        "classifier": asdict(told.config),
        "free": free,
        "parameters": len(task.targets.parameters),
        "separate_features": deep,
        **preset.network,
    }
    network = build("conditional", config, seed=task.seed)
    if not isinstance(network, Conditional):
        raise TypeError("Not a class-conditional network.")
    network.classifier.load_state_dict(told.state_dict())
    for own_features in network.features:
        own_features.load_state_dict(told.features.state_dict())
    made = Made("conditional", network, classifier.preprocessing)
    samples = prepared(task, classifier.preprocessing)
    ((_, settings),) = preset.stages.items()
    if not deep:
        stored = _from_view(task, "classifier_256", uri)
        name = f"features {_digest_of(told.features)}"
        samples = stored or _transformed(task, samples, told.features, name)
    for code, name in enumerate(task.targets.names):
        own = task.samples.phase == code
        count = int((own & (task.part == Part.training)).sum())
        columns = torch.tensor(free[code], device=task.device)
        if not len(free[code]) or not count:
            continue
        _stage(
            task, made, f"regressor_{name}", network.regressor(code), samples, preset,
            settings, _regress(columns), among=own,
            validate=_regression_scores(task, samples, code),
        )  # fmt: skip
    return made


def make_caenn(task: Task, preset: Preset) -> Made:
    """Train the auto-encoder, then the dense regressor on what it makes (section IV-C3)."""
    network = build("caenn", _config(task, preset, points=_points(task, preset)), seed=task.seed)
    if not isinstance(network, Caenn):
        raise TypeError("Not a CAENN.")
    made = Made("caenn", network, preset.preprocessing)
    samples = prepared(task, preset.preprocessing)
    among = _chosen(task, preset.training_samples)
    coder = network.autoencoder
    _stage(
        task, made, "autoencoder", coder, samples, preset, preset.stages["autoencoder"],
        _reconstruct, among=among, validate=lambda n: _reconstruction_errors(task, n, samples),
        score=lambda scores: scores["all"]["mae"],
    )  # fmt: skip
    latent = _transformed(task, samples, Encoding(coder), f"latent {_digest_of(coder)}")
    settings = preset.stages["regressor"]
    _stage(
        task, made, "regressor", network.regressor, latent, preset, settings,
        _integer_objective(settings.regression_weight), among=among,
    )  # fmt: skip
    return made


def make_guided(task: Task, preset: Preset) -> Made:
    """Train the glance of our network; the rest of it knows already."""
    campaign = campaign_of(task.dataset)
    network = build("guided", guided_config(campaign, task.targets, **preset.network),
                    seed=task.seed)  # fmt: skip
    fill_physics_tables(network, campaign, task.targets)
    made = Made("guided", network.to(task.device), preset.preprocessing)
    ((name, settings),) = preset.stages.items()
    glance: nn.Module = network.proposal  # type: ignore[assignment]
    _stage(task, made, name, glance, prepared(task, preset.preprocessing), preset, settings)
    return made


def make_robust(
    task: Task, preset: Preset, cluster: Callable[[], AbstractContextManager[Client]]
) -> Made:
    """Train our network for measured profiles on draws of them, and calibrate it on others."""
    campaign = campaign_of(task.dataset)
    config = guided_config(campaign, task.targets, sample_parameters=True, **preset.network)
    network = build("robust", config, seed=task.seed)
    if not isinstance(network, Robust):
        raise TypeError("Not a robust network.")
    fill_physics_tables(network, campaign, task.targets)
    made = Made("robust", network.to(task.device), preset.preprocessing)
    learnt_from, calibrated_on = preset.draws
    with cluster() as client:
        training = drawn(client, campaign, learnt_from, task.seed)
        right = drawn(client, campaign, calibrated_on, task.seed + 1)
        drifted = drawn(client, campaign, calibrated_on, task.seed + 1, calibrated=False)
    function = preprocessing(preset.preprocessing).function
    samples, part = _in_memory([training, right], function)
    ((name, settings),) = preset.stages.items()
    own = replace(task, samples=samples, part=part)
    glance: nn.Module = network.proposal
    _stage(own, made, name, glance, samples, preset, settings)
    network.eval()
    found = []
    size = len(right.profiles) + len(drifted.profiles)
    with Progress("Calibrating", size, "profiles") as progress, torch.inference_mode():
        for one in (right, drifted):
            ready = np.asarray(function(one.profiles), dtype=np.float32)
            for low in range(0, len(ready), network.batch_size):
                some = torch.from_numpy(ready[low : low + network.batch_size]).to(task.device)
                found.append(network.fit_phases(some))
                progress.advance(len(some))
    phase = np.concatenate([right.phase, drifted.phase])
    values, _ = task.targets.encode(phase, np.concatenate([right.cells, drifted.cells]))
    calibrated = np.arange(size) < len(right.profiles)
    made.facts |= calibrate(
        network, concatenate_fits(found), phase, values, task.targets.free, calibrated
    )
    made.facts |= {
        "draws": list(preset.draws),
        "measurement_effects": effects_from_campaign(campaign).to_json(),
    }
    say(
        f"Calibrated: {made.facts['accuracy']:.2%} of the systems right on held-out draws, cross "
        f"entropy {made.facts['cross_entropy']:.3f}"
    )
    return made


def _in_memory(
    parts: Sequence[Drawn], function: Callable[[Any], NDArray[np.floating]]
) -> tuple[Samples, NDArray[np.int8]]:
    """Return draws to learn from and draws to validate on as prepared samples."""
    ready = np.concatenate([function(part.profiles) for part in parts]).astype(np.float32)
    kinds = [Part.training, Part.validation]
    part = np.concatenate(
        [
            np.full(len(one.phase), kind, dtype=np.int8)
            for one, kind in zip(parts, kinds, strict=True)
        ]
    )
    # Shuffled, as training takes whole chunks: the phases come one after the other.
    order = np.random.default_rng(0).permutation(len(ready))
    ready = ready[order]
    phase = np.concatenate([one.phase for one in parts])[order]
    cells = np.concatenate([one.cells for one in parts])[order]
    intensity = xr.DataArray(ready, dims=("sample", "tof"))
    profiles = Profiles(intensity, 512, lambda values: values, ready)
    return Samples(profiles, phase.astype(np.int8), cells), part[order]


def make_forests(
    task: Task,
    preset_name: str,
    classifier: Predictor | None,
    cluster: Callable[[], AbstractContextManager[Client]],
    how: How,
    directory: Path,
) -> Made:
    """Grow the forests on a cluster: one for each phase, or, without a classifier, one for all."""
    preset = FOREST_PRESETS[preset_name]
    integrated = classifier is None
    n = task.dataset.sizes["sample"]
    with cluster() as client:
        forests, facts = grow(
            client, task.dataset, task.targets, task.part[:n], preset, integrated=integrated,
            seed=task.seed, directory=directory, how=how,
        )  # fmt: skip
    kind = "integrated-forest" if integrated else "forest"
    model = ForestModel(forests, integrated)
    return Made(kind, model, preset.preprocessing, classifier, facts=facts)


# ---- profiles ----------------------------------------------------------------------------------


def prepared(task: Task, prepared_by: str) -> Samples:
    """Return the samples with profiles prepared by a named function, cached if that is wanted."""
    function = preprocessing(prepared_by).function
    return _mapped(task, task.samples, function, prepared_by)


def _mapped(
    task: Task, samples: Samples, function: Callable[[Any], NDArray[np.floating]], name: str
) -> Samples:
    """Return the samples with profiles that something is done to, and its name for the cache."""
    profiles = samples.profiles.mapped(function)
    if task.cache is None:
        return replace(samples, profiles=profiles)
    parts = profiles.parts if isinstance(profiles, Joined) else (profiles,)
    try:
        with Progress(f"Caching {name}", len(profiles), "profiles") as progress:
            ready = [
                cached(part, task.cache, f"{content} {name}", on_chunk=progress.advance)
                for part, content in zip(parts, task.contents, strict=True)
            ]
    except CacheError as error:
        say(f"{error} Going on without a cache.")
        return replace(samples, profiles=profiles)
    return replace(samples, profiles=joined(ready))


def _transformed(task: Task, samples: Samples, network: nn.Module, name: str) -> Samples:
    """Return the samples with a frozen network's features in place of their profiles."""

    def function(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return transformed(network, values, task.device)

    return _mapped(task, samples, function, name)


def _from_view(task: Task, name: str, uri: str) -> Samples | None:
    """Return the samples with a view's features, if a registered model materialised it."""
    attrs = task.dataset.attrs
    view = view_of(name)
    for one in features.materialised(Store(attrs["uri"]), attrs["tag"]):
        if one.view == view.key and one.complete and one.lineage["model"] == uri:
            values = features.load(view, attrs["tag"], attrs["uri"])[view.name]
            say(f"Features from the view {view.key}, snapshot {one.snapshot_id}")
            task.run.log_parameters({"view": view.key, "view_snapshot_id": one.snapshot_id})
            profiles = Profiles(values, int(attrs["rows_per_chunk"]), np.asarray)
            return replace(task.samples, profiles=profiles)
    return None


def _points(task: Task, preset: Preset) -> int:
    function = preprocessing(preset.preprocessing).function
    one = task.dataset.intensity[:1].values
    return int(function(one).shape[1])


def _chosen(task: Task, count: int | None) -> NDArray[np.bool_] | None:
    """Choose some training samples at random, the rare phases' whole, and all for validation."""
    if count is None:
        return None
    training = task.part == Part.training
    whole = np.zeros(len(training), dtype=bool)
    sizes = np.bincount(task.samples.phase[training], minlength=len(task.targets.names))
    for code in np.flatnonzero(sizes < count / 10):
        whole |= training & (task.samples.phase == code)
    rest = np.flatnonzero(training & ~whole)
    share = max(count - int(whole.sum()), 0)
    generator = np.random.default_rng(np.random.SeedSequence([task.seed, 2]))
    whole[generator.permutation(rest)[:share]] = True
    # The best weights are chosen on all validation samples.
    whole |= task.part == Part.validation
    return whole


def _digest_of(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _config(task: Task, preset: Preset, **values: Any) -> dict[str, Any]:
    return {
        "points": task.dataset.sizes["tof"],
        "phases": len(task.targets.names),
        "parameters": len(task.targets.parameters),
        **preset.network,
        **values,
    }


# ---- a stage -----------------------------------------------------------------------------------


def _stage(
    task: Task,
    made: Made,
    name: str,
    network: nn.Module,
    samples: Samples,
    preset: Preset,
    settings: FitSettings,
    objective: Objective | None = None,
    *,
    among: NDArray[np.bool_] | None = None,
    validate: Callable[[nn.Module], Validation] | None = None,
    score: Callable[[Validation], float] = paper_score,
) -> None:
    """Fit a network, show how it goes, log it, and keep its state after every epoch."""
    training, validation = task.part == Part.training, task.part == Part.validation
    if among is not None:
        training, validation = training & among, validation & among
    # With one stage the names are short, as people expect them.
    prefix = f"{name}/" if len(preset.stages) > 1 or name.startswith("regressor_") else ""
    count = int(training.sum())
    if settings.samples_per_epoch is not None:
        most = min(settings.samples_per_epoch, preset.turns * count)
        settings = replace(settings, samples_per_epoch=most)
    count = settings.samples_per_epoch or count
    if settings.balance is not None:
        count = -(-count // settings.batch_size) * settings.batch_size
    total = settings.epochs * count
    history: list[EpochResult] = []
    with Progress(f"Training {name}", total, "profiles") as progress:

        def on_step(step: Step) -> None:
            progress.advance(
                step.samples, f"epoch {step.epoch} of {settings.epochs}, loss {step.loss:.2g}"
            )

        data = TrainingData(task.targets, samples, training, validation)
        execution = Execution(
            device=task.device,
            max_seconds=preset.max_seconds,
            checkpoint=task.checkpoints / f"{name}.safetensors",
            on_step=on_step,
        )
        criteria = Criteria(objective, validate, score)
        for result in fit(
            network, data, settings, seed=task.seed, criteria=criteria, execution=execution
        ):
            history.append(result)
            if not result.restored:
                task.run.log_metrics(
                    {f"{prefix}train": result.training, f"{prefix}validation": result.validation},
                    step=result.epoch,
                )
            if settings.epochs <= 12 or result.epoch % 10 == 0 or result.epoch == settings.epochs:
                say(_told(name, result))
    made.histories[name] = history
    if history[-1].out_of_time:
        say(
            f"The time limit of {duration(preset.max_seconds or 0)} ended the training: another "
            f"run, on a machine with other work, gives other weights. Without limit: "
            f"--max-seconds 0"
        )


def _told(name: str, result: EpochResult) -> str:
    found = ", ".join(
        f"{key} {value:.2%}" if key == "accuracy" else f"{key} {value:.2e}"
        for key, value in result.validation["all"].items()
        if key in ("mse_paper", "accuracy", "mae", "wrong")
    )
    again = ", from the checkpoint" if result.restored else f", {duration(result.seconds)}"
    best = ", best so far" if result.is_best else ""
    return (
        f"{name}, epoch {result.epoch}: loss {result.training['loss']:.3g}, on validation samples "
        f"{found}{again}{best}"
    )


# ---- objectives and scores ---------------------------------------------------------------------


def _classify(network: nn.Module, batch: LabelledBatch, _: torch.Generator) -> dict[str, Tensor]:
    logits, _values = network(batch.profiles)
    with full_precision(batch):
        loss = nn.functional.cross_entropy(logits.float(), batch.phase)
    return {"loss": loss}


def _regress(columns: Tensor) -> Objective:
    def objective(
        network: nn.Module, batch: LabelledBatch, _: torch.Generator
    ) -> dict[str, Tensor]:
        found = network(batch.profiles)
        with full_precision(batch):
            loss = ((found.float() - batch.values[:, columns]) ** 2).mean()
        return {"loss": loss}

    return objective


def _reconstruct(network: nn.Module, batch: LabelledBatch, _: torch.Generator) -> dict[str, Tensor]:
    found = network(batch.profiles)
    with full_precision(batch):
        loss = (found.float() - batch.profiles).abs().mean()
    return {"loss": loss}


def _integer_objective(regression_weight: float) -> Objective:
    """Return the paper's other way: the class as an integer, by the squared error as well."""

    def objective(
        network: nn.Module, batch: LabelledBatch, _: torch.Generator
    ) -> dict[str, Tensor]:
        code, found = network.raw_outputs(batch.profiles)  # type: ignore[operator]
        with full_precision(batch):
            mask = batch.free.float()
            integer = ((code[:, 0].float() - batch.phase) ** 2).mean()
            squared = ((found.float() - batch.values) ** 2 * mask).sum() / mask.sum()
            loss = integer + regression_weight * squared
        return {"loss": loss, "integer": integer, "mse": squared}

    return objective


def _error_rate(task: Task, network: nn.Module, samples: Samples) -> Validation:
    wrong, loss, n = 0, 0.0, 0
    for batch in in_order(samples.profiles, task.part == Part.validation):
        probabilities, _ = outputs(network, batch.profiles, task.device)
        truth = samples.phase[batch.rows]
        wrong += int((probabilities.argmax(axis=1) != truth).sum())
        own = probabilities[np.arange(len(truth)), truth]
        loss -= float(np.log(np.maximum(own, 1e-12)).sum())
        n += len(truth)
    return {"all": {"n": n, "accuracy": 1 - wrong / n, "wrong": wrong, "cross_entropy": loss / n}}


def _wrong(scores: Validation) -> float:
    return scores["all"]["wrong"] + min(scores["all"]["cross_entropy"], 0.99)


def _regression_scores(
    task: Task, samples: Samples, code: int
) -> Callable[[nn.Module], Validation]:
    wanted = (task.part == Part.validation) & (task.samples.phase == code)
    free = task.targets.free[code]

    def validate(network: nn.Module) -> Validation:
        network.eval()
        total: Errors | None = None
        for batch in in_order(samples.profiles, wanted):
            with torch.inference_mode():
                found = network(torch.from_numpy(batch.profiles).to(task.device)).cpu().numpy()
            values = np.zeros((len(found), len(free)))
            values[:, free] = found
            phase = samples.phase[batch.rows]
            cells = task.targets.decode(values, phase)
            some = errors(task.targets, phase, samples.cells[batch.rows], phase, cells)
            total = some if total is None else total + some
        if total is None:
            return {"all": {"n": 0.0, "mse_paper": 0.0}}
        return summary(task.targets, total)

    return validate


def _reconstruction_errors(task: Task, network: nn.Module, samples: Samples) -> Validation:
    network.eval()
    absolute = squared = count = 0.0
    for batch in in_order(samples.profiles, task.part == Part.validation):
        with torch.inference_mode():
            for low in range(0, len(batch.profiles), 256):
                some = torch.from_numpy(batch.profiles[low : low + 256]).to(task.device)
                difference = network(some) - some
                absolute += float(difference.abs().sum())
                squared += float((difference**2).sum())
                count += difference.numel()
    return {"all": {"n": count, "mae": absolute / count, "mse": squared / count}}


def reconstructions(made: Made, profiles: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return prepared profiles (n, points) after an auto-encoder, if the model has one."""
    if not isinstance(made.model, Caenn):
        return None
    coder = made.model.autoencoder.eval()
    device = next(coder.parameters()).device
    with torch.inference_mode():
        return np.asarray(coder(torch.from_numpy(profiles).to(device)).cpu().numpy())
