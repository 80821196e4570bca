"""Models on simulated measurements: predictions, their calibration, and starts of refinements.

The draws have streams of random numbers of their own, which no model was trained or calibrated on.
Functions that take the number of a task run on a worker.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bragg_data.arrays import Array, Indices, Mask
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import PreprocessingError, prepare_measured
from bragg_data.refinement.result import RefinementError, RefinementResult
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation import measurement_effects
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import Draws
from bragg_models.metrics import calibration_error, prediction_sets
from bragg_models.networks.robust import COVERAGE
from bragg_models.predictors import Prediction
from pipelines.cli.style import SYSTEM_COLORS, UNITS
from pipelines.cluster.client import gather_with_progress
from pipelines.evaluation.tables import ResultTable
from pipelines.prediction.library import match_library
from pipelines.prediction.workflow import LoadedModel
from pipelines.registry.feature_views import RegisteredModel
from pipelines.registry.registration import load_version
from pipelines.simulation.draws import Purpose, random_stream, task_sizes

_PREDICTED_PER_TASK = 50  # draws of each phase
_REFINED_PER_TASK = 4
_FEWEST = 5  # predictions of which a share is drawn
_GROUPS = 8  # of intervals, by width
_BINS = 15  # of the probability of the predicted phase
_SAME_MINIMUM = 1.001, 1.0  # factor and addend on χ² of the fit from the truth

STARTS = {  # starts of refinements
    "both": "the model's cell and the library's",
    "model": "the model's cell alone",
    "library": "the library's cells of each phase",
    "centre": "the middle of the campaign's ranges",
    "random": "a cell of the campaign at random",
}

# A phase and a cell, shape (6,), that a refinement starts from.
Start = tuple[int, Array]


@lru_cache(maxsize=1)
def model_and_simulator(model: RegisteredModel) -> tuple[LoadedModel, Simulator]:
    """Return a registered model, and the simulator of its campaign; the last one is cached."""
    predictor = load_version(model.tracking_uri, model.version)
    simulator = measurement_effects.simulator_for(predictor.campaign)
    return LoadedModel(predictor, model.version, model.tracking_uri), simulator


def _draws_of_phases(
    model: RegisteredModel, purpose: Purpose, task: int, count: int
) -> tuple[LoadedModel, Draws]:
    """Draw measured profiles of each phase, the same for the same purpose and task."""
    loaded, simulator = model_and_simulator(model)
    campaign = loaded.predictor.campaign
    generator = np.random.default_rng(random_stream(purpose, 0, task))
    labels = measurement_effects.draw_labels(campaign, count, generator)
    calibrated = purpose is not Purpose.DRIFTED_EVALUATION
    effects = campaign.measurement_effects
    return loaded, measurement_effects.draw_profiles(
        simulator, *labels, generator, effects, calibrated=calibrated
    )


def prepared_profiles(draws: Draws) -> Iterator[tuple[int, GriddedProfile, Array | None]]:
    """Yield row, profile, and the input of models; None where the profile has no signal."""
    for row, values in enumerate(zip(draws.intensity, draws.sigma, draws.covered, strict=True)):
        try:
            prepared = prepare_measured(*values)
        except PreprocessingError:
            prepared = None
        yield row, GriddedProfile(*values), prepared


def starts_of(
    model: LoadedModel, gridded: GriddedProfile, prepared: Array
) -> tuple[Prediction, list[Start], list[Start]]:
    """Return the model's prediction, and the starts from it and from the library."""
    prediction = model.predictor.predict(prepared[None])
    from_model = [(int(prediction.phase[0]), prediction.cells[0])]
    if model.library is None:
        return prediction, from_model, []
    matches = match_library(model.library, prepared[None], gridded.covered[None])
    return prediction, from_model, matches.starts(0)


def refine_or_none(
    refiner: Refiner, gridded: GriddedProfile, starts: Sequence[Start]
) -> Sequence[RefinementResult]:
    """Return the refinements of a profile, the most plausible first; none if it is impossible."""
    try:
        return refiner.refine(gridded, list(starts))
    except RefinementError:
        return []


@dataclass(frozen=True, eq=False)
class DrawPredictions:
    """Predictions of a model for n simulated measurements, and the truth."""

    probabilities: Array  # of the phases, shape (n, n_phases)
    phase: Indices  # the truth, shape (n,)
    cells: Array  # the truth, shape (n, 6)
    intervals: Array  # Å and degrees, shape (n, 6, 2); NaN where not free
    accepted: Mask  # whether the model accepts the profile, shape (n,)

    @property
    def correct(self) -> Mask:
        """Whether the most probable phase is the truth, shape (n,)."""
        return np.asarray(self.probabilities.argmax(axis=1) == self.phase)

    def intervals_of(self, code: int, parameter: str) -> tuple[Mask, Array]:
        """Return whether a parameter is inside its intervals, and their widths.

        Of the correct predictions of a phase, shape (m,).
        """
        rows, column = self.correct & (self.phase == code), CELL_PARAMETERS.index(parameter)
        low, high = self.intervals[rows, column].T
        cells = self.cells[rows, column]
        return (cells >= low) & (cells <= high), high - low

    def reliability(self) -> tuple[Array, Array, Array]:
        """Return mean probability of the predicted phase, accuracy, and number in filled bins."""
        confidence = self.probabilities.max(axis=1)
        bins = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
        used, number = np.unique(bins, return_counts=True)
        means = [(confidence[bins == b].mean(), self.correct[bins == b].mean()) for b in used]
        probability, accuracy = np.array(means).T
        return probability, accuracy, number.astype(np.float64)


def predict_draws(client: Client, model: RegisteredModel, count: int) -> dict[str, DrawPredictions]:
    """Predict draws of each phase, of calibrated and of drifted instruments."""
    predictions = {}
    sizes = task_sizes(count, _PREDICTED_PER_TASK)
    purposes = {"calibrated": Purpose.EVALUATION, "drifted": Purpose.DRIFTED_EVALUATION}
    for name, purpose in purposes.items():
        futures = [
            client.submit(_predict_task, model, purpose, task, size, pure=False)
            for task, size in enumerate(sizes)
        ]
        parts = gather_with_progress(futures, sizes, f"Predicting, {name}", "draws")
        predictions[name] = DrawPredictions(*map(np.concatenate, zip(*parts, strict=True)))
    return predictions


def _predict_task(
    model: RegisteredModel, purpose: Purpose, task: int, count: int
) -> tuple[Any, ...]:
    loaded, draws = _draws_of_phases(model, purpose, task, count)
    prepared = draws.prepared()
    rows = prepared.max(axis=1) > 0
    calibrated = np.full(rows.sum(), purpose is not Purpose.DRIFTED_EVALUATION)
    p = loaded.predictor.predict(prepared[rows], calibrated=calibrated)
    return p.probabilities, draws.phase[rows], draws.cells[rows], p.intervals, p.accepted


def calibration_tables(
    predictions: Mapping[str, DrawPredictions], phases: Sequence[Phase]
) -> list[ResultTable]:
    """Return accuracy and calibration of a model, and the coverage of its intervals.

    The predictions are by the kind of instrument; the phases are the campaign's.
    """
    count = len(next(iter(predictions.values())).phase)
    headings = "expected\ncalibration error", "mean 90 %\nset size", "truth in it"
    calibration = ResultTable(
        f"Simulated measurements, {count:,} for each kind of instrument",
        ("instrument", "accuracy", *headings, "accepted"),
    )
    free = _free_parameters(phases)
    coverage = ResultTable(
        "Inside their 90 % intervals, of draws whose system is correct",
        ("instrument", *(f"{phase.name} {name}" for _, phase, name in free)),
    )
    for name, p in predictions.items():
        size, included = prediction_sets(p.probabilities, p.phase)
        error = calibration_error(p.probabilities, p.phase)
        shares = [f"{share.mean():.1%}" for share in (p.correct, included, p.accepted)]
        calibration.add(name, shares[0], f"{error:.4f}", f"{size.mean():.2f}", *shares[1:])
        inside = (p.intervals_of(code, parameter)[0] for code, _, parameter in free)
        coverage.add(name, *(f"{part.mean():.1%}" if len(part) else "" for part in inside))
    return [calibration, coverage]


def calibration_figure(
    predictions: Mapping[str, DrawPredictions], phases: Sequence[Phase]
) -> Figure:
    """Draw how reliable probabilities and intervals are, by the kind of instrument.

    Three panels: the accuracy over the probability of the predicted phase; the share of parameters
    inside their 90 % intervals; and of the first kind the same over the width of the interval, as
    wide ones should hold the truth no more often than narrow ones.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    reliable, inside, wide = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))
    reliable.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for axis in (inside, wide):
        axis.axhspan(0.88, 0.92, color="0.92")
        axis.axhline(COVERAGE, color="0.6", linewidth=1)
        axis.set_ylim(0.7, 1.0)
        axis.set_ylabel("share inside the 90 % interval")
    free = _free_parameters(phases)
    for index, (name, p) in enumerate(predictions.items()):
        marker: Any = {"fmt": "os"[index], "fillstyle": ("full", "none")[index]}
        probability, accuracy, number = p.reliability()
        spread = np.sqrt(accuracy * (1 - accuracy) / number)
        reliable.errorbar(
            probability, accuracy, spread, color="#0072B2", label=name, markersize=5, **marker
        )
        for position, (code, phase, parameter) in enumerate(free):
            covered, _ = p.intervals_of(code, parameter)
            if len(covered) >= _FEWEST:
                share = covered.mean()
                inside.errorbar(
                    position + 0.2 * index - 0.1,
                    share,
                    np.sqrt(share * (1 - share) / len(covered)),
                    color=SYSTEM_COLORS[phase.crystal_system],
                    markersize=6,
                    **marker,
                )
    _draw_coverage_by_width(wide, next(iter(predictions.values())), phases)
    reliable.set_xlabel("probability of the predicted phase")
    reliable.set_ylabel("accuracy")
    reliable.legend(frameon=False)
    inside.set_xticks(range(len(free)), [f"{phase.name}\n{name}" for _, phase, name in free])
    wide.set_xscale("log")
    wide.set_xlabel("half width of the interval")
    wide.legend(frameon=False, fontsize=8, loc="lower right")
    for axis in (reliable, inside, wide):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_coverage_by_width(axis: Axes, drawn: DrawPredictions, phases: Sequence[Phase]) -> None:
    for code, phase, parameter in _free_parameters(phases):
        covered, width = drawn.intervals_of(code, parameter)
        if len(covered) < _FEWEST:
            continue
        groups = np.array_split(np.argsort(width), min(_GROUPS, len(width) // _FEWEST))
        axis.plot(
            [np.median(width[group]) / 2 for group in groups],
            [covered[group].mean() for group in groups],
            marker="o",
            markersize=4,
            color=SYSTEM_COLORS[phase.crystal_system],
            linestyle="-" if parameter == "a" else "--",
            label=f"{phase.name} {parameter} ({UNITS[parameter]})",
        )


def _free_parameters(phases: Sequence[Phase]) -> list[tuple[int, Phase, str]]:
    """Return the free parameters of all phases: code, phase and name of each."""
    return [
        (code, phase, name)
        for code, phase in enumerate(phases)
        for name in phase.lattice.free_parameters
    ]


class Convergence(NamedTuple):
    """Where a refinement ended."""

    start: str  # a key of STARTS; empty where the draw has no fit from the truth to compare with
    phase: int  # the true one
    converged: bool = False  # it fits as well as from the truth
    first: bool = False  # the true phase is the most plausible one
    seconds: float = 0.0


def convergence_table(
    client: Client, model: RegisteredModel, count: int, phases: Sequence[Phase]
) -> ResultTable:
    """Refine draws of each phase, and return where that ends, from which start, and how fast."""
    sizes = task_sizes(count, _REFINED_PER_TASK)
    futures = [
        client.submit(_refine_task, model, task, size, pure=False)
        for task, size in enumerate(sizes)
    ]
    n_draws = [size * len(phases) for size in sizes]
    parts = gather_with_progress(futures, n_draws, "Refining", "draws")
    return summarise([row for part in parts for row in part], count, phases)


def summarise(rows: Sequence[Convergence], count: int, phases: Sequence[Phase]) -> ResultTable:
    """Return a table of the refinements of ``count`` draws of each phase."""
    table = ResultTable(
        f"Correct minimum reached by the refinement, {count} draws of each phase",
        ("from", *(p.name for p in phases), "all", "correct phase\nfirst", "median s", "95 % s"),
        notes=[
            f"The correct minimum fits as well as the one that the truth itself leads to. From "
            f"other starts than the first, one draw in {_REFINED_PER_TASK}."
        ],
    )
    if without_fit := sum(not row.start for row in rows):
        table.notes.append(f"{without_fit} draws are left out: even the truth leads to no fit.")
    for start, label in STARTS.items():
        of_start = [row for row in rows if row.start == start]
        if not of_start:
            continue
        by_phase = [[r.converged for r in of_start if r.phase == c] for c in range(len(phases))]
        seconds = [row.seconds for row in of_start]
        table.add(
            label,
            *(f"{np.mean(values):.1%}" if values else "" for values in by_phase),
            f"{np.mean([row.converged for row in of_start]):.1%}",
            f"{np.mean([row.first for row in of_start]):.1%}",
            f"{np.median(seconds):.2f}",
            f"{np.percentile(seconds, 95):.2f}",
            style="bold" if start == "both" else "",
        )
    return table


def _refine_task(model: RegisteredModel, task: int, count: int) -> list[Convergence]:
    """Refine draws from all starts, and compare with the fit from the truth."""
    loaded, draws = _draws_of_phases(model, Purpose.REFINEMENT, task, count)
    refiner, samples = loaded.refiner, loaded.predictor.campaign.samples
    generator = np.random.default_rng(random_stream(Purpose.REFINEMENT_STARTS, 0, task))
    codes = range(len(loaded.predictor.campaign.phases))
    cells = [samples.cells[samples.phase == code] for code in codes]
    factor, addend = _SAME_MINIMUM
    results = []
    for row, gridded, prepared in prepared_profiles(draws):
        if prepared is None:
            continue
        phase = int(draws.phase[row])
        _, from_model, from_library = starts_of(loaded, gridded, prepared)
        starts = {
            "both": from_model + from_library,
            "model": from_model,
            "library": from_library,
            "centre": [(c, np.median(cells[c], axis=0)) for c in codes],
            "random": [(c, cells[c][generator.integers(len(cells[c]))]) for c in codes],
        }
        truth = refine_or_none(refiner, gridded, [(phase, draws.cells[row])])
        if not truth:
            results.append(Convergence("", phase))
            continue
        for name, start in starts.items():
            if start and (name == "both" or row % count == 0):  # one of each phase in a task
                began = time.perf_counter()
                fits = refine_or_none(refiner, gridded, start)
                seconds = time.perf_counter() - began
                chi2 = [fit.chi2 for fit in fits if fit.phase == phase]
                converged = bool(chi2) and chi2[0] < factor * truth[0].chi2 + addend
                first = bool(fits) and fits[0].phase == phase
                results.append(Convergence(name, phase, converged, first, seconds))
    return results
