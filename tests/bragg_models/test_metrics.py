"""Eq. (1) of the paper against numbers computed by hand and numbers that the paper prints."""

import itertools

import gemmi
import numpy as np
import pytest
import scipy.stats

from bragg_data.crystallography.cell import lattice_from_space_group
from bragg_models.metrics import Errors, bootstrap_intervals, errors, squared_errors, summary
from bragg_models.targets import Targets

CUBIC, TETRAGONAL, TRIGONAL, DIAMOND = range(4)
GROUPS = ("P m -3 m", "P 4 m m", "R 3 m:R", "F d -3 m")


@pytest.fixture
def targets() -> Targets:
    lattices = tuple(
        lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol)) for symbol in GROUPS
    )
    return Targets(
        ("cubic", "tetragonal", "trigonal", "diamond"), lattices, np.zeros(3), np.ones(3)
    )


def score(
    targets: Targets,
    truth: list[tuple[int, float, float, float]],
    predicted: list[tuple[int, float, float, float]],
) -> dict[str, dict[str, float]]:
    return summary(targets, total(targets, truth, predicted))


def total(
    targets: Targets,
    truth: list[tuple[int, float, float, float]],
    predicted: list[tuple[int, float, float, float]],
) -> Errors:
    def cells(rows: list[tuple[int, float, float, float]]) -> np.ndarray:
        return np.array([(a, a, c, alpha, alpha, alpha) for _, a, c, alpha in rows])

    def phases(rows: list[tuple[int, float, float, float]]) -> np.ndarray:
        return np.array([row[0] for row in rows])

    return errors(targets, phases(truth), cells(truth), phases(predicted), cells(predicted))


def test_a_constant_prediction_on_the_two_published_tetragonal_examples(targets: Targets) -> None:
    # Fig. 6 of the paper: (3.9857, 4.0277) and (3.9870, 4.0279); predicting (4, 4) for both.
    truth = [(TETRAGONAL, 3.9857, 4.0277, 90.0), (TETRAGONAL, 3.9870, 4.0279, 90.0)]
    predicted = [(TETRAGONAL, 4.0, 4.0, 90.0)] * 2
    first = 0.0143**2 + 0.0277**2
    second = 0.0130**2 + 0.0279**2
    assert score(targets, truth, predicted)["all"]["mse_paper"] == pytest.approx(
        (first + second) / 2
    )
    assert first == pytest.approx(9.7e-4, rel=5e-3)
    assert second == pytest.approx(9.5e-4, rel=5e-3)


def test_alpha_is_in_radians_in_eq_1_and_in_degrees_alone(targets: Targets) -> None:
    scores = score(targets, [(TRIGONAL, 4.0, 4.0, 89.0)], [(TRIGONAL, 4.0, 4.0, 90.0)])["trigonal"]
    assert scores["mse_paper"] == pytest.approx((np.pi / 180) ** 2)
    assert scores["mae_alpha"] == pytest.approx(1.0)
    assert scores["mae_a"] == 0.0


def test_both_readings_of_the_cubic_a(targets: Targets) -> None:
    scores = score(targets, [(CUBIC, 4.0, 4.0, 90.0)], [(CUBIC, 4.01, 4.01, 90.0)])["cubic"]
    assert scores["mse_paper"] == pytest.approx(2e-4)
    assert scores["mse_paper_free"] == pytest.approx(1e-4)
    assert scores["mae_a"] == pytest.approx(0.01)
    assert "mae_c" not in scores
    # A tetragonal c is free: there both readings are the same.
    scores = score(targets, [(TETRAGONAL, 4, 4.1, 90)], [(TETRAGONAL, 4, 4.2, 90)])["tetragonal"]
    assert scores["mse_paper"] == scores["mse_paper_free"] == pytest.approx(0.01)


def test_mean_errors_are_over_the_samples_in_which_a_parameter_is_free(targets: Targets) -> None:
    truth = [(CUBIC, 4.0, 4.0, 90.0)] * 3 + [(TRIGONAL, 4.0, 4.0, 85.0)]
    predicted = [(CUBIC, 4.0, 4.0, 90.0)] * 3 + [(TRIGONAL, 4.2, 4.2, 85.5)]
    scores = score(targets, truth, predicted)["all"]
    assert scores["n"] == 4
    assert scores["mae_alpha"] == pytest.approx(0.5)
    assert scores["mae_a"] == pytest.approx(0.05)


def test_accuracy_of_phases_and_of_crystal_systems(targets: Targets) -> None:
    truth = [(CUBIC, 4.0, 4.0, 90.0)] * 4 + [(TETRAGONAL, 4.0, 4.1, 90.0)]
    predicted = [(CUBIC, 4.0, 4.0, 90.0)] * 2 + [(DIAMOND, 4.0, 4.0, 90.0)] * 2 + [truth[4]]
    scores = score(targets, truth, predicted)
    assert scores["all"]["accuracy"] == 1.0  # both are cubic
    assert scores["all"]["accuracy_phase"] == pytest.approx(3 / 5)
    assert scores["cubic"]["accuracy_phase"] == pytest.approx(1 / 2)
    wrong = score(targets, truth, [(TRIGONAL, 4.0, 4.0, 90.0)] * 5)
    assert wrong["all"]["accuracy"] == 0.0
    assert "trigonal" not in wrong  # no sample is


def test_chunks_add_up_to_the_whole(targets: Targets) -> None:
    generator = np.random.default_rng(1)
    n = 1000
    phase, predicted = generator.integers(4, size=(2, n))
    cells, predicted_cells = generator.uniform(3, 5, (2, n, 6))
    at_once = errors(targets, phase, cells, predicted, predicted_cells)
    cuts = [0, 1, 7, 512, n]
    parts = [
        errors(targets, phase[i:j], cells[i:j], predicted[i:j], predicted_cells[i:j])
        for i, j in itertools.pairwise(cuts)
    ]
    added = sum(parts[1:], start=parts[0])
    np.testing.assert_array_equal(added.confusion, at_once.confusion)
    np.testing.assert_allclose(added.squared, at_once.squared, rtol=1e-13)
    np.testing.assert_allclose(added.absolute, at_once.absolute, rtol=1e-13)
    assert at_once.confusion.sum() == n


def test_squared_errors_of_samples_have_the_scores_as_their_means(targets: Targets) -> None:
    generator = np.random.default_rng(2)
    n = 500
    phase, predicted = generator.integers(4, size=(2, n))
    cells, predicted_cells = generator.uniform(3, 5, (2, n, 6))
    literal, free = squared_errors(targets, phase, cells, predicted_cells)
    scores = summary(targets, errors(targets, phase, cells, predicted, predicted_cells))
    assert literal.shape == free.shape == (n,)
    assert literal.mean() == pytest.approx(scores["all"]["mse_paper"])
    assert free.mean() == pytest.approx(scores["all"]["mse_paper_free"])
    trigonal = phase == TRIGONAL
    assert literal[trigonal].mean() == pytest.approx(scores["trigonal"]["mse_paper"])
    assert free[trigonal].mean() == pytest.approx(scores["trigonal"]["mse_paper_free"])


def test_squared_errors_by_hand(targets: Targets) -> None:
    cells = np.array([[4.0, 4, 4, 90, 90, 90]] * 2)
    predicted_cells = np.array([[4.1, 4.1, 4.1, 90, 90, 90], [4.1, 4.1, 4.2, 91, 90, 90]])
    literal, free = squared_errors(targets, np.array([CUBIC, TETRAGONAL]), cells, predicted_cells)
    with_alpha = 0.01 + 0.04 + (np.pi / 180) ** 2
    np.testing.assert_allclose(literal, [0.02, with_alpha], rtol=1e-12)
    np.testing.assert_allclose(free, [0.01, with_alpha], rtol=1e-12)


def test_bootstrap_intervals_are_those_of_scipy() -> None:
    generator = np.random.default_rng(3)
    values = np.stack([generator.normal(5, 1, 60), generator.lognormal(-12, 2, 60)], axis=1)
    intervals = bootstrap_intervals(values, resamples=20_000, seed=4)
    for column in range(2):
        expected = scipy.stats.bootstrap(
            (values[:, column],),
            np.mean,
            method="percentile",
            n_resamples=20_000,
            rng=np.random.default_rng(5),
        ).confidence_interval
        np.testing.assert_allclose(intervals[:, column], expected, rtol=0.02)


def test_bootstrap_intervals_cover_the_mean() -> None:
    generator = np.random.default_rng(6)
    many = generator.normal(2.0, 1.0, (100, 400))  # columns are repetitions
    low, high = bootstrap_intervals(many, resamples=500, seed=7)
    assert ((low < 2.0) & (high > 2.0)).mean() == pytest.approx(0.95, abs=0.04)
    width = 2 * 1.96 / np.sqrt(100)
    assert np.median(high - low) == pytest.approx(width, rel=0.1)


def test_bootstrap_intervals_are_reproducible_and_the_same_resamples_for_all() -> None:
    values = np.random.default_rng(8).exponential(size=(2000, 1))
    first = bootstrap_intervals(values, resamples=77, seed=1)
    both = bootstrap_intervals(np.hstack([values, 3 * values]), resamples=77, seed=1)
    np.testing.assert_allclose(both, np.hstack([first, 3 * first]), rtol=1e-12)
    assert (bootstrap_intervals(values, resamples=77, seed=2) != first).all()
    narrow = bootstrap_intervals(values, resamples=77, level=0.5, seed=1)
    assert first[0] < narrow[0] < narrow[1] < first[1]
