"""Models trained through the command line on the small data set: shared by test modules.

The presets are shortened: an epoch is one turn through the samples, not forty, and our network's
proposal network gets a few: the physics of the network does the rest.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from bragg_data.store.repository import Store
from bragg_models.predictors import Predictor
from catalog import registry
from catalog.registry import ModelVersion
from catalog.tracking import Tracking
from pipelines import train
from pipelines.registry.registration import load_version
from pipelines.training import held_out
from pipelines.training.presets import DEFAULT_PRESETS, PRESETS, Preset, Presets

torch.set_num_threads(1)  # on small arrays more threads only wait for each other

PROPOSAL_EPOCHS = 3
PRINTED = "output.txt"


def short_presets(**changes: Preset) -> Presets:
    """Return short presets named quick; changes replace those of some models."""
    networks = {}
    for name, presets in PRESETS.items():
        quick = presets["quick"]
        epochs = {"guided": PROPOSAL_EPOCHS, "robust": 12}.get(name, 1)
        stages = {stage: replace(s, epochs=epochs) for stage, s in quick.stages.items()}
        ours = name in ("guided", "robust")
        network = {"draws": 256, "starts": 8} if ours else quick.network
        quick = replace(quick, stages=stages, max_passes=1, network=network, max_seconds=None)
        if name == "robust":
            quick = replace(quick, training_draws=900, calibration_draws=100)
        networks[name] = {**presets, "quick": changes.get(name, quick)}
    return Presets(networks, test_draws=20, comparison_draws=2, foreign_draws=10)


def train_here(*arguments: str, presets: Presets = DEFAULT_PRESETS, figures: bool = False) -> str:
    """Train by the command line in this process, and return what it prints.

    Figures, which take longer to draw than small networks to train, are drawn where asked for.
    """
    with nullcontext() if figures else patch.object(held_out, "_log_figures"):
        result = CliRunner().invoke(train.app, arguments, obj=presets, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@dataclass
class Bench:
    """A store, a tracking database, and a directory for the state."""

    store: Store
    tracking: Tracking
    state: Path
    presets: Presets = field(default_factory=short_presets)
    draws: bool = False  # figures

    @property
    def places(self) -> list[str]:
        return ["--tracking", self.tracking.uri, "--state", str(self.state)]

    def __call__(self, *arguments: str) -> str:
        where = [] if "--resume" in arguments else ["--store", self.store.uri, "--workers", "1"]
        if "--data" not in arguments and where:
            where += ["--data", "small-v1"]
        words = *arguments, *where, *self.places
        return train_here(*words, presets=self.presets, figures=self.draws)

    def versions(self, model: str) -> list[ModelVersion]:
        """The newest first."""
        versions = registry.versions(self.tracking, registry.registered_name("small", model))
        return [version for version in versions if version.tags["model"] == model]

    def predictor(self, model: str) -> Predictor:
        return load_version(self.tracking.uri, self.versions(model)[0])

    def metrics(self, model: str, number: int = 0) -> dict[str, float]:
        """What does not depend on the clock."""
        run = self.tracking.client.get_run(self.versions(model)[number].run_id)
        metrics = run.data.metrics.items()
        return {
            k: v for k, v in metrics if not k.endswith("seconds") and not k.startswith("system/")
        }

    def figures(self, model: str) -> set[str]:
        run = self.versions(model)[0].run_id
        files = self.tracking.client.list_artifacts(run, "figures")
        return {file.path.removeprefix("figures/") for file in files}


def train_multitask(store: Store, tracking: Tracking) -> None:
    """Train and register a multitask network, one epoch."""
    arguments = ["--store", store.uri, "--tracking", tracking.uri, "--epochs", "1"]
    state = Path(tracking.uri.removeprefix("sqlite:///")).parent / "state"
    train_here(*arguments, "--state", str(state))


def train_all(store: Store, tracking: Tracking, directory: Path) -> None:
    """Train and register all models, and write what was printed.

    Their figures are made, and empty files: to render them takes longer than to train, and is
    tested in test_figures.py.
    """
    bench = Bench(store, tracking, directory / "state", draws=True)
    with patch.object(Figure, "savefig", lambda _figure, path, **_: Path(path).touch()):
        output = bench("all", "multitask-integer")
    (directory / PRINTED).write_text(output, encoding="utf-8")
