"""The library's index: it finds what reading the whole store finds, and is made again when gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from bragg_data.campaign import Campaign
from bragg_data.refinement.linear_fit import simulator_of
from bragg_data.simulation.kinematic import Simulator
from bragg_models.library import index as library_index
from bragg_models.library.index import IndexUnavailableError, LibraryIndex, build_index, open_index
from bragg_models.library.search import LibraryError, library_match


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indices")


@pytest.fixture(scope="module")
def index(small_dataset: xr.Dataset, small_campaign: Campaign, directory: Path) -> LibraryIndex:
    simulator = simulator_of(small_campaign)
    assert open_index(small_dataset, simulator, directory) is None
    seen: list[int] = []
    built = build_index(small_dataset, simulator, directory, on_batch=seen.append)
    assert sum(seen) == small_dataset.sizes["sample"]
    return built


def noisy(dataset: xr.Dataset, count: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    rows = generator.choice(dataset.sizes["sample"], count, replace=False)
    patterns = dataset["intensity"].values[np.sort(rows)].astype(float)
    patterns /= patterns.max(axis=1, keepdims=True)
    return patterns + generator.normal(0, 0.01, patterns.shape)


@pytest.mark.parametrize("cut", [0, 150])
def test_it_finds_what_the_store_holds(
    index: LibraryIndex, small_dataset: xr.Dataset, cut: int
) -> None:
    queries = noisy(small_dataset, 40)
    covered = np.ones(queries.shape, dtype=bool)
    covered[::2, :cut] = False
    covered[1::2, queries.shape[1] - cut :] = False
    found, exact = index.match(queries, covered), library_match(small_dataset, queries, covered)
    np.testing.assert_array_equal(found.row, exact.row)
    np.testing.assert_allclose(found.correlation, exact.correlation, atol=2e-6)
    np.testing.assert_array_equal(found.cells, exact.cells)


def test_what_cannot_be_compared_is_refused(index: LibraryIndex) -> None:
    points = len(index.basis)
    with pytest.raises(LibraryError, match="bring the profiles to the library's grid"):
        index.match(np.ones((1, points + 1)))
    with pytest.raises(LibraryError, match="nowhere positive"):
        index.match(-np.ones((1, points)))


@pytest.mark.parametrize("name", ["index.json", "basis.npy", "components.npy", "squares.npy"])
def test_what_is_damaged_is_made_again(
    index: LibraryIndex, small_dataset: xr.Dataset, directory: Path, name: str
) -> None:
    (place,) = (path for path in directory.iterdir() if path.is_dir())
    (place / name).unlink()  # a mapped file must not become shorter
    (place / name).write_bytes(b"{")
    assert open_index(small_dataset, index.simulator, directory) is None
    again = build_index(small_dataset, index.simulator, directory)
    np.testing.assert_array_equal(again.components, index.components)


def test_a_place_that_cannot_be_written_is_told(
    index: LibraryIndex, small_dataset: xr.Dataset, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IndexUnavailableError, match=r"cannot be kept in .*file"):
        build_index(small_dataset, index.simulator, tmp_path / "file")


def test_other_patterns_than_the_simulator_s_have_no_index(
    small_dataset: xr.Dataset, small_campaign: Campaign, tmp_path: Path
) -> None:
    c = small_campaign
    other = Simulator(c.phases, c.instrument, c.grid, size=0.2, microstrain=c.microstrain)
    with pytest.raises(IndexUnavailableError, match="does not make the stored patterns"):
        build_index(small_dataset, other, tmp_path)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_few_candidates_are_enough(
    index: LibraryIndex, small_dataset: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = noisy(small_dataset, 40)
    exact = library_match(small_dataset, queries)
    monkeypatch.setattr(library_index, "CANDIDATES", 8)
    assert (index.match(queries).phase == exact.phase).all()
