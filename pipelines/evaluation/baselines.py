"""Baselines that a model has to beat: constant cells, and the library match."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.campaign import Campaign, Samples
from bragg_models.library.compressed import CompressedLibrary, Neighbours, mean_of_nearest
from bragg_models.library.search import library_match
from bragg_models.metrics import errors, summary
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.evaluation.names import CONSTANT, NEAREST, NEAREST_MEAN
from pipelines.evaluation.scoring import Cells, EvaluatedModel, Phases, Profiles, constant_model
from pipelines.evaluation.test_sets import HeldOutSet
from pipelines.simulation.draws import SimulatedMeasurements, load_arrays, save_arrays

MEAN_CELL = "constant (mean cell)"
LIBRARY_MATCH = "library match"

NEIGHBOURS = 4
"""Nearest patterns whose cells are averaged, of those with the phase of the nearest."""

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


def constant_predictions(
    campaign: Campaign, training: tuple[Phases, Cells], count: int
) -> dict[str, Prediction]:
    """Return the constant answers to a number of samples, by what they are called.

    Parameters
    ----------
    campaign, training, count
        The commonest phase's CIF has the cell at room temperature; the labels of the training
        samples, shapes (n,) and (n, 6); the number of samples.
    """
    code, mean = constant_answer(*training)
    cells = {MEAN_CELL: mean, "constant (CIF's cell)": np.array(campaign.phases[code].cell)}
    return {name: (np.full(count, code), np.tile(c, (count, 1))) for name, c in cells.items()}


def error_of(targets: Targets, truth: Prediction, prediction: Prediction, metric: str) -> float:
    """Return the error of predictions by a metric of a model's score.

    Parameters
    ----------
    targets
        Phases and parameters.
    truth, prediction, metric
        Of the same samples; ``error_rate``, or a score of :func:`bragg_models.metrics.summary`.
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
    dataset, draws, cache
        The library; profiles on its grid; directory, or None.
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


class LibraryMatch:
    """The stored patterns as a baseline.

    Parameters
    ----------
    library, labels
        All patterns of a data set, and their labels.
    training : shape (n,)
        The patterns that the models of a test set may be trained on.
    """

    def __init__(
        self, library: CompressedLibrary, labels: Samples, training: NDArray[np.bool_]
    ) -> None:
        self.library, self.labels = library.only(training), labels
        self.size = library.full.nbytes + library.compressed.nbytes
        self.n_queries = self.n_proven = 0
        self._last: tuple[Profiles, Neighbours] | None = None

    def mean_of_nearest(self, count: int) -> Callable[[Profiles], tuple[Phases, Cells]]:
        """Return a function that predicts the mean cell of the nearest patterns of one phase."""

        def predict(profiles: Profiles) -> tuple[Phases, Cells]:
            # Different counts are evaluated on the same profiles in turn.
            if self._last is None or self._last[0] is not profiles:
                nearest = self.library.nearest(profiles, min(NEIGHBOURS, len(self.library.rows)))
                self._last = profiles, nearest
                self.n_queries += len(profiles)
                self.n_proven += int(nearest.proven.sum())
            return mean_of_nearest(self._last[1], self.labels.phase, self.labels.cells, count)

        return predict


def baseline_models(
    labels: Samples, match: LibraryMatch | None, test: HeldOutSet
) -> list[EvaluatedModel]:
    """Return the baselines: a constant, and the nearest stored patterns.

    Parameters
    ----------
    labels, test
        Of the main data set, which holds the training part of the test set.
    match
        The library match; None for the constant alone.
    """
    answer = constant_answer(labels.phase[test.training], labels.cells[test.training])
    baselines = [constant_model(CONSTANT, "always the mean cell", *answer)]
    if match is not None:
        mean = f"library, mean of {NEIGHBOURS}"
        for key, label, count in (
            (NEAREST, "library, nearest", 1),
            (NEAREST_MEAN, mean, NEIGHBOURS),
        ):
            predict = match.mean_of_nearest(count)
            baselines.append(EvaluatedModel(key, key, label, predict, size=match.size))
    return baselines
