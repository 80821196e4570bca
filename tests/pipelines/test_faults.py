"""Parts that die, hang, run out of memory or lose the network while blocks are computed."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import zarr
from distributed import Client, LocalCluster
from numba import njit

from bragg_data.simulation import kinematic
from bragg_data.store.repository import Store, open_snapshot
from bragg_data.store.simulated import Writer, write_block
from bragg_data.store.verification import verify
from pipelines.cluster.blocks import do_blocks, ends_process_after, failures_text
from pipelines.simulation.simulators import recipe_of, simulate_block, simulate_samples
from tests.conftest import TEST_CLUSTER
from tests.servers import ROOT, dask_workers, free_port, samples_done
from tests.small_store import simulate
from tests.tiny_campaign import tiny_campaign, write_campaign

pytestmark = pytest.mark.cluster
SMALL = {"rows": 1, "last": 4.8}  # enough blocks for things to happen in time
# Dask's limit for a worker that is not heard of, which is five minutes otherwise.
IMPATIENT = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content hash of the campaign when nothing happens."""
    directory = tmp_path_factory.mktemp("undisturbed")
    store = Store(directory / "store", create=True)
    simulate(store, tiny_campaign(directory, **SMALL), "tiny-v1")
    return verify(store.open("tiny-v1"))


@contextmanager
def driver(
    directory: Path, *arguments: object, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Simulate the campaign of a directory into its store by a process of its own."""
    command = [sys.executable, "-m", "pipelines.simulate", "--simulator", "kinematic"]
    command += ["--campaign", directory / "tiny.toml", "--store", directory / "store"]
    with subprocess.Popen(
        [*map(str, (*command, *arguments))],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_blocks(store: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while samples_done(store) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_finished(process: subprocess.Popen[str], directory: Path, content: str) -> str:
    """Wait for a driver, see that its data set is the undisturbed one, and return its errors."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (out, errors)
    assert verify(open_snapshot("tiny-v1", directory / "store")) == content
    return errors


def test_a_worker_that_hangs_is_replaced(tmp_path: Path, undisturbed: str) -> None:
    """SIGSTOP: it keeps its connection, and does nothing."""
    write_campaign(tmp_path, **SMALL)
    with driver(tmp_path, "--workers", 2, **IMPATIENT) as process:
        wait_for_blocks(tmp_path / "store", 16, process)
        stopped = dask_workers(psutil.Process(process.pid))[0]
        stopped.suspend()
        assert_finished(process, tmp_path, undisturbed)
        assert not stopped.is_running()


def slurm_arguments(directory: Path, *more: object) -> list[object]:
    shared = directory / "shared"
    shared.mkdir()
    words = ["--cluster", "slurm", "--host", "127.0.0.1", "--memory", "1500 MB", "--yes"]
    return [*words, "--walltime", "00:30:00", "--shared-directory", shared, *more]


def slurm_output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("directive", ["--no-requeue", "--requeue"])
def test_preempted_jobs_lose_nothing(
    slurm: Path, tmp_path: Path, undisturbed: str, directive: str
) -> None:
    """A job of a partition of higher priority takes a node; ours is cancelled, or waits again."""
    assert slurm.is_dir()
    write_campaign(tmp_path, **SMALL)
    arguments = slurm_arguments(tmp_path, "--jobs", "2:2", "--cores", 3, "--directive", directive)
    with driver(tmp_path, *arguments, "--queue", "debug") as process:
        wait_for_blocks(tmp_path / "store", 16, process)
        before = slurm_output("squeue", "--noheader", "--states=running", "--format=%i").split()
        urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodelist=node1", "--exclusive"]
        number = slurm_output(*urgent, "--output=/dev/null", "--wrap=sleep 1")
        assert_finished(process, tmp_path, undisturbed)
    assert len(before) == 2
    wait_for_an_empty_queue()
    jobs = slurm_output("scontrol", "show", "jobs", "--oneliner").splitlines()
    states = {line.split()[0].partition("=")[2]: line for line in jobs}
    assert any("PREEMPTED" in states[job] or "Restarts=1" in states[job] for job in before), jobs
    assert "JobState=COMPLETED" in states[number]


def wait_for_an_empty_queue() -> None:
    deadline = time.monotonic() + 30
    while slurm_output("squeue", "--noheader"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_workers_retire_before_their_jobs_end(
    slurm: Path, tmp_path: Path, undisturbed: str
) -> None:
    """Their blocks go to others, and their jobs are replaced."""
    assert slurm.is_dir()
    write_campaign(tmp_path, **SMALL)
    brief = {"DASK_JOBQUEUE__SLURM__WORKER_EXTRA_ARGS": "['--lifetime', '4s']"}
    arguments = slurm_arguments(tmp_path, "--jobs", "2:2", "--cores", 1)
    with driver(tmp_path, *arguments, **brief) as process:
        errors = assert_finished(process, tmp_path, undisturbed)
    assert not errors
    wait_for_an_empty_queue()


@pytest.mark.slurm
def test_slurmctld_dies(tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs that run go on; the command ends in order, and nothing of it is left."""
    write_campaign(tmp_path, **SMALL)
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory:
        started = subprocess.run(
            [TEST_CLUSTER, "start", directory], capture_output=True, text=True, check=False
        )
        if started.returncode == os.EX_UNAVAILABLE:
            pytest.skip(started.stderr.strip())
        try:
            monkeypatch.setenv(*started.stdout.removeprefix("export ").strip().split("="))
            arguments = slurm_arguments(tmp_path, "--jobs", "2:2", "--cores", 1)
            with driver(tmp_path, *arguments) as process:
                wait_for_blocks(tmp_path / "store", 16, process)
                (controller,) = (
                    candidate
                    for candidate in psutil.process_iter(["name"])
                    if candidate.info["name"] == "slurmctld"
                    and directory in " ".join(candidate.cmdline())
                )
                controller.kill()
                with Path(directory, "slurm.conf").open("a", encoding="utf-8") as file:
                    file.write("MessageTimeout=2\n")  # for each command that asks it from now on
                errors = assert_finished(process, tmp_path, undisturbed)
            assert "Jobs may be left in the queue: SLURM does not answer" in errors
        finally:
            subprocess.run([TEST_CLUSTER, "stop", directory], check=True)


@pytest.mark.parametrize("jump", [400, -400])
def test_the_clock_of_a_driver_and_its_workers_jumps(
    tmp_path: Path, undisturbed: str, jump: int
) -> None:
    """By more than Dask waits for a worker, and less than Icechunk lets a store differ (600 s).

    Backwards no commit is possible, as snapshots are in the order of time: the command says so.
    """
    library = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
    if not library.is_file():
        pytest.skip("faketime is not installed")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    clock = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(offset)}
    clock |= {"FAKETIME_CACHE_DURATION": "1", "DONT_FAKE_MONOTONIC": "1"}
    write_campaign(tmp_path, **SMALL)
    with driver(tmp_path, "--workers", 2, **clock) as process:
        wait_for_blocks(tmp_path / "store", 16, process)
        offset.write_text(f"{jump:+d}")
        if jump > 0:
            assert_finished(process, tmp_path, undisturbed)
            return
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the clock of this machine is not that of earlier commits" in errors
    assert "Traceback" not in errors
    with driver(tmp_path, "--workers", 2) as process:  # set right
        assert_finished(process, tmp_path, undisturbed)


@contextmanager
def other_machine() -> Iterator[tuple[str, str]]:
    """A network namespace, as a machine of its own; yields its name and our address there."""
    name, number = f"bragg{os.getpid()}", os.getpid() % 250
    here, there = f"10.231.{number}.1", f"10.231.{number}.2"
    commands = [
        f"ip netns add {name}",
        f"ip link add {name}a type veth peer name {name}b netns {name}",
        f"ip addr add {here}/30 dev {name}a",
        f"ip link set {name}a up",
        f"ip -n {name} addr add {there}/30 dev {name}b",
        f"ip -n {name} link set {name}b up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in commands:
            if os.geteuid() or subprocess.run(command.split(), check=False).returncode:
                pytest.skip("network namespaces are not permitted here")
        yield name, here
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_a_worker_behind_a_cut_network(tmp_path: Path, undisturbed: str) -> None:
    """Its blocks are computed by another; when the network is back, it may go on."""
    write_campaign(tmp_path, **SMALL)
    environment = {**os.environ, **IMPATIENT, "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        name, here = stack.enter_context(other_machine())
        address = f"tcp://{here}:{free_port()}"

        def run(command: str, before: tuple[str, ...] = ()) -> None:
            program, *words = command.split()
            process = subprocess.Popen(
                [*before, sys.executable, "-m", f"distributed.cli.dask_{program}", *words],
                cwd=tmp_path,
                env=environment,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)

        port = address.rpartition(":")[2]
        run(f"scheduler --host {here} --port {port} --no-dashboard --no-jupyter")
        worker = f"worker {address} --nthreads 1 --no-dashboard --local-directory {tmp_path}"
        run(worker)
        run(f"{worker} --name far", ("ip", "netns", "exec", name))
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        with driver(tmp_path, "--cluster", address) as process:
            wait_for_blocks(tmp_path / "store", 16, process)
            subprocess.run(["ip", "link", "set", f"{name}a", "down"], check=True)
            assert_finished(process, tmp_path, undisturbed)


@pytest.fixture
def small_cluster() -> Iterator[Client]:
    """A cluster of which each worker has 500 MB."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit="500 MB",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
            scheduler_kwargs={"allowed_failures": 0},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def filling_memory(*task: object) -> object:
    """Take more memory than a worker has for block 2; the others are simulated."""
    taken = []
    while task[2] == 2:
        taken.append(np.ones(2_000_000))
        time.sleep(0.02)
    return simulate_block(*task)


@njit  # holds the interpreter's lock: the worker cannot even say that it is there
def never_ending(value: float) -> float:
    while value != 0.5:
        value = np.sin(value)
    return value


def hanging_in_compiled_code(*task: object) -> object:
    with ends_process_after(3.0):
        if task[2] == 2:
            never_ending(1.0)
        return simulate_block(*task)


def waiting_for_ever(*task: object) -> object:
    """Hang while the worker's heartbeats go on."""
    with ends_process_after(3.0):
        if task[2] == 2:
            threading.Event().wait()
        return simulate_block(*task)


def not_finite(*task: object) -> object:
    """Simulate the blocks, of which 2 has a value that is no number."""
    recipe, group, block, samples, fork = task
    patterns = simulate_samples(recipe, samples)
    if block == 2:
        patterns[0, 5] = np.nan
    return write_block(fork, group, block, samples, patterns)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (filling_memory, "the workers that computed it died, each time: look for a lack of memory"),
        (hanging_in_compiled_code, "what takes minutes, at which a worker is ended"),
        (waiting_for_ever, "what takes minutes, at which a worker is ended"),
        (not_finite, "1 patterns are not finite"),
    ],
)
def test_a_block_that_cannot_be_computed_is_named_and_not_stored(
    tmp_path: Path, small_cluster: Client, task: Callable[..., object], reason: str
) -> None:
    campaign = tiny_campaign(tmp_path)
    recipe = recipe_of(campaign)
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", kinematic.VERSION) as writer:

        def submit(block, fork):
            samples = writer.samples[writer.rows(block)]
            return small_cluster.submit(
                task, recipe, writer.group, block, samples, fork, pure=False
            )

        do_blocks(small_cluster, writer, submit, doing="Simulating", unit="patterns")
        assert list(writer.failures) == [2]
        assert reason in writer.failures[2]
        assert "\n" not in failures_text(writer)
        assert writer.missing() == [2]
    group = store.repository.readonly_session(branch=writer.branch)
    intensity = zarr.open_group(group.store, mode="r")["tiny/intensity"][:]
    assert np.isnan(intensity[16:24]).all()
    assert np.isfinite(np.delete(intensity, np.s_[16:24], 0)).all()
