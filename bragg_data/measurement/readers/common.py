"""A measured profile, how its file may be read, and the reading of headers."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from bragg_data.arrays import Array
from bragg_data.files import read_bounded

MINIMUM_POINTS = 20  # a profile with fewer is refused
_MOST_BYTES, _MOST_LINES = 100_000_000, 1_000_000  # of a text file, with all its banks
COMMENT = "#!'\"/*"

Unit = Literal["us", "ms", "s", "d", "Q"]
"""Of a file's axis: time of flight in µs, ms or s; d-spacing in Å; Q in 1/Å."""


class ProfileError(ValueError):
    """A measured profile that cannot be read, or from which nothing can be predicted."""


@dataclass(frozen=True)
class Reading:
    """How to read what a file leaves open; None for what it says itself, or the usual."""

    position: int | None = None  # place of the bank in the file, from 1
    x_unit: Unit | None = None
    bin_edges: bool | None = None  # whether times are lower bin edges, or centres
    block: str | None = None  # name of a CIF's data block


@dataclass(frozen=True, eq=False)
class Profile:
    """One measured powder profile."""

    # (n,) in µs, ascending; where `unit` is d or Q the d-spacing in Å, still to be converted.
    tof: Array
    intensity: Array  # (n,) density per µs, in the file's own units
    sigma: Array  # (n,) its standard deviation; 0: masked or dead detectors
    bank: int | None = None  # its number in the file
    title: str = ""  # of the file
    two_theta: float | None = None  # degrees, from the header
    difc: float | None = None  # µs/Å, from the header: nominal (geometry, no calibration)
    header: dict[str, str] = field(default_factory=dict)  # of comments; keys in lower case
    source: str = "arrays"  # the path of the file
    unit: Literal["us", "d"] = "us"
    format: str = "arrays"  # as the reader that recognised the file calls it
    axis: Unit = "us"  # the unit in the file
    sigma_known: bool = True  # whether `sigma` is the file's, or estimated from the intensities
    # Whether the times of a file of columns may be bin edges: they were taken as centres.
    maybe_edges: bool = False
    # Whether the times of a GSAS file may be centres, as Mantid's: they were taken as lower edges.
    maybe_centres: bool = False
    warnings: tuple[str, ...] = ()  # what was inferred when the file was read, in sentences

    @property
    def name(self) -> str:
        """The file, and the bank in it, for messages."""
        return self.source if self.bank is None else f"{self.source}, bank {self.bank}"

    @property
    def relative_step(self) -> float:
        """The usual distance of neighbouring points, relative to their place on the axis."""
        return float(np.median(np.diff(self.tof) / self.tof[:-1]))


HDF4 = b"\x0e\x03\x13\x01"
_HDF5 = b"\x89HDF\r\n\x1a\n"


def is_hdf(path: Path) -> bool:
    """Return whether a file begins as HDF4 or HDF5 files do."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:  # a pipe would wait
            return file.read(8).startswith((HDF4, _HDF5))
    except OSError:
        return False  # reported where it is read as text


def text_from_file(path: Path) -> str:
    """Return the text of a profile's file.

    Raises a ProfileError if it is unreadable, binary, empty, or too long.
    """
    try:
        content = read_bounded(path, _MOST_BYTES)
    except FileNotFoundError as error:
        raise ProfileError(f"Profile {path} not found. Give the path of a file.") from error
    except OSError as error:
        raise ProfileError(f"Profile {path} cannot be read: {error.strerror}.") from error
    if b"\0" in content:
        raise ProfileError(
            f"{path} is a binary file. Give GSAS (.gsa, .gss, .fxye), columns (.xye), a powder CIF "
            f"or NeXus (HDF5)."
        )
    content = content.removeprefix(b"\xef\xbb\xbf")  # the mark some editors begin UTF-8 with
    if not content.strip():
        raise ProfileError(f"{path} is empty.")
    if (lines := content.count(b"\n")) > _MOST_LINES:
        raise ProfileError(f"{path} has {lines:,} lines; at most {_MOST_LINES:,} are read.")
    return content.decode("latin-1")


# Values of one bank in a Mantid file: "Total flight path 20.61m, tth 120.4deg, DIFC 9041.7"
_BANK_VALUES = {
    "total flight path": re.compile(r"total flight path\D{0,3}([\d.]+)", re.IGNORECASE),
    "two_theta": re.compile(r"\b(?:tth|2-?theta|two_theta)\b[^\d-]{0,3}(-?[\d.]+)", re.IGNORECASE),
    "difc": re.compile(r"\bdifc\b\D{0,3}([\d.]+)", re.IGNORECASE),
}


def header_from_comments(lines: Sequence[str]) -> dict[str, str]:
    """Return what comments contain, as keys in lower case and values; later ones count."""
    header: dict[str, str] = {}
    free = []
    for line in lines:
        text = line.strip().lstrip(COMMENT).strip()
        values = {key: m[1] for key, pattern in _BANK_VALUES.items() if (m := pattern.search(text))}
        if values:
            header |= values
        elif match := re.match(r"([A-Za-z][\w .-]{0,40}?)\s*[:=]\s*(\S.*)$", text):
            header[match[1].lower()] = match[2]
        elif text:
            free.append(text)
    if free:
        header["comment"] = "; ".join(free)
    return header


def table_at_once(lines: Sequence[str]) -> Array | None:
    """Return lines of numbers between blanks, (n, columns), quickly; None if they are not such.

    Then they have to be read line by line, which shows what is wrong with them.
    """
    try:
        table = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2) if lines else None
    except ValueError:
        return None
    return table
