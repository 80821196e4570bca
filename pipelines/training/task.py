"""What to train and where: plain values that are saved, so that a training can be resumed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import xarray as xr

from bragg_data.store.repository import Store
from catalog.tracking import Tracking
from pipelines.cli.options import ClusterOptions
from pipelines.training.names import (
    ALL,
    DEFAULT_STATE,
    EXTRA_DATA_MODELS,
    FORESTS,
    TRAINABLE,
    TrainError,
)
from pipelines.training.presets import DEFAULT_PRESETS, Presets

_FILE = "task.json"
_OLD_FILE = "order.json"  # deprecated: name of the file in the version before
_DROPPED = ("forest_method", "how")  # deprecated: what saved tasks of earlier versions have
_OLD_CHECKPOINT = "glance.safetensors"  # deprecated: name of the proposal network's checkpoint


@dataclass(frozen=True)
class TrainingTask:
    """What to train, in plain values; a resumed training starts from these again."""

    model: str = "multitask"
    preset: str = "quick"
    seed: int = 0
    device: str = "auto"
    split: str = "random"  # or "blocked"
    extra_data: tuple[str, ...] = ()  # tags of further data sets to train on
    epochs: int | None = None  # replaces the preset's, as the next
    max_seconds: float | None = None
    classifier: str | None = None  # address of that which a class-conditional model builds on
    parent: str | None = None  # address, or version, of the model whose weights it starts from
    extra_shares: tuple[float, ...] = ()  # of the loss that extra data have; none: by their sizes

    def check(self) -> None:
        """Refuse, with a `TrainError`, what cannot be trained."""
        if self.split not in ("random", "blocked"):
            raise TrainError(f"There is no split '{self.split}'. Choose random or blocked.")
        if self.extra_data and self.model not in EXTRA_DATA_MODELS:
            raise TrainError(
                f"{self.model} cannot be trained on further data sets (--extra-data "
                f"{' '.join(self.extra_data)}). These models can: {', '.join(EXTRA_DATA_MODELS)}."
            )
        shares, tags = self.extra_shares, self.extra_data
        if shares and (len(shares) != len(tags) or min(shares) <= 0 or sum(shares) >= 1):
            raise TrainError(
                f"{len(tags)} of --extra-data need as many of --extra-share, above 0 and together "
                f"below 1, not {', '.join(f'{share:g}' for share in shares)}."
            )
        if self.parent and self.model in (*FORESTS, "search"):
            reason = "its trees are grown" if self.model in FORESTS else "it has no weights"
            raise TrainError(
                f"{self.model} cannot continue from {self.parent}: {reason}. Train it without "
                f"--continue-from."
            )


@dataclass(frozen=True)
class TrainingEnvironment:
    """Where a training logs, stores its state, and computes."""

    tracking: Tracking
    state: Path = DEFAULT_STATE  # of checkpoints; can be deleted when no training runs
    cache: bool = True  # whether prepared profiles are cached there
    # Where forests are grown and simulated measurements are drawn.
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    presets: Presets = DEFAULT_PRESETS

    @property
    def cache_directory(self) -> Path | None:
        """Directory for prepared profiles; None where they are not cached."""
        return self.state / "cache" if self.cache else None

    def run_state(self, run_id: str) -> Path:
        """Return the directory of an unfinished run."""
        return self.state / "runs" / run_id


def tasks_for(models: Sequence[str], common: TrainingTask, presets: Presets) -> list[TrainingTask]:
    """Return a task for each model, each once; ``all`` stands for the paper's and the guided one.

    Raises `TrainError` if a model is unknown or cannot be trained.
    """
    names: list[str] = []
    for model in models:
        if model != "all" and model not in TRAINABLE:
            raise TrainError(
                f"There is no model '{model}'. Choose among {', '.join(TRAINABLE)}, or all."
            )
        names += ALL if model == "all" else (model,)
    tasks = [replace(common, model=name) for name in dict.fromkeys(names)]
    for task in tasks:
        task.check()
        presets.check(task.model, task.preset)
    return tasks


def save_task(directory: Path, task: TrainingTask, dataset: xr.Dataset) -> None:
    """Write what a resumed training needs into the directory of its run."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {"task": asdict(task), "store": dataset.attrs["uri"], "tag": dataset.attrs["tag"]}
    (directory / _FILE).write_text(json.dumps(values), encoding="utf-8")


def load_task(environment: TrainingEnvironment, run_id: str) -> tuple[TrainingTask, xr.Dataset]:
    """Return the task of an interrupted run, and its data set.

    Raises `TrainError` if there is no saved task here, or the file is damaged.
    """
    directory = environment.run_state(run_id)
    path, old = directory / _FILE, directory / _OLD_FILE
    if not path.exists() and old.exists():
        path, checkpoint = old, directory / _OLD_CHECKPOINT
        if checkpoint.exists():
            checkpoint.rename(directory / "proposal.safetensors")
    if not path.exists():
        unfinished = sorted(p.name for p in (environment.state / "runs").glob("*"))
        which = f"Unfinished runs: {', '.join(unfinished)}." if unfinished else "There is none."
        raise TrainError(
            f"Run '{run_id}' has no checkpoint in {environment.state}. {which} If it was trained "
            f"with another directory, name that with --state."
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        values = dict(saved["order" if path == old else "task"])
        values = {key: value for key, value in values.items() if key not in _DROPPED}
        extra = values.pop("beside", values.get("extra_data"))  # deprecated: beside
        shares = tuple(values.get("extra_shares") or ())
        task = TrainingTask(**{**values, "extra_data": tuple(extra), "extra_shares": shares})
        return task, Store(saved["store"]).open(saved["tag"])
    except (KeyError, TypeError, ValueError) as error:
        raise TrainError(f"{path} is damaged ({error}): train the model again.") from error
