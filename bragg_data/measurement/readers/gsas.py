"""GSAS files: banks of binned counts in the formats FXYE, FXY, ALT, ESD and STD.

They list the lower edges of time bins and the counts in them, already multiplied by the bin width
where they were normalised. The last bin, whose width is not known, is dropped, times become bin
centres, and counts are divided by the width: a density per µs, as the simulated intensity is.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array
from bragg_data.measurement.readers import axis, common
from bragg_data.measurement.readers.checks import RawProfile, checked_profile, warnings_of_binning
from bragg_data.measurement.readers.common import Profile, ProfileError, Reading
from bragg_data.measurement.readers.time_maps import integer, time_maps_of


@dataclass(frozen=True)
class GsasBlock:
    """The ``BANK`` record and data lines of one bank, the file's title, the comments before it."""

    bank: int
    channels: int
    records: str
    binning: str
    coefficients: list[float]
    kind: str
    record: str
    indent: int  # blanks before the record
    title: str
    comments: list[str]
    header: dict[str, str]
    lines: list[str] = field(default_factory=list)


_GROUPS = {"ALT": 20, "ESD": 16, "STD": 8}  # characters of a point, right-aligned
_KINDS = ("FXYE", "FXY", "ALT", "ESD", "STD")
_MARKED = re.compile(r"\n[^\S\n]*[BbTtEe#\x1a]")  # first letters of lines that are not data
# Without this much behind it, "Bank 4" in a column file would be taken for a record.
_RECORD = re.compile(r"\s*BANK\s+\d+\s+\d+\s+\d+\s+[A-Z]", re.IGNORECASE)
_DAMAGED = re.compile(
    r"\d+\s+\d+\s+(?:SLOG|CONST?|COND|RALF|TIME_MAP)\b|"
    r"(?:\d+[\s,;]+){3}.*\b(?:FXYE|FXY|ALT|ESD|STD)\s*$",
    re.IGNORECASE,
)
_BINNINGS = frozenset(["SLOG", "CONS", "CONST", "COND", "RALF", "TIME_MAP", "LOG6"])
_LONGEST = 200  # characters in which a record is looked for
_ROW = re.compile(r"[-+\d.eE\s]+")  # a line of numbers
_LEAST_SHARE = 0.5  # of the announced channels; with fewer the file is cut off


def is_bank_record(line: str) -> bool:
    """Return whether a line begins a bank: ``BANK``, or a record indented or in lower case."""
    return line.startswith("BANK") or (line.lstrip()[:1] in "Bb" and bool(_RECORD.match(line)))


def refuse_damaged_record(lines: Iterable[str], path: Path) -> None:
    """Raise a ProfileError if one of the lines outside of banks looks like a ``BANK`` record."""
    for line in lines:
        if _DAMAGED.search(line[:_LONGEST]):
            raise ProfileError(
                f"{path} has a line that looks like a bank record and is none: "
                f"{line.strip()[:60]!r}. Such a record begins with BANK."
            )


def gsas_blocks(lines: Sequence[str], path: Path) -> tuple[list[GsasBlock], dict[str, Array]]:
    """Cut a GSAS file into its banks and its time maps (lower edges of the channels in µs)."""
    title = "" if is_bank_record(lines[0]) else " ".join(lines[0].lstrip("#").split())
    blocks: list[GsasBlock] = []
    general: list[str] = []
    of_bank: list[str] = []  # comments before the next bank
    target: list[str] | None = None
    map_lines: list[tuple[str, list[str]]] = []
    before = 0  # the line behind the last marked one
    for number in _marked(lines):
        _append(lines[max(before, 1) : number], target, of_bank)
        line, before = lines[number], number + 1
        stripped = line.lstrip()
        if is_bank_record(line):
            if not blocks:
                general, of_bank = of_bank, []
                refuse_damaged_record(general, path)
                _refuse_rows(general, path)
            blocks.append(_bank_record(line, path, title, [*general, *of_bank]))
            of_bank, target = [], blocks[-1].lines
        elif stripped[:8].upper() == "TIME_MAP":
            map_lines.append((stripped, []))
            target = map_lines[-1][1]
        elif stripped[0] == "#":
            of_bank.append(line)
            if blocks and _ROW.fullmatch(row := stripped.lstrip("#")):
                blocks[-1].comments.append(row)  # no data, and doubtful there
        elif target is not None and stripped.strip(" \t\x1a").upper() in ("END", ""):
            target = []  # what follows is no data
        else:
            _append([line] if number else [], target, of_bank)
    _append(lines[max(before, 1) :], target, of_bank)
    return blocks, time_maps_of(map_lines, path)


def _marked(lines: Sequence[str]) -> list[int]:
    """Return the places of the lines whose first letter is a mark."""
    text = "\n".join(["", *lines])
    places, number, before = [], -1, 0
    for match in _MARKED.finditer(text):
        number += text.count("\n", before, match.start() + 1)
        before = match.start() + 1
        places.append(number)
    return places


def _append(lines: Sequence[str], target: list[str] | None, of_bank: list[str]) -> None:
    """Append lines to the data, which have no empty ones, or to the comments before them."""
    if target is None:
        of_bank += lines
    else:
        target += filter(str.strip, lines)


def _refuse_rows(lines: Sequence[str], path: Path) -> None:
    rows = [line for line in lines if _ROW.fullmatch(line) and line.strip()]
    if len(rows) >= common.MINIMUM_POINTS:
        raise ProfileError(
            f"{path} has {len(rows)} lines of numbers before its first bank record, from "
            f"{rows[0].strip()[:60]!r}: the record of these is missing."
        )


def _bank_record(line: str, path: Path, title: str, comments: list[str]) -> GsasBlock:
    words = line.upper().split()
    # int() and float() take 1_0 for 10.
    words = [word if word == "TIME_MAP" else word.replace("_", "?") for word in words]
    try:
        bank, channels, binning = integer(words[1]), integer(words[2]), words[4]
        records, rest = words[3], words[5:]
        kind = next((word for word in rest if word in _KINDS), "STD")
        coefficients = [float(word) for word in rest if word not in _KINDS]
    except (ValueError, IndexError) as error:
        raise ProfileError(
            f"{path} has a bank record that cannot be read: {line.strip()[:80]!r}. Expected: BANK, "
            f"its number, channels, records, binning (SLOG, RALF …), coefficients, data type."
        ) from error
    indent, header = len(line) - len(line.lstrip()), common.header_from_comments(comments)
    return GsasBlock(
        bank, channels, records, binning, coefficients, kind, line, indent, title, comments, header
    )


def read_gsas_bank(
    block: GsasBlock, time_maps: dict[str, Array], path: Path, reading: Reading
) -> Profile:
    """Return the profile of a bank, from what :func:`gsas_blocks` returned.

    A ProfileError is raised if the data cannot be read, or are far fewer than the record promises.
    """
    where = f"{path}, bank {block.bank},"
    sigma: Array | None
    keep = slice(max(block.channels, 0) or None)
    in_file = block.kind in ("FXYE", "FXY", "ALT")  # the times
    if number := next((n for n, line in enumerate(block.lines, 1) if "_" in line), 0):
        raise ProfileError(
            f"{where} has data that cannot be read in line {number} behind its record: "
            f"{block.lines[number - 1].strip()[:60]!r}."
        )
    try:
        if block.kind in ("FXYE", "FXY"):
            rows = _free(block.lines, len(block.kind) - 1, where)[keep]
            edges, counts = rows[:, 0], rows[:, 1]
            sigma = rows[:, 2] if block.kind == "FXYE" else None
        elif block.kind == "ALT":
            # 4(F8.0, F7.4, F5.4): 32 × time, 1000 × counts, 1000 × deviation
            rows = _fixed(block, (8, 7, 5))[keep]
            edges, counts, sigma = rows[:, 0] / 32, rows[:, 1] / 1000, rows[:, 2] / 1000
        elif block.kind == "ESD":  # 5(2F8.0)
            counts, sigma = _fixed(block, (8, 8))[keep].T
            edges = _edges(block, time_maps, len(counts), where)
        else:  # STD, 10(I2, F6.0): number of detectors, counts averaged over them
            detectors, counts = _standard(block)[:, keep]
            spread = np.maximum(counts, min(counts[counts > 0], default=0.0))
            sigma = np.sqrt(spread / np.maximum(detectors, 1))
            edges = _edges(block, time_maps, len(counts), where)
    except ProfileError:
        raise  # it is a ValueError, too
    except (ValueError, IndexError) as error:
        raise ProfileError(f"{where} has unreadable {block.kind} data: {error!s:.80}.") from error
    present, warnings = len(counts), _warnings_of_lines(block, time_maps)
    if present < _LEAST_SHARE * block.channels:
        raise ProfileError(
            f"{where} is truncated: its record promises {block.channels} channels and "
            f"{present} are there."
        )
    if present < block.channels:
        warnings.append(
            f"The record of bank {block.bank} promises {block.channels} channels and {present} are "
            f"there: check that the file is complete."
        )
    if in_file:
        warnings += warnings_of_binning(edges, block.binning, block.coefficients)
    on_centres: list[str] = []
    if reading.bin_edges is None and block.kind in ("FXYE", "ALT") and len(edges) > 1:
        on_centres = _on_centres(block, edges)
    declared = axis.declared_by_header([block.title, *block.comments])
    raw = RawProfile(
        path=path,
        format=f"GSAS {block.kind}",
        sigma_known=block.kind not in ("FXY", "STD"),
        x=edges,
        intensity=counts,
        sigma=sigma,
        bank=block.bank,
        title=block.title,
        header=block.header,
        declared="us" if block.binning == "TIME_MAP" else declared,
        counts=True,
        edges=reading.bin_edges is not False,
        maybe_centres=bool(on_centres),
        computed=not in_file,
        warnings=(*warnings, *on_centres),
    )
    return checked_profile(raw, reading.x_unit)


def _warnings_of_lines(block: GsasBlock, time_maps: Mapping[str, Array]) -> list[str]:
    """Warn of lines that are not as many as announced, not full, or not in their columns."""
    warnings = []
    lines = [line.rstrip() for line in block.lines]
    if block.records != f"{len(lines)}":
        warnings.append(
            f"The record of bank {block.bank} promises {block.records[:20]} lines, and "
            f"{len(lines)} are there: check that the file is complete."
        )
    columns = {"FXYE": 3, "FXY": 2}.get(block.kind, 0)
    if columns and lines and len(lines[0].split()) > columns:
        warnings.append(
            f"Bank {block.bank} is of type {block.kind}, and its lines have more than {columns} "
            f"numbers: the others were not read."
        )
    width = _GROUPS.get(block.kind, 0)
    points = [len(line) // width if width else 1 for line in lines]
    if 0 < block.channels <= sum(points) - max(points, default=0):
        warnings.append(
            f"The record of bank {block.bank} promises {block.channels} channels, and there are "
            f"lines for {sum(points)}: those behind were left out."
        )
    if width:
        start = block.indent if all(line[: block.indent].isspace() for line in lines) else 0
        usual = max(Counter(map(len, lines[:-1])).most_common(1), default=(0, 0))[0]
        odd = [
            line
            for number, line in enumerate(lines, 1)
            if (len(line) - start) % width
            or (len(line) != usual and number < len(lines))
            or len(line) > usual > 0
            or " " in line[start + width - 1 :: width]  # numbers are aligned on the right
        ]
        if 0 < len(odd) < _LEAST_SHARE * len(lines):
            warnings.append(
                f"Bank {block.bank} has lines of data that differ from the others in length or "
                f"columns, first {odd[0].strip()[:60]!r}: check its numbers."
            )
    rows = [line for line in block.comments if _ROW.fullmatch(line) and len(line.split()) > 3]
    if rows:
        warnings.append(f"A line of numbers stands outside of any bank: {rows[0].strip()[:60]!r}.")
    name = "".join(f"{c:.0f}" for c in block.coefficients[:1])
    mapped = block.binning == "TIME_MAP" and name in time_maps
    if mapped and len(time_maps[name]) - block.channels not in (0, 1):
        warnings.append(
            f"Bank {block.bank} has {block.channels} channels, and its time map "
            f"{len(time_maps[name]) - 1}: one of them is wrong."
        )
    if block.binning == "TIME_MAP" and name not in time_maps and len(time_maps) == 1:
        warnings.append(
            f"Bank {block.bank} refers to time map {name[:20]!r}: {next(iter(time_maps))[:20]!r} "
            f"is used, the only one of the file."
        )
    if block.binning not in _BINNINGS:
        warnings.append(
            f"The record of bank {block.bank} names the unknown binning {block.binning[:20]!r}: "
            f"its times were read as they are."
        )
    words = block.record.upper().split()
    if len(block.coefficients) > 4 or (block.kind in words and words[-1] != block.kind):
        warnings.append(
            f"The record of bank {block.bank} has other values than up to four and a type of data: "
            f"{block.record.strip()[:60]!r}."
        )
    if block.kind == "STD" and "STD" not in words:
        warnings.append(f"The record of bank {block.bank} names no type of data: STD is assumed.")
    return warnings


@np.errstate(all="ignore")  # times that are not finite are refused later
def _on_centres(block: GsasBlock, times: Array) -> list[str]:
    """Warn of Mantid's files: its SaveGSS lists the middle of each bin."""
    if "generated by mantid" not in " ".join(block.comments).lower():
        return []
    half = 50 * float(np.median(np.diff(times) / times[:-1]))
    return [
        f"Mantid lists bin centres. They were read as GSAS-II reads them, as lower bin edges, half "
        f"a bin ({half:.2g} %) later: right with a calibration that was refined in GSAS-II on such "
        f"files. With any other give --bin-centres. Until one is given, predicted intervals of "
        f"lengths hold for both; the standard uncertainties of a refined cell do not."
    ]


def _free(lines: Sequence[str], need: int, where: str) -> Array:
    """Read the first numbers of each line; shape (n, need)."""
    table = common.table_at_once(lines)
    if table is not None and table.shape[1] >= need:
        return table[:, :need]
    rows = [line.split() for line in lines]
    widths = set(map(len, rows))
    if min(widths, default=need) < need:
        short = next(line for line, row in zip(lines, rows, strict=True) if len(row) < need)
        raise ProfileError(f"{where} has a line without {need} numbers: {short.strip()[:60]!r}.")
    if len(widths) > 1:
        usual = len(rows[0])
        odd = next(line for line, row in zip(lines, rows, strict=True) if len(row) != usual)
        raise ProfileError(f"{where} has rows of {usual} numbers and others: {odd.strip()[:60]!r}.")
    if widths != {need}:
        rows = [row[:need] for row in rows]
    numbers = map(float, chain.from_iterable(rows))
    return np.fromiter(numbers, np.float64, need * len(rows)).reshape(-1, need)


def _standard(block: GsasBlock) -> Array:
    """Read STD data, 10(I2, F6.0); shape (2, n)."""
    lines = [line[:80].rstrip() for line in block.lines]
    text = "".join(line.ljust(80) for line in lines)
    if not block.indent and not (text[::8] + text[1::8]).strip():
        words = text.split()  # without numbers of detectors blanks separate the counts
        if len(words) == sum(-(-len(line) // 8) for line in lines):
            counts = np.fromiter(map(float, words), np.float64, len(words))
            return np.stack([np.zeros_like(counts), counts])
    return _fixed(block, (2, 6)).T


def _fixed(block: GsasBlock, widths: tuple[int, ...]) -> Array:
    """Read fixed-width fields that repeat along 80-column lines; shape (n, len(widths))."""
    period, starts, lines = sum(widths), np.cumsum((0, *widths)), block.lines
    if block.indent % period and all(
        line[: block.indent].isspace() and (len(line.rstrip()) - block.indent) % period == 0
        for line in lines
    ):
        lines = [line[block.indent :] for line in lines]  # indented as the record is
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
def _edges(block: GsasBlock, time_maps: dict[str, Array], count: int, where: str) -> Array:
    """Return the lower bin edges in µs of data that come without times (ESD, STD)."""
    steps = np.arange(count)
    c = block.coefficients
    if block.binning == "TIME_MAP":
        name = f"{c[0]:.0f}" if c else ""
        if name not in time_maps and len(time_maps) > 1:
            raise ProfileError(
                f"{where} refers to time map {name[:20]!r}; the file holds {', '.join(time_maps)}."
            )
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
