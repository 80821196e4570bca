"""Scores of models and baselines on test sets, from the error of every sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CrystalSystem
from bragg_models.data.batches import Batch, in_order, profiles_of
from bragg_models.metrics import Errors, bootstrap_intervals, errors, squared_errors, summary
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.evaluation.tables import ModelScores
from pipelines.evaluation.test_sets import HeldOutSet

_LARGE_BATCH = 1024  # profiles that are predicted at a time
_BATCH = 512  # the same of profiles in memory

Cells = NDArray[np.float64]
Phases = NDArray[np.integer]
Profiles = NDArray[np.float32]


def in_batches(profiles: Profiles) -> Iterator[Profiles]:
    """Yield profiles (n, points) in batches."""
    for low in range(0, len(profiles), _BATCH):
        yield profiles[low : low + _BATCH]


def predict_batches(
    predictor: Predictor,
    batches: Iterable[Profiles],
    count: int,
    phase: Phases | None = None,
    *,
    description: str,
    quiet: bool = False,
) -> tuple[NDArray[np.intp], Cells, NDArray[np.float64]]:
    """Predict batches of profiles with a model, with a progress bar.

    Parameters
    ----------
    predictor, batches, count
        The model, the profiles, and their number.
    phase : shape (count,)
        Known phases, if the model is not to decide them.
    description, quiet
        Of the progress bar.

    Returns
    -------
    phase, cells, probabilities : shapes (count,), (count, 6), (count, n_phases)
    """
    predictions, done = [], 0
    with Progress(description, count, "profiles", quiet=quiet) as progress:
        for profiles in batches:
            known = None if phase is None else phase[done : done + len(profiles)]
            p = predictor.predict(profiles, known)
            predictions.append((p.phase, p.cells, p.probabilities))
            done += len(profiles)
            progress.advance(len(profiles))
    phases, cells, probabilities = zip(*predictions, strict=True)
    return np.concatenate(phases), np.concatenate(cells), np.concatenate(probabilities)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model or a baseline that is evaluated.

    Attributes
    ----------
    model, key, label
        Name; name of its scores in JSON and MLflow, and for a reader.
    predict
        From raw profiles to phases, shape (n,), and cells, shape (n, 6); None if it predicts no
        cell.
    predict_cells
        From raw profiles and their true phases to cells, of class-conditional models.
    uri, preset, command
        Of a registered version, and the command that trains it again.
    size, n_weights, n_nodes
        On disk in bytes; numbers of weights of networks, and of nodes of trees.
    """

    model: str
    key: str
    label: str
    predict: Callable[[Profiles], tuple[Phases, Cells | None]]
    predict_cells: Callable[[Profiles, Phases], Cells] | None = None
    uri: str = ""
    preset: str = ""
    command: str = ""
    size: int = 0
    n_weights: int = 0
    n_nodes: int = 0


def constant_model(key: str, label: str, phase: int, cell: Cells) -> EvaluatedModel:
    """Return a baseline that predicts the same phase and cell (6,) for every profile."""

    def predict(profiles: Profiles) -> tuple[Phases, Cells]:
        return np.full(len(profiles), phase), np.tile(cell, (len(profiles), 1))

    return EvaluatedModel(key, key, label, predict)


class Scorer:
    """Predicts profiles whose phases and cells are known, and collects the errors.

    Parameters
    ----------
    models, targets
        Baselines and models; phases and parameters.
    """

    def __init__(self, models: Sequence[EvaluatedModel], targets: Targets) -> None:
        self.models, self.targets = models, targets
        self._phases: list[Phases] = []
        self._phases_only: set[str] = set()
        # By the model's key; with the true phases as input, by "KEY/true".
        self._totals: dict[str, Errors] = {}
        self._squared: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def predict(
        self, profiles: Profiles, phase: Phases, cells: Cells
    ) -> Iterator[tuple[EvaluatedModel, Phases, Cells | None]]:
        """Predict a batch of profiles with each model, and yield the predictions.

        Parameters
        ----------
        profiles : shape (n, points)
        phase, cells : shapes (n,), (n, 6)
            The truth.
        """
        self._phases.append(phase)
        for model in self.models:
            predicted, predicted_cells = model.predict(profiles)
            if predicted_cells is None:  # scored on phases alone
                self._phases_only.add(model.key)
                self._add(model.key, phase, cells, predicted, cells)
            else:
                self._add(model.key, phase, cells, predicted, predicted_cells)
            if model.predict_cells is not None and predicted_cells is not None:
                with_truth = predicted_cells.copy()
                wrong = np.flatnonzero(predicted != phase)
                if len(wrong):
                    with_truth[wrong] = model.predict_cells(profiles[wrong], phase[wrong])
                self._add(f"{model.key}/true", phase, cells, phase, with_truth)
            yield model, predicted, predicted_cells

    def _add(
        self, key: str, phase: Phases, cells: Cells, predicted: Phases, predicted_cells: Cells
    ) -> None:
        total = errors(self.targets, phase, cells, predicted, predicted_cells)
        self._totals[key] = self._totals[key] + total if key in self._totals else total
        squared = squared_errors(self.targets, phase, cells, predicted_cells)
        self._squared[key].append(np.stack(squared, axis=1).astype(np.float32))

    def scores(self, resamples: int) -> list[ModelScores]:
        """Return the scores of all models, with their intervals, by bootstrap."""
        systems = self.targets.crystal_systems[np.concatenate(self._phases)]
        groups = {"all": np.ones(len(systems), dtype=bool)}
        groups |= {CrystalSystem(int(code)).name: systems == code for code in np.unique(systems)}
        scores = {key: summary(self.targets, total) for key, total in self._totals.items()}
        columns = np.concatenate([np.concatenate(v) for v in self._squared.values()], axis=1)
        names = [(key, name) for key in scores for name in ("mse_paper", "mse_paper_free")]
        for group, rows in groups.items():
            for of_key in scores.values():
                values = of_key[group]
                values["wrong"] = float(round((1 - values["accuracy"]) * values["n"]))
            if rows.sum() < 2:
                continue  # one sample gives no interval
            low, high = bootstrap_intervals(columns[rows], resamples=resamples)
            for (key, name), bottom, top in zip(names, low, high, strict=True):
                bounds = {f"{name}_low": float(bottom), f"{name}_high": float(top)}
                scores[key][group] |= bounds
        for key in self._phases_only:
            scores[key] = {
                group: {k: v for k, v in values.items() if k in ("n", "wrong") or "accuracy" in k}
                for group, values in scores[key].items()
            }
        return [
            ModelScores(
                m.model, m.label, m.uri, m.preset, scores[m.key], scores.get(f"{m.key}/true")
            )
            for m in self.models
        ]


def score_set(
    test: HeldOutSet,
    models: Sequence[EvaluatedModel],
    targets: Targets,
    *,
    resamples: int,
    quiet: bool = False,
) -> list[ModelScores]:
    """Score models on every sample of a test set; its chunks are read once.

    Parameters
    ----------
    test, models, targets
        The samples, what is scored, and its phases and parameters.
    resamples, quiet
        Of the bootstrap; show no progress.
    """
    scorer, labels = Scorer(models, targets), test.labels
    batches = in_order(profiles_of(test.dataset, lambda values: values), test.selected)
    total = test.count * len(models)
    with Progress(f"Scoring, {test.name}", total, "predictions", quiet=quiet) as bar:
        for batch in _large_batches(batches):
            phase, cells = labels.phase[batch.rows], labels.cells[batch.rows]
            for model, *_ in scorer.predict(batch.profiles, phase, cells):
                bar.advance(len(batch.rows), model.label)
    return scorer.scores(resamples)


def _large_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Join batches, as many small predictions take longer than a few large ones."""
    pending: list[Batch] = []
    for batch in batches:
        pending.append(batch)
        if sum(len(b.rows) for b in pending) >= _LARGE_BATCH:
            yield _concatenated(pending)
            pending = []
    if pending:
        yield _concatenated(pending)


def _concatenated(batches: Sequence[Batch]) -> Batch:
    return Batch(
        np.concatenate([b.profiles for b in batches]), np.concatenate([b.rows for b in batches])
    )
