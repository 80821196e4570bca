"""Growing the random forests of a campaign on a Dask cluster: presets, and the samples of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CrystalSystem
from bragg_data.splits import Part
from bragg_data.store.schema import samples_of
from bragg_models.forest import Forest, ForestSettings, forest_values
from bragg_models.targets import Targets
from pipelines.training.dask_forests import Plan, Search, grow_by_search, grow_joined
from pipelines.training.prepared_matrix import prepared_matrix


class ForestsError(RuntimeError):
    """Forests that cannot be grown."""


@dataclass(frozen=True)
class ForestPreset:
    """How the forests of a campaign are grown.

    Attributes
    ----------
    description, preprocessing
        One line; name and version of the function that prepares the profiles.
    by_system
        Class-conditional: settings by the name of the crystal system.
    other, integrated
        The same for crystal systems that have none there; settings of the integrated forest.
    search
        What ``search`` chooses among.
    """

    description: str
    preprocessing: str
    by_system: Mapping[str, ForestSettings]
    other: ForestSettings
    integrated: ForestSettings
    search: Search


# Tried on trigonal test samples with 6,500 to learn from, mse_paper_free: 1.4e-3 by the paper's
# settings (12 trees); with 20 to 24 extremely randomised trees 1.7e-4 from the points at which the
# cumulated intensity reaches 32 shares, and 3e-5 from smoothed profiles, a third of what ordinary
# random forests make of those. More samples then do more than more trees of the same size.
_EXTRA = ForestSettings(trees=16, extra=True, bootstrap=False)
FOREST_PRESETS: dict[str, ForestPreset] = {
    "quick": ForestPreset(
        "all forests in two to three minutes on two cores",
        "profile_smoothed@1",
        {"tetragonal": replace(_EXTRA, samples=40_000)},
        replace(_EXTRA, samples=20_000),
        replace(_EXTRA, trees=12, samples=60_000),
        Search(),
    ),
    "standard": ForestPreset(
        "good results: all forests in ten minutes on two cores, 150 MB",
        "profile_smoothed@1",
        {"cubic": replace(_EXTRA, trees=100), "trigonal": replace(_EXTRA, trees=24)},
        replace(_EXTRA, trees=12),
        replace(_EXTRA, trees=12),
        Search({"max_features": (0.5, 1.0)}),
    ),
    # Section V-B1. The paper does not say how many features a split chooses among, nor the least
    # number of samples in a leaf: scikit-learn's defaults (all, and one).
    "paper": ForestPreset(
        "the paper's trees, depth and samples: hours on two cores",
        "profile_cropped@1",
        {
            "cubic": ForestSettings(trees=150, samples=792),
            "trigonal": ForestSettings(trees=200, samples=6_500),
            "tetragonal": ForestSettings(trees=200, samples=20_500),
        },
        ForestSettings(trees=200, samples=20_500),
        ForestSettings(trees=250, samples=27_800),
        Search(trial_trees=1),
    ),
}
"""How forests are grown, by name."""


@dataclass(frozen=True)
class ForestTask:
    """The forests to grow.

    Attributes
    ----------
    dataset
        An opened snapshot; the workers open it themselves, by its address.
    targets
        Its phases, parameters and their scaling.
    part : shape (n,)
        A :class:`~bragg_data.splits.Part` for each sample. Forests are grown on a seeded random
        choice of the training and validation samples, since nothing is chosen on the latter; the
        test samples are not used.
    preset, integrated
        Settings; one forest for all phases, instead of one per phase.
    seed
        Of the choice of samples, the folds and the trees.
    """

    dataset: xr.Dataset
    targets: Targets
    part: NDArray[np.int8]
    preset: ForestPreset
    integrated: bool
    seed: int


def grow(
    client: Client,
    task: ForestTask,
    directory: Path,
    *,
    method: str = "search",
    on_progress: Callable[[int], None] | None = None,
) -> tuple[tuple[Forest, ...], Mapping[str, Any]]:
    """Grow the forests of a campaign on the workers of a cluster.

    The number of workers and the distribution of the work make no difference: each group of trees
    has a stream of random numbers of its own. With a single candidate both methods give the same
    forest.

    Parameters
    ----------
    client, task
        Client of the cluster; the forests.
    directory
        A directory that this machine and the workers share, for the prepared profiles; the files
        are removed at the end. Workers map them into memory, so that they exist once per machine.
    method
        ``search``: Dask-ML's GridSearchCV chooses among the preset's candidates by
        cross-validation and grows the best on all samples, a forest a task. ``joined``: a few
        trees per task, joined in a fixed order, by the preset's settings as they are.
    on_progress
        Called with a number of trees when they are grown; for ``search`` in another thread, and
        for the trees of the folds as well.

    Returns
    -------
    forests
        One per phase, in the order of the codes, or the integrated one alone.
    facts
        Plain values for the log, by the forest's name: settings, samples, trees, nodes, bytes,
        seconds per tree, trees by worker, and the search's table.

    Raises
    ------
    ForestsError
        If a phase has too few training samples.
    """
    plans = plans_of(task)
    preset = task.preset
    began = time.monotonic()
    groups = {plan.name: plan.rows for plan in plans}
    with prepared_matrix(client, task.dataset, groups, preset.preprocessing, directory) as matrix:
        prepared = time.monotonic()
        if method == "search":
            grown = grow_by_search(client, plans, preset.search, matrix, task.seed, on_progress)
        else:
            grown = grow_joined(client, plans, matrix, on_progress)
        size = matrix.path.stat().st_size
    facts = {
        "method": method,
        "matrix_bytes": size,
        "prepare_seconds": prepared - began,
        "grow_seconds": time.monotonic() - prepared,
        **{plan.name: grown[plan.name][1] for plan in plans},
    }
    return tuple(grown[plan.name][0] for plan in plans), facts


def plans_of(task: ForestTask) -> list[Plan]:
    """Return the forests that :func:`grow` is going to grow, with the samples of each.

    Raises
    ------
    ForestsError
        If a phase has too few training samples.
    """
    labels, targets, preset = samples_of(task.dataset), task.targets, task.preset
    usable = task.part != Part.test
    groups: list[tuple[str, ForestSettings, NDArray[np.bool_]]]
    if task.integrated:
        groups = [("integrated", preset.integrated, usable)]
    else:
        systems = [CrystalSystem(code).name for code in targets.crystal_systems]
        groups = [
            (name, preset.by_system.get(system, preset.other), usable & (labels.phase == code))
            for code, (name, system) in enumerate(zip(targets.names, systems, strict=True))
        ]
    plans = []
    for number, (name, settings, selected) in enumerate(groups):
        stream = np.random.SeedSequence([task.seed, number, int(task.integrated)])
        rows = np.flatnonzero(selected)
        if len(rows) < 2 * preset.search.folds:
            raise ForestsError(
                f"There are {len(rows)} samples to grow the forest '{name}' on; at least "
                f"{2 * preset.search.folds} are needed. Simulate more of them."
            )
        rows = np.sort(np.random.default_rng(stream).permutation(rows)[: settings.samples])
        values = forest_values(
            targets, labels.phase[rows], labels.cells[rows], integrated=task.integrated
        )
        plans.append(Plan(name, settings, rows, values, int(stream.generate_state(1)[0])))
    return plans
