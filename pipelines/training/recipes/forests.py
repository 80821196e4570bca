"""The training of random forests, class-conditional or integrated."""

from __future__ import annotations

from pathlib import Path

from bragg_models.forest import ForestModel
from bragg_models.predictors import Predictor
from pipelines.cluster.client import open_cluster
from pipelines.training.forests import ForestPreset, ForestTask, grow
from pipelines.training.stage import FittedModel, TrainingContext
from pipelines.training.task import TrainingEnvironment


def train_forests(
    context: TrainingContext,
    environment: TrainingEnvironment,
    preset: ForestPreset,
    method: str,
    classifier: Predictor | None,
) -> FittedModel:
    """Grow one forest for each phase, or, without a classifier, an integrated one.

    Parameters
    ----------
    context, environment
        The data, and the cluster.
    preset, method
        Settings of the forests, and how the work is divided.
    classifier
        Decides the phase for the class-conditional forests.
    """
    n = context.dataset.sizes["sample"]
    directory: Path = environment.state / "forests"
    directory.mkdir(parents=True, exist_ok=True)
    integrated = classifier is None
    task = ForestTask(
        context.dataset, context.targets, context.part[:n], preset, integrated, context.seed
    )
    with open_cluster(environment.cluster) as client:
        forests, facts = grow(client, task, directory.absolute(), method=method)
    kind = "integrated-forest" if integrated else "forest"
    model = ForestModel(forests, integrated)
    return FittedModel(kind, model, preset.preprocessing, classifier, facts=dict(facts))
