"""Simulate a campaign into the versioned store, or a list of cells into a file."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections import Counter, deque
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, cast

import h5netcdf  # type: ignore[import-untyped]
import numpy as np
import typer
from distributed import Client, Future
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from bragg_data import schema
from bragg_data.campaign import Campaign, load_campaign, read_cells
from bragg_data.store import DEFAULT_URI, Store, Tag, errors_told
from bragg_data.writer import BlockResult, Writer
from pipelines.cluster import check_cluster, open_client
from pipelines.cluster_options import SlurmOptions, parse_jobs
from pipelines.console import Progress, console, duration, next_commands, run, say
from pipelines.simulators import (
    Recipe,
    SimulationError,
    choose_simulator,
    failed_block,
    recipe_of,
    simulate_block,
    simulate_samples,
)

ATTEMPTS = 3
"""How often a block is tried in one run."""

# A commit rewrites the list of all chunks, so not every block gets one of its own; but a kill
# loses what is not committed, so many slow blocks do not wait for one another.
_BLOCKS_PER_COMMIT = 16
_SECONDS_PER_COMMIT = 5.0

_NETCDF_OVERHEAD = 1 << 18  # bytes, for attributes and HDF5's own tables


def simulate_campaign(
    campaign: Campaign,
    store: Store,
    simulator: str,
    *,
    tag: str | None = None,
    limit: int | None = None,
    cluster: str = "local",
    workers: int | None = None,
    slurm: SlurmOptions | None = None,
) -> Tag:
    """Bring a campaign's data set into the store and tag it, or find that it is there.

    What is in the store of an interrupted run is kept, and only the rest is simulated.

    Parameters
    ----------
    campaign, store, simulator
        What, where, and by which simulator (not auto).
    tag
        Name of the tag; the next free NAME-vN by default.
    limit
        Simulate the first samples only.
    cluster, workers, slurm
        See :func:`pipelines.cluster.open_client`.

    Returns
    -------
    The data set's tag.

    Raises
    ------
    SimulationError
        If blocks failed; the others are in the store.
    StoreError, ClusterError
        If the store or the cluster do not do their part.
    """
    recipe = recipe_of(campaign, simulator)
    existing = store.tag_of(campaign.identity(simulator, recipe.version, limit))
    if existing:
        say(
            f"This data set is in the store already, as [bold]{existing}[/] (same campaign, "
            f"simulator and number of samples): nothing to do."
        )
        return next(known for known in store.tags() if known.name == existing)
    if tag is not None:
        store.check_new_tag(tag)
    check_cluster(cluster, workers)
    _try_out(recipe, campaign)
    with Writer(
        store, campaign, simulator, recipe.version, limit=limit, code_commit=code_commit()
    ) as writer:
        missing = len(writer.missing())
        say(
            f"Campaign [bold]{campaign.name}[/]: {len(writer.samples):,} patterns of "
            f"{campaign.grid.points:,} points in {writer.n_blocks:,} blocks, simulator {simulator} "
            f"{recipe.version}"
        )
        say(f"Store {escape(store.uri)}, branch {writer.branch}")
        if writer.n_done:
            say(f"Resuming: {writer.n_done:,} patterns are there, {missing:,} blocks are missing")
        if missing:
            _complete(writer, recipe, cluster, workers, slurm)
        if writer.failures:
            block, reason = min(writer.failures.items())
            raise SimulationError(
                f"{len(writer.failures)} of {writer.n_blocks} blocks failed, so nothing is tagged; "
                f"the others are in the store. Block {block} failed with {reason.rstrip('.')}. Run "
                f"the same command again to retry."
            )
        return writer.finish(tag)


def _try_out(recipe: Recipe, campaign: Campaign) -> None:
    """Simulate one sample of each phase, so that what is wrong shows before anything is begun.

    The simulator's warnings appear here too, once, and its compiled code is kept for the workers.
    """
    _, first = np.unique(campaign.samples.phase, return_index=True)
    if not np.isfinite(simulate_samples(recipe, campaign.samples[first])).all():
        raise SimulationError(
            f"The simulator {recipe.simulator} gives a pattern of campaign '{campaign.name}' that "
            f"is not finite. Look for odd values in its instrument file or its broadening."
        )


def _complete(
    writer: Writer, recipe: Recipe, cluster: str, workers: int | None, slurm: SlurmOptions | None
) -> None:
    try:
        with open_client(cluster, workers=workers, slurm=slurm) as client:
            say(f"Cluster {cluster}, dashboard {client.dashboard_link}")
            _simulate_blocks(client, writer, recipe)
    except (KeyboardInterrupt, SystemExit):
        say(
            f"Interrupted: {writer.n_done:,} of {len(writer.samples):,} patterns are in the store. "
            f"Resume with the same command."
        )
        raise


def _simulate_blocks(client: Client, writer: Writer, recipe: Recipe) -> None:
    """Simulate the missing blocks, some at a time, and commit them as they come."""
    todo = deque(writer.missing())
    attempts: Counter[int] = Counter()
    flying: dict[Future, int] = {}
    landed: SimpleQueue[Future] = SimpleQueue()
    waiting: list[BlockResult] = []
    workers, committed = _threads(client), time.monotonic()
    with Progress("Simulating", len(writer.samples), "patterns", done=writer.n_done) as progress:
        try:
            while todo or flying:
                # Few in flight keep memory flat, yet enough for a cluster to grow by.
                while todo and len(flying) < max(8, 4 * workers):
                    block = todo.popleft()
                    attempts[block] += 1
                    future = client.submit(
                        simulate_block, recipe, writer.group, block,
                        writer.samples[writer.rows(block)], writer.fork(), pure=False,
                    )  # fmt: skip
                    flying[future] = block
                    future.add_done_callback(landed.put)
                try:
                    future = landed.get(timeout=1.0)
                except Empty:
                    workers = _threads(client)
                    if time.monotonic() - committed > _SECONDS_PER_COMMIT:
                        writer.commit(waiting)
                        waiting.clear()
                        committed = time.monotonic()
                    progress.tick(_note(workers, writer, attempts))
                    continue
                result = _result(client, future, flying.pop(future), writer)
                if result.fork is None and attempts[result.block] < ATTEMPTS:
                    todo.append(result.block)
                    continue
                waiting.append(result)
                progress.advance(int((result.status == schema.DONE).sum()))
                age = time.monotonic() - committed
                if len(waiting) >= _BLOCKS_PER_COMMIT or age > _SECONDS_PER_COMMIT:
                    writer.commit(waiting)
                    waiting.clear()
                    workers, committed = _threads(client), time.monotonic()
                    progress.tick(_note(workers, writer, attempts))
        finally:
            writer.commit(waiting)
    say(
        f"Simulated {progress.count:,} patterns in {duration(progress.seconds)}, "
        f"{progress.rate:,.0f} patterns/s"
    )


def _threads(client: Client) -> int:
    """Return how many tasks can run at a time.

    Raises
    ------
    SimulationError
        If there is no cluster any more: then no block is to blame.
    """
    try:
        if client.status == "running":
            return sum(client.nthreads().values())
    except (OSError, TimeoutError):
        pass
    raise SimulationError(
        "The cluster does not answer any more. What was committed stays: run the same command "
        "again to resume."
    )


def _note(workers: int, writer: Writer, attempts: Counter[int]) -> str:
    notes = [f"{workers} worker{'s' * (workers > 1)}" if workers else "waiting for workers"]
    if writer.failures:
        notes.append(f"{len(writer.failures)} blocks failed")
    if retried := sum(count > 1 for count in attempts.values()):
        notes.append(f"{retried} blocks retried")
    return ", ".join(notes)


def _result(client: Client, future: Future, block: int, writer: Writer) -> BlockResult:
    try:
        result = future.result()
    except Exception as error:  # the worker died, for example
        _threads(client)
        return failed_block(block, len(writer.samples[writer.rows(block)]), error)
    if isinstance(result, Exception):
        raise result
    return cast("BlockResult", result)


def simulate_cells(cells: Path, out: Path, campaign: Campaign, simulator: str) -> int:
    """Simulate a list of cells, in this process, into a NetCDF file that appears when complete.

    Parameters
    ----------
    cells
        CSV file; see :func:`bragg_data.campaign.read_cells`.
    out
        The file to write; one that exists is replaced.
    campaign
        Its phases, instrument and grid are used.
    simulator
        By which simulator (not auto).

    Returns
    -------
    Number of patterns.

    Raises
    ------
    CampaignError, SimulationError, StoreError
        If the cells cannot be read, a pattern is not finite, or the file cannot be written.
    """
    samples = read_cells(cells, campaign)
    if out.is_dir() or not out.parent.is_dir():
        raise SimulationError(f"{out} cannot be written: name a file in a directory that exists.")
    recipe = recipe_of(campaign, simulator)
    dataset = schema.labelled(campaign, samples, simulator, recipe.version, code_commit())
    rows, n = campaign.rows_per_chunk(simulator), len(samples)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with errors_told(f"writing {out}"):
            # HDF5 can crash where a disk fills: see first whether there is room.
            with partial.open("wb") as file:
                size = dataset.nbytes + 4 * n * campaign.grid.points + _NETCDF_OVERHEAD
                os.posix_fallocate(file.fileno(), 0, size)
            dataset.to_netcdf(partial, engine="h5netcdf")
            # Block by block, so that memory does not grow with the list.
            with (
                h5netcdf.File(partial, "r+") as netcdf,
                Progress("Simulating", n, "patterns") as progress,
            ):
                variable = netcdf.create_variable("intensity", schema.INTENSITY.dims, "<f4")
                variable.attrs.update(schema.INTENSITY.attrs)
                for start in range(0, n, rows):
                    block = slice(start, min(start + rows, n))
                    intensity = simulate_samples(recipe, samples[block])
                    if not np.isfinite(intensity).all():
                        raise SimulationError(
                            f"A pattern of cells {start + 1} to {block.stop} of {cells} is not "
                            f"finite: look for an odd cell there."
                        )
                    variable[block] = intensity
                    progress.advance(len(intensity))
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return n


def code_commit() -> str:
    """Return the commit of this project's code, with -dirty if it was changed since."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _report(store: Store, tag: Tag, seconds: float) -> None:
    dataset = store.open(tag.name)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("Tag", f"[bold]{tag.name}[/]")
    table.add_row("Snapshot", tag.snapshot_id)
    for system, count in schema.counts_per_system(dataset).items():
        table.add_row(system.capitalize(), f"{count:,} patterns")
    table.add_row("On disk", f"{decimal(store.size(tag.name))} in {escape(store.uri)}")
    table.add_row("Content hash", dataset.attrs["content_hash"])
    table.add_row("Time", duration(seconds))
    console.print(table)


app = typer.Typer(add_completion=False)

_COMPUTE, _SLURM, _CELLS = "Where to compute", "SLURM", "Cells instead of a campaign"


@app.command()
def main(
    context: typer.Context,
    campaign: Annotated[
        str, typer.Option(metavar="NAME|FILE.toml", help="A built-in campaign, or a file.")
    ] = "batio3-nomad",
    simulator: Annotated[
        str, typer.Option(help="auto, gsas2, or kinematic, the fast one.")
    ] = "auto",
    store: Annotated[
        str, typer.Option(metavar="URI", help="Directory of the store.")
    ] = DEFAULT_URI,
    tag: Annotated[str | None, typer.Option(help="Snapshot's name; by default NAME-vN.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    cells: Annotated[
        Path | None,
        typer.Option(
            metavar="CELLS.csv",
            rich_help_panel=_CELLS,
            help="Columns crystal_system, a, b, c, alpha, beta, gamma, optionally phase.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATTERNS.nc", rich_help_panel=_CELLS, help="NetCDF file to write."),
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(
            metavar="local|slurm|tcp://HOST:PORT",
            rich_help_panel=_COMPUTE,
            help="This machine, SLURM, or a running Dask scheduler.",
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_COMPUTE, help="Processes on this machine."),
    ] = None,
    jobs: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX", rich_help_panel=_SLURM, help="Jobs at a time."),
    ] = None,
    queue: Annotated[str | None, typer.Option(rich_help_panel=_SLURM, help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(rich_help_panel=_SLURM, help="Account.")] = None,
    walltime: Annotated[
        str | None,
        typer.Option(metavar="HH:MM:SS", rich_help_panel=_SLURM, help="Time limit of a job."),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_SLURM, help="Cores of a job.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(rich_help_panel=_SLURM, help="Memory of a job, as in 8GB.")
    ] = None,
    directive: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_SLURM, help="Further #SBATCH line (repeatable)."),
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", rich_help_panel=_SLURM, help="Variable in workers (repeatable)."
        ),
    ] = None,
    interface: Annotated[
        str | None, typer.Option(rich_help_panel=_SLURM, help="Network interface, as in ib0.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(rich_help_panel=_SLURM, help="This machine, seen from the nodes.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(rich_help_panel=_SLURM, help="Python on the nodes.")
    ] = None,
    shared_directory: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_SLURM, help="Directory that the nodes see as well."),
    ] = None,
) -> None:
    """Simulate a campaign into the versioned store, or a list of cells into a file.

    Whatever interrupts it, the same command completes exactly what is missing.
    """
    began = time.monotonic()
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name != "DEFAULT"
    }
    chosen = choose_simulator(simulator)
    loaded = load_campaign(campaign)
    if cells or out:
        if cells is None or out is None:
            raise SimulationError("--cells CELLS.csv and --out PATTERNS.nc belong together.")
        if odd := given - {"cells", "out", "campaign", "simulator"}:
            raise SimulationError(
                f"--cells computes in this process and into --out alone: leave out "
                f"{', '.join('--' + name.replace('_', '-') for name in sorted(odd))}."
            )
    slurm = SlurmOptions(
        jobs=parse_jobs(jobs) if jobs else SlurmOptions.jobs,
        queue=queue, account=account, walltime=walltime, cores=cores, memory=memory,
        directives=tuple(directive or ()),
        environment=dict(_assignment(text) for text in environment or ()),
        interface=interface, host=host, python=python, shared_directory=shared_directory,
    )  # fmt: skip
    of_slurm = {
        "jobs", "queue", "account", "walltime", "cores", "memory", "directive", "environment",
        "interface", "host", "python", "shared_directory",
    }  # fmt: skip
    if cluster != "slurm" and (odd := given & of_slurm):
        raise SimulationError(
            f"{', '.join('--' + name.replace('_', '-') for name in sorted(odd))} belong to "
            f"--cluster slurm, and this is --cluster {cluster}: name that cluster, or leave them "
            f"out."
        )
    if simulator == "auto":
        say(f"Simulator auto is {chosen} in this installation")
    if cells and out:
        count = simulate_cells(cells, out, loaded, chosen)
        seconds = duration(time.monotonic() - began)
        size = decimal(out.stat().st_size)
        say(f"Written: {count:,} patterns in {escape(str(out))}, {size}, in {seconds}")
        return
    repository = Store(store, create=True)
    snapshot = simulate_campaign(
        loaded, repository, chosen,
        tag=tag, limit=limit, cluster=cluster, workers=workers, slurm=slurm,
    )  # fmt: skip
    _report(repository, snapshot, time.monotonic() - began)
    where = "" if store == DEFAULT_URI else f" --store {shlex.quote(store)}"
    next_commands(
        [
            (
                f"python -m pipelines.inspect {snapshot.name}{where} --png patterns.png",
                "see what is in it, with pictures of some patterns",
            ),
            (f"python -m pipelines.train{where}", "train a model on it"),
        ]
    )


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise SimulationError(f"--environment takes NAME=VALUE, not '{text}'.")
    return name, value


if __name__ == "__main__":
    run(app)
