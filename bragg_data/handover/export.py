"""A joint refinement written to a file, in the format that its suffix names."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bragg_data.handover import fullprof, topas
from bragg_data.handover.curves import write_csv
from bragg_data.handover.gsas2 import write_project
from bragg_data.handover.pdcif import ASCII, cif_of_refinement
from bragg_data.refinement.joint_result import JointResult, RefinedBank

_CLOSE = 1e-3  # between R_wp of GSAS-II and this project's


class HandoverError(ValueError):
    """A format that is not known, or a refinement that a format cannot represent."""


class Refinement(NamedTuple):
    """What is handed over."""

    fit: JointResult
    explanations: tuple[str, ...]  # of the calibrations' uncertainties, in sentences
    gsas2_location: str | None = None  # of the package GSASII


class Written(NamedTuple):
    """The files that were written, and sentences on what another program calculates differently."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def export(refinement: Refinement, file: Path) -> Written:
    """Write a refinement: ``.cif``, ``.csv``, or for GSAS-II, TOPAS and FullProf by their suffixes.

    ``.gpx``, ``.inp`` and ``.pcr``; next to the last two a data file of each bank.
    Raises a HandoverError for another suffix, or if there are no phases to hand over; a Gsas2Error
    if there is no GSAS-II that works.
    """
    check_format(file)
    if file.suffix.lower() != ".csv" and not any(p.present for p in refinement.fit.phases):
        raise HandoverError(f"{file}: no phase was found that could be handed over.")
    return _FORMATS[file.suffix.lower()](refinement, file)


def check_format(file: Path) -> None:
    """Raise a HandoverError if no format has the suffix of a file."""
    if file.suffix.lower() not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise HandoverError(f"{file}: the suffix names no format. There are {known}.")


def _csv(refinement: Refinement, file: Path) -> Written:
    write_csv(refinement.fit.banks, file)
    return Written((file,))


def _cif(refinement: Refinement, file: Path) -> Written:
    text = cif_of_refinement(refinement.fit, refinement.explanations)
    file.write_text(text, encoding="ascii")
    return Written((file,))


def _gpx(refinement: Refinement, file: Path) -> Written:
    fit = refinement.fit
    calculated = write_project(fit, file, refinement.gsas2_location)
    rwp = calculated.rwp_of_all(fit.banks)
    notes = [f"GSAS-II calculates R_wp {100 * rwp:.3f} %, this project {100 * fit.rwp:.3f} %."]
    if abs(rwp - fit.rwp) > _CLOSE:
        notes[0] += " The difference is larger than usual: compare the profiles."
    return Written((file,), (*notes, *calculated.notes))


def _pcr(refinement: Refinement, file: Path) -> Written:
    data = _data_files(refinement, file, "dat")
    content = fullprof.pcr_of_refinement(refinement.fit, [path.name for path in data])
    return _with_data(refinement, file, content, data, fullprof.write_data)


def _inp(refinement: Refinement, file: Path) -> Written:
    data = _data_files(refinement, file, "xye")
    content = topas.inp_of_refinement(refinement.fit, [path.name for path in data])
    return _with_data(refinement, file, content, data, topas.write_data)


def _with_data(
    refinement: Refinement,
    file: Path,
    content: tuple[str, tuple[str, ...]],
    data: Sequence[Path],
    write_data: Callable[[RefinedBank, Path], None],
) -> Written:
    """Write an input file, of which there are text and notes, and the profiles that it names."""
    text, notes = content
    file.write_text(text.translate(ASCII), encoding="ascii", errors="replace")
    for bank, path in zip(refinement.fit.banks, data, strict=True):
        write_data(bank, path)
    return Written((file, *data), notes)


def _data_files(refinement: Refinement, file: Path, suffix: str) -> list[Path]:
    """Return the files of the banks, next to the one that names them; numbered in their order."""
    stem = re.sub(r"[^\w.-]", "_", file.stem, flags=re.ASCII)
    banks = range(1, len(refinement.fit.banks) + 1)
    return [file.with_name(f"{stem}-bank{number}.{suffix}") for number in banks]


_FORMATS: dict[str, Callable[[Refinement, Path], Written]] = {
    ".cif": _cif,
    ".csv": _csv,
    ".gpx": _gpx,
    ".inp": _inp,
    ".pcr": _pcr,
}
