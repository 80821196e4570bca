"""Scores of a model on its held-out samples, and which of them it is compared on."""

from types import SimpleNamespace

import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.model_provenance import ModelProvenance
from bragg_models.predictors import Prediction
from bragg_models.targets import targets_of
from pipelines.training.held_out import HeldOutTest, score_model

N = 100


@pytest.mark.parametrize(("rejected", "compared"), [(0, N), (3, N - 3), (40, N)])
def test_rejected_profiles_are_not_compared_unless_they_are_many(
    small_campaign: Campaign, rejected: int, compared: int
) -> None:
    phase = np.arange(N) % 3
    cells = np.stack([p.cell for p in small_campaign.phases])[phase]
    wrong = cells.copy()
    wrong[:rejected, :3] += 0.5  # Å: what is rejected is far off
    probabilities = np.eye(3)[phase]
    accepted = np.arange(N) >= rejected
    model = SimpleNamespace(
        targets=targets_of(small_campaign.phases, phase, cells),
        provenance=ModelProvenance(model="robust"),
        predict=lambda *_: Prediction(probabilities, phase, wrong, accepted=accepted),
    )
    batches = [np.ones((N, 5), dtype=np.float32)]
    result = score_model(model, HeldOutTest("test", lambda: batches, phase, cells, {}))  # type: ignore[arg-type]
    assert result.compared.sum() == compared
    assert result.scores["all"]["n"] == N
    assert (result.score.value > 0) == (rejected > 0)
    if compared < N:
        assert result.scores["accepted"] == {
            **result.scores["accepted"],
            "n": compared,
            "mse_paper": 0,
        }
    else:
        assert "accepted" not in result.scores
