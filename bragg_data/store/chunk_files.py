"""The files that hold the chunks of a snapshot, whose bytes can be put back in place."""

import asyncio
import re
import uuid
from typing import Any

import icechunk
import numpy as np
import zarr
from icechunk.session import Session
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from bragg_data.store.block_writer import array_of
from bragg_data.store.reading import StoreError, reason_of, storage_errors
from bragg_data.store.repository import Store

_CHUNKS = "chunks"
_CHUNK_ID = re.compile(r"chunks?[/_](?:id=)?([0-9A-Z]{20})")


class NotInPlaceError(Exception):
    """A chunk whose file is not known, as the manifest that names it is lost."""


class ChunkFiles:
    """The chunks of a group in a snapshot, and the files that hold them."""

    def __init__(self, store: Store, session: Session, group: str) -> None:
        self._place, self._session, self._group = store.place, session, group

    def _get(self, key: str) -> bytes | None:
        prototype = default_buffer_prototype()
        stored = asyncio.run(self._session.store.get(f"{self._group}/{key}", prototype))
        return None if stored is None else stored.to_bytes()

    def read(self, name: str, index: int) -> NDArray[Any] | None:
        """Return the values of a chunk, without what is beyond the array; None if damaged."""
        try:
            group = zarr.open_group(self._session.store, path=self._group, mode="r")
            array = array_of(group, name)
            rows = array.chunks[0]
            with storage_errors(f"reading {name}"):
                return np.asarray(array[index * rows : (index + 1) * rows])
        except StoreError:
            return None

    def _rows(self, name: str) -> list[tuple[int, slice]]:
        """Return the number and the rows of each chunk of an array."""
        group = zarr.open_group(self._session.store, path=self._group, mode="r")
        array = array_of(group, name)
        starts = enumerate(range(0, array.shape[0], array.chunks[0]))
        return [(index, slice(start, start + array.chunks[0])) for index, start in starts]

    def read_all(self, name: str) -> NDArray[Any] | None:
        """Return the values of an array; None if a chunk is damaged."""
        parts = [self.read(name, index) for index, _ in self._rows(name)]
        intact = [part for part in parts if part is not None]
        return np.concatenate(intact) if len(intact) == len(parts) else None

    def replace_if_damaged(self, name: str, values: NDArray[Any]) -> bool:
        """Replace the chunks that do not hold an array's values; return whether there are any."""
        damaged = False
        for index, rows in self._rows(name):
            stored = self.read(name, index)
            if stored is None or not np.array_equal(stored, values[rows]):
                self.replace(name, index, values[rows])
                damaged = True
        return damaged

    def replace(self, name: str, index: int, values: NDArray[Any]) -> None:
        """Give the file of a chunk the bytes that hold these values, at once."""
        key, content = self._encoded(name, index, values)
        self._place.write(f"{_CHUNKS}/{self._file(key)}", content, f".repair-{uuid.uuid4().hex}")

    def _encoded(self, name: str, index: int, values: NDArray[Any]) -> tuple[str, bytes]:
        """Return the key of a chunk, and its bytes by the codecs of its array."""
        memory = MemoryStore()
        metadata = self._get(f"{name}/zarr.json")
        if metadata is None:
            raise NotInPlaceError(name)
        prototype = default_buffer_prototype()
        asyncio.run(memory.set("zarr.json", prototype.buffer.from_bytes(metadata)))
        array = zarr.open_array(memory, mode="r+")
        rows = array.chunks[0]
        array[index * rows : index * rows + len(values)] = values
        key = array.metadata.encode_chunk_key((index, *[0] * (array.ndim - 1)))
        stored = asyncio.run(memory.get(key, prototype))
        if stored is None:  # all of it is the fill value
            raise NotInPlaceError(name)
        return f"{name}/{key}", stored.to_bytes()

    def _file(self, key: str) -> str:
        """Return the name of the file that holds a chunk."""
        try:
            content = self._get(key)
        except icechunk.IcechunkError as error:
            match = _CHUNK_ID.search(str(error))
            if match is None:
                raise NotInPlaceError(reason_of(error)) from error
            return match[1]
        files = (f for f in self._place.listed([_CHUNKS]) if f.size == len(content or b""))
        names = [f.base_name for f in files if self._place.read(f.path) == content]
        if len(names) != 1:
            raise NotInPlaceError(key)
        return str(names[0])
