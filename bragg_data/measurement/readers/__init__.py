"""Readers of measured powder profiles: GSAS, columns, powder CIF and NeXus.

Conventions are those of GSAS-II, so that a calibration refined with it holds.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from bragg_data.isolated_process import IsolatedProcess, IsolatedProcessTimeoutError
from bragg_data.measurement.readers import common, pdcif
from bragg_data.measurement.readers.checks import RawProfile, checked_profile, profile_from_arrays
from bragg_data.measurement.readers.columns import read_columns
from bragg_data.measurement.readers.common import Profile, ProfileError, Reading, Unit
from bragg_data.measurement.readers.gsas import (
    GsasBlock,
    gsas_blocks,
    is_bank_record,
    read_gsas_bank,
)

__all__ = ["Profile", "ProfileError", "Reading", "Unit", "profile_from_arrays", "read_profiles"]

_MOST_POINTS = 200_000  # of a profile: diffractometers of time of flight record up to 30,000

AS_USUAL = Reading()
"""As files say themselves, and by the usual conventions."""


def read_profiles(
    path: Path, bank: int | None = None, reading: Reading = AS_USUAL
) -> list[Profile]:
    """Read the profiles of a file: of columns one, else every bank.

    GSAS: binning SLOG, CONST, COND, RALF, TIME_MAP; data FXYE, FXY, ALT, ESD, STD. Columns: time
    of flight, d-spacing or Q, intensity, and optionally the standard deviation, separated by
    blanks, commas or semicolons; comment lines start with ``#``, ``!`` or ``'``; a line of names
    may order the columns (``tof``, ``intensity``, ``sigma`` or ``weight`` and usual variants, with
    a unit in brackets). Powder CIF: :mod:`~bragg_data.measurement.readers.pdcif`; NeXus:
    :mod:`~bragg_data.measurement.readers.nexus`. The content decides, not the extension. Without a
    standard deviation in the file it is √y, and not smaller than that of the smallest positive y.

    With ``bank`` only those of this number are read. A file that does not number its only profile
    is taken to hold this one. A ProfileError names the file, and what is wrong with it.
    """
    profiles = _profiles(path, bank, reading)
    for profile in profiles:
        if (points := len(profile.tof)) > _MOST_POINTS:
            raise ProfileError(
                f"{profile.name} has {points:,} points; at most {_MOST_POINTS:,} can be used. "
                f"Rebin it."
            )
    return profiles


def _profiles(path: Path, bank: int | None, reading: Reading) -> list[Profile]:
    text = "" if common.is_hdf(path) else common.text_from_file(path)
    if pdcif.is_cif(text):
        return _checked(pdcif.read_pdcif(text, path, bank, reading), path, bank, reading)
    if reading.block is not None:
        raise ProfileError(
            f"{path} is no CIF: --block names a data block of one. Leave it out, or choose with "
            f"--bank or --position."
        )
    if not text:
        banks = read_nexus_apart(path, bank if reading.position is None else None)
        if reading.bin_edges is not None:  # of points; those of bins are known
            banks = [raw if raw.edges else replace(raw, edges=reading.bin_edges) for raw in banks]
        return _checked(banks, path, bank, reading)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not any(map(is_bank_record, lines)):
        # Its readers of instruments import much, which the process that reads NeXus does without.
        from bragg_data.measurement.readers.other_kinds import refuse_other_kinds

        refuse_other_kinds(text, path)
        return [read_columns(lines, path, bank, reading)]
    blocks, time_maps = gsas_blocks(lines, path)
    chosen = _chosen(blocks, path, bank, reading.position)
    return [read_gsas_bank(block, time_maps, path, reading) for block in chosen]


def read_nexus_apart(path: Path, bank: int | None, seconds: float = 60.0) -> list[RawProfile]:
    """Return the banks of a NeXus file, read in a process of its own; a ProfileError if it cannot.

    The HDF5 library hangs or dies on damaged files; ``seconds`` are its time limit.
    """
    target = "bragg_data.measurement.readers.nexus:NexusReader"
    try:
        with closing(IsolatedProcess(target, Path.cwd(), name="nexus")) as process:
            banks: list[RawProfile] = process.call("read", path, bank, seconds=seconds)
    except ProfileError:
        raise
    except IsolatedProcessTimeoutError as error:
        raise ProfileError(
            f"{path} is a damaged HDF5 file, or too large: it was not read within {seconds:g} s."
        ) from error
    except Exception as error:
        raise ProfileError(
            f"{path} is a damaged HDF5 file: its library fails. Copy it again."
        ) from error
    return banks


def _checked(
    banks: Sequence[RawProfile], path: Path, bank: int | None, reading: Reading
) -> list[Profile]:
    chosen = _chosen(banks, path, bank, reading.position)
    return [checked_profile(raw, reading.x_unit) for raw in chosen]


_Bank = TypeVar("_Bank", GsasBlock, RawProfile)


def _chosen(
    blocks: Sequence[_Bank], path: Path, bank: int | None, position: int | None
) -> Sequence[_Bank]:
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
