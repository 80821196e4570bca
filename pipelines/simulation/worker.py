"""The simulators behind one signature, and the task of a worker that runs them.

``kinematic`` is the fast simulator, ``gsas2`` GSAS-II itself. ``auto`` is resolved in
:mod:`pipelines.simulation.simulator_choice`.
"""

import warnings
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from icechunk.session import ForkSession
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from bragg_data.campaign import Campaign, Samples
from bragg_data.simulation import gsas2, kinematic
from bragg_data.simulation.gsas2 import Gsas2Options
from bragg_data.simulation.isolated_process import IsolatedProcessError
from bragg_data.store import schema
from bragg_data.store.block_writer import BlockResult, failed_block
from bragg_data.store.repository import DiskFullError
from bragg_data.store.simulated import write_block


class SimulationError(RuntimeError):
    """A simulation that cannot run, or that did not complete."""


class Recipe(NamedTuple):
    """Everything needed to build a simulator in another process."""

    simulator: str
    version: str
    toml: str
    cifs: tuple[tuple[str, str], ...]
    instprm: str
    gsas2: Gsas2Options = Gsas2Options()

    @property
    def campaign(self) -> Campaign:
        """The campaign, read from its texts."""
        return Campaign(self.toml, dict(self.cifs), self.instprm)


def recipe_of(
    campaign: Campaign,
    simulator: str = "kinematic",
    version: str = kinematic.VERSION,
    options: Gsas2Options | None = None,
) -> Recipe:
    """Return the recipe of a campaign's simulator, by default of the fast one."""
    texts = campaign.toml, tuple(campaign.cifs.items()), campaign.instprm
    return Recipe(simulator, version, *texts, options or Gsas2Options())


@lru_cache(maxsize=4)  # a running cluster may serve several campaigns
def build_simulator(recipe: Recipe) -> kinematic.Simulator | gsas2.Simulator:
    """Build a simulator, once per process.

    Raises `SimulationError` if this process has another version of it than the recipe's, and
    `Gsas2Error` if the recipe's simulator is GSAS-II, and there is none that works.
    """
    campaign = recipe.campaign
    setup = campaign.phases, campaign.instrument, campaign.grid
    size, microstrain = campaign.size, campaign.microstrain
    simulator: kinematic.Simulator | gsas2.Simulator
    if recipe.simulator == "gsas2":
        options = recipe.gsas2
        simulator = gsas2.Simulator(*setup, size=size, microstrain=microstrain, options=options)
        version = simulator.version
    else:
        simulator = kinematic.Simulator(*setup, size=size, microstrain=microstrain)
        version = kinematic.VERSION
    if recipe.version != version:
        raise SimulationError(
            f"A worker has version {version} of the simulator {recipe.simulator}, but this "
            f"campaign runs with {recipe.version}. Give the workers the installation of the driver."
        )
    return simulator


def simulate_samples(recipe: Recipe, samples: Samples) -> NDArray[np.float32]:
    """Return the patterns of samples, shape (n, points).

    One thread, wherever it runs: the order of the sums, and so the last bit, is always the same.
    """
    simulator = build_simulator(recipe)
    with _threads().limit(limits=1):
        return simulator.simulate(samples.phase, samples.cells)


# Looking for the libraries takes as long as 30 patterns.
_threads = lru_cache(maxsize=1)(ThreadpoolController)


def simulate_block(
    recipe: Recipe, group: str, block: int, samples: Samples, fork: ForkSession
) -> BlockResult | DiskFullError | SimulationError:
    """Simulate one block and write it: the task of a worker.

    An error that every other block would fail with as well is returned, not raised, because Dask's
    workers print exceptions to the terminal.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the driver has shown them
            intensity = simulate_samples(recipe, samples)
        return write_block(fork, group, block, samples, intensity)
    except (DiskFullError, SimulationError) as error:
        return error
    except gsas2.Gsas2Error as error:
        if isinstance(error.__cause__, IsolatedProcessError):  # it died; other workers need not
            return failed_block(block, len(samples), error)
        return SimulationError(str(error))
    except gsas2.PatternsError as error:
        status = np.full(len(samples), schema.PENDING, np.int8)
        status[list(error.reasons)] = schema.FAILED
        reasons = (
            f"cell ({', '.join(f'{value:g}' for value in samples.cells[row])}): {reason}"
            for row, reason in error.reasons.items()
        )
        return BlockResult(block, status, reason="; ".join(reasons), final=error.final)
    except Exception as error:
        return failed_block(block, len(samples), error)
