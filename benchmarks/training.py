"""Measure training on the store against the same loop fed from tensors in memory.

python benchmarks/training.py [--samples 60000] [--rounds 5]
"""

import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bragg_data.preprocessing import preprocessing
from bragg_data.store.repository import DEFAULT_URI, open_snapshot
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.data import batches
from bragg_models.data.batches import Batch, Profiles, in_order, profiles_of
from bragg_models.data.cache import cached
from bragg_models.predictors import build
from bragg_models.targets import targets_of
from bragg_models.training import fit as training
from bragg_models.training.fit import fit
from bragg_models.training.inference import Samples
from bragg_models.training.settings import Criteria, FitSettings, TrainingData


class Perceptron(nn.Module):
    """Three layers: about as fast as a network on profiles can be."""

    def __init__(self, points: int, phases: int, parameters: int, width: int = 512) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(points, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.phase, self.cell = nn.Linear(width, phases), nn.Linear(width, parameters)

    def forward(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(profiles)
        return self.phase(hidden), self.cell(hidden)


class InMemory(Profiles):
    """Profiles that lie in memory, drawn without reading a store."""


def from_memory(
    profiles: Profiles,
    selected: np.ndarray,
    settings: batches.BatchSettings,
    generator: np.random.Generator,
    balance: batches.Balance | None = None,
) -> Generator[Batch]:
    if not isinstance(profiles, InMemory):
        yield from batches.shuffled(profiles, selected, settings, generator, balance)
        return
    order = generator.permutation(np.flatnonzero(selected))[: settings.samples]
    for low in range(0, len(order), settings.batch_size):
        rows = order[low : low + settings.batch_size]
        # Three to ten times as fast as indexing a tensor.
        yield Batch(np.take(profiles.prepared, rows, axis=0), rows)


training.shuffled = from_memory


def main(
    data: Annotated[str, typer.Option(help="Tag of the data set.")] = "batio3-nomad-v1",
    store: Annotated[str, typer.Option(help="Path of the store.")] = DEFAULT_URI,
    samples: Annotated[int, typer.Option(min=1, help="The first ones of the data set.")] = 60_000,
    multitask_samples: Annotated[int, typer.Option(help="In its epoch, as it is slow.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Epochs from each source, in turn.")] = 5,
) -> None:
    """Compare the store, its cache, and tensors in memory, with a fast and a slow network."""
    dataset = open_snapshot(data, store).isel(sample=slice(0, samples))
    labels = samples_of(dataset)
    targets = targets_of(campaign_of(dataset).phases, labels.phase, labels.cells)
    chosen = np.random.default_rng(0).random(len(labels.phase)) < 0.8
    sizes = dataset.sizes["tof"], len(targets.names), len(targets.parameters)
    shape = dict(zip(("points", "phases", "parameters"), sizes, strict=True))
    table = Table(title=f"Training, {torch.get_num_threads()} threads: medians of {rounds} epochs")
    headings = "network,batch,from,samples/s,of memory,worst,best,CPU µs/sample"
    for column in headings.split(","):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        for model, batch_size, limit, view in (
            ("perceptron", 256, None, "profile_sqrt_unit@1"),
            ("multitask", 128, multitask_samples, "profile_minmax@1"),
        ):
            profiles = profiles_of(dataset, preprocessing(view).function)
            mapped = cached(profiles, Path(directory), view)
            everything = np.empty(mapped.prepared.shape, dtype=np.float32)
            for batch in in_order(mapped, np.ones(len(mapped), dtype=bool)):
                everything[batch.rows] = batch.profiles
            memory = InMemory(mapped.intensity, mapped.rows_per_chunk, mapped.prepare, everything)
            sources = {"memory": memory, "store": profiles, "cache": mapped}
            settings = FitSettings(1, batch_size, samples_per_epoch=limit)
            rates: dict[str, list[float]] = {name: [] for name in sources}
            busy: dict[str, list[float]] = {name: [] for name in sources}
            for turn in range(-1, rounds):
                for name in np.roll(list(sources), -(turn % 3)):
                    torch.manual_seed(0)
                    network = Perceptron(**shape) if model == "perceptron" else build(model, shape)
                    task = Samples(sources[name], labels.phase, labels.cells)
                    began = time.process_time()
                    data = TrainingData(targets, task, chosen, ~chosen)
                    criteria = Criteria(validate=lambda _: {"all": {"mse_paper": 0.0}})
                    (result,) = fit(network, data, settings, seed=turn + 1, criteria=criteria)
                    if turn >= 0:  # the first turn warms up
                        count = min(limit or len(chosen), int(chosen.sum()))
                        rates[name].append(count / result.seconds)
                        busy[name].append((time.process_time() - began) / count * 1e6)
            for name, measured in rates.items():
                ratios = np.array(measured) / np.array(rates["memory"])
                shares = [f"{ratio:.1%}" for ratio in np.percentile(ratios, [50, 0, 100])]
                speed, cpu = f"{np.median(measured):,.0f}", f"{np.median(busy[name]):.0f}"
                table.add_row(model, str(batch_size), name, speed, *shares, cpu)
            del everything, memory, sources
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
