"""The training of the networks, the paper's and this project's, and the losses of the former."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from bragg_data.arrays import AnyFloats, Floats32, Integers8
from bragg_data.preprocessing import preprocessing
from bragg_data.splits import Part
from bragg_data.store.schema import campaign_of
from bragg_models.data.batches import Profiles, in_order, joined
from bragg_models.metrics import Errors, errors, summary
from bragg_models.networks.calibration import calibrate
from bragg_models.networks.guided import Guided, fill_physics_tables, guided_config
from bragg_models.networks.paper import Caenn, Conditional, Encoding, Multitask
from bragg_models.networks.robust import Robust, single_thread
from bragg_models.predictors import Predictor, build
from bragg_models.training.inference import Samples, outputs
from bragg_models.training.settings import (
    Criteria,
    LabelledBatch,
    Validation,
    cross_entropies,
    full_precision,
)
from pipelines.cli.console import Progress, say
from pipelines.cluster.client import open_cluster
from pipelines.simulation.draws import Purpose, SimulatedMeasurements, draw_on_cluster
from pipelines.training import stage
from pipelines.training.expectation import undecided_pairs
from pipelines.training.presets import Preset
from pipelines.training.stage import FittedModel, Stage, TrainingContext

_BATCH = 256  # profiles that an auto-encoder validates at a time
_ROWS = 512  # rows of a chunk of profiles in memory
_SMALLEST_PROBABILITY = 1e-12
_FIRST_DRAWS = 200  # from which undecided phases are reported, before calibration and training


def train_multitask(
    context: TrainingContext, preset: Preset, *, classifier: bool = False
) -> FittedModel:
    """Train the multitask network, or only its classifier (sections IV-A and IV-C1)."""
    parameters = 0 if classifier else len(context.targets.parameters)
    config = _config(context, preset, parameters=parameters)
    network = _started(context, "multitask", config)
    fitted = FittedModel("multitask", network, preset.preprocessing)
    ((name, settings),) = preset.stages.items()
    samples = stage.prepared_samples(context, preset.preprocessing)
    criteria = Criteria()
    if classifier:
        validate = partial(_classification_scores, context, samples)
        criteria = Criteria(_classification, validate, _misclassified)
    elif preset.network.get("integer"):
        criteria = Criteria(partial(_integer_class, settings.regression_weight))
    stage.fit_stage(context, fitted, preset, Stage(name, network, samples, settings, criteria))
    return fitted


def train_conditional(
    context: TrainingContext, preset: Preset, classifier: Predictor, uri: str, *, deep: bool
) -> FittedModel:
    """Train a regressor for each phase on a classifier's features (sections IV-B2 and IV-B3).

    The deep regressors start from the classifier's weights and train all of them. Otherwise the
    features are frozen: they are read from the view ``classifier_256`` if this classifier, by its
    address in the registry, materialised it, and computed otherwise, with the same result to the
    last bit. Raises `TypeError` if the classifier is not a multitask network.
    """
    source = classifier.model
    if not isinstance(source, Multitask):
        raise TypeError(f"A {type(source).__name__} has no features to build on.")
    free = [np.flatnonzero(row).tolist() for row in context.targets.free]
    config = {
        "classifier": asdict(source.config),
        "free": free,
        "parameters": len(context.targets.parameters),
        "separate_features": deep,
        **preset.network,
    }
    network = cast("Conditional", _started(context, "conditional", config))
    if context.parent is None:
        network.classifier.load_state_dict(source.state_dict())
        for features in network.features:
            features.load_state_dict(source.features.state_dict())
    fitted = FittedModel("conditional", network, classifier.preprocessing)
    samples = stage.prepared_samples(context, classifier.preprocessing)
    ((_, settings),) = preset.stages.items()
    if not deep:
        samples = stage.samples_from_view(context, "classifier_256", uri) or stage.encoded_samples(
            context, samples, source.features, "features"
        )
    for code, name in enumerate(context.targets.names):
        of_phase = context.samples.phase == code
        if not len(free[code]) or not (of_phase & (context.part == Part.training)).any():
            continue
        criteria = Criteria(
            partial(_regression, torch.tensor(free[code], device=context.device)),
            partial(_regression_scores, context, samples, code),
        )
        regressor = network.regressor(code)
        of_code = Stage(f"regressor_{name}", regressor, samples, settings, criteria, of_phase)
        stage.fit_stage(context, fitted, preset, of_code)
    return fitted


def train_caenn(context: TrainingContext, preset: Preset) -> FittedModel:
    """Train the auto-encoder, then the dense regressor on its codes (section IV-C3)."""
    profile = context.dataset.intensity[:1].values
    points = preprocessing(preset.preprocessing).function(profile).shape[1]
    config = _config(context, preset, points=points)
    network = cast("Caenn", _started(context, "caenn", config))
    fitted = FittedModel("caenn", network, preset.preprocessing)
    samples = stage.prepared_samples(context, preset.preprocessing)
    subset = stage.choose_samples(context, preset.training_samples)
    settings = preset.stages["autoencoder"]
    validate = partial(_reconstruction_scores, context, samples)
    criteria = Criteria(_reconstruction, validate, lambda scores: scores["all"]["mae"])
    autoencoder = Stage("autoencoder", network.autoencoder, samples, settings, criteria, subset)
    stage.fit_stage(context, fitted, preset, autoencoder)
    codes = stage.encoded_samples(context, samples, Encoding(network.autoencoder), "latent")
    settings = preset.stages["regressor"]
    criteria = Criteria(partial(_integer_class, settings.regression_weight))
    regressor = Stage("regressor", network.regressor, codes, settings, criteria, subset)
    stage.fit_stage(context, fitted, preset, regressor)
    return fitted


def reconstructed_profiles(fitted: FittedModel, profiles: Floats32) -> Floats32:
    """Return prepared profiles (n, points) after the auto-encoder of a CAENN."""
    autoencoder = cast("Caenn", fitted.model).autoencoder.eval()
    device = next(autoencoder.parameters()).device
    with torch.inference_mode():
        return np.asarray(autoencoder(torch.from_numpy(profiles).to(device)).cpu().numpy())


def train_guided(context: TrainingContext, preset: Preset) -> FittedModel:
    """Train the proposal network of the guided network; its physics needs no training."""
    fitted = _untrained(context, preset, "guided")
    _fit_proposal(context, fitted, preset, stage.prepared_samples(context, preset.preprocessing))
    return fitted


def _started(context: TrainingContext, kind: str, config: Mapping[str, Any]) -> nn.Module:
    """Return the parent's network, to be trained on, or one with seeded initial weights."""
    if context.parent is not None:
        return copy.deepcopy(cast("nn.Module", context.parent.model))
    return build(kind, config, seed=context.task.seed)


def _untrained(context: TrainingContext, preset: Preset, kind: str, **config: bool) -> FittedModel:
    """Return a network with the physics of the campaign and the weights to start from."""
    campaign, parent = campaign_of(context.dataset), context.parent
    changes = {**config, **preset.network}
    proposal = cast("Guided | Robust", parent.model).proposal if parent else None
    if proposal is not None:
        changes["proposal"] = asdict(proposal.config)
    values = guided_config(campaign, context.targets, **changes)
    network = build(kind, values, seed=context.task.seed)
    if proposal is not None:
        network.proposal.load_state_dict(proposal.state_dict())  # type: ignore[union-attr]
    fill_physics_tables(network, campaign, context.targets)
    return FittedModel(kind, network.to(context.device), preset.preprocessing)


def _fit_proposal(
    context: TrainingContext, fitted: FittedModel, preset: Preset, samples: Samples
) -> None:
    ((name, settings),) = preset.stages.items()
    proposal: nn.Module = fitted.model.proposal  # type: ignore[union-attr,assignment]
    stage.fit_stage(context, fitted, preset, Stage(name, proposal, samples, settings))


def train_robust(context: TrainingContext, preset: Preset) -> FittedModel:
    """Train the network for measured profiles on simulated measurements, and calibrate it.

    Training (domain randomisation), calibration on instruments that were calibrated, and on
    instruments whose calibration has drifted, have streams of random numbers of their own; the
    cluster draws the profiles. A search without a proposal network is calibrated alone.
    """
    fitted = _untrained(context, preset, "robust", sample_parameters=True)
    campaign, seed = campaign_of(context.dataset), context.task.seed
    count = preset.calibration_draws
    with open_cluster(context.environment.cluster) as client:
        if preset.stages:
            drawn = preset.training_draws, Purpose.TRAINING, seed
            training = draw_on_cluster(client, campaign, *drawn)
        calibration = draw_on_cluster(client, campaign, count, Purpose.CALIBRATION, seed)
        drifted = draw_on_cluster(client, campaign, count, Purpose.DRIFTED_CALIBRATION, seed)
    function = preprocessing(preset.preprocessing).function
    if preset.stages:
        samples, part = _samples_in_memory([training, calibration], function)
        with single_thread():
            _fit_proposal(replace(context, samples=samples, part=part), fitted, preset, samples)
    network = cast("Robust", fitted.model)
    if network.proposal is None and len(campaign.phases) > 1:
        _report_undecided(context, network, calibration, function)
    facts = _calibrate(context, network, [calibration, drifted], function)
    fitted.facts = {
        **facts,
        "draws": [preset.training_draws, preset.calibration_draws],
        "measurement_effects": campaign.measurement_effects.to_json(),
    }
    say(
        f"Calibrated: accuracy {facts['accuracy']:.2%} on the calibration draws, cross entropy "
        f"{facts['cross_entropy']:.3f}"
    )
    return fitted


def _report_undecided(
    context: TrainingContext,
    network: Robust,
    draws: SimulatedMeasurements,
    function: Callable[[Any], AnyFloats],
) -> None:
    """Print the pairs of phases that some profiles do not tell apart, from a few of the draws.

    The network keeps the head that is fitted to them. With the first one 5 % of the profiles of
    four phases of BaTiO₃ would be right only in the end, and not calibrated on: nearly cubic ones
    of large errors. Intervals of trigonal cells covered 87.5 % then, and 89.3 % now.
    """
    every = -(-len(draws.phase) // _FIRST_DRAWS)
    rows = slice(None, None, every)
    profiles, phase = draws.profiles[rows].astype(np.float32), draws.phase[rows]
    stretch, limit = network.stretch, network.limit
    fits = network.eval().fit_profiles(np.asarray(function(profiles), dtype=np.float32))
    values, _ = context.targets.encode(phase, draws.cells[rows])
    calibrate(network, fits, phase, values, context.targets.free, np.ones(len(phase), dtype=bool))
    with torch.inference_mode():
        probabilities = network.phase_logits(fits.proposal, fits.misfit).softmax(dim=1)
    network.stretch, network.limit = stretch, limit
    pairs = undecided_pairs(context.targets.names, probabilities.cpu().numpy(), phase)
    for pair, share in pairs.items():
        say(f"{pair}: about {share:.0%} of their profiles decide between the two.")


def _calibrate(
    context: TrainingContext,
    network: Robust,
    draws: Sequence[SimulatedMeasurements],
    function: Callable[[Any], AnyFloats],
) -> dict[str, float]:
    """Calibrate a network on draws of calibrated instruments, and of drifted ones."""
    network.eval()
    profiles = np.concatenate([part.profiles for part in draws]).astype(np.float32)
    prepared = np.asarray(function(profiles), dtype=np.float32)
    size = len(prepared)
    with Progress("Calibrating", size, "profiles") as progress:
        fits = network.fit_profiles(prepared, progress.advance)
    phase = np.concatenate([part.phase for part in draws])
    values, _ = context.targets.encode(phase, np.concatenate([part.cells for part in draws]))
    calibrated = np.arange(size) < len(draws[0].profiles)
    return calibrate(network, fits, phase, values, context.targets.free, calibrated)


def _samples_in_memory(
    draws: Sequence[SimulatedMeasurements], function: Callable[[Any], AnyFloats]
) -> tuple[Samples, Integers8]:
    """Return draws for training and draws for validation as samples, and their parts.

    Profiles stay in half precision and are prepared where they are used. Each task of a cluster
    drew all phases, so chunks of a few tasks are mixtures of them.
    """

    def prepare(values: AnyFloats) -> Floats32:
        return np.asarray(function(values.astype(np.float32)), dtype=np.float32)

    part = np.repeat([Part.training, Part.validation], [len(d.phase) for d in draws])
    intensities = (xr.DataArray(d.profiles, dims=("sample", "tof")) for d in draws)
    profiles = joined([Profiles(intensity, _ROWS, prepare) for intensity in intensities])
    phase = np.concatenate([d.phase for d in draws]).astype(np.int8)
    return Samples(profiles, phase, np.concatenate([d.cells for d in draws])), part.astype(np.int8)


def _config(context: TrainingContext, preset: Preset, **values: int) -> Mapping[str, Any]:
    """Return the configuration of a network: sizes of the data, the preset's and further values."""
    return {
        "points": context.dataset.sizes["tof"],
        "phases": len(context.targets.names),
        "parameters": len(context.targets.parameters),
        **preset.network,
        **values,
    }


def _classification(
    network: nn.Module, batch: LabelledBatch, _: torch.Generator
) -> dict[str, Tensor]:
    """Return the cross entropy of the phases (section IV-A of the paper)."""
    logits, _values = network(batch.profiles)
    with full_precision(batch):
        loss = batch.mean(cross_entropies(logits, batch))
    return {"loss": loss}


def _regression(
    columns: Tensor, network: nn.Module, batch: LabelledBatch, _: torch.Generator
) -> dict[str, Tensor]:
    """Return the mean squared error of the free parameters' columns (section IV-B)."""
    values = network(batch.profiles)
    with full_precision(batch):
        loss = batch.mean((values.float() - batch.values[:, columns]) ** 2)
    return {"loss": loss}


def _reconstruction(
    network: nn.Module, batch: LabelledBatch, _: torch.Generator
) -> dict[str, Tensor]:
    """Return the mean absolute error of reconstructed profiles (section IV-C3)."""
    profiles = network(batch.profiles)
    with full_precision(batch):
        loss = batch.mean((profiles.float() - batch.profiles).abs())
    return {"loss": loss}


def _integer_class(
    regression_weight: float, network: nn.Module, batch: LabelledBatch, _: torch.Generator
) -> dict[str, Tensor]:
    """Return the paper's alternative loss: the class as an integer, by its squared error too."""
    code, values = network.raw_outputs(batch.profiles)  # type: ignore[operator]
    with full_precision(batch):
        integer = batch.mean((code[:, 0].float() - batch.phase) ** 2)
        squared = batch.squared_error(values)
        loss = integer + regression_weight * squared
    return {"loss": loss, "integer": integer, "mse": squared}


def _classification_scores(
    context: TrainingContext, samples: Samples, network: nn.Module
) -> Validation:
    wrong, loss, n = 0, 0.0, 0
    for batch in in_order(samples.profiles, context.part == Part.validation):
        probabilities, _ = outputs(network, batch.profiles, context.device)
        truth = samples.phase[batch.rows]
        wrong += int((probabilities.argmax(axis=1) != truth).sum())
        of_truth = probabilities[np.arange(len(truth)), truth]
        loss -= float(np.log(np.maximum(of_truth, _SMALLEST_PROBABILITY)).sum())
        n += len(truth)
    return {"all": {"n": n, "accuracy": 1 - wrong / n, "wrong": wrong, "cross_entropy": loss / n}}


def _misclassified(scores: Validation) -> float:
    """Return the number of misclassified samples; of equal numbers the cross entropy decides."""
    return scores["all"]["wrong"] + min(scores["all"]["cross_entropy"], 0.99)


def _regression_scores(
    context: TrainingContext, samples: Samples, code: int, network: nn.Module
) -> Validation:
    validation = (context.part == Part.validation) & (context.samples.phase == code)
    targets = context.targets
    free = targets.free[code]
    network.eval()
    total: Errors | None = None
    for batch in in_order(samples.profiles, validation):
        with torch.inference_mode():
            output = network(torch.from_numpy(batch.profiles).to(context.device)).cpu().numpy()
        values = np.zeros((len(output), len(free)))
        values[:, free] = output
        phase = samples.phase[batch.rows]
        cells = targets.decode(values, phase)
        of_batch = errors(targets, phase, samples.cells[batch.rows], phase, cells)
        total = of_batch if total is None else total + of_batch
    return {"all": {"n": 0.0, "mse_paper": 0.0}} if total is None else summary(targets, total)


def _reconstruction_scores(
    context: TrainingContext, samples: Samples, network: nn.Module
) -> Validation:
    network.eval()
    absolute = squared = count = 0.0
    for batch in in_order(samples.profiles, context.part == Part.validation):
        for part in np.split(batch.profiles, range(_BATCH, len(batch.profiles), _BATCH)):
            profiles = torch.from_numpy(part).to(context.device)
            with torch.inference_mode():
                difference = network(profiles) - profiles
                absolute += float(difference.abs().sum())
                squared += float((difference**2).sum())
                count += difference.numel()
    return {"all": {"n": count, "mae": absolute / count, "mse": squared / count}}
