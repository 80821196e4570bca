"""Measure the fast simulator: patterns per second, fidelity, and the ratio to GSAS-II.

    python benchmarks/simulate.py [--threads N] [--repeats N] [--call-paths CELLS]

Patterns per second are medians over the repeats, for each crystal system, with the nominal widths
and with every per-sample vector in use. Fidelity is against the 36 GSAS-II patterns in tests/data,
and the seconds that GSAS-II took for each of them are stored with them. With ``--call-paths`` the
two ways to call GSAS-II are timed instead, on some cells of each phase.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.crystallography.cell import CrystalSystem
from bragg_data.simulation import gsas2
from bragg_data.simulation.kinematic import Simulator

REFERENCE = Path(__file__).parents[1] / "tests" / "data" / "gsas2_reference_nomad_bank4.npz"
ROWS = 512


def vectors(n: int, difc: float, tzero: float) -> dict[str, NDArray[np.float64]]:
    """Draw every per-sample vector over realistic ranges."""
    rng = np.random.default_rng(0)
    return {
        "u_scale": rng.uniform(0.7, 1.4, n),
        "size": rng.uniform(0.35, 2.0, n),
        "microstrain": rng.uniform(400, 2500, n),
        "tzero": rng.normal(tzero, 2.0, n),
        "difc": difc * (1 + rng.normal(0, 3e-4, n)),
        "width_scale": rng.uniform(0.95, 1.05, n),
    }


def rate(simulator: Simulator, jobs: list[dict[str, Any]], threads: int, repeats: int) -> float:
    """Return patterns per second: the median over repeats of all jobs on some threads."""
    count = sum(len(job["cells"]) for job in jobs)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: simulator.simulate(**job), jobs))  # compiles, builds operators
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(lambda job: simulator.simulate(**job), jobs))
            seconds.append(time.perf_counter() - began)
    return count / float(np.median(seconds))


def compare_call_paths(campaign: Campaign, cells: int) -> Table:
    """Return the seconds per pattern of both ways to call GSAS-II, in turn, and their ratio."""
    simulator = gsas2.Simulator(*campaign.setup)
    table = Table(title=simulator.version)
    for column in ("phase", "in memory, s", "scripting, s", "ratio of medians", "of each: worst"):
        table.add_column(column, justify="right")
    for code, phase in enumerate(campaign.phases):
        rows = np.flatnonzero(campaign.samples.phase == code)
        simulator.check(code, campaign.samples.cells[rows[0]])  # starts it, prepares both projects
        chosen = np.random.default_rng(0).choice(rows, cells, replace=False)
        checks = [simulator.check(code, cell) for cell in campaign.samples.cells[chosen]]
        seconds = np.array([(check.memory_seconds, check.scripting_seconds) for check in checks])
        memory, scripting = np.median(seconds, axis=0)
        both = f"{memory:.2f}", f"{scripting:.2f}", f"{memory / scripting:.0%}"
        table.add_row(phase.name, *both, f"{(seconds[:, 0] / seconds[:, 1]).max():.0%}")
    simulator.close()
    return table


def main(
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    call_paths: Annotated[int, typer.Option(help="Cells of each phase.")] = 0,
) -> None:
    campaign = load_campaign("batio3-nomad")
    if call_paths:
        Console(width=100).print(compare_call_paths(campaign, call_paths))
        return
    samples = campaign.samples
    simulator = Simulator(*campaign.setup)
    with np.load(REFERENCE) as file:
        reference = {name: file[name] for name in file}
    phase = np.array([CrystalSystem[str(s)].value for s in reference["crystal_system"]])
    cells = np.empty((len(phase), 6))
    for code, of_campaign in enumerate(campaign.phases):
        rows = phase == code
        free = [reference[name][rows] for name in of_campaign.lattice.free_parameters]
        cells[rows] = of_campaign.lattice.cells(np.stack(free, axis=1))

    table = Table(title=f"Fast simulator, {threads} threads, median of {repeats}")
    headings = "phase,patterns/s,every vector,GSAS-II s/pattern,times faster"
    for column in [*headings.split(","), "max |Δ| / max", "relative L2", "scale"]:
        table.add_column(column, justify="right")
    with threadpool_limits(limits=1):
        ours = simulator.simulate(phase, cells)
        for code, of_campaign in enumerate(campaign.phases):
            chosen = np.resize(np.flatnonzero(samples.phase == code), 2 * threads * ROWS)
            jobs: list[dict[str, Any]] = [
                {"phase": samples.phase[rows], "cells": samples.cells[rows]}
                for rows in chosen.reshape(-1, ROWS)
            ]
            plain = rate(simulator, jobs, threads, repeats)
            drawn = vectors(ROWS, campaign.instrument.difc, campaign.instrument.tzero)
            varied_jobs = [job | drawn for job in jobs[:threads]]
            varied = rate(simulator, varied_jobs, threads, min(repeats, 3))
            rows = phase == code
            theirs = reference["y"][rows].astype(np.float64)
            difference = np.abs(ours[rows] - theirs)
            seconds = float(np.median(reference["cpu_seconds"][rows]))
            l2 = np.linalg.norm(difference, axis=1) / np.linalg.norm(theirs, axis=1)
            scale = (ours[rows] * theirs).sum(axis=1) / (theirs**2).sum(axis=1)
            worst = (difference.max(axis=1) / theirs.max(axis=1)).max()
            # GSAS-II on as many cores would share the work as well.
            times = f"{seconds:.2f}", f"{plain * seconds / threads:,.0f}"
            fidelity = f"{worst:.1e}", f"{l2.max():.1e}", f"{scale.mean():.6f}"
            table.add_row(of_campaign.name, f"{plain:,.0f}", f"{varied:,.0f}", *times, *fidelity)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
