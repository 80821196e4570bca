"""Loops that numba compiles, with machine code on disk that is never older than their sources.

By itself numba looks at the file of a kernel alone: what the kernel took in from other files,
functions and types, may have changed or gone since.
"""

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from numba import config, njit

from bragg_data.files import writable_cache

_R = TypeVar("_R")
_FINITE = {"nnan", "ninf", "nsz"}  # flags of LLVM that no result depends on
_PACKAGES = Path(__file__).parents[1]


def kernel(*, finite: bool = False) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Return a decorator that compiles a function for threads without the interpreter's lock.

    A division by zero gives infinity or NaN, as in numpy: a loop that looks for it is not
    vectorised. A ``finite`` function never sees either, so that minima vectorise. Arithmetic is
    not rearranged: results do not depend on what the compiler makes of it, to the last bit.
    """

    def compiled(function: Callable[..., _R]) -> Callable[..., _R]:
        chosen = config.CACHE_DIR  # numba reads it where it decorates
        try:
            directory = chosen or cache_directory(_PACKAGES)
            config.CACHE_DIR = str(directory or "")
            options = {"nogil": True, "cache": bool(directory), "error_model": "numpy"}
            decorated = njit(fastmath=_FINITE if finite else False, **options)(function)
        finally:
            config.CACHE_DIR = chosen
        return cast(Callable[..., _R], decorated)

    return compiled


@functools.cache
def cache_directory(packages: Path) -> Path | None:
    """Return where the machine code of the kernels below a directory lies: each source its own.

    That is next to the sources, or where these cannot be written in the user's cache, or among the
    temporary files; None, with a warning, if there is no place.
    """
    digest = hashlib.sha256()
    for path in sorted(packages.glob("bragg_*/**/*.py")):
        source = path.read_bytes()
        if b"@kernel" in source or b"NamedTuple" in source:  # the kernels and their types
            digest.update(source)
    name = f"kernels-{digest.hexdigest()[:12]}"
    directory = packages / "bragg_data" / "__pycache__" / name
    if _is_writable(directory):
        return directory
    cache = writable_cache()
    if cache is None:
        warnings.warn(
            "The compiled loops cannot be kept, so that each process compiles them again, for half "
            "a minute. Set XDG_CACHE_HOME to a folder that you can write.",
            stacklevel=2,
        )
        return None
    return cache / name


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


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
