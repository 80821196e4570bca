"""Baselines that a model has to beat: constant cells, and the library match."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_models.library.search import library_match
from bragg_models.metrics import errors, summary
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.simulation.draws import (
    SimulatedMeasurements,
    load_arrays,
    save_arrays,
)

MEAN_CELL = "constant (mean cell)"
LIBRARY_MATCH = "library match"

Prediction = tuple[NDArray[np.integer], NDArray[np.float64]]
"""Phase codes, shape (n,), and cells, shape (n, 6), in ångström and degrees."""


def constant_answer(
    phase: NDArray[np.integer], cells: NDArray[np.float64]
) -> tuple[int, NDArray[np.float64]]:
    """Return the commonest phase of samples, and its mean cell, shape (6,).

    Parameters
    ----------
    phase, cells : shapes (n,), (n, 6)
        Labels of the training samples.
    """
    commonest = int(np.bincount(phase).argmax())
    return commonest, cells[phase == commonest].mean(axis=0)


def constant_cells(
    campaign: Campaign, phase: NDArray[np.integer], cells: NDArray[np.float64]
) -> dict[str, tuple[int, NDArray[np.float64]]]:
    """Return the constant answers, each a phase and a cell, by what they are called.

    Parameters
    ----------
    campaign
        The commonest phase's CIF has the cell at room temperature.
    phase, cells : shapes (n,), (n, 6)
        Labels of the training samples.
    """
    code, mean = constant_answer(phase, cells)
    structure = campaign.phases[code]
    return {
        MEAN_CELL: (code, mean),
        "constant (CIF's cell)": (code, np.array(structure.cell)),
    }


def error_of(targets: Targets, truth: Prediction, prediction: Prediction, metric: str) -> float:
    """Return the error of predictions by a metric of a model's score.

    Parameters
    ----------
    targets
        Phases and parameters.
    truth, prediction
        Of the same samples.
    metric
        ``error_rate``, or a score of :func:`bragg_models.metrics.summary`.
    """
    if metric == "error_rate":
        return float((truth[0] != prediction[0]).mean())
    return summary(targets, errors(targets, *truth, *prediction))["all"][metric]


def library_match_on_draws(
    dataset: xr.Dataset, draws: SimulatedMeasurements, cache: Path | None
) -> Prediction:
    """Return the library match of held-out draws, computed once and cached by content.

    Parameters
    ----------
    dataset
        The library.
    draws
        Profiles on its grid.
    cache
        Directory, or None.
    """
    content = hashlib.sha256(str(dataset.attrs["content_hash"]).encode())
    for array in (draws.profiles, draws.span):
        content.update(np.ascontiguousarray(array).data)
    key = content.hexdigest()[:16]
    path = None if cache is None else cache / f"library-{key}.npz"
    stored = None if path is None else load_arrays(path, "phase", "cells")
    if stored is not None:
        return stored[0].astype(np.intp), stored[1].astype(np.float64)
    size = dataset.sizes["sample"]
    with Progress("Matching with the library", size, "patterns") as bar:
        matches = library_match(
            dataset,
            draws.profiles.astype(np.float64),
            draws.covered,
            on_chunk=lambda done, total: bar.advance(size * done // total - bar.done),
        )
    phase, cells = np.array(matches.phase), np.array(matches.best_cells)
    if path is not None:
        save_arrays(path, phase=phase, cells=cells)
    return phase, cells
