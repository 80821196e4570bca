"""Random numbers of the simulated measurements: no two purposes share a stream."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from bragg_data.campaign import Campaign
from pipelines.simulation.draws import (
    Purpose,
    draw_on_cluster,
    held_out_draws,
    held_out_stream,
    random_stream,
)

# Those of the version before among them.
SEEDS = (0, 1, 2, 3, 100, 55_000, 77_000, 2**32, 2**40)
TASKS = range(5)


def test_no_two_purposes_seeds_or_tasks_share_a_stream() -> None:
    streams = {
        (purpose, *key): random_stream(purpose, *key)
        for purpose in Purpose
        for key in [(seed, task) for seed, task in product(SEEDS, TASKS)] + [(s,) for s in SEEDS]
    }
    streams |= {("held out", task): held_out_stream(task) for task in (*TASKS, 55_000)}
    states = {tuple(stream.generate_state(8)) for stream in streams.values()}
    assert len(states) == len(streams)
    # Neither do those that are spawned from them, as a worker may.
    children = {tuple(s.spawn(1)[0].generate_state(8)) for s in streams.values()}
    assert len(children | states) == 2 * len(streams)


@pytest.mark.slow
def test_training_and_calibration_draws_of_neighbouring_seeds_differ(
    small_campaign: Campaign,
) -> None:
    """Those of a calibration had the seed of the training, plus one."""
    with Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as c:
        drawn = [
            draw_on_cluster(c, small_campaign, 2, purpose, seed)
            for purpose, seed in (
                (Purpose.TRAINING, 1),
                (Purpose.CALIBRATION, 0),
                (Purpose.DRIFTED_CALIBRATION, 0),
                (Purpose.TRAINING, 1),
            )
        ]
    cells = [{tuple(cell) for cell in draws.cells} for draws in drawn]
    assert cells[0] == cells[3]
    assert not cells[0] & cells[1]
    assert not cells[0] & cells[2]
    assert not cells[1] & cells[2]


@pytest.mark.slow
def test_held_out_draws_are_read_again_as_they_were_drawn(
    small_campaign: Campaign, tmp_path: Path
) -> None:
    fresh = held_out_draws(small_campaign, 3, quiet=True)
    stored = held_out_draws(small_campaign, 3, cache=tmp_path, quiet=True)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    again = held_out_draws(small_campaign, 3, cache=tmp_path, quiet=True)
    assert path.stat().st_mtime_ns == written
    for draws in (stored, again):
        for name in ("profiles", "phase", "cells", "span"):
            np.testing.assert_array_equal(getattr(draws, name), getattr(fresh, name))
            assert getattr(draws, name).dtype == getattr(fresh, name).dtype
    # Outside of what a profile covers there is nothing.
    assert (fresh.profiles[~fresh.covered] == 0).all()
    assert fresh.covered.any(axis=1).all()
    path.write_bytes(b"damaged")
    np.testing.assert_array_equal(
        held_out_draws(small_campaign, 3, cache=tmp_path, quiet=True).profiles, fresh.profiles
    )
    assert held_out_draws(small_campaign, 2, cache=tmp_path, quiet=True).phase.size == 6
