"""What is said about a cluster before there is one: options, limits, and the error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# A task whose worker has died this often is at fault itself. Dask's 3 is too few where jobs are
# preempted or cancelled, since every death counts for all the tasks that the worker had in hand.
ALLOWED_FAILURES = 5


class ClusterError(RuntimeError):
    """There is no such cluster, or it does not do as it is asked."""


@dataclass(frozen=True)
class SlurmOptions:
    """What to ask SLURM for; None stands for the value of Dask's configuration.

    Dask reads its configuration, section ``jobqueue.slurm``, from ``~/.config/dask/*.yaml``;
    ``deploy/slurm/jobqueue.yaml`` is a template with a comment on each entry.
    """

    jobs: tuple[int, int] = (1, 8)
    """Least and greatest number of jobs at a time; between them as many as there are tasks."""
    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    """Time limit of one job, as SLURM writes it (``01:00:00``). A job that ends is replaced."""
    cores: int | None = None
    """Cores of one job; each gets a worker process with one thread."""
    memory: str | None = None
    """Memory of one job, as Dask writes it (``8 GB``), shared by its workers."""
    directives: tuple[str, ...] = ()
    """Further ``#SBATCH`` lines, after those of the configuration."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set in the workers."""
    interface: str | None = None
    """Network interface by which this machine and the nodes see each other (``ib0``)."""
    host: str | None = None
    """Address of this machine that the nodes can reach, where the interface does not tell."""
    python: str | None = None
    """Python on the nodes; by default the one that runs here, by the same path."""
    shared_directory: Path | None = None
    """Directory that this machine and the nodes share, for credentials and logs; default home."""


def parse_jobs(text: str) -> tuple[int, int]:
    """Return the least and greatest number of jobs from ``MIN:MAX`` or one number.

    Raises
    ------
    ClusterError
        If the text has another form, or MAX is below MIN or 1.
    """
    least, _, most = text.partition(":")
    try:
        jobs = int(least), int(most or least)
    except ValueError:
        jobs = -1, -1
    if not 0 <= jobs[0] <= jobs[1] or jobs[1] < 1:
        raise ClusterError(
            f"'{text}' is no number of jobs. Write MIN:MAX with 0 ≤ MIN ≤ MAX and 1 ≤ MAX, as in "
            "2:8, or one number for both."
        )
    return jobs
