"""A training whose MLflow server is killed: it goes on, and loses nothing."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bragg_data.store.repository import Store
from catalog import registry
from catalog.tracking import Tracking, TrackingError
from tests.servers import ROOT, answered, free_port, until

pytestmark = pytest.mark.slow

SHORT, LONG = 40, 300  # epochs: of seconds, and longer than a server needs to start


class Server:
    """A server that can be killed and started again at the same address."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "pipelines.tracking_server", "serve", "--workers", "1"]
        command += ["--home", str(self.home), "--port", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
        until(lambda: answered(f"{self.address}/health"), 90)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, tracking_in: Callable[[Path], Tracking]) -> Iterator[Server]:
    server = Server(tmp_path / "home")
    server.home.mkdir()
    tracking_in(server.home)
    server.start()
    yield server
    server.kill()


class Training:
    """The command in a process of its own, with what it has printed until now."""

    def __init__(self, *arguments: str, cache: Path) -> None:
        command = [sys.executable, "-u", "-m", "pipelines.train", *arguments]
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **both)
        self.printed = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.printed += line

    def has_printed(self, pattern: str) -> bool:
        assert self.process.poll() is None or re.search(pattern, self.printed), self.printed
        return re.search(pattern, self.printed) is not None


def start_training(server: Server, store: Store, place: Path, epochs: int) -> Training:
    arguments = ["multitask", "--store", store.uri, "--tracking", server.address]
    arguments += ["--epochs", str(epochs), "--max-seconds", "0", "--state", str(place / "state")]
    return Training(*arguments, cache=place / "cache")


def losses(address: str, run_id: str) -> list[int]:
    history = Tracking(address).client.get_metric_history(run_id, "train/loss")
    return [metric.step for metric in history]


def test_a_server_that_comes_back_has_all_metrics(
    server: Server, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    training = start_training(server, small_store, tmp_path, LONG)
    until(lambda: training.has_printed(r"Run \w{32} in http"), 120)
    until(lambda: training.has_printed("epoch [1-9] of"), 120)
    server.kill()
    until(lambda: training.has_printed("does not answer. The training continues"), 60)
    before = training.printed.count("\n")
    until(lambda: training.printed.count("\n") > before, 60)
    server.start()
    until(lambda: training.has_printed("answers again"), 60)
    assert training.process.wait(300) == 0, training.printed
    run_id = re.search(r"Run (\w{32}) in", training.printed)[1]
    assert sorted(losses(server.address, run_id)) == list(range(1, LONG + 1))
    assert len(registry.versions(Tracking(server.address), "small")) == 1
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_a_server_that_stays_away_gets_all_with_the_next_command(
    server: Server, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    training = start_training(server, small_store, tmp_path, SHORT)
    until(lambda: training.has_printed("epoch [1-9] of"), 120)
    server.kill()
    assert training.process.wait(300) == 2
    until(lambda: "--resume" in training.printed, 60)
    run_id = re.search(r"Run (\w{32}) in", training.printed)[1]
    assert "What was trained is kept: continue when it is back, with" in training.printed
    assert f"--resume {run_id}" in training.printed
    assert "Traceback" not in training.printed
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"does not answer\. Start it again"):
        Tracking(server.address)
    assert time.monotonic() - began < 60
    server.start()
    assert sorted(losses(server.address, run_id)) == list(range(1, SHORT + 1))
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
    state = "--state", str(tmp_path / "state")
    again = Training(
        "--resume", run_id, "--tracking", server.address, *state, cache=tmp_path / "cache"
    )
    assert again.process.wait(300) == 0, again.printed
    assert len(registry.versions(Tracking(server.address), "small")) == 1
