"""Compare the fast simulator with GSAS-II: patterns, differences, times, and a figure."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
        norm, reference = np.linalg.norm, self.reference.astype(np.float64)
        return np.asarray(norm(self.fast - reference, axis=1) / norm(reference, axis=1))


def draw_cells(campaign: Campaign, count: int, generator: np.random.Generator) -> Samples:
    """Draw `count` cells of each phase from a campaign's samples, without replacement."""
    order = generator.permutation(len(campaign.samples))
    codes = range(len(campaign.phases))
    of_phases = (order[campaign.samples.phase[order] == code][:count] for code in codes)
    return campaign.samples[np.concatenate(list(of_phases))]


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
    fast = simulate_samples(recipe_of(campaign), samples)
    fast_seconds = np.empty(len(samples))
    for code in np.unique(samples.phase):
        rows = np.flatnonzero(samples.phase == code)
        began = time.perf_counter()
        simulate_samples(recipe_of(campaign), samples[np.tile(rows, _REPEATS)])
        fast_seconds[rows] = (time.perf_counter() - began) / (_REPEATS * len(rows))
    with open_client("local", workers=workers) as client:
        recipe, seconds = simulators.choose("gsas2", campaign, samples, options, client)
        simulators.confirm(simulators.estimate(seconds, samples.phase), yes=yes)
        single = [samples[np.array([row])] for row in range(len(samples))]
        futures = client.map(_timed, single, recipe=recipe, pure=False)
        sizes = [1] * len(futures)
        results = gather_with_progress(futures, sizes, "Simulating with GSAS-II", "patterns")
    for row, result in enumerate(results):
        if isinstance(result, gsas2.PatternsError):
            cell = cell_text(campaign, samples, row)
            raise SimulationError(f"GSAS-II fails on {cell}: {result.reasons[0]}.")
    reference, seconds = (np.array(values) for values in zip(*results, strict=True))
    return Comparison(samples, fast, reference, fast_seconds, seconds, recipe.version)


def _timed(sample: Samples, recipe: Recipe) -> tuple[Floats32, float] | gsas2.PatternsError:
    simulator = simulators.build_simulator(recipe)
    if isinstance(simulator, gsas2.Simulator):
        simulator.prepare(int(sample.phase[0]))  # once per campaign: not part of the time
    began = time.perf_counter()
    try:
        pattern = simulate_samples(recipe, sample)
    except gsas2.PatternsError as error:
        return error  # Dask's workers print exceptions to the terminal
    return pattern[0], time.perf_counter() - began


def cell_text(campaign: Campaign, samples: Samples, row: int) -> str:
    """Return phase and free cell parameters of a sample: ``cubic, a = 4 Å``."""
    phase = campaign.phases[samples.phase[row]]
    return f"{phase.name}, {free_parameters_text(samples.cells[row], phase)}"


def draw_extremes(campaign: Campaign, comparison: Comparison, file: Path) -> None:
    """Draw the samples with the smallest and the largest difference to a PNG file."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    ordered = np.argsort(comparison.maximum).tolist()
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 3, 1))
    tof = campaign.grid.tof / 1000
    for title, row, (above, below) in (
        ("Best", ordered[0], panels[:2]),
        ("Worst", ordered[-1], panels[2:]),
    ):
        top = float(comparison.reference[row].max())
        reference, fast = (v[row] / top for v in (comparison.reference, comparison.fast))
        color = SYSTEM_COLORS[campaign.phases[comparison.samples.phase[row]].crystal_system]
        above.plot(tof, reference, color="0.15", linewidth=1.6, label="GSAS-II")
        above.plot(tof, fast, color=color, linewidth=0.8, label="fast simulator")
        text = cell_text(campaign, comparison.samples, row)
        above.set_title(f"{title}: {text}", loc="left", fontsize=10)
        above.set_ylabel("intensity / max")
        above.legend(loc="upper left", frameon=False, fontsize=9)
        below.plot(tof, fast.astype(np.float64) - reference, color=color, linewidth=0.8)
        below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        below.set(ylabel="difference", xlim=(tof[0], tof[-1]))
    for axis in panels:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    panels[-1].set_xlabel("time of flight / ms")
    figure.suptitle(f"{campaign.name}: fast simulator and {comparison.gsas2}")
    with storage_errors(f"writing {file}"):
        figure.savefig(file, format="png", dpi=150)


def print_table(campaign: Campaign, comparison: Comparison) -> None:
    """Print differences and times for each phase."""
    table = Table(title=f"Fast simulator {kinematic.VERSION} and {comparison.gsas2}")
    for heading in ("phase", "crystal system"):
        table.add_column(heading, no_wrap=True)
    numbers = "cells,max |Δ| / max\nmedian,\nworst,relative L2\nworst,"
    numbers += "GSAS-II\ns/pattern,fast\nms/pattern,times\nfaster"
    for heading in numbers.split(","):
        table.add_column(heading, justify="right")
    for code, phase in enumerate(campaign.phases):
        rows = comparison.samples.phase == code
        if not rows.any():
            continue
        of_phase = comparison.reference_seconds, comparison.fast_seconds, comparison.maximum
        slow, quick, median = (float(np.median(values[rows])) for values in of_phase)
        largest, l2 = comparison.maximum[rows].max(), comparison.l2[rows].max()
        errors = f"{median:.1e}", f"{largest:.1e}", f"{l2:.1e}"
        seconds = f"{slow:.2f}", f"{1000 * quick:.2f}", f"{slow / quick:,.0f}"
        count = str(int(rows.sum()))
        table.add_row(phase.name, phase.crystal_system.name, count, *errors, *seconds)
    console.print(table)
