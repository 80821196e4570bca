"""Processed workspaces of Mantid in NeXus files: spectra as banks, and where they stand.

SaveNexusProcessed writes a group ``mantid_workspace_N`` for each workspace.
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from bragg_data.arrays import Array
from bragg_data.instrument.diffractometer import DIFC_PER_METRE
from bragg_data.measurement.readers import axis, hdf5
from bragg_data.measurement.readers.checks import RawProfile, histogram
from bragg_data.measurement.readers.common import ProfileError

MOST_SPECTRA = 500  # of a file; more are detectors, not banks
_EVENTS = 30_000_000
_ANGLE_SPREAD = 30.0  # degrees between detectors of a bank, from which their mean says nothing

# Of Mantid's unit IDs; the others (Wavelength, Energy …) are no axes of profiles.
_MANTID_UNITS: dict[str, axis.Declared | None] = {
    "TOF": "us",
    "dSpacing": "d",
    "MomentumTransfer": "Q",
    "Degrees": "angle",
    "Phi": "angle",
    "Label": None,
    "": None,
}
_SOURCE_TYPE = re.compile(r"<type\b[^>]{0,200}\bis=\"source\"[^>]{0,200}>", re.IGNORECASE)
_COMPONENT = (
    r"<component\b[^>]{{0,200}}\btype=\"{}\"[^>]{{0,200}}>\s{{0,200}}(<location\b[^>]{{0,300}}>)"
)
_MOVED_SOURCE = re.compile(
    r"(?:source|moderator|undulator)\w{0,40};V3D;pos;\[([^]]{1,100})\]", re.IGNORECASE
)


def spectra_of(entry: h5py.Group, path: Path, bank: int | None) -> Iterator[RawProfile]:
    """Yield the spectra of a processed workspace."""
    events = hdf5.group_at(entry, "event_workspace")
    group = hdf5.group_at(entry, "workspace") or events
    x_axis = None if group is None else hdf5.dataset_at(group, "axis1")
    if group is None or x_axis is None:
        raise ProfileError(
            f"{path}, {entry.name}, is no workspace of spectra (such as a table or peaks): save "
            f"the focused profile with SaveNexusProcessed."
        )
    unit = hdf5.text_of(hdf5.attribute(x_axis, "units"))
    x = hdf5.numbers(x_axis)
    numbered = hdf5.dataset_at(group, "axis2")
    rows = _events(group, x, path) if group == events else _matrix(group, path)
    values, errors = rows
    if not (values.ndim == 2 and x.shape[-1] in (values.shape[1], values.shape[1] + 1)) or (
        x.ndim > 1 and x.shape[:-1] != values.shape[:1]
    ):
        raise ProfileError(
            f"{path}, {entry.name}, has values of shape {values.shape} over an axis of shape "
            f"{x.shape}: expected are spectra over their points or bin edges."
        )
    if len(values) > MOST_SPECTRA and bank is None:
        raise ProfileError(
            f"{path} holds {len(values)} spectra: focus them into banks (DiffractionFocussing), "
            f"or name one with --bank."
        )
    kind = "" if numbered is None else hdf5.text_of(hdf5.attribute(numbered, "units"))
    of_detectors = hdf5.dataset_at(entry, "instrument/detector/spectra")
    listed = numbered if kind in ("spectraNumber", "") else of_detectors
    spectra = _spectrum_numbers(listed, len(values))
    geometry = _geometry(entry)
    name = hdf5.text_at(entry, "instrument/name")
    header = {"instrument": name} if name else {}
    angles = _angles(numbered, spectra) if kind == "Degrees" else {}
    density = hdf5.text_of(hdf5.attribute(x_axis, "distribution")) not in ("0", "", "False")
    notes = () if density or x.shape[-1] > values.shape[1] else (_COUNTS_AT_POINTS,)
    for row, number in enumerate(spectra):
        if bank not in (None, number):
            continue
        raw = RawProfile(
            path=path,
            format="Mantid NeXus",
            x=x,
            intensity=values[row],
            sigma=None,
            bank=number,
            title=hdf5.text_at(entry, "title") or hdf5.text_at(entry, "workspace_name"),
            header=header | angles.get(number, {}) | geometry.get(number, {}),
            declared=_MANTID_UNITS.get(unit, "other"),
            counts=not density,
            warnings=notes,
        )
        of_row = None if errors is None else errors[row]
        yield histogram(raw, x[row] if x.ndim == 2 else x, values[row], of_row)


_COUNTS_AT_POINTS = (
    "The file holds counts at points, not in bins: they were divided by the distance of the points."
)


def _matrix(group: h5py.Group, path: Path) -> tuple[Array, Array | None]:
    signal, errors = hdf5.dataset_at(group, "values"), hdf5.dataset_at(group, "errors")
    if signal is None:
        raise ProfileError(f"{path}, {group.name}, holds no values.")
    values = hdf5.numbers(signal)
    deviations = None if errors is None or errors.shape != signal.shape else hdf5.numbers(errors)
    for row, bins in _masked_bins(group, values.shape):
        values[row, bins] = np.nan if deviations is None else 0.0
        if deviations is not None:
            deviations[row, bins] = 0.0
    return values, deviations


def _masked_bins(
    group: h5py.Group, shape: tuple[int, ...]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield rows and bins (n,) that MaskBins masked: what is left of them holds no information.

    Each row of ``masked_spectra`` has an index, and where its bins begin in ``masked_bins``.
    """
    datasets = (hdf5.dataset_at(group, name) for name in ("masked_spectra", "masked_bins"))
    spectra, bins = (None if d is None else hdf5.numbers(d).astype(np.int64) for d in datasets)
    if spectra is None or bins is None or spectra.shape[1:] != (2,) or len(shape) != 2:
        return
    for (row, first), last in zip(spectra, [*spectra[1:, 1], len(bins)], strict=True):
        of_row = bins[max(first, 0) : last]
        if 0 <= row < shape[0]:
            yield int(row), of_row[(of_row >= 0) & (of_row < shape[1])]


def _events(group: h5py.Group, x: Array, path: Path) -> tuple[Array, Array]:
    """Return the counts of events in the bins of the workspace, and their standard deviations."""
    columns = [hdf5.dataset_at(group, key) for key in ("indices", "tof", "weight", "error_squared")]
    indices, times, weight, squared = columns
    if indices is None or times is None or x.ndim > 2:
        raise ProfileError(f"{path}, {group.name}, holds neither a histogram nor events.")
    if times.size and times.size > _EVENTS:
        raise ProfileError(
            f"{path} holds {times.size} events: save a histogram (ConvertToMatrixWorkspace)."
        )
    ends, tof = hdf5.numbers(indices).astype(np.int64), hdf5.numbers(times)
    weights = np.ones_like(tof) if weight is None else hdf5.numbers(weight)
    variances = weights if squared is None else hdf5.numbers(squared)
    if not (len(tof) == len(weights) == len(variances)) or len(ends) < 2:
        raise ProfileError(f"{path}, {group.name}, has events of unequal numbers.")
    if (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > len(tof):
        raise ProfileError(f"{path}, {group.name}, has indices beyond its events.")
    counts = np.zeros((2, len(ends) - 1, x.shape[-1] - 1))
    for row, (low, high) in enumerate(pairwise(ends)):
        edges = x[row] if x.ndim == 2 else x
        if not (np.diff(edges) > 0).all():
            raise ProfileError(f"{path}, {group.name}, has bin edges that do not ascend.")
        for k, of_event in enumerate((weights, variances)):
            counts[k, row] = np.histogram(tof[low:high], edges, weights=of_event[low:high])[0]
    return counts[0], np.sqrt(np.maximum(counts[1], 0.0))


def _spectrum_numbers(dataset: h5py.Dataset | None, count: int) -> list[int]:
    """Return the numbers of spectra, or their places from 1 where they have none."""
    if dataset is not None and dataset.shape == (count,) and dataset.dtype.kind in "iuf":
        values = hdf5.numbers(dataset)
        whole = np.isfinite(values).all() and (values == np.round(values)).all()
        if whole and values.min() > 0 and values.max() < 1e9 and len(set(values)) == count:
            return [int(value) for value in values]
    return list(range(1, count + 1))


def _angles(dataset: h5py.Dataset | None, spectra: Sequence[int]) -> dict[int, dict[str, str]]:
    """Return a header for each spectrum with 2θ, of an axis in degrees."""
    if dataset is None or dataset.shape != (len(spectra),):
        return {}
    values = zip(spectra, hdf5.numbers(dataset).tolist(), strict=True)
    return {number: _header_of(angle, 0.0) for number, angle in values if 0 < angle < 180}


def _header_of(two_theta: float, flight_path: float) -> dict[str, str]:
    """Return an angle and a flight path in m, which is 0 where it is not known, as a header."""
    header = {"two_theta": repr(two_theta)}
    if flight_path:
        sine = math.sin(math.radians(two_theta / 2))
        header["total flight path"] = repr(flight_path)
        header["difc"] = repr(DIFC_PER_METRE * flight_path * sine)
    return header


def _geometry(entry: h5py.Group) -> dict[int, dict[str, str]]:
    """Return a header for each spectrum, by its number: where its detectors stand on average."""
    detector = hdf5.group_at(entry, "instrument/detector")
    if detector is None:
        return {}
    names = ("spectra", "detector_index", "detector_count", "detector_positions")
    datasets = [hdf5.dataset_at(detector, name) for name in names]
    if any(dataset is None or dataset.dtype.kind not in "iuf" for dataset in datasets):
        return {}
    spectra, index, count, positions = (hdf5.numbers(d) for d in datasets if d is not None)
    if positions.ndim != 2 or positions.shape[1] != 3 or not len(spectra) == len(count) > 0:
        return {}
    primary = _primary_flight_path(entry)
    headers = {}
    for number, low, n in zip(spectra, index, count, strict=False):
        if not (0 <= low < len(positions) and 0 < n <= len(positions)):
            continue
        rows = positions[int(low) : int(low) + int(n)]
        if not np.isfinite(rows).all():
            continue
        distance, angle = np.mean(rows[:, :2], axis=0)
        if 0 < angle < 180 and np.ptp(rows[:, 1]) < _ANGLE_SPREAD and 0 < distance < 1000:
            path = primary + distance if primary else 0.0
            headers[int(number)] = _header_of(round(float(angle), 9), round(float(path), 9))
    return headers


def _primary_flight_path(entry: h5py.Group) -> float:
    """Return the distance of source and sample in m; 0 where it is not known.

    From the parameter map, where a component was moved, or the instrument's definition in XML,
    which is searched rather than parsed. The sample stands at the origin.
    """
    moved = _MOVED_SOURCE.search(hdf5.text_at(entry, "instrument/instrument_parameter_map/data"))
    if moved:
        return _length(moved[1].split(","))
    definition = hdf5.text_at(entry, "instrument/instrument_xml/data")
    for kind in _SOURCE_TYPE.findall(definition):
        name = re.search(r"\bname=\"([^\"]{1,100})\"", kind)
        place = name and re.search(_COMPONENT.format(re.escape(name[1])), definition)
        if place:
            values = [re.search(rf"\b{key}=\"\s*([-+.\deE]+)", place[1]) for key in "xyz"]
            return _length([value[1] if value else "0" for value in values])
    return 0.0


def _length(words: list[str]) -> float:
    try:
        length = math.hypot(*(float(word) for word in words))
    except ValueError:
        return 0.0
    return length if 0 < length < 1000 else 0.0
