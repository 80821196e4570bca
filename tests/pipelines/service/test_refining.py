"""Refinements by the HTTP service, as a process: samples of several banks, files and phases."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
import requests

from bragg_data.instrument.peak_shape import peak, peak_shape
from catalog import packages
from pipelines.cli.options import ClusterOptions, ProfileOptions
from pipelines.prediction import load_model
from pipelines.prediction.distributed import predict_anywhere
from pipelines.prediction.result import json_schema, to_json
from pipelines.recording.record import Record
from pipelines.refinement.inputs import read_known_structures
from pipelines.service.app import Service
from pipelines.service.batching import ModelHolder, ServedModel
from pipelines.service.refining import RefinementWorkers, Setup
from pipelines.service.replay import Replayer
from tests.measured_banks import STRUCTURES, bank_of, bins, nomad, structure
from tests.servers import server_at

pytestmark = pytest.mark.slow
MODEL = "packaged:batio3-nomad"
FIRST = nomad()
SECOND = FIRST.with_parameters(bank=5, two_theta=123.4, difc=FIRST.difc * 1.002)
CALIBRATION = FIRST.section + SECOND.section
WEIGHTS = {"cubic": 78.0, "silicon": 22.0}


def gsas(banks: dict[int, np.ndarray], tof: np.ndarray) -> str:
    lines, step = ["Several banks"], float(np.log(tof[1] / tof[0]))
    tof = tof * np.exp(-step / 2)  # lower edges of bins
    for bank, counts in banks.items():
        lines += [
            f"# Total flight path 21.04m, tth {123.0 if bank == 5 else 122.3}deg",
            f"BANK {bank} {len(tof)} {len(tof)} SLOG {tof[0]:.3f} {tof[-1]:.3f} {step:.7f} 0 FXYE",
        ]
        lines += [
            f"{t:.4f} {y:.1f} {max(y, 1) ** 0.5:.4f}" for t, y in zip(tof, counts, strict=True)
        ]
    return "\n".join(lines) + "\n"


def counted(phases: dict[str, float], bank: Any, tof: np.ndarray) -> np.ndarray:
    """Counts of barium titanate and further phases, by weight."""
    cubic = next(p for p in load_model(MODEL).predictor.campaign.phases if p.name == "cubic")
    structures = {name: cubic if name == "cubic" else structure(name) for name in phases}
    cells = {"cubic": [4.01], "silicon": [5.4321]}
    samples = [
        (
            structures[name],
            cells[name],
            {"size": 2.0, "microstrain": 900.0, "amount": weight / structures[name].cell_mass},
        )
        for name, weight in phases.items()
    ]
    profile = bank_of(samples, bank, tof, counts=8000, seed=bank.bank).profile
    return np.asarray(profile.intensity)


@pytest.fixture(scope="module")
def tof() -> np.ndarray:
    return bins(4000.0, 18_000.0, 1e-3)


@pytest.fixture(scope="module")
def sample(tof: np.ndarray) -> str:
    """Barium titanate with silicon on two banks."""
    return gsas({bank.bank: counted(WEIGHTS, bank, tof) for bank in (FIRST, SECOND)}, tof)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structures")
    shutil.copy(STRUCTURES / "silicon.cif", folder)
    (folder / "broken.cif").write_text("no structure")
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def server(folder: Path, record: Path) -> Iterator[tuple[str, psutil.Process]]:
    options = ("--model", MODEL, "--phases", str(folder), "--record", str(record))
    with (
        tempfile.TemporaryFile() as log,
        server_at("pipelines.serve", *options, answers="ready", log=log) as (url, process),
    ):
        yield url, psutil.Process(process.pid)


def post(url: str, **document: Any) -> requests.Response:
    return requests.post(f"{url}/predict/file", json=document, timeout=120)


def seconds_of(server: psutil.Process) -> float:
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(used.user for used in times)


def test_the_first_refinement_is_no_slower_than_later_ones(
    server: tuple[str, psutil.Process], tof: np.ndarray
) -> None:
    text = gsas({4: counted({"cubic": 100.0}, FIRST, tof)}, tof)
    seconds = []  # of the processor
    for _ in range(3):
        before = seconds_of(server[1])
        (result,) = post(server[0], text=text, refine=True).json()["predictions"]
        seconds.append(seconds_of(server[1]) - before)
        assert result["refined"]["phase"] == "cubic"
        assert abs(result["cell"]["a"] - 4.01) < 0.002
    assert seconds[0] < 2 * max(seconds[1:]) + 0.5


def test_random_lines_are_not_refined(server: tuple[str, psutil.Process], tof: np.ndarray) -> None:
    d = np.random.default_rng(2).uniform(0.4, 2.4, 20)
    position = FIRST.tof_from_d_spacing(d)
    shape = peak_shape(FIRST, d, size=2.0, microstrain=900.0)
    lines = (peak(tof[:, None] - position, shape) * position).sum(axis=1)
    counts = np.random.default_rng(3).poisson(3000 * lines / lines.max() + 100)
    document = {"text": gsas({4: counts}, tof), "refine": True}
    (result,) = post(server[0], **document).json()["predictions"]
    assert result["accepted"] is False
    assert (result["refined"], result["mixture"]) == (None, None)
    assert any("neither where those of the model's" in warning for warning in result["warnings"])
    # With structures to search for it is searched.
    (result,) = post(server[0], **document, phases=True).json()["predictions"]
    assert result["mixture"] is not None


@pytest.mark.parametrize("phases", [False, True])
def test_a_sample_of_two_banks_is_refined_as_by_the_command(
    server: tuple[str, psutil.Process], sample: str, folder: Path, tmp_path: Path, phases: bool
) -> None:
    document = {"text": sample, "instrument": CALIBRATION, "name": "mine.gsa", "refine": True}
    answer = post(server[0], **document, phases=phases)
    assert answer.status_code == 200, answer.text
    file, instrument = tmp_path / "mine.gsa", tmp_path / "two.instprm"
    file.write_text(sample)
    instrument.write_text(CALIBRATION)
    results, _, _ = predict_anywhere(
        [file],
        ProfileOptions(instrument),
        [load_model(MODEL)],
        ClusterOptions(cluster=None),
        refine=True,
        further=read_known_structures([folder])[0] if phases else (),
    )
    expected = json.dumps([to_json(result) for result in results])
    expected = expected.replace(str(file), "mine.gsa").replace(f"{tmp_path}/", "")
    predictions = answer.json()["predictions"]
    for prediction in predictions:
        jsonschema.validate(prediction, json_schema())
    without_time(predictions, documents := json.loads(expected))
    ids = [prediction.pop("id") for prediction in predictions]
    assert all(ids) == (not phases)  # whose structures no record holds
    assert predictions == [{k: v for k, v in d.items() if k != "id"} for d in documents]
    assert predictions[0]["combined"]["banks"] == ["Bank 4", "Bank 5"]
    identified = {p["name"]: p for p in predictions[0]["mixture"]["phases"]}
    assert ("silicon" in identified) == phases
    if phases:
        silicon = identified["silicon"]
        assert abs(silicon["weight_percent"] - 22.0) < 4 * silicon["su_weight_percent"] < 3


def without_time(*documents: Any) -> None:
    """Remove the seconds that refinements took."""
    for document in documents:
        if isinstance(document, dict):
            document.pop("seconds", None)
        if isinstance(document, dict | list):
            without_time(*(document.values() if isinstance(document, dict) else document))


@pytest.mark.parametrize("refine", [False, True])
def test_files_of_a_sample_are_its_banks(
    server: tuple[str, psutil.Process], record: Path, tof: np.ndarray, refine: bool
) -> None:
    files = [
        {"text": gsas({bank.bank: counted({"cubic": 100.0}, bank, tof)}, tof), "name": name}
        for bank, name in ((FIRST, "a.gsa"), (SECOND, "b.gsa"))
    ]
    rng = np.random.default_rng(0)
    noise = {"text": gsas({4: rng.poisson(400.0, len(tof))}, tof), "name": "noise.gsa"}
    document = {"instrument": CALIBRATION, "refine": refine}
    answer = post(server[0], files=[*files, noise], **document)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["predictions"]
    assert [first["file"], second["file"]] == ["a.gsa", "b.gsa"]
    assert first["combined"] == second["combined"]
    assert first["combined"]["banks"] == ["Bank 4", "Bank 5"]
    assert any("left out: noise.gsa" in warning for warning in first["warnings"])
    assert "/tmp" not in answer.text
    replayer = Replayer(Record(record), None)
    replays = [replayer.replay(replayer.record.find(p["id"])[0]) for p in (first, second)]
    assert [(replay.same, replay.differences) for replay in replays] == [(True, ())] * 2
    if refine:
        (phase,) = first["combined"]["joint"]["phases"]
        assert abs(phase["cell"]["a"] - 4.01) < 0.002
        # The time limit is the recorded one: with another limit it is another answer.
        (stored,) = replayer.record.find(first["id"])
        assert stored.batch == "refined 10.0"
        hurried = Replayer(replayer.record, None).replay(replace(stored, batch="refined 0.001"))
        assert any("ended at its time limit" in difference for difference in hurried.differences)
    refused = post(server[0], files=[noise], **document)
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("noise.gsa")


def test_answers_of_a_model_for_each_bank_are_replayed(tmp_path: Path, sample: str) -> None:
    loaded = []
    for name, calibration in (("first", FIRST), ("second", SECOND)):
        package = Path(shutil.copytree(packages.directory_of("batio3-nomad"), tmp_path / name))
        described = json.loads((package / "model.json").read_text(encoding="utf-8"))
        described["provenance"]["instrument_instprm"] = calibration.section
        (package / "model.json").write_text(json.dumps(described), encoding="utf-8")
        packages.Manifest.read(package).write(package)
        loaded.append(load_model(f"packaged:{package}"))
    record = Record(tmp_path / "record", create=True)
    workers = RefinementWorkers(0, Setup())
    service = Service(ModelHolder("", None), 1.0, 1000, workers, record)
    service.holder.banks = tuple(ServedModel(m.version, m.predictor) for m in loaded)
    body = json.dumps({"text": sample, "instrument": CALIBRATION, "name": "mine.gsa"}).encode()

    async def answers() -> list[dict[str, Any]]:
        recorder = service._recorder
        assert recorder is not None
        running = [asyncio.ensure_future(w.run()) for w in (service._batcher, recorder)]
        responses = await asyncio.gather(*(service.predict_file(body) for _ in range(3)))
        for task in running:
            task.cancel()
        return [p for r in responses for p in json.loads(bytes(r.body))["predictions"]]

    predictions = asyncio.run(answers())
    assert [p["bank"] for p in predictions] == [4, 5] * 3
    assert {p["model"] for p in predictions} == {m.version.uri for m in loaded}
    stored = record.answers()
    assert {p["id"] for p in predictions} == {answer.id for answer in stored}
    assert any(len(answer.batch.split()) > 1 for answer in stored)  # of several requests
    replays = [Replayer(record, None).replay(answer) for answer in stored]
    assert [(replay.same, replay.differences) for replay in replays] == [(True, ())] * 6


def test_what_cannot_be_refined_is_refused_with_a_sentence(
    server: tuple[str, psutil.Process], sample: str
) -> None:
    for document, message in (
        ({"text": sample, "phases": True}, "set it to true"),
        ({"text": sample, "files": [{"text": sample}]}, "give the file as text"),
        ({"files": []}, "files"),
        ({"files": [{"text": sample, "data": "MQ=="}]}, "files.0"),
        ({"text": "no numbers", "refine": True, "name": "mine.txt"}, "mine.txt"),
        ({"text": sample, "refine": True, "bank": 9}, "bank 9"),
    ):
        answer = post(server[0], **document)
        assert answer.status_code == 422
        assert message in answer.json()["detail"]
        assert "/tmp" not in answer.text


def waiting(url: str) -> float:
    lines = requests.get(f"{url}/metrics", timeout=5).text.splitlines()
    return float(next(x.split()[1] for x in lines if x.startswith("bragg_refinements_waiting")))


def until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_refinement_for_a_client_that_leaves_ends_and_a_lost_process_is_replaced(
    server: tuple[str, psutil.Process], sample: str
) -> None:
    url, process = server
    document = {"text": sample, "instrument": CALIBRATION, "refine": True, "phases": True}
    assert "silicon" in requests.get(f"{url}/model", timeout=5).json()["searched"]
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{url}/predict/file", json=document, timeout=0.3)
    until(lambda: waiting(url) == 0, 3)
    with ThreadPoolExecutor(1) as pool:
        began = pool.submit(post, url, **document)
        until(lambda: waiting(url) == 1, 60)
        time.sleep(0.2)
        (worker,) = (c for c in process.children() if "isolated_process" in " ".join(c.cmdline()))
        worker.kill()
        lost = began.result()
    assert lost.status_code == 503
    assert "SIGKILL" in lost.json()["detail"]
    assert post(url, **document).status_code == 200


def test_a_refinement_ends_at_its_time_limit_and_the_service_with_it(sample: str) -> None:
    options = ("--model", MODEL, "--time-limit", "0.1")
    with (
        tempfile.TemporaryFile() as log,
        server_at("pipelines.serve", *options, answers="ready", log=log) as (url, process),
    ):
        document = {"text": sample, "instrument": CALIBRATION, "refine": True}
        answer = post(url, **document)
        first, _ = answer.json()["predictions"]
        assert first["refined"] is None
        sentence = "Not refined: It was ended at its time limit of 0."  # 0.1 s, 0.6 s of a request
        assert any(warning.startswith(sentence) for warning in first["warnings"])
        assert "its time limit of" in first["combined"]["not_joint"]
        assert first["phase"]
        refused = post(url, **document, phases=True)
        assert "--phases FOLDER" in refused.json()["detail"]
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.terminate()
        process.wait(20)
        until(lambda: not any(child.is_running() for child in children), 60)
