"""Compact forests against those of scikit-learn, and saved models of them."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

from bragg_data.campaign import Campaign
from bragg_data.model_provenance import ModelProvenance
from bragg_models.forest import (
    LEAF,
    Forest,
    ForestError,
    ForestModel,
    ForestSettings,
    forest_from_trees,
    forest_values,
    groups_of,
    grow_group,
    join,
)
from bragg_models.predictors import Predictor, PredictorError, build, load_predictor
from bragg_models.targets import Targets, targets_of

torch.set_num_threads(1)

RNG = np.random.default_rng(0)
# Few distinct values: thresholds lie just between two of them, or on one.
X = np.round(RNG.normal(size=(600, 12)), 2).astype(np.float32)
Y = np.column_stack([X[:, 0] * 2 + X[:, 1] ** 2, np.sin(X[:, 2] * 3) + X[:, 3]])
NEW = np.round(RNG.normal(size=(400, 12)), 2).astype(np.float32)


@pytest.mark.parametrize("kind", [RandomForestRegressor, ExtraTreesRegressor])
@pytest.mark.parametrize("outputs", [1, 2])
def test_predictions_are_those_of_scikit_learn(kind: type, outputs: int) -> None:
    grown = kind(15, random_state=0).fit(X, Y[:, 0] if outputs == 1 else Y)
    forest = forest_from_trees(grown.estimators_)
    assert (forest.trees, forest.outputs) == (15, outputs)
    expected = grown.predict(NEW).reshape(len(NEW), -1)
    np.testing.assert_allclose(forest.predict(NEW), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(forest.predict(NEW[:1]), forest.predict(NEW)[:1])
    # The same leaf in every tree, for samples on the thresholds too.
    for rows in (NEW, X):
        nodes = grown.apply(rows)
        first = 0
        for number, tree in enumerate(grown.estimators_):
            of_node = np.cumsum(tree.tree_.children_left == -1) - 1 + first
            np.testing.assert_array_equal(forest.leaves(rows)[:, number], of_node[nodes[:, number]])
            first += tree.tree_.n_leaves


@settings(max_examples=200)
@given(st.floats(-1e6, 1e6), st.integers(-3, 3))
def test_thresholds_in_single_precision_give_the_same_leaves(threshold: float, steps: int) -> None:
    grown = RandomForestRegressor(1, bootstrap=False).fit(
        np.array([[0.0], [1.0]], np.float32), [0.0, 1.0]
    )
    tree = grown.estimators_[0].tree_
    tree.threshold[0] = threshold
    forest = forest_from_trees(grown.estimators_)
    x = np.float32(threshold)
    for _ in range(abs(steps)):
        x = np.nextafter(x, np.float32(np.inf * np.sign(steps)))
    rows = np.array([[x]], np.float32)
    assert forest.predict(rows)[0, 0] == grown.predict(rows)[0]


def test_votes_are_shares_of_trees_by_rounded_code() -> None:
    code = (X[:, 0] > 0).astype(float) + (X[:, 1] > 0.5)
    grown = RandomForestRegressor(9, random_state=0, min_samples_leaf=3).fit(X, code)
    votes = forest_from_trees(grown.estimators_).votes(NEW, 0, 3)
    codes = np.array([np.rint(tree.predict(NEW)) for tree in grown.estimators_])
    expected = np.stack([(codes == c).mean(axis=0) for c in range(3)], axis=1)
    np.testing.assert_allclose(votes, expected, atol=1e-12)


def test_groups_grown_separately_and_joined_are_the_forest() -> None:
    how = ForestSettings(trees=10, max_features=0.5, extra=True)
    groups = [grow_group(X, Y.astype(np.float32), how, group, seed=1) for group in groups_of(how)]
    assert [group.trees for group in groups] == [4, 4, 2]
    forest = join(groups)
    mean = sum(group.predict(NEW) * group.trees for group in groups) / 10
    np.testing.assert_allclose(forest.predict(NEW), mean, atol=1e-12)
    again = grow_group(X, Y.astype(np.float32), how, 2, seed=1)
    np.testing.assert_array_equal(again.threshold, groups[2].threshold)
    assert not np.array_equal(groups[0].threshold[:5], groups[1].threshold[:5])
    with pytest.raises(ForestError, match="same outputs"):
        join([forest, grow_group(X, Y[:, :1].astype(np.float32), how, 0, seed=1)])
    with pytest.raises(ForestError, match="at least one"):
        join([])


def test_inconsistent_arrays_are_refused() -> None:
    how = ForestSettings(trees=2)
    good = grow_group(X, Y.astype(np.float32), how, 0, seed=1)
    assert np.array_equal(Forest.from_arrays(good.arrays()).predict(NEW), good.predict(NEW))
    leaf, inner = (int(np.flatnonzero((good.feature == LEAF) == end)[0]) for end in (True, False))
    for name, index, value in (
        ("right", inner, inner),
        ("right", inner, len(good.right)),
        ("right", inner, -1),
        ("right", leaf, len(good.value)),
        ("root", 0, len(good.right)),
        ("root", 0, -1),
        ("feature", len(good.feature) - 1, 0),
    ):
        damaged = {key: array.copy() for key, array in good.arrays().items()}
        damaged[name][index] = value
        with pytest.raises(ForestError, match="inconsistent"):
            Forest.from_arrays(damaged)
    for arrays in (
        {**good.arrays(), "right": good.right.astype(np.int64)},
        {**good.arrays(), "threshold": good.threshold[:-1]},
    ):
        with pytest.raises(ForestError, match="inconsistent"):
            Forest.from_arrays(arrays)
    with pytest.raises(ForestError, match="no array 'value'"):
        Forest.from_arrays({k: v for k, v in good.arrays().items() if k != "value"})
    with pytest.raises(ForestError, match="features"):
        good.predict(NEW[:, :3])


# ---- as a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def targets(small_campaign: Campaign) -> Targets:
    samples = small_campaign.samples
    return targets_of(small_campaign.phases, samples.phase, samples.cells)


def patterns(targets: Targets, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with offsets that depend on the phase, a and c."""
    rng = np.random.default_rng(1)
    phase = rng.integers(0, 3, count)
    scaled = rng.uniform(-1, 1, (count, 3))
    cells = targets.decode(scaled, phase)
    profiles = rng.uniform(0, 0.1, (count, 800)).astype(np.float32)
    for block, column in enumerate((phase / 2, cells[:, 0] - 3.9, cells[:, 2] - 3.9)):
        profiles[:, 200 * block : 200 * block + 200] += column[:, None].astype(np.float32) * 5
    return profiles, phase, cells


@pytest.fixture(scope="module")
def models(targets: Targets) -> tuple[Predictor, Predictor]:
    """A class-conditional model with a network as its classifier, and an integrated one."""
    from bragg_data.preprocessing import smoothed

    profiles, phase, cells = patterns(targets, 400)
    prepared = smoothed(profiles)
    how = ForestSettings(trees=4, extra=True, bootstrap=False)
    conditional = []
    for code in range(3):
        rows = phase == code
        values = forest_values(targets, phase[rows], cells[rows], integrated=False)
        conditional.append(grow_group(prepared[rows], values, how, 0, seed=code))
    values = forest_values(targets, phase, cells, integrated=True)
    whole = grow_group(prepared, values, how, 0, seed=4)
    config = {"points": 800, "phases": 3, "parameters": 3}
    classifier = Predictor(
        "multitask",
        build("multitask", config),
        targets,
        "profile_minmax@1",
        800,
        ModelProvenance(preset="classifier"),
    )
    conditional_model = ForestModel(tuple(conditional), integrated=False)
    provenance = ModelProvenance(preset="forest")
    prepared_by = "profile_smoothed@1"
    return (
        Predictor("forest", conditional_model, targets, prepared_by, 800, provenance, classifier),
        Predictor(
            "integrated_forest",
            ForestModel((whole,), integrated=True),
            targets,
            prepared_by,
            800,
            ModelProvenance(),
        ),
    )


def test_training_values_are_those_of_the_paper(targets: Targets) -> None:
    _, phase, cells = patterns(targets, 50)
    values = forest_values(targets, phase, cells, integrated=True)
    np.testing.assert_array_equal(values[:, 0], phase)
    physical = values[:, 1:] * targets.half_range[phase] + targets.middle[phase]
    np.testing.assert_allclose(physical, cells[:, [0, 2, 3]], atol=1e-4)  # c = a, alpha = 90 too
    tetragonal = phase == 1
    conditional = forest_values(targets, phase[tetragonal], cells[tetragonal], integrated=False)
    np.testing.assert_array_equal(conditional, values[tetragonal][:, [1, 2]])


def test_a_saved_model_predicts_as_before_and_loads_quickly(
    models: tuple[Predictor, Predictor], targets: Targets, tmp_path: Path
) -> None:
    profiles, phase, _ = patterns(targets, 60)
    for number, model in enumerate(models):
        directory = tmp_path / str(number)
        model.save(directory)
        suffixes = {path.suffix for path in directory.rglob("*") if path.is_file()}
        assert suffixes == {".json", ".safetensors"}
        began = time.process_time()
        loaded = load_predictor(directory)
        assert time.process_time() - began < 1
        for known in (None, phase):
            before, after = model.predict(profiles, known), loaded.predict(profiles, known)
            np.testing.assert_array_equal(before.probabilities, after.probabilities)
            np.testing.assert_array_equal(before.phase, after.phase)
            np.testing.assert_array_equal(before.cells, after.cells)
    assert (loaded.kind, loaded.classifier) == ("integrated_forest", None)


def test_conditional_forests_use_their_classifier_unless_the_phase_is_known(
    models: tuple[Predictor, Predictor], targets: Targets
) -> None:
    conditional, integrated = models
    profiles, phase, cells = patterns(targets, 60)
    assert conditional.classifier is not None
    predicted = conditional.predict(profiles)
    classified = conditional.classifier.predict(profiles)
    np.testing.assert_array_equal(predicted.phase, classified.phase)
    np.testing.assert_array_equal(predicted.probabilities, classified.probabilities)
    known = conditional.predict(profiles, phase)
    np.testing.assert_array_equal(known.phase, phase)
    np.testing.assert_array_equal(known.probabilities, np.eye(3)[phase])
    assert np.abs(known.cells[:, 0] - cells[:, 0]).mean() < 0.03
    np.testing.assert_array_equal(known.cells[phase == 0][:, 3:], 90)
    votes = integrated.predict(profiles)
    assert (votes.phase == phase).mean() > 0.9
    np.testing.assert_allclose(votes.probabilities.sum(axis=1), 1)
    other = integrated.predict(profiles, np.full(60, 2))
    np.testing.assert_array_equal(other.cells[:, 0], other.cells[:, 2])  # under another phase
    with pytest.raises(PredictorError, match="from 0 to 2"):
        conditional.predict(profiles, np.full(60, 3))
    with pytest.raises(PredictorError, match="each of the 60"):
        conditional.predict(profiles, 1)


def test_a_damaged_saved_model_is_refused(
    models: tuple[Predictor, Predictor], tmp_path: Path
) -> None:
    conditional, integrated = models
    conditional.save(tmp_path / "one")
    (tmp_path / "one" / "classifier").rename(tmp_path / "elsewhere")
    with pytest.raises(PredictorError, match="no classifier"):
        load_predictor(tmp_path / "one")
    integrated.save(tmp_path / "two")
    weights = "weights.safetensors"
    (tmp_path / "one" / weights).replace(tmp_path / "two" / weights)
    with pytest.raises(ForestError, match="outputs"):
        load_predictor(tmp_path / "two")
    (tmp_path / "two" / weights).write_bytes(b"short")
    with pytest.raises(PredictorError, match="incomplete or damaged"):
        load_predictor(tmp_path / "two")
