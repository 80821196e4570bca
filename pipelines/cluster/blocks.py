"""Compute the missing blocks of the store on a cluster: retried, and committed in batches."""

import ctypes
import faulthandler
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import cast

from distributed import Client, Future, KilledWorker
from icechunk.session import ForkSession

from bragg_data.store import schema
from bragg_data.store.block_writer import BlockResult, BlockWriter, failed_block
from pipelines.cli.console import Progress

ATTEMPTS = 3  # at a block in a run
# A commit takes some 20 ms, whatever is in it, so blocks are committed in batches. A kill loses the
# blocks being computed and those not committed: as many of these, at most, as there are workers.
_BLOCKS_PER_COMMIT = 16
_SECONDS_PER_COMMIT = 5.0


class BlocksError(RuntimeError):
    """Blocks that cannot be computed."""


def do_blocks(
    client: Client,
    writer: BlockWriter,
    submit: Callable[[int, ForkSession], Future],
    *,
    doing: str,
    unit: str,
) -> Progress:
    """Compute the missing blocks of a group of the store on a cluster and commit them.

    Raises `BlocksError` or `StoreError` if the cluster is gone, or the store cannot be written to.

    The writer of the group is entered. ``submit`` sends a block with a fork to the cluster; its
    task returns a :class:`~bragg_data.store.block_writer.BlockResult`, or an error that every other
    block would meet as well, which is raised here. ``doing`` and ``unit`` are for the progress bar:
    "Simulating", "patterns".
    """
    todo = deque(writer.missing())
    attempts: Counter[int] = Counter()
    running: dict[Future, int] = {}
    finished: SimpleQueue[Future] = SimpleQueue()
    waiting: list[BlockResult] = []
    workers, committed = _threads(client), time.monotonic()
    n_finished, pause = 0, _SECONDS_PER_COMMIT

    def commit() -> float:
        writer.commit(waiting)
        waiting.clear()
        _return_memory()
        return time.monotonic()

    with Progress(doing, writer.count, unit, done=writer.n_done) as progress:
        try:
            while todo or running:
                # Few blocks at a time keep memory flat; enough for a cluster to start more workers.
                while todo and len(running) < max(8, 4 * workers):
                    block = todo.popleft()
                    attempts[block] += 1
                    future = submit(block, writer.fork())
                    running[future] = block
                    future.add_done_callback(finished.put)
                futures = _next(finished)
                if not futures:
                    workers = _threads(client)
                    if time.monotonic() - committed > pause:
                        committed = commit()
                    progress.tick(_note(workers, writer, attempts))
                    continue
                for result in _results(client, {f: running.pop(f) for f in futures}, writer):
                    block = result.block
                    if result.fork is None and not result.final and attempts[block] < ATTEMPTS:
                        todo.append(block)
                        continue
                    if attempts[block] == 1:
                        del attempts[block]  # of a million, most need one
                    waiting.append(result)
                    n_finished += 1
                    progress.advance(int((result.status == schema.DONE).sum()))
                pause = max(_SECONDS_PER_COMMIT, workers * progress.seconds / max(n_finished, 1))
                age = time.monotonic() - committed
                if len(waiting) >= max(_BLOCKS_PER_COMMIT, workers) or age > pause:
                    committed, workers = commit(), _threads(client)
                    progress.tick(_note(workers, writer, attempts))
        finally:
            writer.commit(waiting)
    return progress


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library can do that."""
    # What commits free stays in glibc's heaps otherwise: 7 MiB in a thousand blocks.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def ends_process_after(seconds: float | None) -> Iterator[None]:
    """End this process, a worker, if what is done within takes longer; None: never.

    Another worker gets its task. A thread of C does it, which nothing that hangs can hold up:
    neither compiled code with the interpreter's lock, nor what waits without it, for which Dask
    takes the worker as alive.
    """
    if seconds is None:
        yield
        return
    with Path(os.devnull).open("w") as nowhere:  # for tracebacks
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def failures_text(writer: BlockWriter) -> str:
    """Return how many blocks failed, why the first did, and the remedy, without a full stop."""
    block, reason = min(writer.failures.items())
    return (
        f"{len(writer.failures)} of {writer.n_blocks} blocks failed; the others are in the store. "
        f"Block {block} failed with {reason.rstrip('.')}. Run the same command again to retry"
    )


def _threads(client: Client) -> int:
    """Return the number of tasks that can run at a time; a lost cluster is no block's failure."""
    with suppress(OSError, TimeoutError):
        if client.status == "running":
            return sum(client.nthreads().values())
    raise BlocksError(
        "The cluster does not answer any more. What was committed stays: run it again to resume."
    )


def _note(workers: int, writer: BlockWriter, attempts: Counter[int]) -> str:
    notes = [f"{workers} worker{'s' * (workers > 1)}" if workers else "waiting for workers"]
    if writer.failures:
        notes.append(f"{len(writer.failures)} blocks failed")
    if retried := sum(count > 1 for count in attempts.values()):
        notes.append(f"{retried} blocks retried")
    return ", ".join(notes)


def _next(finished: SimpleQueue[Future]) -> list[Future]:
    """Wait for a second, or until a future is finished; return all that are."""
    futures: list[Future] = []
    with suppress(Empty):
        futures.append(finished.get(timeout=1.0))
        while True:
            futures.append(finished.get_nowait())
    return futures


def _results(
    client: Client, blocks: dict[Future, int], writer: BlockWriter
) -> Iterator[BlockResult]:
    """Fetch results together, as each request takes some ms; one by one where there is an error."""
    try:
        results = client.gather(list(blocks))
    except Exception:
        results = [_result(client, future, block, writer) for future, block in blocks.items()]
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


def _result(client: Client, future: Future, block: int, writer: BlockWriter) -> BlockResult:
    try:
        return cast("BlockResult", future.result())
    except Exception as error:  # the worker died, for example
        _threads(client)
        rows = writer.rows(block)
        if isinstance(error, KilledWorker):
            error = RuntimeError(
                "the workers that computed it died, each time: look for a lack of memory, or for "
                "what takes minutes, at which a worker is ended"
            )
        return failed_block(block, rows.stop - rows.start, error)
