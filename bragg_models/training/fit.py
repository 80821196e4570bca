"""The training loop: a generator of epoch results, which can continue from a checkpoint."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bragg_models.data.batches import Balance, Batch, BatchSettings, shuffled
from bragg_models.metrics import summary
from bragg_models.training.inference import evaluate
from bragg_models.training.settings import (
    Criteria,
    EpochResult,
    Execution,
    FitSettings,
    LabelledBatch,
    Step,
    TrainingData,
    Validation,
    multitask_objective,
)

_METADATA = "about"  # its name in checkpoints


class TrainingError(RuntimeError):
    """A training that cannot continue."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, or of another training."""


def fit(
    network: nn.Module,
    data: TrainingData,
    settings: FitSettings,
    *,
    seed: int,
    criteria: Criteria = Criteria(),  # noqa: B008 - frozen
    execution: Execution = Execution(),  # noqa: B008 - frozen
) -> Iterator[EpochResult]:
    """Train a network, yielding after every epoch.

    When the generator ends, or is closed early, the network has the best weights so far; parameters
    that require no gradient are not changed. On one CPU, with the same number of threads, the same
    seed (of the order of the samples and of random numbers within the network, with streams for
    each epoch) gives the same weights to the last bit. Raises `TrainingError` if the loss is no
    longer a finite number, or nothing can be trained, and `CheckpointError` if the checkpoint is
    damaged or of another training.
    """
    training = _Training(network, data, settings, seed, criteria, execution)
    clock, checkpoint = execution.clock, execution.checkpoint
    history: list[EpochResult] = []
    best, best_score = _weights(network), math.inf
    identity = _identity(network, data, settings, seed)
    if checkpoint is not None and checkpoint.exists():
        best, metadata = _restore(checkpoint, identity, network, training.optimizer)
        history = [replace(EpochResult(**r), restored=True) for r in metadata["history"]]
        training.resume(history, float(metadata["elapsed"]))
        scores = (criteria.score(r.validation) for r in history if r.is_best)
        best_score = min(scores, default=math.inf)
    try:
        yield from history
        for epoch in range(len(history) + 1, settings.epochs + 1):
            if history and training.out_of_time:
                return
            start = clock()
            means = training.run_epoch(epoch)
            validation = training.validate(network)
            is_best = bool(criteria.score(validation) < best_score)
            if is_best:
                best, best_score = _weights(network), criteria.score(validation)
            result = EpochResult(
                epoch=epoch,
                step=training.steps_done,
                training=means,
                validation=validation,
                is_best=is_best,
                seconds=clock() - start,
                out_of_time=training.out_of_time,
            )
            history.append(result)
            if checkpoint is not None:
                metadata = {
                    "of": identity,
                    "elapsed": clock() - training.began,
                    "history": [asdict(result) for result in history],
                }
                _save(checkpoint, metadata, network, best, training.optimizer)
            yield result
    finally:
        network.load_state_dict(best)


class _Training:
    """A network in training: optimizer, encoded labels, and progress."""

    def __init__(
        self,
        network: nn.Module,
        data: TrainingData,
        settings: FitSettings,
        seed: int,
        criteria: Criteria,
        execution: Execution,
    ) -> None:
        self.network, self.data, self.settings, self.seed = network, data, settings, seed
        self.execution = execution
        self.device = execution.device or torch.device("cpu")
        network.to(self.device)
        self.optimizer = _optimizer(network, settings)
        self.objective = criteria.objective or partial(
            multitask_objective, regression_weight=settings.regression_weight
        )
        self.validate = criteria.validate or self._validate
        samples = data.samples
        self.values, self.free = data.targets.encode(samples.phase, samples.cells)
        self.weight = samples.weight
        if self.weight is not None:
            self.weight = (self.weight / self.weight[data.training].mean()).astype(np.float32)
        self.balance = None
        if settings.balance is not None:
            counts = np.bincount(samples.phase[data.training], minlength=len(data.targets.names))
            shares = np.where(counts > 0, counts.astype(float) ** settings.balance, 0.0)
            self.balance = Balance(samples.phase, shares.tolist())
        count = settings.samples_per_epoch or int(data.training.sum())
        self.steps_per_epoch = max(1, math.ceil(count / settings.batch_size))
        self.steps_done, self.elapsed = 0, 0.0
        self.began = execution.clock()
        self.limit = math.inf if execution.max_seconds is None else execution.max_seconds

    @property
    def out_of_time(self) -> bool:
        return self.elapsed >= self.limit

    def resume(self, history: list[EpochResult], elapsed: float) -> None:
        self.steps_done = history[-1].step if history else 0
        self.elapsed = elapsed
        self.began = self.execution.clock() - elapsed

    def _validate(self, network: nn.Module) -> Validation:
        data = self.data
        total = evaluate(network, data.targets, data.samples, data.validation, self.device)
        return summary(data.targets, total)

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Train for an epoch; return the means of the losses, and the last learning rate."""
        settings, data = self.settings, self.data
        self.network.train()
        stream = np.random.SeedSequence([self.seed, epoch, 1]).generate_state(2, np.uint64)
        generator = torch.Generator().manual_seed(int(stream[0] >> np.uint64(1)))
        order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        sizes = BatchSettings(
            settings.batch_size, settings.buffer_chunks, settings.samples_per_epoch
        )
        batches = shuffled(data.samples.profiles, data.training, sizes, order, self.balance)
        devices = [self.device] if self.device.type == "cuda" else []
        sums: dict[str, float] = {}
        step, rate = 0, settings.learning_rate
        with closing(batches), torch.random.fork_rng(devices):
            torch.manual_seed(int(stream[1] >> np.uint64(1)))  # of dropout and similar layers
            for step, batch in enumerate(batches, start=1):
                all_steps = self.steps_per_epoch * settings.epochs
                progress = max(self.steps_done / all_steps, self.elapsed / self.limit)
                rate = _learning_rate(settings, min(progress, 1.0), epoch)
                losses = self._step(batch, generator, rate)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value
                if not math.isfinite(losses["loss"]):
                    raise TrainingError(
                        f"The loss is {losses['loss']} at step {step} of epoch {epoch}. Use a "
                        f"smaller learning rate than {settings.learning_rate:g}."
                    )
                if self.execution.on_step is not None:
                    count, loss = len(batch.rows), losses["loss"]
                    self.execution.on_step(Step(epoch, step, self.steps_per_epoch, count, loss))
                self.elapsed = self.execution.clock() - self.began
                if self.out_of_time:
                    break
        means = {name: total / max(step, 1) for name, total in sums.items()}
        return {**means, "learning_rate": rate}

    def _step(self, batch: Batch, generator: torch.Generator, rate: float) -> dict[str, float]:
        rows, phase = batch.rows, self.data.samples.phase[batch.rows].astype(np.int64)
        arrays = batch.profiles, phase, self.values[rows], self.free[rows]
        profiles, codes, values, free = (torch.from_numpy(a).to(self.device) for a in arrays)
        weight = None
        if self.weight is not None:
            weight = torch.from_numpy(self.weight[rows]).to(self.device)
        labelled = LabelledBatch(profiles, codes, values, free, rows, weight)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        half = self.settings.mixed_precision and _computes_bfloat16(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            losses = self.objective(self.network, labelled, generator)
        self.optimizer.zero_grad()
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps_done += 1
        return {name: value.item() for name, value in losses.items()}


def _optimizer(network: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("The network has no weight to train: all are frozen. Unfreeze some.")
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, rate, settings.momentum, weight_decay=decay, fused=True)
    return torch.optim.Adam(trained, rate, weight_decay=decay, fused=True)


def _learning_rate(settings: FitSettings, progress: float, epoch: int) -> float:
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.schedule == "steps":
        passed = sum(milestone < epoch for milestone in settings.milestones)
        return settings.learning_rate * settings.decay**passed
    rise = 0.1
    if progress < rise:
        return settings.learning_rate * max(progress, 1e-3) / rise
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def _computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, which is slow if emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _identity(
    network: nn.Module, data: TrainingData, settings: FitSettings, seed: int
) -> dict[str, str]:
    """Return what a training must have in common with the one that it continues."""
    weights = [(n, list(v.shape), str(v.dtype)) for n, v in network.state_dict().items()]
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    labels = hashlib.sha256()
    samples = data.samples
    weight = () if samples.weight is None else (samples.weight,)
    for values in (samples.phase, samples.cells, data.training, data.validation, *weight):
        labels.update(np.ascontiguousarray(values).data)
    return {
        "settings": repr(settings),
        "seed": str(seed),
        "network": hashlib.sha256(repr((weights, trained)).encode()).hexdigest(),
        "samples": labels.hexdigest(),
    }


def _save(
    path: Path,
    metadata: Mapping[str, object],
    network: nn.Module,
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint atomically: the file is always the old or the new one."""
    tensors = {f"now/{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{key}/{name}"] = value
    partial = path.with_name(f"{path.name}.partial")
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        partial,
        {_METADATA: json.dumps(metadata, default=float)},
    )
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _restore(
    path: Path, identity: Mapping[str, str], network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Set the weights and the optimizer's state; return the best weights and the metadata."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()[_METADATA])
            differing = [name for name in identity if metadata["of"].get(name) != identity[name]]
            if differing:
                raise CheckpointError(
                    f"The checkpoint {path} is of another training, which differs in "
                    f"{' and '.join(differing)}. Continue it as it was started, or delete it."
                )
            state = network.state_dict()
            best = {name: file.get_tensor(f"best/{name}") for name in state}
            network.load_state_dict({name: file.get_tensor(f"now/{name}") for name in state})
            parameters = dict(network.named_parameters())
            for entry in file.keys():  # noqa: SIM118 - no mapping
                key, _, name = entry.partition("/")
                if key not in ("now", "best"):
                    value, parameter = file.get_tensor(entry), parameters[name]
                    # In the memory layout of the weights, which the optimizer expects.
                    like = parameter if value.shape == parameter.shape else value
                    empty = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
                    optimizer.state[parameter][key] = empty.detach().copy_(value)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}). Delete it to start again."
        ) from error
    return best, metadata
