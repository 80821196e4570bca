"""Figures of predictions: measurement, calculated pattern of the predicted cell, and difference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalError, encloses_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import (
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)
from bragg_data.refinement.result import PatternFit, RefinementError
from pipelines.cli.style import SYSTEM_COLORS, UNITS
from pipelines.prediction.workflow import PredictedProfile

MAX_PANELS = 12
"""Predictions in one figure."""

_MEASURED, _DIFFERENCE = "#4d4d4d", "#8a8a8a"


@dataclass(frozen=True, eq=False)
class Panel:
    """A panel of a figure.

    Attributes
    ----------
    title, color
        Title, to which R_wp is added, and colour of the calculated pattern.
    ticks : shape (n,)
        Positions of reflections, in µs.
    """

    title: str
    color: str
    ticks: NDArray[np.float64]


def fit_predictions(
    profiles: Sequence[PredictedProfile], campaign: Campaign
) -> list[PatternFit | None]:
    """Fit the pattern of each predicted cell to its measurement; of a refined one it is known.

    Returns
    -------
    None where there is no cell, it encloses no volume, or its pattern cannot be fitted.
    """
    fits = [profile.refined[0].pattern_fit if profile.refined else None for profile in profiles]
    rows = [
        row
        for row, profile in enumerate(profiles)
        if not profile.refined and encloses_volume(profile.cell[None])[0]
    ]
    if rows:
        patterns = simulator_of(campaign).simulate(
            np.array([profiles[row].prediction.phase[profiles[row].row] for row in rows]),
            np.stack([profiles[row].cell for row in rows]),
        )
        for row, pattern in zip(rows, patterns, strict=True):
            with suppress(RefinementError):
                fits[row] = fit_scale_and_background(profiles[row].measurement.gridded, pattern)
    return fits


def prediction_figure(profiles: Sequence[PredictedProfile], campaign: Campaign) -> Figure:
    """Draw predictions (Fig. 6 of the paper) below each other, the first :data:`MAX_PANELS`."""
    shown = profiles[:MAX_PANELS]
    figure = Figure(figsize=(11, 0.4 + 3.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False).ravel()
    for axis, profile, fit in zip(axes, shown, fit_predictions(shown, campaign), strict=True):
        phase, cell = _best_cell(profile)
        ticks = np.empty(0)
        if fit is not None:
            with suppress(CrystalError):
                ticks = reflection_positions(phase, cell, campaign)[0]
        draw(
            axis,
            campaign.grid.tof,
            profile.measurement.gridded,
            fit,
            Panel(
                f"{profile.measurement.profile.name}: {_caption(profile)}",
                SYSTEM_COLORS[phase.crystal_system],
                ticks,
            ),
        )
    axes[-1].set_xlabel("time of flight (µs)")
    return figure


def _best_cell(profile: PredictedProfile) -> tuple[Phase, NDArray[np.float64]]:
    """Return the refined phase and cell if there are any, else the predicted ones."""
    if profile.refined:
        return profile.phases[profile.refined[0].phase], profile.refined[0].cell
    return profile.phase, profile.cell


def _caption(profile: PredictedProfile) -> str:
    """Return a prediction in a few words: crystal system, free parameters, probability."""
    phase, cell = _best_cell(profile)
    values = ", ".join(
        f"{name} {cell[CELL_PARAMETERS.index(name)]:.4f} {UNITS[name]}"
        for name in phase.lattice.free_parameters
    )
    if profile.refined:
        return f"{phase.crystal_system.name}, {values} (refined)"
    probability = float(profile.prediction.probabilities[profile.row].max())
    return f"{phase.crystal_system.name}, {values} (p {probability:.3f})"


def draw(
    axis: Axes,
    tof: NDArray[np.float64],
    gridded: GriddedProfile,
    fit: PatternFit | None,
    panel: Panel,
) -> None:
    """Draw one measurement with its calculated pattern, reflections, and the difference below.

    Parameters
    ----------
    axis
        Axes of the figure.
    tof : shape (points,)
        The campaign's grid, in µs.
    gridded, fit
        The measurement, and the fit to it, or None.
    panel
        Title, colour and reflections.
    """
    color, title = panel.color, panel.title
    measured = np.where(gridded.covered, gridded.intensity, np.nan)
    axis.plot(tof, measured, ".", color=_MEASURED, markersize=2, label="measured")
    top, low = float(np.nanmax(measured)), float(np.nanmin(measured))
    height = max(top - low, 1e-300)
    if fit is not None:
        axis.plot(tof, fit.calculated, color=color, linewidth=1, label="calculated")
        axis.plot(
            tof, fit.background, color=color, linewidth=0.8, linestyle=":", label="background"
        )
        foot = low - 0.06 * height
        axis.vlines(panel.ticks, foot - 0.04 * height, foot, color=color, linewidth=0.6)
        spread = float(np.nanmax(np.abs(fit.difference)))
        middle = foot - 0.08 * height - spread
        axis.axhline(middle, color=_DIFFERENCE, linewidth=0.5)
        axis.plot(
            tof, fit.difference + middle, color=_DIFFERENCE, linewidth=0.7, label="difference"
        )
        title += f", Rwp {100 * fit.rwp:.1f} %"
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_ylabel("intensity")
    axis.set_xlim(tof[0], tof[-1])
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
