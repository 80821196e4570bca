import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import dask
import psutil
import pytest

from pipelines.cli.options import ClusterError, SlurmOptions
from pipelines.cluster.client import dashboard_text, open_client
from pipelines.cluster.slurm import _Job
from tests.conftest import TEST_CLUSTER

pytestmark = pytest.mark.slurm


@pytest.fixture
def options(slurm: Path, tmp_path: Path) -> Iterator[SlurmOptions]:
    """Options of small jobs, and a watch that sees a lost job within a second."""
    assert slurm.is_dir()
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1 s"}):
        yield SlurmOptions(
            jobs="2:2",
            cores=1,
            memory="500 MB",
            walltime="00:30:00",
            host="127.0.0.1",
            shared_directory=tmp_path,
        )
    assert not queue()
    assert not any(tmp_path.iterdir())


class Place(NamedTuple):
    """Where a task ran, and how."""

    job: str
    node: str
    process: int
    threads: str
    variable: str | None


def place(_: int = 0) -> Place:
    time.sleep(0.05)
    names = "SLURM_JOB_ID", "SLURMD_NODENAME", "OPENBLAS_NUM_THREADS"
    job, node, threads = (os.environ[name] for name in names)
    return Place(job, node, os.getpid(), threads, os.environ.get("BRAGG_TEST"))


def queue() -> set[str]:
    """Return the jobs in the queue of SLURM, whoever submitted them."""
    query = ["squeue", "--noheader", "--format=%i"]
    return set(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It does not come true."
        time.sleep(0.05)


def changed(options: SlurmOptions, **changes: object) -> SlurmOptions:
    return SlurmOptions(**{**vars(options), **changes})


def test_tasks_run_in_jobs_on_both_nodes(options: SlurmOptions) -> None:
    special = changed(
        options, cores=2, directives=["--exclusive"], environment=["BRAGG_TEST=it's set"]
    )
    with open_client("slurm", slurm=special) as client:
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        client.wait_for_workers(4, timeout=60)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        assert all(address.startswith("tls://") for address in workers)
        assert {worker["nthreads"] for worker in workers.values()} == {1}
        places = client.gather(client.map(place, range(40)))
        assert {where.job for where in places} == queue()
        assert {where.node for where in places} == {"node1", "node2"}
        assert len({where.process for where in places}) == 4
        assert {where.threads for where in places} == {"1"}
        assert {where.variable for where in places} == {"it's set"}


def test_cancelled_job_is_replaced_and_its_tasks_run_again(options: SlurmOptions) -> None:
    # One job at a time, so that nobody else can do its work; two workers in it, the case in which
    # Dask itself replaces nothing.
    with open_client("slurm", slurm=changed(options, jobs="1:1", cores=2)) as client:
        futures = client.map(place, range(100))
        first = futures[0].result(timeout=60).job
        subprocess.run(["scancel", first], check=True)
        places = client.gather(futures)
    assert len(places) == 100
    assert len({where.job for where in places} - {first}) == 1


def test_jobs_come_with_the_work(options: SlurmOptions) -> None:
    with open_client("slurm", slurm=changed(options, jobs="1:3")) as client:
        futures = client.map(place, range(1000))
        client.wait_for_workers(3, timeout=60)
        assert len(queue()) == 3
        client.cancel(futures)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"queue": "nowhere"}, "refuses .*Invalid partition name specified"),
        ({"memory": "900 GB"}, "refuses .*Requested node configuration is not available"),
        ({"walltime": "soon"}, "refuses .*Invalid --time specification"),
        ({"queue": "short"}, r"never start them \(PartitionTimeLimit\)"),
        ({"queue": "closed", "account": "x"}, r"never start them .*closed allows staff"),
        ({"python": "/no/such/python"}, r"\d SLURM jobs in a row .*/no/such/python: No such file"),
        ({"interface": "eth99", "host": None}, "'eth99' is not a valid network interface"),
    ],
)
def test_refusal_is_a_single_error_with_the_message_of_slurm(
    options: SlurmOptions, changes: dict[str, object], words: str
) -> None:
    with (
        pytest.raises(ClusterError, match=words) as caught,
        open_client("slurm", slurm=changed(options, **changes)) as client,
    ):
        client.submit(place).result(timeout=60)
    assert "\n" not in str(caught.value)
    assert not queue()


def test_error_in_the_block_passes_and_leaves_no_job(options: SlurmOptions) -> None:
    def fail() -> None:
        with open_client("slurm", slurm=options) as client:
            client.submit(place).result(timeout=60)
            assert queue()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not queue()


@contextlib.contextmanager
def driver(options: SlurmOptions, work: str) -> Iterator[subprocess.Popen[str]]:
    """Run a driver of one job, which does the work with its `client`; it does not outlive this."""
    program = f"""
import faulthandler, signal, time
from pathlib import PosixPath
from pipelines.cluster.client import dashboard_text, open_client
from pipelines.cluster.slurm import _Job
from pipelines.cli.options import SlurmOptions
if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    with open_client("slurm", slurm={changed(options, jobs="1:1")}) as client:
        client.wait_for_workers(1, timeout=60)
        print("ready", flush=True)
        {work}
"""

    def obey() -> None:  # whatever runs these tests may ignore them, as nohup does
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=obey,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
            assert len(queue()) == 1
            yield process
        finally:
            process.kill()  # a test that fails here does not wait for it, nor does the next one


def errors_of(process: subprocess.Popen[str], seconds: float = 60) -> str:
    """Return what a process says until it ends, which has to be soon."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)  # to say where it is
        time.sleep(1)
        process.kill()
        subprocess.run(["scancel", *queue()], check=True)
        pytest.fail(f"It does not end. {process.communicate()[1]}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_killed_driver_leaves_no_job(
    options: SlurmOptions, number: signal.Signals, tmp_path: Path
) -> None:
    work = "client.gather(client.map(time.sleep, [0.2] * 5000, pure=False))"
    with driver(options, work) as process:
        process.send_signal(number)
        errors = errors_of(process)
    if number == signal.SIGKILL:
        wait_until(lambda: not queue())  # the workers end by themselves
        for left in tmp_path.iterdir():
            for file in left.iterdir():
                file.unlink()
            left.rmdir()
    assert process.returncode in (-number, 128 + number)
    assert not queue()
    assert "ERROR" not in errors  # as Dask's log has it


_FINALISER = """
        class Last:
            def __del__(self):
                print("there", flush=True)
                time.sleep(3)
        Last()
        time.sleep(600)
"""
_COLLECTION = """
        import gc
        def callback(phase, info):
            print("there", flush=True)
            gc.callbacks.remove(callback)
            time.sleep(3)
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("work", "number"),
    [(_FINALISER, signal.SIGINT), (_COLLECTION, signal.SIGTERM)],
    ids=["finaliser", "collection"],
)
def test_signal_where_python_drops_exceptions_is_obeyed(
    options: SlurmOptions, number: signal.Signals, work: str
) -> None:
    with driver(options, work) as process:
        assert process.stdout
        assert process.stdout.readline() == "there\n"
        process.send_signal(number)
        errors = errors_of(process)
    assert "Exception ignored" in errors
    # A KeyboardInterrupt that nobody catches ends Python by the signal itself.
    assert process.returncode == (-number if number == signal.SIGINT else 128 + number)
    assert not queue()


def test_stop_leaves_no_process(slurm: Path) -> None:
    assert slurm.is_dir()  # so that SLURM is installed
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        directory = Path(name)

        def run(command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [TEST_CLUSTER, command, directory], capture_output=True, text=True, check=False
            )

        assert run("stop").returncode == 0  # there is nothing to stop
        assert "No SLURM runs" in run("status").stderr
        started = run("start")
        assert started.stdout == f"export SLURM_CONF={directory}/slurm.conf\n"
        assert run("start").stdout == started.stdout  # it runs already
        assert run("status").stdout.count("debug* idle") == 2
        job = "sleep 1000 & sleep 1000 & setsid sleep 1000 & jobs -p > pids; wait"
        subprocess.run(
            ["sbatch", f"--chdir={directory}", "--wrap", job],
            env={**os.environ, "SLURM_CONF": f"{directory}/slurm.conf"},
            check=True,
        )
        pids = directory / "pids"
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 3)
        running = [psutil.Process(int(line)) for line in pids.read_text().split()]
        wait_until(lambda: all(process.name() == "sleep" for process in running[:3]))
        running += daemons(directory)
        names = {process.name() for process in running}
        assert names == {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"}
        assert run("stop").returncode == 0
        assert not [process for process in running if alive(process)]
        assert not daemons(directory)
        assert run("stop").returncode == 0


def alive(process: psutil.Process) -> bool:
    # A process that nobody has waited for is in the table, but has ended.
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def daemons(directory: Path) -> list[psutil.Process]:
    """Return SLURM's processes that were started with a file in the directory or have one open."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.name() in {"munged", "slurmctld", "slurmd", "slurmstepd"}:
                files = [file.path for file in process.open_files()]
                if f"{directory}/" in " ".join([*process.cmdline(), *files]) and alive(process):
                    processes.append(process)
    return processes


def test_banners_of_a_site_are_no_job(
    options: SlurmOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An sbatch that greets with numbers submits a job once, and cancels nobody else's."""
    wrapper = tmp_path.parent / f"{tmp_path.name}-bin" / "sbatch"
    wrapper.parent.mkdir()
    real = shutil.which("sbatch")
    wrapper.write_text(
        f'#!/bin/sh\necho "Welcome to cluster 5, 12 nodes"\necho x >> {wrapper}.calls\n'
        f'exec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    foreign = subprocess.run(
        [str(real), "--parsable", "--output=/dev/null", "--wrap=sleep 600"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    try:
        with open_client("slurm", slurm=changed(options, jobs="1:1")) as client:
            places = client.gather(client.map(place, range(10)))
            time.sleep(2)  # in which the watch looks at the queue
            assert {where.job for where in places} == queue() - {foreign}
            dashboard = dashboard_text(client, "slurm")
            port = re.match(r"http://127\.0\.0\.1:(\d+)/status", dashboard)[1]
            assert f"ssh -L {port}:127.0.0.1:{port} " in dashboard
            assert urllib.request.urlopen(dashboard.split()[0], timeout=10).status == 200
        assert len(Path(f"{wrapper}.calls").read_text().split()) == 1
        assert queue() == {foreign}
    finally:
        subprocess.run(["scancel", foreign], check=True)
        wait_until(lambda: not queue())


@pytest.mark.parametrize(
    ("out", "number"),
    [
        ("123\n", "123"),
        ("123;cluster\n", "123"),
        ("Welcome to 5\n99 users\nSubmitted batch job 123\n", "123"),
        ("7\nmotd of 2026\n123\n", "123"),
    ],
)
def test_the_number_of_a_job(out: str, number: str) -> None:
    assert _Job._job_id_from_submit_output(object.__new__(_Job), out) == number


def test_a_number_of_another_run_is_not_cancelled(slurm: Path) -> None:
    assert slurm.is_dir()
    submit = ["sbatch", "--parsable", "--output=/dev/null", "--job-name=foreign", "--wrap=sleep 60"]
    foreign = subprocess.run(submit, capture_output=True, text=True, check=True).stdout.strip()
    job = object.__new__(_Job)
    job.name, job.job_id, job.job_name = "x", foreign, "bragg-mine"
    asyncio.run(job.close())
    assert foreign in queue()
    subprocess.run(["scancel", foreign], check=True)
    wait_until(lambda: not queue())


def test_a_relative_shared_directory_is_that_of_the_submission(
    options: SlurmOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    relative = changed(options, jobs="1:1", shared_directory=Path(tmp_path.name))
    with open_client("slurm", slurm=relative) as client:
        assert len(client.gather(client.map(place, range(3)))) == 3
