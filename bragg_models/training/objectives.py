"""Objectives that training minimises, and the score by which the best weights are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class LabelledBatch:
    """A batch of n samples on the device, as an objective receives it.

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
        Row numbers of the samples in the data set.
    """

    profiles: Tensor
    phase: Tensor
    values: Tensor
    free: Tensor
    rows: NDArray[np.intp]


Objective = Callable[[nn.Module, LabelledBatch, torch.Generator], dict[str, Tensor]]
"""Named losses of a network on a batch; ``loss`` is minimised, the others are logged.

It is called under autocast, which :func:`full_precision` disables for the losses. All its random
numbers come from the generator.
"""

Validation = dict[str, dict[str, float]]
"""Scores by group of samples, as those of :func:`~bragg_models.metrics.summary`."""


def full_precision(batch: LabelledBatch) -> torch.autocast:
    """Return the context in which an objective computes its losses in single precision."""
    return torch.autocast(batch.profiles.device.type, enabled=False)


def multitask_objective(regression_weight: float = 1.0) -> Objective:
    """Return the objective of networks with logits and scaled parameters as outputs.

    It is the cross entropy plus the weighted mean squared error of the free parameters.
    """

    def objective(
        network: nn.Module, batch: LabelledBatch, _: torch.Generator
    ) -> dict[str, Tensor]:
        logits, values = network(batch.profiles)
        with full_precision(batch):
            mask = batch.free.float()
            cross_entropy = nn.functional.cross_entropy(logits.float(), batch.phase)
            squared = ((values.float() - batch.values) ** 2 * mask).sum() / mask.sum()
            loss = cross_entropy + regression_weight * squared
        return {"loss": loss, "cross_entropy": cross_entropy, "mse": squared}

    return objective


def paper_score(validation: Validation) -> float:
    """Return the ``mse_paper`` of all samples."""
    return validation["all"]["mse_paper"]
