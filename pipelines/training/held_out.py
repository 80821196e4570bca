"""A trained model's test: on stored samples or on draws; its scores and figures, logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bragg_data.campaign import Samples as Labels
from bragg_data.model_provenance import ModelScore
from bragg_data.preprocessing import CROP_SHORT_TOF, preprocessing
from bragg_data.splits import Part
from bragg_data.store.schema import campaign_of
from bragg_models.data.batches import in_order, profiles_of
from bragg_models.metrics import errors, squared_errors, summary
from bragg_models.predictors import Predictor
from bragg_models.training.settings import EpochResult
from catalog.tracking import Run
from pipelines.cli.console import say
from pipelines.evaluation.scoring import answered, in_batches
from pipelines.evaluation.tables import constant_answer, print_scores
from pipelines.registry.registration import register
from pipelines.simulation.draws import pinned_draws
from pipelines.training import figures, recipes
from pipelines.training.recipes import Made, Task

CONDITIONAL = ("forest", "transfer", "deep")
"""Models with a regressor for each phase, which a classifier tells."""


@dataclass(frozen=True)
class Test:
    """What a model is tested on.

    Attributes
    ----------
    title
        For a reader.
    batches
        Begins to read the profiles, shape (m, points) each time.
    phase, cells : shapes (n,), (n, 6)
        The truth of all of them, in that order.
    constant
        The answer of a model without eyes: :func:`pipelines.evaluation.tables.constant_answer`.
    """

    title: str
    batches: Callable[[], Iterator[NDArray[np.float32]]]
    phase: NDArray[np.integer]
    cells: NDArray[np.float64]
    constant: tuple[int, NDArray[np.float64]]


def stored_test(task: Task, labels: Labels, part: NDArray[np.int8], split: str) -> Test:
    """Return the test samples of a split, in stored order."""
    wanted = part == Part.test

    def batches() -> Iterator[NDArray[np.float32]]:
        for batch in in_order(profiles_of(task.dataset, lambda values: values), wanted):
            yield batch.profiles

    return Test(
        f"Test samples, {split} split", batches, labels.phase[wanted], labels.cells[wanted],
        constant_answer(labels.phase, labels.cells, part == Part.training),
    )  # fmt: skip


def drawn_test(task: Task, per_phase: int) -> Test:
    """Return the pinned draws of measured-looking profiles."""
    draws = pinned_draws(campaign_of(task.dataset), per_phase)

    everywhere = np.ones(len(draws.phase), dtype=bool)
    return Test(
        "Draws of measured-looking profiles", partial(in_batches, draws.profiles),
        draws.phase, draws.cells, constant_answer(draws.phase, draws.cells, everywhere),
    )  # fmt: skip


def tested(
    task: Task, predictor: Predictor, made: Made, test: Test, fit_seconds: float
) -> Predictor:
    """Score a model; print the scores and log them with figures.

    Returns
    -------
    The model with ``test`` (see :func:`bragg_models.metrics.summary`) and ``score`` in its
    provenance.
    """
    provenance = predictor.provenance
    model = provenance.model
    answers = answered(predictor, test.batches(), len(test.phase), doing="Testing")[:2]
    total = errors(task.targets, test.phase, test.cells, *answers)
    scores = summary(task.targets, total)
    metrics: dict[str, Any] = {"test": scores, "fit_seconds": fit_seconds}
    is_classifier = model == "classifier"
    wrong = float((answers[0] != test.phase).sum())
    scores["all"]["wrong"] = wrong
    if is_classifier:
        scores = {
            group: {k: v for k, v in values.items() if np.isfinite(v)}
            for group, values in scores.items()
        }
        metrics["test"] = scores
    if model in CONDITIONAL:
        told = answered(predictor, test.batches(), len(test.phase), test.phase, doing="Testing")[1]
        metrics["test_true_system"] = summary(
            task.targets, errors(task.targets, test.phase, test.cells, test.phase, told)
        )
    task.run.log_metrics(metrics)
    score = (
        ModelScore("error_rate", wrong / len(test.phase))
        if is_classifier
        else ModelScore("mse_paper", scores["all"]["mse_paper"])
    )
    say()
    if is_classifier:
        say(f"{test.title}: {wrong:,.0f} of {len(test.phase):,} systems wrong")
    else:
        phase, cell = test.constant
        n = len(test.phase)
        constant = errors(
            task.targets, test.phase, test.cells, np.full(n, phase), np.tile(cell, (n, 1))
        )
        print_scores(
            provenance.campaign, model, scores, summary(task.targets, constant),
            task.targets, test.title,
        )  # fmt: skip
    _draw(task, made, test, answers, total.confusion)
    return replace(predictor, provenance=replace(provenance, test=scores, score=score))


def register_glance(run_: Run, guided: Predictor, test: Test) -> None:
    """Register the guided network's glance as a model of its own: what a network alone can do."""
    glance: Any = guided.model.proposal  # type: ignore[union-attr]
    provenance = replace(guided.provenance, model="perceptron")
    predictor = Predictor(
        "perceptron", glance, guided.targets, guided.preprocessing, guided.points, provenance
    )
    answers = answered(predictor, test.batches(), len(test.phase), doing="Testing")[:2]
    found = errors(predictor.targets, test.phase, test.cells, *answers)
    scores = summary(predictor.targets, found)
    run_.log_metrics({"test_glance": scores})
    say(f"Its glance alone, a perceptron: mse_paper {scores['all']['mse_paper']:.2e}")
    score = ModelScore("mse_paper", scores["all"]["mse_paper"])
    register(run_, replace(predictor, provenance=replace(provenance, test=scores, score=score)))


def _draw(
    task: Task,
    made: Made,
    test: Test,
    answers: tuple[NDArray[np.intp], NDArray[np.float64]],
    confusion: NDArray[np.int64],
) -> None:
    """Draw what the training came to, and log the figures."""
    run_, cells, names = task.run, test.cells, task.targets.names
    system_of = np.array([int(one.crystal_system) for one in task.targets.lattices])
    systems = system_of[test.phase]
    free = {
        int(lattice.crystal_system): lattice.free_parameters for lattice in task.targets.lattices
    }
    if made.histories:
        curves = {
            name: [_point(result) for result in history] for name, history in made.histories.items()
        }
        run_.log_figure(figures.learning_curves(curves), "figures/learning_curves.png")
    run_.log_figure(figures.confusion(confusion, names), "figures/confusion.png")
    if np.isfinite(answers[1]).all():
        run_.log_figure(figures.parity(cells, answers[1], systems, free), "figures/parity.png")
        squared, _ = squared_errors(task.targets, test.phase, cells, answers[1])
        run_.log_figure(figures.error_map(cells, squared, systems, free), "figures/error_map.png")
    if made.kind == "caenn":
        rows = np.concatenate([np.flatnonzero(test.phase == c)[:2] for c in range(len(names))])
        function = preprocessing(made.preprocessing).function
        profiles = np.asarray(function(_some(test, rows)), dtype=np.float32)
        again = recipes.reconstructions(made, profiles)
        if again is not None:
            tof = task.dataset.tof.values
            first = CROP_SHORT_TOF if len(tof) > profiles.shape[1] else 0
            figure = figures.reconstructions(
                tof[first : first + profiles.shape[1]], profiles, again,
                [names[code] for code in test.phase[rows]], systems[rows],
            )  # fmt: skip
            run_.log_figure(figure, "figures/reconstructions.png")


def _some(test: Test, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the profiles of a few rows."""
    found, done = {}, 0
    for profiles in test.batches():
        here = rows[(rows >= done) & (rows < done + len(profiles))]
        found.update({int(row): profiles[row - done] for row in here})
        done += len(profiles)
        if len(found) == len(rows):
            break
    return np.stack([found[int(row)] for row in rows])


def _point(result: EpochResult) -> dict[str, float]:
    scores = result.validation["all"]
    point = {"epoch": float(result.epoch), "training_loss": result.training["loss"]}
    for name in ("accuracy", "mse_paper"):
        if name in scores:
            point[name] = scores[name]
    for name in ("cross_entropy", "mae"):
        if name in scores:
            point["validation_loss"] = scores[name]
    return point
