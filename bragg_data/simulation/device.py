"""A torch device that arrays are moved to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bragg_data.arrays import AnyFloats, Floats32, Indices

_STORED = 16  # objects of which the tensors stay on the device


class DeviceError(ValueError):
    """A device that torch does not know, or that this machine does not have."""


class Device:
    """A torch device, and what was moved to it. Raises a DeviceError if there is no such device."""

    def __init__(self, name: str) -> None:
        self.device = _existing(name)
        self._moved: dict[int, tuple[object, Any]] = {}

    def send(self, values: AnyFloats | Indices) -> Tensor:
        """Return an array as a tensor on the device, without waiting for it to get there."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def to_host(self, values: Tensor) -> Floats32:
        """Return a tensor as an array, of a GPU in memory that it writes to directly."""
        if self.device.type == "cuda":
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
        return np.asarray(values.cpu().numpy())

    def once(self, key: object, build: Callable[[], Any]) -> Any:
        """Return what belongs to an object, built the first time and kept for a while."""
        stored = self._moved.pop(id(key), None) or (key, build())  # no other gets the id of a key
        self._moved[id(key)] = stored
        if len(self._moved) > _STORED:
            del self._moved[next(iter(self._moved))]
        return stored[1]

    def zeros(self, n: int, columns: int) -> Tensor:
        """Return zeros of shape (n, columns), in single precision."""
        return torch.zeros(n, columns, device=self.device)


def _existing(name: str) -> torch.device:
    """Return a device; if it does not exist, the DeviceError names those that do."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise DeviceError(
            f"There is no device '{name}' here; torch {torch.__version__} finds {', '.join(there)}."
        ) from error
    return device


@contextmanager
def single_precision() -> Iterator[None]:
    """Keep products of matrices in single precision: TF32 is good to three digits only."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
