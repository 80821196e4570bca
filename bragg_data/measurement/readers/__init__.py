"""Readers of measured powder profiles: GSAS files and files of columns.

Conventions are those of GSAS-II, so that a calibration refined with it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bragg_data.measurement.readers import common
from bragg_data.measurement.readers.common import Profile, ProfileError, profile_from_arrays
from bragg_data.measurement.readers.gsas import gsas_blocks, read_gsas_bank

__all__ = ["Profile", "ProfileError", "profile_from_arrays", "read_profiles"]

_COLUMN_NAMES = {
    "tof": {"tof", "tof_us", "time_of_flight", "time-of-flight", "t", "time", "x"},
    "intensity": {"intensity", "y", "yobs", "y_obs", "i", "iobs", "counts", "observed", "obs"},
    "sigma": {"sigma", "e", "err", "error", "esd", "s", "dy", "sig", "uncertainty", "std"},
    "weight": {"weight", "w"},
}
_OTHER_AXES = re.compile(r"d|d[_-]?spacing|q|2-?theta|two_theta|wavelength|tof_ms|energy")


def read_profiles(path: Path, bank: int | None = None) -> list[Profile]:
    """Read the profiles of a GSAS file (every bank) or of a file of columns (one).

    GSAS: binning SLOG, CONST, COND, RALF, TIME_MAP; data FXYE, FXY, ALT, ESD, STD. Columns: time
    of flight in µs, intensity, and optionally the standard deviation, separated by blanks, commas
    or semicolons; comment lines start with ``#``, ``!`` or ``'``; a line of names may order the
    columns (``tof``, ``intensity``, ``sigma`` or ``weight`` and usual variants). ``BANK`` records
    tell which of the two it is, not the extension. Without a standard deviation in the file it is
    √y, and not smaller than that of the smallest positive y.

    With ``bank`` only that one is read. A file of columns does not say its bank: it is taken to be
    this one. A ProfileError names the file, and what is wrong with it.
    """
    lines = common.text_from_file(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not any(line.startswith("BANK") for line in lines):
        return [_read_columns(lines, path, bank)]
    blocks, time_maps = gsas_blocks(lines, path)
    known = [block.bank for block in blocks]
    names = ", ".join(map(str, known))
    if len(set(known)) < len(known):
        raise ProfileError(f"{path} has two banks of one number; it holds banks {names}.")
    if bank is not None and bank not in known:
        raise ProfileError(f"{path} has no bank {bank}. It holds banks {names}.")
    return [
        read_gsas_bank(block, time_maps, path) for block in blocks if bank in (None, block.bank)
    ]


def _fields(line: str) -> list[str]:
    return re.split(r"\s*[,;]\s*|\s+", line.strip().rstrip(",; "))


def _named_columns(candidates: list[str], width: int, path: Path) -> dict[str, int] | None:
    """Take the line of column names, as many as columns, out of the header's lines."""
    for line in reversed(candidates):
        bare = re.sub(r"\([^()]*\)|\[[^][]*\]", "", line.strip().lstrip(common.COMMENT))
        names = [name.strip("\"'").lower() for name in _fields(bare)]
        if len(names) != width or any(re.fullmatch(r"[=:\d.+-]+", name) for name in names):
            continue  # such as "2theta = 122.0" before three columns
        columns = {
            meaning: names.index(matches[0])
            for meaning, variants in _COLUMN_NAMES.items()
            if (matches := [name for name in names if name in variants])
        }
        if _OTHER_AXES.fullmatch(names[0]) and "tof" not in columns:
            raise ProfileError(f"{path} is over {names[0]}; time of flight in µs is expected.")
        if "tof" in columns and "intensity" in columns:
            candidates.remove(line)
            return columns
    return None


def _read_columns(lines: Sequence[str], path: Path, bank: int | None) -> Profile:
    comments: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if not stripped or stripped[0] in common.COMMENT:
            comments += [stripped] if stripped else []
            continue
        try:
            row = [float(word) for word in _fields(stripped)]
        except ValueError as error:
            if not rows and number <= 100:  # a title, or the names of the columns
                comments.append(stripped)
                continue
            if not rows:
                break
            raise ProfileError(
                f"{path} cannot be read at line {number}: {stripped[:60]!r} is not numbers."
            ) from error
        if rows and len(row) != len(rows[0]):
            raise ProfileError(
                f"{path} has {len(row)} columns at line {number} and {len(rows[0])} before."
            )
        rows.append(row)
    if not rows:
        raise ProfileError(
            f"{path} holds no numbers. Expected: columns of time of flight in µs, intensity and "
            f"its standard deviation, or a GSAS file with BANK records."
        )
    width = len(rows[0])
    if width < 2:
        raise ProfileError(f"{path} has one column; time of flight and intensity are expected.")
    named = _named_columns(comments, width, path)
    index = named or {"tof": 0, "intensity": 1, **({"sigma": 2} if width > 2 else {})}
    data = np.array(rows)
    sigma = data[:, index["sigma"]] if "sigma" in index else None
    if sigma is None and "weight" in index:
        weight = data[:, index["weight"]]
        known = weight > 0
        sigma = np.where(known, 1 / np.sqrt(np.where(known, weight, 1.0)), 0.0)
    header = common.header_from_comments(comments)
    title = header.get("title", "") or header.get("comment", "").partition("; ")[0]
    # A density at the given times. (GSAS-II moves these by half a bin, as it does with edges:
    # calibrations refined there from column files contain that shift.)
    columns = (data[:, index["tof"]], data[:, index["intensity"]], sigma)
    return common.checked_profile(path, bank, title, header, columns, edges=False)
