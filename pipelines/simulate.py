"""Simulate a campaign into the versioned store, or a list of cells into a file."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import h5netcdf  # type: ignore[import-untyped]
import numpy as np
import typer
from distributed import Client, Future
from icechunk.session import ForkSession
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from bragg_data.campaign import Campaign, load_campaign, read_cells
from bragg_data.provenance import code_commit
from bragg_data.simulation import kinematic
from bragg_data.simulation.gsas2 import PATTERN_SECONDS, PatternsError
from bragg_data.store import schema
from bragg_data.store.repository import DEFAULT_URI, Store, Tag, storage_errors
from bragg_data.store.simulated import Writer
from pipelines.cli.console import Progress, console, duration, next_commands, run, say, three_digits
from pipelines.cluster.blocks import do_blocks
from pipelines.cluster.client import check_cluster, open_client
from pipelines.cluster.options import SlurmOptions, parse_jobs
from pipelines.simulation.simulator_choice import (
    check_name,
    check_resume,
    choose,
    confirm,
    gsas2_options,
    remembered,
)
from pipelines.simulation.worker import (
    Gsas2Options,
    Recipe,
    SimulationError,
    recipe_of,
    simulate_block,
    simulate_samples,
)

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
    gsas2: Gsas2Options | None = None,
    yes: bool = False,
) -> Tag:
    """Bring a campaign's data set into the store and tag it, or find that it is there.

    What is in the store of an interrupted run is kept, and only the rest is simulated.

    Parameters
    ----------
    campaign, store, simulator
        What, where, and by which simulator.
    tag
        Name of the tag; the next free NAME-vN by default.
    limit
        Simulate the first samples only.
    cluster, workers, slurm
        See :func:`pipelines.cluster.client.open_client`.
    gsas2
        How GSAS-II is found.
    yes
        Begin a long campaign without a question.

    Returns
    -------
    The data set's tag.

    Raises
    ------
    SimulationError
        If there is no such simulator, or blocks failed; the others are in the store.
    StoreError, ClusterError
        If the store or the cluster do not do their part.
    """
    check_name(simulator)
    known = store.data_sets_of(campaign, limit)
    chosen = remembered(known, simulator)
    for one in known:
        # Nobody simulates for days again because of a newer GSAS-II.
        same = one.simulator == "gsas2" or one.version == kinematic.VERSION
        if one.tag and one.simulator == chosen and same:
            say(
                f"This data set is in the store already, as [bold]{one.tag}[/] (same campaign, "
                f"simulator and number of samples): nothing to do."
            )
            return store.tag(one.tag)
    if tag is not None:
        store.check_new_tag(tag)
    check_cluster(cluster, workers)
    with contextlib.ExitStack() as stack:
        client: Client | None = None
        if chosen == "kinematic":
            recipe = recipe_of(campaign, chosen, kinematic.VERSION)
        else:
            client = stack.enter_context(_opened(cluster, workers, slurm))
            samples = campaign.samples[slice(limit)]
            choice = choose(chosen, campaign, samples, gsas2 or Gsas2Options(), client)
            recipe = choice.recipe
            check_resume(known, recipe)
            left = 1 - sum(one.done / one.total for one in known if one.tag is None)
            confirm(left * choice.core_hours, yes=yes)
        if recipe.simulator == "kinematic":
            _try_out(recipe, campaign)
        call_path = recipe.gsas2.call_path if recipe.simulator == "gsas2" else ""
        writer = stack.enter_context(
            Writer(
                store, campaign, recipe.simulator, recipe.version, limit=limit,
                code_commit=code_commit(), call_path=call_path,
            )
        )  # fmt: skip
        missing = len(writer.missing())
        say(
            f"Campaign [bold]{campaign.name}[/]: {len(writer.samples):,} patterns of "
            f"{campaign.grid.points:,} points in {writer.n_blocks:,} blocks, simulator "
            f"{recipe.simulator} {recipe.version}"
        )
        say(f"Store {escape(store.uri)}, branch {writer.branch}")
        if writer.n_done:
            say(f"Resuming: {writer.n_done:,} patterns are there, {missing:,} blocks are missing")
        try:
            if missing:
                client = client or stack.enter_context(_opened(cluster, workers, slurm))
                _simulate(client, writer, recipe)
        except (KeyboardInterrupt, SystemExit):
            say(
                f"Interrupted: {writer.n_done:,} of {len(writer.samples):,} patterns are in the "
                f"store. Resume with the same command."
            )
            raise
        if writer.failures:
            block, reason = min(writer.failures.items())
            remedy = ", with a longer --pattern-limit, or leave such cells out of the campaign"
            remedy = remedy if recipe.simulator == "gsas2" else ""
            raise SimulationError(
                f"{len(writer.failures)} of {writer.n_blocks} blocks failed, so nothing is tagged; "
                f"the others are in the store. Block {block} failed with {reason.rstrip('.')}. Run "
                f"the same command again to retry{remedy}."
            )
        return writer.finish(tag)


@contextlib.contextmanager
def _opened(cluster: str, workers: int | None, slurm: SlurmOptions | None) -> Iterator[Client]:
    with open_client(cluster, workers=workers, slurm=slurm) as client:
        say(f"Cluster {cluster}, dashboard {client.dashboard_link}")
        yield client


def _simulate(client: Client, writer: Writer, recipe: Recipe) -> None:
    def submit(block: int, fork: ForkSession) -> Future:
        samples = writer.samples[writer.rows(block)]
        return client.submit(simulate_block, recipe, writer.group, block, samples, fork, pure=False)

    done = do_blocks(client, writer, submit, doing="Simulating", unit="patterns")
    say(
        f"Simulated {done.count:,} patterns in {duration(done.seconds)}, "
        f"{three_digits(done.rate)} patterns/s"
    )


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


def simulate_cells(
    cells: Path,
    out: Path,
    campaign: Campaign,
    simulator: str,
    *,
    gsas2: Gsas2Options | None = None,
    yes: bool = False,
) -> int:
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
        By which simulator.
    gsas2, yes
        See :func:`simulate_campaign`.

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
    recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
    if simulator != "kinematic":
        recipe, core_hours = choose(simulator, campaign, samples, gsas2 or Gsas2Options())
        confirm(core_hours, yes=yes)
    dataset = schema.labelled(campaign, samples, recipe.simulator, recipe.version, code_commit())
    if recipe.simulator == "gsas2":
        dataset.attrs["call_path"] = recipe.gsas2.call_path
    rows, n = campaign.rows_per_chunk(recipe.simulator), len(samples)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with storage_errors(f"writing {out}"):
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
                    try:
                        intensity = simulate_samples(recipe, samples[block])
                    except PatternsError as error:
                        row, reason = min(error.reasons.items())
                        raise SimulationError(
                            f"GSAS-II fails on cell {start + row + 1} of {cells}: {reason}."
                        ) from error
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

_COMPUTE, _SLURM = "Where to compute", "SLURM"
_GSAS2, _CELLS = "GSAS-II", "Cells instead of a campaign"


@app.command()
def main(
    context: typer.Context,
    campaign: Annotated[
        str, typer.Option(metavar="NAME|FILE.toml", help="A built-in campaign, or a file.")
    ] = "batio3-nomad",
    simulator: Annotated[
        str,
        typer.Option(
            metavar="auto|gsas2|kinematic",
            help="GSAS-II, the fast one, or GSAS-II where every worker has it.",
        ),
    ] = "auto",
    store: Annotated[
        str, typer.Option(metavar="URI", help="Directory of the store.")
    ] = DEFAULT_URI,
    tag: Annotated[str | None, typer.Option(help="Snapshot's name; by default NAME-vN.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Begin without asking, however long it takes.")
    ] = False,
    gsas2_path: Annotated[
        Path | None,
        typer.Option(
            envvar="BRAGG_GSAS2_PATH",
            rich_help_panel=_GSAS2,
            help="Directory that holds the package GSASII, where Python does not find it.",
        ),
    ] = None,
    pattern_limit: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", rich_help_panel=_GSAS2, help="Time limit of a pattern."
        ),
    ] = PATTERN_SECONDS,
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
    check_name(simulator)
    loaded = load_campaign(campaign)
    if cells or out:
        if cells is None or out is None:
            raise SimulationError("--cells CELLS.csv and --out PATTERNS.nc belong together.")
        if odd := given - {
            "cells", "out", "campaign", "simulator", "gsas2_path", "pattern_limit", "yes",
        }:  # fmt: skip
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
    options = gsas2_options(gsas2_path, pattern_limit)
    if cells and out:
        count = simulate_cells(cells, out, loaded, simulator, gsas2=options, yes=yes)
        seconds = duration(time.monotonic() - began)
        size = decimal(out.stat().st_size)
        say(f"Written: {count:,} patterns in {escape(str(out))}, {size}, in {seconds}")
        return
    repository = Store(store, create=True)
    snapshot = simulate_campaign(
        loaded, repository, simulator,
        tag=tag, limit=limit, cluster=cluster, workers=workers, slurm=slurm, gsas2=options, yes=yes,
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
