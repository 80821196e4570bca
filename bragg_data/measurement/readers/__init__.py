"""Readers of measured powder profiles: GSAS files and files of columns.

Conventions are those of GSAS-II, so that a calibration refined with it holds.
"""

from __future__ import annotations

from pathlib import Path

from bragg_data.measurement.readers.columns import read_columns
from bragg_data.measurement.readers.common import (
    MINIMUM_POINTS,
    Profile,
    ProfileError,
    profile_from_arrays,
    text_from_file,
)
from bragg_data.measurement.readers.gsas import gsas_blocks, read_gsas_bank

__all__ = ["MINIMUM_POINTS", "Profile", "ProfileError", "profile_from_arrays", "read_profiles"]


def read_profiles(path: Path, bank: int | None = None) -> list[Profile]:
    """Read the profiles of a GSAS file (every bank) or of a file of columns (one).

    GSAS: binning SLOG, CONST, COND, RALF, TIME_MAP; data FXYE, FXY, ALT, ESD, STD. Columns: time
    of flight in µs, intensity, and optionally the standard deviation, separated by blanks, commas
    or semicolons; comment lines start with ``#``, ``!`` or ``'``; a line of names may order the
    columns (``tof``, ``intensity``, ``sigma`` or ``weight`` and usual variants). Which of the two
    it is shows from ``BANK`` records, not from the extension.

    Parameters
    ----------
    path
        The file.
    bank
        Read this bank only. A file of columns does not say its bank: it is taken to be this one.

    Returns
    -------
    The profiles in the file's order. Without a standard deviation in the file it is √y, and not
    smaller than that of the smallest positive y.

    Raises
    ------
    ProfileError
        Naming the file, and what is wrong with it.
    """
    lines = text_from_file(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not any(line.startswith("BANK") for line in lines):
        return [read_columns(lines, path, bank)]
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
