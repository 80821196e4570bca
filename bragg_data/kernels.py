"""Loops that numba compiles, with machine code on disk that is never older than their sources.

By itself numba looks at the file of a kernel alone: what the kernel took in from other files,
functions and types, may have changed or gone since.
"""

import functools
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar, cast

from filelock import FileLock
from numba import config, njit

_R = TypeVar("_R")
_PACKAGES = Path(__file__).parents[1]


def kernel(*, fastmath: bool = False) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Return a decorator that compiles a function for threads without the interpreter's lock.

    A division by zero gives infinity or NaN, as in numpy: a loop that looks for it is not
    vectorised.
    """

    def compiled(function: Callable[..., _R]) -> Callable[..., _R]:
        chosen = config.CACHE_DIR  # numba reads it where it decorates
        try:
            config.CACHE_DIR = chosen or str(cache_directory(_PACKAGES))
            decorated = njit(nogil=True, cache=True, fastmath=fastmath, error_model="numpy")(
                function
            )
        finally:
            config.CACHE_DIR = chosen
        compile_ = decorated.compile

        def compile_once(signature: object) -> object:
            # What is inlined depends on what was on disk, and the last bits of results on that: one
            # process compiles, the others load what it saved.
            with _compiling():
                return compile_(signature)

        decorated.compile = compile_once
        return cast(Callable[..., _R], decorated)

    return compiled


@functools.cache
def _lock() -> FileLock | None:
    directory = cache_directory(_PACKAGES)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # nothing is saved there either
        return None
    return FileLock(directory / "compiling.lock")


def _compiling() -> AbstractContextManager[object]:
    return _lock() or nullcontext()


@functools.cache
def cache_directory(packages: Path) -> Path:
    """Return where the machine code of the kernels below a directory lies: each source its own."""
    digest = hashlib.sha256()
    for path in sorted(packages.glob("bragg_*/**/*.py")):
        source = path.read_bytes()
        if b"@kernel" in source or b"NamedTuple" in source:  # the kernels and their types
            digest.update(source)
    return packages / "bragg_data" / "__pycache__" / f"kernels-{digest.hexdigest()[:12]}"


@kernel()
def exponential(x: float) -> float:
    """Return the exponential of -50 to 50 to 1e-10, in operations that compilers vectorise."""
    t = x * (1 / 64)
    p = 1.0 + t * (1 / 13)
    p = 1.0 + t * p * (1 / 12)
    p = 1.0 + t * p * (1 / 11)
    p = 1.0 + t * p * (1 / 10)
    p = 1.0 + t * p * (1 / 9)
    p = 1.0 + t * p * (1 / 8)
    p = 1.0 + t * p * (1 / 7)
    p = 1.0 + t * p * (1 / 6)
    p = 1.0 + t * p * (1 / 5)
    p = 1.0 + t * p * (1 / 4)
    p = 1.0 + t * p * (1 / 3)
    p = 1.0 + t * p * (1 / 2)
    p = 1.0 + t * p
    p = p * p
    p = p * p
    p = p * p
    p = p * p
    p = p * p
    return p * p
