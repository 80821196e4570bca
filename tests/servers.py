"""Servers and workers as processes of their own, for the tests that ask or kill them."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import psutil
import requests

from bragg_data.store.repository import Store

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(*arguments: str, answers: str) -> Iterator[str]:
    """Run python -m MODULE … --port PORT until it answers at a path; yields its address."""
    with server_at(*arguments, answers=answers) as (address, _):
        yield address


@contextmanager
def server_at(
    *arguments: str, answers: str, log: IO[bytes] | None = None, out: IO[bytes] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """As serving; yields the process, too. What it prints goes to files, if there are any."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    with (
        tempfile.TemporaryFile() as unread,
        subprocess.Popen(command, cwd=ROOT, stdout=out or unread, stderr=log) as server,
    ):
        try:
            end = time.monotonic() + 240
            while not answered(f"{address}/{answers}"):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.1)
            yield address, server
        finally:
            server.terminate()


def answered(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def until(condition: Callable[[], object], seconds: float) -> float:
    """Wait for a condition, and return how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.05)
    return time.monotonic() - began


def samples_done(store: Path) -> int:
    """Return how many samples of an unfinished data set are committed; -1 if there is none.

    Cheap where nothing was committed since: who waits takes no time from the process that computes.
    """
    try:
        refs = {(ref, ref.stat().st_mtime_ns) for ref in (store / "refs").rglob("ref.json")}
    except FileNotFoundError:  # just removed
        return samples_done(store)
    return _samples_done(store, frozenset(refs))


@lru_cache(maxsize=1)
def _samples_done(store: Path, refs: frozenset[tuple[Path, int]]) -> int:
    return next((data_set.done for data_set in Store(store).unfinished()), -1) if refs else -1


def dask_workers(process: psutil.Process) -> list[psutil.Process]:
    """Return the workers below a driver or nanny, which fork from a server that it started."""
    below = process.children(recursive=True)
    forked = [child for child in below if child.ppid() != process.pid]
    return [child for child in forked if "forkserver" in " ".join(child.cmdline())]


def open_experiment(uri: str) -> str:
    """Return the id of an experiment in an MLflow database; here processes import little else."""
    from catalog.tracking import Tracking

    return Tracking(uri).experiment("same")
