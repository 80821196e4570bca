"""Time predictions for measured-looking profiles: network, library match, refinement, all.

    python benchmarks/prediction.py [--model URI] [--draws 20]

One profile after the other, in a process with all cores; medians and 95th percentiles over the
draws of all phases.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import prepare_measured
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation.measurement_effects import draw_labels, draw_profiles, simulator_for
from catalog import registry
from catalog.tracking import Tracking
from pipelines.prediction.library import INDEX_DIRECTORY, open_library
from pipelines.registry.registration import load_version

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the only champion")
    parser.add_argument("--draws", type=int, default=20, help="of each phase")
    options = parser.parse_args()
    tracking = Tracking()
    version = registry.find(tracking, options.model or registry.champion_uri(tracking))
    predictor = load_version(tracking.uri, version)
    campaign = predictor.campaign
    library = open_library(predictor)
    if library is None:
        sys.exit("This model's library is missing: run make run first.")
    refiner = Refiner(campaign, cache=INDEX_DIRECTORY)
    generator = np.random.default_rng(4)
    phase, cells = draw_labels(campaign, options.draws, generator)
    effects = campaign.measurement_effects
    draws = draw_profiles(simulator_for(campaign), phase, cells, generator, effects)
    order = generator.permutation(len(phase))
    prepared = draws.prepared()
    seconds: dict[str, list[float]] = {}
    batch = np.repeat(prepared[order], -(-512 // len(order)), axis=0)[:512]
    predictor.predict(batch)
    began = time.perf_counter()
    predictor.predict(batch)
    together = (time.perf_counter() - began) / len(batch)
    arrays = (array[order] for array in (draws.intensity, draws.sigma, draws.covered))
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
    table = Table("", "median ms", "95 % ms", title=f"{version.uri}, {len(order)} draws")
    for name, spent in seconds.items():
        table.add_row(name, *(f"{1e3 * value:.0f}" for value in np.percentile(spent, [50, 95])))
    table.add_row("network, per profile of 512", f"{1e3 * together:.1f}", "")
    console.print(table)


if __name__ == "__main__":
    main()
