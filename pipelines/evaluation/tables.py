"""Scores of models as tables, with the paper's results and those of the baselines."""

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
from pipelines.evaluation import names as known

Scores = Mapping[str, Mapping[str, float]]
"""By ``all`` and crystal system: scores by their names."""

_WIDE = 8  # columns, beyond which there is no space for padding in 120 characters
_SCORES = ("systems\nwrong", "mse_paper", "tied c once")
_GREEK = {"alpha": "α", "beta": "β", "gamma": "γ"}


@dataclass(frozen=True)
class ResultTable:
    """A table of texts, for a terminal and for Markdown.

    Attributes
    ----------
    title, notes
        What it shows, and lines below it.
    columns
        Headings; the first column is the rows' names, the others are numbers.
    rows
        Texts, as many as columns or fewer, each row with a style: "bold", "dim" or "".
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
            title=escape(self.title),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            padding=(0, 0 if len(self.columns) > _WIDE else 1),
        )
        for index, heading in enumerate(self.columns):
            justify: Literal["left", "right"] = "right" if index else "left"
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
        Name of the score.
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


def mae_headings(targets: Targets) -> list[str]:
    """Return a heading with its unit for each parameter."""
    return [f"MAE {p} ({'Å' if p in 'abc' else '°'})" for p in targets.parameters]


@dataclass(frozen=True)
class ModelScores:
    """The scores of a model on one test set.

    Attributes
    ----------
    model, label
        Name, also of a baseline; name for a reader.
    uri, preset
        Of the registered version; empty for a baseline.
    groups
        By "all" and crystal system: the scores of :func:`bragg_models.metrics.summary`, the number
        of misclassified samples (``wrong``), and the bounds of intervals as ``mse_paper_low`` …; of
        a classifier the scores that need no cell.
    true_system
        The same with each sample's true crystal system as input, of class-conditional models.
    """

    model: str
    label: str
    uri: str
    preset: str
    groups: Scores
    true_system: Scores | None = None


def by_table(scores: Iterable[ModelScores]) -> tuple[list[ModelScores], ...]:
    """Return the scores of baselines, of class-conditional models, and of integrated ones."""
    scores = list(scores)
    baselines = [s for s in scores if not s.uri]
    conditional = [s for s in scores if s.model == known.CLASSIFIER]
    conditional += [s for s in scores if s.model in known.CLASS_CONDITIONAL]
    integrated = [s for s in scores if s.uri and s not in conditional and s.model != known.INTEGER]
    return baselines, conditional, integrated


@dataclass(frozen=True)
class TableOptions:
    """Variants of the paper's tables.

    Attributes
    ----------
    with_paper
        Add the paper's results.
    measured
        The samples are measured ones: Tables IV and V instead of II and III.
    not_trained
        Labels of models whose rows stay empty.
    """

    with_paper: bool = False
    measured: bool = False
    not_trained: Sequence[str] = ()


def class_conditional_table(
    title: str, scores: Sequence[ModelScores], targets: Targets, options: TableOptions
) -> ResultTable:
    """Return Table II of the paper, each crystal system by itself; of measured profiles Table IV.

    Parameters
    ----------
    title, targets, options
        The test set, its parameters, and which of the tables.
    scores
        Baselines first; then in the paper's order.
    """
    name, published = ("IV", known.TABLE_IV) if options.measured else ("II", known.TABLE_II)
    shown = _SCORES[:2] if options.measured else _SCORES
    columns = ("", *shown, "true\nsystem", "paper", *_narrow_headings(targets))
    table = ResultTable(f"Table {name}, class-conditional models: {title}", columns)
    for system in _systems(scores):
        count = next(s.groups[system]["n"] for s in scores if system in s.groups)
        table.add(f"{system}, {count:,.0f} sample{'s' * (count != 1)}", style="bold")
        for score in scores:
            first, last = _texts(score.groups[system], targets)
            true_system = None if score.true_system is None else score.true_system[system]
            paper = published.get(score.model, {}).get(system) if options.with_paper else None
            table.add(
                f"  {score.label}",
                *first[: len(shown)],
                number(true_system["mse_paper"] if true_system else None),
                number(paper),
                *last,
            )
        for label in options.not_trained:
            table.add(f"  {label}", "", "not trained", style="dim")
    return table


def integrated_table(
    title: str, scores: Sequence[ModelScores], targets: Targets, options: TableOptions
) -> ResultTable:
    """Return Table III of the paper (V, of measured ones): all systems together, and each below.

    Parameters
    ----------
    title, scores, targets, options
        As for :func:`class_conditional_table`.
    """
    name, published = ("V", known.TABLE_V) if options.measured else ("III", known.TABLE_III)
    shown = _SCORES[:2] if options.measured else _SCORES
    columns = ("", "samples", *shown, "paper", *_narrow_headings(targets))
    table = ResultTable(f"Table {name}, integrated models: {title}", columns)
    for score in scores:
        for group in ("all", *_systems([score])):
            values = score.groups[group]
            first, last = _texts(values, targets)
            with_paper = options.with_paper and group == "all"
            table.add(
                score.label if group == "all" else f"  {group}",
                f"{values['n']:,.0f}",
                *first[: len(shown)],
                number(published.get(score.model) if with_paper else None),
                *last,
                style="bold" if group == "all" else "dim",
            )
    for label in options.not_trained:
        table.add(label, "", "", "not trained", style="dim")
    return table


def _narrow_headings(targets: Targets) -> list[str]:
    headings = zip(targets.parameters, mae_headings(targets), strict=True)
    return [h.replace(p, _GREEK.get(p, p)).replace(" (", "\n(") for p, h in headings]


def _texts(values: Mapping[str, float], targets: Targets) -> tuple[list[str], list[str]]:
    scores = [f"{values['wrong']:,.0f}"]
    scores += [with_interval(values, name) for name in ("mse_paper", "mse_paper_free")]
    return scores, [number(values.get(f"mae_{p}")) for p in targets.parameters]


def _systems(scores: Sequence[ModelScores]) -> list[str]:
    return list(dict.fromkeys(g for score in scores for g in score.groups if g != "all"))
