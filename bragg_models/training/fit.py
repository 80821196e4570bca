"""The fit loop: a generator of epoch results, which a checkpoint lets go on after any end."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bragg_data.errors import first_line
from bragg_models.data.batches import shuffled
from bragg_models.metrics import summary
from bragg_models.targets import Targets
from bragg_models.training.checkpoints import read_about, restore, save
from bragg_models.training.inference import Samples, evaluate


class TrainingError(RuntimeError):
    """A training that cannot go on."""


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained.

    Attributes
    ----------
    epochs, batch_size, learning_rate, weight_decay
        The paper's regressors have 500, 512, 1e-3 and none (section V-B2). Weight decay is the
        L2 regularisation that adds a multiple of each weight to its gradient.
    optimizer, momentum
        ``adam``, or ``sgd`` with this momentum.
    schedule
        ``constant``; ``one_cycle``: a linear rise over the first tenth of the steps, then a
        cosine down to zero; ``steps``: times ``decay`` after each of the ``milestones``.
    milestones, decay
        Numbers of finished epochs, and the factor.
    balance
        Composition of a batch: the share of a phase goes as its number of training samples to
        this power. 0 gives each phase the same share, values between 0 and 1 lift the rare ones;
        None is every sample exactly once per epoch.
    samples_per_epoch
        Where an epoch ends (balanced: after the batch that reaches it); None is after as many
        samples as there are to train on. An epoch reads only the chunks that it needs, other ones
        each time; of fewer samples than it wants it takes another turn.
    buffer_chunks
        Chunks in the shuffle buffer.
    regression_weight
        Weight of the mean squared error of the scaled parameters beside the cross entropy.
    mixed_precision
        Compute the network (not the loss, not the weights) in bfloat16 where the processor or the
        GPU has instructions for it. Answers are always computed in single precision.

    Notes
    -----
    The paper's two ways of balancing: the classifier's batches of 30 of each system are
    ``batch_size=90, balance=0``. That the regressors use "800 cubic samples with replacement in
    every epoch" to balance the classes is read as 800 of each system per epoch:
    ``balance=0, samples_per_epoch=800 * n_phases``.
    """

    epochs: int
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.0
    schedule: Literal["constant", "one_cycle", "steps"] = "constant"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    balance: float | None = None
    samples_per_epoch: int | None = None
    buffer_chunks: int = 32
    regression_weight: float = 1.0
    mixed_precision: bool = True


@dataclass(frozen=True)
class Labelled:
    """A batch as an objective sees it: on the device, n samples.

    Attributes
    ----------
    profiles : shape (n, points), float32
        Prepared.
    phase : shape (n,), int64
        Codes.
    values : shape (n, n_parameters), float32
        Scaled parameters, as by :class:`~bragg_models.targets.Targets`; 0 where not free.
    free : shape (n, n_parameters), bool
        Which parameters are free.
    rows : shape (n,)
        Where the samples are in the data set.
    """

    profiles: Tensor
    phase: Tensor
    values: Tensor
    free: Tensor
    rows: NDArray[np.intp]


Objective = Callable[[nn.Module, Labelled, torch.Generator], dict[str, Tensor]]
"""Named losses of a network on a batch; ``loss`` is minimised, the others are logged beside it.

It is called under autocast; :func:`full_precision` leaves that for the losses. All its own random
draws come from the generator.
"""

Validation = dict[str, dict[str, float]]
"""Scores by group of samples, as those of :func:`~bragg_models.metrics.summary`."""


@dataclass(frozen=True)
class Step:
    """Progress within an epoch, all counted from 1."""

    epoch: int
    step: int
    steps: int
    samples: int
    loss: float


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    Attributes
    ----------
    training
        Means of the objective's losses over the epoch's batches (by default ``loss``,
        ``cross_entropy`` and ``mse`` of scaled parameters), and the last ``learning_rate``.
    validation
        By default the scores of :func:`~bragg_models.metrics.summary`.
    is_best
        Whether these are the best weights so far.
    seconds
        Time that the epoch took, validation included.
    out_of_time
        Whether the time limit ended the training here.
    restored
        Whether it is told from a checkpoint.
    """

    epoch: int
    step: int
    training: dict[str, float]
    validation: Validation
    is_best: bool
    seconds: float
    out_of_time: bool
    restored: bool = False


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by name; ``auto`` is a GPU where there is one.

    Raises
    ------
    TrainingError
        If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise TrainingError(f"Device '{name}' cannot be used: {reason}. Use cpu.") from error
    return device


def full_precision(batch: Labelled) -> torch.autocast:
    """Return the context in which an objective computes its losses in single precision."""
    return torch.autocast(batch.profiles.device.type, enabled=False)


def multitask_objective(regression_weight: float = 1.0) -> Objective:
    """Return the objective of networks that give logits and scaled parameters.

    The cross entropy, and the mean squared error of the free parameters with a weight. If the
    network has a loss of its own (as :meth:`~bragg_models.networks.guided.Guided.own_loss`,
    of parts that only answer after training), that is added.
    """

    def objective(
        network: nn.Module, batch: Labelled, generator: torch.Generator
    ) -> dict[str, Tensor]:
        logits, found = network(batch.profiles)
        with full_precision(batch):
            mask = batch.free.float()
            cross_entropy = nn.functional.cross_entropy(logits.float(), batch.phase)
            squared = ((found.float() - batch.values) ** 2 * mask).sum() / mask.sum()
            loss = cross_entropy + regression_weight * squared
            own_loss = getattr(network, "own_loss", None)
            if own_loss is not None:
                loss = loss + own_loss(batch.profiles, batch.phase, batch.values, generator)
        return {"loss": loss, "cross_entropy": cross_entropy, "mse": squared}

    return objective


def paper_score(validation: Validation) -> float:
    """Return the ``mse_paper`` of all samples."""
    return validation["all"]["mse_paper"]


def fit(
    network: nn.Module,
    targets: Targets,
    samples: Samples,
    training: NDArray[np.bool_],
    validation: NDArray[np.bool_],
    settings: FitSettings,
    *,
    seed: int,
    device: torch.device | None = None,
    max_seconds: float | None = None,
    on_step: Callable[[Step], None] | None = None,
    objective: Objective | None = None,
    validate: Callable[[nn.Module], Validation] | None = None,
    score: Callable[[Validation], float] = paper_score,
    checkpoint: Path | None = None,
) -> Iterator[EpochResult]:
    """Train a network, yielding after every epoch.

    When the generator ends, or is closed early, the network holds the best weights so far. On one
    CPU, with the same number of threads, the same seed gives the same weights to the last bit.

    Parameters
    ----------
    network
        Parameters that require no gradient are left as they are.
    targets
        What the outputs mean.
    samples
        The data set.
    training, validation : shape (n,)
        Which samples to train on, and on which to choose the best weights.
    settings
        How.
    seed
        Of the order of the samples and of draws within the network; each epoch has streams of its
        own.
    device
        Where to compute; the network is moved there.
    max_seconds
        Where to end even if epochs are left. The schedule of the learning rate then follows the
        clock where the clock is ahead of the steps, so that it still comes to its end; the result
        depends on the machine if that happens.
    on_step
        Called after every step.
    objective
        What is minimised; by default :func:`multitask_objective`.
    validate
        Gives the scores of the network as it is; by default those of :func:`evaluate` on the
        validation samples.
    score
        The number of these scores by which the best weights are chosen; lower is better.
    checkpoint
        File that is written after every epoch. If it is there, its epochs are yielded again as
        ``restored``, and the training goes on after them: on a CPU to the very weights that it
        would have come to without interruption.

    Raises
    ------
    TrainingError
        If the loss is no longer a finite number, or nothing can be trained.
    bragg_models.training.checkpoints.CheckpointError
        If the checkpoint is damaged or of another training.
    """
    device = device or torch.device("cpu")
    network.to(device)
    optimizer = _optimizer(network, settings)
    if objective is None:
        objective = multitask_objective(settings.regression_weight)
    if validate is None:

        def validate(network: nn.Module) -> Validation:
            return summary(targets, evaluate(network, targets, samples, validation, device))

    half = settings.mixed_precision and computes_bfloat16(device)
    values, free = targets.encode(samples.phase, samples.cells)
    shares = None
    if settings.balance is not None:
        counts = np.bincount(samples.phase[training], minlength=len(targets.names))
        shares = np.where(counts > 0, counts.astype(float) ** settings.balance, 0.0).tolist()
    count = settings.samples_per_epoch or int(training.sum())
    steps = max(1, math.ceil(count / settings.batch_size))
    history: list[EpochResult] = []
    elapsed = 0.0
    best, best_score = _weights(network), math.inf
    own = _identity(network, samples, training, validation, settings, seed)
    if checkpoint is not None and checkpoint.exists():
        best, about = restore(checkpoint, own, network, optimizer)
        history, elapsed = _history(about), float(about["elapsed"])
        best_score = min((score(r.validation) for r in history if r.is_best), default=math.inf)
    done = history[-1].step if history else 0
    began = time.perf_counter() - elapsed
    limit = math.inf if max_seconds is None else max_seconds
    try:
        yield from history
        for epoch in range(len(history) + 1, settings.epochs + 1):
            if history and elapsed >= limit:
                return
            start = time.perf_counter()
            network.train()
            sums: dict[str, float] = {}
            stream = np.random.SeedSequence([seed, epoch, 1]).generate_state(2, np.uint64)
            draws = torch.Generator().manual_seed(int(stream[0] >> np.uint64(1)))
            batches = shuffled(
                samples.profiles,
                training,
                settings.batch_size,
                np.random.default_rng(np.random.SeedSequence([seed, epoch])),
                phase=samples.phase,
                shares=shares,
                buffer_chunks=settings.buffer_chunks,
                samples=settings.samples_per_epoch,
            )
            step = 0
            rate = settings.learning_rate
            with closing(batches), torch.random.fork_rng(
                [device] if device.type == "cuda" else []
            ):  # fmt: skip
                torch.manual_seed(int(stream[1] >> np.uint64(1)))  # of dropout and the like
                for step, batch in enumerate(batches, start=1):
                    progress = max(done / (steps * settings.epochs), elapsed / limit)
                    rate = _learning_rate(settings, min(progress, 1.0), epoch)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    labelled = Labelled(
                        torch.from_numpy(batch.profiles).to(device),
                        torch.from_numpy(samples.phase[batch.rows].astype(np.int64)).to(device),
                        torch.from_numpy(values[batch.rows]).to(device),
                        torch.from_numpy(free[batch.rows]).to(device),
                        batch.rows,
                    )
                    with torch.autocast(device.type, torch.bfloat16, enabled=half):
                        losses = objective(network, labelled, draws)
                    optimizer.zero_grad()
                    losses["loss"].backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    done += 1
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0.0) + value.item()
                    loss = losses["loss"].item()
                    if not math.isfinite(loss):
                        raise TrainingError(
                            f"The loss is {loss} at step {step} of epoch {epoch}. Use a smaller "
                            f"learning rate than {settings.learning_rate:g}."
                        )
                    if on_step is not None:
                        on_step(Step(epoch, step, steps, len(batch.rows), loss))
                    elapsed = time.perf_counter() - began
                    if elapsed >= limit:
                        break
            scores = validate(network)
            is_best = bool(score(scores) < best_score)
            if is_best:
                best, best_score = _weights(network), score(scores)
            means = {name: total / max(step, 1) for name, total in sums.items()}
            means["learning_rate"] = rate
            history.append(
                EpochResult(
                    epoch, done, means, scores, is_best, time.perf_counter() - start,
                    elapsed >= limit,
                )
            )  # fmt: skip
            if checkpoint is not None:
                about = {
                    "of": own,
                    "elapsed": time.perf_counter() - began,
                    "history": [asdict(result) for result in history],
                }
                save(checkpoint, about, network, best, optimizer)
            yield history[-1]
    finally:
        network.load_state_dict(best)


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16, so that it is fast and not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


def _optimizer(network: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError(
            "The network has no weight to train: all are frozen. Leave some of them free."
        )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            trained,
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return torch.optim.Adam(
        trained, settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )


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


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def read_checkpoint(path: Path) -> list[EpochResult]:
    """Return the results of the epochs that a checkpoint holds.

    Raises
    ------
    bragg_models.training.checkpoints.CheckpointError
        If it is damaged.
    """
    return _history(read_about(path))


def _identity(
    network: nn.Module,
    samples: Samples,
    training: NDArray[np.bool_],
    validation: NDArray[np.bool_],
    settings: FitSettings,
    seed: int,
) -> dict[str, str]:
    """Return what a training must have in common with one that it continues."""
    weights = [(n, list(v.shape), str(v.dtype)) for n, v in network.state_dict().items()]
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    labels = hashlib.sha256()
    for values in (samples.phase, samples.cells, training, validation):
        labels.update(np.ascontiguousarray(values).data)
    return {
        "settings": repr(settings),
        "seed": str(seed),
        "network": hashlib.sha256(repr((weights, trained)).encode()).hexdigest(),
        "samples": labels.hexdigest(),
    }


def _history(about: dict[str, Any]) -> list[EpochResult]:
    return [replace(EpochResult(**result), restored=True) for result in about["history"]]
