"""Outputs of networks, batch by batch, their errors on a data set, and where they are computed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bragg_data.arrays import Array, Floats32, Integers, Integers8, Mask
from bragg_data.errors import first_line
from bragg_models.data.batches import BatchError, Profiles, in_order
from bragg_models.metrics import Errors, errors
from bragg_models.targets import Targets


class DeviceError(ValueError):
    """A device that does not exist or cannot be used."""


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by name, ``auto`` for a GPU if there is one; may raise `DeviceError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise DeviceError(f"Device '{name}' cannot be used: {reason}. Use cpu.") from error
    return device


@dataclass(frozen=True)
class Samples:
    """A data set for training: n lazy profiles and their labels."""

    profiles: Profiles
    phase: Integers8  # (n,)
    cells: Array  # (n, 6), in ångström and degrees
    weight: Array | None = None  # (n,) in the loss, on any scale; None is the same for all


def evaluate(
    network: nn.Module,
    targets: Targets,
    samples: Samples,
    selected: Mask,
    device: torch.device | None = None,
) -> Errors:
    """Return the errors of a network on the selected samples, shape (n,), as sums."""
    total: Errors | None = None
    for batch in in_order(samples.profiles, selected):
        probabilities, values = outputs(network, batch.profiles, device)
        phase = probabilities.argmax(axis=1)
        cells = targets.decode(values, phase)
        part = errors(targets, samples.phase[batch.rows], samples.cells[batch.rows], phase, cells)
        total = part if total is None else total + part
    if total is None:
        raise BatchError("There is no sample to evaluate on. Choose a larger part.")
    return total


def transformed(
    network: nn.Module, profiles: Floats32, device: torch.device, batch_size: int = 128
) -> Floats32:
    """Return the features (n, m) that a network computes from prepared profiles (n, points).

    Features are the same to the last bit for the same batches only.
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
    profiles: Floats32,
    device: torch.device | None = None,
    batch_size: int | None = None,
    phase: Integers | None = None,
) -> tuple[Floats32, Floats32]:
    """Return the probabilities (n, n_phases) and the scaled parameters (n, n_parameters).

    Of prepared profiles (n, points), and of known phases (n,), where the network has them as its
    second argument; on the device where the network is. ``batch_size`` is by default that of the
    network, or 128: small batches stay in a processor's cache.
    """
    network.eval()
    batch_size = batch_size or int(getattr(network, "batch_size", 128))
    parts = []
    with torch.inference_mode():
        for low in range(0, len(profiles), batch_size):
            rows = slice(low, low + batch_size)
            inputs = [torch.from_numpy(profiles[rows]).to(device)]
            if phase is not None:
                known = np.asarray(phase[rows], dtype=np.int64)
                inputs.append(torch.from_numpy(known).to(device))
            logits, values = network(*inputs)
            parts.append((logits.softmax(dim=1).cpu().numpy(), values.cpu().numpy()))
    return np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts])
