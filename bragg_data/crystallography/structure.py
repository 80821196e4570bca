"""Crystal structures: phases from CIF files, their scattering lengths and free coordinates."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bragg_data.arrays import Array
from bragg_data.crystallography.atoms import all_atoms, coincident_sites
from bragg_data.crystallography.cell import (
    CELL_PARAMETERS,
    CrystalError,
    CrystalSystem,
    Lattice,
    cell_volume,
    check_volume,
    lattice_from_space_group,
)
from bragg_data.crystallography.cif import Site, cell_of, read_text, select_block, sites_of
from bragg_data.crystallography.consistency import contradictions
from bragg_data.crystallography.scattering import (
    ResonanceError,
    absorption_cross_section,
    atomic_mass,
    is_resonant,
    scattering_length,
)
from bragg_data.crystallography.symmetry import space_group_of

_SAME = 1e-3  # fractional: closer positions are the same


@dataclass(frozen=True, eq=False)
class Phase:
    """One crystal structure: a space group and atoms at fixed fractional coordinates."""

    name: str  # the campaign's
    space_group: str  # extended Hermann-Mauguin symbol, for example R 3 m:R
    lattice: Lattice
    cell: Array  # (6,) of the CIF, in ångström and degrees
    symbols: tuple[str, ...]  # of all atoms of the cell, as the next three
    positions: Array  # (n_atoms, 3) fractional
    occupancies: Array  # (n_atoms,)
    u_iso: Array  # (n_atoms,) in Å²
    sites: tuple[Site, ...]  # the asymmetric unit, from which symmetry makes all atoms
    site_of_atom: tuple[int, ...]  # place in `sites` of each atom
    cif: str  # the text of the CIF
    assumptions: tuple[str, ...] = ()  # sentences: what the CIF leaves open, and how it was read
    two_theta: float | None = None  # degrees; gives the wavelengths of resonant elements
    # (n_atoms,) group of each atom, whose displacement parameters are equal and change together;
    # None: atoms with the same displacement parameter form one.
    displacement_groups: tuple[int, ...] | None = None

    @property
    def crystal_system(self) -> CrystalSystem:
        """The crystal system of the space group."""
        return self.lattice.crystal_system

    @property
    def scattering_lengths(self) -> NDArray[np.complex128]:
        """Bound coherent scattering length of each atom times occupancy, in 1e-12 cm.

        A ResonanceError is raised if one of them varies with the wavelength.
        """
        lengths = [scattering_length(symbol) for symbol in self.symbols]
        return np.array(lengths, dtype=np.complex128) * self.occupancies

    @property
    def group_ops(self) -> gemmi.GroupOps:
        """The symmetry operations of the space group, in its setting."""
        group = gemmi.find_spacegroup_by_name(self.space_group)
        assert group is not None  # the symbol was written by gemmi itself
        return group.operations()

    @property
    def cell_mass(self) -> float:
        """Mass of the atoms of a unit cell in u."""
        masses = [atomic_mass(symbol) for symbol in self.symbols]
        return float(np.dot(masses, self.occupancies))

    @property
    def absorption(self) -> float:
        """Linear absorption coefficient at 1.798 Å in 1/cm: barn over Å³."""
        sections = [absorption_cross_section(symbol) for symbol in self.symbols]
        return float(np.dot(sections, self.occupancies) / cell_volume(self.cell[None])[0])

    def at_angle(self, two_theta: float) -> Self:
        """Return the phase as it scatters to an angle in degrees.

        There a reflection has the wavelength 2 d sin θ, on which the scattering lengths of resonant
        elements depend. Without such elements it is this same phase.
        """
        if abs(two_theta) == self.two_theta or not any(map(is_resonant, set(self.symbols))):
            return self
        return replace(self, two_theta=abs(two_theta))

    def with_displacement_groups(self, groups: Sequence[int], u_iso: ArrayLike) -> Self:
        """Return the phase with a displacement parameter for each group of its atoms.

        ``groups`` (n_atoms,) count from 0, without gaps; ``u_iso`` (n_groups,) are in Å².
        """
        members = tuple(int(group) for group in groups)
        values = np.asarray(u_iso, dtype=np.float64)[list(members)]
        return replace(self, displacement_groups=members, u_iso=values)


def scaled_to_volume_per_atom(phase: Phase, reference: Phase, reference_cell: Array) -> Array:
    """Return the cell of a phase's CIF, scaled to the volume per atom of a reference phase's cell.

    Both cells have shape (6,), in Å and degrees; axial ratios and angles stay those of the CIF. A
    CrystalError is raised if the reference's cell encloses no volume.
    """
    check_volume(reference_cell[None])
    volume_per_atom = cell_volume(reference_cell[None])[0] / len(reference.positions)
    cell = np.array(phase.cell, dtype=np.float64)
    cell[:3] *= (volume_per_atom * len(phase.positions) / cell_volume(cell[None])[0]) ** (1 / 3)
    return cell


_RECTANGULAR = """data_x
_cell_length_a {0} _cell_length_b {1} _cell_length_c {2}
_cell_angle_alpha 90 _cell_angle_beta 90 _cell_angle_gamma 90
_space_group_name_H-M_alt '{group}'
loop_
_atom_site_label _atom_site_type_symbol
_atom_site_fract_x _atom_site_fract_y _atom_site_fract_z
_atom_site_U_iso_or_equiv
{atoms}
"""


def phase_on_orthogonal_axes(
    name: str, space_group: str, lengths: tuple[float, float, float], atoms: str
) -> Phase:
    """Return a phase whose cell has right angles, from the values of a published table.

    ``lengths`` are in Å; ``atoms`` has a line for each: label, element, x, y, z, U in Å². Raises
    the errors of :func:`read_phase`.
    """
    return read_phase(_RECTANGULAR.format(*lengths, group=space_group, atoms=atoms), name)


def read_phase(cif: Path | str, name: str, block: str | None = None) -> Phase:
    """Read a phase from a CIF file, or from the text of one, and warn of what was assumed.

    Raises the errors of :func:`phase_from_cif`, and a CrystalError if there is no such file.
    """
    where = str(cif) if isinstance(cif, Path) else f"CIF of phase '{name}'"
    text = read_text(cif) if isinstance(cif, Path) else cif
    phase = phase_from_cif(text, name, block, where)
    for assumption in phase.assumptions:
        warnings.warn(f"{where}: {assumption}", stacklevel=2)
    return phase


def phase_from_cif(text: str, name: str, block: str | None = None, where: str = "") -> Phase:
    """Return the phase of a CIF's text.

    Anisotropic displacement parameters become their equivalent isotropic ones. What the CIF leaves
    open is in :attr:`Phase.assumptions`.

    Raises a CrystalError if the text names no known space group, no atoms, or several structures
    without the name of a data ``block``, if its origin is open, or if its cell contradicts its
    space group. ``where`` names the file in errors.
    """
    where = where or f"CIF of phase '{name}'"
    content = select_block(text, where, block)
    parameters = cell_of(content, where)
    sides = np.where(np.isnan(parameters[:3]), parameters[0], parameters[:3])
    angles = np.where(np.isnan(parameters[3:]), 90.0, parameters[3:])
    try:
        check_volume(np.concatenate([sides, angles])[None])
    except CrystalError as error:
        raise CrystalError(f"{where}: {error}") from error
    cell = gemmi.UnitCell(*sides, *angles)
    unit, of_atoms = sites_of(content, cell, where)
    sites = unit.sites
    if not sites:
        raise CrystalError(f"{where} lists no atoms (_atom_site_fract_x …), so nothing scatters.")
    group, of_group = space_group_of(unit)
    lattice = lattice_from_space_group(group)
    parameters, of_cell = _completed_cell(parameters, lattice, where)
    try:
        lattice.check(parameters[None])
    except CrystalError as error:
        raise CrystalError(f"{where}: {error}") from error
    repeated = [tag for tag in content.repeated if tag.startswith(("_cell", "_atom", "_s"))]
    of_tags = (f"Given twice: {', '.join(repeated)}; the first counts.",)
    for symbol in sorted({site.symbol for site in sites}):
        # A resonance is refused by the simulator that cannot model it.
        try:
            scattering_length(symbol)
        except ResonanceError:
            pass
        except CrystalError as error:
            raise CrystalError(f"{where}: {error}") from error
    unit = replace(unit, cell=gemmi.UnitCell(*parameters))
    atoms = all_atoms(unit, group)
    of_site = [sites[site] for site in atoms.site]
    of_places = [
        f"{unit.label(a)} and {unit.label(b)} are at the same place: both are used."
        for a, b in coincident_sites(unit, atoms)
    ]
    return Phase(
        name=name,
        space_group=group.xhm(),
        lattice=lattice,
        cell=parameters,
        symbols=tuple(site.symbol for site in of_site),
        positions=atoms.positions % 1.0,
        occupancies=np.array([site.occupancy for site in of_site]),
        u_iso=np.array([site.u_iso for site in of_site]),
        sites=sites,
        site_of_atom=tuple(int(site) for site in atoms.site),
        cif=text,
        assumptions=(
            *of_group,
            *of_cell,
            *of_atoms,
            *of_places,
            *(of_tags if repeated else ()),
            *contradictions(unit, group, atoms),
        ),
    )


def _completed_cell(values: Array, lattice: Lattice, where: str) -> tuple[Array, tuple[str, ...]]:
    """Return a cell with its gaps filled by the constraints of its lattice, and a report."""
    missing = np.isnan(values)
    if not missing.any():
        return values, ()
    filled = lattice.cells(values[None, lattice.free_columns])[0]
    names = ", ".join(n for n, gap in zip(CELL_PARAMETERS, missing, strict=True) if gap)
    if np.isnan(filled).any():
        raise CrystalError(f"{where} has no complete unit cell: it lacks {names}.")
    complete = np.where(missing, filled, values)
    return complete, (f"The cell lacks {names}: filled in from its crystal system.",)


@lru_cache(maxsize=32)
def free_coordinates(phase: Phase) -> Array:
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
    modes: list[Array] = []
    for site in phase.sites:
        position = np.array(site.position)
        images = [rotation @ position + shift for rotation, shift in operations]
        fixed = [
            rotation
            for (rotation, _), image in zip(operations, images, strict=True)
            if _distance(image, position) < _SAME
        ]
        directions = _range_of(np.mean(fixed, axis=0))
        rotation_to: dict[int, Array] = {}
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
    independent: list[Array] = []
    for mode in reversed(modes):
        if np.linalg.matrix_rank(np.array([*dependent, mode.ravel()]), tol=1e-6) > len(dependent):
            dependent.append(mode.ravel())
            independent.append(mode)
    return np.array(independent[::-1]).reshape(-1, len(phase.positions), 3)


def _distance(a: Array, b: Array) -> float:
    """Return the largest difference of fractional coordinates, whole cells apart."""
    difference = a - b
    return float(np.abs(difference - np.round(difference)).max())


def _range_of(projector: Array) -> Array:
    """Return an orthonormal basis of a projector's range, as columns."""
    vectors, values, _ = np.linalg.svd(projector)
    return np.asarray(vectors[:, values > 1e-6])
