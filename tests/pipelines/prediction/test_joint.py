"""The banks of a file, refined jointly: a simulated measurement of two banks, with known truth."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.load import Measurement, measurement_from_profile
from bragg_data.refinement.calibration_uncertainty import CalibrationKind, calibration_su
from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Prediction
from catalog.tracking import Tracking
from pipelines.prediction.interface import load_model
from pipelines.prediction.joint import with_banks
from pipelines.prediction.render import print_results
from pipelines.prediction.result import PredictionResult, json_schema, to_json
from pipelines.prediction.workflow import PredictedProfile, refine_predictions
from pipelines.refinement.output import cell_texts
from pipelines.report.page import render_report
from tests.measured_banks import bank_of, bins, nomad

TRUE = {"a": 3.99, "c": 4.03}
SAMPLE = {"size": 1.0, "microstrain": 1000.0}
ERRORS = (2e-4, -3e-4)
"""Of the banks' difC, relative: the calibration that is used is off by as much."""
FIRST = nomad()
SECOND = FIRST.with_parameters(bank=5, two_theta=150.0, difc=FIRST.difc * 1.1)
CERTAIN, UNSURE = (0.005, 0.99, 0.005), (0.3, 0.3, 0.4)
"""Probabilities of the cubic, the tetragonal and the trigonal phase."""


@pytest.fixture(scope="module")
def instrument(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("instrument") / "two.instprm"
    file.write_text(FIRST.section + SECOND.section, encoding="utf-8")
    return file


def campaign_of(campaign: Campaign, bank: Instrument) -> Campaign:
    return replace(campaign, instprm=bank.section)


def measurement(campaign: Campaign, bank: Instrument, error: float) -> Measurement:
    """Return a bank that measured the tetragonal phase, with an error of its calibration."""
    sample = [(campaign.phases[1], list(TRUE.values()), SAMPLE)]
    tof = bins(4000.0, 24_000.0, 1e-3)
    measured = bank_of(sample, bank, tof, counts=4000, seed=bank.bank, true_difc=error).profile
    known = replace(measured, source="two.gsa", difc=bank.difc, maybe_edges=False)
    return measurement_from_profile(known, campaign, [FIRST, SECOND])


def predicted(
    campaign: Campaign, measured: Measurement, probabilities: tuple[float, ...]
) -> PredictedProfile:
    cell = np.array([[3.992, 3.992, 4.028, 90, 90, 90]])
    intervals = np.full((1, 6, 2), np.nan)
    intervals[0, [0, 2]] = cell[0, [0, 2], None] + 3e-3 * np.array([-1, 1])
    code = np.array([int(np.argmax(probabilities))])
    prediction = Prediction(
        np.array([probabilities]), code, cell, intervals, np.array([True]), np.array([0.02]), 0.15
    )
    return PredictedProfile(measured, prediction, 0, campaign, "models:/small/1", "small-v1")


@pytest.fixture(scope="module")
def refined(small_campaign: Campaign) -> list[PredictedProfile]:
    """Both banks, each refined by itself."""
    profiles = []
    for bank, error in zip((FIRST, SECOND), ERRORS, strict=True):
        campaign = campaign_of(small_campaign, bank)
        profile = predicted(campaign, measurement(campaign, bank, error), CERTAIN)
        profiles += refine_predictions([profile], Refiner(campaign))
    return profiles


@pytest.fixture(scope="module")
def together(refined: list[PredictedProfile], instrument: Path) -> list[PredictedProfile]:
    return with_banks(refined, instrument, refine=True)


@pytest.fixture(scope="module")
def results(together: list[PredictedProfile]) -> list[PredictionResult]:
    return [profile.result() for profile in together]


def test_the_joint_cell_is_right_and_more_precise_than_either_bank(
    together: list[PredictedProfile], results: list[PredictionResult]
) -> None:
    combined = results[0].combined
    assert combined is not None
    assert combined == results[1].combined
    assert (combined.not_joint, combined.warnings) == (None, ())
    joint = combined.joint
    assert joint is not None
    assert joint.accepted
    assert joint.banks == (FIRST.bank, SECOND.bank)
    assert joint.files == ("two.gsa",)
    assert 0.8 < (joint.reduced_chi2 or 0) < 1.2
    (phase,) = joint.phases
    assert phase.name == "tetragonal"
    cell, su, calibration = (v.values() for v in (phase.cell, phase.su, phase.su_calibration))
    for name, true in TRUE.items():
        total = np.hypot(su[name], calibration[name])
        assert abs(cell[name] - true) < 3 * total
        for result, bank in zip(results, together[0].together.fit.banks, strict=True):
            alone = result.refined.best.su.values()[name]
            assert su[name] < alone
            # Of a bank alone an error of its calibration is an error of the cell.
            assert total < np.hypot(alone, true * calibration_su(bank.bank, CalibrationKind.OTHER))
    # The difference of the banks' calibrations is found.
    first, second = (bank.difc_offset for bank in joint.of_banks)
    assert first - second == pytest.approx(ERRORS[0] - ERRORS[1], abs=5e-5)


def test_the_banks_decision_takes_the_joint_cell(results: list[PredictionResult]) -> None:
    for result in results:
        (phase,) = result.combined.joint.phases
        assert result.cell_from == "joint refinement"
        assert result.cell == phase.cell
        for name, ends in result.intervals.items():
            half = 1.645 * np.hypot(phase.su.values()[name], phase.su_calibration.values()[name])
            assert ends == pytest.approx(result.cell.values()[name] + half * np.array([-1, 1]))
        assert result.evidence[-1].cell == result.refined.best.cell  # of the bank alone
        document = json.loads(json.dumps(to_json(result), allow_nan=False))
        jsonschema.validate(document, json_schema())
        assert document["combined"]["joint"]["phases"][0]["cell"]["a"] == phase.cell.a
        assert pickle.loads(pickle.dumps(result)) == result


def test_terminal_and_report_show_the_joint_refinement(
    together: list[PredictedProfile],
    results: list[PredictionResult],
    trained: Tracking,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cell = cell_texts(results[0].combined.joint.phases[0])
    print_results(results)
    printed = " ".join(capsys.readouterr().out.split())
    assert "two.gsa, all banks, refined jointly" in printed
    assert f"a = {cell['a']} Å" in printed
    page = render_report(together, load_model(tracking=trained.uri).predictor)
    contents, *sections = page.split("<article")
    assert contents.count('<svg class="plot of-tetragonal"') == 2
    assert len(sections) == 2
    for part in (contents, *sections):
        assert f"<b>{cell['a']}" in part
        assert f"<b>{cell['c']}" in part


def test_evidence_decides_between_the_phases_that_are_left(
    refined: list[PredictedProfile], instrument: Path
) -> None:
    unsure = [predicted(p.campaign, p.measurement, UNSURE) for p in refined]
    results = [profile.result() for profile in with_banks(unsure, instrument, refine=True)]
    combined = results[0].combined
    assert combined.phase == "trigonal"  # by the model, which is wrong
    assert combined.joint.phases[0].name == "tetragonal"
    best, *rest = combined.joint_rwp.items()
    assert best == ("tetragonal", pytest.approx(combined.joint.rwp))
    assert {name for name, _ in rest} == {"cubic", "trigonal"}
    assert all(rwp > 1.5 * best[1] for _, rwp in rest)
    (warning,) = combined.warnings
    assert "explained best by tetragonal, while their predictions together are trigonal" in warning
    assert results[0].cell_from == "model"


def test_banks_that_disagree_by_their_calibrations_are_named(
    small_campaign: Campaign, refined: list[PredictedProfile], instrument: Path
) -> None:
    campaign = campaign_of(small_campaign, SECOND)
    off = predicted(campaign, measurement(campaign, SECOND, 6e-3), CERTAIN)
    off = refine_predictions([off], Refiner(campaign))[0]
    result = with_banks([refined[0], off], instrument, refine=True)[0].result()
    combined = result.combined
    # Of two nothing shows which one is off.
    names = ["Bank 4", "Bank 5"]
    assert [text.split(",")[0] for text in combined.warnings] == names
    assert all("refined by itself, differs from the joint" in text for text in combined.warnings)
    assert [text.split(" disagrees")[0] for text in combined.joint.remarks] == ["bank 4", "bank 5"]
    (phase,) = combined.joint.phases
    assert abs(phase.cell.a - TRUE["a"]) < 3 * phase.su_calibration.a


def test_why_there_is_no_joint_refinement(
    refined: list[PredictedProfile], instrument: Path
) -> None:
    twice = [refined[0], refined[0]]
    combined = with_banks(twice, instrument, refine=True)[0].result().combined
    assert combined.joint is None
    assert "holds a bank of the instrument several times" in combined.not_joint
    # Of few points: what is left of a profile where something else has its place.
    measured = refined[1].measurement
    few = replace(measured.profile, sigma=np.where(np.arange(len(measured.profile.tof)) < 50, 1, 0))
    short = replace(refined[1], measurement=replace(measured, profile=few))
    result = with_banks([refined[0], short], instrument, refine=True)[0].result()
    assert "two banks are needed. Bank 5 is left out" in result.combined.not_joint
    assert result.cell_from == "refinement"
    plain = with_banks(refined, instrument, refine=False)[0].result()
    assert (plain.combined.joint, plain.combined.not_joint) == (None, None)
