"""Measure how many patterns a model needs, drawn at random or chosen where the model is weak.

python benchmarks/grow.py run multitask [--split blocked] [--seeds 5]   # resumes from its journal
python benchmarks/grow.py report                                        # tables and a figure

As with bragg grow, a data set in memory grows by a rule, and as with bragg train --continue-from,
the training goes on from the last weights, for as many profiles in each round.
"""

import copy
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import t as student
from typer import Argument, Option

from bragg_data.arrays import Floats32, Integers8
from bragg_data.campaign import Campaign, Samples, load_campaign
from bragg_data.model_provenance import ModelProvenance
from bragg_data.simulation import kinematic
from bragg_data.splits import Part, blocked_split, extra_data_split
from bragg_data.store.schema import labelled
from bragg_models.data.batches import Profiles
from bragg_models.metrics import squared_errors
from bragg_models.predictors import Predictor
from bragg_models.targets import targets_of
from bragg_models.training.inference import Samples as Stored
from catalog.tracking import Tracking
from pipelines.simulation.growth import GrowthRequest, grown_campaign
from pipelines.simulation.simulators import recipe_of, simulate_samples
from pipelines.training import recipes
from pipelines.training.presets import PRESETS, Preset
from pipelines.training.stage import FittedModel, TrainingContext
from pipelines.training.task import TrainingEnvironment, TrainingTask

CAMPAIGN, OFF_GRID = "batio3-nomad", "batio3-offgrid"
RULES = ("random", "uncertain", "wrong")
JOURNAL = Path("data/benchmarks/grow.jsonl")
TESTED = 2000  # samples of each test set
PAPER = 1.90e-5  # the paper's multitask network, Å² + rad²
# Ours on the full data (docs/results.md), by model and test set.
FULL = {
    "multitask": {"random": 3.88e-6, "blocked": 6.47e-4, "off-grid": 6.49e-4},
    "proposal": {"random": 6.03e-7},
}
STEPS = {"multitask": 30_000, "proposal": 60_000}  # usual profiles of a round
COLORS = {"random": "0.35", "uncertain": "#0072B2", "wrong": "#D55E00"}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in memory: its labels as of a store, its patterns, and what may be trained on."""

    dataset: xr.Dataset
    labels: Samples
    patterns: Floats32
    usable: np.ndarray  # of a blocked split only samples outside of the boxes that are held out

    def grown(self, request: GrowthRequest, predictor: Predictor, closed: "Closed") -> "Data":
        """Return the data set with the samples that a request adds."""
        campaign = grown_campaign(self.dataset, request, predictor)
        labels = campaign.samples
        later = labels[slice(len(self.labels), None)]
        patterns = simulate_samples(recipe_of(campaign), later)
        usable = np.append(self.usable, closed.usable(later))
        return Data(
            in_memory(campaign, labels), labels, np.concatenate([self.patterns, patterns]), usable
        )


@dataclass(frozen=True, eq=False)
class Closed:
    """The samples of the whole campaign, and which of them a blocked split holds out."""

    labels: Samples
    part: Integers8 | None  # None where nothing is held out but the test samples

    def usable(self, samples: Samples) -> np.ndarray:
        if self.part is None:
            return np.ones(len(samples), np.bool_)
        all_ = self.labels
        systems, cells = samples.crystal_system, samples.cells
        of_each = extra_data_split(all_.crystal_system, all_.cells, self.part, systems, cells)
        return np.asarray(of_each == Part.training)


def in_memory(campaign: Campaign, labels: Samples) -> xr.Dataset:
    dataset = labelled(campaign, labels, "kinematic", kinematic.VERSION, "")
    return dataset.assign_attrs(tag=f"{campaign.name}-{len(labels)}", content_hash="0" * 64, uri="")


@cache
def campaign_of_seed(seed: int) -> Campaign:
    campaign = load_campaign(CAMPAIGN)
    old = f"seed = {campaign.definition['seed']}"
    return replace(campaign, toml=campaign.toml.replace(old, f"seed = {seed}"))


def first_data(split: str, seed: int, count: int) -> tuple[Data, Closed, dict[str, tuple]]:
    """Return the first samples, what is held out, and the test sets: labels and patterns."""
    campaign = campaign_of_seed(seed)
    everything, recipe = campaign.samples, recipe_of(campaign)
    part = None
    if split == "blocked":
        part = blocked_split(everything.crystal_system, everything.cells, seed=seed)
    closed = Closed(everything, part)
    rows = np.arange(len(everything)) if part is None else np.flatnonzero(part == Part.training)
    tested = np.arange(len(everything)) if part is None else np.flatnonzero(part == Part.test)
    first, tests = everything[rows[:count]], {split: everything[tested[-TESTED:]]}
    if split == "random":
        tests["off-grid"] = load_campaign(OFF_GRID).samples[:TESTED]
    data = Data(
        in_memory(campaign, first), first, simulate_samples(recipe, first), np.ones(count, np.bool_)
    )
    return data, closed, {n: (s, simulate_samples(recipe, s)) for n, s in tests.items()}


def preset_of(model: str, steps: int) -> Preset:
    """Return the quick preset with one epoch of as many profiles in each stage."""
    preset = PRESETS["guided" if model == "proposal" else model]["quick"]
    stages = {
        name: replace(settings, epochs=1, samples_per_epoch=steps)
        for name, settings in preset.stages.items()
    }
    return replace(preset, stages=stages, max_passes=1_000_000, max_seconds=None)


class Trainer:
    """Trains a model again and again, from its last weights."""

    def __init__(self, model: str, steps: int, seed: int, directory: Path) -> None:
        self.model, self.steps, self.seed, self.directory = model, steps, seed, directory
        self.tracking = Tracking(f"sqlite:///{directory}/mlflow.db")

    def train(self, data: Data, parents: dict[str, Predictor]) -> dict[str, Predictor]:
        """Return the models after a round, by name, given those of the round before."""
        if self.model != "deep":
            return {self.model: self._trained(self.model, data, parents.get(self.model))}
        classifier = self._trained("classifier", data, parents.get("classifier"))
        parent = copy.deepcopy(parents.get("deep"))
        if parent is not None:
            parent.model.classifier.load_state_dict(classifier.model.state_dict())
        deep = self._trained("deep", data, parent, classifier)
        return {"classifier": classifier, "deep": deep}

    def _trained(
        self, model: str, data: Data, parent: Predictor | None, classifier: Predictor | None = None
    ) -> Predictor:
        preset = preset_of(model, self.steps)
        with self._context(data, parent) as context:
            if model == "deep":
                fitted = recipes.train_conditional(context, preset, classifier, "", deep=True)
            elif model == "caenn":
                fitted = recipes.train_caenn(context, preset)
            elif model == "proposal":
                fitted = recipes.train_guided(context, preset)
            else:
                is_classifier = model == "classifier"
                fitted = recipes.train_multitask(context, preset, classifier=is_classifier)
        return self._predictor(fitted, context)

    @contextmanager
    def _context(self, data: Data, parent: Predictor | None) -> Iterator[TrainingContext]:
        labels = data.labels
        # The scale of the outputs is that of the whole campaign.
        everything = campaign_of_seed(0).samples
        phases = campaign_of_seed(0).phases
        targets = targets_of(phases, everything.phase, everything.cells)
        part = np.where(data.usable, Part.training, Part.unused).astype(np.int8)
        part[:20] = Part.validation  # nothing is chosen by them: there is one epoch
        intensity = xr.DataArray(data.patterns, dims=("sample", "tof"))
        stored = Stored(Profiles(intensity, 512, lambda v: v), labels.phase, labels.cells)
        task = TrainingTask(self.model, seed=self.seed)
        with tempfile.TemporaryDirectory(dir=self.directory) as state:
            environment = TrainingEnvironment(self.tracking, Path(state))
            device = torch.device("cpu")
            with self.tracking.run("grow", self.model, {}) as run:
                (environment.run_state(run.id)).mkdir(parents=True)
                dataset = data.dataset.assign(intensity=intensity)
                of_data = dataset, stored, targets, part, ("content",)
                context = TrainingContext(*of_data, device, task, environment, run)
                if parent is not None:
                    context = replace(context, parent=parent, targets=parent.targets)
                yield context

    def _predictor(self, fitted: FittedModel, context: TrainingContext) -> Predictor:
        provenance = ModelProvenance(model=self.model)
        points = context.dataset.sizes["tof"]
        of_model = fitted.kind, fitted.model.eval(), context.targets, fitted.preprocessing
        return Predictor(*of_model, points, provenance)


def predicting(predictor: Predictor) -> Predictor:
    """Return what predicts: of the guided network its proposal network, without the search."""
    if predictor.kind != "guided":
        return predictor
    return replace(predictor, kind="perceptron", model=predictor.model.proposal)


def score(predictor: Predictor, labels: Samples, patterns: Floats32) -> tuple[float, int]:
    parts = [predictor.predict(patterns[low : low + 512]) for low in range(0, len(labels), 512)]
    phase = np.concatenate([part.phase for part in parts])
    cells = np.concatenate([part.cells for part in parts])
    squared, _ = squared_errors(predictor.targets, labels.phase, labels.cells, cells)
    return float(squared.mean()), int((phase != labels.phase).sum())


@app.command()
def run(
    model: Annotated[str, Argument(help="multitask, deep, caenn or proposal.")] = "multitask",
    split: Annotated[str, Option(help="random (also scored off the grid) or blocked.")] = "random",
    seeds: Annotated[int, Option(min=1, help="How many seeds.")] = 5,
    rules: Annotated[str, Option(help="Rules of growth, by commas.")] = ",".join(RULES),
    first: Annotated[int, Option(min=64, help="Samples before the first growth.")] = 1000,
    last: Annotated[int, Option(help="Samples at the end.")] = 16_000,
    steps: Annotated[int, Option(help="Profiles that each round trains on.")] = 30_000,
    factor: Annotated[int, Option(min=2, help="By which each growth multiplies the samples.")] = 2,
    threads: Annotated[int, Option(min=1, help="Threads of torch.")] = 1,
    journal: Annotated[Path, Option(help="JSON lines.")] = JOURNAL,
) -> None:
    """Measure, and append to the journal; what it has already is left out."""
    torch.set_num_threads(threads)
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = read(journal)
    settings = {"model": model, "split": split, "steps": steps, "factor": factor}
    finished = {
        (row["seed"], row["where"])
        for row in done
        if settings.items() <= row.items() and row["samples"] == last
    }
    for seed in range(seeds):
        missing = [rule for rule in rules.split(",") if (seed, rule) not in finished]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as directory:
            trainer = Trainer(model, steps, seed, Path(directory))
            begun, closed, tests = first_data(split, seed, first)
            models = trainer.train(begun, {})
            for rule in missing:
                rows, of_rule, data = [], models, begun
                while True:
                    began = time.perf_counter()
                    predictor = predicting(of_rule[model])
                    scores = {name: score(predictor, *test) for name, test in tests.items()}
                    row = {**settings, "where": rule, "seed": seed, "samples": len(data.labels)}
                    row["used"] = int(data.usable.sum())
                    row["mse"] = {name: mse for name, (mse, _) in scores.items()}
                    row["wrong"] = {name: wrong for name, (_, wrong) in scores.items()}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if len(data.labels) >= last:
                        break
                    count = min((factor - 1) * len(data.labels), last - len(data.labels))
                    data = data.grown(GrowthRequest(rule, count, seed), predictor, closed)
                    of_rule = trainer.train(data, of_rule)
                    print(f"{time.perf_counter() - began:.0f} s", flush=True)
                with journal.open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(row)}\n" for row in rows)


def read(journal: Path) -> list[dict]:
    """Return the rows of a journal, which may not exist."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    return [{"factor": 2, **json.loads(line)} for line in lines]


@app.command()
def report(
    journal: Annotated[Path, Option(help="JSON lines.")] = JOURNAL,
    figure: Annotated[Path, Option(help="PNG.")] = Path("docs/assets/grow.png"),
) -> None:
    """Print tables of errors and of the samples needed, and draw the curves."""
    curves: dict[tuple, dict[int, dict[int, float]]] = {}  # mse by curve, samples and seed
    for row in read(journal):
        for test, mse in row["mse"].items():
            curve = row["model"], test, row["steps"], row["factor"], row["where"]
            curves.setdefault(curve, {}).setdefault(row["samples"], {})[row["seed"]] = mse
    columns = sorted({samples for sizes in curves.values() for samples in sizes})
    print(f"| test, rule, network | seeds | {' | '.join(f'{n:,}' for n in columns)} |")
    print(f"| --- | --- |{' --- |' * len(columns)}")
    for (model, test, steps, factor, rule), sizes in sorted(curves.items(), key=str):
        name = f"{test}, {rule}, {model}, {steps:,} profiles a round, ×{factor}"
        cells = []
        for samples in columns:
            mean, low, high = interval(list(sizes.get(samples, {0: 0.0}).values()))
            spread = f" ({low:.1e} to {high:.1e})" if low < high else ""
            cells.append(f"{mean:.2e}{spread}" if samples in sizes else "")
        print(f"| {name} | {len(sizes[max(sizes)])} | {' | '.join(cells)} |")
    for (*of_curve, rule), sizes in sorted(curves.items()):
        if rule == "random" or (drawn := curves.get((*of_curve, "random"))) is None:
            continue
        print(needed(f"{of_curve}, {rule}", sizes, drawn, FULL[of_curve[0]].get(of_curve[1])))
    drawing(curves).savefig(figure, dpi=110)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of values, and of three or more its 95 % interval (Student's t)."""
    logs = np.log(np.maximum(values, np.finfo(float).tiny))
    half = 0.0
    if len(logs) > 2:
        half = float(student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5)
    mean = float(logs.mean())
    return tuple(float(np.exp(value)) for value in (mean, mean - half, mean + half))


def crossing(sizes: dict[int, dict[int, float]], seed: int, level: float) -> float:
    """Return the samples at which a seed's curve falls to a level, infinite if it does not."""
    points = sorted((n, by_seed[seed]) for n, by_seed in sizes.items() if seed in by_seed)
    for (n, above), (m, below) in pairwise(points):
        if below <= level < above:
            return float(n * (m / n) ** (np.log(above / level) / np.log(above / below)))
    return float("inf")


def needed(name: str, chosen: dict, drawn: dict, full: float | None) -> str:
    """Return how many samples a rule needs for what the largest random data set reaches."""
    largest = max(drawn)
    seeds = sorted(set(drawn[largest]) & set(chosen[max(chosen)]))
    counts = [crossing(chosen, seed, drawn[largest][seed]) for seed in seeds]
    text = f"{name}, {len(seeds)} seeds, of {largest:,} random ones"
    text += ": {:.1%} ({:.1%} to {:.1%})".format(*interval([c / largest for c in counts]))
    if full is not None:
        for rule, sizes in (("chosen", chosen), ("random", drawn)):
            counts = [crossing(sizes, seed, full) for seed in seeds]
            reached = "more than there are"
            if np.isfinite(counts).all():
                reached = "{:,.0f} ({:,.0f} to {:,.0f})".format(*interval(counts))
            text += f"; {full:.2e} after {reached} {rule} ones"
    return text


def drawing(curves: dict) -> Figure:
    """Draw the error against the number of samples, a panel for each test set."""
    tests = {"random": "random split", "off-grid": "off the grid", "blocked": "blocked split"}
    canvas = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (test, title) in zip(canvas.subplots(1, 3), tests.items(), strict=True):
        for (model, of_test, steps, factor, rule), sizes in sorted(curves.items()):
            if of_test != test or factor != 2:
                continue
            samples = sorted(sizes)
            values = np.array([interval(list(sizes[n].values())) for n in samples]).T
            label = f"{rule}" if model == "multitask" else f"{rule}, proposal network"
            label += f", {steps:,} profiles a round" if steps != STEPS[model] else ""
            style = ":" if model == "proposal" else "-" if steps == STEPS[model] else "--"
            mean, errors = values[0], np.abs(values[1:] - values[0])
            line = {"color": COLORS[rule], "linestyle": style, "marker": "o", "markersize": 4}
            axis.errorbar(samples, mean, errors, label=label, capsize=3, linewidth=1.2, **line)
        full = FULL["multitask"][test]
        axis.axhline(full, color="0.6", linewidth=0.8)
        axis.text(1000, full * 1.08, "multitask, full data", fontsize=8, color="0.4")
        if test == "random":
            axis.axhline(PAPER, color="0.6", linewidth=0.8)
            axis.text(1000, PAPER * 1.08, "multitask of the paper", fontsize=8, color="0.4")
        axis.set(xscale="log", yscale="log", xlabel="simulated patterns", title=title)
        axis.set_xlim(850, 19_000)
        axis.grid(visible=True, which="both", linewidth=0.2)
    canvas.axes[0].set_ylabel("mse_paper / Å² + rad²")
    handles = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(*handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return canvas


if __name__ == "__main__":
    app()
