"""Print the findings of the checks of a data set."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from bragg_data.store.checks import Finding
from pipelines.cli.console import console, say


def print_findings(tag: str, findings: Sequence[Finding]) -> None:
    """Print a line for each check, and how many hard checks failed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=tag, title_justify="left")
    for heading in ("check", "", "result"):
        table.add_column(heading)
    for finding in findings:
        failure = "[bold red]failed[/]" if finding.hard else "[yellow]warning[/]"
        table.add_row(
            finding.name, "[green]passed[/]" if finding.passed else failure, finding.message
        )
    console.print(table)
    hard = sum(finding.hard and not finding.passed for finding in findings)
    say(f"{hard} hard checks failed." if hard else "All hard checks passed.")
