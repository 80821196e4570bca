"""Compare the fast simulator with GSAS-II on random cells of your own campaign."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from distributed import as_completed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from bragg_data.campaign import Campaign, Samples, load_campaign
from bragg_data.simulation import gsas2, kinematic
from bragg_data.store.repository import storage_errors
from pipelines.cli.console import Progress, console, next_commands, run, say
from pipelines.cli.style import SYSTEM_COLORS
from pipelines.cluster.client import open_client
from pipelines.inspect import free_text
from pipelines.simulation.simulator_choice import choose, confirm, gsas2_options
from pipelines.simulation.worker import (
    Gsas2Options,
    Recipe,
    SimulationError,
    build_simulator,
    recipe_of,
    simulate_samples,
)

_REPEATS = 32  # of the fast simulator, in which a handful of patterns says nothing about the speed


@dataclass(frozen=True)
class Comparison:
    """Patterns by both simulators.

    Attributes
    ----------
    samples
        The n cells.
    fast, reference : shape (n, points)
        Patterns by the fast simulator and by GSAS-II.
    fast_seconds, reference_seconds : shape (n,)
        Time of one core for each of them.
    version
        Of GSAS-II, and of what is done with it.
    """

    samples: Samples
    fast: NDArray[np.float32]
    reference: NDArray[np.float32]
    fast_seconds: NDArray[np.float64]
    reference_seconds: NDArray[np.float64]
    version: str

    @property
    def gsas2(self) -> str:
        """GSAS-II with its version."""
        return self.version.partition(", ")[2]

    @property
    def maximum(self) -> NDArray[np.float64]:
        """Largest difference over the maximum of GSAS-II's pattern, shape (n,)."""
        difference = np.abs(self.fast - self.reference.astype(np.float64))
        return np.asarray(difference.max(axis=1) / self.reference.max(axis=1))

    @property
    def l2(self) -> NDArray[np.float64]:
        """L2 norm of the difference over that of GSAS-II's pattern, shape (n,)."""
        reference = self.reference.astype(np.float64)
        return np.asarray(
            np.linalg.norm(self.fast - reference, axis=1) / np.linalg.norm(reference, axis=1)
        )


def draw_cells(campaign: Campaign, count: int, generator: np.random.Generator) -> Samples:
    """Draw some cells of each phase from a campaign's samples, without replacement."""
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

    Raises
    ------
    SimulationError
        If there is no GSAS-II, or it fails on a pattern.
    """
    fast, fast_seconds = _fast(campaign, samples)
    reference = np.empty_like(fast)
    seconds = np.empty(len(samples))
    with open_client("local", workers=workers) as client:
        recipe, core_hours = choose("gsas2", campaign, samples, options, client)
        confirm(core_hours, yes=yes)
        futures = {
            client.submit(_timed, recipe, samples[np.array([row])], pure=False): row
            for row in range(len(samples))
        }
        with Progress("Simulating with GSAS-II", len(samples), "patterns") as progress:
            for future in as_completed(futures):
                row = futures[future]
                found = future.result()
                if isinstance(found, gsas2.PatternsError):
                    raise SimulationError(
                        f"GSAS-II fails on {_name(campaign, samples, row)}: {found.reasons[0]}."
                    )
                reference[row], seconds[row] = found
                progress.advance()
    return Comparison(samples, fast, reference, fast_seconds, seconds, recipe.version)


def _timed(
    recipe: Recipe, sample: Samples
) -> tuple[NDArray[np.float32], float] | gsas2.PatternsError:
    simulator = build_simulator(recipe)
    assert isinstance(simulator, gsas2.Simulator)
    simulator.prepare(int(sample.phase[0]))  # what a campaign does once does not count
    began = time.perf_counter()
    try:
        pattern = simulate_samples(recipe, sample)
    except gsas2.PatternsError as error:
        return error  # what is raised in Dask's workers they write to the terminal
    return pattern[0], time.perf_counter() - began


def _fast(campaign: Campaign, samples: Samples) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
    patterns = simulate_samples(recipe, samples)
    seconds = np.empty(len(samples))
    for code in np.unique(samples.phase):
        rows = np.flatnonzero(samples.phase == code)
        many = samples[np.resize(rows, _REPEATS * len(rows))]
        began = time.perf_counter()
        simulate_samples(recipe, many)
        seconds[rows] = (time.perf_counter() - began) / len(many)
    return patterns, seconds


def _name(campaign: Campaign, samples: Samples, row: int) -> str:
    phase = campaign.phases[samples.phase[row]]
    return f"{phase.name}, {free_text(samples.cells[row], phase)}"


def draw_extremes(campaign: Campaign, found: Comparison, file: Path) -> None:
    """Draw both patterns and their difference, where they agree best and where worst, to a PNG."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    ordered = np.argsort(found.maximum)
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 3, 1))
    for title, row, axes in (
        ("Best", int(ordered[0]), panels[:2]),
        ("Worst", int(ordered[-1]), panels[2:]),
    ):
        _draw(campaign, found, row, title, axes)
    panels[-1].set_xlabel("time of flight / ms")
    figure.suptitle(f"{campaign.name}: fast simulator and {found.gsas2}")
    with storage_errors(f"writing {file}"):
        figure.savefig(file, format="png", dpi=150)


def _draw(
    campaign: Campaign, found: Comparison, row: int, title: str, axes: Sequence[Axes]
) -> None:
    tof = campaign.grid.tof / 1000
    reference, fast = found.reference[row], found.fast[row]
    top = float(reference.max())
    color = SYSTEM_COLORS[campaign.phases[found.samples.phase[row]].crystal_system]
    above, below = axes
    above.plot(tof, reference / top, color="0.15", linewidth=1.6, label="GSAS-II")
    above.plot(tof, fast / top, color=color, linewidth=0.8, label="fast simulator")
    above.set_title(f"{title}: {_name(campaign, found.samples, row)}", loc="left", fontsize=10)
    above.set_ylabel("intensity / max")
    above.legend(loc="upper left", frameon=False, fontsize=9)
    scale = 10 ** np.floor(np.log10(max(float(found.maximum[row]), 1e-12)))
    below.plot(tof, (fast.astype(np.float64) - reference) / top / scale, color=color, linewidth=0.8)
    below.axhline(0, color="0.7", linewidth=0.6, zorder=0)
    below.set_ylabel(f"difference\n/ {scale:.0e} max")
    below.set_xlim(tof[0], tof[-1])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)


def _show(campaign: Campaign, found: Comparison) -> None:
    table = Table(title=f"Fast simulator {kinematic.VERSION} and {found.gsas2}")
    for heading in ("phase", "crystal system"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "cells", "max |Δ| / max\nmedian", "\nworst", "relative L2\nworst", "GSAS-II\ns/pattern",
        "fast\nms/pattern", "times\nfaster",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for code, phase in enumerate(campaign.phases):
        rows = found.samples.phase == code
        if not rows.any():
            continue
        slow, quick = (
            float(np.median(seconds[rows]))
            for seconds in (found.reference_seconds, found.fast_seconds)
        )
        table.add_row(
            phase.name,
            phase.crystal_system.name,
            str(int(rows.sum())),
            f"{np.median(found.maximum[rows]):.1e}",
            f"{found.maximum[rows].max():.1e}",
            f"{found.l2[rows].max():.1e}",
            f"{slow:.2f}",
            f"{1000 * quick:.2f}",
            f"{slow / quick:,.0f}",
        )
    console.print(table)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    campaign: Annotated[
        str, typer.Option(metavar="NAME|FILE.toml", help="A built-in campaign, or a file.")
    ] = "batio3-nomad",
    cells: Annotated[int, typer.Option(min=1, help="Random cells of each phase.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of the random choice.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    png: Annotated[Path, typer.Option(metavar="FILE", help="Figure to write.")] = Path(
        "compare_simulators.png"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Begin without asking.")] = False,
    gsas2_path: Annotated[
        Path | None,
        typer.Option(
            envvar="BRAGG_GSAS2_PATH",
            help="Directory that holds the package GSASII, where Python does not find it.",
        ),
    ] = None,
    pattern_limit: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Time limit of a GSAS-II pattern.")
    ] = gsas2.PATTERN_SECONDS,
) -> None:
    """Compare the fast simulator with GSAS-II on random cells of a campaign.

    May the fast simulator be trusted with your structure and your instrument? The table tells the
    differences and the times, the figure shows the best and the worst pattern.
    """
    loaded = load_campaign(campaign)
    if png.is_dir() or not png.parent.is_dir():
        raise SimulationError(f"{png} cannot be written: name a file in a directory that exists.")
    samples = draw_cells(loaded, cells, np.random.default_rng(seed))
    options = gsas2_options(gsas2_path, pattern_limit)
    found = compare(loaded, samples, options, workers=workers, yes=yes)
    _show(loaded, found)
    draw_extremes(loaded, found, png)
    worst = int(np.argmax(found.maximum))
    say(
        f"Largest difference: {found.maximum[worst]:.1e} of the maximum, at "
        f"{_name(loaded, samples, worst)}"
    )
    say(f"Drawn: the best and the worst of {len(samples)} patterns in {escape(str(png))}")
    named = f"--campaign {shlex.quote(campaign)}"
    next_commands(
        [
            (
                f"python -m pipelines.simulate --simulator kinematic {named}",
                "simulate the campaign with the fast one",
            ),
            (
                f"python -m pipelines.simulate --simulator gsas2 {named}",
                "or with GSAS-II",
            ),
        ]
    )


if __name__ == "__main__":
    run(app)
