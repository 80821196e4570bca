"""Targets of models: crystal structures as scaled arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem, Lattice
from bragg_data.crystallography.structure import Phase


class TargetsError(ValueError):
    """A description of targets that cannot be read."""


class PhaseJson(TypedDict):
    """A phase of :class:`Targets` as JSON."""

    name: str
    crystal_system: str
    free_parameters: list[str]
    tied: list[list[str | float]]


class ParameterJson(TypedDict):
    """A parameter of :class:`Targets` as JSON; numbers in ``unit``."""

    name: str
    unit: str
    middle: float
    half_range: float


class TargetsJson(TypedDict):
    """The JSON values of :class:`Targets`."""

    phases: list[PhaseJson]
    parameters: list[ParameterJson]


@dataclass(frozen=True)
class Targets:
    r"""What a model of a campaign predicts: one of its phases, and that phase's free parameters.

    A model has one output per phase (a classifier) and one per parameter that is free in any of
    them (a regressor). A parameter that is not free in a sample's phase is masked in the loss, and
    set by symmetry when a prediction is decoded. Each is scaled to [-1, 1] over the campaign:

    .. math:: z = (p - p_\text{mid}) / p_\text{half}

    Attributes
    ----------
    names
        The phases, in the order of their codes.
    lattices
        Their crystal systems and metric constraints.
    middle, half_range : shape (n_parameters,)
        Middle and half width of each parameter's range in the campaign, in ångström or degrees.

    Notes
    -----
    The paper (section IV-C) regresses a, c and alpha for every sample, also where symmetry fixes
    them. With the mask the outputs are the same for BaTiO3, and the code serves all seven systems.
    """

    names: tuple[str, ...]
    lattices: tuple[Lattice, ...]
    middle: NDArray[np.float64]
    half_range: NDArray[np.float64]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Cell parameters that are free in any phase, in the order of CELL_PARAMETERS."""
        return _free_in_any(self.lattices)

    @property
    def crystal_systems(self) -> NDArray[np.int8]:
        """Code of the crystal system of each phase, shape (n_phases,)."""
        return np.array([lattice.crystal_system for lattice in self.lattices], dtype=np.int8)

    @property
    def free(self) -> NDArray[np.bool_]:
        """Which parameters are free in which phase, shape (n_phases, n_parameters)."""
        parameters = self.parameters
        rows = [[p in lattice.free_parameters for p in parameters] for lattice in self.lattices]
        return np.array(rows)

    def encode(
        self, phase: NDArray[np.integer], cells: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the scaled parameters of each sample, and which of them are free.

        Parameters
        ----------
        phase : shape (n,)
            Index of the campaign's phase.
        cells : shape (n, 6)
            a, b, c in ångström; alpha, beta, gamma in degrees.

        Returns
        -------
        values : shape (n, n_parameters)
            Scaled; zero where not free.
        free : shape (n, n_parameters)
        """
        free = self.free[phase]
        columns = [CELL_PARAMETERS.index(name) for name in self.parameters]
        scaled = (cells[:, columns] - self.middle) / self.half_range
        return np.where(free, scaled, 0.0).astype(np.float32), free

    def decode(
        self, values: NDArray[np.floating], phase: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Return full cells that obey the constraints of the given phases and enclose a volume.

        Parameters outside the domain of their lattice are clipped
        (:meth:`~bragg_data.crystallography.cell.Lattice.clip_to_domain`).

        Parameters
        ----------
        values : shape (n, n_parameters)
            Scaled parameters, as predicted by a regressor.
        phase : shape (n,)
            Index of each sample's (predicted) phase.

        Returns
        -------
        shape (n, 6)
            a, b, c in ångström; alpha, beta, gamma in degrees.
        """
        physical = np.asarray(values, dtype=np.float64) * self.half_range + self.middle
        cells = np.empty((len(values), 6))
        for code, lattice in enumerate(self.lattices):
            rows = np.flatnonzero(phase == code)
            free = lattice.clip_to_domain(physical[rows][:, self.free[code]])
            cells[rows] = lattice.cells(free)
        return cells

    def to_json(self) -> TargetsJson:
        """Return plain JSON values, as :meth:`from_json` reads them."""
        return {
            "phases": [
                {
                    "name": name,
                    "crystal_system": lattice.crystal_system.name,
                    "free_parameters": list(lattice.free_parameters),
                    "tied": [list(pair) for pair in lattice.tied],
                }
                for name, lattice in zip(self.names, self.lattices, strict=True)
            ],
            "parameters": [
                {
                    "name": name,
                    "unit": "Å" if name in "abc" else "degree",
                    "middle": float(middle),
                    "half_range": float(half),
                }
                for name, middle, half in zip(
                    self.parameters, self.middle, self.half_range, strict=True
                )
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Targets:
        """Return the targets from the values of :meth:`to_json`.

        Raises
        ------
        TargetsError
            If an entry is missing or invalid.
        """
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
            middle = np.array([entry["middle"] for entry in values["parameters"]], dtype=float)
            half = np.array([entry["half_range"] for entry in values["parameters"]], dtype=float)
        except (KeyError, TypeError, ValueError) as error:
            raise TargetsError(
                f"The model's description of its targets is incomplete or damaged ({error!r}). "
                f"Train the model again."
            ) from error
        if tuple(described) != _free_in_any(lattices):
            raise TargetsError(
                f"The model's description lists the parameters {', '.join(described)}, but those "
                f"free in its phases are {', '.join(_free_in_any(lattices))}. Train it again."
            )
        return cls(names, lattices, middle, half)


def targets_of(
    phases: Sequence[Phase], phase: NDArray[np.integer], cells: NDArray[np.float64]
) -> Targets:
    """Return the targets of a campaign, scaled to the ranges of its samples.

    Parameters
    ----------
    phases
        The campaign's phases, in the order of their codes.
    phase : shape (n,)
        Phase of every sample of the campaign (test samples too: the ranges define the campaign,
        they are not fitted).
    cells : shape (n, 6)
        Their cells, in ångström and degrees.
    """
    lattices = tuple(p.lattice for p in phases)
    low, high = [], []
    for name in _free_in_any(lattices):
        where_free = np.array([name in lattice.free_parameters for lattice in lattices])[phase]
        column = cells[where_free, CELL_PARAMETERS.index(name)]
        low.append(column.min() if len(column) else 0.0)
        high.append(column.max() if len(column) else 0.0)
    half = (np.array(high) - np.array(low)) / 2
    # A parameter with a single value (of a tiny campaign) is not scaled.
    half[half == 0] = 1.0
    return Targets(
        tuple(p.name for p in phases), lattices, (np.array(low) + np.array(high)) / 2, half
    )


def _free_in_any(lattices: Sequence[Lattice]) -> tuple[str, ...]:
    return tuple(
        name for name in CELL_PARAMETERS if any(name in lat.free_parameters for lat in lattices)
    )
