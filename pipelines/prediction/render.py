"""Predictions as tables on a terminal and in notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape as escape_html

import numpy as np
from rich.markup import escape
from rich.table import Table

from pipelines.cli.console import console, say
from pipelines.cli.style import UNITS
from pipelines.prediction.result import Cell, PredictionResult, RefinedPhase

NOT_DETERMINED = "not determined"
"""Instead of an interval that carries no information."""

_MAX_TABLES = 12  # results that are shown with all candidates


def print_results(results: Sequence[PredictionResult]) -> None:
    """Print the model's predictions, the library's matches and refinements as tables.

    Of many results each gets a line.
    """
    if len(results) > _MAX_TABLES:
        _print_lines(results)
        return
    for result in results:
        table = Table(title=escape(result.name), title_justify="left")
        table.add_column("")
        table.add_column("crystal system")
        for name, unit in UNITS.items():
            table.add_column(f"{name} ({unit})", justify="right")
        table.add_column("confidence", justify="right")
        for cells, style in _prediction_rows(result):
            table.add_row(*cells, style=style)
        console.print(table)
        if result.refined is not None:
            _print_refinement(result.refined.candidates)
        for name, reason in (result.not_determined or {}).items():
            say(f"[yellow]![/] {name} is {NOT_DETERMINED}. {escape(reason)}")
        for reason in result.reasons or ():
            say(f"[bold red]Not accepted:[/] {escape(reason)}")
        for warning in result.warnings:
            say(f"[yellow]![/] {escape(warning)}")


def _prediction_rows(result: PredictionResult) -> list[tuple[list[str], str]]:
    """Return the cells and the style of each row: model, intervals, library candidates."""
    confidence = f"p {result.probability:.3f}"
    rows = [(["model", result.crystal_system, *_formatted(result.cell), confidence], "bold")]
    intervals = result.intervals
    if intervals:
        ends = {
            name: NOT_DETERMINED if ends is None else f"±{(ends.high - ends.low) / 2:.4f}"
            for name, ends in intervals.items()
        }
        rows.append((["90 % interval", "", *(ends.get(name, "") for name in UNITS), ""], ""))
    candidates = () if result.library_match is None else result.library_match.candidates
    for rank, candidate in enumerate(candidates):
        row = ["" if rank else "library match", candidate.crystal_system]
        row += [*_formatted(candidate.cell), f"r {candidate.correlation:.4f}"]
        rows.append((row, "dim" if rank else "bold"))
    return rows


def _print_refinement(candidates: Iterable[RefinedPhase]) -> None:
    table = Table()
    for heading in ("refined", "crystal system", "cell"):
        table.add_column(heading)
    for heading in ("Rwp", "χ² reduced"):
        table.add_column(heading, justify="right")
    for rank, phase in enumerate(candidates):
        table.add_row(*_refined_row(rank, phase), style="dim" if rank else "bold")
    console.print(table)


def _refined_row(rank: int, phase: RefinedPhase) -> list[str]:
    label = "best" if phase.intensities == "structure" else "positions alone"
    return [
        "" if rank else label,
        phase.crystal_system,
        refined_cell_text(phase),
        f"{100 * phase.rwp:.2f} %",
        f"{phase.reduced_chi2:.2f}",
    ]


def refined_cell_text(phase: RefinedPhase) -> str:
    """Return the free cell parameters with uncertainties and units."""
    # What symmetry fixes or ties has no uncertainty of its own.
    cell, su = phase.cell.values(), phase.su.values()
    return ", ".join(
        f"{name} {with_uncertainty(cell[name] or np.nan, su[name] or 0.0)} {UNITS[name]}"
        for name in phase.free_parameters
    )


def with_uncertainty(value: float, su: float) -> str:
    """Format a value with its standard uncertainty in units of the last digit.

    By the rule of 19, as in Acta Crystallographica: 3.98851(4), 4.0235(12). A value without
    uncertainty is exact: 90.
    """
    if not su > 0:
        return f"{value:g}" if float(f"{value:g}") == value else f"{value:.5f}"
    digits = max(0, -int(np.floor(np.log10(su))))
    if round(su * 10**digits) == 1:
        digits += 1  # two digits up to 19
    return f"{value:.{digits}f}({round(su * 10**digits)})"


def _print_lines(results: Sequence[PredictionResult]) -> None:
    table = Table(box=None)
    table.add_column("file", overflow="fold")
    table.add_column("crystal system")
    for name, unit in UNITS.items():
        table.add_column(f"{name} ({unit})", justify="right")
    table.add_column("p", justify="right")
    for result in results:
        table.add_row(
            escape(result.name),
            result.crystal_system,
            *_formatted(result.cell),
            f"{result.probability:.3f}",
        )
    console.print(table)
    warnings = Counter(warning for result in results for warning in result.warnings)
    for warning, count in warnings.items():
        say(f"[yellow]![/] {count:,} of {len(results):,}: {escape(warning)}")
    rejected = sum(result.accepted is False for result in results)
    if rejected:
        say(f"[yellow]![/] {rejected:,} of {len(results):,} are not accepted; --json has reasons.")


def _formatted(cell: Cell) -> list[str]:
    return [
        "–" if value is None else f"{value:.4f}" if name in "abc" else f"{value:.3f}"
        for name, value in cell.values().items()
    ]


def html_from_result(result: PredictionResult) -> str:
    """Return a result as tables of HTML, for notebooks."""
    headings = ["", "crystal system", *(f"{n} ({unit})" for n, unit in UNITS.items()), "confidence"]
    rows = [row for row, _ in _prediction_rows(result)]
    parts = [f"<p><b>{escape_html(result.name)}</b></p>", _html_table(headings, rows)]
    if result.refined is not None:
        refined = [_refined_row(rank, c) for rank, c in enumerate(result.refined.candidates)]
        parts.append(
            _html_table(["refined", "crystal system", "cell", "Rwp", "χ² reduced"], refined)
        )
    notes = [
        f"{name} is {NOT_DETERMINED}. {r}" for name, r in (result.not_determined or {}).items()
    ]
    notes += [f"Not accepted: {reason}" for reason in result.reasons or ()]
    notes += result.warnings
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape_html(note)}</li>" for note in notes) + "</ul>")
    return "".join(parts)


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape_html(text)}</th>" for text in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape_html(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
