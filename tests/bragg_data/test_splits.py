"""The paper's random split, and the one by blocks."""

import numpy as np
import pytest

from bragg_data.campaign import Samples, load_campaign
from bragg_data.crystallography.cell import CrystalSystem
from bragg_data.splits import Part, blocked_split, extra_data_split, random_split


@pytest.fixture(scope="module")
def samples() -> Samples:
    return load_campaign("batio3-nomad").samples


@pytest.fixture(scope="module")
def labels(samples: Samples) -> np.ndarray:
    return samples.crystal_system


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


def test_an_additional_system_changes_nothing() -> None:
    labels = np.random.default_rng(0).integers(0, 3, size=1000).astype(np.int8)
    more = np.concatenate([labels, np.full(100, CrystalSystem.hexagonal, np.int8)])
    np.testing.assert_array_equal(random_split(labels, seed=5), random_split(more, seed=5)[:1000])


def test_a_single_sample_is_for_training() -> None:
    assert random_split(np.array([0, 1, 1]), seed=0).tolist() == [Part.training] * 3


def test_blocks_hold_a_fifth_of_each_system(samples: Samples) -> None:
    part = blocked_split(samples.crystal_system, samples.cells, seed=0)
    for system in range(3):
        of_system = part[samples.crystal_system == system]
        assert (of_system == Part.test).mean() == pytest.approx(0.2, abs=0.021)
        assert (of_system == Part.validation).mean() == pytest.approx(0.04, abs=0.021)


@pytest.mark.parametrize(
    ("system", "columns", "steps", "near"),
    [
        (CrystalSystem.cubic, [0], [0.001], 0.12),
        (CrystalSystem.tetragonal, [0, 2], [0.001, 0.001], 0.25),
        (CrystalSystem.trigonal, [0, 3], [0.001, 0.5], 0.55),
    ],
)
def test_test_samples_in_blocks_have_no_twins(
    samples: Samples, system: CrystalSystem, columns: list[int], steps: list[float], near: float
) -> None:
    """All but those at a block's side; in a random split nearly all have one."""
    of_system = samples.crystal_system == system
    points = np.rint(samples.cells[of_system][:, columns] / steps).astype(int)
    for split, share in (
        (blocked_split(samples.crystal_system, samples.cells, seed=0), near),
        (random_split(samples.crystal_system, seed=0), None),
    ):
        part = split[of_system]
        training = {tuple(point) for point in points[part == Part.training]}
        moves = [m for m in np.ndindex(*[3] * len(columns)) if any(k != 1 for k in m)]
        twins = [
            any(tuple(point + np.array(move) - 1) in training for move in moves)
            for point in points[part == Part.test][:3000]
        ]
        if share is None:
            assert np.mean(twins) > 0.9
        else:
            assert 0 < np.mean(twins) < share


@pytest.mark.slow
def test_a_box_is_never_divided(samples: Samples) -> None:
    part = blocked_split(samples.crystal_system, samples.cells, seed=3)
    of_system = samples.crystal_system == CrystalSystem.tetragonal
    boxes = np.rint(samples.cells[of_system][:, [0, 2]] * 1000).astype(int) // 20
    for box in np.unique(boxes, axis=0):
        assert len(set(part[of_system][(boxes == box).all(axis=1)])) == 1


def test_seed_and_other_systems_mean_the_same_to_blocks(samples: Samples) -> None:
    few = samples[:5000]
    part = blocked_split(few.crystal_system, few.cells, seed=0)
    np.testing.assert_array_equal(part, blocked_split(few.crystal_system, few.cells, seed=0))
    assert (part != blocked_split(few.crystal_system, few.cells, seed=1)).any()
    tetragonal = few.crystal_system == CrystalSystem.tetragonal
    alone = blocked_split(few.crystal_system[tetragonal], few.cells[tetragonal], seed=0)
    np.testing.assert_array_equal(part[tetragonal], alone)
    other = blocked_split(few.crystal_system, few.cells, seed=0, validation=0.1)
    np.testing.assert_array_equal(part == Part.test, other == Part.test)


def boxes_of(samples: Samples) -> np.ndarray:
    """In whole numbers of 1e-9 Å or degrees, so that rounding scatters no grid point."""
    edges = np.array([20_000_000] * 3 + [2_500_000_000] * 3)
    numbers = np.rint(samples.cells * 1e9).astype(np.int64) // edges
    return np.column_stack([samples.crystal_system, numbers])


def test_extra_data_joins_training_outside_the_boxes_that_are_held_out(samples: Samples) -> None:
    part = blocked_split(samples.crystal_system, samples.cells, seed=0)
    extra = load_campaign("batio3-offgrid").samples
    split = extra_data_split(
        samples.crystal_system, samples.cells, part, extra.crystal_system, extra.cells
    )
    assert split.dtype == np.int8
    assert set(split.tolist()) == {Part.training, Part.test}
    held_out = {tuple(box) for box in boxes_of(samples)[part != Part.training]}
    inside = np.array([tuple(box) in held_out for box in boxes_of(extra)])
    # Cells within rounding of a side are of either box.
    assert ((split == Part.test) != inside).sum() <= 2
    assert 0.15 < inside.mean() < 0.35
    # Validation blocks are closed, too: the best weights are chosen on them.
    validation = {tuple(box) for box in boxes_of(samples)[part == Part.validation]}
    closed = np.array([tuple(box) in validation for box in boxes_of(extra)])
    assert closed.any()
    assert (split[closed] == Part.test).mean() > 0.99


def test_extra_data_equal_to_the_data_set_give_its_training_samples(samples: Samples) -> None:
    part = blocked_split(samples.crystal_system, samples.cells, seed=4)
    split = extra_data_split(
        samples.crystal_system, samples.cells, part, samples.crystal_system, samples.cells
    )
    np.testing.assert_array_equal(split == Part.training, part == Part.training)


def test_the_same_cell_in_extra_data_is_held_out_of_a_random_split(samples: Samples) -> None:
    part = random_split(samples.crystal_system, seed=4)
    labels = samples.crystal_system, samples.cells
    split = extra_data_split(*labels, part, *labels, blocked=False)
    np.testing.assert_array_equal(split == Part.training, part == Part.training)
    near = samples.cells + np.array([1e-4, 0, 0, 0, 0, 0])
    near = extra_data_split(*labels, part, samples.crystal_system, near, blocked=False)
    assert (near == Part.training).all()


def test_a_box_of_extra_data_belongs_to_a_single_crystal_system() -> None:
    cell = np.array([[4.01, 4.01, 4.01, 90.0, 90.0, 90.0]])
    cubic, tetragonal = np.array([0], np.int8), np.array([1], np.int8)
    part = np.array([Part.test], np.int8)
    assert extra_data_split(cubic, cell, part, cubic, cell).tolist() == [Part.test]
    assert extra_data_split(cubic, cell, part, tetragonal, cell).tolist() == [Part.training]
    far = cell + np.array([0.02, 0, 0, 0, 0, 0])
    assert extra_data_split(cubic, cell, part, cubic, far).tolist() == [Part.training]
    none = np.array([Part.training], np.int8)
    assert extra_data_split(cubic, cell, none, cubic, cell).tolist() == [Part.training]
    assert extra_data_split(cubic, cell, part, cubic[:0], cell[:0]).shape == (0,)
