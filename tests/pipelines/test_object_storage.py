"""Stores in S3-compatible object storage: a real server, the same commands, the same results."""

import re
import subprocess
import sys
import time
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr

from benchmarks.commits import lost_commits
from bragg_data.campaign import load_campaign
from bragg_data.simulation import kinematic
from bragg_data.store import repair
from bragg_data.store.care import copy
from bragg_data.store.chunk_files import ChunkFiles
from bragg_data.store.place import Place
from bragg_data.store.reading import reason_of
from bragg_data.store.repository import Store, StoreError, open_snapshot
from bragg_data.store.simulated import Writer
from bragg_data.store.verification import verify
from catalog import features
from pipelines import check, grow, inspect, simulate
from pipelines import features as features_command
from pipelines import store as store_command
from pipelines.cluster.client import open_client
from tests.object_storage import BUCKET, SECRET, object_storage
from tests.servers import ROOT, free_port
from tests.small_bench import train_multitask
from tests.small_store import TAG
from tests.small_store import simulate as simulate_into
from tests.tiny_campaign import tiny_campaign, tiny_patterns, write_campaign

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Peaks of this instrument are narrow"),
]


@pytest.fixture(scope="module", autouse=True)
def storage():
    with object_storage() as address:
        yield address


@pytest.fixture(scope="module")
def store(small_campaign) -> Store:
    store = Store(f"s3://{BUCKET}/of/many/small", create=True)
    simulate_into(store, small_campaign, TAG)
    return store


@pytest.fixture(scope="module")
def cluster():
    """The address of a running scheduler, whose worker has the storage's environment."""
    with open_client("local", workers=1) as client:
        yield client.scheduler.address


def damage(store: Store, block: int) -> str:
    """Overwrite an object of a block with another of its length; return its name."""
    session = store.repository.readonly_session(tag=TAG)
    name = f"chunks/{ChunkFiles(store, session, 'small')._file(f'intensity/c/{block}/0')}"
    content = bytearray(store.place.read(name))
    content[len(content) // 2] ^= 1
    store.place.write(name, bytes(content), "")
    return name


def test_a_store_there_is_that_of_a_directory(store, small_store, command):
    where = "--store", store.uri
    dataset, expected = store.open(TAG), small_store.open(TAG)
    assert (dataset.attrs["uri"], store.path) == (store.uri, None)
    np.testing.assert_array_equal(dataset.intensity.values, expected.intensity.values)
    assert verify(dataset) == expected.attrs["content_hash"]
    code, out, err = command(check.app, TAG, *where)
    assert (code, err) == (0, "")
    code, out, err = command(inspect.app, TAG, *where)
    assert (code, dataset.attrs["snapshot_id"] in out, err) == (0, True, "")
    code, out, _ = command(store_command.app, "stats", *where)
    assert (code, "Nothing refers to 0 files" in out) == (0, True)
    code, _, err = command(inspect.app, "other-v1", *where)
    assert (code, f"Known tags: {TAG}." in err) == (2, True)


def test_repair_in_place(store, small_store, command):
    where = "--store", store.uri
    snapshot, name = store.tag(TAG).snapshot_id, damage(store, 3)
    code, out, _ = command(store_command.app, "verify", *where)
    assert (code, f"{TAG}: 1 damaged" in out) == (1, True)
    code, out, err = command(store_command.app, "repair", TAG, *where)
    assert (code, "1 blocks computed again" in out, err) == (0, True, "")
    assert command(store_command.app, "verify", *where)[0] == 0
    assert Store(store.uri).tag(TAG).snapshot_id == snapshot
    # Where the index of the chunks is lost, the tag gets a new snapshot.
    for manifest in store.place.listed(["manifests"]):
        store.place.write(manifest.path, b"", "")
    code, out, err = command(store_command.app, "repair", TAG, *where)
    assert (code, "12 blocks computed again, new snapshot" in out, err) == (0, True, "")
    again = Store(store.uri).open(TAG)
    assert verify(again) == small_store.open(TAG).attrs["content_hash"]
    # What is young may belong to a data set that is being written.
    code, out, _ = command(store_command.app, "gc", *where)
    assert (code, "Deleted: 0 chunks" in out) == (0, True)
    assert command(store_command.app, "expire", "--days", 0, *where)[0] == 0
    code, out, _ = command(store_command.app, "gc", "--days", 0, *where)
    assert (code, "Deleted: 0 chunks" in out, name in out) == (0, False, False)
    assert all(file.path != name for file in store.place.listed(["chunks"]))
    verify(Store(store.uri).open(TAG))


def test_copies_to_a_directory_and_back(store, tmp_path, command):
    there, back = tmp_path / "copy", f"s3://{BUCKET}/back"
    code, out, _ = command(store_command.app, "copy", there, "--store", store.uri)
    assert (code, "1 data sets, verified" in out) == (0, True)
    code, out, _ = command(store_command.app, "copy", back, "--store", there)
    assert (code, "1 data sets, verified" in out) == (0, True)
    assert Store(back).tags() == Store(there).tags() == Store(store.uri).tags()
    assert open_snapshot(TAG, back).equals(open_snapshot(TAG, there))
    code, _, err = command(store_command.app, "copy", back, "--store", there)
    assert (code, "is there already" in err) == (2, True)


def test_a_copy_that_dies_among_the_references_is_continued(store, monkeypatch):
    there, exact = f"s3://{BUCKET}/interrupted", Place.write

    def write(place, name, content, partial):
        if name.startswith("refs/tag."):
            raise ConnectionError("gone")
        exact(place, name, content, partial)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", write)
        with pytest.raises(StoreError, match=r"copying.*gone"):
            copy(store, there)
    with pytest.raises(StoreError, match="it is no store"):
        Store(there)
    assert copy(store, there).tags() == store.tags()


def test_a_repair_is_committed_once_and_not_hindered_by_another(store, small_store, monkeypatch):
    """Where the last step is refused as others commit, and another repair ends or has died."""
    refused, exact = [], repair._point

    def point(*arguments):
        exact(*arguments)
        if not refused:
            refused.append(True)
            store.repository.delete_branch(f"rewrite-{TAG}")
            raise icechunk.ConflictError("one", "another")

    repository = store.repository
    repository.create_branch(f"rewrite-{TAG}", repository.lookup_branch("main"))
    monkeypatch.setattr(repair, "_point", point)
    repair.rewrite(store, TAG, tiny_patterns)
    assert refused
    assert not [name for name in repository.list_branches() if name.startswith("rewrite-")]
    again = Store(store.uri)
    assert verify(again.open(TAG)) == small_store.open(TAG).attrs["content_hash"]
    (branch,) = again.repository.list_branches() - {"main"}
    assert again.repository.lookup_branch(branch) == again.tag(TAG).snapshot_id


def test_the_reason_of_a_failed_repair_is_not_hidden(store):
    def end(_count: int) -> None:
        for name in store.repository.list_branches():
            if name.startswith("rewrite-"):
                store.repository.delete_branch(name)
        raise StoreError("it rained")

    with pytest.raises(StoreError, match=r"^it rained$"):
        repair.rewrite(store, TAG, tiny_patterns, on_block=end)


def test_a_repair_does_not_drop_what_is_written_meanwhile(store):
    """Features, for example: in object storage no lock holds them up."""
    repository = store.repository
    (branch,) = repository.list_branches() - {"main"}
    before = store.tag(TAG).snapshot_id
    written = []

    def write_once(_count: int) -> None:
        if not written:
            session = repository.writable_session(branch)
            zarr.open_group(session.store, mode="r+").attrs["features"] = "new"
            written.append(session.commit("features"))

    with pytest.raises(StoreError, match="written meanwhile"):
        repair.rewrite(store, TAG, tiny_patterns, on_block=write_once)
    again = Store(store.uri)
    assert again.repository.lookup_branch(branch) == written[0]
    assert again.tag(TAG).snapshot_id == before


@pytest.mark.training
def test_training_and_features_read_it_and_no_file_has_the_secret(
    store, cluster, tracking_in, tmp_path, command
):
    tracking = tracking_in(tmp_path)
    train_multitask(store, tracking)
    where = "--store", store.uri, "--cluster", cluster
    code, _, err = command(features_command.app, "materialise", "profile_cropped", *where)
    assert (code, err) == (0, "")
    (stored,) = features.materialised(store)
    assert (stored.complete, stored.tag) == (True, TAG)
    database = (tmp_path / "mlflow.db").read_bytes()
    assert store.uri.encode() in database
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    objects = [file.path for file in store.place.listed([""], below=True)]
    assert not [path for path in objects if SECRET.encode() in store.place.read(path)]


@pytest.mark.cluster
def test_a_killed_driver_resumes_and_the_data_set_grows(tmp_path, cluster, command):
    toml, uri = write_campaign(tmp_path, rows=1), f"s3://{BUCKET}/killed"
    options = "--simulator", "kinematic", "--campaign", toml, "--store", uri
    options = *options, "--cluster", cluster
    arguments = [sys.executable, "-m", "pipelines.simulate", *map(str, options)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL) as driver:
        end, done = time.monotonic() + 60, 0
        while not done and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            done = sum(d.done for d in Store(uri, create=True).unfinished())
        driver.kill()
    assert 0 < done < 67
    campaign = load_campaign(toml)
    with Writer(Store(uri), campaign, "kinematic", kinematic.VERSION) as writer:
        assert len(writer.missing()) < 67
    code, out, err = command(simulate.app, *options)
    assert (code, "Resuming" in out) == (0, True), err
    local = Store(tmp_path / "local", create=True)
    simulate_into(local, tiny_campaign(tmp_path, rows=1), "tiny-v1")
    assert verify(open_snapshot("tiny-v1", uri)) == verify(local.open("tiny-v1"))
    arguments = toml, "--store", uri, "--cluster", cluster, "--where", "random", "--samples", 5
    code, out, err = command(grow.app, *arguments)
    assert (code, open_snapshot("tiny-v2", uri).sizes["sample"]) == (0, 72), err


@pytest.mark.parametrize(
    ("uri", "environment", "sentence"),
    [
        ("s3://other/store", {}, r"There is no bucket 'other' at http://127"),
        ("s3://bragg/nothing", {}, r"There is no store at s3://bragg/nothing. Make one"),
        ("s3://bragg", {}, r"does not name a store: give s3://BUCKET/PREFIX"),
        ("s3://me:secret@bragg/a", {}, r"give s3://bragg/a, and set AWS_ACCESS_KEY_ID and"),
        ("s3://bragg/a", {"AWS_SECRET_ACCESS_KEY": ""}, "has no AWS_SECRET_ACCESS_KEY"),
        ("s3://bragg/a", {"AWS_ENDPOINT_URL": "NOBODY"}, "does not answer: .*onnect"),
        ("s3://bragg/a", {"AWS_ENDPOINT_URL": "http://nobody.invalid"}, "does not answer: "),
    ],
)
def test_what_cannot_be_reached_is_named_at_once(uri, environment, sentence, monkeypatch, command):
    for name, value in environment.items():
        nobody = f"http://127.0.0.1:{free_port()}"
        monkeypatch.setenv(name, value.replace("NOBODY", nobody))
    began = time.monotonic()
    code, out, err = command(store_command.app, "stats", "--store", uri)
    assert time.monotonic() - began < 30  # its retries alone would take minutes
    assert (code, out, err.count("\n"), "secret@" in err) == (2, "", 1, False)
    assert re.search(sentence, err)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NoSuchBucket", "refuses it (NoSuchBucket: it does not exist)"),
        ("dispatch failure", "does not answer (session error: dispatch failure)"),
    ],
)
def test_the_cause_is_the_innermost_of_icechunk_s_errors(text, reason):
    """As Icechunk 1.1.21 spells them; it takes 19 s to give up a server that was killed."""
    inner = (
        "NoSuchBucket: it does not exist" if text == "NoSuchBucket" else f"x session error: {text}"
    )
    error = icechunk.IcechunkError(
        f"  x error listing objects service error\n  | \n  | context:\n  |    0: icechunk::x\n"
        f"  |-> service error\n  `-> {inner}\n  | \n  | context:\n  |    0: icechunk::refs\n"
    )
    assert reason_of(error) == f"the object storage {reason}"


@pytest.mark.parametrize("where", ["directory", "object storage"])
def test_no_commit_is_lost(where, tmp_path: Path):
    uri = f"s3://{BUCKET}/commits" if where == "object storage" else str(tmp_path / "store")
    count = 24 if where == "object storage" else 100
    assert lost_commits(uri, count, 4, lock=True)[0] == 0
