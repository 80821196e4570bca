"""GSAS-II itself, in the process that imports it; started by :mod:`bragg_data.simulation.gsas2`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from bragg_data.simulation.gsas2_project import Gsas2Error, Project

VERSION = "1"
"""Version of the way in which GSAS-II is called, part of a data set's identity next to its own."""

HOW_TO_INSTALL = (
    "Install the conda package gsas2pkg (deploy/environment.yml does), or name the directory that "
    "holds GSASII with --gsas2-path or the variable BRAGG_GSAS2_PATH. The fast simulator, "
    "--simulator kinematic, needs none of it."
)
"""The remedy where there is no GSAS-II that works."""

_MODULES = {
    "path": "path",
    "sc": "scriptable",
    "io": "strIO",
    "math": "strMath",
    "groups": "spc",
    "processes": "mpsubs",
}


class Gsas2Worker:
    """GSAS-II in the process that imports it, with a working directory of its own.

    Parameters
    ----------
    location
        Directory that holds the package ``GSASII``, where it cannot be imported otherwise.
    phases, instrument, tof : tof of shape (points,)
        What is simulated, at which times of flight in µs; without them it only has a version.

    Raises
    ------
    Gsas2Error
        If there is no GSAS-II that works.
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
    """Import GSAS-II and check that its compiled parts work.

    Raises
    ------
    Gsas2Error
        If there is none, or it does not work.
    """
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
        g2 = SimpleNamespace(
            **{name: importlib.import_module(f"GSASII.GSASII{_MODULES[name]}") for name in _MODULES}
        )
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "GSASII" and "GSASII" not in sys.modules:
            raise Gsas2Error(
                f"GSAS-II is not installed for {sys.executable}. {HOW_TO_INSTALL}"
            ) from error
        raise _broken(error) from error
    except (Exception, SystemExit) as error:
        raise _broken(error) from error
    try:
        problem, _ = g2.groups.SpcGroup("P -1")  # compiled
        if problem:
            raise RuntimeError(f"it does not know the space group P -1 ({problem})")  # noqa: TRY301
        _make_quiet_and_single(g2)
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


def _make_quiet_and_single(g2: SimpleNamespace) -> None:
    # Whatever the user has set for GSAS-II's windows: one process is one thread here.
    g2.path.AddConfigValue({"Multiprocessing_cores": 0, "debug": False, "Show_timing": False})
    g2.processes.ResetMP()
    g2.sc.SetPrintLevel("none")


def _broken(error: BaseException) -> Gsas2Error:
    package: ModuleType | None = sys.modules.get("GSASII")
    where = getattr(package, "__file__", None) or sys.executable
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return Gsas2Error(f"The GSAS-II at {where} is broken ({reason}). {HOW_TO_INSTALL}")
