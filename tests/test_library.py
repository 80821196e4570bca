"""Library match against plain numpy, and on noisy copies of stored patterns."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from bragg_data.schema import samples_of
from bragg_models.library import LibraryError, library_match

pytest_plugins = ("tests.small_store",)

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
