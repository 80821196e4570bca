"""Batches: complete, balanced, repeatable, and never more in memory than promised."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from bragg_models.data.batches import (
    Balance,
    Batch,
    BatchError,
    BatchSettings,
    Profiles,
    in_order,
    joined,
    prefetched,
    profiles_of,
    shuffled,
)
from bragg_models.data.cache import cached
from tests.bragg_models.data.conftest import ROWS, N


@pytest.fixture
def selected() -> np.ndarray:
    return np.random.default_rng(0).random(N) < 0.8


def rows_of(batches: Iterator) -> list[np.ndarray]:
    rows = []
    for batch in batches:
        # The profile belongs to the row number, and was prepared.
        np.testing.assert_array_equal(batch.profiles[:, 0], 2 * batch.rows)
        rows.append(batch.rows)
    return rows


def everything_of(profiles: Profiles) -> np.ndarray:
    return np.concatenate(
        [b.profiles for b in in_order(profiles, np.ones(len(profiles), dtype=bool))]
    )


@pytest.mark.parametrize("buffer_chunks", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [7, 64, 200, 5000])
def test_every_sample_comes_exactly_once(
    profiles: Profiles, selected: np.ndarray, buffer_chunks: int, batch_size: int
) -> None:
    generator = np.random.default_rng(1)
    rows = rows_of(
        shuffled(profiles, selected, BatchSettings(batch_size, buffer_chunks), generator)
    )
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.flatnonzero(selected))
    assert {len(r) for r in rows[:-1]} <= {batch_size}
    assert len(rows) == -(-selected.sum() // batch_size)


def test_order_depends_on_the_seed_alone(profiles: Profiles, selected: np.ndarray) -> None:
    def order(seed: int) -> np.ndarray:
        return np.concatenate(
            rows_of(shuffled(profiles, selected, BatchSettings(32), np.random.default_rng(seed)))
        )

    np.testing.assert_array_equal(order(1), order(1))
    assert (order(1) != order(2)).mean() > 0.9
    # Neighbours in the store are no neighbours in an epoch.
    assert (np.abs(np.diff(order(1))) == 1).mean() < 0.02


@pytest.mark.parametrize("samples", [1, 100, 129, 800, 2000])
def test_an_epoch_has_the_requested_number_of_samples(
    profiles: Profiles, selected: np.ndarray, samples: int
) -> None:
    generator = np.random.default_rng(1)
    rows = rows_of(shuffled(profiles, selected, BatchSettings(32, 2, samples), generator))
    together = np.concatenate(rows)
    assert len(together) == samples
    assert {len(r) for r in rows[:-1]} <= {32}
    # No sample comes again before all have come; the last buffers of a turn may be cut short.
    used = np.bincount(together, minlength=N)
    assert not used[~selected].any()
    assert used.max() - used[selected].min() <= 1
    phase = (np.arange(N) % 3).astype(np.int8)
    settings = BatchSettings(30, samples=samples)
    balance = Balance(phase, (1, 1, 1))
    balanced = shuffled(profiles, selected, settings, np.random.default_rng(1), balance)
    assert [len(r) for r in rows_of(balanced)] == [30] * -(-samples // 30)


def test_a_short_epoch_reads_only_what_it_needs(profiles: Profiles, selected: np.ndarray) -> None:
    seen: list[int] = []
    counting = Profiles(profiles.intensity, ROWS, lambda x: seen.append(len(x)) or x * 2)
    first = []
    for seed in range(4):
        settings = BatchSettings(20, buffer_chunks=2, samples=60)
        batches = shuffled(counting, selected, settings, np.random.default_rng(seed))
        first.append(np.concatenate(rows_of(batches)))
    assert len(seen) == 4 * 2
    assert len(np.unique(np.concatenate(first) // ROWS)) > 2  # other chunks in other epochs


def test_balanced_batches_have_the_shares_and_use_samples_evenly(profiles: Profiles) -> None:
    generator = np.random.default_rng(0)
    phase = generator.choice(3, size=N, p=[0.04, 0.76, 0.2]).astype(np.int8)
    everything = np.ones(N, dtype=bool)
    rows = rows_of(
        shuffled(profiles, everything, BatchSettings(30, 8), generator, Balance(phase, (1, 1, 1)))
    )
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

    def batches(shares: tuple[float, ...]) -> Iterator[Batch]:
        generator = np.random.default_rng(0)
        return shuffled(profiles, everything, BatchSettings(16), generator, Balance(phase, shares))

    for batch in rows_of(batches((0.3, 0.5, 0.2))):
        assert np.bincount(phase[batch], minlength=3).tolist() == [6, 10, 0]
    with pytest.raises(BatchError, match="No sample"):
        list(batches((0, 0, 1)))


def test_nothing_to_train_on_is_refused(profiles: Profiles) -> None:
    with pytest.raises(BatchError, match="larger part"):
        next(
            shuffled(profiles, np.zeros(N, dtype=bool), BatchSettings(16), np.random.default_rng(0))
        )


def test_in_order_reads_only_the_chunks_that_it_needs(profiles: Profiles) -> None:
    selected = np.zeros(N, dtype=bool)
    selected[[3, 5, 70, 999]] = True
    seen: list[int] = []
    counting = Profiles(profiles.intensity, ROWS, lambda x: seen.append(len(x)) or x * 2)
    rows = rows_of(in_order(counting, selected))
    assert [r.tolist() for r in rows] == [[3, 5], [70], [999]]
    assert seen == [2, 1, 1]


def test_prefetching_stays_the_promised_number_of_items_ahead() -> None:
    produced, changed = 0, threading.Condition()

    def item(_: int) -> int:
        nonlocal produced
        with changed:
            produced += 1
            changed.notify_all()
        return produced

    with prefetched(item, itertools.count(), depth=2) as ahead:
        for taken in range(1, 20):
            next(ahead)
            with changed:
                # Two more are computed while this item is in use; a third never is.
                assert changed.wait_for(lambda: produced == taken + 2, timeout=60)  # noqa: B023
    assert produced == 21


def test_an_error_in_the_background_is_raised_where_its_item_would_be() -> None:
    def item(number: int) -> int:
        if number > 1:
            raise OSError("the disk is gone")
        return number

    with prefetched(item, itertools.count(1), depth=3) as ahead:
        assert next(ahead) == 1
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)


def test_leaving_early_ends_the_thread(profiles: Profiles, selected: np.ndarray) -> None:
    before = threading.active_count()
    batches = shuffled(profiles, selected, BatchSettings(8, 1), np.random.default_rng(0))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_two_buffers_are_in_memory_and_no_more(selected: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    values = xr.DataArray(np.zeros((N, 5), np.float32), dims=("sample", "tof"))
    read: list[int] = []
    counting = Profiles(values, ROWS, lambda x: read.append(len(x)) or x)
    used = 0
    chunks = -(-N // ROWS)
    for batch in shuffled(counting, selected, BatchSettings(16, 2), generator):
        used += len(batch.rows)
        # Two chunks in use, two read ahead; a chunk holds at most ROWS samples.
        assert sum(read) <= used + 4 * ROWS
    assert len(read) == chunks


def test_a_snapshot_is_read_by_its_stored_chunks(small_dataset: xr.Dataset) -> None:
    profiles = profiles_of(small_dataset, lambda x: x)
    assert profiles.rows_per_chunk == 64
    everything = np.ones(len(profiles), dtype=bool)
    read = np.concatenate([batch.profiles for batch in in_order(profiles, everything)])
    np.testing.assert_array_equal(read, small_dataset.intensity.values)


def test_fewer_samples_than_a_batch_fill_a_batch(profiles: Profiles) -> None:
    selected = np.zeros(len(profiles), dtype=bool)
    selected[:20] = True
    phase = np.zeros(len(profiles), dtype=np.int8)
    generator = np.random.default_rng(0)
    balance = Balance(phase, (1,))
    batches = list(shuffled(profiles, selected, BatchSettings(64), generator, balance))
    assert [len(batch.rows) for batch in batches] == [64]
    assert set(batches[0].rows) == set(range(20))


# ---- functions of profiles, and several data sets -----------------------------------------------


def test_a_function_is_applied_to_profiles(profiles: Profiles, selected: np.ndarray) -> None:
    mapped = profiles.mapped(lambda x: (x[:, :2] + 1).astype(np.float64))
    assert len(mapped) == N
    for new, old in zip(in_order(mapped, selected), in_order(profiles, selected), strict=True):
        assert new.profiles.dtype == np.float32
        np.testing.assert_array_equal(new.rows, old.rows)
        np.testing.assert_array_equal(new.profiles, old.profiles[:, :2] + 1)
    # Twice: in the order of the calls.
    twice = profiles.mapped(lambda x: x + 1).mapped(lambda x: x * 10)
    np.testing.assert_array_equal(everything_of(twice), (everything_of(profiles) + 1) * 10)


def test_a_function_is_applied_to_cached_profiles(profiles: Profiles, tmp_path: Path) -> None:
    """As frozen features of prepared profiles that are cached."""
    expected = everything_of(profiles) + 1
    mapped = cached(profiles, tmp_path, "doubled@1").mapped(lambda x: x + 1)
    np.testing.assert_array_equal(everything_of(mapped), expected)
    # The copy on the disk stays what it was.
    np.testing.assert_array_equal(
        everything_of(cached(profiles, tmp_path, "doubled@1")), expected - 1
    )


@pytest.fixture
def parts() -> list[Profiles]:
    """Three data sets of different lengths and chunks; the values are joint row numbers."""
    values = np.arange(N, dtype=np.float32)[:, None] * np.ones(5, dtype=np.float32)
    cuts, rows = (0, 130, 131, N), (50, 7, 64)
    return [
        Profiles(xr.DataArray(values[low:high], dims=("sample", "tof")), r, lambda x: x * 2)
        for low, high, r in zip(cuts[:-1], cuts[1:], rows, strict=True)
    ]


def test_joined_profiles_are_in_sequence(parts: list[Profiles]) -> None:
    both = joined(parts)
    assert len(both) == N
    everything = np.ones(N, dtype=bool)
    rows = np.concatenate(rows_of(in_order(both, everything)))
    np.testing.assert_array_equal(rows, np.arange(N))
    chunks = both.chunks_with(everything)
    assert chunks.tolist() == list(range(3 + 1 + 14))
    assert both.count(chunks, everything) == N
    assert both.count(chunks[[2, 3, 17]], everything) == 30 + 1 + 37
    few = np.zeros(N, dtype=bool)
    few[[129, 130, 131]] = True
    assert both.chunks_with(few).tolist() == [2, 3, 4]
    assert both.count(chunks, few) == 3
    assert [r.tolist() for r in rows_of(in_order(both, few))] == [[129], [130], [131]]
    assert joined(parts[:1]) is parts[0]


@pytest.mark.parametrize("cache", [False, True])
def test_joined_profiles_are_shuffled_together(
    parts: list[Profiles], selected: np.ndarray, tmp_path: Path, cache: bool
) -> None:
    stored = [cached(part, tmp_path, f"part {n}") for n, part in enumerate(parts)]
    both = joined(stored if cache else parts)
    batches = rows_of(shuffled(both, selected, BatchSettings(32, 4), np.random.default_rng(1)))
    together = np.concatenate(batches)
    np.testing.assert_array_equal(np.sort(together), np.flatnonzero(selected))
    # Samples of several data sets meet in a batch.
    assert np.mean([len(set(np.searchsorted([130, 131], b, "right"))) > 1 for b in batches]) > 0.3
    phase = (np.arange(N) % 3).astype(np.int8)
    settings = BatchSettings(30, samples=2000)
    balance = Balance(phase, (1, 1, 1))
    balanced = shuffled(both, selected, settings, np.random.default_rng(1), balance)
    for batch in rows_of(balanced):
        assert np.bincount(phase[batch]).tolist() == [10, 10, 10]


def test_a_function_is_applied_to_joined_profiles(parts: list[Profiles]) -> None:
    mapped = joined(parts).mapped(lambda x: x[:, :1] - 1)
    expected = everything_of(joined(parts))[:, :1] - 1
    np.testing.assert_array_equal(everything_of(mapped), expected)


def test_a_joined_part_without_a_selected_sample_is_not_read(parts: list[Profiles]) -> None:
    def never(_: np.ndarray) -> np.ndarray:
        raise AssertionError("read")

    closed = Profiles(parts[2].intensity, parts[2].rows_per_chunk, never)
    both = joined([*parts[:2], closed])
    selected = np.arange(N) < 131
    batches = shuffled(both, selected, BatchSettings(16), np.random.default_rng(0))
    assert np.concatenate(rows_of(batches)).max() == 130
