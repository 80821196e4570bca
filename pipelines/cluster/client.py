"""Where tasks run: processes of this machine, SLURM jobs, or a running Dask scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Security, WorkerPlugin, as_completed
from distributed.comm import connect
from distributed.system import MEMORY_LIMIT
from threadpoolctl import threadpool_limits

from bragg_data.simulation.isolated_process import SINGLE_THREAD
from pipelines.cli.console import Progress
from pipelines.cluster.options import ALLOWED_FAILURES, ClusterError, SlurmOptions, check_cluster

_WORKERS_SHARE_OF_MEMORY = 0.75  # the rest is the driver's and the scheduler's
_CONNECT_SECONDS = 8.0
_AGAIN_SECONDS = 0.2  # after which a signal is given again: not at once in the same finaliser


@contextlib.contextmanager
def open_client(
    cluster: str = "local", *, workers: int | None = None, slurm: SlurmOptions | None = None
) -> Iterator[Client]:
    """Open a Dask client and, at the end, leave nothing of its cluster behind.

    On every kind of cluster a worker computes with one thread, so that sums of floating-point
    numbers do not depend on the number of cores, and can import this project. A worker that dies
    is replaced and its tasks run again elsewhere.

    Parameters
    ----------
    cluster
        ``local``: worker processes on this machine. ``slurm``: jobs of the SLURM whose programs
        are on PATH. ``tcp://HOST:PORT`` or ``tls://HOST:PORT``: a scheduler that runs already and
        goes on running (credentials from Dask's configuration, ``distributed.comm.tls``).
    workers
        Number of processes of ``local``; by default the number of cores available to this process.
    slurm
        Options of ``slurm``.

    Yields
    ------
    Client
        If SLURM stops giving workers for good, the client is closed: whatever waits for it ends
        with one of Dask's errors, which leaves this context as a ClusterError.

    Raises
    ------
    ClusterError
        If `cluster` is none of the above, the scheduler cannot be reached, SLURM refuses the jobs,
        or the workers cannot import this project.
    """
    check_cluster(cluster, workers)
    opened: contextlib.AbstractContextManager[Client]
    if cluster == "local":
        opened = _open_local(workers or CPU_COUNT)
    elif cluster == "slurm":
        # Not before it is needed: see what its import does to Ctrl-C.
        from pipelines.cluster.slurm import open_slurm

        opened = open_slurm(slurm or SlurmOptions())
    else:
        opened = _open_running(cluster)
    with _no_signal_lost(), opened as client:
        try:
            client.register_plugin(_OneThread())
        except Exception as error:  # the worker's, or a bare Exception with its text
            raise ClusterError(
                f"The workers of '{cluster}' cannot be prepared ({error}). They must be able to "
                "import this project: install it in their Python."
            ) from error
        yield client


def gathered(
    futures: Sequence[Future], sizes: Sequence[int], doing: str, unit: str, *, quiet: bool = False
) -> list[Any]:
    """Wait for tasks with a progress bar, and return their results in their order.

    Parameters
    ----------
    futures, sizes
        The tasks, and how much each of them does.
    doing, unit, quiet
        As for :class:`~pipelines.cli.console.Progress`.
    """
    order = {future.key: number for number, future in enumerate(futures)}
    results: dict[int, Any] = {}
    with Progress(doing, sum(sizes), unit, quiet=quiet) as progress:
        for future, result in as_completed(futures, with_results=True):
            number = order[future.key]
            results[number] = result
            progress.advance(sizes[number])
    return [results[number] for number in range(len(futures))]


class _OneThread(WorkerPlugin):  # type: ignore[misc]
    """One thread per numerical library also where workers were started by someone else.

    Being pickled by its name, it is the proof that a worker can import this project, too.
    """

    name = "one-thread"

    def setup(self, worker: Any) -> None:  # noqa: ARG002
        import numpy as np  # noqa: F401  (loads the library that is to be limited)

        os.environ.update(SINGLE_THREAD)  # for libraries that are loaded later
        self._limits = threadpool_limits(1)

    def teardown(self, worker: Any) -> None:  # noqa: ARG002
        self._limits.restore_original_limits()


@contextlib.contextmanager
def _open_local(workers: int) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="bragg-workers-", ignore_cleanup_errors=True)
        )
        stack.enter_context(_environment_kept())
        with _environment_kept(), dask.config.set({"temporary-directory": scratch}):
            # The libraries read these when they are loaded, which a spawned process may do before
            # Dask's own code runs in it: they have to be in the environment that it inherits.
            os.environ.update(SINGLE_THREAD)
            with _interrupts_ignored():
                cluster = stack.enter_context(
                    LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        processes=True,
                        memory_limit=int(_WORKERS_SHARE_OF_MEMORY * MEMORY_LIMIT / workers),
                        dashboard_address="127.0.0.1:0",
                        silence_logs=logging.ERROR,
                        env=SINGLE_THREAD,
                        scheduler_kwargs={"allowed_failures": ALLOWED_FAILURES},
                    )
                )
        yield stack.enter_context(Client(cluster))


@contextlib.contextmanager
def _no_signal_lost() -> Iterator[None]:
    """Give a signal to end again, if it came where Python drops what its handler raises.

    That is in a finaliser or in a callback of the garbage collector, both of which Dask has.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield  # no signal is handled here
        return
    before = sys.unraisablehook

    def told(dropped: sys.UnraisableHookArgs) -> None:
        before(dropped)
        number = 0
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            number = signal.SIGINT
        elif isinstance(dropped.exc_value, SystemExit) and isinstance(dropped.exc_value.code, int):
            number = dropped.exc_value.code - 128
        if number > 0 and threading.current_thread() is main:
            again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main.ident, number))
            again.daemon = True
            again.start()

    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C for a while, here and for good in the processes that begin meanwhile.

    A terminal sends it to the workers too, which would die loudly while the driver, which alone
    has to obey it, cleans up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler can be changed here, nor is there a terminal behind
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what is done, here and by Dask's nannies, to this process's environment for workers.

    Otherwise whatever this process loads and starts later would have one thread as well.
    """
    names = (*SINGLE_THREAD, "PYTHONHASHSEED", "MALLOC_TRIM_THRESHOLD_", "__DASK_PARENT_PID")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


async def _reach(address: str) -> None:
    """Raise what keeps a client from connecting to an address."""
    arguments = Security().get_connection_args("client")
    comm = await connect(address, timeout=_CONNECT_SECONDS, **arguments)
    await comm.close()


@contextlib.contextmanager
def _open_running(address: str) -> Iterator[Client]:
    try:
        # Before there is a client: one that cannot connect stays Dask's default until it is
        # collected, and may lock up the process then.
        asyncio.run(_reach(address))
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ClusterError(
            f"No Dask scheduler answers at {address} ({error}). Start one there with "
            "'dask scheduler', or choose the cluster local or slurm."
        ) from error
    with client:
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone, the error is known
                client.unregister_worker_plugin(_OneThread.name)
