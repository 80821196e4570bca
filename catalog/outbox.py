"""Metrics of a run on a server: sent in the background, and kept while the server is away.

A training neither waits for its server nor ends with it. What is not delivered yet lies in a file
in the user's cache as well: it is sent when the server answers again, by the training itself or,
if that has ended, by the next command that uses the server. Sending twice is harmless: MLflow
stores the same number of the same step once.
"""

import hashlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from bragg_data.files import writable_cache

_EVERY = 1.5  # seconds between two looks at the server
_PATIENCE = 2.0  # seconds in which it has to answer
_METRICS_PER_CALL = 1000  # limit of MLflow's log_batch

Row = tuple[str, float, int, int]  # name, value, time (ms), step


def answers(uri: str) -> bool:
    """Return whether a server answers, whatever it answers."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_PATIENCE):
            return True
    except urllib.error.HTTPError:  # it answers, but wants a password for example
        return True
    except (OSError, ValueError, http.client.HTTPException):  # or something else than HTTP
        return False


class Outbox:
    """The metrics of one run, delivered in the background; a context manager.

    A warning states that the server does not answer, at most 5 s after it has stopped, and another
    one that it does again. Leaving the context delivers what is left if the server answers.
    """

    def __init__(self, client: MlflowClient, uri: str, run_id: str) -> None:
        self._client, self._uri, self._run_id = client, uri, run_id
        self._waiting: deque[list[Row]] = deque()
        self._changed, self._ended = threading.Condition(), False
        self._away = False
        self._file = _file(uri, run_id)
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def __enter__(self) -> "Outbox":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        if self._waiting:
            warnings.warn(
                f"{sum(map(len, self._waiting))} metrics of run {self._run_id} are kept in "
                f"{self._file}: the next command that uses {self._uri} delivers them.",
                stacklevel=2,
            )

    def put(self, rows: list[Row]) -> None:
        """Add metrics, which are sent soon."""
        with self._changed:
            self._waiting.append(rows)
            if self._file is not None:
                with suppress(OSError), self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows) + "\n")
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._ended and (self._away or not self._waiting):
                    self._changed.wait(_EVERY)
                ended = self._ended
            self._look()
            if not self._away:
                self._deliver()
            if ended:
                return

    def _look(self) -> None:
        away = not answers(self._uri)
        if away and not self._away:
            warnings.warn(
                f"The tracking server {self._uri} does not answer. The training continues; its "
                f"metrics are kept and delivered when the server is back.",
                stacklevel=2,
            )
        elif self._away and not away:
            warnings.warn(f"The tracking server {self._uri} answers again.", stacklevel=2)
        self._away = away

    def _deliver(self) -> None:
        """Send what is waiting, and forget what was delivered."""
        while self._waiting:
            try:
                send(self._client, self._run_id, self._waiting[0])
            except MlflowException:
                time.sleep(_EVERY)
                return
            with self._changed:
                self._waiting.popleft()
                if not self._waiting and self._file is not None:
                    self._file.unlink(missing_ok=True)


def send(client: MlflowClient, run_id: str, rows: Sequence[Row]) -> None:
    """Send metrics of a run, as many at a time as MLflow takes."""
    for low in range(0, len(rows), _METRICS_PER_CALL):
        metrics = [Metric(*row) for row in rows[low : low + _METRICS_PER_CALL]]
        client.log_batch(run_id, metrics=metrics)


def deliver_pending(client: MlflowClient, uri: str) -> None:
    """Deliver the metrics of trainings that ended while their server was away."""
    folder = _folder(uri)
    for file in sorted(folder.glob("*.jsonl")) if folder is not None else ():
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # the last line of a training that was killed
                    rows = [(str(n), v, t, s) for n, v, t, s in json.loads(line)]
                    send(client, file.stem, rows)
            file.unlink(missing_ok=True)
        except OSError:
            continue
        except MlflowException as error:  # no reason to keep a command from its work
            warnings.warn(f"Metrics of run {file.stem} cannot be delivered: {error}", stacklevel=2)
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                with suppress(OSError):
                    file.rename(file.with_suffix(".undeliverable"))


def _folder(uri: str) -> Path | None:
    cache = writable_cache()
    if cache is None:
        return None
    return cache / "metrics" / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]


def _file(uri: str, run_id: str) -> Path | None:
    folder = _folder(uri)
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            return folder / f"{run_id}.jsonl"
    return None
