"""Phases that profiles do not tell apart are reported before anything is trained."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from bragg_data.campaign import BUILT_IN, load_campaign
from bragg_data.preprocessing import preprocessing
from bragg_models.networks.robust import Robust
from pipelines.simulation.draws import SimulatedMeasurements
from pipelines.training import recipes
from tests.bragg_models.networks.test_search import STRUCTURES, draws_of, search_predictor

CAMPAIGN = """name = "two"
seed = 1
sampling = "sobol"
[instrument]
file = "{built_in}/nomad_bank4.instprm"
[tof]
start = 6333.1
relative_step = 0.0011
points = 991
[[phases]]
name = "same"
cif = "{built_in}/batio3_tetragonal.cif"
samples = 256
[phases.cell]
a = {{ low = 3.96, high = 4.04 }}
c = {{ low = 3.96, high = 4.04 }}
[[phases]]
name = "tetragonal"
cif = "{built_in}/batio3_tetragonal.cif"
samples = 256
[phases.cell]
a = {{ low = 3.96, high = 4.04 }}
c = {{ low = 3.96, high = 4.04 }}
[[phases]]
name = "silicon"
cif = "{structures}/silicon.cif"
samples = 256
[phases.cell]
a = {{ low = 5.38, high = 5.48 }}
"""


@pytest.mark.slow
def test_phases_with_the_same_lines_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same structure twice, by two names; silicon is like neither."""
    path = tmp_path / "two.toml"
    path.write_text(CAMPAIGN.format(built_in=BUILT_IN, structures=STRUCTURES), encoding="utf-8")
    campaign = load_campaign(path)
    predictor = search_predictor(campaign)
    network = cast("Robust", predictor.model)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    drawn = draws_of(campaign, 20, 1)
    draws = SimulatedMeasurements(*drawn, np.tile([0, campaign.grid.points], (len(drawn[1]), 1)))
    context: Any = SimpleNamespace(targets=predictor.targets)
    function = preprocessing(predictor.preprocessing).function
    recipes._report_undecided(context, network, draws, function)
    (line,) = capsys.readouterr().out.strip().splitlines()
    match = re.fullmatch(r"same and tetragonal: about (\d+)% of their profiles decide .*", line)
    assert match
    assert int(match[1]) < 20
    # The calibration that follows begins as it did, with the head that decides between phases now.
    after = network.state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["head"]
    assert np.isfinite(network.predict(draws.profiles[:2], np.ones(2, dtype=bool))[0]).all()
