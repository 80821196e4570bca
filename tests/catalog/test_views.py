"""Definitions of feature views: recognised by what they compute, not by how they are written."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from bragg_data.preprocessing import minmax
from bragg_data.store.repository import Store
from catalog import features
from catalog.features import FeatureWriter, group_of, write_features
from catalog.tracking import Tracking
from catalog.views import VIEWS, View, pinned_inputs

TAG = "small-v1"
# As the version before this definition of the hash wrote them: of the functions' source text.
EARLIER = {
    "profile_minmax@1": "4b3bfd9ffa73aedd",
    "profile_cropped@1": "dcf51d0af6fc1473",
    "profile_sqrt_unit@1": "05e2f9ba2b40e70e",
    "profile_smoothed@1": "c023ab463c3015e3",
    "profile_background_subtracted@1": "36e25f93abfb23c0",
    "measured_aligned@1": "7071bccd1470c2ea",
    "classifier_256@1": "5679073bf6836b63",
    "cae_latent@1": "4d905628670e4fd7",
}


@pytest.fixture
def store(small_store: Store, tmp_path: Path) -> Store:
    """A copy: the small store itself stays as it is."""
    shutil.copytree(small_store.path, tmp_path / "store")
    return Store(tmp_path / "store")


def materialise(store: Store, view: View) -> int:
    """Write the missing blocks of a pure view; return their number."""
    dataset = store.open(TAG)
    assert view.function is not None
    size = view.function(dataset.intensity[:1].values).shape[1]
    with FeatureWriter(store, dataset, view, size) as writer:
        missing = list(writer.missing())
        for block in missing:
            values = view.function(dataset.intensity[writer.rows(block)].values)
            writer.commit([write_features(writer.fork(), writer.group, block, values)])
    return len(missing)


def reasons(store: Store) -> list[str]:
    tracking = Tracking(f"sqlite:///{store.path.parent}/mlflow.db")
    return [values.reason for values in features.stale(store, tracking)]


def rescaled(profiles: NDArray[np.float64]) -> NDArray[np.float64]:
    return minmax(profiles)


def rescaled_and_documented(profiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale each profile: the same numbers, with a docstring and another name."""
    scaled = minmax(profiles)
    return np.asarray(scaled)


def with_helper(factor: float) -> View:
    def helper(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return factor * values

    def scaled(profiles: NDArray[np.float64]) -> NDArray[np.float64]:
        return helper(minmax(profiles))

    return View("scaled", 1, "", scaled)


def test_an_edited_docstring_is_the_same_definition() -> None:
    plain = View("scaled", 1, "", rescaled)
    documented = View("scaled", 1, "Described.", rescaled_and_documented)
    assert documented.definition_hash == plain.definition_hash
    assert replace(plain, version=2).definition_hash != plain.definition_hash


def test_a_changed_helper_is_another_definition() -> None:
    assert with_helper(1.0).definition_hash == with_helper(1.0).definition_hash
    assert with_helper(1.0).definition_hash != with_helper(1.001).definition_hash


def test_definitions_do_not_change_without_a_new_version() -> None:
    hashes = {key: view.definition_hash for key, view in VIEWS.items()}
    assert hashes == {
        "profile_minmax@1": "2091a903353ec777",
        "profile_cropped@1": "942eeee283241e31",
        "profile_sqrt_unit@1": "9392303438eaf359",
        "profile_smoothed@1": "d3d52774173602b6",
        "profile_background_subtracted@1": "44f3f36c2acc296a",
        "measured_aligned@1": "0e667fafb0ec310e",
        "classifier_256@1": "5679073bf6836b63",
        "cae_latent@1": "4d905628670e4fd7",
    }


def test_pinned_profiles_look_like_measured_ones() -> None:
    pinned = pinned_inputs()
    assert pinned["intensity"].shape == (2, 640)
    assert pinned["covered"][0].all()
    assert not pinned["covered"][1].all()
    assert ((pinned["sigma"] > 0) == pinned["covered"]).all()


@pytest.mark.parametrize("key", EARLIER)
def test_hashes_of_the_version_before_are_accepted(key: str) -> None:
    assert EARLIER[key] in VIEWS[key].accepted_hashes


@pytest.mark.slow
def test_values_of_the_version_before_are_neither_stale_nor_computed_again(store: Store) -> None:
    view = VIEWS["profile_minmax@1"]
    assert materialise(store, view) == 12
    expected = features.load(view, TAG, store.uri)[view.name].values
    session = store.repository.writable_session(store.branch_of(store.open(TAG)))
    group = zarr.open_group(session.store, path=group_of(view), mode="a")
    group.attrs["definition_hash"] = EARLIER[view.key]
    session.commit("as an earlier version of this project wrote it")
    assert reasons(store) == []
    stored = features.load(view, TAG, store.uri)[view.name]
    assert stored.attrs["definition_hash"] == EARLIER[view.key]
    np.testing.assert_array_equal(stored.values, expected)
    assert materialise(store, view) == 0
    # Values of another definition are.
    session = store.repository.writable_session(store.branch_of(store.open(TAG)))
    group = zarr.open_group(session.store, path=group_of(view), mode="a")
    group.attrs["definition_hash"] = "0123456789abcdef"
    session.commit("another definition")
    assert reasons(store) == ["its definition changed"]
    assert materialise(store, view) == 12
