"""Files of users: read up to a stated size, kept in a folder of the user, locked by their side."""

import contextlib
import errno
import os
import stat
import tempfile
import uuid
from pathlib import Path

from filelock import FileLock


def read_bounded(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    A device or a pipe could have no end, or never begin. Raises an OSError, the ``strerror`` of
    which is the reason, as a message states it.
    """
    try:
        status = path.stat()
    except ValueError as error:  # a null character in its name
        raise FileNotFoundError(errno.ENOENT, "no file has such a name", str(path)) from error
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, and no regular file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:g} MB", str(path))
    with path.open("rb") as file:
        return file.read(status.st_size)


def write_whole(file: Path, content: bytes, partial: Path | None = None) -> None:
    """Give a file its content at once: whoever reads it sees the old one or all of the new.

    It is written under another name on the same disk, hidden next to it unless ``partial`` is
    given, reaches the disk, and is renamed. An OSError leaves the file as it was.
    """
    partial = partial or file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def user_cache() -> Path | None:
    """Return where this user keeps what can be made again; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "bragg"
    except RuntimeError:  # no home
        return None


def writable_cache() -> Path | None:
    """Return the user's cache, or one for temporary files; None if neither can be written.

    In a directory that others can write to, only a folder of this user counts that no one else can
    change: somebody else could have made it.
    """
    temporary = Path(tempfile.gettempdir()) / f"bragg-{os.getuid()}"
    for folder in (user_cache(), temporary):
        if folder is not None and is_private(folder):
            return folder
    return None


def is_private(folder: Path) -> bool:
    """Return whether a folder, made if it is missing, is written by this user and no one else."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        return mine and not status.st_mode & 0o022 and os.access(folder, os.W_OK)
    return False


def lock_for(path: Path) -> contextlib.AbstractContextManager[object]:
    """Return the lock of a file among processes; of one in a folder to be read alone, none.

    The lock lies next to what it protects, where the group that may write there may take it,
    whatever the umask of who was first; a kill releases it.
    """
    if not os.access(path.parent, os.W_OK):
        return contextlib.nullcontext()
    return FileLock(f"{path}.lock", mode=0o664, fallback_to_soft=False)
