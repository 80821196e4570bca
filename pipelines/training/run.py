"""One training from a data set to a registered model: reading, fitting, testing, logging."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import xarray as xr

from bragg_data.arrays import Integers8
from bragg_data.campaign import Samples as Labels
from bragg_data.growth import ATTRIBUTE, drawn_content_hash
from bragg_data.splits import Part
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.data.batches import joined, profiles_of
from bragg_models.forest import ForestModel
from bragg_models.predictors import Predictor
from bragg_models.targets import targets_of
from bragg_models.training.inference import Samples, choose_device
from catalog import registry
from catalog.experiment_view import configure_experiment
from catalog.gate import BaselineComparison
from catalog.tracking import Run
from pipelines.cli.console import say
from pipelines.cluster.client import open_cluster
from pipelines.evaluation.names import CLASS_CONDITIONAL, MEASURED
from pipelines.evaluation.scoring import SPLIT, part_of
from pipelines.registry import registration
from pipelines.snapshots.verification import verify_snapshot
from pipelines.training import recipes
from pipelines.training.extra_data import StoredSamples, extra_samples, loss_weights
from pipelines.training.forests import ForestTask, grow
from pipelines.training.held_out import register_proposal_network, test_model
from pipelines.training.names import FORESTS, TrainError
from pipelines.training.presets import ForestPreset, Preset
from pipelines.training.stage import FittedModel, TrainingContext
from pipelines.training.task import TrainingEnvironment, TrainingTask, save_task


def train_model(
    dataset: xr.Dataset,
    environment: TrainingEnvironment,
    task: TrainingTask,
    *,
    promotion: registration.PromotionPolicy = "if better",
    resume: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> tuple[registry.ModelVersion, bool]:
    """Train, score on held-out samples, log to MLflow and register.

    The settings are among the environment's presets; ``resume`` is the run to continue; ``notes``
    are JSON values that the model's provenance records among its facts. Returned are the
    registered version, and whether it is the champion now. Raises `TrainError` if the task is not
    possible, or the data set has too few samples.
    """
    task.check()
    verify_snapshot(dataset)
    presets = environment.presets
    presets.check(task.model, task.preset)
    name = campaign_of(dataset).name
    labels, split = samples_of(dataset), {"name": task.split, **SPLIT}
    part = part_of(task.split, labels, split)
    parent = None
    if task.parent is not None:
        task, parent = _parent(dataset, environment, task)
    used = Part.training, Part.validation, Part.test
    if not all((part == p).any() for p in used):
        raise TrainError(
            f"Data set {dataset.attrs['tag']} has {len(part)} samples, too few to train, "
            f"validate and test on. Simulate more: python -m pipelines.simulate --limit 2000"
        )
    if task.model in MEASURED:
        split["test_draws"] = presets.test_draws  # so its test set has a name of its own
    if task.model in CLASS_CONDITIONAL and task.classifier is None:
        classifier = _find_classifier(dataset, environment, task, split)
        task = replace(task, classifier=classifier)
    settings: ForestPreset | Preset = (
        presets.forests[task.preset]
        if task.model in FORESTS
        else presets.network(task.model, task.preset, task.epochs, task.max_seconds)
    )
    if parent is not None:  # its features are those that its weights were trained on
        settings = replace(settings, preprocessing=parent.preprocessing)
        _check_architecture(task, settings, parent)
    provenance = registration.provenance_of(dataset, asdict(task), split, asdict(settings))
    data = f"simulated measurements of the campaign of {dataset.attrs['tag']}"
    if task.model not in MEASURED:
        n_training, n_validation, n_test = (int((part == p).sum()) for p in used)
        data = (
            f"{dataset.attrs['tag']}, {task.split} split: {n_training:,} samples for training, "
            f"{n_validation:,} for validation, {n_test:,} for testing"
        )
    say(f"Training [bold]{task.model}[/] (preset {task.preset}) on {data}")
    of_split = "" if task.split == "random" else f" {task.split}"
    tracking = environment.tracking
    title = f"{task.model} {task.preset}{of_split} s{task.seed}"  # short, or the UI cuts it
    opened = (
        tracking.run(name, title, registration.run_tags(provenance), watch=True)
        if resume is None
        else tracking.resumed(resume)
    )
    with opened as run_:
        say(f"Run {run_.id} in {tracking.uri}")
        if resume is None:
            configure_experiment(tracking, run_.experiment_id)
            run_.log_parameters(
                {
                    **asdict(task),
                    "settings": provenance.preset_values,
                    "split": provenance.split.to_json(),
                    "threads": torch.get_num_threads(),
                    "cores": os.cpu_count() or 0,
                }
            )
        state = environment.run_state(run_.id)
        save_task(state, task, dataset)
        context = _context(dataset, labels, part, environment, task, run_)
        if parent is not None:  # outputs keep their scale, so that the weights keep their meaning
            context = replace(context, parent=parent, targets=parent.targets)
        run_.log_dataset(dataset, "training")
        began = time.monotonic()
        fitted = _fit(context, settings)
        run_.log_metrics({"fit_seconds": time.monotonic() - began})
        predictor = Predictor(
            fitted.kind,
            fitted.model,
            context.targets,
            fitted.preprocessing,
            dataset.sizes["tof"],
            replace(provenance, facts={**fitted.facts, **(notes or {})}),
            fitted.classifier,
        )
        predictor = test_model(context, predictor, fitted)
        version = registration.register(run_, predictor)
        if fitted.kind == "guided":
            register_proposal_network(context, predictor)
    shutil.rmtree(state, ignore_errors=True)
    # A model of another split is trained for a comparison, not to be used.
    if task.split != "random" and promotion != "force":
        return version, False
    comparison = BaselineComparison.from_provenance(predictor.provenance)
    promoted = registration.promote_if_better(tracking, version, comparison, promotion)
    return version, promoted


def _parent(
    dataset: xr.Dataset, environment: TrainingEnvironment, task: TrainingTask
) -> tuple[TrainingTask, Predictor]:
    """Return the task with the address of the model that it continues from, and that model."""
    campaign, uri = campaign_of(dataset), str(task.parent)
    if uri.isdecimal():
        uri = f"models:/{registry.registered_name(campaign.name, task.model)}/{uri}"
    version = registry.find(environment.tracking, uri)
    parent = registration.load_version(environment.tracking.uri, version)
    provenance, targets = parent.provenance, parent.targets
    if provenance.model != task.model:
        raise TrainError(
            f"{task.model} cannot continue from {uri}, which is a {provenance.model}: train that, "
            f"or name a version of {task.model}."
        )
    lattices = tuple(phase.lattice for phase in campaign.phases)
    expected = tuple(phase.name for phase in campaign.phases), lattices, campaign.grid
    if (targets.names, targets.lattices, parent.campaign.grid) != expected:
        raise TrainError(
            f"{uri} has other phases or another time-of-flight grid than {dataset.attrs['tag']}: "
            f"its weights are of no use there. Train without --continue-from."
        )
    data, attrs = provenance.data, dataset.attrs
    known = drawn_content_hash(data.content_hash, data.growth), provenance.split.name
    held_out = drawn_content_hash(attrs["content_hash"], attrs.get(ATTRIBUTE, "")), task.split
    if known != held_out and task.model not in MEASURED:
        raise TrainError(
            f"{uri} was trained on {data.tag} with the {provenance.split.name} split: it knows "
            f"samples that would test it on {attrs['tag']} with the {task.split} split. Continue "
            f"with that split on that data set, or on one that it has grown to."
        )
    return replace(task, parent=version.uri, classifier=provenance.classifier_uri), parent


def _check_architecture(
    task: TrainingTask, settings: ForestPreset | Preset, parent: Predictor
) -> None:
    """Raise a `TrainError` if a preset has other layers than the model that is continued."""
    layers = asdict(settings).get("network")
    of_parent = parent.provenance.preset_values.get("network", layers)
    if json.dumps(layers, sort_keys=True) != json.dumps(of_parent, sort_keys=True):
        raise TrainError(
            f"{task.parent} has other layers than preset {task.preset} of {task.model}: name the "
            f"preset that it was trained with."
        )


def _context(
    dataset: xr.Dataset,
    labels: Labels,
    part: Integers8,
    environment: TrainingEnvironment,
    task: TrainingTask,
    run_: Run,
) -> TrainingContext:
    targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
    sets = [StoredSamples(dataset, labels, part, str(dataset.attrs["content_hash"]))]
    sets += [
        extra_samples(sets[0], tag, blocked=task.split == "blocked") for tag in task.extra_data
    ]
    for extra, share in zip_longest(sets[1:], task.extra_shares):
        of_loss = f", {share:.3g} of the loss" if share else ""
        run_.log_dataset(extra.dataset, f"training, extra data{of_loss}")
    phase = np.concatenate([of_set.labels.phase for of_set in sets])
    part = np.concatenate([of_set.part for of_set in sets])
    samples = Samples(
        joined([profiles_of(of_set.dataset, lambda values: values) for of_set in sets]),
        phase,
        np.concatenate([of_set.labels.cells for of_set in sets]),
    )
    if task.extra_shares:
        number = np.repeat(np.arange(len(sets)), [len(of_set.part) for of_set in sets])
        shares = 1 - sum(task.extra_shares), *task.extra_shares
        samples = replace(samples, weight=loss_weights(phase, number, part, shares))
    return TrainingContext(
        dataset,
        samples,
        targets,
        part,
        tuple(of_set.content for of_set in sets),
        choose_device(task.device),
        task,
        environment,
        run_,
    )


def _fit(context: TrainingContext, settings: ForestPreset | Preset) -> FittedModel:
    task, environment, classifier = context.task, context.environment, None
    if task.classifier is not None:
        version = registry.find(environment.tracking, task.classifier)
        classifier = registration.load_version(environment.tracking.uri, version)
    if isinstance(settings, ForestPreset):
        # One forest for each phase, or, without a classifier, an integrated one.
        kind = "integrated-forest" if classifier is None else "forest"
        part = context.part[: context.dataset.sizes["sample"]]
        data = context.dataset, context.targets, part
        forests = ForestTask(*data, settings, classifier is None, task.seed)
        directory = environment.state.absolute() / "forests"
        with open_cluster(environment.cluster) as client:
            grown, facts = grow(client, forests, directory)
        model = ForestModel(grown, forests.integrated)
        return FittedModel(kind, model, settings.preprocessing, classifier, facts=dict(facts))
    if classifier is not None:
        deep = task.model == "deep"
        return recipes.train_conditional(context, settings, classifier, version.uri, deep=deep)
    if task.model == "caenn":
        return recipes.train_caenn(context, settings)
    if task.model == "guided":
        return recipes.train_guided(context, settings)
    if task.model in MEASURED:
        return recipes.train_robust(context, settings)
    return recipes.train_multitask(context, settings, classifier=task.model == "classifier")


def _find_classifier(
    dataset: xr.Dataset,
    environment: TrainingEnvironment,
    task: TrainingTask,
    split: Mapping[str, Any],
) -> str:
    """Return the newest classifier of the same split of the same data, trained if there is none."""
    name = registry.registered_name(campaign_of(dataset).name, "classifier")
    same_test_set = registration.test_set(dataset, split)
    for version in registry.versions(environment.tracking, name):
        if version.tags.get("test_set") == same_test_set:
            say(f"The classifier {version.uri} decides the phase")
            return version.uri
    say(f"{task.model} needs a classifier that decides the phase, and there is none yet.")
    classifier = replace(task, model="classifier", extra_data=(), epochs=None, max_seconds=None)
    return train_model(dataset, environment, classifier)[0].uri
