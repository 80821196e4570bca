"""What a campaign would take, before anything is begun: blocks, time, disk, and SLURM's job."""

import math
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr
from rich.filesize import decimal
from rich.markup import escape

from bragg_data.store.block_writer import COMPRESSORS
from pipelines.cli.console import say
from pipelines.simulation.campaign import SimulationJob
from pipelines.simulation.simulators import choose, estimate, recipe_of, simulate_samples

_SAMPLES = 64  # that are timed and compressed; fewer of GSAS-II's, which takes seconds for each
_SAMPLES_OF_GSAS2 = 4


def print_dry_run(job: SimulationJob) -> None:
    """Print blocks, core-hours and disk of a campaign, and the script of a job of SLURM.

    The time is that of samples on this machine. Nothing is written or submitted.
    """
    campaign, samples = job.campaign, job.campaign.samples[slice(job.limit)]
    if job.simulator == "kinematic":
        recipe, seconds = recipe_of(campaign), None
    else:
        recipe, seconds = choose(job.simulator, campaign, samples, job.gsas2)
    few = samples[: _SAMPLES if recipe.simulator == "kinematic" else _SAMPLES_OF_GSAS2]
    patterns = simulate_samples(recipe, few)
    if seconds is None:
        began = time.monotonic()
        simulate_samples(recipe, few)
        seconds = np.full(len(campaign.phases), (time.monotonic() - began) / len(few))
    rows = campaign.rows_per_chunk(recipe.simulator)
    blocks = math.ceil(len(samples) / rows)
    say(
        f"Campaign [bold]{campaign.name}[/]: {len(samples):,} patterns of "
        f"{campaign.grid.points:,} points in {blocks:,} blocks of {rows}, simulator "
        f"{recipe.simulator} {recipe.version}"
    )
    estimate(seconds, samples.phase)
    size = _compressed_bytes(patterns) / len(few) * len(samples)
    say(f"Disk: about {decimal(round(size))} in {blocks:,} files, from {len(few)} patterns")
    if job.cluster.cluster == "slurm":
        from pipelines.cluster.slurm import job_script

        least, most = job.cluster.slurm.job_limits
        say(f"SLURM: {least} to {most} jobs at a time, each with this script:")
        say(escape(job_script(job.cluster.slurm)))
    say("Nothing was begun: leave --dry-run out.")


def _compressed_bytes(patterns: np.ndarray) -> int:
    with tempfile.TemporaryDirectory(prefix="bragg-dry-run-") as directory:
        zarr.create_array(directory, data=patterns, chunks=patterns.shape, compressors=COMPRESSORS)
        return sum(file.stat().st_size for file in Path(directory).rglob("c/*/*"))
