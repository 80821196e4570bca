"""The record of answers, as a killed service leaves it, and answers that are computed again."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import requests
from typer.testing import CliRunner

from bragg_data.store.repository import Store
from catalog import packages, registry
from catalog.packages import directory_of
from pipelines import predict, replay
from pipelines.prediction.examples import EXAMPLES
from pipelines.recording.record import FILE, Exchange, Record, RecordError
from pipelines.service import recorder
from pipelines.service.recorder import Answered
from pipelines.service.replay import _changed_snapshot
from tests.damage import chunk_file, flip
from tests.servers import server_at
from tests.small_store import TAG

if TYPE_CHECKING:
    from catalog.tracking import Tracking

PROFILE, CALIBRATION = EXAMPLES / "pseudo_experiment.xye", EXAMPLES / "pseudo_experiment.instprm"
NPY = {"Content-Type": "application/octet-stream"}


def exchange(number: int, body: bytes = b"body") -> Exchange:
    answer = {"cell": {"a": 4.0 + number}}
    return Exchange(f"r{number}", "/predict", body, {"n": 1}, [answer], [{"width": 0.1}], ["b"])


def test_the_oldest_requests_are_dropped_beyond_the_limit(tmp_path: Path) -> None:
    record = Record(tmp_path, 1.0, create=True)
    for number in range(30):
        record.write([exchange(number, bytes(100_000))])
    requests_left = [answer.request for answer in record.answers()]
    assert requests_left == [f"r{number}" for number in range(21, 30)]  # of 100,030 bytes each
    assert 900_000 < record.size <= 1_000_000
    assert record.input("r20") is None
    assert record.input("r29") == ("/predict", bytes(100_000))
    assert json.loads(record.find("r29-0")[0].answer) == {"cell": {"a": 33.0}}
    assert [answer.id for answer in record.answers(last=2)] == ["r28-0", "r29-0"]
    other = Record(tmp_path, create=True)  # as bragg predict --record opens it
    assert other.limit == 1_000_000
    assert other.write([exchange(30, bytes(1_000_001))]) == [False]
    other.close()
    assert len(record.answers()) == 9
    with pytest.raises(RecordError, match="no answer r3-0"):
        record.find("r3-0")
    record.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6e6
    with pytest.raises(RecordError, match="holds no record"):
        Record(tmp_path / "elsewhere")
    (tmp_path / FILE).write_bytes(bytes(5000))
    with pytest.raises(RecordError, match="cannot be used"):
        Record(tmp_path)


def test_answers_are_added_to_a_request_that_is_there(tmp_path: Path) -> None:
    record = Record(tmp_path, 1.0, create=True)
    whole = exchange(1)
    assert record.write([Exchange("r1", "/predict", b"body"), exchange(0)]) == [True, True]
    assert [answer.id for answer in record.answers()] == ["r0-0"]
    assert record.write([whole]) == [True]
    assert [answer.id for answer in record.answers()] == ["r1-0", "r0-0"]
    sizes = record._database.execute("SELECT size FROM requests").fetchall()
    assert sizes[0] == sizes[1]
    assert record.size == sizes[0][0] + sizes[1][0]


def test_the_record_is_readable_by_its_user_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Record(tmp_path, create=True).write([exchange(0)])
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    tmp_path.chmod(0o775)
    with pytest.warns(UserWarning, match="Others can write to the folder"):
        Record(tmp_path, create=True)


def test_what_waits_for_the_disk_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_MOST_WAITING", 10)

    async def main() -> list[bool]:
        waiting = recorder.Recorder(Record(tmp_path, create=True))
        put = [asyncio.ensure_future(waiting.put(Answered(exchange(k), ()))) for k in range(3)]
        await asyncio.sleep(0)
        assert waiting.counts.lost == 1  # of 4 bytes each
        return [future.done() for future in put]

    assert asyncio.run(main()) == [False, False, True]


def test_a_batch_is_recorded_with_its_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_MOST_BEGUN", 10)
    monkeypatch.setattr(recorder, "origin_of", lambda _: {"n": 1})
    record = Record(tmp_path, create=True)

    async def main() -> None:
        recording = recorder.Recorder(record)
        for k in range(3):  # of 4 bytes each: the first one's client has left for long
            recording.begin(Answered(Exchange(f"r{k}", "/predict", b"body"), ()))
        writing = asyncio.ensure_future(recording.run())
        whole = replace(exchange(2), batches=["r1.0:0:1 r2.0:0:1"])
        assert await recording.put(Answered(whole, ()))
        writing.cancel()

    asyncio.run(main())
    stored = [record.input(f"r{k}") for k in range(3)]
    assert stored == [None, ("/predict", b"body"), ("/predict", b"body")]
    assert [answer.id for answer in record.answers()] == ["r2-0"]


def replayed(folder: Path, tracking: str, *arguments: object) -> tuple[int, dict[str, Any]]:
    words = [*map(str, arguments), "--record", str(folder), "--tracking", tracking, "--json"]
    result = CliRunner().invoke(replay.app, words)
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(scope="module")
def served(
    trained: Tracking, small_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The record of a service that was killed, and the ids that its clients got."""
    folder = tmp_path_factory.mktemp("record")
    (name,) = registry.names(trained)
    (version,) = registry.versions(trained, name)
    profiles = small_store.open(TAG).intensity[:60].values
    tof = small_store.open(TAG).tof.values

    def post(address: str, k: int) -> list[str]:
        rows = profiles[k : k + 3]
        if k % 3 == 0:
            file = io.BytesIO()
            np.save(file, rows)
            body: dict[str, Any] = {"data": file.getvalue(), "headers": NPY}
            response = requests.post(f"{address}/predict/array", **body, timeout=60)
        elif k % 3 == 1:
            body = {"profiles": rows.tolist()}
            response = requests.post(f"{address}/predict", json=body, timeout=60)
        else:
            lines = "".join(f"{t:.6f} {y:.6e}\n" for t, y in zip(tof, rows[0], strict=True))
            body = {"text": f"# bin centres\n{lines}", "name": "sample.xy"}
            response = requests.post(f"{address}/predict/file", json=body, timeout=60)
        assert response.status_code == 200, response.text
        ids = [prediction["id"] for prediction in response.json()["predictions"]]
        header = ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
        assert response.headers["x-answer-id"] == header
        return ids

    where = "--tracking", trained.uri, "--model", version.uri, "--record", str(folder)
    with server_at("pipelines.serve", *where, answers="ready") as (address, server):
        with ThreadPoolExecutor(8) as pool:
            ids = [i for of in pool.map(lambda k: post(address, k), range(45)) for i in of]
        metrics = requests.get(f"{address}/metrics", timeout=5).text
        assert f"bragg_recorded {len(ids)}" in metrics
        server.kill()
    return folder, ids


@pytest.mark.slow
def test_every_answer_of_a_killed_service_is_computed_again_to_the_last_bit(
    served: tuple[Path, list[str]], trained: Tracking
) -> None:
    folder, ids = served
    assert len(ids) == len(set(ids)) == 105
    code, result = replayed(folder, trained.uri, *ids)
    assert [a["differences"] for a in result["answers"] if not a["same"]] == []
    assert (code, result["replayed"], result["same"]) == (0, 105, 105)
    record = Record(folder)
    batches = {answer.batch for answer in record.answers()}
    assert any(len(batch.split()) > 1 for batch in batches)  # of several requests together
    answer = record.answers(last=1)[0]
    origin = record.origin(answer.origin)
    assert origin["model"].startswith("models:/small")
    assert origin["snapshot"]["tag"] == TAG
    assert set(answer.statistics) >= {"width", "background", "noise", "accepted", "misfit"}


@pytest.mark.slow
def test_another_answer_is_named_with_what_changed(
    served: tuple[Path, list[str]], trained: Tracking, tmp_path: Path
) -> None:
    folder, ids = served
    mine = Path(shutil.copytree(folder, tmp_path / "record"))
    record = Record(mine)
    (answer,) = record.find(ids[0])
    document = json.loads(answer.answer)
    document["cell"]["a"] = np.nextafter(document["cell"]["a"], 9)
    origin = {**record.origin(answer.origin), "code": "0" * 40}
    origin["libraries"] = {**origin["libraries"], "numpy": "1.0"}
    changes = [
        ("UPDATE answers SET answer = ? WHERE request = ?", (json.dumps(document), answer.request)),
        ("UPDATE origins SET document = ?", (json.dumps(origin),)),
    ]
    with record._database as database:
        for change in changes:
            database.execute(*change)
    code, result = replayed(mine, trained.uri, ids[0])
    assert (code, result["same"]) == (1, 0)
    (only,) = result["answers"]
    assert any(line.startswith("cell.a: ") for line in only["differences"])
    changed = " ".join(only["changed"])
    assert f"code: {'0' * 40} then" in changed
    assert "library numpy: 1.0 then" in changed


def test_a_record_that_cannot_be_opened_costs_no_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("record").write_text("no folder", encoding="utf-8")
    words = [str(PROFILE), "--instrument", str(CALIBRATION), "--model", "packaged:batio3-nomad"]
    with pytest.warns(UserWarning, match="have no ids. The record record cannot be used"):
        result = CliRunner().invoke(predict.app, [*words, "--json", "--record", "record"])
    assert result.exit_code == 0
    assert [answer["id"] for answer in json.loads(result.stdout)] == [None]


def test_names_that_are_not_utf_8_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [os.fsdecode(b"Pr\xfcfling.xye"), "second.xye"]  # Latin-1
    for name in names:
        shutil.copy(PROFILE, name)
    words = [*names, "--instrument", str(CALIBRATION), "--model", "packaged:batio3-nomad"]
    words += ["--json", "--same-sample", "--record", "record"]
    done = CliRunner().invoke(predict.app, words)
    assert done.exit_code == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [answer["file"] for answer in answers] == names
    assert answers[0]["combined"] is not None
    ids = [answer["id"] for answer in answers]
    code, result = replayed(tmp_path / "record", "sqlite:///nowhere.db", *ids)
    assert [answer["differences"] for answer in result["answers"]] == [[], []]
    assert code == 0


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, str]:
    """A package of one's own, and a record of what bragg predict made of an example with it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    package = Path(shutil.copytree(directory_of("batio3-nomad"), tmp_path / "mine"))
    shutil.copy(PROFILE, "Probe_ü.xye")
    words = ["Probe_ü.xye", "--instrument", str(CALIBRATION), "--json", "--record", "record"]
    words += ["--model", f"packaged:{package}"]
    result = CliRunner().invoke(predict.app, [*words, "--refine"])
    assert result.exit_code == 0, result.stderr
    (prediction,) = json.loads(result.stdout)
    record = Record(Path("record"))
    record._database.execute(
        "CREATE TRIGGER full BEFORE INSERT ON requests BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    with pytest.warns(UserWarning, match="not recorded, and have no ids.*disk full"):
        result = CliRunner().invoke(predict.app, [*words, "missing.xye"])
    assert json.loads(result.stdout)[0]["cell"]["a"] == pytest.approx(prediction["cell"]["a"], 1e-3)
    assert json.loads(result.stdout)[0]["id"] is None
    record.close()
    return package, tmp_path / "record", prediction["id"]


def test_a_file_of_the_command_line_is_replayed_and_changed_bytes_are_named(
    packaged: tuple[Path, Path, str],
) -> None:
    package, folder, name = packaged
    nowhere = "sqlite:///nowhere.db"
    code, result = replayed(folder, nowhere, name)
    assert (code, result["answers"][0]["differences"]) == (0, [])
    weights = (package / "weights.safetensors").read_bytes()
    flip(package / "weights.safetensors", 0.9)
    code, result = replayed(folder, nowhere, name)
    assert (code, result["answers"][0]["same"]) == (1, None)
    assert result["answers"][0]["changed"] == [
        f"weights.safetensors of packaged:{package}: its SHA-256 is another one"
    ]
    (package / "weights.safetensors").write_bytes(weights)
    described = json.loads((package / "model.json").read_text(encoding="utf-8"))
    cifs = described["provenance"]["cifs"]
    name_of_phase = next(iter(cifs))
    cifs[name_of_phase] += "\n"
    (package / "model.json").write_text(json.dumps(described), encoding="utf-8")
    packages.Manifest.read(package).write(package)  # as if it were a package of its own
    code, result = replayed(folder, nowhere, name)
    assert code == 1
    assert f"CIF of {name_of_phase} in model.json: another text" in result["answers"][0]["changed"]
    described["provenance"]["campaign_toml"] = described["provenance"]["campaign_toml"].replace(
        "seed = ", "seed = 1", 1
    )
    cifs[name_of_phase] = cifs[name_of_phase][:-1]
    (package / "model.json").write_text(json.dumps(described), encoding="utf-8")
    packages.Manifest.read(package).write(package)
    code, result = replayed(folder, nowhere, name)
    assert (code, result["answers"][0]["changed"][1:2]) == (
        1,
        ["campaign in model.json: another text"],
    )


def test_a_changed_block_is_named(small_store: Store, tmp_path: Path) -> None:
    store = Store(shutil.copytree(small_store.path, tmp_path / "store"))
    attrs = store.open(TAG).attrs
    snapshot = {"uri": store.uri, "tag": TAG, "content": attrs["content_hash"]}
    assert list(_changed_snapshot({"snapshot": snapshot})) == []
    flip(chunk_file(store, TAG, 1))
    (change,) = _changed_snapshot({"snapshot": snapshot})
    assert change.startswith(f"snapshot {TAG}: ")
    assert "block 1" in change.lower()
