"""The state of a training on disk: weights, the best weights, optimizer state, and metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_METADATA = "about"  # its name in the files


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, or of another training."""


def save(
    path: Path,
    metadata: Mapping[str, object],
    network: nn.Module,
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint atomically: the file is always the old or the new one.

    Parameters
    ----------
    path
        Of the file.
    metadata
        Plain JSON values; ``of`` identifies the training.
    network, best, optimizer
        The present weights, the best weights, and the optimizer's state.
    """
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


def restore(
    path: Path, identity: Mapping[str, str], network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Set the weights and the optimizer's state; return the best weights and the metadata.

    Raises
    ------
    CheckpointError
        If the file is damaged, or the training in its metadata differs from ``identity``.
    """
    with _checkpoint(path) as (metadata, file):
        differing = [name for name in identity if metadata["of"].get(name) != identity[name]]
        if differing:
            raise CheckpointError(
                f"The checkpoint {path} is of another training, which differs in "
                f"{' and '.join(differing)}. Continue it as it was started, or delete it to start "
                f"again."
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
        return best, metadata


def read_metadata(path: Path) -> Mapping[str, Any]:
    """Return the metadata of a checkpoint.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    with _checkpoint(path) as (metadata, _):
        return metadata


@contextmanager
def _checkpoint(path: Path) -> Iterator[tuple[Mapping[str, Any], Any]]:
    try:
        with safe_open(path, "pt") as file:
            yield json.loads(file.metadata()[_METADATA]), file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}). Delete it to start again."
        ) from error
