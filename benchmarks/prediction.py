"""Time predictions for measured-looking profiles: network, library match, refinement, all.

    python benchmarks/prediction.py [--model URI] [--draws 20] [--library]

One profile after the other, in a process with all cores; medians and 95th percentiles over the
draws of all phases. ``--library`` times the library alone: building its index, opening it, and its
matches, which are compared with those of the whole store.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
import xarray as xr
from rich.console import Console
from rich.table import Table

from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import prepare_measured
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    Draws,
    draw_labels,
    draw_profiles,
    simulator_for,
)
from bragg_models.library.index import open_index
from bragg_models.library.search import library_match
from pipelines.prediction.interface import load_model


def main(
    model: Annotated[str | None, typer.Option(help="By default the only champion.")] = None,
    draws: Annotated[int, typer.Option(help="Of each phase.")] = 20,
    only_library: Annotated[bool, typer.Option("--library", help="Only the library.")] = False,
) -> None:
    loaded = load_model(model)
    predictor, library, refiner = loaded.predictor, loaded.library, loaded.refiner
    campaign = predictor.campaign
    if library is None:
        sys.exit("This model's library is missing: run make run first.")
    generator = np.random.default_rng(4)
    phase, cells = draw_labels(campaign, draws, generator)
    effects = campaign.measurement_effects
    drawn = draw_profiles(simulator_for(campaign), phase, cells, generator, effects)
    if only_library:
        time_library(library.dataset, library.index.simulator, drawn)
        return
    order = generator.permutation(len(phase))
    prepared = drawn.prepared()
    seconds: dict[str, list[float]] = {}
    batch = np.repeat(prepared[order], -(-512 // len(order)), axis=0)[:512]
    predictor.predict(batch)
    began = time.perf_counter()
    predictor.predict(batch)
    together = (time.perf_counter() - began) / len(batch)
    arrays = (array[order] for array in (drawn.intensity, drawn.sigma, drawn.covered))
    gridded = [GriddedProfile(*values) for values in zip(*arrays, strict=True)]

    def prepare(row: int):
        profile = gridded[row]
        return prepare_measured(profile.intensity, profile.sigma, profile.covered)[None]

    profiles = [prepare(row) for row in range(len(order))]

    def predict(row: int):
        return predictor.predict(profiles[row])

    def match(row: int):
        return library.index.match(profiles[row], gridded[row].covered[None]).starts(0)

    predictions = [predict(row) for row in range(len(order))]
    starts = [[(int(p.phase[0]), p.cells[0]), *match(row)] for row, p in enumerate(predictions)]

    def refine(row: int):
        return refiner.refine(gridded[row], starts[row])

    def everything(row: int):
        return prepare(row), predict(row), match(row), refine(row)

    # Each separately: alternating steps would find the processor idle and its caches cold.
    for name, do in {
        "background off": prepare,
        "network with intervals": predict,
        "library match": match,
        "refinement": refine,
        "everything": everything,
    }.items():
        for row in [0, *range(len(order))]:
            began = time.perf_counter()
            do(row)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
        seconds[name].pop(0)
    table = Table("", "median ms", "95 % ms", title=f"{loaded.version.uri}, {len(order)} draws")
    for name, spent in seconds.items():
        table.add_row(name, *(f"{1e3 * value:.0f}" for value in np.percentile(spent, [50, 95])))
    table.add_row("network, per profile of 512", f"{1e3 * together:.1f}", "")
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def timed(function: Callable, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def time_library(dataset: xr.Dataset, simulator: Simulator, drawn: Draws) -> None:
    profiles, covered = drawn.prepared(), drawn.covered
    with TemporaryDirectory() as directory:
        for name in ("build", "open"):
            spent, index = timed(open_index, dataset, simulator, Path(directory))
            print(f"{name}: {spent:.2f} s")
        for name in ("first", "again"):
            rows = [[row] for row in range(len(profiles))]
            each = [timed(index.match, profiles[row], covered[row])[0] for row in rows]
            median, p95 = 1e3 * np.percentile(each, [50, 95])
            print(f"query, {name}: median {median:.1f} ms, 95 % {p95:.1f} ms")
        spent, matches = timed(index.match, profiles, covered)
        print(f"{len(profiles)} queries together: {1e3 * spent / len(profiles):.1f} ms each")
    exact = library_match(dataset, profiles, covered)
    best = np.arange(len(profiles)), exact.phase
    lost = exact.correlation - matches.correlation
    print(
        f"the store's pattern: of {matches.row.size} phases {(matches.row == exact.row).sum()}, of "
        f"{len(profiles)} best phases {(matches.row[best] == exact.row[best]).sum()}; correlation "
        f"lost: at most {lost.max():.1e}, of the best phase {lost[best].max():.1e}"
    )


if __name__ == "__main__":
    typer.run(main)
