"""Foreign samples: never of a campaign's present compounds, and always the same."""

import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.crystallography.structure import phase_on_orthogonal_axes
from pipelines.simulation.foreign import FOREIGN_PHASES, foreign_phases, foreign_profiles
from tests.bragg_models.networks.test_search import search_campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return search_campaign(tmp_path_factory.mktemp("campaign"), "silicon", "rutile")


class _Campaign:
    def __init__(self, *names: str) -> None:
        self.phases = [phase_on_orthogonal_axes("present", *FOREIGN_PHASES[name]) for name in names]


@pytest.mark.parametrize(
    "present", [(), *((name,) for name in FOREIGN_PHASES), ("silicon", "copper")]
)
def test_no_foreign_compound_has_the_elements_of_a_phase(present: tuple[str, ...]) -> None:
    names = [phase.name for phase in foreign_phases(_Campaign(*present))]
    assert len(set(names)) == 3
    assert not set(names) & set(present)
    knpresent = [set(phase.symbols) for phase in _Campaign(*present).phases]
    for phase in foreign_phases(_Campaign(*present)):
        assert set(phase.symbols) not in knpresent


def test_profiles_are_always_the_same(campaign: Campaign) -> None:
    assert [phase.name for phase in foreign_phases(campaign)] == ["diamond", "zircon", "ceria"]
    profiles = foreign_profiles(campaign, 2)
    assert profiles.shape == (6, campaign.grid.points)
    assert profiles.dtype == np.float32
    assert (profiles.max(axis=1) > 0).all()
    assert (profiles.max(axis=1) <= 1).all()
    np.testing.assert_array_equal(foreign_profiles(campaign, 2), profiles)
    assert not np.array_equal(profiles[0], profiles[1])
