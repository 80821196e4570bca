"""Random forests: grown by scikit-learn, stored as compact arrays of trees, and applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bragg_data.arrays import Array, Floats32, Integers
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.kernels import kernel
from bragg_models.targets import Targets

LEAF = np.uint16(2**16 - 1)  # value of ``feature`` for a leaf
_TREES_PER_GROUP = 4  # trees that share a stream of random numbers and are grown together


class ForestError(ValueError):
    """Trees that do not fit together, or a forest that cannot be read."""


@dataclass(frozen=True)
class Forest:
    """Regression trees as plain arrays, one after the other.

    The nodes of a tree are in depth-first order, as in scikit-learn: the left child of a node is
    the next node, so only the right one is stored. Leaves are numbered through all trees.
    """

    root: NDArray[np.int32]  # (n_trees,): first node of each tree
    feature: NDArray[np.uint16]  # (n_nodes,): feature that is compared; LEAF for a leaf
    threshold: Floats32  # (n_nodes,): at most this goes to the left child
    right: NDArray[np.int32]  # (n_nodes,): right child; of a leaf its row in ``value``
    value: Floats32  # (n_leaves, n_outputs): mean of the training samples

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

    def predict(self, profiles: Floats32) -> Array:
        """Return the mean of the trees for prepared profiles (n, n_features): (n, n_outputs)."""
        return np.asarray(_mean(self.leaves(profiles), self.value))

    def votes(self, profiles: Floats32, column: int, n_codes: int) -> Array:
        """Return the share of the trees that predict each code 0 to n_codes - 1: (n, n_codes).

        ``column`` is an output that is a code; values beyond the codes count for the nearest.
        """
        codes = np.rint(self.value[self.leaves(profiles), column]).clip(0, n_codes - 1)
        return np.stack([(codes == code).mean(axis=1) for code in range(n_codes)], axis=1)

    def leaves(self, profiles: Floats32) -> NDArray[np.int32]:
        """Return the row in ``value`` to which each tree leads each profile, (n, n_trees)."""
        rows = np.ascontiguousarray(profiles, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] < self._width:
            raise ForestError(
                f"The trees expect {self._width} features, as an array of shape (n, features); got "
                f"shape {rows.shape}. Prepare the profiles as for training."
            )
        return np.asarray(_leaves(rows, self.root, self.feature, self.threshold, self.right))

    @cached_property
    def _width(self) -> int:
        compared = self.feature[self.feature != LEAF]
        return int(compared.max(initial=0)) + 1

    def _is_consistent(self) -> bool:
        """Return whether every path ends in a leaf: each step goes forward and stays inside."""
        if {name: (array.dtype, array.ndim) for name, array in self.arrays().items()} != _LAYOUT:
            return False
        nodes = len(self.feature)
        if not len(self.root) or {len(self.threshold), len(self.right)} != {nodes}:
            return False
        number = np.arange(nodes)
        child_inside = (self.right > number) & (self.right < nodes) & (number + 1 < nodes)
        leaf_inside = (self.right >= 0) & (self.right < len(self.value))
        root_inside = (self.root >= 0) & (self.root < nodes)
        inside = np.where(self.feature == LEAF, leaf_inside, child_inside)
        return bool(inside.all() and root_inside.all())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, as :meth:`from_arrays` reads them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Forest:
        """Return a forest from arrays of unknown origin, named as by :meth:`arrays`.

        Raises `ForestError` if one is missing or they are inconsistent.
        """
        try:
            forest = cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except KeyError as error:
            raise ForestError(f"The forest has no array {error}. Train the model again.") from None
        if not forest._is_consistent():
            raise ForestError("The arrays of the forest are inconsistent. Train the model again.")
        return forest


_LAYOUT = {  # dtype and number of dimensions
    "root": (np.dtype(np.int32), 1),
    "feature": (np.dtype(np.uint16), 1),
    "threshold": (np.dtype(np.float32), 1),
    "right": (np.dtype(np.int32), 1),
    "value": (np.dtype(np.float32), 2),
}


def join(forests: Sequence[Forest]) -> Forest:
    """Return one forest of all trees in the given order; a ForestError if their outputs differ."""
    if not forests or len({forest.outputs for forest in forests}) != 1:
        raise ForestError(
            f"Forests with {[forest.outputs for forest in forests]} outputs cannot be joined; at "
            f"least one is needed, all with the same outputs."
        )
    joined = [forest.arrays() for forest in forests]
    nodes = leaves = 0
    for forest, arrays in zip(forests, joined, strict=True):
        arrays["root"] = forest.root + np.int32(nodes)
        shift = np.where(forest.feature == LEAF, leaves, nodes).astype(np.int32)
        arrays["right"] = forest.right + shift
        nodes += len(forest.feature)
        leaves += len(forest.value)
    return Forest(*(np.concatenate([arrays[name] for arrays in joined]) for name in _LAYOUT))


@dataclass(frozen=True)
class ForestModel:
    """Random forests for the phases and cells of a campaign.

    Class-conditional (section IV-B1): one per phase, whose outputs are that phase's free
    parameters. Integrated (IV-C2): a single one, whose outputs are the phase's code and every
    parameter that is free in any phase.
    """

    forests: tuple[Forest, ...]
    integrated: bool

    def outputs(
        self, profiles: Floats32, targets: Targets, phase: Integers | None = None
    ) -> tuple[Array, Array]:
        """Return probabilities (n, n_phases) and scaled values (n, n_parameters).

        Class-conditional forests need the ``phase`` (n,) of each profile, as a classifier predicts
        it: its probability is 1, and values that are not free are 0. An integrated forest predicts
        the phase itself: its probability is the share of the trees whose rounded code it is. Raises
        `ForestError` if class-conditional forests get no phases.
        """
        if self.integrated:
            (forest,) = self.forests
            votes = forest.votes(profiles, 0, len(targets.names))
            return votes, forest.predict(profiles)[:, 1:]
        if phase is None:
            raise ForestError("Class-conditional forests need the phase of each profile: pass it.")
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

        Raises `ForestError` if they are missing, are inconsistent, or do not fit the targets.
        """
        counts = [1 + len(targets.parameters)] if integrated else targets.free.sum(axis=1).tolist()
        of_forest: list[dict[str, NDArray[Any]]] = [{} for _ in counts]
        for key, array in arrays.items():
            number, _, name = key.partition(".")
            if number.isdecimal() and int(number) < len(counts):
                of_forest[int(number)][name] = array
        forests = tuple(map(Forest.from_arrays, of_forest))
        if [forest.outputs for forest in forests] != counts:
            raise ForestError(
                f"The forests have {[forest.outputs for forest in forests]} outputs, but the "
                f"targets need {counts}. Train the model again."
            )
        return cls(forests, integrated)


# Tree by tree, so that a tree's nodes stay in the processor's cache for all rows; the sum over the
# trees is always in their order, so that a row's prediction does not depend on its batch. (treelite
# would walk the same nodes, with its own order of summation and its own format; saved models are
# these arrays, and have to predict the same to the last bit.)


@kernel()
def _leaves(rows: Any, root: Any, feature: Any, threshold: Any, right: Any) -> Any:
    leaves = np.empty((len(rows), len(root)), dtype=np.int32)
    for tree, first in enumerate(root):
        for i in range(len(rows)):
            node = first
            while feature[node] != LEAF:
                node = node + 1 if rows[i, feature[node]] <= threshold[node] else right[node]
            leaves[i, tree] = right[node]
    return leaves


@kernel()
def _mean(leaves: Any, value: Any) -> Any:
    total = np.zeros((len(leaves), value.shape[1]))
    for tree in range(leaves.shape[1]):
        for i in range(len(leaves)):
            for k in range(value.shape[1]):
                total[i, k] += value[leaves[i, tree], k]
    return total / leaves.shape[1]


# ---- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForestSettings:
    """Hyperparameters of a forest, in scikit-learn's names."""

    trees: int
    max_depth: int = 50  # of the paper (section V-B1)
    max_features: float = 1.0  # share of the features among which a split is chosen
    min_samples_leaf: int = 1
    # Extremely randomised trees (Geurts, Ernst & Wehenkel, Machine Learning 63 (2006) 3): one
    # random threshold per feature instead of the best one.
    extra: bool = False
    bootstrap: bool = True  # each tree sees a sample drawn with replacement, or all samples
    samples: int | None = None  # training samples, chosen at random; None uses all


def forest_from_trees(trees: Sequence[Any]) -> Forest:
    """Return the compact form of fitted regression trees of scikit-learn (``estimators_``).

    scikit-learn compares features in single precision with a threshold in double precision; x <= t
    is true for exactly the same x if t is rounded down. A ForestError if there are no trees, or
    they have more features than 16 bits can count.
    """
    return join([_forest_from_tree(tree.tree_) for tree in trees])


def _forest_from_tree(tree: Any) -> Forest:
    if tree.n_features >= LEAF:
        raise ForestError(f"{tree.n_features} features are more than a saved forest's {LEAF - 1}.")
    is_leaf = tree.children_left == -1
    inner = np.flatnonzero(~is_leaf)
    if not np.array_equal(tree.children_left[inner], inner + 1):
        raise ForestError("Trees were not grown depth-first: leave max_leaf_nodes at its default.")
    feature = np.where(is_leaf, LEAF, tree.feature).astype(np.uint16)
    right = np.where(is_leaf, np.cumsum(is_leaf) - 1, tree.children_right).astype(np.int32)
    threshold = tree.threshold.astype(np.float32)
    too_high = threshold > tree.threshold
    threshold[too_high] = np.nextafter(threshold[too_high], np.float32(-np.inf))
    threshold[is_leaf] = 0
    value = tree.value[is_leaf, :, 0].astype(np.float32)
    return Forest(np.zeros(1, np.int32), feature, threshold, right, value)


def grow_group(
    profiles: Floats32, values: Floats32, settings: ForestSettings, group: int, *, seed: int
) -> Forest:
    """Grow a group of a forest's trees from prepared profiles (n, n_features).

    ``values`` (n, n_outputs) are scaled targets. The number of the group selects its stream of
    random numbers, wherever it is grown.
    """
    # Not needed for predictions.
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

    kind = ExtraTreesRegressor if settings.extra else RandomForestRegressor
    state = np.random.SeedSequence([seed, group]).generate_state(1)
    regressor = kind(
        n_estimators=min(_TREES_PER_GROUP, settings.trees - group * _TREES_PER_GROUP),
        max_depth=settings.max_depth,
        max_features=settings.max_features,
        min_samples_leaf=settings.min_samples_leaf,
        bootstrap=settings.bootstrap,
        random_state=int(state[0]),
    )
    # A single output has to be one-dimensional, or scikit-learn warns.
    regressor.fit(profiles, values[:, 0] if values.shape[1] == 1 else values)
    return forest_from_trees(regressor.estimators_)


def groups_of(settings: ForestSettings) -> range:
    """Return the numbers of a forest's groups of trees."""
    return range(-(-settings.trees // _TREES_PER_GROUP))


def forest_values(targets: Targets, phase: Integers, cells: Array, *, integrated: bool) -> Floats32:
    """Return the values (n, n_outputs) that a forest is trained to predict.

    They are the scaled free parameters of the phase (n,), the same for all samples; for an
    integrated forest the code, then every parameter that is free in any phase, also where symmetry
    fixes it (c = a, alpha = 90°), as in section IV-C2. ``cells`` (n, 6) are in Å and degrees.
    """
    columns = [CELL_PARAMETERS.index(name) for name in targets.parameters]
    middle, half_range = targets.middle[phase], targets.half_range[phase]
    scaled = ((cells[:, columns] - middle) / half_range).astype(np.float32)
    if integrated:
        return np.column_stack([phase.astype(np.float32), scaled])
    return scaled[:, targets.free[phase[0]]]
