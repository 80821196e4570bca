"""A team's PostgreSQL and MLflow server are killed during work and come back from a backup.

The whole scene runs with secrets in its environment, which nobody may find afterwards in what was
stored or printed.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import typer
from typer.testing import CliRunner

from bragg_data.store.repository import Store
from catalog import lineage_events, registry
from catalog.backup import TrackingServerError
from catalog.tracking import Tracking
from pipelines import simulate, tracking_server, train
from tests.postgresql import PostgreSql
from tests.servers import ROOT, answered, free_port, until
from tests.small_store import TAG

# On a busy machine the server may be slow to answer: the training says so, and goes on.
SLOW_SERVER = pytest.mark.filterwarnings("ignore:The tracking server", "ignore:.* metrics of run")
pytestmark = [SLOW_SERVER, pytest.mark.slow, pytest.mark.postgresql, pytest.mark.training]

CANARY = "cAnArY-7f3d"
EPOCHS = 300  # longer than what happens meanwhile


def _environment(place: Path, address: str) -> dict[str, str]:
    """What a careless user has in the environment."""
    return {
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
        "AWS_ACCESS_KEY_ID": f"{CANARY}-key",
        "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws",
        "MLFLOW_TRACKING_URI": address.replace("//", f"//me:{CANARY}-tracking@"),
        "PGPASSWORD": f"{CANARY}-pg",
        "OPENLINEAGE__TRANSPORT__TYPE": "file",
        "OPENLINEAGE__TRANSPORT__LOG_FILE_PATH": str(place / "events"),
        "OPENLINEAGE_API_KEY": f"{CANARY}-lineage",
    }


@dataclass
class Command:
    """A command in a process of its own, with a log."""

    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, place: Path, env: Mapping[str, str], name: str, *arguments: str) -> "Command":
        log = place / f"{name}-{len(list(place.glob('*.log')))}.log"
        line = [sys.executable, "-u", "-m", f"pipelines.{name}", *arguments]
        with log.open("wb") as file:
            both = {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(line, cwd=ROOT, env=env, start_new_session=True, **both)
        return cls(log, process)

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def has_printed(self, pattern: str) -> bool:
        assert self.process.poll() in (None, 0) or re.search(pattern, self.printed), self.printed
        return re.search(pattern, self.printed) is not None

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Team:
    """A place of logs and files, the address of the MLflow server, and all that was started."""

    place: Path
    port: int
    started: list[Command]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, name: str, *arguments: str, **variables: str) -> Command:
        environment = os.environ | variables
        self.started.append(Command.start(self.place, environment, name, *arguments))
        return self.started[-1]

    def call(self, app: typer.Typer, *arguments: str) -> str:
        """Run a command in this process, which has imported all already; return its output."""
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        (self.place / f"{len(list(self.place.iterdir()))}.log").write_text(result.output)
        assert result.exit_code == 0, result.output
        return result.output

    def serve_runs(self, home: Path, backend: str) -> Command:
        options = ["--home", str(home), "--port", str(self.port), "--workers", "1"]
        server = self.start("tracking_server", "serve", *options, BRAGG_MLFLOW_BACKEND=backend)
        until(lambda: answered(f"{self.address}/health"), 90)
        return server

    def training(self, store: Store, epochs: int) -> list[str]:
        options = ["--store", store.uri, "--epochs", str(epochs), "--max-seconds", "0"]
        return ["multitask", *options, "--state", str(self.place / "state")]


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    team = Team(tmp_path, free_port(), [])
    for name, value in _environment(tmp_path, team.address).items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that what commands set goes away afterwards
        monkeypatch.delenv(name)
    yield team
    lineage_events.finish()
    for command in team.started:
        command.kill()


def _records(address: str, run_id: str) -> dict[str, Any]:
    """Return what the server knows of models, and of a run that has ended."""
    tracking = Tracking(address)
    client = tracking.client
    run = client.get_run(run_id)
    return {
        "run": run.to_dictionary(),
        "losses": [metric.value for metric in client.get_metric_history(run_id, "train/loss")],
        "files": sorted(file.path for file in client.list_artifacts(run_id)),
        "versions": registry.versions(tracking, "small"),
    }


def test_all_comes_back_from_a_backup_and_no_secret_got_out(
    team: Team, campaign_file: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", create=True)
    options = ["--campaign", str(campaign_file), "--store", store.uri, "--tag", TAG]
    team.call(simulate.app, *options, "--simulator", "kinematic", "--workers", "1")
    profile = store.open(TAG).intensity[:1].values

    with PostgreSql() as first:
        backend = first.database("bragg", f"team:{CANARY}-backend")
        server = team.serve_runs(tmp_path / "home", backend)
        trained = team.call(train.app, *team.training(store, 1))
        run_id = re.search(r"Run (\w{32}) in", trained)[1]
        port, tokens = free_port(), tmp_path / "tokens"
        tokens.write_text(f"{CANARY}-token-of-the-service\n")
        options = ["--port", str(port), "--refresh", "0.3", "--token-file", str(tokens)]
        service = team.start("serve", *options)

        def ask(path: str, **body: Any) -> dict[str, Any]:
            headers = {"Authorization": f"Bearer {CANARY}-token-of-the-service"}
            url = f"http://127.0.0.1:{port}/{path}"
            method = requests.post if body else requests.get
            return method(url, headers=headers, timeout=30, **body).json()

        def answer() -> dict[str, float]:
            (prediction,) = ask("predict", json={"profiles": profile.tolist()})["predictions"]
            return dict(prediction["probabilities"])

        until(lambda: answered(f"http://127.0.0.1:{port}/health"), 60)
        until(lambda: ask("ready").get("uri") == "models:/small/1", 60)
        expected = answer()
        training = team.start("train", *team.training(store, EPOCHS))
        until(lambda: training.has_printed("epoch [1-9] of"), 120)

        # The database alone dies, and recovers from its own log.
        first.kill()
        until(lambda: ask("ready").get("refresh_error"), 60)
        assert answer() == expected
        first.start()
        until(lambda: not ask("ready").get("refresh_error"), 60)

        expected_records = _records(team.address, run_id)
        backups = tmp_path / "backups"
        options = ["--home", str(tmp_path / "home"), "--backend", backend]
        team.call(tracking_server.app, "backup", str(backups), *options)
        first.kill()
        server.kill()
        until(lambda: training.has_printed("does not answer. The training continues"), 60)
        assert answer() == expected

    with PostgreSql() as second:
        backend = second.database("bragg", f"team:{CANARY}-backend")
        (backup,) = backups.iterdir()
        options = ["--home", str(tmp_path / "again"), "--backend", backend]
        team.call(tracking_server.app, "restore", str(backup), *options)
        team.serve_runs(tmp_path / "again", backend)
        assert _records(team.address, run_id) == expected_records
        until(lambda: not ask("ready").get("refresh_error"), 60)
        assert answer() == expected
        assert training.process.wait(240) == 0, training.printed
        with pytest.raises(TrackingServerError, match="not empty"):  # it is not written over
            team.call(tracking_server.app, "restore", str(backup), *options)
        versions = registry.versions(Tracking(team.address), "small")
        assert [version.version for version in versions] == ["2", "1"]
        champion = registry.champion(Tracking(team.address), "small")
        until(lambda: ask("ready").get("uri") == champion.uri, 60)
        service.kill()

        tokens.unlink()
        plain = ["pg_dump", "--format=plain", backend]
        dumped = subprocess.run(plain, capture_output=True, check=True).stdout
        assert b"promotion_reason" in dumped
        assert CANARY.encode() not in dumped
    (attrs,) = (store.open(tag.name).attrs for tag in store.tags())
    assert CANARY not in str(attrs)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [str(file) for file in files if CANARY.encode() in file.read_bytes()]
