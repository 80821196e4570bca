"""Library match against plain numpy, and on noisy copies of stored patterns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from bragg_data.preprocessing import PreprocessingError
from bragg_data.store.schema import samples_of
from bragg_models.library import search as module
from bragg_models.library.search import Library, LibraryError, library_match, mean_of_nearest

ROWS = [0, 17, 63, 64, 300, 709]


@pytest.fixture(scope="module")
def patterns(small_dataset: xr.Dataset) -> np.ndarray:
    return small_dataset.intensity.values.astype(np.float64)


def test_a_stored_pattern_finds_itself(small_dataset: xr.Dataset, patterns: np.ndarray) -> None:
    samples = samples_of(small_dataset)
    # In any scale.
    found = library_match(small_dataset, patterns[ROWS] * 1e-4)
    phase = samples.phase[ROWS]
    np.testing.assert_array_equal(found.phase, phase)
    np.testing.assert_array_equal(found.row[np.arange(len(ROWS)), phase], ROWS)
    np.testing.assert_allclose(found.correlation.max(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(found.best_cells, samples.cells[ROWS])


def test_it_is_the_correlation_over_the_covered_points(
    small_dataset: xr.Dataset, patterns: np.ndarray
) -> None:
    generator = np.random.default_rng(0)
    queries = patterns[[5, 400, 600]] + generator.normal(0, 30, (3, patterns.shape[1]))
    covered = np.ones(queries.shape, dtype=bool)
    covered[0, :200] = False
    covered[1, generator.random(queries.shape[1]) < 0.5] = False
    queries[~covered] = np.nan  # what was not measured may be anything
    found = library_match(small_dataset, queries, covered)
    phase = small_dataset.phase.values
    for query, mask, rows, values in zip(
        queries, covered, found.row, found.correlation, strict=True
    ):
        asked = np.sqrt(np.maximum(query[mask], 0))
        stored = np.sqrt(patterns[:, mask])
        wanted = stored @ asked / np.linalg.norm(stored, axis=1) / np.linalg.norm(asked)
        for code in range(3):
            own = np.flatnonzero(phase == code)
            assert values[code] == pytest.approx(wanted[own].max(), abs=2e-5)
            assert wanted[rows[code]] == pytest.approx(wanted[own].max(), abs=2e-5)


def test_a_noisy_copy_finds_a_near_neighbour(
    small_dataset: xr.Dataset, patterns: np.ndarray
) -> None:
    samples = samples_of(small_dataset)
    generator = np.random.default_rng(1)
    rows = generator.choice(len(patterns), 40, replace=False)
    # Counting noise on a background of a tenth of the maximum, which is then subtracted.
    counts = patterns[rows] * (2000 / patterns[rows].max(axis=1, keepdims=True))
    noisy = generator.poisson(counts + 200.0) - 200.0
    found = library_match(small_dataset, noisy)
    assert (found.phase == samples.phase[rows]).mean() > 0.95
    right = found.phase == samples.phase[rows]
    distance = np.abs(found.best_cells - samples.cells[rows])[right]
    # The grid's steps are 0.002 Å (cubic), 0.01 Å and 1°.
    assert np.median(distance[:, :3]) <= 0.002
    assert distance[:, :3].max() <= 0.02 + 1e-9


def test_only_wanted_rows_are_compared(small_dataset: xr.Dataset, patterns: np.ndarray) -> None:
    wanted = np.ones(len(patterns), dtype=bool)
    wanted[300] = False
    found = library_match(small_dataset, patterns[300:301], wanted=wanted)
    assert 300 not in found.row
    cubic_only = small_dataset.phase.values == 0
    found = library_match(small_dataset, patterns[300:301], wanted=cubic_only)
    assert found.row[0].tolist()[1:] == [-1, -1]
    assert found.correlation[0].tolist()[1:] == [-1.0, -1.0]
    assert np.isnan(found.cells[0, 1:]).all()
    assert found.phase.tolist() == [0]


def test_any_number_of_workers_gives_the_same(
    small_dataset: xr.Dataset, patterns: np.ndarray
) -> None:
    told: list[tuple[int, int]] = []
    one = library_match(small_dataset, patterns[:7], workers=1)
    three = library_match(
        small_dataset, patterns[:7], workers=3, on_chunk=lambda done, of: told.append((done, of))
    )
    np.testing.assert_array_equal(one.row, three.row)
    np.testing.assert_array_equal(one.correlation, three.correlation)
    assert told == [(k, 12) for k in range(1, 13)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (np.ones((1, 7)), "library's grid first"),
        (-np.ones((1, 800)), "nowhere positive"),
        (np.full((1, 800), np.nan), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    small_dataset: xr.Dataset, query: np.ndarray, message: str
) -> None:
    with pytest.raises(LibraryError, match=message):
        library_match(small_dataset, query)


def test_too_little_coverage_is_refused(small_dataset: xr.Dataset, patterns: np.ndarray) -> None:
    covered = np.zeros((1, 800), dtype=bool)
    covered[0, :2] = True
    with pytest.raises(LibraryError, match="fewer than three"):
        library_match(small_dataset, patterns[:1], covered)


@pytest.fixture(scope="module")
def library(small_dataset: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Library:
    every = np.ones(small_dataset.sizes["sample"], dtype=bool)
    return Library.build(small_dataset, every, tmp_path_factory.mktemp("library"), components=24)


@pytest.fixture(scope="module")
def kept_out() -> np.ndarray:
    return np.random.default_rng(3).random(710) < 0.3


def test_many_queries_find_what_an_exact_search_finds(
    small_dataset: xr.Dataset, patterns: np.ndarray, library: Library, kept_out: np.ndarray
) -> None:
    generator = np.random.default_rng(4)
    queries = patterns[kept_out] + generator.uniform(0, 20, patterns[kept_out].shape)
    found = library.only(~kept_out).nearest(queries, 1)
    exact = library_match(small_dataset, queries, wanted=~kept_out)
    best = exact.correlation.max(axis=1)
    np.testing.assert_allclose(found.correlation[:, 0], best, atol=2e-6)
    wanted = exact.row[np.arange(len(queries)), exact.phase]
    # Where two stored patterns are alike to rounding, either is right.
    assert (found.row[:, 0] == wanted).mean() > 0.97
    assert found.proven.mean() > 0.9
    assert not kept_out[found.row].any()


def test_the_k_nearest_are_those_of_all_products_in_double_precision(
    patterns: np.ndarray, library: Library, kept_out: np.ndarray
) -> None:
    roots = np.sqrt(patterns)
    unit = roots / np.linalg.norm(roots, axis=1, keepdims=True)
    products = unit[kept_out] @ unit[~kept_out].T
    order = np.argsort(-products, axis=1)[:, :5]
    found = library.only(~kept_out).nearest(patterns[kept_out], 5)
    np.testing.assert_allclose(
        found.correlation, np.take_along_axis(products, order, axis=1), atol=2e-7
    )
    assert (np.diff(found.correlation, axis=1) <= 0).all()
    wanted = np.flatnonzero(~kept_out)[order]
    assert (found.row == wanted).mean() > 0.98
    assert found.proven.mean() > 0.9


def test_only_proven_answers_are_called_so(
    patterns: np.ndarray, library: Library, kept_out: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With two components and no second look hardly anything can be proven, but what is, is right.
    monkeypatch.setattr(module, "_MORE", 1)
    part = library.only(~kept_out)
    coarse = Library(
        part.rows, part.basis[:, :2],
        module._compressed(part.full[part.place], part.basis[:, :2]), part.full, part.place,
    )  # fmt: skip
    found = coarse.nearest(patterns[kept_out], 1, candidates=4)
    exact = part.nearest(patterns[kept_out], 1, candidates=len(part.rows))
    assert exact.proven.all()
    right = found.correlation[:, 0] >= exact.correlation[:, 0] - 1e-6
    assert not right.all()
    assert 0 < found.proven.sum() < len(right)
    assert right[found.proven].all()


def test_a_library_is_the_same_for_any_number_of_workers_and_blocks(
    patterns: np.ndarray, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = library.nearest(patterns[:100], 3, workers=1)
    monkeypatch.setattr(module, "_QUERIES", 7)
    monkeypatch.setattr(module, "_TILE", 50)
    in_pieces = library.nearest(patterns[:100], 3, workers=3)
    np.testing.assert_array_equal(at_once.row[:, 0], np.arange(100))
    np.testing.assert_array_equal(at_once.row, in_pieces.row)
    np.testing.assert_allclose(at_once.correlation, in_pieces.correlation, atol=1e-7)


def test_the_mean_is_of_neighbours_of_the_nearest_phase() -> None:
    phase = np.array([0, 1, 1, 1])
    cells = np.arange(24, dtype=float).reshape(4, 6)
    rows = np.array([[1, 0, 2, 3], [0, 1, 2, 3]])
    neighbours = module.Neighbours(rows, np.ones((2, 4)), np.ones(2, dtype=bool))
    found, mean = mean_of_nearest(neighbours, phase, cells, 2)
    assert found.tolist() == [1, 0]
    np.testing.assert_array_equal(mean, [(cells[1] + cells[2]) / 2, cells[0]])
    _, nearest = mean_of_nearest(neighbours, phase, cells, 1)
    np.testing.assert_array_equal(nearest, cells[[1, 0]])


def test_what_a_library_cannot_do_is_refused(
    small_dataset: xr.Dataset, library: Library, patterns: np.ndarray, tmp_path: Path
) -> None:
    nothing = np.zeros(710, dtype=bool)
    with pytest.raises(LibraryError, match="Choose a larger part"):
        Library.build(small_dataset, nothing, tmp_path)
    with pytest.raises(LibraryError, match="Choose a larger part"):
        library.only(nothing)
    with pytest.raises(LibraryError, match="library's grid first"):
        library.nearest(patterns[:2, :100])
    with pytest.raises(LibraryError, match="710 patterns, fewer than the 800"):
        library.nearest(patterns[:2], 800)
    with pytest.raises(PreprocessingError, match="no"):
        library.nearest(np.zeros((1, 800)))
