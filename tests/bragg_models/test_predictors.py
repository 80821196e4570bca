"""Predictions of every kind of network: valid cells, also of known phases and wild outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bragg_data.crystallography.cell import encloses_volume
from bragg_data.model_provenance import ModelProvenance
from bragg_models.predictors import FORMAT, Predictor, PredictorError, build, load_predictor
from bragg_models.targets import Targets

torch.set_num_threads(1)

POINTS = 256
KINDS = ("multitask", "caenn", "perceptron")


def untrained(kind: str, targets: Targets) -> Predictor:
    network = build(kind, {"points": POINTS, "phases": 3, "parameters": 3}, seed=0).eval()
    provenance = ModelProvenance()
    return Predictor(kind, network, targets, "profile_sqrt_unit@1", POINTS, provenance)


@pytest.fixture
def profiles() -> np.ndarray:
    return np.random.default_rng(0).random((6, POINTS)) + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_phase_determines_the_lattice(
    kind: str, targets: Targets, profiles: np.ndarray
) -> None:
    """The outputs are the same, but decoded under the known phases."""
    predictor = untrained(kind, targets)
    known = np.array([0, 1, 2, 0, 1, 2])
    prediction = predictor.predict(profiles, known)
    np.testing.assert_array_equal(prediction.phase, known)
    assert (prediction.cells[known == 0][:, 0] == prediction.cells[known == 0][:, 2]).all()
    assert (prediction.cells[known == 1][:, 3:] == 90.0).all()
    free = predictor.predict(profiles)
    np.testing.assert_array_equal(prediction.probabilities, free.probabilities)
    same = free.phase == known
    np.testing.assert_array_equal(prediction.cells[same], free.cells[same])
    with pytest.raises(PredictorError, match="from 0 to 2"):
        predictor.predict(profiles, known + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [-1e6, 1e6, 30.0])
def test_wild_outputs_give_cells_that_enclose_a_volume(
    kind: str, bias: float, targets: Targets, profiles: np.ndarray
) -> None:
    predictor = untrained(kind, targets)
    with torch.no_grad():
        for parameter in list(predictor.model.parameters())[-1:]:
            parameter.fill_(bias)
    for phase in range(3):
        cells = predictor.predict(profiles, np.full(len(profiles), phase)).cells
        assert encloses_volume(cells).all()


def test_a_model_of_a_newer_format_is_refused(targets: Targets, tmp_path: Path) -> None:
    untrained("multitask", targets).save(tmp_path)
    path = tmp_path / "model.json"
    text = path.read_text(encoding="utf-8")
    assert f'"format": {FORMAT}' in text
    path.write_text(text.replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(PredictorError, match=r"reads 1 and 2\. Use the code that wrote it"):
        load_predictor(tmp_path)
