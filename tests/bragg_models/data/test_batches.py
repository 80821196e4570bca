"""Batches: complete, balanced, repeatable, and never more in memory than promised."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from bragg_models.data import cache as module
from bragg_models.data.batches import (
    BatchError,
    Profiles,
    in_order,
    joined,
    prefetched,
    profiles_of,
    shuffled,
)
from bragg_models.data.cache import CacheError, cached

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


@pytest.mark.parametrize("samples", [1, 100, 129, 800, 2000])
def test_an_epoch_ends_after_so_many_samples(
    profiles: Profiles, wanted: np.ndarray, samples: int
) -> None:
    generator = np.random.default_rng(1)
    rows = rows_of(shuffled(profiles, wanted, 32, generator, buffer_chunks=2, samples=samples))
    together = np.concatenate(rows)
    assert len(together) == samples
    assert {len(r) for r in rows[:-1]} <= {32}
    # No sample comes again before all have come; the last buffers of a turn may be cut short.
    used = np.bincount(together, minlength=N)
    assert not used[~wanted].any()
    assert used.max() - used[wanted].min() <= 1
    phase = (np.arange(N) % 3).astype(np.int8)
    balanced = shuffled(profiles, wanted, 30, np.random.default_rng(1), phase=phase,
                        shares=(1, 1, 1), samples=samples)  # fmt: skip
    assert [len(r) for r in rows_of(balanced)] == [30] * -(-samples // 30)


def test_a_short_epoch_reads_only_what_it_needs(profiles: Profiles, wanted: np.ndarray) -> None:
    seen: list[int] = []
    counting = Profiles(profiles.intensity, ROWS, lambda x: seen.append(len(x)) or x * 2)
    first = []
    for seed in range(4):
        batches = shuffled(counting, wanted, 20, np.random.default_rng(seed), buffer_chunks=2,
                           samples=60)  # fmt: skip
        first.append(np.concatenate(rows_of(batches)))
    assert len(seen) == 4 * 2
    assert len(np.unique(np.concatenate(first) // ROWS)) > 2  # other chunks in other epochs


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


# ---- more things done, and several data sets ---------------------------------------------------


def test_one_more_thing_is_done_to_profiles(profiles: Profiles, wanted: np.ndarray) -> None:
    mapped = profiles.mapped(lambda x: (x[:, :2] + 1).astype(np.float64))
    assert len(mapped) == N
    for one, other in zip(in_order(mapped, wanted), in_order(profiles, wanted), strict=True):
        assert one.profiles.dtype == np.float32
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.profiles, other.profiles[:, :2] + 1)
    # Twice: in the order in which it was said.
    twice = profiles.mapped(lambda x: x + 1).mapped(lambda x: x * 10)
    np.testing.assert_array_equal(everything_of(twice), (everything_of(profiles) + 1) * 10)


def test_one_more_thing_is_done_to_cached_profiles(profiles: Profiles, tmp_path: Path) -> None:
    """As frozen features of prepared profiles that are cached."""
    expected = everything_of(profiles) + 1
    mapped = cached(profiles, tmp_path, "doubled@1").mapped(lambda x: x + 1)
    np.testing.assert_array_equal(everything_of(mapped), expected)
    # The copy on the disk stays what it was.
    np.testing.assert_array_equal(
        everything_of(cached(profiles, tmp_path, "doubled@1", verify=True)), expected - 1
    )


@pytest.fixture
def parts() -> list[Profiles]:
    """Three data sets of other lengths and chunks that together tell their own row numbers."""
    values = np.arange(N, dtype=np.float32)[:, None] * np.ones(5, dtype=np.float32)
    cuts, rows = (0, 130, 131, N), (50, 7, 64)
    return [
        Profiles(xr.DataArray(values[low:high], dims=("sample", "tof")), r, lambda x: x * 2)
        for low, high, r in zip(cuts[:-1], cuts[1:], rows, strict=True)
    ]


def test_joined_profiles_are_one_after_the_other(parts: list[Profiles]) -> None:
    both = joined(parts)
    assert len(both) == N
    everything = np.ones(N, dtype=bool)
    rows = np.concatenate(rows_of(in_order(both, everything)))
    np.testing.assert_array_equal(rows, np.arange(N))
    chunks = both.chunks_with(everything)
    assert chunks.tolist() == list(range(3 + 1 + 14))
    assert both.count(chunks, everything) == N
    assert both.count(chunks[[2, 3, 17]], everything) == 30 + 1 + 37
    one = np.zeros(N, dtype=bool)
    one[[129, 130, 131]] = True
    assert both.chunks_with(one).tolist() == [2, 3, 4]
    assert both.count(chunks, one) == 3
    assert [r.tolist() for r in rows_of(in_order(both, one))] == [[129], [130], [131]]
    assert joined(parts[:1]) is parts[0]


@pytest.mark.parametrize("cache", [False, True])
def test_joined_profiles_are_shuffled_together(
    parts: list[Profiles], wanted: np.ndarray, tmp_path: Path, cache: bool
) -> None:
    both = cached(joined(parts), tmp_path, "doubled@1") if cache else joined(parts)
    batches = rows_of(shuffled(both, wanted, 32, np.random.default_rng(1), buffer_chunks=4))
    together = np.concatenate(batches)
    np.testing.assert_array_equal(np.sort(together), np.flatnonzero(wanted))
    # Samples of several data sets meet in a batch.
    assert np.mean([len(set(np.searchsorted([130, 131], b, "right"))) > 1 for b in batches]) > 0.3
    phase = (np.arange(N) % 3).astype(np.int8)
    balanced = shuffled(both, wanted, 30, np.random.default_rng(1), phase=phase,
                        shares=(1, 1, 1), samples=2000)  # fmt: skip
    for batch in rows_of(balanced):
        assert np.bincount(phase[batch]).tolist() == [10, 10, 10]


def test_one_more_thing_is_done_to_joined_profiles(parts: list[Profiles]) -> None:
    mapped = joined(parts).mapped(lambda x: x[:, :1] - 1)
    expected = everything_of(joined(parts))[:, :1] - 1
    np.testing.assert_array_equal(everything_of(mapped), expected)


def test_of_joined_profiles_a_part_without_a_wanted_sample_is_not_read(
    parts: list[Profiles],
) -> None:
    def never(_: np.ndarray) -> np.ndarray:
        raise AssertionError("read")

    closed = Profiles(parts[2].intensity, parts[2].rows_per_chunk, never)
    both = joined([*parts[:2], closed])
    wanted = np.arange(N) < 131
    batches = shuffled(both, wanted, 16, np.random.default_rng(0))
    assert np.concatenate(rows_of(batches)).max() == 130


# ---- the cache ---------------------------------------------------------------------------------


def the_file(directory: Path, suffix: str = ".npy") -> Path:
    (path,) = directory.glob(f"*{suffix}")
    return path


def everything_of(profiles: Profiles) -> np.ndarray:
    return np.concatenate(
        [b.profiles for b in in_order(profiles, np.ones(len(profiles), dtype=bool))]
    )


def test_batches_of_a_cache_are_the_same(small_dataset: xr.Dataset, tmp_path: Path) -> None:
    direct = profiles_of(small_dataset, np.sqrt)
    written: list[int] = []
    mapped = cached(direct, tmp_path / "new" / "cache", "sqrt@1", on_chunk=written.append)
    assert sum(written) == len(mapped) == len(direct)
    assert mapped.intensity.sizes == direct.intensity.sizes
    wanted = np.random.default_rng(0).random(len(direct)) < 0.7
    phase = small_dataset.phase.values
    for options in ({}, {"phase": phase, "shares": (1, 2, 1)}, {"samples": 1500}):
        for one, other in zip(
            shuffled(direct, wanted, 48, np.random.default_rng(3), buffer_chunks=3, **options),
            shuffled(mapped, wanted, 48, np.random.default_rng(3), buffer_chunks=3, **options),
            strict=True,
        ):
            np.testing.assert_array_equal(one.rows, other.rows)
            np.testing.assert_array_equal(one.profiles, other.profiles)
    for one, other in zip(in_order(direct, wanted), in_order(mapped, wanted), strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.profiles, other.profiles)


def test_a_cache_is_made_once(profiles: Profiles, tmp_path: Path) -> None:
    cached(profiles, tmp_path, "doubled@1")

    def never(_: np.ndarray) -> np.ndarray:
        raise AssertionError("read again")

    again = cached(Profiles(profiles.intensity, ROWS, never), tmp_path, "doubled@1", verify=True)
    np.testing.assert_array_equal(everything_of(again), everything_of(profiles))
    # Values of another key, here frozen features, are another file.
    features = cached(
        Profiles(profiles.intensity, ROWS, lambda x: x[:, :2] + 1), tmp_path, "features@1"
    )
    assert everything_of(features).shape == (N, 2)
    shutil.rmtree(tmp_path)
    cached(profiles, tmp_path, "doubled@1")


@pytest.mark.parametrize("damage", ["bit", "end", "gone", "json", "key", "half"])
def test_a_damaged_cache_is_made_anew(profiles: Profiles, tmp_path: Path, damage: str) -> None:
    right = everything_of(profiles)
    cached(profiles, tmp_path, "doubled@1")
    values, about = the_file(tmp_path), the_file(tmp_path, ".json")
    content = bytearray(values.read_bytes())
    if damage == "bit":
        content[-5] ^= 1
        values.write_bytes(content)
    elif damage == "end":
        values.write_bytes(content[:-7])
    elif damage == "gone":
        values.unlink()
    elif damage == "json":
        about.write_text("{")
    elif damage == "key":
        about.write_text(json.dumps({**json.loads(about.read_text()), "key": "other"}))
    else:  # ended while it was written
        about.unlink()
        values.with_suffix(".partial").write_bytes(content[:3000])
    np.testing.assert_array_equal(everything_of(cached(profiles, tmp_path, "doubled@1")), right)
    assert the_file(tmp_path).read_bytes()[-100:] == right.tobytes()[-100:]
    assert not list(tmp_path.glob("*.partial"))


def test_all_of_a_cache_is_checked_if_wanted(profiles: Profiles, tmp_path: Path) -> None:
    cached(profiles, tmp_path, "doubled@1")
    path = the_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) - (N - ROWS - 3) * 20] ^= 1  # in the second of sixteen chunks
    path.write_bytes(content)
    wrong = everything_of(cached(profiles, tmp_path, "doubled@1"))
    assert (wrong != everything_of(profiles)).sum() == 1
    whole = everything_of(cached(profiles, tmp_path, "doubled@1", verify=True))
    np.testing.assert_array_equal(whole, everything_of(profiles))


def test_a_full_disk_is_told_and_nothing_is_left(
    profiles: Profiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPARE", 1 << 60)
    with pytest.raises(CacheError, match=r"GB free\..*without a cache"):
        cached(profiles, tmp_path, "doubled@1")
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="Choose another directory"):
        cached(profiles, tmp_path / "file", "doubled@1")


def test_an_error_of_the_reading_is_not_hidden(profiles: Profiles, tmp_path: Path) -> None:
    def fail(values: np.ndarray) -> np.ndarray:
        if values[0, 0] > N / 2:
            raise ValueError("no signal")
        return values

    with pytest.raises(ValueError, match="no signal"):
        cached(Profiles(profiles.intensity, ROWS, fail), tmp_path, "failing@1")
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}


def _make_cache(directory: Path) -> list[int]:
    values = np.ones((20_000, 50), dtype=np.float32)
    written: list[int] = []
    profiles = Profiles(xr.DataArray(values, dims=("sample", "tof")), 50, np.sqrt)
    cached(profiles, directory, "ones@1", on_chunk=written.append)
    return written


def test_of_two_processes_one_makes_it(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        written = sorted(len(w) for w in pool.map(_make_cache, [tmp_path, tmp_path]))
    assert written == [0, 400]


def test_a_cache_takes_no_anonymous_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells how much memory is anonymous")
    one = np.ones((1, 1000), dtype=np.float32)
    values = xr.DataArray(np.broadcast_to(one, (40_000, 1000)), dims=("sample", "tof"))
    before = anonymous()
    mapped = cached(Profiles(values, 256, lambda x: x), tmp_path, "ones@1")  # 160 MB
    wanted = np.ones(len(mapped), dtype=bool)
    most = before
    for _ in shuffled(mapped, wanted, 512, np.random.default_rng(0)):
        most = max(most, anonymous())
    assert most - before < 30_000  # kB


def test_joined_profiles_are_cached_one_by_one(profiles: Profiles, tmp_path: Path) -> None:
    parts = [profiles, Profiles(profiles.intensity[:100], 30, profiles.prepare)]
    both = joined(parts)
    again = cached(both, tmp_path, "both@1")
    assert len(list(tmp_path.glob("*.npy"))) == 2
    np.testing.assert_array_equal(everything_of(again), everything_of(both))
    wanted = np.arange(len(both)) % 3 > 0
    for one, other in zip(
        shuffled(both, wanted, 32, np.random.default_rng(0), buffer_chunks=3),
        shuffled(again, wanted, 32, np.random.default_rng(0), buffer_chunks=3),
        strict=True,
    ):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.profiles, other.profiles)
