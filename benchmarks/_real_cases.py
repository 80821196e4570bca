"""Measured profiles with their instruments and structures, and the results to expect: cases.toml.

A case is what a user has. Its ``folder`` is relative to the file's; profiles, instrument,
calibration and CIFs to that.
"""

import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bragg_data.crystallography.structure import Phase, read_phase

_STRUCTURES = {
    "austenite": ("F m -3 m", "Fe1 Fe 0 0 0 0.005"),
    "diamond": ("F d -3 m:2", "C1 C 0.125 0.125 0.125 0.0020"),
    "silicon": ("F d -3 m:2", "Si1 Si 0.125 0.125 0.125 0.0059"),
    "srtio3": (
        "I 4/m c m",
        "Sr1 Sr 0 0.5 0.25 0.0021\nTi1 Ti 0 0 0 0.0021\n"
        "O1 O 0 0 0.25 0.0040\nO2 O 0.244 0.744 0 0.0030",
    ),
}
"""Space group and atoms (label, element, x, y, z, U in Å²) of phases that a case only names."""

_Length = Annotated[float, Field(gt=0)]
_Lengths = dict[Literal["a", "b", "c"], _Length]


class CasesError(ValueError):
    """A file of cases that cannot be used."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProfileFile(_Table):
    """A file of profiles, and the bank to use; all of them without one."""

    file: str
    bank: int | None = None


class PhaseOfCase(_Table):
    """A phase: a CIF, or the name of a known structure with its space group and cell."""

    name: str
    cif: str | None = None
    space_group: str | None = None
    cell: _Lengths | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cif is not None:
            if self.space_group is not None or self.cell is not None:
                raise ValueError(f"phase '{self.name}' has both a CIF and a space group or cell")
            return self
        if self.space_group is None or not self.cell or "a" not in self.cell:
            raise ValueError(
                f"phase '{self.name}' needs cif, or space_group and a cell with at least a"
            )
        known = _STRUCTURES.get(self.name)
        if known is None or known[0] != self.space_group:
            names = ", ".join(f"{name} ({group})" for name, (group, _) in _STRUCTURES.items())
            raise ValueError(
                f"the atoms of phase '{self.name}' in {self.space_group} are unknown: give a cif, "
                f"or one of {names}"
            )
        return self


class Gsas2Result(_Table):
    """A refinement of one profile by GSAS-II: lengths and standard uncertainties in Å, Rwp in %."""

    a: _Length
    esd_a: _Length
    b: _Length | None = None
    esd_b: _Length | None = None
    c: _Length | None = None
    esd_c: _Length | None = None
    rwp: _Length


class Case(_Table):
    """What a user has, and the result to expect; lengths in Å are of the first phase."""

    name: str
    folder: str
    profiles: Annotated[tuple[ProfileFile, ...], Field(min_length=1)]
    instrument: str
    calibration: str | None = None
    phases: Annotated[tuple[PhaseOfCase, ...], Field(min_length=1)]
    reference: _Lengths = {}
    uncertainty: _Lengths = {}
    reference_kind: Literal["certificate", "published", "gsas2"] | None = None
    gsas2: tuple[Gsas2Result, ...] = ()
    weight_percent: dict[str, Annotated[float, Field(ge=0, le=100)]] = {}
    refuse: bool = False
    series: bool = False
    root: Path = Field(exclude=True)  # of the file's folder

    @model_validator(mode="after")
    def _check(self) -> Self:
        if set(self.reference) != set(self.uncertainty):
            raise ValueError("reference and uncertainty name different lengths")
        if bool(self.reference) != (self.reference_kind is not None):
            raise ValueError("a reference needs reference_kind, and only a reference has one")
        if self.gsas2 and len(self.gsas2) != len(self.profiles):
            raise ValueError("gsas2 needs one result for each profile")
        unknown = set(self.weight_percent) - {phase.name for phase in self.phases}
        if unknown:
            raise ValueError(
                f"weight_percent names {', '.join(sorted(unknown))}, which no phase is"
            )
        if self.refuse and (self.reference or self.weight_percent):
            raise ValueError("a case to refuse has no result to expect")
        for file in (self.instrument, self.calibration, *(p.cif for p in self.phases)):
            if file is not None and not self.path(file).is_file():
                raise ValueError(f"there is no file {self.path(file)}")
        for profile in self.profiles:
            if not self.path(profile.file).is_file():
                raise ValueError(f"there is no profile {self.path(profile.file)}")
        return self

    def path(self, file: str) -> Path:
        """Return the path of a file of the case."""
        return self.root / self.folder / file

    @property
    def instrument_paths(self) -> tuple[Path, Path]:
        """The instrument file, and the one that calibrates these data."""
        return self.path(self.instrument), self.path(self.calibration or self.instrument)

    @property
    def runs(self) -> tuple[tuple[ProfileFile, ...], ...]:
        """The profiles of each refinement: all, or in a series and to be refused each by itself."""
        return (
            tuple((p,) for p in self.profiles) if self.series or self.refuse else (self.profiles,)
        )

    def structures(self) -> list[Phase]:
        """Return the phases with their atoms; raises a CrystalError if a CIF cannot be read."""
        return [
            read_phase(self.path(p.cif) if p.cif else _cif_of_known_structure(p), p.name)
            for p in self.phases
        ]

    def cif_paths(self, directory: Path) -> list[Path]:
        """Return the CIF of each phase, written into a directory where the case has none."""
        paths = []
        for phase in self.phases:
            path = self.path(phase.cif) if phase.cif else directory / f"{phase.name}.cif"
            if not phase.cif:
                path.write_text(_cif_of_known_structure(phase), encoding="utf-8")
            paths.append(path)
        return paths


def load_cases(folder: Path) -> list[Case]:
    """Read and check cases.toml of a folder; a CasesError names every fault in one sentence."""
    file = folder / "cases.toml"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CasesError(f"{file} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CasesError(f"{file} is not valid TOML: {error}.") from error
    tables = content.pop("case", None)
    listed = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if content or not listed or not tables:
        raise CasesError(f"{file} has to be a list of tables [[case]], and nothing else.")
    cases, faults = [], []
    for number, table in enumerate(tables, 1):
        where = f"case '{table['name']}'" if "name" in table else f"case {number}"
        try:
            cases.append(Case.model_validate({**table, "root": folder.absolute()}))
        except ValidationError as error:
            for fault in error.errors():
                place = ".".join(str(part) for part in fault["loc"])
                reason = fault["msg"].removeprefix("Value error, ")
                faults.append(f"{file}, {where}{place and f', {place}'}: {reason}.")
    repeated = [n for n, count in Counter(case.name for case in cases).items() if count > 1]
    faults += [f"{file} has several cases '{name}'." for name in repeated]
    if faults:
        raise CasesError("\n".join(faults))
    return cases


def _cif_of_known_structure(phase: PhaseOfCase) -> str:
    group, atoms = _STRUCTURES[phase.name]
    cell = phase.cell or {}
    a, b, c = (cell.get(name, cell["a"]) for name in ("a", "b", "c"))
    return f"""data_{phase.name}
_cell_length_a {a}
_cell_length_b {b}
_cell_length_c {c}
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
