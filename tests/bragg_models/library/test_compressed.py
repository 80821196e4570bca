"""Nearest patterns in a compressed library, against exact searches."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from bragg_data.preprocessing import PreprocessingError
from bragg_models.library.compressed import CompressedLibrary, Neighbours, compress, mean_of_nearest
from bragg_models.library.search import LibraryError, library_match


@pytest.fixture(scope="module")
def patterns(small_dataset: xr.Dataset) -> np.ndarray:
    return small_dataset.intensity.values.astype(np.float64)


@pytest.fixture(scope="module")
def library(
    small_dataset: xr.Dataset, tmp_path_factory: pytest.TempPathFactory
) -> CompressedLibrary:
    selected = np.ones(small_dataset.sizes["sample"], dtype=bool)
    return CompressedLibrary.build(
        small_dataset, selected, tmp_path_factory.mktemp("library"), components=24
    )


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    return np.random.default_rng(3).random(710) < 0.3


def test_the_nearest_are_those_of_an_exact_search(
    small_dataset: xr.Dataset,
    patterns: np.ndarray,
    library: CompressedLibrary,
    held_out: np.ndarray,
) -> None:
    generator = np.random.default_rng(4)
    queries = patterns[held_out] + generator.uniform(0, 20, patterns[held_out].shape)
    neighbours = library.only(~held_out).nearest(queries, 1)
    stored = np.flatnonzero(~held_out)
    exact = library_match(small_dataset.isel(sample=stored), queries)
    best = exact.correlation.max(axis=1)
    np.testing.assert_allclose(neighbours.correlation[:, 0], best, atol=2e-6)
    expected = stored[exact.row[np.arange(len(queries)), exact.phase]]
    # Where two stored patterns are equal to rounding, either is correct.
    assert (neighbours.row[:, 0] == expected).mean() > 0.97
    assert neighbours.proven.mean() > 0.9
    assert not held_out[neighbours.row].any()


def test_the_k_nearest_are_those_of_all_products_in_double_precision(
    patterns: np.ndarray, library: CompressedLibrary, held_out: np.ndarray
) -> None:
    roots = np.sqrt(patterns)
    unit = roots / np.linalg.norm(roots, axis=1, keepdims=True)
    products = unit[held_out] @ unit[~held_out].T
    order = np.argsort(-products, axis=1)[:, :5]
    neighbours = library.only(~held_out).nearest(patterns[held_out], 5)
    np.testing.assert_allclose(
        neighbours.correlation, np.take_along_axis(products, order, axis=1), atol=2e-7
    )
    assert (np.diff(neighbours.correlation, axis=1) <= 0).all()
    expected = np.flatnonzero(~held_out)[order]
    assert (neighbours.row == expected).mean() > 0.98
    assert neighbours.proven.mean() > 0.9


def test_only_exact_results_are_called_proven(
    patterns: np.ndarray, library: CompressedLibrary, held_out: np.ndarray
) -> None:
    # With two components and no widening few results are proven, but these are exact.
    part = library.only(~held_out)
    basis = part.basis[:, :2]
    compressed = compress(part.full[part.position], basis)
    coarse = CompressedLibrary(part.rows, basis, compressed, part.full, part.position)
    neighbours = coarse.nearest(patterns[held_out], 1, candidates=4, widening=1)
    exact = part.nearest(patterns[held_out], 1, candidates=len(part.rows))
    assert exact.proven.all()
    correct = neighbours.correlation[:, 0] >= exact.correlation[:, 0] - 1e-6
    assert not correct.all()
    assert 0 < neighbours.proven.sum() < len(correct)
    assert correct[neighbours.proven].all()


def test_the_result_does_not_depend_on_blocks(
    patterns: np.ndarray, library: CompressedLibrary
) -> None:
    at_once = library.nearest(patterns[:100], 3)
    in_pieces = [library.nearest(patterns[low : low + 10], 3) for low in range(0, 100, 10)]
    np.testing.assert_array_equal(at_once.row[:, 0], np.arange(100))
    np.testing.assert_array_equal(at_once.row, np.concatenate([n.row for n in in_pieces]))
    together = np.concatenate([n.correlation for n in in_pieces])
    np.testing.assert_allclose(at_once.correlation, together, atol=1e-7)


def test_the_mean_is_of_neighbours_of_the_nearest_phase() -> None:
    phase = np.array([0, 1, 1, 1])
    cells = np.arange(24, dtype=float).reshape(4, 6)
    rows = np.array([[1, 0, 2, 3], [0, 1, 2, 3]])
    known = Neighbours(rows, np.ones((2, 4)), np.ones(2, dtype=bool))
    nearest_phase, mean = mean_of_nearest(known, phase, cells, 2)
    assert nearest_phase.tolist() == [1, 0]
    np.testing.assert_array_equal(mean, [(cells[1] + cells[2]) / 2, cells[0]])
    _, nearest = mean_of_nearest(known, phase, cells, 1)
    np.testing.assert_array_equal(nearest, cells[[1, 0]])


def test_impossible_searches_are_refused(
    small_dataset: xr.Dataset, library: CompressedLibrary, patterns: np.ndarray, tmp_path: Path
) -> None:
    nothing = np.zeros(710, dtype=bool)
    with pytest.raises(LibraryError, match="Choose a larger part"):
        CompressedLibrary.build(small_dataset, nothing, tmp_path)
    with pytest.raises(LibraryError, match="Choose a larger part"):
        library.only(nothing)
    with pytest.raises(LibraryError, match="library's grid first"):
        library.nearest(patterns[:2, :100])
    with pytest.raises(LibraryError, match="710 patterns, fewer than 800"):
        library.nearest(patterns[:2], 800)
    with pytest.raises(PreprocessingError, match="no"):
        library.nearest(np.zeros((1, 800)))
