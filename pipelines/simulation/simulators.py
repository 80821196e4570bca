"""The simulators behind one signature, the task of a worker that runs them, and their choice.

``kinematic`` is the fast simulator, ``gsas2`` GSAS-II itself. ``auto`` is whichever the workers can
import, or the one with which a campaign was begun.
"""

import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import typer
from distributed import Client, as_completed
from icechunk.session import ForkSession
from rich.markup import escape

from bragg_data.arrays import Array, Floats32, Integers, Mask
from bragg_data.campaign import Campaign, Samples
from bragg_data.isolated_process import IsolatedProcessError
from bragg_data.simulation import gsas2, kinematic
from bragg_data.simulation.gsas2 import Gsas2Options
from bragg_data.store import schema
from bragg_data.store.block_writer import BlockResult, failed_block
from bragg_data.store.repository import DataSet, DiskFullError
from bragg_data.store.reuse import Reuse
from bragg_data.store.simulated import write_block
from pipelines.cli.console import Progress, duration, say
from pipelines.cluster.blocks import ends_process_after

_ASK_ABOVE_CORE_HOURS = 1.0  # longer campaigns are begun after a question, or with --yes
# For a block of the fast simulator, which takes 0.1 s with everything compiled, and for each of its
# patterns, of 0.1 ms.
_BLOCK_SECONDS, _PATTERN_SECONDS = 300.0, 0.1
_TIMED_SAMPLES = 256  # of the fast simulator, in which one pattern alone says nothing


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


def simulate_samples(recipe: Recipe, samples: Samples) -> Floats32:
    """Return the patterns of samples, shape (n, points)."""
    return build_simulator(recipe).simulate(samples.phase, samples.cells)


def simulate_block(
    recipe: Recipe,
    group: str,
    block: int,
    samples: Samples,
    fork: ForkSession,
    reuse: Reuse | None = None,
) -> BlockResult | DiskFullError | SimulationError:
    """Simulate one block and write it: the task of a worker.

    Patterns that ``reuse`` finds in other data sets are copied; where that fails, the block is
    simulated as a whole. An error that every other block would fail with as well is returned, not
    raised, because Dask's workers print exceptions to the terminal.
    """
    new, copies = np.ones(len(samples), np.bool_), np.empty((0, 0), np.float32)
    if reuse is not None:
        with suppress(Exception):
            copies = reuse.read()
            new = reuse.new
    # GSAS-II's patterns have a limit each, in a process of their own.
    fast = recipe.simulator == "kinematic"
    limit = _BLOCK_SECONDS + _PATTERN_SECONDS * len(samples) if fast else None
    try:
        with warnings.catch_warnings(), ends_process_after(limit):
            warnings.simplefilter("ignore")  # the driver has shown them
            intensity = _complete(recipe, samples, new, copies)
            result = write_block(fork, group, block, samples, intensity)
        return replace(result, copied=reuse.copied) if reuse and len(copies) else result
    except (DiskFullError, SimulationError) as error:
        return error
    except gsas2.Gsas2Error as error:
        if isinstance(error.__cause__, IsolatedProcessError):  # it died; other workers need not
            return failed_block(block, len(samples), error)
        return SimulationError(str(error))
    except gsas2.PatternsError as error:
        status = np.full(len(samples), schema.PENDING, np.int8)
        rows = np.flatnonzero(new)
        failed = {int(rows[row]): reason for row, reason in error.reasons.items()}
        status[list(failed)] = schema.FAILED
        reasons = (
            f"cell ({', '.join(f'{value:g}' for value in samples.cells[row])}): {reason}"
            for row, reason in failed.items()
        )
        return BlockResult(block, status, reason="; ".join(reasons), final=error.final)
    except Exception as error:
        return failed_block(block, len(samples), error)


def _complete(recipe: Recipe, samples: Samples, new: Mask, copies: Floats32) -> Floats32:
    """Return the patterns of all samples: copies, (m, points), and simulated ones where new."""
    if not len(copies):
        return simulate_samples(recipe, samples)
    intensity = np.empty((len(new), copies.shape[1]), np.float32)
    intensity[~new] = copies
    if new.any():
        intensity[new] = simulate_samples(recipe, samples[np.flatnonzero(new)])
    return intensity


# ---- the choice ---------------------------------------------------------------------------------


class Probe(NamedTuple):
    """GSAS-II as one Python can import it: its version, or the reason why there is none."""

    host: str
    version: str
    reason: str


def simulator_of_data_sets(existing: Sequence[DataSet], simulator: str) -> str:
    """Return the simulator that ``auto`` means for a campaign's data sets, or the named one.

    Raises `SimulationError` if an unfinished data set is by another simulator: two never mix.
    """
    if simulator == "auto" and existing:
        begun = min(existing, key=lambda s: (s.tag is not None, s.simulator)).simulator
        say(f"Simulator auto is {begun}, with which this campaign was begun")
        return begun
    if any(s.tag and s.simulator == simulator for s in existing):
        return simulator  # its data set is finished
    for data_set in existing:
        if data_set.tag is None and simulator not in ("auto", data_set.simulator):
            raise SimulationError(
                f"{_begun(data_set)}; {simulator} cannot resume it, because two simulators never "
                f"mix under one tag. Use --simulator {data_set.simulator}, or another --store."
            )
    return simulator


def check_resume(existing: Sequence[DataSet], recipe: Recipe) -> None:
    """Raise a SimulationError if another version of GSAS-II began an unfinished data set."""
    for data_set in existing:
        same = data_set.simulator == recipe.simulator != "kinematic"
        if data_set.tag is None and same and data_set.version != recipe.version:
            raise SimulationError(
                f"{_begun(data_set)}; the workers have {recipe.version}, whose patterns would mix "
                f"with those. Give the workers the version that began it, or name another --store."
            )


def _begun(data_set: DataSet) -> str:
    return (
        f"This campaign was begun with the simulator {data_set.simulator} ({data_set.version}), "
        f"which has done {data_set.done:,} of {data_set.total:,} patterns"
    )


def gsas2_options(path: Path | None, pattern_seconds: float) -> Gsas2Options:
    """Return where GSAS-II is and how many seconds a pattern may take, from 1 s to a day."""
    if not 1 <= pattern_seconds <= 86_400:
        raise SimulationError(f"--pattern-limit {pattern_seconds:g} is not between 1 and 86,400 s.")
    location = str(path.expanduser().absolute()) if path else None
    return Gsas2Options(location, pattern_seconds)


def choose(
    simulator: str,
    campaign: Campaign,
    samples: Samples,
    options: Gsas2Options,
    client: Client | None = None,
    new_samples: Callable[[Recipe], Mask] | None = None,
) -> tuple[Recipe, Array]:
    """Choose the simulator of some samples and the way to call it.

    Returned are its recipe, and how many seconds a pattern of each phase takes on one core.

    For ``auto`` (``kinematic`` needs no choice), GSAS-II is chosen if every worker can import it.
    Then one cell of each phase is simulated in both ways to call it: the faster way is used if they
    agree. Phases without ``new_samples`` of a recipe, (n,), were checked when theirs were
    simulated. Without a client, this process simulates. Raises `SimulationError` for ``gsas2``, if
    a worker has no GSAS-II, or the workers have different versions, and `Gsas2Error` if GSAS-II
    does not understand a phase.
    """
    probes = _probes(client, options.location)
    lacking = [answer for answer in probes if answer.reason]
    if simulator == "gsas2" and lacking:
        where = f"On worker {lacking[0].host}: " if client else ""
        raise SimulationError(f"{where}{lacking[0].reason}")
    if not lacking:
        if simulator == "auto":
            count = f"every worker ({len(probes)})" if client else "this Python"
            say(f"Simulator auto is gsas2: {count} can import GSAS-II")
        recipe = recipe_of(campaign, "gsas2", common_version(probes), options)
        new = np.arange(len(samples))
        if new_samples is not None:
            new = np.flatnonzero(new_samples(recipe))
            if not len(new):
                return recipe, np.zeros(len(campaign.phases))
        checked = _choose_call_path(recipe, samples[new], client)
        if len(new) == len(samples) or checked[0] == recipe:
            return checked
        return _choose_call_path(recipe, samples, client)
    reason, host = lacking[0].reason.partition(". ")[0], lacking[0].host
    say(f"Simulator auto is kinematic, the fast one, because on {host} {escape(reason)}")
    recipe = recipe_of(campaign)
    return recipe, np.full(len(campaign.phases), seconds_per_pattern(recipe, samples))


def seconds_per_pattern(recipe: Recipe, samples: Samples) -> float:
    """Return how many seconds a pattern of the fast simulator takes, from some of the samples."""
    few = samples[:_TIMED_SAMPLES]
    simulate_samples(recipe, few)  # compiles, and computes its tables
    began = time.monotonic()
    simulate_samples(recipe, few)
    return (time.monotonic() - began) / len(few)


def _choose_call_path(
    recipe: Recipe, samples: Samples, client: Client | None
) -> tuple[Recipe, Array]:
    codes, first = np.unique(samples.phase, return_index=True)
    cells = zip(codes.tolist(), samples.cells[first], strict=True)
    tasks = [(recipe, code, cell) for code, cell in cells]
    checks: dict[int, gsas2.PathCheck] = {}
    with Progress("Checking GSAS-II on one cell of each phase", len(tasks), "phases") as progress:
        if client is None:
            results = (check_call_paths(*task) for task in tasks)
        else:
            futures = [client.submit(check_call_paths, *task, pure=False) for task in tasks]
            results = (future.result() for future in as_completed(futures))
        for code, check in results:
            if isinstance(check, Exception):
                raise check
            checks[code] = check
            progress.advance()
    paths = {check.call_path for check in checks.values()}
    call_path: gsas2.CallPath = "memory" if paths == {"memory"} else "scripting"
    worst = max(checks.values(), key=lambda check: check.difference)
    if call_path == "scripting":
        problem = worst.problem or f"differs by {worst.difference:.1e} of the maximum"
        warnings.warn(
            f"GSAS-II called in memory is not this version's scripting interface ({problem}). The "
            f"scripting interface is used, which takes about twice as long.",
            stacklevel=2,
        )
    else:
        say(f"Called in memory, it agrees with its scripting interface to {worst.difference:.0e}")
    seconds = np.zeros(int(codes.max()) + 1)
    for code, check in checks.items():
        seconds[code] = getattr(check, f"{call_path}_seconds")
    return recipe._replace(gsas2=recipe.gsas2._replace(call_path=call_path)), seconds


def estimate(seconds: Array, phase: Integers) -> float:
    """Print how long patterns take on one core, and return that in hours.

    Of the seconds that one takes of each phase, (n_phases,), and their phase codes, (n,).
    """
    total = float(seconds[phase].sum())
    core_hours = total / 3600
    hours = f"{core_hours:,.1f}" if core_hours >= 0.1 else f"{core_hours:.1g}"
    say(
        f"Estimate: {hours} core-hours for {len(phase):,} patterns ({duration(total)} on one "
        f"core), from a timed sample"
    )
    return core_hours


def confirm(core_hours: float, *, yes: bool) -> None:
    """Ask before a long campaign begins; raise a SimulationError without a yes or a terminal."""
    if yes or core_hours <= _ASK_ABOVE_CORE_HOURS:
        return
    if not sys.stdin.isatty():
        raise SimulationError(
            f"This takes more than {_ASK_ABOVE_CORE_HOURS:g} core-hour, and without a terminal "
            f"nobody can confirm that: add --yes to begin, --limit N for fewer patterns, or "
            f"--simulator kinematic."
        )
    if not typer.confirm(f"Spend about {core_hours:,.0f} core-hours?"):
        raise SimulationError("Not begun. --limit N simulates fewer patterns.")


def common_version(probes: Sequence[Probe]) -> str:
    """Return the version of GSAS-II of all workers; raise a SimulationError if they differ."""
    versions = sorted({answer.version for answer in probes})
    if len(versions) > 1:
        raise SimulationError(
            f"The workers have different versions of GSAS-II, whose patterns would mix: "
            f"{'; '.join(versions)}. Give all of them the same."
        )
    return versions[0]


def probe(location: str | None) -> Probe:
    """Return the version of GSAS-II that this Python can import, or why it cannot."""
    host = socket.gethostname()
    try:
        return Probe(host, gsas2.installed_version(location), "")
    except gsas2.Gsas2Error as error:
        return Probe(host, "", str(error))


def check_call_paths(
    recipe: Recipe, code: int, cell: Array
) -> tuple[int, gsas2.PathCheck | Exception]:
    """Compare the two ways to call GSAS-II on one cell, shape (6,), of a phase.

    An error is returned, because Dask's workers print exceptions to the terminal.
    """
    try:
        simulator = cast("gsas2.Simulator", build_simulator(recipe))
        return code, simulator.check(code, cell)
    except (gsas2.Gsas2Error, SimulationError) as error:
        return code, error


def _probes(client: Client | None, location: str | None) -> list[Probe]:
    """Probe every worker, after waiting for the first; without a client, this process."""
    if client is None:
        return [probe(location)]
    first = client.submit(probe, location, pure=False).result()
    probes: list[Probe] = []
    waiting = {
        address: client.submit(probe, location, workers=[address], pure=False)
        for address in client.scheduler_info(n_workers=-1)["workers"]
    }
    while waiting:
        alive = client.scheduler_info(n_workers=-1)["workers"]
        for address in list(waiting):
            if waiting[address].done():
                probes.append(waiting.pop(address).result())
            elif address not in alive:  # its successor is checked with its first block
                del waiting[address]
        time.sleep(0.05)
    return probes or [first]  # all of them were replaced meanwhile
