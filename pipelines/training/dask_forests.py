"""Growing forests on a cluster by Dask-ML's search (a forest a task), or a few trees a task."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from dask_ml.model_selection import GridSearchCV
from distributed import Client, as_completed, get_worker
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.model_selection import KFold

from bragg_models.forest import Forest, ForestSettings, groups_of, grow_group, join
from pipelines.cli.console import Progress, duration
from pipelines.training.prepared_matrix import PreparedMatrix

GrownForest = tuple[Forest, Mapping[str, Any]]
"""A forest, and facts about its growth: plain JSON values."""


@dataclass(frozen=True)
class Search:
    """Candidates of a search, and its cross-validation.

    Attributes
    ----------
    candidates, folds
        Values by the name of a setting of the forest; number of folds.
    trial_trees
        Trees of each forest in a fold: a few rank the candidates, the final forest has all.
    """

    candidates: Mapping[str, tuple[float | int | bool, ...]] = field(
        default_factory=lambda: {"max_features": (1.0,)}
    )
    folds: int = 2
    trial_trees: int = 2


@dataclass(frozen=True)
class Plan:
    """A forest to grow.

    Attributes
    ----------
    name
        Of the phase, or ``integrated``.
    settings, seed
        Of this forest, and of its trees.
    rows, values : shapes (n,), (n, n_outputs)
        Samples that it is grown on, in stored order, and their targets.
    """

    name: str
    settings: ForestSettings
    rows: NDArray[np.intp]
    values: NDArray[np.float32]
    seed: int


@dataclass(frozen=True)
class TreeGroup:
    """A group of trees that a worker grew: how many, how long it took, and where."""

    trees: int
    seconds: float
    worker: str


@dataclass(frozen=True)
class ForestSource:
    """Everything about a :class:`MappedForest` that a search leaves unchanged.

    Attributes
    ----------
    path, samples
        The file of prepared profiles, and the number of samples of the final forest.
    trial_trees
        Trees of a forest in a fold.
    settings, seed, topic
        Of the forest, and of the events that report groups of trees.
    """

    path: Path
    samples: int
    trial_trees: int
    settings: ForestSettings
    seed: int
    topic: str


class MappedForest(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A forest as scikit-learn's and Dask-ML's searches need it, on profiles in a mapped file.

    Its X are row numbers of that file, shape (n, 1), so that a search transfers and folds numbers
    only.

    Parameters
    ----------
    source
        What a search leaves unchanged.
    max_features, min_samples_leaf, max_depth, extra, bootstrap
        Settings that a search may try; None for those of the source.
    """

    def __init__(
        self,
        source: ForestSource,
        max_features: float | None = None,
        min_samples_leaf: int | None = None,
        max_depth: int | None = None,
        extra: bool | None = None,
        bootstrap: bool | None = None,
    ) -> None:
        self.source = source
        self.max_features = max_features
        self.min_samples_leaf = min_samples_leaf
        self.max_depth = max_depth
        self.extra = extra
        self.bootstrap = bootstrap

    def forest_settings(self) -> ForestSettings:
        """Return the settings, with those that the search tries replaced."""
        names = ("max_features", "min_samples_leaf", "max_depth", "extra", "bootstrap")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self.source.settings, **changes)

    def fit(self, X: NDArray[np.intp], y: NDArray[np.float32]) -> MappedForest:
        """Grow the forest on the rows X: with few trees in a fold, with all on all samples."""
        source, settings = self.source, self.forest_settings()
        if len(X) < source.samples:
            settings = replace(settings, trees=min(source.trial_trees, settings.trees))
        profiles = np.load(source.path, mmap_mode="r")[X[:, 0]]
        y = y.reshape(len(y), -1)
        forests, self.groups_ = [], []
        for group in groups_of(settings):
            began = time.monotonic()
            forests.append(grow_group(profiles, y, settings, group, seed=source.seed))
            self.groups_.append(_tree_group(forests[-1], began))
            get_worker().log_event(source.topic, asdict(self.groups_[-1]))
        self.forest_ = join(forests)
        return self

    def predict(self, X: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the forest's predictions for the rows X, shape (n, n_outputs)."""
        return self.forest_.predict(np.load(self.source.path, mmap_mode="r")[X[:, 0]])


def _tree_group(forest: Forest, began: float) -> TreeGroup:
    worker = f"{get_worker().address} (process {os.getpid()})"
    return TreeGroup(forest.trees, time.monotonic() - began, worker)


def grow_by_search(
    client: Client,
    plans: Sequence[Plan],
    search: Search,
    matrix: PreparedMatrix,
    seed: int,
    on_progress: Callable[[int], None] | None,
) -> dict[str, GrownForest]:
    """Choose among candidates for each forest by Dask-ML, and grow the best, all in parallel.

    Parameters
    ----------
    client, plans, search, matrix, seed
        The cluster, the forests, candidates and folds, prepared profiles, the seed of the folds.
    on_progress
        Called in another thread with a number of trees when they are grown, those of the folds
        included.

    Returns
    -------
    By the forest's name.
    """
    candidates = {name: list(values) for name, values in search.candidates.items()}
    topic = f"forest-{uuid.uuid4().hex}"

    def grow(plan: Plan) -> GrownForest:
        source = ForestSource(
            matrix.path, len(plan.rows), search.trial_trees, plan.settings, plan.seed, topic
        )
        searched = GridSearchCV(
            MappedForest(source),
            candidates,
            scoring="neg_mean_squared_error",  # of scaled outputs
            cv=KFold(search.folds, shuffle=True, random_state=seed),
            # A fold that raised would be repeated for ever; so it scores nothing, and if that was
            # not by chance, the final fit raises.
            error_score=np.nan,
            iid=False,
            scheduler=client,
        )
        searched.fit(matrix.rows[plan.name][:, None], plan.values)
        best = searched.best_estimator_
        table = {name: np.asarray(column).tolist() for name, column in searched.cv_results_.items()}
        facts = _facts(plan, best.forest_, best.forest_settings(), best.groups_)
        return best.forest_, {**facts, "search": table}

    fits = int(np.prod([len(values) for values in candidates.values()])) * search.folds
    total = sum(
        plan.settings.trees + fits * min(search.trial_trees, plan.settings.trees) for plan in plans
    )
    # The largest first, so that it is not the last to start.
    ordered = sorted(plans, key=lambda plan: plan.values.size * plan.settings.trees, reverse=True)
    with Progress("Growing trees", total, "trees") as progress:

        def on_event(event: tuple[float, Mapping[str, Any]]) -> None:
            _advance(progress, on_progress, TreeGroup(**event[1]))

        client.subscribe_topic(topic, on_event)
        try:
            with ThreadPoolExecutor(len(plans)) as pool:
                names = (plan.name for plan in ordered)
                return dict(zip(names, pool.map(grow, ordered), strict=True))
        finally:
            client.unsubscribe_topic(topic)


def _advance(
    progress: Progress, on_progress: Callable[[int], None] | None, group: TreeGroup
) -> None:
    progress.advance(group.trees, f"{duration(group.seconds / group.trees)} per tree")
    if on_progress is not None:
        on_progress(group.trees)


def grow_joined(
    client: Client,
    plans: Sequence[Plan],
    matrix: PreparedMatrix,
    on_progress: Callable[[int], None] | None,
) -> dict[str, GrownForest]:
    """Grow a few trees per task and join them in a fixed order.

    Parameters
    ----------
    client, plans, matrix
        The cluster, the forests, and prepared profiles.
    on_progress
        Called with a number of trees when they are grown.

    Returns
    -------
    By the forest's name.
    """
    path = matrix.path
    parts: dict[str, dict[int, tuple[Forest, TreeGroup]]] = {plan.name: {} for plan in plans}
    labels = {plan.name: path.with_name(f"{path.stem}-{k}.npz") for k, plan in enumerate(plans)}
    total = sum(plan.settings.trees for plan in plans)
    try:
        for plan in plans:  # in files, which outlive any worker
            np.savez(labels[plan.name], rows=matrix.rows[plan.name], values=plan.values)
        with Progress("Growing trees", total, "trees") as progress:
            futures = {}
            for plan in plans:
                for group in groups_of(plan.settings):
                    task = path, labels[plan.name], plan.settings, group, plan.seed
                    future = client.submit(_grow_group, *task, pure=False)
                    futures[future] = plan.name, group
            for future in as_completed(list(futures)):
                name, group = futures.pop(future)
                parts[name][group] = future.result()
                future.release()
                _advance(progress, on_progress, parts[name][group][1])
    finally:
        for label in labels.values():
            label.unlink(missing_ok=True)
    forests: dict[str, GrownForest] = {}
    for plan in plans:
        of_plan = [parts[plan.name].pop(group) for group in groups_of(plan.settings)]
        forest = join([part for part, _ in of_plan])
        groups = [group for _, group in of_plan]
        forests[plan.name] = forest, _facts(plan, forest, plan.settings, groups)
    return forests


def _grow_group(
    path: Path, labels: Path, settings: ForestSettings, group: int, seed: int
) -> tuple[Forest, TreeGroup]:
    """On a worker: grow a group of trees on a part of the mapped profiles."""
    began = time.monotonic()
    with np.load(labels) as file:
        rows, values = file["rows"], file["values"]
    profiles = np.load(path, mmap_mode="r")[rows]
    forest = grow_group(profiles, values, settings, group, seed=seed)
    return forest, _tree_group(forest, began)


def _facts(
    plan: Plan, forest: Forest, settings: ForestSettings, groups: Sequence[TreeGroup]
) -> Mapping[str, Any]:
    workers: Counter[str] = Counter()
    for group in groups:
        workers[group.worker] += group.trees
    return {
        "settings": asdict(settings),
        "samples": len(plan.rows),
        "trees": forest.trees,
        "nodes": len(forest.feature),
        "bytes": forest.nbytes,
        "seconds_per_tree": sum(group.seconds for group in groups) / forest.trees,
        "trees_by_worker": dict(workers),
    }
