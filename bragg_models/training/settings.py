"""Data, hyperparameters, execution and results of a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bragg_models.targets import Targets
from bragg_models.training.inference import Samples
from bragg_models.training.objectives import Objective, Validation, paper_score


@dataclass(frozen=True)
class FitSettings:
    """Hyperparameters of a training.

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
        Composition of a batch: the share of a phase is proportional to its number of training
        samples to this power. 0 gives each phase the same share, values between 0 and 1 raise
        those of rare phases; None uses every sample exactly once per epoch.
    samples_per_epoch
        Samples per epoch (balanced: rounded up to whole batches); None is the number of training
        samples. A shorter epoch reads only the chunks that it needs, different ones each time; a
        longer one repeats samples.
    buffer_chunks
        Chunks in the shuffle buffer.
    regression_weight
        Weight of the mean squared error of the scaled parameters relative to the cross entropy.
    mixed_precision
        Compute the network (not the loss, not the weights) in bfloat16 where the processor or the
        GPU has instructions for it. Predictions are always computed in single precision.

    Notes
    -----
    The paper's two ways of balancing: the classifier's batches of 30 of each system are
    ``batch_size=90, balance=0``. That the regressors use "800 cubic samples with replacement in
    every epoch" to balance the classes is interpreted as 800 of each system per epoch:
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
class Step:
    """Progress within an epoch, all counted from 1."""

    epoch: int
    step: int
    steps: int
    samples: int
    loss: float


@dataclass(frozen=True)
class EpochResult:
    """Result of one epoch.

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
        Whether it was read from a checkpoint.
    """

    epoch: int
    step: int
    training: dict[str, float]
    validation: Validation
    is_best: bool
    seconds: float
    out_of_time: bool
    restored: bool = False


@dataclass(frozen=True)
class TrainingData:
    """Samples to train and validate on.

    Attributes
    ----------
    targets
        Meaning of the outputs.
    samples
        n samples.
    training, validation : shape (n,)
        Which samples to train on, and on which to choose the best weights.
    """

    targets: Targets
    samples: Samples
    training: NDArray[np.bool_]
    validation: NDArray[np.bool_]


@dataclass(frozen=True)
class Criteria:
    """What is minimised, and how the best weights are chosen.

    Attributes
    ----------
    objective
        By default :func:`~bragg_models.training.objectives.multitask_objective`.
    validate
        Returns the scores of the network; by default those of
        :func:`~bragg_models.training.inference.evaluate` on the validation samples.
    score
        One number from these scores; the weights with the lowest are the best.
    """

    objective: Objective | None = None
    validate: Callable[[nn.Module], Validation] | None = None
    score: Callable[[Validation], float] = paper_score


@dataclass(frozen=True)
class Execution:
    """Where and how long a training runs.

    Attributes
    ----------
    device
        Where to compute; the network is moved there. By default the CPU.
    max_seconds
        Time limit. The schedule of the learning rate then follows the clock where the clock is
        ahead of the steps, so that it is completed; in that case the result depends on the machine.
    checkpoint
        File that is written after every epoch. If it exists, its epochs are yielded again as
        ``restored``, and the training continues after them: on a CPU with exactly the weights of
        an uninterrupted training.
    on_step
        Called after every step.
    clock
        Time in seconds.
    """

    device: torch.device | None = None
    max_seconds: float | None = None
    checkpoint: Path | None = None
    on_step: Callable[[Step], None] | None = None
    clock: Callable[[], float] = time.perf_counter
