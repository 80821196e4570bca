"""Figures of predictions: measurement, calculated pattern of the predicted cell, and difference."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import fit_cells, reflection_positions
from bragg_data.refinement.result import PatternFit
from pipelines.cli.style import SYSTEM_COLORS, free_parameters_text
from pipelines.prediction.workflow import PredictedProfile

MAX_PANELS = 12  # predictions in one figure
_MEASURED, _DIFFERENCE = "#4d4d4d", "#8a8a8a"


def prediction_figure(profiles: Sequence[PredictedProfile]) -> Figure:
    """Draw predictions (Fig. 6 of the paper) below each other, the first :data:`MAX_PANELS`."""
    panels = []
    for profile in profiles[:MAX_PANELS]:
        gridded, phase, cell = profile.measurement.gridded, profile.phase, profile.cell
        campaign, best = profile.campaign, profile.fit
        if best is None:
            code = profile.prediction.phase[profile.row]
            (fit,) = fit_cells(campaign, [code], cell[None], [gridded])
            note = f"p {float(profile.prediction.probabilities[profile.row].max()):.3f}"
        else:
            note = "refined"
            phase, cell, fit = profile.phases[best.phase], best.cell, best.pattern_fit
        system = phase.crystal_system.name
        values = free_parameters_text(cell, phase, ".4f")
        title = f"{profile.measurement.profile.name}: {system}, {values} ({note})"
        panels.append(Panel(gridded, fit, title, phase, cell, campaign))
    return draw(panels)


class Panel(NamedTuple):
    """A measurement with its calculated pattern, if there is one, of a phase and its cell."""

    gridded: GriddedProfile
    fit: PatternFit | None
    title: str  # R_wp is added
    phase: Phase
    cell: Array  # shape (6,)
    campaign: Campaign

    def draw(self, axis: Axes) -> None:
        """Draw both with the reflections, and the difference below."""
        gridded, fit, title, phase, cell, campaign = self
        tof, color = campaign.grid.tof, SYSTEM_COLORS[phase.crystal_system]
        measured = np.where(gridded.covered, gridded.intensity, np.nan)
        axis.plot(tof, measured, ".", color=_MEASURED, markersize=2, label="measured")
        top, low = float(np.nanmax(measured)), float(np.nanmin(measured))
        height = max(top - low, 1e-300)
        if fit is not None:
            axis.plot(tof, fit.calculated, color=color, linewidth=1, label="calculated")
            axis.plot(tof, fit.background, ":", color=color, linewidth=0.8, label="background")
            foot = low - 0.06 * height
            ticks = reflection_positions(phase, cell, campaign)[0]
            axis.vlines(ticks, foot - 0.04 * height, foot, color=color, linewidth=0.6)
            middle = foot - 0.08 * height - float(np.nanmax(np.abs(fit.difference)))
            axis.axhline(middle, color=_DIFFERENCE, linewidth=0.5)
            shifted = fit.difference + middle
            axis.plot(tof, shifted, color=_DIFFERENCE, linewidth=0.7, label="difference")
            title += f", Rwp {100 * fit.rwp:.1f} %"
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_ylabel("intensity")
        axis.set_xlim(tof[0], tof[-1])
        axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)


def draw(panels: Sequence[Panel]) -> Figure:
    """Draw measurements with calculated patterns, reflections and differences below each other."""
    figure = Figure(figsize=(11, 0.4 + 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=True):
        panel.draw(axis)
    axes[-1].set_xlabel("time of flight (µs)")
    return figure
