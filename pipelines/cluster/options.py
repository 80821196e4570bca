"""Options of a cluster, for command lines and Python, and the error of one that does not work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distributed import Client

# A task whose worker has died this often is at fault itself. Dask's 3 is too few where jobs are
# preempted or cancelled, since every death counts for all the tasks that the worker had in hand.
ALLOWED_FAILURES = 5

_CLUSTER_PANEL, _SLURM_PANEL = "Where to compute", "SLURM"


class ClusterError(RuntimeError):
    """A cluster that does not exist, cannot be reached, or refuses the work."""


@dataclass(frozen=True)
class SlurmOptions:
    """Resources to request from SLURM; None stands for the value of Dask's configuration.

    Dask reads its configuration, section ``jobqueue.slurm``, from ``~/.config/dask/*.yaml``;
    ``deploy/slurm/jobqueue.yaml`` is a template with a comment on each entry.

    Raises
    ------
    ClusterError
        If `jobs` or `environment` cannot be parsed.
    """

    jobs: Annotated[
        str,
        typer.Option(
            metavar="MIN:MAX", rich_help_panel=_SLURM_PANEL, help="Jobs at a time, as in 2:8."
        ),
    ] = "1:8"
    """Least and greatest number of jobs at a time; between them as many as there are tasks."""
    queue: Annotated[str | None, typer.Option(rich_help_panel=_SLURM_PANEL, help="Partition.")] = (
        None
    )
    account: Annotated[str | None, typer.Option(rich_help_panel=_SLURM_PANEL, help="Account.")] = (
        None
    )
    walltime: Annotated[
        str | None,
        typer.Option(metavar="HH:MM:SS", rich_help_panel=_SLURM_PANEL, help="Time limit of a job."),
    ] = None
    """Time limit of one job, as SLURM writes it (``01:00:00``). A job that ends is replaced."""
    cores: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_SLURM_PANEL, help="Cores of a job.")
    ] = None
    """Cores of one job; each gets a worker process with one thread."""
    memory: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SLURM_PANEL, help="Memory of a job, as in 8GB."),
    ] = None
    """Memory of one job, as Dask writes it (``8 GB``), shared by its workers."""
    directives: Annotated[
        list[str],
        typer.Option(
            "--directive",
            metavar="TEXT",
            rich_help_panel=_SLURM_PANEL,
            help="Additional #SBATCH line (repeatable).",
        ),
    ] = field(default_factory=list)
    """Additional ``#SBATCH`` lines, after those of the configuration."""
    environment: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE",
            rich_help_panel=_SLURM_PANEL,
            help="Environment variable of the workers (repeatable).",
        ),
    ] = field(default_factory=list)
    """Environment variables of the workers, each as ``NAME=VALUE``."""
    interface: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SLURM_PANEL, help="Network interface, as in ib0."),
    ] = None
    """Network interface by which this machine and the nodes see each other (``ib0``)."""
    host: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SLURM_PANEL, help="Address of this machine for the nodes."),
    ] = None
    """Address of this machine that the nodes can reach, if not that of the interface."""
    python: Annotated[
        str | None, typer.Option(rich_help_panel=_SLURM_PANEL, help="Python on the nodes.")
    ] = None
    """Python on the nodes; by default the one that runs here, by the same path."""
    shared_directory: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_SLURM_PANEL, help="Directory that the nodes can read as well."
        ),
    ] = None
    """Directory that this machine and the nodes share, for credentials and logs; default home."""

    def __post_init__(self) -> None:
        _ = self.job_limits, self.variables

    @property
    def job_limits(self) -> tuple[int, int]:
        """Least and greatest number of jobs, from ``MIN:MAX`` or one number for both."""
        least, _, most = self.jobs.partition(":")
        try:
            limits = int(least), int(most or least)
        except ValueError:
            limits = -1, -1
        if not 0 <= limits[0] <= limits[1] or limits[1] < 1:
            raise ClusterError(
                f"'{self.jobs}' is not a number of jobs. Write MIN:MAX with 0 ≤ MIN ≤ MAX and "
                "1 ≤ MAX, as in 2:8, or one number for both."
            )
        return limits

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the workers by their names."""
        variables = {}
        for text in self.environment:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise ClusterError(f"--environment takes NAME=VALUE, not '{text}'.")
            variables[name] = value
        return variables


@dataclass(frozen=True)
class ClusterOptions:
    """Where tasks run.

    Raises
    ------
    ClusterError
        If there is no such cluster, or an option belongs to another one.
    """

    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="local|slurm|tcp://HOST:PORT",
            rich_help_panel=_CLUSTER_PANEL,
            help="This machine, SLURM, or a running Dask scheduler.",
        ),
    ] = "local"
    """None where the command chooses: this process for little work, else ``local``."""
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_CLUSTER_PANEL,
            help="Processes on this machine; by default one per core.",
        ),
    ] = None
    slurm: SlurmOptions = field(default_factory=SlurmOptions)

    def __post_init__(self) -> None:
        check_cluster(self.name, self.workers)
        default = SlurmOptions()
        changed = [
            "--directive" if option.name == "directives" else f"--{option.name.replace('_', '-')}"
            for option in fields(self.slurm)
            if getattr(self.slurm, option.name) != getattr(default, option.name)
        ]
        if changed and self.name != "slurm":
            raise ClusterError(
                f"{', '.join(changed)}: only for --cluster slurm, and this is --cluster "
                f"{self.name}. Choose --cluster slurm, or omit them."
            )

    @property
    def name(self) -> str:
        """Name or address of the cluster."""
        return self.cluster or "local"

    @contextmanager
    def open(self) -> Iterator[Client]:
        """Open a client of the cluster; see :func:`pipelines.cluster.client.open_client`."""
        from pipelines.cluster.client import open_client

        with open_client(self.name, workers=self.workers, slurm=self.slurm) as client:
            yield client


def check_cluster(cluster: str, workers: int | None = None) -> None:
    """Refuse a cluster that does not exist, or a number of workers that it does not take.

    Raises
    ------
    ClusterError
        Naming the choices.
    """
    if cluster not in ("local", "slurm") and not cluster.startswith(("tcp://", "tls://")):
        raise ClusterError(
            f"There is no cluster '{cluster}'. Choose local, slurm, or the address of a running "
            "Dask scheduler, tcp://HOST:PORT or tls://HOST:PORT."
        )
    if workers is not None and (cluster != "local" or workers < 1):
        raise ClusterError(
            f"{workers} workers on '{cluster}': a number of workers, at least 1, belongs to the "
            "cluster 'local'. SLURM takes a number of jobs, a running scheduler has its workers."
        )
