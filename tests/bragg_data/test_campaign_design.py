"""The design of a campaign from structures and an instrument file."""

from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import BUILT_IN, load_campaign
from bragg_data.campaign_design import CampaignDesign, DesignOptions, design_campaign
from bragg_data.crystallography.cell import encloses_volume

NOMAD = BUILT_IN / "nomad_bank4.instprm"
BATIO3 = tuple(str(BUILT_IN / f"batio3_{s}.cif") for s in ("cubic", "tetragonal", "trigonal"))


@pytest.fixture(scope="module")
def batio3(tmp_path_factory: pytest.TempPathFactory) -> tuple[CampaignDesign, Path]:
    directory = tmp_path_factory.mktemp("design")
    design = design_campaign(DesignOptions(BATIO3, NOMAD), directory)
    path = directory / f"{design.name}.toml"
    path.write_text(design.toml, encoding="utf-8")
    return design, path


def test_barium_titanate_on_nomad_is_near_the_papers_campaign(
    batio3: tuple[CampaignDesign, Path],
) -> None:
    design, path = batio3
    campaign, paper = load_campaign(path), load_campaign("batio3-nomad")
    assert design.name == "batio3-nomad"
    assert campaign.instrument == paper.instrument
    assert campaign.grid.relative_step == pytest.approx(paper.grid.relative_step, rel=0.2)
    assert campaign.grid.stop == pytest.approx(paper.grid.stop, rel=0.05)
    assert (campaign.size, campaign.microstrain) == (paper.size, paper.microstrain)
    ours, theirs = campaign.measurement_effects, paper.measurement_effects
    assert ours == theirs


def test_all_cells_are_of_their_phase(batio3: tuple[CampaignDesign, Path]) -> None:
    samples = load_campaign(batio3[1]).samples
    assert encloses_volume(samples.cells).all()
    assert np.bincount(samples.phase).min() >= 1000
