"""The test of a trained model: on stored samples and on simulated measurements.

Models for simulated profiles are scored on the test samples of their split (metrics ``test/…``),
and every model on the same simulated measurements (``draws/…``), so that these can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bragg_data.model_provenance import ModelScore, Scores
from bragg_data.preprocessing import CROP_SHORT_TOF, preprocessing
from bragg_data.splits import Part
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.data.batches import in_order, profiles_of
from bragg_models.metrics import Errors, errors, squared_errors, summary
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from bragg_models.training.settings import EpochResult
from pipelines.cli.console import say
from pipelines.evaluation.baselines import (
    LIBRARY_MATCH,
    MEAN_CELL,
    constant_cells,
    error_of,
    library_match_on_draws,
)
from pipelines.evaluation.scoring import in_batches, predict_batches
from pipelines.evaluation.tables import print_scores
from pipelines.registry.registration import register
from pipelines.simulation.draws import SimulatedMeasurements, held_out_draws
from pipelines.training import figures
from pipelines.training.names import CONDITIONAL
from pipelines.training.presets import Presets
from pipelines.training.recipes.paper import reconstructed_profiles
from pipelines.training.stage import FittedModel, TrainingContext

_CLASSIFIER, _ROBUST = "classifier", "robust"
# Its search ends where a noiseless pattern is met. On noise it goes through all its starts in all
# phases, seconds for each profile; its proposal network and the robust network are scored instead.
_SLOW_ON_NOISE = ("guided",)


@dataclass(frozen=True)
class HeldOutTest:
    """Samples that models are tested on.

    Attributes
    ----------
    title
        For a reader.
    batches
        Starts reading the profiles, shape (m, points) each time.
    phase, cells : shapes (n,), (n, 6)
        The truth, in the same order.
    constants
        Constant answers, by what they are called: a phase and its cell, shape (6,).
    """

    title: str
    batches: Callable[[], Iterator[NDArray[np.float32]]]
    phase: NDArray[np.integer]
    cells: NDArray[np.float64]
    constants: dict[str, tuple[int, NDArray[np.float64]]]

    def constant_predictions(self) -> dict[str, tuple[NDArray[np.integer], NDArray[np.float64]]]:
        """Return the constant answers for all samples: phases (n,) and cells (n, 6)."""
        n = len(self.phase)
        return {
            name: (np.full(n, phase), np.tile(cell, (n, 1)))
            for name, (phase, cell) in self.constants.items()
        }


@dataclass(frozen=True)
class HeldOutScores:
    """Predictions of a model on a test, and their scores.

    Attributes
    ----------
    scores
        Of all samples and of each crystal system, see :func:`bragg_models.metrics.summary`; of a
        classifier those that need no cell.
    score
        The number that models are compared by.
    phase, cells : shapes (n,), (n, 6)
        The predictions; cells of a classifier are NaN.
    errors
        Sums over the samples.
    """

    scores: Scores
    score: ModelScore
    phase: NDArray[np.intp]
    cells: NDArray[np.float64]
    errors: Errors


def stored_test(context: TrainingContext, split: str) -> HeldOutTest:
    """Return the test samples of the training's split, in stored order."""
    labels = samples_of(context.dataset)
    part = context.part[: len(labels.phase)]
    test, training = part == Part.test, part == Part.training

    def batches() -> Iterator[NDArray[np.float32]]:
        for batch in in_order(profiles_of(context.dataset, lambda values: values), test):
            yield batch.profiles

    return HeldOutTest(
        f"Test samples, {split} split",
        batches,
        labels.phase[test],
        labels.cells[test],
        constant_cells(
            campaign_of(context.dataset), labels.phase[training], labels.cells[training]
        ),
    )


def draws_test(context: TrainingContext, draws: SimulatedMeasurements) -> HeldOutTest:
    """Return simulated measurements as a test."""
    return HeldOutTest(
        "Simulated measurements",
        partial(in_batches, draws.profiles),
        draws.phase,
        draws.cells,
        constant_cells(campaign_of(context.dataset), draws.phase, draws.cells),
    )


def score_model(predictor: Predictor, test: HeldOutTest) -> HeldOutScores:
    """Predict the samples of a test and score the predictions."""
    targets, n = predictor.targets, len(test.phase)
    phase, cells, _ = predict_batches(predictor, test.batches(), n, description="Testing")
    total = errors(targets, test.phase, test.cells, phase, cells)
    scores = summary(targets, total)
    wrong = float((phase != test.phase).sum())
    scores["all"]["wrong"] = wrong
    if predictor.provenance.model == _CLASSIFIER:
        scores = {
            group: {name: value for name, value in values.items() if np.isfinite(value)}
            for group, values in scores.items()
        }
        score = ModelScore("error_rate", wrong / n)
    else:
        score = ModelScore("mse_paper", scores["all"]["mse_paper"])
    return HeldOutScores(scores, score, phase, cells, total)


def test_model(
    context: TrainingContext, predictor: Predictor, fitted: FittedModel, presets: Presets
) -> Predictor:
    """Score a model on its held-out samples and on simulated measurements; log and print it.

    Parameters
    ----------
    context, predictor, fitted
        The training, and the model.
    presets
        Numbers of simulated measurements.

    Returns
    -------
    The model, with its scores and those of the baselines in the provenance. The library match is
    among the baselines of a model for measured profiles; of simulated profiles the library holds
    near twins.
    """
    provenance, targets = predictor.provenance, context.targets
    model = provenance.model
    for_measured = model == _ROBUST
    on_draws_test = draws_test(context, _draws(context, presets.comparison_draws))
    on_draws = None if model in _SLOW_ON_NOISE else score_model(predictor, on_draws_test)
    metrics = {} if on_draws is None else {"draws": on_draws.scores}
    if for_measured:
        test_draws = _draws(context, presets.test_draws)
        test = draws_test(context, test_draws)
        result = score_model(predictor, test)
        metrics["draws_test"] = result.scores  # what versions of this model are compared by
    else:
        test = stored_test(context, provenance.split.name)
        result = score_model(predictor, test)
        metrics["test"] = result.scores
    if model in CONDITIONAL:
        n = len(test.phase)
        cells = predict_batches(predictor, test.batches(), n, test.phase, description="Testing")[1]
        total = errors(targets, test.phase, test.cells, test.phase, cells)
        metrics["test_true_system"] = summary(targets, total)
    context.run.log_metrics(metrics)
    predictions = test.constant_predictions()
    if for_measured:
        predictions[LIBRARY_MATCH] = library_match_on_draws(
            context.dataset, test_draws, _draws_cache(context)
        )
    truth = test.phase, test.cells
    baselines = {
        name: error_of(targets, truth, prediction, result.score.name)
        for name, prediction in predictions.items()
    }
    _print_result(context, predictor, test, result)
    if on_draws is not None:
        say(
            f"{on_draws_test.title}, {len(on_draws.phase):,}: accuracy "
            f"{on_draws.scores['all']['accuracy']:.2%}, {on_draws.score.name} "
            f"{on_draws.score.value:.2e}"
        )
    _log_figures(context, fitted, test, result)
    provenance = replace(
        provenance,
        test=result.scores,
        draws=None if on_draws is None else on_draws.scores,
        score=result.score,
        baselines=baselines,
    )
    return replace(predictor, provenance=provenance)


def register_proposal_network(
    context: TrainingContext, guided: Predictor, presets: Presets
) -> None:
    """Register the guided network's proposal network as a model of its own.

    It shows how well a network alone does, without the physics.
    """
    network: nn.Module = guided.model.proposal  # type: ignore[union-attr,assignment]
    provenance = replace(guided.provenance, model="perceptron", baselines=None)
    predictor = Predictor(
        "perceptron", network, guided.targets, guided.preprocessing, guided.points, provenance
    )
    result = score_model(predictor, stored_test(context, provenance.split.name))
    draws = _draws(context, presets.comparison_draws)
    on_draws = score_model(predictor, draws_test(context, draws))
    context.run.log_metrics({"test_proposal": result.scores, "draws_proposal": on_draws.scores})
    say(f"Its proposal network alone, a perceptron: mse_paper {result.score.value:.2e}")
    provenance = replace(provenance, test=result.scores, draws=on_draws.scores, score=result.score)
    register(context.run, replace(predictor, provenance=provenance))


def _draws(context: TrainingContext, per_phase: int) -> SimulatedMeasurements:
    return held_out_draws(campaign_of(context.dataset), per_phase, cache=_draws_cache(context))


def _draws_cache(context: TrainingContext) -> Path | None:
    return None if context.cache is None else context.cache / "draws"


def _print_result(
    context: TrainingContext, predictor: Predictor, test: HeldOutTest, result: HeldOutScores
) -> None:
    n, provenance = len(test.phase), predictor.provenance
    say()
    if provenance.model == _CLASSIFIER:
        wrong = result.scores["all"]["wrong"]
        say(f"{test.title}: {wrong:,.0f} of {n:,} systems misclassified")
        return
    constant = test.constant_predictions()[MEAN_CELL]
    total = errors(context.targets, test.phase, test.cells, *constant)
    print_scores(
        provenance.campaign,
        provenance.model,
        result.scores,
        summary(context.targets, total),
        context.targets,
        test.title,
    )


def _log_figures(
    context: TrainingContext, fitted: FittedModel, test: HeldOutTest, result: HeldOutScores
) -> None:
    """Draw the training and its errors, and log the figures."""
    run_, targets = context.run, context.targets
    systems = _systems(targets)[test.phase]
    free = {int(lattice.crystal_system): lattice.free_parameters for lattice in targets.lattices}
    if fitted.histories:
        curves = {
            name: [_point(epoch) for epoch in history] for name, history in fitted.histories.items()
        }
        run_.log_figure(figures.learning_curves(curves), "figures/learning_curves.png")
    run_.log_figure(
        figures.confusion(result.errors.confusion, targets.names), "figures/confusion.png"
    )
    if np.isfinite(result.cells).all():
        run_.log_figure(
            figures.parity(test.cells, result.cells, systems, free), "figures/parity.png"
        )
        squared, _ = squared_errors(targets, test.phase, test.cells, result.cells)
        run_.log_figure(
            figures.error_map(test.cells, squared, systems, free), "figures/error_map.png"
        )
    if fitted.kind == "caenn":
        _log_reconstructions(context, fitted, test)


def _log_reconstructions(context: TrainingContext, fitted: FittedModel, test: HeldOutTest) -> None:
    names = context.targets.names
    rows = np.concatenate([np.flatnonzero(test.phase == c)[:2] for c in range(len(names))])
    function = preprocessing(fitted.preprocessing).function
    profiles = np.asarray(function(_profiles_of_rows(test, rows)), dtype=np.float32)
    reconstructed = reconstructed_profiles(fitted, profiles)
    if reconstructed is None:
        return
    tof = context.dataset.tof.values
    first = CROP_SHORT_TOF if len(tof) > profiles.shape[1] else 0
    figure = figures.reconstructions(
        tof[first : first + profiles.shape[1]],
        profiles,
        reconstructed,
        [names[code] for code in test.phase[rows]],
        _systems(context.targets)[test.phase[rows]],
    )
    context.run.log_figure(figure, "figures/reconstructions.png")


def _systems(targets: Targets) -> NDArray[np.intp]:
    return np.array([int(lattice.crystal_system) for lattice in targets.lattices])


def _profiles_of_rows(test: HeldOutTest, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the profiles of a few rows, shape (m, points)."""
    profiles: dict[int, NDArray[np.float32]] = {}
    low = 0
    for batch in test.batches():
        in_batch = rows[(rows >= low) & (rows < low + len(batch))]
        profiles.update({int(row): batch[row - low] for row in in_batch})
        low += len(batch)
        if len(profiles) == len(rows):
            break
    return np.stack([profiles[int(row)] for row in rows])


def _point(result: EpochResult) -> dict[str, float]:
    scores = result.validation["all"]
    point = {"epoch": float(result.epoch), "training_loss": result.training["loss"]}
    point |= {name: scores[name] for name in ("accuracy", "mse_paper") if name in scores}
    for name in ("cross_entropy", "mae"):
        if name in scores:
            point["validation_loss"] = scores[name]
    return point
