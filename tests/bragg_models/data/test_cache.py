"""The cache of prepared profiles: same batches, rebuilt when damaged, bounded memory."""

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from bragg_models.data.batches import (
    Balance,
    Batch,
    BatchSettings,
    Profiles,
    in_order,
    joined,
    profiles_of,
    shuffled,
)
from bragg_models.data.cache import CacheError, cached
from tests.bragg_models.data.conftest import ROWS, N


def assert_same_batches(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.profiles, b.profiles)


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
    selected = np.random.default_rng(0).random(len(direct)) < 0.7
    phase = small_dataset.phase.values
    for balance, samples in ((None, None), (Balance(phase, (1, 2, 1)), None), (None, 1500)):
        settings = BatchSettings(48, 3, samples)
        assert_same_batches(
            shuffled(direct, selected, settings, np.random.default_rng(3), balance),
            shuffled(mapped, selected, settings, np.random.default_rng(3), balance),
        )
    assert_same_batches(in_order(direct, selected), in_order(mapped, selected))


def test_a_cache_is_built_once(profiles: Profiles, tmp_path: Path) -> None:
    cached(profiles, tmp_path, "doubled@1")

    def never(_: np.ndarray) -> np.ndarray:
        raise AssertionError("read again")

    again = cached(Profiles(profiles.intensity, ROWS, never), tmp_path, "doubled@1")
    np.testing.assert_array_equal(everything_of(again), everything_of(profiles))
    # Values of another key, here frozen features, are another file.
    features = cached(
        Profiles(profiles.intensity, ROWS, lambda x: x[:, :2] + 1), tmp_path, "features@1"
    )
    assert everything_of(features).shape == (N, 2)
    shutil.rmtree(tmp_path)
    cached(profiles, tmp_path, "doubled@1")


def test_half_precision_stays_half_precision(profiles: Profiles, tmp_path: Path) -> None:
    halves = profiles.mapped(lambda x: x[:, :3] / 7, np.float16)
    for _ in range(2):
        again = cached(halves, tmp_path, "halves@1")
        assert again.prepared is not None
        assert again.prepared.dtype == np.float16
        np.testing.assert_array_equal(everything_of(again), everything_of(halves))
    assert the_file(tmp_path).stat().st_size < 2 * 3 * N + 200


@pytest.mark.parametrize("damage", ["bit", "end", "gone", "json", "key", "half"])
def test_a_damaged_cache_is_rebuilt(profiles: Profiles, tmp_path: Path, damage: str) -> None:
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


@pytest.mark.parametrize("chunk", range(11))
def test_a_flipped_bit_is_noticed_in_every_chunk(tmp_path: Path, chunk: int) -> None:
    values = np.random.default_rng(0).random((110, 40), dtype=np.float32)
    right = Profiles(xr.DataArray(values, dims=("sample", "tof")), 10, np.sqrt)
    cached(right, tmp_path, "roots@1")
    content = bytearray(the_file(tmp_path).read_bytes())
    content[-(110 * 40 * 4) + chunk * 1600 + 800] ^= 1
    the_file(tmp_path).write_bytes(content)
    again = cached(right, tmp_path, "roots@1")
    np.testing.assert_array_equal(again.prepared, np.sqrt(values))


def test_a_full_disk_is_reported_and_nothing_is_left(profiles: Profiles, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"GB free\..*without a cache"):
        cached(profiles, tmp_path, "doubled@1", spare=1 << 60)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="Choose another directory"):
        cached(profiles, tmp_path / "file", "doubled@1")


def test_an_error_in_reading_is_not_hidden(profiles: Profiles, tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_of_two_processes_only_the_first_builds_it(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        written = sorted(len(w) for w in pool.map(_make_cache, [tmp_path, tmp_path]))
    assert written == [0, 400]


def test_a_cache_takes_no_anonymous_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux reports anonymous memory")
    row = np.ones((1, 1000), dtype=np.float32)
    values = xr.DataArray(np.broadcast_to(row, (40_000, 1000)), dims=("sample", "tof"))
    before = anonymous()
    mapped = cached(Profiles(values, 256, lambda x: x), tmp_path, "ones@1")  # 160 MB
    selected = np.ones(len(mapped), dtype=bool)
    most = before
    for _ in shuffled(mapped, selected, BatchSettings(512), np.random.default_rng(0)):
        most = max(most, anonymous())
    assert most - before < 30_000  # kB


def test_joined_profiles_are_cached_separately(profiles: Profiles, tmp_path: Path) -> None:
    parts = [profiles, Profiles(profiles.intensity[:100], 30, profiles.prepare)]
    both = joined(parts)
    again = joined([cached(part, tmp_path, f"part {n}") for n, part in enumerate(parts)])
    assert len(list(tmp_path.glob("*.npy"))) == 2
    np.testing.assert_array_equal(everything_of(again), everything_of(both))
    selected = np.arange(len(both)) % 3 > 0
    assert_same_batches(
        shuffled(both, selected, BatchSettings(32, 3), np.random.default_rng(0)),
        shuffled(again, selected, BatchSettings(32, 3), np.random.default_rng(0)),
    )
