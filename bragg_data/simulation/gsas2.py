"""GSAS-II as a simulator, always in a process of its own.

GSAS-II (Toby & Von Dreele, J. Appl. Cryst. 46 (2013) 544) is unsafe with threads, prints, writes
files into its directory and keeps global state: see :mod:`bragg_data.isolated_process`.
Its reading of a campaign is compared before anything is computed.
"""

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np

from bragg_data.arrays import Array, Floats32, Integers
from bragg_data.crystallography.structure import Phase
from bragg_data.defaults import PATTERN_SECONDS
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.isolated_process import (
    IsolatedProcess,
    IsolatedProcessError,
    IsolatedProcessTimeoutError,
)
from bragg_data.simulation.gsas2_process import HOW_TO_INSTALL
from bragg_data.simulation.gsas2_process import Gsas2Error as Gsas2Error
from bragg_data.simulation.sample_parameters import (
    SampleParameters,
    checked_samples,
    nominal_sample,
)

CallPath = Literal["memory", "scripting"]
"""How GSAS-II is called: its functions in memory, or its documented scripting interface."""

AGREEMENT = 1e-5  # largest difference of the two call paths, relative to a pattern's maximum
_SECONDS = 300.0  # time limit for everything but patterns
_TARGET = "bragg_data.simulation.gsas2_process:Gsas2Worker"


class Gsas2Options(NamedTuple):
    """Where GSAS-II is and how it is called."""

    location: str | None = None  # of the package GSASII, where it cannot be imported otherwise
    pattern_seconds: float = PATTERN_SECONDS  # time limit for one pattern
    call_path: CallPath = "memory"


class PatternsError(RuntimeError):
    """Patterns on which GSAS-II failed: the reason for each, by the number of the sample.

    ``final``: it would fail again, as it refused or took too long, but did not crash.
    """

    def __init__(self, reasons: Mapping[int, str], final: bool = True) -> None:
        super().__init__(reasons, final)
        self.reasons, self.final = dict(reasons), final

    def __str__(self) -> str:
        number, reason = min(self.reasons.items())
        return f"{len(self.reasons)} patterns failed; the first, number {number}: {reason}"


class PathCheck(NamedTuple):
    """The two call paths of GSAS-II, compared on one pattern."""

    difference: float  # largest, over the maximum; infinite where the path in memory fails
    memory_seconds: float
    scripting_seconds: float
    problem: str  # why the path in memory fails, or empty

    @property
    def call_path(self) -> CallPath:
        """The faster path, if both agree."""
        return "memory" if self.difference <= AGREEMENT else "scripting"


class Simulator:
    """GSAS-II with the signature of :class:`bragg_data.simulation.kinematic.Simulator`.

    Size in µm and microstrain in 1e-6 are the nominal broadening.

    GSAS-II's defaults that are changed: the 2,806 centres of its bins become the points of the
    grid; its lower limit, d = 0.4 Å, the first point; its background of 1.0 zero; ``ycalc`` is
    returned, since ``yobs`` carries noise. Its default scale, 1e5, stays.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        instrument: Instrument,
        grid: TofGrid,
        size: float,
        microstrain: float,
        options: Gsas2Options | None = None,
    ) -> None:
        self.phases, self.instrument, self.grid = tuple(phases), instrument, grid
        self.options = options or Gsas2Options()
        self._location = _absolute(self.options.location)
        self._nominal = nominal_sample(instrument, size, microstrain)
        self._process: IsolatedProcess | None = None
        self._lock = threading.RLock()  # GSAS-II is one process, however many threads call it

    @property
    def version(self) -> str:
        """Version of GSAS-II, and of the way in which it is called; Gsas2Error if there is none."""
        with _remedy(self._location):
            return str(self._call("version", seconds=_SECONDS))

    def prepare(self, phase: int) -> None:
        """Start GSAS-II and set up a phase's project, which the first pattern does otherwise.

        Raises a Gsas2Error if there is no GSAS-II that works, or it does not understand the phase.
        """
        try:
            with _remedy(self._location):
                self._call("prepare", phase, seconds=_SECONDS)
        except Gsas2Error:
            raise
        except Exception as error:
            raise Gsas2Error(
                f"GSAS-II does not take phase '{self.phases[phase].name}' ({_message_of(error)}). "
                f"Look at its CIF and the instrument file, or use --simulator kinematic."
            ) from error

    def simulate(
        self, phase: Integers, cells: Array, **parameters: Unpack[SampleParameters]
    ) -> Floats32:
        """Return the patterns of samples, and raise errors, as the fast simulator does.

        Raises a PatternsError if GSAS-II fails on patterns, or takes too long; all others were
        computed before. A Gsas2Error if no GSAS-II works, or it does not understand a phase.
        """
        samples = checked_samples(self.phases, phase, cells, parameters, self._nominal)
        codes, cells, per_sample = samples
        patterns = np.full((len(cells), self.grid.points), np.nan, dtype=np.float32)
        reasons, final = {}, True
        for row, (code, cell) in enumerate(zip(codes.tolist(), cells, strict=True)):
            sample = {name: float(values[row]) for name, values in per_sample.items()}
            try:
                patterns[row] = self._pattern(self.options.call_path, code, cell, sample)
            except Gsas2Error:
                raise
            except Exception as error:
                reasons[row] = _message_of(error)
                final &= isinstance(error, IsolatedProcessTimeoutError) or not isinstance(
                    error, IsolatedProcessError
                )
        if reasons:
            raise PatternsError(reasons, final)
        return patterns

    def check(self, phase: int, cell: Array) -> PathCheck:
        """Compare the two call paths of GSAS-II on one cell, shape (6,), of a phase.

        Raises a Gsas2Error if there is no GSAS-II that works, or it does not understand the phase,
        or the documented path fails.
        """
        sample = self._nominal
        self.prepare(phase)
        began = time.monotonic()
        try:
            documented = self._pattern("scripting", phase, cell, sample)
        except Exception as error:
            name = self.phases[phase].name
            raise Gsas2Error(f"GSAS-II fails on phase '{name}': {_message_of(error)}.") from error
        between = time.monotonic()
        problem, difference = "", np.inf
        try:
            pattern = self._pattern("memory", phase, cell, sample)
            difference = float(np.abs(pattern - documented).max() / np.abs(documented).max())
        except Exception as error:
            problem = _message_of(error)
        if not np.isfinite(difference):
            difference, problem = np.inf, problem or "values that are not finite"
        return PathCheck(difference, time.monotonic() - between, between - began, problem)

    def close(self) -> None:
        """End GSAS-II's process and remove its directory, which also happens at exit."""
        if self._process:
            self._process.close()
        self._process = None

    def _pattern(
        self, call_path: CallPath, code: int, cell: Array, sample: dict[str, float]
    ) -> Array:
        arguments, seconds = (call_path, code, cell.tolist(), sample), self.options.pattern_seconds
        try:
            return np.asarray(self._call(*arguments, seconds=seconds))
        except IsolatedProcessTimeoutError:
            raise
        except IsolatedProcessError:  # a crash costs a second try
            return np.asarray(self._call(*arguments, seconds=seconds))

    def _call(self, method: str, *arguments: Any, seconds: float) -> Any:
        with self._lock:
            if self._process is None or not self._process.alive:
                campaign = self.phases, self.instrument, self.grid.tof
                self._process = IsolatedProcess(_TARGET, self._location, *campaign, name="gsas2")
            return self._process.call(method, *arguments, seconds=seconds)


def installed_version(location: str | None = None) -> str:
    """Return the version of the GSAS-II that this Python imports, after a test that it works.

    Raises a Gsas2Error if there is none, or it does not work.
    """
    location = _absolute(location)
    with _remedy(location), closing(IsolatedProcess(_TARGET, location, name="gsas2")) as process:
        return str(process.call("version", seconds=_SECONDS))


def _absolute(location: str | None) -> str | None:
    """Return a path that means the same in GSAS-II's process."""
    return str(Path(location).expanduser().absolute()) if location else None


def _message_of(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    # The text of a KeyError is the key alone.
    complete = isinstance(error, (IsolatedProcessError, RuntimeError, ValueError)) and text
    return text if complete else f"{type(error).__name__}: {text}"


@contextmanager
def _remedy(location: str | None) -> Iterator[None]:
    """Say how to install GSAS-II where its process fails."""
    try:
        yield
    except IsolatedProcessError as error:
        where = location or sys.executable
        raise Gsas2Error(f"GSAS-II of {where} does not run: {error}. {HOW_TO_INSTALL}") from error
