"""Compare the fast simulator with GSAS-II: patterns, differences, times, and a figure."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from bragg_data.arrays import Array, Floats32
from bragg_data.campaign import Campaign, Samples
from bragg_data.simulation import gsas2, kinematic
from bragg_data.simulation.gsas2 import Gsas2Options
from bragg_data.store.repository import storage_errors
from pipelines.cli.console import console
from pipelines.cli.style import SYSTEM_COLORS, free_parameters_text
from pipelines.cluster.client import gather_with_progress, open_client
from pipelines.simulation import simulators
from pipelines.simulation.simulators import Recipe, SimulationError, recipe_of, simulate_samples

_REPEATS = 32  # of the fast simulator: a handful of patterns is too few to time it


@dataclass(frozen=True)
class Comparison:
    """Patterns of n cells by both simulators, and the time of one core for each of them."""

    samples: Samples
    fast: Floats32  # shape (n, points)
    reference: Floats32  # shape (n, points), by GSAS-II
    fast_seconds: Array  # shape (n,)
    reference_seconds: Array
    version: str  # of the interface to GSAS-II and of GSAS-II, as 1, GSAS-II 5838

    @property
    def gsas2(self) -> str:
        """GSAS-II with its version."""
        return self.version.partition(", ")[2]

    @property
    def maximum(self) -> Array:
        """Largest difference over the maximum of GSAS-II's pattern, shape (n,)."""
        difference = np.abs(self.fast - self.reference.astype(np.float64))
        return np.asarray(difference.max(axis=1) / self.reference.max(axis=1))

    @property
    def l2(self) -> Array:
        """L2 norm of the difference over that of GSAS-II's pattern, shape (n,)."""
        reference = self.reference.astype(np.float64)
        return np.asarray(
            np.linalg.norm(self.fast - reference, axis=1) / np.linalg.norm(reference, axis=1)
        )


def draw_cells(campaign: Campaign, count: int, generator: np.random.Generator) -> Samples:
    """Draw `count` cells of each phase from a campaign's samples, without replacement."""
    samples = campaign.samples
    rows = []
    for code in range(len(campaign.phases)):
        of_phase = np.flatnonzero(samples.phase == code)
        rows.append(generator.choice(of_phase, min(count, len(of_phase)), replace=False))
    return samples[np.concatenate(rows)]


def compare(
    campaign: Campaign,
    samples: Samples,
    options: Gsas2Options,
    *,
    workers: int | None = None,
    yes: bool = False,
) -> Comparison:
    """Simulate samples with both simulators, GSAS-II on the cores of this machine.

    Raises `SimulationError` if there is no GSAS-II, or it fails on a pattern.
    """
    fast, fast_seconds = _fast(campaign, samples)
    with open_client("local", workers=workers) as client:
        recipe, core_hours = simulators.choose("gsas2", campaign, samples, options, client)
        simulators.confirm(core_hours, yes=yes)
        futures = [
            client.submit(_timed, recipe, samples[np.array([row])], pure=False)
            for row in range(len(samples))
        ]
        sizes = [1] * len(futures)
        results = gather_with_progress(futures, sizes, "Simulating with GSAS-II", "patterns")
    for row, result in enumerate(results):
        if isinstance(result, gsas2.PatternsError):
            cell = cell_text(campaign, samples, row)
            raise SimulationError(f"GSAS-II fails on {cell}: {result.reasons[0]}.")
    reference, seconds = (np.array(values) for values in zip(*results, strict=True))
    return Comparison(samples, fast, reference, fast_seconds, seconds, recipe.version)


def _timed(recipe: Recipe, sample: Samples) -> tuple[Floats32, float] | gsas2.PatternsError:
    simulator = simulators.build_simulator(recipe)
    if isinstance(simulator, gsas2.Simulator):
        simulator.prepare(int(sample.phase[0]))  # once per campaign: not part of the time
    began = time.perf_counter()
    try:
        pattern = simulate_samples(recipe, sample)
    except gsas2.PatternsError as error:
        return error  # Dask's workers print exceptions to the terminal
    return pattern[0], time.perf_counter() - began


def _fast(campaign: Campaign, samples: Samples) -> tuple[Floats32, Array]:
    recipe = recipe_of(campaign)
    patterns = simulate_samples(recipe, samples)
    seconds = np.empty(len(samples))
    for code in np.unique(samples.phase):
        rows = np.flatnonzero(samples.phase == code)
        many = samples[np.resize(rows, _REPEATS * len(rows))]
        began = time.perf_counter()
        simulate_samples(recipe, many)
        seconds[rows] = (time.perf_counter() - began) / len(many)
    return patterns, seconds


def cell_text(campaign: Campaign, samples: Samples, row: int) -> str:
    """Return phase and free cell parameters of a sample: ``cubic, a = 4 Å``."""
    phase = campaign.phases[samples.phase[row]]
    return f"{phase.name}, {free_parameters_text(samples.cells[row], phase)}"


def draw_extremes(campaign: Campaign, comparison: Comparison, file: Path) -> None:
    """Draw the samples with the smallest and the largest difference to a PNG file."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    ordered = np.argsort(comparison.maximum).tolist()
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 3, 1))
    _draw(campaign, comparison, ordered[0], "Best", panels[:2])
    _draw(campaign, comparison, ordered[-1], "Worst", panels[2:])
    panels[-1].set_xlabel("time of flight / ms")
    figure.suptitle(f"{campaign.name}: fast simulator and {comparison.gsas2}")
    with storage_errors(f"writing {file}"):
        figure.savefig(file, format="png", dpi=150)


def _draw(
    campaign: Campaign, comparison: Comparison, row: int, title: str, axes: Sequence[Axes]
) -> None:
    tof = campaign.grid.tof / 1000
    reference, fast = comparison.reference[row], comparison.fast[row]
    top = float(reference.max())
    color = SYSTEM_COLORS[campaign.phases[comparison.samples.phase[row]].crystal_system]
    above, below = axes
    above.plot(tof, reference / top, color="0.15", linewidth=1.6, label="GSAS-II")
    above.plot(tof, fast / top, color=color, linewidth=0.8, label="fast simulator")
    text = cell_text(campaign, comparison.samples, row)
    above.set_title(f"{title}: {text}", loc="left", fontsize=10)
    above.set_ylabel("intensity / max")
    above.legend(loc="upper left", frameon=False, fontsize=9)
    scale = 10 ** np.floor(np.log10(max(float(comparison.maximum[row]), 1e-12)))
    below.plot(tof, (fast.astype(np.float64) - reference) / top / scale, color=color, linewidth=0.8)
    below.axhline(0, color="0.7", linewidth=0.6, zorder=0)
    below.set_ylabel(f"difference\n/ {scale:.0e} max")
    below.set_xlim(tof[0], tof[-1])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)


def print_table(campaign: Campaign, comparison: Comparison) -> None:
    """Print differences and times for each phase."""
    table = Table(title=f"Fast simulator {kinematic.VERSION} and {comparison.gsas2}")
    differences = "max |Δ| / max\nmedian", "\nworst", "relative L2\nworst"
    times = "GSAS-II\ns/pattern", "fast\nms/pattern", "times\nfaster"
    for heading in ("phase", "crystal system", "cells", *differences, *times):
        text = heading in ("phase", "crystal system")
        table.add_column(heading, no_wrap=text, justify="left" if text else "right")
    for code, phase in enumerate(campaign.phases):
        rows = comparison.samples.phase == code
        if not rows.any():
            continue
        slow = float(np.median(comparison.reference_seconds[rows]))
        quick = float(np.median(comparison.fast_seconds[rows]))
        largest, l2 = comparison.maximum[rows], comparison.l2[rows].max()
        errors = f"{np.median(largest):.1e}", f"{largest.max():.1e}", f"{l2:.1e}"
        seconds = f"{slow:.2f}", f"{1000 * quick:.2f}", f"{slow / quick:,.0f}"
        name, count = phase.crystal_system.name, str(int(rows.sum()))
        table.add_row(phase.name, name, count, *errors, *seconds)
    console.print(table)
