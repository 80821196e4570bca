"""Blocks of the store through a cluster: a few at a time, tried again, committed."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import cast

from distributed import Client, Future
from icechunk.session import ForkSession

from bragg_data.store import schema
from bragg_data.store.block_writer import BlockResult, BlockWriter, failed_block
from pipelines.cli.console import Progress

ATTEMPTS = 3
"""How often a block is tried in one run."""

# A commit rewrites the list of all chunks, so not every block gets one of its own. A kill loses
# what is not committed; it loses the blocks in hand anyway, so to wait as long as a block takes
# costs no more than that again.
_BLOCKS_PER_COMMIT = 16
_SECONDS_PER_COMMIT = 5.0


class BlocksError(RuntimeError):
    """Blocks that cannot be done."""


def do_blocks(
    client: Client,
    writer: BlockWriter,
    submit: Callable[[int, ForkSession], Future],
    *,
    doing: str,
    unit: str,
) -> Progress:
    """Do the missing blocks of a group of the store on a cluster and commit them.

    Parameters
    ----------
    client
        Of the cluster.
    writer
        Of the group, entered.
    submit
        Sends a block with a fork to the cluster. What the task returns is a
        :class:`~bragg_data.store.block_writer.BlockResult`, or the error that all other blocks
        would meet as well; that is raised here.
    doing, unit
        What is shown: "Simulating", "patterns".

    Returns
    -------
    How it went: how many samples, in which time.

    Raises
    ------
    BlocksError
        If the cluster is gone.
    StoreError
        If the store takes them no more.
    """
    todo = deque(writer.missing())
    attempts: Counter[int] = Counter()
    flying: dict[Future, int] = {}
    landed: SimpleQueue[Future] = SimpleQueue()
    waiting: list[BlockResult] = []
    workers, committed = _threads(client), time.monotonic()
    landings, pause = 0, _SECONDS_PER_COMMIT
    with Progress(doing, writer.count, unit, done=writer.n_done) as progress:
        try:
            while todo or flying:
                # Few in flight keep memory flat, yet enough for a cluster to grow by.
                while todo and len(flying) < max(8, 4 * workers):
                    block = todo.popleft()
                    attempts[block] += 1
                    future = submit(block, writer.fork())
                    flying[future] = block
                    future.add_done_callback(landed.put)
                try:
                    future = landed.get(timeout=1.0)
                except Empty:
                    workers = _threads(client)
                    if time.monotonic() - committed > pause:
                        writer.commit(waiting)
                        waiting.clear()
                        committed = time.monotonic()
                    progress.tick(_note(workers, writer, attempts))
                    continue
                result = _result(client, future, flying.pop(future), writer)
                if result.fork is None and not result.final and attempts[result.block] < ATTEMPTS:
                    todo.append(result.block)
                    continue
                waiting.append(result)
                landings += 1
                progress.advance(int((result.status == schema.DONE).sum()))
                pause = max(_SECONDS_PER_COMMIT, workers * progress.seconds / landings)
                age = time.monotonic() - committed
                if len(waiting) >= _BLOCKS_PER_COMMIT or age > pause:
                    writer.commit(waiting)
                    waiting.clear()
                    workers, committed = _threads(client), time.monotonic()
                    progress.tick(_note(workers, writer, attempts))
        finally:
            writer.commit(waiting)
    return progress


def _threads(client: Client) -> int:
    """Return how many tasks can run at a time.

    Raises
    ------
    BlocksError
        If there is no cluster any more: then no block is to blame.
    """
    try:
        if client.status == "running":
            return sum(client.nthreads().values())
    except (OSError, TimeoutError):
        pass
    raise BlocksError(
        "The cluster does not answer any more. What was committed stays: run the same command "
        "again to resume."
    )


def _note(workers: int, writer: BlockWriter, attempts: Counter[int]) -> str:
    notes = [f"{workers} worker{'s' * (workers > 1)}" if workers else "waiting for workers"]
    if writer.failures:
        notes.append(f"{len(writer.failures)} blocks failed")
    if retried := sum(count > 1 for count in attempts.values()):
        notes.append(f"{retried} blocks retried")
    return ", ".join(notes)


def _result(client: Client, future: Future, block: int, writer: BlockWriter) -> BlockResult:
    try:
        result = future.result()
    except Exception as error:  # the worker died, for example
        _threads(client)
        rows = writer.rows(block)
        return failed_block(block, rows.stop - rows.start, error)
    if isinstance(result, Exception):
        raise result
    return cast("BlockResult", result)
