"""Readers of measured powder profiles: GSAS files and files of columns.

Conventions, which are GSAS-II's so that a calibration refined with it holds:

* A GSAS file (``BANK`` records) lists the lower edges of time bins and the counts in them, already
  multiplied by the bin width where they were normalised. The last bin, whose width is not known, is
  dropped, times become bin centres, and counts are divided by the width: a density per µs, as the
  simulated intensity is.
* A column file lists a density at the given times, which are taken as they stand (GSAS-II moves
  these by half a bin, too; calibrations refined there from column files carry that shift).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MINIMUM_POINTS = 20
"""A profile with fewer points is refused."""

_LARGEST = 1e30  # beyond this sums of squares overflow: no detector counts so much
_LARGEST_TOF = 1e7  # µs; ten seconds
_SMALLEST_STEP = 1e-6  # µs; no clock is finer, and a density over less overflows
_COMMENT = "#!'\"/*"


class ProfileError(ValueError):
    """A measured profile that cannot be read, or that a model cannot answer for."""


@dataclass(frozen=True, eq=False)
class Profile:
    """One measured powder profile.

    Attributes
    ----------
    tof : shape (n,)
        Times of flight in µs, ascending.
    intensity : shape (n,)
        Density per µs, in the file's own units.
    sigma : shape (n,)
        Standard deviation of ``intensity``; 0 where the point holds no information (masked or
        dead detectors).
    bank
        The bank's number in the file, if it has one.
    title
        The file's title, or empty.
    two_theta
        Scattering angle in degrees, from the header.
    difc
        Nominal difC in µs/Å, from the header: geometry alone, no calibration.
    header
        What the comments before the data say, keys in lower case.
    source
        The path of the file.
    """

    tof: NDArray[np.float64]
    intensity: NDArray[np.float64]
    sigma: NDArray[np.float64]
    bank: int | None
    title: str
    two_theta: float | None
    difc: float | None
    header: dict[str, str]
    source: str

    @property
    def name(self) -> str:
        """The file, and the bank in it, for messages."""
        return self.source if self.bank is None else f"{self.source}, bank {self.bank}"


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
    lines = _text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not any(line.startswith("BANK") for line in lines):
        return [_read_columns(lines, path, bank)]
    blocks, time_maps = _gsas_blocks(lines, path)
    known = [block.bank for block in blocks]
    names = ", ".join(map(str, known))
    if len(set(known)) < len(known):
        raise ProfileError(f"{path} has two banks of one number; it holds banks {names}.")
    if bank is not None and bank not in known:
        raise ProfileError(f"{path} has no bank {bank}. It holds banks {names}.")
    return [
        _read_gsas_bank(block, time_maps, path) for block in blocks if bank in (None, block.bank)
    ]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
            binary = b"\0" in start
            content = start if binary else start + file.read()
    except FileNotFoundError as error:
        raise ProfileError(f"Profile {path} not found. Give the path of a file.") from error
    except OSError as error:
        raise ProfileError(f"Profile {path} cannot be read: {error.strerror}.") from error
    if binary or b"\0" in content:
        raise ProfileError(
            f"{path} is a binary file. Give a text file: GSAS (.gsa, .gss, .fxye) or columns "
            f"(.xye)."
        )
    content = content.removeprefix(b"\xef\xbb\xbf")  # the mark some editors begin UTF-8 with
    if not content.strip():
        raise ProfileError(f"{path} is empty.")
    return content.decode("latin-1")


# ---- headers -----------------------------------------------------------------------------------

# What a Mantid file says of one bank only, as "Total flight path 20.61m, tth 120.4deg, DIFC 9041.7"
_OF_ONE_BANK = {
    "total flight path": re.compile(r"total flight path\D{0,3}([\d.]+)", re.IGNORECASE),
    "two_theta": re.compile(r"\b(?:tth|2-?theta|two_theta)\b\D{0,3}([\d.]+)", re.IGNORECASE),
    "difc": re.compile(r"\bdifc\b\D{0,3}([\d.]+)", re.IGNORECASE),
}


def _header(general: Sequence[str], own: Sequence[str] = ()) -> dict[str, str]:
    header: dict[str, str] = {}
    free = []
    for line in (*general, *own):
        text = line.strip().lstrip(_COMMENT).strip()
        found = {key: m[1] for key, pattern in _OF_ONE_BANK.items() if (m := pattern.search(text))}
        header.update(found)
        if found or not text:
            continue
        match = re.match(r"([A-Za-z][\w .-]{0,40}?)\s*[:=]\s*(\S.*)$", text)
        if match:
            header[match[1].lower()] = match[2]
        else:
            free.append(text)
    if free:
        header["comment"] = "; ".join(free)
    return header


def _number_of(header: dict[str, str], key: str, largest: float) -> float | None:
    try:
        value = float(header[key])
    except (KeyError, ValueError):
        return None
    return value if 0 < value < largest else None


def _profile(
    path: Path,
    bank: int | None,
    title: str,
    header: dict[str, str],
    columns: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None],
    *,
    edges: bool,
) -> Profile:
    """Check the columns and make a profile of them; ``edges``: GSAS's bins and counts."""
    tof, intensity, sigma = columns
    where = str(path) if bank is None else f"{path}, bank {bank},"
    if len(tof) < MINIMUM_POINTS:
        raise ProfileError(
            f"{where} has {len(tof)} points; a profile needs at least {MINIMUM_POINTS}."
        )
    if not np.isfinite(tof).all():
        raise ProfileError(f"{where} has a time of flight that is not a number.")
    if tof.max() < 100:
        raise ProfileError(
            f"{where} runs from {tof.min():g} to {tof.max():g}: time of flight in µs is wanted "
            f"(not ms, Å or degrees)."
        )
    if tof.min() <= 0 or tof.max() > _LARGEST_TOF:
        raise ProfileError(
            f"{where} runs from {tof.min():g} to {tof.max():g} µs; times of flight lie between "
            f"0 and {_LARGEST_TOF:g} µs."
        )
    step = np.diff(tof)
    if not (step > _SMALLEST_STEP).all():
        row = int(np.argmin(step > _SMALLEST_STEP))
        raise ProfileError(
            f"{where} has times of flight that do not ascend: {tof[row + 1]:g} µs follows "
            f"{tof[row]:g} µs at point {row + 2}."
        )
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
            f"{where} has an intensity beyond {_LARGEST:g}, which no detector counts."
        )
    if edges:
        tof, intensity, sigma = tof[:-1] + step / 2, intensity[:-1] / step, sigma[:-1] / step
    return Profile(
        tof=tof,
        intensity=intensity,
        sigma=sigma,
        bank=bank,
        title=title,
        two_theta=_number_of(header, "two_theta", 180.0),
        difc=_number_of(header, "difc", 1e6),
        header=header,
        source=str(path),
    )


def profile_from_arrays(
    tof: NDArray[np.float64],
    intensity: NDArray[np.float64],
    sigma: NDArray[np.float64] | None = None,
    *,
    bank: int | None = None,
    two_theta: float | None = None,
) -> Profile:
    """Return a profile from arrays, checked and completed as the columns of a file.

    Parameters
    ----------
    tof, intensity, sigma : shape (n,)
        Times of flight in µs, ascending; density per µs; its standard deviation, estimated from
        counting statistics if left out.
    bank, two_theta
        Number and scattering angle (degrees) of the bank.

    Raises
    ------
    ProfileError
        If the arrays differ in length, or are no profile.
    """
    columns = (tof, intensity) if sigma is None else (tof, intensity, sigma)
    if {column.shape for column in columns} != {(len(tof),)}:
        shapes = ", ".join(str(column.shape) for column in columns)
        raise ProfileError(
            f"A profile needs one-dimensional arrays of one length; their shapes are {shapes}."
        )
    header = {} if two_theta is None else {"two_theta": repr(two_theta)}
    return _profile(Path("arrays"), bank, "", header, (tof, intensity, sigma), edges=False)


# ---- GSAS files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    bank: int
    channels: int
    binning: str
    coefficients: list[float]
    kind: str
    title: str
    header: dict[str, str]
    lines: list[str] = field(default_factory=list)


_KINDS = ("FXYE", "FXY", "ALT", "ESD", "STD")


def _gsas_blocks(
    lines: Sequence[str], path: Path
) -> tuple[list[_Block], dict[str, NDArray[np.float64]]]:
    """Cut a GSAS file into its banks and its time maps (lower edges of the channels in µs)."""
    title = "" if lines[0].startswith("BANK") else " ".join(lines[0].lstrip("#").split())
    blocks: list[_Block] = []
    maps: dict[str, NDArray[np.float64]] = {}
    general: list[str] = []
    own: list[str] = []
    target: list[str] = general
    map_lines: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines):
        if line.startswith("BANK"):
            if not blocks:
                general, own = own, []
            blocks.append(_bank_record(line, path, title, _header(general, own)))
            own, target = [], blocks[-1].lines
        elif line.startswith("TIME_MAP"):
            map_lines.append((line, []))
            target = map_lines[-1][1]
        elif line.startswith("#") or (number and not blocks):
            own.append(line)
        elif line.strip() and blocks:
            target.append(line)
    for record, rows in map_lines:
        name, edges = _time_map(record, rows, path)
        maps[name] = edges
    return blocks, maps


def _integer(word: str) -> int:
    if len(word) > 18:
        raise ValueError(f"{word[:18]!r} is the beginning of too long a number")
    return int(word)


def _bank_record(line: str, path: Path, title: str, header: dict[str, str]) -> _Block:
    words = line.split()
    try:
        bank, channels, binning = _integer(words[1]), _integer(words[2]), words[4]
        rest = words[5:]
        kind = next((word for word in rest if word in _KINDS), "STD")
        numbers = [word for word in rest if word not in _KINDS]
        coefficients = [float(word) for word in numbers]
    except (ValueError, IndexError) as error:
        raise ProfileError(
            f"{path} has a bank record that cannot be read: {line.strip()[:80]!r}. Wanted: BANK, "
            f"its number, channels, records, binning (SLOG, RALF …), coefficients, data type."
        ) from error
    return _Block(bank, channels, binning, coefficients, kind, title, header)


@np.errstate(over="ignore", invalid="ignore")  # times that are not finite are refused later
def _time_map(record: str, rows: Sequence[str], path: Path) -> tuple[str, NDArray[np.float64]]:
    """Read ``TIME_MAP number values records TIME_MAP clock/ns`` and its (channel, time, step)."""
    words = record[8:].split()
    try:
        count, clock = _integer(words[1]), float(words[4]) / 1000
        values = [_integer(word) for row in rows for word in row.split()][:count]
        starts, steps = values[1:-1:3], values[2::3]
        stops = [*starts[1:], values[-1]]
        lengths = [math.ceil((b - a) / s) for a, b, s in zip(starts, stops, steps, strict=True)]
    except (ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise ProfileError(
            f"{path} has a time map that cannot be read: {str(error)[:80]}."
        ) from error
    if min(lengths, default=-1) < 0 or sum(lengths) > 10**6 or min(steps) <= 0:
        raise ProfileError(f"{path} has a time map whose times do not ascend in steps.")
    parts = [a + s * np.arange(n) for a, s, n in zip(starts, steps, lengths, strict=True)]
    return words[0], np.append(np.concatenate(parts), stops[-1]) * clock


def _read_gsas_bank(
    block: _Block, time_maps: dict[str, NDArray[np.float64]], path: Path
) -> Profile:
    where = f"{path}, bank {block.bank},"
    sigma: NDArray[np.float64] | None
    try:
        if block.kind in ("FXYE", "FXY"):
            rows = _free(block.lines, len(block.kind) - 1, where)
            edges, counts = rows[:, 0], rows[:, 1]
            sigma = rows[:, 2] if block.kind == "FXYE" else None
        elif block.kind == "ALT":
            # 4(F8.0, F7.4, F5.4): 32 × time, 1000 × counts, 1000 × deviation
            rows = _fixed(block.lines, (8, 7, 5))
            edges, counts, sigma = rows[:, 0] / 32, rows[:, 1] / 1000, rows[:, 2] / 1000
        elif block.kind == "ESD":  # 5(2F8.0)
            counts, sigma = _fixed(block.lines, (8, 8)).T
            edges = _edges(block, time_maps, len(counts), where)
        else:  # STD, 10(I2, F6.0): number of detectors, counts averaged over them
            detectors, counts = _fixed(block.lines, (2, 6)).T
            spread = np.maximum(counts, min(counts[counts > 0], default=0.0))
            sigma = np.sqrt(spread / np.maximum(detectors, 1))
            edges = _edges(block, time_maps, len(counts), where)
    except ProfileError:
        raise  # it is a ValueError, too
    except (ValueError, IndexError) as error:
        raise ProfileError(
            f"{where} has {block.kind} data that cannot be read: {str(error)[:80]}."
        ) from error
    if len(counts) < block.channels:
        raise ProfileError(
            f"{where} is truncated: its record promises {block.channels} channels and "
            f"{len(counts)} are there."
        )
    keep = slice(max(block.channels, 0) or None)
    cut = (edges[keep], counts[keep], None if sigma is None else sigma[keep])
    return _profile(path, block.bank, block.title, block.header, cut, edges=True)


def _free(lines: Sequence[str], need: int, where: str) -> NDArray[np.float64]:
    """Read the first numbers of each line; shape (n, need)."""
    for line in lines:
        if len(line.split()) < need:
            raise ProfileError(
                f"{where} has a line of fewer than {need} numbers: {line.strip()[:60]!r}."
            )
    return np.array([[float(w) for w in s.split()[:need]] for s in lines]).reshape(-1, need)


def _fixed(lines: Sequence[str], widths: tuple[int, ...]) -> NDArray[np.float64]:
    """Read fixed-width fields that repeat along 80-column lines; shape (n, len(widths))."""
    period, starts = sum(widths), np.cumsum((0, *widths))
    rows = []
    for line in lines:
        for start in range(0, min(len(line), 80) - period + widths[-1], period):
            group = line[start : start + period]
            if not group.strip():
                break
            cells = (group[a:b].strip() for a, b in pairwise(starts))
            rows.append([float(cell) if cell else 0.0 for cell in cells])
    return np.array(rows).reshape(-1, len(widths))


@np.errstate(over="ignore", invalid="ignore")  # as above
def _edges(
    block: _Block, time_maps: dict[str, NDArray[np.float64]], count: int, where: str
) -> NDArray[np.float64]:
    """Return the lower bin edges in µs of data that come without times (ESD, STD)."""
    steps = np.arange(count)
    c = block.coefficients
    if block.binning == "TIME_MAP":
        name = f"{c[0]:.0f}" if c else ""
        edges = time_maps.get(name, next(iter(time_maps.values()), np.empty(0)))
        if len(edges) < count:
            raise ProfileError(f"{where} has {count} channels and a time map of {len(edges)}.")
        return np.asarray(edges[:count])
    if block.binning in ("CONS", "CONST", "COND") and len(c) >= 2:
        return np.asarray(c[0] + c[1] * steps)
    if block.binning == "SLOG" and len(c) >= 3 and 0 < c[2] < 0.1:
        return np.asarray(c[0] * (1 + c[2]) ** steps)
    raise ProfileError(
        f"{where} gives {block.kind} data without times in binning {block.binning[:20]!r}, from "
        f"which they cannot be known. Save it as FXYE."
    )


# ---- files of columns --------------------------------------------------------------------------

_COLUMN_NAMES = {
    "tof": {"tof", "tof_us", "time_of_flight", "time-of-flight", "t", "time", "x"},
    "intensity": {"intensity", "y", "yobs", "y_obs", "i", "iobs", "counts", "observed", "obs"},
    "sigma": {"sigma", "e", "err", "error", "esd", "s", "dy", "sig", "uncertainty", "std"},
    "weight": {"weight", "w"},
}
_OTHER_AXES = {
    "d", "d_spacing", "dspacing", "d-spacing", "q", "2theta", "two_theta", "2-theta", "wavelength",
    "tof_ms", "energy",
}  # fmt: skip


def _fields(line: str) -> list[str]:
    return re.split(r"\s*[,;]\s*|\s+", line.strip().rstrip(",; "))


def _named_columns(candidates: list[str], width: int, path: Path) -> dict[str, int] | None:
    """Take the line of column names, as many as columns, out of the header's lines."""
    for line in reversed(candidates):
        bare = re.sub(r"\([^()]*\)|\[[^][]*\]", "", line.strip().lstrip(_COMMENT))
        names = [name.strip("\"'").lower() for name in _fields(bare)]
        if len(names) != width or any(re.fullmatch(r"[=:\d.+-]+", name) for name in names):
            continue  # such as "2theta = 122.0" before three columns
        found = {
            meaning: names.index(hits[0])
            for meaning, variants in _COLUMN_NAMES.items()
            if (hits := [name for name in names if name in variants])
        }
        if names[0] in _OTHER_AXES and "tof" not in found:
            raise ProfileError(f"{path} is over {names[0]}: time of flight in µs is wanted.")
        if "tof" in found and "intensity" in found:
            candidates.remove(line)
            return found
    return None


def _read_columns(lines: Sequence[str], path: Path, bank: int | None) -> Profile:
    comments: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if not stripped:
            continue
        if stripped[0] in _COMMENT:
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
            f"{path} holds no numbers. Wanted: columns of time of flight in µs, intensity and its "
            f"standard deviation, or a GSAS file with BANK records."
        )
    width = len(rows[0])
    if width < 2:
        raise ProfileError(f"{path} has one column; time of flight and intensity are wanted.")
    named = _named_columns(comments, width, path)
    index = named or {"tof": 0, "intensity": 1, **({"sigma": 2} if width > 2 else {})}
    data = np.array(rows)
    sigma = data[:, index["sigma"]] if "sigma" in index else None
    if sigma is None and "weight" in index:
        weight = data[:, index["weight"]]
        known = weight > 0
        sigma = np.where(known, 1 / np.sqrt(np.where(known, weight, 1.0)), 0.0)
    header = _header(comments)
    title = header.get("title", "") or header.get("comment", "").partition("; ")[0]
    columns = (data[:, index["tof"]], data[:, index["intensity"]], sigma)
    return _profile(path, bank, title, header, columns, edges=False)
