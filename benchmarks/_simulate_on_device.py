"""The fast simulator on a torch device: rates, fidelity, and bytes moved; see simulate.py."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bragg_data.campaign import Campaign
from bragg_data.simulation.kinematic import Simulator

CALLS = 4  # queued one after the other, as for training data; the device is waited for at the end


class Traffic(TorchDispatchMode):
    """Counts the bytes of all operands and results of every operation, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def add(self, *values: object) -> None:
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        self.bytes += sum(
            min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.add(args, kwargs, result)
        return result

    def as_a_unit(self, function: Callable[..., None]) -> Callable[..., None]:
        """Return a function that counts as one operation: it is fused."""

        def counted(*args: object) -> None:
            with _disable_current_modes():
                function(*args)
            self.add(args, args[0])

        return counted


def bytes_per_pattern(simulator: Simulator, job: dict[str, Any], compiled: bool) -> float:
    """Return the bytes that all operations read and write for a pattern."""
    response, traffic = simulator._on_device, Traffic()
    assert response is not None
    functions = response.deposit_lines, response.add_steps
    if compiled:
        response.deposit_lines, response.add_steps = map(traffic.as_a_unit, functions)
    with traffic:
        simulator.simulate_on_device(**job)
    response.deposit_lines, response.add_steps = functions
    return traffic.bytes / len(job["cells"])


def rate(device: torch.device, call: Callable[[], object], rows: int, repeats: int) -> float:
    """Return rows per second of a call: medians of several that are queued, after a warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for index in range(repeats + 2):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        if index > 1:
            seconds.append(time.perf_counter() - began)
    return CALLS * rows / float(np.median(seconds))


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a large copy on the device."""
    values = torch.rand((1 << 31 if device.type == "cuda" else 1 << 27) // 4, device=device)
    room = torch.empty_like(values)
    return rate(device, lambda: room.copy_(values), 2 * values.numel() * values.itemsize, 7)


def measure(
    campaign: Campaign,
    reference: tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float32]],
    drawn: dict[str, NDArray[np.float64]],
    name: str,
    repeats: int,
    compiled: bool,
) -> dict[str, Any]:
    """Return what ``--json`` prints.

    The reference: phases, cells and GSAS-II's patterns; drawn: values of each per-sample vector.
    """
    simulator = Simulator(*campaign.setup, device=name, compiled=compiled)
    assert simulator._on_device is not None
    device = simulator._on_device.device.device
    on_host = Simulator(*campaign.setup)
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "tensors on the CPU"
    rows = len(drawn["size"])
    names = "patterns_per_second", "copied_to_host", "bytes_per_pattern", "against_cpu"
    measured: dict[str, Any] = {key: {"shared": {}, "general": {}} for key in names}
    generator = np.random.default_rng(0)
    for code, phase in enumerate(campaign.phases):
        of_phase = np.flatnonzero(campaign.samples.phase == code)
        chosen = generator.choice(of_phase, rows)
        job = {"phase": campaign.samples.phase[chosen], "cells": campaign.samples.cells[chosen]}
        system = phase.lattice.crystal_system.name
        for kind, parameters in (("shared", {}), ("general", drawn)):
            both = job | parameters
            few = {key: values[:64] for key, values in both.items()}
            ours, theirs = simulator.simulate(**few), on_host.simulate(**few)
            difference = np.abs(ours - theirs).max(axis=1) / theirs.max(axis=1)
            measured["against_cpu"][kind][system] = float(difference.max())
            for key, call in (
                ("patterns_per_second", simulator.simulate_on_device),
                ("copied_to_host", simulator.simulate),
            ):
                measured[key][kind][system] = rate(
                    device, lambda call=call, both=both: call(**both), rows, repeats
                )
            moved = bytes_per_pattern(simulator, both, compiled)
            measured["bytes_per_pattern"][kind][system] = moved
    phase, cells, patterns = reference
    difference = simulator.simulate(phase, cells) - patterns
    l2 = np.linalg.norm(difference, axis=1) / np.linalg.norm(patterns, axis=1)
    worst = np.abs(difference).max(axis=1) / patterns.max(axis=1)
    measured |= {
        "fidelity": {"max": float(worst.max()), "l2": float(l2.max())},
        "bandwidth": bandwidth(device),
        "device": f"{device}: {title}, torch {torch.__version__}",
        "compiled": compiled,
    }
    return measured


def report(measured: dict[str, Any]) -> Group:
    """Return what was measured as a table and a sentence."""
    bandwidth = measured["bandwidth"]
    table = Table(title=f"{measured['device']}: a copy moves {bandwidth / 1e9:,.0f} GB/s")
    headings = "phase,widths,patterns/s,copied to host,MB/pattern,GB/s,of the copy's,max |Δ| to CPU"
    for column in headings.split(","):
        table.add_column(column, justify="right")
    for kind, rates in measured["patterns_per_second"].items():
        for system, on_device in rates.items():
            moved = measured["bytes_per_pattern"][kind][system]
            per_second = moved * on_device
            table.add_row(
                system,
                kind,
                f"{on_device:,.0f}",
                f"{measured['copied_to_host'][kind][system]:,.0f}",
                f"{moved / 1e6:.2f}",
                f"{per_second / 1e9:,.0f}",
                f"{per_second / bandwidth:.0%}",
                f"{measured['against_cpu'][kind][system]:.1e}",
            )
    fidelity = measured["fidelity"]
    return Group(
        table,
        f"Against GSAS-II: largest difference {fidelity['max']:.1e} of the maximum, relative L2 "
        f"{fidelity['l2']:.1e}",
    )
