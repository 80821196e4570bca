"""Growing the forests of a campaign on a Dask cluster: a forest a task.

The workers map a file of prepared profiles into memory, so that they exist once per machine.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from dask_ml.model_selection import GridSearchCV
from distributed import Client, as_completed, get_worker
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.model_selection import KFold

from bragg_data.arrays import Array, Floats32, Indices, Integers8
from bragg_data.crystallography.cell import CrystalSystem
from bragg_data.preprocessing import preprocessing
from bragg_data.splits import TRAINED
from bragg_data.store.repository import open_snapshot
from bragg_data.store.schema import samples_of
from bragg_models.data.batches import Profiles, profiles_of
from bragg_models.forest import Forest, ForestSettings, forest_values, groups_of, grow_group, join
from bragg_models.targets import Targets
from pipelines.cli.console import Progress, duration
from pipelines.training.names import TrainError
from pipelines.training.presets import ForestPreset, Search

_CHUNKS_PER_TASK = 8  # of profiles to prepare

# A forest, and facts about its growth: plain JSON values.
_GrownForest = tuple[Forest, Mapping[str, Any]]
# A .npy file of prepared profiles, shape (n, n_features), and the rows of each forest in it.
_Matrix = tuple[Path, Mapping[str, Indices]]


@dataclass(frozen=True)
class Plan:
    """A forest to grow."""

    name: str  # of the phase, or "integrated"
    settings: ForestSettings
    rows: Indices  # samples that it is grown on, in stored order, shape (n,)
    values: Floats32  # their targets, shape (n, n_outputs)
    seed: int  # of the trees


@dataclass(frozen=True)
class ForestTask:
    """The forests to grow.

    They are grown on a seeded random choice of the training and validation samples, since nothing
    is chosen on the latter; the test samples are not used.
    """

    dataset: xr.Dataset  # a snapshot, which the workers open themselves, by its address
    targets: Targets
    part: Integers8  # the Part of each sample, shape (n,)
    preset: ForestPreset
    integrated: bool  # one forest for all phases, instead of one per phase
    seed: int  # of the choice of samples, the folds and the trees


def grow(
    client: Client, task: ForestTask, directory: Path
) -> tuple[tuple[Forest, ...], Mapping[str, Any]]:
    """Grow the forests of a campaign on the workers of a cluster.

    Dask-ML's GridSearchCV chooses among the preset's candidates by cross-validation and grows the
    best on all samples. The number of workers and the distribution of the work make no difference:
    each group of trees has a stream of random numbers of its own. Raises `TrainError` if a phase
    has too few training samples.

    ``directory`` is for the prepared profiles, shared by this machine and the workers. Returned are
    the forests, one per phase in the order of the codes, or the integrated one alone; and JSON
    values for the log, by the forest's name.
    """
    plans, preset, dataset = plans_of(task), task.preset, task.dataset
    began = time.monotonic()
    groups = {plan.name: plan.rows for plan in plans}
    with _prepared_matrix(client, dataset, groups, preset.preprocessing, directory) as matrix:
        prepared = time.monotonic()
        grown = _grow_by_search(client, plans, preset.search, matrix, task.seed)
        size = matrix[0].stat().st_size
    facts = {
        "matrix_bytes": size,
        "prepare_seconds": prepared - began,
        "grow_seconds": time.monotonic() - prepared,
        **{plan.name: grown[plan.name][1] for plan in plans},
    }
    return tuple(grown[plan.name][0] for plan in plans), facts


def plans_of(task: ForestTask) -> list[Plan]:
    """Return the forests that :func:`grow` is going to grow, with the samples of each.

    Raises `TrainError` if a phase has too few training samples.
    """
    labels, targets, preset = samples_of(task.dataset), task.targets, task.preset
    usable = np.isin(task.part, TRAINED)
    groups = [("integrated", preset.integrated, usable)]
    if not task.integrated:
        systems = [CrystalSystem(code).name for code in targets.crystal_systems]
        groups = [
            (name, preset.by_system.get(system, preset.other), usable & (labels.phase == code))
            for code, (name, system) in enumerate(zip(targets.names, systems, strict=True))
        ]
    plans, least = [], 2 * preset.search.folds
    for number, (name, settings, selected) in enumerate(groups):
        stream = np.random.SeedSequence([task.seed, number, int(task.integrated)])
        rows = np.flatnonzero(selected)
        if len(rows) < least:
            raise TrainError(
                f"There are {len(rows)} samples to grow the forest '{name}' on; at least {least} "
                f"are needed. Simulate more of them."
            )
        rows = np.sort(np.random.default_rng(stream).permutation(rows)[: settings.samples])
        values = forest_values(
            targets, labels.phase[rows], labels.cells[rows], integrated=task.integrated
        )
        plans.append(Plan(name, settings, rows, values, int(stream.generate_state(1)[0])))
    return plans


@contextmanager
def _prepared_matrix(
    client: Client,
    dataset: xr.Dataset,
    groups: Mapping[str, Indices],
    prepared_by: str,
    directory: Path,
) -> Iterator[_Matrix]:
    """Write the prepared profiles of (overlapping) groups of samples to a temporary file."""
    samples = np.unique(np.concatenate(list(groups.values())))
    profiles = profiles_of(dataset, preprocessing(prepared_by).function)
    features = profiles.prepare(dataset["intensity"][samples[:1]].values).shape[1]
    source = (str(dataset.attrs["tag"]), str(dataset.attrs["uri"]), prepared_by)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / f"profiles-{uuid.uuid4().hex}.npy"
    size = profiles.rows_per_chunk * _CHUNKS_PER_TASK
    try:
        np.lib.format.open_memmap(path, "w+", np.float32, (len(samples), features)).flush()
        with Progress("Preparing profiles", len(samples), "profiles") as progress:
            futures = []
            for low in range(0, int(samples[-1]) + 1, size):  # samples that share chunks
                first, last = np.searchsorted(samples, (low, low + size)).tolist()
                if last > first:
                    task = source, path, first, samples[first:last]
                    futures.append(client.submit(_write_rows, *task, pure=False))
            for future in as_completed(futures):
                progress.advance(future.result())
        yield path, {name: np.searchsorted(samples, group) for name, group in groups.items()}
    finally:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _profiles(tag: str, uri: str, prepared_by: str) -> Profiles:
    return profiles_of(open_snapshot(tag, uri), preprocessing(prepared_by).function)


def _write_rows(source: tuple[str, str, str], path: Path, first: int, samples: Indices) -> int:
    """On a worker: prepare the profiles of samples, and write them from a row of the file on."""
    profiles = _profiles(*source)
    selected = np.zeros(len(profiles), dtype=bool)
    selected[samples] = True
    with path.open("r+b") as file:
        for chunk in profiles.chunks_with(selected):
            values, numbers = profiles.read(int(chunk), selected)
            row = first + int(np.searchsorted(samples, numbers[0]))
            file.seek(np.load(path, mmap_mode="r").offset + row * values[0].nbytes)
            file.write(values.data)
    return len(samples)


@dataclass(eq=False, repr=False)
class MappedForest(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A forest as scikit-learn's and Dask-ML's searches need it, on profiles in a mapped file.

    Its X are row numbers of that file, shape (n, 1), so that a search transfers and folds numbers
    only. The settings that a search may try are None for those of ``settings``.
    """

    path: Path  # file of prepared profiles
    n_rows: int  # of the final forest
    trial_trees: int  # of a forest in a fold
    settings: ForestSettings
    seed: int
    topic: str  # of the events that report groups of trees
    max_features: float | None = None
    min_samples_leaf: int | None = None

    def forest_settings(self) -> ForestSettings:
        """Return the settings, with those that the search tries replaced."""
        values: Mapping[str, Any] = {
            f.name: value
            for f in fields(ForestSettings)
            if (value := getattr(self, f.name, None)) is not None
        }
        return replace(self.settings, **values)

    def fit(self, X: Indices, y: Floats32) -> MappedForest:
        """Grow the forest on the rows X: with few trees in a fold, with all on all samples."""
        settings = self.forest_settings()
        if len(X) < self.n_rows:
            settings = replace(settings, trees=min(self.trial_trees, settings.trees))
        profiles = np.load(self.path, mmap_mode="r")[X[:, 0]]
        y = y.reshape(len(y), -1)
        forests, self.groups_ = [], []
        for group in groups_of(settings):
            began = time.monotonic()
            forests.append(grow_group(profiles, y, settings, group, seed=self.seed))
            worker = get_worker()
            where = f"{worker.address} (process {os.getpid()})"
            trees, seconds = forests[-1].trees, time.monotonic() - began
            self.groups_.append({"trees": trees, "seconds": seconds, "worker": where})
            worker.log_event(self.topic, self.groups_[-1])
        self.forest_ = join(forests)
        return self

    def predict(self, X: Indices) -> Array:
        """Return the forest's predictions for the rows X, shape (n, n_outputs)."""
        return self.forest_.predict(np.load(self.path, mmap_mode="r")[X[:, 0]])


def _grow_by_search(
    client: Client, plans: Sequence[Plan], search: Search, matrix: _Matrix, seed: int
) -> dict[str, _GrownForest]:
    """Choose among candidates for each forest by Dask-ML, and grow the best, all in parallel."""
    candidates = {name: list(values) for name, values in search.candidates.items()}
    topic = f"forest-{uuid.uuid4().hex}"
    path, rows = matrix

    def grow(plan: Plan) -> _GrownForest:
        sizes = len(plan.rows), search.trial_trees
        searched = GridSearchCV(
            MappedForest(path, *sizes, plan.settings, plan.seed, topic),
            candidates,
            scoring="neg_mean_squared_error",  # of scaled outputs
            cv=KFold(search.folds, shuffle=True, random_state=seed),
            # A fold that raised would be repeated for ever; so it scores nothing, and if that was
            # not by chance, the final fit raises.
            error_score=np.nan,
            iid=False,
            scheduler=client,
        )
        searched.fit(rows[plan.name][:, None], plan.values)
        best = searched.best_estimator_
        table = {name: np.asarray(column).tolist() for name, column in searched.cv_results_.items()}
        forest, workers = best.forest_, Counter[str]()
        for group in best.groups_:
            workers[group["worker"]] += group["trees"]
        return forest, {
            "settings": asdict(best.forest_settings()),
            "samples": len(plan.rows),
            "trees": forest.trees,
            "nodes": len(forest.feature),
            "bytes": forest.nbytes,
            "seconds_per_tree": sum(group["seconds"] for group in best.groups_) / forest.trees,
            "trees_by_worker": dict(workers),
            "search": table,
        }

    fits = int(np.prod([len(values) for values in candidates.values()])) * search.folds
    total = sum(
        plan.settings.trees + fits * min(search.trial_trees, plan.settings.trees) for plan in plans
    )
    # The largest first, so that it is not the last to start.
    ordered = sorted(plans, key=lambda plan: plan.values.size * plan.settings.trees, reverse=True)
    with Progress("Growing trees", total, "trees") as progress:

        def on_event(event: tuple[float, Mapping[str, Any]]) -> None:
            trees, seconds = event[1]["trees"], event[1]["seconds"]
            progress.advance(trees, f"{duration(seconds / trees)} per tree")

        client.subscribe_topic(topic, on_event)
        try:
            with ThreadPoolExecutor(len(plans)) as pool:
                names = (plan.name for plan in ordered)
                return dict(zip(names, pool.map(grow, ordered), strict=True))
        finally:
            client.unsubscribe_topic(topic)
