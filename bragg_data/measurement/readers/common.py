"""A measured profile, the checks that every one has to pass, and the reading of headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MINIMUM_POINTS = 20  # a profile with fewer is refused
_LARGEST = 1e30  # beyond this sums of squares overflow: no detector counts so much
_LARGEST_TOF = 1e7  # µs; ten seconds
_SMALLEST_STEP = 1e-6  # µs; no clock is finer, and a density over less overflows
COMMENT = "#!'\"/*"


class ProfileError(ValueError):
    """A measured profile that cannot be read, or from which nothing can be predicted."""


@dataclass(frozen=True, eq=False)
class Profile:
    """One measured powder profile."""

    tof: NDArray[np.float64]  # (n,) in µs, ascending
    intensity: NDArray[np.float64]  # (n,) density per µs, in the file's own units
    sigma: NDArray[np.float64]  # (n,) its standard deviation; 0: masked or dead detectors
    bank: int | None = None  # its number in the file
    title: str = ""  # of the file
    two_theta: float | None = None  # degrees, from the header
    difc: float | None = None  # µs/Å, from the header: nominal (geometry, no calibration)
    header: dict[str, str] = field(default_factory=dict)  # of comments; keys in lower case
    source: str = "arrays"  # the path of the file

    @property
    def name(self) -> str:
        """The file, and the bank in it, for messages."""
        return self.source if self.bank is None else f"{self.source}, bank {self.bank}"


def text_from_file(path: Path) -> str:
    """Return the text of a profile's file; a ProfileError if it is unreadable, binary or empty."""
    try:
        with path.open("rb") as file:
            content = file.read(1 << 16)
            if b"\0" not in content:  # as nearly all binary files have it there
                content += file.read()
    except FileNotFoundError as error:
        raise ProfileError(f"Profile {path} not found. Give the path of a file.") from error
    except OSError as error:
        raise ProfileError(f"Profile {path} cannot be read: {error.strerror}.") from error
    if b"\0" in content:
        raise ProfileError(
            f"{path} is a binary file. Give a text file: GSAS (.gsa, .gss, .fxye) or columns "
            f"(.xye)."
        )
    content = content.removeprefix(b"\xef\xbb\xbf")  # the mark some editors begin UTF-8 with
    if not content.strip():
        raise ProfileError(f"{path} is empty.")
    return content.decode("latin-1")


# Values of one bank in a Mantid file: "Total flight path 20.61m, tth 120.4deg, DIFC 9041.7"
_BANK_VALUES = {
    "total flight path": re.compile(r"total flight path\D{0,3}([\d.]+)", re.IGNORECASE),
    "two_theta": re.compile(r"\b(?:tth|2-?theta|two_theta)\b[^\d-]{0,3}(-?[\d.]+)", re.IGNORECASE),
    "difc": re.compile(r"\bdifc\b\D{0,3}([\d.]+)", re.IGNORECASE),
}


def header_from_comments(general: Sequence[str], of_bank: Sequence[str] = ()) -> dict[str, str]:
    """Return what comments contain, as keys in lower case and values.

    Lines before the first bank are ``general``; those before this one take precedence.
    """
    header: dict[str, str] = {}
    free = []
    for line in (*general, *of_bank):
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


def _number_of(header: dict[str, str], key: str, low: float, high: float) -> float | None:
    try:
        value = float(header[key])
    except (KeyError, ValueError):
        return None
    return value if low < value < high and value != 0 else None


def checked_profile(
    path: Path,
    bank: int | None,
    title: str,
    header: dict[str, str],
    columns: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None],
    *,
    edges: bool,
) -> Profile:
    """Check the columns of a file and return them as a :class:`Profile`, or raise a ProfileError.

    ``columns``, each of shape (n,), are times of flight in µs, intensities, and standard deviations
    or None; with ``edges`` GSAS's lower bin edges and counts, not points of a density.
    """
    tof, intensity, sigma = columns
    where = str(path) if bank is None else f"{path}, bank {bank},"
    if problem := _problem_of_times(tof):
        raise ProfileError(f"{where} {problem}")
    step = np.diff(tof)
    missing = ~np.isfinite(intensity)
    if sigma is not None:
        missing |= ~np.isfinite(sigma)
    if missing.mean() > 0.5:
        raise ProfileError(
            f"{where} has no number as intensity (or its standard deviation) at {missing.sum()} of "
            f"{len(tof)} points."
        )
    intensity = np.where(missing, 0.0, intensity)
    if not intensity.any():
        raise ProfileError(f"{where} holds no intensity: all {len(tof)} values are zero.")
    if sigma is None or not (sigma > 0).any():
        positive = intensity[intensity > 0]
        if not len(positive):
            raise ProfileError(f"{where} holds no positive intensity.")
        sigma = np.sqrt(np.maximum(intensity, positive.min()))
    sigma = np.where(missing | (sigma < 0), 0.0, sigma)
    if max(np.abs(intensity).max(), sigma.max()) > _LARGEST:
        raise ProfileError(
            f"{where} has an intensity beyond {_LARGEST:g}: no detector counts so much."
        )
    if edges:
        tof, intensity, sigma = tof[:-1] + step / 2, intensity[:-1] / step, sigma[:-1] / step
    two_theta = _number_of(header, "two_theta", -180.0, 180.0)
    difc = _number_of(header, "difc", 0.0, 1e6)
    return Profile(tof, intensity, sigma, bank, title, two_theta, difc, header, str(path))


def _problem_of_times(tof: NDArray[np.float64]) -> str:
    if len(tof) < MINIMUM_POINTS:
        return f"has {len(tof)} points; a profile needs at least {MINIMUM_POINTS}."
    if not np.isfinite(tof).all():
        return "has a time of flight that is not a number."
    ends = f"runs from {tof.min():g} to {tof.max():g}"
    if tof.max() < 100:
        return f"{ends}: time of flight in µs is expected (not ms, Å or degrees)."
    if tof.min() <= 0 or tof.max() > _LARGEST_TOF:
        return f"{ends} µs; times of flight lie between 0 and {_LARGEST_TOF:g} µs."
    row = int(np.argmin(np.diff(tof) > _SMALLEST_STEP))
    if tof[row + 1] - tof[row] > _SMALLEST_STEP:
        return ""
    return (
        f"has times of flight that do not ascend: {tof[row + 1]:g} µs follows {tof[row]:g} µs at "
        f"point {row + 2}."
    )


def profile_from_arrays(
    tof: NDArray[np.float64],
    intensity: NDArray[np.float64],
    sigma: NDArray[np.float64] | None = None,
    *,
    bank: int | None = None,
    two_theta: float | None = None,
) -> Profile:
    """Return a profile from arrays (n,), checked and completed as the columns of a file.

    Times of flight in µs, ascending; density per µs; its standard deviation, estimated from
    counting statistics if left out; scattering angle in degrees. A ProfileError is raised if the
    arrays differ in length, or are no profile.
    """
    columns = (tof, intensity) if sigma is None else (tof, intensity, sigma)
    if {column.shape for column in columns} != {(len(tof),)}:
        shapes = ", ".join(str(column.shape) for column in columns)
        raise ProfileError(
            f"A profile needs one-dimensional arrays of one length; their shapes are {shapes}."
        )
    header = {} if two_theta is None else {"two_theta": repr(two_theta)}
    return checked_profile(Path("arrays"), bank, "", header, (tof, intensity, sigma), edges=False)
