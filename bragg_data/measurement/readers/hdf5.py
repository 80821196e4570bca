"""Access to HDF5 files that are not trusted: no link leads out of the file, sizes are bounded."""

import re
from itertools import islice

import h5py
import numpy as np

from bragg_data.arrays import Array
from bragg_data.measurement.readers.common import ProfileError

_VALUES = 30_000_000  # of a dataset: 1000 banks of 30,000 points
_BYTES = 1 << 28  # of a chunk or a text
_MEMBERS = 10_000  # of a group
_LINKS = 40  # that lead to links
_ATTRIBUTE = 1 << 16  # bytes


def names_in(group: h5py.Group) -> list[str]:
    """Return the names of a group's members."""
    return list(islice(group, _MEMBERS))


def node_at(group: h5py.Group, path: str, links: int = _LINKS) -> h5py.HLObject | None:
    """Return what a path inside the file leads to; None if it leads nowhere.

    Raises a ProfileError where it leads to another file.
    """
    node = group.file["/"] if path.startswith("/") else group
    for name in path.split("/"):
        if name in ("", "."):
            continue
        if not isinstance(node, h5py.Group) or links <= 0:
            return None
        raw = name.encode("utf-8", "surrogateescape")
        if not node.id.links.exists(raw):
            return None
        kind = node.id.links.get_info(raw).type
        if kind == h5py.h5l.TYPE_SOFT:
            target = node.id.links.get_val(raw).decode("utf-8", "replace")
            node = node_at(node, target, links - 1)
        elif kind == h5py.h5l.TYPE_HARD:
            node = node[name]
        else:
            raise ProfileError(
                f"{group.file.filename} keeps {node.name.rstrip('/')}/{name} in another file, and "
                f"links to other files are not followed: save it with its data in one file."
            )
    return node if isinstance(node, h5py.Group | h5py.Dataset) else None


def group_at(group: h5py.Group, path: str) -> h5py.Group | None:
    """Return the group at a path; None if there is none."""
    node = node_at(group, path)
    return node if isinstance(node, h5py.Group) else None


def dataset_at(group: h5py.Group, path: str) -> h5py.Dataset | None:
    """Return the dataset at a path; None if there is none."""
    node = node_at(group, path)
    return node if isinstance(node, h5py.Dataset) else None


def numbers(dataset: h5py.Dataset) -> Array:
    """Return a dataset of numbers; raises a ProfileError if it is another, too large, or outside.

    Datasets may be views of other files (virtual), or be stored outside (external).
    """
    where = f"{dataset.file.filename}, {dataset.name},"
    if dataset.dtype.kind not in "iuf" or dataset.size is None:
        raise ProfileError(f"{where} holds no numbers.")
    _refuse_what_is_elsewhere(dataset, where)
    if dataset.size > _VALUES:
        raise ProfileError(f"{where} has {dataset.size} values: no profile, or not focused yet.")
    return np.asarray(dataset[()], dtype=np.float64)


def _refuse_what_is_elsewhere(dataset: h5py.Dataset, where: str) -> None:
    if dataset.is_virtual or dataset.external:
        raise ProfileError(f"{where} is in another file, which is not read: save it with its data.")
    if dataset.chunks and np.prod(dataset.chunks, dtype=float) * dataset.dtype.itemsize > _BYTES:
        raise ProfileError(f"{where} is stored in chunks that are too large.")


def text_at(group: h5py.Group, path: str) -> str:
    """Return the text of a dataset, or an empty one."""
    dataset = dataset_at(group, path)
    if dataset is None or dataset.dtype.kind not in "SO" or dataset.size not in (1,):
        return ""
    _refuse_what_is_elsewhere(dataset, dataset.name)
    return "" if dataset.dtype.itemsize > _BYTES else text_of(dataset[()])


def attribute(node: h5py.HLObject, name: str) -> object:
    """Return an attribute; None if it is not there, or too large."""
    raw = name.encode()
    if not h5py.h5a.exists(node.id, raw):
        return None
    if h5py.h5a.open(node.id, raw).get_storage_size() > _ATTRIBUTE:
        return None
    value: object = node.attrs[name]
    return value


def text_of(value: object) -> str:
    """Return a text as HDF5 holds it: bytes, or an array with one; numbers as text."""
    values = np.ravel(np.asarray(value, dtype=object))
    if len(values) != 1 or values[0] is None:
        return ""
    first = values[0]
    text = first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
    return text.strip("\0 \n")


def texts_of(value: object) -> list[str]:
    """Return the texts of an attribute: an array of them, or names that ``:`` or ``,`` separate."""
    values = np.ravel(np.asarray(value, dtype=object))
    if len(values) == 1:
        return [name for name in re.split(r"[:,\s\[\]]+", text_of(value)) if name]
    return [text_of(value) for value in values[:10]]


def class_of(node: h5py.HLObject) -> str:
    """Return the NeXus class of a group."""
    return text_of(attribute(node, "NX_class"))
