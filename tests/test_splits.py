"""The paper's random split."""

from __future__ import annotations

import numpy as np
import pytest

from bragg_data.campaign import load_campaign
from bragg_data.crystal import CrystalSystem
from bragg_data.splits import Part, random_split


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return load_campaign("batio3-nomad").samples.crystal_system


def test_counts_are_those_of_the_paper(labels: np.ndarray) -> None:
    part = random_split(labels, seed=0)
    counts = {
        system: ((part[labels == system] != Part.test).sum(), (part[labels == system] == 2).sum())
        for system in (CrystalSystem.cubic, CrystalSystem.trigonal, CrystalSystem.tetragonal)
    }
    assert counts[CrystalSystem.cubic] == (800, 200)
    assert counts[CrystalSystem.trigonal] == (38_175, 9_544)
    assert counts[CrystalSystem.tetragonal] == (128_320, 32_080)
    assert ((part != Part.test).sum(), (part == Part.test).sum()) == (167_295, 41_824)


def test_validation_samples_come_from_each_system_of_the_training_part(labels: np.ndarray) -> None:
    part = random_split(labels, seed=0, validation=0.05)
    of_system = [(part[labels == s] == Part.validation).sum() for s in range(3)]
    assert of_system == [40, 6416, 1909]


def test_seed_decides_and_nothing_else(labels: np.ndarray) -> None:
    part = random_split(labels, seed=0)
    np.testing.assert_array_equal(part, random_split(labels, seed=0))
    other = random_split(labels, seed=1)
    # Two independent draws of a fifth share a fifth of a fifth.
    assert ((part == Part.test) & (other == Part.test)).mean() == pytest.approx(0.04, abs=0.002)
    # Another size of the validation part leaves the test samples as they are.
    fewer = random_split(labels, seed=0, validation=0.01)
    np.testing.assert_array_equal(part == Part.test, fewer == Part.test)


def test_another_system_beside_changes_nothing() -> None:
    labels = np.random.default_rng(0).integers(0, 3, size=1000).astype(np.int8)
    more = np.concatenate([labels, np.full(100, CrystalSystem.hexagonal, np.int8)])
    np.testing.assert_array_equal(random_split(labels, seed=5), random_split(more, seed=5)[:1000])


def test_a_single_sample_is_for_training() -> None:
    assert random_split(np.array([0, 1, 1]), seed=0).tolist() == [Part.training] * 3
