"""Grow random forests on a Dask cluster: searched by Dask-ML, or a few trees per task, joined."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client, as_completed
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CrystalSystem
from bragg_data.splits import Part
from bragg_data.store.repository import open_snapshot
from bragg_data.store.schema import samples_of
from bragg_models.data.batches import profiles_of
from bragg_models.forest import Forest
from bragg_models.forest_training import ForestSettings, forest_values
from bragg_models.predictors import DESCRIPTION, Prediction, Predictor, load_predictor
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.training.dask_forests import (
    Grown,
    Plan,
    Search,
    grow_by_search,
    grow_joined,
    prepared_matrix,
)

FOREST_METHODS = ("search", "joined")
"""Cross-validated search, a forest a task; or a few trees a task, joined."""


class ForestsError(RuntimeError):
    """Forests that cannot be grown."""


@dataclass(frozen=True)
class ForestPreset:
    """How the forests of a campaign are grown.

    Attributes
    ----------
    description
        One line.
    preprocessing
        Name and version of the function that prepares the profiles.
    by_system
        Class-conditional: settings by the name of the crystal system.
    other
        The same for crystal systems that have none there.
    integrated
        Settings of the integrated forest.
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


def grow(
    client: Client,
    dataset: xr.Dataset,
    targets: Targets,
    part: NDArray[np.int8],
    preset: ForestPreset,
    *,
    integrated: bool,
    seed: int,
    directory: Path,
    method: str = "search",
    on_progress: Callable[[int], None] | None = None,
) -> tuple[tuple[Forest, ...], dict[str, Any]]:
    """Grow the forests of a campaign on the workers of a cluster.

    Neither the number of workers nor which of them grows what makes a difference: each group of
    trees has a stream of random numbers of its own. With a single candidate both ways give the same
    forest.

    Parameters
    ----------
    client
        Of the cluster.
    dataset
        An opened snapshot; the workers open it themselves, by its address.
    targets
        Its phases, parameters and their scaling.
    part : shape (n,)
        A :class:`~bragg_data.splits.Part` for each sample. Forests are grown on a seeded random
        choice of the training and validation samples, since they choose nothing on the latter; the
        test samples are not touched.
    preset
        How many trees, on how many samples …
    integrated
        One forest for all, instead of one per phase.
    seed
        Of the choice of samples, the folds and the trees.
    directory
        Which this machine and the workers see, for the prepared profiles; the files are removed at
        the end. Workers map them into memory, so that they exist once per machine.
    method
        ``search``: Dask-ML's GridSearchCV chooses among the preset's candidates by
        cross-validation and grows the best on all samples; a forest is one task then, all forests
        are grown side by side. ``joined``: a few trees per task, joined in a fixed order, by the
        preset's settings as they are.
    on_progress
        Called with a number of trees when they are grown; for ``search`` in another thread, and
        for the trees of the folds as well.

    Returns
    -------
    forests
        One per phase, in the order of the codes, or the integrated one alone.
    facts
        What to log, plain values, by the forest's name: settings, samples, trees, nodes, bytes,
        seconds per tree, trees by worker, and the search's table.

    Raises
    ------
    ForestsError
        If a phase has no samples to learn from.
    """
    plans = plans_of(dataset, targets, part, preset, integrated=integrated, seed=seed)
    began = time.monotonic()
    grown: dict[str, Grown]
    with prepared_matrix(client, dataset, plans, preset.preprocessing, directory) as (path, rows):
        prepared = time.monotonic()
        if method == "search":
            grown = grow_by_search(client, plans, preset.search, path, rows, seed, on_progress)
        else:
            grown = grow_joined(client, plans, path, rows, on_progress)
        size = path.stat().st_size
    facts: dict[str, Any] = {
        "how": method,
        "matrix_bytes": size,
        "prepare_seconds": prepared - began,
        "grow_seconds": time.monotonic() - prepared,
    }
    for plan in plans:
        facts[plan.name] = grown[plan.name].facts
    return tuple(grown[plan.name].forest for plan in plans), facts


def plans_of(
    dataset: xr.Dataset,
    targets: Targets,
    part: NDArray[np.int8],
    preset: ForestPreset,
    *,
    integrated: bool,
    seed: int,
) -> list[Plan]:
    """Return the forests that :func:`grow` is going to grow, with the samples chosen for each.

    Raises
    ------
    ForestsError
        If a phase has no samples to learn from.
    """
    labels = samples_of(dataset)
    usable = part != Part.test
    groups: list[tuple[str, ForestSettings, NDArray[np.bool_]]]
    if integrated:
        groups = [("integrated", preset.integrated, usable)]
    else:
        systems = [CrystalSystem(code).name for code in targets.crystal_systems]
        groups = [
            (name, preset.by_system.get(system, preset.other), usable & (labels.phase == code))
            for code, (name, system) in enumerate(zip(targets.names, systems, strict=True))
        ]
    plans = []
    for number, (name, settings, wanted) in enumerate(groups):
        stream = np.random.SeedSequence([seed, number, int(integrated)])
        rows = np.flatnonzero(wanted)
        if len(rows) < 2 * preset.search.folds:
            raise ForestsError(
                f"There are {len(rows)} samples to grow the forest '{name}' on; at least "
                f"{2 * preset.search.folds} are needed. Simulate more of them."
            )
        rows = np.sort(np.random.default_rng(stream).permutation(rows)[: settings.samples])
        values = forest_values(
            targets, labels.phase[rows], labels.cells[rows], integrated=integrated
        )
        plans.append(Plan(name, settings, rows, values, int(stream.generate_state(1)[0])))
    return plans


# ---- answers -----------------------------------------------------------------------------------


def predict_chunks(
    client: Client,
    dataset: xr.Dataset,
    directory: Path,
    wanted: NDArray[np.bool_],
    phase: NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.intp], Prediction]:
    """Let a saved model answer for samples of a snapshot, chunk by chunk on the workers.

    Parameters
    ----------
    client
        Of the cluster.
    dataset
        An opened snapshot; the workers open it themselves.
    directory
        A saved model (:meth:`~bragg_models.predictors.Predictor.save`) that the workers see.
    wanted : shape (n,)
        Which samples.
    phase : shape (n,)
        Phases under which the cells are wanted; left out, the most probable ones.

    Returns
    -------
    rows : shape (m,)
        Numbers of the wanted samples, in stored order.
    prediction
        The answers for them.
    """
    source = str(dataset.attrs["tag"]), str(dataset.attrs["uri"])
    model = directory.resolve(), (directory / DESCRIPTION).stat().st_mtime_ns
    profiles = profiles_of(dataset, lambda values: values)
    size = profiles.rows_per_chunk
    chunks = profiles.chunks_with(wanted)
    with Progress("Predicting", int(wanted.sum()), "profiles") as progress:
        futures = []
        for chunk in chunks:
            rows = slice(int(chunk) * size, (int(chunk) + 1) * size)
            inside = np.flatnonzero(wanted[rows])
            told = None if phase is None else phase[rows][inside]
            futures.append(
                client.submit(_predict_rows, source, model, rows, inside, told, pure=False)
            )
        for future in as_completed(futures):
            progress.advance(len(future.result().phase))
        parts = [future.result() for future in futures]
    return np.flatnonzero(wanted), Prediction(
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.phase for part in parts]),
        np.concatenate([part.cells for part in parts]),
    )


_opened = lru_cache(maxsize=1)(open_snapshot)


@lru_cache(maxsize=1)
def _loaded(directory: Path, written: int) -> Predictor:  # noqa: ARG001 - a new one is read again
    return load_predictor(directory)


def _predict_rows(
    source: tuple[str, str],
    model: tuple[Path, int],
    rows: slice,
    inside: NDArray[np.intp],
    phase: NDArray[np.integer] | None,
) -> Prediction:
    intensity = _opened(*source)["intensity"].isel(sample=rows).values[inside]
    return _loaded(*model).predict(intensity, phase)
