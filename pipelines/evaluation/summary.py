"""The result of an evaluation: scores and costs as tables, JSON, metrics and Markdown."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from bragg_models.targets import Targets
from pipelines.evaluation import names as known
from pipelines.evaluation.scoring import EvaluatedModel
from pipelines.evaluation.tables import (
    ModelScores,
    ResultTable,
    TableOptions,
    by_table,
    class_conditional_table,
    integrated_table,
    number,
)

BATCH = 512
"""Profiles of the large timed batch."""

_SECONDS = 3.0  # longest time of one timing
_REPETITIONS = 2, 50  # of a timing, at least and at most


@dataclass(frozen=True)
class Speed:
    """Seconds of a prediction of 1 and of 512 profiles (medians), and the model's size."""

    model: str
    label: str
    single: float
    batch: float
    bytes: int
    weights: int
    nodes: int


class MissingModel(NamedTuple):
    """A model that is not registered, and the command that trains it."""

    model: str
    split: str
    command: str


class DatasetReference(NamedTuple):
    """Identity of a data set."""

    tag: str
    snapshot_id: str
    content_hash: str


@dataclass(frozen=True)
class EvaluationFacts:
    """Date, code, data sets and settings of an evaluation."""

    date: str
    commit: str
    campaign: str
    data: DatasetReference
    offgrid: DatasetReference | None
    bootstrap: int
    limit: int | None
    command: str


def speed_of(model: EvaluatedModel, profiles: NDArray[np.float32]) -> Speed:
    """Time predictions of raw profiles (512, points); the first one of each size does not count."""
    fewest, most = _REPETITIONS

    def median(count: int) -> float:
        seconds: list[float] = []
        while len(seconds) < fewest or (len(seconds) < most and sum(seconds) < _SECONDS):
            began = time.perf_counter()
            model.predict(profiles[:count])
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])

    counts = model.size, model.n_weights, model.n_nodes
    return Speed(model.model, model.label, median(1), median(BATCH), *counts)


@dataclass
class EvaluationReport:
    """The result of an evaluation.

    Attributes
    ----------
    facts, targets
        Date, commit, data sets, settings; phases and parameters.
    scores
        By the name of the test set, and the key of the model.
    titles
        Of the test sets.
    proven
        By the name of the test set: share of the samples for which the library match is proven to
        be that of a search through all patterns.
    speed, missing
        Costs of the models, and those that are not registered.
    commands, run_id
        Commands that trained the models, by address; the MLflow run.
    """

    facts: EvaluationFacts
    targets: Targets
    scores: dict[str, dict[str, ModelScores]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    proven: dict[str, float] = field(default_factory=dict)
    speed: list[Speed] = field(default_factory=list)
    missing: list[MissingModel] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    run_id: str = ""

    def value(self, test: str, model: str, name: str = "mse_paper") -> float | None:
        """Return a score over all samples, or None where there is none."""
        score = self.scores.get(test, {}).get(model)
        return None if score is None else score.groups["all"].get(name)

    def tables(self) -> list[ResultTable]:
        """Return everything as tables."""
        tables = [table for test in self.scores for table in self._test_tables(test)]
        return [*tables, *self._ablation(), self._costs()]

    def _test_tables(self, test: str) -> list[ResultTable]:
        baselines, conditional, integrated = by_table(self.scores[test].values())
        split = "blocked" if test == "blocked" else "random"
        tables = []
        for make, names, models in (
            (class_conditional_table, (known.CLASSIFIER, *known.CLASS_CONDITIONAL), conditional),
            (integrated_table, known.INTEGRATED, integrated),
        ):
            missing = [m.model for m in self.missing if m.model in names and m.split == split]
            if not missing and not models:
                continue  # nothing but baselines
            options = TableOptions(
                with_paper=self.facts.campaign == known.PAPER_CAMPAIGN and test == "random",
                not_trained=[known.LABELS.get(model, model) for model in missing],
            )
            table = make(self.titles[test], [*baselines, *models], self.targets, options)
            if missing:
                table.notes.append(f"Not trained: {known.train_command(' '.join(missing), split)}")
            if test in self.proven:
                table.notes.append(
                    f"The library match is proven to be the exact one for "
                    f"{self.proven[test]:.1%} of the samples."
                )
            tables.append(table)
        return tables

    def _ablation(self) -> list[ResultTable]:
        table = ResultTable(
            "Ablation: cross entropy + MSE against the class as an integer",
            ("", "wrong", "mse_paper", "wrong, integer", "mse_paper, integer"),
        )
        for test in self.scores:
            if self.value(test, known.INTEGER) is not None:
                names = [
                    (m, n) for m in ("multitask", known.INTEGER) for n in ("wrong", "mse_paper")
                ]
                table.add(test, *(number(self.value(test, *name)) for name in names))
        return [table] if table.rows else []

    def _costs(self) -> ResultTable:
        headings = ("1 profile (ms)", f"{BATCH} profiles (ms)", "per profile (ms)", "on disk")
        table = ResultTable(
            "Time per prediction, raw profile to cell, and size",
            ("", *headings, "weights", "nodes"),
        )
        for s in self.speed:
            table.add(
                s.label,
                number(1e3 * s.single),
                number(1e3 * s.batch),
                number(1e3 * s.batch / BATCH),
                decimal(s.bytes),
                f"{s.weights:,}" if s.weights else "",
                f"{s.nodes:,}" if s.nodes else "",
            )
        return table

    def to_json(self) -> Mapping[str, Any]:
        """Return plain JSON values; numbers that are not finite are null."""
        test_sets = {
            test: {"title": self.titles[test], "models": {k: asdict(s) for k, s in scores.items()}}
            for test, scores in self.scores.items()
        }
        values = {
            **asdict(self.facts),
            "data": self.facts.data._asdict(),
            "offgrid": None if self.facts.offgrid is None else self.facts.offgrid._asdict(),
            "test_sets": test_sets,
            "not_trained": [missing._asdict() for missing in self.missing],
            "library_proven": self.proven,
            # deprecated: "one" was the name of "single"
            "speed": [{**asdict(speed), "one": speed.single} for speed in self.speed],
            "commands": self.commands,
        }
        return dict(finite_or_null(values))

    def metrics(self) -> Mapping[str, Any]:
        """Return the scores as nested numbers, for MLflow."""
        tests: dict[str, dict[str, Mapping[str, Any]]] = {}
        for test, scores in self.scores.items():
            tests[test] = {}
            for key, score in scores.items():
                with_truth = {f"{g}_true_system": v for g, v in (score.true_system or {}).items()}
                tests[test][key] = {**score.groups, **with_truth}
        for speed in self.speed:
            tests.setdefault("speed", {})[speed.model] = {
                "seconds_1": speed.single,
                f"seconds_{BATCH}": speed.batch,
                **{name: getattr(speed, name) for name in ("bytes", "weights", "nodes")},
            }
        return {"evaluate": tests}

    def markdown(self) -> str:
        """Return the tables with all that is needed to repeat the evaluation."""
        facts = self.facts
        lines = ["# Results", "", f"- date: {facts.date}", f"- commit: {facts.commit}"]
        lines += [
            f"- {name}: `{data.tag}`, snapshot {data.snapshot_id}, content {data.content_hash[:12]}"
            for name, data in (("data", facts.data), ("offgrid", facts.offgrid))
            if data is not None
        ]
        lines += [
            f"- intervals: 95 %, bootstrap over samples, {facts.bootstrap} resamples, in the power "
            f"of ten of the number before them",
            f"- {known.EQUATION_1}",
            "",
            "```",
            *dict.fromkeys(self.commands.values()),
            facts.command,
            "```",
        ]
        return "\n".join([*lines, "", *(table.markdown() for table in self.tables())])


def finite_or_null(value: Any) -> Any:
    """Return JSON values with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
