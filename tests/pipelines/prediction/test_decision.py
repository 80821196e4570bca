"""One decision: how model, library and refinements are pooled, and what is shown first."""

import jsonschema
import numpy as np
import pytest

from pipelines.prediction.decision import (
    CALIBRATED,
    UNCALIBRATED,
    decide,
    from_correlations,
    pooled,
)
from pipelines.prediction.result import (
    Cell,
    Interval,
    Intervals,
    LibraryCandidate,
    LibraryMatch,
    PredictionResult,
    RefinedPhase,
    json_schema,
    tables_of,
    to_json,
)

CUBIC, TETRAGONAL = Cell(4, 4, 4, 90, 90, 90), Cell(3.99, 3.99, 4.03, 90, 90, 90)
MODEL = Intervals({"a": Interval(3.999, 4.001)})
CELLS = {"cubic": CUBIC, "tetragonal": TETRAGONAL}


def predicted(cubic: float, intervals: Intervals | None = MODEL) -> PredictionResult:
    probabilities = {"cubic": cubic, "tetragonal": 1 - cubic}
    phase = max(probabilities, key=lambda name: probabilities[name])
    model = "models:/small/1"
    return PredictionResult(
        phase, phase, probabilities, CELLS[phase], model, interval_estimates=intervals
    )


def refined(phase: str, probability: float) -> RefinedPhase:
    su = Cell(1e-4, 1e-4, 1e-4, 0, 0, 0)
    estimates = Intervals({"a": Interval(3.9898, 3.9902)})
    numbers = 0.05, 1.1, {}, {}, 0.99, "structure"
    return RefinedPhase(
        phase, phase, CELLS[phase], su, ("a",), *numbers, True, probability, estimates
    )


def refinements(cubic: float) -> list[RefinedPhase]:
    fits = [refined("cubic", cubic), refined("tetragonal", 1 - cubic)]
    return sorted(fits, key=lambda fit: -(fit.probability or 0))


def test_a_model_alone_is_left_as_it_is() -> None:
    result = decide(predicted(0.7))
    assert result.probabilities == {"cubic": 0.7, "tetragonal": pytest.approx(0.3)}
    assert (result.cell, result.cell_from, result.probability) == (CUBIC, "model", 0.7)
    assert [(part.source, part.weight) for part in result.evidence] == [("model", 1.0)]
    assert decide(result).evidence == result.evidence


@pytest.mark.parametrize(
    ("model", "evidence", "phase"),
    [
        (0.99, 0.2, "cubic"),  # hardly any evidence for a distortion, and a model that is sure
        (0.99, 0.01, "tetragonal"),
        (0.8, 1e-6, "tetragonal"),
        (1e-9, 0.95, "tetragonal"),
        (1e-9, 1 - 1e-9, "cubic"),
    ],
)
def test_what_is_shown_first_is_what_was_decided(model: float, evidence: float, phase: str) -> None:
    result = decide(predicted(model), refined=refinements(evidence))
    assert result.phase == result.crystal_system == phase
    assert result.phase == max(result.probabilities, key=lambda name: result.probabilities[name])
    assert result.refined is not None
    assert result.refined.best.phase == phase
    assert (result.cell, result.cell_from) == (CELLS[phase], "refinement")
    assert result.intervals == {"a": Interval(3.9898, 3.9902)}
    document = to_json(result)
    jsonschema.validate(document, json_schema())
    parts = {part["source"]: part for part in document["evidence"]}
    assert parts["model"]["probabilities"]["cubic"] == model
    assert parts["model"]["intervals"] == {"a": [3.999, 4.001]}
    assert parts["refinement"]["probabilities"]["cubic"] == pytest.approx(evidence)
    assert sum(part["weight"] for part in parts.values()) == pytest.approx(1)
    assert [row[0] for row in tables_of(result)[0][1]][:3] == ["decision", "90 % interval", "model"]


def test_the_same_evidence_twice_counts_once() -> None:
    """Model and refinement see the same profile: agreeing makes neither of them surer."""
    probabilities, weights = pooled(
        [("model", {"a": 0.8, "b": 0.2}), ("refinement", {"a": 0.8, "b": 0.2})], CALIBRATED
    )
    assert sum(weights) == pytest.approx(1)
    assert probabilities["a"] == pytest.approx(0.8, abs=1e-3)


def test_none_is_surer_than_it_was_proven_to_be() -> None:
    sure = {"a": 1.0, "b": 0.0, "c": 0.0}
    other = {"a": 0.0, "b": 1.0, "c": 0.0}
    for weights in (CALIBRATED, UNCALIBRATED):
        probabilities, _ = pooled([("model", sure), ("refinement", other)], weights)
        assert np.isfinite(list(probabilities.values())).all()
        assert probabilities["b"] > probabilities["a"] > probabilities["c"] > 0
    # A model of ideal patterns is believed less.
    ideal, _ = pooled([("model", sure), ("refinement", {"a": 0.1, "b": 0.9})], UNCALIBRATED)
    calibrated, _ = pooled([("model", sure), ("refinement", {"a": 0.1, "b": 0.9})], CALIBRATED)
    assert ideal["a"] < calibrated["a"]


def test_a_phase_that_was_not_refined_has_the_least_evidence() -> None:
    model = {"a": 0.5, "b": 0.25, "c": 0.25}
    probabilities, _ = pooled([("model", model), ("refinement", {"a": 0.9, "b": 0.1})], CALIBRATED)
    assert probabilities["b"] == probabilities["c"]


def match(cubic: float, tetragonal: float) -> LibraryMatch:
    correlations = {"cubic": cubic, "tetragonal": tetragonal}
    order = sorted(correlations, key=lambda name: -correlations[name])
    candidates = (LibraryCandidate(name, name, correlations[name], CELLS[name]) for name in order)
    return LibraryMatch("small-v1", tuple(candidates))


def test_the_library_helps_a_model_of_ideal_patterns_alone() -> None:
    unsure = predicted(0.6, None)
    result = decide(unsure, match(0.9, 0.98))
    assert (result.phase, result.cell, result.cell_from) == ("tetragonal", TETRAGONAL, "library")
    assert result.intervals is None
    assert [part.source for part in result.evidence] == ["model", "library"]
    agreeing = decide(predicted(0.6, None), match(0.98, 0.9))
    assert (agreeing.cell_from, agreeing.cell) == ("model", CUBIC)
    assert decide(predicted(0.6), match(0.9, 0.98)).probabilities == predicted(0.6).probabilities


def test_stored_patterns_are_compared_by_what_they_leave() -> None:
    odds = from_correlations({"a": 0.99, "b": 0.98})
    assert odds["a"] > 0.98
    assert sum(odds.values()) == pytest.approx(1)
    assert from_correlations({"a": 1.0, "b": 1.0 - 1e-9})["a"] == pytest.approx(0.5)
