"""Predictions as tables: on a terminal, and as comma-separated values."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from rich.markup import escape
from rich.table import Table

from pipelines.cli.console import command_line, console, next_commands, say
from pipelines.cli.style import UNITS, with_uncertainty
from pipelines.prediction.combined_result import CombinedBanks
from pipelines.prediction.result import Cell, PredictionResult, cell_texts, notes_on, tables_of
from pipelines.refinement.output import print_tables, quality
from pipelines.refinement.result import JointRefinement

_MAX_TABLES = 12  # results that are shown with all candidates
_STYLES = {"": "dim", "90 % interval": ""}  # of rows, by their label; others are bold


def print_results(results: Sequence[PredictionResult]) -> None:
    """Print the model's predictions, the library's matches and refinements as tables.

    Of many results each gets a line.
    """
    if len(results) > _MAX_TABLES:
        _print_lines(results)
        return
    for result in results:
        (headings, rows), *refinement = tables_of(result)
        say(f"[bold]{escape(result.name)}[/]")  # a table folds its title, and paths with it
        _print_table(headings, rows, numbers=2)
        for headings, rows in refinement:
            _print_table(headings, rows, numbers=3)
        for label, text in notes_on(result):
            say(f"{f'[bold red]{label}[/]' if label else '[yellow]![/]'} {escape(text)}")
    for file, mixture in {r.file: r.mixture for r in results if r.mixture}.items():
        _print_joint(f"{file}, as a mixture", mixture)
    for file, together in {r.file: r.combined for r in results if r.combined}.items():
        _print_combined(f"{file}, all banks", together)


def _print_combined(title: str, together: CombinedBanks) -> None:
    """Print what several banks show together."""
    rows = [
        [
            f"{label} {name}",
            f"{with_uncertainty(p.value, p.uncertainty)} {UNITS[name]}",
            f"{p.chi2:.2g} of {len(p.banks) - 1}",
            ", ".join(f"{bank}: {value:.5f}" for bank, value in p.banks.items()),
        ]
        for label, parameters in (("predicted", together.cell), ("refined", together.refined))
        for name, p in parameters.items()
    ]
    phase = f"{escape(together.phase)}, p {together.probabilities[together.phase]:.3f}"
    say(f"[bold]{escape(title)}[/]: {phase}")
    table = Table("", "value", "χ²", "banks")
    table.columns[3].overflow = "fold"
    for row in rows:
        table.add_row(*map(escape, row), style="bold")
    console.print(table)
    for text in together.warnings:
        say(f"[yellow]![/] {escape(text)}")
    if together.joint is not None:
        _print_joint(f"{title}, refined jointly", together.joint)
        rest = list(together.joint_rwp.items())[1:]
        if rest:
            with_rwp = ", ".join(f"{escape(name)} {100 * rwp:.2f} %" for name, rwp in rest)
            say(f"R_wp of the other phases: {with_rwp}")
    if together.not_joint is not None:
        say(f"[yellow]![/] {escape(together.not_joint)}")


def _print_joint(title: str, joint: JointRefinement) -> None:
    acceptance = "" if joint.accepted else ", [bold red]not accepted[/]"
    say(f"[bold]{escape(title)}[/]{acceptance}: {quality(joint)}")
    print_tables(joint)
    for text in dict.fromkeys(joint.calibration):
        say(f"[dim]{escape(text)}[/]")


def _print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> None:
    """Print a table, the columns with numbers from a certain one on."""
    table = Table(*headings[:numbers])
    for heading in headings[numbers:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row, style=_STYLES.get(row[0], "bold"))
    console.print(table)


def _print_lines(results: Sequence[PredictionResult]) -> None:
    table = Table("file", "crystal system", box=None)
    table.columns[0].overflow = "fold"
    for heading in (*(f"{name} ({unit})" for name, unit in UNITS.items()), "p"):
        table.add_column(heading, justify="right")
    for result in results:
        cell, probability = cell_texts(result.cell), f"{result.probability:.3f}"
        table.add_row(escape(result.name), result.crystal_system, *cell, probability)
    console.print(table)
    warnings = Counter(warning for result in results for warning in result.warnings)
    for warning, count in warnings.items():
        say(f"[yellow]![/] {count:,} of {len(results):,}: {escape(warning)}")
    rejected = sum(result.accepted is False for result in results)
    if rejected:
        say(f"[yellow]![/] {rejected:,} of {len(results):,} are not accepted; --json has reasons.")


def print_next(file: Path, instrument: Path | None, results: Sequence[PredictionResult]) -> None:
    """Print what to type next: with a calibration, or to identify what is not the model's."""
    if instrument is None and results:
        again = command_line("predict", file, "--instrument", "YOURS.instprm")
        next_commands((again, "predict with the measurement's own calibration"))
    elif any(result.accepted is False and not _is_explained(result) for result in results):
        words = "--phases", "CIFS", "--instrument", instrument
        other = command_line("identify", file, *words)
        next_commands((other, "which of the structures in a folder CIFS it is a mixture of"))


def _is_explained(result: PredictionResult) -> bool:
    mixture = result.mixture
    return mixture is not None and mixture.accepted and not mixture.unexplained_lines


def table_row(result: PredictionResult) -> dict[str, str | float | int | bool | None]:
    """Return a result as a row of a table for spreadsheets, with units in the column names."""
    row: dict[str, str | float | int | bool | None] = {
        "file": result.file,
        "bank": result.bank,
        "crystal system": result.crystal_system,
        "phase": result.phase,
        "probability": result.probability,
        **_cell_columns("", result.cell),
    }
    if result.library_match is not None:
        best = result.library_match.candidates[0]
        row |= {
            "library crystal system": best.crystal_system,
            "library correlation": best.correlation,
            **_cell_columns("library ", best.cell),
        }
    for name, interval in (result.intervals or {}).items():
        low, high = interval or (None, None)
        row |= {f"{name} low ({UNITS[name]})": low, f"{name} high ({UNITS[name]})": high}
    if result.accepted is not None:
        row["accepted"] = result.accepted
    return row | {"model": result.model, "warnings": " ".join(result.warnings)}


def _cell_columns(prefix: str, cell: Cell) -> dict[str, float | None]:
    return {f"{prefix}{name} ({UNITS[name]})": value for name, value in cell.values().items()}


def write_csv(results: Sequence[PredictionResult], stream: TextIO) -> None:
    """Write results as comma-separated values, a row for each (:func:`table_row`)."""
    rows = [table_row(result) for result in results]
    longest = max(rows, key=len, default={})
    names = dict.fromkeys(name for row in (longest, *rows) for name in row)
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
