"""Commands on a damaged store: one sentence with block and remedy, and no result."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import Campaign, Samples
from bragg_data.preprocessing import sqrt_unit
from bragg_data.simulation import kinematic
from bragg_data.store import block_writer
from bragg_data.store.repair import repair
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.simulated import Writer, write_block
from bragg_models.data.batches import profiles_of
from bragg_models.data.cache import cached
from bragg_models.library.search import library_match
from catalog import features
from pipelines import check, simulate, train
from pipelines import features as features_command
from pipelines import store as store_command
from tests.damage import chunk_file, flip
from tests.small_store import TAG
from tests.small_store import simulate as simulate_into

REMEDY = f"bragg store repair {TAG}"


@pytest.fixture
def store(small_store, tmp_path) -> Store:
    """A copy of the small store."""
    shutil.copytree(small_store.path, tmp_path / "store", ignore=shutil.ignore_patterns("verified"))
    return Store(tmp_path / "store")


def small_patterns(campaign: Campaign, samples: Samples) -> np.ndarray:
    return kinematic.Simulator(*campaign.setup).simulate(samples.phase, samples.cells)


def damage(store: Store, how: str) -> None:
    file = chunk_file(store, TAG, 3)
    if how == "flipped":
        flip(file)
    elif how == "missing":
        file.unlink()
    else:
        for manifest in (store.path / "manifests").iterdir():
            manifest.unlink()


@pytest.mark.parametrize("how", ["flipped", "missing", "no manifests"])
@pytest.mark.parametrize(
    "name", ["train", "simulate", pytest.param("materialise", marks=pytest.mark.cluster)]
)
def test_nothing_is_computed_from_a_damaged_store(
    store, tmp_path, campaign_file, command, tracking_in, name, how
):
    damage(store, how)
    database = tracking_in(tmp_path).uri
    arguments = {
        "train": (train.app, "multitask", "--data", TAG, "--tracking", database),
        "simulate": (simulate.app, "--campaign", campaign_file, "--simulator", "kinematic"),
        "materialise": (features_command.app, "materialise", "profile_cropped", "--data", TAG),
    }[name]
    code, out, err = command(*arguments, "--store", store.path)
    assert code == 2
    assert REMEDY in err
    assert how == "no manifests" or "lock 3" in err
    assert err.count("\n") == 1
    assert "nothing to do" not in out
    assert features.materialised(store) == [] if how != "no manifests" else True


@pytest.mark.cluster
def test_simulate_does_again_what_is_damaged_of_an_unfinished_data_set(
    tmp_path, campaign_file, small_campaign: Campaign, small_store, command
):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, small_campaign, "kinematic", kinematic.VERSION) as writer:
        samples = writer.samples[writer.rows(2)]
        intensity = small_patterns(small_campaign, samples)
        writer.commit([write_block(writer.fork(), writer.group, 2, samples, intensity)])
    largest: Path = max((store.path / "chunks").iterdir(), key=lambda file: file.stat().st_size)
    largest.unlink()
    options = "--campaign", campaign_file, "--simulator", "kinematic", "--workers", 1
    code, out, _ = command(simulate.app, *options, "--store", store.path)
    assert code == 0
    assert "1 finished blocks are damaged or missing (the first is 2)" in out
    again, expected = Store(store.path).open(TAG), small_store.open(TAG)
    assert again.attrs["content_hash"] == expected.attrs["content_hash"]
    np.testing.assert_array_equal(again.intensity.values, expected.intensity.values)


def test_a_cache_is_never_built_from_what_is_damaged(
    small_campaign: Campaign, small_store, tmp_path, monkeypatch
):
    """In stores of earlier versions, whose chunks have no checksums, a flipped byte is a value."""
    with monkeypatch.context() as patch:
        patch.setattr(block_writer, "COMPRESSORS", block_writer.COMPRESSORS[:1])
        store = Store(tmp_path / "old", create=True)
        simulate_into(store, small_campaign, TAG)
    flip(chunk_file(store, TAG, 3), 0.5)
    caches = tmp_path / "caches"
    damaged = profiles_of(store.open(TAG), sqrt_unit)
    with pytest.raises(StoreError, match=r"Block 3 .* is not what was written"):
        cached(damaged, caches, "roots")
    assert not list(caches.glob("*.npy"))
    with pytest.raises(StoreError, match="Block 3"):
        library_match(store.open(TAG), np.ones((1, 800)))
    repair(store, TAG, lambda samples: small_patterns(small_campaign, samples))
    again = cached(profiles_of(Store(store.path).open(TAG), sqrt_unit), caches, "roots")
    expected = sqrt_unit(small_store.open(TAG).intensity.values)
    np.testing.assert_array_equal(again.prepared, expected)


@pytest.mark.cluster
def test_features_that_are_damaged_are_refused_and_computed_again(store, command):
    materialise = "materialise", "profile_cropped", "--store", store.path, "--workers", 1
    assert command(features_command.app, *materialise)[0] == 0
    expected = features.load("profile_cropped", TAG, store.uri).profile_cropped.values
    files = sorted((store.path / "chunks").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    features_of_blocks = [file for file in files[-40:] if file.stat().st_size > 50_000][-12:]
    flip(features_of_blocks[5])
    with pytest.raises(ValueError, match="checksum"):
        _ = features.load("profile_cropped", TAG, store.uri).profile_cropped.values
    code, out, _ = command(features_command.app, *materialise)
    assert (code, "1 finished blocks are damaged: they are computed again" in out) == (0, True)
    again = features.load("profile_cropped", TAG, store.uri).profile_cropped.values
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_check_does_not_pass_what_is_damaged(store, command, how):
    damage(store, how)
    code, out, err = command(check.app, TAG, "--store", store.path)
    assert (code, err) == (1, "")
    assert re.search(r"[Bb]lock 3", out)
    assert REMEDY in " ".join(out.split())


@pytest.mark.cluster
def test_an_unfinished_data_set_without_manifests_begins_again(
    tmp_path, campaign_file, small_campaign: Campaign, small_store, command
):
    place = ("--store", tmp_path / "store")
    with Writer(Store(place[1], create=True), small_campaign, "kinematic", "1") as writer:
        branch = writer.branch
    for manifest in (tmp_path / "store" / "manifests").iterdir():
        manifest.unlink()
    options = "--campaign", campaign_file, "--simulator", "kinematic", "--workers", 1
    code, out, err = command(simulate.app, *options, *place)
    assert (code, err.count("\n")) == (2, 1)
    assert f"bragg store repair {branch}" in err
    code, out, err = command(store_command.app, "repair", branch, *place)
    assert (code, "begins it again" in out, err) == (0, True, "")
    code, out, _ = command(simulate.app, *options, *place)
    assert code == 0
    expected = small_store.open(TAG).attrs["content_hash"]
    assert Store(place[1]).open(TAG).attrs["content_hash"] == expected
    code, out, err = command(store_command.app, "repair", branch, *place)
    assert (code, "has a tag: repair that instead" in err) == (2, True)


def test_repair_keeps_what_can_be_resumed(tmp_path, small_campaign: Campaign, command):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, small_campaign, "kinematic", "1") as writer:
        branch, samples = writer.branch, writer.samples[writer.rows(0)]
        patterns = small_patterns(small_campaign, samples)
        writer.commit([write_block(writer.fork(), writer.group, 0, samples, patterns)])
    largest: Path = max((store.path / "chunks").iterdir(), key=lambda file: file.stat().st_size)
    largest.unlink()  # a block, which simulate computes again
    code, _, err = command(store_command.app, "repair", branch, "--store", store.path)
    assert (code, err.count("\n")) == (2, 1)
    assert "can be read: run its simulate command again" in err
    assert Store(store.path).unfinished()[0].done == len(samples)
