"""What stands in GSAS-II's process for tests of everything around it: it fails on certain cells."""

import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SLOW, CRASHING, CRASHING_ONCE, FAILING = 4.01, 4.02, 4.03, 4.04
"""The a, in ångström, of cells that take for ever, end the process (each time, or the first), or
raise an error; all others give a flat pattern of height a."""


class Stubborn:
    """The methods of bragg_data.simulation.gsas2_process.Gsas2Worker."""

    def __init__(self, location, _phases=(), _instrument=None, tof=None):
        self.marker = Path(location or ".") / "crashed"
        self.tof = tof

    def version(self) -> str:
        return "1, nobody"

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


class Dying:
    """What ends before it is ready, as a process that gets no memory does."""

    def __init__(self, *_: object) -> None:
        os._exit(9)
