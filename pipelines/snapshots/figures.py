"""Pictures of the patterns of a snapshot."""

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bragg_data.store import schema
from pipelines.cli.style import SYSTEM_COLORS, free_parameters_text


def draw_patterns(dataset: xr.Dataset, file: Path) -> None:
    """Draw two patterns of each phase, the cell nearest to the CIF's and the first, to a PNG."""
    campaign = schema.campaign_of(dataset)
    samples = schema.samples_of(dataset)
    present = [code for code in range(len(campaign.phases)) if (samples.phase == code).any()]
    figure = Figure(figsize=(10, 1.0 + 2.2 * len(present)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(present), sharex=True))
    time_of_flight = dataset.tof.values / 1000
    for axis, code in zip(axes, present, strict=True):
        phase = campaign.phases[code]
        rows = np.flatnonzero(samples.phase == code)
        nearest = rows[np.argmin(np.linalg.norm(samples.cells[rows] - phase.cell, axis=1))]
        color = SYSTEM_COLORS[phase.crystal_system]
        for row in dict.fromkeys((rows[0], nearest)):
            intensity = dataset.intensity[int(row)].values
            style = {"color": color, "lw": 1.0} if row == nearest else {"color": "0.65", "lw": 0.7}
            label = free_parameters_text(samples.cells[row], phase)
            axis.plot(time_of_flight, intensity, label=label, **style)
            if row == nearest:
                axis.fill_between(time_of_flight, intensity, color=color, alpha=0.12, linewidth=0)
        # Few and weak peaks at short times leave room there.
        axis.legend(
            loc="upper left",
            title=f"{phase.name}, {phase.space_group}",
            title_fontproperties={"weight": "bold", "size": 10},
            alignment="left",
            frameon=False,
            fontsize=9,
        )
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlim(time_of_flight[0], time_of_flight[-1])
    axes[-1].set_xlabel("time of flight / ms")
    figure.supylabel("intensity per µs (arbitrary scale)", fontsize=10)
    figure.suptitle(f"{dataset.attrs['tag']}  ({dataset.sizes['sample']:,} patterns)", fontsize=11)
    scale = axes[0].twiny()
    to_d, to_tof = campaign.instrument.d_spacing_from_tof, campaign.instrument.tof_from_d_spacing
    low, high = to_d(dataset.tof.values[[0, -1]])
    ticks = MaxNLocator(10).tick_values(low, high)
    ticks = ticks[(ticks > low) & (ticks < high)]
    scale.set_xlim(axes[-1].get_xlim())
    scale.set_xticks(to_tof(ticks) / 1000, [f"{tick:.3g}" for tick in ticks], fontsize=8)
    scale.set_xlabel("d / Å")
    scale.spines["right"].set_visible(False)
    figure.savefig(file, format="png", dpi=150)
