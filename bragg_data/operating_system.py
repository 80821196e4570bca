"""What operating systems do in different ways: cores of a process, room on a disk."""

import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO


def available_cores() -> int:
    """Return the number of cores that this process may use; macOS knows only those of the machine.

    joblib's and Dask's counts, which also read the limits of a container, are not for this layer.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reserve_space(file: BinaryIO, size: int) -> None:
    """Make sure that a file can grow to a size in bytes.

    Where the system cannot reserve the space (macOS), the free space of the disk is looked up.
    Raises an OSError with ``errno.ENOSPC`` if the disk, with ``EDQUOT`` or ``EFBIG`` if a limit is
    too small.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif shutil.disk_usage(Path(file.name).parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
