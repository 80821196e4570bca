"""Simulate a list of cells into a NetCDF file, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import h5netcdf  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal
from rich.markup import escape

from bragg_data.campaign import Samples, read_cells
from bragg_data.operating_system import reserve_space
from bragg_data.provenance import code_commit
from bragg_data.simulation import kinematic
from bragg_data.simulation.gsas2 import PatternsError
from bragg_data.store import schema
from bragg_data.store.repository import storage_errors
from pipelines.cli.console import Progress, duration, say
from pipelines.simulation.campaign import SimulationJob
from pipelines.simulation.simulator_choice import choose, confirm
from pipelines.simulation.worker import Recipe, SimulationError, recipe_of, simulate_samples

_NETCDF_OVERHEAD = 1 << 18  # bytes, for attributes and HDF5's own tables


def simulate_cells(cells: Path, out: Path, job: SimulationJob) -> int:
    """Simulate a list of cells into a NetCDF file that appears when it is complete.

    Parameters
    ----------
    cells
        CSV file; see :func:`bragg_data.campaign.read_cells`.
    out
        The file to write; one that exists is replaced.
    job
        Campaign, of which phases, instrument and grid are used, and simulator.

    Returns
    -------
    Number of patterns.

    Raises
    ------
    CampaignError, SimulationError, StoreError
        If the cells cannot be read, a pattern is not finite, or the file cannot be written.
    """
    campaign = job.campaign
    samples = read_cells(cells, campaign)
    if out.is_dir() or not out.parent.is_dir():
        raise SimulationError(f"{out} cannot be written: name a file in a directory that exists.")
    recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
    if job.simulator != "kinematic":
        recipe, core_hours = choose(job.simulator, campaign, samples, job.gsas2)
        confirm(core_hours, yes=job.confirmed)
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


def _patterns(
    recipe: Recipe, samples: Samples, rows: int, cells: Path
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
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


def print_file(out: Path, count: int, seconds: float) -> None:
    """Print how many patterns were written, the file's size, and the time."""
    size = decimal(out.stat().st_size)
    say(f"Written: {count:,} patterns in {escape(str(out))}, {size}, in {duration(seconds)}")
