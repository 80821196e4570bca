"""The test sets that models are scored on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.campaign import Samples
from bragg_data.splits import Part, blocked_split, random_split
from bragg_data.store.schema import campaign_of, samples_of

SPLIT = {"seed": 0, "test": 0.2, "validation": 0.05}
"""Seed and shares of the splits, so that all scores are of the same samples."""

_SPLITS = {"random": "random split", "blocked": "blocked split"}


class TestSetError(ValueError):
    """A data set that does not make a test set."""

    __test__ = False  # not a test of pytest


@dataclass(frozen=True)
class HeldOutSet:
    """A test set of a data set.

    Attributes
    ----------
    name, dataset
        "random", "blocked" or "off-grid"; the snapshot that holds the samples.
    selected : shape (n,)
        Which of its samples are in the test set.
    training : shape (m,)
        Samples of the main data set that the models of this split may be trained on.
    """

    name: str
    dataset: xr.Dataset
    selected: NDArray[np.bool_]
    training: NDArray[np.bool_]

    @cached_property
    def labels(self) -> Samples:
        """The labels of the whole data set."""
        return samples_of(self.dataset)

    @property
    def count(self) -> int:
        """Number of samples in the test set."""
        return int(self.selected.sum())

    @property
    def split(self) -> str:
        """The split whose models are scored."""
        return "blocked" if self.name == "blocked" else "random"

    @property
    def title(self) -> str:
        """The test set for a reader."""
        split = _SPLITS.get(self.name, "off the grid")
        return f"{split}, {self.count:,} samples of {self.dataset.attrs['tag']}"


def part_of(name: str, labels: Samples, values: Mapping[str, object]) -> NDArray[np.int8]:
    """Return the part of each sample, shape (n,), in a split with this seed and these shares."""
    settings = {key: values[key] for key in SPLIT}
    if name == "blocked":
        return blocked_split(labels.crystal_system, labels.cells, **settings)  # type: ignore[arg-type]
    return random_split(labels.crystal_system, **settings)  # type: ignore[arg-type]


def held_out_sets(
    dataset: xr.Dataset, offgrid: xr.Dataset | None, limit: int | None = None
) -> list[HeldOutSet]:
    """Return the test sets of a data set, at most ``limit`` samples of each.

    Raises
    ------
    TestSetError
        If the off-grid data set has other phases or another grid.
    """
    labels = samples_of(dataset)
    test_sets = []
    for name in _SPLITS:
        part = part_of(name, labels, SPLIT)
        test_sets.append(HeldOutSet(name, dataset, part == Part.test, part != Part.test))
    if offgrid is not None:
        phases = [[p.name for p in campaign_of(d).phases] for d in (dataset, offgrid)]
        if phases[0] != phases[1] or not np.array_equal(dataset.tof, offgrid.tof):
            raise TestSetError(
                f"{offgrid.attrs['tag']} has other phases or another time-of-flight grid than "
                f"{dataset.attrs['tag']}. Name another data set with --offgrid."
            )
        every = np.ones(offgrid.sizes["sample"], dtype=bool)
        test_sets.append(HeldOutSet("off-grid", offgrid, every, test_sets[0].training))
    if limit is not None:
        for test in test_sets:
            test.selected[np.flatnonzero(test.selected)[limit:]] = False
    return test_sets
