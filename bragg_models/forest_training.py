"""Growing of random forests with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_models.forest import LEAF, Forest, ForestError, join
from bragg_models.targets import Targets

TREES_PER_GROUP = 4
"""Trees that share a stream of random numbers and are grown together."""


@dataclass(frozen=True)
class ForestSettings:
    """Hyperparameters of a forest.

    Attributes
    ----------
    trees
        Number of trees.
    max_depth
        50 in the paper (section V-B1).
    max_features
        Share of the features among which a split is chosen; 1.0 is scikit-learn's default.
    min_samples_leaf
        Least number of training samples in a leaf.
    extra
        Extremely randomised trees (Geurts, Ernst & Wehenkel, Machine Learning 63 (2006) 3): one
        random threshold per feature instead of the best one.
    bootstrap
        Whether each tree sees a sample drawn with replacement, or all samples.
    samples
        Number of training samples, chosen at random; None uses all.
    """

    trees: int
    max_depth: int = 50
    max_features: float = 1.0
    min_samples_leaf: int = 1
    extra: bool = False
    bootstrap: bool = True
    samples: int | None = None


def forest_from_trees(trees: Sequence[Any]) -> Forest:
    """Return the compact form of trees that scikit-learn grew.

    scikit-learn compares features in single precision with a threshold in double precision; x <= t
    is true for exactly the same x if t is rounded down.

    Parameters
    ----------
    trees
        Fitted regressors (``estimators_`` of a forest).

    Raises
    ------
    ForestError
        If there are none, or one has more features than 16 bits can count.
    """
    if not trees:
        raise ForestError("A forest needs at least one tree.")
    return join([_forest_from_tree(tree.tree_) for tree in trees])


def _forest_from_tree(tree: Any) -> Forest:
    if tree.n_features >= LEAF:
        raise ForestError(
            f"The trees have {tree.n_features} features; a saved forest has at most {LEAF - 1}."
        )
    is_leaf = tree.children_left == -1
    inner = np.flatnonzero(~is_leaf)
    if not np.array_equal(tree.children_left[inner], inner + 1):
        raise ForestError(
            "The trees were not grown depth-first. Leave max_leaf_nodes at its default."
        )
    feature = np.where(is_leaf, LEAF, tree.feature).astype(np.uint16)
    right = np.where(is_leaf, np.cumsum(is_leaf) - 1, tree.children_right).astype(np.int32)
    threshold = tree.threshold.astype(np.float32)
    too_high = threshold > tree.threshold
    threshold[too_high] = np.nextafter(threshold[too_high], np.float32(-np.inf))
    threshold[is_leaf] = 0
    value = tree.value[is_leaf, :, 0].astype(np.float32)
    return Forest(np.zeros(1, np.int32), feature, threshold, right, value)


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
        Number of the group, which selects its stream of random numbers, wherever it is grown.
    seed
        Of the forest.
    """
    # Not needed for predictions.
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


def forest_values(
    targets: Targets, phase: NDArray[np.integer], cells: NDArray[np.float64], *, integrated: bool
) -> NDArray[np.float32]:
    """Return the values that a forest is trained to predict.

    Parameters
    ----------
    targets
        The campaign's phases and scaling.
    phase : shape (n,)
        Phase codes; for a class-conditional forest all the same.
    cells : shape (n, 6)
        In ångström and degrees.
    integrated
        Whether the forest is integrated.

    Returns
    -------
    shape (n, n_outputs)
        Scaled free parameters of the phase; for an integrated forest the code, then every parameter
        that is free in any phase, also where symmetry fixes it (c = a, alpha = 90°), as in section
        IV-C2.
    """
    columns = [CELL_PARAMETERS.index(name) for name in targets.parameters]
    scaled = ((cells[:, columns] - targets.middle) / targets.half_range).astype(np.float32)
    if integrated:
        return np.column_stack([phase.astype(np.float32), scaled])
    return scaled[:, targets.free[phase[0]]]
