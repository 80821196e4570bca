"""Lattices that are nearly more symmetric than their phase: the cells that look alike."""

import gemmi
import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import encloses_volume
from bragg_data.crystallography.structure import Phase

_OBLIQUITY = 2.5  # degrees, up to which an operation counts as one of the lattice
_SAME = 2e-4  # relative: cells that differ by less are one
_MOST = 8


def pseudosymmetric_cells(phase: Phase, free: Array) -> list[Array]:
    """Return other free cell parameters (n_free,) with lines at nearly the same places.

    An operation of the lattice that is none of the space group's, but for a small distortion (Le
    Page, J. Appl. Cryst. 15 (1982) 255, by gemmi), exchanges axes that are nearly equivalent. The
    exchanged metric is averaged over the space group.
    """
    if len(free) < 3:
        return []  # of axes that are equal but for one, no exchange is left after the average
    cell = phase.lattice.cells(free[None])[0]
    centring = phase.space_group[0] if phase.space_group[0] in "PABCIFR" else "P"
    if centring == "R" and phase.lattice.free_parameters == ("a", "alpha"):
        centring = "P"
    unit = gemmi.UnitCell(*cell)
    metric = _metric(cell)
    rotations = [np.array(op.rot) / op.DEN for op in phase.group_ops.sym_ops]
    alternatives: list[Array] = []
    for op in gemmi.find_lattice_symmetry(unit, centring, _OBLIQUITY).sym_ops:
        rotation = np.array(op.rot) / op.DEN
        exchanged = rotation.T @ metric @ rotation
        mean = np.mean([r.T @ exchanged @ r for r in rotations], axis=0)
        candidate = _cell(mean)[phase.lattice.free_columns]
        known = [free, *alternatives]
        if (
            all(np.abs(candidate / other - 1).max() > _SAME for other in known)
            and (encloses_volume(phase.lattice.cells(candidate[None]))[0])
        ):
            alternatives.append(candidate)
    return alternatives[:_MOST]


def _metric(cell: Array) -> Array:
    """Return the metric tensor (3, 3) of a cell (6,), in Å²."""
    orthogonal = np.array(gemmi.UnitCell(*cell).orth.mat.tolist())
    return np.asarray(orthogonal.T @ orthogonal)


def _cell(metric: Array) -> Array:
    """Return the cell (6,) of a metric tensor (3, 3) in Å²."""
    lengths = np.sqrt(np.diag(metric))
    cosines = metric / np.outer(lengths, lengths)
    angles = np.degrees(np.arccos(np.clip(cosines[[1, 0, 0], [2, 2, 1]], -1, 1)))
    return np.concatenate([lengths, angles])
