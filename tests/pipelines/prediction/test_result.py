"""The result of a prediction: plain values, JSON, schema, tables."""

import io
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest

from bragg_data.campaign import Campaign
from bragg_models.predictors import Prediction
from pipelines.prediction.acceptance import assess_acceptance, estimate_intervals
from pipelines.prediction.render import write_csv
from pipelines.prediction.result import (
    Acceptance,
    Cell,
    Interval,
    Intervals,
    LibraryCandidate,
    LibraryMatch,
    PredictionResult,
    RefinedPhase,
    Refinement,
    json_schema,
    to_json,
)
from pipelines.prediction.workflow import result_from_prediction

ROOT = Path(__file__).parents[3]
TETRAGONAL = Cell(3.99, 3.99, 4.03, 90.0, 90.0, 90.0)
CUBIC = Cell(4.0, 4.0, 4.0, 90.0, 90.0, 90.0)


@pytest.fixture
def result() -> PredictionResult:
    su = Cell(1e-4, 1e-4, 2e-4, 0.0, 0.0, 0.0)
    refined = RefinedPhase(
        crystal_system="tetragonal",
        phase="tetragonal",
        cell=TETRAGONAL,
        su=su,
        free_parameters=("a", "c"),
        rwp=0.05,
        reduced_chi2=1.1,
        parameters={"u_scale": 1.2, "size": 0.8, "shift_1": 0.01},
        parameters_su={"u_scale": 0.1, "size": 0.2, "shift_1": 0.005},
        explained=0.99,
        intensities="structure",
        converged=True,
    )
    return PredictionResult(
        crystal_system="tetragonal",
        phase="tetragonal",
        probabilities={"cubic": 0.1, "tetragonal": 0.9},
        cell=TETRAGONAL,
        model="models:/small/1",
        file="<sample>.xye",
        bank=4,
        warnings=("No calibration & no hope.",),
        interval_estimates=Intervals({"a": Interval(3.98, 4.0), "c": None}, {"c": "Too wide."}),
        acceptance=Acceptance(True, (), 0.02, 0.15),
        library_match=LibraryMatch(
            "small-v1",
            (
                LibraryCandidate("tetragonal", "tetragonal", 0.97, TETRAGONAL),
                LibraryCandidate("cubic", "cubic", 0.93, CUBIC),
            ),
        ),
        refined=Refinement((refined,)),
    )


def test_the_published_schema_is_current() -> None:
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    published = ROOT / "docs" / "reference" / "prediction-result.schema.json"
    assert published.read_text(encoding="utf-8") == text


def test_json_conforms_to_the_schema_and_has_the_keys_of_the_version_before(
    result: PredictionResult,
) -> None:
    document = json.loads(json.dumps(to_json(result), allow_nan=False))
    jsonschema.validate(document, json_schema())
    assert document["cell"] == asdict(TETRAGONAL)
    assert document["units"]["a"] == "Å"
    assert document["units"]["alpha"] == "°"
    assert document["intervals"] == {"a": [3.98, 4.0], "c": None}
    assert document["not_determined"] == {"c": "Too wide."}
    assert (document["accepted"], document["reasons"]) == (True, [])
    match = document["library_match"]
    assert (match["phase"], match["correlation"], match["snapshot"]) == (
        "tetragonal",
        0.97,
        "small-v1",
    )
    assert [candidate["phase"] for candidate in match["candidates"]] == ["tetragonal", "cubic"]
    refined = document["refined"]
    assert (refined["rwp"], refined["u_scale"], refined["shift_1"]) == (0.05, 1.2, 0.01)
    assert refined["others_su"] == refined["parameters_su"]  # deprecated
    assert refined["free_parameters"] == ["a", "c"]
    assert refined["candidates"][0]["size"] == 0.8
    bare = to_json(PredictionResult("cubic", "cubic", {"cubic": 1.0}, CUBIC, "models:/small/1"))
    jsonschema.validate(bare, json_schema())
    for key in ("library_match", "refined", "intervals", "accepted", "reasons", "bank", "file"):
        assert bare[key] is None


def test_it_is_frozen_and_crosses_processes(result: PredictionResult) -> None:
    assert pickle.loads(pickle.dumps(result)) == result
    with pytest.raises(FrozenInstanceError):
        result.phase = "cubic"  # type: ignore[misc]


def test_a_cell_without_values_is_null() -> None:
    cell = Cell.from_array([4.0, 4.0, np.nan, 90.0, np.inf, 90.0])
    assert cell == Cell(4.0, 4.0, None, 90.0, None, 90.0)
    np.testing.assert_array_equal(cell.to_array(), [4.0, 4.0, np.nan, 90.0, np.nan, 90.0])


def test_a_table_row_has_units_and_empty_ends_where_not_determined(
    result: PredictionResult,
) -> None:
    stream = io.StringIO()
    write_csv([replace(result, interval_estimates=None), result], stream)
    table = pd.read_csv(io.StringIO(stream.getvalue()))
    assert table["a (Å)"].tolist() == [3.99, 3.99]
    assert table["library correlation"].tolist() == [0.97, 0.97]
    assert np.isnan(table["a low (Å)"][0])
    assert table["a low (Å)"][1] == 3.98
    assert np.isnan(table["c high (Å)"][1])


def test_a_notebook_shows_tables_and_escapes_what_comes_from_a_file(
    result: PredictionResult,
) -> None:
    page = result._repr_html_()
    assert "&lt;sample&gt;.xye, bank 4" in page
    assert "<td>3.9900</td>" in page
    assert "c is not determined. Too wide." in page
    assert "No calibration &amp; no hope." in page


def robust_prediction(half_width: float, probability: float = 0.999) -> Prediction:
    """A tetragonal cell with intervals of this half-width, in Å."""
    cells = TETRAGONAL.to_array()[None]
    intervals = np.full((1, 6, 2), np.nan)
    for column in (0, 2):
        intervals[0, column] = cells[0, column] + np.array([-half_width, half_width])
    rest = (1 - probability) / 2
    return Prediction(
        np.array([[rest, probability, rest]]),
        np.array([1]),
        cells,
        intervals,
        np.array([True]),
        np.array([0.02]),
        0.15,
    )


@pytest.mark.parametrize(
    ("half_width", "determined"),
    [(0.001, True), (0.099, True), (0.1, False), (90_013.0, False), (np.inf, False)],
)
def test_an_interval_as_wide_as_the_campaign_is_not_determined(
    small_campaign: Campaign, half_width: float, determined: bool
) -> None:
    # The campaign's a and c run from 3.90 to 4.10 Å.
    prediction = robust_prediction(half_width)
    intervals = estimate_intervals(prediction, 0, small_campaign)
    assert intervals is not None
    assert set(intervals.ends) == {"a", "c"}
    result = result_from_prediction(prediction, 0, small_campaign, "models:/small/1")
    document = to_json(result)
    jsonschema.validate(document, json_schema())
    if determined:
        assert intervals.not_determined == {}
        assert intervals.ends["a"] == pytest.approx((3.99 - half_width, 3.99 + half_width))
    else:
        assert intervals.ends == {"a": None, "c": None}
        assert document["intervals"] == {"a": None, "c": None}
        assert set(intervals.not_determined) == {"a", "c"}
        json.dumps(document, allow_nan=False)


def test_intervals_of_lengths_hold_where_edges_and_centres_are_unclear() -> None:
    prediction = robust_prediction(0.001)
    assert prediction.intervals is not None
    widened = prediction.widened(np.array([5e-4])).intervals
    assert widened is not None
    np.testing.assert_allclose(widened[0, 0], [3.989 * (1 - 5e-4), 3.991 * (1 + 5e-4)], rtol=1e-12)
    np.testing.assert_array_equal(widened[0, 3:], prediction.intervals[0, 3:])
    without = replace(prediction, intervals=None)
    assert without.widened(np.array([5e-4])) is without


def test_the_unexplained_fraction_is_that_of_the_predicted_phase() -> None:
    prediction = replace(
        robust_prediction(0.001), accepted=np.array([False]), unexplained=np.array([0.62])
    )
    acceptance = assess_acceptance(prediction, 0)
    assert (acceptance.accepted, acceptance.unexplained, acceptance.limit) == (False, 0.62, 0.15)
    assert acceptance.reasons is not None
    assert "the predicted phase leaves 62 % of it" in acceptance.reasons[0]
