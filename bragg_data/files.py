"""Reading of users' files: regular ones alone, up to a stated size."""

import errno
import stat
from pathlib import Path


def read_bounded(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    A device or a pipe could have no end, or never begin. Raises an OSError, the ``strerror`` of
    which is the reason, as a message states it.
    """
    try:
        found = path.stat()
    except ValueError as error:  # a null character in its name
        raise FileNotFoundError(errno.ENOENT, "no file has such a name", str(path)) from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, and no regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:g} MB", str(path))
    with path.open("rb") as file:
        return file.read(found.st_size)
