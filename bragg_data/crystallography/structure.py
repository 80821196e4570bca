"""Crystal structures: phases from CIF files, their scattering lengths and free coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import gemmi
import numpy as np
import periodictable
from numpy.typing import NDArray

from bragg_data.crystallography.cell import (
    CrystalError,
    CrystalSystem,
    Lattice,
    cell_volume,
    check_volume,
    lattice_from_space_group,
)
from bragg_data.errors import first_line

# Elements whose scattering length varies with energy over the thermal range (a nuclear resonance,
# tabulated with Breit-Wigner terms by GSAS-II and Lynn & Seeger, ADNDT 44 (1990) 191).
_RESONANT = frozenset({"Cd", "Rh", "Sm", "Eu", "Gd", "Er", "Yb"})

# An imaginary scattering length below this share of |b| changes |F|² by less than 1e-4.
_NEGLIGIBLE_IMAGINARY = 0.01

_SAME = 1e-3  # fractional: closer positions are the same

_Array = NDArray[np.float64]


class ResonanceError(CrystalError):
    """An element whose scattering length depends on the wavelength."""


@dataclass(frozen=True)
class Site:
    """An atom of the asymmetric unit."""

    symbol: str  # of the element, or D
    position: tuple[float, float, float]  # fractional coordinates
    occupancy: float
    u_iso: float  # isotropic displacement parameter, in Å²


@dataclass(frozen=True, eq=False)
class Phase:
    """One crystal structure: a space group and atoms at fixed fractional coordinates."""

    name: str  # the campaign's
    space_group: str  # extended Hermann-Mauguin symbol, for example R 3 m:R
    lattice: Lattice
    cell: NDArray[np.float64]  # (6,) of the CIF, in ångström and degrees
    symbols: tuple[str, ...]  # of all atoms of the cell, as the next three
    positions: NDArray[np.float64]  # (n_atoms, 3) fractional
    occupancies: NDArray[np.float64]  # (n_atoms,)
    u_iso: NDArray[np.float64]  # (n_atoms,) in Å²
    sites: tuple[Site, ...]  # the asymmetric unit, from which symmetry makes all atoms
    cif: str  # the text of the CIF

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


def scattering_length(element: str) -> complex:
    """Return the bound coherent scattering length of an element in 1e-12 cm (10 fm).

    The values are those of the periodictable package (Rauch & Waschkowski; Sears, Neutron News 3
    (1992) 26). An imaginary part (absorption, for example boron) is kept where it matters.

    Raises a CrystalError for an element without a tabulated value, a ResonanceError for one with a
    resonance in the thermal range.
    """
    try:
        neutron = periodictable.elements.symbol(element).neutron
        b = neutron.b_c
    except (ValueError, AttributeError) as error:
        raise CrystalError(
            f"Element '{element}' has no neutron scattering length. Correct the atom types of the "
            f"CIF."
        ) from error
    if b is None:
        raise CrystalError(
            f"Element '{element}' has no measured neutron scattering length, so no pattern of it "
            f"can be simulated."
        )
    if element in _RESONANT or neutron.is_energy_dependent:
        raise ResonanceError(
            f"Element '{element}' has a resonance in the thermal range: its scattering length "
            f"varies with wavelength, which the kinematic simulator does not model. Use "
            f"--simulator gsas2 for this structure."
        )
    imaginary = getattr(neutron.b_c_complex, "imag", 0.0)
    matters = abs(imaginary) >= _NEGLIGIBLE_IMAGINARY * abs(b)
    return complex(b, imaginary if matters else 0.0) / 10.0


def scaled_to_volume_per_atom(
    phase: Phase, reference: Phase, reference_cell: NDArray[np.float64]
) -> NDArray[np.float64]:
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
_cell_length_a {0}
_cell_length_b {1}
_cell_length_c {2}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt '{group}'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
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


def read_phase(cif: Path | str, name: str) -> Phase:
    """Read a phase from a CIF file, or from the text of one.

    Anisotropic displacement parameters become their equivalent isotropic ones, with a warning.
    Raises a CrystalError if the file is missing or unreadable, names no known space group or no
    atoms, or if its cell contradicts its space group.
    """
    if isinstance(cif, Path):
        where = str(cif)
        try:
            text = cif.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise CrystalError(f"CIF file {cif} not found. Give the path of a CIF file.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise CrystalError(f"CIF file {cif} cannot be read: {error}.") from error
    else:
        where, text = f"CIF of phase '{name}'", cif
    structure = _structure(text, where)
    group = structure.spacegroup
    if group is None:
        raise CrystalError(
            f"{where} names no known space group: give its symmetry operations "
            f"(_space_group_symop_operation_xyz) or its Hermann-Mauguin symbol."
        )
    lattice = lattice_from_space_group(group)
    cell = np.array(structure.cell.parameters)
    try:
        lattice.check(cell[None])
    except CrystalError as error:
        raise CrystalError(f"{where}: {error}") from error

    sites = _sites(structure.sites, structure.cell)
    atoms = _sites(structure.get_all_unit_cell_sites(), structure.cell)
    if not atoms:
        raise CrystalError(f"{where} lists no atoms (_atom_site_fract_x …), so nothing scatters.")
    for symbol in sorted({site.symbol for site in sites}):
        # A resonance is refused by the simulator that cannot model it.
        with suppress(ResonanceError):
            scattering_length(symbol)
    if any(site.aniso.nonzero() for site in structure.sites):
        warnings.warn(
            f"{where} has anisotropic displacement parameters: their equivalent isotropic values "
            f"are used.",
            stacklevel=2,
        )
    return Phase(
        name=name,
        space_group=group.xhm(),
        lattice=lattice,
        cell=cell,
        symbols=tuple(atom.symbol for atom in atoms),
        positions=np.array([atom.position for atom in atoms]) % 1.0,
        occupancies=np.array([atom.occupancy for atom in atoms]),
        u_iso=np.array([atom.u_iso for atom in atoms]),
        sites=sites,
        cif=text,
    )


def _sites(sites: Iterable[gemmi.SmallStructure.Site], cell: gemmi.UnitCell) -> tuple[Site, ...]:
    return tuple(
        Site(
            symbol="D" if site.type_symbol == "D" else site.element.name,
            position=(site.fract.x, site.fract.y, site.fract.z),
            occupancy=site.occ,
            u_iso=_u_equivalent(site.aniso, cell) if site.aniso.nonzero() else site.u_iso,
        )
        for site in sites
        if site.occ > 0
    )


def _structure(text: str, where: str) -> gemmi.SmallStructure:
    try:
        blocks = list(gemmi.cif.read_string(text))
        blocks = [block for block in blocks if block.find_values("_atom_site_fract_x")]
        structure = gemmi.make_small_structure_from_block(blocks[0]) if blocks else None
    except (ValueError, RuntimeError) as error:
        raise CrystalError(f"{where} is not a readable CIF: {first_line(error)}.") from error
    if structure is None:
        raise CrystalError(
            f"{where} holds no atoms: a CIF with _cell_length_a … and _atom_site_fract_x … is "
            f"needed."
        )
    # Operations come first: the symbol alone does not always tell the setting.
    structure.determine_and_set_spacegroup("S.H2")
    return structure


def _u_equivalent(u: gemmi.SMat33d, cell: gemmi.UnitCell) -> float:
    r"""Return the equivalent isotropic displacement parameter in Å².

    .. math:: U_\text{eq} = \frac13 \sum_{ij} U_{ij} a_i^* a_j^* \mathbf a_i\cdot\mathbf a_j

    Fischer & Tillmanns, Acta Cryst. C44 (1988) 775.
    """
    direct = np.array(cell.orth.mat.tolist())
    metric = direct.T @ direct
    star = np.sqrt(np.diag(np.linalg.inv(metric)))
    tensor = np.array([[u.u11, u.u12, u.u13], [u.u12, u.u22, u.u23], [u.u13, u.u23, u.u33]])
    return float((tensor * np.outer(star, star) * metric).sum() / 3)


@lru_cache(maxsize=32)
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
