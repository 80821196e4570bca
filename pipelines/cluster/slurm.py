"""Dask workers in SLURM jobs: submitted, watched, replaced and, at the end, cancelled."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Client, Security
from distributed.core import Status

from bragg_data.simulation.isolated_process import SINGLE_THREAD
from pipelines.cluster.options import ALLOWED_FAILURES, ClusterError, SlurmOptions

# The import of dask_jobqueue lets Ctrl-C end the process with exit code 0, as if all were done.
_on_interrupt = signal.getsignal(signal.SIGINT)
from dask_jobqueue.slurm import SLURMCluster, SLURMJob  # noqa: E402

signal.signal(signal.SIGINT, _on_interrupt)

logger = logging.getLogger(__name__)

_PROGRAMS = ("sbatch", "squeue", "scancel")
_SECONDS = 30.0  # for one answer of a busy controller, and for cancelled jobs to go
_RETRY_SECONDS = 60.0  # between submissions of a job that SLURM refuses while others run
_FRUITLESS_JOBS = 3  # as many jobs that brought no worker, and we give up
# Reasons for which SLURM accepts a job and then never starts it (squeue(1), JOB REASON CODES;
# where an account or QOS is not let in, a sentence of slurmctld). `sbatch --test-only` does not
# find these, and refuses what would only have to wait for drained nodes.
_NEVER = re.compile(
    r"PartitionTimeLimit|BadConstraints|Invalid(Account|QOS)|(Assoc|QOS)Max\w+PerJob|"
    r"Job's (account|QOS) "
)


def job_script(options: SlurmOptions) -> str:
    """Return the script that SLURM would get for one job, without the credentials' options.

    Raises
    ------
    ClusterError
        If neither the options nor Dask's configuration tell the cores and memory of a job.
    """
    settings = _settings(options, "bragg", Path())
    for name in ("scheduler_options", "silence_logs", "name"):
        del settings[name]
    script: str = _Job("tls://SCHEDULER", name="bragg-1", **settings).job_script()
    return script


def _settings(options: SlurmOptions, name: str, directory: Path) -> dict[str, Any]:
    """Return the arguments of SLURMCluster; None among them stands for the configuration's."""
    cores = options.cores or _configured("cores")
    if not cores or not (options.memory or _configured("memory")):
        raise ClusterError(
            "SLURM has to be told how many cores and how much memory a job needs: give both as "
            "options, or as 'cores' and 'memory' under jobqueue.slurm in ~/.config/dask/*.yaml."
        )
    environment = {**options.variables, **SINGLE_THREAD}
    prologue = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    python = options.python or _configured("python")
    if not python:
        # The same Python, which may know this project from the working directory alone.
        project = shlex.quote(str(Path(__file__).resolve().parents[2]))
        prologue.append(f"export PYTHONPATH={project}${{PYTHONPATH:+:$PYTHONPATH}}")
    # Else workers would come and die, each with a task in hand, and the task would get the blame.
    prologue.append(
        f"{shlex.quote(python or sys.executable)} -c 'import pipelines.cluster.client' || exit 1"
    )
    scheduler = {
        "dashboard_address": "127.0.0.1:0",
        "allowed_failures": ALLOWED_FAILURES,
        **(_configured("scheduler-options") or {}),
    }
    if options.host:
        scheduler["host"] = options.host
    return {
        "name": name,
        "job_name": name,
        "queue": options.queue,
        "account": options.account,
        "walltime": options.walltime,
        "cores": cores,
        "processes": cores,
        "memory": options.memory,
        "interface": options.interface,
        "python": options.python,
        "job_extra_directives": [*(_configured("job-extra-directives") or ()), *options.directives],
        "job_script_prologue": [*(_configured("job-script-prologue") or ()), *prologue],
        "worker_extra_args": [*(_configured("worker-extra-args") or ()), "--no-dashboard"],
        "log_directory": _expanded(_configured("log-directory") or str(directory)),
        "scheduler_options": scheduler,
        "silence_logs": logging.ERROR,
    }


def _configured(key: str) -> Any:
    return dask.config.get(f"jobqueue.slurm.{key}")


def _expanded(path: str | Path) -> str:
    return os.path.expandvars(Path(path).expanduser())


@contextlib.contextmanager
def open_slurm(options: SlurmOptions) -> Iterator[Client]:
    """Open a client of workers in SLURM jobs; see :func:`pipelines.cluster.client.open_client`."""
    missing = [program for program in _PROGRAMS if not shutil.which(program)]
    if missing:
        raise ClusterError(
            f"SLURM's {', '.join(missing)} not found on PATH. Run this where jobs are submitted "
            "from (a login node), or choose the cluster local."
        )
    name = f"bragg-{secrets.token_hex(4)}"
    try:
        _queue(name)
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        words = words.decode() if isinstance(words, bytes) else words  # they are after a timeout
        raise ClusterError(f"SLURM does not answer: {' '.join(words.split())}") from error
    shared = _expanded(options.shared_directory or _configured("shared-temp-directory") or "~")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals_obeyed_in_order())
        try:
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix=f".{name}-", dir=shared, ignore_cleanup_errors=True
                )
            )
        except OSError as error:
            raise ClusterError(
                f"Cannot write in {shared} ({error}). Name a directory that this machine and the "
                "nodes share, as an option or as jobqueue.slurm.shared-temp-directory."
            ) from error
        settings = _settings(options, name, Path(directory))
        try:
            cluster = _Cluster(security=_credentials(Path(directory)), **settings)
        except (OSError, ValueError, RuntimeError) as error:
            raise ClusterError(f"The scheduler for SLURM's jobs does not start: {error}") from error
        stack.callback(_close, cluster, name)
        cluster.submit(options.job_limits)
        client = stack.enter_context(Client(cluster))
        watch = stack.enter_context(_Watch(cluster, client, name))
        try:
            yield client
        except Exception as error:
            if watch.failure:
                raise ClusterError(watch.failure) from error
            raise


@contextlib.contextmanager
def _signals_obeyed_in_order() -> Iterator[None]:
    """Let a signal to end (from timeout, a service, a closed terminal) cancel the jobs first."""

    def obey(number: int, _: object) -> None:
        sys.exit(128 + number)

    changed = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # an ignored one, as by nohup, stays so
                changed[number] = signal.signal(number, obey)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def _credentials(directory: Path) -> Security:
    """Make TLS credentials for this run, as files that the nodes can read and nobody else."""
    made = Security.temporary().get_tls_config_for_role("worker")
    files = {}
    for key in ("ca_file", "cert", "key"):
        files[key] = directory / key
        files[key].touch(mode=0o600)
        files[key].write_text(made[key])
    pairs = {
        f"tls_{role}_{key}": str(files[key])
        for role in ("scheduler", "worker", "client")
        for key in ("cert", "key")
    }
    return Security(require_encryption=True, tls_ca_file=str(files["ca_file"]), **pairs)


class _Job(SLURMJob):  # type: ignore[misc]
    """A job that remembers SLURM's refusal; the base class leaves it to the log."""

    refusal = ""
    refused_at = 0.0

    async def start(self) -> None:
        try:
            await super().start()
        except (OSError, RuntimeError, ValueError) as error:
            words = str(error).rpartition("stderr:\n")[2].replace("sbatch: error: ", "")
            self.refusal = "; ".join(words.split("\n")).strip("; ")
            self.refused_at = time.monotonic()
            self.status = Status.running  # so that close() is in order

    async def close(self) -> None:
        await super().close()
        self.status = Status.closed


class _Cluster(SLURMCluster):  # type: ignore[misc]
    """Jobs that are replaced when they are lost."""

    job_cls = _Job
    adaptive: Any = None

    def new_worker_spec(self) -> dict[str, Any]:
        # A new name for every job: the base class closes, some time after a loss, whatever then
        # bears the lost job's name.
        self._i += 1
        spec: dict[str, Any] = super().new_worker_spec()
        return spec

    def submit(self, jobs: tuple[int, int]) -> None:
        """Submit one job, to see whether SLURM takes it, and let Dask ask for the others."""

        async def submitted() -> None:
            await self

        self.scale(jobs=1)
        self.sync(submitted)
        for job in self.workers.values():
            if job.refusal:
                raise ClusterError(f"SLURM refuses this run's jobs: {job.refusal}")
        self.adaptive = self.adapt(
            minimum_jobs=jobs[0],
            maximum_jobs=jobs[1],
            # Workers of one job come and go together. A short target makes as many workers of the
            # tasks in hand as are allowed: jobs should not wait for a driver that is careful. They
            # go after 30 checks, a second each, without tasks: new ones may wait in the queue long.
            worker_key=_job_of_worker,
            target_duration="100 ms",
            wait_count=30,
        )

    def drop_lost(self, jobs: dict[str, _Job], queue: Mapping[str, str]) -> int:
        """Forget those of `jobs` that are not in the queue, which makes room for new ones."""
        lost = [
            name
            for name, job in jobs.items()
            if name in self.worker_spec
            and self.workers.get(name) is job
            and (
                job.job_id not in queue
                if job.job_id
                else job.refusal
                and (not queue or time.monotonic() - job.refused_at > _RETRY_SECONDS)
            )
        ]
        for name in lost:
            del self.worker_spec[name]
            self.workers.pop(name).status = Status.closed
        return len(lost)


def _job_of_worker(worker: Any) -> str:
    """Return the job's name, bragg-RUN-NUMBER, from the worker's, which may have a -NUMBER more."""
    return "-".join(str(worker.name).split("-")[:3])


class _Watch(threading.Thread):
    """Compare the jobs that Dask believes in with SLURM's queue, as long as the client is open.

    Dask alone does not see a job that ends before its workers come, nor, with several workers in a
    job, one that ends later: it would wait for them without end.
    """

    def __init__(self, cluster: _Cluster, client: Client, name: str) -> None:
        super().__init__(name="slurm-watch", daemon=True)
        self.failure = ""
        self._cluster, self._client, self._run_name = cluster, client, name
        self._fruitless = 0
        self._last_job = ""
        self._reasons: set[str] = set()
        self._stop_asked = threading.Event()
        lost_worker_timeout = dask.config.get("distributed.deploy.lost-worker-timeout")
        self._interval: float = parse_timedelta(lost_worker_timeout) / 3

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        """Look at the queue every few seconds until the failure or the end."""
        while not self._stop_asked.wait(self._interval):
            jobs = dict(self._cluster.workers)  # before the queue, which then knows all of them
            try:
                queue = _queue(self._run_name)
            except (OSError, subprocess.SubprocessError):
                continue  # a controller too busy to answer is no news about jobs
            self.failure = self._cluster.sync(self._judge, jobs, queue)
            if self.failure:
                self._client.close()
                return

    async def _judge(self, jobs: dict[str, _Job], queue: dict[str, str]) -> str:
        lost = self._cluster.drop_lost(jobs, queue)
        if self._cluster.scheduler.workers:
            self._fruitless = 0
            return ""
        self._fruitless += lost
        refusals = [job.refusal for job in jobs.values() if job.refusal]
        ended = [job.job_id for job in jobs.values() if job.job_id and job.job_id not in queue]
        self._last_job = ended[-1] if ended else self._last_job
        if self._fruitless >= _FRUITLESS_JOBS:
            if refusals:
                return f"SLURM refuses this run's jobs: {refusals[-1]}"
            return (
                f"{self._fruitless} SLURM jobs in a row ended before a worker in them reached the "
                f"scheduler at {self._cluster.scheduler_address}. Can the nodes reach that address "
                "(options interface and host), and does Python find this project there? The last "
                f"job's log ends: {self._log_end()}"
            )
        reasons = set(queue.values())
        if reasons and all(map(_NEVER.match, reasons)):
            return (
                f"SLURM took this run's jobs but will never start them ({', '.join(reasons)}). "
                "Change the queue, account or time limit."
            )
        if reasons - {"None"} - self._reasons:
            logger.warning("SLURM has not started a job yet: %s", ", ".join(reasons))
        self._reasons |= reasons
        return ""

    def _log_end(self) -> str:
        directory = Path(self._cluster._dummy_job.log_directory)
        logs = sorted(directory.glob(f"{self._run_name}-{self._last_job}.*"))
        text = " ".join(log.read_text(errors="replace")[-500:] for log in logs)
        return " ".join(text.split())


def _queue(name: str) -> dict[str, str]:
    """Return the reason why it waits, or ``None``, for each job of this name in SLURM's queue."""
    answer = subprocess.run(
        ["squeue", "--noheader", "--name", name, "--format", "%i|%r"],
        capture_output=True, text=True, check=True, timeout=_SECONDS,
    )  # fmt: skip
    return dict(line.split("|", 1) for line in answer.stdout.split("\n") if line)


def _close(cluster: _Cluster, name: str) -> None:
    """End the cluster and all jobs of this name, whether Dask knows of them or not."""
    if cluster.adaptive:
        cluster.adaptive.stop()  # no new jobs from here on
    # Jobs first: a worker that just starts should still find the scheduler listening.
    _cancel(name)
    try:
        cluster.close()
    except Exception:
        # Whatever it is, it must not take the place of the error that brought us here.
        logger.exception("Dask's cluster did not close in order.")
    finally:
        _cancel(name)  # one that was being submitted


def _cancel(name: str) -> None:
    try:
        subprocess.run(
            ["scancel", "--name", name], capture_output=True, check=False, timeout=_SECONDS
        )
        deadline = time.monotonic() + _SECONDS
        while (left := _queue(name)) and time.monotonic() < deadline:
            time.sleep(0.1)
    except (OSError, subprocess.SubprocessError) as error:
        left = {f"SLURM does not answer ({error})": ""}
    if left:
        logger.error(
            "Jobs may be left in SLURM's queue: %s. See 'squeue --name %s'.", ", ".join(left), name
        )
