"""Measured profiles in powder CIFs (pdCIF): the loop of points in a data block.

Names are those of the powder dictionary, with dots (DDLm) or without; what they mean:
https://www.iucr.org/resources/cif/dictionaries/cif_pd.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.cif import CifBlock, blocks_of
from bragg_data.measurement.readers import axis
from bragg_data.measurement.readers.checks import RawProfile
from bragg_data.measurement.readers.common import ProfileError, Reading

# What a profile is over, the first that is there: a column, or least and greatest value and step.
# Times are in µs, d in Å, Q in 1/Å. d may stand next to the angles of constant wavelength.
_AXES: dict[str, axis.Declared] = {
    "_pd_meas_time_of_flight": "us",
    "_pd_proc_time_of_flight": "us",
    "_pd_meas_2theta_scan": "angle",
    "_pd_proc_2theta_corrected": "angle",
    "_pd_meas_2theta_corrected": "angle",
    "_pd_meas_angle_2theta": "angle",
    "_pd_meas_time_of_flight_range": "us",
    "_pd_meas_2theta_range": "angle",
    "_pd_proc_2theta_range": "angle",
    "_pd_proc_d_spacing": "d",
    "_pd_proc_recip_len_q": "Q",
    "_pd_proc_energy_incident": "other",
    "_pd_proc_energy_detection": "other",
    "_pd_proc_wavelength": "other",
}
# Measured intensities, the most processed with background first; those of a model are not here.
_INTENSITIES = (
    "_pd_proc_intensity_total",
    "_pd_proc_intensity_norm",
    "_pd_meas_intensity_total",
    "_pd_meas_counts_total",
    "_pd_proc_intensity_net",
    "_pd_meas_intensity_net",
)
_WEIGHT = "_pd_proc_ls_weight"
_COUNTS = "_pd_meas_counts_total"
_ANGLES = "_pd_meas_2theta_fixed", "_pd_instr_2theta_bank", "_instr_2theta_bank"
_DIFC = "_pd_instr_dtt1", "_instr_d_to_tof_linear"
_PROBES = "_diffrn_radiation_probe", "_diffrn_radiation_type"
_SU = re.compile(r"[-+]?(?:\d+\.?(\d*)|\.(\d+))\((\d{1,9})\)(?:[eE]([-+]?\d{1,3}))?")
_LONGEST_ANGLE = 180.0  # degrees


def is_cif(text: str) -> bool:
    """Return whether a text is a CIF: its first line that is no comment begins a data block."""
    for match in re.finditer(r"[^\r\n]+", text[: 1 << 16]):
        line = match[0].lstrip("\ufeff \t")
        if line and line[0] != "#":
            return bool(re.match(r"data_\S*\s*(#|$)|global_\s*$", line, re.IGNORECASE))
    return False


def read_pdcif(text: str, path: Path, bank: int | None, reading: Reading) -> list[RawProfile]:
    """Return the measured profiles of a CIF's data blocks, or raise a ProfileError.

    Several are numbered in their order; a single one is taken to be the given bank.
    """
    try:
        blocks = blocks_of(text, str(path))
    except CrystalError as error:
        raise ProfileError(str(error)) from error
    blocks = [block for block in blocks if _intensities_of(block)]
    if not blocks:
        raise ProfileError(
            f"{path} is a CIF without a measured profile (_pd_meas_…, _pd_proc_…): as a structure "
            f"it belongs to a campaign."
        )
    if reading.block is not None:
        requested = reading.block.removeprefix("data_").lower()
        known = ", ".join(block.name for block in blocks)
        blocks = [block for block in blocks if block.name.lower() == requested]
        if not blocks:
            raise ProfileError(
                f"{path} has no block '{reading.block}' with a measured profile. It has: {known}."
            )
    alone = len(blocks) == 1
    return [
        _profile(block, path, bank if alone else number, reading)
        for number, block in enumerate(blocks, start=1)
    ]


def _intensities_of(block: CifBlock) -> str:
    """Return the tag of a block's measured intensities; empty if it has none but place holders."""
    for tag in _INTENSITIES:
        if len(block.columns.get(tag, ())) > 1 and np.isfinite(block.numbers(tag)).any():
            return tag
    return ""


def _profile(block: CifBlock, path: Path, bank: int | None, reading: Reading) -> RawProfile:
    where = f"{path}, data_{block.name},"
    name = _intensities_of(block)
    intensity = block.numbers(name)
    x, declared, notes = _axis(block, len(intensity), where)
    probe = block.text(*_PROBES).lower()
    if probe.startswith(("x-ray", "electron", "gamma")):
        raise ProfileError(f"{where} was measured with {probe[:20]}; only neutrons are supported.")
    wavelength = _number(block.text("_diffrn_radiation_wavelength"))
    if declared in ("d", "Q") and wavelength > 0:
        raise ProfileError(
            f"{where} is constant wavelength, {wavelength:g} Å; only time of flight is supported."
        )
    sigma, of_sigma = _sigma(block, name, intensity)
    if len(x) > 1 and (np.diff(x) < 0).all():
        x, intensity = x[::-1], intensity[::-1]
        sigma = None if sigma is None else sigma[::-1]
    if name == _COUNTS and declared == "us":
        notes.append("Counts were divided by the distance of their times.")
    header = {}
    if angle := block.text(*_ANGLES):
        header["two_theta"] = _plain(angle)
    if difc := _difc(block):
        header["difc"] = difc
    return RawProfile(
        path=path,
        format="pdCIF",
        x=x,
        intensity=intensity,
        sigma=sigma,
        bank=bank,
        title=block.name,
        header=header,
        declared=declared,
        counts=name == _COUNTS,
        edges=bool(reading.bin_edges),
        warnings=(*notes, *of_sigma),
    )


def _axis(block: CifBlock, count: int, where: str) -> tuple[Array, axis.Declared, list[str]]:
    """Return what a profile of ``count`` points is over, and what was inferred."""
    for tag, declared in _AXES.items():
        if len(block.columns.get(tag, ())) == count > 1:
            x = block.numbers(tag)
            if np.isnan(x).any():
                row = int(np.argmax(np.isnan(x)))
                raise ProfileError(
                    f"{where} has '{block.columns[tag][row][:20]}' as {tag} at point {row + 1}, "
                    f"where a number is needed."
                )
            return x, declared, []
        ends = [_number(block.text(f"{tag}_{end}")) for end in ("min", "max", "inc")]
        if np.isfinite(ends).all() and ends[2] > 0:
            low, high, step = ends
            if abs((high - low) / step + 1 - count) > 1:
                raise ProfileError(
                    f"{where} has {count} intensities and {tag}_min, _max, _inc for "
                    f"{(high - low) / step + 1:.0f} points."
                )
            x = np.asarray(low + step * np.arange(count), dtype=np.float64)
            if declared == "angle" and high > _LONGEST_ANGLE:
                return x, "us", [f"{tag} to {high:g} is no angle: taken as time of flight in µs."]
            return x, declared, []
    raise ProfileError(
        f"{where} has {count} intensities and nothing that they are over, such as as many values "
        f"of _pd_meas_time_of_flight."
    )


def _sigma(block: CifBlock, name: str, y: Array) -> tuple[Array | None, list[str]]:
    """Return standard uncertainties (0: no information; None: none in the file), and warnings.

    From a column of their own, behind the values in brackets, from weights or counts.
    """
    columns = block.columns
    for tag in (f"{name}_su", f"{name}_esd"):
        if len(columns.get(tag, ())) == len(y):
            return np.nan_to_num(block.numbers(tag)), []
    in_brackets = _in_brackets(columns[name])
    if (in_brackets > 0).any():
        without = int((np.isfinite(y) & ~(in_brackets > 0)).sum())
        return in_brackets, [
            f"{without} points of {len(y)} have no standard uncertainty: they are not used."
        ] if without else []
    if len(columns.get(_WEIGHT, ())) == len(y):
        weight = block.numbers(_WEIGHT)
        known = weight > 0  # 0: left out by the refinement
        return np.where(known, 1 / np.sqrt(np.where(known, weight, 1.0)), 0.0), []
    return None, []


def _in_brackets(values: Sequence[str]) -> Array:
    """Return the standard uncertainties of values as in 1.23(4); 0 where there is none."""
    result = np.zeros(len(values))
    for row, value in enumerate(values):
        if value[-1:] == ")" or "(" in value:
            match = _SU.fullmatch(value.strip("'\""))
            if match:
                decimals = len(match[1] or match[2] or "")
                result[row] = int(match[3]) * 10.0 ** (int(match[4] or 0) - decimals)
    return result


def _difc(block: CifBlock) -> str:
    """Return difC, as programs write it, or the linear term of the dictionary's table."""
    powers, terms = block.numbers("_pd_calib_d_to_tof_power"), "_pd_calib_d_to_tof_coeff"
    if len(powers) == len(block.columns.get(terms, ())):
        for power, value in zip(powers, block.numbers(terms), strict=True):
            if power == 1 and np.isfinite(value):
                return repr(float(value))
    return _plain(block.text(*_DIFC))


def _number(text: str) -> float:
    try:
        return float(_plain(text))
    except ValueError:
        return float("nan")


def _plain(text: str) -> str:
    """Return a number without its standard uncertainty."""
    return text.partition("(")[0].strip()
