import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest
import yaml
from dask.system import cpu_count
from distributed import Client, LocalCluster, Scheduler
from distributed.utils import sync
from threadpoolctl import threadpool_info, threadpool_limits

from bragg_data.isolated_process import SINGLE_THREAD
from pipelines.cli.options import ClusterError, SlurmOptions
from pipelines.cluster.client import open_client
from pipelines.cluster.job_settings import lifetime_arguments, seconds_of
from tests.conftest import TEST_CLUSTER

pytestmark = pytest.mark.cluster


def blas_threads() -> list[int]:
    np.ones((64, 64)) @ np.ones((64, 64))
    return [library["num_threads"] for library in threadpool_info()]


def set_two_threads() -> None:
    threadpool_limits(2)


def process_and_threads() -> tuple[int, list[int], dict[str, str]]:
    return os.getpid(), blas_threads(), {name: os.environ[name] for name in SINGLE_THREAD}


def wait_and_square(number: int) -> int:
    time.sleep(0.05)
    return number**2


def test_local_workers_are_single_threaded_processes_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = dict(os.environ)
    with open_client("local", workers=2) as client:
        answers = client.run(process_and_threads).values()
        processes = {process for process, _, _ in answers}
        assert len(processes - {os.getpid()}) == 2
        assert all(set(threads) == {1} for _, threads, _ in answers)
        assert all(set(names.values()) == {"1"} for _, _, names in answers)
        assert set(client.nthreads().values()) == {1}
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        # A program that trains a network after (or while) it simulates keeps its own threads.
        assert {**os.environ, **before} == dict(os.environ)
        assert os.environ["OMP_NUM_THREADS"] == "7"
        assert any(tmp_path.iterdir())
    assert dict(os.environ) == before
    # The socket of the process that workers fork from, which ends with this one.
    assert [path.name[:5] for path in tmp_path.iterdir()] in ([], ["pymp-"])
    assert not any(psutil.pid_exists(process) for process in processes)
    assert capfd.readouterr() == ("", "")


def test_local_takes_all_cores_within_memory() -> None:
    with open_client() as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert len(workers) == cpu_count() <= (os.cpu_count() or 1)
        assert sum(worker["memory_limit"] for worker in workers) < psutil.virtual_memory().total


def test_killed_local_worker_is_replaced_and_its_tasks_run_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with open_client("local", workers=2) as client:
        first = set(client.run(os.getpid).values())
        futures = client.map(wait_and_square, range(60))
        os.kill(min(first), signal.SIGKILL)
        assert client.gather(futures) == [number**2 for number in range(60)]
        client.wait_for_workers(2, timeout=30)
        assert len(set(client.run(os.getpid).values()) - first) == 1
    assert capfd.readouterr() == ("", "")


def test_task_that_kills_its_workers_fails() -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with open_client("local", workers=2) as client:
        future = client.submit(die)
        with pytest.raises(Exception, match="6 different workers"):
            future.result(timeout=60)
        assert client.submit(wait_and_square, 3).result(timeout=30) == 9


def metadata_of_tasks(dask_scheduler: Scheduler) -> list[object]:
    return [span._metadata for span in dask_scheduler.extensions["spans"].spans.values()]


def test_the_scheduler_keeps_nothing_of_each_task() -> None:
    with open_client("local", workers=1) as client:
        client.gather([client.submit(wait_and_square, k, pure=False) for k in range(3)])
        metadata = client.run_on_scheduler(metadata_of_tasks)
    assert metadata
    assert not any(metadata)


def test_exception_in_the_block_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), open_client("local", workers=1):
        _ = 1 / 0


def test_running_scheduler_is_used_with_a_single_thread_and_left_running() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as running,
        Client(running, set_as_default=False) as other,
    ):
        address = running.scheduler_address
        other.run(set_two_threads)
        assert set(*other.run(blas_threads).values()) == {2}
        with open_client(address) as client:
            assert client.scheduler.address == address
            assert client.submit(wait_and_square, 12).result() == 144
            assert set(*client.run(blas_threads).values()) == {1}
        assert client.status == "closed"
        assert other.submit(wait_and_square, 13).result() == 169
        assert set(*other.run(blas_threads).values()) == {2}


def test_workers_that_cannot_import_the_project_are_refused() -> None:
    def forget() -> None:
        sys.modules.update({"pipelines": None, "pipelines.cluster.client": None})  # type: ignore[dict-item]

    with (
        LocalCluster(n_workers=1, dashboard_address="127.0.0.1:0", silence_logs=50) as running,
        Client(running, set_as_default=False) as other,
    ):
        other.run(forget)
        with (
            pytest.raises(ClusterError, match=r"import of pipelines.* install it in their Python"),
            open_client(running.scheduler_address),
        ):
            pytest.fail("opened")


def test_unreachable_scheduler() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{bound.getsockname()[1]}"
        with (
            pytest.raises(ClusterError, match=rf"No Dask scheduler answers at {address} .*Start"),
            open_client(address, connect_seconds=0.5),
        ):
            pytest.fail("opened")


@pytest.mark.parametrize("address", ["tcp://", "tcp://nowhere", "tcp://127.0.0.1:port", "tls://::"])
def test_malformed_address(address: str) -> None:
    with (
        pytest.raises(ClusterError, match="No Dask scheduler answers at"),
        open_client(address, connect_seconds=0.5),
    ):
        pytest.fail("opened")
    # The client that could not connect is not Dask's default.
    assert dask.config.get("scheduler", None) is None


@pytest.mark.parametrize("name", ["", "slrum", "127.0.0.1:8786", "http://127.0.0.1:8786"])
def test_unknown_cluster_names_the_choices(name: str) -> None:
    with pytest.raises(ClusterError, match=r"local, slurm, .*tcp://HOST:PORT"), open_client(name):
        pytest.fail("opened")


@pytest.mark.parametrize(("name", "workers"), [("local", 0), ("slurm", 2), ("tcp://x:1", 2)])
def test_number_of_workers_belongs_to_local(name: str, workers: int) -> None:
    with (
        pytest.raises(ClusterError, match=r"at least 1, belongs to the cluster 'local'"),
        open_client(name, workers=workers),
    ):
        pytest.fail("opened")


@pytest.mark.parametrize(("text", "jobs"), [("2:8", (2, 8)), ("4", (4, 4)), ("0:1", (0, 1))])
def test_jobs_are_parsed(text: str, jobs: tuple[int, int]) -> None:
    assert SlurmOptions(jobs=text).job_limits == jobs


@pytest.mark.parametrize("text", ["", "0", "8:2", "-1:2", "a:b", "1:2:3", "2,5", "0:0", "1.5"])
def test_wrong_number_of_jobs(text: str) -> None:
    with pytest.raises(ClusterError, match=f"'{text}' is not a number of jobs. Write MIN:MAX"):
        SlurmOptions(jobs=text)


def test_slurm_leaves_ctrl_c_to_the_program() -> None:
    script = (
        "import signal, pipelines.cluster.slurm; print(signal.getsignal(signal.SIGINT).__name__)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert answer.stdout.strip() == "default_int_handler"


def test_slurm_without_its_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ClusterError, match="sbatch, squeue, scancel not found on PATH"),
        open_client("slurm"),
    ):
        pytest.fail("opened")


def test_template_of_the_slurm_configuration() -> None:
    from pipelines.cluster.slurm import job_script

    template = yaml.safe_load((TEST_CLUSTER.parent / "jobqueue.yaml").read_text())
    assert set(template["jobqueue"]["slurm"]) <= set(dask.config.get("jobqueue.slurm"))
    with dask.config.set(dask.config.merge(dask.config.config, template)):
        script = job_script(SlurmOptions()).split("\n")
        options = SlurmOptions(
            queue="long",
            account="other",
            walltime="2-00:00",
            cores=4,
            memory="8 GiB",
            directives=["--exclude=n7"],
            environment=["A=b c"],
            interface="eth1",
            python="/opt/python",
        )
        other = job_script(options).split("\n")
    directives = {line.removeprefix("#SBATCH ") for line in script if line.startswith("#SBATCH ")}
    assert {"-p compute", "-A my-project", "-t 01:00:00", "--cpus-per-task=16"} <= directives
    assert {"--mem=23G", "--qos=normal", "--no-requeue"} <= directives  # 23 GiB is 24 GB
    *_, command = filter(None, script)
    assert command.startswith(f"{sys.executable} -m distributed.cli.dask_worker tls://")
    assert "--nthreads 1 " in command
    assert "--nworkers 16 " in command
    assert "--interface ib0" in command
    assert "--lifetime 3396s --lifetime-stagger 72s" in command  # 3,600 s at most with closing
    assert "export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}" in script
    assert script.index("module purge") < script.index("export OMP_NUM_THREADS=1")
    assert {"-p long", "-A other", "-t 2-00:00", "--cpus-per-task=4", "--mem=8G"} <= {
        line.removeprefix("#SBATCH ") for line in other
    }
    assert other.index("#SBATCH --no-requeue") < other.index("#SBATCH --exclude=n7")
    assert "export A='b c'" in other
    assert "/opt/python -m distributed.cli.dask_worker" in other[-2]
    assert "--interface eth1" in other[-2]


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("2:00:05", 7205),
        ("1-2", 93_600),
        ("1-2:03", 93_780),
        ("1-02:03:04", 93_784),
        ("0", 0),
        ("UNLIMITED", 0),
        ("soon", 0),
        ("", 0),
    ],
)
def test_walltimes_of_slurm(walltime: str, seconds: int) -> None:
    assert seconds_of(walltime) == seconds
    if not seconds:
        assert lifetime_arguments(walltime) == []
        return
    _, lifetime, _, stagger = lifetime_arguments(walltime)
    assert 0.85 * seconds < float(lifetime[:-1]) + float(stagger[:-1]) < seconds - 60


def test_job_needs_cores_and_memory() -> None:
    from pipelines.cluster.slurm import job_script

    with (
        dask.config.set({"jobqueue.slurm.cores": None, "jobqueue.slurm.memory": None}),
        pytest.raises(ClusterError, match="how many cores and how much memory"),
    ):
        job_script(SlurmOptions(cores=4))


def test_an_interrupt_before_a_call_has_begun_logs_nothing(caplog):
    """The loop is busy when the signal comes: Dask cancels a future that it has not made yet."""

    async def nothing() -> None:
        pass

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with open_client(workers=1) as client:
            client.loop.add_callback(time.sleep, 1.0)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                sync(client.loop, nothing)
            assert client.submit(abs, -1).result() == 1  # the loop has run its callbacks
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [record for record in caplog.records if record.name == "tornado.application"] == []
