"""GSAS-II itself: the one place that imports it, always in a process of its own.

GSAS-II (Toby & Von Dreele, J. Appl. Cryst. 46 (2013) 544) is unsafe with threads, prints, writes
files into its directory and keeps global state: see :mod:`bragg_data.child`. It is told everything
that a campaign says, and what it makes of it is compared before anything is computed.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bragg_data.child import Child, ChildError, ChildTimeoutError
from bragg_data.crystal import cell_volume, check_volume
from bragg_data.instrument import Instrument, TofGrid
from bragg_data.structure import Phase

VERSION = "1"
"""Version of what is done with GSAS-II, part of a data set's identity beside GSAS-II's own."""

CallPath = Literal["memory", "scripting"]
"""The way to call it: its functions in memory, or its documented scripting interface."""

PATTERN_SECONDS = 600.0
"""Default time limit for one pattern."""

AGREEMENT = 1e-5
"""How far, relative to a pattern's maximum, the two ways may be apart."""

_HOW_TO_GET = (
    "Install the conda package gsas2pkg (deploy/environment.yml does), or name the directory that "
    "holds GSASII with --gsas2-path or the variable BRAGG_GSAS2_PATH. The fast simulator, "
    "--simulator kinematic, needs none of it."
)


_SECONDS = 300.0  # for whatever is no pattern
_TARGET = f"{__name__}:Served"
_Answer = TypeVar("_Answer")


class Gsas2Error(RuntimeError):
    """There is no GSAS-II that works, or it does not understand a campaign."""


class PatternsError(RuntimeError):
    """Patterns that GSAS-II failed on.

    Parameters
    ----------
    reasons
        By the number of the sample, why.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        number, reason = min(self.reasons.items())
        return f"{len(self.reasons)} patterns failed; the first, number {number}: {reason}"


class PathCheck(NamedTuple):
    """The two ways to call GSAS-II, compared on one pattern.

    Attributes
    ----------
    difference
        Largest difference over the maximum; infinite where the way in memory fails.
    memory_seconds, scripting_seconds
        How long they took.
    problem
        Why the way in memory fails, or nothing.
    """

    difference: float
    memory_seconds: float
    scripting_seconds: float
    problem: str

    @property
    def call_path(self) -> CallPath:
        """The faster way, if it gives the same."""
        return "memory" if self.difference <= AGREEMENT else "scripting"


class Simulator:
    """GSAS-II with the signature of :class:`bragg_data.kinematic.Simulator`.

    Parameters
    ----------
    phases, instrument, grid
        What to simulate.
    size, microstrain
        Isotropic Lorentzian broadening in µm and 1e-6.
    location
        Directory that holds the package ``GSASII``, where it cannot be imported otherwise.
    call_path
        See :data:`CallPath`.
    pattern_seconds
        Time limit for one pattern.

    Notes
    -----
    What GSAS-II does by itself and what is made of it: the 2,806 centres of its bins become the
    points of the grid; its lower limit, d = 0.4 Å, the first point; its background of 1.0 zero;
    ``ycalc`` is returned, since ``yobs`` carries noise. Its default scale, 1e5, is kept.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        instrument: Instrument,
        grid: TofGrid,
        *,
        size: float,
        microstrain: float,
        location: str | None = None,
        call_path: CallPath = "memory",
        pattern_seconds: float = PATTERN_SECONDS,
    ) -> None:
        self.instrument = instrument
        self.grid = grid
        self.phases = tuple(phases)
        self.size = size
        self.microstrain = microstrain
        self.location = location
        self.call_path: CallPath = call_path
        self.pattern_seconds = pattern_seconds
        self._child: Child | None = None

    @property
    def version(self) -> str:
        """Version of GSAS-II, and of what is done with it.

        Raises
        ------
        Gsas2Error
            If there is none, or it does not work.
        """
        return str(
            _answered(self.location, lambda: self._running().call("version", seconds=_SECONDS))
        )

    def simulate(
        self,
        phase: NDArray[np.integer],
        cells: NDArray[np.float64],
        *,
        u_scale: ArrayLike | None = None,
        size: ArrayLike | None = None,
        microstrain: ArrayLike | None = None,
        tzero: ArrayLike | None = None,
        difc: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Return the patterns of samples.

        Parameters
        ----------
        phase : shape (n,)
            Index of each sample's phase.
        cells : shape (n, 6)
            Unit cells, in ångström and degrees.
        u_scale : shape (n,), optional
            Factor on the displacement parameters of the phase.
        size, microstrain : shape (n,), optional
            Broadening of each sample in µm and 1e-6; the nominal one if left out.
        tzero, difc : shape (n,), optional
            Calibration of each sample's measurement, in µs and µs/Å; the instrument's if left out.

        Returns
        -------
        shape (n, points), float32
            Intensity per µs.

        Raises
        ------
        PatternsError
            If GSAS-II fails on patterns, or takes too long; all others were computed before.
        Gsas2Error
            If there is no GSAS-II that works, or it does not understand a phase.
        CrystalError
            If a cell encloses no volume, or is not of its phase's lattice.
        """
        phase = np.asarray(phase)
        cells = np.asarray(cells, dtype=np.float64)
        check_volume(cells)
        for code in np.unique(phase):
            self.phases[code].lattice.check_tied(cells[phase == code])
        given_and_nominal = {
            "u_scale": (u_scale, 1.0),
            "size": (size, self.size),
            "microstrain": (microstrain, self.microstrain),
            "tzero": (tzero, self.instrument.tzero),
            "difc": (difc, self.instrument.difc),
        }
        per_sample = {
            name: np.full(len(cells), nominal if given is None else given, dtype=np.float64)
            for name, (given, nominal) in given_and_nominal.items()
        }
        patterns = np.full((len(cells), self.grid.points), np.nan, dtype=np.float32)
        reasons = {}
        for row, (code, cell) in enumerate(zip(phase, cells, strict=True)):
            sample = {name: float(values[row]) for name, values in per_sample.items()}
            try:
                patterns[row] = self._pattern(self.call_path, int(code), cell, sample)
            except Gsas2Error:
                raise
            except Exception as error:
                reasons[row] = " ".join(str(error).split()) or type(error).__name__
        if reasons:
            raise PatternsError(reasons)
        return patterns

    def check(self, phase: int, cell: NDArray[np.float64]) -> PathCheck:
        """Compare the two ways to call GSAS-II on one cell, shape (6,), of a phase.

        Raises
        ------
        Gsas2Error
            If there is no GSAS-II that works, or it does not understand the phase, or the
            documented way fails.
        """
        sample = {
            "u_scale": 1.0, "size": self.size, "microstrain": self.microstrain,
            "tzero": self.instrument.tzero, "difc": self.instrument.difc,
        }  # fmt: skip
        _answered(self.location, lambda: self._running().call("prepare", phase, seconds=_SECONDS))
        began = time.monotonic()
        try:
            wanted = self._pattern("scripting", phase, cell, sample)
        except RuntimeError as error:
            name = self.phases[phase].name
            raise Gsas2Error(f"GSAS-II fails on a cell of phase '{name}': {error}.") from error
        between = time.monotonic()
        problem, difference = "", np.inf
        try:
            found = self._pattern("memory", phase, cell, sample)
            difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return PathCheck(difference, time.monotonic() - between, between - began, problem)

    def close(self) -> None:
        """End GSAS-II's process and remove its directory, which happens by itself as well."""
        if self._child:
            self._child.close()
        self._child = None

    def _pattern(
        self, call_path: CallPath, code: int, cell: NDArray[np.float64], sample: dict[str, float]
    ) -> NDArray[np.float64]:
        for last in (False, True):
            try:
                pattern: NDArray[np.float64] = self._running().call(
                    call_path, code, [float(v) for v in cell], sample, seconds=self.pattern_seconds
                )
            except ChildTimeoutError:
                raise
            except ChildError:
                if last:
                    raise
            else:
                return pattern
        raise AssertionError  # the second round returns or raises

    def _running(self) -> Child:
        if self._child is None or not self._child.alive:
            self._child = Child(
                _TARGET, self.location, self.phases, self.instrument, self.grid.tof, name="gsas2"
            )
        return self._child


def installed_version(location: str | None = None) -> str:
    """Return the version of the GSAS-II that this Python finds, having tried whether it works.

    Raises
    ------
    Gsas2Error
        If there is none, or it does not work.
    """
    with closing(_answered(location, lambda: Child(_TARGET, location, name="gsas2"))) as child:
        return str(_answered(location, lambda: child.call("version", seconds=_SECONDS)))


def _answered(location: str | None, ask: Callable[[], _Answer]) -> _Answer:
    try:
        return ask()
    except ChildError as error:
        where = location or sys.executable
        raise Gsas2Error(f"GSAS-II of {where} does not run: {error}. {_HOW_TO_GET}") from error


# -- in GSAS-II's process ------------------------------------------------------------------------


class Served:
    """GSAS-II in the process that imports it; its working directory is all its own.

    Parameters are those of :class:`Simulator`; without phases it can only tell its version.
    """

    def __init__(
        self,
        location: str | None,
        phases: Sequence[Phase] = (),
        instrument: Instrument | None = None,
        tof: NDArray[np.float64] | None = None,
    ) -> None:
        self._g2 = _import(location)
        self._phases, self._instrument, self._tof = phases, instrument, tof
        self._projects: dict[int, _Project] = {}

    def version(self) -> str:
        """Return the version of GSAS-II and of what is done with it."""
        path = self._g2.path
        # A checkout, such as gsas2pkg makes, may be newer than what was written into it.
        home = Path(path.path2GSAS2)
        commit = _head(home.parent / ".git") or _head(home / ".git")
        commit = commit or getattr(path.getSavedVersionInfo(), "git_version", "unknown")
        number, tag = path.GetVersionNumber(), path.GetVersionTag()
        return f"{VERSION}, GSAS-II {number} {tag} {commit[:8]}"

    def prepare(self, code: int) -> None:
        """Make the project of a phase."""
        self._project(code)

    def memory(self, code: int, cell: list[float], sample: dict[str, float]) -> NDArray[np.float64]:
        """Return a pattern, shape (points,), by GSAS-II's functions in memory."""
        return self._project(code).memory(cell, sample)

    def scripting(
        self, code: int, cell: list[float], sample: dict[str, float]
    ) -> NDArray[np.float64]:
        """Return a pattern, shape (points,), by the documented scripting interface."""
        return self._project(code).scripting(cell, sample)

    def _project(self, code: int) -> _Project:
        if code not in self._projects:
            assert self._instrument is not None
            assert self._tof is not None
            phase = self._phases[code]
            self._projects[code] = _Project(self._g2, phase, self._instrument, self._tof, code)
        return self._projects[code]


class _Project:
    """A project of one phase and one simulated histogram."""

    def __init__(
        self,
        g2: SimpleNamespace,
        phase: Phase,
        instrument: Instrument,
        tof: NDArray[np.float64],
        code: int,
    ) -> None:
        self._g2, self._source = g2, phase
        instprm = Path(f"instrument-{code}.instprm").absolute()
        instprm.write_text(instrument.text, encoding="utf-8")
        self._project = g2.sc.G2Project(newgpx=str(Path(f"phase-{code}.gpx").absolute()))
        # Any times, given as it wants them, in ms: the grid's own come below.
        self._histogram = self._project.add_simulated_powder_histogram(
            "simulated", str(instprm), Tmin=1.0, Tmax=2.0, Npoints=len(tof)
        )
        symbol, shift = _setting(phase)
        self._phase = self._project.add_phase(
            phasename=phase.name,
            spacegroup=symbol,
            cell=[float(v) for v in phase.cell],
            histograms=[self._histogram],
        )
        for number, site in enumerate(phase.sites):
            self._phase.add_atom(
                *(np.array(site.position) + shift), site.symbol, f"{site.symbol}{number}",
                occ=site.occupancy, uiso=site.u_iso,
            )  # fmt: skip
        self._check(shift)
        data = self._histogram.data
        n = len(tof)
        data["data"][1] = [tof.copy(), *(np.zeros(n) if k else np.ones(n) for k in (1, 0, 1, 1, 1))]
        data["Limits"] = [(tof[0], tof[-1]), [tof[0], tof[-1]]]
        data["Background"][0][:] = ["chebyschev-1", False, 1, 0.0]
        self._in_memory: SimpleNamespace | None = None

    def _check(self, shift: NDArray[np.float64]) -> None:
        """Refuse a phase in which GSAS-II sees another symmetry, or other atoms, than we do."""
        found = self._phase.data["General"]["SGData"]
        wanted = self._source.group_ops
        known = _operations_of(wanted, shift)
        theirs = _operations_in(found)
        name, symbol = self._source.name, self._source.space_group
        if known != theirs:
            raise Gsas2Error(
                f"Phase '{name}' has the space group {symbol}, which GSAS-II reads as "
                f"{found['SpGrp']} ({found['SGLaue']}) with other operations. Transform the CIF "
                f"to the standard setting, or use --simulator kinematic."
            )
        multiplicity = [atom.mult for atom in self._phase.atoms()]
        if sum(multiplicity) != len(self._source.symbols):
            raise Gsas2Error(
                f"Phase '{name}' has {len(self._source.symbols)} atoms in the cell, but GSAS-II "
                f"counts {sum(multiplicity)}: give the coordinates of special positions with more "
                f"digits (0.333333, not 0.333)."
            )

    def scripting(self, cell: list[float], sample: dict[str, float]) -> NDArray[np.float64]:
        histogram, phase = self._histogram.data, self._phase.data
        self._set(histogram, phase, cell, sample)
        # A refinement that fails says so only to the screen: what it leaves is this.
        untouched = -1.0
        histogram["data"][1][3] = np.full_like(histogram["data"][1][0], untouched)
        self._project.do_refinements([{}])
        pattern = np.ma.getdata(self._histogram.getdata("ycalc")).astype(np.float64)
        if (pattern == untouched).all():
            raise RuntimeError("GSAS-II computes no pattern for this cell")
        return pattern

    def memory(self, cell: list[float], sample: dict[str, float]) -> NDArray[np.float64]:
        io, math = self._g2.io, self._g2.math
        if self._in_memory is None:
            self._project.save()
            histograms, phases = io.GetUsedHistogramsAndPhases(self._project.filename)
            controls = io.GetControls(self._project.filename)
            self._in_memory = SimpleNamespace(
                histograms=histograms, phases=phases, controls=controls
            )
        known = self._in_memory
        ((name, histogram),) = known.histograms.items()
        (phase,) = known.phases.values()
        self._set(histogram, phase, cell, sample)
        rigid_bodies: dict[str, list[Any]] = {"Vector": [], "Residue": []}
        names = (
            "Natoms", "atomIndx", "", "", "", "FFtables", "EFtables", "ORBtables", "BLtables",
            "MFtables", "maxSSwave",
        )  # fmt: skip
        found = io.GetPhaseData(known.phases, {}, rigid_bodies, Print=False)
        _, _, _, of_phase, pawley, *_ = found
        control = known.controls | {k: v for k, v in zip(names, found, strict=True) if k}
        _, of_both, more = io.GetHistogramPhaseData(
            known.phases, known.histograms, Controls=control, Print=False
        )
        control.update(more)
        _, of_histogram, tables, more = io.GetHistogramData(known.histograms, Print=False)
        control.update(more)
        pattern, background = math.getPowderProfile(
            of_phase | of_both | of_histogram, tables, histogram["Data"][0], [], histogram,
            known.phases, control, pawley, name,
        )  # fmt: skip
        return np.ma.getdata(pattern + background).astype(np.float64)

    def _set(
        self,
        histogram: dict[str, Any],
        phase: dict[str, Any],
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


def _setting(phase: Phase) -> tuple[str, NDArray[np.float64]]:
    """Return GSAS-II's symbol of a phase's space group, and the way to its origin.

    GSAS-II knows rhombohedral axes by an R behind the symbol (a table number would mean hexagonal
    ones, so none is given), and of two origins only the second, the centre of symmetry.
    """
    group = gemmi.find_spacegroup_by_name(phase.space_group)
    assert group is not None  # the symbol was written by gemmi itself
    symbol = f"{group.hm} R" if group.ext == "R" else group.hm
    if group.ext != "1":
        return symbol, np.zeros(3)
    own = group.operations()
    other = gemmi.find_spacegroup_by_name(f"{group.hm}:2")
    assert other is not None
    wanted = _operations_of(other.operations(), np.zeros(3))
    inversions = [op for op in own if op.rot == (gemmi.Op("-x,-y,-z").rot)]
    centres = [
        (np.array(op.tran) / op.DEN + corner) / 2
        for op in inversions
        for corner in itertools.product((0, 1), repeat=3)
    ]
    return symbol, next((-c for c in centres if _operations_of(own, -c) == wanted), np.zeros(3))


def _operations_of(operations: gemmi.GroupOps, shift: NDArray[np.float64]) -> set[tuple[int, ...]]:
    """Return symmetry operations about an origin shifted so, with translations in 24ths."""
    found = set()
    for op in operations:
        rotation = np.array(op.rot) // op.DEN
        moved = np.array(op.tran) + np.rint((shift - rotation @ shift) * op.DEN).astype(int)
        found.add((*rotation.ravel().tolist(), *(moved % op.DEN).tolist()))
    return found


def _operations_in(group: dict[str, Any]) -> set[tuple[int, ...]]:
    """Return the symmetry operations of GSAS-II's space group, with translations in 24ths."""
    found = set()
    for rotation, translation in group["SGOps"]:
        for sign in (1, -1) if group["SGInv"] else (1,):
            for centring in group["SGCen"]:
                moved = np.rint(24 * (sign * np.asarray(translation) + centring)).astype(int) % 24
                turned = np.rint(sign * np.asarray(rotation)).astype(int)
                found.add((*turned.ravel().tolist(), *moved.tolist()))
    return found


def _import(location: str | None) -> SimpleNamespace:
    """Import GSAS-II from where it is, and try whether its compiled parts work.

    Raises
    ------
    Gsas2Error
        If there is none, or it does not work.
    """
    if location:
        given = Path(location).expanduser()
        holder = given.parent if (given / "GSASIIscriptable.py").is_file() else given
        if not (holder / "GSASII" / "GSASIIscriptable.py").is_file():
            raise Gsas2Error(f"There is no GSAS-II in {location}. {_HOW_TO_GET}")
        sys.path.insert(0, str(holder))
    else:
        # gsas2pkg puts it beside, not into, the packages of its environment.
        prefixes = (sys.prefix, os.environ.get("CONDA_PREFIX", ""))
        sys.path.extend(str(Path(prefix) / "GSAS-II") for prefix in prefixes if prefix)
    try:
        modules = {
            name: importlib.import_module(f"GSASII.GSASII{module}")
            for name, module in (
                ("path", "path"), ("sc", "scriptable"), ("io", "strIO"), ("math", "strMath"),
                ("groups", "spc"), ("processes", "mpsubs"),
            )
        }  # fmt: skip
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "GSASII" and "GSASII" not in sys.modules:
            raise Gsas2Error(
                f"GSAS-II is not installed for {sys.executable}. {_HOW_TO_GET}"
            ) from error
        raise _broken(error) from error
    except (Exception, SystemExit) as error:
        raise _broken(error) from error
    g2 = SimpleNamespace(**modules)
    try:
        problem, _ = g2.groups.SpcGroup("P -1")  # compiled
        if problem:
            raise RuntimeError(f"it does not know the space group P -1 ({problem})")  # noqa: TRY301
        _make_quiet_and_single(g2)
    except Exception as error:
        raise _broken(error) from error
    return g2


def _head(repository: Path) -> str:
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


def _make_quiet_and_single(g2: SimpleNamespace) -> None:
    # Whatever the user has set for GSAS-II's windows: one process is one thread here.
    g2.path.AddConfigValue({"Multiprocessing_cores": 0, "debug": False, "Show_timing": False})
    g2.processes.ResetMP()
    g2.sc.SetPrintLevel("none")


def _broken(error: BaseException) -> Gsas2Error:
    package: ModuleType | None = sys.modules.get("GSASII")
    where = getattr(package, "__file__", None) or sys.executable
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return Gsas2Error(f"The GSAS-II at {where} is broken ({reason}). {_HOW_TO_GET}")
