"""What becomes of a trained model: a candidate, or the champion if it is good enough."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xarray as xr

from bragg_data.model_provenance import ModelProvenance, ModelScore
from catalog import registry
from catalog.gate import BaselineComparison
from catalog.registry import CANDIDATE, ModelVersion
from catalog.tracking import Tracking
from pipelines.registry import registration
from pipelines.registry.registration import promote_if_better

# The quick preset of the network for measured profiles on hausmannite, and its baselines.
WORSE = BaselineComparison("mse_paper", 3000, 4.3e-2, {"constant": 1.6e-2, "library match": 5e-3})
BETTER = replace(WORSE, model=1e-4)


@pytest.fixture
def tracking(tmp_path: Path, tracking_in: Callable[[Path], Tracking]) -> Tracking:
    place = tracking_in(tmp_path)
    place.client.create_registered_model("small-measured")
    return place


def add_version(tracking: Tracking, score: float, test_set: str = "x") -> ModelVersion:
    entity = tracking.client.create_model_version(
        "small-measured",
        source="file:///nowhere",
        tags={"score": f"{score:g}", "test_set": test_set},
    )
    return registry.version_of(tracking.client, entity)


def champion_uri(tracking: Tracking) -> str:
    return registry.find(tracking, f"models:/small-measured@{registry.CHAMPION}").uri


def test_a_model_worse_than_a_constant_stays_a_candidate(
    tracking: Tracking, capsys: pytest.CaptureFixture[str]
) -> None:
    version = add_version(tracking, WORSE.model)
    assert not promote_if_better(tracking, version, WORSE)
    assert registry.champion(tracking, "small-measured") is None
    assert registry.find(tracking, f"models:/small-measured@{CANDIDATE}") == replace(
        version, aliases=(CANDIDATE,)
    )
    # The comparison and the remedies are printed.
    printed = " ".join(capsys.readouterr().out.split())
    for number in ("0.043", "0.016", "0.005", "3,000"):
        assert number in printed
    assert "--preset standard" in printed
    assert "--force --reason" in printed


def test_every_baseline_has_to_be_beaten(tracking: Tracking) -> None:
    between = replace(WORSE, model=1e-2)
    assert between.not_beaten == ("library match",)
    assert WORSE.not_beaten == ("constant", "library match")
    assert replace(WORSE, model=math.nan).not_beaten == ("constant", "library match")
    assert BETTER.not_beaten == ()
    assert not promote_if_better(tracking, add_version(tracking, 1e-2), between)
    version = add_version(tracking, BETTER.model)
    assert promote_if_better(tracking, version, BETTER)
    assert champion_uri(tracking) == version.uri
    # A lower error than the champion's is not enough either.
    newer = add_version(tracking, 1e-5)
    assert not promote_if_better(tracking, newer, WORSE)
    assert champion_uri(tracking) == version.uri
    # By force it is.
    assert promote_if_better(tracking, newer, WORSE, "force")
    champion = registry.champion(tracking, "small-measured")
    assert champion is not None
    assert champion.version == newer.version
    assert champion.tags["promoted_by"] == "forced"


def test_only_scores_of_the_same_test_set_are_compared(
    tracking: Tracking, capsys: pytest.CaptureFixture[str]
) -> None:
    first = add_version(tracking, 1e-3)
    assert promote_if_better(tracking, first, BETTER)
    assert not promote_if_better(tracking, add_version(tracking, 1e-9, "y"), BETTER)
    assert champion_uri(tracking) == first.uri
    assert "tested on other samples" in " ".join(capsys.readouterr().out.split())
    assert not promote_if_better(tracking, add_version(tracking, 2e-3), BETTER)
    assert champion_uri(tracking) == first.uri
    better = add_version(tracking, 5e-4)
    assert promote_if_better(tracking, better, BETTER)
    assert champion_uri(tracking) == better.uri


def test_a_champion_of_other_data_is_replaced_if_the_baselines_are_beaten(
    tracking: Tracking,
) -> None:
    first = add_version(tracking, 1e-9)
    assert promote_if_better(tracking, first, BETTER)
    assert not promote_if_better(tracking, add_version(tracking, 1e-3, "y"), WORSE, "replace")
    assert champion_uri(tracking) == first.uri
    better = add_version(tracking, 1e-3, "y")
    assert promote_if_better(tracking, better, BETTER, "replace")
    assert champion_uri(tracking) == better.uri


def test_the_comparison_is_what_training_recorded() -> None:
    provenance = ModelProvenance(
        test={"all": {"n": 3000.0}},
        score=ModelScore("mse_paper", WORSE.model),
        baselines=WORSE.baselines,
    )
    read = ModelProvenance.from_json(provenance.to_json())
    assert BaselineComparison.from_provenance(read) == WORSE
    # Of a model that rejects profiles, the others are compared.
    rejecting = replace(read, test={**read.test, "accepted": {"n": 2990.0, "mse_paper": 1e-6}})
    compared = BaselineComparison.from_provenance(rejecting)
    assert compared == replace(WORSE, n_samples=2990, model=1e-6)
    assert BaselineComparison.from_provenance(ModelProvenance()) is None
    # Models of an earlier version recorded no baselines.
    assert BaselineComparison.from_provenance(replace(provenance, baselines=None)) is None


def test_the_test_set_is_that_of_the_same_samples(small_dataset: xr.Dataset) -> None:
    split = {"name": "random", "seed": 0, "test": 0.2, "validation": 0.05}
    # Stored samples have the name that versions before this one gave them.
    content = small_dataset.attrs["content_hash"]
    earlier = hashlib.sha256(repr((content, split, "test")).encode()).hexdigest()[:16]
    assert registration.test_set(small_dataset, split) == earlier
    # Draws of another campaign are other samples, also of the same number.
    draws = {**split, "test_draws": 20}
    name = registration.test_set(small_dataset, draws)
    assert name == registration.test_set(small_dataset, draws)
    toml = small_dataset.attrs["campaign_toml"].replace("last = 88.0", "last = 87.0")
    other = small_dataset.assign_attrs(campaign_toml=toml)
    assert (
        len(
            {
                name,
                registration.test_set(other, draws),
                registration.test_set(other, split),
                earlier,
            }
        )
        == 3
    )
