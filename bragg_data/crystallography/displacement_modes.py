"""Atomic coordinates that symmetry leaves free, as displacements of all atoms of the cell."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.structure import Phase

_SAME = 1e-3  # fractional: closer positions are the same

_Array = NDArray[np.float64]


def free_coordinates(phase: Phase) -> _Array:
    r"""Return the independent displacements of the atoms that keep the space group.

    The displacements that a site's stabiliser S leaves invariant are the range of the projector
    :math:`\frac{1}{|S|} \sum_{R \in S} R`; the other operations carry a displacement to the site's
    equivalents. Where the space group fixes no origin along some direction, a shift of all atoms
    together changes nothing: the first sites lose that freedom.

    Returned are fractional displacements of the atoms of :attr:`Phase.positions`, shape
    (m, n_atoms, 3); each moves its first atom by 1 Å in the CIF's cell.
    """
    metric = np.array(gemmi.UnitCell(*phase.cell).orth.mat.tolist())
    operations = [(np.array(op.rot) / op.DEN, np.array(op.tran) / op.DEN) for op in phase.group_ops]
    modes: list[_Array] = []
    for site in phase.sites:
        position = np.array(site.position)
        images = [rotation @ position + shift for rotation, shift in operations]
        fixed = [
            rotation
            for (rotation, _), image in zip(operations, images, strict=True)
            if _distance(image, position) < _SAME
        ]
        directions = _range_of(np.mean(fixed, axis=0))
        rotation_to: dict[int, _Array] = {}
        for (rotation, _), image in zip(operations, images, strict=True):
            for atom, other in enumerate(phase.positions):
                if phase.symbols[atom] == site.symbol and _distance(image, other) < _SAME:
                    rotation_to.setdefault(atom, rotation)
        for direction in directions.T:
            mode = np.zeros((len(phase.positions), 3))
            for atom, rotation in rotation_to.items():
                mode[atom] = rotation @ direction
            modes.append(mode / np.linalg.norm(metric @ direction))
    floating = _range_of(np.mean([rotation for rotation, _ in operations], axis=0))
    dependent = [np.tile(direction, len(phase.positions)) for direction in floating.T]
    independent: list[_Array] = []
    for mode in reversed(modes):
        if np.linalg.matrix_rank(np.array([*dependent, mode.ravel()]), tol=1e-6) > len(dependent):
            dependent.append(mode.ravel())
            independent.append(mode)
    return np.array(independent[::-1]).reshape(-1, len(phase.positions), 3)


def displaced(phase: Phase, modes: _Array, shifts: _Array) -> Phase:
    """Return a phase with its atoms displaced along its :func:`free_coordinates`.

    Modes have shape (m, n_atoms, 3); shifts, (m,), are in Å of the CIF's cell.
    """
    return replace(phase, positions=phase.positions + np.tensordot(shifts, modes, axes=1))


def _distance(a: _Array, b: _Array) -> float:
    """Return the largest difference of fractional coordinates, whole cells apart."""
    difference = a - b
    return float(np.abs(difference - np.round(difference)).max())


def _range_of(projector: _Array) -> _Array:
    """Return an orthonormal basis of a projector's range, as columns."""
    vectors, values, _ = np.linalg.svd(projector)
    return np.asarray(vectors[:, values > 1e-6])
