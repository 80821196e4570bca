"""Atomic coordinates that symmetry leaves free, as displacements of all atoms of the cell."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.structure import Phase

_SAME = 1e-3  # fractional: positions that close are one

_Array = NDArray[np.float64]


def free_coordinates(phase: Phase) -> _Array:
    r"""Return the independent displacements of the atoms that keep the space group.

    The positions that a site's stabiliser S leaves alone are the range of the projector
    :math:`\frac{1}{|S|} \sum_{R \in S} R`; the other operations carry a displacement to the site's
    equivalents. Where the space group fixes no origin along some direction, a shift of all atoms
    together changes nothing: the first sites lose that freedom.

    Returns
    -------
    shape (m, n_atoms, 3)
        Fractional displacements of the atoms of :attr:`Phase.positions`; each moves its first atom
        by 1 Å in the CIF's cell.
    """
    metric = _orthogonalization(phase.cell)
    operations = [_affine(op) for op in phase.group_ops]
    modes: list[_Array] = []
    for site in phase.sites:
        position = np.array(site.position)
        images = [rotation @ position + shift for rotation, shift in operations]
        fixed = [r for (r, _), image in zip(operations, images, strict=True)
                 if _apart(image, position) < _SAME]  # fmt: skip
        directions = _range_of(np.mean(fixed, axis=0))
        found: dict[int, _Array] = {}
        for (rotation, _), image in zip(operations, images, strict=True):
            for atom, other in enumerate(phase.positions):
                if phase.symbols[atom] == site.symbol and _apart(image, other) < _SAME:
                    found.setdefault(atom, rotation)
        for direction in directions.T:
            mode = np.zeros((len(phase.positions), 3))
            for atom, rotation in found.items():
                mode[atom] = rotation @ direction
            modes.append(mode / np.linalg.norm(metric @ direction))
    floating = _range_of(np.mean([rotation for rotation, _ in operations], axis=0))
    known = [np.tile(direction, len(phase.positions)) for direction in floating.T]
    kept: list[_Array] = []
    for mode in reversed(modes):
        if np.linalg.matrix_rank(np.array([*known, mode.ravel()]), tol=1e-6) > len(known):
            known.append(mode.ravel())
            kept.append(mode)
    return np.array(kept[::-1]).reshape(-1, len(phase.positions), 3)


def displaced(phase: Phase, modes: _Array, shifts: _Array) -> Phase:
    """Return a phase with its atoms displaced.

    Parameters
    ----------
    phase, modes : modes of shape (m, n_atoms, 3)
        The phase and its :func:`free_coordinates`.
    shifts : shape (m,)
        In Å of the CIF's cell.
    """
    return replace(phase, positions=phase.positions + np.tensordot(shifts, modes, axes=1))


def _affine(op: gemmi.Op) -> tuple[_Array, _Array]:
    return np.array(op.rot) / op.DEN, np.array(op.tran) / op.DEN


def _apart(one: _Array, other: _Array) -> float:
    difference = one - other
    return float(np.abs(difference - np.round(difference)).max())


def _range_of(projector: _Array) -> _Array:
    """Return an orthonormal basis of a projector's range, as columns."""
    vectors, values, _ = np.linalg.svd(projector)
    return np.asarray(vectors[:, values > 1e-6])


def _orthogonalization(cell: _Array) -> _Array:
    return np.array(gemmi.UnitCell(*cell).orth.mat.tolist())
