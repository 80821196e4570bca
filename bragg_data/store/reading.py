"""Reading from the store: errors in one sentence, with what is damaged and the remedy."""

import errno
import itertools
import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import icechunk
import xarray as xr
from icechunk.session import Session
from icechunk.store import IcechunkStore
from zarr.storage import WrapperStore

from bragg_data.defaults import DEFAULT_URI

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

RESTORE = "Restore the store from a copy."

# A full disk, an exhausted quota and a limit on file sizes, and how Icechunk spells them.
_FULL = {code: f"(os error {code})" for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
_FILE = re.compile(r"(chunk|manifest|snapshot|transaction)s/([0-9A-Z]{20})")
_CHUNK = re.compile(r"(?P<group>.*)/(?P<array>[^/]+)/c/(?P<chunk>\d+)(/\d+)*")
# How zarr's codecs report bytes that are not those that were written.
_DAMAGED = ("checksum", "blosc decompression", "zstd", "Wanted range", "range was invalid")


class StoreError(RuntimeError):
    """A store that cannot be opened, read or written as requested."""


class DiskFullError(StoreError):
    """The disk (or a quota, or a limit on file sizes) takes no more."""


def remedy_of(attrs: Mapping[Hashable, Any]) -> str:
    """Return the sentence that names the command which repairs an opened data set.

    Of one that has no tag, or holds measured profiles, what else to do.
    """
    if "tag" not in attrs or attrs.get("simulator") == "measured":
        return RESTORE
    default = Path(DEFAULT_URI).absolute().as_uri()
    store = "" if attrs["uri"] == default else f" --store {attrs['uri']}"
    return f"Repair it with: bragg store repair {attrs['tag']}{store}"


class _ReadableStore(WrapperStore[IcechunkStore]):
    """The Zarr store of a session; what cannot be read is a `StoreError` with a remedy."""

    def __init__(self, store: IcechunkStore, remedy: str = RESTORE) -> None:
        super().__init__(store)
        self._remedy = remedy

    async def get(
        self, key: str, prototype: "BufferPrototype", byte_range: "ByteRequest | None" = None
    ) -> "Buffer | None":
        try:
            return await self._store.get(key, prototype, byte_range)
        except icechunk.IcechunkError as error:
            raise StoreError(
                f"{_place_of(key)} cannot be read: {reason_of(error)}. {self._remedy}"
            ) from error


def _place_of(key: str) -> str:
    match = _CHUNK.fullmatch(key)
    if match is None:
        return f"'{key}'"
    if match["array"] in ("intensity", "values"):
        return f"Block {match['chunk']} of {match['group']}"
    return f"The array '{match['array']}' of {match['group']}"


def open_dataset(session: Session, group: str, remedy: str = RESTORE) -> xr.Dataset:
    """Open a group of a session, lazily.

    What cannot be read, then or now, because a file of the store is missing or damaged, is a
    `StoreError` that ends with the remedy.
    """
    store = _ReadableStore(session.store, remedy)
    # Without chunks xarray reads lazily by itself, and nobody needs dask.
    dataset: xr.Dataset = xr.open_zarr(store, group=group, consolidated=False, chunks=None)
    return dataset


def reason_of(error: Exception) -> str:
    """Return why a read or write failed, in a clause without a full stop."""
    text = str(error)
    file = _FILE.search(text)
    if file and "not found" in text:
        return f"its {file[1]} {file[2]} is missing"
    if file and any(sign in text for sign in _DAMAGED):
        return f"its {file[1]} {file[2]} is damaged"
    if "timestamp ordering" in text or "clock has drifted" in text:
        return (
            "the clock of this machine is not that of earlier commits or of the disk: set it right "
            "or wait until it has passed the last commit, and run the same command again"
        )
    if "service error" in text or "dispatch failure" in text:
        causes = re.findall(r"-> (?:[x×] )?(.*)", text)  # the innermost is the last
        what = "does not answer" if "dispatch failure" in text else "refuses it"
        cause = f" ({causes[-1].rstrip('.')})" if causes else ""
        return f"the object storage {what}{cause}"
    # Icechunk's own sentence, behind a cross and broken into lines; a call stack follows.
    lines = [line.strip(" ×x|") for line in text.strip().splitlines()]
    return " ".join(itertools.takewhile(bool, lines)).rstrip(".") or type(error).__name__


def is_conflict(error: Exception) -> bool:
    """Whether an error of Icechunk means that another process made the commit, branch or tag."""
    signs = "branch update conflict", "tag already exists"
    return isinstance(error, icechunk.ConflictError) or any(sign in str(error) for sign in signs)


def is_damage(error: Exception) -> bool:
    """Whether an error of zarr's codecs means that bytes are not those that were written."""
    return any(sign in str(error) for sign in _DAMAGED)


@contextmanager
def storage_errors(action: str, remedy: str = "") -> Iterator[None]:
    """Raise errors of Icechunk and of the file system as a StoreError of one sentence.

    It contains the action within the context, as "reading the tags of …", and ends with the remedy.
    Where the disk takes no more, it is a DiskFullError. Bytes that a codec refuses, as they are not
    what was written, are a StoreError as well.
    """
    try:
        yield
    except (icechunk.IcechunkError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or any(spelling in str(error) for spelling in _FULL.values()):
            raise DiskFullError(
                f"The disk is full, or a quota or a limit on file sizes is reached ({action}). "
                f"Free some space and run the same command again: what is committed stays."
            ) from error
        raise StoreError(f"Failed {action}: {reason_of(error)}. {remedy}".rstrip()) from error
    except (ValueError, RuntimeError) as error:
        if isinstance(error, StoreError) or not is_damage(error):
            raise
        raise StoreError(
            f"Failed {action}: its bytes are not those that were written. {remedy or RESTORE}"
        ) from error
