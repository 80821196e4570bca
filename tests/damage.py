"""Damage to the files of a real store, for tests: a flipped byte, a missing file."""

import asyncio
from pathlib import Path

from zarr.core.buffer import default_buffer_prototype

from bragg_data.store.repository import Store


def chunk_file(store: Store, tag: str, block: int, array: str = "intensity") -> Path:
    """Return the file that holds a block of a tagged data set."""
    session = store.repository.readonly_session(tag=tag)
    group = tag.rpartition("-v")[0]
    key = f"{group}/{array}/c/{block}" + ("/0" if array in ("intensity", "block_sha256") else "")
    stored = asyncio.run(session.store.get(key, default_buffer_prototype()))
    assert stored is not None
    content = stored.to_bytes()
    files = (store.path / "chunks").iterdir()
    (file,) = (f for f in files if f.read_bytes() == content)
    return file


def flip(file: Path, place: float = 0.5) -> None:
    """Change a bit of a file, at a place between its beginning, 0, and its end, 1."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)
