"""Seeded splits of a data set into training, validation and test samples."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from bragg_data.arrays import Array, Integers, Integers8

# Edges of the boxes of a blocked split, in Å along a, b, c and degrees along alpha, beta, gamma.
_EDGES = np.array([0.02] * 3 + [2.5] * 3)


class Part(IntEnum):
    """What a sample is for."""

    training = 0
    validation = 1
    test = 2
    unused = 3  # a sample that joined later, near samples that are for validation or testing


TRAINED = (Part.training, Part.validation)
"""The parts that a model may have seen."""


def random_split(
    crystal_system: Integers, *, seed: int, test: float = 0.2, validation: float = 0.05
) -> Integers8:
    """Split samples, (n,), at random within each crystal system, as the paper does (section V-B).

    ``test`` is the share of each system that is kept for testing, ``validation`` that of the rest.
    Two samples of a system or more give at least one to train on; small shares of few samples may
    round to none. The split depends on the seed and on the labels, in stored order, alone. Each
    crystal system has a random stream of its own, so that adding another changes nothing.
    """
    part = np.full(len(crystal_system), Part.training, dtype=np.int8)
    for system in np.unique(crystal_system).tolist():
        rows = np.flatnonzero(crystal_system == system)
        generator = np.random.default_rng(np.random.SeedSequence([seed, system]))
        shuffled = generator.permutation(rows)
        n_test = round(test * len(rows))
        n_validation = round(validation * (len(rows) - n_test))
        part[shuffled[:n_test]] = Part.test
        part[shuffled[n_test : n_test + n_validation]] = Part.validation
    return part


def blocked_split(
    crystal_system: Integers,
    cells: Array,
    *,
    seed: int,
    test: float = 0.2,
    validation: float = 0.05,
) -> Integers8:
    """Split by blocks of cells within each crystal system, so that test samples have no twins.

    The space of cells, shape (n, 6) in Å and degrees, is cut into boxes of 0.02 Å and 2.5°; a box
    is for training, validation or testing as a whole. So nearly all test samples are further from
    any training sample than a step of the grid, and a model has to bridge the gap. Arguments and
    result are otherwise those of :func:`random_split`; the share for testing is exceeded by less
    than one block.
    """
    boxes = _boxes(cells)
    part = np.full(len(crystal_system), Part.training, dtype=np.int8)
    for system in np.unique(crystal_system).tolist():
        rows = np.flatnonzero(crystal_system == system)
        _, block, sizes = np.unique(boxes[rows], axis=0, return_inverse=True, return_counts=True)
        generator = np.random.default_rng(np.random.SeedSequence([seed, system]))
        order = generator.permutation(len(sizes))
        before = np.cumsum(sizes[order]) - sizes[order]
        n_test = test * len(rows)
        of_block = np.full(len(sizes), Part.training, dtype=np.int8)
        of_block[order[before < n_test + validation * (len(rows) - n_test)]] = Part.validation
        of_block[order[before < n_test]] = Part.test
        part[rows] = of_block[block]
    return part


def extra_data_split(
    crystal_system: Integers,
    cells: Array,
    part: Integers8,
    extra_crystal_system: Integers,
    extra_cells: Array,
    *,
    blocked: bool = True,
) -> Integers8:
    """Return which samples, (m,), of extra data may join the training of a split, (n,).

    ``Part.training`` where no sample of the box, or, if the split is not blocked, of the same cell,
    is for validation or testing, elsewhere ``Part.test``; ``part`` is what the split returned.
    """
    of_cells = _boxes if blocked else _rounded
    held_out = part != Part.training
    boxes = np.column_stack([crystal_system[held_out], of_cells(cells[held_out])])
    closed = {row.tobytes() for row in np.unique(boxes, axis=0)}
    extra = np.column_stack([extra_crystal_system, of_cells(extra_cells)])
    inside = np.array([row.tobytes() in closed for row in extra], dtype=bool)
    return np.where(inside, Part.test, Part.training).astype(np.int8)


def _rounded(cells: Array) -> NDArray[np.int64]:
    return np.rint(cells * 1e9).astype(np.int64)


def _boxes(cells: Array) -> NDArray[np.int64]:
    # Grid points lie on the boxes' sides: rounding must not scatter them.
    return np.asarray(np.floor(cells / _EDGES + 1e-6), dtype=np.int64)
