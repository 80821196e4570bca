"""The atoms that a space group makes of sites, and the distances between them."""

import itertools
from typing import NamedTuple

import gemmi
import numpy as np

from bragg_data.arrays import Array, Indices
from bragg_data.crystallography.cif import AsymmetricUnit
from bragg_data.crystallography.scattering import element_of

IMPOSSIBLE = 0.5
"""Share of the sum of covalent radii: no two atoms are closer."""

_FULL = 1.05  # sum of occupancies, rounded, of atoms that share a place
_ROUNDING, _MERGED = 0.1, 0.4  # Å; images in between are one atom, though coordinates differ


class Atoms(NamedTuple):
    """All atoms of a unit cell."""

    site: Indices  # (n,) of the asymmetric unit
    positions: Array  # (n, 3) fractional


class Contact(NamedTuple):
    """The shortest distance between atoms, over the sum of their covalent radii."""

    ratio: float
    first: int  # site, as the next
    second: int
    images: bool = False  # of one atom, that count as one though they are this far apart


def all_atoms(unit: AsymmetricUnit, group: gemmi.SpaceGroup) -> Atoms:
    """Return the atoms that a space group makes of sites; images within 0.4 Å are one."""
    structure = gemmi.SmallStructure()
    structure.cell = unit.cell
    structure.spacegroup = group
    for number, site in enumerate(unit.sites):
        atom = gemmi.SmallStructure.Site()
        atom.label = str(number)
        atom.fract = gemmi.Fractional(*site.position)
        structure.add_site(atom)
    structure.setup_cell_images()
    atoms = structure.get_all_unit_cell_sites()
    return Atoms(
        np.array([int(atom.label) for atom in atoms], dtype=np.intp),
        np.array([(atom.fract.x, atom.fract.y, atom.fract.z) for atom in atoms]).reshape(-1, 3),
    )


def closest_contact(unit: AsymmetricUnit, group: gemmi.SpaceGroup) -> Contact:
    """Return the shortest distance between atoms over the sum of their covalent radii.

    Atoms that cannot be there together, since their occupancies sum to 1 or less, do not count.
    """
    atoms = all_atoms(unit, group)
    radius = np.array([gemmi.Element(element_of(s.symbol)).covalent_r for s in unit.sites])
    radius = radius[atoms.site]
    occupancies = np.array([site.occupancy for site in unit.sites])[atoms.site]
    first = np.unique(atoms.site, return_index=True)[1]  # one of each site meets all neighbours
    shifts = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
    orthogonal = np.array(unit.cell.orth.mat.tolist())
    closest = _closest_image(unit, group)
    for atom in first:
        difference = atoms.positions - atoms.positions[atom]
        difference -= np.round(difference)
        images = (difference[:, None] + shifts) @ orthogonal.T
        distance = np.linalg.norm(images, axis=2)
        distance[atom, 13] = np.inf  # itself
        distance[occupancies + occupancies[atom] <= 1.001] = np.inf
        ratios = distance.min(axis=1) / (radius + radius[atom])
        nearest = int(ratios.argmin())
        if ratios[nearest] < closest.ratio:
            closest = Contact(float(ratios[nearest]), *atoms.site[[atom, nearest]].tolist())
    return closest


def coincident_sites(unit: AsymmetricUnit, atoms: Atoms) -> list[tuple[int, int]]:
    """Return pairs of sites at one place that cannot both be there: their occupancies exceed 1."""
    occupancies = np.array([site.occupancy for site in unit.sites])
    pairs = []
    for site, first in enumerate(np.unique(atoms.site, return_index=True)[1].tolist()):
        distance = _lengths(unit.cell, atoms.positions - atoms.positions[first])
        near = np.unique(atoms.site[distance < _ROUNDING])
        full = occupancies[near] + occupancies[site] > _FULL
        pairs += [(site, other) for other in near[full].tolist() if other > site]
    return pairs


def _lengths(cell: gemmi.UnitCell, differences: Array) -> Array:
    """Return the lengths (n,) in Å of fractional differences (n, 3), whole cells apart."""
    orthogonal = np.array(cell.orth.mat.tolist())
    return np.asarray(np.linalg.norm((differences - np.round(differences)) @ orthogonal.T, axis=1))


def _closest_image(unit: AsymmetricUnit, group: gemmi.SpaceGroup) -> Contact:
    """Return the closest images that count as one atom, further apart than rounding."""
    operations = list(group.operations())
    rotations = np.array([op.rot for op in operations]) / gemmi.Op.DEN
    shifts = np.array([op.tran for op in operations]) / gemmi.Op.DEN
    closest = Contact(np.inf, 0, 0)
    for number, site in enumerate(unit.sites):
        difference = rotations @ np.array(site.position) + shifts - np.array(site.position)
        distance = _lengths(unit.cell, difference)
        distance = distance[(distance > _ROUNDING) & (distance < _MERGED)]
        if len(distance) and site.occupancy > 0.5:
            radius = gemmi.Element(element_of(site.symbol)).covalent_r
            ratio = float(distance.min()) / (2 * radius)
            closest = min(closest, Contact(ratio, number, number, images=True))
    return closest
