"""Commit from many processes at once to one branch of a store, and count the commits that are lost.

    python benchmarks/commits.py [--store URI] [--commits 100] [--processes 20] [--no-lock]

The store is a new one in a temporary directory, unless named (as s3://BUCKET/PREFIX). Each commit
writes one number of an array. It is lost if it succeeded, and its number is not there. The exit
code is 1 if one is.
"""

import multiprocessing
import tempfile
import time
from itertools import repeat
from typing import Annotated

import icechunk
import numpy as np
import typer
import zarr
from typer import Option

from bragg_data.store.repository import Store, retried


def commit(uri: str, number: int, at: float, *, lock: bool) -> float:
    """Commit a number, not before a time; return the seconds that it took."""
    store = Store(uri)

    def work() -> None:
        session = store.repository.writable_session("main")
        zarr.open_array(session.store, path="numbers", mode="r+")[number] = number
        session.commit(str(number))

    time.sleep(max(0.0, at - time.time()))
    began = time.monotonic()
    store.committed(work) if lock else retried(work)
    return time.monotonic() - began


def lost_commits(uri: str, commits: int, processes: int, *, lock: bool) -> tuple[int, float]:
    """Return how many of some commits to a new store are lost, and the seconds of all."""
    store = Store(uri, create=True)
    session = store.repository.writable_session("main")
    array = {"shape": (commits,), "chunks": (1,), "dtype": "i4", "fill_value": -1}
    zarr.create_array(session.store, name="numbers", **array)
    session.commit("begin")
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(abs, range(4 * processes), 1)  # all have started
        began = time.time()
        tasks = zip(repeat(uri), range(commits), repeat(began + 0.5), repeat(lock), strict=False)
        pool.starmap(_commit, tasks, 1)
    seconds = time.time() - began - 0.5
    session = Store(uri).repository.readonly_session("main")
    numbers = zarr.open_array(session.store, path="numbers", mode="r")[:]
    return int((numbers != np.arange(commits)).sum()), seconds


def _commit(uri: str, number: int, at: float, lock: bool) -> float:
    return commit(uri, number, at, lock=lock)


def main(
    store: Annotated[str | None, Option(metavar="URI", help="A new store.")] = None,
    commits: Annotated[int, Option(min=1)] = 100,
    processes: Annotated[int, Option(min=1)] = 20,
    lock: Annotated[bool, Option(help="Hold the store's lock, where there is one.")] = True,
) -> None:
    """Commit from many processes at once, and count the commits that are lost."""
    with tempfile.TemporaryDirectory() as directory:
        uri = store or f"{directory}/store"
        lost, seconds = lost_commits(uri, commits, processes, lock=lock)
    print(
        f"Icechunk {icechunk.__version__}, {'lock' if lock else 'no lock'}: {lost} of {commits} "
        f"commits lost, {seconds:.1f} s"
    )
    raise typer.Exit(bool(lost))


if __name__ == "__main__":
    typer.run(main)
