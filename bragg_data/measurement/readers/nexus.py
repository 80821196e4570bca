"""NeXus files: processed workspaces of Mantid, and NXdata groups.

Mantid's SaveNexusProcessed writes a group ``mantid_workspace_N`` for each workspace, whose spectra
are banks. Any other file is read by its default plot, or its NXdata groups:
https://manual.nexusformat.org/datarules.html#find-the-plottable-data.
"""

import os
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from bragg_data.arrays import Array
from bragg_data.errors import first_line
from bragg_data.measurement.readers import axis, hdf5
from bragg_data.measurement.readers.checks import RawProfile, histogram
from bragg_data.measurement.readers.common import HDF4, ProfileError
from bragg_data.measurement.readers.mantid import MOST_SPECTRA, spectra_of

_COUNTS = re.compile(r"counts?|neutrons?", re.IGNORECASE)


def read_nexus(path: Path, bank: int | None) -> list[RawProfile]:
    """Return the banks of a NeXus file, as they are there; a ProfileError if it holds no profile.

    ``bank`` is the one that will be chosen, if any: it may be one of many detectors. The HDF5
    library may hang or die on a damaged file: see :class:`NexusReader`.
    """
    with path.open("rb") as file:
        if file.read(4) == HDF4:
            raise ProfileError(f"{path} is of HDF4, which is not read: save it as NeXus of HDF5.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            workspaces = [key for key in hdf5.names_in(file) if key.startswith("mantid_workspace_")]
            if workspaces:
                entries = [hdf5.group_at(file, name) for name in sorted(workspaces, key=_in_order)]
                banks = [raw for e in entries if e is not None for raw in spectra_of(e, path, bank)]
            else:
                banks = list(_plottable(file, path))
    except ProfileError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise ProfileError(
            f"{path} is a damaged HDF5 file: {first_line(error)[:120]}. Save or copy it again."
        ) from error
    if bank is not None and not banks:
        known = ", ".join(str(raw.bank) for raw in read_nexus(path, None))
        raise ProfileError(f"{path} has no bank {bank}. It holds banks {known[:100]}.")
    return _not_empty(banks, bank, path)


def _in_order(name: str) -> tuple[int, str]:
    number = name.rpartition("_")[2]
    return (int(number) if number.isdecimal() and len(number) < 9 else 0, name)


def _not_empty(banks: list[RawProfile], bank: int | None, path: Path) -> list[RawProfile]:
    """Leave out spectra without counts, as masked panels are, and say so."""
    counted = [raw for raw in banks if np.nan_to_num(raw.intensity).any()]
    if bank is not None or len(counted) == len(banks):
        return banks
    if not counted:
        raise ProfileError(f"{path} holds no intensity: every value of its spectra is zero.")
    empty = ", ".join(str(raw.bank) for raw in banks if raw not in counted)
    note = f"Spectra without counts were left out: {empty[:60]}."
    return [replace(raw, warnings=(*raw.warnings, note)) for raw in counted]


# Units in those that are declared; other times are axis's.
_UNITS: dict[str, tuple[float, axis.Declared]] = {
    **dict.fromkeys(("ns", "nanosecond", "nanoseconds"), (1e-3, "us")),
    **dict.fromkeys(("angstrom", "angstroms", "å", "a", "ang"), (1.0, "d")),
    "nm": (10.0, "d"),
    **dict.fromkeys(("rad", "radian", "radians"), (180 / np.pi, "angle")),
}
_OF_NO_PROFILE = None, "other", "angle"
_INVERSE = re.compile(r"(?:1/|per_?)(angstrom|å|a|nm)s?|(angstrom|å|a|nm)s?(?:\^|\*\*)?-1")


class _Axis(NamedTuple):
    values: Array
    declared: axis.Declared | None


def _plottable(file: h5py.File, path: Path) -> list[RawProfile]:
    """Return the default plot of a file, or all its NXdata groups over an axis of profiles."""
    default = _default(file)
    groups = [default] if default is not None else _nxdata_groups(file)
    banks: list[RawProfile] = []
    problems: list[ProfileError] = []
    for group in groups:
        try:
            banks += _nxdata(group, path)
        except ProfileError as error:
            problems.append(error)
    if banks:
        # Next to profiles there may be images, monitors over wavelength, and others.
        of_profiles = [raw for raw in banks if raw.declared not in _OF_NO_PROFILE]
        return [replace(raw, bank=k) for k, raw in enumerate(of_profiles or banks, start=1)]
    if problems:
        raise problems[0]
    raise ProfileError(
        f"{path} holds no profile: neither a processed workspace of Mantid nor an NXdata group "
        f"with a signal. Raw data and events have to be reduced and focused first."
    )


def _default(group: h5py.Group) -> h5py.Group | None:
    """Follow the attribute ``default`` from the root to an NXdata group."""
    for _ in range(10):
        if hdf5.class_of(group) == "NXdata":
            return group
        name = hdf5.text_of(hdf5.attribute(group, "default"))
        below = hdf5.group_at(group, name) if name else None
        if below is None:
            return None
        group = below
    return None


def _nxdata_groups(group: h5py.Group, depth: int = 4) -> list[h5py.Group]:
    """Return the NXdata groups with a signal below a group."""
    below: list[h5py.Group] = []
    for name in hdf5.names_in(group):
        node = hdf5.node_at(group, name) if depth else None
        if not isinstance(node, h5py.Group):
            continue
        if hdf5.class_of(node) != "NXdata":
            below += _nxdata_groups(node, depth - 1)
        elif _signal(node):
            below.append(node)
        if len(below) > MOST_SPECTRA:
            break
    return below


def _signal(group: h5py.Group) -> str:
    """Return the name of the dataset that an NXdata group plots."""
    named = hdf5.text_of(hdf5.attribute(group, "signal"))
    if named and hdf5.dataset_at(group, named) is not None:
        return named
    for name in hdf5.names_in(group):  # as before 2014
        dataset = hdf5.dataset_at(group, name)
        if dataset is not None and hdf5.text_of(hdf5.attribute(dataset, "signal")) == "1":
            return name
    return ""


def _nxdata(group: h5py.Group, path: Path) -> list[RawProfile]:
    """Return the spectra of an NXdata group."""
    where = f"{path}, {group.name},"
    name = _signal(group)
    signal = hdf5.dataset_at(group, name) if name else None
    if signal is None:
        raise ProfileError(f"{where} does not name its signal.")
    if signal.ndim not in (1, 2):
        raise ProfileError(
            f"{where} has a signal over {signal.ndim} axes: a profile has one, or banks and one."
        )
    names = _axes(group, signal)
    values = hdf5.numbers(signal)
    errors = _errors(group, name, signal)
    dimension, over = _profile_axis(group, names, values.shape, where)
    if dimension == 0 and values.ndim == 2:
        values, errors = values.T, None if errors is None else errors.T
    rows = np.atleast_2d(values)
    if len(rows) > MOST_SPECTRA:
        raise ProfileError(f"{where} holds {len(rows)} spectra: focus them into banks.")
    edges = len(over.values) > rows.shape[1]
    counts, notes = _meaning(hdf5.text_of(hdf5.attribute(signal, "units")), edges=edges)
    title = hdf5.text_at(group, "title")
    parent = hdf5.group_at(group.file, group.name.rpartition("/")[0] or "/")
    title = title or ("" if parent is None else hdf5.text_at(parent, "title"))
    header = _angles(group, names[1 - dimension], len(rows)) if values.ndim == 2 else []
    alone = len(rows) == 1
    banks = []
    for row, of_row in enumerate(rows):
        raw = RawProfile(
            path=path,
            format="NXdata",
            x=over.values,
            intensity=of_row,
            sigma=None,
            title=title,
            header=header[row] if header else {},
            declared=over.declared,
            counts=counts,
            warnings=notes,
        )
        deviation = None if errors is None else errors if alone else errors[row]
        deviation = None if deviation is None else np.ravel(deviation)
        banks.append(histogram(raw, over.values, of_row, deviation))
    return banks


def _meaning(units: str, *, edges: bool) -> tuple[bool, tuple[str, ...]]:
    """Return whether values are counts in bins, and what was inferred."""
    if not edges:
        return False, ()
    if _COUNTS.fullmatch(units.strip()):
        return True, ()
    if not units:
        return True, (
            "The file does not say whether its intensities are counts in bins: they were taken as "
            "such, and divided by the widths of the bins.",
        )
    return False, (
        f"Intensities in '{units[:30]}' over bins were taken as a density, not as counts in bins.",
    )


def _axes(group: h5py.Group, signal: h5py.Dataset) -> list[str]:
    """Return the name of the axis of each dimension; empty where there is none."""
    for node in (group, signal):
        listed = hdf5.texts_of(hdf5.attribute(node, "axes"))
        if len(listed) == signal.ndim or (listed and signal.ndim == 1):
            return ["" if name == "." else name for name in listed][: signal.ndim]
    names = [""] * signal.ndim
    for name in hdf5.names_in(group):  # as before 2014
        dataset = hdf5.dataset_at(group, name)
        number = "" if dataset is None else hdf5.text_of(hdf5.attribute(dataset, "axis"))
        if number.isdecimal() and 0 < int(number[:4]) <= signal.ndim:
            names[int(number[:4]) - 1] = name
    return names


def _errors(group: h5py.Group, name: str, signal: h5py.Dataset) -> Array | None:
    named = hdf5.text_of(hdf5.attribute(signal, "uncertainties"))
    for candidate in (f"{name}_errors", named, f"{name}_error", "errors"):
        dataset = hdf5.dataset_at(group, candidate) if candidate else None
        if dataset is not None and dataset.shape == signal.shape:
            return hdf5.numbers(dataset)
    return None


def _profile_axis(
    group: h5py.Group, names: list[str], shape: tuple[int, ...], where: str
) -> tuple[int, _Axis]:
    """Return the dimension over which a profile runs, and its axis."""
    candidates = []
    for dimension, (name, size) in enumerate(zip(names, shape, strict=True)):
        dataset = hdf5.dataset_at(group, name) if name else None
        if dataset is not None and dataset.shape in ((size,), (size + 1,)):
            candidates.append((dimension, _axis_of(name, dataset)))
    known = [c for c in candidates if c[1].declared not in _OF_NO_PROFILE]
    for chosen in (known, candidates[-1:]):
        if chosen:
            return chosen[-1]
    raise ProfileError(
        f"{where} has no axis for its signal: the attribute axes has to name one of as many values "
        f"(or bin edges)."
    )


def _angles(group: h5py.Group, name: str, count: int) -> list[dict[str, str]]:
    """Return headers with the angles of spectra, where their axis holds these; else none."""
    dataset = hdf5.dataset_at(group, name) if name else None
    if dataset is None or dataset.shape != (count,) or dataset.dtype.kind not in "iuf":
        return []
    angles = _axis_of(name, dataset)
    if angles.declared != "angle":
        return []
    return [{"two_theta": repr(float(value))} for value in angles.values]


def _axis_of(name: str, dataset: h5py.Dataset) -> _Axis:
    """Return the values of an axis, in a unit that can be declared."""
    values = hdf5.numbers(dataset)
    label = hdf5.text_of(hdf5.attribute(dataset, "long_name"))
    unit = hdf5.text_of(hdf5.attribute(dataset, "units")).lower().replace("μ", "µ").replace(" ", "")
    by_name = axis.declared_by_name(name) or axis.declared_by_name(label)
    if unit in _UNITS:
        scale, declared = _UNITS[unit]
        return _Axis(values * scale, "other" if (declared, by_name) == ("d", "other") else declared)
    time = axis.declared_by_name(f"time ({unit})") if unit else None
    if time in axis.MICROSECONDS:
        return _Axis(values, time)
    if inverse := _INVERSE.fullmatch(unit):
        nanometres = "nm" in (inverse[1], inverse[2])
        return _Axis(values / 10 if nanometres else values, "Q")
    if unit:
        return _Axis(values, axis.declared_by_name(unit) or by_name or "other")
    return _Axis(values, by_name)


# ---- the process -------------------------------------------------------------------------------

_MEMORY = 1 << 33  # bytes of address space
_PROCESSOR_TIME = 20  # s; the largest files that are read take a few


class NexusReader:
    """Reads files in a process of its own, in the caller's working directory, within limits."""

    def __init__(self, directory: Path) -> None:
        os.chdir(directory)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_TIME, _PROCESSOR_TIME))

    def read(self, path: Path, bank: int | None) -> list[RawProfile]:
        """Return what :func:`read_nexus` does."""
        return read_nexus(path, bank)
