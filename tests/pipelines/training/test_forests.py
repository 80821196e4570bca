"""Forests on a cluster: grown on the workers, the same on every cluster."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client

from bragg_data.model_provenance import ModelProvenance
from bragg_data.splits import Part, random_split
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.forest import Forest, ForestModel, ForestSettings
from bragg_models.metrics import errors, summary
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets, targets_of
from pipelines.cli.console import Progress
from pipelines.cli.options import SlurmOptions
from pipelines.cluster.client import open_client
from pipelines.training.forests import ForestTask, grow, plans_of
from pipelines.training.names import TrainError
from pipelines.training.presets import FOREST_PRESETS, ForestPreset, Search

pytestmark = pytest.mark.cluster

torch.set_num_threads(1)

TREES = ForestSettings(trees=10, extra=True, bootstrap=False)
PRESET = ForestPreset(
    "profile_smoothed@1",
    {"cubic": replace(TREES, samples=60)},
    TREES,
    replace(TREES, samples=300),
    Search(),
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_client("local", workers=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def targets(small_dataset: xr.Dataset) -> Targets:
    labels = samples_of(small_dataset)
    return targets_of(campaign_of(small_dataset).phases, labels.phase, labels.cells)


@pytest.fixture(scope="module")
def part(small_dataset: xr.Dataset) -> np.ndarray:
    return random_split(samples_of(small_dataset).crystal_system, seed=0)


@pytest.fixture(scope="module")
def expected(
    client: Client,
    small_dataset: xr.Dataset,
    targets: Targets,
    part: np.ndarray,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[tuple[Forest, ...], dict]:
    return grow(
        client,
        ForestTask(small_dataset, targets, part, PRESET, False, 3),
        tmp_path_factory.mktemp("forests"),
    )


@pytest.fixture
def on_trees(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object]], None]:
    """Call a function with each number of trees that are grown."""

    def call(function: Callable[[int], object]) -> None:
        advance = Progress.advance

        def advance_and_call(self: Progress, count: int = 1, note: str | None = None) -> None:
            advance(self, count, note)
            if self.task == "Growing trees":
                function(count)

        monkeypatch.setattr(Progress, "advance", advance_and_call)

    return call


def assert_equal(left: tuple[Forest, ...], right: tuple[Forest, ...]) -> None:
    assert len(left) == len(right)
    for forest, expected in zip(left, right, strict=True):
        for name, array in forest.arrays().items():
            np.testing.assert_array_equal(array, expected.arrays()[name], err_msg=name)


def processes(facts: dict, names: tuple[str, ...]) -> set[int]:
    workers = {worker for name in names for worker in facts[name]["trees_by_worker"]}
    return {int(worker.rpartition("process ")[2].rstrip(")")) for worker in workers}


def test_search_grows_the_same_forests_again_on_workers(
    client: Client,
    small_dataset: xr.Dataset,
    targets: Targets,
    part: np.ndarray,
    expected: tuple[tuple[Forest, ...], dict],
    on_trees: Callable[[Callable[[int], object]], None],
    tmp_path: Path,
) -> None:
    grown: list[int] = []
    on_trees(grown.append)
    forests, facts = grow(
        client, ForestTask(small_dataset, targets, part, PRESET, False, 3), tmp_path
    )
    assert_equal(forests, expected[0])
    workers = set(client.run(os.getpid).values())
    assert os.getpid() not in workers
    assert processes(facts, targets.names) <= workers
    assert all(sum(facts[n]["trees_by_worker"].values()) == 10 for n in targets.names)
    table = facts["cubic"]["search"]
    assert table["params"] == [{"max_features": 1.0}]
    assert -1 < table["mean_test_score"][0] < 0
    assert sum(grown) <= 3 * (10 + 2 * 2)
    assert not any(tmp_path.iterdir())


@pytest.mark.slurm
def test_jobs_of_slurm_grow_the_same_forests(
    slurm: Path,
    small_dataset: xr.Dataset,
    targets: Targets,
    part: np.ndarray,
    expected: tuple[tuple[Forest, ...], dict],
    tmp_path: Path,
) -> None:
    assert slurm.is_dir()
    options = SlurmOptions(
        jobs="2:2",
        cores=1,
        memory="1 GB",
        walltime="00:30:00",
        host="127.0.0.1",
        shared_directory=tmp_path / "shared",
    )
    (tmp_path / "shared").mkdir()
    (tmp_path / "forests").mkdir()
    with open_client("slurm", slurm=options) as jobs:
        jobs.wait_for_workers(2, timeout=60)
        forests, facts = grow(
            jobs, ForestTask(small_dataset, targets, part, PRESET, False, 3), tmp_path / "forests"
        )
        numbers = jobs.run(lambda: os.environ["SLURM_JOB_ID"])
        workers = set(jobs.run(os.getpid).values())
    assert_equal(forests, expected[0])
    assert len(set(numbers.values())) == 2
    assert processes(facts, targets.names) <= workers
    assert not any((tmp_path / "forests").iterdir())


def test_search_chooses_what_does_better_in_the_folds(
    client: Client, small_dataset: xr.Dataset, targets: Targets, part: np.ndarray, tmp_path: Path
) -> None:
    preset = replace(PRESET, search=Search({"min_samples_leaf": (100, 1)}))
    (forest,), facts = grow(
        client, ForestTask(small_dataset, targets, part, preset, True, 3), tmp_path
    )
    integrated = facts["integrated"]
    assert integrated["settings"]["min_samples_leaf"] == 1
    assert integrated["search"]["rank_test_score"] == [2, 1]
    assert (integrated["samples"], integrated["trees"], integrated["bytes"]) == (
        300,
        10,
        forest.nbytes,
    )


def test_number_of_workers_makes_no_difference(
    small_dataset: xr.Dataset,
    targets: Targets,
    part: np.ndarray,
    expected: tuple[tuple[Forest, ...], dict],
    tmp_path: Path,
) -> None:
    with open_client("local", workers=1) as client:
        forests, _ = grow(
            client, ForestTask(small_dataset, targets, part, PRESET, False, 3), tmp_path
        )
    assert_equal(forests, expected[0])


def test_worker_killed_meanwhile_does_not_matter(
    small_dataset: xr.Dataset,
    targets: Targets,
    part: np.ndarray,
    expected: tuple[tuple[Forest, ...], dict],
    on_trees: Callable[[Callable[[int], object]], None],
    tmp_path: Path,
) -> None:
    killed: list[int] = []
    with open_client("local", workers=2) as client:
        pids = sorted(client.run(os.getpid).values())

        def kill_once(_: int) -> None:
            if not killed:
                killed.append(pids[0])
                os.kill(killed[0], signal.SIGKILL)

        on_trees(kill_once)
        forests, _ = grow(
            client, ForestTask(small_dataset, targets, part, PRESET, False, 3), tmp_path
        )
    assert killed
    assert_equal(forests, expected[0])


def test_test_samples_are_not_touched_and_the_choice_is_seeded(
    small_dataset: xr.Dataset, targets: Targets, part: np.ndarray
) -> None:
    plans = plans_of(ForestTask(small_dataset, targets, part, PRESET, False, 3))
    phase = samples_of(small_dataset).phase
    for code, plan in enumerate(plans):
        assert (part[plan.rows] != Part.test).all()
        assert (phase[plan.rows] == code).all()
        assert len(np.unique(plan.rows)) == len(plan.rows)
    assert len(plans[0].rows) == 60
    again, another = (
        plans_of(ForestTask(small_dataset, targets, part, PRESET, False, seed))[0]
        for seed in (3, 4)
    )
    np.testing.assert_array_equal(again.rows, plans[0].rows)
    assert not np.array_equal(another.rows, plans[0].rows)
    nothing = np.full_like(part, Part.test)
    with pytest.raises(TrainError, match="Simulate more"):
        plans_of(ForestTask(small_dataset, targets, nothing, PRESET, False, 3))


def test_an_integrated_forest_is_better_than_a_constant(
    client: Client, small_dataset: xr.Dataset, targets: Targets, part: np.ndarray, tmp_path: Path
) -> None:
    task = ForestTask(small_dataset, targets, part, PRESET, True, 0)
    (forest,), _ = grow(client, task, tmp_path)
    model = ForestModel((forest,), integrated=True)
    predictor = Predictor("forest", model, targets, PRESET.preprocessing, 800, ModelProvenance())
    rows = np.flatnonzero(part == Part.test)
    prediction = predictor.predict(small_dataset["intensity"].values[rows])
    labels = samples_of(small_dataset)
    truth = labels.phase[rows], labels.cells[rows]
    scores = summary(targets, errors(targets, *truth, prediction.phase, prediction.cells))["all"]
    assert scores["accuracy"] > 0.75
    assert scores["mse_paper"] < 4e-3  # a constant: 1e-2


def test_presets_are_the_papers_and_ours() -> None:
    paper = FOREST_PRESETS["paper"]
    sizes = {name: (s.trees, s.samples) for name, s in paper.by_system.items()}
    assert sizes == {"cubic": (150, 792), "trigonal": (200, 6500), "tetragonal": (200, 20500)}
    assert (paper.integrated.trees, paper.integrated.samples) == (250, 27800)
    settings = (*paper.by_system.values(), paper.integrated)
    assert all((s.max_depth, s.max_features, s.extra) == (50, 1.0, False) for s in settings)
    assert paper.preprocessing == "profile_cropped@1"
    assert {"quick", "standard"} < set(FOREST_PRESETS)
