"""Library match against plain numpy, and on noisy copies of stored patterns."""

import numpy as np
import pytest
import xarray as xr

from bragg_data.store.schema import samples_of
from bragg_models.library.search import LibraryError, library_match

ROWS = [0, 17, 63, 64, 300, 709]


@pytest.fixture(scope="module")
def patterns(small_dataset: xr.Dataset) -> np.ndarray:
    return small_dataset.intensity.values.astype(np.float64)


def test_a_stored_pattern_matches_itself(small_dataset: xr.Dataset, patterns: np.ndarray) -> None:
    samples = samples_of(small_dataset)
    # On any scale.
    matches = library_match(small_dataset, patterns[ROWS] * 1e-4)
    phase = samples.phase[ROWS]
    np.testing.assert_array_equal(matches.phase, phase)
    np.testing.assert_array_equal(matches.row[np.arange(len(ROWS)), phase], ROWS)
    np.testing.assert_allclose(matches.correlation.max(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(matches.best_cells, samples.cells[ROWS])


def test_the_correlation_is_over_the_covered_points(
    small_dataset: xr.Dataset, patterns: np.ndarray
) -> None:
    generator = np.random.default_rng(0)
    queries = patterns[[5, 400, 600]] + generator.normal(0, 30, (3, patterns.shape[1]))
    covered = np.ones(queries.shape, dtype=bool)
    covered[0, :200] = False
    covered[1, generator.random(queries.shape[1]) < 0.5] = False
    queries[~covered] = np.nan  # values that were not measured are ignored
    matches = library_match(small_dataset, queries, covered)
    phase = small_dataset.phase.values
    for query, mask, rows, values in zip(
        queries, covered, matches.row, matches.correlation, strict=True
    ):
        root = np.sqrt(np.maximum(query[mask], 0))
        stored = np.sqrt(patterns[:, mask])
        expected = stored @ root / np.linalg.norm(stored, axis=1) / np.linalg.norm(root)
        for code in range(3):
            of_phase = np.flatnonzero(phase == code)
            assert values[code] == pytest.approx(expected[of_phase].max(), abs=2e-5)
            assert expected[rows[code]] == pytest.approx(expected[of_phase].max(), abs=2e-5)


def test_a_noisy_copy_matches_a_near_neighbour(
    small_dataset: xr.Dataset, patterns: np.ndarray
) -> None:
    samples = samples_of(small_dataset)
    generator = np.random.default_rng(1)
    rows = generator.choice(len(patterns), 40, replace=False)
    # Counting noise on a background of a tenth of the maximum, which is then subtracted.
    counts = patterns[rows] * (2000 / patterns[rows].max(axis=1, keepdims=True))
    noisy = generator.poisson(counts + 200.0) - 200.0
    matches = library_match(small_dataset, noisy)
    assert (matches.phase == samples.phase[rows]).mean() > 0.95
    right = matches.phase == samples.phase[rows]
    distance = np.abs(matches.best_cells - samples.cells[rows])[right]
    # The grid's steps are 0.002 Å (cubic), 0.01 Å and 1°.
    assert np.median(distance[:, :3]) <= 0.002
    assert distance[:, :3].max() <= 0.02 + 1e-9


def test_phases_without_patterns_have_no_match(
    small_dataset: xr.Dataset, patterns: np.ndarray
) -> None:
    cubic_only = small_dataset.isel(sample=np.flatnonzero(small_dataset.phase.values == 0))
    matches = library_match(cubic_only, patterns[300:301])
    assert matches.row[0].tolist()[1:] == [-1, -1]
    assert matches.correlation[0].tolist()[1:] == [-1.0, -1.0]
    assert np.isnan(matches.cells[0, 1:]).all()
    assert matches.phase.tolist() == [0]


def test_any_number_of_workers_gives_the_same(
    small_dataset: xr.Dataset, patterns: np.ndarray
) -> None:
    progress: list[tuple[int, int]] = []
    single = library_match(small_dataset, patterns[:7], workers=1)
    three = library_match(
        small_dataset,
        patterns[:7],
        workers=3,
        on_chunk=lambda done, of: progress.append((done, of)),
    )
    np.testing.assert_array_equal(single.row, three.row)
    np.testing.assert_array_equal(single.correlation, three.correlation)
    assert progress == [(k, 12) for k in range(1, 13)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (np.ones((1, 7)), "library's grid first"),
        (-np.ones((1, 800)), "nowhere positive"),
        (np.full((1, 800), np.nan), "not finite"),
    ],
)
def test_unusable_queries_are_refused(
    small_dataset: xr.Dataset, query: np.ndarray, message: str
) -> None:
    with pytest.raises(LibraryError, match=message):
        library_match(small_dataset, query)


def test_too_little_coverage_is_refused(small_dataset: xr.Dataset, patterns: np.ndarray) -> None:
    covered = np.zeros((1, 800), dtype=bool)
    covered[0, :2] = True
    with pytest.raises(LibraryError, match="fewer than three"):
        library_match(small_dataset, patterns[:1], covered)
