"""Batches: complete, balanced, repeatable, and never more in memory than promised."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr

from bragg_models.batches import BatchError, Profiles, in_order, prefetched, profiles_of, shuffled

pytest_plugins = ("tests.small_store",)

N, ROWS = 1000, 64


@pytest.fixture
def profiles() -> Profiles:
    """Profiles that tell their own row number."""
    values = np.arange(N, dtype=np.float32)[:, None] * np.ones(5, dtype=np.float32)
    return Profiles(xr.DataArray(values, dims=("sample", "tof")), ROWS, lambda x: x * 2)


@pytest.fixture
def wanted() -> np.ndarray:
    return np.random.default_rng(0).random(N) < 0.8


def rows_of(batches: Iterator) -> list[np.ndarray]:
    rows = []
    for batch in batches:
        # The profile belongs to the row number, and was prepared.
        np.testing.assert_array_equal(batch.profiles[:, 0], 2 * batch.rows)
        rows.append(batch.rows)
    return rows


@pytest.mark.parametrize("buffer_chunks", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [7, 64, 200, 5000])
def test_every_sample_comes_exactly_once(
    profiles: Profiles, wanted: np.ndarray, buffer_chunks: int, batch_size: int
) -> None:
    generator = np.random.default_rng(1)
    rows = rows_of(shuffled(profiles, wanted, batch_size, generator, buffer_chunks=buffer_chunks))
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.flatnonzero(wanted))
    assert {len(r) for r in rows[:-1]} <= {batch_size}
    assert len(rows) == -(-wanted.sum() // batch_size)


def test_order_depends_on_the_seed_alone(profiles: Profiles, wanted: np.ndarray) -> None:
    def order(seed: int) -> np.ndarray:
        return np.concatenate(rows_of(shuffled(profiles, wanted, 32, np.random.default_rng(seed))))

    np.testing.assert_array_equal(order(1), order(1))
    assert (order(1) != order(2)).mean() > 0.9
    # Neighbours in the store are no neighbours in an epoch.
    assert (np.abs(np.diff(order(1))) == 1).mean() < 0.02


def test_balanced_batches_have_the_shares_and_use_each_phase_evenly(profiles: Profiles) -> None:
    generator = np.random.default_rng(0)
    phase = generator.choice(3, size=N, p=[0.04, 0.76, 0.2]).astype(np.int8)
    everything = np.ones(N, dtype=bool)
    rows = rows_of(
        shuffled(profiles, everything, 30, generator, phase=phase, shares=(1, 1, 1),
                 buffer_chunks=8)
    )  # fmt: skip
    for batch in rows:
        assert np.bincount(phase[batch], minlength=3).tolist() == [10, 10, 10]
    assert len(rows) == -(-N // 30)
    used = np.bincount(np.concatenate(rows), minlength=N)
    # The rare phase repeats, the common one is not through; none is drawn much more than another.
    assert used[phase == 1].max() == 1
    assert used[phase == 0].min() >= 3
    for code in (0, 2):
        of_phase = used[phase == code]
        assert of_phase.max() - of_phase.min() <= 4


def test_shares_that_do_not_divide_and_phases_without_samples(profiles: Profiles) -> None:
    phase = (np.arange(N) % 2).astype(np.int8)
    everything = np.ones(N, dtype=bool)
    batches = shuffled(
        profiles, everything, 16, np.random.default_rng(0), phase=phase, shares=(0.3, 0.5, 0.2)
    )
    for batch in rows_of(batches):
        assert np.bincount(phase[batch], minlength=3).tolist() == [6, 10, 0]
    with pytest.raises(BatchError, match="No sample"):
        list(shuffled(profiles, everything, 16, np.random.default_rng(0), phase=phase,
                      shares=(0, 0, 1)))  # fmt: skip
    with pytest.raises(BatchError, match="phase"):
        next(shuffled(profiles, everything, 16, np.random.default_rng(0), shares=(1, 1)))


def test_nothing_to_train_on_is_refused(profiles: Profiles) -> None:
    with pytest.raises(BatchError, match="larger part"):
        next(shuffled(profiles, np.zeros(N, dtype=bool), 16, np.random.default_rng(0)))


def test_in_order_reads_only_the_chunks_that_it_needs(profiles: Profiles) -> None:
    wanted = np.zeros(N, dtype=bool)
    wanted[[3, 5, 70, 999]] = True
    seen: list[int] = []
    counting = Profiles(profiles.intensity, ROWS, lambda x: seen.append(len(x)) or x * 2)
    rows = rows_of(in_order(counting, wanted))
    assert [r.tolist() for r in rows] == [[3, 5], [70], [999]]
    assert seen == [2, 1, 1]


def test_prefetching_stays_the_promised_number_of_items_ahead() -> None:
    made, changed = 0, threading.Condition()

    def items() -> Iterator[int]:
        nonlocal made
        while True:
            with changed:
                made += 1
                changed.notify_all()
            yield made

    with prefetched(items(), depth=2) as ahead:
        for taken in range(1, 20):
            next(ahead)
            with changed:
                # Two more are made while this one is in use; a third never is.
                assert changed.wait_for(lambda: made == taken + 2, timeout=10)  # noqa: B023
    assert made == 21


def test_an_error_in_the_background_is_raised_where_its_item_would_be() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with prefetched(items(), depth=3) as ahead:
        assert next(ahead) == 1
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)


def test_leaving_early_ends_the_thread(profiles: Profiles, wanted: np.ndarray) -> None:
    before = threading.active_count()
    batches = shuffled(profiles, wanted, 8, np.random.default_rng(0), buffer_chunks=1)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_two_buffers_are_in_memory_and_no_more(wanted: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    values = xr.DataArray(np.zeros((N, 5), np.float32), dims=("sample", "tof"))
    read: list[int] = []
    counting = Profiles(values, ROWS, lambda x: read.append(len(x)) or x)
    used = 0
    chunks = -(-N // ROWS)
    for batch in shuffled(counting, wanted, 16, generator, buffer_chunks=2):
        used += len(batch.rows)
        # Two chunks in use, two read ahead; a chunk holds at most ROWS samples.
        assert sum(read) <= used + 4 * ROWS
    assert len(read) == chunks


def test_a_real_snapshot_is_read_by_its_own_chunks(small_dataset: xr.Dataset) -> None:
    profiles = profiles_of(small_dataset, lambda x: x)
    assert profiles.rows_per_chunk == 64
    everything = np.ones(len(profiles), dtype=bool)
    read = np.concatenate([batch.profiles for batch in in_order(profiles, everything)])
    np.testing.assert_array_equal(read, small_dataset.intensity.values)


def test_fewer_samples_than_a_batch_make_one(profiles: Profiles) -> None:
    wanted = np.zeros(len(profiles), dtype=bool)
    wanted[:20] = True
    phase = np.zeros(len(profiles), dtype=np.int8)
    batches = list(
        shuffled(profiles, wanted, 64, np.random.default_rng(0), phase=phase, shares=(1,))
    )
    assert [len(batch.rows) for batch in batches] == [64]
    assert set(batches[0].rows) == set(range(20))
