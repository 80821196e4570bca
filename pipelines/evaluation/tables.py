"""Scores of models as tables, the paper's numbers and a constant answer's beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.markup import escape
from rich.table import Table

from bragg_models.targets import Targets
from pipelines.cli.console import console, say

PAPER_CAMPAIGN = "batio3-nomad"
"""The paper's numbers are for this campaign alone."""

PAPER_BY_SYSTEM = {
    "forest": {"cubic": 1.20e-6, "trigonal": 8.14e-4, "tetragonal": 5.84e-6},
    "transfer": {"cubic": 4.71e-4, "trigonal": 1.01e-2, "tetragonal": 5.18e-4},
    "deep": {"cubic": 1.00e-5, "trigonal": 1.40e-5, "tetragonal": 2.60e-5},
}
"""Table II of the paper: mse_paper of the class-conditional models on the synthetic test set."""

PAPER_MSE = {"integrated-forest": 1.48e-4, "multitask": 1.90e-5, "caenn": 5.96e-6}
"""Table III of the paper: mse_paper of the integrated models on the synthetic test set."""

PAPER_MEASURED_BY_SYSTEM = {
    "forest": {"trigonal": 6.30e-2, "tetragonal": 1.08e-2},
    "transfer": {"trigonal": 1.91e-1, "tetragonal": 3.08e-2},
    "deep": {"trigonal": 6.75e-2, "tetragonal": 3.08e-4},
}
"""Table IV of the paper: the same on its 15 measured profiles."""

PAPER_MEASURED = {"integrated-forest": 1.17e-1, "multitask": 1.23e-3, "caenn": 2.00e-3}
"""Table V of the paper: the integrated models on its 15 measured profiles."""

EQUATION_1 = (
    "mse_paper is eq. (1) of the paper: squared errors of a, c (Å²) and alpha (rad²) added. "
    "MAE: over the samples in which the parameter is free."
)


def print_scores(
    campaign: str,
    model: str,
    scores: Mapping[str, Mapping[str, float]],
    constant: Mapping[str, Mapping[str, float]],
    targets: Targets,
    title: str = "Test samples, random split",
) -> None:
    """Print the scores on the test samples, the constant answer's and the paper's beside.

    Parameters
    ----------
    campaign, model
        Names; the paper's number is for its own campaign alone.
    scores, constant
        As :func:`bragg_models.metrics.summary` gives them.
    targets
        The parameters.
    title
        What was scored.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("samples", "accuracy", "mse_paper", "… tied c once"):
        table.add_column(column, justify="right")
    for heading in mae_headings(targets):
        table.add_column(heading, justify="right")

    def row(label: str, values: Mapping[str, float], style: str | None = None) -> None:
        found = [f"{values[k]:.2e}" for k in ("mse_paper", "mse_paper_free")]
        for parameter in targets.parameters:
            mean = values.get(f"mae_{parameter}")
            found.append(
                "" if mean is None else f"{mean:.4f}" if parameter in "abc" else f"{mean:.3f}"
            )
        table.add_row(
            label, f"{values['n']:,.0f}", f"{values['accuracy']:.2%}", *found, style=style
        )

    for label, values in scores.items():
        row(label, values, "bold" if label == "all" else None)
    row("always the mean cell", constant["all"], "dim")
    if campaign == PAPER_CAMPAIGN:
        for system, value in PAPER_BY_SYSTEM.get(model, {}).items():
            table.add_row(f"the paper's, {system}", "", "", f"{value:.2e}", style="dim")
        if model in PAPER_MSE:
            table.add_row("the paper's", "41,824", "", f"{PAPER_MSE[model]:.2e}", style="dim")
    console.print(table)
    say(EQUATION_1)


def mae_headings(targets: Targets) -> list[str]:
    """Return a heading with its unit for each parameter."""
    return [f"MAE {p} ({'Å' if p in 'abc' else '°'})" for p in targets.parameters]


@dataclass(frozen=True)
class Sheet:
    """A table of texts, for a terminal and for Markdown.

    Attributes
    ----------
    title
        What it shows.
    columns
        Headings; the first column is the rows' names, the others are numbers.
    rows
        Texts, as many as columns or fewer, each row with a style: "bold", "dim" or "".
    notes
        Lines below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Sequence[str], str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *texts: str, style: str = "") -> None:
        """Add a row."""
        self.rows.append((texts, style))

    def show(self) -> None:
        """Print it with its notes."""
        table = Table(
            title=escape(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
            collapse_padding=True,
            padding=(0, 0 if len(self.columns) > 8 else 1),  # to be no wider than 120 characters
        )  # fmt: skip
        for number, heading in enumerate(self.columns):
            justify: Literal["left", "right"] = "right" if number else "left"
            table.add_column(escape(heading), justify=justify, vertical="bottom", no_wrap=True)
        for texts, style in self.rows:
            table.add_row(*(escape(text) for text in texts), style=style or None)
        console.print(table)
        for note in self.notes:
            say(escape(note))

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"### {self.title}", "", _pipes(c.replace("\n", " ") for c in self.columns)]
        lines.append(_pipes(["---", *["---:"] * (len(self.columns) - 1)]))
        for texts, style in self.rows:
            mark = "**" if style == "bold" else ""
            padded = [*texts, *[""] * (len(self.columns) - len(texts))]
            lines.append(_pipes(f"{mark}{text}{mark}" if text.strip() else "" for text in padded))
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def _pipes(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.strip().replace("|", "\\|") for text in texts) + " |"


def number(value: float | None) -> str:
    """Write a number in three digits: 4.36e-6, 0.0123, 1.5; nothing for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def with_interval(values: Mapping[str, float], name: str) -> str:
    """Write a score and its interval, which shares the power of ten: 4.36e-6 (3.90–4.91).

    Parameters
    ----------
    values
        Scores; the bounds are those under ``name_low`` and ``name_high``.
    name
        Which.
    """
    value = values.get(name)
    if value is None:
        return ""
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    if low is None or high is None or value <= 0 or not math.isfinite(value):
        return number(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    unit = 10.0 ** int(exponent)
    return f"{mantissa}e{int(exponent)} ({low / unit:.2f}–{high / unit:.2f})"


@dataclass(frozen=True)
class Score:
    """A model's scores on one test set.

    Attributes
    ----------
    model
        Name, also of a baseline.
    label
        What is shown.
    uri, preset
        Of the registered version; empty for a baseline.
    groups
        By "all" and crystal system: the scores of :func:`bragg_models.metrics.summary`, the number
        of ``wrong`` systems, and the bounds of intervals as ``mse_paper_low`` …; for a model that
        answers no cell, what is known without.
    true_system
        The same with each sample's own crystal system given, of class-conditional models.
    """

    model: str
    label: str
    uri: str
    preset: str
    groups: Mapping[str, Mapping[str, float]]
    true_system: Mapping[str, Mapping[str, float]] | None = None


_SCORES = ("systems\nwrong", "mse_paper", "tied c once")


def _narrow(targets: Targets) -> list[str]:
    headings = zip(targets.parameters, mae_headings(targets), strict=True)
    greek = {"alpha": "α", "beta": "β", "gamma": "γ"}
    return [h.replace(p, greek.get(p, p)).replace(" (", "\n(") for p, h in headings]


def _texts(values: Mapping[str, float], targets: Targets) -> tuple[list[str], list[str]]:
    scores = [f"{values['wrong']:,.0f}"]
    scores += [with_interval(values, name) for name in ("mse_paper", "mse_paper_free")]
    return scores, [number(values.get(f"mae_{p}")) for p in targets.parameters]


def class_conditional_sheet(
    title: str,
    scores: Sequence[Score],
    targets: Targets,
    *,
    of_paper: bool,
    not_trained: Sequence[str] = (),
    measured: bool = False,
) -> Sheet:
    """Return Table II of the paper: each crystal system by itself; of measured profiles Table IV.

    Parameters
    ----------
    title
        Which test set.
    scores
        Baselines first; then in the paper's order.
    targets
        The parameters.
    of_paper
        Whether the paper's numbers belong beside them.
    not_trained
        Models whose rows stay empty.
    measured
        Whether the samples are measured ones.
    """
    table, published = ("IV", PAPER_MEASURED_BY_SYSTEM) if measured else ("II", PAPER_BY_SYSTEM)
    shown = _SCORES[:2] if measured else _SCORES
    columns = ("", *shown, "true\nsystem", "paper", *_narrow(targets))
    sheet = Sheet(f"Table {table}, class-conditional models: {title}", columns)
    for system in _systems(scores):
        count = next(s.groups[system]["n"] for s in scores if system in s.groups)
        sheet.add(f"{system}, {count:,.0f} sample{'s' * (count != 1)}", style="bold")
        for score in scores:
            first, last = _texts(score.groups[system], targets)
            given = "" if score.true_system is None else (
                number(score.true_system[system]["mse_paper"])
            )  # fmt: skip
            paper = published.get(score.model, {}).get(system) if of_paper else None
            first = first[: len(shown)]
            sheet.add(f"  {score.label}", *first, given, number(paper), *last)
        for label in not_trained:
            sheet.add(f"  {label}", "", "not trained", style="dim")
    return sheet


def integrated_sheet(
    title: str,
    scores: Sequence[Score],
    targets: Targets,
    *,
    of_paper: bool,
    not_trained: Sequence[str] = (),
    measured: bool = False,
) -> Sheet:
    """Return Table III of the paper (V, of measured ones): all systems together, and each below.

    Parameters
    ----------
    title, scores, targets, of_paper, not_trained, measured
        As for :func:`class_conditional_sheet`.
    """
    shown = _SCORES[:2] if measured else _SCORES
    columns = ("", "samples", *shown, "paper", *_narrow(targets))
    table, published = ("V", PAPER_MEASURED) if measured else ("III", PAPER_MSE)
    sheet = Sheet(f"Table {table}, integrated models: {title}", columns)
    for score in scores:
        for group in ("all", *_systems([score])):
            values = score.groups[group]
            first, last = _texts(values, targets)
            paper = published.get(score.model) if of_paper and group == "all" else None
            label = score.label if group == "all" else f"  {group}"
            style = "bold" if group == "all" else "dim"
            first = first[: len(shown)]
            sheet.add(label, f"{values['n']:,.0f}", *first, number(paper), *last, style=style)
    for label in not_trained:
        sheet.add(label, "", "", "not trained", style="dim")
    return sheet


def _systems(scores: Sequence[Score]) -> list[str]:
    return list(dict.fromkeys(g for score in scores for g in score.groups if g != "all"))
