"""Targets of models: crystal structures as scaled arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bragg_data.arrays import AnyFloats, Array, Floats32, Integers, Integers8, Mask
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem, Lattice
from bragg_data.crystallography.structure import Phase


class TargetsError(ValueError):
    """A description of targets that cannot be read."""


@dataclass(frozen=True)
class Targets:
    r"""What a model of a campaign predicts: one of its phases, and that phase's free parameters.

    A model has one output per phase (a classifier) and one per parameter that is free in any of
    them (a regressor). A parameter that is not free in a sample's phase is masked in the loss, and
    set by symmetry when a prediction is decoded. Each is scaled to [-1, 1] over the campaign:

    .. math:: z = (p - p_\text{mid}) / p_\text{half}

    with one scale for the phases whose ranges of the parameter overlap, so that phases that are
    distortions of each other share it, and the cells of different compounds do not.
    """

    names: tuple[str, ...]  # the phases, in the order of their codes
    lattices: tuple[Lattice, ...]  # their crystal systems and metric constraints
    middle: Array  # (n_phases, n_parameters): of each parameter's range, in Å or degrees
    half_range: Array  # the same for half its width; over all phases where it is not free

    @property
    def parameters(self) -> tuple[str, ...]:
        """Cell parameters that are free in any phase, in the order of CELL_PARAMETERS."""
        return _free_in_any(self.lattices)

    @property
    def crystal_systems(self) -> Integers8:
        """Code of the crystal system of each phase, shape (n_phases,)."""
        return np.array([lattice.crystal_system for lattice in self.lattices], dtype=np.int8)

    @property
    def free(self) -> Mask:
        """Which parameters are free in which phase, shape (n_phases, n_parameters)."""
        parameters = self.parameters
        rows = [[p in lattice.free_parameters for p in parameters] for lattice in self.lattices]
        return np.array(rows)

    def encode(self, phase: Integers, cells: Array) -> tuple[Floats32, Mask]:
        """Return the scaled parameters of n samples, and which are free: (n, n_parameters) each.

        ``phase`` has shape (n,), ``cells`` (n, 6), in Å and degrees; values not free are zero.
        """
        free = self.free[phase]
        columns = [CELL_PARAMETERS.index(name) for name in self.parameters]
        scaled = (cells[:, columns] - self.middle[phase]) / self.half_range[phase]
        return np.where(free, scaled, 0.0).astype(np.float32), free

    def decode(self, values: AnyFloats, phase: Integers) -> Array:
        """Return full cells (n, 6), in Å and degrees, from scaled parameters (n, n_parameters).

        They obey the constraints of the (predicted) phases (n,) and enclose a volume: parameters
        outside the domain of their lattice are clipped
        (:meth:`~bragg_data.crystallography.cell.Lattice.clip_to_domain`).
        """
        scaled = np.asarray(values, dtype=np.float64)
        physical = scaled * self.half_range[phase] + self.middle[phase]
        cells = np.empty((len(values), 6))
        for code, lattice in enumerate(self.lattices):
            rows = np.flatnonzero(phase == code)
            free = lattice.clip_to_domain(physical[rows][:, self.free[code]])
            cells[rows] = lattice.cells(free)
        return cells

    def to_json(self) -> dict[str, list[dict[str, object]]]:
        """Return plain JSON values, as :meth:`from_json` reads them."""
        phases: list[dict[str, object]] = [
            {
                "name": name,
                "crystal_system": lattice.crystal_system.name,
                "free_parameters": list(lattice.free_parameters),
                "tied": [list(pair) for pair in lattice.tied],
            }
            for name, lattice in zip(self.names, self.lattices, strict=True)
        ]
        ranges = zip(
            self.parameters, self.middle.T.tolist(), self.half_range.T.tolist(), strict=True
        )
        parameters: list[dict[str, object]] = [
            {
                "name": name,
                "unit": "Å" if name in "abc" else "degree",
                "middle": middle,  # by phase
                "half_range": half,
            }
            for name, middle, half in ranges
        ]
        return {"phases": phases, "parameters": parameters}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Targets:
        """Return the targets from the values of :meth:`to_json`; may raise `TargetsError`."""
        try:
            lattices = tuple(
                Lattice(
                    CrystalSystem[phase["crystal_system"]],
                    tuple(phase["free_parameters"]),
                    tuple((name, source) for name, source in phase["tied"]),
                )
                for phase in values["phases"]
            )
            names = tuple(phase["name"] for phase in values["phases"])
            described = [entry["name"] for entry in values["parameters"]]
            # Older models have one scale, a number, for all phases.
            middle, half = (
                np.array(
                    [np.broadcast_to(entry[key], len(names)) for entry in values["parameters"]]
                )
                .astype(float)
                .reshape(-1, len(names))
                .T
                for key in ("middle", "half_range")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TargetsError(
                f"The model's description of its targets is incomplete or damaged ({error!r}). "
                f"Train the model again."
            ) from error
        free = _free_in_any(lattices)
        if tuple(described) != free:
            raise TargetsError(
                f"The model's description lists the parameters {', '.join(described)}, but those "
                f"free in its phases are {', '.join(free)}. Train it again."
            )
        return cls(names, lattices, middle, half)


def targets_of(phases: Sequence[Phase], phase: Integers, cells: Array) -> Targets:
    """Return the targets of a campaign's phases, scaled to the ranges of its samples.

    ``phase`` (n,) and ``cells`` (n, 6), in Å and degrees, are of every sample of the campaign (test
    samples too: the ranges define the campaign, they are not fitted).
    """
    lattices = tuple(p.lattice for p in phases)
    names = _free_in_any(lattices)
    ends = np.zeros((2, len(phases), len(names)))
    for column, name in enumerate(names):
        ranges = {}
        for code, lattice in enumerate(lattices):
            values = cells[phase == code, CELL_PARAMETERS.index(name)]
            if name in lattice.free_parameters and len(values):
                ranges[code] = float(values.min()), float(values.max())
        if ranges:
            lows, highs = zip(*ranges.values(), strict=True)
            ends[:, :, column] = [[min(lows)], [max(highs)]]
        for code, joined in _joined_ranges(ranges).items():
            ends[:, code, column] = joined
    low, high = ends
    half = (high - low) / 2
    half[half == 0] = 1.0  # of a tiny campaign: a parameter with a single value is not scaled
    return Targets(tuple(p.name for p in phases), lattices, (low + high) / 2, half)


def _joined_ranges(ranges: Mapping[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """Return for each key the union of its range and of those that overlap it, also in a chain."""
    joined: list[tuple[list[int], float, float]] = []
    for code, (low, high) in sorted(ranges.items(), key=lambda entry: entry[1]):
        if joined and low <= joined[-1][2]:
            codes, first, last = joined[-1]
            joined[-1] = [*codes, code], first, max(last, high)
        else:
            joined.append(([code], low, high))
    return {code: (low, high) for codes, low, high in joined for code in codes}


def _free_in_any(lattices: Sequence[Lattice]) -> tuple[str, ...]:
    return tuple(
        p for p in CELL_PARAMETERS if any(p in lattice.free_parameters for lattice in lattices)
    )
