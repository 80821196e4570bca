"""Random forests as compact arrays of trees, and predictions with them.

They are grown by :mod:`bragg_models.forest_training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bragg_models.targets import Targets

LEAF = np.uint16(2**16 - 1)
"""Value of ``feature`` for a leaf."""


class ForestError(ValueError):
    """Trees that do not fit together, or a forest that cannot be read."""


@dataclass(frozen=True)
class Forest:
    """Regression trees as plain arrays, one after the other.

    The nodes of a tree are in depth-first order, as in scikit-learn: the left child of a node is
    the next node, so only the right one is stored. Leaves are numbered through all trees.

    Attributes
    ----------
    root : shape (n_trees,), int32
        First node of each tree.
    feature : shape (n_nodes,), uint16
        Feature that a node compares; :data:`LEAF` for a leaf.
    threshold : shape (n_nodes,), float32
        A profile whose feature is at most this goes to the left child.
    right : shape (n_nodes,), int32
        Right child of a node; of a leaf its row in ``value``.
    value : shape (n_leaves, n_outputs), float32
        Mean of the training samples in each leaf.
    """

    root: NDArray[np.int32]
    feature: NDArray[np.uint16]
    threshold: NDArray[np.float32]
    right: NDArray[np.int32]
    value: NDArray[np.float32]

    @property
    def trees(self) -> int:
        """Number of trees."""
        return len(self.root)

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.value.shape[1])

    @property
    def nbytes(self) -> int:
        """Size in memory and, nearly, on disk, in bytes."""
        return sum(array.nbytes for array in self.arrays().values())

    def predict(self, profiles: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the mean of the trees' predictions.

        Parameters
        ----------
        profiles : shape (n, n_features)
            Prepared as for training.

        Returns
        -------
        shape (n, n_outputs)
        """
        return np.asarray(_mean(*self._arguments(profiles)))

    def votes(
        self, profiles: NDArray[np.float32], column: int, n_codes: int
    ) -> NDArray[np.float64]:
        """Return the share of the trees that predict each code, for an output that is a code.

        Parameters
        ----------
        profiles : shape (n, n_features)
            As in :meth:`predict`.
        column
            Index of the output.
        n_codes
            Codes are 0 to n_codes - 1; values beyond count for the nearest.

        Returns
        -------
        shape (n, n_codes)
        """
        return np.asarray(_votes(*self._arguments(profiles), column, n_codes))

    def leaves(self, profiles: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return the row in ``value`` to which each tree leads each profile, (n, n_trees)."""
        return np.asarray(_leaves(*self._arguments(profiles)[:-1]))

    def _arguments(self, profiles: NDArray[np.float32]) -> tuple[Any, ...]:
        rows = np.ascontiguousarray(profiles, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] < self._width:
            raise ForestError(
                f"The trees expect {self._width} features, as an array of shape (n, features); got "
                f"shape {rows.shape}. Prepare the profiles as for training."
            )
        return rows, self.root, self.feature, self.threshold, self.right, self.value

    @cached_property
    def _width(self) -> int:
        compared = self.feature[self.feature != LEAF]
        return int(compared.max(initial=0)) + 1

    def _is_consistent(self) -> bool:
        """Return whether every path ends in a leaf: each step goes forward and stays inside."""
        if any(
            array.dtype != _TYPES[name] or array.ndim != (2 if name == "value" else 1)
            for name, array in self.arrays().items()
        ):
            return False
        nodes = len(self.feature)
        if not len(self.root) or {len(self.threshold), len(self.right)} != {nodes}:
            return False
        is_leaf = self.feature == LEAF
        number = np.arange(nodes)
        child_inside = (self.right > number) & (self.right < nodes) & (number + 1 < nodes)
        leaf_inside = (self.right >= 0) & (self.right < len(self.value))
        root_inside = (self.root >= 0) & (self.root < nodes)
        return bool(np.where(is_leaf, leaf_inside, child_inside).all() and root_inside.all())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, as :meth:`from_arrays` reads them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Forest:
        """Return a forest from arrays of unknown origin, named as by :meth:`arrays`.

        Raises
        ------
        ForestError
            If one is missing or they are inconsistent: following them could lead anywhere.
        """
        try:
            forest = cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except KeyError as error:
            raise ForestError(f"The forest has no array {error}. Train the model again.") from None
        if not forest._is_consistent():
            raise ForestError("The arrays of the forest are inconsistent. Train the model again.")
        return forest


_TYPES = {
    "root": np.dtype(np.int32),
    "feature": np.dtype(np.uint16),
    "threshold": np.dtype(np.float32),
    "right": np.dtype(np.int32),
    "value": np.dtype(np.float32),
}


def join(forests: Sequence[Forest]) -> Forest:
    """Return one forest of all trees, in the given order.

    Raises
    ------
    ForestError
        If there are none, or their outputs differ in number.
    """
    if not forests or len({forest.outputs for forest in forests}) != 1:
        raise ForestError(
            f"Forests with {[forest.outputs for forest in forests]} outputs cannot be joined; at "
            f"least one is needed, all with the same outputs."
        )
    root, right = [], []
    nodes = leaves = 0
    for forest in forests:
        root.append(forest.root + np.int32(nodes))
        right.append(
            forest.right + np.where(forest.feature == LEAF, leaves, nodes).astype(np.int32)
        )
        nodes += len(forest.feature)
        leaves += len(forest.value)
    return Forest(
        np.concatenate(root),
        np.concatenate([forest.feature for forest in forests]),
        np.concatenate([forest.threshold for forest in forests]),
        np.concatenate(right),
        np.concatenate([forest.value for forest in forests]),
    )


@dataclass(frozen=True)
class ForestModel:
    """Random forests for the phases and cells of a campaign.

    Attributes
    ----------
    forests
        Class-conditional (section IV-B1): one per phase, whose outputs are that phase's free
        parameters. Integrated (IV-C2): a single one, whose outputs are the phase's code and every
        parameter that is free in any phase.
    integrated
        Which of both.
    """

    forests: tuple[Forest, ...]
    integrated: bool

    def outputs(
        self,
        profiles: NDArray[np.float32],
        targets: Targets,
        phase: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the predictions of the forests.

        Parameters
        ----------
        profiles : shape (n, n_features)
            Prepared.
        targets
            What the outputs mean.
        phase : shape (n,)
            Phase of each profile, as predicted by a classifier. Class-conditional forests need it;
            integrated ones predict it themselves.

        Returns
        -------
        probabilities : shape (n, n_phases)
            For an integrated forest the share of its trees whose rounded code is the phase's; for
            class-conditional ones 1 for the input phase.
        values : shape (n, n_parameters)
            Scaled as by :class:`~bragg_models.targets.Targets`; class-conditional forests leave 0
            where a parameter is not free.

        Raises
        ------
        ForestError
            If class-conditional forests get no phases.

        Notes
        -----
        The paper rounds the mean of the trees' codes, which is tetragonal (1) where half of them
        predict cubic (0) and half trigonal (2); the votes do not depend on the order of the codes.
        """
        if self.integrated:
            (forest,) = self.forests
            votes = forest.votes(profiles, 0, len(targets.names))
            return votes, forest.predict(profiles)[:, 1:]
        if phase is None:
            raise ForestError(
                "Class-conditional forests need the phase of each profile. Pass phase."
            )
        values = np.zeros((len(profiles), len(targets.parameters)))
        for code, forest in enumerate(self.forests):
            rows = np.flatnonzero(phase == code)
            if len(rows):
                values[np.ix_(rows, targets.free[code])] = forest.predict(profiles[rows])
        return np.eye(len(targets.names))[phase], values

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of all forests, named by the forest's number."""
        return {
            f"{number}.{name}": array
            for number, forest in enumerate(self.forests)
            for name, array in forest.arrays().items()
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], targets: Targets, *, integrated: bool
    ) -> ForestModel:
        """Return the model from the arrays of :meth:`arrays`.

        Raises
        ------
        ForestError
            If arrays are missing, are inconsistent, or do not fit the targets.
        """
        counts = [1 + len(targets.parameters)] if integrated else targets.free.sum(axis=1).tolist()
        forests = tuple(
            Forest.from_arrays(
                {
                    name.removeprefix(f"{number}."): array
                    for name, array in arrays.items()
                    if name.startswith(f"{number}.")
                }
            )
            for number in range(len(counts))
        )
        if [forest.outputs for forest in forests] != counts:
            raise ForestError(
                f"The forests have {[forest.outputs for forest in forests]} outputs, but the "
                f"targets need {counts}. Train the model again."
            )
        return cls(forests, integrated)


# ---- compiled loops ----------------------------------------------------------------------------
# Tree by tree, so that a tree's nodes stay in the processor's cache for all rows; the sum over the
# trees is always in their order, so that a row's prediction does not depend on its batch. (treelite
# would walk the same nodes, with its own order of summation and its own format; saved models are
# these arrays, and have to predict the same to the last bit.)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _leaf(profile: Any, node: int, feature: Any, threshold: Any, right: Any) -> int:
    while feature[node] != LEAF:
        node = node + 1 if profile[feature[node]] <= threshold[node] else right[node]
    return int(right[node])


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mean(rows: Any, root: Any, feature: Any, threshold: Any, right: Any, value: Any) -> Any:
    total = np.zeros((len(rows), value.shape[1]))
    for first in root:
        for i in range(len(rows)):
            leaf = _leaf(rows[i], first, feature, threshold, right)
            for k in range(value.shape[1]):
                total[i, k] += value[leaf, k]
    return total / len(root)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _votes(
    rows: Any,
    root: Any,
    feature: Any,
    threshold: Any,
    right: Any,
    value: Any,
    column: int,
    n_codes: int,
) -> Any:
    share = np.zeros((len(rows), n_codes))
    for first in root:
        for i in range(len(rows)):
            code = value[_leaf(rows[i], first, feature, threshold, right), column]
            share[i, min(max(int(np.rint(code)), 0), n_codes - 1)] += 1.0
    return share / len(root)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _leaves(rows: Any, root: Any, feature: Any, threshold: Any, right: Any) -> Any:
    leaves = np.empty((len(rows), len(root)), dtype=np.int32)
    for tree, first in enumerate(root):
        for i in range(len(rows)):
            leaves[i, tree] = _leaf(rows[i], first, feature, threshold, right)
    return leaves
