"""Simulated measurements: drawn on a cluster for training, and the held-out ones for tests.

Every purpose has streams of random numbers of its own (:func:`random_stream`), so that nothing is
tested or calibrated on what it was trained on.
"""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from bragg_data.arrays import AnyFloats, Array, Indices, Mask
from bragg_data.campaign import Campaign
from bragg_data.simulation import kinematic
from bragg_data.simulation.measurement_effects import draw_labels, draw_profiles, simulator_for
from bragg_data.threads import single_threaded
from pipelines.cli.console import Progress
from pipelines.cluster.client import gather_with_progress
from pipelines.simulation.simulators import Recipe, recipe_of

_PER_TASK = 100  # draws of each phase
_VERSION = 2  # of the drawing; names the cached files

_ENTROPY = 77_000
# The held-out draws keep the seed of the first version: scores of older models stay comparable.
_HELD_OUT_ENTROPY = 55_000


class Purpose(IntEnum):
    """What random numbers are used for. A purpose keeps its number for ever."""

    TRAINING = 1
    CALIBRATION = 2
    DRIFTED_CALIBRATION = 3
    EVALUATION = 4
    DRIFTED_EVALUATION = 5
    FOREIGN_PROFILES = 6
    REFINEMENT = 7
    REFINEMENT_STARTS = 8
    MONITORING = 9


_DRIFTED = (Purpose.DRIFTED_CALIBRATION, Purpose.DRIFTED_EVALUATION)


def random_stream(purpose: Purpose, *key: int) -> np.random.SeedSequence:
    """Return the seed of a stream of random numbers that nothing else uses.

    Purpose and key are the spawn key of a `SeedSequence`, two words of 32 bits for each number of
    the key. In its entropy they would collide: ``SeedSequence([s, 0])`` and ``SeedSequence(s)`` are
    equal; so would the keys ``(2**32,)`` and ``(0, 1)``, without a fixed number of words. The
    numbers of the key (a user's seed, the number of a task …) are non-negative and below 2**64.
    """
    words = [word for number in key for word in (number % 2**32, number >> 32)]
    return np.random.SeedSequence(_ENTROPY, spawn_key=(int(purpose), *words))


def held_out_stream(task: int) -> np.random.SeedSequence:
    """Return the seed of a task of the held-out draws."""
    return np.random.SeedSequence(_HELD_OUT_ENTROPY, spawn_key=(task,))


@dataclass(frozen=True, eq=False)
class SimulatedMeasurements:
    """Prepared profiles as if they had been measured, and their truth."""

    profiles: AnyFloats
    """Shape (n, points), background off, between 0 and 1; those without signal are left out. In
    half precision as they are drawn: finer than the noise."""
    phase: Indices  # shape (n,): phase codes
    cells: Array  # shape (n, 6), in Å and degrees
    span: Indices  # shape (n, 2): first point with information, one past the last

    @property
    def covered(self) -> Mask:
        """Where the profiles hold information, shape (n, points)."""
        point = np.arange(self.profiles.shape[1])
        return np.asarray((point >= self.span[:, :1]) & (point < self.span[:, 1:]))


def draw_on_cluster(
    client: Client, campaign: Campaign, per_phase: int, purpose: Purpose, seed: int
) -> SimulatedMeasurements:
    """Draw profiles of each phase on a cluster; the same purpose and seed give the same profiles.

    The purpose also determines whether the instruments' calibrations have drifted.
    """
    counts = task_sizes(per_phase)
    seeds = [random_stream(purpose, seed, task) for task in range(len(counts))]
    recipe, calibrated = recipe_of(campaign), purpose not in _DRIFTED
    futures = client.map(draw_task, seeds, counts, recipe=recipe, calibrated=calibrated, pure=False)
    sizes = [count * len(campaign.phases) for count in counts]
    return _concatenated(gather_with_progress(futures, sizes, "Drawing", "profiles"))


def held_out_draws(
    campaign: Campaign, per_phase: int, *, cache: Path | None = None, quiet: bool = False
) -> SimulatedMeasurements:
    """Return the simulated measurements that models are tested on; always the same.

    The instruments are calibrated. A smaller number is the beginning of a larger one in steps of
    100 of each phase; profiles without signal are left out. In the directory `cache` they are
    stored by their content, and read again.
    """
    path = None if cache is None else cache / f"draws-{held_out_key(campaign, per_phase)}.npz"
    if path is not None and (stored := load_arrays(path, "profiles", "phase", "cells", "span")):
        types = (np.float32, np.intp, np.float64, np.intp)
        arrays = (array.astype(kind) for array, kind in zip(stored, types, strict=True))
        return SimulatedMeasurements(*arrays)
    parts, recipe = [], recipe_of(campaign)
    size = per_phase * len(campaign.phases)
    with Progress("Drawing held-out profiles", size, "profiles", quiet=quiet) as progress:
        for task, count in enumerate(task_sizes(per_phase)):
            parts.append(draw_task(held_out_stream(task), count, recipe=recipe, calibrated=True))
            progress.advance(count * len(campaign.phases))
    draws = _concatenated(parts)
    if path is not None:
        save_arrays(path, **vars(draws))
    return replace(draws, profiles=draws.profiles.astype(np.float32))


def task_sizes(count: int, per_task: int = _PER_TASK) -> list[int]:
    """Return the sizes of tasks that together have a number of draws."""
    return [min(per_task, count - low) for low in range(0, count, per_task)]


def held_out_key(campaign: Campaign, per_phase: int) -> str:
    """Return a digest of all that determines the held-out draws of a campaign."""
    texts = campaign.toml, sorted(campaign.cifs.items()), campaign.instprm
    effects = repr(campaign.measurement_effects)
    content = (_VERSION, kinematic.VERSION, _HELD_OUT_ENTROPY, per_phase, *texts, effects)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def save_arrays(path: Path, **arrays: NDArray[np.generic]) -> None:
    """Write arrays to an NPZ file that is complete as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.npz")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: Path, *names: str) -> list[NDArray[np.generic]] | None:
    """Return arrays of an NPZ file; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [np.asarray(file[name]) for name in names]
    except (OSError, EOFError, BadZipFile, ValueError, KeyError):
        return None


def _concatenated(parts: Sequence[SimulatedMeasurements]) -> SimulatedMeasurements:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return SimulatedMeasurements(*map(np.concatenate, columns))


@lru_cache(maxsize=1)
def _campaign_and_simulator(recipe: Recipe) -> tuple[Campaign, kinematic.Simulator]:
    campaign = recipe.campaign
    return campaign, simulator_for(campaign)


def draw_task(
    seed: np.random.SeedSequence, per_phase: int, *, recipe: Recipe, calibrated: bool
) -> SimulatedMeasurements:
    """Draw profiles: the task of a worker."""
    campaign, simulator = _campaign_and_simulator(recipe)
    generator = np.random.default_rng(seed)
    phase, cells = draw_labels(campaign, per_phase, generator)
    effects = campaign.measurement_effects
    # More threads of linear algebra than this one would wait for each other.
    with single_threaded():
        draws = draw_profiles(simulator, phase, cells, generator, effects, calibrated=calibrated)
        prepared = draws.prepared()
    with_signal = prepared.max(axis=1) > 0
    covered = draws.covered[with_signal]
    points = covered.shape[1]
    span = np.stack([covered.argmax(axis=1), points - covered[:, ::-1].argmax(axis=1)], axis=1)
    return SimulatedMeasurements(
        prepared[with_signal].astype(np.float16),
        phase[with_signal],
        draws.cells[with_signal],
        span.astype(np.intp),
    )
