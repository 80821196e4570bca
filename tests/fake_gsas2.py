"""Replacements of GSAS-II in its process, for tests without it; they fail on certain cells."""

import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bragg_data.instrument.diffractometer import TofGrid

SLOW, CRASHING, CRASHING_ONCE, FAILING = 4.01, 4.02, 4.03, 4.04
"""Lattice parameter a, in ångström, of cells that take for ever, end the process (always, or the
first time), or raise an error; the pattern of any other cell is flat, of height a."""


class FakeGsas2:
    """The interface of bragg_data.simulation.gsas2_process.Gsas2Worker."""

    def __init__(self, location, _phases=(), _instrument=None, tof=None):
        self.marker = Path(location or ".") / "crashed"
        self.tof = tof

    def version(self) -> str:
        return "1, fake"

    def prepare(self, code: int) -> None:
        pass

    def memory(self, _code: int, cell: list[float], _sample: dict[str, float]) -> NDArray:
        print("noise", flush=True)
        Path("rubbish.gpx").write_text("rubbish")
        if cell[0] == SLOW:
            time.sleep(600)
        if cell[0] == CRASHING or (cell[0] == CRASHING_ONCE and not self.marker.exists()):
            self.marker.touch()
            os.abort()
        if cell[0] == FAILING:
            raise ValueError("no reflections\nin range")
        return np.full(len(self.tof), cell[0])

    def scripting(self, code: int, cell: list[float], sample: dict[str, float]) -> NDArray:
        return 1.001 * self.memory(code, cell, sample)


class RecordingGsas2(FakeGsas2):
    """Patterns of the fast simulator, one at a time; the file ``calls`` gets a line for each.

    They fail while there is a file ``failing`` next to it that holds the cell's a.
    """

    def __init__(self, location, phases=(), instrument=None, tof=None):
        super().__init__(location, phases, instrument, tof)
        self.place = Path(location)
        if tof is not None:
            # Slow to import, and not needed for the version.
            from bragg_data.simulation import kinematic

            grid = TofGrid(tof[0], tof[1] / tof[0] - 1, len(tof))
            self.simulator = kinematic.Simulator(phases, instrument, grid, 1.0, 1000.0)

    def memory(self, code: int, cell: list[float], sample: dict[str, float]) -> NDArray:
        failing = self.place / "failing"
        if failing.exists() and float(failing.read_text()) == cell[0]:
            raise ValueError("no reflections in range")
        with (self.place / "calls").open("a") as calls:
            calls.write(f"{code} {cell}\n")
        return self.scripting(code, cell, sample)

    def scripting(self, code: int, cell: list[float], _sample: dict[str, float]) -> NDArray:
        return self.simulator.simulate(np.array([code]), np.array([cell]))[0]


class DyingGsas2:
    """Ends its process before it is ready, as without enough memory."""

    def __init__(self, *_: object) -> None:
        os._exit(9)
