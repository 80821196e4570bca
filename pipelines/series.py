"""Refine known structures along a series of frames: temperature, pressure, load or time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import next_commands, print_json, run, say
from pipelines.cli.refinement_options import BankOptions, FrameOptions

if TYPE_CHECKING:
    from pipelines.refinement.frames import FrameResult

_CLUSTER = options.ClusterOptions(cluster=None)  # this process for few frames
_FRAME = FrameOptions()


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
    cluster: options.ClusterOptions = _CLUSTER,
    frame: FrameOptions = _FRAME,
    values: Annotated[
        Path | None,
        Option(metavar="TABLE", help="File names in the first column, and what they run along."),
    ] = None,
    along: Annotated[
        str | None,
        Option(metavar="NAME[:N]", help="Column of the table (its number N), or name of the axis."),
    ] = None,
    reference: Annotated[int, Option(min=0, help="Frame that strains are relative to.")] = 0,
    csv: Annotated[Path | None, Option(metavar="CSV", help="Write a line for each frame.")] = None,
    plot: Annotated[Path | None, Option(metavar="PNG", help="Draw what changes.")] = None,
    report: Annotated[
        Path | None, Option(metavar="HTML", help="Write a page on the frames and events.")
    ] = None,
    into: Annotated[
        str | None, Option(metavar="NAME", help="Write the series into the store, as NAME.")
    ] = None,
    store: options.StoreOption = options.DEFAULT_URI,
    as_json: options.JsonOption = False,
) -> None:
    """Refine known structures along a series of frames, and name what happens.

    Each frame is refined from its neighbour and, where that is surprising and at every 32nd frame,
    from the CIFs; the better fit counts. Phases that appear or disappear, transitions, jumps of a
    cell, of the signal or of the broadening, blank frames and new lines are listed with the number
    of the frame. Without --values a frame's value is the number after the name of --along in its
    header, the last number in its file name, or else its place. A file that cannot be read is a
    blank frame. What is finished is kept next to the first of the output files until it is written:
    after an interruption, the same command goes on from there.
    """
    import shutil
    from dataclasses import asdict

    from pipelines.refinement.frames import SeriesOptions, refine_series
    from pipelines.refinement.inputs import request_of
    from pipelines.refinement.result import to_json
    from pipelines.refinement.series import (
        draw_series,
        print_expansions,
        print_series,
        relative_to,
        values_of_files,
        write_csv,
    )

    request = request_of(files, instrument, banks)
    inputs = *request.inputs(cif), values
    options.check_writable(csv, plot, report, inputs=inputs)
    label = (along or "value").partition(":")[0]
    if label in ("frame", "file", "bank", "accepted", "rwp", "reason"):
        raise options.OutputError(f"--along {label} is the name of another column: choose one.")
    repository = None
    if into:  # a name that cannot be is refused at once
        from bragg_data.store.repository import Store
        from bragg_data.store.series import check_name

        check_name(repository := Store(store, create=True), into)
    at = values_of_files(files, values, along)
    output = csv or plot or report
    keep = output and output.with_name(f".{output.name}.frames")
    how = SeriesOptions(frame, keep, cluster, as_json)
    frames, events = refine_series(request, cif, at, how)
    strains = relative_to(frames, reference)
    if csv is not None:
        write_csv(frames, strains, label, csv)
    if plot is not None:
        draw_series(frames, strains, events, label, plot)
    if report is not None:
        from pipelines.report.refinement import render_series

        report.write_text(render_series(frames, events, label), encoding="utf-8")
    tag = None
    if into and repository:
        from bragg_data.store.series import write_series
        from pipelines.refinement.series_dataset import lineage, series_dataset

        origin = lineage(files, instrument, request.with_cans(cif), repr((banks, frame)))
        dataset = series_dataset(frames, events, strains, label).assign_attrs(origin)
        tag = write_series(repository, into, dataset)
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
    if as_json:
        entries = [
            {"frame": f.number, "value": f.value} | (to_json(f.result) if f.result else _unread(f))
            for f in frames
        ]
        print_json([*entries, {"events": [asdict(event) for event in events]}])
        return
    if values is None and along is None and at != sorted(at) and at != sorted(at, reverse=True):
        say("[yellow]![/] The numbers of the files are not in order; neighbours are as listed.")
    print_series(frames, events, label)
    print_expansions(frames, label)
    for file in (csv, plot, report):
        if file is not None:
            say(f"Written: {escape(str(file))}")
    if tag is not None:
        say(f"Tag [bold]{tag}[/] in {escape(str(store))}: bragg_data.open_series('{tag}', …)")
    if csv is None:
        next_commands(("… --csv series.csv --plot series.png", "a table and a figure of it"))


def _unread(frame: FrameResult) -> dict[str, object]:
    return {"files": [str(frame.file)], "phases": [], "accepted": False, "reasons": [frame.reason]}


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
