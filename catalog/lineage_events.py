"""OpenLineage events: what was made of what, sent wherever the environment names a place for them.

The variables are those of the official client (``OPENLINEAGE_URL``, ``OPENLINEAGE_CONFIG``,
``OPENLINEAGE__TRANSPORT__…``), which is the optional dependency ``bragg[lineage]``. Without them
nothing happens. Events are sent in the background: a server that is slow or away costs the work
nothing but a warning, and up to two seconds when the process ends.
"""

import atexit
import logging
import os
import threading
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import xarray as xr

from bragg_data.errors import first_line

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

_NAMESPACE = "OPENLINEAGE_NAMESPACE"  # of the jobs, bragg by default
_PATIENCE = 2.0  # seconds that the end of a process waits for events on their way
_PLACES = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT")


@dataclass(frozen=True)
class LineageDataset:
    """What a job reads or writes: a data set, a model or a file, where it lies, and its version."""

    place: str  # a path, or the URI of a store or registry; its user and password are left out
    name: str = ""  # within the place
    version: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    rows: int | None = None  # written

    @classmethod
    def of_snapshot(cls, dataset: xr.Dataset) -> Self:
        """Return a data set of a store, as it was opened."""
        attrs = dataset.attrs
        facts = {key: str(attrs[key]) for key in ("content_hash", "simulator") if key in attrs}
        rows = int(dataset.sizes["sample"])
        return cls(attrs["uri"], attrs["tag"], attrs["snapshot_id"], facts, rows)

    @property
    def namespace(self) -> str:
        """What the names of datasets of one kind and host have in common."""
        parts = urlsplit(self.place)
        if "://" not in self.place or parts.hostname is None:
            return "file"
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}"

    @property
    def path(self) -> str:
        """The name in the namespace, which begins with the path of the place."""
        # In the path of a file ? and # mean themselves.
        place = urlsplit(self.place).path if "://" in self.place else self.place
        path = place.strip("/")
        return "/" + "/".join(part for part in (path, self.name) if part)


@dataclass
class LineageRun:
    """A run of a job, a context manager: it emits START, then COMPLETE, FAIL or ABORT.

    Inputs and outputs may be added until it ends, and the ``error`` of a part that failed.
    """

    job: str
    inputs: list[LineageDataset] = field(default_factory=list)
    outputs: list[LineageDataset] = field(default_factory=list)
    error: str = ""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __enter__(self) -> Self:
        self._emit("START")
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if error is None:
            self._emit("FAIL" if self.error else "COMPLETE", self.error)
        elif isinstance(error, Exception):
            self._emit("FAIL", first_line(error))
        else:  # Ctrl-C or SIGTERM
            self._emit("ABORT")

    def _emit(self, state: str, error: str = "") -> None:
        if is_configured():
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            done = tuple(self.inputs), tuple(self.outputs)
            _sender().put(_Event(state, now, self.id, self.job, *done, error))


@dataclass(frozen=True)
class _Event:
    state: str
    time: str
    run_id: str
    job: str
    inputs: tuple[LineageDataset, ...]
    outputs: tuple[LineageDataset, ...]
    error: str


def is_configured() -> bool:
    """Return whether the environment names a place for events."""
    disabled = os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true"
    return not disabled and any(name.startswith(_PLACES) for name in os.environ)


class _Sender:
    """Sends events one after the other, in a thread of its own; warns once if that fails."""

    def __init__(self) -> None:
        self._events: SimpleQueue[_Event | None] = SimpleQueue()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="lineage", daemon=True)
        self._thread.start()

    def put(self, event: _Event) -> None:
        self._events.put(event)

    def _work(self) -> None:
        try:
            from openlineage.client.client import OpenLineageClient

            for name in ("openlineage", "urllib3"):  # one warning says it all
                logging.getLogger(name).setLevel(logging.CRITICAL)
            # Where this project is a folder of another repository, that is not its source.
            here = {"facets": {"source_code_location": {"disabled": True}}}
            client = OpenLineageClient(config=here)
        except ModuleNotFoundError:
            self._warn("openlineage-python is not installed: pip install 'bragg[lineage]'")
            return
        except Exception as error:
            self._warn(f"the configuration of OpenLineage is not valid ({first_line(error)})")
            return
        while (event := self._events.get()) is not None:
            try:
                client.emit(_official(event))
            except Exception as error:
                self._warn(first_line(error))
        client.close(_PATIENCE)

    def finish(self) -> None:
        self._events.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._warn(f"no answer within {_PATIENCE:g} s")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"Lineage events are lost: {reason}. The work goes on.", stacklevel=2)


@cache
def _sender() -> _Sender:
    return _Sender()


@atexit.register
def finish() -> None:
    """Wait until the events of this process are sent, for two seconds at most."""
    if _sender.cache_info().currsize:
        _sender().finish()
        _sender.cache_clear()


def _official(event: _Event) -> "RunEvent":
    """Return an event in the client's own classes, which are made from OpenLineage's schema."""
    from openlineage.client import event_v2 as api
    from openlineage.client import facet_v2 as facets

    version = metadata.version("bragg")
    producer = f"bragg:{version}"  # a URI

    def dataset_facets(item: LineageDataset) -> dict[str, facets.DatasetFacet]:
        by_name: dict[str, facets.DatasetFacet] = {}
        if item.version:
            versioned = facets.dataset_version_dataset.DatasetVersionDatasetFacet
            by_name["version"] = versioned(item.version, producer=producer)
        if item.facts:
            tag = facets.tags_dataset.TagsDatasetFacetFields
            tags = [tag(key, value, "BRAGG") for key, value in item.facts.items()]
            by_name["tags"] = facets.tags_dataset.TagsDatasetFacet(tags, producer=producer)
        return by_name

    def output(item: LineageDataset) -> api.OutputDataset:
        counts = facets.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet
        rows = {"outputStatistics": counts(item.rows, producer=producer)} if item.rows else {}
        return api.OutputDataset(item.namespace, item.path, rows, facets=dataset_facets(item))

    engine = facets.processing_engine_run.ProcessingEngineRunFacet
    run: dict[str, facets.RunFacet] = {
        "processing_engine": engine(version, "bragg", producer=producer)
    }
    if event.error:
        message = facets.error_message_run.ErrorMessageRunFacet
        run["errorMessage"] = message(event.error, "python", producer=producer)
    kind = facets.job_type_job.JobTypeJobFacet("BATCH", "BRAGG", "JOB", producer=producer)
    return api.RunEvent(
        eventType=api.RunState(event.state),
        eventTime=event.time,
        run=api.Run(event.run_id, run),
        job=api.Job(os.environ.get(_NAMESPACE, "bragg"), event.job, {"jobType": kind}),
        inputs=[
            api.InputDataset(item.namespace, item.path, facets=dataset_facets(item))
            for item in event.inputs
        ],
        outputs=[output(item) for item in event.outputs],
        producer=producer,
    )
