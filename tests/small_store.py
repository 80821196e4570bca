"""A small data set in a real store, computed by the real simulator: see conftest.py."""

import shutil
from pathlib import Path

from bragg_data.campaign import BUILT_IN, Campaign
from bragg_data.simulation import kinematic
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store.repository import Store
from bragg_data.store.simulated import Writer, write_block

TAG = "small-v1"

# Three phases on a short, coarse grid; crystallites so small that the peaks are wide on it.
TOML = """
name = "small"
seed = 7
[instrument]
file = "nomad_bank4.instprm"
bank = 4
[tof]
start = 6000.0
relative_step = 0.0012
points = 800
[broadening]
size = 1.0
microstrain = 5000.0
[rows_per_chunk]
kinematic = 64
[[phases]]
name = "cubic"
cif = "batio3_cubic.cif"
[phases.cell]
a = { first = 3.90, last = 4.10, step = 0.002 }
[[phases]]
name = "tetragonal"
cif = "batio3_tetragonal.cif"
exclude = ["a = c"]
[phases.cell]
a = { first = 3.90, last = 4.10, step = 0.01 }
c = { first = 3.90, last = 4.10, step = 0.01 }
[[phases]]
name = "trigonal"
cif = "batio3_trigonal.cif"
[phases.cell]
a = { first = 3.90, last = 4.10, step = 0.01 }
alpha = { first = 80.0, last = 88.0, step = 1.0 }
"""


def write_campaign(directory: Path) -> None:
    """Write the campaign's file, small.toml, with the files that it names."""
    for file in BUILT_IN.iterdir():
        if file.suffix in {".cif", ".instprm"}:
            shutil.copy(file, directory)
    (directory / "small.toml").write_text(TOML, encoding="utf-8")


def simulate(store: Store, campaign: Campaign, tag: str) -> None:
    """Simulate a campaign into a store and tag it, in this process."""
    simulator = Simulator(*campaign.setup)
    with Writer(store, campaign, "kinematic", kinematic.VERSION) as writer:
        results = []
        for block in writer.missing():
            samples = writer.samples[writer.rows(block)]
            intensity = simulator.simulate(samples.phase, samples.cells)
            results.append(write_block(writer.fork(), writer.group, block, samples, intensity))
        writer.commit(results)
        writer.finish(tag)
