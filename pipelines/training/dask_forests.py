"""Growing forests on a cluster: prepared profiles in a mapped file, two ways to share the work.

``search`` is Dask-ML's cross-validated search, a forest a task; ``joined`` is a few trees a task.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from dask_ml.model_selection import GridSearchCV
from distributed import Client, as_completed, get_worker
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.model_selection import KFold

from bragg_data.preprocessing import preprocessing
from bragg_data.store.repository import open_snapshot
from bragg_models.data.batches import Profiles, profiles_of
from bragg_models.forest import Forest, join
from bragg_models.forest_training import ForestSettings, groups_of, grow_group
from pipelines.cli.console import Progress, duration

_CHUNKS_PER_TASK = 8


@dataclass(frozen=True)
class Search:
    """What a search chooses among, and how.

    Attributes
    ----------
    candidates
        Values by the name of a setting of the forest.
    folds
        Of the cross-validation.
    trial_trees
        Trees of each forest in a fold: a few rank the candidates, the forest that is kept is grown
        with all.
    """

    candidates: Mapping[str, tuple[Any, ...]] = field(
        default_factory=lambda: {"max_features": (1.0,)}
    )
    folds: int = 2
    trial_trees: int = 2


@dataclass(frozen=True)
class Plan:
    """One forest to grow.

    Attributes
    ----------
    name
        The phase's, or ``integrated``.
    settings
        Of this forest.
    rows : shape (n,)
        Samples to grow it on, in stored order.
    values : shape (n, n_outputs)
        What it is to learn about them.
    seed
        Of its trees.
    """

    name: str
    settings: ForestSettings
    rows: NDArray[np.intp]
    values: NDArray[np.float32]
    seed: int


@dataclass(frozen=True)
class Grown:
    """A forest, and plain facts about its growing."""

    forest: Forest
    facts: dict[str, Any]


# ---- prepared profiles in a file that all workers map ------------------------------------------


@contextmanager
def prepared_matrix(
    client: Client, dataset: xr.Dataset, plans: Sequence[Plan], prepared_by: str, directory: Path
) -> Iterator[tuple[Path, dict[str, NDArray[np.intp]]]]:
    """Write the prepared profiles of all plans; yield the file, and the rows of each plan in it.

    The workers read and prepare them, each to its own place in the file. Taken as a context, at
    whose end the file is removed.

    Parameters
    ----------
    client
        Of the cluster.
    dataset
        An opened snapshot; the workers open it themselves, by its address.
    plans
        Whose samples are wanted.
    prepared_by
        Name and version of the preprocessing.
    directory
        Which this machine and the workers see.

    Yields
    ------
    path
        A .npy file of shape (n, n_features), single precision.
    rows
        By the forest's name, which rows of the file are its samples.
    """
    rows = np.unique(np.concatenate([plan.rows for plan in plans]))
    profiles = profiles_of(dataset, preprocessing(prepared_by).function)
    features = profiles.prepare(dataset["intensity"][rows[:1]].values).shape[1]
    source = (str(dataset.attrs["tag"]), str(dataset.attrs["uri"]), prepared_by)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / f"profiles-{uuid.uuid4().hex}.npy"
    try:
        np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), features)).flush()
        with Progress("Preparing profiles", len(rows), "profiles") as progress:
            futures = []
            size = profiles.rows_per_chunk * _CHUNKS_PER_TASK
            for low in range(0, len(profiles), size):
                first, last = np.searchsorted(rows, (low, low + size)).tolist()
                if last > first:
                    futures.append(
                        client.submit(
                            _write_rows, source, path, first, rows[first:last], pure=False
                        )
                    )
            for future in as_completed(futures):
                progress.advance(future.result())
        yield path, {plan.name: np.searchsorted(rows, plan.rows) for plan in plans}
    finally:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _profiles(tag: str, uri: str, prepared_by: str) -> Profiles:
    return profiles_of(open_snapshot(tag, uri), preprocessing(prepared_by).function)


def _write_rows(
    source: tuple[str, str, str], path: Path, first: int, rows: NDArray[np.intp]
) -> int:
    """On a worker: prepare some samples' profiles and write them into the file from a row on."""
    profiles = _profiles(*source)
    wanted = np.zeros(len(profiles), dtype=bool)
    wanted[rows] = True
    with path.open("r+b") as file:
        for chunk in profiles.chunks_with(wanted):
            values, of_chunk = profiles.read(int(chunk), wanted)
            place = first + int(np.searchsorted(rows, of_chunk[0]))
            file.seek(np.load(path, mmap_mode="r").offset + place * values[0].nbytes)
            file.write(values.data)
    return len(rows)


# ---- Dask-ML ------------------------------------------------------------------------------------


class MappedForest(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A forest as scikit-learn's and Dask-ML's searches want it, on profiles in a mapped file.

    What it is given as X are row numbers of that file, shape (n, 1), so that a search hands over
    and folds numbers only.
    """

    def __init__(
        self,
        path: Path,
        samples: int,
        trial_trees: int,
        settings: ForestSettings,
        seed: int,
        topic: str,
        max_features: float | None = None,
        min_samples_leaf: int | None = None,
        max_depth: int | None = None,
        extra: bool | None = None,
        bootstrap: bool | None = None,
    ) -> None:
        self.path = path
        self.samples = samples
        self.trial_trees = trial_trees
        self.settings = settings
        self.seed = seed
        self.topic = topic
        self.max_features = max_features
        self.min_samples_leaf = min_samples_leaf
        self.max_depth = max_depth
        self.extra = extra
        self.bootstrap = bootstrap

    def chosen(self) -> ForestSettings:
        """Return the settings, with those replaced that the search is trying."""
        names = ("max_features", "min_samples_leaf", "max_depth", "extra", "bootstrap")
        tried = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self.settings, **tried)

    def fit(self, X: NDArray[np.intp], y: NDArray[np.float32]) -> MappedForest:
        """Grow the forest on the rows X: with few trees in a fold, with all on all samples."""
        settings = self.chosen()
        if len(X) < self.samples:
            settings = replace(settings, trees=min(self.trial_trees, settings.trees))
        profiles = np.load(self.path, mmap_mode="r")[X[:, 0]]
        y = y.reshape(len(y), -1)
        forests, self.built_ = [], []
        for group in groups_of(settings):
            began = time.monotonic()
            forests.append(grow_group(profiles, y, settings, group, seed=self.seed))
            built = _built(forests[-1], began)
            self.built_.append(built)
            get_worker().log_event(self.topic, built)
        self.forest_ = join(forests)
        return self

    def predict(self, X: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the forest's answers for the rows X, shape (n, n_outputs)."""
        return self.forest_.predict(np.load(self.path, mmap_mode="r")[X[:, 0]])


def _built(forest: Forest, began: float) -> dict[str, Any]:
    return {
        "trees": forest.trees,
        "seconds": time.monotonic() - began,
        "worker": get_worker().address,
        "pid": os.getpid(),
    }


def grow_by_search(
    client: Client,
    plans: Sequence[Plan],
    how: Search,
    path: Path,
    rows: Mapping[str, NDArray[np.intp]],
    seed: int,
    on_progress: Callable[[int], None] | None,
) -> dict[str, Grown]:
    """Let Dask-ML choose among candidates for each forest and grow the best, all side by side.

    Parameters
    ----------
    client
        Of the cluster.
    plans
        The forests.
    how
        What is chosen among.
    path, rows
        As :func:`prepared_matrix` gives them.
    seed
        Of the folds.
    on_progress
        Called in another thread with a number of trees when they are grown, those of the folds
        included.

    Returns
    -------
    By the forest's name.
    """
    candidates = {name: list(values) for name, values in how.candidates.items()}
    trials = int(np.prod([len(values) for values in candidates.values()])) * how.folds
    topic = f"forest-{uuid.uuid4().hex}"

    def search(plan: Plan) -> Grown:
        forest = MappedForest(
            path, len(plan.rows), how.trial_trees, plan.settings, plan.seed, topic
        )
        searched = GridSearchCV(
            forest,
            candidates,
            scoring="neg_mean_squared_error",  # of scaled outputs
            cv=KFold(how.folds, shuffle=True, random_state=seed),
            # A fold that raised would be tried again for ever; so it scores nothing, and if it was
            # not by chance, the last fit raises.
            error_score=np.nan,
            iid=False,
            scheduler=client,
        )
        searched.fit(rows[plan.name][:, None], plan.values)
        best = searched.best_estimator_
        facts = _facts(plan, best.forest_, best.chosen(), best.built_)
        facts["search"] = {
            name: [_plain(value) for value in column]
            for name, column in searched.cv_results_.items()
        }
        return Grown(best.forest_, facts)

    # The largest first, so that it is not the last to begin.
    ordered = sorted(plans, key=lambda plan: plan.values.size * plan.settings.trees, reverse=True)
    few = [min(how.trial_trees, plan.settings.trees) for plan in plans]
    total = sum(plan.settings.trees for plan in plans) + trials * sum(few)
    with Progress("Growing trees", total, "trees") as progress:

        def told(event: tuple[float, dict[str, Any]]) -> None:
            _advance(progress, on_progress, event[1])

        client.subscribe_topic(topic, told)
        try:
            with ThreadPoolExecutor(len(plans)) as pool:
                found = dict(zip((p.name for p in ordered), pool.map(search, ordered), strict=True))
        finally:
            client.unsubscribe_topic(topic)
    return found


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _advance(
    progress: Progress, on_progress: Callable[[int], None] | None, built: Mapping[str, Any]
) -> None:
    progress.advance(built["trees"], f"{duration(built['seconds'] / built['trees'])} per tree")
    if on_progress is not None:
        on_progress(built["trees"])


# ---- a few trees per task ----------------------------------------------------------------------


def grow_joined(
    client: Client,
    plans: Sequence[Plan],
    path: Path,
    rows: Mapping[str, NDArray[np.intp]],
    on_progress: Callable[[int], None] | None,
) -> dict[str, Grown]:
    """Grow a few trees per task and join them in a fixed order.

    Parameters
    ----------
    client
        Of the cluster.
    plans
        The forests.
    path, rows
        As :func:`prepared_matrix` gives them.
    on_progress
        Called with a number of trees when they are grown.

    Returns
    -------
    By the forest's name.
    """
    parts: dict[str, dict[int, tuple[Forest, dict[str, Any]]]] = {p.name: {} for p in plans}
    labels = {plan.name: path.with_name(f"{path.stem}-{k}.npz") for k, plan in enumerate(plans)}
    total = sum(plan.settings.trees for plan in plans)
    try:
        for plan in plans:  # in files, which outlive any worker
            np.savez(labels[plan.name], rows=rows[plan.name], values=plan.values)
        with Progress("Growing trees", total, "trees") as progress:
            futures = {
                client.submit(
                    _grow_group, path, labels[plan.name], plan.settings, group, plan.seed,
                    pure=False,
                ): (plan.name, group)
                for plan in plans
                for group in groups_of(plan.settings)
            }  # fmt: skip
            running = as_completed(list(futures))
            for future in running:
                name, group = futures.pop(future)
                parts[name][group] = future.result()
                future.release()
                _advance(progress, on_progress, parts[name][group][1])
    finally:
        for label in labels.values():
            label.unlink(missing_ok=True)
    found = {}
    for plan in plans:
        of_plan = [parts[plan.name].pop(group) for group in groups_of(plan.settings)]
        forest = join([part for part, _ in of_plan])
        built = [built for _, built in of_plan]
        found[plan.name] = Grown(forest, _facts(plan, forest, plan.settings, built))
    return found


def _grow_group(
    path: Path, labels: Path, settings: ForestSettings, group: int, seed: int
) -> tuple[Forest, dict[str, Any]]:
    """On a worker: grow a group of trees on a share of the mapped profiles."""
    began = time.monotonic()
    with np.load(labels) as file:
        rows, values = file["rows"], file["values"]
    profiles = np.load(path, mmap_mode="r")[rows]
    forest = grow_group(profiles, values, settings, group, seed=seed)
    return forest, _built(forest, began)


def _facts(
    plan: Plan, forest: Forest, settings: ForestSettings, built: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    workers: Counter[str] = Counter()
    for group in built:
        workers[f"{group['worker']} (process {group['pid']})"] += group["trees"]
    return {
        "settings": asdict(settings),
        "samples": len(plan.rows),
        "trees": forest.trees,
        "nodes": len(forest.feature),
        "bytes": forest.nbytes,
        "seconds_per_tree": sum(group["seconds"] for group in built) / forest.trees,
        "trees_by_worker": dict(workers),
    }
