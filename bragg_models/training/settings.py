"""Data, objectives, hyperparameters, execution and results of a training."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bragg_data.arrays import Indices, Mask
from bragg_models.targets import Targets
from bragg_models.training.inference import Samples


@dataclass(frozen=True)
class LabelledBatch:
    """A batch of n samples on the device, as an objective receives it."""

    profiles: Tensor  # (n, points), float32, prepared
    phase: Tensor  # (n,), int64
    values: Tensor  # (n, n_parameters), float32: scaled as by Targets; 0 where not free
    free: Tensor  # (n, n_parameters), bool
    rows: Indices  # (n,): row numbers of the samples in the data set
    weight: Tensor | None = None  # (n,) of the samples in the loss, 1 on average; None is 1 for all

    def mean(self, losses: Tensor) -> Tensor:
        """Return the weighted mean over the samples of losses (n,) or (n, m)."""
        if self.weight is not None:
            losses = losses * self.weight.reshape(-1, *[1] * (losses.ndim - 1))
        return losses.mean()

    def squared_error(self, values: Tensor) -> Tensor:
        """Return the weighted mean squared error of values (n, n_parameters) that are free."""
        mask = self.free.float()
        return self.mean((values.float() - self.values) ** 2 * mask) * mask.numel() / mask.sum()


# Named losses of a network on a batch; ``loss`` is minimised, the others are logged. An objective
# is called under autocast, which full_precision disables for the losses. All its random numbers
# come from the generator.
Objective = Callable[[nn.Module, LabelledBatch, torch.Generator], dict[str, Tensor]]

# Scores by group of samples, as those of :func:`~bragg_models.metrics.summary`.
Validation = dict[str, dict[str, float]]


def full_precision(batch: LabelledBatch) -> torch.autocast:
    """Return the context in which an objective computes its losses in single precision."""
    return torch.autocast(batch.profiles.device.type, enabled=False)


def cross_entropies(logits: Tensor, batch: LabelledBatch) -> Tensor:
    """Return the cross entropy of the phase of each sample, (n,), from logits (n, n_phases)."""
    return nn.functional.cross_entropy(logits.float(), batch.phase, reduction="none")


def multitask_objective(
    network: nn.Module, batch: LabelledBatch, _: torch.Generator, *, regression_weight: float = 1.0
) -> dict[str, Tensor]:
    """Return the cross entropy plus the weighted mean squared error of the free parameters.

    Of networks with logits and scaled parameters as outputs.
    """
    logits, values = network(batch.profiles)
    with full_precision(batch):
        cross_entropy = batch.mean(cross_entropies(logits, batch))
        squared = batch.squared_error(values)
        loss = cross_entropy + regression_weight * squared
    return {"loss": loss, "cross_entropy": cross_entropy, "mse": squared}


def _paper_score(validation: Validation) -> float:
    return validation["all"]["mse_paper"]


@dataclass(frozen=True)
class Criteria:
    """What is minimised, and how the best weights are chosen.

    ``validate`` returns scores of the network, by default those of
    :func:`~bragg_models.training.inference.evaluate` on the validation samples; the weights with
    the lowest ``score`` of them, by default ``mse_paper``, are the best.
    """

    objective: Objective | None = None  # by default multitask_objective
    validate: Callable[[nn.Module], Validation] | None = None
    score: Callable[[Validation], float] = _paper_score


@dataclass(frozen=True)
class FitSettings:
    """Hyperparameters of a training.

    The paper's regressors have 500 epochs, batches of 512, a learning rate of 1e-3 and no weight
    decay (section V-B2). The paper's two ways of balancing: the classifier's batches of 30 of each
    system are ``batch_size=90, balance=0``. That the regressors use "800 cubic samples with
    replacement in every epoch" to balance the classes is interpreted as 800 of each system per
    epoch: ``balance=0, samples_per_epoch=800 * n_phases``.
    """

    epochs: int
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0  # L2: a multiple of each weight is added to its gradient
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.0  # of sgd
    # one_cycle: a linear rise over the first tenth of the steps, then a cosine down to zero; steps:
    # times ``decay`` after each of the ``milestones``, numbers of finished epochs.
    schedule: Literal["constant", "one_cycle", "steps"] = "constant"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    # Composition of a batch: the share of a phase is proportional to its number of training samples
    # to this power. 0 gives each phase the same share, values between 0 and 1 raise those of rare
    # phases; None uses every sample exactly once per epoch.
    balance: float | None = None
    # Balanced: rounded up to whole batches; None is the number of training samples. A shorter epoch
    # reads only the chunks that it needs, different ones each time; a longer one repeats samples.
    samples_per_epoch: int | None = None
    buffer_chunks: int = 32  # in the shuffle buffer
    regression_weight: float = 1.0  # of the scaled parameters' squared error; 1 of cross entropy
    # Compute the network (not the loss, not the weights) in bfloat16 where the processor or the GPU
    # has instructions for it. Predictions are always computed in single precision.
    mixed_precision: bool = True


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
    """Result of one epoch."""

    epoch: int
    step: int
    # Means of the objective's losses over the epoch's batches, and the last ``learning_rate``.
    training: dict[str, float]
    validation: Validation
    is_best: bool  # these are the best weights so far
    seconds: float  # validation included
    out_of_time: bool  # the time limit ended the training here
    restored: bool = False  # it was read from a checkpoint


@dataclass(frozen=True)
class TrainingData:
    """n samples, and which of them, (n,), to train on and to choose the best weights on."""

    targets: Targets
    samples: Samples
    training: Mask
    validation: Mask


@dataclass(frozen=True)
class Execution:
    """Where and how long a training runs."""

    device: torch.device | None = None  # the network is moved there; by default the CPU
    # The schedule of the learning rate follows the clock where the clock is ahead of the steps, so
    # that it is completed; in that case the result depends on the machine.
    max_seconds: float | None = None
    # Written after every epoch. If it exists, its epochs are yielded again as ``restored``, and the
    # training continues after them: on a CPU with exactly the weights of an uninterrupted training.
    checkpoint: Path | None = None
    on_step: Callable[[Step], None] | None = None
    clock: Callable[[], float] = time.perf_counter  # in seconds
