"""The store: round trip, resume, tags, refusals, locks, the content hash."""

import hashlib
import os
import pickle
import subprocess
from pathlib import Path

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr
from filelock import Timeout

from bragg_data.campaign import Campaign
from bragg_data.store import place as places
from bragg_data.store import schema
from bragg_data.store.repository import DataSet, DiskFullError, Store, StoreError, open_snapshot
from bragg_data.store.schema import campaign_of
from bragg_data.store.simulated import BlockResult, Writer, write_block
from bragg_data.store.verification import verify
from tests.tiny_campaign import tiny_campaign, tiny_patterns


def write(writer: Writer, blocks: list[int]) -> None:
    results = []
    for block in blocks:
        samples = writer.samples[writer.rows(block)]
        intensity = tiny_patterns(samples)
        # As on its way to a worker and back.
        fork = pickle.loads(pickle.dumps(writer.fork()))
        result = write_block(fork, writer.group, block, samples, intensity)
        results.append(pickle.loads(pickle.dumps(result)))
    writer.commit(results)


def fill(uri: Path, campaign: Campaign, tag: str | None = None, **options) -> str:
    with Writer(Store(uri, create=True), campaign, "kinematic", "0", **options) as writer:
        write(writer, writer.missing())
        return writer.finish(tag).name


@pytest.fixture
def campaign(tmp_path):
    return tiny_campaign(tmp_path)


def test_round_trip(tmp_path, campaign):
    tag = fill(tmp_path / "store", campaign)
    assert tag == "tiny-v1"
    dataset = open_snapshot(tag, (tmp_path / "store").as_uri())
    expected = tiny_patterns(campaign.samples)
    assert not dataset.variables["intensity"]._in_memory  # nothing is read before it is needed
    np.testing.assert_array_equal(dataset.intensity.values, expected)
    np.testing.assert_array_equal(dataset.alpha.values, campaign.samples.cells[:, 3])
    np.testing.assert_array_equal(dataset.tof.values, campaign.grid.tof)
    assert dataset.attrs["tag"] == tag
    assert dataset.attrs["uri"] == (tmp_path / "store").as_uri()
    assert dataset.attrs["snapshot_id"] == Store(tmp_path / "store").tags()[0].snapshot_id
    rebuilt = campaign_of(dataset)
    assert rebuilt.identity("kinematic", "0") == campaign.identity("kinematic", "0")
    assert rebuilt.instrument == campaign.instrument


def test_plain_xarray_opens_a_snapshot(tmp_path, campaign):
    fill(tmp_path / "store", campaign)
    storage = icechunk.local_filesystem_storage(str(tmp_path / "store"))
    session = icechunk.Repository.open(storage).readonly_session(tag="tiny-v1")
    # Not by way of a cluster that another test has closed.
    dataset = xr.open_zarr(session.store, group="tiny", consolidated=False, chunks=None)
    cubic = dataset.intensity[np.flatnonzero(dataset.crystal_system == 0)]
    assert cubic.shape == (21, 256)
    assert np.isfinite(cubic.values).all()


def test_queries_by_label_and_row(tmp_path, campaign):
    fill(tmp_path / "store", campaign)
    dataset = open_snapshot("tiny-v1", tmp_path / "store")
    box = (dataset.phase == 1) & (dataset.a >= 3.99) & (dataset.c < 4.04)
    rows = np.flatnonzero(box)
    assert len(rows) == 3 * 2
    expected = tiny_patterns(campaign.samples[rows])
    np.testing.assert_array_equal(dataset.intensity.isel(sample=rows).values, expected)


def test_content_hash_follows_its_documented_layout(tmp_path, campaign):
    tag = fill(tmp_path / "store", campaign)
    dataset = open_snapshot(tag, tmp_path / "store").load()
    whole = hashlib.sha256(dataset.attrs["identity"].encode())
    for start in range(0, dataset.sizes["sample"], 8):
        part = dataset.isel(sample=slice(start, start + 8))
        cells = np.stack([part[n].values for n in ("a", "b", "c", "alpha", "beta", "gamma")], 1)
        block = hashlib.sha256(
            cells.astype("<f8").tobytes()
            + part.crystal_system.values.tobytes()
            + part.phase.values.tobytes()
            + part.intensity.values.astype("<f4").tobytes()
        )
        whole.update(block.digest())
    assert dataset.attrs["content_hash"] == whole.hexdigest()
    assert verify(dataset) == whole.hexdigest()


def test_content_hash_ignores_order_interruptions_and_place(tmp_path, campaign):
    fill(tmp_path / "one", campaign, provenance={"code_commit": "abc"})
    with Writer(Store(tmp_path / "two", create=True), campaign, "kinematic", "0") as writer:
        assert writer.n_blocks == 9
        write(writer, [7, 2])
    with Writer(Store(tmp_path / "two"), campaign, "kinematic", "0") as writer:
        assert writer.missing() == [0, 1, 3, 4, 5, 6, 8]
        assert writer.n_done == 16
        write(writer, [8, 0, 1])
        write(writer, [3, 4, 5, 6])
        writer.finish("other")
    whole, resumed = (
        open_snapshot("tiny-v1", tmp_path / "one"),
        open_snapshot("other", tmp_path / "two"),
    )
    assert whole.attrs["content_hash"] == resumed.attrs["content_hash"]
    assert verify(resumed) == verify(whole)


def test_verify_finds_a_changed_number(tmp_path, campaign):
    fill(tmp_path / "store", campaign)
    dataset = open_snapshot("tiny-v1", tmp_path / "store").load()
    dataset.intensity[20, 100] *= 1.001
    with pytest.raises(
        StoreError,
        match=r"Block 2 \(samples 16 to 23\) of tiny-v1.*bragg store repair tiny-v1 --store file",
    ):
        verify(dataset)


def test_finish_refuses_what_is_incomplete(tmp_path, campaign):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, writer.missing()[:-1])
        with pytest.raises(schema.SchemaError, match=r"3 of 67 samples.*same command again"):
            writer.finish()
    assert store.tags() == []
    (unfinished,) = store.unfinished()
    assert (unfinished.done, unfinished.total) == (64, 67)


def test_a_death_between_the_last_commit_and_the_tag_is_mended(tmp_path, campaign):
    expected = fill(tmp_path / "other", campaign)
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, writer.missing())
        session = store.repository.writable_session(writer.branch)
        hash_ = open_snapshot(expected, tmp_path / "other").attrs["content_hash"]
        zarr.open_group(session.store, path=writer.group, mode="r+").attrs["content_hash"] = hash_
        session.commit("what finish does before it tags")
    with Writer(store, campaign, "kinematic", "0") as writer:
        assert writer.missing() == []
        tag = writer.finish()
    assert verify(store.open(tag.name)) == hash_


def test_failures_are_recorded_and_forgotten_when_mended(tmp_path, campaign):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        samples = writer.samples[writer.rows(1)]
        intensity = tiny_patterns(samples)
        intensity[3, 7] = np.nan
        result = write_block(writer.fork(), writer.group, 1, samples, intensity)
        assert result.fork is None
        assert result.status.tolist() == [0, 0, 0, -1, 0, 0, 0, 0]
        writer.commit([result])
        write(writer, [0, 2, 3, 4])
    assert store.unfinished()[0].failed_blocks == 1
    with Writer(store, campaign, "kinematic", "0") as writer:
        assert "1 patterns are not finite" in writer.failures[1]
        assert writer.missing() == [5, 6, 7, 8, 1]  # the one that failed waits for the others
        write(writer, writer.missing())
        assert writer.failures == {}
        writer.finish()
    assert "failures" not in open_snapshot("tiny-v1", tmp_path / "store").attrs
    verify(open_snapshot("tiny-v1", tmp_path / "store"))


def test_a_block_is_a_whole_chunk(tmp_path, campaign):
    with Writer(Store(tmp_path / "store", create=True), campaign, "kinematic", "0") as writer:
        samples = writer.samples[0:4]
        with pytest.raises(StoreError, match=r"a block is one chunk, \(8, 256\)"):
            write_block(writer.fork(), writer.group, 0, samples, tiny_patterns(samples))


def test_code_commits_of_all_runs_are_recorded(tmp_path, campaign):
    store = Store(tmp_path / "store", create=True)
    for commit, blocks in (("aaa", [0, 1]), ("bbb", [2]), ("aaa", list(range(3, 9)))):
        with Writer(
            store, campaign, "kinematic", "0", provenance={"code_commit": commit}
        ) as writer:
            write(writer, blocks)
    with Writer(store, campaign, "kinematic", "0", provenance={"code_commit": "aaa"}) as writer:
        writer.finish()
    assert store.open("tiny-v1").attrs["code_commit"] == "aaa bbb"


def test_two_data_sets_in_a_store(tmp_path, campaign):
    fill(tmp_path / "store", campaign)
    fill(tmp_path / "store", campaign, limit=10)
    store = Store(tmp_path / "store")
    assert [tag.name for tag in store.tags()] == ["tiny-v1", "tiny-v2"]
    assert store.open("tiny-v1").sizes["sample"] == 67
    limited = store.open("tiny-v2")
    assert limited.sizes["sample"] == 10
    np.testing.assert_array_equal(limited.a.values, campaign.samples.cells[:10, 0])
    assert store.data_sets_of(campaign) == [DataSet("kinematic", "0", 67, 67, "tiny-v1")]
    assert store.data_sets_of(campaign, 10) == [DataSet("kinematic", "0", 10, 10, "tiny-v2")]
    assert store.data_sets_of(campaign, 11) == []
    assert store.unfinished() == []
    assert 0 < store.size("tiny-v2") < store.size("tiny-v1")


def test_tags_are_in_the_order_of_their_numbers(tmp_path, campaign):
    store = Store(tmp_path / "store", create=True)
    for number in (10, 2, 1):
        fill(tmp_path / "store", campaign, f"tiny-v{number}", limit=number)
    assert [tag.name for tag in store.tags()] == ["tiny-v1", "tiny-v2", "tiny-v10"]
    assert store.next_tag("tiny") == "tiny-v11"
    assert store.next_tag("tin") == "tin-v1"


def test_a_tag_never_changes(tmp_path, campaign):
    fill(tmp_path / "store", campaign, "mine")
    before = Store(tmp_path / "store").tags()
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"'mine' exists already.*Choose another name"):
        store.check_new_tag("mine")
    with Writer(store, campaign, "kinematic", "0", limit=9) as writer:
        write(writer, writer.missing())
        with pytest.raises(StoreError, match="Choose another name"):
            writer.finish("mine")
        assert store.tags() == before
        writer.finish("yours")
    assert [tag.name for tag in store.tags()] == ["mine", "yours"]


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a b", "ä"])
def test_bad_tag_names_are_refused(tmp_path, name):
    with pytest.raises(StoreError, match="is no tag: use letters"):
        Store(tmp_path / "store", create=True).check_new_tag(name)


def test_unknown_tag_is_refused_with_the_known_tags(tmp_path, campaign):
    fill(tmp_path / "store", campaign)
    uri = (tmp_path / "store").as_uri()
    message = rf"Snapshot 'v3' not found in {uri}\. Known tags: tiny-v1\."
    with pytest.raises(StoreError, match=message):
        open_snapshot("v3", uri)


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    with pytest.raises(StoreError, match=r"no store at .*python -m pipelines\.simulate"):
        Store(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("other", "file"):
        with pytest.raises(StoreError, match=r"no store.*empty or not there yet"):
            Store(tmp_path / name, create=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match="Give a path, or a URI that begins with file:///"):
        Store("ftp://bucket/store")


def test_an_empty_directory_becomes_a_store(tmp_path):
    (tmp_path / "a b").mkdir()
    store = Store((tmp_path / "a b").as_uri(), create=True)
    assert store.path == tmp_path / "a b"
    assert Store(tmp_path / "a b").tags() == []


def test_a_second_writer_of_a_data_set_is_refused(tmp_path, campaign):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        with (
            pytest.raises(StoreError, match=r"Another process.*Wait until it ends"),
            Writer(Store(tmp_path / "store"), campaign, "kinematic", "0"),
        ):
            pass
        with Writer(store, campaign, "kinematic", "0", limit=9) as other:  # another data set
            write(other, [0, 1])
        write(writer, writer.missing())
        writer.finish()
    with Writer(store, campaign, "kinematic", "0") as writer:
        assert writer.missing() == []


def test_other_cells_under_the_same_identity_are_refused(tmp_path, campaign):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, [0])
    writer = Writer(store, campaign, "kinematic", "0")
    writer.samples.cells[66, 0] += 1e-9
    with pytest.raises(StoreError, match="package versions that began it"), writer:
        pass


def test_a_commit_that_fails_changes_nothing(tmp_path, campaign):
    """A directory that takes no more files, here because a file is in its place."""
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, [0, 1])
        transactions = tmp_path / "store" / "transactions"
        transactions.rename(tmp_path / "aside")
        transactions.write_text("")
        with pytest.raises(StoreError, match=r"^Failed .*: .*Not a directory"):
            write(writer, [2, 3])
        transactions.unlink()
        (tmp_path / "aside").rename(transactions)
    with Writer(Store(tmp_path / "store"), campaign, "kinematic", "0") as writer:
        assert writer.missing() == [2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_full_disk_leaves_the_store_sound(small_disk, tmp_path):
    campaign = tiny_campaign(tmp_path, rows=64, last=6.0)
    with Writer(Store(small_disk, create=True), campaign, "kinematic", "0") as writer:
        written = []
        blocks = iter(writer.missing())

        def write_on() -> None:
            for block in blocks:
                write(writer, [block])
                written.append(block)

        with pytest.raises(DiskFullError, match=r"disk is full.*Free some space.*same command"):
            write_on()
        assert written
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    with Writer(Store(small_disk), campaign, "kinematic", "0") as writer:
        assert writer.missing() == [b for b in range(writer.n_blocks) if b not in written]
        write(writer, writer.missing())
        writer.finish()
    fill(tmp_path / "store", campaign)
    hashes = {verify(open_snapshot("tiny-v1", uri)) for uri in (small_disk, tmp_path / "store")}
    assert len(hashes) == 1


def test_a_read_only_place_is_refused_in_a_sentence(small_disk, tmp_path):
    campaign = tiny_campaign(tmp_path)
    fill(small_disk / "store", campaign, limit=8)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("store", "new"):
        with pytest.raises(StoreError, match=r"^Failed .*Read-only file system"):
            fill(small_disk / name, campaign)
    assert verify(open_snapshot("tiny-v1", small_disk / "store"))  # reading needs no lock


def test_full_disk_when_the_data_set_is_created(small_disk, tmp_path):
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    campaign = tiny_campaign(tmp_path)
    store = small_disk / "store"
    with pytest.raises(DiskFullError, match="Free some space"):
        fill(store, campaign)
    (small_disk / "ballast").unlink()
    assert fill(store, campaign) == "tiny-v1"


def test_block_results_of_a_commit_may_fail_and_succeed(tmp_path, campaign):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        samples = writer.samples[writer.rows(4)]
        good = write_block(writer.fork(), writer.group, 4, samples, tiny_patterns(samples))
        bad = BlockResult(5, np.full(8, schema.FAILED, np.int8), reason="it rained")
        writer.commit([bad, good])
        assert writer.failures == {5: "it rained"}
        assert writer.n_done == 8
    session = store.repository.readonly_session(branch=writer.branch)
    status = zarr.open_array(session.store, path="tiny/status", mode="r")[:]
    assert status[32:48].tolist() == [1] * 8 + [-1] * 8
    assert not status[:32].any()


def test_a_commit_that_fails_leaves_the_writer_as_the_store_is(tmp_path, campaign):
    place, away = tmp_path / "store", tmp_path / "away"
    with Writer(Store(place, create=True), campaign, "kinematic", "0") as writer:
        samples = writer.samples[writer.rows(4)]
        good = write_block(writer.fork(), writer.group, 4, samples, tiny_patterns(samples))
        bad = BlockResult(5, np.full(8, schema.FAILED, np.int8), reason="it rained")
        missing = writer.missing()
        place.rename(away)
        with pytest.raises(StoreError, match=r"^Failed committing"):
            writer.commit([bad, good])
        away.rename(place)
        assert writer.n_done == 0
        assert writer.failures == {}
        assert writer.missing() == missing
        writer.commit([bad, good])
        assert writer.n_done == 8
        assert writer.failures == {5: "it rained"}
        assert writer.missing() == [b for b in missing if b not in (4, 5)] + [5]


def test_a_tag_follows_what_it_names_to_the_disk(tmp_path, campaign, monkeypatch):
    """In a power failure the disk keeps what was synchronised; a tag is never all that it keeps."""
    store, exact, synced = Store(tmp_path / "store", create=True), places._sync_file_system, []

    def sync(descriptor: int) -> None:
        exact(descriptor)
        try:
            store.lock("commit").acquire(timeout=0).lock.release()
            locked = False
        except Timeout:
            locked = True
        synced.append((locked, {path for path in store.path.rglob("*") if path.is_file()}))

    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, range(writer.n_blocks))
        monkeypatch.setattr(places, "_sync_file_system", sync)
        writer.finish()
    (was_locked, first), (_, at_tag), (_, last) = synced  # however many files there are
    assert not was_locked
    assert {path for path in last if path.parent.name == "chunks"} <= first
    assert {path.parent.name for path in last - at_tag} == {"tag.tiny-v1"}
    assert {path for path in store.path.rglob("*") if path.is_file()} == last
