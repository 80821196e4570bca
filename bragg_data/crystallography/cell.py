"""Unit cells, crystal systems, the constraints of lattices and d-spacings."""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bragg_data.arrays import Array, Mask

CELL_PARAMETERS = ("a", "b", "c", "alpha", "beta", "gamma")
"""Names of the six cell parameters; a, b, c in ångström, alpha, beta, gamma in degrees."""

EQUAL_LENGTHS = 1e-6  # Å; cell lengths, and angles in degrees, that are closer count as equal
_FLAT = 1e-9  # square of V/(abc) below which a cell counts as flat
_LENGTHS = (1.0, 1000.0)  # Å, of cells that are moved to enclose volume
_ANGLE_MARGIN = 0.5  # degrees
_ANGLE_LIMITS = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]], dtype=np.float64)


class CrystalSystem(IntEnum):
    """The seven crystal systems, coded as everywhere in this project: the paper's three first."""

    cubic = 0
    tetragonal = 1
    trigonal = 2
    hexagonal = 3
    orthorhombic = 4
    monoclinic = 5
    triclinic = 6


class CrystalError(ValueError):
    """A cell or a structure that contradicts itself or its space group."""


@dataclass(frozen=True)
class Lattice:
    """The metric constraints of a space group in its setting."""

    crystal_system: CrystalSystem
    free_parameters: tuple[str, ...]  # in the order of CELL_PARAMETERS
    # Each other parameter, and the free one that it equals or a fixed angle in degrees.
    tied: tuple[tuple[str, str | float], ...]

    @cached_property
    def metric_terms(self) -> tuple[tuple[int, ...], ...]:
        """The terms of :func:`reciprocal_metric` that are always equal, grouped, without zero ones.

        A cubic lattice has one group (0, 1, 2), a rhombohedral one (0, 1, 2) and (3, 4, 5), a
        triclinic one six of one term each. Reflections whose products agree in every group have
        the same d in every cell.
        """
        # Two cells without accidental equalities show which terms are tied.
        generic = np.array([[4.1, 5.3, 6.7, 83.0, 97.0, 101.0], [7.3, 6.1, 4.7, 78.0, 95.0, 88.0]])
        metric = reciprocal_metric(self.cells(generic[:, self.free_columns]))
        groups: list[tuple[int, ...]] = []
        for term in range(6):
            if any(term in group for group in groups) or np.abs(metric[:, term]).max() < 1e-12:
                continue
            equal = np.isclose(metric, metric[:, [term]], rtol=1e-9, atol=0).all(axis=0)
            groups.append(tuple(int(t) for t in np.flatnonzero(equal)))
        return tuple(groups)

    def independent_metric(self, cells: Array) -> Array:
        """Return a term of each of :attr:`metric_terms` of cells (n, 6), (n, n_terms) in Å⁻²."""
        first = [group[0] for group in self.metric_terms]
        return np.ascontiguousarray(reciprocal_metric(cells)[:, first])

    @property
    def free_columns(self) -> list[int]:
        """Positions of the free parameters among the six of a cell."""
        return [CELL_PARAMETERS.index(name) for name in self.free_parameters]

    @property
    def free_mask(self) -> Mask:
        """Which of the six cell parameters are free, shape (6,)."""
        return np.array([name in self.free_parameters for name in CELL_PARAMETERS])

    def cells(self, free: ArrayLike) -> Array:
        """Return cells (n, 6) in Å and degrees from the free parameters, shape (n, n_free)."""
        free = np.asarray(free, dtype=np.float64)
        cells = np.empty((len(free), 6))
        cells[:, self.free_columns] = free
        for name, source in self.tied:
            cells[:, CELL_PARAMETERS.index(name)] = _tied_value(cells, source)
        return cells

    def check_tied(self, cells: Array) -> None:
        """Refuse cells (n, 6) in which a tied parameter has another value than its lattice's.

        The CrystalError names the first such cell, what it has and what it must have.
        """
        for name, source in self.tied:
            values = cells[:, CELL_PARAMETERS.index(name)]
            wrong = np.flatnonzero(~(np.abs(values - _tied_value(cells, source)) <= EQUAL_LENGTHS))
            if len(wrong):
                target = source if isinstance(source, str) else f"{source:g}°"
                raise CrystalError(
                    f"Cell {_cell_text(cells[wrong[0]])} is not {self.crystal_system.name} in "
                    f"this setting: {name} is {values[wrong[0]]:g} and must equal {target}."
                )

    def check(self, cells: Array) -> None:
        """Refuse cells, shape (n, 6) in Å and degrees, that break the constraints of this lattice.

        Raises a CrystalError if a tied parameter has another value, if the cell encloses no volume,
        or if the tetragonal (or trigonal) cell is metrically cubic, so that its label would be
        wrong.
        """
        self.check_tied(cells)
        check_volume(cells)
        # Cells of other systems are not compared with lattices of higher symmetry.
        if self.crystal_system is CrystalSystem.tetragonal:
            equal, special = "a = c", np.abs(cells[:, 0] - cells[:, 2]) <= EQUAL_LENGTHS
        elif self.free_parameters == ("a", "alpha"):
            equal, special = "alpha = 90°", np.abs(cells[:, 3] - 90.0) <= EQUAL_LENGTHS
        else:
            return
        if special.any():
            first = _cell_text(cells[np.flatnonzero(special)[0]])
            raise CrystalError(
                f"Cell {first} is labelled {self.crystal_system.name} but has {equal}, which is "
                f"cubic ({special.sum()} such cells): leave these cells out, or label them cubic."
            )

    def clip_to_domain(self, free: ArrayLike) -> Array:
        """Move free parameters, (n, n_free), whose cell encloses no volume to ones whose cell does.

        Cells that enclose volume stay as they are, bit by bit. Lengths are clipped to between 1 and
        1,000 Å; angles move along a straight line towards right angles, until every angle is half a
        degree from the limits that the other two set. A rhombohedral cell of alpha = 125° gets
        alpha = 119.83°. NaN stays NaN.
        """
        clipped = np.array(free, dtype=np.float64)
        cells = self.cells(clipped)
        outside = ~encloses_volume(cells)
        cells = cells[outside]
        from_right = np.clip(cells[:, 3:], 0.0, 180.0) - 90.0
        # Three angles close a corner if each is less than the sum of the others, and all below
        # 360°: four planes, the faces of a tetrahedron about (90°, 90°, 90°).
        distance = (from_right @ _ANGLE_LIMITS.T).max(axis=1)
        share = np.minimum(1.0, (90.0 - _ANGLE_MARGIN) / np.maximum(distance, 1.0))
        angles = 90.0 + share[:, None] * from_right
        moved = np.concatenate([np.clip(cells[:, :3], *_LENGTHS), angles], axis=1)
        clipped[outside] = moved[:, self.free_columns]
        return clipped


def _tied_value(cells: Array, source: str | float) -> Array | float:
    """Return what a tied parameter of cells (n, 6) equals: another parameter, or a constant."""
    return cells[:, CELL_PARAMETERS.index(source)] if isinstance(source, str) else source


def _cell_text(cell: Array) -> str:
    return "(" + ", ".join(f"{value:g}" for value in cell) + ")"


# What each cell parameter is: itself if it is free, another one, or an angle in degrees.
_CONSTRAINTS = {
    CrystalSystem.cubic: "a a a 90 90 90",
    CrystalSystem.tetragonal: "a a c 90 90 90",
    CrystalSystem.trigonal: "a a c 90 90 120",
    CrystalSystem.hexagonal: "a a c 90 90 120",
    CrystalSystem.orthorhombic: "a b c 90 90 90",
    CrystalSystem.triclinic: "a b c alpha beta gamma",
}
_RHOMBOHEDRAL = "a a a alpha alpha alpha"
_MONOCLINIC = {"a": "a b c alpha 90 90", "b": "a b c 90 beta 90", "c": "a b c 90 90 gamma"}


def lattice_from_space_group(group: gemmi.SpaceGroup) -> Lattice:
    """Return the metric constraints of a space group in its setting.

    International Tables for Crystallography, vol. A, table 2.1.2.1. A trigonal group on
    rhombohedral axes is free in a and alpha, on hexagonal axes in a and c; a monoclinic one is
    free in the angle at its unique axis.
    """
    system = CrystalSystem[group.crystal_system_str()]
    if system is CrystalSystem.monoclinic:
        constraints = _MONOCLINIC[group.monoclinic_unique_axis()]
    elif system is CrystalSystem.trigonal and group.ext == "R":
        constraints = _RHOMBOHEDRAL
    else:
        constraints = _CONSTRAINTS[system]
    sources = list(zip(CELL_PARAMETERS, constraints.split(), strict=True))
    free = tuple(name for name, source in sources if source == name)
    tied = [(n, float(s) if s.isdigit() else s) for n, s in sources if s != n]
    return Lattice(system, free, tuple(tied))


def encloses_volume(cells: Array) -> Mask:
    """Return which cells (n, 6) in Å and degrees enclose a volume; NaN and infinity do not."""
    with np.errstate(invalid="ignore"):
        lengths = (cells[:, :3] > 0) & np.isfinite(cells[:, :3])
        angles = (cells[:, 3:] > 0) & (cells[:, 3:] < 180)
        inside = (lengths & angles).all(axis=1)
        return np.asarray(inside & (_squared_volume_factor(cells) > _FLAT))


def check_volume(cells: Array) -> None:
    """Refuse cells, shape (n, 6) in Å and degrees, that enclose no volume.

    The CrystalError names the first such cell, and for a rhombohedral one the limit of alpha.
    """
    bad = ~encloses_volume(cells)
    if not bad.any():
        return
    cell = cells[int(np.flatnonzero(bad)[0])]
    if not ((cell[:3] > 0) & np.isfinite(cell[:3])).all():
        remedy = "Cell lengths must be positive numbers in ångström."
    elif cell[3] == cell[4] == cell[5]:
        remedy = "A rhombohedral cell needs 0° < alpha < 120°."
    else:
        remedy = "Each angle must be smaller than the sum of the other two, and all below 360°."
    raise CrystalError(f"Unit cell {_cell_text(cell)} encloses no volume. {remedy}")


def _squared_volume_factor(cells: Array) -> Array:
    ca, cb, cg = np.cos(cells[:, 3:] * (np.pi / 180)).T
    return np.asarray(1 - ca**2 - cb**2 - cg**2 + 2 * ca * cb * cg)


def cell_volume(cells: Array) -> Array:
    """Return the volume of each cell, shape (n,), in Å³, from cells of shape (n, 6)."""
    volume: Array = cells[:, :3].prod(axis=1) * np.sqrt(_squared_volume_factor(cells))
    return volume


def reciprocal_metric(cells: Array) -> Array:
    r"""Return the six independent terms of the reciprocal metric tensor of each cell.

    With :math:`g` the metric tensor of the direct cell, :math:`G^{-1} = g^{-1}` and

    .. math:: 1/d^2 = m_0 h^2 + m_1 k^2 + m_2 l^2 + m_3 hk + m_4 hl + m_5 kl .

    International Tables for Crystallography, vol. B, section 1.1. From cells (n, 6) in Å and
    degrees, shape (n, 6) in Å⁻²; the mixed terms carry their factor of two.
    """
    a, b, c = cells[:, :3].T
    ca, cb, cg = np.cos(cells[:, 3:] * (np.pi / 180)).T
    s = _squared_volume_factor(cells)
    return np.stack(
        [
            (1 - ca**2) / (a**2 * s),
            (1 - cb**2) / (b**2 * s),
            (1 - cg**2) / (c**2 * s),
            2 * (ca * cb - cg) / (a * b * s),
            2 * (ca * cg - cb) / (a * c * s),
            2 * (cb * cg - ca) / (b * c * s),
        ],
        axis=1,
    )


def index_products(hkl: NDArray[Any]) -> NDArray[Any]:
    """Return h², k², l², hk, hl and kl of Miller indices (n, 3), shape (6, n)."""
    h, k, l = hkl.T  # noqa: E741
    return np.stack([h * h, k * k, l * l, h * k, h * l, k * l])


def d_spacing(hkl: NDArray[np.integer], cells: Array) -> Array:
    r"""Return the interplanar spacing in Å of each reflection in each cell, (n, n_reflections).

    .. math:: d_{hkl} = (\mathbf h^\mathsf{T} G^{-1} \mathbf h)^{-1/2}

    of Miller indices (n_reflections, 3) and cells (n, 6) in Å and degrees. International Tables for
    Crystallography, vol. B, section 1.1.
    """
    products = index_products(np.asarray(hkl, dtype=np.float64))
    return np.asarray((reciprocal_metric(cells) @ products) ** -0.5)
