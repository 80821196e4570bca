"""Figures of answers: a measurement, what the answer's cell would look like, and the difference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import (
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)
from bragg_data.refinement.result import PatternFit
from pipelines.cli.style import SYSTEM_COLORS, UNITS
from pipelines.prediction.predict import Answer

MOST_PANELS = 12
"""Answers in one figure."""

_MEASURED, _DIFFERENCE = "#4d4d4d", "#8a8a8a"


def overlays(answers: Sequence[Answer], campaign: Campaign) -> list[PatternFit | None]:
    """Simulate each answer's cell and lay it over its measurement; None where there is no cell.

    Of a refined answer it is the refinement's.
    """
    found = [one.refined[0].pattern_fit if one.refined else None for one in answers]
    rows = [
        row for row, one in enumerate(answers) if not one.refined and np.isfinite(one.cell).all()
    ]
    if rows:
        patterns = simulator_of(campaign).simulate(
            np.array([answers[row].prediction.phase[answers[row].row] for row in rows]),
            np.stack([answers[row].cell for row in rows]),
        )
        for row, pattern in zip(rows, patterns, strict=True):
            found[row] = fit_scale_and_background(answers[row].measurement.gridded, pattern)
    return found


def answers_figure(answers: Sequence[Answer], campaign: Campaign) -> Figure:
    """Draw answers (the paper's Fig. 6): one below the other, the first ones if there are many."""
    shown = answers[:MOST_PANELS]
    figure = Figure(figsize=(11, 0.4 + 3.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False).ravel()
    for axis, one, overlay in zip(axes, shown, overlays(shown, campaign), strict=True):
        title = f"{one.measurement.profile.name}: {describe(one)}"
        phase, cell = shown_cell(one)
        draw(axis, campaign.grid.tof, one.measurement.gridded, overlay, title=title,
             color=SYSTEM_COLORS[phase.crystal_system],
             ticks=reflection_positions(phase, cell, campaign)[0] if overlay
             else np.empty(0))  # fmt: skip
    axes[-1].set_xlabel("time of flight (µs)")
    return figure


def shown_cell(answer: Answer) -> tuple[Phase, NDArray[np.float64]]:
    """Return the phase and cell that are drawn: the refined ones if there are any."""
    if answer.refined:
        return answer.phases[answer.refined[0].phase], answer.refined[0].cell
    return answer.phase, answer.cell


def describe(answer: Answer) -> str:
    """Return an answer in a few words: system, free parameters, probability."""
    phase, cell = shown_cell(answer)
    values = ", ".join(
        f"{name} {cell[CELL_PARAMETERS.index(name)]:.4f} {UNITS[name]}"
        for name in phase.lattice.free_parameters
    )
    if answer.refined:
        return f"{phase.crystal_system.name}, {values} (refined)"
    probability = float(answer.prediction.probabilities[answer.row].max())
    return f"{answer.phase.crystal_system.name}, {values} (p {probability:.3f})"


def draw(
    axis: Axes,
    tof: NDArray[np.float64],
    gridded: GriddedProfile,
    overlay: PatternFit | None,
    *,
    title: str,
    color: str,
    ticks: NDArray[np.float64],
) -> None:
    """Draw one measurement with its overlay, peak ticks, and the difference below."""
    measured = np.where(gridded.covered, gridded.intensity, np.nan)
    axis.plot(tof, measured, ".", color=_MEASURED, markersize=2, label="measured")
    top, low = float(np.nanmax(measured)), float(np.nanmin(measured))
    height = max(top - low, 1e-300)
    if overlay is not None:
        axis.plot(tof, overlay.calculated, color=color, linewidth=1, label="calculated")
        axis.plot(tof, overlay.background, color=color, linewidth=0.8, linestyle=":",
                  label="background")  # fmt: skip
        foot = low - 0.06 * height
        axis.vlines(ticks, foot - 0.04 * height, foot, color=color, linewidth=0.6)
        spread = float(np.nanmax(np.abs(overlay.difference)))
        middle = foot - 0.08 * height - spread
        axis.axhline(middle, color=_DIFFERENCE, linewidth=0.5)
        axis.plot(tof, overlay.difference + middle, color=_DIFFERENCE, linewidth=0.7,
                  label="difference")  # fmt: skip
        title += f", Rwp {100 * overlay.rwp:.1f} %"
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_ylabel("intensity")
    axis.set_xlim(tof[0], tof[-1])
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
