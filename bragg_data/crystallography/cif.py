"""The data blocks of a CIF as values by tag, and the atoms that one of them lists."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import gemmi
import numpy as np
from numpy.typing import ArrayLike

from bragg_data.arrays import Array, Indices, Mask
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalError
from bragg_data.crystallography.scattering import scatterer
from bragg_data.errors import first_line
from bragg_data.files import read_bounded

DEFAULT_U = 0.005
"""Isotropic displacement parameter in Å² of sites that have none: inorganic solids near 295 K."""

_MOST_BYTES = 20_000_000  # with intensities of a single crystal a few MB; gemmi takes 20-fold
_MOST_ROWS = 1_000  # of atoms: comparing their distances takes the square of the time
_LARGEST_OCCUPANCY = 1.2  # refined values exceed 1 by their uncertainty; others are mistakes
_U_TO_B = 8 * np.pi * np.pi
_NAMED = 6  # sites that a message names
_CELL_TAGS = [f"_cell_length_{n}" for n in CELL_PARAMETERS[:3]]
_CELL_TAGS += [f"_cell_angle_{n}" for n in CELL_PARAMETERS[3:]]
COORDINATES = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")
_ANISO = ("11", "22", "33", "12", "13", "23")
OPERATIONS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
NUMBERS = ("_space_group_it_number", "_symmetry_int_tables_number")
MULTIPLICITIES = ("_atom_site_symmetry_multiplicity", "_atom_site_site_symmetry_multiplicity")
_LABELS = ("_atom_site_label", "_atom_site_type_symbol")
SITE_TAGS = (
    *(*_CELL_TAGS, *COORDINATES, *_LABELS, *OPERATIONS, *NUMBERS, *MULTIPLICITIES),
    *(f"_atom_site_{n}" for n in ("occupancy", "u_iso_or_equiv", "b_iso_or_equiv", "aniso_label")),
    *(f"_atom_site_aniso_{kind}_{ij}" for kind in "ub" for ij in _ANISO),
    *("_space_group_name_h-m_alt", "_symmetry_space_group_name_h-m", "_space_group_name_hall"),
    *("_cell_volume", "_cell_formula_units_z", "_chemical_formula_sum"),
    *("_exptl_crystal_density_diffrn", "_space_group_crystal_system"),
)
"""Tags that are read, or compared with what is read."""

_FRACTION = re.compile(r"([+-]?\d+)/(\d+)")
_ASCII = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "\ufeff": ""})


@dataclass(frozen=True)
class Site:
    """An atom of the asymmetric unit."""

    symbol: str  # of the element, D, or an isotope such as 11B
    position: tuple[float, float, float]  # fractional coordinates
    occupancy: float
    u_iso: float  # isotropic displacement parameter, in Å²
    label: str = ""


@dataclass(frozen=True)
class CifBlock:
    """A data block: raw values by tag, in lower case and with _ for the dots of DDLm names."""

    name: str
    columns: dict[str, tuple[str, ...]]
    repeated: tuple[str, ...]  # tags given twice, of which the first counts

    def texts(self, *tags: str) -> tuple[str, ...]:
        """Return the values of the first of some tags that is there, without quotes."""
        for tag in tags:
            if tag in self.columns:
                return tuple(gemmi.cif.as_string(value) for value in self.columns[tag])
        return ()

    def text(self, *tags: str) -> str:
        """Return the first value of some tags that is not ?, . or empty; else an empty text."""
        for tag in tags:
            for raw in self.columns.get(tag, ())[:1]:
                value = "" if gemmi.cif.is_null(raw) else gemmi.cif.as_string(raw).strip()
                if value:
                    return value
        return ""

    def numbers(self, tag: str) -> Array:
        """Return the values of a tag, (n,); NaN for what is no number."""
        return np.array([gemmi.cif.as_number(value) for value in self.columns.get(tag, ())])


@dataclass(frozen=True)
class AsymmetricUnit:
    """The sites that a data block lists, in its cell."""

    where: str  # the file, for errors
    block: CifBlock
    cell: gemmi.UnitCell
    sites: tuple[Site, ...]
    rows: Indices  # of the sites in the CIF

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of all rows of the CIF."""
        return self.block.texts(*_LABELS)

    def label(self, site: int) -> str:
        """Return the label of a site."""
        return self.labels[int(self.rows[site])]


def read_text(path: Path) -> str:
    """Return the text of a CIF file, which is UTF-8 with or without a mark, UTF-16 or Latin-1.

    A CrystalError is raised if the file is missing, unreadable, or larger than 20 MB.
    """
    try:
        content = read_bounded(path, _MOST_BYTES)
        try:
            text = content.decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
            text = content.decode("utf-16" if marked else "latin-1")
    except FileNotFoundError as error:
        raise CrystalError(f"CIF file {path} not found. Give the path of a CIF file.") from error
    except OSError as error:
        raise CrystalError(f"CIF file {path} cannot be read: {error.strerror}.") from error
    except UnicodeError as error:
        raise CrystalError(f"CIF file {path} cannot be read: {error}.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def file_and_block(text: str) -> tuple[Path, str | None]:
    """Return the file and the data block that FILE.cif or FILE.cif:BLOCK names."""
    path = Path(text)
    file, colon, block = text.rpartition(":")
    if colon and file and block and not path.exists():
        return Path(file), block
    return path, None


def select_block(text: str, where: str, name: str | None = None) -> CifBlock:
    """Return the data block with atoms, which is named where there are several.

    Raises a CrystalError if the text is no CIF, holds no atoms or several structures without a
    ``name``, or no block of that name.
    """
    blocks = [b for b in blocks_of(text, where) if _has_atoms(b)]
    if not blocks:
        raise CrystalError(
            f"{where} holds no atoms: it needs _cell_length_a …, _atom_site_fract_x …, and so on."
        )
    known = ", ".join(block.name for block in blocks)
    if name is not None:
        blocks = [b for b in blocks if b.name.lower() == name.removeprefix("data_").lower()]
        if not blocks:
            raise CrystalError(f"{where} has no block '{name}' with atoms. It has: {known}.")
    if len({tuple(sorted(block.columns.items())) for block in blocks}) > 1:
        raise CrystalError(
            f"{where} holds {len(blocks)} structures: choose one of its data blocks by name "
            f"(block = …). It has: {known}."
        )
    return blocks[0]


def structure_names(text: str, where: str) -> tuple[str, ...]:
    """Return the names of the data blocks with atoms, once where blocks have the same content."""
    blocks = [block for block in blocks_of(text, where) if _has_atoms(block)]
    same: dict[tuple[tuple[str, tuple[str, ...]], ...], str] = {}
    for block in blocks:
        same.setdefault(tuple(sorted(block.columns.items())), block.name)
    return tuple(same.values())


def _has_atoms(block: CifBlock) -> bool:
    columns = (block.columns.get(tag, ()) for tag in COORDINATES)
    return all(any(not gemmi.cif.is_null(value) for value in column) for column in columns)


def blocks_of(text: str, where: str) -> list[CifBlock]:
    """Return the data blocks of a text; raises a CrystalError if it is no CIF."""
    if not text.isascii():  # of comments and names of people; what is read here is ASCII
        text = text.translate(_ASCII).encode("ascii", "replace").decode()
    try:
        try:
            document = gemmi.cif.read_string(text)
        except (ValueError, RuntimeError) as error:
            if "duplicate" not in str(error).lower():
                raise
            document = gemmi.cif.Document()
            document.parse_string(text)
    except (ValueError, RuntimeError) as error:
        raise CrystalError(f"{where} is not a readable CIF: {first_line(error)}.") from error
    return [_block(block) for block in document]


def _block(block: gemmi.cif.Block) -> CifBlock:
    columns: dict[str, tuple[str, ...]] = {}
    repeated: list[str] = []
    for item in block:
        loop = cast("gemmi.cif.Loop | None", item.loop)
        entries: dict[str, tuple[str, ...]] = {}
        if item.pair is not None:
            tag, value = cast("list[str]", item.pair)
            entries = {tag: (value,)}
        elif loop is not None:
            values, tags = loop.values, loop.tags
            entries = {tag: tuple(values[i :: len(tags)]) for i, tag in enumerate(tags)}
        for tag, column in entries.items():
            name = tag.lower().replace(".", "_")
            if name in columns:
                repeated.append(name)
            columns.setdefault(name, column)
    return CifBlock(block.name, columns, tuple(repeated))


def cell_of(block: CifBlock, where: str) -> Array:
    """Return the six cell parameters, NaN for those that are not given; a must be."""
    cell = np.full(6, np.nan)
    for column, tag in enumerate(_CELL_TAGS):
        text = block.text(tag)
        if text:
            cell[column] = gemmi.cif.as_number(text)
            if not np.isfinite(cell[column]):
                raise CrystalError(f"{where}: {tag} is '{text}', which is no number.")
    if np.isnan(cell[0]):
        raise CrystalError(f"{where} has no unit cell: _cell_length_a … are needed.")
    return cell


def sites_of(
    block: CifBlock, cell: gemmi.UnitCell, where: str
) -> tuple[AsymmetricUnit, tuple[str, ...]]:
    """Return the sites of the asymmetric unit, and what was assumed.

    Raises a CrystalError for atoms without an element, coordinates or a sensible occupancy.
    """
    labels, symbols, notes = _symbols(block, where)
    if len(labels) > _MOST_ROWS:
        raise CrystalError(f"{where} lists {len(labels):,} atoms; at most {_MOST_ROWS:,} are read.")
    for tag in (tag for tag in SITE_TAGS if "_site_" in tag and "aniso" not in tag):
        if len(block.columns.get(tag, labels)) != len(labels):
            raise CrystalError(f"{where}: {tag} has other rows than the labels of its atoms.")
    positions = np.stack([_coordinates(block, tag) for tag in COORDINATES], axis=1)
    occupancy = _column(block, "_atom_site_occupancy", len(labels))
    u_iso, of_u = _displacements(block, labels, cell)
    dummy = np.isnan(positions).all(axis=1)
    bad = np.isnan(positions).any(axis=1) & ~dummy
    if bad.any():
        raise CrystalError(f"{where}: coordinates of {_listed(labels, bad)} are no numbers.")
    unknown = np.isnan(occupancy) & ("_atom_site_occupancy" in block.columns) & ~dummy
    occupancy = np.where(np.isnan(occupancy), 1.0, occupancy)
    if (occupancy > _LARGEST_OCCUPANCY).any():
        above = occupancy > _LARGEST_OCCUPANCY
        raise CrystalError(
            f"{where}: the occupancy of {_listed(labels, above)} is {occupancy[above][0]:g}; it "
            f"must be between 0 and 1."
        )
    of_rows = [
        (dummy, "{} without coordinates: left out."),
        (unknown, "No occupancy of {}: 1 is assumed."),
        (occupancy > 1, "Occupancy above 1 of {}: used as it is."),
        (occupancy < 0, "Negative occupancy of {}: left out."),
        (occupancy == 0, "Occupancy 0 of {}: left out."),
    ]
    used = (occupancy > 0) & ~dummy
    of_rows += [(rows & used, text) for rows, text in of_u]
    notes += [text.format(_listed(labels, rows)) for rows, text in of_rows if rows.any()]
    rows = np.flatnonzero(used)
    columns = (values[rows].tolist() for values in (positions, occupancy, u_iso))
    sites = tuple(
        Site(symbols[row], (x, y, z), share, u, labels[row])
        for row, (x, y, z), share, u in zip(rows, *columns, strict=True)
    )
    return AsymmetricUnit(where, block, cell, sites, rows), tuple(notes)


def _symbols(block: CifBlock, where: str) -> tuple[Sequence[str], list[str], list[str]]:
    types = block.texts("_atom_site_type_symbol")
    labels = block.texts("_atom_site_label") or types
    if len(labels) != len(block.columns[COORDINATES[0]]):
        raise CrystalError(f"{where}: its atoms have neither _atom_site_label nor a type.")
    symbols: list[str] = []
    from_label = np.zeros(len(labels), dtype=bool)
    for row, label in enumerate(labels):
        given = types[row] if types and types[row] not in ("", "?", ".") else ""
        from_label[row] = not given
        symbol = scatterer(given or label, label=not given)
        if symbol is None:
            raise CrystalError(
                f"{where}: the type '{given or label}' of atom '{label}' is no element. Correct "
                f"the atom types (_atom_site_type_symbol)."
            )
        symbols.append(symbol)
    notes = []
    if from_label.any():
        pairs = dict.fromkeys(
            f"{label} is {symbol}"
            for label, symbol, of_label in zip(labels, symbols, from_label, strict=True)
            if of_label
        )
        notes = [f"No atom types: elements are taken from the labels ({_shortened(pairs)})."]
    return labels, symbols, notes


def _coordinates(block: CifBlock, tag: str) -> Array:
    numbers = block.numbers(tag)
    for row in np.flatnonzero(np.isnan(numbers)):
        fraction = _FRACTION.fullmatch(gemmi.cif.as_string(block.columns[tag][row]).strip())
        if fraction and int(fraction[2]):
            numbers[row] = int(fraction[1]) / int(fraction[2])
    return numbers


def _column(block: CifBlock, tag: str, count: int) -> Array:
    return block.numbers(tag) if tag in block.columns else np.full(count, np.nan)


def _displacements(
    block: CifBlock, labels: Sequence[str], cell: gemmi.UnitCell
) -> tuple[Array, list[tuple[Mask, str]]]:
    """Return U of each row in Å², and rows with what was assumed of them."""
    u_iso = _column(block, "_atom_site_u_iso_or_equiv", len(labels))
    b_iso = _column(block, "_atom_site_b_iso_or_equiv", len(labels))
    u_iso = np.where(np.isnan(u_iso), b_iso / _U_TO_B, u_iso)
    tensors = _anisotropic(block)
    aniso = np.array([label in tensors for label in labels])
    for row in np.flatnonzero(aniso).tolist():
        u_iso[row] = _u_equivalent(tensors[labels[row]], cell)
    missing, negative = np.isnan(u_iso), u_iso < 0
    u_iso = np.where(missing, DEFAULT_U, np.where(negative, 0.0, u_iso))
    default = f"No displacement parameter of {{}}: U = {DEFAULT_U:g} Å² is assumed."
    return u_iso, [
        (aniso, "Anisotropic displacements of {}: their equivalent isotropic values are used."),
        (missing, default),
        (negative, "Negative displacement parameter of {}: 0 is used."),
    ]


def _anisotropic(block: CifBlock) -> dict[str, Array]:
    """Return the tensors U in Å², shape (3, 3), by label; those of zeros and gaps are left out."""
    tensors: dict[str, Array] = {}
    labels = block.texts("_atom_site_aniso_label")
    for kind, unit in (("u", 1.0), ("b", _U_TO_B)):
        columns = [_column(block, f"_atom_site_aniso_{kind}_{ij}", len(labels)) for ij in _ANISO]
        for label, terms in zip(labels, np.array(columns).T, strict=False):
            if np.isfinite(terms).all() and terms.any() and label not in tensors:
                xx, yy, zz, xy, xz, yz = terms / unit
                tensors[label] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return tensors


def _u_equivalent(tensor: Array, cell: gemmi.UnitCell) -> float:
    r"""Return the equivalent isotropic displacement parameter in Å².

    .. math:: U_\text{eq} = \frac13 \sum_{ij} U_{ij} a_i^* a_j^* \mathbf a_i\cdot\mathbf a_j

    Fischer & Tillmanns, Acta Cryst. C44 (1988) 775.
    """
    direct = np.array(cell.orth.mat.tolist())
    metric = direct.T @ direct
    star = np.sqrt(np.diag(np.linalg.inv(metric)))
    return float((tensor * np.outer(star, star) * metric).sum() / 3)


def _listed(labels: Sequence[str], rows: ArrayLike) -> str:
    return _shortened(dict.fromkeys(labels[row] for row in np.flatnonzero(rows).tolist()))


def _shortened(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(shown[:_NAMED]) + more
