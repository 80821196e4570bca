"""Measure the fast simulator: patterns per second, fidelity, derivatives, refinement, draws.

    python benchmarks/simulate.py [--json] [--threads N] [--repeats N] [--call-paths CELLS]
    python benchmarks/simulate.py --device cuda [--compiled] [--rows N] [--json] [--repeats N]

Patterns per second are medians over the repeats, for each crystal system, with the nominal widths
and with every per-sample vector in use. Fidelity is against the 36 GSAS-II patterns in tests/data,
and the seconds that GSAS-II took for each of them are stored with them. A pattern with all its
derivatives is compared with the same pattern by itself, one at a time. Refinements are of simulated
measurements, from starts near the truth for every phase. With ``--call-paths`` the two ways to call
GSAS-II are timed instead, on some cells of each phase.

With ``--device`` it is the simulator on a device of torch that is measured, alone: patterns per
second that stay on the device, and with the copy to the host; fidelity against GSAS-II and against
the compiled loops of the CPU; and the bytes moved. These are counted: the operands and results of
every operation of torch on the device (a fused one counts once), as if no cache held any of them.
The bandwidth that they are compared with is that of a large copy on the same device.
"""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation import gsas2
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    Draws,
    draw_labels,
    draw_profiles,
    simulator_for,
)

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


def median_seconds(do: Callable[[int], object], count: int) -> list[float]:
    """Return the processor's seconds of each of ``count`` calls, after two that are not counted."""
    for index in (0, 0):
        do(index)
    seconds = []
    for index in range(count):
        began = time.process_time()
        do(index)
        seconds.append(time.process_time() - began)
    return seconds


def derivatives_over_pattern(campaign: Campaign, repeats: int) -> dict[str, float]:
    """Return how many patterns a pattern with all its derivatives costs, for each phase."""
    simulator = Simulator(*campaign.setup, width_range=(-0.4, 1.0))
    ratios = {}
    for code, phase in enumerate(campaign.phases):
        cell = campaign.samples.cells[campaign.samples.phase == code][0]
        free = cell[phase.lattice.free_columns]
        of_sample = {name: v[0] for name, v in vectors(1, *calibration(campaign)).items()}
        modes = len(simulator.free_coordinates(code))
        names = (*of_sample, *(f"shift_{k + 1}" for k in range(modes)))
        values = np.array([*of_sample.values(), *[0.01] * modes])

        def draw(_: int, slopes: bool, code=code, free=free, names=names, values=values) -> object:
            return simulator.linearise(code, free, names, values, slopes=slopes)

        # In turn, as the machine's pace changes.
        pairs = [
            [median_seconds(partial(draw, slopes=slopes), 1)[0] for slopes in (True, False)]
            for _ in range(10 * repeats)
        ]
        both, alone = np.median(pairs, axis=0)
        ratios[f"{phase.lattice.crystal_system.name}, {len(names) + len(free)}"] = both / alone
    return ratios


def measured_looking(campaign: Campaign, per_phase: int, threads: int) -> tuple[Draws, float]:
    """Return draws of every phase with measurement effects, and how many come per second."""
    simulator = simulator_for(campaign)

    def draw(seed: int) -> Draws:
        generator = np.random.default_rng(seed)
        phase, cells = draw_labels(campaign, per_phase, generator)
        return draw_profiles(simulator, phase, cells, generator, campaign.measurement_effects)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, range(threads)))
        began = time.perf_counter()
        draws = list(pool.map(draw, range(2 * threads)))
        seconds = time.perf_counter() - began
    return draws[0], sum(len(part.phase) for part in draws) / seconds


def refinement_seconds(campaign: Campaign, draws: Draws, count: int) -> tuple[list[float], float]:
    """Return the seconds of each refinement against all phases, and the share of right phases."""
    refiner = Refiner(campaign)
    rows = np.random.default_rng(0).choice(len(draws.phase), count, replace=False)
    right = []

    def refine(index: int) -> None:
        row = rows[index]
        profile = GriddedProfile(draws.intensity[row], draws.sigma[row], draws.covered[row])
        cell, truth = draws.cells[row], draws.phase[row]
        length = float(cell[:3].prod() ** (1 / 3))
        near = {"a": 0.999 * length, "c": 1.002 * length, "alpha": 89.9}
        starts = []
        for code, phase in enumerate(campaign.phases):
            free = np.array([near.get(name, length) for name in phase.lattice.free_parameters])
            if code == truth:
                free = cell[phase.lattice.free_columns] * (1 + 3e-4 * (free < 50))
            starts.append((code, phase.lattice.cells(free[None])[0]))
        right.append(refiner.refine(profile, starts)[0].phase == truth)

    seconds = median_seconds(refine, count)
    return seconds, float(np.mean(right[2:]))


def calibration(campaign: Campaign) -> tuple[float, float]:
    """Return difC and Zero."""
    return campaign.instrument.difc, campaign.instrument.tzero


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
    device: Annotated[
        str | None, typer.Option(help="Measure on this device of torch: cuda, cuda:1, cpu.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Fuse operations there: a minute, a C compiler.")
    ] = False,
    per_call: Annotated[
        int, typer.Option("--rows", min=64, help="Samples of a call on the device.")
    ] = 16384,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, no tables.")] = False,
) -> None:
    """Measure the fast simulator on the CPU, or on a GPU: --device cuda."""
    campaign = load_campaign("batio3-nomad")
    console = Console(width=120, highlight=False)
    if call_paths:
        console.print(compare_call_paths(campaign, call_paths))
        return
    samples = campaign.samples
    with np.load(REFERENCE) as file:
        reference = {name: file[name] for name in file}
    phase = np.array([CrystalSystem[str(s)].value for s in reference["crystal_system"]])
    cells = np.empty((len(phase), 6))
    for code, of_campaign in enumerate(campaign.phases):
        rows = phase == code
        free = [reference[name][rows] for name in of_campaign.lattice.free_parameters]
        cells[rows] = of_campaign.lattice.cells(np.stack(free, axis=1))
    if device is not None:
        from _simulate_on_device import measure, report

        from bragg_data.simulation.device import DeviceError

        of_gsas2 = phase, cells, reference["y"]
        drawn = vectors(per_call, *calibration(campaign))
        try:
            measured = measure(campaign, of_gsas2, drawn, device, repeats, compiled)
        except DeviceError as error:
            raise typer.BadParameter(str(error), param_hint="--device") from error
        if as_json:
            print(json.dumps(measured, indent=2))
        else:
            console.print(report(measured))
        return

    simulator = Simulator(*campaign.setup)
    table = Table(title=f"Fast simulator, {threads} threads, median of {repeats}")
    headings = "phase,patterns/s,every vector,GSAS-II s/pattern,times faster"
    for column in [*headings.split(","), "max |Δ| / max", "relative L2", "scale"]:
        table.add_column(column, justify="right")
    measured: dict[str, Any] = {"patterns_per_second": {"shared": {}, "general": {}}}
    worst_of_all = {"max": 0.0, "l2": 0.0}
    with threadpool_limits(limits=1):
        ours = simulator.simulate(phase, cells)
        for code, of_campaign in enumerate(campaign.phases):
            chosen = np.resize(np.flatnonzero(samples.phase == code), 2 * threads * ROWS)
            jobs: list[dict[str, Any]] = [
                {"phase": samples.phase[rows], "cells": samples.cells[rows]}
                for rows in chosen.reshape(-1, ROWS)
            ]
            plain = rate(simulator, jobs, threads, repeats)
            drawn = vectors(ROWS, *calibration(campaign))
            varied = rate(simulator, [job | drawn for job in jobs[:threads]], threads, repeats)
            rows = phase == code
            theirs = reference["y"][rows].astype(np.float64)
            difference = np.abs(ours[rows] - theirs)
            seconds = float(np.median(reference["cpu_seconds"][rows]))
            l2 = np.linalg.norm(difference, axis=1) / np.linalg.norm(theirs, axis=1)
            scale = (ours[rows] * theirs).sum(axis=1) / (theirs**2).sum(axis=1)
            worst = float((difference.max(axis=1) / theirs.max(axis=1)).max())
            # GSAS-II on as many cores would share the work as well.
            times = f"{seconds:.2f}", f"{plain * seconds / threads:,.0f}"
            fidelity = f"{worst:.1e}", f"{l2.max():.1e}", f"{scale.mean():.6f}"
            table.add_row(of_campaign.name, f"{plain:,.0f}", f"{varied:,.0f}", *times, *fidelity)
            system = of_campaign.lattice.crystal_system.name
            measured["patterns_per_second"]["shared"][system] = plain
            measured["patterns_per_second"]["general"][system] = varied
            worst_of_all["max"] = max(worst_of_all["max"], worst)
            worst_of_all["l2"] = max(worst_of_all["l2"], float(l2.max()))
        ratios = derivatives_over_pattern(campaign, repeats)
        draws, per_second = measured_looking(campaign, 200, threads)
        of_refinements, right = refinement_seconds(campaign, draws, 15 * repeats)
    milliseconds = 1e3 * np.percentile(of_refinements, [50, 95])
    measured |= {
        "fidelity": worst_of_all,
        "derivatives_over_pattern": max(ratios.values()),
        "refinement_ms": {"median": milliseconds[0], "p95": milliseconds[1]},
        "draws_per_second": per_second,
        "device": "cpu",
    }
    if as_json:
        print(json.dumps(measured, indent=2))
        return
    console.print(table)
    of_phases = ", ".join(f"{ratio:.1f} ({name})" for name, ratio in ratios.items())
    console.print(
        f"Pattern with all derivatives, in patterns (parameters): {of_phases}\n"
        f"Refinement against all phases: median {milliseconds[0]:.0f} ms, 95 % "
        f"{milliseconds[1]:.0f} ms; right phase first: {right:.1%} of {len(of_refinements)}\n"
        f"Simulated measurements: {per_second:,.0f} per second"
    )


if __name__ == "__main__":
    typer.run(main)
