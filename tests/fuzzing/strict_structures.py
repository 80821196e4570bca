"""A strict parser of CIFs, by gemmi alone: None for what contradicts itself or is not plain."""

import itertools
import re
from typing import NamedTuple

import gemmi
import numpy as np
import periodictable
from numpy.typing import NDArray

NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+))(?:\((\d{1,3})\))?"
CELL = tuple(f"_cell_length_{n}" for n in "abc") + tuple(
    f"_cell_angle_{n}" for n in ("alpha", "beta", "gamma")
)
SITE = tuple(
    f"_atom_site_{n}"
    for n in ["label", "type_symbol", *(f"fract_{x}" for x in "xyz"), "occupancy", "U_iso_or_equiv"]
)
OPERATIONS, MULTIPLICITY = "_space_group_symop_operation_xyz", "_atom_site_symmetry_multiplicity"
NAME, NUMBER_TAG = "_space_group_name_H-M_alt", "_space_group_IT_number"
REDUNDANT = (
    "_cell_volume",
    "_cell_formula_units_Z",
    "_chemical_formula_sum",
    "_exptl_crystal_density_diffrn",
    "_space_group_crystal_system",
)
_VOLUME, _COMPOSITION, _DENSITY = 3e-4, 0.02, 0.01  # relative differences that are no contradiction
_CONTACT = 0.5  # of the sum of covalent radii
_SPECIAL = 0.1, 0.4  # Å between images that are neither one atom nor two
_ISOTOPES = {"D": "2H"}


class Structure(NamedTuple):
    """What is compared of a phase: of all atoms of the cell."""

    space_group: str
    cell: NDArray[np.float64]
    symbols: tuple[str, ...]
    positions: NDArray[np.float64]
    occupancies: NDArray[np.float64]
    u_iso: NDArray[np.float64]


def structure(content: bytes) -> Structure | None:
    """Return the structure of a CIF, or None if it is not exactly one."""
    try:
        marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        try:
            text = content.decode("utf-16" if marked else "utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        text = text.replace("\xa0", " ").replace("−", "-").encode("ascii", "replace").decode()
        document = gemmi.cif.Document()
        document.parse_string(text)
        return _structure(document)
    except (ValueError, RuntimeError, KeyError, IndexError, ZeroDivisionError):
        return None


def _values(block: gemmi.cif.Block) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    tags = (*CELL, *SITE, *REDUNDANT, OPERATIONS, MULTIPLICITY, NAME, NUMBER_TAG)
    known = {tag.lower(): tag for tag in tags}
    for item in block:
        if item.pair is not None:
            columns = {item.pair[0]: [item.pair[1]]}
        elif item.loop is not None:
            names = item.loop.tags
            columns = {n: list(item.loop.values[i :: len(names)]) for i, n in enumerate(names)}
        else:
            continue
        for tag, column in columns.items():
            name = known.get(tag.lower())
            if name is None:
                continue
            if values.get(name, column) != column:
                raise ValueError(tag)
            values[name] = [gemmi.cif.as_string(value) for value in column]
    return values


def _number(text: str) -> float:
    match = re.fullmatch(NUMBER, text)
    if match is None:
        raise ValueError(text)
    return float(match[1])


def _last_place(text: str) -> float:
    decimals = text.partition("(")[0].partition(".")[2]
    return 10.0 ** -len(decimals)


def _structure(document: gemmi.cif.Document) -> Structure | None:
    (block,) = document
    values = _values(block)
    cell = np.array([_number(values[tag][0]) for tag in CELL])
    if not ((cell[:3] > 1).all() and (cell[:3] < 100).all() and (abs(cell[3:] - 90) < 80).all()):
        return None
    name = " ".join(values[NAME][0].split()).replace(" :", ":")
    group = gemmi.find_spacegroup_by_name(name)
    if group is None or name not in (group.xhm(), group.hm, group.short_name()):
        return None
    if group.ext in ("1", "2", "H", "R") and name != group.xhm():
        return None
    if not _symmetry_agrees(values, group, cell):
        return None
    labels, types, *columns = (values[tag] for tag in SITE)
    x, y, z, occupancy, u = (np.array([_number(text) for text in column]) for column in columns)
    symbols = [_symbol(label, kind) for label, kind in zip(labels, types, strict=True)]
    fract = np.stack([x, y, z], axis=1)
    plausible = (abs(fract) <= 2).all() and (occupancy > 0).all() and (occupancy <= 1).all()
    if not plausible or (u < 0).any() or (u > 0.2).any() or len(set(labels)) < len(labels):
        return None
    small = gemmi.SmallStructure()
    small.cell, small.spacegroup = gemmi.UnitCell(*cell), group
    for number, position in enumerate(fract):
        site = gemmi.SmallStructure.Site()
        site.label, site.fract = str(number), gemmi.Fractional(*position)
        small.add_site(site)
    small.setup_cell_images()
    atoms = small.get_all_unit_cell_sites()
    of_site = np.array([int(atom.label) for atom in atoms])
    positions = np.array([(a.fract.x, a.fract.y, a.fract.z) for a in atoms])
    if not _contents_agree(values, small.cell.volume, of_site, symbols, occupancy):
        return None
    if not _distances_agree(small.cell, group, fract, positions, of_site, symbols, occupancy):
        return None
    return Structure(
        group.xhm(),
        cell,
        tuple(symbols[k] for k in of_site),
        positions % 1.0,
        occupancy[of_site],
        u[of_site],
    )


def _symbol(label: str, kind: str) -> str:
    of_label = re.match(r"[A-Za-z]+", label)
    of_type = re.fullmatch(r"(\d*)([A-Za-z]{1,2})(?:\d?[-+])?", kind)
    if not of_label or not of_type or not of_label[0].lower().startswith(of_type[2].lower()):
        raise ValueError(label, kind)
    mass, element = of_type[1], of_type[2].capitalize()
    if gemmi.Element(element).name != element:
        raise ValueError(kind)
    return {"1H": "1H", "2H": "D"}.get(mass + element, mass + element)


def _symmetry_agrees(
    values: dict[str, list[str]], group: gemmi.SpaceGroup, cell: NDArray[np.float64]
) -> bool:
    operations = [op.wrap().triplet() for op in group.operations()]
    if OPERATIONS in values:
        listed = [gemmi.Op(text).wrap().triplet() for text in values[OPERATIONS]]
        if set(listed) != set(operations):
            return False
    if NUMBER_TAG in values and values[NUMBER_TAG] != [str(group.number)]:
        return False
    tag = "_space_group_crystal_system"
    if tag in values and values[tag] != [group.crystal_system_str()]:
        return False
    frame = np.array(gemmi.UnitCell(*cell).orth.mat.tolist())
    metric = frame.T @ frame
    rotations = [np.array(op.rot) / op.DEN for op in group.operations()]
    return all(np.allclose(r.T @ metric @ r, metric, atol=1e-4 * metric.max()) for r in rotations)


def _contents_agree(
    values: dict[str, list[str]],
    volume: float,
    of_site: NDArray[np.intp],
    symbols: list[str],
    occupancy: NDArray[np.float64],
) -> bool:
    if MULTIPLICITY in values:
        listed = [int(text) for text in values[MULTIPLICITY]]
        if listed != np.bincount(of_site, minlength=len(symbols)).tolist():
            return False
    if "_cell_volume" in values:
        text = values["_cell_volume"][0]
        if abs(_number(text) - volume) > _VOLUME * volume + _last_place(text):
            return False
    contents: dict[str, float] = {}
    mass = 0.0
    for k in of_site:
        element = symbols[k].lstrip("0123456789")
        contents[element] = contents.get(element, 0.0) + occupancy[k]
        mass += occupancy[k] * getattr(periodictable, element).mass
    if "_exptl_crystal_density_diffrn" in values:
        density = _number(values["_exptl_crystal_density_diffrn"][0])
        if abs(density / (mass / volume / 0.602214076) - 1) > _DENSITY:
            return False
    if "_chemical_formula_sum" in values:
        words = values["_chemical_formula_sum"][0].split()
        matches = [re.fullmatch(r"([A-Z][a-z]?)(\d*\.?\d*)", word) for word in words]
        formula = {m[1]: float(m[2] or 1) for m in matches}  # type: ignore[index]
        if len(formula) != len(words) or set(formula) != set(contents):
            return False
        ratios = np.array([contents[element] / count for element, count in formula.items()])
        units = _number(values["_cell_formula_units_Z"][0])
        if (abs(ratios / units - 1) > _COMPOSITION).any():
            return False
    return True


def _distances_agree(
    cell: gemmi.UnitCell,
    group: gemmi.SpaceGroup,
    fract: NDArray[np.float64],
    positions: NDArray[np.float64],
    of_site: NDArray[np.intp],
    symbols: list[str],
    occupancy: NDArray[np.float64],
) -> bool:
    frame = np.array(cell.orth.mat.tolist())
    for op in group.operations():
        moved = fract @ (np.array(op.rot).T / op.DEN) + np.array(op.tran) / op.DEN - fract
        distance = np.linalg.norm((moved - np.round(moved)) @ frame.T, axis=1)
        if ((distance > _SPECIAL[0]) & (distance < _SPECIAL[1])).any():
            return False
    radius = np.array([gemmi.Element(s.lstrip("0123456789")).covalent_r for s in symbols])[of_site]
    shifts = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
    for atom in np.unique(of_site, return_index=True)[1]:
        apart = positions - positions[atom]
        apart -= np.round(apart)
        distance = np.linalg.norm((apart[:, None] + shifts) @ frame.T, axis=2)
        distance[atom, 13] = np.inf
        closest = distance.min(axis=1)
        together = occupancy[of_site] + occupancy[of_site][atom] > 1.001
        if (closest[together] < _CONTACT * (radius + radius[atom])[together]).any():
            return False
    return True
