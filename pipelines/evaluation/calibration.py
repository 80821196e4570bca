"""Calibration of a model: are its probabilities and intervals as reliable as they state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase
from bragg_models.metrics import calibration_error, prediction_sets
from bragg_models.networks.robust import COVERAGE
from pipelines.cli.style import SYSTEM_COLORS, UNITS
from pipelines.evaluation.tables import ResultTable

_FEWEST = 5  # predictions of which a share is drawn
_GROUPS = 8  # of intervals, by width
_BINS = 15  # of the probability of the predicted phase


@dataclass(frozen=True, eq=False)
class DrawPredictions:
    """Predictions of a model for n simulated measurements, and the truth."""

    probabilities: NDArray[np.float64]  # of the phases, shape (n, n_phases)
    phase: NDArray[np.intp]  # the truth, shape (n,)
    cells: NDArray[np.float64]  # the truth, shape (n, 6)
    intervals: NDArray[np.float64]  # Å and degrees, shape (n, 6, 2); NaN where not free
    accepted: NDArray[np.bool_]  # whether the model accepts the profile, shape (n,)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the most probable phase is the truth, shape (n,)."""
        return np.asarray(self.probabilities.argmax(axis=1) == self.phase)

    def intervals_of(
        self, code: int, parameter: str
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Return whether a parameter is inside its intervals, and their widths.

        Of the correct predictions of a phase, shape (m,).
        """
        rows, column = self.correct & (self.phase == code), CELL_PARAMETERS.index(parameter)
        low, high = self.intervals[rows, column].T
        cells = self.cells[rows, column]
        return (cells >= low) & (cells <= high), high - low

    def reliability(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return mean probability of the predicted phase, accuracy, and number in filled bins."""
        confidence = self.probabilities.max(axis=1)
        bins = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
        used, number = np.unique(bins, return_counts=True)
        means = [(confidence[bins == b].mean(), self.correct[bins == b].mean()) for b in used]
        probability, accuracy = np.array(means).T
        return probability, accuracy, number.astype(np.float64)


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


def _draw_coverage_by_width(
    axis: Axes, predictions: DrawPredictions, phases: Sequence[Phase]
) -> None:
    for code, phase, parameter in _free_parameters(phases):
        covered, width = predictions.intervals_of(code, parameter)
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
