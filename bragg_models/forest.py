"""Random forests: compact arrays of trees that answer fast, and what they are grown by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_models.targets import Targets

LEAF = np.uint16(2**16 - 1)
"""What a leaf has in place of a feature."""

TREES_PER_GROUP = 4
"""Trees that share a stream of random numbers, and that are grown in one go."""


class ForestError(ValueError):
    """Trees that do not fit together, or a forest that cannot be read."""


@dataclass(frozen=True)
class ForestSettings:
    """How a forest is grown.

    Attributes
    ----------
    trees
        Their number.
    max_depth
        50 in the paper (section V-B1).
    max_features
        Share of the features that a split chooses among; 1.0 is scikit-learn's default.
    min_samples_leaf
        Least number of training samples in a leaf.
    extra
        Extremely randomised trees (Geurts, Ernst & Wehenkel, Machine Learning 63 (2006) 3): one
        random threshold per feature instead of the best one.
    bootstrap
        Whether each tree sees a sample drawn with replacement, or all samples.
    samples
        Number of samples to grow it on, chosen at random; None is all there are.
    """

    trees: int
    max_depth: int = 50
    max_features: float = 1.0
    min_samples_leaf: int = 1
    extra: bool = False
    bootstrap: bool = True
    samples: int | None = None


@dataclass(frozen=True)
class Forest:
    """Regression trees as plain arrays, one after the other.

    The nodes of a tree lie depth-first as scikit-learn writes them: the left child of a node is the
    next one, so only the right one is kept. Leaves are numbered through all trees.

    Attributes
    ----------
    root : shape (n_trees,), int32
        First node of each tree.
    feature : shape (n_nodes,), uint16
        Feature that a node asks for; :data:`LEAF` for a leaf.
    threshold : shape (n_nodes,), float32
        A profile whose feature is at most this goes to the left.
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
        """Return the mean of the trees' answers.

        Parameters
        ----------
        profiles : shape (n, n_features)
            Prepared as those that the trees were grown on.

        Returns
        -------
        shape (n, n_outputs)
        """
        return np.asarray(_mean(*self._walked(profiles)))

    def votes(
        self, profiles: NDArray[np.float32], column: int, n_codes: int
    ) -> NDArray[np.float64]:
        """Return which share of the trees answers each code, where an output is a rounded code.

        Parameters
        ----------
        profiles : shape (n, n_features)
            As in :meth:`predict`.
        column
            The output that is a code.
        n_codes
            Codes are 0 to n_codes - 1; an answer beyond counts for the nearest.

        Returns
        -------
        shape (n, n_codes)
        """
        return np.asarray(_votes(*self._walked(profiles), column, n_codes))

    def leaves(self, profiles: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return the row in ``value`` to which each tree leads each profile, (n, n_trees)."""
        return np.asarray(_leaves(*self._walked(profiles)[:-1]))

    def _walked(self, profiles: NDArray[np.float32]) -> tuple[Any, ...]:
        rows = np.ascontiguousarray(profiles, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] < self._width:
            raise ForestError(
                f"The trees ask for {self._width} features, given as an array of shape "
                f"(n, features); got shape {rows.shape}. Prepare the profiles as for training."
            )
        return rows, self.root, self.feature, self.threshold, self.right, self.value

    @cached_property
    def _width(self) -> int:
        asked = self.feature[self.feature != LEAF]
        return int(asked.max(initial=0)) + 1

    def _is_consistent(self) -> bool:
        """Tell whether every walk ends in a leaf: each step goes forward and stays inside."""
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
        """Return the arrays by name, from which :meth:`from_arrays` makes an equal forest."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Forest:
        """Return a forest from arrays of unknown origin, as :meth:`arrays` named them.

        Raises
        ------
        ForestError
            If one is missing or they contradict each other: following them could lead anywhere.
        """
        try:
            forest = cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except KeyError as error:
            raise ForestError(f"The forest has no array {error}: train the model again.") from None
        if not forest._is_consistent():
            raise ForestError("The forest's arrays contradict each other: train the model again.")
        return forest


_TYPES = {
    "root": np.dtype(np.int32),
    "feature": np.dtype(np.uint16),
    "threshold": np.dtype(np.float32),
    "right": np.dtype(np.int32),
    "value": np.dtype(np.float32),
}


def forest_from_trees(trees: Sequence[Any]) -> Forest:
    """Return the compact form of trees that scikit-learn grew.

    It compares features in single precision with a threshold in double precision; x <= t holds for
    just the same x if t is rounded down.

    Parameters
    ----------
    trees
        Fitted regressors (``estimators_`` of a forest).

    Raises
    ------
    ForestError
        If there are none, or one has more features than 16 bits count.
    """
    if not trees:
        raise ForestError("A forest needs at least one tree.")
    return join([_one_tree(tree.tree_) for tree in trees])


def _one_tree(tree: Any) -> Forest:
    if tree.n_features >= LEAF:
        raise ForestError(
            f"The trees have {tree.n_features} features; a saved forest counts to {LEAF - 1}."
        )
    is_leaf = tree.children_left == -1
    inner = np.flatnonzero(~is_leaf)
    if not np.array_equal(tree.children_left[inner], inner + 1):
        raise ForestError(
            "The trees were not grown depth-first: leave max_leaf_nodes at its default."
        )
    feature = np.where(is_leaf, LEAF, tree.feature).astype(np.uint16)
    right = np.where(is_leaf, np.cumsum(is_leaf) - 1, tree.children_right).astype(np.int32)
    threshold = tree.threshold.astype(np.float32)
    too_high = threshold > tree.threshold
    threshold[too_high] = np.nextafter(threshold[too_high], np.float32(-np.inf))
    threshold[is_leaf] = 0
    value = tree.value[is_leaf, :, 0].astype(np.float32)
    return Forest(np.zeros(1, np.int32), feature, threshold, right, value)


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


def grow_group(
    profiles: NDArray[np.float32],
    values: NDArray[np.float32],
    settings: ForestSettings,
    group: int,
    *,
    seed: int,
) -> Forest:
    """Grow one group of a forest's trees.

    Parameters
    ----------
    profiles : shape (n, n_features)
        Prepared.
    values : shape (n, n_outputs)
        Scaled targets.
    settings
        Of the whole forest.
    group
        Its number: each group has a stream of random numbers of its own, wherever it is grown.
    seed
        Of the forest.
    """
    # Not needed by a model that only answers.
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

    kind = ExtraTreesRegressor if settings.extra else RandomForestRegressor
    state = np.random.SeedSequence([seed, group]).generate_state(1)
    regressor = kind(
        n_estimators=min(TREES_PER_GROUP, settings.trees - group * TREES_PER_GROUP),
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
    return range(-(-settings.trees // TREES_PER_GROUP))


# ---- what answers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForestModel:
    """Forests that together answer for a campaign.

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
        """Return what the forests say.

        Parameters
        ----------
        profiles : shape (n, n_features)
            Prepared.
        targets
            What the outputs mean.
        phase : shape (n,)
            Phase of each profile, as a classifier tells it. Class-conditional forests need it;
            integrated ones find it themselves.

        Returns
        -------
        probabilities : shape (n, n_phases)
            Of an integrated forest the share of its trees whose rounded code is the phase's; of
            class-conditional ones 1 for the phase that they were told.
        values : shape (n, n_parameters)
            Scaled as by :class:`~bragg_models.targets.Targets`; class-conditional forests leave 0
            where a parameter is not free.

        Raises
        ------
        ForestError
            If class-conditional forests are not told the phases.

        Notes
        -----
        The paper rounds the mean of the trees' codes, which is tetragonal (1) where half of them
        say cubic (0) and half trigonal (2); the votes do not depend on the order of the codes.
        """
        if self.integrated:
            (forest,) = self.forests
            votes = forest.votes(profiles, 0, len(targets.names))
            return votes, forest.predict(profiles)[:, 1:]
        if phase is None:
            raise ForestError("Class-conditional forests answer for a given phase: give one.")
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
        """Return the model whose arrays :meth:`arrays` gave.

        Raises
        ------
        ForestError
            If arrays are missing, contradict each other, or answer something else than the targets.
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
                f"The forests have {[forest.outputs for forest in forests]} outputs, the targets "
                f"ask for {counts}: train the model again."
            )
        return cls(forests, integrated)


def forest_values(
    targets: Targets, phase: NDArray[np.integer], cells: NDArray[np.float64], *, integrated: bool
) -> NDArray[np.float32]:
    """Return what a forest is to learn about some samples.

    Parameters
    ----------
    targets
        The campaign's phases and scaling.
    phase : shape (n,)
        Phase codes; for a class-conditional forest all the same.
    cells : shape (n, 6)
        In ångström and degrees.
    integrated
        Whether for an integrated forest.

    Returns
    -------
    shape (n, n_outputs)
        Scaled free parameters of the phase; integrated: the code, then every parameter that is free
        in any phase, also where symmetry fixes it (c = a, alpha = 90°), as in section IV-C2.
    """
    columns = [CELL_PARAMETERS.index(name) for name in targets.parameters]
    scaled = ((cells[:, columns] - targets.middle) / targets.half_range).astype(np.float32)
    if integrated:
        return np.column_stack([phase.astype(np.float32), scaled])
    return scaled[:, targets.free[phase[0]]]


# ---- compiled loops ----------------------------------------------------------------------------
# Tree by tree, so that a tree's nodes stay in the processor's cache for all rows; the sum over the
# trees is always in their order, so that a row's answer does not depend on its batch.


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
    rows: Any, root: Any, feature: Any, threshold: Any, right: Any, value: Any,
    column: int, n_codes: int,
) -> Any:  # fmt: skip
    share = np.zeros((len(rows), n_codes))
    for first in root:
        for i in range(len(rows)):
            answer = value[_leaf(rows[i], first, feature, threshold, right), column]
            share[i, min(max(int(np.rint(answer)), 0), n_codes - 1)] += 1.0
    return share / len(root)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _leaves(rows: Any, root: Any, feature: Any, threshold: Any, right: Any) -> Any:
    found = np.empty((len(rows), len(root)), dtype=np.int32)
    for tree, first in enumerate(root):
        for i in range(len(rows)):
            found[i, tree] = _leaf(rows[i], first, feature, threshold, right)
    return found
