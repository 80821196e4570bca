"""The result of an evaluation: scores and costs as tables, JSON, metrics and Markdown."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.filesize import decimal

from bragg_data.arrays import Floats32
from bragg_models.targets import Targets
from pipelines.cli.style import finite_or_null
from pipelines.evaluation import names as known
from pipelines.evaluation import tables
from pipelines.evaluation.scoring import EvaluatedModel
from pipelines.evaluation.tables import ModelScores, ResultTable, number

BATCH = 512  # profiles of the large timed batch
_SECONDS = 1.0  # longest time of one timing
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


def speed_of(model: EvaluatedModel, profiles: Floats32) -> Speed:
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
    """The result of an evaluation."""

    # JSON values: date, commit, campaign, data, offgrid, bootstrap, limit, command.
    facts: Mapping[str, Any]
    targets: Targets
    titles: Mapping[str, str]  # by the name of the test set
    missing: list[dict[str, str]]  # models that are not registered: model, split and command
    # By the name of the test set, and the key of the model.
    scores: dict[str, dict[str, ModelScores]] = field(default_factory=dict)
    # By the name of the test set: share of the samples for which the library match is proven to be
    # that of a search through all patterns.
    proven: dict[str, float] = field(default_factory=dict)
    speed: list[Speed] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)  # that trained the models, by address
    run_id: str = ""

    def tables(self) -> list[ResultTable]:
        """Return everything as tables."""
        of_tests = [table for test in self.scores for table in self._test_tables(test)]
        return [*of_tests, *self._ablation(), self._costs()]

    def _test_tables(self, test: str) -> list[ResultTable]:
        baselines, conditional, integrated = tables.by_table(self.scores[test].values())
        split = "blocked" if test == "blocked" else "random"
        with_paper = self.facts["campaign"] == known.PAPER_CAMPAIGN and test == "random"
        paper = tables.PaperTables(self.titles[test], self.targets, with_paper)
        shown = []
        for make, names, models in (
            (paper.class_conditional, (known.CLASSIFIER, *known.CLASS_CONDITIONAL), conditional),
            (paper.integrated, known.INTEGRATED, integrated),
        ):
            missing = [m["model"] for m in self.missing if m["split"] == split]
            missing = [model for model in missing if model in names]
            if not missing and not models:
                continue  # nothing but baselines
            labels = [known.LABELS.get(model, model) for model in missing]
            table = make([*baselines, *models], labels)
            if missing:
                table.notes.append(f"Not trained: {known.train_command(' '.join(missing), split)}")
            if test in self.proven:
                table.notes.append(
                    f"The library match is proven to be the exact one for "
                    f"{self.proven[test]:.1%} of the samples."
                )
            shown.append(table)
        return shown

    def _ablation(self) -> list[ResultTable]:
        table = ResultTable(
            "Ablation: cross entropy + MSE against the class as an integer",
            ("", "wrong", "mse_paper", "wrong, integer", "mse_paper, integer"),
        )
        for test, scores in self.scores.items():
            if known.INTEGER in scores:
                values: list[float | None] = []
                for model in ("multitask", known.INTEGER):
                    of_model = scores[model].groups["all"] if model in scores else {}
                    values += of_model.get("wrong"), of_model.get("mse_paper")
                table.add(test, *map(number, values))
        return [table] if table.rows else []

    def _costs(self) -> ResultTable:
        headings = ("1 profile (ms)", f"{BATCH} profiles (ms)", "per profile (ms)", "on disk")
        table = ResultTable(
            "Time per prediction, raw profile to cell, and size",
            ("", *headings, "weights", "nodes"),
        )
        for s in self.speed:
            times = (number(1e3 * t) for t in (s.single, s.batch, s.batch / BATCH))
            counts = (f"{count:,}" if count else "" for count in (s.weights, s.nodes))
            table.add(s.label, *times, decimal(s.bytes), *counts)
        return table

    def to_json(self) -> Mapping[str, Any]:
        """Return plain JSON values; numbers that are not finite are null."""
        test_sets = {
            test: {"title": self.titles[test], "models": {k: asdict(s) for k, s in scores.items()}}
            for test, scores in self.scores.items()
        }
        values = {
            **self.facts,
            "test_sets": test_sets,
            "not_trained": self.missing,
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
        lines = ["# Results", "", *(f"- {name}: {facts[name]}" for name in ("date", "commit"))]
        for name in ("data", "offgrid"):
            if data := facts[name]:
                content = data["content_hash"][:12]
                snapshot = f"snapshot {data['snapshot_id']}, content {content}"
                lines.append(f"- {name}: `{data['tag']}`, {snapshot}")
        lines += [
            f"- intervals: 95 %, bootstrap over samples, {facts['bootstrap']} resamples, in the "
            f"power of ten of the number before them",
            f"- {known.EQUATION_1}",
            "",
            "```",
            *dict.fromkeys(self.commands.values()),
            facts["command"],
            "```",
        ]
        return "\n".join([*lines, "", *(table.markdown() for table in self.tables())])
