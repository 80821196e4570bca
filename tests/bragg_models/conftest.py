"""The campaign of networks that are not trained."""

import pytest

from bragg_data.campaign import Campaign
from bragg_models.targets import Targets, targets_of
from tests.tiny_campaign import tiny_campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return tiny_campaign(tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="module")
def targets(campaign: Campaign) -> Targets:
    samples = campaign.samples
    return targets_of(campaign.phases, samples.phase, samples.cells)
