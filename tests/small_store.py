"""A small data set in a real store, made by the real simulator: shared by several test modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr
from typer.testing import CliRunner

from bragg_data.campaign import BUILT_IN, Campaign, load_campaign
from bragg_data.simulation import kinematic
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store.repository import Store
from bragg_data.store.simulated import Writer, write_block
from catalog.tracking import Tracking

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


@pytest.fixture(scope="session")
def campaign_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("campaign")
    for file in BUILT_IN.iterdir():
        if file.suffix in {".cif", ".instprm"}:
            shutil.copy(file, directory)
    path = directory / "small.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_campaign(campaign_file: Path) -> Campaign:
    return load_campaign(campaign_file)


@pytest.fixture(scope="session")
def simulate_into() -> Callable[[Store, Campaign, str], None]:
    """Simulate a campaign into a store and tag it, in this process."""

    def simulate(store: Store, c: Campaign, tag: str) -> None:
        simulator = Simulator(
            c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain
        )
        with Writer(store, c, "kinematic", kinematic.VERSION) as writer:
            results = []
            for block in writer.missing():
                samples = writer.samples[writer.rows(block)]
                intensity = simulator.simulate(samples.phase, samples.cells)
                results.append(write_block(writer.fork(), writer.group, block, samples, intensity))
            writer.commit(results)
            writer.finish(tag)

    return simulate


@pytest.fixture(scope="session")
def small_store(
    small_campaign: Campaign,
    simulate_into: Callable[[Store, Campaign, str], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Store:
    store = Store(tmp_path_factory.mktemp("small") / "store", create=True)
    simulate_into(store, small_campaign, TAG)
    return store


@pytest.fixture(scope="session")
def small_dataset(small_store: Store) -> xr.Dataset:
    return small_store.open(TAG)


@pytest.fixture(scope="session")
def tracking_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Tracking]:
    """Make an MLflow database in a directory, as a copy: making a new one takes seconds."""
    empty = tmp_path_factory.mktemp("database") / "mlflow.db"
    Tracking(f"sqlite:///{empty}")

    def copied(directory: Path) -> Tracking:
        shutil.copy(empty, directory / "mlflow.db")
        return Tracking(f"sqlite:///{directory}/mlflow.db")

    return copied


@pytest.fixture(scope="session")
def trained(
    small_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    tracking_in: Callable[[Path], Tracking],
) -> Tracking:
    """Where one model is registered that has learnt a little: a multitask network, one epoch."""
    from pipelines import train  # takes seconds, and few need it

    place = tracking_in(tmp_path_factory.mktemp("trained"))
    arguments = ["--store", small_store.uri, "--tracking", place.uri, "--epochs", "1"]
    result = CliRunner().invoke(train.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return place
