"""Where tasks run: processes of this machine, SLURM jobs, or a running Dask scheduler."""

import asyncio
import contextlib
import getpass
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Security, WorkerPlugin, as_completed
from distributed.comm import connect
from distributed.system import MEMORY_LIMIT
from distributed.utils import get_mp_context
from threadpoolctl import threadpool_limits

from bragg_data.errors import first_line
from bragg_data.isolated_process import SINGLE_THREAD
from pipelines.cli import options
from pipelines.cli.console import Progress
from pipelines.cluster import scheduler

_WORKERS_SHARE_OF_MEMORY = 0.75  # the rest is for the driver and the scheduler
_ATTEMPTS, _RETRY_SECONDS = 3, 0.5  # at the start of workers that die
_REPEAT_SECONDS = 0.2  # before a signal is sent again: not at once in the same finaliser


@contextlib.contextmanager
def open_client(
    cluster: str = "local",
    *,
    workers: int | None = None,
    slurm: options.SlurmOptions | None = None,
    connect_seconds: float = 8.0,
) -> Iterator[Client]:
    """Open a Dask client and, at the end, leave nothing of its cluster behind.

    On every kind of cluster a worker computes with one thread, so that sums of floating-point
    numbers do not depend on the number of cores, and can import this project. A worker that dies is
    replaced and its tasks run again on another. Raises `ClusterError` if the scheduler cannot be
    reached, SLURM refuses the jobs, or the workers cannot import this project. If SLURM brings no
    more workers, the client is closed: whatever waits for it ends with one of Dask's errors, and so
    with this one.

    Parameters
    ----------
    cluster, slurm, workers
        ``local``: worker processes on this machine, by default one for each core available to this
        process. ``slurm``: jobs of the SLURM whose programs are on PATH, with their options.
        ``tcp://HOST:PORT`` or ``tls://HOST:PORT``: a scheduler that runs already and goes on
        running (credentials from Dask's configuration, ``distributed.comm.tls``).
    connect_seconds
        Time limit for the connection to a running scheduler.
    """
    options.check_cluster(cluster, workers)
    opened: contextlib.AbstractContextManager[Client]
    if cluster == "local":
        opened = _open_local(workers or CPU_COUNT)
    elif cluster == "slurm":
        # Only here, since its import changes the handling of Ctrl-C.
        from pipelines.cluster.slurm import open_slurm

        opened = open_slurm(slurm or options.SlurmOptions())
    else:
        opened = _open_running(cluster, connect_seconds)
    with _repeat_lost_signals(), _early_interrupts_unlogged(), opened as client:
        _prepare(client, cluster)
        yield client


def _prepare(client: Client, cluster: str) -> None:
    """Let the workers compute with one thread; those that die meanwhile are replaced by others."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            client.register_plugin(_SingleThread())
        except (OSError, TimeoutError) as error:
            if attempt == _ATTEMPTS:
                raise options.ClusterError(
                    f"The workers of '{cluster}' die while they start ({first_line(error)}). Look "
                    "for a lack of memory."
                ) from error
            time.sleep(_RETRY_SECONDS)
        except Exception as error:  # the worker's, or a bare Exception with its text
            raise options.ClusterError(
                f"The workers of '{cluster}' cannot be prepared ({error}). They must be able to "
                "import this project: install it in their Python."
            ) from error
        else:
            return


def open_cluster(chosen: options.ClusterOptions) -> contextlib.AbstractContextManager[Client]:
    """Open a client of the cluster that a command's options name; see :func:`open_client`."""
    return open_client(chosen.name, workers=chosen.workers, slurm=chosen.slurm)


def gather_with_progress(
    futures: Sequence[Future], sizes: Sequence[int], doing: str, unit: str, *, quiet: bool = False
) -> list[Any]:
    """Wait for tasks of these sizes with a progress bar; return their results in the same order."""
    size_of = {future.key: size for future, size in zip(futures, sizes, strict=True)}
    results: dict[str, object] = {}
    with Progress(doing, sum(sizes), unit, quiet=quiet) as progress:
        for future, result in as_completed(futures, with_results=True):
            results[future.key] = result
            progress.advance(size_of[future.key])
    return [results[future.key] for future in futures]


class _SingleThread(WorkerPlugin):  # type: ignore[misc]
    """Limits numerical libraries to one thread, also in workers of a running scheduler.

    It is pickled by its name: its registration fails where a worker cannot import this project.
    """

    name = "single-thread"

    def setup(self, worker: Any) -> None:  # noqa: ARG002
        import numpy as np  # noqa: F401  (loads the library to limit)

        os.environ.update(SINGLE_THREAD)  # for libraries that are loaded later
        self._limits = threadpool_limits(1)

    def teardown(self, worker: Any) -> None:  # noqa: ARG002
        self._limits.restore_original_limits()


def _preload() -> None:
    """Let the process that local workers fork from import what simulations need, once for all."""
    context = get_mp_context()
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["distributed", "pandas", "pipelines.simulation.simulators"])


@contextlib.contextmanager
def _open_local(workers: int) -> Iterator[Client]:
    _preload()
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="bragg-workers-", ignore_cleanup_errors=True)
        )
        stack.enter_context(_environment_restored())
        with _environment_restored(), dask.config.set({"temporary-directory": scratch}):
            # The libraries read these when they are loaded, which a spawned process may do before
            # Dask's own code runs in it: they have to be in the environment that it inherits.
            os.environ.update(SINGLE_THREAD)
            with _interrupts_ignored():
                cluster = stack.enter_context(_local_cluster(workers))
        yield stack.enter_context(Client(cluster))


def _local_cluster(workers: int) -> LocalCluster:
    """Start workers; where one dies before it is there, all are started again."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=int(_WORKERS_SHARE_OF_MEMORY * MEMORY_LIMIT / workers),
                dashboard_address="127.0.0.1:0",
                # A worker's heartbeat while the cluster closes is logged as an error.
                silence_logs=logging.CRITICAL,
                env=SINGLE_THREAD | _storage_variables(),
                scheduler_kwargs=scheduler.OPTIONS,
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            if attempt == _ATTEMPTS:
                raise options.ClusterError(
                    f"{workers} worker processes cannot be started ({first_line(error)}). Look for "
                    "a lack of memory, or take fewer with --workers."
                ) from error
            time.sleep(_RETRY_SECONDS)
    raise AssertionError  # the last attempt returns or raises


def _storage_variables() -> dict[str, str]:
    """Return what leads workers to object storage.

    They inherit the environment of the process that forks them, which may have begun before.
    """
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@contextlib.contextmanager
def _repeat_lost_signals() -> Iterator[None]:
    """Send a signal again if Python drops its exception, as in finalisers, which Dask has."""
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield  # only the main thread handles signals
        return
    before = sys.unraisablehook

    def repeat(dropped: "sys.UnraisableHookArgs") -> None:  # known to type checkers only
        before(dropped)
        number = 0
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            number = signal.SIGINT
        elif isinstance(dropped.exc_value, SystemExit) and isinstance(dropped.exc_value.code, int):
            number = dropped.exc_value.code - 128
        if number > 0 and threading.current_thread() is main:
            timer = threading.Timer(_REPEAT_SECONDS, signal.pthread_kill, (main.ident, number))
            timer.daemon = True
            timer.start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _early_interrupts_unlogged() -> Iterator[None]:
    """Drop the traceback of Ctrl-C before distributed's ``sync`` has assigned its future."""

    def of_interest(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, NameError) and "'future'" in str(error))

    logger = logging.getLogger("tornado.application")
    logger.addFilter(of_interest)
    try:
        yield
    finally:
        logger.removeFilter(of_interest)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C here, and in processes started here for good: a terminal sends it to all."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can be changed in the main thread only
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Restore the workers' variables: they would limit libraries of this process as well."""
    names = (*SINGLE_THREAD, "PYTHONHASHSEED", "MALLOC_TRIM_THRESHOLD_", "__DASK_PARENT_PID")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def dashboard_text(client: Client, cluster: str) -> str:
    """Return the address of the dashboard, and for SLURM how to see it from another machine.

    It is open to this machine alone, as it lets nobody log in.
    """
    port = urlsplit(client.dashboard_link).port
    if cluster not in ("local", "slurm") or port is None:
        return str(client.dashboard_link)
    address = f"http://127.0.0.1:{port}/status"
    if cluster == "local":
        return address
    here = f"{getpass.getuser()}@{socket.getfqdn()}"
    return f"{address} (from elsewhere after: ssh -L {port}:127.0.0.1:{port} {here})"


async def _reach(address: str, seconds: float) -> None:
    """Connect to an address and disconnect, to raise the error that a client would meet."""
    comm = await connect(address, seconds, **Security().get_connection_args("client"))
    await comm.close()


@contextlib.contextmanager
def _open_running(address: str, connect_seconds: float) -> Iterator[Client]:
    try:
        # A client that cannot connect stays Dask's default until it is collected, and may lock up
        # the process then.
        asyncio.run(_reach(address, connect_seconds))
        client = Client(address, timeout=connect_seconds)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise options.ClusterError(
            f"No Dask scheduler answers at {address} ({error}). Start one there with "
            "'dask scheduler', or choose the cluster local or slurm."
        ) from error
    with client:
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone, the error is known
                client.unregister_worker_plugin(_SingleThread.name)
