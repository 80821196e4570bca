"""GSAS-II itself, in the process that imports it; started by :mod:`bragg_data.simulation.gsas2`.

GSAS-II's symmetry and atoms of a phase are compared with the campaign's before the first pattern.
"""

import importlib
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gemmi
import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import cell_volume
from bragg_data.crystallography.scattering import ResonanceError, element_of
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.diffractometer import Instrument

VERSION = "1"
"""Version of the way in which GSAS-II is called, part of a data set's identity next to its own."""

HOW_TO_INSTALL = (
    "Install the conda package gsas2pkg (deploy/environment.yml does), or name the directory that "
    "holds GSASII with --gsas2-path or the variable BRAGG_GSAS2_PATH. Simulations need none of it "
    "with --simulator kinematic."
)
_TRANSFORM = "Transform the CIF to the standard setting, or use --simulator kinematic."

_NAMES = ("path", "sc", "io", "math", "groups", "processes", "profiles")
# Without the prefix GSASII.
_MODULES = ("path", "scriptable", "strIO", "strMath", "spc", "mpsubs", "pwd")

# What GetPhaseData returns; the parts without a name are no controls.
_PHASE_DATA = (
    *("Natoms", "atomIndx", "", "", "", "FFtables", "EFtables", "ORBtables", "BLtables"),
    *("MFtables", "maxSSwave"),
)


class Gsas2Error(RuntimeError):
    """There is no GSAS-II that works, or it reads a campaign in another way."""


class Gsas2Worker:
    """GSAS-II in the process that imports it, with a working directory of its own.

    ``location`` is the directory that holds the package ``GSASII``, where it cannot be imported
    otherwise; ``tof``, (points,), the times of flight in µs at which phases are simulated. Without
    phases it only has a version. Raises a Gsas2Error if there is no GSAS-II that works.
    """

    def __init__(
        self,
        location: str | None,
        phases: Sequence[Phase] = (),
        instrument: Instrument | None = None,
        tof: Array | None = None,
    ) -> None:
        self._g2 = import_gsas2(location)
        self._phases, self._instrument, self._tof = phases, instrument, tof
        self._projects: dict[int, Project] = {}

    def version(self) -> str:
        """Return the version of GSAS-II and of the way in which it is called."""
        path = self._g2.path
        # A checkout, as gsas2pkg makes one, may be newer than the version written into it.
        home = Path(path.path2GSAS2)
        commit = commit_of_repository(home.parent / ".git") or commit_of_repository(home / ".git")
        commit = commit or getattr(path.getSavedVersionInfo(), "git_version", "unknown")
        number, tag = path.GetVersionNumber(), path.GetVersionTag()
        return f"{VERSION}, GSAS-II {number} {tag} {commit[:8]}"

    def prepare(self, code: int) -> None:
        """Make the project of a phase."""
        self._project(code)

    def memory(self, code: int, cell: list[float], sample: dict[str, float]) -> Array:
        """Return a pattern, shape (points,), by GSAS-II's functions in memory."""
        return self._project(code).memory(cell, sample)

    def scripting(self, code: int, cell: list[float], sample: dict[str, float]) -> Array:
        """Return a pattern, shape (points,), by the documented scripting interface."""
        return self._project(code).scripting(cell, sample)

    def _project(self, code: int) -> "Project":
        if code not in self._projects:
            assert self._instrument is not None
            assert self._tof is not None
            phase = self._phases[code]
            self._projects[code] = Project(self._g2, phase, self._instrument, self._tof, code)
        return self._projects[code]


class Project:
    """A project of one phase and one simulated histogram, in the working directory.

    ``g2`` are GSAS-II's modules; ``code`` is the phase's number, for the names of files. Raises a
    Gsas2Error if GSAS-II reads the phase in another way than the campaign.
    """

    def __init__(
        self, g2: SimpleNamespace, phase: Phase, instrument: Instrument, tof: Array, code: int
    ) -> None:
        self._g2, self._source = g2, phase
        instprm = Path(f"instrument-{code}.instprm").absolute()
        if instrument.flight_path <= 0:
            # From it GSAS-II has the wavelengths, which matter to resonances alone.
            try:
                phase.scattering_lengths  # noqa: B018
            except ResonanceError as error:
                raise Gsas2Error(
                    f"Phase '{phase.name}' holds an element with a resonance, and the instrument "
                    f"file lacks the flight path, which gives the wavelengths: add fltPath, in m."
                ) from error
            instrument = instrument.with_parameters(flight_path=20.0)
        # Complete, since GSAS-II needs the keys with value zero, too.
        instprm.write_text(instrument.instprm, encoding="utf-8")
        self._project = g2.sc.G2Project(newgpx=str(Path(f"phase-{code}.gpx").absolute()))
        # Any times, in ms; those of the grid replace them below.
        self._histogram = self._project.add_simulated_powder_histogram(
            "simulated", str(instprm), Tmin=1.0, Tmax=2.0, Npoints=100
        )
        self._phase = add_phase(g2, self._project, phase, [self._histogram])
        data = self._histogram.data
        n = len(tof)
        data["data"][1] = [tof.copy(), *(np.zeros(n) if k else np.ones(n) for k in (1, 0, 1, 1, 1))]
        data["Limits"] = [(tof[0], tof[-1]), [tof[0], tof[-1]]]
        data["Background"][0][:] = ["chebyschev-1", False, 1, 0.0]
        self._in_memory: tuple[Any, Any, Any] | None = None

    def scripting(self, cell: list[float], sample: dict[str, float]) -> Array:
        """Return a pattern, shape (points,), by the documented scripting interface."""
        histogram, phase = self._histogram.data, self._phase.data
        self._set(histogram, phase, cell, sample)
        # A refinement that fails only prints a message, and leaves these values as they are.
        untouched = -1.0
        histogram["data"][1][3] = np.full_like(histogram["data"][1][0], untouched)
        self._project.do_refinements([{}])
        pattern = np.ma.getdata(self._histogram.getdata("ycalc")).astype(np.float64)
        if (pattern == untouched).all():
            raise RuntimeError("GSAS-II computes no pattern for this cell")
        return pattern

    def memory(self, cell: list[float], sample: dict[str, float]) -> Array:
        """Return a pattern, shape (points,), by GSAS-II's functions in memory."""
        io, math = self._g2.io, self._g2.math
        if self._in_memory is None:
            self._project.save()
            histograms, phases = io.GetUsedHistogramsAndPhases(self._project.filename)
            controls = io.GetControls(self._project.filename)
            self._in_memory = histograms, phases, controls
        histograms, phases, controls = self._in_memory
        ((name, histogram),) = histograms.items()
        (phase,) = phases.values()
        self._set(histogram, phase, cell, sample)
        rigid_bodies: dict[str, list[Any]] = {"Vector": [], "Residue": []}
        phase_data = io.GetPhaseData(phases, {}, rigid_bodies, Print=False)
        _, _, _, of_phase, pawley, *_ = phase_data
        control = controls | {
            name: table for name, table in zip(_PHASE_DATA, phase_data, strict=True) if name
        }
        both = io.GetHistogramPhaseData(phases, histograms, Controls=control, Print=False)
        _, of_both, more = both
        control.update(more)
        _, of_histogram, tables, more = io.GetHistogramData(histograms, Print=False)
        control.update(more)
        parameters, tof = of_phase | of_both | of_histogram, histogram["Data"][0]
        pattern, background = math.getPowderProfile(
            parameters, tables, tof, [], histogram, phases, control, pawley, name
        )
        return np.ma.getdata(pattern + background).astype(np.float64)

    def _set(
        self,
        histogram: Mapping[str, Any],
        phase: Mapping[str, Any],
        cell: list[float],
        sample: dict[str, float],
    ) -> None:
        volume = float(cell_volume(np.array([cell]))[0])
        phase["General"]["Cell"][1:8] = [*cell, volume]
        u_iso = phase["General"]["AtomPtrs"][3] + 1
        for atom, site in zip(phase["Atoms"], self._source.sites, strict=True):
            atom[u_iso] = site.u_iso * sample["u_scale"]
        ((_, broadening),) = phase["Histograms"].items()
        broadening["Size"][1][0] = sample["size"]
        broadening["Mustrain"][1][0] = sample["microstrain"]
        instrument = histogram["Instrument Parameters"][0]
        for key, name in (("difC", "difc"), ("Zero", "tzero")):
            instrument[key][:2] = [sample[name], sample[name]]


def add_phase(g2: SimpleNamespace, project: Any, source: Phase, histograms: Sequence[Any]) -> Any:
    """Add a phase to a project of GSAS-II, and return GSAS-II's object of it.

    ``g2`` are GSAS-II's modules. Raises a Gsas2Error if GSAS-II reads the phase in another way.
    """
    symbol, shift = setting(source)
    if g2.groups.SpcGroup(symbol)[0]:
        raise Gsas2Error(
            f"Phase '{source.name}' has the space group {source.space_group}, which GSAS-II does "
            f"not know. {_TRANSFORM}"
        )
    phase = project.add_phase(
        phasename=source.name,
        spacegroup=symbol,
        cell=[float(v) for v in source.cell],
        histograms=histograms,
    )
    for number, site in enumerate(source.sites):
        position, name = np.array(site.position) + shift, f"{site.symbol}{number}"
        element = element_of(site.symbol)
        phase.add_atom(*position, element, name, occ=site.occupancy, uiso=site.u_iso)
    _set_isotopes(phase, source)
    _check(phase, source, shift)
    return phase


def _set_isotopes(phase: Any, source: Phase) -> None:
    """Choose the isotope of each element, which GSAS-II knows once for all of its atoms."""
    general = phase.data["General"]
    symbols = {site.symbol for site in source.sites}
    for symbol in sorted(symbols - {element_of(symbol) for symbol in symbols}):
        element = element_of(symbol)
        mass = symbol.removesuffix(element)
        mixed = sum(element_of(other) == element for other in symbols) > 1
        if mixed or mass not in general["Isotopes"][element]:
            raise Gsas2Error(
                f"Phase '{source.name}' holds {symbol}, which GSAS-II does not know, or "
                f"not next to other {element}. Use --simulator kinematic."
            )
        general["Isotope"][element] = mass


def _check(phase: Any, source: Phase, shift: Array) -> None:
    """Refuse a phase to which GSAS-II gives another symmetry, or other atoms, than gemmi."""
    group = phase.data["General"]["SGData"]
    if operations_of(source.group_ops, shift) != operations_of_gsas2(group):
        raise Gsas2Error(
            f"Phase '{source.name}' has the space group {source.space_group}, which GSAS-II reads "
            f"as {group['SpGrp']} ({group['SGLaue']}) with other operations. {_TRANSFORM}"
        )
    multiplicity = [atom.mult for atom in phase.atoms()]
    if sum(multiplicity) != len(source.symbols):
        raise Gsas2Error(
            f"Phase '{source.name}' has {len(source.symbols)} atoms in the cell, but GSAS-II "
            f"counts {sum(multiplicity)}: give the coordinates of special positions with more "
            f"digits (0.333333, not 0.333)."
        )


def setting(phase: Phase) -> tuple[str, Array]:
    """Return GSAS-II's symbol of a phase's space group, and the shift to its origin.

    GSAS-II marks rhombohedral axes by an R behind the symbol (a table number would mean hexagonal
    ones, so there is none), and of two origins it knows only the second, the centre of symmetry.
    """
    group = gemmi.find_spacegroup_by_name(phase.space_group)
    assert group is not None  # the symbol was written by gemmi itself
    symbol = f"{group.hm} R" if group.ext == "R" else group.hm
    if group.ext != "1":
        return symbol, np.zeros(3)
    operations = group.operations()
    second = gemmi.find_spacegroup_by_name(f"{group.hm}:2")
    assert second is not None  # every group with a first choice of origin has a second one
    target = operations_of(second.operations(), np.zeros(3))
    inversions = [op for op in operations if op.rot == (gemmi.Op("-x,-y,-z").rot)]
    centres = [
        (np.array(op.tran) / op.DEN + corner) / 2
        for op in inversions
        for corner in itertools.product((0, 1), repeat=3)
    ]
    return symbol, next(
        (-c for c in centres if operations_of(operations, -c) == target), np.zeros(3)
    )


def operations_of(operations: gemmi.GroupOps, shift: Array) -> set[tuple[int, ...]]:
    """Return symmetry operations about a shifted origin, with translations in 24ths."""
    result = set()
    for op in operations:
        rotation = np.array(op.rot) // op.DEN
        moved = np.array(op.tran) + np.rint((shift - rotation @ shift) * op.DEN).astype(int)
        result.add((*rotation.ravel().tolist(), *(moved % op.DEN).tolist()))
    return result


def operations_of_gsas2(group: Mapping[str, Any]) -> set[tuple[int, ...]]:
    """Return the symmetry operations of GSAS-II's space group, with translations in 24ths."""
    result = set()
    for rotation, translation in group["SGOps"]:
        for sign in (1, -1) if group["SGInv"] else (1,):
            for centring in group["SGCen"]:
                moved = np.rint(24 * (sign * np.asarray(translation) + centring)).astype(int) % 24
                turned = np.rint(sign * np.asarray(rotation)).astype(int)
                result.add((*turned.ravel().tolist(), *moved.tolist()))
    return result


def import_gsas2(location: str | None) -> SimpleNamespace:
    """Import GSAS-II and check that its compiled parts work."""
    if location:
        # The package itself may be named, too. Where pip installs it, modules of an older layout
        # lie next to it.
        path = Path(location)
        directories = [path, path.parent] if path.name == "GSASII" else [path]
        holders = [d for d in directories if (d / "GSASII" / "GSASIIscriptable.py").is_file()]
        if not holders:
            raise Gsas2Error(f"There is no GSAS-II in {location}. {HOW_TO_INSTALL}")
        sys.path.insert(0, str(holders[0]))
    else:
        # gsas2pkg installs it next to the packages of its environment, not among them.
        prefixes = (sys.prefix, os.environ.get("CONDA_PREFIX", ""))
        sys.path.extend(str(Path(prefix) / "GSAS-II") for prefix in prefixes if prefix)
    try:
        modules = [importlib.import_module(f"GSASII.GSASII{name}") for name in _MODULES]
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "GSASII" and "GSASII" not in sys.modules:
            raise Gsas2Error(
                f"GSAS-II is not installed for {sys.executable}. {HOW_TO_INSTALL}"
            ) from error
        raise _broken(error) from error
    except (Exception, SystemExit) as error:
        raise _broken(error) from error
    g2 = SimpleNamespace(**dict(zip(_NAMES, modules, strict=True)))
    try:
        problem, _ = g2.groups.SpcGroup("P -1")  # compiled
        if problem:
            raise RuntimeError(f"it does not know the space group P -1 ({problem})")  # noqa: TRY301
        # Whatever the user has set for GSAS-II's windows: one process is one thread here.
        g2.path.AddConfigValue({"Multiprocessing_cores": 0, "debug": False, "Show_timing": False})
        g2.processes.ResetMP()
        g2.sc.SetPrintLevel("none")
    except Exception as error:
        raise _broken(error) from error
    return g2


def commit_of_repository(repository: Path) -> str:
    """Return the commit that a git repository is at, without the program, or nothing.

    GSAS-II itself answers this by git where that is on PATH, and otherwise says something else:
    two workers of one installation would have different versions.
    """
    try:
        head = (repository / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (repository / name).is_file():
            return (repository / name).read_text().strip()
        packed = (repository / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return ""


def _broken(error: BaseException) -> Gsas2Error:
    where = getattr(sys.modules.get("GSASII"), "__file__", None) or sys.executable
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return Gsas2Error(f"The GSAS-II at {where} is broken ({reason}). {HOW_TO_INSTALL}")
