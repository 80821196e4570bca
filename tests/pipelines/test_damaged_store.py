"""Commands on a damaged store: one sentence with block and remedy, and no result."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.simulation import kinematic
from bragg_data.store.repository import Store
from bragg_data.store.simulated import Writer
from catalog import features
from pipelines import features as features_command
from pipelines import simulate, train
from pipelines.cli.console import run
from tests.damage import chunk_file, flip
from tests.small_store import TAG

REMEDY = f"bragg store repair {TAG}"


@pytest.fixture
def store(small_store, tmp_path) -> Store:
    """A copy of the small store."""
    shutil.copytree(small_store.path, tmp_path / "store", ignore=shutil.ignore_patterns("verified"))
    return Store(tmp_path / "store")


@pytest.fixture
def command(capsys):
    """Run a command line in this process: exit code, standard output, standard error."""

    def execute(app, *arguments: object) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exit_:
                run(app, [*map(str, arguments)])
        finally:
            signal.signal(signal.SIGTERM, before)
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return execute


def damage(store: Store, how: str) -> None:
    file = chunk_file(store, TAG, 3)
    if how == "flipped":
        flip(file)
    elif how == "missing":
        file.unlink()
    else:
        for manifest in (store.path / "manifests").iterdir():
            manifest.unlink()


@pytest.mark.parametrize("how", ["flipped", "missing", "no manifests"])
@pytest.mark.parametrize("name", ["train", "simulate", "materialise"])
def test_nothing_is_computed_from_a_damaged_store(
    store, tmp_path, campaign_file, command, name, how
):
    damage(store, how)
    database = tmp_path / "mlflow.db"
    arguments = {
        "train": (train.app, "multitask", "--data", TAG, "--tracking", f"sqlite:///{database}"),
        "simulate": (simulate.app, "--campaign", campaign_file, "--simulator", "kinematic"),
        "materialise": (features_command.app, "materialise", "profile_cropped", "--data", TAG),
    }[name]
    code, out, err = command(*arguments, "--store", store.path)
    assert code == 2
    assert REMEDY in err
    assert how == "no manifests" or "lock 3" in err
    assert err.count("\n") == 1
    assert "nothing to do" not in out
    assert features.materialised(store) == [] if how != "no manifests" else True


def test_simulate_does_again_what_is_damaged_of_an_unfinished_data_set(
    tmp_path, campaign_file, small_campaign: Campaign, small_store, command
):
    from bragg_data.simulation.kinematic import Simulator
    from bragg_data.store.simulated import write_block

    store = Store(tmp_path / "store", create=True)
    simulator = Simulator(*small_campaign.setup)
    with Writer(store, small_campaign, "kinematic", kinematic.VERSION) as writer:
        samples = writer.samples[writer.rows(2)]
        intensity = simulator.simulate(samples.phase, samples.cells)
        writer.commit([write_block(writer.fork(), writer.group, 2, samples, intensity)])
    largest: Path = max((store.path / "chunks").iterdir(), key=lambda file: file.stat().st_size)
    largest.unlink()
    options = "--campaign", campaign_file, "--simulator", "kinematic", "--workers", 1
    code, out, _ = command(simulate.app, *options, "--store", store.path)
    assert code == 0
    assert "1 finished blocks are damaged or missing (the first is 2)" in out
    again, expected = Store(store.path).open(TAG), small_store.open(TAG)
    assert again.attrs["content_hash"] == expected.attrs["content_hash"]
    np.testing.assert_array_equal(again.intensity.values, expected.intensity.values)
