"""Several data sets in one training: shares of the loss, and what of them is used."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from typer.testing import CliRunner

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.splits import Part, random_split
from bragg_data.store.repository import Store
from bragg_data.store.schema import samples_of
from bragg_models.data.batches import Profiles
from bragg_models.targets import targets_of
from bragg_models.training.fit import fit
from bragg_models.training.inference import Samples
from bragg_models.training.settings import (
    Criteria,
    FitSettings,
    LabelledBatch,
    TrainingData,
    multitask_objective,
)
from catalog.lineage import trace
from catalog.tracking import Tracking
from pipelines import ingest
from pipelines import simulate as simulate_command
from pipelines.training.extra_data import StoredSamples, extra_samples, loss_weights
from pipelines.training.names import TrainError
from pipelines.training.task import TrainingTask
from tests.small_bench import Bench, short_presets


@pytest.fixture(scope="module")
def mixed(
    small_store: Store,
    campaign_file: Path,
    simulate_into: Callable[[Store, Campaign, str], None],
    tmp_path_factory: pytest.TempPathFactory,
    tracking_in: Callable[[Path], Tracking],
) -> Bench:
    """A store with small-v1, and other-v1 of another seed and other cells."""
    directory = tmp_path_factory.mktemp("mixed")
    store = Store(shutil.copytree(small_store.path, directory / "store"))
    path = shutil.copytree(campaign_file.parent, directory / "campaign") / campaign_file.name
    text = path.read_text(encoding="utf-8").replace("seed = 7", "seed = 8")
    path.write_text(text.replace("step = 0.002", "step = 0.004").replace('"small"', '"other"'))
    simulate_into(store, load_campaign(path), "other-v1")
    return Bench(store, tracking_in(directory), directory / "state", short_presets())


def main_samples(dataset: xr.Dataset) -> StoredSamples:
    labels = samples_of(dataset)
    return StoredSamples(dataset, labels, random_split(labels.crystal_system, seed=0), "")


def test_shares_hold_within_each_phase():
    phase = np.repeat([0, 0, 1, 1, 2], [30, 3, 50, 2, 7])
    number = np.repeat([0, 1, 0, 1, 0], [30, 3, 50, 2, 7])
    part = np.full(len(phase), Part.training, np.int8)
    part[:10] = Part.test
    weight = loss_weights(phase, number, part, (0.75, 0.25))
    training = part == Part.training
    for code in (0, 1):
        of_phase = training & (phase == code)
        assert weight[of_phase].mean() == pytest.approx(1)
        of_second = weight[of_phase & (number == 1)].sum()
        assert of_second / weight[of_phase].sum() == pytest.approx(0.25)
    assert (weight[phase == 2] == 1).all()  # the other data set has none of this phase


def test_a_weight_of_two_is_a_sample_twice():
    network = nn.Module()
    outputs = torch.randn(3, 3), torch.randn(3, 2)
    network.forward = lambda rows: tuple(of_all[rows] for of_all in outputs)
    truth = torch.tensor([0, 2, 1]), torch.randn(3, 2)
    free = torch.tensor([[True, False], [True, True], [False, True]])

    def loss(rows: list[int], weight: torch.Tensor | None) -> dict[str, float]:
        labels = torch.tensor(rows), truth[0][rows], truth[1][rows], free[rows]
        batch = LabelledBatch(*labels, np.array(rows), weight)
        return {k: float(v) for k, v in multitask_objective(network, batch, None).items()}

    weighted, repeated = loss([0, 1, 2], torch.tensor([0.75, 1.5, 0.75])), loss([0, 1, 1, 2], None)
    assert weighted["cross_entropy"] == pytest.approx(repeated["cross_entropy"])
    assert loss([0, 1, 2], torch.ones(3)) == pytest.approx(loss([0, 1, 2], None))


def test_contradicting_data_sets_are_fitted_by_their_shares():
    """The same profiles, labelled differently by two data sets of very different sizes."""
    phases = load_campaign("batio3-nomad").phases[:1]
    targets = targets_of(phases, np.zeros(2, np.int8), cells(3, 5))
    phase, number = np.zeros(440, np.int8), np.repeat([0, 1], [400, 40])
    of_all = np.repeat(cells(5, 3), [400, 40], axis=0)  # scaled: 1 and -1
    intensity = xr.DataArray(np.ones((440, 1), np.float32), dims=("sample", "tof"))
    part = np.full(440, Part.training, np.int8)
    weight = loss_weights(phase, number, part, (0.3, 0.7))
    samples = Samples(Profiles(intensity, 512, lambda v: v), phase, of_all, weight)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(1))

        def forward(self, profiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            n = len(profiles)
            return torch.zeros(n, 1), self.value.expand(n, 1)

    network, everything = Constant(), np.ones(440, bool)
    settings = FitSettings(80, batch_size=440, learning_rate=0.1, schedule="one_cycle")
    data, later = TrainingData(targets, samples, everything, everything), itertools.count()
    # Each epoch counts as better than the one before, so that the last weights remain.
    criteria = Criteria(validate=lambda _: {"all": {"mse_paper": -float(next(later))}})
    list(fit(network, data, settings, seed=0, criteria=criteria))
    assert network.value.item() == pytest.approx(0.3 - 0.7, abs=0.01)


def cells(*lengths: float) -> np.ndarray:
    return np.array([[a, a, a, 90.0, 90.0, 90.0] for a in lengths])


@pytest.mark.training
def test_both_data_sets_are_named(mixed: Bench):
    arguments = "multitask", "--extra-data", "other-v1", "--extra-share", "0.4"
    mixed(*arguments)
    (version,) = mixed.versions("multitask")
    chain, provenance = trace(mixed.tracking, version.uri)
    assert provenance.order["extra_shares"] == [0.4]
    view, extra = chain.sources[0].sources
    assert view.sources[0].name == "small-v1"
    assert (extra.name, extra.facts["context"]) == (
        "other-v1",
        "training, extra data, 0.4 of the loss",
    )
    assert extra.facts["id"].startswith(mixed.store.open("other-v1").attrs["snapshot_id"])
    assert mixed.metrics("multitask")["test/all/n"] == 142  # of small-v1 alone


def test_cells_that_are_held_out_stay_out(mixed: Bench):
    main = main_samples(mixed.store.open("small-v1"))
    same = extra_samples(main, "small-v1", blocked=False)
    np.testing.assert_array_equal(same.part == Part.training, main.part == Part.training)
    other = extra_samples(main, "other-v1", blocked=False)
    assert 0.5 < (other.part == Part.training).mean() < 1


def test_labelled_measured_profiles_join_without_their_background(
    mixed: Bench, campaign_file: Path, tmp_path: Path
):
    dataset = mixed.store.open("small-v1")
    row = int(np.flatnonzero(dataset.phase.values == 1)[0])
    pattern = dataset.intensity.values[row].astype(np.float64)
    pattern *= 1e4 / pattern.max()
    counts = pattern + 500.0
    for name in ("known", "unknown"):
        columns = np.column_stack([dataset.tof.values, counts, np.sqrt(counts)])
        np.savetxt(tmp_path / f"{name}.xye", columns)
    a, c = float(dataset.a[row]), float(dataset.c[row])
    labels = tmp_path / "labels.csv"
    labels.write_text(f"file,phase,a,c\nknown.xye,tetragonal,{a},{c}\n")
    arguments = [tmp_path / "known.xye", tmp_path / "unknown.xye", "--into", "mine"]
    arguments += ["--labels", labels, "--campaign", campaign_file, "--store", mixed.store.uri]
    arguments += ["--instrument", campaign_file.parent / "nomad_bank4.instprm"]
    result = CliRunner().invoke(ingest.app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (simulated,) = mixed.store.data_sets_of(load_campaign(campaign_file))
    assert simulated.tag == "small-v1"  # measured ones next to it do no harm
    extra = extra_samples(main_samples(dataset), "mine-v1", blocked=False)
    np.testing.assert_allclose(extra.labels.cells[:, [0, 2]], [[a, c]])
    (profile,) = extra.dataset.intensity.values
    assert profile.max() == 1
    assert np.corrcoef(profile, pattern)[0, 1] > 0.99
    assert np.median(profile) < 0.02


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.5), (0.2, 0.0)])
def test_shares_that_do_not_fit_are_refused(shares):
    task = TrainingTask(extra_data=("a-v1", "b-v1"), extra_shares=shares)
    with pytest.raises(TrainError, match="2 of --extra-data need as many of --extra-share"):
        task.check()


@pytest.mark.training
def test_few_patterns_of_gsas2_and_many_fast_ones(
    mixed: Bench, campaign_file: Path, gsas2_location: str | None
):
    arguments = ["--campaign", campaign_file, "--simulator", "gsas2", "--limit", 48]
    arguments += ["--store", mixed.store.uri, "--workers", 1, "--tag", "exact-v1"]
    if gsas2_location:
        arguments += ["--gsas2-path", gsas2_location]
    result = CliRunner().invoke(
        simulate_command.app, [*map(str, arguments)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    before = len(mixed.versions("multitask"))
    shares = "--extra-data", "small-v1", "--extra-share", "0.8"
    mixed("multitask", "--data", "exact-v1", *shares)
    version = mixed.versions("multitask")[0]
    assert len(mixed.versions("multitask")) == before + 1
    chain, provenance = trace(mixed.tracking, version.uri)
    view, extra = chain.sources[0].sources
    assert view.sources[0].facts["simulator"].startswith("gsas2 ")
    assert (view.sources[0].name, extra.name) == ("exact-v1", "small-v1")
    # As its cells are those of small-v1, the patterns of its test samples are kept out there.
    main = main_samples(mixed.store.open("exact-v1"))
    used = extra_samples(main, "small-v1", blocked=False)
    assert (used.part != Part.training).sum() == (main.part != Part.training).sum()
    assert provenance.test["all"]["mse_paper"] < 0.02
