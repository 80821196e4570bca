"""Measure how simulations scale on SLURM, with workers that sleep for as long as GSAS-II computes.

    python benchmarks/scaling.py workers [--workers 1 --workers 8 …] [--seconds 3] [--figure PNG]
    python benchmarks/scaling.py driver [--blocks 1000000] [--first 20000]
    python benchmarks/scaling.py commits [--blocks 200000]

``workers`` starts SLURM on this machine (``deploy/slurm/test_cluster``) and simulates in its jobs,
of at most eight cores, as ``bragg simulate`` does; only the simulation of a block is replaced, by
sleep. A worker is a Dask worker process with one thread. A block is one pattern, so that there are
as many tasks as there can be. ``driver`` computes the first blocks of a large data set, without
sleep, and prints the driver's memory meanwhile. ``commits`` times commits, and counts the bytes
that they write, while a data set fills.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import psutil
import typer
import zarr
from distributed import Client, Future
from icechunk.session import ForkSession
from rich.console import Console
from rich.table import Table

from bragg_data.campaign import BUILT_IN, Samples, load_campaign
from bragg_data.store import schema
from bragg_data.store.block_writer import BlockResult, BlockWriter, array_of
from bragg_data.store.repository import Store
from bragg_data.store.simulated import Writer, write_block
from pipelines.cli.options import SlurmOptions
from pipelines.cluster.blocks import do_blocks
from pipelines.cluster.client import open_client

TEST_CLUSTER = Path(__file__).parents[1] / "deploy" / "slurm" / "test_cluster"
POINTS = 64
TOML = """
name = "scaling"
seed = 1
sampling = "sobol"
[instrument]
file = "{built_in}/nomad_bank4.instprm"
[tof]
start = 11000.0
relative_step = 0.0009381
points = {points}
[rows_per_chunk]
kinematic = 1
[[phases]]
name = "cubic"
cif = "{built_in}/batio3_cubic.cif"
samples = {blocks}
[phases.cell]
a = {{ low = 3.9, high = 4.1 }}
"""
MIB = 2**20
GSAS2_SECONDS = 3.24  # for a pattern of the paper's campaign
app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


class CountingWriter(Writer):
    """A writer that counts commits and their seconds, of the first blocks of a data set."""

    commits, seconds = 0, 0.0
    most: int | None = None

    def missing(self) -> list[int]:
        return super().missing()[: self.most]

    def commit(self, results: Sequence[BlockResult]) -> None:
        began = time.perf_counter()
        super().commit(results)
        self.commits += bool(results)
        self.seconds += time.perf_counter() - began


class Run(NamedTuple):
    """What a run with some workers took."""

    workers: int
    blocks: int
    start_seconds: float  # from the submission until all workers are there
    seconds: float
    efficiency: float
    commits: int
    commit_seconds: float
    driver_seconds: float  # of a processor
    driver_mib: float  # private memory at the end


def slept(
    group: str, block: int, samples: Samples, fork: ForkSession, seconds: float
) -> BlockResult:
    """Write a block of ones after some seconds for each pattern: the task of a worker."""
    time.sleep(seconds * len(samples))
    return write_block(fork, group, block, samples, np.ones((len(samples), POINTS), np.float32))


@contextmanager
def new_writer(directory: Path, blocks: int) -> Iterator[CountingWriter]:
    file = directory / "scaling.toml"
    file.write_text(TOML.format(built_in=BUILT_IN, points=POINTS, blocks=blocks))
    store = Store(directory / "store", create=True)
    with CountingWriter(store, load_campaign(file), "kinematic", "sleeping") as writer:
        yield writer


def simulate(client: Client, writer: Writer, seconds: float) -> None:
    def submit(block: int, fork: ForkSession) -> Future:
        samples = writer.samples[writer.rows(block)]
        return client.submit(slept, writer.group, block, samples, fork, seconds, pure=False)

    do_blocks(client, writer, submit, doing="Sleeping", unit="patterns")
    if writer.failures:
        raise SystemExit(f"{len(writer.failures)} blocks failed: {writer.failures}")


def private_mib(process: psutil.Process) -> float:
    memory = process.memory_info()
    return float(memory.rss - memory.shared) / MIB


def run_workers(workers: int, seconds: float, each: int) -> Run:
    """Let some workers in SLURM jobs do each some blocks."""
    cores = min(workers, 8)
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as place, new_writer(Path(place), workers * each) as writer:
        options = SlurmOptions(
            jobs=f"{workers // cores}",
            cores=cores,
            memory=f"{400 * cores} MB",
            walltime="00:30:00",
            host="127.0.0.1",
            shared_directory=Path(place),
        )
        began = time.perf_counter()
        with open_client("slurm", slurm=options) as client:
            client.wait_for_workers(workers, timeout=400)
            client.gather(client.map(_ready, range(8 * workers), pure=False))  # imports
            ready = time.perf_counter()
            cpu = sum(process.cpu_times()[:2])
            simulate(client, writer, seconds)
            took = time.perf_counter() - ready
            cpu = sum(process.cpu_times()[:2]) - cpu
    blocks = workers * each
    ideal = each * seconds
    costs = writer.commits, writer.seconds, cpu, private_mib(process)
    return Run(workers, blocks, ready - began, took, ideal / took, *costs)


def _ready(_: int) -> None:
    from bragg_data.store import simulated  # noqa: F401

    time.sleep(0.05)


def show(title: str, rows: list[dict[str, str]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.values())
    Console(width=150).print(table)


def child(*arguments: object) -> str:
    """Run a command of this file in a process of its own; return the last line that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


@contextmanager
def slurm(cpus: int) -> Iterator[None]:
    """Start SLURM with two nodes that state this number of processors."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory:
        command = [TEST_CLUSTER, "start", directory, "--cpus", str(cpus)]
        started = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        os.environ["SLURM_CONF"] = started.stdout.strip().partition("=")[2]
        try:
            yield
        finally:
            subprocess.run([TEST_CLUSTER, "stop", directory], check=True)


@app.command()
def workers(
    workers: Annotated[list[int] | None, typer.Option(min=1)] = None,
    seconds: float = 3.0,
    each: Annotated[int, typer.Option(help="Blocks for each worker.")] = 6,
    runs_file: Annotated[
        Path | None, typer.Option(help="Keep runs there, with earlier ones.")
    ] = None,
    figure: Path | None = None,
) -> None:
    """Run 1 to 64 sleeping workers."""
    counts = workers or [1, 2, 4, 8, 16, 32, 64]
    with slurm(cpus=max(8, max(counts) // 2)):
        # A driver of its own each, with nothing left in its memory.
        lines = [child("single-run", n, seconds, each) for n in counts]
    if runs_file:
        with runs_file.open("a+", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        lines = runs_file.read_text(encoding="utf-8").splitlines()
    runs = sorted(Run(**json.loads(line)) for line in lines)
    rows = [
        {
            "workers": f"{run.workers}",
            "blocks": f"{run.blocks}",
            "start (s)": f"{run.start_seconds:.1f}",
            "time (s)": f"{run.seconds:.2f}",
            "efficiency (%)": f"{100 * run.efficiency:.1f}",
            "blocks per minute": f"{60 * run.blocks / run.seconds:.0f}",
            "commits per minute": f"{60 * run.commits / run.seconds:.1f}",
            "ms per commit": f"{1e3 * run.commit_seconds / run.commits:.0f}",
            "driver (% of a core)": f"{100 * run.driver_seconds / run.seconds:.1f}",
            "driver (ms per block)": f"{1e3 * run.driver_seconds / run.blocks:.1f}",
            "driver (MiB)": f"{run.driver_mib:.0f}",
        }
        for run in runs
    ]
    show(f"Sleeping workers, blocks of {seconds:g} s", rows)
    if figure:
        draw(runs, seconds, figure)


def draw(runs: list[Run], seconds: float, figure: Path) -> None:
    """Draw efficiencies, and the driver's load for the blocks of a campaign."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    counts = np.array([run.workers for run in runs])
    left.semilogx(counts, [100 * run.efficiency for run in runs], "o-", base=2)
    left.set(xlabel="workers", ylabel="efficiency (%)", ylim=(0, 105), xticks=counts)
    left.set_xticklabels(counts)
    left.set_title(f"blocks of one pattern, {seconds:g} s")
    cost = runs[-1].driver_seconds / runs[-1].blocks
    many = np.geomspace(1, 30_000, 50)
    for patterns in (16, 64):
        load = 100 * cost * many / (patterns * GSAS2_SECONDS)
        right.loglog(many, load, label=f"{patterns} patterns per block")
    busy = [100 * run.driver_seconds / run.seconds for run in runs]
    right.loglog(counts, busy, "o", label=f"measured, blocks of {seconds:g} s")
    right.axhline(100, color="grey", lw=0.8)
    right.set(xlabel="workers", ylabel="driver (% of a core)", ylim=(0.01, 300))
    right.set_title("projection, 3.24 s per pattern")
    right.legend(fontsize=8)
    fig.savefig(figure, dpi=130)


@app.command(hidden=True)
def single_run(workers: int, seconds: float, each: int) -> None:
    """Print one run as JSON."""
    print(json.dumps(run_workers(workers, seconds, each)._asdict()))


@app.command()
def driver(blocks: int = 1_000_000, first: int = 20_000) -> None:
    """Begin a large data set, and see the driver's memory."""
    process, seen = psutil.Process(), list[tuple[int, float]]()
    with (
        tempfile.TemporaryDirectory() as place,
        new_writer(Path(place), blocks) as writer,
        open_client("local", workers=2) as client,
    ):
        writer.most = first

        def watch() -> None:
            while writer.n_done < first:
                seen.append((writer.n_done, private_mib(process)))
                time.sleep(10)

        threading.Thread(target=watch, daemon=True).start()
        began, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        simulate(client, writer, 0.0)
        took = time.perf_counter() - began
        cpu = sum(process.cpu_times()[:2]) - cpu
        print(f"{first / took:.0f} blocks/s, {1e3 * cpu / first:.1f} ms of the driver per block")
    rows = [{"blocks done": f"{done:,}", "MiB": f"{mib:.0f}"} for done, mib in seen]
    show(f"Private memory of the driver, {blocks:,} blocks", rows)


@app.command()
def commits(blocks: int = 200_000) -> None:
    """Time commits of 16 blocks while a data set fills, and count their bytes."""
    rows, done, pattern = [], 0, np.ones((1, POINTS), np.float32)
    with tempfile.TemporaryDirectory() as place, new_writer(Path(place), blocks) as writer:
        for stop in (0, blocks // 100, blocks // 10, blocks // 2, blocks - 16):
            filled(writer, done, stop)
            done = stop
            results = [
                write_block(writer.fork(), writer.group, b, writer.samples[b : b + 1], pattern)
                for b in range(stop, stop + 16)
            ]
            before, times = size(Path(place)), []
            for _ in range(5):
                began = time.perf_counter()
                writer.commit(results)
                times.append(time.perf_counter() - began)
            written = (size(Path(place)) - before) / 5
            row = {"blocks done": f"{done:,}", "ms per commit": f"{1e3 * np.median(times):.0f}"}
            rows.append({**row, "kB per commit": f"{written / 1e3:.0f}"})
    show(f"Commits of 16 blocks, {blocks:,} blocks", rows)


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def filled(writer: BlockWriter, start: int, stop: int) -> None:
    """Write blocks in one commit, as if they had been computed."""
    session = writer.store.repository.writable_session(writer.branch)
    group = zarr.open_group(session.store, path=writer.group, mode="r+")
    array_of(group, "intensity")[start:stop] = np.ones((stop - start, POINTS), np.float32)
    array_of(group, "status")[start:stop] = schema.DONE
    digests = np.random.default_rng(start).integers(0, 256, (stop - start, 32), np.uint8)
    array_of(group, "block_sha256")[start:stop] = digests
    if stop > start:
        session.commit("fill")


if __name__ == "__main__":
    app()
