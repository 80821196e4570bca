"""Measure training on the store against the same loop fed from tensors in memory, and its memory.

python benchmarks/training.py throughput [--samples 60000] [--rounds 5]
python benchmarks/training.py memory [--samples 209119] [--directory /tmp]
"""

import tempfile
import threading
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import icechunk
import numpy as np
import psutil
import torch
import typer
import xarray as xr
import zarr
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bragg_data.preprocessing import preprocessing
from bragg_data.store.block_writer import COMPRESSOR
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

app = typer.Typer(add_completion=False)

DataTag = Annotated[str, typer.Option(help="Of the data set.")]


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


@app.command()
def throughput(
    data: DataTag = "batio3-nomad-v1",
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


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def train_once(
    store: str, group: str, rows: int, source: str, directory: str, tag: str, uri: str
) -> tuple[int, int, float]:
    """Train for one epoch, and validate; return anonymous bytes before, at most, and seconds."""
    origin = open_snapshot(tag, uri)
    campaign, labels = campaign_of(origin), samples_of(origin)
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(store))
    opened = xr.open_zarr(
        repository.readonly_session("main").store, group=group, consolidated=False, chunks=None
    )
    turns = np.arange(rows) % len(labels.phase)
    phase, cells = labels.phase[turns], labels.cells[turns]
    targets = targets_of(campaign.phases, phase, cells)
    chosen = np.random.default_rng(0).random(rows) < 0.95
    torch.manual_seed(0)
    # A narrow one: the reading sets the pace.
    network = Perceptron(opened.sizes["tof"], len(targets.names), len(targets.parameters), 32)
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        profiles = profiles_of(opened, preprocessing("profile_minmax@1").function)
        if source == "cache":
            profiles = cached(profiles, Path(directory), f"{group} {rows}")
        task = Samples(profiles, phase, cells)
        data = TrainingData(targets, task, chosen, ~chosen)
        list(fit(network, data, FitSettings(1, 512), seed=0))
    finally:
        done.set()
        watcher.join()
    return before, most, time.perf_counter() - began


def write_copies(dataset: xr.Dataset, path: Path, group: str, rows: int) -> None:
    """Write the profiles repeatedly, until there are `rows`, in the campaign's chunks."""
    storage = icechunk.local_filesystem_storage(str(path))
    repository = icechunk.Repository.open_or_create(storage)
    session = repository.writable_session("main")
    profiles = profiles_of(dataset, lambda values: values)
    chunk, points = profiles.rows_per_chunk, dataset.sizes["tof"]
    layout = {"shape": (rows, points), "chunks": (chunk, points), "dtype": "float32"}
    array = zarr.open_group(session.store, mode="a").create_array(
        f"{group}/intensity", compressors=COMPRESSOR, dimension_names=("sample", "tof"), **layout
    )
    whole = len(profiles) // chunk * chunk  # chunks stay whole in every turn
    chosen = np.arange(len(profiles)) < whole
    low = 0
    while low < rows:
        with closing(in_order(profiles, chosen)) as whole_chunks:
            for batch in whole_chunks:
                some = batch.profiles[: rows - low]
                array[low : low + len(some)] = some
                low += len(some)
                if low >= rows:
                    break
    session.commit(f"{rows} profiles")


@app.command()
def memory(
    data: DataTag = "batio3-nomad-v1",
    store: Annotated[str, typer.Option(help="Path of the store.")] = DEFAULT_URI,
    samples: Annotated[int, typer.Option(min=1, help="Of the smaller data set.")] = 209_119,
    source: Annotated[str, typer.Option(help="store or cache.")] = "store",
    times: Annotated[int, typer.Option(min=1, help="How much larger the other is.")] = 5,
    directory: Annotated[Path, typer.Option(help="For both, and their caches.")] = Path("/tmp"),
) -> None:
    """Train an epoch on a data set and on one several times as large: their anonymous memory."""
    dataset = open_snapshot(data, store)
    table = Table(title=f"Anonymous memory of training from the {source}, MiB")
    for column in ("samples", "before", "at most", "for training", "seconds"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        copies = Path(temporary) / "store"
        for rows in (samples, samples * times):
            write_copies(dataset, copies, f"of-{rows}", rows)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                before, most, seconds = pool.submit(
                    train_once, str(copies), f"of-{rows}", rows, source, temporary, data, store
                ).result()
            mib = [f"{value / 2**20:,.0f}" for value in (before, most, most - before)]
            table.add_row(f"{rows:,}", *mib, f"{seconds:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    app()
