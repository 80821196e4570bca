"""Refine known structures along a series of frames: temperature, pressure, load or time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import console, next_commands, print_json, run, say
from pipelines.cli.refinement_options import BankOptions

if TYPE_CHECKING:
    from pipelines.refinement.series import FrameResult


def main(
    files: Annotated[
        list[Path], Argument(metavar="FILE...", help="A file for each frame, with all its banks.")
    ],
    cif: Annotated[
        list[str], Option("--cif", metavar="FILE.cif[:BLOCK]", help="A structure (repeatable).")
    ],
    instrument: Annotated[
        Path, Option(metavar="FILE", help=".instprm, .prm, .iparm, .EXP, .irf or .pcr.")
    ],
    banks: BankOptions,
    single: Annotated[
        bool, Option("--one-of", help="A frame holds one of the structures, not several at a time.")
    ] = False,
    values: Annotated[
        Path | None,
        Option(metavar="TABLE", help="File names in the first column, and what they run along."),
    ] = None,
    along: Annotated[
        str | None, Option(metavar="NAME", help="Column of the table, or name of the axis.")
    ] = None,
    csv: Annotated[Path | None, Option(metavar="CSV", help="Write a line for each frame.")] = None,
    plot: Annotated[Path | None, Option(metavar="PNG", help="Draw cells along the series.")] = None,
    report: Annotated[
        Path | None, Option(metavar="HTML", help="Write a page on the frames and events.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Refine known structures along a series of frames, and name what happens.

    Each frame is refined from its neighbour and from the CIFs, and the better fit counts. Phases
    that appear or disappear, transitions, jumps of a cell or of the signal, blank frames and new
    lines are listed with the number of the frame. Without --values a frame's value is the last
    number in its file name, otherwise its place. A file that cannot be read is a blank frame.
    """
    from dataclasses import asdict

    from pipelines.refinement.inputs import request_of
    from pipelines.refinement.interface import refine_series
    from pipelines.refinement.output import cell_texts
    from pipelines.refinement.result import to_json
    from pipelines.refinement.series import draw_series, values_of_files, write_csv

    options.check_writable(csv, plot, report)
    label = along or "value"
    if label in ("frame", "file", "accepted", "rwp", "reason"):
        raise options.OutputError(f"--along {label} is the name of another column: choose one.")
    request = request_of(files, instrument, banks)
    at = values_of_files(files, values, along)
    frames, events = refine_series(request, cif, at, single=single, quiet=as_json)
    if csv is not None:
        write_csv(frames, label, csv)
    if plot is not None:
        draw_series(frames, events, label, plot)
    if report is not None:
        from pipelines.report.refinement import render_series

        report.write_text(render_series(frames, events, label), encoding="utf-8")
    if as_json:
        entries = [
            {"frame": number, "value": frame.value}
            | (to_json(frame.result) if frame.result else _unread(frame))
            for number, frame in enumerate(frames)
        ]
        print_json([*entries, {"events": [asdict(event) for event in events]}])
        return
    if values is None and along is None and at != sorted(at) and at != sorted(at, reverse=True):
        say("[yellow]![/] The numbers of the files are not in order; neighbours are as listed.")
    table = Table("frame", label, "file", "phase", "cell (Å, °)", "wt %", "R_wp (%)")
    for number, frame in enumerate(frames):
        first = f"{number}", f"{frame.value:g}", escape(frame.file.name)
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
    for file in (csv, plot, report):
        if file is not None:
            say(f"Written: {escape(str(file))}")
    if csv is None:
        next_commands(("… --csv series.csv --plot series.png", "the same as a table and a figure"))


def _unread(frame: FrameResult) -> dict[str, object]:
    return {"files": [str(frame.file)], "phases": [], "accepted": False, "reasons": [frame.reason]}


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
