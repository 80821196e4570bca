"""The command `store`: verify, repair, gc, expire, copy, stats, migrate, on a real store."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from bragg_data.store import block_writer, schema
from bragg_data.store.block_writer import COMPRESSORS
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.verification import verify
from catalog.features import FeatureWriter
from catalog.views import view_of
from pipelines import store as store_command
from pipelines.cli.console import run
from tests.damage import chunk_file, flip
from tests.small_store import TAG, simulate


@pytest.fixture
def store(small_store, tmp_path) -> Store:
    """A copy of the small store."""
    shutil.copytree(small_store.path, tmp_path / "store", ignore=shutil.ignore_patterns("verified"))
    return Store(tmp_path / "store")


@pytest.fixture
def command(capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def execute(*arguments: object) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exit_:
                run(store_command.app, [*map(str, arguments)])
        finally:
            signal.signal(signal.SIGTERM, before)
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return execute


def is_as(store: Store, small_store: Store) -> bool:
    """Whether the data set is that of another store: snapshot, content hash and intensities."""
    repaired, expected = Store(store.path).open(TAG), small_store.open(TAG)
    np.testing.assert_array_equal(repaired.intensity.values, expected.intensity.values)
    return verify(repaired) == expected.attrs["content_hash"]


@pytest.mark.parametrize("how", ["flipped", "missing", "cut short"])
def test_repair_computes_only_the_damaged_blocks(store, small_store, command, how):
    snapshot = store.tag(TAG).snapshot_id
    for block in (3, 11):  # the last one is shorter
        file = chunk_file(store, TAG, block)
        if how == "flipped":
            flip(file)
        elif how == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-9])
    code, out, err = command("verify", "--store", store.path)
    assert (code, err) == (1, "")
    assert f"{TAG}: 2 damaged" in out
    assert f"pipelines.store repair {TAG} --store {store.path}" in out
    code, out, err = command("repair", TAG, "--store", store.path)
    assert (code, err) == (0, "")
    assert f"{TAG}: 2 blocks computed again" in out
    assert Store(store.path).tag(TAG).snapshot_id == snapshot
    assert is_as(store, small_store)
    code, out, _ = command("verify", "--store", store.path)
    assert (code, f"{TAG}: byte for byte what was written" in out) == (0, True)


def test_repair_of_a_named_block_reads_no_other(store, small_store, command):
    flip(chunk_file(store, TAG, 3))
    flip(chunk_file(store, TAG, 4))
    assert command("repair", TAG, "--block", 3, "--store", store.path)[0] == 0
    code, out, _ = command("verify", "--store", store.path)
    assert (code, f"{TAG}: 1 damaged" in out) == (1, True)
    code, _, err = command("repair", TAG, "--block", 12, "--store", store.path)
    assert (code, "There is no block 12: they are 0 to 11." in err) == (2, True)
    assert command("repair", TAG, "--store", store.path)[0] == 0
    assert is_as(store, small_store)


@pytest.mark.parametrize("array", ["c", "tof"])
def test_labels_and_the_grid_are_repaired(store, small_store, command, array):
    flip(chunk_file(store, TAG, 0, array))
    code, out, _ = command("verify", "--store", store.path)
    assert (code, "1 damaged" in out) == (1, True)
    code, out, _ = command("repair", TAG, "--store", store.path)
    assert f"0 blocks computed again, {array} written again" in out
    assert is_as(store, small_store)


def test_lost_manifests_give_a_new_snapshot_and_the_same_tag_and_hash(store, small_store, command):
    damaged = store.tag(TAG).snapshot_id
    flip(chunk_file(store, TAG, 3))
    for manifest in (store.path / "manifests").iterdir():
        manifest.unlink()
    code, out, err = command("repair", TAG, "--store", store.path)
    assert (code, err) == (0, "")
    assert f"{TAG}: 12 blocks computed again, new snapshot" in out
    assert is_as(store, small_store)
    # What was damaged can be reached by nobody, and gc deletes it.
    opened = Store(store.path)
    repository = opened.repository
    reached = {
        info.id
        for branch in repository.list_branches()
        for info in repository.ancestry(branch=branch)
    }
    assert damaged not in reached | {opened.tag(TAG).snapshot_id}
    code, out, _ = command("gc", "--store", store.path)
    assert (code, "Deleted: 0 chunks" not in out) == (0, True)
    assert not (store.path / "snapshots" / damaged).exists()
    assert is_as(store, small_store)


def test_what_cannot_be_repaired_is_refused(store, command):
    (store.path / "snapshots" / store.tag(TAG).snapshot_id).unlink()
    code, _, err = command("repair", TAG, "--store", store.path)
    assert (code, err.count("\n")) == (2, 1)
    assert "is missing. Restore the store from a copy." in err


def test_other_patterns_are_refused_and_nothing_is_written(store, command, monkeypatch):
    """As an installation with another linear algebra computes them."""
    from pipelines.simulation import repair

    exact = repair.simulate_samples
    monkeypatch.setattr(repair, "simulate_samples", lambda *a: exact(*a) * np.float32(1.0000001))
    flip(chunk_file(store, TAG, 3))
    before = {f: f.read_bytes() for f in (store.path / "chunks").iterdir()}
    code, _, err = command("repair", TAG, "--store", store.path)
    assert (code, err.count("\n")) == (2, 1)
    assert "computes block 3 otherwise than" in err
    assert {f: f.read_bytes() for f in (store.path / "chunks").iterdir()} == before


def test_gc_deletes_orphans_and_scratch_and_nothing_else(store, small_store, command):
    orphan = store.path / "chunks" / "0123456789ABCDEFGHJG"
    orphan.write_bytes(bytes(5000))
    next_to = store.path.parent
    scratch = [store.path / ".repair-x", next_to / f".{store.path.name}-{'0a' * 16}"]
    of_a_person = next_to / f".{store.path.name}-old"
    for folder in (scratch[1], of_a_person):
        folder.mkdir()
    for path in (scratch[0], scratch[1] / "file"):
        path.write_bytes(bytes(100))
    for path in (*scratch, of_a_person):
        os.utime(path, (time.time() - 7200,) * 2)
    recent = store.path / ".repair-recent"
    recent.write_bytes(b"")
    code, out, _ = command("stats", "--json", "--store", store.path)
    assert json.loads(out)["garbage"]["chunks"] == 1
    code, out, _ = command("gc", "--dry-run", "--store", store.path)
    assert (code, "To delete: 1 chunks" in out, "2 scratch files, 5.2 kB" in out) == (0, True, True)
    assert orphan.exists()
    code, out, _ = command("gc", "--store", store.path)
    assert "Deleted: 1 chunks" in out
    assert not any(path.exists() for path in (orphan, *scratch))
    assert recent.exists()
    assert of_a_person.exists()
    assert is_as(store, small_store)


def test_a_repair_that_was_killed_is_done_again(store, small_store, command):
    """It leaves a branch without a data set, and chunks that nothing refers to."""
    repository = store.repository
    repository.create_branch(f"rewrite-{TAG}", repository.lookup_branch("main"))
    (store.path / "chunks" / "0123456789ABCDEFGHJG").write_bytes(bytes(5000))
    for manifest in (store.path / "manifests").iterdir():
        manifest.unlink()
    assert command("repair", TAG, "--store", store.path)[0] == 0
    assert is_as(store, small_store)
    assert command("gc", "--store", store.path)[0] == 0
    assert f"rewrite-{TAG}" not in Store(store.path).repository.list_branches()
    assert not (store.path / "chunks" / "0123456789ABCDEFGHJG").exists()
    assert is_as(store, small_store)


def test_gc_waits_for_who_writes(store, command):
    """Chunks of a data set that is being written belong to nothing until they are committed."""
    with store.locked("small-8b427006b5f7", "it"):
        code, _, err = command("gc", "--store", store.path)
    assert (code, "Another process is writing a data set" in err) == (2, True)


def test_a_repair_is_refused_while_features_are_written(store, command):
    """A repair that writes the data set again would lose them."""
    view = view_of("profile_cropped")
    with (
        FeatureWriter(store, store.open(TAG), view, 8) as writer,
        FeatureWriter(store, store.open(TAG), view_of("profile_minmax"), 8) as other,
    ):  # side by side
        assert writer.missing() == other.missing() == list(range(12))
        code, _, err = command("repair", TAG, "--store", store.path)
    assert (code, "Another process is writing" in err) == (2, True)
    assert command("repair", TAG, "--store", store.path)[0] == 0
    with (
        store.locked(writer.branch, "it"),
        pytest.raises(StoreError, match="Another process is writing"),
        FeatureWriter(store, store.open(TAG), view, 8),
    ):
        pass


def test_gc_leaves_a_repair_that_runs(store, command):
    """In object storage, where nothing is locked, what is younger than the days given stays."""
    repository = store.repository
    repository.create_branch("rewrite-it", repository.lookup_branch("main"))
    assert command("gc", "--days", 1, "--store", store.path)[0] == 0
    assert "rewrite-it" in repository.list_branches()
    reference = store.path / "refs" / "branch.rewrite-it" / "ref.json"
    os.utime(reference, (time.time() - 2 * 86_400,) * 2)
    assert command("gc", "--days", 1, "--store", store.path)[0] == 0
    assert "rewrite-it" not in repository.list_branches()


def test_expire_forgets_the_history_and_keeps_the_tag(store, small_store, command):
    options = "--days", 0, "--store", store.path
    code, out, _ = command("expire", "--dry-run", *options)
    assert (code, "To expire: 2 snapshots" in out) == (0, True)
    code, out, _ = command("expire", *options)
    assert (code, "Expired: 2 snapshots" in out) == (0, True)
    code, out, _ = command("gc", "--store", store.path)
    assert (code, "chunks, 0 files" not in out) == (0, True)
    assert is_as(store, small_store)


def test_a_copy_has_the_same_tags_and_hashes(store, small_store, tmp_path, command):
    code, out, _ = command("copy", tmp_path / "there" / "copy", "--store", store.path)
    assert (code, "1 data sets, verified" in out) == (0, True)
    copied = Store(tmp_path / "there" / "copy")
    assert copied.tags() == small_store.tags()
    shutil.rmtree(store.path)
    assert is_as(copied, small_store)
    code, _, err = command("copy", copied.path, "--store", copied.path)
    assert (code, "is there already" in err) == (2, True)
    assert [path.name for path in copied.path.parent.iterdir()] == ["copy"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB of its own."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_keeps_no_part_of_a_copy(small_store, disk, command):
    (disk / "other").write_bytes(bytes(7_500_000))
    code, _, err = command("copy", disk / "copy", "--store", small_store.path)
    assert (code, err.count("\n"), "The disk is full" in err) == (2, 1, True)
    assert [path.name for path in disk.iterdir()] == ["other"]


def test_a_store_on_a_read_only_disk_is_read(small_store, disk, command):
    """What has to write ends with one sentence, and leaves nothing behind."""
    store = shutil.copytree(
        small_store.path, disk / "store", ignore=shutil.ignore_patterns("verified")
    )
    flip(chunk_file(Store(store), TAG, 3))
    files = sorted(disk.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, out, err = command("verify", "--store", store)
    assert (code, err, f"{TAG}: 1 damaged" in out) == (1, "", True)
    assert command("stats", "--store", store)[0] == 0
    for arguments in (("repair", TAG), ("gc",), ("expire",)):
        code, _, err = command(*arguments, "--store", store)
        assert (code, err.count("\n"), "Read-only file system" in err) == (2, 1, True), arguments
    assert sorted(disk.rglob("*")) == files


def test_a_damaged_store_is_copied_but_not_called_verified(store, tmp_path, command):
    chunk_file(store, TAG, 5).unlink()
    code, out, err = command("copy", tmp_path / "copy", "--store", store.path)
    assert (code, "verified" in out.lower().replace("verifying", "")) == (2, False)
    assert "Block 5 of small" in err


def test_stats_of_a_store(store, command):
    code, out, _ = command("stats", "--json", "--store", store.path)
    (known,) = json.loads(out)["data_sets"]
    assert code == 0
    assert (known["name"], known["samples"], known["blocks"]) == (TAG, 710, 12)
    assert (known["schema_version"], known["checksums"], known["complete"]) == (1, True, True)
    assert known["bytes"] == store.size(TAG)
    out = command("stats", "--store", store.path)[1]
    assert "710" in out


def test_migrate_adds_checksums_and_keeps_tag_and_hash(
    tmp_path, small_campaign, small_store, command, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(block_writer, "COMPRESSORS", COMPRESSORS[:1])  # as they were written before
        patch.setattr(schema, "SCHEMA_VERSION", 0)
        store = Store(tmp_path / "old", create=True)
        simulate(store, small_campaign, TAG)
    flip(chunk_file(store, TAG, 3))
    assert np.isfinite(store.open(TAG).intensity.values).all()  # nobody notices
    code, out, _ = command("verify", "--store", store.path)
    assert (code, "1 damaged" in out) == (1, True)
    code, out, _ = command("migrate", "--dry-run", "--store", store.path)
    assert (code, f"To write again: {TAG}" in out) == (0, True)
    code, out, _ = command("migrate", "--store", store.path)
    assert (code, f"Written again: {TAG}" in out) == (0, True)
    assert Store(store.path).open(TAG).attrs["schema_version"] == 1
    assert is_as(store, small_store)
    code, out, _ = command("migrate", "--store", store.path)
    assert (code, "Nothing to do." in out) == (0, True)
