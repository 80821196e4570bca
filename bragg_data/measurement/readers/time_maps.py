"""Time maps of GSAS files: times of flight of channels of unequal widths."""

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array
from bragg_data.measurement.readers.common import ProfileError


def integer(word: str) -> int:
    """Return a whole number of at most 18 digits and no sign; a ValueError is raised for others."""
    if len(word) > 18 or word.startswith("-") or "_" in word:
        raise ValueError(f"{word[:18]!r} is too long a number, or a negative one")
    return int(word)


def time_maps_of(map_lines: Sequence[tuple[str, list[str]]], path: Path) -> dict[str, Array]:
    """Return the lower edges of the channels in µs of each map, from its record and lines."""
    maps: dict[str, Array] = {}
    for record, rows in map_lines:
        name, edges = _time_map(record, rows, path)
        if name in maps and not np.array_equal(maps[name], edges):
            raise ProfileError(
                f"{path} has two different time maps of the number {name[:20]}, so that the times "
                f"of its banks cannot be known. Number them as the bank records do."
            )
        maps[name] = edges
    return maps


@np.errstate(over="ignore", invalid="ignore")  # times that are not finite are refused later
def _time_map(record: str, rows: Sequence[str], path: Path) -> tuple[str, Array]:
    """Read ``TIME_MAP number values records TIME_MAP clock/ns`` and its (channel, time, step)."""
    words = record[8:].split()
    try:
        count, records = integer(words[1]), integer(words[2])
        clock = float(words[4]) / 1000
        cells = (word for row in rows for word in row.split())
        values = [integer(word) for word in islice(cells, count)]
        starts, steps = values[1:-1:3], values[2::3]
        stops = [*starts[1:], values[-1]]
        lengths = [math.ceil((b - a) / s) for a, b, s in zip(starts, stops, steps, strict=True)]
    except (ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise ProfileError(f"{path} has an unreadable time map: {str(error)[:80]}.") from error
    if min(lengths, default=-1) < 0 or sum(lengths) > 10**6 or min(steps) <= 0:
        raise ProfileError(f"{path} has a time map whose times do not ascend in steps.")
    parts = [a + s * np.arange(n) for a, s, n in zip(starts, steps, lengths, strict=True)]
    channels = [1 + sum(lengths[:k]) for k in range(len(lengths))]
    whole = all((b - a) % s == 0 for a, b, s in zip(starts[:-1], stops, steps, strict=False))
    complete = len(values) == count and len(rows) == records and not next(cells, "")
    if values[0:-1:3] != channels or not complete or not whole:
        raise ProfileError(
            f"{path} has a time map that contradicts itself: its steps begin at the channels "
            f"{', '.join(map(str, channels[:9]))}, and it names others, or counts of values or "
            f"lines are wrong."
        )
    return words[0], np.append(np.concatenate(parts), stops[-1]) * clock
