"""Pictures of the patterns of a designed campaign."""

from pathlib import Path
from typing import TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bragg_data.arrays import Array
from bragg_data.campaign_design import CampaignDesign
from pipelines.cli.style import SYSTEM_COLORS, free_parameters_text


class Style(TypedDict):
    """How a line is drawn."""

    color: str
    lw: float


_PANELS = 8  # phases at most
_STYLES: dict[str, Style] = {
    "smallest": {"color": "0.7", "lw": 0.6},
    "largest": {"color": "0.5", "lw": 0.6},
}


def draw_design(design: CampaignDesign, file: Path) -> None:
    """Draw patterns of each phase to a PNG: the CIF's cell, the smallest and the largest one.

    With ticks at the lines of the CIF's cell, and the measured profile if there is one. Of many
    phases the first eight.
    """
    campaign = design.campaign
    phases, grid = campaign.phases[:_PANELS], campaign.grid
    figure = Figure(figsize=(10, 1.2 + 2.4 * len(phases)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(phases), sharex=True))
    tof = grid.tof / 1000
    examples = design.examples[: len(phases)]
    for axis, phase, example in zip(axes, phases, examples, strict=True):
        shown, patterns, d = example.cells, example.patterns, example.d_spacings
        color = SYSTEM_COLORS[phase.crystal_system]
        if design.measured is not None:
            _draw_measured(axis, design, float(patterns[2].max()))
        for name, cell, pattern in zip(
            ("smallest", "largest", "CIF"), shown, patterns, strict=True
        ):
            style = _STYLES.get(name, {"color": color, "lw": 1.0})
            label = f"{name}: {free_parameters_text(cell, phase, '.5g')}"
            axis.plot(tof, pattern, label=label, **style)
        lines = campaign.instrument.tof_from_d_spacing(d) / 1000
        low = -0.06 * float(patterns[2].max())
        axis.vlines(lines, 2 * low, low, color=color, lw=0.5)
        axis.legend(
            loc="upper left",
            title=f"{phase.name}, {phase.space_group}, {len(d)} lines",
            title_fontproperties={"weight": "bold", "size": 9},
            alignment="left",
            fontsize=8,
            edgecolor="none",
            framealpha=0.8,
        )
        axis.set_ylim(2.3 * low, 1.05 * float(patterns.max()))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_yticks([tick for tick in axis.get_yticks() if 0 <= tick <= patterns.max()])
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlim(tof[0], tof[-1])
    axes[-1].set_xlabel("time of flight / ms")
    figure.supylabel("intensity per µs (arbitrary scale)", fontsize=9)
    figure.suptitle(f"{design.name}: {campaign.description}", fontsize=9, wrap=True)
    _draw_d_scale(axes[0], design, tof)
    figure.savefig(file, format="png", dpi=130)


def _draw_measured(axis: Axes, design: CampaignDesign, height: float) -> None:
    """Draw the measured profile in units of a pattern's highest peak, its lowest point at 0."""
    profile, grid = design.measured, design.campaign.grid
    assert profile is not None
    inside = (profile.tof >= grid.start) & (profile.tof <= grid.stop) & (profile.sigma > 0)
    if inside.sum() < 2:
        return
    y = profile.intensity[inside]
    floor = np.quantile(y, 0.02)
    y = (y - floor) * height / max(np.quantile(y, 0.9995) - floor, 1e-300)
    axis.plot(profile.tof[inside] / 1000, y, ".", color="0.35", ms=1.5, label="measured", zorder=0)


def _draw_d_scale(axis: Axes, design: CampaignDesign, tof: Array) -> None:
    instrument = design.campaign.instrument
    low, high = instrument.d_spacing_from_tof(1000 * tof[[0, -1]])
    ticks = MaxNLocator(10).tick_values(low, high)
    ticks = ticks[(ticks > low) & (ticks < high)]
    scale = axis.twiny()
    scale.set_xlim(tof[0], tof[-1])
    scale.set_xticks(
        instrument.tof_from_d_spacing(ticks) / 1000, [f"{tick:.3g}" for tick in ticks], fontsize=8
    )
    scale.set_xlabel("d / Å", fontsize=9)
    scale.spines["right"].set_visible(False)
