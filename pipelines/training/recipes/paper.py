"""The training of the paper's networks: multitask, class-conditional, CAENN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bragg_data.splits import Part
from bragg_models.networks.build import build
from bragg_models.networks.paper import Caenn, Conditional, Encoding, Multitask
from bragg_models.predictors import Predictor
from bragg_models.training.settings import Criteria
from pipelines.training.presets import Preset
from pipelines.training.recipes import objectives
from pipelines.training.stage import (
    FittedModel,
    Stage,
    TrainingContext,
    choose_samples,
    encoded_samples,
    fit_stage,
    prepared_points,
    prepared_samples,
    samples_from_view,
)


def train_multitask(
    context: TrainingContext, preset: Preset, *, classifier: bool = False
) -> FittedModel:
    """Train the multitask network, or only its classifier (sections IV-A and IV-C1)."""
    parameters = 0 if classifier else len(context.targets.parameters)
    config = _config(context, preset, parameters=parameters)
    network = build("multitask", config, seed=context.seed)
    fitted = FittedModel("multitask", network, preset.preprocessing)
    ((name, settings),) = preset.stages.items()
    samples = prepared_samples(context, preset.preprocessing)
    if classifier:
        criteria = Criteria(
            objectives.classification,
            objectives.classification_scores(context, samples),
            objectives.misclassified,
        )
    elif preset.network.get("integer"):
        criteria = Criteria(objectives.integer_class(settings.regression_weight))
    else:
        criteria = Criteria()
    fit_stage(context, fitted, preset, Stage(name, network, samples, settings, criteria))
    return fitted


def train_conditional(
    context: TrainingContext, preset: Preset, classifier: Predictor, uri: str, *, deep: bool
) -> FittedModel:
    """Train a regressor for each phase on a classifier's features (sections IV-B2 and IV-B3).

    The deep regressors start from the classifier's weights and train all of them. Otherwise the
    features are frozen: they are read from the view ``classifier_256`` if this classifier
    materialised it, and computed otherwise, with the same result to the last bit.

    Parameters
    ----------
    context, preset
        The data, and the settings.
    classifier, uri
        The classifier, and its address in the registry.
    deep
        Train the features too.

    Raises
    ------
    TypeError
        If the classifier is not a multitask network.
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
    network = build("conditional", config, seed=context.seed)
    if not isinstance(network, Conditional):
        raise TypeError(f"Expected a class-conditional network, found {type(network).__name__}.")
    network.classifier.load_state_dict(source.state_dict())
    for features in network.features:
        features.load_state_dict(source.features.state_dict())
    fitted = FittedModel("conditional", network, classifier.preprocessing)
    samples = prepared_samples(context, classifier.preprocessing)
    ((_, settings),) = preset.stages.items()
    if not deep:
        samples = samples_from_view(context, "classifier_256", uri) or encoded_samples(
            context, samples, source.features, "features"
        )
    for code, name in enumerate(context.targets.names):
        of_phase = context.samples.phase == code
        if not len(free[code]) or not (of_phase & (context.part == Part.training)).any():
            continue
        criteria = Criteria(
            objectives.regression(torch.tensor(free[code], device=context.device)),
            objectives.regression_scores(context, samples, code),
        )
        regressor = network.regressor(code)
        stage = Stage(f"regressor_{name}", regressor, samples, settings, criteria, of_phase)
        fit_stage(context, fitted, preset, stage)
    return fitted


def train_caenn(context: TrainingContext, preset: Preset) -> FittedModel:
    """Train the auto-encoder, then the dense regressor on its codes (section IV-C3)."""
    points = prepared_points(context, preset.preprocessing)
    network = build("caenn", _config(context, preset, points=points), seed=context.seed)
    if not isinstance(network, Caenn):
        raise TypeError(f"Expected a CAENN, found {type(network).__name__}.")
    fitted = FittedModel("caenn", network, preset.preprocessing)
    samples = prepared_samples(context, preset.preprocessing)
    subset = choose_samples(context, preset.training_samples)
    settings = preset.stages["autoencoder"]
    criteria = Criteria(
        objectives.reconstruction,
        objectives.reconstruction_scores(context, samples),
        objectives.mean_absolute_error,
    )
    autoencoder = Stage("autoencoder", network.autoencoder, samples, settings, criteria, subset)
    fit_stage(context, fitted, preset, autoencoder)
    codes = encoded_samples(context, samples, Encoding(network.autoencoder), "latent")
    settings = preset.stages["regressor"]
    criteria = Criteria(objectives.integer_class(settings.regression_weight))
    regressor = Stage("regressor", network.regressor, codes, settings, criteria, subset)
    fit_stage(context, fitted, preset, regressor)
    return fitted


def reconstructed_profiles(
    fitted: FittedModel, profiles: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """Return prepared profiles (n, points) after the auto-encoder; None if there is none."""
    if not isinstance(fitted.model, Caenn):
        return None
    autoencoder = fitted.model.autoencoder.eval()
    device = next(autoencoder.parameters()).device
    with torch.inference_mode():
        return np.asarray(autoencoder(torch.from_numpy(profiles).to(device)).cpu().numpy())


def _config(context: TrainingContext, preset: Preset, **values: int) -> Mapping[str, Any]:
    """Return the configuration of a network: sizes of the data, the preset's and further values."""
    return {
        "points": context.dataset.sizes["tof"],
        "phases": len(context.targets.names),
        "parameters": len(context.targets.parameters),
        **preset.network,
        **values,
    }
