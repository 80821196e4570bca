"""Scores of models and baselines on test sets, from the error of every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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


class ScoringError(ValueError):
    """Samples that models cannot be scored on."""


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
    phases, cells, probabilities, done = [], [], [], 0
    with Progress(description, count, "profiles", quiet=quiet) as progress:
        for profiles in batches:
            known = None if phase is None else phase[done : done + len(profiles)]
            prediction = predictor.predict(profiles, known)
            phases.append(prediction.phase)
            cells.append(prediction.cells)
            probabilities.append(prediction.probabilities)
            done += len(profiles)
            progress.advance(len(profiles))
    return np.concatenate(phases), np.concatenate(cells), np.concatenate(probabilities)


@dataclass
class ErrorAccumulator:
    """The errors of a model on a test set, collected batch by batch.

    Attributes
    ----------
    targets
        Phases and parameters.
    phases_only
        Whether the model predicts no cell.
    total
        Sums over the samples.
    literal, free
        Squared errors of each sample, as :func:`bragg_models.metrics.squared_errors` returns them.
    """

    targets: Targets
    phases_only: bool = False
    total: Errors | None = None
    literal: list[NDArray[np.float32]] = field(default_factory=list)
    free: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, phase: Phases, cells: Cells, predicted: Phases, predicted_cells: Cells) -> None:
        """Add a batch: the truth, and the predictions."""
        of_batch = errors(self.targets, phase, cells, predicted, predicted_cells)
        self.total = of_batch if self.total is None else self.total + of_batch
        literal, free = squared_errors(self.targets, phase, cells, predicted_cells)
        self.literal.append(literal.astype(np.float32))
        self.free.append(free.astype(np.float32))


@dataclass(frozen=True)
class EvaluatedModel:
    """A model or a baseline that is evaluated.

    Attributes
    ----------
    model
        Name.
    key, label
        Name of its scores in JSON and MLflow, and for a reader.
    predict
        From raw profiles to phases, shape (n,), and cells, shape (n, 6); None if it predicts no
        cell.
    predict_cells
        From raw profiles and their true phases to cells, of class-conditional models.
    uri, preset
        Of a registered version.
    """

    model: str
    key: str
    label: str
    predict: Callable[[Profiles], tuple[Phases, Cells | None]]
    predict_cells: Callable[[Profiles, Phases], Cells] | None = None
    uri: str = ""
    preset: str = ""


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
    test
        The samples.
    models
        What is scored.
    targets
        Phases and parameters.
    resamples
        Of the bootstrap.
    quiet
        Show no progress.
    """
    labels = test.labels
    accumulators: dict[str, ErrorAccumulator] = {}
    phases = []
    profiles = profiles_of(test.dataset, lambda values: values)
    total = test.count * len(models)
    with Progress(f"Scoring, {test.name}", total, "predictions", quiet=quiet) as bar:
        for batch in _large_batches(in_order(profiles, test.selected), _LARGE_BATCH):
            truth = labels.phase[batch.rows], labels.cells[batch.rows]
            phases.append(truth[0])
            for model in models:
                predict_and_accumulate(model, batch.profiles, truth, accumulators, targets)
                bar.advance(len(batch.rows), model.label)
    return scores_of(models, accumulators, np.concatenate(phases), targets, resamples)


def predict_and_accumulate(
    model: EvaluatedModel,
    profiles: Profiles,
    truth: tuple[Phases, Cells],
    accumulators: dict[str, ErrorAccumulator],
    targets: Targets,
) -> tuple[Phases, Cells | None]:
    """Predict profiles whose phases and cells are known, and accumulate the errors.

    They are accumulated under the model's key; with the true phases as input, of class-conditional
    models, under ``KEY/true``.

    Returns
    -------
    phase, cells : shapes (n,), (n, 6)
        The predictions.
    """
    phase, cells = truth
    predicted, predicted_cells = model.predict(profiles)
    accumulator = accumulators.setdefault(
        model.key, ErrorAccumulator(targets, phases_only=predicted_cells is None)
    )
    # A model without cells is scored on phases alone.
    accumulator.add(phase, cells, predicted, cells if predicted_cells is None else predicted_cells)
    if model.predict_cells is not None and predicted_cells is not None:
        with_truth = predicted_cells
        wrong = np.flatnonzero(predicted != phase)
        if len(wrong):
            with_truth = predicted_cells.copy()
            with_truth[wrong] = model.predict_cells(profiles[wrong], phase[wrong])
        accumulators.setdefault(f"{model.key}/true", ErrorAccumulator(targets)).add(
            phase, cells, phase, with_truth
        )
    return predicted, predicted_cells


def scores_of(
    models: Sequence[EvaluatedModel],
    accumulators: Mapping[str, ErrorAccumulator],
    phases: Phases,
    targets: Targets,
    resamples: int,
) -> list[ModelScores]:
    """Return the scores of models with their intervals.

    Parameters
    ----------
    models, accumulators
        The models, and their errors.
    phases : shape (n,)
        The true phases, in the order in which the errors were added.
    targets, resamples
        As for :func:`score_set`.
    """
    groups = _groups(accumulators, targets.crystal_systems[phases], targets, resamples)
    for key, accumulator in accumulators.items():
        if accumulator.phases_only:
            groups[key] = {
                group: {k: v for k, v in values.items() if k in ("n", "wrong") or "accuracy" in k}
                for group, values in groups[key].items()
            }
    return [
        ModelScores(
            model.model,
            model.label,
            model.uri,
            model.preset,
            groups[model.key],
            groups.get(f"{model.key}/true"),
        )
        for model in models
    ]


def _large_batches(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Join batches until they have some size: many small predictions take longer than a few."""
    pending: list[Batch] = []
    for batch in batches:
        pending.append(batch)
        if sum(len(b.rows) for b in pending) >= size:
            yield _concatenated(pending)
            pending = []
    if pending:
        yield _concatenated(pending)


def _concatenated(batches: Sequence[Batch]) -> Batch:
    return Batch(
        np.concatenate([b.profiles for b in batches]), np.concatenate([b.rows for b in batches])
    )


def _groups(
    accumulators: Mapping[str, ErrorAccumulator],
    systems: NDArray[np.integer],
    targets: Targets,
    resamples: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores with their intervals of each model, of all samples and by system."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for key, accumulator in accumulators.items():
        if accumulator.total is None:
            raise ScoringError(f"'{key}' was not given any sample.")
        scores[key] = summary(targets, accumulator.total)
    columns = np.stack(
        [np.concatenate(part) for a in accumulators.values() for part in (a.literal, a.free)],
        axis=1,
    )
    names = [(key, name) for key in accumulators for name in ("mse_paper", "mse_paper_free")]
    groups = {"all": np.ones(len(systems), dtype=bool)}
    groups |= {CrystalSystem(int(code)).name: systems == code for code in np.unique(systems)}
    for group, rows in groups.items():
        for key in accumulators:
            values = scores[key][group]
            values["wrong"] = float(round((1 - values["accuracy"]) * values["n"]))
        if rows.sum() < 2:
            continue  # one sample gives no interval
        low, high = bootstrap_intervals(columns[rows], resamples=resamples)
        for (key, name), bottom, top in zip(names, low, high, strict=True):
            values = scores[key][group]
            values[f"{name}_low"], values[f"{name}_high"] = float(bottom), float(top)
    return scores
