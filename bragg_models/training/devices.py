"""Choice of the device on which torch computes."""

from __future__ import annotations

import torch

from bragg_data.errors import first_line


class DeviceError(ValueError):
    """A device that does not exist or cannot be used."""


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by name; ``auto`` is a GPU if there is one.

    Raises
    ------
    DeviceError
        If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise DeviceError(f"Device '{name}' cannot be used: {reason}. Use cpu.") from error
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, which is slow if emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
