"""Files of columns: time of flight, intensity, and optionally the standard deviation.

They list a density at the given times, which are taken as they stand (GSAS-II moves these by half a
bin, too; calibrations refined there from column files contain that shift).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bragg_data.measurement.readers.common import (
    COMMENT,
    Profile,
    ProfileError,
    checked_profile,
    header_from_comments,
)

_COLUMN_NAMES = {
    "tof": {"tof", "tof_us", "time_of_flight", "time-of-flight", "t", "time", "x"},
    "intensity": {"intensity", "y", "yobs", "y_obs", "i", "iobs", "counts", "observed", "obs"},
    "sigma": {"sigma", "e", "err", "error", "esd", "s", "dy", "sig", "uncertainty", "std"},
    "weight": {"weight", "w"},
}
_OTHER_AXES = frozenset(
    [
        "d",
        "d_spacing",
        "dspacing",
        "d-spacing",
        "q",
        "2theta",
        "two_theta",
        "2-theta",
        "wavelength",
        "tof_ms",
        "energy",
    ]
)


def _fields(line: str) -> list[str]:
    return re.split(r"\s*[,;]\s*|\s+", line.strip().rstrip(",; "))


def _named_columns(candidates: list[str], width: int, path: Path) -> dict[str, int] | None:
    """Take the line of column names, as many as columns, out of the header's lines."""
    for line in reversed(candidates):
        bare = re.sub(r"\([^()]*\)|\[[^][]*\]", "", line.strip().lstrip(COMMENT))
        names = [name.strip("\"'").lower() for name in _fields(bare)]
        if len(names) != width or any(re.fullmatch(r"[=:\d.+-]+", name) for name in names):
            continue  # such as "2theta = 122.0" before three columns
        columns = {
            meaning: names.index(matches[0])
            for meaning, variants in _COLUMN_NAMES.items()
            if (matches := [name for name in names if name in variants])
        }
        if names[0] in _OTHER_AXES and "tof" not in columns:
            raise ProfileError(f"{path} is over {names[0]}; time of flight in µs is expected.")
        if "tof" in columns and "intensity" in columns:
            candidates.remove(line)
            return columns
    return None


def read_columns(lines: Sequence[str], path: Path, bank: int | None) -> Profile:
    """Return the profile of a file of columns.

    Parameters
    ----------
    lines
        Of the file.
    path, bank
        As in :class:`Profile`.

    Raises
    ------
    ProfileError
        If it holds no columns of numbers, or other quantities.
    """
    comments: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if not stripped:
            continue
        if stripped[0] in COMMENT:
            comments.append(stripped)
            continue
        try:
            row = [float(word) for word in _fields(stripped)]
        except ValueError as error:
            if not rows:  # a title, or the names of the columns
                if number <= 100:
                    comments.append(stripped)
                    continue
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
    header = header_from_comments(comments)
    title = header.get("title", "") or header.get("comment", "").partition("; ")[0]
    columns = (data[:, index["tof"]], data[:, index["intensity"]], sigma)
    return checked_profile(path, bank, title, header, columns, edges=False)
