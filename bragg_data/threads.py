"""How many threads libraries of linear algebra take.

The last bits of sums depend on it. Products of small matrices take longer with two threads, and
many times as long where other processes want the cores as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let linear algebra within take one thread, whatever the environment allows.

    The limit is the process's, and threadpoolctl lets one of its threads set it at a time: where
    several are within, it ends with the first. It also decorates functions.
    """
    with _libraries().limit(limits=1):
        yield


@cache  # looking for them takes as long as 30 patterns
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
