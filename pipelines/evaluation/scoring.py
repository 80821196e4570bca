"""Test sets, and scores of models and baselines on them, from the error of every sample."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from bragg_data.arrays import Array, Floats32, Integers, Integers8, Mask
from bragg_data.campaign import Samples
from bragg_data.crystallography.cell import CrystalSystem
from bragg_data.splits import TRAINED, Part, blocked_split, extra_data_split, random_split
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.data.batches import Batch, in_order, profiles_of
from bragg_models.metrics import Errors, bootstrap_intervals, errors, squared_errors, summary
from bragg_models.predictors import Prediction, Predictor
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.evaluation.names import EvaluateError
from pipelines.evaluation.tables import ModelScores

# Seed and shares of the splits, so that all scores are of the same samples.
SPLIT = {"seed": 0, "test": 0.2, "validation": 0.05}

SPLITS = ("random", "blocked")

_LARGE_BATCH = 1024  # profiles that are predicted at a time
_BATCH = 512  # the same of profiles in memory

Cells = Array
Phases = Integers
Profiles = Floats32


@dataclass(frozen=True)
class HeldOutSet:
    """A test set of a data set."""

    name: str  # "random", "blocked" or "off-grid"
    dataset: xr.Dataset
    selected: Mask  # which samples are in the test set, shape (n,)
    # Which samples of the main data set the models of this split may be trained on, shape (m,).
    training: Mask

    @cached_property
    def labels(self) -> Samples:
        """The labels of the whole data set."""
        return samples_of(self.dataset)

    @property
    def count(self) -> int:
        """Number of samples in the test set."""
        return int(self.selected.sum())

    @property
    def split(self) -> str:
        """The split whose models are scored."""
        return "blocked" if self.name == "blocked" else "random"

    @property
    def title(self) -> str:
        """The test set for a reader."""
        split = f"{self.name} split" if self.name in SPLITS else "off the grid"
        return f"{split}, {self.count:,} samples of {self.dataset.attrs['tag']}"


def part_of(name: str, labels: Samples, values: Mapping[str, object]) -> Integers8:
    """Return the part of each sample, shape (n,), in a split with this seed and these shares.

    Of a data set that has grown, the samples that were drawn first are split as they were before.
    Later ones are for training, or unused if a blocked split holds their box out.
    """
    settings = {key: values[key] for key in SPLIT}
    systems, cells, n = labels.crystal_system, labels.cells, labels.n_drawn or len(labels)
    if name != "blocked":
        part = random_split(systems[:n], **settings)  # type: ignore[arg-type]
        return np.append(part, np.full(len(labels) - n, Part.training, np.int8))
    part = blocked_split(systems[:n], cells[:n], **settings)  # type: ignore[arg-type]
    later = extra_data_split(systems[:n], cells[:n], part, systems[n:], cells[n:])
    later[later == Part.test] = Part.unused
    return np.append(part, later)


def held_out_sets(
    dataset: xr.Dataset, offgrid: xr.Dataset | None, limit: int | None = None
) -> list[HeldOutSet]:
    """Return the test sets of a data set, at most ``limit`` samples of each.

    Raises `EvaluateError` if the off-grid data set has other phases or another grid.
    """
    labels = samples_of(dataset)
    test_sets = []
    for name in SPLITS:
        part = part_of(name, labels, SPLIT)
        test_sets.append(HeldOutSet(name, dataset, part == Part.test, np.isin(part, TRAINED)))
    if offgrid is not None:
        phases = [[p.name for p in campaign_of(d).phases] for d in (dataset, offgrid)]
        if phases[0] != phases[1] or not np.array_equal(dataset.tof, offgrid.tof):
            raise EvaluateError(
                f"{offgrid.attrs['tag']} has other phases or another time-of-flight grid than "
                f"{dataset.attrs['tag']}. Name another data set with --offgrid."
            )
        every = np.ones(offgrid.sizes["sample"], dtype=bool)
        test_sets.append(HeldOutSet("off-grid", offgrid, every, test_sets[0].training))
    if limit is not None:
        for test in test_sets:
            test.selected[np.flatnonzero(test.selected)[limit:]] = False
    return test_sets


def stored_batches(dataset: xr.Dataset, selected: Mask) -> Iterator[Batch]:
    """Yield the selected profiles of a snapshot as they are, in stored order."""
    return in_order(profiles_of(dataset, lambda values: values), selected)


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
) -> Prediction:
    """Predict batches of ``count`` profiles together, with a progress bar.

    The phases, shape (count,), are known if the model is not to decide them.
    """
    predictions, done = [], 0
    with Progress(description, count, "profiles", quiet=quiet) as progress:
        for profiles in batches:
            known = None if phase is None else phase[done : done + len(profiles)]
            predictions.append(predictor.predict(profiles, known))
            done += len(profiles)
            progress.advance(len(profiles))
    return Prediction.concatenated(predictions)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model or a baseline that is evaluated.

    ``predict`` returns the phases, shape (n,), and the cells, shape (n, 6), of raw profiles; None
    instead of cells that it does not predict. ``predict_cells`` of class-conditional models returns
    the cells of raw profiles and their true phases.
    """

    model: str
    key: str  # of its scores in JSON and MLflow
    label: str  # for a reader
    predict: Callable[[Profiles], tuple[Phases, Cells | None]]
    predict_cells: Callable[[Profiles, Phases], Cells] | None = None
    uri: str = ""  # of a registered version
    preset: str = ""
    command: str = ""  # that trains it again
    size: int = 0  # on disk, bytes
    n_weights: int = 0  # of networks
    n_nodes: int = 0  # of trees


def constant_answer(phase: Phases, cells: Cells) -> tuple[int, Cells]:
    """Return the commonest phase of samples, and its mean cell, shape (6,)."""
    commonest = int(np.bincount(phase).argmax())
    return commonest, cells[phase == commonest].mean(axis=0)


def constant_model(key: str, label: str, phase: int, cell: Cells) -> EvaluatedModel:
    """Return a baseline that predicts the same phase and cell (6,) for every profile."""

    def predict(profiles: Profiles) -> tuple[Phases, Cells]:
        return np.full(len(profiles), phase), np.tile(cell, (len(profiles), 1))

    return EvaluatedModel(key, key, label, predict)


def score_models(
    models: Sequence[EvaluatedModel],
    targets: Targets,
    batches: Iterable[tuple[Profiles, Phases, Cells]],
    resamples: int,
    on_prediction: Callable[[EvaluatedModel, Phases, Cells | None], None],
) -> list[ModelScores]:
    """Return the scores of models, with 95 % intervals by bootstrap.

    The models include baselines. Batches are raw profiles (n, points), their phases (n,) and cells
    (n, 6); ``on_prediction`` is called with each model's phases and cells of each batch.
    """
    truths: list[Phases] = []
    # By the model's key; with the true phases as input, by "KEY/true".
    totals: dict[str, Errors] = {}
    squared: dict[str, list[Floats32]] = defaultdict(list)
    without_cells = set()

    def add(key: str, truth: tuple[Phases, Cells], predicted: Phases, cells: Cells) -> None:
        total = errors(targets, *truth, predicted, cells)
        totals[key] = totals[key] + total if key in totals else total
        of_samples = squared_errors(targets, *truth, cells)
        squared[key].append(np.stack(of_samples, axis=1).astype(np.float32))

    for profiles, phase, cells in batches:
        truths.append(phase)
        for model in models:
            predicted, predicted_cells = model.predict(profiles)
            if predicted_cells is None:  # scored on phases alone
                without_cells.add(model.key)
                add(model.key, (phase, cells), predicted, cells)
            else:
                add(model.key, (phase, cells), predicted, predicted_cells)
            if model.predict_cells is not None and predicted_cells is not None:
                with_truth = predicted_cells.copy()
                wrong = np.flatnonzero(predicted != phase)
                if len(wrong):
                    with_truth[wrong] = model.predict_cells(profiles[wrong], phase[wrong])
                add(f"{model.key}/true", (phase, cells), phase, with_truth)
            on_prediction(model, predicted, predicted_cells)

    systems = targets.crystal_systems[np.concatenate(truths)]
    scores = {key: summary(targets, total) for key, total in totals.items()}
    _add_intervals(scores, systems, squared, resamples)
    for key in without_cells:
        scores[key] = {
            group: {k: v for k, v in values.items() if k in ("n", "wrong") or "accuracy" in k}
            for group, values in scores[key].items()
        }
    return [
        ModelScores(m.model, m.label, m.uri, m.preset, scores[m.key], scores.get(f"{m.key}/true"))
        for m in models
    ]


def _add_intervals(
    scores: Mapping[str, dict[str, dict[str, float]]],
    systems: Integers8,
    squared: Mapping[str, Sequence[Floats32]],
    resamples: int,
) -> None:
    """Add the numbers of wrong systems, and intervals, to the scores of all models and groups."""
    groups = {"all": np.ones(len(systems), dtype=bool)}
    groups |= {CrystalSystem(int(code)).name: systems == code for code in np.unique(systems)}
    columns = np.concatenate([np.concatenate(parts) for parts in squared.values()], axis=1)
    names = [(key, name) for key in scores for name in ("mse_paper", "mse_paper_free")]
    for group, rows in groups.items():
        for of_key in scores.values():
            values = of_key[group]
            values["wrong"] = float(round((1 - values["accuracy"]) * values["n"]))
        if rows.sum() < 2:
            continue  # one sample gives no interval
        low, high = bootstrap_intervals(columns[rows], resamples=resamples)
        for (key, name), bottom, top in zip(names, low, high, strict=True):
            scores[key][group] |= {f"{name}_low": float(bottom), f"{name}_high": float(top)}


def score_set(
    test: HeldOutSet,
    models: Sequence[EvaluatedModel],
    targets: Targets,
    *,
    resamples: int,
    quiet: bool = False,
) -> list[ModelScores]:
    """Return the scores of models on every sample of a test set; its chunks are read once."""
    total = test.count * len(models)
    with Progress(f"Scoring, {test.name}", total, "predictions", quiet=quiet) as bar:
        return score_models(
            models,
            targets,
            _large_batches(test),
            resamples,
            lambda model, phase, _: bar.advance(len(phase), model.label),
        )


def _large_batches(test: HeldOutSet) -> Iterator[tuple[Profiles, Phases, Cells]]:
    """Join batches, as many small predictions take longer than a few large ones."""
    pending: list[Batch] = []
    count = 0
    for batch in stored_batches(test.dataset, test.selected):
        pending.append(batch)
        count += len(batch.rows)
        is_last = count == test.count
        if is_last or sum(len(b.rows) for b in pending) >= _LARGE_BATCH:
            profiles = np.concatenate([b.profiles for b in pending])
            rows = np.concatenate([b.rows for b in pending])
            yield profiles, test.labels.phase[rows], test.labels.cells[rows]
            pending = []
