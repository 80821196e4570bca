"""Simulating into the store: distributed equals serial, killed and resumed equals undisturbed."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr

from benchmarks import killed_workers
from bragg_data.campaign import Campaign, Samples, load_campaign
from bragg_data.simulation import kinematic
from bragg_data.store.repository import DiskFullError, Store, StoreError, open_snapshot
from bragg_data.store.simulated import Writer, write_block
from bragg_data.store.verification import verify
from pipelines import simulate
from pipelines.cli.console import run
from pipelines.cli.options import ClusterOptions
from pipelines.cluster import blocks
from pipelines.cluster.client import open_client
from pipelines.simulation.campaign import SimulationJob, simulate_campaign
from pipelines.simulation.simulators import SimulationError, recipe_of, simulate_samples
from tests.servers import dask_workers, samples_done
from tests.tiny_campaign import tiny_campaign, write_campaign

PROJECT = Path(__file__).parents[2]
KINEMATIC = ("--simulator", "kinematic")
CALM = pytest.mark.filterwarnings("ignore:Peaks of this instrument are narrow")
pytestmark = [CALM, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster():
    """The address of a running scheduler with two workers."""
    with open_client("local", workers=2) as client:
        yield client.scheduler.address


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Content hashes of campaigns that are simulated here, block after block."""
    known: dict[tuple, str] = {}

    def content_hash(**options) -> str:
        key = tuple(sorted(options.items()))
        if key not in known:
            directory = tmp_path_factory.mktemp("undisturbed")
            limit = options.pop("limit", None)
            campaign = tiny_campaign(directory, **options)
            recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
            store = Store(directory / "store", create=True)
            with Writer(store, campaign, "kinematic", kinematic.VERSION, limit=limit) as writer:
                results = []
                for block in writer.missing():
                    samples = writer.samples[writer.rows(block)]
                    intensity = simulate_samples(recipe, samples)
                    results.append(
                        write_block(writer.fork(), writer.group, block, samples, intensity)
                    )
                writer.commit(results)
                writer.finish()
            known[key] = store.open("tiny-v1").attrs["content_hash"]
        return known[key]

    return content_hash


@pytest.fixture
def command(capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def execute(*arguments: object) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exit_:
                run(simulate.app, [*KINEMATIC, *map(str, arguments)])
        finally:
            signal.signal(signal.SIGTERM, before)
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return execute


def kinematic_job(campaign: Campaign, cluster: str) -> SimulationJob:
    return SimulationJob(campaign, "kinematic", cluster=ClusterOptions(cluster))


def start(*arguments: object, **options) -> subprocess.Popen[str]:
    """Start the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.simulate", *KINEMATIC, *map(str, arguments)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_distributed_equals_serial(tmp_path, cluster, undisturbed):
    campaign = tiny_campaign(tmp_path)
    store = Store(tmp_path / "store", create=True)
    tag = simulate_campaign(kinematic_job(campaign, cluster), store)
    dataset = open_snapshot(tag.name, store.uri)
    assert dataset.sizes["block"] == 9
    assert dataset.attrs["content_hash"] == undisturbed()
    assert verify(dataset) == undisturbed()
    assert dataset.attrs["simulator_version"] == kinematic.VERSION
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", dataset.attrs["code_commit"])


def test_command_line_on_a_local_cluster(tmp_path, undisturbed, command):
    toml = write_campaign(tmp_path)
    store = tmp_path / "store"
    limited = "--workers", 1, "--limit", 20
    code, out, err = command("--campaign", toml, "--store", store, *limited)
    assert (code, err) == (0, "")
    assert "Simulating: 20 of 20 patterns (100%)" in out
    assert "dashboard http://127.0.0.1:" in out
    for expected in (
        "tiny-v1",
        "Cubic",
        "patterns",
        "pipelines.inspect tiny-v1 --png patterns.png --store",
    ):
        assert expected in out
    assert "\x1b" not in out  # no control characters where there is no terminal
    assert open_snapshot("tiny-v1", store).attrs["content_hash"] == undisturbed(limit=20)


@pytest.mark.parametrize("blocks", [0, 112])
def test_killed_driver_resumes_exactly(tmp_path, cluster, undisturbed, blocks):
    """SIGKILL when some blocks are committed; in the meantime a second driver is refused."""
    options = {"rows": 1, "last": 4.1}
    toml = write_campaign(tmp_path, **options)
    store = tmp_path / "store"
    arguments = ("--campaign", toml, "--store", store, "--cluster", cluster)
    process = start(*arguments)
    wait_until(lambda: samples_done(store) >= blocks, process)
    campaign = load_campaign(toml)
    with pytest.raises(StoreError, match=r"Another process.*Wait until it ends"):
        simulate_campaign(kinematic_job(campaign, cluster), Store(store))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    committed = samples_done(store)
    assert blocks <= committed < len(campaign.samples)
    with Writer(Store(store), campaign, "kinematic", kinematic.VERSION) as writer:
        assert len(writer.missing()) == len(campaign.samples) - committed
    tag = simulate_campaign(kinematic_job(campaign, cluster), Store(store))
    dataset = open_snapshot(tag.name, store)
    assert verify(dataset) == undisturbed(**options)


def test_killed_worker_is_replaced(tmp_path, undisturbed):
    options = {"rows": 1, "last": 4.1}
    store = tmp_path / "store"
    toml = write_campaign(tmp_path, **options)
    process = start("--campaign", toml, "--store", store, "--workers", 2)
    wait_until(lambda: samples_done(store) >= 16, process)
    workers = dask_workers(psutil.Process(process.pid))
    assert len(workers) >= 2
    workers[0].kill()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert open_snapshot("tiny-v1", store).attrs["content_hash"] == undisturbed(**options)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_driver_commits_and_reports_it(tmp_path, cluster, undisturbed, number, code):
    options = {"rows": 1, "last": 4.4}  # enough cells for the signal to come in time
    toml = write_campaign(tmp_path, **options)
    store = tmp_path / "store"
    process = start("--campaign", toml, "--store", store, "--cluster", cluster)
    wait_until(lambda: samples_done(store) >= 32, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    message = re.search(r"Interrupted: (\d+) of \d+ patterns are in the store", out)
    assert message
    assert "Resume with the same command" in out
    assert int(message[1]) == samples_done(store)
    simulate_campaign(kinematic_job(load_campaign(toml), cluster), Store(store))
    assert open_snapshot("tiny-v1", store).attrs["content_hash"] == undisturbed(**options)


def test_ctrl_c_reaches_the_driver_alone(tmp_path):
    """A terminal sends it to the workers as well."""
    options = {"rows": 1, "last": 4.4}  # enough cells for the signal to come in time
    toml = write_campaign(tmp_path, **options)
    store = tmp_path / "store"
    arguments = ("--campaign", toml, "--store", store, "--workers", 1)
    process = start(*arguments, start_new_session=True)
    wait_until(lambda: samples_done(store) >= 16, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "Resume with the same command" in out
    assert 16 <= samples_done(store) < len(load_campaign(toml).samples)


@pytest.mark.slurm
def test_slurm_with_a_cancelled_job(slurm, tmp_path, undisturbed):
    assert slurm.is_dir()
    options = {"rows": 1, "last": 4.1}
    toml = write_campaign(tmp_path, **options)
    store, shared = tmp_path / "store", tmp_path / "shared"
    shared.mkdir()
    process = start(
        "--campaign",
        toml,
        "--store",
        store,
        "--cluster",
        "slurm",
        "--jobs",
        "2:2",
        "--cores",
        1,
        "--memory",
        "500 MB",
        "--walltime",
        "00:30:00",
        "--host",
        "127.0.0.1",
        "--shared-directory",
        shared,
    )
    wait_until(lambda: samples_done(store) >= 16, process)
    queue = ["squeue", "--noheader", "--states=running", "--format=%i"]
    running = subprocess.run(queue, capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["scancel", running[0]], check=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert verify(open_snapshot("tiny-v1", store)) == undisturbed(**options), out
    assert not subprocess.run(queue, capture_output=True, text=True, check=True).stdout


RUNNING = """
import time
from pipelines.cluster.client import open_client
with open_client("local", workers=1) as client:
    print(client.scheduler.address, flush=True)
    time.sleep(600)
"""


def test_lost_scheduler_is_a_single_sentence_and_blames_no_block(tmp_path, cluster, undisturbed):
    options = {"rows": 1, "last": 4.1}
    campaign = tiny_campaign(tmp_path, **options)
    store = Store(tmp_path / "store", create=True)
    running = subprocess.Popen(
        [sys.executable, "-c", RUNNING],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with running:
        assert running.stdout
        address = running.stdout.readline().strip()
        process = start(
            "--campaign", tmp_path / "tiny.toml", "--store", store.path, "--cluster", address
        )
        wait_until(lambda: samples_done(store.path) >= 16, process)
        running.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("Error: The cluster does not answer any more.")
    (unfinished,) = store.unfinished()
    assert unfinished.failed_blocks == 0
    tag = simulate_campaign(kinematic_job(campaign, cluster), store)
    assert verify(store.open(tag.name)) == undisturbed(**options)


class Spoilt(Samples):
    """Samples of which a cell encloses no volume, the first times that block 2 is read."""

    def __init__(self, samples: Samples, times: int) -> None:
        super().__init__(samples.phase, samples.crystal_system, samples.cells)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "reads", 0)

    def __getitem__(self, rows):
        if isinstance(rows, slice) and rows == slice(None):
            return self
        part = super().__getitem__(rows)
        if isinstance(rows, slice) and rows == slice(16, 24):
            object.__setattr__(self, "reads", self.reads + 1)
            if self.reads <= self.times:
                part = Samples(part.phase, part.crystal_system, part.cells.copy())
                part.cells[3, 3:] = 120.0
        return part


def test_failing_block_is_recorded_and_retried_by_the_next_run(tmp_path, cluster, undisturbed):
    campaign = tiny_campaign(tmp_path)
    campaign.__dict__["samples"] = samples = Spoilt(campaign.samples, times=99)
    store = Store(tmp_path / "store", create=True)
    message = r"1 of 9 blocks failed.*Block 2 failed with CrystalError: Unit cell .* to retry"
    with pytest.raises(SimulationError, match=message):
        simulate_campaign(kinematic_job(campaign, cluster), store)
    assert samples.reads == blocks.ATTEMPTS
    assert store.tags() == []
    (unfinished,) = store.unfinished()
    assert (unfinished.done, unfinished.failed_blocks) == (67 - 8, 1)
    healthy = tiny_campaign(tmp_path)
    with Writer(store, healthy, "kinematic", kinematic.VERSION) as writer:
        assert writer.missing() == [2]
        assert "encloses no volume" in writer.failures[2]
    tag = simulate_campaign(kinematic_job(healthy, cluster), store)
    assert verify(store.open(tag.name)) == undisturbed()


def test_block_that_fails_once_is_retried_in_the_same_run(tmp_path, cluster, undisturbed):
    campaign = tiny_campaign(tmp_path)
    campaign.__dict__["samples"] = samples = Spoilt(campaign.samples, times=1)
    store = Store(tmp_path / "store", create=True)
    tag = simulate_campaign(kinematic_job(campaign, cluster), store)
    assert samples.reads == 2
    assert verify(store.open(tag.name)) == undisturbed()


def test_two_campaigns_at_once_in_a_store(tmp_path, cluster, undisturbed):
    """No commit of one is lost to the other's."""
    store = tmp_path / "store"
    Store(store, create=True)

    def simulated(seed: int) -> None:
        directory = tmp_path / str(seed)
        directory.mkdir()
        campaign = tiny_campaign(directory, rows=1, seed=seed)
        simulate_campaign(kinematic_job(campaign, cluster), Store(store))

    threads = [threading.Thread(target=simulated, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hashes = {verify(open_snapshot(tag, store)) for tag in ("tiny-v1", "tiny-v2")}
    assert hashes == {undisturbed(rows=1, seed=1), undisturbed(rows=1, seed=2)}


def test_file_size_limit_is_a_single_sentence_and_can_be_resumed(tmp_path, cluster, undisturbed):
    options = {"rows": 64, "last": 4.1}
    campaign = tiny_campaign(tmp_path, **options)
    undisturbed(**options)  # compiles what would not fit under the limit
    store = tmp_path / "store"
    limit = 30_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(
        "--campaign", tmp_path / "tiny.toml", "--store", store, "--workers", 1, preexec_fn=limited
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(r"Error: The disk is full, .* run the same command again.*\n", err)
    assert samples_done(store) == 0
    tag = simulate_campaign(kinematic_job(campaign, cluster), Store(store))
    assert verify(open_snapshot(tag.name, store)) == undisturbed(**options)


def test_full_disk_of_the_workers(tmp_path, cluster, undisturbed):
    options = {"rows": 64, "last": 5.0}
    campaign = tiny_campaign(tmp_path, **options)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        store = Store(disk / "store", create=True)
        with pytest.raises(DiskFullError, match="Free some space and run the same command again"):
            simulate_campaign(kinematic_job(campaign, cluster), store)
        assert store.tags() == []
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        tag = simulate_campaign(kinematic_job(campaign, cluster), Store(disk / "store"))
        assert verify(store.open(tag.name)) == undisturbed(**options)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_finished_data_set_is_not_simulated_again(tmp_path, cluster, command):
    toml = write_campaign(tmp_path)
    store = ("--campaign", toml, "--store", tmp_path / "store")
    # The commands below compute nothing: no scheduler listens there.
    nowhere = ("--cluster", "tcp://127.0.0.1:9")
    code, out, err = command(*store, "--tag", "mine", "--cluster", cluster)
    assert (code, err) == (0, "")
    before = Store(tmp_path / "store").tags()
    for tag in ((), ("--tag", "mine"), ("--tag", "yours"), ("--limit", 67), ("--limit", 1000)):
        code, out, err = command(*store, *tag, *nowhere)
        assert (code, err) == (0, "")
        assert "in the store already, as mine" in out
    code, _, err = command(*store, "--limit", 20, "--tag", "mine", *nowhere)
    assert code == 2
    assert re.fullmatch(r"Error: Tag 'mine' exists already.* Choose another name.*\n", err)
    assert Store(tmp_path / "store").tags() == before
    assert Store(tmp_path / "store").unfinished() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", 0), "'--limit'.*greater than or equal to 1"),
        (("--workers", 0), "'--workers'.*greater than or equal to 1"),
        (("--simulator", "magic"), "No simulator 'magic': use auto, kinematic or gsas2"),
        (("--campaign", "moon"), "Campaign 'moon' is not known.*one of: .*batio3-nomad"),
        (("--campaign", "/nowhere/x.toml"), "cannot be read: No such file"),
        (("--tag", "a/b"), "is no tag: use letters"),
        (("--store", "gs://bucket/a"), "begins with file:/// or s3://"),
        (("--store", "s3://bucket"), "give s3://BUCKET/PREFIX"),
        (("--cells", "cells.csv"), "--cells .* and --out .* belong together"),
        (("--cells", "x.csv", "--out", "x.nc", "--tag", "t", "--workers", 2), "--tag, --workers"),
        (("--environment", "X"), "NAME=VALUE, not 'X'"),
        (("--jobs", "2:3", "--queue", "x"), "--jobs, --queue: only for --cluster slurm"),
        (("--jobs", "3:2"), "'3:2' is not a number of jobs"),
        (("--frob",), "No such option.*--help"),
    ],
)
def test_bad_usage_is_a_single_sentence_and_leaves_no_data(tmp_path, command, arguments, message):
    store = () if "--store" in arguments else ("--store", tmp_path / "store")
    if "--cells" in arguments:
        store = ()
    code, _, err = command(*store, *arguments)
    assert code == 2
    assert re.fullmatch(rf"Error: .*{message}.*\n", err)
    if (tmp_path / "store").exists():
        assert Store(tmp_path / "store").unfinished() == []


def test_unknown_cluster_is_a_single_sentence(tmp_path, command):
    toml = write_campaign(tmp_path)
    code, _, err = command("--campaign", toml, "--store", tmp_path / "store", "--cluster", "cloud")
    assert code == 2
    assert re.fullmatch(r"Error: There is no cluster 'cloud'\. Choose local, slurm.*\n", err)


CELLS = """crystal_system,a,b,c,alpha,beta,gamma
tetragonal,3.9945,3.9945,4.0335,90,90,90
cubic,4.0123,4.0123,4.0123,90,90,90
trigonal,4.003,4.003,4.003,89.87,89.87,89.87
"""


@pytest.fixture
def cells(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(CELLS)
    return path


def test_cells_become_a_netcdf_file(tmp_path, command, cells):
    toml = write_campaign(tmp_path, rows=2)
    out = tmp_path / "patterns.nc"
    out.write_text("an older file")
    code, text, err = command("--campaign", toml, "--cells", cells, "--out", out)
    assert (code, err) == (0, "")
    assert f"3 patterns in {out}" in text.replace("\n", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.csv", "patterns.nc", "tiny.toml"]
    with xr.open_dataset(out, engine="h5netcdf") as dataset:
        assert dataset.intensity.dims == ("sample", "tof")
        assert dataset.intensity.dtype == np.float32
        assert dataset.tof.attrs["units"] == "us"
        np.testing.assert_allclose(dataset.tof[0], 11000.0)
        assert dataset.crystal_system.values.tolist() == [1, 0, 2]
        assert dataset.phase.attrs["flag_meanings"] == "cubic tetragonal trigonal"
        assert dataset.a.values.tolist() == [3.9945, 4.0123, 4.003]
        assert dataset.alpha.values.tolist() == [90.0, 90.0, 89.87]
        assert dataset.free_parameter.values[:, 2].tolist() == [True, False, False]
        assert dataset.attrs["simulator"] == "kinematic"
        campaign = load_campaign(toml)
        samples = Samples(
            dataset.phase.values,
            dataset.crystal_system.values,
            np.stack([dataset[n].values for n in ("a", "b", "c", "alpha", "beta", "gamma")], 1),
        )
        expected = simulate_samples(recipe_of(campaign, "kinematic", kinematic.VERSION), samples)
        np.testing.assert_allclose(dataset.intensity.values, expected, rtol=1e-6)
        # Three different patterns with peaks in them.
        peaks = dataset.intensity.argmax("tof").values
        assert len(set(peaks.tolist())) > 1
        assert (dataset.intensity.max("tof") > 100 * dataset.intensity.min("tof")).all()


def test_cells_become_a_netcdf_file_on_macos(tmp_path, command, cells, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    toml = write_campaign(tmp_path, rows=2)
    code, _, err = command("--campaign", toml, "--cells", cells, "--out", tmp_path / "patterns.nc")
    assert (code, err) == (0, "")
    with xr.open_dataset(tmp_path / "patterns.nc", engine="h5netcdf") as dataset:
        assert np.isfinite(dataset.intensity.values).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "lacks the column"),
        (CELLS + "hexagonal,4,4,5,90,90,120\n", "line 5: the campaign has no phase"),
        (CELLS + "cubic,4,4,4,120,120,120\n", "0° < alpha < 120°"),
    ],
)
def test_bad_cells_leave_the_old_file(tmp_path, command, cells, text, message):
    out = tmp_path / "patterns.nc"
    out.write_text("an older file")
    cells.write_text(text)
    code, _, err = command("--cells", cells, "--out", out)
    assert code == 2
    assert re.fullmatch(rf"Error: .*{message}.*\n", err)
    assert out.read_text() == "an older file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.csv", "patterns.nc"]


def test_full_disk_leaves_the_old_file(tmp_path, cells):
    out = tmp_path / "patterns.nc"
    out.write_text("an older file")
    process = start(
        "--cells",
        cells,
        "--out",
        out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"Error: The disk is full, .* Free some space .*\n", err)
    assert out.read_text() == "an older file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.csv", "patterns.nc"]


def test_out_needs_a_directory(tmp_path, command, cells):
    code, _, err = command("--cells", cells, "--out", tmp_path / "missing" / "x.nc")
    assert code == 2
    assert "in a directory that exists" in err


def test_a_dry_run_prints_what_it_would_take_and_begins_nothing(tmp_path, capfd):
    file = write_campaign(tmp_path)
    before = set(tmp_path.rglob("*"))
    slurm = ["--cluster", "slurm", "--jobs", "2:4", "--cores", "2", "--memory", "1GB"]
    where = ["--campaign", str(file), "--store", str(tmp_path / "store")]
    with pytest.raises(SystemExit) as ended:
        run(simulate.app, [*KINEMATIC, *where, "--dry-run", *slurm])
    assert ended.value.code in (0, None)
    printed = capfd.readouterr().out
    assert "67 patterns of 256 points in 9 blocks of 8" in printed
    assert re.search(r"Estimate: \S+ core-hours for 67 patterns", printed)
    size = re.search(r"Disk: about ([\d.]+) kB in 9 files", printed)
    assert 67 * 256 * 4 * 0.3 < float(size[1]) * 1000 < 67 * 256 * 4
    assert "SLURM: 2 to 4 jobs" in printed
    assert "#SBATCH --cpus-per-task=2" in printed
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_the_only_worker_dies_while_it_starts(tmp_path, undisturbed, delay):
    file = write_campaign(tmp_path, rows=2, last=4.1)
    assert killed_workers.ended(tmp_path, file, 1, delay) == (
        "finished",
        undisturbed(rows=2, last=4.1),
    )
