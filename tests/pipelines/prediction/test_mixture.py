"""Samples of several phases: what a model's phases and further structures make of them."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.load import measurement_from_profile
from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Prediction
from pipelines.prediction.files import PredictError, check_request
from pipelines.prediction.interface import load_model
from pipelines.prediction.mixture import with_mixtures
from pipelines.prediction.render import print_next, print_results
from pipelines.prediction.result import json_schema, to_json
from pipelines.prediction.workflow import PredictedProfile, refine_predictions
from pipelines.report.page import render_report
from tests.measured_banks import bank_of, bins, nomad, structure

A_CUBIC, A_SILICON, SILICON_PERCENT = 4.01, 5.4321, 22.0
BROADENING = {"size": 2.0, "microstrain": 900.0}


@pytest.fixture(scope="module")
def silicon() -> Phase:
    return structure("silicon")


@pytest.fixture(scope="module")
def refined(small_campaign: Campaign, silicon: Phase) -> list[PredictedProfile]:
    """Cubic barium titanate with silicon, refined as a single phase of the model."""
    cubic = next(p for p in small_campaign.phases if p.crystal_system.name == "cubic")
    weights = {cubic: 100 - SILICON_PERCENT, silicon: SILICON_PERCENT}
    cells = {cubic: [A_CUBIC], silicon: [A_SILICON]}
    samples = [
        (phase, cells[phase], BROADENING | {"amount": weight / phase.cell_mass})
        for phase, weight in weights.items()
    ]
    measured = bank_of(samples, nomad(), bins(4000.0, 24_000.0, 1e-3), counts=20_000).profile
    known = replace(measured, source="mixture.xye", difc=nomad().difc, maybe_edges=False)
    measurement = measurement_from_profile(known, small_campaign, [nomad()])
    cell = np.array([[A_CUBIC, A_CUBIC, A_CUBIC, 90, 90, 90]])
    code = small_campaign.phases.index(cubic)
    prediction = Prediction(
        np.eye(len(small_campaign.phases))[[code]],
        np.array([code]),
        cell,
        np.full((1, 6, 2), np.nan),
        np.array([False]),
        np.array([0.24]),
        0.12,
    )
    profile = PredictedProfile(measurement, prediction, 0, small_campaign, "models:/small/1", "v1")
    return refine_predictions([profile], Refiner(small_campaign))


def test_a_refused_mixture_is_explained_by_its_phases(
    refined: list[PredictedProfile], silicon: Phase, capsys: pytest.CaptureFixture[str]
) -> None:
    (profile,) = with_mixtures(refined, None, [silicon])
    result = profile.result()
    assert result.accepted is False
    mixture = result.mixture
    assert mixture is not None
    assert mixture.accepted
    assert mixture.unexplained_lines == ()
    phases = {phase.name: phase for phase in mixture.phases}
    assert phases.keys() == {"cubic", "silicon"}
    second = phases["silicon"]
    assert abs(second.weight_percent - SILICON_PERCENT) < 4 * second.su_weight_percent < 2
    for name, a in {"cubic": A_CUBIC, "silicon": A_SILICON}.items():
        assert abs(phases[name].cell.a - a) < 4 * phases[name].su.a < 1e-3 * a
    document = json.loads(json.dumps(to_json(result), allow_nan=False))
    jsonschema.validate(document, json_schema())
    assert [phase["name"] for phase in document["mixture"]["phases"]] == list(phases)
    print_results([result])
    print_next(Path("mixture.xye"), Path("nomad.instprm"), [result])
    page = render_report([profile], load_model("packaged:batio3-nomad").predictor)
    assert "What mixture.xye consists of" in page
    assert page.count('<path class="reflections of-phase') >= 2  # rows of ticks of both phases
    assert "is not explained" not in page
    assert f"{second.weight_percent:.1f}"[:3] in page
    printed = " ".join(capsys.readouterr().out.split())
    assert "mixture.xye, as a mixture: R_wp" in printed
    assert "identify" not in printed


def test_lines_that_no_phase_of_the_model_explains_remain(refined: list[PredictedProfile]) -> None:
    (profile,) = with_mixtures(refined, None)
    mixture = profile.result().mixture
    assert mixture is not None
    assert "silicon" not in {phase.name for phase in mixture.phases}
    for h2k2l2 in (8, 11):  # 220 and 311 of silicon, where barium titanate has no line
        d = A_SILICON / np.sqrt(h2k2l2)
        assert any(abs(line - d) < 0.005 for line in mixture.unexplained_lines)


def test_structures_are_refused_without_a_refinement() -> None:
    with pytest.raises(PredictError, match="--refine"):
        check_request(two_formats=False, unused_phases=[Path("cifs")], instrument=None)
