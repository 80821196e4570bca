"""One training from a data set to a registered model: reading, fitting, testing, logging."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from bragg_data.campaign import Samples as Labels
from bragg_data.model_provenance import ModelProvenance
from bragg_data.splits import Part, extra_data_split
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.data.batches import joined, profiles_of
from bragg_models.predictors import Predictor
from bragg_models.targets import targets_of
from bragg_models.training.devices import choose_device
from bragg_models.training.inference import Samples
from catalog import registry
from catalog.experiment_view import configure_experiment
from catalog.promotion import BaselineComparison
from catalog.tracking import Run, Tracking
from pipelines.cli.console import say
from pipelines.cluster.client import open_client
from pipelines.cluster.options import SlurmOptions
from pipelines.evaluation.scoring import SPLIT, part_of
from pipelines.registry.registration import (
    load_version,
    promote_if_better,
    provenance_of,
    register,
    run_tags,
    test_set,
)
from pipelines.simulation.draws import TEST_DRAWS
from pipelines.training import recipes
from pipelines.training.forests import FOREST_PRESETS, How
from pipelines.training.held_out import (
    CONDITIONAL,
    drawn_test,
    register_glance,
    stored_test,
    tested,
)
from pipelines.training.presets import FORESTS, TrainError, preset_of
from pipelines.training.recipes import Made, Task

STATE = Path("data/training")
"""Where the commands keep checkpoints and cached profiles."""


@dataclass(frozen=True)
class Order:
    """What is asked for, in plain values: what a resumed training begins from again.

    Attributes
    ----------
    model, preset, seed, device
        See the command's help.
    split
        ``random`` or ``blocked``.
    beside
        Tags of data sets whose samples are learnt from, too.
    epochs, max_seconds
        Instead of the preset's.
    how
        How forests are grown.
    classifier
        Address of the version that the class-conditional models build on.
    """

    model: str = "multitask"
    preset: str = "quick"
    seed: int = 0
    device: str = "auto"
    split: str = "random"
    beside: tuple[str, ...] = ()
    epochs: int | None = None
    max_seconds: float | None = None
    how: How = "search"
    classifier: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a training reads, keeps its state, and computes.

    Attributes
    ----------
    tracking
        Runs and models.
    state
        Directory of checkpoints and cached profiles; it can be deleted when nothing runs.
    cache
        Whether prepared profiles are kept there.
    cluster, slurm, workers
        Where forests are grown; see :func:`pipelines.cluster.client.open_client`.
    """

    tracking: Tracking
    state: Path = STATE
    cache: bool = True
    cluster: str = "local"
    slurm: SlurmOptions | None = None
    workers: int | None = None

    def client(self) -> AbstractContextManager[Client]:
        """Open a client of the cluster."""
        return open_client(self.cluster, workers=self.workers, slurm=self.slurm)


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
        Address of the champion, None if there is none.
    fit_seconds
        Time that the fit took, reading included.
    """

    version: registry.ModelVersion
    run_id: str
    scores: Mapping[str, Mapping[str, float]]
    is_champion: bool
    champion: str | None
    fit_seconds: float


def train_model(
    dataset: xr.Dataset,
    place: Place,
    order: Order,
    *,
    promote: bool = False,
    resume: str | None = None,
) -> Trained:
    """Train, score on the test samples, log to MLflow and register.

    Parameters
    ----------
    dataset
        An opened snapshot.
    place, order
        Where, and what.
    promote
        Make it the champion even if the present one did better.
    resume
        The run to go on with.

    Raises
    ------
    TrainError
        If there are too few samples.
    """
    name = campaign_of(dataset).name
    labels, split = samples_of(dataset), {"name": order.split, **SPLIT}
    part = part_of(order.split, labels, split)
    if not all((part == p).any() for p in Part):
        raise TrainError(
            f"Data set {dataset.attrs['tag']} has {len(part)} samples, too few to train, "
            f"validate and test on. Simulate more: python -m pipelines.simulate --limit 2000"
        )
    on_draws = order.model == "robust"
    if on_draws:
        split["test_draws"] = TEST_DRAWS  # so its test set has a name of its own
    if order.model in CONDITIONAL and order.classifier is None:
        order = replace(order, classifier=_classifier(dataset, place, order, split))
    settings = _settings(order)
    provenance = provenance_of(dataset, asdict(order), split, settings)
    say(
        f"Training [bold]{order.model}[/] (preset {order.preset}) on "
        + (
            f"draws of measured-looking profiles of the campaign of {dataset.attrs['tag']}"
            if on_draws
            else f"{dataset.attrs['tag']}, "
            f"{order.split} split: {(part == Part.training).sum():,} samples to learn from, "
            f"{(part == Part.validation).sum():,} to choose the best weights on, "
            f"{(part == Part.test).sum():,} to test"
        )
    )
    with _run(place, name, order, provenance, resume) as run_:
        state = place.state / "runs" / run_.id
        _keep(state, order, dataset)
        task = _task(dataset, labels, part, place, order, run_, state)
        run_.log_dataset(dataset, "training")
        began = time.monotonic()
        made = _made(task, order, place)
        fit_seconds = time.monotonic() - began
        predictor = Predictor(
            made.kind, made.model, task.targets, made.preprocessing, dataset.sizes["tof"],
            replace(provenance, facts=made.facts), made.classifier,
        )  # fmt: skip
        test = (
            drawn_test(task, TEST_DRAWS)
            if on_draws
            else stored_test(task, labels, part, order.split)
        )
        predictor = tested(task, predictor, made, test, fit_seconds)
        version = register(run_, predictor)
        if made.kind == "guided":
            register_glance(run_, predictor, test)
    shutil.rmtree(state, ignore_errors=True)
    scores = predictor.provenance.test or {}
    # What is trained to be compared on other samples is not to answer unasked.
    if order.split != "random" and not promote:
        return Trained(version, run_.id, scores, False, version.uri, fit_seconds)
    comparison = BaselineComparison.from_provenance(predictor.provenance)
    decision = promote_if_better(place.tracking, version, comparison, forced=promote)
    return Trained(version, run_.id, scores, decision.promoted, decision.champion_uri, fit_seconds)


@contextlib.contextmanager
def _run(
    place: Place, name: str, order: Order, provenance: ModelProvenance, resume: str | None
) -> Iterator[Run]:
    if resume is not None:
        with place.tracking.resumed(resume) as run_:
            yield run_
        return
    split = "" if order.split == "random" else f" {order.split}"
    title = f"{order.model} {order.preset}{split} s{order.seed}"  # short, or the UI cuts it
    with place.tracking.run(name, title, run_tags(provenance), watch=True) as run_:
        configure_experiment(place.tracking, run_.experiment_id)
        run_.log_parameters(
            {**asdict(order), "settings": provenance.preset_values,
             "split": provenance.split.to_json(), "threads": torch.get_num_threads(),
             "cores": os.cpu_count() or 0}
        )  # fmt: skip
        yield run_


def _settings(order: Order) -> dict[str, Any]:
    if order.model in FORESTS:
        return asdict(FOREST_PRESETS[order.preset])
    return asdict(preset_of(order.preset, order.epochs, order.max_seconds, model=order.model))


def _keep(state: Path, order: Order, dataset: xr.Dataset) -> None:
    """Write down what a resumed training has to know."""
    state.mkdir(parents=True, exist_ok=True)
    known = {"order": asdict(order), "store": dataset.attrs["uri"], "tag": dataset.attrs["tag"]}
    (state / "order.json").write_text(json.dumps(known), encoding="utf-8")


def _task(
    dataset: xr.Dataset,
    labels: Labels,
    part: NDArray[np.int8],
    place: Place,
    order: Order,
    run_: Run,
    state: Path,
) -> Task:
    targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
    parts, phases, cells = [profiles_of(dataset, _as_they_are)], [labels.phase], [labels.cells]
    contents = [str(dataset.attrs["content_hash"])]
    of = [part]
    for tag in order.beside:
        other = Store(dataset.attrs["uri"]).open(tag)
        own = samples_of(other)
        if [p.name for p in campaign_of(other).phases] != list(targets.names) or not np.array_equal(
            other.tof, dataset.tof
        ):
            raise TrainError(
                f"{tag} has other phases or another time-of-flight grid than "
                f"{dataset.attrs['tag']}: it cannot be learnt from beside it."
            )
        parts.append(profiles_of(other, _as_they_are))
        phases.append(own.phase)
        cells.append(own.cells)
        contents.append(str(other.attrs["content_hash"]))
        of.append(
            extra_data_split(
                labels.crystal_system, labels.cells, part, own.crystal_system, own.cells
            )
            if order.split == "blocked"
            else np.full(len(own.phase), Part.training, dtype=np.int8)
        )
        run_.log_dataset(other, "training, beside")
    samples = Samples(joined(parts), np.concatenate(phases), np.concatenate(cells))
    return Task(
        dataset, samples, targets, np.concatenate(of), order.seed, choose_device(order.device),
        place.state / "cache" if place.cache else None, tuple(contents), state, run_,
    )  # fmt: skip


def _as_they_are(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values


def _made(task: Task, order: Order, place: Place) -> Made:
    classifier = None
    if order.classifier is not None:
        version = registry.find(place.tracking, order.classifier)
        classifier = load_version(place.tracking.uri, version)
    if order.model in FORESTS:
        directory = place.state / "forests"
        directory.mkdir(parents=True, exist_ok=True)
        return recipes.make_forests(
            task, order.preset, classifier, place.client, order.how, directory.absolute()
        )
    preset = preset_of(order.preset, order.epochs, order.max_seconds, model=order.model)
    if classifier is not None:
        return recipes.make_conditional(
            task, preset, classifier, version.uri, deep=order.model == "deep"
        )
    if order.model == "caenn":
        return recipes.make_caenn(task, preset)
    if order.model == "guided":
        return recipes.make_guided(task, preset)
    if order.model == "robust":
        return recipes.make_robust(task, preset, place.client)
    return recipes.make_multitask(task, preset, classifier=order.model == "classifier")


def _classifier(dataset: xr.Dataset, place: Place, order: Order, split: Mapping[str, Any]) -> str:
    """Return the newest classifier of the same split of the same data, trained if there is none."""
    name = registry.registered_name(campaign_of(dataset).name, "classifier")
    wanted = test_set(dataset, split)
    for version in registry.versions(place.tracking, name):
        if version.tags.get("test_set") == wanted:
            say(f"The phases are told by the classifier {version.uri}")
            return version.uri
    say(f"{order.model} needs a classifier that tells the phases, and there is none yet.")
    own = replace(order, model="classifier", beside=(), epochs=None, max_seconds=None)
    return train_model(dataset, place, own).version.uri


def kept_order(place: Place, run_id: str) -> tuple[Order, xr.Dataset]:
    """Return what an interrupted run was asked for, and its data set.

    Raises
    ------
    TrainError
        If nothing is known about it here.
    """
    path = place.state / "runs" / run_id / "order.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        order: dict[str, Any] = known["order"]
        order["beside"] = tuple(order["beside"])
        return Order(**order), Store(known["store"]).open(known["tag"])
    except FileNotFoundError as error:
        unfinished = sorted(p.name for p in (place.state / "runs").glob("*"))
        which = f"Unfinished runs: {', '.join(unfinished)}." if unfinished else "There is none."
        raise TrainError(
            f"Run '{run_id}' has no checkpoint in {place.state}. {which} Where it was trained in "
            f"another directory, name that with --state."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise TrainError(f"{path} is damaged ({error}): train the model anew.") from error
