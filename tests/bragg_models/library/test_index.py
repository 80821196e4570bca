"""The library's index: the same matches as from the whole store, and rebuilt when damaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from bragg_data.campaign import Campaign
from bragg_data.refinement.linear_fit import simulator_of
from bragg_data.simulation.kinematic import Simulator
from bragg_models.library.index import IndexUnavailableError, LibraryIndex, open_index
from bragg_models.library.search import LibraryError, library_match
from tests.damage import flip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indices")


@pytest.fixture(scope="module")
def index(small_dataset: xr.Dataset, small_campaign: Campaign, directory: Path) -> LibraryIndex:
    simulator = simulator_of(small_campaign)
    seen: list[int] = []
    built = open_index(small_dataset, simulator, directory, on_batch=seen.append)
    assert sum(seen) == small_dataset.sizes["sample"]
    again = open_index(small_dataset, simulator, directory, on_batch=seen.append)
    assert sum(seen) == small_dataset.sizes["sample"]  # it is not built again
    np.testing.assert_array_equal(again.components, built.components)
    return built


def noisy(dataset: xr.Dataset, count: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    rows = generator.choice(dataset.sizes["sample"], count, replace=False)
    patterns = dataset["intensity"].values[np.sort(rows)].astype(float)
    patterns /= patterns.max(axis=1, keepdims=True)
    return patterns + generator.normal(0, 0.01, patterns.shape)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 150])
def test_matches_are_those_of_the_store(
    index: LibraryIndex, small_dataset: xr.Dataset, cut: int
) -> None:
    queries = noisy(small_dataset, 40)
    covered = np.ones(queries.shape, dtype=bool)
    covered[::2, :cut] = False
    covered[1::2, queries.shape[1] - cut :] = False
    matches, exact = index.match(queries, covered), library_match(small_dataset, queries, covered)
    np.testing.assert_array_equal(matches.row, exact.row)
    np.testing.assert_allclose(matches.correlation, exact.correlation, atol=2e-6)
    np.testing.assert_array_equal(matches.cells, exact.cells)


def test_unusable_queries_are_refused(index: LibraryIndex) -> None:
    points = len(index.basis)
    with pytest.raises(LibraryError, match="bring the profiles to the library's grid"):
        index.match(np.ones((1, points + 1)))
    with pytest.raises(LibraryError, match="nowhere positive"):
        index.match(-np.ones((1, points)))


@pytest.mark.parametrize("ending", [".json", "-basis.npz", ".npy"])
def test_a_damaged_index_is_rebuilt(
    index: LibraryIndex, small_dataset: xr.Dataset, directory: Path, ending: str
) -> None:
    paths = [path for path in directory.iterdir() if path.name.endswith(ending)]
    (path,) = paths
    path.unlink()  # a mapped file must not become shorter
    path.write_bytes(b"{")
    again = open_index(small_dataset, index.simulator, directory)
    np.testing.assert_array_equal(again.components, index.components)


def test_a_flipped_bit_of_the_basis_is_noticed(
    index: LibraryIndex, small_dataset: xr.Dataset, directory: Path
) -> None:
    (path,) = directory.glob("*-basis.npz")
    flip(path)
    again = open_index(small_dataset, index.simulator, directory)
    np.testing.assert_array_equal(again.basis, index.basis)


def test_a_directory_that_cannot_be_written_is_refused(
    index: LibraryIndex, small_dataset: xr.Dataset, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IndexUnavailableError, match=r"cannot be kept in .*file"):
        open_index(small_dataset, index.simulator, tmp_path / "file")


def test_patterns_of_another_simulation_have_no_index(
    small_dataset: xr.Dataset, small_campaign: Campaign, tmp_path: Path
) -> None:
    c = small_campaign
    other = Simulator(c.phases, c.instrument, c.grid, size=0.2, microstrain=c.microstrain)
    with pytest.raises(IndexUnavailableError, match="does not reproduce the stored patterns"):
        open_index(small_dataset, other, tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_few_candidates_are_enough(index: LibraryIndex, small_dataset: xr.Dataset) -> None:
    queries = noisy(small_dataset, 40)
    covered = np.ones(queries.shape, dtype=bool)
    covered[:20, :150] = False
    exact = library_match(small_dataset, queries, covered)
    matches = replace(index, shortlist=48, candidates=4).match(queries, covered)
    best = np.arange(len(queries)), exact.phase
    np.testing.assert_array_equal(matches.row[best], exact.row[best])
    assert np.abs(exact.correlation - matches.correlation).max() < 1e-3


def test_profiles_together_have_the_matches_of_each(
    index: LibraryIndex, small_dataset: xr.Dataset
) -> None:
    queries = noisy(small_dataset, 40)
    covered = np.random.default_rng(2).random(queries.shape) < 0.4
    covered[::3] = True
    together = index.match(queries, covered)
    for query, mask, row in zip(queries, covered, together.row, strict=True):
        np.testing.assert_array_equal(index.match(query[None], mask[None]).row, [row])
