"""Dask workers in SLURM jobs: submitted, watched, replaced and, at the end, cancelled."""

from __future__ import annotations

import contextlib
import logging
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

from pipelines.cli.options import ClusterError, SlurmOptions
from pipelines.cluster.job_settings import configured, expanded, settings_of

# The import of dask_jobqueue lets Ctrl-C end the process with exit code 0, as if all were done.
_on_interrupt = signal.getsignal(signal.SIGINT)
from dask_jobqueue.slurm import SLURMCluster, SLURMJob  # noqa: E402

signal.signal(signal.SIGINT, _on_interrupt)

logger = logging.getLogger(__name__)

_PROGRAMS = ("sbatch", "squeue", "scancel")
_SECONDS = 30.0  # for a reply of a busy controller, and for cancelled jobs to end
_RETRY_SECONDS = 60.0  # between submissions of a job that SLURM refuses while others run
_JOB_ID = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?\s*$", re.MULTILINE)
_FRUITLESS_JOBS = 3  # jobs in a row without a worker after which the run ends
# Reasons for which SLURM accepts a job and then never starts it (squeue(1), JOB REASON CODES;
# for an account or QOS without access, a sentence of slurmctld). `sbatch --test-only` does not
# report these, and refuses jobs that would only have to wait for drained nodes.
_NEVER = re.compile(
    r"PartitionTimeLimit|BadConstraints|Invalid(Account|QOS)|(Assoc|QOS)Max\w+PerJob|"
    r"Job's (account|QOS) "
)


def job_script(options: SlurmOptions) -> str:
    """Return the script that SLURM would get for a job, without the options of the credentials.

    Raises `ClusterError` if neither the options nor Dask's configuration state the cores and memory
    of a job.
    """
    settings = settings_of(options, "bragg", Path())
    for name in ("scheduler_options", "silence_logs", "name"):
        del settings[name]
    script: str = _Job("tls://SCHEDULER", name="bragg-1", **settings).job_script()
    return script


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
        reason = getattr(error, "stderr", None) or str(error)
        reason = reason.decode() if isinstance(reason, bytes) else reason  # bytes after a timeout
        raise ClusterError(f"SLURM does not answer: {' '.join(reason.split())}") from error
    shared = expanded(options.shared_directory or configured("shared-temp-directory") or "~")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cleanup_on_signals())
        try:
            directory = tempfile.TemporaryDirectory(
                prefix=f".{name}-", dir=shared, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise ClusterError(
                f"Cannot write in {shared} ({error}). Name a directory that this machine and the "
                "nodes share, as an option or as jobqueue.slurm.shared-temp-directory."
            ) from error
        path = Path(stack.enter_context(directory))
        settings = settings_of(options, name, path)
        try:
            cluster = _Cluster(security=_credentials(path), **settings)
        except (OSError, ValueError, RuntimeError) as error:
            raise ClusterError(f"The scheduler for SLURM's jobs does not start: {error}") from error
        stack.callback(_close, cluster, name)
        cluster.submit(options.job_limits)
        client = stack.enter_context(Client(cluster))
        watch = stack.enter_context(_Watch(cluster, client, name, options.job_limits[1]))
        try:
            yield client
        except Exception as error:
            if watch.failure:
                raise ClusterError(watch.failure) from error
            raise


@contextlib.contextmanager
def _cleanup_on_signals() -> Iterator[None]:
    """Exit on SIGTERM and SIGHUP (from timeout, a service, a closed terminal), so that jobs end."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    changed = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                changed[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def _credentials(directory: Path) -> Security:
    """Make TLS credentials for this run, as files that only this user can read."""
    credentials = Security.temporary().get_tls_config_for_role("worker")
    files = {}
    for key in ("ca_file", "cert", "key"):
        files[key] = directory / key
        files[key].touch(mode=0o600)
        files[key].write_text(credentials[key])
    pairs = {
        f"tls_{role}_{key}": str(files[key])
        for role in ("scheduler", "worker", "client")
        for key in ("cert", "key")
    }
    return Security(require_encryption=True, tls_ca_file=str(files["ca_file"]), **pairs)


class _Job(SLURMJob):  # type: ignore[misc]
    """A job that stores SLURM's refusal, which the base class only logs."""

    # So the id is alone on its line, whatever banners and wrappers of a site print.
    submit_command = "sbatch --parsable"
    refusal = ""
    refused_at = 0.0

    async def start(self) -> None:
        try:
            await super().start()
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).rpartition("stderr:\n")[2].replace("sbatch: error: ", "")
            self.refusal = "; ".join(reason.split("\n")).strip("; ")
            self.refused_at = time.monotonic()
            self.status = Status.running  # close() expects it

    def _job_id_from_submit_output(self, out: str) -> str:
        ids = _JOB_ID.findall(out)
        if not ids:
            raise ValueError(f"stderr:\nsbatch names no job; it prints {out.strip()[:200]!r}")
        return str(ids[-1])  # banners come first

    async def close(self) -> None:
        # By the run's name, too: with a wrong number alone it would be somebody else's job.
        self.cancel_command = f"scancel --name {shlex.quote(self.job_name)}"
        await super().close()
        self.status = Status.closed


class _Cluster(SLURMCluster):  # type: ignore[misc]
    """A cluster that replaces lost jobs."""

    job_cls = _Job
    adaptive: Any = None

    def new_worker_spec(self) -> Any:
        # A new name for every job: some time after a loss the base class closes the job of that
        # name, which would be the new one.
        self._i += 1
        return super().new_worker_spec()

    def submit(self, jobs: tuple[int, int]) -> None:
        """Submit a job, to see whether SLURM accepts it, and let Dask submit the rest."""

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
            # Workers of a job start and end together. With a short target duration the tasks in
            # hand ask for all jobs allowed. Jobs end after 30 checks, a second each, without tasks:
            # new jobs may wait in the queue for long.
            # The job's name, bragg-RUN-NUMBER; that of a worker may end in -NUMBER.
            worker_key=lambda worker: "-".join(str(worker.name).split("-")[:3]),
            target_duration="100 ms",
            wait_count=30,
        )

    def drop_lost(self, jobs: dict[str, _Job], queue: Mapping[str, str]) -> int:
        """Drop those of `jobs` that are not in the queue, so that Dask submits new ones."""
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


class _Watch(threading.Thread):
    """Compares Dask's list of jobs with SLURM's queue while the client is open.

    Dask alone does not notice a job that ends before its workers connect, nor, with several workers
    in a job, one that ends later: it would wait for them for ever.
    """

    def __init__(self, cluster: _Cluster, client: Client, name: str, most_jobs: int) -> None:
        super().__init__(name="slurm-watch", daemon=True)
        self.failure = ""
        self._cluster, self._client, self._run_name = cluster, client, name
        self._most_jobs = most_jobs
        self._fruitless = 0
        self._last_job = ""
        self._reasons: set[str] = set()
        self._stop_requested = threading.Event()
        lost_worker_timeout = dask.config.get("distributed.deploy.lost-worker-timeout")
        self._interval: float = parse_timedelta(lost_worker_timeout) / 3

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_requested.set()
        self.join()

    def run(self) -> None:
        while not self._stop_requested.wait(self._interval):
            jobs = dict(self._cluster.workers)  # before the queue, which then holds all of them
            try:
                queue = _queue(self._run_name)
            except (OSError, subprocess.SubprocessError):
                continue  # the controller is too busy to answer
            self.failure = self._cluster.sync(self._failure_of, jobs, queue)
            if self.failure:
                self._client.close()
                return

    async def _failure_of(self, jobs: dict[str, _Job], queue: dict[str, str]) -> str:
        """Return why the run cannot go on, or an empty text."""
        known = {job.job_id for job in self._cluster.workers.values()}
        unknown = set(queue) - known
        if len(unknown) > 2 * self._most_jobs:  # as many may be about to end
            return (
                f"SLURM's queue holds {len(unknown)} jobs of this run that are not known here: the "
                f"output of sbatch is not understood. Call it without a wrapper."
            )
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
    """Return the jobs of this name in SLURM's queue: id and reason to wait, or ``None``."""
    command = ["squeue", "--noheader", "--name", name, "--format", "%i|%r"]
    queue = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return dict(line.split("|", 1) for line in queue.stdout.split("\n") if line)


def _close(cluster: _Cluster, name: str) -> None:
    """End the cluster and all jobs of this name, including those that Dask lost track of."""
    if cluster.adaptive:
        cluster.adaptive.stop()  # no new jobs from here on
    # Jobs first: a worker that just starts should still reach the scheduler.
    _cancel(name)
    try:
        cluster.close()
    except Exception:
        # It must not replace the error that ended the run.
        logger.exception("Dask's cluster did not close in order.")
    finally:
        _cancel(name)  # a job that was being submitted


def _cancel(name: str) -> None:
    command = ["scancel", "--name", name]
    try:
        subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS)
        deadline = time.monotonic() + _SECONDS
        while (left := _queue(name)) and time.monotonic() < deadline:
            time.sleep(0.1)
    except (OSError, subprocess.SubprocessError) as error:
        left = {f"SLURM does not answer ({error})": ""}
    if left:
        logger.error("Jobs may be left in the queue: %s (squeue --name %s).", ", ".join(left), name)
