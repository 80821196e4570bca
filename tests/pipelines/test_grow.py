"""Growing a data set: the old tag stays, the store grows by the new samples, kills do no harm."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bragg_data.campaign import load_campaign
from bragg_data.growth import chosen_text, growths_of
from bragg_data.simulation import kinematic
from bragg_data.splits import TRAINED, Part, blocked_split, random_split
from bragg_data.store import repair
from bragg_data.store.care import give_up, size_on_disk
from bragg_data.store.repository import Store, StoreError, open_snapshot
from bragg_data.store.schema import samples_of
from bragg_data.store.simulated import Writer, write_block
from bragg_data.store.verification import verify
from bragg_models.predictors import Predictor
from catalog import registry
from catalog.lineage import trace
from catalog.tracking import Tracking
from pipelines import grow
from pipelines.evaluation.scoring import SPLIT, part_of
from pipelines.registry.registration import load_version
from pipelines.simulation.growth import GrowthRequest, grown_campaign
from pipelines.simulation.simulators import SimulationError, recipe_of, simulate_samples
from pipelines.training.names import TrainError
from pipelines.training.presets import Presets
from pipelines.training.task import TrainingTask
from tests.servers import samples_done
from tests.small_bench import Bench, short_presets, train_here
from tests.small_store import simulate
from tests.tiny_campaign import tiny_campaign, write_campaign

PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Peaks of this instrument are narrow")


@pytest.fixture
def tiny(tmp_path):
    """A store with tiny-v1 (67 samples in blocks of 8), and the path of its campaign file."""
    store = Store(tmp_path / "store", create=True)
    simulate(store, tiny_campaign(tmp_path), "tiny-v1")
    return store, write_campaign(tmp_path)


@pytest.fixture
def small_predictor(trained: Tracking) -> Predictor:
    return load_version(trained.uri, registry.find(trained, "models:/small/1"))


def command(store: Store, campaign: Path, *more: object) -> str:
    arguments = [campaign, "--store", store.uri, "--workers", 1, *more]
    result = CliRunner().invoke(grow.app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_chosen_rows_survive_their_text():
    rows = np.array([0, 3, 511, 799])
    growth = f'[{{"parent": "x", "parent_content_hash": "", "parent_samples": 1, "where": "wrong",\
 "model": "", "profiles": "", "seed": 0, "candidates": 800, "chosen": "{chosen_text(rows, 800)}"}}]'
    np.testing.assert_array_equal(growths_of(growth)[0].rows, rows)


@pytest.mark.cluster
def test_the_old_tag_stays_and_the_new_tag_begins_with_its_samples(tiny):
    store, campaign = tiny
    old = store.open("tiny-v1")
    content, labels, patterns = verify(old), samples_of(old), old.intensity.values
    out = command(store, campaign, "--where", "random", "--samples", 53)
    assert "tiny-v1 grows by 53 samples: random" in out
    assert verify(open_snapshot("tiny-v1", store.uri)) == content
    new = open_snapshot("tiny-v2", store.uri)
    verify(new)
    assert new.sizes["sample"] == 120
    np.testing.assert_array_equal(samples_of(new).cells[:67], labels.cells)
    np.testing.assert_allclose(new.intensity.values[:67], patterns, rtol=1e-5)
    # The cells are those that the campaign file, the seed and the recorded choice give.
    (growth,) = growths_of(new.attrs["growth"])
    assert (growth.parent, growth.parent_content_hash, growth.where) == (
        "tiny-v1",
        content,
        "random",
    )
    drawn = load_campaign(campaign).candidates(labels, 0, growth.candidates, 0)
    np.testing.assert_array_equal(samples_of(new).cells[67:], drawn[growth.rows].cells)
    recipe = recipe_of(load_campaign(campaign))
    computed = simulate_samples(recipe, samples_of(new)[slice(104, 112)])
    np.testing.assert_array_equal(new.intensity.values[104:112], computed)


@pytest.mark.cluster
def test_a_budget_allows_what_was_timed(tiny):
    store, campaign = tiny
    request = "--where", "random", "--budget", 1 / 600
    out = command(store, campaign, *request)
    assert "samples fit into 0.00166667 minutes, from timed ones" in out
    joined = store.open("tiny-v2").sizes["sample"] - 67
    assert f"grows by {joined:,} samples" in out
    assert 10 < joined < 10_000  # of 0.02 to 2 ms in 0.1 s
    # Unfinished or finished, the number need not be the same when the command is repeated.
    parent = *request, "--data", "tiny-v1"
    assert "nothing to do" in command(store, campaign, *parent)


def test_a_budget_and_a_number_contradict(tiny):
    store, campaign = tiny
    with pytest.raises(SimulationError, match="Give --samples N, or --budget MIN"):
        command(store, campaign, "--samples", 5, "--budget", 1)


@pytest.mark.cluster
def test_a_named_parent_grows_once_and_the_newest_again(tiny):
    store, campaign = tiny
    request = "--where", "random", "--samples", 13
    command(store, campaign, *request, "--data", "tiny-v1")
    assert "nothing to do" in command(store, campaign, *request, "--data", "tiny-v1")
    assert [tag.name for tag in store.tags()] == ["tiny-v1", "tiny-v2"]
    command(store, campaign, *request)
    third = store.open("tiny-v3")
    verify(third)
    assert [growth.parent for growth in growths_of(third.attrs["growth"])] == ["tiny-v1", "tiny-v2"]
    labels = samples_of(third)
    assert (len(labels), labels.n_drawn) == (93, 67)
    assert len(np.unique(np.column_stack([labels.phase, labels.cells]), axis=0)) == 93


def test_the_store_grows_by_the_new_samples_only(small_campaign, tmp_path):
    store = Store(tmp_path / "store", create=True)

    def fill(writer: Writer) -> None:
        recipe = recipe_of(small_campaign)
        results = []
        for block in writer.missing():
            part = writer.samples[writer.rows(block)]
            patterns = simulate_samples(recipe, part)
            results.append(write_block(writer.fork(), writer.group, block, part, patterns))
        writer.commit(results)
        written.append(len(results))
        writer.finish()

    written: list[int] = []
    with Writer(store, small_campaign, "kinematic", kinematic.VERSION, limit=512) as writer:
        fill(writer)
    before, first = size_on_disk(store), store.open("small-v1")
    content, size = first.attrs["content_hash"], store.size("small-v1")
    grown = grown_campaign(first, GrowthRequest("random", 512))
    with Writer(store, grown, "kinematic", kinematic.VERSION) as writer:
        fill(writer)
    assert written == [8, 8]
    new = store.size("small-v2") - size
    assert size_on_disk(store) - before < 1.05 * new
    assert verify(store.open("small-v1")) == content


def test_later_samples_change_no_test_set(small_dataset):
    labels = samples_of(small_dataset)
    grown = grown_campaign(small_dataset, GrowthRequest("random", 500)).samples
    n = len(labels)
    assert grown.n_drawn == n
    split = {"name": "random", **SPLIT}
    part = part_of("random", grown, split)
    np.testing.assert_array_equal(part[:n], random_split(labels.crystal_system, seed=0))
    assert (part[n:] == Part.training).all()
    part = part_of("blocked", grown, split)
    blocked = blocked_split(labels.crystal_system, labels.cells, seed=0)
    np.testing.assert_array_equal(part[:n], blocked)
    assert set(np.unique(part[n:])) == {Part.training, Part.unused}

    def boxes(rows: np.ndarray) -> set[bytes]:
        box = np.floor(grown.cells[rows] / np.array([0.02] * 3 + [2.5] * 3) + 1e-6)
        return {row.tobytes() for row in np.column_stack([grown.crystal_system[rows], box])}

    assert not boxes(np.isin(part, TRAINED)) & boxes(part == Part.test)


def test_wrong_samples_are_where_the_model_is(small_dataset, small_predictor):
    request = GrowthRequest("wrong", 300, model="models:/small/1")
    grown = grown_campaign(small_dataset, request, small_predictor)
    n = small_dataset.sizes["sample"]
    chosen = grown.samples[slice(n, None)]
    at_random = grown_campaign(small_dataset, GrowthRequest("random", 300)).samples[slice(n, None)]
    recipe = recipe_of(grown)

    def error(samples) -> float:
        cells = small_predictor.predict(simulate_samples(recipe, samples)).cells
        return float(np.abs(cells - samples.cells)[:, :3].mean())

    assert error(chosen) > 1.15 * error(at_random)
    again = grown_campaign(small_dataset, request, small_predictor)
    assert again.growth == grown.growth
    uncertain = grown_campaign(small_dataset, GrowthRequest("uncertain", 300), small_predictor)
    assert error(uncertain.samples[slice(n, None)]) > 1.05 * error(at_random)


def test_samples_near_measured_cells_are_chosen(small_dataset, small_predictor):
    cell = np.array([4.05, 4.05, 4.05, 90.0, 90.0, 90.0])
    request = GrowthRequest("measured", 30, profiles="0" * 64)
    grown = grown_campaign(small_dataset, request, small_predictor, (np.array([0]), cell[None]))
    chosen = grown.samples[slice(small_dataset.sizes["sample"], None)]
    assert (chosen.phase == 0).mean() > 0.3  # of 7 % among the candidates
    assert np.median(np.abs(chosen.cells[chosen.phase == 0, 0] - 4.05)) < 0.02


@pytest.mark.cluster
def test_killed_at_any_moment_the_same_command_finishes(tiny):
    store, campaign = tiny
    content = store.open("tiny-v1").attrs["content_hash"]
    arguments = [campaign, "--where", "random", "--samples", 600, "--data", "tiny-v1"]
    arguments += ["--store", store.uri, "--workers", 1]
    run = [sys.executable, "-m", "pipelines.grow", *map(str, arguments)]

    kills = 0
    for least in (0, 67, 100):  # before the first block, and after some
        process = subprocess.Popen(run, cwd=PROJECT, stdout=subprocess.DEVNULL)
        while process.poll() is None and samples_done(store.path) < least:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    last = subprocess.run(run, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert [tag.name for tag in Store(store.path).tags()] == ["tiny-v1", "tiny-v2"]
    assert verify(open_snapshot("tiny-v1", store.uri)) == content
    grown = open_snapshot("tiny-v2", store.uri)
    assert grown.sizes["sample"] == 667
    undisturbed = grown_campaign(store.open("tiny-v1"), GrowthRequest("random", 600))
    assert undisturbed.growth == grown.attrs["growth"]
    verify(grown)


@pytest.mark.cluster
def test_repair_finds_nothing_damaged_in_a_grown_data_set(tiny):
    store, campaign = tiny
    command(store, campaign, "--where", "random", "--samples", 53)
    done = repair.repair(
        Store(store.path),
        "tiny-v2",
        lambda s: simulate_samples(recipe_of(load_campaign(campaign)), s),
    )
    assert (done.blocks, done.arrays) == ((), ())  # what is intact is left as it is


@pytest.mark.training
def test_training_on_a_grown_tag_is_scored_on_the_same_samples(
    small_store, campaign_file, trained, tmp_path
):
    store = Store(shutil.copytree(small_store.path, tmp_path / "store"))
    where = "--tracking", trained.uri, "--where", "wrong", "--samples", 64
    assert "wrong, by models:/small/" in command(store, campaign_file, *where)
    before, parent = registry.find(trained, "models:/small/1"), store.open("small-v1").attrs
    arguments = ["multitask", "--data", "small-v2", "--store", store.uri, "--epochs", "1"]
    arguments += ["--tracking", trained.uri, "--state", str(tmp_path / "state"), "--workers", "1"]
    train_here(*arguments, presets=short_presets())
    after = registry.find(trained, "models:/small/2")
    assert after.tags["test_set"] == before.tags["test_set"]
    assert after.tags["content_hash"] != before.tags["content_hash"]
    chain, _ = trace(trained, after.uri)
    (view,) = chain.sources[0].sources[:1]
    grown = view.sources[0]
    assert (grown.name, grown.facts["grown from"], grown.facts["where"]) == (
        "small-v2",
        "small-v1",
        "wrong",
    )
    assert grown.facts["model"] == f"{before.uri}, run {before.run_id}"
    assert grown.sources[0].facts["content"] == parent["content_hash"]
    assert grown.sources[0].sources[0].kind == "campaign"


@pytest.mark.training
@pytest.mark.parametrize("model", ["multitask", "transfer", "caenn", "guided"])
def test_training_continues_from_the_last_weights(bench: Bench, model):
    parent = bench.versions(model)[0]
    before = load_version(bench.tracking.uri, parent)
    presets = stopped(short_presets())
    arguments = [model, "--continue-from", parent.version, "--data", "small-v1"]
    arguments += ["--store", bench.store.uri, "--workers", "1", *bench.places]
    train_here(*arguments, presets=presets)
    version = bench.versions(model)[0]
    after = load_version(bench.tracking.uri, version)
    # At a learning rate of nearly zero the weights are the parent's, and so are the outputs.
    for name, value in after.model.state_dict().items():
        np.testing.assert_allclose(value, before.model.state_dict()[name], atol=1e-5, err_msg=name)
    assert after.targets.to_json() == before.targets.to_json()
    assert after.preprocessing == before.preprocessing
    assert after.provenance.parent_uri == parent.uri
    chain, _ = trace(bench.tracking, version.uri)
    assert parent.uri in [source.name for source in chain.sources]
    assert chain.sources[0].facts["continues from"] == parent.uri


def stopped(presets: Presets) -> Presets:
    """Return presets of other seeds' weights that stay where a training begins."""
    networks = {
        name: {
            "quick": replace(
                of_model["quick"],
                stages={
                    stage: replace(s, learning_rate=1e-9, weight_decay=0.0)
                    for stage, s in of_model["quick"].stages.items()
                },
            )
        }
        for name, of_model in presets.networks.items()
    }
    return replace(presets, networks=networks)


@pytest.mark.training
def test_a_parent_of_another_kind_is_refused(bench: Bench):
    uri = bench.versions("multitask")[0].uri
    with pytest.raises(TrainError, match=f"caenn cannot continue from {uri}, which is a multitask"):
        bench("caenn", "--continue-from", uri)


@pytest.mark.training
def test_a_parent_that_knows_the_test_samples_is_refused(bench: Bench):
    uri = bench.versions("multitask")[0].uri
    message = r"on small-v1 with the random split: it knows samples that would test it"
    with pytest.raises(TrainError, match=message):
        bench("multitask", "--continue-from", uri, "--split", "blocked")


@pytest.mark.training
def test_a_preset_with_other_layers_than_its_parent_is_refused(bench: Bench):
    uri = bench.versions("multitask")[0].uri
    presets = short_presets()
    of_model = {"quick": replace(presets.networks["multitask"]["quick"], network={"dense": (8,)})}
    presets = replace(presets, networks={**presets.networks, "multitask": of_model})
    arguments = ["multitask", "--continue-from", uri, "--data", "small-v1"]
    arguments += ["--store", bench.store.uri, "--workers", "1", *bench.places]
    with pytest.raises(TrainError, match=f"{uri} has other layers than preset quick"):
        train_here(*arguments, presets=presets)


@pytest.mark.parametrize("model", ["forest", "integrated-forest", "search"])
def test_what_has_no_weights_does_not_continue(model):
    with pytest.raises(TrainError, match=f"{model} cannot continue from 3: (its trees|it has no)"):
        TrainingTask(model, parent="3").check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("everywhere", 5), "No rule 'everywhere': use random, uncertain, wrong, measured."),
        (("measured", 5), "--where measured and --profiles FILE… belong together."),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(SimulationError) as error:
        GrowthRequest(*arguments)
    assert str(error.value) == message


def test_a_grown_data_set_that_cannot_be_resumed_begins_with_its_parent(tiny):
    store, _ = tiny
    content = store.open("tiny-v1").attrs["content_hash"]
    manifests = set((store.path / "manifests").iterdir())
    campaign = grown_campaign(store.open("tiny-v1"), GrowthRequest("random", 5))
    with Writer(store, campaign, "kinematic", kinematic.VERSION) as writer:
        branch = writer.branch
    for manifest in set((store.path / "manifests").iterdir()) - manifests:
        manifest.unlink()
    store = Store(store.path)
    give_up(store, branch)
    simulate(store, campaign, "tiny-v2")
    assert verify(store.open("tiny-v1")) == content
    verify(store.open("tiny-v2"))
    with pytest.raises(StoreError, match="has a tag: repair that instead"):
        give_up(store, branch)
