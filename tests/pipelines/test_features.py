"""Feature views: the same numbers in the store, in training and in inference."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xarray as xr
from distributed import Client
from typer.testing import CliRunner

from bragg_data.preprocessing import preprocessing
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.schema import campaign_of
from catalog import features
from catalog.features import FeatureWriter
from catalog.tracking import Tracking
from catalog.views import VIEWS, FeatureError, view_of
from pipelines.cluster.client import open_client
from pipelines.features import app
from pipelines.registry.feature_views import RegisteredModel, features_of, materialise

if TYPE_CHECKING:
    from tests.small_bench import Bench

pytestmark = pytest.mark.cluster

# Those of measured data sets are tested with these.
PURE = [key for key, view in VIEWS.items() if view.function and view.inputs == ("intensity",)]
NETWORKS = [key for key, view in VIEWS.items() if view.model]
TAG = "small-v1"


@pytest.fixture
def store(small_store: Store, tmp_path: Path) -> Store:
    """A copy: the small store itself stays as it is."""
    shutil.copytree(small_store.path, tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_client("local", workers=2) as opened:
        yield opened


def model_of(bench: Bench, kind: str) -> RegisteredModel:
    return RegisteredModel(bench.tracking.uri, bench.versions(kind)[0])


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("key", PURE)
def test_a_pure_view_is_what_inference_computes_to_the_last_bit(
    key: str, store: Store, client: Client
) -> None:
    dataset = store.open(TAG)
    as_read = features.load(key, TAG, store.uri)
    view = VIEWS[key]
    assert view.function is preprocessing(key).function  # the same object
    done = materialise(client, store, dataset, view)
    assert (done.done, done.total, done.complete) == (710, 710, True)
    stored = features.load(key, TAG, store.uri)
    values = stored[view.name].values
    np.testing.assert_array_equal(values, as_read[view.name].values)
    for row in (0, 63, 64, 709):  # one by row_values, as inference sees them
        row_values = view.function(dataset.intensity[row : row + 1].values)  # type: ignore[misc]
        np.testing.assert_array_equal(values[row : row + 1], row_values.astype(np.float32))
    xr.testing.assert_equal(stored.drop_vars(view.name), as_read.drop_vars(view.name))
    np.testing.assert_array_equal(stored.a.values, dataset.a.values)
    assert stored[view.name].attrs["source_snapshot_id"] == dataset.attrs["snapshot_id"]


@pytest.mark.parametrize(
    ("key", "kind"), [("classifier_256@1", "classifier"), ("cae_latent@1", "caenn")]
)
def test_a_network_s_view_is_what_its_model_sees(
    key: str, kind: str, store: Store, client: Client, everything: str, bench: Bench
) -> None:
    assert everything
    view, dataset = VIEWS[key], store.open(TAG)
    with pytest.raises(FeatureError, match=rf"not materialised.*features materialise {key}"):
        features.load(key, TAG, store.uri)
    model = model_of(bench, kind)
    materialise(client, store, dataset, view, model)
    stored = features.load(view.name, TAG, store.uri)[view.name]
    assert stored.attrs["model"] == model.version.uri
    profiles = dataset.intensity[:64].values  # one block
    predictor = bench.predictor(kind)
    np.testing.assert_array_equal(stored[:64].values, predictor.features(profiles))
    alone = np.concatenate([features_of(view, model, profiles[r : r + 1]) for r in range(8)])
    scale = np.abs(stored[:8].values).max()
    np.testing.assert_allclose(stored[:8].values, alone, rtol=1e-6, atol=1e-6 * scale)


def test_the_transfer_learner_is_trained_on_the_classifier_s_view(
    store: Store, client: Client, everything: str, bench: Bench
) -> None:
    """With the view or without it, it becomes the same; and it sees the view when it answers."""
    assert everything
    dataset = store.open(TAG)
    view = view_of("classifier_256")
    done = materialise(client, store, dataset, view, model_of(bench, "classifier"))
    database = store.path.parent / "other.db"
    shutil.copy(bench.tracking.uri.removeprefix("sqlite:///"), database)
    tracking = Tracking(f"sqlite:///{database}")
    other = replace(bench, store=store, tracking=tracking, state=store.path.parent / "state")
    output = other("transfer")
    assert f"Features from the view classifier_256@1, snapshot {done.snapshot_id}" in output
    run = tracking.client.get_run(other.versions("transfer")[0].run_id)
    assert run.data.params["view_snapshot_id"] == done.snapshot_id
    # The first of those there: tests of other modules may have trained it again.
    assert other.metrics("transfer") == bench.metrics("transfer", -1)
    stored = features.load(view, TAG, store.uri).classifier_256[:64].values
    seen = other.predictor("transfer").features(dataset.intensity[:64].values)
    np.testing.assert_array_equal(seen, stored)


def test_current_values_stay_and_changed_values_are_computed_again(
    store: Store, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, view = store.open(TAG), view_of("profile_cropped")
    first = materialise(client, store, dataset, view)
    again = materialise(client, store, dataset, view)
    assert again == first  # not even a commit
    assert "0 of 12 blocks to do" in capsys.readouterr().out
    with FeatureWriter(store, dataset, view, 489, model=("models:/x/1", "ab")) as other:
        assert len(other.missing()) == 12
    assert not features.materialised(store)[0].complete
    # The data set itself is as it was.
    assert store.open(TAG).attrs["snapshot_id"] == dataset.attrs["snapshot_id"]
    assert store.unfinished() == []
    (known,) = store.data_sets_of(campaign_of(dataset))
    assert known.tag == TAG


KILLED = """
import sys, time
from bragg_data.store.repository import Store
from catalog.features import FeatureWriter, write_features
from catalog.views import view_of
store = Store(sys.argv[1])
dataset, view = store.open("small-v1"), view_of("profile_minmax")
with FeatureWriter(store, dataset, view, 800) as writer:
    for block in writer.missing():
        values = view.function(dataset.intensity[writer.rows(block)].values)
        writer.commit([write_features(writer.fork(), writer.group, block, values)])
        print(block, flush=True)
        time.sleep(0.2)
"""


def test_after_a_kill_only_missing_blocks_are_computed(store: Store, client: Client) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, store.uri],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdout is not None
        for _ in range(3):
            assert child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
    (partly,) = features.materialised(store)
    assert 3 * 64 <= partly.done < partly.total
    # What is not complete is not loaded; a pure view is computed instead.
    assert features.load("profile_minmax", TAG, store.uri).profile_minmax.chunks is not None
    assert "samples are done" in features.stale(store, _none(store))[0].reason
    dataset = store.open(TAG)
    done = materialise(client, store, dataset, view_of("profile_minmax"))
    assert done.complete
    expected = view_of("profile_minmax").function(dataset.intensity.values)  # type: ignore[misc]
    stored = features.load("profile_minmax", TAG, store.uri).profile_minmax
    assert stored.chunks is None
    np.testing.assert_array_equal(stored.values, expected)


def _none(store: Store) -> Tracking:
    return Tracking(f"sqlite:///{store.path.parent}/mlflow.db")


def test_two_at_once_are_refused(store: Store) -> None:
    dataset, view = store.open(TAG), view_of("profile_minmax")
    with (
        FeatureWriter(store, dataset, view, 800),
        pytest.raises(StoreError, match=r"Another process is writing .*features/profile_min"),
        FeatureWriter(store, dataset, view, 800),
    ):
        pass


def test_values_out_of_date_are_listed_with_the_remedy(
    store: Store, client: Client, everything: str, bench: Bench
) -> None:
    assert everything
    dataset = store.open(TAG)
    view = view_of("classifier_256")
    newest = model_of(bench, "classifier")
    former = replace(newest, version=replace(newest.version, version="0"))
    materialise(client, store, dataset, view, former)
    uri = newest.version.uri
    (outdated,) = features.stale(store, bench.tracking)
    assert outdated.reason == f"{uri} is newer than models:/small-classifier/0"
    assert (
        outdated.command
        == "python -m pipelines.features materialise classifier_256@1 --data small-v1"
    )
    key = "profile_minmax@1"
    materialise(client, store, dataset, VIEWS[key])
    newer = replace(VIEWS[key], version=2)
    views = {**VIEWS, newer.key: newer}
    by_view = {values.view: values for values in features.stale(store, bench.tracking, views)}
    assert by_view["profile_minmax@1"].reason == "profile_minmax@2 is newer"
    assert "materialise profile_minmax@2" in by_view["profile_minmax@1"].command
    changed = replace(VIEWS["profile_minmax@1"], function=VIEWS["profile_cropped@1"].function)
    changed = replace(changed, earlier_hashes=())
    reasons = [o.reason for o in features.stale(store, bench.tracking, {**VIEWS, key: changed})]
    assert "its definition changed" in reasons
    without = {k: v for k, v in VIEWS.items() if k != key}
    reasons = [o.reason for o in features.stale(store, bench.tracking, without)]
    assert "its definition is gone" in reasons


def test_commands(store: Store, everything: str, bench: Bench) -> None:
    assert everything
    where = ["--store", store.uri]
    listed = command("list", *where)
    assert all(view.name in listed for view in VIEWS.values())
    tracked = [*where, "--tracking", bench.tracking.uri]
    # As people start it, and in a process of its own, where the commands are __main__.
    started = [sys.executable, "-m", "pipelines.features", "materialise", "classifier_256"]
    done = subprocess.run(
        [*started, *tracked, "--workers", "1"],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    uri = bench.versions("classifier")[0].uri
    assert f"Computed by {uri}" in output
    assert "710 samples" in output
    shown = command("show", "classifier_256", *where)
    assert uri in shown
    assert store.open(TAG).attrs["snapshot_id"] in shown
    assert "Nothing is out of date" in command("stale", *tracked)
    for arguments, message in (
        (("show", "profile_maxmin", *where), r"no feature view 'profile_maxmin'. Known: profile_"),
        (("materialise", "cae_latent", "--model", uri, *tracked), "is computed by a caenn"),
    ):
        with pytest.raises(FeatureError, match=message):
            CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_without_its_model_a_view_is_refused(store: Store, client: Client) -> None:
    dataset = store.open(TAG)
    with pytest.raises(FeatureError, match="computed by a registered caenn, and none was trained"):
        features.model_of_view(_none(store), VIEWS["cae_latent@1"], dataset)
    with pytest.raises(FeatureError, match="name one"):
        materialise(client, store, dataset, VIEWS["cae_latent@1"])
