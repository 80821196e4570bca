"""What an evaluation found: scores, costs and bars, as tables, JSON, metrics and Markdown."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal
from torch import nn

from bragg_models.forest import Forest
from bragg_models.targets import Targets
from pipelines.evaluation.scoring import NEAREST, NEAREST_MEAN, Answers
from pipelines.evaluation.tables import (
    EQUATION_1,
    PAPER_CAMPAIGN,
    Score,
    Sheet,
    class_conditional_sheet,
    integrated_sheet,
    number,
)

CLASS_CONDITIONAL = ("forest", "transfer", "deep")
INTEGRATED = ("integrated-forest", "multitask", "caenn", "guided")
OURS, CLASSIFIER, INTEGER, ROBUST = "guided", "classifier", "multitask-integer", "robust"
MODELS = (CLASSIFIER, *CLASS_CONDITIONAL, *INTEGRATED, INTEGER)
"""Every model that is trained here, in the order of the tables."""

LABELS = {
    "forest": "forest (C1)",
    "transfer": "transfer learner (C2)",
    "deep": "deep regressor (C3)",
    "integrated-forest": "integrated forest",
    "caenn": "CAENN",
    "guided": "guided (ours)",
    "perceptron": "its glance alone",
    ROBUST: "robust (ours)",
    INTEGER: "multitask, class as integer",
}
BATCH = 512
"""Profiles in a large timed question."""

_SECONDS = 3.0  # that one timing takes at most


def train_command(model: str, split: str) -> str:
    """Return the command that trains a model on a split's training part."""
    return f"python -m pipelines.train {model}" + ("" if split == "random" else f" --split {split}")


@dataclass(frozen=True)
class Speed:
    """What an answer costs: seconds for 1 and for 512 profiles (medians), and the model's size."""

    model: str
    label: str
    one: float
    batch: float
    bytes: int
    weights: int
    nodes: int


def numbers_in(thing: object) -> tuple[int, int]:
    """Count the weights of all networks, and the nodes of all trees, that a predictor holds."""
    if isinstance(thing, nn.Module):
        return sum(p.numel() for p in thing.parameters()), 0
    if isinstance(thing, Forest):
        return 0, len(thing.feature)
    inside: list[object] = []
    if isinstance(thing, Mapping):
        inside = list(thing.values())
    elif isinstance(thing, (list, tuple)):
        inside = list(thing)
    elif is_dataclass(thing):
        inside = [getattr(thing, f.name) for f in fields(thing)]
    found = [numbers_in(part) for part in inside]
    return sum(weights for weights, _ in found), sum(nodes for _, nodes in found)


def speed_of(
    one: Answers, profiles: NDArray[np.float32], size: int, counts: tuple[int, int]
) -> Speed:
    """Time answers, from raw profiles to cells; the first one of each kind does not count."""

    def median(count: int) -> float:
        taken: list[float] = []
        while len(taken) < 2 or (len(taken) < 50 and sum(taken) < _SECONDS):
            began = time.perf_counter()
            one.ask(profiles[:count])
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])

    return Speed(one.model, one.label, median(1), median(BATCH), size, *counts)


@dataclass
class Report:
    """What an evaluation found.

    Attributes
    ----------
    facts
        Date, commit, data sets, settings.
    scores
        By the name of the test set.
    titles
        Of the test sets.
    proven
        By the name of the test set: share of the samples for which the library match is proven to
        be that of a search through all patterns.
    missing
        Model, split and the command that trains it, where nothing is registered.
    commands
        That made the models.
    """

    facts: dict[str, Any]
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    proven: dict[str, float] = field(default_factory=dict)
    speed: list[Speed] = field(default_factory=list)
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)

    def value(self, test: str, model: str, name: str = "mse_paper") -> float | None:
        """Return a score over all samples, or None where there is none."""
        score = self.scores.get(test, {}).get(model)
        return None if score is None else score.groups["all"].get(name)

    def bars(self) -> list[Bar]:
        """Return what was aimed at, and what was found."""
        bars = [
            Bar("classifier, wrong systems, random", 5, self.value("random", CLASSIFIER, "wrong")),
            Bar("ours, mse_paper, random", 5e-7, self.value("random", OURS)),
            Bar("ours, wrong systems, random", 0, self.value("random", OURS, "wrong")),
        ]
        random = self.value("random", OURS)
        for test, factor in (("off-grid", 3), ("blocked", 10)):
            own = self.value(test, OURS)
            ratio = None if own is None or random is None else own / random
            bars.append(Bar(f"ours, {test} over random", factor, ratio))
        for test in ("random", "blocked", "off-grid"):
            found = [self.value(test, name) for name in (NEAREST, NEAREST_MEAN)]
            known = [value for value in found if value is not None]
            # The better of the two library matches is the bar.
            bars.append(
                Bar(f"ours, mse_paper, {test}, against the library match",
                    min(known) if known else None, self.value(test, OURS))
            )  # fmt: skip
        return bars

    def sheets(self, targets: Targets) -> list[Sheet]:
        """Return everything as tables."""
        of_paper = self.facts["campaign"] == PAPER_CAMPAIGN
        sheets = []
        for test, scores in self.scores.items():
            first = [s for s in scores.values() if not s.uri]
            conditional = [s for s in scores.values() if s.model in CLASS_CONDITIONAL]
            others = [
                s for s in scores.values()
                if s.uri and s.model not in (*CLASS_CONDITIONAL, CLASSIFIER, INTEGER)
            ]  # fmt: skip
            classifiers = [s for s in scores.values() if s.model == CLASSIFIER]
            title = self.titles[test]
            split = "blocked" if test == "blocked" else "random"
            known = of_paper and test == "random"
            for make, names, rows in (
                (class_conditional_sheet, (CLASSIFIER, *CLASS_CONDITIONAL),
                 [*first, *classifiers, *conditional]),
                (integrated_sheet, INTEGRATED, [*first, *others]),
            ):  # fmt: skip
                missing = [m for m, s, _ in self.missing if m in names and s == split]
                if not missing and all(score in first for score in rows):
                    continue  # nothing but baselines
                labels = [LABELS.get(model, model) for model in missing]
                sheet = make(title, rows, targets, of_paper=known, not_trained=labels)
                if missing:
                    command = train_command(" ".join(missing), split)
                    sheet.notes.append(f"Not trained: {command}")
                if test in self.proven:
                    sheet.notes.append(
                        f"The library match is proven to be the exact one for "
                        f"{self.proven[test]:.1%} of the samples."
                    )
                sheets.append(sheet)
        return [*sheets, *self._ablation(), self._costs(), self._aims()]

    def _ablation(self) -> list[Sheet]:
        sheet = Sheet(
            "Ablation: cross entropy + MSE against the class as an integer",
            ("", "wrong", "mse_paper", "wrong, integer", "mse_paper, integer"),
        )
        for test in self.scores:
            if self.value(test, INTEGER) is not None:
                found = [self.value(test, m, n) for m in ("multitask", INTEGER)
                         for n in ("wrong", "mse_paper")]  # fmt: skip
                sheet.add(test, *(number(value) for value in found))
        return [sheet] if sheet.rows else []

    def _costs(self) -> Sheet:
        sheet = Sheet(
            "Time per answer, raw profile to cell, and size",
            ("", "1 profile (ms)", f"{BATCH} profiles (ms)", "per profile (ms)", "on disk",
             "weights", "nodes"),
        )  # fmt: skip
        for s in self.speed:
            sheet.add(
                s.label, number(1e3 * s.one), number(1e3 * s.batch), number(1e3 * s.batch / BATCH),
                decimal(s.bytes), f"{s.weights:,}" if s.weights else "",
                f"{s.nodes:,}" if s.nodes else "",
            )  # fmt: skip
        return sheet

    def _aims(self) -> Sheet:
        sheet = Sheet("Bars", ("", "bar", "found", ""))
        for bar in self.bars():
            limit = "not known" if bar.limit is None else f"≤ {number(bar.limit)}"
            sheet.add(bar.what, limit, number(bar.found) or "not known", bar.verdict)
        return sheet

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite is null."""
        values = {
            **self.facts,
            "test_sets": {
                test: {"title": self.titles[test],
                       "models": {key: asdict(score) for key, score in scores.items()}}
                for test, scores in self.scores.items()
            },
            "not_trained": [
                {"model": model, "split": split, "command": command}
                for model, split, command in self.missing
            ],
            "library_proven": self.proven,
            "speed": [asdict(one) for one in self.speed],
            "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in self.bars()],
            "commands": self.commands,
        }  # fmt: skip
        return dict(_finite(values))

    def metrics(self) -> dict[str, Any]:
        """Return what was measured as nested numbers."""
        tests: dict[str, Any] = {}
        for test, scores in self.scores.items():
            tests[test] = {}
            for key, score in scores.items():
                given = {f"{g}_true_system": v for g, v in (score.true_system or {}).items()}
                tests[test][key] = {**score.groups, **given}
        for one in self.speed:
            tests.setdefault("speed", {})[one.model] = {
                "seconds_1": one.one, f"seconds_{BATCH}": one.batch, "bytes": one.bytes,
                "weights": one.weights, "nodes": one.nodes,
            }  # fmt: skip
        return {"evaluate": tests}

    def markdown(self, targets: Targets) -> str:
        """Return the tables with all that is needed to make them again."""
        facts = self.facts
        lines = ["# Results", "", f"- date: {facts['date']}", f"- commit: {facts['commit']}"]
        for name in ("data", "offgrid"):
            if facts[name]:
                one = facts[name]
                lines.append(
                    f"- {name}: `{one['tag']}`, snapshot {one['snapshot_id']}, content "
                    f"{one['content_hash'][:12]}"
                )
        lines.append(
            f"- intervals: 95 %, bootstrap over samples, {facts['bootstrap']} resamples, in the "
            f"power of ten of the number before them"
        )
        lines += [
            f"- {EQUATION_1}",
            "",
            "```",
            *dict.fromkeys(self.commands.values()),
            facts["command"],
            "```",
        ]
        return "\n".join([*lines, "", *(sheet.markdown() for sheet in self.sheets(targets))])


@dataclass(frozen=True)
class Bar:
    """Something aimed at: what, the largest value that meets it, and the value found."""

    what: str
    limit: float | None
    found: float | None

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.limit is None or self.found is None:
            return "not measured"
        return "met" if self.found <= self.limit else "missed"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
