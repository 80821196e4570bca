"""How many threads libraries of linear algebra take: the last bits of sums depend on it."""

from contextlib import AbstractContextManager
from functools import lru_cache

from threadpoolctl import ThreadpoolController

# Looking for the libraries takes as long as 30 patterns.
_libraries = lru_cache(maxsize=1)(ThreadpoolController)


def single_threaded() -> AbstractContextManager[object]:
    """Let linear algebra within take one thread, whatever the environment allows."""
    limit: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limit
