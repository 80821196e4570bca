"""Outputs of networks, batch by batch, and their errors on the samples of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bragg_models.data.batches import Profiles, in_order
from bragg_models.metrics import Errors, errors
from bragg_models.targets import Targets


class InferenceError(ValueError):
    """Samples on which no network can be evaluated."""


@dataclass(frozen=True)
class Samples:
    """A data set for training: lazy profiles and their labels.

    Attributes
    ----------
    profiles
        n profiles.
    phase : shape (n,)
        Phase codes.
    cells : shape (n, 6)
        In ångström and degrees.
    """

    profiles: Profiles
    phase: NDArray[np.int8]
    cells: NDArray[np.float64]


def evaluate(
    network: nn.Module,
    targets: Targets,
    samples: Samples,
    selected: NDArray[np.bool_],
    device: torch.device | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Errors:
    """Return the errors of a network on the selected samples, shape (n,), as sums.

    ``on_batch`` is called with the number of samples of every chunk that is done.
    """
    total: Errors | None = None
    for batch in in_order(samples.profiles, selected):
        probabilities, values = outputs(network, batch.profiles, device)
        phase = probabilities.argmax(axis=1)
        cells = targets.decode(values, phase)
        part = errors(targets, samples.phase[batch.rows], samples.cells[batch.rows], phase, cells)
        total = part if total is None else total + part
        if on_batch is not None:
            on_batch(len(batch.rows))
    if total is None:
        raise InferenceError("There is no sample to evaluate on. Choose a larger part.")
    return total


def transformed(
    network: nn.Module, profiles: NDArray[np.float32], device: torch.device, batch_size: int = 128
) -> NDArray[np.float32]:
    """Return the features of prepared profiles, shape (n, m).

    Parameters
    ----------
    network
        From profiles (n, points) to features (n, m).
    profiles : shape (n, points)
        Prepared.
    device
        Where the network is.
    batch_size
        Profiles at a time. Features are the same to the last bit for the same batches only.
    """
    network.eval()
    parts = []
    with torch.inference_mode():
        for low in range(0, len(profiles), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(profiles[low : low + batch_size]))
            parts.append(network(batch.to(device)).cpu().numpy())
    return np.concatenate(parts)


def outputs(
    network: nn.Module,
    profiles: NDArray[np.float32],
    device: torch.device | None = None,
    batch_size: int | None = None,
    phase: NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the probabilities of the phases and the scaled parameters of prepared profiles.

    Parameters
    ----------
    network
        With logits and scaled parameters as outputs.
    profiles : shape (n, points)
        Prepared.
    device
        Where the network is.
    batch_size
        Profiles at a time; by default the ``batch_size`` of the network, or 128: small batches
        stay in a processor's cache.
    phase : shape (n,)
        Known phases: the second argument of the network.

    Returns
    -------
    probabilities : shape (n, n_phases)
    values : shape (n, n_parameters)
    """
    network.eval()
    batch_size = batch_size or int(getattr(network, "batch_size", 128))
    parts = []
    with torch.inference_mode():
        for low in range(0, len(profiles), batch_size):
            batch = torch.from_numpy(profiles[low : low + batch_size]).to(device)
            if phase is None:
                logits, values = network(batch)
            else:
                known = np.asarray(phase[low : low + batch_size], dtype=np.int64)
                logits, values = network(batch, torch.from_numpy(known).to(device))
            parts.append((logits.softmax(dim=1).cpu().numpy(), values.cpu().numpy()))
    return np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts])
