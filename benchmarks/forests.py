"""Measure both ways to grow forests on a cluster: seconds per tree, in turn, and their ratio.

python benchmarks/forests.py [--trees 8] [--samples 4000] [--times 3] [--workers 2] [--preset quick]
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.splits import random_split
from bragg_data.store.repository import DEFAULT_URI, open_snapshot
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.targets import targets_of
from pipelines.cluster.client import open_client
from pipelines.training.dask_forests import Search
from pipelines.training.forests import FOREST_METHODS, FOREST_PRESETS, ForestTask, grow


def main(
    data: Annotated[str, typer.Option(help="Tag of the data set.")] = "batio3-nomad-v1",
    store: Annotated[str, typer.Option(help="Path or file:// URI of the store.")] = DEFAULT_URI,
    preset: Annotated[str, typer.Option(help=", ".join(FOREST_PRESETS) + ".")] = "quick",
    trees: Annotated[int, typer.Option(min=1, help="Of each forest.")] = 8,
    samples: Annotated[int, typer.Option(min=100, help="Of each forest, at most.")] = 4000,
    times: Annotated[int, typer.Option(min=1, help="Repeats of each way.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    dataset = open_snapshot(data, store)
    labels = samples_of(dataset)
    targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
    part = random_split(labels.crystal_system, seed=0)
    chosen = FOREST_PRESETS[preset]
    size = {"trees": trees, "samples": samples}
    small = replace(
        chosen,
        by_system={k: replace(v, **size) for k, v in chosen.by_system.items()},
        other=replace(chosen.other, **size),
        # One candidate in two folds of one tree: the least that a search can add to the forest.
        search=Search(folds=2, trial_trees=1),
    )
    task = ForestTask(dataset, targets, part, small, False, 0)
    seconds: dict[str, list[float]] = {how: [] for how in FOREST_METHODS}
    ways = list(seconds)
    with open_client("local", workers=workers) as client, tempfile.TemporaryDirectory() as place:

        def measure(how: str) -> float:
            _, facts = grow(client, task, Path(place), method=how)
            return float(facts["grow_seconds"]) / (trees * len(targets.names))

        for how in ways:
            measure(how)  # the workers import and compile what they need
        for _ in range(times):
            for how in ways:
                seconds[how].append(measure(how))
    table = Table(title=f"{trees} trees per phase, at most {samples:,} samples, {workers} workers")
    for column in ("way", "s per tree, median", "least", "greatest", "ratio of medians"):
        table.add_column(column, justify="left" if column == "way" else "right")
    reference = np.median(seconds["joined"])
    for how in ways:
        median, least, greatest = np.percentile(seconds[how], [50, 0, 100])
        times = f"{median:.3f}", f"{least:.3f}", f"{greatest:.3f}"
        table.add_row(how, *times, f"{median / reference:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
