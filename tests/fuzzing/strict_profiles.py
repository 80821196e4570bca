"""Strict parsers of profiles, apart from the readers: None for what is not exactly the format.

Every count has to agree with what it counts, times have to be regular and those of the binning,
numbers plain and in their columns, standard deviations those of counts if nearly all are.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,9})?"
Array = NDArray[np.float64]


class Bank(NamedTuple):
    """What is compared of a profile."""

    bank: int | None
    two_theta: float | None
    difc: float | None
    x: Array
    y: Array
    sigma: Array


_PATH = re.compile(rf"total flight path ({NUMBER})", re.IGNORECASE)
_ANGLE = re.compile(rf"\b(?:tth|2theta)[ =]*({NUMBER})", re.IGNORECASE)
_DIFC = re.compile(rf"\bdifc ({NUMBER})", re.IGNORECASE)
_RECORD = re.compile(
    rf"BANK\S*\s+(\d+)\s+(\d+)\s+(\d+)\s+([A-Z_]+)((?:\s+{NUMBER})*)\s+(FXYE|FXY|ALT|ESD|STD)\s*",
    re.IGNORECASE,
)
_MAP = re.compile(r"TIME_MAP\D*(\d+)\s+(\d+)\s+(\d+)\s+\S+\s+(\d+)\s*", re.IGNORECASE)
_STEP = 0.08  # of a step: times off by less are the rounding of times
_COUNTING = 0.03  # relative difference of variance and counts


def profiles(content: bytes, kind: str) -> list[Bank] | None:
    """Return the banks of a file, or None if it is not exactly of its format."""
    try:
        text = (
            content.removeprefix(b"\xef\xbb\xbf")
            .decode("latin-1")
            .replace("\r\n", "\n")
            .replace("\r", "\n")
        )
        if "BANK" in text.upper():
            banks = _gsas(text)
        else:
            banks = _columns(text, {"fxy": "xy", "fxye": "xye"}.get(kind, kind))
    except (ValueError, IndexError, ZeroDivisionError, OverflowError):
        return None
    return banks if banks and all(map(_sound, banks)) else None


def _sound(bank: Bank) -> bool:
    return bool(
        np.isfinite([bank.x, bank.y, bank.sigma]).all()
        and bank.x[0] > 100
        and 1000 < bank.x[-1] <= 1e6
        and np.abs(bank.y).max() < 1e15
        and (bank.sigma >= 0).all()
        and (bank.y > -5 * bank.sigma).all()
    )


def regular(x: Array) -> bool:
    """Return whether times ascend in steps that are all equal, or grow by one factor."""
    steps = np.diff(x)
    if len(x) < 20 or steps.min() <= 0:
        return False
    x, last = x[:-1], steps[-1]  # the last bin may be cut off
    factor = (x[-1] / x[0]) ** (1 / (len(x) - 1))
    logarithmic = x[0] * factor ** np.arange(len(x))
    linear = np.linspace(x[0], x[-1], len(x))
    return bool(last < (1 + _STEP) * factor * steps[-2]) and any(
        bool((np.abs(x - ideal) < _STEP * steps[:-1].min()).all())
        for ideal in (linear, logarithmic)
    )


def _of_counts(y: Array, sigma: Array) -> bool:
    """Return whether all variances are one constant times the intensity, or those of few are."""
    y, sigma = y[(y > 0) & (sigma > 0)], sigma[(y > 0) & (sigma > 0)]
    equal = (
        np.abs(sigma**2 / np.maximum(y, 1e-9) / np.median(sigma**2 / np.maximum(y, 1e-9)) - 1)
        < _COUNTING
    )
    return bool(equal.all() or equal.mean() < 0.9)


def _plain(words: Sequence[str]) -> list[float]:
    if not all(re.fullmatch(NUMBER, word) for word in words):
        raise ValueError(words)
    return [float(word) for word in words]


def _columns(text: str, kind: str) -> list[Bank] | None:
    lines = [line.strip() for line in text.rstrip("\n").split("\n")]
    header = [line for line in lines if line[:1] in ("#", "")]
    rows = [line for line in lines if line[:1] not in ("#", "")]
    if re.search(r"[A-DF-Za-df-z]", rows[0]):
        header.append(rows.pop(0))
    of_names = r"#?\s*_?tof_us[,;\s]\s?(?:yobs[,;\s]\s?weight|weight[,;\s]\s?yobs)[,;\s]\s?[^,]*"
    names = re.compile(of_names, re.IGNORECASE)
    comments = [line for line in header if not names.fullmatch(line)]
    if (kind == "csv") == (len(comments) == len(header)):
        return None
    if kind == "csv" and any("," in line for line in comments):
        return None
    angles = [match for line in header if (match := _ANGLE.search(line))]
    table = _table(rows)
    x, y, *columns = table.T
    if len(columns) != {"xy": 0, "xye": 1, "csv": 2}[kind] or not regular(x):
        return None
    if kind == "xy":
        sigma = np.sqrt(np.maximum(y, y[y > 0].min()))
    elif kind == "xye":
        sigma = columns[0]
    else:
        weight = columns[0]
        if (
            "weight"
            in re.split(r"[,;\s]+", next(filter(names.fullmatch, header)).lower().lstrip("# "))[1]
        ):
            y, weight = weight, y
        sigma = np.where(weight > 0, 1 / np.sqrt(np.where(weight > 0, weight, 1)), 0)
        sigma[weight < 0] = -1
    if not _of_counts(y, sigma):
        return None
    return [Bank(None, float(angles[-1][1]) if angles else None, None, x, y, sigma)]


def _table(rows: Sequence[str]) -> Array:
    """Read rows with the same separators, which are blanks, commas, semicolons or tabs."""
    if "," in rows[0] and not any("." in row for row in rows) and re.search(r"[ \t;]", rows[0]):
        rows = [row.replace(",", ".") for row in rows]
    if len({(row.count(","), row.count(";")) for row in rows}) > 1:
        raise ValueError(rows[0])
    words = [re.split(r"[ \t]*[,;][ \t]*|[ \t]+", row) for row in rows]
    if len({len(row) for row in words}) > 1:
        raise ValueError(words[0])
    return np.array([[*_plain(row[:3]), *[0.0] * (len(row) - 3)] for row in words])


def _gsas(text: str) -> list[Bank] | None:
    lines = [line for line in text.split("\n") if line.strip()]
    maps: dict[str, Array] = {}
    banks: list[tuple[re.Match[str], list[str], list[float | None]]] = []
    geometry: list[float | None] = []
    at = 0 if _RECORD.fullmatch(lines[0]) or _MAP.fullmatch(lines[0]) else 1
    while at < len(lines):
        line = lines[at]
        at += 1
        if match := _MAP.fullmatch(line):
            rows = lines[at : (at := at + int(match[3]))]
            values = [int(word) for row in rows for word in row.split()]
            if len(values) != int(match[2]) or len(rows) != int(match[3]):
                return None
            edges = _time_map(values, int(match[4]))
            if not np.array_equal(maps.setdefault(match[1], edges), edges):
                return None
        elif match := _RECORD.fullmatch(line):
            rows = lines[at : (at := at + int(match[3]))]
            if len(rows) != int(match[3]):
                return None
            banks.append((match, rows, geometry))
            geometry = []
        elif line.startswith("#"):
            values = [m and float(m[1]) for m in (p.search(line) for p in (_PATH, _ANGLE, _DIFC))]
            if all(values):
                path, two_theta, difc = values
                sine = abs(math.sin(math.radians(two_theta / 2)))
                if abs(difc / (505.557 * abs(path) * sine) - 1) > 0.02:
                    return None
            geometry = [a or b for a, b in zip(values, geometry or values, strict=True)]
        elif not banks and not maps and re.match(r"\s*[A-Za-z]|\D*$", line):
            continue
        else:
            return None
    return [_bank(match, rows, maps, geometry) for match, rows, geometry in banks]


def _time_map(values: list[int], clock: int) -> Array:
    parts = []
    for k in range(0, len(values) - 1, 3):
        _, start, step = values[k : k + 3]
        stop = values[k + 4] if k + 4 < len(values) else values[-1]
        parts.append(np.arange(start, stop, step))
        if values[k] != 1 + sum(map(len, parts[:-1])):
            raise ValueError
    return np.append(np.concatenate(parts), values[-1]) * (clock / 1000)


def _fixed(rows: Sequence[str], widths: Sequence[int], blank: int = 0) -> Array:
    """Read right-aligned fields; the first ``blank`` of each group may be empty."""
    cells = []
    for row in rows:
        if len(row) % sum(widths) or not row:
            raise ValueError(row)
        at = 0
        while at < len(row):
            for k, width in enumerate(widths):
                cell = row[at : at + width]
                if not cell.strip() and k < blank:
                    cell = "0".rjust(width)
                if not re.fullmatch(rf"\s*(?:{NUMBER})", cell):
                    raise ValueError(cell)
                cells.append(float(cell))
                at += width
    return np.array(cells).reshape(-1, len(widths))


def _bank(
    match: re.Match[str],
    rows: Sequence[str],
    maps: dict[str, Array],
    geometry: Sequence[float | None],
) -> Bank:
    channels, binning, kind = int(match[2]), match[4].upper(), match[6].upper()
    c = [float(word) for word in match[5].split()]
    x: Array | None = None
    sigma: Array | None = None
    if kind in ("FXYE", "FXY"):
        table = np.array([_plain(row.split()) for row in rows])
        if table.shape[1] != len(kind) - 1:
            raise ValueError
        x, y = table[:, 0], table[:, 1]
        sigma = table[:, 2] if kind == "FXYE" else np.sqrt(np.maximum(y, y[y > 0].min()))
    elif kind == "ALT":
        x, y, sigma = (_fixed(rows, (8, 7, 5)) / [32, 1000, 1000]).T
    elif kind == "ESD":
        y, sigma = _fixed(rows, (8, 8)).T
    else:
        detectors, y = _fixed(rows, (2, 6), blank=1).T
        sigma = np.sqrt(np.maximum(y, y[y > 0].min()) / np.maximum(detectors, 1))
        if (detectors < 0).any():
            raise ValueError
    if binning == "TIME_MAP":
        edges = maps[f"{c[0]:.0f}"]
        if len(edges) - 1 != channels:
            raise ValueError
        edges = edges[:channels]
    elif binning in ("CONST", "CONS"):
        if len(c) != 4:
            raise ValueError
        edges = c[0] + c[1] * np.arange(channels)
    elif binning == "SLOG":
        edges = c[0] * (1 + c[2]) ** np.arange(channels)
        if abs(c[1] - edges[-1] * (1 + c[2])) > 3 * c[2] * c[1] or len(c) != 4:
            raise ValueError
    elif binning == "RALF":
        edges = c[0] / 32 * (1 + c[3]) ** np.arange(channels)
        if abs(c[1] / c[0] - c[3]) > 0.05 * c[3] or c[0] != c[2]:
            raise ValueError
    else:
        raise ValueError
    if x is None:
        x = edges
    if len(y) != channels or not regular(x) or abs(x[0] - edges[0]) > 4 * np.diff(x).max():
        raise ValueError
    if abs(np.diff(np.log(x)).mean() / np.diff(np.log(edges)).mean() - 1) > 0.02:
        raise ValueError
    width = np.diff(x)
    if not _of_counts(y, sigma) and kind not in ("STD",):
        raise ValueError
    return Bank(
        int(match[1]),
        geometry[1] if geometry else None,
        geometry[2] if geometry else None,
        x[:-1] + width / 2,
        y[:-1] / width,
        sigma[:-1] / width,
    )
