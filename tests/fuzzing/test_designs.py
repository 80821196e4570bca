"""Damaged structures, instrument and campaign files give a campaign, or a single sentence."""

import random
from pathlib import Path

import pytest

from bragg_data.campaign import BUILT_IN, CampaignError, load_campaign
from bragg_data.campaign_design import DesignError, DesignOptions, design_campaign
from bragg_data.crystallography.cell import CrystalError
from bragg_data.instrument.instprm import InstrumentError
from tests.fuzzing.formats import INSTRUMENTS
from tests.fuzzing.mutations import mutated
from tests.fuzzing.originals import structures

COUNT = 25
NOMAD, TETRAGONAL = BUILT_IN / "nomad_bank4.instprm", str(BUILT_IN / "batio3_tetragonal.cif")


def check_sentence(error: Exception) -> None:
    assert str(error).endswith(".")
    assert "\n" not in str(error)
    assert len(str(error)) < 5000


def designed(options: DesignOptions, directory: Path) -> bool:
    """Design a campaign and load it; return False where a sentence refuses it."""
    try:
        design = design_campaign(options, directory)
    except (CampaignError, CrystalError, DesignError, InstrumentError) as error:
        check_sentence(error)
        return False
    file = directory / "designed.toml"
    file.write_text(design.toml, encoding="utf-8")
    assert load_campaign(file).definition == design.campaign.definition
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_structures(tmp_path: Path) -> None:
    rng, originals = random.Random(1), structures()
    results = []
    for number in range(COUNT):
        file = tmp_path / "damaged.cif"
        file.write_bytes(mutated(originals[number % len(originals)].encode(), rng)[0])
        results.append(designed(DesignOptions((str(file),), NOMAD), tmp_path))
    assert {True, False} == set(results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_instrument_files(tmp_path: Path) -> None:
    rng, originals = random.Random(1), [INSTRUMENTS[name] for name in ("instprm", "gsas prm")]
    results = []
    for number in range(COUNT):
        suffix, text, _ = originals[number % len(originals)]
        file = tmp_path / f"damaged{suffix}"
        file.write_bytes(mutated(text.encode(), rng)[0])
        results.append(designed(DesignOptions((TETRAGONAL,), file), tmp_path))
    assert {True, False} == set(results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_campaign_files(tmp_path: Path) -> None:
    rng = random.Random(7)
    original = design_campaign(DesignOptions((TETRAGONAL,), NOMAD), tmp_path).toml
    file = tmp_path / "damaged.toml"
    for _ in range(8 * COUNT):
        file.write_bytes(mutated(original.encode(), rng)[0])
        try:
            campaign = load_campaign(file)
            assert len(campaign.samples)
            assert campaign.identity("kinematic", "1")
        except CampaignError as error:
            check_sentence(error)
