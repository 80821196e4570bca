"""Runs in MLflow: parameters, metrics and the data that they used."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import xarray as xr
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from bragg_data.errors import first_line
from bragg_data.files import lock_for
from catalog import DEFAULT_TRACKING_URI, without_credentials
from catalog.database import (
    ARTIFACTS,
    SQLITE,
    DatabaseError,
    check_database,
    moved,
    path_of,
    problem_of,
)
from catalog.lineage_events import LineageDataset, LineageRun
from catalog.outbox import Outbox, Row, answers, deliver_pending, send

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_METRICS, DRAWS_METRICS, MEASURED_METRICS = "test", "draws", "measured"
"""First part of the names of metrics: on simulated test samples, on held-out draws of
measured-looking profiles, and on measured profiles. Numbers of different parts are not comparable.
"""

SERVER_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # one server process, no workers of its own
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment of an MLflow server that this project starts."""

_VERSIONS = ("torch", "numpy", "scikit-learn", "xarray", "icechunk", "mlflow", "gemmi")
_WATCH_SECONDS = 10.0  # between two measurements of the machine
# Limits of MLflow's log_batch, and of the digest of a data set.
_PARAMETERS_PER_CALL, _PARAMETER_LENGTH = 100, 6000
_DIGEST_LENGTH = 36


class TrackingError(RuntimeError):
    """A tracking database or server that cannot be used."""


def open_existing(uri: str = DEFAULT_TRACKING_URI) -> Tracking | None:
    """Open a database or server; None for a database that does not exist, which is not created.

    Raises `TrackingError` if it cannot be used.
    """
    path = path_of(uri)
    return None if path is not None and not path.exists() else Tracking(uri)


class Tracking:
    """An MLflow tracking database or server: runs, models and their files.

    A database (``sqlite:///PATH``) is created if it is missing, and the artifacts go to
    ``mlartifacts`` in the same directory; a server has a directory for them. Raises `TrackingError`
    if it cannot be used.
    """

    def __init__(self, uri: str = DEFAULT_TRACKING_URI) -> None:
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised as well
        self.database = path = path_of(uri)  # the file of a database; None of a server
        self._artifacts: Path | None = None
        if path is not None:
            self._artifacts = path.parent / ARTIFACTS
            uri = f"{SQLITE}{path}"
        elif not uri.startswith(("http://", "https://")):
            raise TrackingError(  # without the rest, which may have a password
                f"'{uri.partition(':')[0]}:' is no MLflow database or server. Give another URI "
                f"with --tracking, for example {DEFAULT_TRACKING_URI} or http://SERVER:5000."
            )
        self.uri = uri = without_credentials(uri)
        try:
            if path is None:
                # MLflow's default waits for minutes before it reports that nothing answers.
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
                self.client = self._connected()
                if self.is_server:
                    deliver_pending(self.client, uri)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                # Several processes that create the database at the same time break it.
                with lock_for(path):
                    check_database(path)
                    self.client = self._connected()
        except DatabaseError as error:
            raise TrackingError(str(error)) from error
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise TrackingError(
                f"{problem_of(first_line(error), uri)} Give another URI with --tracking, for "
                f"example {DEFAULT_TRACKING_URI}."
            ) from error

    @property
    def is_server(self) -> bool:
        """Whether it is an MLflow server, which may go away and come back."""
        return self.uri.startswith(("http://", "https://"))

    def _connected(self) -> MlflowClient:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about details of the tables that it creates
            client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
        return client

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, created if it does not exist."""
        known = self.client.get_experiment_by_name(name)
        if known is None:
            artifacts = None if self._artifacts is None else (self._artifacts / name).as_uri()
            try:
                return str(self.client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:
                known = self.client.get_experiment_by_name(name)
                if known is None:  # else another process was faster
                    raise
        self._check_place(known.artifact_location)
        return str(known.experiment_id)

    def _check_place(self, location: str) -> None:
        """Refuse to write artifacts where the folder of the database was before it was moved."""
        path = path_of(self.uri)
        if path is not None and moved(location, path):
            old = Path(unquote(urlsplit(location).path))
            if not old.exists():
                raise TrackingError(
                    f"The folder of {path} was moved: its runs have their files in {old.parent}, "
                    f"which is gone. Correct their addresses once: python -m pipelines.tracking "
                    f"relocate --tracking {self.uri}"
                )

    def run(
        self, experiment: str, name: str, tags: Mapping[str, str], *, watch: bool = False
    ) -> AbstractContextManager[Run]:
        """Open a run; it ends as finished, failed or (by Ctrl-C) killed.

        The versions of the packages are added to its tags. With `watch`, processor, memory, disk
        and GPU are logged every few seconds: the metrics ``system/…``.
        """
        experiment_id = self.experiment(experiment)
        versions = {f"version.{package}": metadata.version(package) for package in _VERSIONS}
        tags = {**versions, **tags, "mlflow.source.type": "LOCAL"}
        entity = self.client.create_run(experiment_id, run_name=name, tags=tags)
        run = Run(self, entity.info.run_id, experiment_id)
        return self._ended(run, _job(tags, experiment), watch=watch)

    def resumed(self, run_id: str) -> AbstractContextManager[Run]:
        """Open an unfinished run again; raises `TrackingError` if there is none of this id."""
        try:
            entity = self.client.get_run(run_id)
        except MlflowException as error:
            raise TrackingError(f"There is no run {run_id} in {self.uri}.") from error
        if entity.info.status == "FINISHED":
            raise TrackingError(f"Run {run_id} is finished: there is nothing to resume.")
        self.client.update_run(run_id, status="RUNNING")
        experiment = self.client.get_experiment(entity.info.experiment_id)
        run, job = (
            Run(self, run_id, experiment.experiment_id),
            _job(entity.data.tags, experiment.name),
        )
        return self._ended(run, job, watch=True, again=True)

    def training_run(self, run_id: str, model: str) -> Run | None:
        """Return the run that trained a model, by its name; None if it is gone or trained another.

        A proposal network is registered from the run of the network that it belongs to.
        """
        try:
            entity = self.client.get_run(run_id)
        except MlflowException:
            return None
        same = entity.data.tags.get("model") == model
        return Run(self, run_id, entity.info.experiment_id) if same else None

    @contextmanager
    def _ended(self, run: Run, job: str, *, watch: bool, again: bool = False) -> Iterator[Run]:
        status = "FAILED"
        run.lineage = LineageRun(job, id=str(uuid.UUID(run.id)))
        monitor = SystemMetricsMonitor(
            run.id, sampling_interval=_WATCH_SECONDS, resume_logging=again, tracking_uri=self.uri
        )
        if watch:
            monitor.start()
        try:
            if watch and self.is_server:
                with run.lineage, Outbox(self.client, self.uri, run.id) as run.outbox:
                    yield run
            else:
                with run.lineage:
                    yield run
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            status = "KILLED"
            raise
        except MlflowException as error:
            if not self.is_server or answers(self.uri):
                raise
            remedy = "Run the same command again when it is back."
            if watch:  # a training
                remedy = (
                    f"What was trained is kept: continue when it is back, with python -m "
                    f"pipelines.train --resume {run.id} --tracking {self.uri}"
                )
            message = f"The tracking server {self.uri} does not answer. {remedy}"
            raise TrackingError(message) from error
        finally:
            if not self.is_server or answers(self.uri):
                monitor.finish()
                self.client.set_terminated(run.id, status)


class Run:
    """An open run."""

    def __init__(self, tracking: Tracking, run_id: str, experiment_id: str) -> None:
        self.tracking = tracking
        self.id = run_id
        self.experiment_id = experiment_id
        self.outbox: Outbox | None = None  # of a training on a server
        self.lineage: LineageRun | None = None  # of an open run

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log settings; nested mappings become dotted names."""
        flat = [Param(k, str(v)[:_PARAMETER_LENGTH]) for k, v in _flattened(parameters, ".")]
        for low in range(0, len(flat), _PARAMETERS_PER_CALL):
            self.tracking.client.log_batch(self.id, params=flat[low : low + _PARAMETERS_PER_CALL])

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Log numbers; nested mappings become names with slashes, which are groups in the UI.

        Those of a training on a server are sent in the background.
        """
        now = int(time.time() * 1000)
        rows: list[Row] = [(k, float(v), now, step) for k, v in _flattened(metrics, "/")]
        if self.outbox is not None:
            self.outbox.put(rows)
        else:
            send(self.tracking.client, self.id, rows)

    def log_dataset(self, dataset: xr.Dataset, context: str) -> None:
        """Log an opened snapshot as data of this run, for a purpose such as "training"."""
        attrs = dataset.attrs
        names = ("uri", "tag", "snapshot_id", "content_hash")
        source = json.dumps({name: attrs.get(name, "") for name in names})
        # The snapshot's identity is the digest: hashing gigabytes again would add nothing.
        entity = Dataset(attrs["tag"], attrs["snapshot_id"][:_DIGEST_LENGTH], "icechunk", source)
        entry = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
        self.tracking.client.log_inputs(self.id, [entry])
        if self.lineage is not None:
            self.lineage.inputs.append(LineageDataset.of_snapshot(dataset))

    def log_text(self, text: str, file: str) -> None:
        """Log a text as an artifact, under a path relative to the run's."""
        self.tracking.client.log_text(self.id, text, file)

    def log_figure(self, figure: Figure, file: str) -> None:
        """Log a figure as a PNG artifact, under a path relative to the run's."""
        self.tracking.client.log_figure(self.id, figure, file, save_kwargs={"dpi": 130})


def _job(tags: Mapping[str, str], experiment: str) -> str:
    """Return the name of a run's job among lineage events, such as ``train.batio3-nomad``."""
    source = tags.get("mlflow.source.name", "run").removeprefix("pipelines.")
    return f"{source}.{experiment}"


def _flattened(values: Mapping[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            for inner, leaf in _flattened(value, separator):
                yield f"{key}{separator}{inner}", leaf
        else:
            yield key, value
