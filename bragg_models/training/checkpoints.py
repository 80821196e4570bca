"""The state of a training on disk: weights, the best ones, the optimizer, and what it came to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, or of another training."""


def save(
    path: Path,
    about: dict[str, Any],
    network: nn.Module,
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint so that the file is the old one or the new one, whatever happens."""
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
        {"about": json.dumps(about, default=float)},
    )
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def restore(
    path: Path, own: dict[str, str], network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Set weights and optimizer; return the best weights, and what was written about them.

    Raises
    ------
    CheckpointError
        If the file is damaged, or what it says it is of (``about["of"]``) differs from ``own``.
    """
    with _checkpoint(path) as (about, file):
        if other := [name for name in own if about["of"].get(name) != own[name]]:
            raise CheckpointError(
                f"The checkpoint {path} is of another training, which differs in "
                f"{' and '.join(other)}. Continue it as it was started, or delete it to start anew."
            )
        state = network.state_dict()
        best = {name: file.get_tensor(f"best/{name}") for name in state}
        network.load_state_dict({name: file.get_tensor(f"now/{name}") for name in state})
        parameters = dict(network.named_parameters())
        for entry in file.keys():  # noqa: SIM118 - no mapping
            key, _, name = entry.partition("/")
            if key not in ("now", "best"):
                value, parameter = file.get_tensor(entry), parameters[name]
                # In the memory layout of the weights, which the optimizer takes for granted.
                like = parameter if value.shape == parameter.shape else value
                empty = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
                optimizer.state[parameter][key] = empty.detach().copy_(value)
        return best, about


def read_about(path: Path) -> dict[str, Any]:
    """Return what was written about a checkpoint.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    with _checkpoint(path) as (about, _):
        return about


@contextmanager
def _checkpoint(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    try:
        with safe_open(path, "pt") as file:
            yield json.loads(file.metadata()["about"]), file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}). Delete it to start anew."
        ) from error
