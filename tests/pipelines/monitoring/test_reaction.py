"""The settings with which a reaction trains again."""

import json
from dataclasses import asdict

import pytest

from bragg_data.model_provenance import ModelProvenance, SplitSettings
from pipelines.monitoring.reaction import presets_of
from pipelines.training.presets import PRESETS


@pytest.mark.parametrize(("model", "preset"), [("robust", "quick"), ("multitask", "paper")])
def test_a_model_is_trained_again_as_it_was(model: str, preset: str) -> None:
    settings = PRESETS[model][preset]
    values = json.loads(json.dumps(asdict(settings) | {"calibration_draws": 17}))
    split = SplitSettings(test_draws=42)
    provenance = ModelProvenance(model, preset=preset, preset_values=values, split=split)
    presets = presets_of(provenance)
    assert presets.network(model, preset).calibration_draws == 17
    assert presets.network(model, preset).stages == settings.stages
    assert presets.test_draws == 42
