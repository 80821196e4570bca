"""Time limits of refinements: what takes longer ends at its next step, with an error.

Checked where minimisations and searches take their steps, which are tenths of a second at most.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_END: ContextVar[tuple[float, str]] = ContextVar("_END", default=(float("inf"), ""))
_PER_PROFILE: ContextVar[float] = ContextVar("_PER_PROFILE", default=float("inf"))


class TimeLimitError(RuntimeError):
    """A refinement that took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let what is done within take ``seconds``, or less where a limit around it ends earlier."""
    end = time.monotonic() + seconds, f"It was ended at its time limit of {seconds:g} s."
    token = _END.set(min(end, _END.get()))
    try:
        yield
    finally:
        _END.reset(token)


@contextmanager
def time_limit_per_profile(seconds: float) -> Iterator[None]:
    """Let every refinement of profiles within take ``seconds`` for each of its profiles."""
    token = _PER_PROFILE.set(seconds)
    try:
        yield
    finally:
        _PER_PROFILE.reset(token)


@contextmanager
def limited(n_profiles: int = 1) -> Iterator[None]:
    """Refine some profiles within, by the limit of :func:`time_limit_per_profile` if there is."""
    with time_limit(n_profiles * _PER_PROFILE.get()):
        yield


def check_time() -> None:
    """Raise a TimeLimitError if the time is over."""
    end, text = _END.get()
    if time.monotonic() > end:
        raise TimeLimitError(text)
