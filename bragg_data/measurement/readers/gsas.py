"""GSAS files: banks of binned counts in the formats FXYE, FXY, ALT, ESD and STD.

They list the lower edges of time bins and the counts in them, already multiplied by the bin width
where they were normalised. The last bin, whose width is not known, is dropped, times become bin
centres, and counts are divided by the width: a density per µs, as the simulated intensity is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bragg_data.measurement.readers import common
from bragg_data.measurement.readers.common import Profile, ProfileError


@dataclass(frozen=True)
class GsasBlock:
    """The ``BANK`` record and data lines of one bank, the file's title, the comments before it."""

    bank: int
    channels: int
    binning: str
    coefficients: list[float]
    kind: str
    title: str
    header: dict[str, str]
    lines: list[str] = field(default_factory=list)


_KINDS = ("FXYE", "FXY", "ALT", "ESD", "STD")


def gsas_blocks(
    lines: Sequence[str], path: Path
) -> tuple[list[GsasBlock], dict[str, NDArray[np.float64]]]:
    """Cut a GSAS file into its banks and its time maps (lower edges of the channels in µs)."""
    title = "" if lines[0].startswith("BANK") else " ".join(lines[0].lstrip("#").split())
    blocks: list[GsasBlock] = []
    general: list[str] = []
    of_bank: list[str] = []  # comments before the next bank
    target: list[str] = general
    map_lines: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines):
        if line.startswith("BANK"):
            if not blocks:
                general, of_bank = of_bank, []
            header = common.header_from_comments(general, of_bank)
            blocks.append(_bank_record(line, path, title, header))
            of_bank, target = [], blocks[-1].lines
        elif line.startswith("TIME_MAP"):
            map_lines.append((line, []))
            target = map_lines[-1][1]
        elif line.startswith("#") or (number and not blocks):
            of_bank.append(line)
        elif line.strip() and blocks:
            target.append(line)
    return blocks, dict(_time_map(record, rows, path) for record, rows in map_lines)


def _integer(word: str) -> int:
    if len(word) > 18:
        raise ValueError(f"{word[:18]!r} is the beginning of too long a number")
    return int(word)


def _bank_record(line: str, path: Path, title: str, header: dict[str, str]) -> GsasBlock:
    words = line.split()
    try:
        bank, channels, binning = _integer(words[1]), _integer(words[2]), words[4]
        rest = words[5:]
        kind = next((word for word in rest if word in _KINDS), "STD")
        coefficients = [float(word) for word in rest if word not in _KINDS]
    except (ValueError, IndexError) as error:
        raise ProfileError(
            f"{path} has a bank record that cannot be read: {line.strip()[:80]!r}. Expected: BANK, "
            f"its number, channels, records, binning (SLOG, RALF …), coefficients, data type."
        ) from error
    return GsasBlock(bank, channels, binning, coefficients, kind, title, header)


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


def read_gsas_bank(
    block: GsasBlock, time_maps: dict[str, NDArray[np.float64]], path: Path
) -> Profile:
    """Return the profile of a bank, from what :func:`gsas_blocks` returned.

    A ProfileError is raised if the data cannot be read, or are fewer than the record promises.
    """
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
    return common.checked_profile(path, block.bank, block.title, block.header, cut, edges=True)


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
    block: GsasBlock, time_maps: dict[str, NDArray[np.float64]], count: int, where: str
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
