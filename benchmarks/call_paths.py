"""Measure the two ways to call GSAS-II: seconds per pattern, in turn, and their ratio.

python benchmarks/call_paths.py [--cells 5]
"""

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.campaign import load_campaign
from bragg_data.simulation.gsas2 import Simulator


def main(cells: Annotated[int, typer.Option(min=1, help="Of each phase.")] = 5) -> None:
    campaign = load_campaign("batio3-nomad")
    simulator = Simulator(*campaign.setup)
    table = Table(title=simulator.version)
    for column in ("phase", "in memory, s", "scripting, s", "ratio of medians", "of each: worst"):
        table.add_column(column, justify="right")
    for code, phase in enumerate(campaign.phases):
        rows = np.flatnonzero(campaign.samples.phase == code)
        simulator.check(code, campaign.samples.cells[rows[0]])  # starts it, prepares both projects
        chosen = np.random.default_rng(0).choice(rows, cells, replace=False)
        checks = [simulator.check(code, cell) for cell in campaign.samples.cells[chosen]]
        seconds = [(check.memory_seconds, check.scripting_seconds) for check in checks]
        worst = max(memory / scripting for memory, scripting in seconds)
        memory, scripting = np.median(seconds, axis=0)
        both = f"{memory:.2f}", f"{scripting:.2f}", f"{memory / scripting:.0%}"
        table.add_row(phase.name, *both, f"{worst:.0%}")
    simulator.close()
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
