"""OpenLineage events of real runs: valid, connected by name and version, and never in the way."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import xarray as xr
from typer.testing import CliRunner

from bragg_data.store.repository import Store
from catalog import lineage_events, registry
from catalog.lineage_events import LineageDataset, LineageRun
from catalog.tracking import Tracking
from pipelines import predict
from pipelines.simulation.campaign import SimulationJob, simulate_campaign
from tests.servers import ROOT
from tests.small_bench import train_multitask
from tests.tiny_campaign import tiny_campaign

_FACETS = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["_producer", "_schemaURL"],
        "properties": {key: {"type": "string", "format": "uri"} for key in ("_producer",)},
    },
}
_NAMED = {
    "type": "object",
    "required": ["namespace", "name"],
    "properties": {"namespace": {"type": "string", "minLength": 1}, "facets": _FACETS},
}
# What OpenLineage's specification 2-0-2 requires of a run event.
SCHEMA = {
    "type": "object",
    "required": ["eventTime", "producer", "schemaURL", "run", "job", "eventType"],
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "format": "date-time"},
        "producer": {"type": "string", "format": "uri"},
        "schemaURL": {
            "const": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
        },
        "run": {
            "required": ["runId"],
            "properties": {"runId": {"type": "string", "format": "uuid"}, "facets": _FACETS},
        },
        "job": _NAMED,
        "inputs": {"type": "array", "items": _NAMED},
        "outputs": {"type": "array", "items": _NAMED},
    },
}

Event = dict[str, Any]
Events = Callable[[], list[Event]]


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    """Send the events of this process to a file; the function reads those that came."""
    pytest.importorskip("openlineage.client")
    file = tmp_path / "events.jsonl"
    for key, value in {"TYPE": "file", "LOG_FILE_PATH": str(file), "APPEND": "true"}.items():
        monkeypatch.setenv(f"OPENLINEAGE__TRANSPORT__{key}", value)

    def read() -> list[Event]:
        lineage_events.finish()
        sent = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        check = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
        for event in sent:
            check.validate(event)
        return sent

    yield read
    lineage_events.finish()


def _identity(dataset: Event) -> tuple[str, str, str]:
    return dataset["namespace"], dataset["name"], dataset["facets"]["version"]["datasetVersion"]


def test_a_run_of_mlflow_names_what_it_read_under_the_same_id(
    events: Events, small_dataset: xr.Dataset, tracking_in: Any, tmp_path: Path
) -> None:
    tracking = tracking_in(tmp_path)
    tags = {"mlflow.source.name": "pipelines.evaluate"}
    with tracking.run("small", "some", tags) as run:
        run.log_dataset(small_dataset, "evaluation")
    start, complete = events()
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert complete["job"]["name"] == "evaluate.small"
    assert {e["run"]["runId"].replace("-", "") for e in (start, complete)} == {run.id}
    (read,) = complete["inputs"]
    attrs = small_dataset.attrs
    path = attrs["uri"].removeprefix("file://")
    assert _identity(read) == ("file", f"{path}/small-v1", attrs["snapshot_id"])
    tags = {tag["key"]: tag["value"] for tag in read["facets"]["tags"]["tags"]}
    assert tags["content_hash"] == attrs["content_hash"]


@pytest.mark.parametrize(
    ("error", "state"), [(ValueError("no peaks\nmore"), "FAIL"), (KeyboardInterrupt(), "ABORT")]
)
def test_the_state_of_a_run_that_fails(events: Events, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), LineageRun("predict"):
        raise error
    last = events()[-1]
    assert last["eventType"] == state
    message = last["run"]["facets"].get("errorMessage", {}).get("message")
    assert message == ("no peaks" if state == "FAIL" else None)


def test_a_run_that_failed_in_part(events: Events) -> None:
    with LineageRun("predict") as run:
        run.error = "2 of 3 files have no prediction"
    assert [event["eventType"] for event in events()] == ["START", "FAIL"]


def test_files_keep_all_of_their_names() -> None:
    assert LineageDataset("/data/run#12?.gsa").path == "/data/run#12?.gsa"
    assert LineageDataset("/data/run#12?.gsa").namespace == "file"


def test_names_have_no_password() -> None:
    stored = LineageDataset("s3://user:SECRET@store.org:9000/data/store", "tag-v1")
    assert (stored.namespace, stored.path) == ("s3://store.org:9000", "/data/store/tag-v1")
    assert LineageDataset("sqlite:////data/mlflow.db", "small").path == "/data/mlflow.db/small"


@pytest.mark.training
@pytest.mark.cluster
def test_the_chain_from_a_campaign_to_a_prediction(
    events: Events, small_store: Store, tracking_in: Any, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", create=True)
    tag = simulate_campaign(SimulationJob(tiny_campaign(tmp_path), "kinematic"), store)
    tracking: Tracking = tracking_in(tmp_path)
    train_multitask(small_store, tracking)  # and promote it, as the first version
    (version,) = registry.versions(tracking, "small")
    example = ROOT / "pipelines/examples/pseudo_experiment.xye"
    where = ["--tracking", tracking.uri, "--model", version.uri, "--no-library", "--json"]
    CliRunner().invoke(predict.app, [str(example), *where], catch_exceptions=False)

    ended = {e["job"]["name"]: e for e in events() if e["eventType"] != "START"}
    assert set(ended) == {"simulate.tiny", "train.small", "promote.small", "predict"}
    assert {e["eventType"] for e in ended.values()} == {"COMPLETE"}
    (simulated,) = ended["simulate.tiny"]["outputs"]
    assert _identity(simulated) == ("file", f"{tmp_path}/store/{tag.name}", tag.snapshot_id)
    rows = store.open(tag.name).sizes["sample"]
    assert simulated["outputFacets"]["outputStatistics"]["rowCount"] == rows
    (data,), (model,) = (ended["train.small"][side] for side in ("inputs", "outputs"))
    assert _identity(data)[2] == small_store.open("small-v1").attrs["snapshot_id"]
    assert _identity(model) == ("file", f"{tmp_path}/mlflow.db/small", "1")
    assert ended["train.small"]["run"]["runId"].replace("-", "") == version.run_id
    assert [_identity(i) for i in ended["promote.small"]["inputs"]] == [_identity(model)]
    (champion,) = ended["promote.small"]["outputs"]
    assert _identity(champion) == ("file", f"{tmp_path}/mlflow.db/small@champion", "1")
    used, file = ended["predict"]["inputs"]
    assert _identity(used) == _identity(model)
    assert file["name"] == str(example)


def _run_with(url: str) -> tuple[str, float]:
    """Run two jobs in a process that sends to a URL; return its standard error and seconds."""
    code = (
        "from catalog.lineage_events import LineageRun\n"
        "for job in 'ab':\n"
        "    with LineageRun(job): pass\n"
        "print('done')"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OPENLINEAGE_URL": url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "done\n"
    return done.stderr, time.monotonic() - began


@pytest.mark.parametrize("kind", ["refuses", pytest.param("is silent", marks=pytest.mark.slow)])
def test_a_dead_server_costs_a_warning(kind: str) -> None:
    pytest.importorskip("openlineage.client")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refuses":
            server.close()
        printed, seconds = _run_with(url)
    assert printed.count("Lineage events are lost") == 1
    assert "Traceback" not in printed
    assert seconds < 25  # its retries alone would take longer; the end waits for two seconds


def test_without_the_client_a_warning_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "openlineage.client.client", None)
    run = LineageRun("predict")
    with pytest.warns(UserWarning, match=r"pip install 'bragg\[lineage\]'"), run:
        lineage_events.finish()
    lineage_events.finish()
