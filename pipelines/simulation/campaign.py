"""Simulate a campaign into the versioned store on a cluster, or a list of cells into a file."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

import h5netcdf  # type: ignore[import-untyped]
import numpy as np
from distributed import Client, Future
from icechunk.session import ForkSession
from rich.filesize import decimal
from rich.markup import escape

from bragg_data.arrays import Floats32
from bragg_data.campaign import Campaign, Samples, read_cells
from bragg_data.provenance import code_commit
from bragg_data.simulation import kinematic
from bragg_data.simulation.gsas2 import Gsas2Options, PatternsError
from bragg_data.store import schema
from bragg_data.store.repository import DataSet, Snapshot, Store, Tag, storage_errors
from bragg_data.store.reuse import Reuse, find_reusable
from bragg_data.store.simulated import Writer
from catalog.lineage_events import LineageDataset, LineageRun
from pipelines.cli.console import Progress, duration, print_rows, say
from pipelines.cli.options import ClusterOptions, check_writable
from pipelines.cluster.blocks import do_blocks, failures_text
from pipelines.cluster.client import dashboard_text, open_cluster
from pipelines.simulation import simulators
from pipelines.simulation.simulators import Recipe, SimulationError, recipe_of, simulate_samples
from pipelines.snapshots.verification import verify_snapshot

# Simulators of which patterns are copied from other data sets. Not the fast one: the last bit of
# its patterns depends on how many are computed together (matrix products of few rows take another
# path in OpenBLAS), so that a block of which a part is copied would change the content hash. It
# would not gain much either: it takes 0.13 ms for a pattern of 2,807 points, a copy 0.02 to 0.3 ms.
_REUSED = {"gsas2"}

_NETCDF_OVERHEAD = 1 << 18  # bytes, for attributes and HDF5's own tables


@dataclass(frozen=True)
class SimulationJob:
    """What to simulate, and where."""

    campaign: Campaign
    simulator: str = "auto"  # or gsas2, kinematic
    tag: str | None = None  # the next free NAME-vN by default
    limit: int | None = None  # only the first samples of the campaign
    gsas2: Gsas2Options = field(default_factory=Gsas2Options)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    confirmed: bool = False  # begin a long campaign without a question

    def __post_init__(self) -> None:
        if self.simulator not in ("auto", "kinematic", "gsas2"):
            raise SimulationError(f"No simulator '{self.simulator}': use auto, kinematic or gsas2.")


def simulate_campaign(job: SimulationJob, store: Store) -> Tag:
    """Simulate a campaign into the store and tag it, unless the store has it already.

    Blocks in the store from an interrupted run are kept; only the missing ones are simulated, and
    of these only the samples that no other data set has (by GSAS-II). Raises `SimulationError` if
    blocks failed (the others are in the store), and `StoreError` or `ClusterError` if the store or
    the cluster fails.
    """
    existing = store.data_sets_of(job.campaign, job.limit)
    simulator = simulators.simulator_of_data_sets(existing, job.simulator)
    # Nobody simulates for days again because of a newer GSAS-II.
    finished = [
        data_set.tag
        for data_set in existing
        if data_set.tag and data_set.simulator == simulator
        if simulator == "gsas2" or data_set.version == kinematic.VERSION
    ]
    if finished:
        verify_snapshot(store.open(finished[0]))
        say(
            f"This data set is in the store already, as [bold]{finished[0]}[/] (same campaign, "
            f"simulator and number of samples): nothing to do."
        )
        return store.tag(finished[0])
    if job.tag is not None:
        store.check_new_tag(job.tag)
    lineage = LineageRun(f"simulate.{job.campaign.name}", _lineage_inputs(job.campaign, store))
    with lineage, contextlib.ExitStack() as stack:
        client: Client | None = None
        if simulator == "kinematic":
            recipe, reuse = recipe_of(job.campaign), None
        else:
            client = stack.enter_context(_open(job.cluster))
            recipe, reuse = _chosen_recipe(job, simulator, existing, store, client)
        if recipe.simulator == "kinematic":
            _check_first_patterns(recipe, job.campaign)
        provenance = {"code_commit": code_commit()}
        if recipe.simulator == "gsas2":
            provenance["call_path"] = recipe.gsas2.call_path
        by = recipe.simulator, recipe.version
        writer = stack.enter_context(
            Writer(store, job.campaign, *by, limit=job.limit, provenance=provenance)
        )
        _recheck(writer)
        missing = len(writer.missing())
        _print_plan(job.campaign, recipe, store, writer, missing)
        try:
            if missing:
                client = client or stack.enter_context(_open(job.cluster))
                _simulate_blocks(client, writer, recipe, reuse)
        except (KeyboardInterrupt, SystemExit):
            say(
                f"Interrupted: {writer.n_done:,} of {len(writer.samples):,} patterns are in the "
                f"store. Resume with the same command."
            )
            raise
        if writer.failures:
            remedy = ", with a longer --pattern-limit, or leave such cells out of the campaign"
            remedy = remedy if recipe.simulator == "gsas2" else ""
            raise SimulationError(f"Nothing is tagged: {failures_text(writer)}{remedy}.")
        tag = writer.finish(job.tag)
        lineage.outputs.append(LineageDataset.of_snapshot(store.open(tag.name)))
        return tag


def _lineage_inputs(campaign: Campaign, store: Store) -> list[LineageDataset]:
    digest = hashlib.sha256(campaign.toml.encode()).hexdigest()
    parents = [store.open(growth.parent) for growth in campaign.growths[-1:]]
    file = LineageDataset("bragg://campaigns", campaign.name, digest)
    return [file, *map(LineageDataset.of_snapshot, parents)]


@contextlib.contextmanager
def _open(options: ClusterOptions) -> Iterator[Client]:
    with open_cluster(options) as client:
        say(f"Cluster {options.name}, dashboard {dashboard_text(client, options.name)}")
        yield client


def _chosen_recipe(
    job: SimulationJob, simulator: str, existing: Sequence[DataSet], store: Store, client: Client
) -> tuple[Recipe, Reuse | None]:
    """Choose simulator and call path, find what the store has, and ask before long campaigns."""
    campaign, samples = job.campaign, job.campaign.samples[slice(job.limit)]

    @cache
    def reusable(recipe: Recipe) -> Reuse:
        by = {"simulator": recipe.simulator, "simulator_version": recipe.version}
        by["call_path"] = recipe.gsas2.call_path
        return find_reusable(store, campaign, by, job.limit)

    recipe, seconds = simulators.choose(
        simulator, campaign, samples, job.gsas2, client, lambda recipe: reusable(recipe).new
    )
    simulators.check_resume(existing, recipe)
    reuse, new = None, np.ones(len(samples), np.bool_)
    if recipe.simulator in _REUSED:
        reuse = reusable(recipe)
        new = reuse.new
    if reuse and reuse.copied:
        counts = {donor.name: count for donor, count in reuse.copied.items()}
        single = len(counts) == 1
        names = (name if single else f"{name} ({count:,})" for name, count in counts.items())
        say(
            f"{(~new).sum():,} of {len(new):,} patterns are copied from {' and '.join(names)}, "
            f"{new.sum():,} are simulated"
        )
    finished = sum(s.done / s.total for s in existing if s.tag is None)
    core_hours = (1 - finished) * simulators.estimate(seconds, samples.phase[new])
    simulators.confirm(core_hours, yes=job.confirmed)
    return recipe, reuse


def _recheck(writer: Writer) -> None:
    """Read what an earlier run finished: what is damaged or gone is simulated again."""
    if not writer.n_done:
        return
    with Progress("Verifying", writer.n_done, "patterns") as progress:
        damaged = writer.recheck(progress.advance)
    if damaged:
        say(
            f"[yellow]{len(damaged)} finished blocks are damaged or missing (the first is "
            f"{damaged[0]}): they are simulated again[/]"
        )


def _check_first_patterns(recipe: Recipe, campaign: Campaign) -> None:
    """Simulate one sample of each phase in this process, to fail before anything is begun.

    The simulator's warnings appear here too, once, and its compiled code is cached for the workers.
    """
    _, first = np.unique(campaign.samples.phase, return_index=True)
    if not np.isfinite(simulate_samples(recipe, campaign.samples[first])).all():
        raise SimulationError(
            f"The simulator {recipe.simulator} gives a pattern of campaign '{campaign.name}' that "
            f"is not finite. Look for odd values in its instrument file or its broadening."
        )


def _print_plan(
    campaign: Campaign, recipe: Recipe, store: Store, writer: Writer, missing: int
) -> None:
    say(
        f"Campaign [bold]{campaign.name}[/]: {len(writer.samples):,} patterns of "
        f"{campaign.grid.points:,} points in {writer.n_blocks:,} blocks, simulator "
        f"{recipe.simulator} {recipe.version}"
    )
    say(f"Store {escape(store.uri)}, branch {writer.branch}")
    if writer.n_done:
        say(f"Resuming: {writer.n_done:,} patterns are there, {missing:,} blocks are missing")


def _simulate_blocks(client: Client, writer: Writer, recipe: Recipe, reuse: Reuse | None) -> None:
    parts = {block: reuse[writer.rows(block)] for block in writer.missing()} if reuse else {}
    parts = {block: part for block, part in parts.items() if part.copied}

    def submit(block: int, fork: ForkSession) -> Future:
        samples = writer.samples[writer.rows(block)]
        task = recipe, writer.group, block, samples, fork, parts.get(block)
        return client.submit(simulators.simulate_block, *task, pure=False)

    progress = do_blocks(client, writer, submit, doing="Simulating", unit="patterns")
    say(f"Simulated {progress.summary}")
    planned = sum((Counter(part.copied) for part in parts.values()), Counter[Snapshot]())
    for donor, count in (planned - writer.copied).items() if not writer.failures else ():
        say(
            f"[yellow]{count:,} patterns of {donor.name} are gone or damaged: they were simulated "
            f"again. Restore the store from a copy; inspect --verify reads and checks it all.[/]"
        )


def simulate_cells(cells: Path, out: Path, job: SimulationJob) -> int:
    """Simulate a list of cells (CSV) into a NetCDF file that appears when it is complete.

    Of the job's campaign phases, instrument and grid are used. Returns the number of patterns.
    Raises `CampaignError` or `SimulationError` if the cells cannot be read or a pattern is not
    finite, `OutputError` or `StoreError` if the file cannot be written.
    """
    campaign = job.campaign
    samples = read_cells(cells, campaign)
    check_writable(out)
    recipe = recipe_of(campaign)
    if job.simulator != "kinematic":
        recipe, seconds = simulators.choose(job.simulator, campaign, samples, job.gsas2)
        simulators.confirm(simulators.estimate(seconds, samples.phase), yes=job.confirmed)
    dataset = schema.labelled(campaign, samples, recipe.simulator, recipe.version, code_commit())
    if recipe.simulator == "gsas2":
        dataset.attrs["call_path"] = recipe.gsas2.call_path
    size = dataset.nbytes + 4 * len(samples) * campaign.grid.points + _NETCDF_OVERHEAD
    rows = campaign.rows_per_chunk(recipe.simulator)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with storage_errors(f"writing {out}"):
            # HDF5 can crash where a disk fills: see first whether there is room.
            with partial.open("wb") as file:
                reserve_space(file, size)
            dataset.to_netcdf(partial, engine="h5netcdf")
            with (
                h5netcdf.File(partial, "r+") as netcdf,
                Progress("Simulating", len(samples), "patterns") as progress,
            ):
                variable = netcdf.create_variable("intensity", schema.INTENSITY.dims, "<f4")
                variable.attrs.update(schema.INTENSITY.attrs)
                for block, intensity in _patterns(recipe, samples, rows, cells):
                    variable[block] = intensity
                    progress.advance(len(intensity))
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return len(samples)


def reserve_space(file: BinaryIO, size: int) -> None:
    """Make sure that a file can grow to a size in bytes; raises an OSError if it cannot.

    Where the system cannot reserve the space (macOS), the free space of the disk is looked up.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif shutil.disk_usage(Path(file.name).parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _patterns(
    recipe: Recipe, samples: Samples, rows: int, cells: Path
) -> Iterator[tuple[slice, Floats32]]:
    """Yield patterns block by block, so that memory does not grow with the list."""
    for start in range(0, len(samples), rows):
        block = slice(start, min(start + rows, len(samples)))
        try:
            intensity = simulate_samples(recipe, samples[block])
        except PatternsError as error:
            row, reason = min(error.reasons.items())
            raise SimulationError(
                f"GSAS-II fails on cell {start + row + 1} of {cells}: {reason}."
            ) from error
        if not np.isfinite(intensity).all():
            raise SimulationError(
                f"A pattern of cells {start + 1} to {block.stop} of {cells} is not finite: look "
                f"for an odd cell there."
            )
        yield block, intensity


def print_data_set(store: Store, tag: Tag, seconds: float) -> None:
    """Print contents and size of a data set, and the seconds that the command took."""
    dataset = store.open(tag.name)
    counts = schema.counts_per_system(dataset)
    rows = {
        "Tag": f"[bold]{tag.name}[/]",
        "Snapshot": tag.snapshot_id,
        **{system.capitalize(): f"{count:,} patterns" for system, count in counts.items()},
        "On disk": f"{decimal(store.size(tag.name))} in {escape(store.uri)}",
        "Content hash": dataset.attrs["content_hash"],
        "Time": duration(seconds),
    }
    print_rows(rows)
