"""Readers of measured powder profiles: GSAS files and files of columns.

Conventions are those of GSAS-II, so that a calibration refined with it holds.
"""

from pathlib import Path

from bragg_data.measurement.readers import common
from bragg_data.measurement.readers.checks import profile_from_arrays
from bragg_data.measurement.readers.columns import read_columns
from bragg_data.measurement.readers.common import Profile, ProfileError, Reading, Unit
from bragg_data.measurement.readers.gsas import (
    GsasBlock,
    gsas_blocks,
    is_bank_record,
    read_gsas_bank,
)

__all__ = [
    "AS_USUAL",
    "Profile",
    "ProfileError",
    "Reading",
    "Unit",
    "profile_from_arrays",
    "read_profiles",
]

AS_USUAL = Reading()
"""As files say themselves, and by the usual conventions."""


def read_profiles(
    path: Path, bank: int | None = None, reading: Reading = AS_USUAL
) -> list[Profile]:
    """Read the profiles of a GSAS file (every bank) or of a file of columns (one).

    GSAS: binning SLOG, CONST, COND, RALF, TIME_MAP; data FXYE, FXY, ALT, ESD, STD. Columns: time
    of flight, d-spacing or Q, intensity, and optionally the standard deviation, separated by
    blanks, commas or semicolons; comment lines start with ``#``, ``!`` or ``'``; a line of names
    may order the columns (``tof``, ``intensity``, ``sigma`` or ``weight`` and usual variants, with
    a unit in brackets). ``BANK`` records tell which of the two it is, not the extension. Without a
    standard deviation in the file it is √y, and not smaller than that of the smallest positive y.

    With ``bank`` only those of this number are read. A file of columns does not say its bank: it
    is taken to be this one. A ProfileError names the file, and what is wrong with it.
    """
    lines = common.text_from_file(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not any(map(is_bank_record, lines)):
        return [read_columns(lines, path, bank, reading)]
    blocks, time_maps = gsas_blocks(lines, path)
    chosen = _chosen(blocks, path, bank, reading.position)
    return [read_gsas_bank(block, time_maps, path, reading) for block in chosen]


def _chosen(
    blocks: list[GsasBlock], path: Path, bank: int | None, position: int | None
) -> list[GsasBlock]:
    names = ", ".join(str(block.bank) for block in blocks)
    if position is not None:
        if not 0 < position <= len(blocks):
            raise ProfileError(
                f"{path} has no bank at position {position}. It holds banks {names}, in this order."
            )
        blocks = [blocks[position - 1]]
    chosen = [block for block in blocks if bank in (None, block.bank)]
    if not chosen:
        raise ProfileError(f"{path} has no bank {bank}. It holds banks {names}.")
    return chosen
