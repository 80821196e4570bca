"""Repair of the hashes themselves, which have a file of their own from 17 blocks on."""

import numpy as np
import pytest

from bragg_data.store.repair import repair
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.simulated import Writer, write_block
from bragg_data.store.verification import verify
from tests.damage import chunk_file, flip
from tests.tiny_campaign import tiny_campaign, tiny_patterns

TAG = "tiny-v1"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store", create=True)
    with Writer(store, tiny_campaign(tmp_path, rows=2), "kinematic", "0") as writer:
        results = []
        for block in writer.missing():
            samples = writer.samples[writer.rows(block)]
            patterns = tiny_patterns(samples)
            results.append(write_block(writer.fork(), writer.group, block, samples, patterns))
        writer.commit(results)
        writer.finish(TAG)
    return store


@pytest.mark.parametrize("damaged_block", [None, 7])
def test_hashes_that_are_lost_are_computed_from_the_patterns(store, damaged_block):
    content = store.open(TAG).attrs["content_hash"]
    if damaged_block is not None:
        chunk_file(store, TAG, damaged_block).unlink()
    flip(chunk_file(store, TAG, 0, "block_sha256"))
    with pytest.raises(StoreError, match=f"bragg store repair {TAG}"):
        verify(store.open(TAG))
    repaired = repair(store, TAG, tiny_patterns)
    assert repaired.arrays == ("block_sha256",)
    assert repaired.blocks == (() if damaged_block is None else (damaged_block,))
    assert verify(Store(store.path).open(TAG)) == content


def test_nothing_is_written_by_a_simulator_that_computes_other_patterns(store):
    """As another processor may, in the last bits: what is intact stays, hashes or not."""
    flip(chunk_file(store, TAG, 0, "block_sha256"))
    chunk_file(store, TAG, 1).unlink()
    before = {f: f.read_bytes() for f in sorted((store.path / "chunks").iterdir())}
    with pytest.raises(StoreError, match="cannot be repaired here"):
        repair(store, TAG, lambda samples: np.nextafter(tiny_patterns(samples), np.float32(9)))
    assert {f: f.read_bytes() for f in sorted((store.path / "chunks").iterdir())} == before
