"""Series of frames: their values, as a table for spreadsheets, and as a figure."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bragg_data.measurement.readers import ProfileError
from bragg_data.refinement.series import Event
from pipelines.cli.style import SYMBOLS, UNITS
from pipelines.refinement.result import JointPhase, JointRefinement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


class FrameResult(NamedTuple):
    """A frame of a series."""

    file: Path
    value: float
    result: JointRefinement | None  # None where the file cannot be used, for the reason
    reason: str = ""


def values_of_files(files: Sequence[Path], table: Path | None, along: str | None) -> list[float]:
    """Return what a series runs along: a column of a table, numbers in file names, or 0, 1, ….

    The table's first column holds the names of the files; its columns are separated by commas, tabs
    or semicolons. A ProfileError is raised if it does not have the column or a file.
    """
    if table is not None:
        return _values_of_table(files, table, along)
    numbers = [_NUMBER.findall(file.stem) for file in files]
    if all(numbers):
        values = [float(of_file[-1]) for of_file in numbers]
        if len(set(values)) == len(values):
            return values
    return [float(number) for number in range(len(files))]


def _values_of_table(files: Sequence[Path], table: Path, along: str | None) -> list[float]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The table {table} cannot be read: {error}.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    mark = max(",;\t", key=lines[0].count) if lines else ","
    rows = [[word.strip() for word in row] for row in csv.reader(lines, delimiter=mark)]
    names = [name.lstrip("#").split("[")[0].strip().lower() for name in rows[0]] if rows else []
    if along is None or along.lower() not in names[1:]:
        columns = ", ".join(names[1:])
        raise ProfileError(
            f"{table} has the columns {columns}: name one of them with --along. Columns are "
            f"separated by commas, semicolons or tabs."
        )
    column = names.index(along.lower())
    values: dict[str, str] = {row[0]: row[column] for row in rows[1:] if len(row) > column}
    try:
        chosen = [float(values.get(file.name, values.get(file.stem, ""))) for file in files]
    except ValueError as error:
        missing = [f.name for f in files if f.name not in values and f.stem not in values]
        what = f"no line for {missing[0]}" if missing else f"no number in {along}: {error}"
        raise ProfileError(f"{table} has {what}.") from error
    if not np.isfinite(chosen).all():
        raise ProfileError(f"{table} has values of {along} that are not finite numbers.")
    return chosen


def write_csv(frames: Sequence[FrameResult], label: str, file: Path) -> None:
    """Write a line for each frame, units in the names of columns; empty where there is no value."""
    rows = [_row(number, frame, label) for number, frame in enumerate(frames)]
    columns = dict.fromkeys(name for row in rows for name in row)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _row(number: int, frame: FrameResult, label: str) -> dict[str, object]:
    row: dict[str, object] = {"frame": number, "file": str(frame.file), label: frame.value}
    if frame.result is None:
        return row | {"accepted": False, "reason": frame.reason}
    row |= {"accepted": frame.result.accepted, "rwp": frame.result.rwp}
    for phase in frame.result.phases:
        row |= _of_phase(phase)
    return row


def _of_phase(phase: JointPhase) -> dict[str, object]:
    if phase.cell is None or phase.su is None or phase.su_calibration is None:
        return {}
    row: dict[str, object] = {}
    for name in phase.free_parameters:
        unit = UNITS[name]
        row[f"{phase.name} {name} ({unit})"] = getattr(phase.cell, name)
        row[f"{phase.name} su {name} ({unit})"] = getattr(phase.su, name)
        row[f"{phase.name} su calibration {name} ({unit})"] = getattr(phase.su_calibration, name)
    row[f"{phase.name} wt %"] = phase.weight_percent
    row[f"{phase.name} su wt %"] = phase.su_weight_percent
    for name, value in phase.parameters.items():
        row[f"{phase.name} {name}"], row[f"{phase.name} su {name}"] = value.value, value.su
    return row


def draw_series(
    frames: Sequence[FrameResult], events: Sequence[Event], label: str, file: Path
) -> None:
    """Draw cell parameters, weight fractions and R_wp along a series, and its events, to a PNG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(p.name for f in frames if f.result for p in f.result.phases))
    free = dict.fromkeys(
        n for f in frames if f.result for p in f.result.phases for n in p.free_parameters
    )
    several = len(names) > 1
    count = len(free) + several + 1
    figure = Figure(figsize=(8, 1.9 * count + 0.6), layout="constrained")
    axes: list[Axes] = figure.subplots(count, squeeze=False, sharex=True)[:, 0].tolist()
    for color, name in zip(_COLORS * len(names), names, strict=False):
        phases = [
            (f.value, p)
            for f in frames
            if f.result
            for p in f.result.phases
            if p.name == name and p.cell is not None
        ]
        for axis, parameter in zip(axes, free, strict=False):
            points = [(x, p) for x, p in phases if parameter in p.free_parameters]
            y = [getattr(p.cell, parameter) for _, p in points]
            su = [getattr(p.su, parameter) for _, p in points]
            axis.errorbar([x for x, _ in points], y, su, fmt=".", color=color, label=name, ms=4)
            axis.set_ylabel(f"{SYMBOLS[parameter]} / {UNITS[parameter]}")
        if several:
            share = [(x, p) for x, p in phases if p.weight_percent is not None]
            y, su = [p.weight_percent for _, p in share], [p.su_weight_percent for _, p in share]
            axes[len(free)].errorbar([x for x, _ in share], y, su, fmt=".", color=color, ms=4)
            axes[len(free)].set_ylabel("wt %")
    fitted = [(f.value, 100 * f.result.rwp) for f in frames if f.result and f.result.rwp]
    x, y = [value for value, _ in fitted], [rwp for _, rwp in fitted]
    axes[-1].plot(x, y, ".", color="0.3", ms=4)
    axes[-1].set(xlabel=label, ylabel="R_wp / %")
    for event in events:
        for axis in axes:
            axis.axvline(frames[event.frame].value, color="0.7", linewidth=0.7, linestyle=":")
    for axis in axes:
        axis.ticklabel_format(axis="y", useOffset=False)
    if len(names) > 1:
        axes[0].legend(frameon=False, fontsize=8, ncols=4)
    figure.savefig(file, format="png", dpi=130)
