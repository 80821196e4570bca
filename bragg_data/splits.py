"""Seeded splits of a data set into training, validation and test samples."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Part(IntEnum):
    """What a sample is for."""

    training = 0
    validation = 1
    test = 2


def random_split(
    crystal_system: NDArray[np.integer],
    *,
    seed: int,
    test: float = 0.2,
    validation: float = 0.05,
) -> NDArray[np.int8]:
    """Split at random within each crystal system, as the paper does (section V-B).

    On the paper's campaign the test samples are 200 cubic, 9,544 trigonal and 32,080 tetragonal
    ones, and 800, 38,175 and 128,320 are left, from which the validation samples are taken: the
    best weights are chosen on them, never on the test samples.

    Parameters
    ----------
    crystal_system : shape (n,)
        Code of each sample, in stored order.
    seed
        The split depends on it and on the labels alone. Each crystal system has a stream of its
        own, so that another system beside them changes nothing.
    test
        Share of each crystal system that is kept for testing.
    validation
        Share of the rest that is kept for choosing the best weights.

    Returns
    -------
    shape (n,)
        A :class:`Part` for each sample. Two samples of a system or more give at least one to
        train on; small shares of few samples may round to none.

    Notes
    -----
    On a grid of 1e-3 Å a random split leaves near twins of most test samples among the training
    samples, so its scores say little about cells between and beyond the grid's points.
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
    crystal_system: NDArray[np.integer],
    cells: NDArray[np.float64],
    *,
    seed: int,
    test: float = 0.2,
    validation: float = 0.05,
    length: float = 0.02,
    angle: float = 2.5,
) -> NDArray[np.int8]:
    """Split by blocks of cells within each crystal system, so that test samples have no twins.

    Space is cut into boxes of the given edges in every cell parameter; a box is for training,
    validation or testing as a whole. So nearly all test samples are further from any training
    sample than a step of the grid, and a model has to bridge the gap.

    Parameters
    ----------
    crystal_system : shape (n,)
        Code of each sample, in stored order.
    cells : shape (n, 6)
        In ångström and degrees.
    seed
        The split depends on it and on the labels alone, each crystal system by itself.
    test
        Share of each crystal system that is kept for testing, exceeded by less than one block.
    validation
        Share of the rest that is kept for choosing the best weights, in blocks as well.
    length, angle
        Edges of a box, in ångström and degrees.

    Returns
    -------
    shape (n,)
        A :class:`Part` for each sample.
    """
    boxes = _boxes(cells, length, angle)
    part = np.full(len(crystal_system), Part.training, dtype=np.int8)
    for system in np.unique(crystal_system).tolist():
        rows = np.flatnonzero(crystal_system == system)
        _, block, sizes = np.unique(boxes[rows], axis=0, return_inverse=True, return_counts=True)
        generator = np.random.default_rng(np.random.SeedSequence([seed, system]))
        order = generator.permutation(len(sizes))
        before = np.cumsum(sizes[order]) - sizes[order]
        wanted = test * len(rows)
        of_block = np.full(len(sizes), Part.training, dtype=np.int8)
        of_block[order[before < wanted + validation * (len(rows) - wanted)]] = Part.validation
        of_block[order[before < wanted]] = Part.test
        part[rows] = of_block[block]
    return part


def beside_split(
    crystal_system: NDArray[np.integer],
    cells: NDArray[np.float64],
    part: NDArray[np.int8],
    beside_system: NDArray[np.integer],
    beside_cells: NDArray[np.float64],
    *,
    length: float = 0.02,
    angle: float = 2.5,
) -> NDArray[np.int8]:
    """Tell which samples of another data set may be learnt from beside a blocked split.

    Parameters
    ----------
    crystal_system, cells, part : shapes (n,), (n, 6), (n,)
        The data set that :func:`blocked_split` cut, with the same edges.
    beside_system, beside_cells : shapes (m,), (m, 6)
        The other one.
    length, angle
        Edges of a box, in ångström and degrees.

    Returns
    -------
    shape (m,)
        ``Part.training`` where no sample of the box is kept for validation or testing, elsewhere
        ``Part.test``.
    """
    kept = part != Part.training
    boxes = np.column_stack([crystal_system[kept], _boxes(cells[kept], length, angle)])
    closed = {box.tobytes() for box in np.unique(boxes, axis=0)}
    others = np.column_stack([beside_system, _boxes(beside_cells, length, angle)])
    inside = np.array([box.tobytes() in closed for box in others], dtype=bool)
    return np.where(inside, Part.test, Part.training).astype(np.int8)


def _boxes(cells: NDArray[np.float64], length: float, angle: float) -> NDArray[np.int64]:
    edges = np.array([length] * 3 + [angle] * 3)
    # Grid points lie on the boxes' sides: rounding must not scatter them.
    boxes: NDArray[np.int64] = np.floor(cells / edges + 1e-6).astype(np.int64)
    return boxes
