"""Damaged stores: what is read is what was written, or one sentence names block and remedy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from bragg_data.store.repository import Store, StoreError
from bragg_data.store.simulated import Writer, write_block
from bragg_data.store.verification import verify, verify_once
from tests.damage import chunk_file, flip
from tests.tiny_campaign import tiny_campaign, tiny_patterns

TAG = "tiny-v1"
REMEDY = rf"bragg store repair {TAG} --store file:///"


@pytest.fixture
def campaign(tmp_path):
    return tiny_campaign(tmp_path)


def write(writer: Writer, blocks: list[int]) -> None:
    results = []
    for block in blocks:
        samples = writer.samples[writer.rows(block)]
        fork = writer.fork()
        results.append(write_block(fork, writer.group, block, samples, tiny_patterns(samples)))
    writer.commit(results)


@pytest.fixture
def store(tmp_path, campaign) -> Store:
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, writer.missing())
        writer.finish(TAG)
    return store


def checked_text(error: pytest.ExceptionInfo[StoreError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "object store" not in text
    assert len(text) < 300
    return text


def test_a_flipped_byte_is_an_error_of_every_reader(store):
    flip(chunk_file(store, TAG, 3))
    with pytest.raises(StoreError, match=rf"block 3: its bytes.*{REMEDY}") as error:
        verify(store.open(TAG))
    checked_text(error)
    with pytest.raises(ValueError, match="checksum"):  # plain xarray too
        _ = store.open(TAG).intensity[24:32].values
    assert np.isfinite(store.open(TAG).intensity[:24].values).all()


def test_a_flipped_byte_of_a_label_is_noticed(tmp_path):
    store = Store(tmp_path / "longer", create=True)
    campaign = tiny_campaign(tmp_path, rows=64, last=4.2)  # few labels are stored in the manifest
    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, writer.missing())
        writer.finish(TAG)
    flip(chunk_file(store, TAG, 0, "c"))
    with pytest.raises(StoreError, match=REMEDY) as error:
        verify(store.open(TAG))
    checked_text(error)


def test_a_missing_chunk_is_named_with_its_block(store):
    chunk_file(store, TAG, 5).unlink()
    dataset = store.open(TAG)
    with pytest.raises(StoreError, match=rf"Block 5 of tiny cannot .*is missing\. .*{REMEDY}") as e:
        verify(dataset)
    checked_text(e)
    with pytest.raises(StoreError, match="Block 5 of tiny") as e:
        _ = dataset.intensity.values
    checked_text(e)


def test_a_chunk_that_was_cut_short_is_damaged(store):
    file = chunk_file(store, TAG, 5)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreError, match=rf"Block 5 of tiny cannot .*is damaged\. .*{REMEDY}"):
        verify(store.open(TAG))


def test_missing_manifests_and_snapshots(store):
    for file in (store.path / "manifests").iterdir():
        file.unlink()
    with pytest.raises(
        StoreError, match=rf"manifest \w+ is missing\. Repair it with: {REMEDY}"
    ) as error:
        verify(Store(store.path).open(TAG))
    checked_text(error)
    for file in (store.path / "snapshots").iterdir():
        file.unlink()
    with pytest.raises(StoreError, match=r"snapshot \w+ is missing\. Restore the store") as error:
        Store(store.path).open(TAG)
    checked_text(error)


def read_blocks(store: Store) -> int:
    """Verify a snapshot once; return how many of its samples were read."""
    read: list[int] = []
    verify_once(Store(store.path).open(TAG), read.append)
    return sum(read)


def test_a_snapshot_is_verified_once_and_again_when_a_file_changed(store, campaign):
    assert read_blocks(store) == 67
    assert read_blocks(store) == 0
    with Writer(store, campaign, "kinematic", "0", limit=9) as writer:  # more is added
        write(writer, writer.missing())
        writer.finish("tiny-v2")
    assert read_blocks(store) == 0
    file = chunk_file(store, TAG, 3)
    intact = file.read_bytes()
    flip(file)
    with pytest.raises(StoreError, match="block 3"):
        read_blocks(store)
    file.write_bytes(intact)
    assert read_blocks(store) == 67


def test_a_copy_with_damage_is_not_trusted_because_of_its_record(store, tmp_path):
    assert read_blocks(store) == 67
    flip(chunk_file(store, TAG, 3))
    shutil.copytree(store.path, tmp_path / "copy", copy_function=shutil.copyfile)
    with pytest.raises(StoreError, match="block 3"):
        read_blocks(Store(tmp_path / "copy"))


READER = """
import os, sys
from bragg_data.store.repository import Store
from bragg_data.store.verification import verify, verify_once
verify(Store(sys.argv[1]).open("tiny-v1"))  # imports what this user may not read any more
os.setgid(65534)
os.setuid(65534)
for _ in range(2):
    read = []
    verify_once(Store(sys.argv[1]).open("tiny-v1"), read.append)
    print(sum(read))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("home", ["writable", "/nonexistent"])
def test_a_reader_without_write_access_remembers_it_too(store, tmp_path, home):
    """Another user, who may write in the own cache, or nowhere at all."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.owner() == "root" and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o055)
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, 65534, 65534)
    place = str(cache) if home == "writable" else home
    environment = {"XDG_CACHE_HOME": place, "HOME": place, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", READER, str(store.path)]
    options = {"env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert (done.returncode, done.stdout.split()) == (0, ["67", "0"]), done.stderr
    records = [path for path in cache.rglob("*.json") if "bragg" in str(path)]
    assert len(records) == (home == "writable")
    assert not (store.path / "verified").exists()


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_an_interrupted_data_set_does_not_trust_what_it_finished(tmp_path, campaign, how):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", "0") as writer:
        write(writer, [0, 1, 8])
        group = zarr.open_group(
            store.repository.readonly_session(branch=writer.branch).store, path="tiny", mode="r"
        )
        expected = np.asarray(group["intensity"][:16])
    files = sorted((store.path / "chunks").iterdir(), key=lambda file: -file.stat().st_size)[:3]
    for file in files:
        flip(file) if how == "flipped" else file.unlink()
    store = Store(store.path)
    with Writer(store, campaign, "kinematic", "0") as writer:
        assert writer.recheck() == [0, 1, 8]
        assert writer.missing() == list(range(9))
        write(writer, writer.missing())
        assert writer.recheck() == []
        tag = writer.finish()
    dataset = store.open(tag.name)
    verify(dataset)
    np.testing.assert_array_equal(dataset.intensity[:16].values, expected)


def test_messages_name_no_rust(store):
    chunk_file(store, TAG, 0).unlink()
    with pytest.raises(StoreError) as error:
        verify(store.open(TAG))
    assert not re.search(r"icechunk/src|context:", str(error.value))
