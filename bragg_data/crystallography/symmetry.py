"""The space group of a CIF: its operations, Hall or Hermann-Mauguin symbol, number and origin."""

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import gemmi
import numpy as np

from bragg_data.crystallography import cif
from bragg_data.crystallography.atoms import IMPOSSIBLE, Atoms, all_atoms, closest_contact
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.consistency import agree, contents_of, formula_of, units_of

_SENSIBLE = 0.65  # of the sum of covalent radii: shorter than any bond (V=O has 0.72, N≡N 0.77)

_CHOICES = {"S": "1", "Z": "2"}  # of the ICSD: centre of symmetry elsewhere, at the origin
_CHOICE = re.compile(
    r"\s*:\s*([12HRSZhrsz])$|\s*\bO(?:rigin)?[\s-]*(?:choice\s*)?([12])$|\s*([SZHR])$"
)
# Cubic symbols of the years before 1983: F d 3 m for F d -3 m.
_OLD_CUBIC = re.compile(r"([PFI])\s*([mndac])\s*(3)\s*([mndc]?)")
_HALL = ("_space_group_name_hall", "_symmetry_space_group_name_hall")
_SYMBOLS = (
    "_space_group_name_h-m_alt",
    "_symmetry_space_group_name_h-m",
    "_space_group_name_h-m",
    "_space_group_name_h-m_full",
    "_space_group_name_h-m_ref",
)


class _Named(NamedTuple):
    """What a symbol or a number names: two groups where the origin is open."""

    groups: tuple[gemmi.SpaceGroup, ...]
    text: str


def space_group_of(unit: cif.AsymmetricUnit) -> tuple[gemmi.SpaceGroup, tuple[str, ...]]:
    """Return the space group of a data block in its setting, and what was assumed.

    Listed operations count most, then the Hall symbol, the Hermann-Mauguin symbol and the number.
    A list that is only a part of the named group's operations is completed, unless the completed
    group puts atoms on top of each other. Of two origins that are both possible, the one counts
    that agrees with the multiplicities or the formula, or else that alone gives sensible distances.

    Raises a CrystalError if there is no known space group, or both origins are possible.
    """
    where = unit.where
    named, notes = _named(unit.block, unit.cell)
    listed, group = _listed(unit.block)
    parents = tuple(g for g in named.groups if listed < _triplets(g)) if listed else ()
    if listed and group is None and not parents:
        group = _completed(listed)
        if group is None or (named.groups and group.number != named.groups[0].number):
            raise CrystalError(
                f"{where} names no known space group: its list of symmetry operations is no group "
                f"in a tabulated setting. Complete it, or give the Hermann-Mauguin symbol instead."
            )
        return group, (
            f"The list of symmetry operations is incomplete or damaged: {group.xhm()} is used.",
        )
    if group is not None:
        # A number alone names no setting.
        if not named.groups or any(
            g.number == group.number and (notes or g.hm == group.hm) for g in named.groups
        ):
            return group, ()
        contact = closest_contact(unit, parents[0]).ratio if parents else 0.0
        if contact < IMPOSSIBLE:
            return group, (
                f"The symmetry operations are those of {group.xhm()}, not of {named.text}: the "
                f"operations are used.",
            )
    if parents:
        named = _Named(parents, named.text)
        notes = [f"The list of symmetry operations is only a part of {named.text}, which is used."]
    if not named.groups:
        raise CrystalError(
            f"{where} names no known space group: give its symmetry operations "
            f"(_space_group_symop_operation_xyz) or its Hermann-Mauguin symbol."
        )
    chosen, more = _choose_origin(named, unit)
    return chosen, (*notes, *more)


def _triplets(group: gemmi.SpaceGroup) -> frozenset[str]:
    return frozenset(op.wrap().triplet() for op in group.operations())


def _listed(block: cif.CifBlock) -> tuple[frozenset[str], gemmi.SpaceGroup | None]:
    """Return the operations of a list, and their space group if they are all of one's."""
    listed: dict[str, gemmi.Op] = {}
    for text in block.texts(*cif.OPERATIONS):
        try:
            operation = gemmi.Op(text.strip()).wrap()
        except (ValueError, RuntimeError):
            continue
        listed.setdefault(operation.triplet(), operation)
    if not listed:
        return frozenset(), None
    try:
        group = gemmi.find_spacegroup_by_ops(gemmi.GroupOps(list(listed.values())))
    except (ValueError, RuntimeError):
        group = None
    # Gemmi looks at some of them.
    alike = group is not None and frozenset(listed) == _triplets(group)
    return frozenset(listed), group if alike else None


def _completed(listed: frozenset[str]) -> gemmi.SpaceGroup | None:
    try:
        operations = gemmi.GroupOps([gemmi.Op(text) for text in listed])
        operations.add_missing_elements()
        return gemmi.find_spacegroup_by_ops(operations)
    except (ValueError, RuntimeError):
        return None


def _named(block: cif.CifBlock, cell: gemmi.UnitCell) -> tuple[_Named, list[str]]:
    """Return what the Hall or Hermann-Mauguin symbol or the number names, and what was assumed."""
    hall, number = block.text(*_HALL), block.text(*cif.NUMBERS)
    symbol = " ".join(block.text(*_SYMBOLS).replace("_", "").split())
    if hall:
        try:
            group = gemmi.find_spacegroup_by_ops(gemmi.symops_from_hall(hall))
        except (ValueError, RuntimeError):
            group = None
        if group is not None:
            return _Named((group,), f"the Hall symbol '{hall}'"), []
    if symbol:
        code = block.text("_space_group_it_coordinate_system_code")
        groups = _groups_of_symbol(symbol, code, cell)
        if groups:
            return _Named(groups, f"'{symbol}'"), []
    if number.isdigit() and 1 <= int(number) <= 230:
        group = gemmi.get_spacegroup_reference_setting(int(number))
        groups = _groups_of_symbol(group.hm, "", cell)
        text = f"Space group number {number} alone: its standard setting {group.hm} is assumed."
        return _Named(groups, f"space group number {number}"), [text]
    return _Named((), ""), []


def _groups_of_symbol(text: str, code: str, cell: gemmi.UnitCell) -> tuple[gemmi.SpaceGroup, ...]:
    """Return the space groups of a Hermann-Mauguin symbol: two if the origin is open."""
    choice = _CHOICE.search(text)
    symbol, extension = text, code.upper() if code.upper() in ("1", "2", "H", "R") else ""
    if choice:
        mark = (choice[1] or choice[2] or choice[3]).upper()
        symbol, extension = text[: choice.start()], _CHOICES.get(mark, mark)
    names = [symbol, symbol[:1].upper() + symbol[1:].lower()]
    if old := _OLD_CUBIC.fullmatch(names[1]):
        names.append(f"{old[1]} {old[2]} -3 {old[4]}".strip())
    for name in names if choice else [text, *names]:
        named = gemmi.find_spacegroup_by_name(name, cell.alpha, cell.gamma, "2")
        group = cast("gemmi.SpaceGroup | None", named)
        if group is None:
            continue
        known = [
            g for g in gemmi.spacegroup_table() if g.hm == group.hm and g.number == group.number
        ]
        if group.ext in ("H", "R") and not extension:
            extension = "H" if abs(cell.gamma - 120.0) < 1.0 else "R"
        chosen = [g for g in known if g.ext == extension] if extension else []
        if chosen:
            return (chosen[0],)
        if group.ext in ("1", "2") and not text.rstrip().endswith((":1", ":2")):
            return tuple(
                sorted((g for g in known if g.ext in ("1", "2")), key=lambda g: -int(g.ext))
            )
        return (_on_the_unique_axis(group, cell),)
    return ()


def _on_the_unique_axis(group: gemmi.SpaceGroup, cell: gemmi.UnitCell) -> gemmi.SpaceGroup:
    """Return a monoclinic group with c as its axis if the cell needs it and one setting has it."""
    if group.crystal_system_str() != "monoclinic" or group.monoclinic_unique_axis() != "b":
        return group
    if abs(cell.beta - 90.0) > 1e-3 or abs(cell.gamma - 90.0) < 1e-3:
        return group
    settings = [
        g
        for g in gemmi.spacegroup_table()
        if g.number == group.number and g.monoclinic_unique_axis() == "c"
    ]
    return settings[0] if len(settings) == 1 else group


def _choose_origin(named: _Named, unit: cif.AsymmetricUnit) -> tuple[gemmi.SpaceGroup, list[str]]:
    if len(named.groups) == 1:
        return named.groups[0], []
    atoms = [all_atoms(unit, group) for group in named.groups]
    formula, units = formula_of(unit.block), units_of(unit.block)
    contents = [contents_of(unit.sites, of_group) for of_group in atoms]
    for evidence, agrees in (
        ("the multiplicities of the sites", _agree_with_multiplicities(unit, atoms)),
        ("the chemical formula", [agree(content, formula, units) for content in contents]),
        ("the distances between atoms", _sensible(unit, named.groups, atoms)),
    ):
        if agrees.count(True) == 1:
            chosen = agrees.index(True)
            return named.groups[chosen], [
                f"{named.text} has two origins, and none is named: origin "
                f"{named.groups[chosen].ext} ({len(atoms[chosen].site)} atoms in the cell), which "
                f"agrees with {evidence}."
            ]
    counts = " or ".join(
        f"{len(of_group.site)} with origin {group.ext}"
        for group, of_group in zip(named.groups, atoms, strict=True)
    )
    raise CrystalError(
        f"{unit.where}: {named.text} has two origins, none is named, and its atoms fit both "
        f"({counts} in the cell). Write '{named.groups[0].hm}:1' or '{named.groups[0].hm}:2', or "
        f"list the symmetry operations."
    )


def _agree_with_multiplicities(unit: cif.AsymmetricUnit, atoms: Sequence[Atoms]) -> list[bool]:
    for tag in cif.MULTIPLICITIES:
        listed = unit.block.numbers(tag)
        if len(listed) and np.isfinite(listed[unit.rows]).all():
            return [np.array_equal(np.bincount(a.site), listed[unit.rows]) for a in atoms]
    return [False] * len(atoms)


def _sensible(
    unit: cif.AsymmetricUnit, groups: Sequence[gemmi.SpaceGroup], atoms: Sequence[Atoms]
) -> list[bool]:
    """Return which of two origins gives sensible distances: alone, or with atoms less crowded."""
    contacts = [closest_contact(unit, group).ratio for group in groups]
    counts = [len(of_group.site) for of_group in atoms]
    return [
        contacts[a] >= _SENSIBLE
        and (contacts[b] < IMPOSSIBLE or (counts[a] < counts[b] and contacts[a] >= contacts[b]))
        for a, b in ((0, 1), (1, 0))
    ]
