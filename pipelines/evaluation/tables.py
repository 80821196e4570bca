"""Scores of models as tables, with the paper's results and those of the baselines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from bragg_data.model_provenance import Scores
from bragg_models.targets import Targets
from pipelines.cli.console import console, say
from pipelines.cli.style import SYMBOLS, UNITS
from pipelines.evaluation import names as known

_WIDE = 8  # columns, beyond which there is no space for padding in 120 characters


@dataclass(frozen=True)
class ResultTable:
    """A table of texts, for a terminal and for Markdown; below it are notes.

    The first column has the rows' names, the others numbers. A row has as many texts as there are
    columns or fewer, and a style: "bold", "dim" or "".
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
            table.add_column(escape(heading), vertical="bottom", no_wrap=True)
            table.columns[-1].justify = "right" if index else "left"
        for texts, style in self.rows:
            table.add_row(*map(escape, texts), style=style or None)
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


def finite(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the numbers that are finite, nested as they are."""
    nested = {k: finite(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    return {k: v for k, v in nested.items() if isinstance(v, Mapping) or math.isfinite(v)}


def with_interval(values: Mapping[str, float], name: str) -> str:
    """Write a score and its interval, which shares the power of ten: 4.36e-6 (3.90–4.91).

    The bounds are the values of ``name_low`` and ``name_high``.
    """
    value, low, high = (values.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or low is None or high is None or value <= 0 or not math.isfinite(value):
        return number(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    unit = 10.0 ** int(exponent)
    return f"{mantissa}e{int(exponent)} ({low / unit:.2f}–{high / unit:.2f})"


@dataclass(frozen=True)
class ModelScores:
    """The scores of a model on one test set.

    ``groups`` has, by "all" and crystal system, the scores of :func:`bragg_models.metrics.summary`,
    the number of misclassified samples (``wrong``), and the bounds of intervals as
    ``mse_paper_low`` …; of a classifier the scores that need no cell. ``true_system`` has the same
    with each sample's true crystal system as input, of class-conditional models.
    """

    model: str  # also of a baseline
    label: str  # for a reader
    uri: str  # of the registered version; empty for a baseline
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
class PaperTables:
    """The paper's tables of a test set, with its results on request.

    They are Tables II and III, of measured samples IV and V. Models come in the paper's order,
    after the baselines; those that are not trained, by their labels, have empty rows.
    """

    title: str
    targets: Targets
    with_paper: bool = False
    measured: bool = False

    def class_conditional(
        self, scores: Sequence[ModelScores], not_trained: Sequence[str] = ()
    ) -> ResultTable:
        """Return the table of each crystal system by itself."""
        name, published = ("IV", known.TABLE_IV) if self.measured else ("II", known.TABLE_II)
        columns = ("", *self._shown, "true\nsystem", "paper", *self._mae_headings)
        table = ResultTable(f"Table {name}, class-conditional models: {self.title}", columns)
        for system in dict.fromkeys(g for score in scores for g in score.groups if g != "all"):
            count = next(s.groups[system]["n"] for s in scores if system in s.groups)
            table.add(f"{system}, {count:,.0f} sample{'s' * (count != 1)}", style="bold")
            for score in scores:
                first, last = self._texts(score.groups[system])
                true_system = score.true_system[system]["mse_paper"] if score.true_system else None
                paper = published.get(score.model, {}).get(system) if self.with_paper else None
                table.add(f"  {score.label}", *first, number(true_system), number(paper), *last)
            for label in not_trained:
                table.add(f"  {label}", "", "not trained", style="dim")
        return table

    def integrated(
        self, scores: Sequence[ModelScores], not_trained: Sequence[str] = ()
    ) -> ResultTable:
        """Return the table of all systems together, and of each below."""
        name, published = ("V", known.TABLE_V) if self.measured else ("III", known.TABLE_III)
        columns = ("", "samples", *self._shown, "paper", *self._mae_headings)
        table = ResultTable(f"Table {name}, integrated models: {self.title}", columns)
        for score in scores:
            for group, values in score.groups.items():
                first, last = self._texts(values)
                of_all = group == "all"
                label, style = (score.label, "bold") if of_all else (f"  {group}", "dim")
                paper = number(published.get(score.model) if self.with_paper and of_all else None)
                table.add(label, f"{values['n']:,.0f}", *first, paper, *last, style=style)
        for label in not_trained:
            table.add(label, "", "", "not trained", style="dim")
        return table

    @property
    def _shown(self) -> tuple[str, ...]:
        return ("systems\nwrong", "mse_paper", "tied c once")[: 2 if self.measured else 3]

    @property
    def _mae_headings(self) -> list[str]:
        return [f"MAE {SYMBOLS[p]}\n({UNITS[p]})" for p in self.targets.parameters]

    def _texts(self, values: Mapping[str, float]) -> tuple[list[str], list[str]]:
        """Return the scores that are shown, and the mean absolute errors."""
        scores = [f"{values['wrong']:,.0f}"]
        scores += [with_interval(values, name) for name in ("mse_paper", "mse_paper_free")]
        errors = [number(values.get(f"mae_{p}")) for p in self.targets.parameters]
        return scores[: len(self._shown)], errors
