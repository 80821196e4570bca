"""Which simulator a campaign gets: by name, by what the workers have, by what began it."""

from __future__ import annotations

import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import typer
from distributed import Client, as_completed
from rich.markup import escape

from bragg_data.campaign import Campaign, Samples
from bragg_data.simulation import gsas2, kinematic
from bragg_data.store.repository import DataSet
from pipelines.cli.console import Progress, duration, say
from pipelines.simulation.worker import (
    SIMULATORS,
    Gsas2Options,
    Recipe,
    SimulationError,
    build_simulator,
    recipe_of,
    simulate_samples,
)

ASK_ABOVE_CORE_HOURS = 1.0
"""Campaigns that take longer are begun after a question only, or with --yes."""

_TIMED_SAMPLES = 256  # of the fast simulator, in which one pattern alone says nothing

_Result = TypeVar("_Result")


class Probe(NamedTuple):
    """What one Python says of its GSAS-II: where, which version or, without one, why."""

    place: str
    version: str
    reason: str


class Choice(NamedTuple):
    """A simulator, and what the whole campaign will take on one core."""

    recipe: Recipe
    core_hours: float


def check_name(simulator: str) -> None:
    """Refuse a name that no simulator has.

    Raises
    ------
    SimulationError
        Telling those that there are.
    """
    if simulator not in ("auto", *SIMULATORS):
        raise SimulationError(
            f"There is no simulator '{simulator}'. Choose auto, {' or '.join(SIMULATORS)}."
        )


def remembered(known: Sequence[DataSet], simulator: str) -> str:
    """Return what auto means for data sets that are there, and any other name as it is.

    Parameters
    ----------
    known
        The data sets of the campaign, finished or not, by whichever simulator.
    simulator
        auto, or a name.

    Raises
    ------
    SimulationError
        If another simulator has begun and not finished: two never mix.
    """
    if simulator == "auto" and known:
        one = min(known, key=lambda one: (one.tag is not None, one.simulator))
        say(f"Simulator auto is {one.simulator}, with which this campaign was begun")
        return one.simulator
    if any(one.tag and one.simulator == simulator for one in known):
        return simulator  # it has its own
    for one in known:
        if one.tag is None and simulator not in ("auto", one.simulator):
            raise SimulationError(
                f"{_begun(one)}; {simulator} cannot go on with it, because two simulators never "
                f"mix under one tag. Finish it with --simulator {one.simulator}, or name another "
                f"--store."
            )
    return simulator


def check_resume(known: Sequence[DataSet], recipe: Recipe) -> None:
    """Refuse to go on with an unfinished data set by another GSAS-II.

    Raises
    ------
    SimulationError
        Naming both.
    """
    for one in known:
        same = one.simulator == recipe.simulator != "kinematic"
        if one.tag is None and same and one.version != recipe.version:
            raise SimulationError(
                f"{_begun(one)}; the workers have {recipe.version}, whose patterns would mix with "
                f"those. Give the workers the version that began it, or name another --store."
            )


def _begun(one: DataSet) -> str:
    return (
        f"This campaign was begun with the simulator {one.simulator} ({one.version}), which has "
        f"done {one.done:,} of {one.total:,} patterns"
    )


def gsas2_options(path: Path | None, pattern_seconds: float) -> Gsas2Options:
    """Return how GSAS-II is found and how long a pattern may take.

    Raises
    ------
    SimulationError
        If that is no time from a second to a day.
    """
    if not 1 <= pattern_seconds <= 86_400:
        raise SimulationError(
            f"--pattern-limit {pattern_seconds:g} is not between 1 and 86,400 seconds."
        )
    location = str(path.expanduser().absolute()) if path else None
    return Gsas2Options(location, pattern_seconds)


def choose(
    wanted: str,
    campaign: Campaign,
    samples: Samples,
    options: Gsas2Options,
    client: Client | None = None,
) -> Choice:
    """Settle which simulator computes some samples, how it is called, and what that takes.

    GSAS-II is chosen where every worker can import it. Then one cell of each phase is simulated
    in both ways to call it: the faster one is taken if they agree.

    Parameters
    ----------
    wanted
        auto or gsas2; kinematic needs no choice.
    campaign, samples
        What is to be simulated.
    options
        How GSAS-II is found.
    client
        Of the workers; without one, this process is meant.

    Raises
    ------
    SimulationError
        If gsas2 is wanted and a worker has none, or they have different ones.
    Gsas2Error
        If GSAS-II does not understand a phase.
    """
    probes = list(_everywhere(client, probe, options.location))
    lacking = [found for found in probes if found.reason]
    if wanted == "gsas2" and lacking:
        where = f"On worker {lacking[0].place}: " if client else ""
        raise SimulationError(f"{where}{lacking[0].reason}")
    if not lacking:
        return _choose_gsas2(wanted, campaign, samples, options, client, probes)
    what, place = lacking[0].reason.partition(". ")[0], lacking[0].place
    say(f"Simulator auto is kinematic, the fast one, because on {place} {escape(what)}")
    recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
    few = samples[:_TIMED_SAMPLES]
    simulate_samples(recipe, few)  # compiles, and makes its tables
    began = time.monotonic()
    simulate_samples(recipe, few)
    each = (time.monotonic() - began) / len(few)
    return _told(Choice(recipe, each * len(samples) / 3600), len(samples))


def _choose_gsas2(
    wanted: str,
    campaign: Campaign,
    samples: Samples,
    options: Gsas2Options,
    client: Client | None,
    probes: Sequence[Probe],
) -> Choice:
    versions = sorted({found.version for found in probes})
    if len(versions) > 1:
        raise SimulationError(
            f"The workers have different versions of GSAS-II, whose patterns would mix: "
            f"{'; '.join(versions)}. Give all of them the same."
        )
    if wanted == "auto":
        count = f"every worker ({len(probes)})" if client else "this Python"
        say(f"Simulator auto is gsas2: {count} can import GSAS-II")
    recipe = recipe_of(campaign, "gsas2", versions[0], options)
    codes, first, counts = np.unique(samples.phase, return_index=True, return_counts=True)
    tasks = [
        (recipe, int(code), samples.cells[row]) for code, row in zip(codes, first, strict=True)
    ]
    checks: dict[int, gsas2.PathCheck] = {}
    with Progress("Checking GSAS-II on one cell of each phase", len(tasks), "phases") as progress:
        for code, check in _spread(client, check_call_paths, tasks):
            if isinstance(check, Exception):
                raise check
            checks[code] = check
            progress.advance()
    paths = {check.call_path for check in checks.values()}
    call_path: gsas2.CallPath = "memory" if paths == {"memory"} else "scripting"
    if call_path == "scripting":
        worst = max(checks.values(), key=lambda check: check.difference)
        problem = worst.problem or f"differs by {worst.difference:.1e} of the maximum"
        warnings.warn(
            f"GSAS-II called in memory is not this version's scripting interface ({problem}). The "
            f"scripting interface is used, which takes about twice as long.",
            stacklevel=2,
        )
    else:
        worst_difference = max(check.difference for check in checks.values())
        say(f"Called in memory, it agrees with its scripting interface to {worst_difference:.0e}")
    seconds = sum(
        int(count) * getattr(checks[int(code)], f"{call_path}_seconds")
        for code, count in zip(codes, counts, strict=True)
    )
    settled = recipe._replace(gsas2=options._replace(call_path=call_path))
    return _told(Choice(settled, seconds / 3600), len(samples))


def _told(choice: Choice, count: int) -> Choice:
    seconds = 3600 * choice.core_hours
    hours = f"{choice.core_hours:,.1f}" if choice.core_hours >= 0.1 else f"{choice.core_hours:.1g}"
    say(
        f"Estimate: {hours} core-hours for {count:,} patterns ({duration(seconds)} on one core), "
        f"from a timed sample"
    )
    return choice


def confirm(core_hours: float, *, yes: bool) -> None:
    """Ask before a long campaign begins.

    Raises
    ------
    SimulationError
        If the answer is no, or there is nobody to ask.
    """
    if yes or core_hours <= ASK_ABOVE_CORE_HOURS:
        return
    if not sys.stdin.isatty():
        raise SimulationError(
            f"This takes more than {ASK_ABOVE_CORE_HOURS:g} core-hour, and nobody is there to be "
            f"asked: add --yes to begin, --limit N for fewer patterns, or --simulator kinematic."
        )
    if not typer.confirm(f"Spend about {core_hours:,.0f} core-hours?"):
        raise SimulationError("Not begun. --limit N simulates fewer patterns.")


def probe(location: str | None) -> Probe:
    """Tell of the GSAS-II that this Python finds."""
    place = socket.gethostname()
    try:
        return Probe(place, gsas2.installed_version(location), "")
    except gsas2.Gsas2Error as error:
        return Probe(place, "", str(error))


def check_call_paths(
    recipe: Recipe, code: int, cell: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> tuple[int, gsas2.PathCheck | Exception]:
    """Compare the two ways to call GSAS-II on one cell, shape (6,), of a phase.

    An error is returned, because Dask's workers write what is raised in them to the terminal.
    """
    try:
        simulator = build_simulator(recipe)
        assert isinstance(simulator, gsas2.Simulator)
        return code, simulator.check(code, cell)
    except (gsas2.Gsas2Error, SimulationError) as error:
        return code, error


def _everywhere(
    client: Client | None, function: Callable[..., _Result], *arguments: object
) -> Iterator[_Result]:
    """Call a function on every worker there is, having waited for the first."""
    if client is None:
        yield function(*arguments)
        return
    client.submit(function, *arguments, pure=False).result()
    waiting = {
        address: client.submit(function, *arguments, workers=[address], pure=False)
        for address in client.scheduler_info(n_workers=-1)["workers"]
    }
    while waiting:
        there = client.scheduler_info(n_workers=-1)["workers"]
        for address in list(waiting):
            if waiting[address].done():
                yield waiting.pop(address).result()
            elif address not in there:  # its successor shows what it has with its first block
                del waiting[address]
        time.sleep(0.05)


def _spread(
    client: Client | None, function: Callable[..., _Result], tasks: Sequence[tuple[object, ...]]
) -> Iterator[_Result]:
    """Call a function once for each task, on any worker."""
    if client is None:
        yield from (function(*task) for task in tasks)
        return
    futures = [client.submit(function, *task, pure=False) for task in tasks]
    for future in as_completed(futures):
        yield future.result()
