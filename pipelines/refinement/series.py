"""Series of frames: their values, as a table for spreadsheets, and as a figure."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.markup import escape
from rich.table import Table

from bragg_data.measurement.readers import ProfileError
from pipelines.cli.console import console, say
from pipelines.cli.style import SYMBOLS, UNITS, with_uncertainty
from pipelines.refinement.events import Event
from pipelines.refinement.expansion import TEMPERATURES, Expansion, expansions
from pipelines.refinement.frames import FrameResult
from pipelines.refinement.output import cell_texts
from pipelines.refinement.result import JointPhase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_SIGNED = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_HEADER = 4000  # bytes of a file that may name its temperature
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def values_of_files(files: Sequence[Path], table: Path | None, along: str | None) -> list[float]:
    """Return what a series runs along: a column of a table, or numbers of headers or file names.

    In a header it is the number after the name, in a file name the last one; 0, 1, … else.

    The table's first column holds the names of the files; its columns are separated by commas, tabs
    or semicolons. A ProfileError is raised if it does not have the column or a file.
    """
    if table is not None:
        return _values_of_table(files, table, along)
    if along is not None and (of_headers := _values_of_headers(files, along)):
        return of_headers
    numbers = [_NUMBER.findall(file.stem) for file in files]
    if all(numbers):
        values = [float(of_file[-1]) for of_file in numbers]
        if len(set(values)) == len(values):
            return values
    return [float(number) for number in range(len(files))]


def _values_of_headers(files: Sequence[Path], along: str) -> list[float]:
    """Return the number after a name in the first lines of each file; none if a file has none."""
    pattern = re.compile(rf"\b{re.escape(along)}\b[^\d\n+-]{{0,20}}?{_SIGNED}", re.I)
    values = []
    for file in files:
        try:
            with file.open("rb") as stream:
                head = stream.read(_HEADER).decode("utf-8", "replace")
        except OSError:
            return []
        if not (match := pattern.search(head)):
            return []
        values.append(float(match[1]))
    return values


def _values_of_table(files: Sequence[Path], table: Path, along: str | None) -> list[float]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The table {table} cannot be read: {error}.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    mark = max(",;\t", key=lines[0].count) if lines else ","
    rows = [[word.strip() for word in row] for row in csv.reader(lines, delimiter=mark)]
    names = [name.lstrip("#").split("[")[0].strip().lower() for name in rows[0]] if rows else []
    name, _, number = (along or "").partition(":")
    if number.isdigit() and int(number) >= 2:
        column = int(number) - 1
    elif len({len(row) for row in rows}) > 1 and along is not None:
        first = ", ".join(f"{k} {word}" for k, word in enumerate(rows[1][:12], start=1))
        raise ProfileError(
            f"{table} names {len(names)} columns and has {len(rows[1])}: give the number of one, "
            f"as in --along {name or 'stress'}:3. Its first line has {first}."
        )
    elif name.lower() in names[1:]:
        column = names.index(name.lower())
    else:
        columns = ", ".join(names[1:])
        raise ProfileError(
            f"{table} has the columns {columns}: name one of them with --along. Columns are "
            f"separated by commas, semicolons or tabs."
        )
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


class Strain(NamedTuple):
    """Change of a length of a cell, relative to the same length of another frame."""

    value: float
    su: float  # standard uncertainty of the measurements: an error of the calibration cancels


Strains = dict[tuple[int, int, str], dict[str, Strain]]
"""By place in the list of frames, place of a phase and its name: the strain of each length."""


def relative_to(frames: Sequence[FrameResult], reference: int) -> Strains:
    """Return lattice strains relative to a frame, or where it has not the phase the first that has.

    Where banks are refined apart, relative to the same bank.
    """
    firsts: dict[tuple[tuple[int, ...], str], JointPhase] = {}
    late = sorted(frames, key=lambda f: (f.number != reference, f.number))
    for frame in late:
        for phase in frame.result.phases if frame.result else ():
            if phase.cell and frame.result:
                firsts.setdefault((frame.result.banks, phase.name), phase)
    strains: Strains = {}
    for place, frame in enumerate(frames):
        for of_result, phase in enumerate(frame.result.phases if frame.result else ()):
            assert frame.result is not None
            first = firsts.get((frame.result.banks, phase.name))
            if first and first.cell and first.su and phase.cell and phase.su:
                strains[place, of_result, phase.name] = {
                    name: Strain(
                        x / x_0 - 1, 0.0 if first is phase else float(np.hypot(u / x, u_0 / x_0))
                    )
                    for name in phase.free_parameters
                    if name in "abc"
                    for x, x_0, u, u_0 in [
                        [
                            float(c.values()[name] or 0)
                            for c in (phase.cell, first.cell, phase.su, first.su)
                        ]
                    ]
                }
    return strains


def print_series(frames: Sequence[FrameResult], events: Sequence[Event], label: str) -> None:
    """Print a table of the frames, and what happens."""
    table = Table("frame", label, "file", "phase", "cell (Å, °)", "wt %", "R_wp (%)")
    for frame in frames:
        first = f"{frame.number}", f"{frame.value:g}", escape(frame.file.name)
        if frame.result is None:
            table.add_row(*first, f"[yellow]{escape(frame.reason)}[/]")
            continue
        rwp = f"{100 * (frame.result.rwp or 0):.2f}"
        for phase in frame.result.phases:
            cell = ", ".join(cell_texts(phase).values())
            weight = "" if phase.weight_percent is None else f"{phase.weight_percent:.1f}"
            table.add_row(*first, escape(phase.name), cell, weight, rwp)
            first, rwp = ("", "", ""), ""
    console.print(table)
    for event in events:
        say(f"[yellow]![/] frame {event.frame}, {event.kind}: {escape(event.text)}")


def print_expansions(frames: Sequence[FrameResult], label: str) -> None:
    """Print the coefficients of thermal expansion, along a temperature."""
    if label.lower() not in TEMPERATURES:
        return
    for curve in expansions(frames):
        value = with_uncertainty(1e6 * curve.coefficient, 1e6 * curve.su)
        say(
            f"{escape(curve.phase)}: {curve.length} expands by {value}e-6 per degree, the mean "
            f"from {curve.x[0]:g} to {curve.x[-1]:g}."
        )


def write_csv(frames: Sequence[FrameResult], strains: Strains, label: str, file: Path) -> None:
    """Write a line for each frame, units in the names of columns; empty where there is no value."""
    rows = [_row(place, frame, strains, label) for place, frame in enumerate(frames)]
    columns = dict.fromkeys(name for row in rows for name in row)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _row(place: int, frame: FrameResult, strains: Strains, label: str) -> dict[str, object]:
    row: dict[str, object] = {"frame": frame.number, "file": str(frame.file), label: frame.value}
    if frame.result is None:
        return row | {"accepted": False, "reason": frame.reason}
    row |= {"banks": " ".join(map(str, frame.result.banks))}
    row |= {"accepted": frame.result.accepted, "rwp": frame.result.rwp}
    for code, phase in enumerate(frame.result.phases):
        row |= _of_phase(phase)
        for name, strain in strains.get((place, code, phase.name), {}).items():
            row[f"{phase.name} strain {name} (1e-6)"] = round(1e6 * strain.value, 2)
            row[f"{phase.name} su strain {name} (1e-6)"] = round(1e6 * strain.su, 2)
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
    frames: Sequence[FrameResult], strains: Strains, events: Sequence[Event], label: str, file: Path
) -> None:
    """Draw to a PNG what changes along a series, with uncertainties, and its events.

    Cells and strains, weight fractions, displacement parameters, microstrain and R_wp.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}

    def add(panel: str, curve: str, x: float, y: float | None, su: float | None = None) -> None:
        if y is not None:
            of_panel = panels.setdefault(panel, {})
            of_panel.setdefault(curve, []).append((x, y, su or 0.0))

    used = [frame.result for frame in frames if frame.result]
    several = len({phase.name for result in used for phase in result.phases}) > 1
    apart = len({result.banks for result in used}) > 1
    for place, frame in enumerate(frames):
        if frame.result is None:
            continue
        of_bank = f", bank {frame.result.banks[0]}" if apart else ""
        for code, phase in enumerate(frame.result.phases):
            curve, x = f"{phase.name}{of_bank}", frame.value
            if phase.cell and phase.su:
                for name in phase.free_parameters:
                    y, su = (cell.values()[name] for cell in (phase.cell, phase.su))
                    add(f"{SYMBOLS[name]} / {UNITS[name]}", curve, x, y, su)
                of_phase = strains.get((place, code, phase.name), {})
                for name, strain in of_phase.items():
                    add(f"strain {name} / 1e-6", curve, x, 1e6 * strain.value, 1e6 * strain.su)
                for site, u in phase.u_iso.items():
                    add("U / Å²", f"{curve} {site}", x, u)
                if micro := phase.parameters.get("microstrain"):
                    add("microstrain / 1e-6", curve, x, micro.value, micro.su)
            if several and phase.weight_percent is not None:
                add("wt %", curve, x, phase.weight_percent, phase.su_weight_percent)
        add("R_wp / %", f"all{of_bank}", frame.value, 100 * (frame.result.rwp or np.nan))
    smooth: dict[str, list[Expansion]] = {}
    for of_length in () if apart else expansions(frames):
        panel = f"{SYMBOLS[of_length.length]} / {UNITS[of_length.length]}"
        smooth.setdefault(panel, []).append(of_length)
    figure = Figure(figsize=(9, 1.9 * len(panels) + 0.6), layout="constrained")
    axes: list[Axes] = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0].tolist()
    for axis, (panel, curves) in zip(axes, panels.items(), strict=True):
        for color, (curve, points) in zip(_COLORS * len(curves), curves.items(), strict=False):
            x, y, su = np.array(points).T
            axis.errorbar(x, y, su, fmt=".", color=color, label=curve, ms=4, linewidth=0.8)
        for fit in smooth.get(panel, ()):
            axis.plot(fit.x, fit.curve, color="0.35", linewidth=0.8, zorder=0)
        axis.set_ylabel(panel)
        axis.ticklabel_format(axis="y", useOffset=False)
        if len(curves) > 1:
            axis.legend(
                frameon=False, fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5)
            )
        for event in events:
            at = next(f.value for f in frames if f.number == event.frame)
            axis.axvline(at, color="0.7", linewidth=0.7, linestyle=":")
    axes[-1].set_xlabel(label)
    figure.savefig(file, format="png", dpi=130)
