"""GSAS-II itself: the one place that imports it, always in a process of its own.

GSAS-II (Toby & Von Dreele, J. Appl. Cryst. 46 (2013) 544) is unsafe with threads, prints, writes
files into its directory and keeps global state: see :mod:`bragg_data.simulation.isolated_process`.
It is given everything that a campaign defines, and what it makes of it is compared before anything
is computed.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bragg_data.crystallography.cell import check_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.defaults import PATTERN_SECONDS
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.simulation.gsas2_project import Gsas2Error, Project
from bragg_data.simulation.isolated_process import (
    IsolatedProcess,
    IsolatedProcessError,
    IsolatedProcessTimeoutError,
)

VERSION = "1"
"""Version of what is done with GSAS-II, part of a data set's identity beside GSAS-II's own."""

__all__ = ["Gsas2Error", "PathCheck", "PatternsError", "Simulator", "installed_version"]

CallPath = Literal["memory", "scripting"]
"""The way to call it: its functions in memory, or its documented scripting interface."""

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


class PatternsError(RuntimeError):
    """Patterns that GSAS-II failed on.

    Parameters
    ----------
    reasons
        By the number of the sample, why.
    final
        Whether it would fail again: it did not die, but refused, or took too long.
    """

    def __init__(self, reasons: Mapping[int, str], final: bool = True) -> None:
        super().__init__(reasons, final)
        self.reasons = dict(reasons)
        self.final = final

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
    """GSAS-II with the signature of :class:`bragg_data.simulation.kinematic.Simulator`.

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
        self.location = _absolute(location)
        self.call_path: CallPath = call_path
        self.pattern_seconds = pattern_seconds
        self._child: IsolatedProcess | None = None
        self._turn = threading.RLock()  # GSAS-II is one process, whatever threads ask for patterns

    @property
    def version(self) -> str:
        """Version of GSAS-II, and of what is done with it.

        Raises
        ------
        Gsas2Error
            If there is none, or it does not work.
        """
        return str(_answered(self.location, lambda: self._call("version", seconds=_SECONDS)))

    def prepare(self, phase: int) -> None:
        """Start GSAS-II and make the project of a phase, which the first pattern does otherwise.

        Raises
        ------
        Gsas2Error
            If there is no GSAS-II that works, or it does not understand the phase.
        """
        try:
            _answered(self.location, lambda: self._call("prepare", phase, seconds=_SECONDS))
        except Gsas2Error:
            raise
        except Exception as error:
            name = self.phases[phase].name
            raise Gsas2Error(
                f"GSAS-II does not take phase '{name}' ({_told(error)}). Look at its CIF and the "
                f"instrument file, or use --simulator kinematic."
            ) from error

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
        given = {
            "u_scale": u_scale, "size": size, "microstrain": microstrain, "tzero": tzero,
            "difc": difc,
        }  # fmt: skip
        per_sample = {
            name: np.full(
                len(cells), nominal if given[name] is None else given[name], dtype=np.float64
            )
            for name, nominal in self._nominal.items()
        }
        patterns = np.full((len(cells), self.grid.points), np.nan, dtype=np.float32)
        reasons, final = {}, True
        for row, (code, cell) in enumerate(zip(phase, cells, strict=True)):
            sample = {name: float(values[row]) for name, values in per_sample.items()}
            try:
                patterns[row] = self._pattern(self.call_path, int(code), cell, sample)
            except Gsas2Error:
                raise
            except Exception as error:
                reasons[row] = _told(error)
                final &= isinstance(error, IsolatedProcessTimeoutError) or not isinstance(
                    error, IsolatedProcessError
                )
        if reasons:
            raise PatternsError(reasons, final)
        return patterns

    def check(self, phase: int, cell: NDArray[np.float64]) -> PathCheck:
        """Compare the two ways to call GSAS-II on one cell, shape (6,), of a phase.

        Raises
        ------
        Gsas2Error
            If there is no GSAS-II that works, or it does not understand the phase, or the
            documented way fails.
        """
        sample = self._nominal
        self.prepare(phase)
        began = time.monotonic()
        try:
            wanted = self._pattern("scripting", phase, cell, sample)
        except Exception as error:
            name = self.phases[phase].name
            raise Gsas2Error(
                f"GSAS-II fails on a cell of phase '{name}': {_told(error)}."
            ) from error
        between = time.monotonic()
        problem, difference = "", np.inf
        try:
            found = self._pattern("memory", phase, cell, sample)
            difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        except Exception as error:
            problem = _told(error)
        if not np.isfinite(difference):
            difference, problem = np.inf, problem or "values that are not finite"
        return PathCheck(difference, time.monotonic() - between, between - began, problem)

    def close(self) -> None:
        """End GSAS-II's process and remove its directory, which happens by itself as well."""
        if self._child:
            self._child.close()
        self._child = None

    @property
    def _nominal(self) -> dict[str, float]:
        """What a sample has that is given nothing of its own."""
        return {
            "u_scale": 1.0, "size": self.size, "microstrain": self.microstrain,
            "tzero": self.instrument.tzero, "difc": self.instrument.difc,
        }  # fmt: skip

    def _pattern(
        self, call_path: CallPath, code: int, cell: NDArray[np.float64], sample: dict[str, float]
    ) -> NDArray[np.float64]:
        for last in (False, True):
            try:
                pattern: NDArray[np.float64] = self._call(
                    call_path, code, [float(v) for v in cell], sample, seconds=self.pattern_seconds
                )
            except IsolatedProcessTimeoutError:
                raise
            except IsolatedProcessError:
                if last:
                    raise
            else:
                return pattern
        raise AssertionError  # the second round returns or raises

    def _call(self, method: str, *arguments: Any, seconds: float) -> Any:
        with self._turn:
            return self._running().call(method, *arguments, seconds=seconds)

    def _running(self) -> IsolatedProcess:
        if self._child is None or not self._child.alive:
            self._child = IsolatedProcess(
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
    location = _absolute(location)
    with closing(
        _answered(location, lambda: IsolatedProcess(_TARGET, location, name="gsas2"))
    ) as child:
        return str(_answered(location, lambda: child.call("version", seconds=_SECONDS)))


def _absolute(location: str | None) -> str | None:
    """Return a path that means the same in GSAS-II's process."""
    return str(Path(location).expanduser().absolute()) if location else None


def _told(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    # A KeyError says nothing but the key.
    told = isinstance(error, (IsolatedProcessError, RuntimeError, ValueError)) and text
    return text if told else f"{type(error).__name__}: {text}"


def _answered(location: str | None, ask: Callable[[], _Answer]) -> _Answer:
    try:
        return ask()
    except IsolatedProcessError as error:
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
        self._projects: dict[int, Project] = {}

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

    def _project(self, code: int) -> Project:
        if code not in self._projects:
            assert self._instrument is not None
            assert self._tof is not None
            phase = self._phases[code]
            self._projects[code] = Project(self._g2, phase, self._instrument, self._tof, code)
        return self._projects[code]


def _import(location: str | None) -> SimpleNamespace:
    """Import GSAS-II from where it is, and try whether its compiled parts work.

    Raises
    ------
    Gsas2Error
        If there is none, or it does not work.
    """
    if location:
        given = Path(location)
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
