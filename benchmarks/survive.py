"""Kill a campaign several times and compare its content hash with that of an undisturbed run.

    python benchmarks/survive.py [--kills 5] [--limit N]     # SIGKILL of the driver
    python benchmarks/survive.py --slurm [--limit N]         # a real SLURM, one scancel
    python benchmarks/survive.py --slurm --simulator gsas2 --limit 96 --victim worker

Drivers are killed at random moments, together with their workers or without them; then the same
command runs to the end. With ``--slurm`` a two-node SLURM is started on this machine, and when a
third of the samples is done one job is cancelled, or one worker process killed.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer
from rich.console import Console

from bragg_data.store.repository import Store

console = Console(width=100)
TEST_CLUSTER = Path(__file__).parents[1] / "deploy" / "slurm" / "test_cluster"


class Campaign(NamedTuple):
    """What is simulated, and how."""

    limit: int | None
    simulator: str

    def command(self, store: Path, *more: str) -> list[str]:
        """Return the command line that makes the data set."""
        only = [] if self.limit is None else ["--limit", str(self.limit)]
        line = f"-m pipelines.simulate --yes --simulator {self.simulator} --store"
        return [sys.executable, *line.split(), str(store), *only, *more]


def content_hash(store: Path) -> str:
    """Return the content hash of the one tag."""
    (tag,) = Store(store).tags()
    return str(Store(store).open(tag.name).attrs["content_hash"])


def done(store: Path) -> int:
    """Return how many samples of the unfinished data set are committed."""
    begun = Store(store).unfinished() if (store / "refs").is_dir() else []
    return begun[0].done if begun else 0


def killed(directory: Path, campaign: Campaign, kills: int, seconds: float) -> None:
    """Kill the driver some times, and run to the end."""
    rng = random.Random(0)
    for kill in range(kills):
        process = subprocess.Popen(
            campaign.command(directory), stdout=subprocess.DEVNULL, start_new_session=True
        )
        wait = rng.uniform(0.1, 0.3) * seconds
        time.sleep(wait)
        if process.poll() is not None:
            raise SystemExit(f"It ended before kill {kill + 1}: no result. Run it again.")
        (os.killpg if kill % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        console.print(f"killed after {wait:.0f} s, {done(directory):,} samples are committed")
    subprocess.run(campaign.command(directory), check=True, stdout=subprocess.DEVNULL)


def on_slurm(directory: Path, campaign: Campaign, victim: str) -> None:
    """Run on SLURM, and lose a job or a worker process."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as cluster:
        started = subprocess.run(
            [TEST_CLUSTER, "start", cluster], check=True, capture_output=True, text=True
        )
        name, value = started.stdout.removeprefix("export ").strip().split("=")
        os.environ[name] = value
        try:
            options = "--cluster slurm --jobs 2:2 --cores 1 --memory 1500MB --walltime 01:00:00"
            options += " --host 127.0.0.1 --directive --exclusive --shared-directory"
            process = subprocess.Popen(campaign.command(directory, *options.split(), cluster))
            third = (campaign.limit or 209_119) // 3
            while process.poll() is None and done(directory) < third:
                time.sleep(0.5)
            queue = ["squeue", "--noheader", "--states=running", "--format=%i %N"]
            jobs = subprocess.run(queue, capture_output=True, text=True, check=True).stdout
            console.print(f"running jobs and nodes: {jobs.splitlines()}; a {victim} is lost")
            if not jobs.split():
                raise SystemExit("It ended before anything was lost: no result.")
            if victim == "worker":
                kill_a_worker()
            else:
                subprocess.run(["scancel", jobs.split()[0]], check=True)
            if process.wait():
                raise SystemExit(process.returncode)
        finally:
            subprocess.run([TEST_CLUSTER, "stop", cluster], check=True)


def kill_a_worker() -> None:
    """Kill one process in which Dask runs tasks in a job: forked for its nanny."""
    workers = [
        child
        for nanny in psutil.process_iter(["cmdline"])
        if "distributed.cli.dask_worker" in (nanny.info["cmdline"] or ())
        for child in nanny.children(recursive=True)
        if "forkserver" in " ".join(child.cmdline()) and child.ppid() != nanny.pid
    ]
    console.print(f"SIGKILL for {workers[0].pid}, one of {len(workers)} worker processes")
    workers[0].kill()


def main(
    kills: Annotated[int, typer.Option(min=1)] = 5,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    simulator: Annotated[str, typer.Option()] = "kinematic",
    slurm: Annotated[bool, typer.Option("--slurm")] = False,
    victim: Annotated[str, typer.Option(help="job or worker")] = "job",
) -> None:
    campaign = Campaign(limit, simulator)
    serial = ("--workers", "1") if simulator == "gsas2" else ()
    with tempfile.TemporaryDirectory() as temporary:
        began, store = time.perf_counter(), Path(temporary) / "undisturbed"
        subprocess.run(campaign.command(store, *serial), check=True, stdout=subprocess.DEVNULL)
        expected, seconds = content_hash(store), time.perf_counter() - began
        console.print(f"undisturbed: {expected} in {seconds:.0f} s")
        other = Path(temporary) / "disturbed"
        if slurm:
            on_slurm(other, campaign, victim)
        else:
            killed(other, campaign, kills, seconds)
        result = content_hash(other)
        console.print(f"disturbed:   {result}: {'equal' if result == expected else 'DIFFERENT'}")
        if result != expected:
            raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
