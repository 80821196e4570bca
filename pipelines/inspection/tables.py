"""What a file was recognised as, on the terminal."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.conversion import Density, OriginalBank, peaks_of
from bragg_data.instrument.diffractometer import Instrument
from bragg_data.measurement.plausibility import counts_at_maximum, d_range, tof_range
from bragg_data.recognition import MeasuredBank, RecognisedFile
from pipelines.cli.console import command_line, console, next_commands, print_rows, say
from pipelines.cli.style import free_parameters_text
from pipelines.inspection.report import BankReport, FileReport

_WIDE = 112  # columns of a terminal, from which banks and their resolution are one table
_SPACINGS = np.array([0.5, 1.0, 2.0, 4.0])  # Å, at which the resolution is shown
_AXES = {
    "us": "time of flight in µs",
    "ms": "time of flight in ms, converted to µs",
    "s": "time of flight in s, converted to µs",
    "d": "d-spacing in Å",
    "Q": "Q in 1/Å, converted to d-spacing",
}
_NUMBER = re.compile(r"-?\d[\d.,]*(?:e[-+]?\d+)?")


def print_file(file: RecognisedFile, report: FileReport, typed: Sequence[str] = ()) -> None:
    """Print what a file was recognised as, its contents, doubts and what to type next.

    ``typed`` are the options with which it was read: the next command repeats them.
    """
    d = file.diffractometer
    rows = {
        "file": escape(str(file.path)),
        "kind": f"[bold]{file.kind}[/], {escape(file.format)}",
        "facility": escape(", ".join(filter(None, (d.facility, d.name)))),
    }
    if file.banks:
        rows |= _common_rows(file)
    elif file.campaign is not None:
        rows |= _campaign_rows(file)
    print_rows({name: text for name, text in rows.items() if text})
    if report.banks:
        _print_measured(file.banks, report.banks)
    if file.instruments:
        _print_instruments(file.instruments)
    if file.phases:
        console.print(_phase_table(file.phases))
    for warning in _grouped(report.warnings):
        say(f"[yellow]{escape(warning)}[/]")
    next_commands(*_next(file, typed))


def _common_rows(file: RecognisedFile) -> dict[str, str]:
    profiles = [bank.profile for bank in file.banks]
    axes = dict.fromkeys(_AXES[p.axis] for p in profiles)
    known = {p.sigma_known for p in profiles}
    estimated = "estimated from the intensities: the file has none"
    sigma = "in the file" if known == {True} else estimated if known == {False} else "in some banks"
    origins = dict.fromkeys(re.sub(r", bank -?\d+", "", b.origin) or "none" for b in file.banks)
    return {
        "title": escape(" ".join(profiles[0].title.split())[:90]),
        "axis": ", ".join(axes),
        "σ": sigma,
        "calibration": escape(", ".join(origins)),
    }


def _campaign_rows(file: RecognisedFile) -> dict[str, str]:
    campaign = file.campaign
    assert campaign is not None
    grid = campaign.grid
    return {
        "campaign": escape(f"{campaign.name}: {campaign.description}".rstrip(": ")),
        "samples": f"{len(campaign.samples):,}",
        "grid": f"{grid.points:,} points, {grid.start / 1e3:g} to {grid.stop / 1e3:.5g} ms, "
        f"ΔT/T = {grid.relative_step:g}",
    }


def _table(*headings: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def _print_banks(headings: list[str], rows: list[list[str]], resolution: list[list[str]]) -> None:
    """Print rows of banks, each with its resolution: next to it, or below on a narrow terminal."""
    if resolution and console.width >= _WIDE:
        headings = headings + _resolution_headings()
        rows = [row + widths for row, widths in zip(rows, resolution, strict=True)]
    tables = [(headings, rows)]
    if resolution and console.width < _WIDE:
        banks = [row[:1] + widths for row, widths in zip(rows, resolution, strict=True)]
        tables.append((["bank", *_resolution_headings()], banks))
    for titles, lines in tables:
        table = _table(*titles)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def _print_measured(banks: Sequence[MeasuredBank], reports: Sequence[BankReport]) -> None:
    headings = ["bank", "2θ (°)", "difC", "points", "T (ms)", "d (Å)"]
    headings += ["ΔT/T\n(%)", "counts\nat top"]
    rows, resolution = [], []
    for bank, report in zip(banks, reports, strict=True):
        profile, calibration = bank.profile, bank.calibration
        of_file = None if bank.nominal else calibration
        times, spacings = tof_range(profile, calibration), d_range(profile, calibration)
        rows.append(
            [
                _text(report.bank, "d"),
                _text(report.two_theta, ".6g"),
                _text(report.difc, ".6g"),
                f"{report.points:,}",
                _span(times and (times[0] / 1e3, times[1] / 1e3), ".4g"),
                _span(spacings, ".3g"),
                f"{100 * profile.relative_step:.2g}",
                _rounded(counts_at_maximum(profile)),
            ]
        )
        density = peaks_of(of_file) if of_file else None
        resolution.append(_resolution(of_file, density, spacings))
    known = any(bank.calibration is not None and not bank.nominal for bank in banks)
    _print_banks(headings, rows, resolution if known else [])


def _print_instruments(banks: Sequence[OriginalBank]) -> None:
    rows, resolution = [], []
    for bank in banks:
        i = bank.instrument
        values = (i.difc, i.difa, i.difb, i.tzero)
        path = f"{i.flight_path:.6g}" if i.flight_path > 0 else "–"
        rows.append([str(i.bank), f"{i.two_theta:.6g}", path, *(f"{v:.7g}" for v in values)])
        resolution.append(_resolution(i, bank.original, (bank.d[0], bank.d[-1])))
    _print_banks(["bank", "2θ (°)", "L (m)", "difC", "difA", "difB", "Zero"], rows, resolution)


def _resolution_headings() -> list[str]:
    first, *rest = (f"{d:g} Å" for d in _SPACINGS)
    return [f"Δd/d (%)\nat {first}", *(f"\n{text}" for text in rest)]


def _resolution(
    instrument: Instrument | None, density: Density | None, ends: tuple[float, float] | None
) -> list[str]:
    """Return the full width of a peak over d, in %, where the bank has such d."""
    if instrument is None or density is None or ends is None:
        return ["–"] * len(_SPACINGS)
    inside = (ends[0] <= _SPACINGS) & (ends[1] >= _SPACINGS)
    widths, _ = OriginalBank(instrument, density, _SPACINGS[inside]).widths()
    values = iter(100 * widths / (instrument.difc * _SPACINGS[inside]))
    return [f"{next(values):.2g}" if covered else "–" for covered in inside]


def _phase_table(phases: Sequence[Phase]) -> Table:
    left = ("phase", "space group", "crystal system", "cell")
    table = _table(*left, "sites", "atoms in cell", left=left)
    for phase in phases:
        table.add_row(
            escape(phase.name),
            escape(phase.space_group),
            phase.crystal_system.name,
            free_parameters_text(phase.cell, phase),
            str(len(phase.sites)),
            str(len(phase.positions)),
        )
    return table


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _span(ends: tuple[float, float] | None, form: str) -> str:
    return "–" if ends is None else f"{ends[0]:{form}}–{ends[1]:{form}}"


def _rounded(count: float) -> str:
    """Return a number with two digits: 1,200."""
    if count < 1:
        return f"{count:.1g}"
    digits = max(int(np.floor(np.log10(count))) - 1, 0)
    return f"{round(count, -digits):,.0f}"


def _grouped(warnings: Iterable[str]) -> list[str]:
    """Return one sentence of those that differ by their numbers alone, and how many there are."""
    groups: dict[str, list[str]] = {}
    for warning in warnings:
        groups.setdefault(_NUMBER.sub("#", warning), []).append(warning)
    return [
        f"{first} (The same of {len(rest)} more.)" if rest else first
        for first, *rest in groups.values()
    ]


def _next(file: RecognisedFile, typed: Sequence[str]) -> list[tuple[str, str]]:
    path = file.path
    if file.kind == "campaign":
        return [(command_line("run", path), "simulate it, and make a model that predicts")]
    if file.kind == "structure":
        command = command_line("run", "--cif", path, "--instrument", "YOURS.instprm")
        return [(command, "make a model that predicts its profiles")]
    if file.kind == "instrument":
        predict = command_line("predict", "PROFILE", "--instrument", path)
        commands = [(predict, "predict with this calibration")]
        if file.format != "GSAS-II .instprm":
            out = path.with_suffix(".instprm").name
            convert = command_line("instrument", "convert", path, "--out", out)
            commands.insert(0, (convert, "convert it, and compare the peak widths"))
        return commands
    calibration = file.instrument_file or "YOURS.instprm"
    words: list[object] = [path, "--instrument", calibration, *typed]
    numbers = [bank.profile.bank for bank in file.banks]
    if len(numbers) > 1 and all(bank.profile.two_theta is None for bank in file.banks):
        # The resolution is best at the largest angle.
        angles = [abs(b.calibration.two_theta) if b.calibration else 0.0 for b in file.banks]
        words += ["--bank", numbers[angles.index(max(angles))]]
    return [(command_line("predict", *words), "predict crystal system and cell")]
