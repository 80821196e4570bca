"""The test of a trained model: on stored samples and on simulated measurements.

Models for simulated profiles are scored on the test samples of their split (metrics ``test/…``),
and every model on the same simulated measurements (``draws/…``), so that these can be compared.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from bragg_data.arrays import Array, Floats32, Integers, Mask
from bragg_data.campaign import Campaign
from bragg_data.model_provenance import ACCEPTED, ModelScore, Scores
from bragg_data.preprocessing import CROP_SHORT_TOF, preprocessing
from bragg_data.splits import Part
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.metrics import errors, squared_errors, summary
from bragg_models.predictors import Prediction, Predictor
from bragg_models.training.settings import EpochResult
from pipelines.cli.console import say
from pipelines.cli.style import UNITS
from pipelines.evaluation import names, scoring
from pipelines.evaluation.tables import ResultTable, finite
from pipelines.prediction.library import PatternLibrary, match_library
from pipelines.registry.registration import register
from pipelines.simulation import draws as simulated
from pipelines.simulation.draws import SimulatedMeasurements
from pipelines.simulation.foreign import foreign_profiles
from pipelines.training import figures
from pipelines.training.expectation import EXPECTED, expectation, rejected_share
from pipelines.training.recipes import reconstructed_profiles
from pipelines.training.stage import FittedModel, TrainingContext

_MEAN_CELL = "constant (mean cell)"
# A model that rejects more of genuine profiles is compared with the baselines on all of them.
_LEAST_ACCEPTED = 0.95
_SAMPLES_PER_DRAW = 128  # samples of a data set for each draw that models are compared on
# Phase codes, shape (n,), and cells, shape (n, 6), in ångström and degrees.
Labels = tuple[Integers, Array]


@dataclass(frozen=True)
class HeldOutTest:
    """Samples that models are tested on."""

    title: str  # for a reader
    batches: Callable[[], Iterable[Floats32]]  # reads the profiles, shape (m, points)
    phase: Integers  # the truth, shape (n,)
    cells: Array  # the truth, shape (n, 6)
    constants: Mapping[str, Labels]  # constant answers


@dataclass(frozen=True)
class HeldOutScores:
    """Predictions of a model on a test, and their scores."""

    scores: Scores  # by "all" and crystal system; of a classifier those that need no cell
    score: ModelScore  # the number that models are compared by
    prediction: Prediction  # cells are NaN of a classifier
    confusion: Integers  # samples by true and predicted phase
    compared: Mask  # shape (n,): on which samples the model is compared with baselines


def stored_test(context: TrainingContext, split: str) -> HeldOutTest:
    """Return the test samples of the training's split, in stored order."""
    labels = samples_of(context.dataset)
    part = context.part[: len(labels.phase)]
    test, training = part == Part.test, part == Part.training
    known = labels.phase[training], labels.cells[training]
    return HeldOutTest(
        f"Test samples, {split} split",
        lambda: (batch.profiles for batch in scoring.stored_batches(context.dataset, test)),
        labels.phase[test],
        labels.cells[test],
        _constants(campaign_of(context.dataset), *known, int(test.sum())),
    )


def draws_test(context: TrainingContext, draws: SimulatedMeasurements) -> HeldOutTest:
    """Return simulated measurements as a test."""
    truth = draws.phase, draws.cells
    constants = _constants(campaign_of(context.dataset), *truth, len(draws.phase))
    batches = partial(scoring.in_batches, draws.profiles)
    return HeldOutTest("Simulated measurements", batches, *truth, constants)


def _constants(campaign: Campaign, phase: Integers, cells: Array, count: int) -> dict[str, Labels]:
    """Return constant answers to ``count`` samples, from the labels of training samples.

    The cell of the commonest phase is their mean, or its CIF's, which is that at room temperature.
    """
    code, mean = scoring.constant_answer(phase, cells)
    answers = {_MEAN_CELL: mean, "constant (CIF's cell)": np.array(campaign.phases[code].cell)}
    return {name: (np.full(count, code), np.tile(c, (count, 1))) for name, c in answers.items()}


def score_model(predictor: Predictor, test: HeldOutTest) -> HeldOutScores:
    """Predict the samples of a test and score the predictions."""
    targets, n = predictor.targets, len(test.phase)
    prediction = scoring.predict_batches(predictor, test.batches(), n, description="Testing")
    phase, cells = prediction.phase, prediction.cells
    total = errors(targets, test.phase, test.cells, phase, cells)
    scores = summary(targets, total)
    wrong = float((phase != test.phase).sum())
    scores["all"]["wrong"] = wrong
    if predictor.provenance.model == names.CLASSIFIER:
        score = ModelScore("error_rate", wrong / n)
        everything = np.ones(n, dtype=bool)
        return HeldOutScores(finite(scores), score, prediction, total.confusion, everything)
    score = ModelScore("mse_paper", scores["all"]["mse_paper"])
    accepted = np.ones(n, dtype=bool) if prediction.accepted is None else prediction.accepted
    compared = accepted | (accepted.mean() < _LEAST_ACCEPTED)
    if not compared.all():
        predictions = test.phase, test.cells, phase, cells
        total_compared = errors(targets, *(values[compared] for values in predictions))
        scores[ACCEPTED] = summary(targets, total_compared)["all"]
    return HeldOutScores(scores, score, prediction, total.confusion, compared)


def test_model(context: TrainingContext, predictor: Predictor, fitted: FittedModel) -> Predictor:
    """Score a model on its held-out samples and on simulated measurements; log and print it.

    Returned is the model, with its scores and those of the baselines in the provenance. The library
    match is among the baselines of a model for measured profiles; of simulated profiles the library
    holds near twins. Where the model rejects a few profiles, those of the baselines are of the
    others: one profile of noise alone can have most of the squared error of all.
    """
    provenance, targets = predictor.provenance, context.targets
    model = provenance.model
    on_draws_test = draws_test(context, _comparison_draws(context))
    on_draws = score_model(predictor, on_draws_test)
    metrics = {"draws": on_draws.scores}
    library: dict[str, Labels] = {}
    facts = dict(provenance.facts)
    if model in names.MEASURED:
        draws = _draws(context, context.environment.presets.test_draws)
        test = draws_test(context, draws)
        result = score_model(predictor, test)
        metrics["draws_test"] = result.scores  # what versions of this model are compared by
        library["library match"] = _library_match(context, draws)
        of_each = context.environment.presets.foreign_draws
        foreign = foreign_profiles(campaign_of(context.dataset), of_each)
        rejected = rejected_share(predictor, foreign)
        expected = expectation(targets, result.prediction, test.phase, test.cells, rejected)
        facts[EXPECTED] = expected.to_json()
        metrics["expected"] = {"all": expected.metrics}
    else:
        test = stored_test(context, provenance.split.name)
        result = score_model(predictor, test)
        metrics["test"] = result.scores
    truth = test.phase, test.cells
    if model in names.CLASS_CONDITIONAL:
        n = len(test.phase)
        cells = scoring.predict_batches(
            predictor, test.batches(), n, test.phase, description="Testing"
        ).cells
        total = errors(targets, *truth, test.phase, cells)
        metrics["test_true_system"] = summary(targets, total)
    context.run.log_metrics(metrics)
    baselines = {}
    compared = result.compared
    known = test.phase[compared], test.cells[compared]
    for name, (phase, cells) in {**test.constants, **library}.items():
        if result.score.name == "error_rate":
            baselines[name] = float((truth[0] != phase).mean())
        else:
            scores = summary(targets, errors(targets, *known, phase[compared], cells[compared]))
            baselines[name] = scores["all"][result.score.name]
    _print_result(context, predictor, test, result)
    if model in names.MEASURED:
        say(f"Expected of measured profiles: {expected}.")
        for pair, share in expected.undecided.items():
            say(f"{pair}: {share:.1%} of their profiles decide between the two.")
    say(
        f"{on_draws_test.title}, {len(on_draws_test.phase):,}: accuracy "
        f"{on_draws.scores['all']['accuracy']:.2%}, {on_draws.score.name} "
        f"{on_draws.score.value:.2e}"
    )
    _log_figures(context, fitted, test, result)
    provenance = replace(provenance, test=result.scores, draws=on_draws.scores, score=result.score)
    provenance = replace(provenance, baselines=baselines, facts=facts)
    return replace(predictor, provenance=provenance)


def _library_match(context: TrainingContext, draws: SimulatedMeasurements) -> Labels:
    """Return the library match of held-out draws, computed once and cached by content."""
    content = hashlib.sha256(str(context.dataset.attrs["content_hash"]).encode())
    for array in (draws.profiles, draws.span):
        content.update(np.ascontiguousarray(array).data)
    cache = _draws_cache(context)
    path = None if cache is None else cache / f"library-{content.hexdigest()[:16]}.npz"
    if path is not None and (stored := simulated.load_arrays(path, "phase", "cells")):
        return stored[0].astype(np.intp), stored[1].astype(np.float64)
    library, profiles = PatternLibrary(context.dataset), draws.profiles.astype(np.float64)
    matches = match_library(library, profiles, draws.covered, progress=True)
    phase, cells = np.array(matches.phase), np.array(matches.best_cells)
    if path is not None:
        simulated.save_arrays(path, phase=phase, cells=cells)
    return phase, cells


def register_proposal_network(context: TrainingContext, guided: Predictor) -> None:
    """Register the guided network's proposal network as a model of its own.

    It shows how well a network alone does, without the physics.
    """
    network: nn.Module = guided.model.proposal  # type: ignore[union-attr,assignment]
    provenance = replace(guided.provenance, model="perceptron", baselines=None)
    predictor = replace(guided, kind="perceptron", model=network, provenance=provenance)
    result = score_model(predictor, stored_test(context, provenance.split.name))
    on_draws = score_model(predictor, draws_test(context, _comparison_draws(context)))
    context.run.log_metrics({"test_proposal": result.scores, "draws_proposal": on_draws.scores})
    say(f"Its proposal network alone, a perceptron: mse_paper {result.score.value:.2e}")
    provenance = replace(provenance, test=result.scores, draws=on_draws.scores, score=result.score)
    register(context.run, replace(predictor, provenance=provenance))


def _comparison_draws(context: TrainingContext) -> SimulatedMeasurements:
    """Return the draws on which all models of a data set are scored, fewer for a small one."""
    share = context.dataset.sizes["sample"] // _SAMPLES_PER_DRAW
    return _draws(context, min(context.environment.presets.comparison_draws, max(share, 2)))


def _draws(context: TrainingContext, per_phase: int) -> SimulatedMeasurements:
    return simulated.held_out_draws(
        campaign_of(context.dataset), per_phase, cache=_draws_cache(context)
    )


def _draws_cache(context: TrainingContext) -> Path | None:
    cache = context.environment.cache_directory
    return None if cache is None else cache / "draws"


def _print_result(
    context: TrainingContext, predictor: Predictor, test: HeldOutTest, result: HeldOutScores
) -> None:
    provenance, targets = predictor.provenance, context.targets
    say()
    if provenance.model == names.CLASSIFIER:
        wrong, n = result.scores["all"]["wrong"], len(test.phase)
        say(f"{test.title}: {wrong:,.0f} of {n:,} systems misclassified")
        return
    mae_headings = (f"MAE {p} ({UNITS[p]})" for p in targets.parameters)
    headings = ("", "samples", "accuracy", "mse_paper", "… tied c once", *mae_headings)
    table = ResultTable(test.title, headings, notes=[names.EQUATION_1])
    constant = errors(targets, test.phase, test.cells, *test.constants[_MEAN_CELL])
    rows = {**result.scores, "always the mean cell": summary(targets, constant)["all"]}
    styles = {"all": "bold", "always the mean cell": "dim"}
    for label, values in rows.items():
        texts = [f"{values[k]:.2e}" for k in ("mse_paper", "mse_paper_free")]
        for parameter in targets.parameters:
            mean, digits = values.get(f"mae_{parameter}"), 4 if parameter in "abc" else 3
            texts.append("" if mean is None else f"{mean:.{digits}f}")
        counts = f"{values['n']:,.0f}", f"{values['accuracy']:.2%}"
        table.add(label, *counts, *texts, style=styles.get(label, ""))
    if provenance.campaign == names.PAPER_CAMPAIGN:
        for system, value in names.TABLE_II.get(provenance.model, {}).items():
            table.add(f"the paper's, {system}", "", "", f"{value:.2e}", style="dim")
        if provenance.model in names.TABLE_III:
            samples, value = f"{names.TEST_SAMPLES:,}", names.TABLE_III[provenance.model]
            table.add("the paper's", samples, "", f"{value:.2e}", style="dim")
    table.show()


def _log_figures(
    context: TrainingContext, fitted: FittedModel, test: HeldOutTest, result: HeldOutScores
) -> None:
    targets = context.targets
    systems = targets.crystal_systems[test.phase]
    free = {int(lattice.crystal_system): lattice.free_parameters for lattice in targets.lattices}
    drawn = {"confusion": figures.confusion(result.confusion, targets.names)}
    if fitted.histories:
        curves = {name: [_point(e) for e in epochs] for name, epochs in fitted.histories.items()}
        drawn["learning_curves"] = figures.learning_curves(curves)
    if np.isfinite(result.prediction.cells).all():
        drawn["parity"] = figures.parity(test.cells, result.prediction.cells, systems, free)
        squared, _ = squared_errors(targets, test.phase, test.cells, result.prediction.cells)
        drawn["error_map"] = figures.error_map(test.cells, squared, systems, free)
    if fitted.kind == "caenn":
        drawn["reconstructions"] = _reconstructions(context, fitted, test)
    for name, figure in drawn.items():
        context.run.log_figure(figure, f"figures/{name}.png")


def _reconstructions(context: TrainingContext, fitted: FittedModel, test: HeldOutTest) -> Figure:
    targets, dataset = context.targets, context.dataset
    rows = np.concatenate([np.flatnonzero(test.phase == c)[:2] for c in range(len(targets.names))])
    part = context.part[: dataset.sizes["sample"]]
    values = dataset["intensity"][np.flatnonzero(part == Part.test)[rows]].values
    function = preprocessing(fitted.preprocessing).function
    profiles = np.asarray(function(values), dtype=np.float32)
    tof = dataset.tof.values
    first = CROP_SHORT_TOF if len(tof) > profiles.shape[1] else 0
    return figures.reconstructions(
        tof[first : first + profiles.shape[1]],
        profiles,
        reconstructed_profiles(fitted, profiles),
        [targets.names[code] for code in test.phase[rows]],
        targets.crystal_systems[test.phase[rows]],
    )


def _point(result: EpochResult) -> dict[str, float]:
    scores = result.validation["all"]
    point = {"epoch": float(result.epoch), "training_loss": result.training["loss"]}
    point |= {name: scores[name] for name in ("accuracy", "mse_paper") if name in scores}
    for name in ("cross_entropy", "mae"):
        if name in scores:
            point["validation_loss"] = scores[name]
    return point
