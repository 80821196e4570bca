"""The simulators behind one signature, and what a worker does with them.

A simulator is a module with a ``VERSION`` and a class ``Simulator``, made by
``Simulator(phases, instrument, grid, size=…, microstrain=…)``, that has the method of
:class:`Simulator` below. To add one, add its module to the table.
"""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple, Protocol, cast

import numpy as np
from icechunk.session import ForkSession
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from bragg_data import schema
from bragg_data.campaign import Campaign, Samples
from bragg_data.store import DiskFullError
from bragg_data.writer import BlockResult, write_block

_MODULES = {"kinematic": "bragg_data.kinematic", "gsas2": "bragg_data.gsas2"}


class SimulationError(RuntimeError):
    """A simulation that cannot run, or that did not complete."""


class Simulator(Protocol):
    """What computes patterns."""

    def simulate(self, phase: NDArray[np.int8], cells: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the patterns, shape (n, points), of phases (n,) in cells (n, 6)."""
        ...


class Recipe(NamedTuple):
    """All that it takes to build a simulator somewhere else."""

    simulator: str
    version: str
    toml: str
    cifs: tuple[tuple[str, str], ...]
    instprm: str


def choose_simulator(name: str) -> str:
    """Return the simulator that a name means here: auto is kinematic.

    Raises
    ------
    SimulationError
        If there is no such simulator, or it is not installed.
    """
    chosen = "kinematic" if name == "auto" else name
    _module(chosen)
    return chosen


def _module(name: str) -> ModuleType:
    if name not in _MODULES:
        raise SimulationError(
            f"There is no simulator '{name}'. Choose auto, {' or '.join(_MODULES)}."
        )
    try:
        return importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        raise SimulationError(
            f"The simulator {name} is not available in this installation. Use --simulator "
            f"kinematic, the fast one, which is."
        ) from error


def recipe_of(campaign: Campaign, simulator: str) -> Recipe:
    """Return the recipe of a campaign's simulator in the version that is installed here."""
    texts = campaign.toml, tuple(campaign.cifs.items()), campaign.instprm
    return Recipe(simulator, _module(simulator).VERSION, *texts)


@lru_cache(maxsize=4)  # a running cluster may serve several campaigns
def build_simulator(recipe: Recipe) -> Simulator:
    """Build a simulator, once per process.

    Raises
    ------
    SimulationError
        If this process has another version of it than the recipe wants.
    """
    module = _module(recipe.simulator)
    if recipe.version != module.VERSION:
        raise SimulationError(
            f"A worker has version {module.VERSION} of the simulator {recipe.simulator}, but this "
            f"campaign runs with {recipe.version}. Give the workers the installation of the driver."
        )
    campaign = Campaign(recipe.toml, dict(recipe.cifs), recipe.instprm)
    simulator = module.Simulator(
        campaign.phases,
        campaign.instrument,
        campaign.grid,
        size=campaign.size,
        microstrain=campaign.microstrain,
    )
    return cast("Simulator", simulator)


def simulate_samples(recipe: Recipe, samples: Samples) -> NDArray[np.float32]:
    """Return the patterns of samples, shape (n, points).

    One thread, wherever it runs: the order of the sums, and so the last bit, is always the same.
    """
    simulator = build_simulator(recipe)
    with _threads().limit(limits=1):
        return simulator.simulate(samples.phase, samples.cells)


@lru_cache(maxsize=1)
def _threads() -> ThreadpoolController:
    return ThreadpoolController()  # looking for the libraries takes as long as 30 patterns


def simulate_block(
    recipe: Recipe, group: str, block: int, samples: Samples, fork: ForkSession
) -> BlockResult | DiskFullError | SimulationError:
    """Simulate one block and write it: the task of a worker.

    Returns
    -------
    What became of the block; or the error, if all other blocks would meet it as well. It is not
    raised, because Dask's workers write what is raised in them to the terminal.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the driver has shown them
            intensity = simulate_samples(recipe, samples)
        return write_block(fork, group, block, samples, intensity)
    except (DiskFullError, SimulationError) as error:
        return error
    except Exception as error:
        return failed_block(block, len(samples), error)


def failed_block(block: int, count: int, error: Exception) -> BlockResult:
    """Return the result of a block of some samples that an error stopped."""
    reason = next(iter(str(error).strip().splitlines()), "no reason given")
    status = np.full(count, schema.FAILED, np.int8)
    return BlockResult(block, status, reason=f"{type(error).__name__}: {reason}")
