"""A campaign of a few dozen short patterns, for tests."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from bragg_data.campaign import BUILT_IN, Campaign, Samples, load_campaign
from bragg_data.simulation.kinematic import Simulator

TOML = """
name = "tiny"
description = "a few cells of barium titanate"
seed = {seed}

[instrument]
file = "{built_in}/nomad_bank4.instprm"

[tof]
start = 11000.0
relative_step = 0.0009381
points = 256

[rows_per_chunk]
kinematic = {rows}

[[phases]]
name = "cubic"
cif = "{built_in}/batio3_cubic.cif"
[phases.cell]
a = {{ first = 3.95, last = 4.05, step = 0.005 }}

[[phases]]
name = "tetragonal"
cif = "{built_in}/batio3_tetragonal.cif"
exclude = ["a = c"]
[phases.cell]
a = {{ first = 3.98, last = {last}, step = 0.005 }}
c = {{ first = 4.03, last = 4.05, step = 0.005 }}

[[phases]]
name = "trigonal"
cif = "{built_in}/batio3_trigonal.cif"
[phases.cell]
a = {{ first = 4.0, last = 4.01, step = 0.005 }}
alpha = {{ first = 89.0, last = 89.6, step = 0.1 }}
"""


def write_campaign(directory: Path, *, rows: int = 8, last: float = 4.0, seed: int = 1) -> Path:
    """Write the campaign's file: 21 cubic, 25 (or more) tetragonal and 21 trigonal cells."""
    path = directory / "tiny.toml"
    path.write_text(TOML.format(built_in=BUILT_IN, rows=rows, last=last, seed=seed))
    return path


def tiny_campaign(directory: Path, *, rows: int = 8, last: float = 4.0, seed: int = 1) -> Campaign:
    return load_campaign(write_campaign(directory, rows=rows, last=last, seed=seed))


@cache
def _simulator() -> Simulator:
    with tempfile.TemporaryDirectory() as directory:
        c = tiny_campaign(Path(directory))
        return Simulator(c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain)


def tiny_patterns(samples: Samples) -> np.ndarray:
    """The patterns of some cells, shape (n, 256): a tag is refused to any others."""
    # One by one, so that the last bit does not depend on what else is requested with it.
    rows = range(len(samples))
    simulate = _simulator().simulate
    return np.concatenate([simulate(samples.phase[[r]], samples.cells[[r]]) for r in rows])
