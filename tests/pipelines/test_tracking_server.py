"""The team's MLflow server: many writers at once, files through the server, backup and restore."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bragg_data.store.repository import Store
from catalog import features, registry
from catalog.backup import TrackingServerError
from catalog.tracking import Tracking
from catalog.views import view_of
from pipelines.cluster.client import open_client
from pipelines.registry.feature_views import RegisteredModel, materialise
from pipelines.registry.registration import load_version
from pipelines.tracking_server import app
from tests.postgresql import PostgreSql
from tests.servers import serving
from tests.small_bench import short_presets, train_here

pytestmark = pytest.mark.slow

WRITERS, RUNS, METRICS = 8, 1, 3


@dataclass(frozen=True)
class Server:
    """A running server, and what it was started with."""

    address: str
    home: Path
    backend: str | None

    @property
    def options(self) -> list[str]:
        backend = [] if self.backend is None else ["--backend", self.backend]
        return ["--home", str(self.home), *backend]


@contextmanager
def running(home: Path, backend: str | None, workers: int) -> Iterator[Server]:
    server = Server("", home, backend)
    command = "pipelines.tracking_server", "serve", "--workers", str(workers), *server.options
    with serving(*command, answers="health") as address:
        yield replace(server, address=address)


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]
)
def backends(request: pytest.FixtureRequest) -> Iterator[Iterator[str | None]]:
    """One new, empty backend after the other."""
    with ExitStack() as stack:
        server = stack.enter_context(PostgreSql()) if request.param == "postgresql" else None

        def new() -> Iterator[str | None]:
            for number in range(3):
                yield None if server is None else server.database(f"bragg{number}")

        yield new()


@pytest.fixture(scope="module")
def server(
    backends: Iterator[str | None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server") / "home", next(backends), 2) as started:
        yield started


def write(address: str, writer: int) -> None:
    """What a training logs, as fast as it goes."""
    tracking = Tracking(address)
    for number in range(RUNS):
        with tracking.run("crowd", f"{writer}-{number}", {"writer": str(writer)}) as run:
            run.log_parameters({"number": number})
            for step in range(METRICS):
                run.log_metrics({"loss": writer + step / 10}, step)
            run.log_text(f"{writer} {number}", "said.txt")


def test_of_many_writers_at_once_none_is_lost(server: Server) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports take longer than the rest
    children = [context.Process(target=write, args=(server.address, k)) for k in range(WRITERS)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * WRITERS
    client = Tracking(server.address).client
    experiment = client.get_experiment_by_name("crowd")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    names = sorted(run.info.run_name for run in runs)
    assert names == sorted(f"{k}-{n}" for k in range(WRITERS) for n in range(RUNS))
    for run in runs:
        assert run.info.status == "FINISHED"
        writer, number = run.info.run_name.split("-")
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [m.value for m in history] == [int(writer) + s / 10 for s in range(METRICS)]
        assert run.data.params == {"number": number}
        said = client.list_artifacts(run.info.run_id)
        assert [file.path for file in said] == ["said.txt"]


@pytest.mark.training
@pytest.mark.parametrize("backends", ["sqlite"], indirect=True)  # PostgreSQL's: test_recovery.py
def test_all_follows_the_address_alone_and_comes_back_from_a_backup(
    server: Server,
    backends: Iterator[str | None],
    small_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train, materialise on workers, predict; then everything again from a backup."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    shutil.copytree(small_store.path, tmp_path / "store")
    store = Store(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    train_here("classifier", "--store", store.uri, presets=short_presets())
    assert not list(tmp_path.rglob("*.db"))  # no database of its own
    tracking = Tracking(server.address)
    (version,) = registry.versions(tracking, "small-classifier")
    assert version.source.startswith("mlflow-artifacts:/")
    dataset = store.open("small-v1")
    with open_client("local", workers=1) as client:
        materialise(
            client,
            store,
            dataset,
            view_of("classifier_256"),
            RegisteredModel(server.address, version),
        )
    stored = features.load("classifier_256", "small-v1", store.uri)
    profiles = dataset.intensity[:64].values
    predictor = load_version(server.address, version)
    np.testing.assert_array_equal(stored.classifier_256[:64], predictor.features(profiles))

    result = CliRunner().invoke(
        app, ["backup", str(tmp_path / "backups"), *server.options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    (backup,) = (tmp_path / "backups").iterdir()
    again = Server("", tmp_path / "again", next(backends))
    restored = CliRunner().invoke(
        app, ["restore", str(backup), *again.options], catch_exceptions=False
    )
    assert restored.exit_code == 0, restored.output
    with running(again.home, again.backend, 1) as other:
        elsewhere = Tracking(other.address)
        (back,) = registry.versions(elsewhere, "small-classifier")
        answer = load_version(other.address, back).predict(profiles)
        expected = predictor.predict(profiles)
        np.testing.assert_array_equal(answer.probabilities, expected.probabilities)
        run = elsewhere.client.get_run(back.run_id)
        before = tracking.client.get_run(back.run_id)
        assert run.data.to_dictionary() == before.data.to_dictionary()
        files = {file.path for file in elsewhere.client.list_artifacts(run.info.run_id)}
        assert files == {file.path for file in tracking.client.list_artifacts(run.info.run_id)}
        # What is there is not written over.
        with pytest.raises(TrackingServerError, match="not empty"):
            CliRunner().invoke(
                app, ["restore", str(backup), *again.options], catch_exceptions=False
            )


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    for arguments, message in (
        (["restore", str(tmp_path / "half")], "no complete backup"),
        (["backup", str(tmp_path / "b"), "--home", str(tmp_path / "none")], "no database"),
        (["serve", "--backend", "mysql://me:secret@there/db"], "'mysql:' is no database"),
    ):
        with pytest.raises(TrackingServerError, match=message) as raised:
            CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert "secret" not in str(raised.value)
    contents = {"made_at": "", "database": "database.dump", "artifacts": 0, "bytes": 0}
    (tmp_path / "half" / "backup.json").write_text(json.dumps(contents))
    with pytest.raises(TrackingServerError, match="kind of backend"):
        CliRunner().invoke(
            app,
            ["restore", str(tmp_path / "half"), "--home", str(tmp_path / "new")],
            catch_exceptions=False,
        )
