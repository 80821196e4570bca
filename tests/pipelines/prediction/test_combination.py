"""Predictions of several banks of one sample, combined by their uncertainties."""

import math
from collections.abc import Sequence

import jsonschema
import numpy as np
import pytest

from pipelines.prediction.combination import CombinationError, combine, with_combined
from pipelines.prediction.result import (
    Acceptance,
    Cell,
    Interval,
    Intervals,
    PredictionResult,
    RefinedPhase,
    Refinement,
    json_schema,
    to_json,
)

NORMAL_90 = 1.6449


def refined(a: float, su: float, phase: str = "cubic") -> Refinement:
    fixed = Cell(su, su, su, 0.0, 0.0, 0.0)
    cell = Cell(a, a, a, 90.0, 90.0, 90.0)
    fit = RefinedPhase(
        phase, phase, cell, fixed, ("a",), 0.05, 1.0, {}, {}, 0.99, "structure", converged=True
    )
    return Refinement((fit,))


def bank(
    number: int | None,
    a: float = 4.0,
    sigma: float | None = 0.001,
    probability: float = 0.9,
    *,
    file: str = "a.gsa",
    accepted: bool | None = True,
    refinement: Refinement | None = None,
) -> PredictionResult:
    """Predict cubic with a probability, or else tetragonal."""
    phase = "cubic" if probability > 0.5 else "tetragonal"
    half = None if sigma is None else NORMAL_90 * sigma
    ends = None if half is None else Interval(a - half, a + half)
    return PredictionResult(
        crystal_system=phase,
        phase=phase,
        probabilities={"cubic": probability, "tetragonal": 1 - probability},
        cell=Cell(a, a, a, 90.0, 90.0, 90.0),
        model=f"models:/x-bank{number}-measured/1",
        file=file,
        bank=number,
        interval_estimates=Intervals({"a": ends}),
        acceptance=Acceptance(accepted),
        refined=refinement,
    )


def test_the_mean_is_weighted_by_inverse_variances() -> None:
    together = combine([bank(1, 4.0, 0.001), bank(2, 4.001, 0.002)])
    a = together.cell["a"]
    assert a.value == pytest.approx(4.0 + 0.001 / 5, abs=1e-9)
    assert a.uncertainty == pytest.approx(0.001 * 2 / math.sqrt(5), rel=1e-4)
    assert a.chi2 == pytest.approx(0.001**2 / (0.001**2 + 0.002**2), rel=1e-4)
    assert a.banks == {"Bank 1": 4.0, "Bank 2": 4.001}
    assert together.banks == ("Bank 1", "Bank 2")
    assert (together.phase, together.crystal_system) == ("cubic", "cubic")
    assert (a.discrepant, together.warnings, together.refined) == ((), (), {})


def test_uncertainties_of_means_are_right_where_those_of_the_banks_are() -> None:
    random = np.random.default_rng(0)
    sigma = np.array([0.001, 0.002, 0.003, 0.001])
    errors, squares, named = [], [], 0
    for values in 4.0 + sigma * random.normal(size=(2000, 4)):
        banks = [bank(n, a, s) for n, (a, s) in enumerate(zip(values, sigma, strict=True), 1)]
        a = combine(banks).cell["a"]
        errors.append((a.value - 4.0) / a.uncertainty)
        squares.append(a.chi2)
        named += bool(a.discrepant)
    assert np.mean(squares) == pytest.approx(3, abs=0.15)
    # Uncertainties are enlarged where banks differ by chance, too.
    assert 0.68 < np.mean(np.abs(errors) < 1) < 0.78
    assert named < 0.02 * 2000


def test_a_bank_that_is_off_is_named_and_the_uncertainty_grows() -> None:
    agreeing = [bank(1, 4.0), bank(2, 4.0005), bank(3, 4.0002)]
    together = combine([*agreeing, bank(4, 4.02)])
    a = together.cell["a"]
    assert a.discrepant == ("Bank 4",)
    (warning,) = together.warnings
    assert warning.startswith("Bank 4 differs from the other banks")
    assert a.uncertainty > 5 * combine(agreeing).cell["a"].uncertainty
    # Of two nothing shows which one it is.
    assert combine([bank(1, 4.0), bank(2, 4.02)]).cell["a"].discrepant == ("Bank 1", "Bank 2")


def test_probabilities_are_multiplied() -> None:
    together = combine([bank(1, probability=0.8), bank(2, probability=0.6)])
    assert together.probabilities["cubic"] == pytest.approx(0.48 / (0.48 + 0.08))
    assert sum(together.probabilities.values()) == pytest.approx(1)
    # One bank alone does not exclude what the others see.
    certain = combine([bank(1, probability=1e-12), *(bank(n, probability=0.95) for n in (2, 3, 4))])
    assert certain.phase == "cubic"
    assert list(certain.cell["a"].banks) == ["Bank 2", "Bank 3", "Bank 4"]
    assert "Bank 1 predicts tetragonal, and the banks together cubic." in certain.warnings


def test_banks_that_are_not_accepted_are_left_out_unless_all_are() -> None:
    together = combine([bank(1), bank(2, 4.2, accepted=False), bank(3, accepted=None)])
    assert together.banks == ("Bank 1", "Bank 3")
    assert together.warnings[0].startswith("Bank 2 is left out: not accepted")
    assert combine([bank(1, accepted=False), bank(2, accepted=False)]).banks == ("Bank 1", "Bank 2")


def test_refined_cells_are_combined_by_their_uncertainties() -> None:
    banks = [bank(1, 4.01, refinement=refined(4.0, 1e-4)), bank(2, refinement=refined(4.0, 1e-4))]
    together = combine([*banks, bank(3, refinement=refined(4.2, 1e-4, "tetragonal"))])
    assert together.refined["a"].value == pytest.approx(4.0)
    assert together.refined["a"].uncertainty == pytest.approx(1e-4 / math.sqrt(2))
    assert list(together.refined["a"].banks) == ["Bank 1", "Bank 2"]


def test_a_parameter_that_a_single_bank_determines() -> None:
    together = combine([bank(1, sigma=None), bank(2, 4.001)])
    assert together.cell["a"].banks == {"Bank 2": 4.001}
    assert combine([bank(1, sigma=None), bank(2, sigma=None)]).cell == {}


def grouped(results: Sequence[PredictionResult]) -> list[tuple[str, ...] | None]:
    return [r.combined and r.combined.banks for r in with_combined(results)]


def test_banks_of_the_same_file_belong_together() -> None:
    pair = "Bank 1", "Bank 2"
    results = [bank(1), bank(2), bank(1, file="b.gsa")]
    assert grouped(results) == [pair, pair, None]
    same = [bank(1), bank(1)]
    assert grouped(same) == [("a.gsa, bank 1 (1)", "a.gsa, bank 1 (2)")] * 2
    for result in with_combined(results):
        document = to_json(result)
        jsonschema.validate(document, json_schema())
        assert (document["combined"] is None) == (result.file == "b.gsa")


def test_models_of_other_phases_are_refused() -> None:
    stranger = PredictionResult("cubic", "spinel", {"spinel": 1.0}, bank(1).cell, "x", "a.gsa", 2)
    with pytest.raises(CombinationError, match="models of different phases"):
        combine([bank(1), stranger])
