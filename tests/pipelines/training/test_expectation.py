"""What to expect of a model, from predictions made by hand."""

import json
from dataclasses import replace

import gemmi
import numpy as np
import pytest

from bragg_data.crystallography.cell import lattice_from_space_group
from bragg_models.predictors import Prediction
from bragg_models.targets import Targets
from pipelines.training.expectation import Expectation, expectation

LATTICES = tuple(
    lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol))
    for symbol in ("P m -3 m", "P 4 m m")
)
TARGETS = Targets(("cubic", "tetragonal"), LATTICES, np.full((2, 2), 4.0), np.ones((2, 2)))
PHASE = np.array([0, 0, 1, 1])
CELLS = np.array(
    [[4.0] * 3 + [90.0] * 3, [5.0] * 3 + [90.0] * 3, [4, 4, 8, 90, 90, 90], [4, 4, 2, 90, 90, 90]]
)


def prediction(**values: np.ndarray | None) -> Prediction:
    """The second is of the wrong phase; a is 0.004, 0.008 and 0 off, c 0.08 and 0."""
    cells = CELLS.copy()
    cells[0, :3] += 0.004
    cells[1, :3] += 1.0
    cells[2, :2] += 0.008
    cells[2, 2] -= 0.08
    half = np.where(np.arange(6) < 3, 0.005, np.nan)  # the errors of the third are larger
    intervals = np.stack([cells - half, cells + half], axis=2)
    accepted = np.array([True, False, True, True])
    fields = {"intervals": intervals, "accepted": accepted, **values}
    return Prediction(np.full((4, 2), 0.5), np.array([0, 1, 1, 1]), cells, **fields)


def test_values_of_handwritten_predictions() -> None:
    expected = expectation(TARGETS, prediction(), PHASE, CELLS, 0.9)
    assert expected.accuracy == 0.75
    # Of the right phase's free parameters alone: b and c of a cubic cell repeat a.
    assert expected.mae == {"a": pytest.approx(0.012 / 3), "c": pytest.approx(0.04)}
    assert expected.relative_mae == pytest.approx((0.001 + 0.002 + 0.01) / 5)
    assert expected.coverage == pytest.approx(3 / 5)
    assert expected.accepted == 0.75
    assert expected.rejected == 0.9
    assert "mae" not in expected.metrics
    assert expected.metrics["accuracy"] == 0.75


def test_without_intervals_or_a_right_phase() -> None:
    none = expectation(TARGETS, prediction(intervals=None, accepted=None), PHASE, CELLS, 0.0)
    assert (none.coverage, none.accepted) == (0.0, 1.0)
    wrong = expectation(TARGETS, prediction(), np.array([1, 0, 0, 0]), CELLS, 0.0)
    assert (wrong.accuracy, wrong.mae) == (0.0, {})
    assert (wrong.relative_mae, wrong.coverage) == (None, None)
    assert str(wrong) == (
        "phase right in 0.0%; genuine samples accepted in 75.0%, foreign ones rejected in 0.0%"
    )


def test_phases_between_which_profiles_do_not_decide_are_named() -> None:
    assert expectation(TARGETS, prediction(), PHASE, CELLS, 0.9).undecided == {
        "cubic and tetragonal": 0.0
    }
    probabilities = np.array([[0.95, 0.05], [0.2, 0.8], [0.0, 1.0], [0.11, 0.89]])
    some = replace(prediction(), probabilities=probabilities)
    assert expectation(TARGETS, some, PHASE, CELLS, 0.9).undecided == {"cubic and tetragonal": 0.5}
    sure = replace(prediction(), probabilities=np.eye(2)[PHASE])
    assert expectation(TARGETS, sure, PHASE, CELLS, 0.9).undecided == {}


def test_json_round_trip_and_the_sentence() -> None:
    expected = expectation(TARGETS, prediction(), PHASE, CELLS, 0.9)
    assert Expectation.from_json(json.loads(json.dumps(expected.to_json()))) == expected
    assert str(expected) == (
        "a within 0.004 Å, c within 0.04 Å on average; 60% of the parameters inside their 90 % "
        "intervals; phase right in 75.0%; genuine samples accepted in 75.0%, foreign ones rejected "
        "in 90.0%"
    )
