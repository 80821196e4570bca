"""Draws of measured-looking profiles: to learn from on a cluster, and the pinned test draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from distributed import Client
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from bragg_data.campaign import Campaign
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    draw_labels,
    draw_profiles,
    effects_from_campaign,
    simulator_for,
)
from pipelines.cli.console import Progress
from pipelines.cluster.client import gather_with_progress

_PER_TASK = 100  # draws of each phase
_TEST_SEED = 55_000

TEST_DRAWS = 1000
"""How many draws of each phase models for measured profiles are tested on."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Prepared profiles and their truth.

    Attributes
    ----------
    profiles : shape (n, points), float32
        Background off, between 0 and 1; those with no signal are left out.
    phase, cells : shapes (n,), (n, 6)
    """

    profiles: NDArray[np.float32]
    phase: NDArray[np.intp]
    cells: NDArray[np.float64]


def drawn(
    client: Client,
    campaign: Campaign,
    per_phase: int,
    seed: int,
    *,
    calibrated: bool = True,
) -> Drawn:
    """Draw so many profiles of each phase on a cluster, the same for the same seed.

    Parameters
    ----------
    client
        Of the cluster.
    campaign
        Phases, ranges, instrument, grid, and what differs in measured profiles.
    per_phase
        How many.
    seed
        Of everything that is drawn.
    calibrated
        Whether the instrument was calibrated anew.
    """
    counts = [min(_PER_TASK, per_phase - low) for low in range(0, per_phase, _PER_TASK)]
    seeds = np.random.SeedSequence([seed, int(calibrated)]).spawn(len(counts))
    futures = client.map(
        _draw, seeds, counts, toml=campaign.toml, cifs=dict(campaign.cifs),
        instprm=campaign.instprm, calibrated=calibrated, pure=False,
    )  # fmt: skip
    sizes = [count * len(campaign.phases) for count in counts]
    return _joined(gather_with_progress(futures, sizes, "Drawing", "profiles"))


def pinned_draws(campaign: Campaign, per_phase: int, *, quiet: bool = False) -> Drawn:
    """Draw the profiles that models for measured ones are tested on, here; always the same.

    The instrument is calibrated. Fewer are a part of more, but for the last hundred.
    """
    counts = [min(_PER_TASK, per_phase - low) for low in range(0, per_phase, _PER_TASK)]
    seeds = np.random.SeedSequence(_TEST_SEED).spawn(len(counts))
    parts = []
    size = per_phase * len(campaign.phases)
    with Progress("Drawing", size, "profiles", quiet=quiet) as progress:
        for seed, count in zip(seeds, counts, strict=True):
            one = _draw(
                seed, count, toml=campaign.toml, cifs=dict(campaign.cifs),
                instprm=campaign.instprm, calibrated=True,
            )  # fmt: skip
            parts.append(one)
            progress.advance(count * len(campaign.phases))
    return _joined(parts)


def _joined(parts: Sequence[Drawn]) -> Drawn:
    return Drawn(
        np.concatenate([p.profiles for p in parts]).astype(np.float32),
        np.concatenate([p.phase for p in parts]),
        np.concatenate([p.cells for p in parts]),
    )


@lru_cache(maxsize=1)
def _ready(
    toml: str, cifs: tuple[tuple[str, str], ...], instprm: str
) -> tuple[Campaign, Simulator]:
    campaign = Campaign(toml, dict(cifs), instprm)
    return campaign, simulator_for(campaign)


def _draw(
    seed: np.random.SeedSequence,
    per_phase: int,
    *,
    toml: str,
    cifs: Mapping[str, str],
    instprm: str,
    calibrated: bool,
) -> Drawn:
    """Draw some profiles: the task of a worker."""
    campaign, simulator = _ready(toml, tuple(cifs.items()), instprm)
    generator = np.random.default_rng(seed)
    phase, cells = draw_labels(campaign, per_phase, generator)
    # More threads of linear algebra than this one would wait for each other.
    with threadpool_limits(limits=1, user_api="blas"):
        draws = draw_profiles(
            simulator, phase, cells, generator, effects_from_campaign(campaign),
            calibrated=calibrated,
        )  # fmt: skip
        prepared = draws.prepared()
    kept = prepared.max(axis=1) > 0
    # Half precision is finer than the noise.
    return Drawn(prepared[kept].astype(np.float16), phase[kept], draws.cells[kept])
