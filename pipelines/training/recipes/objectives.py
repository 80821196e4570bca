"""Losses of the paper's models, and their scores on the validation samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bragg_data.splits import Part
from bragg_models.data.batches import in_order
from bragg_models.metrics import Errors, errors, summary
from bragg_models.training.inference import Samples, outputs
from bragg_models.training.objectives import (
    LabelledBatch,
    Objective,
    Validation,
    full_precision,
)
from pipelines.training.stage import TrainingContext

_BATCH = 256  # profiles that an auto-encoder validates at a time
_SMALLEST_PROBABILITY = 1e-12


def classification(
    network: nn.Module, batch: LabelledBatch, _: torch.Generator
) -> dict[str, Tensor]:
    """Return the cross entropy of the phases (section IV-A of the paper)."""
    logits, _values = network(batch.profiles)
    with full_precision(batch):
        loss = nn.functional.cross_entropy(logits.float(), batch.phase)
    return {"loss": loss}


def regression(columns: Tensor) -> Objective:
    """Return the mean squared error of some of the scaled parameters (section IV-B).

    Parameters
    ----------
    columns
        Indices of the parameters that are free in the phase.
    """

    def objective(
        network: nn.Module, batch: LabelledBatch, _: torch.Generator
    ) -> dict[str, Tensor]:
        values = network(batch.profiles)
        with full_precision(batch):
            loss = ((values.float() - batch.values[:, columns]) ** 2).mean()
        return {"loss": loss}

    return objective


def reconstruction(
    network: nn.Module, batch: LabelledBatch, _: torch.Generator
) -> dict[str, Tensor]:
    """Return the mean absolute error of reconstructed profiles (section IV-C3)."""
    profiles = network(batch.profiles)
    with full_precision(batch):
        loss = (profiles.float() - batch.profiles).abs().mean()
    return {"loss": loss}


def integer_class(regression_weight: float) -> Objective:
    """Return the paper's alternative loss: the class as an integer, by its squared error too.

    Parameters
    ----------
    regression_weight
        Factor on the mean squared error of the free parameters.
    """

    def objective(
        network: nn.Module, batch: LabelledBatch, _: torch.Generator
    ) -> dict[str, Tensor]:
        code, values = network.raw_outputs(batch.profiles)  # type: ignore[operator]
        with full_precision(batch):
            mask = batch.free.float()
            integer = ((code[:, 0].float() - batch.phase) ** 2).mean()
            squared = ((values.float() - batch.values) ** 2 * mask).sum() / mask.sum()
            loss = integer + regression_weight * squared
        return {"loss": loss, "integer": integer, "mse": squared}

    return objective


def classification_scores(
    context: TrainingContext, samples: Samples
) -> Callable[[nn.Module], Validation]:
    """Return a function that gives accuracy and cross entropy on the validation samples."""

    def validate(network: nn.Module) -> Validation:
        wrong, loss, n = 0, 0.0, 0
        for batch in in_order(samples.profiles, context.part == Part.validation):
            probabilities, _ = outputs(network, batch.profiles, context.device)
            truth = samples.phase[batch.rows]
            wrong += int((probabilities.argmax(axis=1) != truth).sum())
            of_truth = probabilities[np.arange(len(truth)), truth]
            loss -= float(np.log(np.maximum(of_truth, _SMALLEST_PROBABILITY)).sum())
            n += len(truth)
        accuracy = 1 - wrong / n
        return {"all": {"n": n, "accuracy": accuracy, "wrong": wrong, "cross_entropy": loss / n}}

    return validate


def misclassified(scores: Validation) -> float:
    """Return the number of misclassified samples; of equal numbers the cross entropy decides."""
    return scores["all"]["wrong"] + min(scores["all"]["cross_entropy"], 0.99)


def regression_scores(
    context: TrainingContext, samples: Samples, code: int
) -> Callable[[nn.Module], Validation]:
    """Return a function that gives the errors of one phase's regressor.

    Parameters
    ----------
    context, samples
        The training, and what the regressor is applied to.
    code
        Of the phase.
    """
    validation = (context.part == Part.validation) & (context.samples.phase == code)
    targets = context.targets
    free = targets.free[code]

    def validate(network: nn.Module) -> Validation:
        network.eval()
        total: Errors | None = None
        for batch in in_order(samples.profiles, validation):
            with torch.inference_mode():
                output = network(torch.from_numpy(batch.profiles).to(context.device)).cpu().numpy()
            values = np.zeros((len(output), len(free)))
            values[:, free] = output
            phase = samples.phase[batch.rows]
            cells = targets.decode(values, phase)
            of_batch = errors(targets, phase, samples.cells[batch.rows], phase, cells)
            total = of_batch if total is None else total + of_batch
        if total is None:
            return {"all": {"n": 0.0, "mse_paper": 0.0}}
        return summary(targets, total)

    return validate


def reconstruction_scores(
    context: TrainingContext, samples: Samples
) -> Callable[[nn.Module], Validation]:
    """Return a function that gives the errors of reconstructed validation profiles."""

    def validate(network: nn.Module) -> Validation:
        network.eval()
        absolute = squared = count = 0.0
        for batch in in_order(samples.profiles, context.part == Part.validation):
            with torch.inference_mode():
                for low in range(0, len(batch.profiles), _BATCH):
                    profiles = torch.from_numpy(batch.profiles[low : low + _BATCH])
                    profiles = profiles.to(context.device)
                    difference = network(profiles) - profiles
                    absolute += float(difference.abs().sum())
                    squared += float((difference**2).sum())
                    count += difference.numel()
        return {"all": {"n": count, "mae": absolute / count, "mse": squared / count}}

    return validate


def mean_absolute_error(scores: Validation) -> float:
    """Return the score that the auto-encoder's best weights minimise."""
    return scores["all"]["mae"]
