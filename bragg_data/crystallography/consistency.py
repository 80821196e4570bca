"""What a CIF has twice in different words, compared: cell and volume, atoms and formula.

Each contradiction is a sentence; none is a reason to refuse, since values that nothing is computed
from are often those of another refinement.
"""

import difflib
import re
from collections.abc import Sequence

import gemmi
import numpy as np
import periodictable

from bragg_data.crystallography import cif
from bragg_data.crystallography.atoms import IMPOSSIBLE, Atoms, closest_contact
from bragg_data.crystallography.scattering import element_of, scatterer

_ELEMENT = re.compile(r"(\d*[A-Z][a-z]?)\s*(\d*\.?\d*)")
_LABEL = re.compile(r"[A-Za-z]+[\w()'*+,/\"]*")  # an element, a number, letters and marks
_VOLUME = 2e-4  # relative, beyond the last place: cells are rounded after the volume is computed
_FULL, _EMPTY = 4.0, 130.0  # Å³ for each atom: diamond has 5.7, caesium 116
_COMPOSITION = 0.02  # relative: refined occupancies against a formula of integers
_DENSITY = 0.01  # relative
_AMU_PER_A3 = 1 / 0.602214076  # g/cm³
_FURTHEST = 2.0  # fractional coordinate: atoms are listed in or next to the cell
_LARGEST_U = 0.2  # Å²
_SIMILAR = 0.85  # share of equal characters of a misspelt tag
_MANY = 2_000_000  # pairs of images beyond which distances take more than a second
_SYSTEMS = {"rhombohedral": "trigonal", "isometric": "cubic", "anorthic": "triclinic"}


def contradictions(unit: cif.AsymmetricUnit, group: gemmi.SpaceGroup, atoms: Atoms) -> list[str]:
    """Return what of a data block contradicts its cell, space group or atoms, in sentences."""
    return [
        *_of_tags(unit.block),
        *_of_volume(unit.block, unit.cell),
        *_of_space(unit, atoms),
        *_of_group(unit.block, group),
        *_of_multiplicities(unit, atoms),
        *_of_contents(unit, atoms),
        *_of_values(unit),
        *_of_labels(unit),
        *_of_distances(unit, group, atoms),
    ]


def formula_of(block: cif.CifBlock) -> dict[str, float]:
    """Return the number of each element in the formula of a data block; empty without one."""
    formula: dict[str, float] = {}
    for symbol, count in _ELEMENT.findall(block.text("_chemical_formula_sum")):
        element = _natural(symbol)
        formula[element] = formula.get(element, 0.0) + float(count.rstrip(".") or 1.0)
    return formula


def _natural(symbol: str) -> str:
    """Return an element, H of D: formulas write either."""
    element = element_of(symbol)
    return "H" if element == "D" else element


def contents_of(sites: Sequence[cif.Site], atoms: Atoms) -> dict[str, float]:
    """Return the number of atoms of each element in the cell, by their occupancies."""
    contents: dict[str, float] = {}
    for site in atoms.site:
        element = _natural(sites[site].symbol)
        contents[element] = contents.get(element, 0.0) + sites[site].occupancy
    return contents


def agree(contents: dict[str, float], formula: dict[str, float], units: float) -> bool:
    """Return whether contents are a formula times its units; NaN for any number of units."""
    if not formula or set(contents) != set(formula) or min(formula.values()) <= 0:
        return False
    ratios = np.array([contents[element] / formula[element] for element in sorted(formula)])
    if np.isnan(units):
        units = sum(contents.values()) / sum(formula.values())
    return bool(np.allclose(ratios, units, rtol=_COMPOSITION))


def units_of(block: cif.CifBlock) -> float:
    """Return the number of formula units in the cell, NaN if it is not given."""
    numbers = block.numbers("_cell_formula_units_z")
    return float(numbers[0]) if len(numbers) else float("nan")


def _of_tags(block: cif.CifBlock) -> list[str]:
    notes = []
    for tag in block.columns:
        if tag in cif.SITE_TAGS or tag in _OTHER_TAGS:
            continue
        near = difflib.get_close_matches(tag, cif.SITE_TAGS, 1, _SIMILAR)
        if near and near[0] not in block.columns:
            notes.append(f"The tag {tag[:60]} is unknown, and {near[0]} missing: it was not read.")
    at = [list(block.columns).index(tag) for tag in cif.COORDINATES]
    if at != [at[0], at[0] + 1, at[0] + 2]:
        notes.append("The columns of x, y and z are not side by side: check which is which.")
    return notes


def _of_space(unit: cif.AsymmetricUnit, atoms: Atoms) -> list[str]:
    count = sum(contents_of(unit.sites, atoms).values())
    each = unit.cell.volume / max(count, 1e-3)
    if _FULL < each < _EMPTY:
        return []
    return [
        f"The cell has {each:.2g} Å³ for each of its {count:.3g} atoms: a length or an angle is "
        f"wrong, or atoms are missing."
    ]


def _of_volume(block: cif.CifBlock, cell: gemmi.UnitCell) -> list[str]:
    text = block.text("_cell_volume")
    volume = gemmi.cif.as_number(text) if text else np.nan
    decimals = text.partition("(")[0].partition(".")[2]
    if not abs(volume - cell.volume) > _VOLUME * cell.volume + 10.0 ** -len(decimals):
        return []
    return [
        f"The cell encloses {cell.volume:.3f} Å³, and _cell_volume is {text[:20]}: one of them is "
        f"wrong; the cell is used."
    ]


def _of_group(block: cif.CifBlock, group: gemmi.SpaceGroup) -> list[str]:
    notes = []
    for text in block.texts(*cif.OPERATIONS):
        try:
            gemmi.Op(text.strip())
        except (ValueError, RuntimeError):
            notes.append(f"The symmetry operation '{text[:40]}' cannot be read: it was left out.")
    number = block.text(*cif.NUMBERS)
    if number.isdigit() and int(number) != group.number:
        notes.append(f"The space group {group.xhm()} is number {group.number}, not {number[:9]}.")
    system = block.text("_space_group_crystal_system", "_symmetry_cell_setting").lower()
    system = _SYSTEMS.get(system, system)
    actual = group.crystal_system_str()
    if system and {system, actual} - {"trigonal", "hexagonal"} and system != actual:
        notes.append(f"The space group {group.xhm()} is {actual}, and it is called {system[:20]}.")
    return notes


def _of_multiplicities(unit: cif.AsymmetricUnit, atoms: Atoms) -> list[str]:
    actual = np.bincount(atoms.site, minlength=len(unit.rows))
    for tag in cif.MULTIPLICITIES:
        if tag in unit.block.columns:
            listed = unit.block.numbers(tag)[unit.rows]
            for odd in np.flatnonzero(np.isfinite(listed) & (listed != actual))[:1]:
                return [
                    f"Site {unit.label(odd)} has {actual[odd]} atoms in the cell; its multiplicity "
                    f"is given as {listed[odd]:g}."
                ]
    return []


def _of_contents(unit: cif.AsymmetricUnit, atoms: Atoms) -> list[str]:
    notes, block, sites = [], unit.block, unit.sites
    formula, contents, units = formula_of(block), contents_of(sites, atoms), units_of(block)
    if formula and not agree(contents, formula, units):
        counted = " ".join(f"{element}{count:.6g}" for element, count in contents.items())
        z = "" if np.isnan(units) else f" with {units:g} formula units"
        notes.append(
            f"The atoms in the cell are {counted}, which is not the formula "
            f"'{block.text('_chemical_formula_sum')[:40]}'{z}: the atoms are used."
        )
    text = block.text("_exptl_crystal_density_diffrn")
    density = gemmi.cif.as_number(text) if text else np.nan
    masses = [
        sites[site].occupancy * periodictable.elements.symbol(element_of(sites[site].symbol)).mass
        for site in atoms.site
    ]
    computed = sum(masses) * _AMU_PER_A3 / unit.cell.volume
    if abs(density - computed) > _DENSITY * computed:
        notes.append(
            f"Cell and atoms have a density of {computed:.3f} g/cm³, and "
            f"_exptl_crystal_density_diffrn is {text[:20]}."
        )
    return notes


def _of_values(unit: cif.AsymmetricUnit) -> list[str]:
    names, notes = unit.labels, []
    for row, site in zip(unit.rows, unit.sites, strict=True):
        if max(map(abs, site.position)) > _FURTHEST:
            notes.append(f"Site {names[row]} is far outside the cell: check its coordinates.")
        if site.u_iso > _LARGEST_U:
            notes.append(f"Site {names[row]} has a large U of {site.u_iso:g} Å²: check it.")
    strangers = set(unit.block.texts("_atom_site_aniso_label")) - set(names)
    if strangers:
        notes.append(f"Anisotropic displacements of {sorted(strangers)[0][:20]} are of no site.")
    return notes


def _of_labels(unit: cif.AsymmetricUnit) -> list[str]:
    """Report sites with labels of another element, where most are of their own, or equal labels."""
    names, notes = unit.labels, []
    if repeated := next((n for k, n in enumerate(names) if n in names[:k]), ""):
        notes.append(f"Several sites have the label {repeated[:20]}: all are used.")
    unlike = [name for name in names if not _LABEL.fullmatch(name)]
    if len(unlike) == 1 < len(names):
        notes.append(f"The label {unlike[0][:20]} is unlike all others: check its line.")
    elements = [scatterer(names[row], label=True) for row in unit.rows]
    odd = [
        (names[row], site.symbol)
        for row, element, site in zip(unit.rows, elements, unit.sites, strict=True)
        if element != element_of(site.symbol) and not (element == "H" and site.symbol == "D")
    ]
    if 0 < len(odd) < max(len(unit.sites) / 2, 1.5):
        label, symbol = odd[0]
        notes.append(f"Site {label} is of type {symbol}: check whether label and type are right.")
    return notes


def _of_distances(unit: cif.AsymmetricUnit, group: gemmi.SpaceGroup, atoms: Atoms) -> list[str]:
    if 27 * len(unit.sites) * len(atoms.site) > _MANY:
        return []
    contact = closest_contact(unit, group)
    if contact.ratio >= IMPOSSIBLE:
        return []
    first, second = unit.label(contact.first), unit.label(contact.second)
    if contact.images:
        return [
            f"Site {first} is close to a special position and not on it: its images, closer than "
            f"0.4 Å, are taken as one atom."
        ]
    if np.isclose(contact.ratio, 0.0, atol=0.05):
        return []  # reported as sites at the same place
    return [
        f"{first} and {second} are closer than half the sum of their radii: check coordinates, "
        f"occupancies and cell."
    ]


# Of the dictionary, and like tags that are read.
_OTHER_TAGS = frozenset(
    [
        *("_atom_site_fract_symmform", "_atom_site_label_component_0"),
        *("_atom_site_site_symmetry_order", "_atom_site_u_equiv_geom_mean"),
        *("_atom_site_aniso_type_symbol", "_space_group_ssg_name", "_symmetry_equiv_pos_site_id"),
        *("_space_group_symop_id", "_symmetry_space_group_name_hall", "_space_group_name_h-m"),
        *("_space_group_name_h-m_full", "_space_group_name_h-m_ref"),
        *(f"_cell_length_{axis}_su" for axis in "abc"),
    ]
)
