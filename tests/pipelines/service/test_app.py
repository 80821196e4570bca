"""The HTTP service, as a process: predictions, refusals, and a change of the champion."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import requests

from bragg_data import preprocessing
from bragg_data.campaign import BUILT_IN, Campaign
from bragg_data.measurement.load import Measurement
from bragg_data.store.repository import Store
from catalog import registry
from catalog.tracking import Tracking
from pipelines import serve
from pipelines.cli.options import ProfileOptions
from pipelines.prediction.workflow import FILE_ERRORS, read_measurements
from pipelines.service.app import create_app
from pipelines.service.batching import ModelHolder
from tests.bragg_data.instrument.test_gsas_iparm import prm, records
from tests.fuzzing.service import fuzz
from tests.pipelines.service.test_batching import BrokenTracking
from tests.servers import ROOT, answered, free_port, server_at, serving

if TYPE_CHECKING:
    from tests.small_bench import Bench


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bench_of_service(bench: Bench, everything: str) -> Bench:
    assert everything
    registry.set_alias(bench.tracking, bench.versions("multitask")[0], registry.CHAMPION)
    return bench


@pytest.fixture(scope="module")
def address(bench_of_service: Bench) -> Iterator[str]:
    options = ("--workers", "0", "--refresh", "0.2", "--max-megabytes", "2")
    tracking = ("--tracking", bench_of_service.tracking.uri)
    with serving("pipelines.serve", *tracking, *options, answers="ready") as url:
        yield url


def profiles_of(store: Store, count: int) -> np.ndarray:
    return np.asarray(store.open("small-v1").intensity[:count].values)


def post(address: str, profiles: Any, path: str = "predict") -> requests.Response:
    return requests.post(f"{address}/{path}", json={"profiles": profiles}, timeout=30)


def test_it_describes_itself(address: str, bench_of_service: Bench) -> None:
    assert requests.get(f"{address}/health", timeout=5).json() == {"status": "alive"}
    ready = requests.get(f"{address}/ready", timeout=5).json()
    assert ready["uri"] == bench_of_service.versions("multitask")[0].uri
    assert ready["refresh_error"] is None
    assert ready["refreshed_at"].startswith("20")
    about = requests.get(f"{address}/model", timeout=5).json()
    assert (about["points"], about["tof"]["start"]) == (800, 6000.0)
    assert about["phases"] == {n: n for n in ("cubic", "tetragonal", "trigonal")}
    assert about["units"]["a"] == "Å"
    paths = requests.get(f"{address}/openapi.json", timeout=5).json()["paths"]
    predictions = {"/predict", "/predict/array", "/predict/file"}
    assert set(paths) == {"/health", "/ready", "/model", *predictions}


def post_array(address: str, body: bytes) -> requests.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(f"{address}/predict/array", data=body, headers=headers, timeout=30)


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def test_an_array_is_predicted_as_its_json_is(address: str, bench_of_service: Bench) -> None:
    profiles = profiles_of(bench_of_service.store, 5)
    expected = post(address, profiles.tolist()).json()
    assert post_array(address, npy(profiles)).json() == expected
    by_column = np.asfortranarray(profiles.astype(np.float64))
    assert post_array(address, npy(by_column)).json() == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no NPY file"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "no NPY file"),
        (npy(np.array([{}, 1], dtype=object), allow_pickle=True), "no NPY file"),
        (pickle.dumps([1.0] * 800), "no NPY file"),
        (npy(np.ones((2, 801))), "of shape \\(2, 801\\)"),
        (npy(np.ones((0, 800))), "of shape \\(0, 800\\)"),
        (npy(np.float64(1.0)), "of shape \\(\\)"),
        (npy(np.ones((2, 800), dtype=int)), "the file holds int64"),
        (npy(np.full((2, 800), np.nan)), "not finite"),
        (npy(np.full((2, 800), 1e300)), "not finite"),
        (npy(np.ones((2, 800)))[:-1], "no NPY file"),
        (npy(np.ones((2, 800))).replace(b"'<f8'", b"'<f8 "), "no NPY file"),
        (npy(np.ones((2, 800))).replace(b"(2, 800)", b"(9, 800)"), "no NPY file"),
        (npy(np.ones((1, 800))).replace(b"(1, 800), }   ", b"(True, 800), }"), "."),
        (npy(np.ones((2, 800))).replace(b"(2, 800)", b"(9" + 15 * b"0" + b", 800)"), "no NPY file"),
    ],
)
def test_a_bad_array_is_refused(address: str, body: bytes, message: str) -> None:
    answer = post_array(address, body)
    assert answer.status_code == 422
    assert re.search(message, answer.json()["detail"])


def test_hosts_ids_metrics_and_docs(address: str, bench_of_service: Bench) -> None:
    foreign = requests.get(f"{address}/ready", headers={"Host": "example.org:80"}, timeout=5)
    assert foreign.status_code == 400
    assert "--allowed-host" in foreign.json()["detail"]
    for host in ("localhost", "127.0.0.1:1", "[::1]:8080"):
        assert requests.get(f"{address}/ready", headers={"Host": host}, timeout=5).ok
    mine = requests.get(f"{address}/health", headers={"X-Request-Id": "mine-1"}, timeout=5)
    assert mine.headers["x-request-id"] == "mine-1"
    unsafe = requests.get(f"{address}/health", headers={"X-Request-Id": "a b"}, timeout=5)
    assert re.fullmatch("[0-9a-f]{16}", unsafe.headers["x-request-id"])
    before = metrics_of(address)
    assert post(address, profiles_of(bench_of_service.store, 3).tolist()).ok
    after = metrics_of(address)
    assert after["bragg_profiles_total"] - before["bragg_profiles_total"] == 3
    served = 'bragg_requests_total{path="/predict",status="200"}'
    assert after[served] - before.get(served, 0) == 1
    assert after['bragg_request_seconds_bucket{path="/predict",le="+Inf"}'] >= after[served]
    assert (after["bragg_profiles_waiting"], after["bragg_requests_active"]) == (0, 1)
    page = requests.get(f"{address}/docs", timeout=5)
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text)


def metrics_of(address: str) -> dict[str, float]:
    text = requests.get(f"{address}/metrics", timeout=5).text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_long_json_does_not_delay_other_requests(address: str) -> None:
    body = json.dumps({"profiles": [[0.5] * 800] * 480})
    answers = 0
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(requests.post, f"{address}/predict", data=body, timeout=60)
        while not posted.done():
            answers += requests.get(f"{address}/health", timeout=5).ok
    assert answers > 10  # two, if it is read where requests are answered


def test_half_open_connections_are_closed(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for _ in range(50)
        ]
        for connection in idle[::2]:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n")
        assert requests.get(f"{address}/health", timeout=5).ok
        assert [connection.recv(1) for connection in idle] == [b""] * len(idle)


def test_it_predicts_as_the_model_does(address: str, bench_of_service: Bench) -> None:
    profiles = profiles_of(bench_of_service.store, 5)
    expected = bench_of_service.predictor("multitask").predict(profiles)
    response = post(address, profiles.tolist()).json()
    assert response["model"]["kind"] == "multitask"
    assert len(response["predictions"]) == 5
    for row, prediction in enumerate(response["predictions"]):
        cell = [prediction["cell"][n] for n in ("a", "b", "c", "alpha", "beta", "gamma")]
        np.testing.assert_allclose(cell, expected.cells[row], rtol=1e-5)
        assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert prediction["phase"] == ("cubic", "tetragonal", "trigonal")[expected.phase[row]]


def test_many_small_requests_at_once_get_their_predictions(
    address: str, bench_of_service: Bench
) -> None:
    profiles = profiles_of(bench_of_service.store, 40)
    expected = bench_of_service.predictor("multitask").predict(profiles)
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda row: post(address, [profiles[row].tolist()]), range(40)))
    for row, response in enumerate(responses):
        assert response.status_code == 200
        a = response.json()["predictions"][0]["cell"]["a"]
        assert a == pytest.approx(expected.cells[row, 0], rel=1e-5)


def test_a_file_on_another_grid(address: str, bench_of_service: Bench) -> None:
    dataset = bench_of_service.store.open("small-v1")
    columns = np.column_stack([dataset.tof.values, dataset.intensity[0].values])
    text = "\n".join(f"{t:.4f} {y:.6e}" for t, y in columns)
    body = {"text": text, "name": "sample.xy"}
    response = requests.post(f"{address}/predict/file", json=body, timeout=30)
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["predictions"]
    assert prediction["cell"]["a"] > 0
    assert prediction["file"] == "sample.xy"
    assert any("calibration" in warning for warning in prediction["warnings"])


@pytest.mark.parametrize("name", ["..", ".", "/", "漢" * 200, "calibration.instprm", "a/b"])
def test_any_name_of_a_file_is_only_a_name(
    address: str, bench_of_service: Bench, name: str
) -> None:
    dataset = bench_of_service.store.open("small-v1")
    columns = np.column_stack([dataset.tof.values, dataset.intensity[0].values])
    body = {
        "text": "# bin centres\n" + "\n".join(f"{t:.4f} {y:.6e}" for t, y in columns),
        "instrument": (BUILT_IN / "nomad_bank4.instprm").read_text(),
    }
    response = requests.post(f"{address}/predict/file", json=body | {"name": name}, timeout=30)
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["predictions"]
    assert prediction["file"] == name
    default = requests.post(f"{address}/predict/file", json=body, timeout=30)
    assert prediction["cell"] == default.json()["predictions"][0]["cell"]
    assert prediction["warnings"] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"profiles": [[1.0, 2.0]]}, r"profiles of 800 points; got \[2\]"),
        ({"profiles": []}, "at least 1 item"),
        ({"profiles": [["x"] * 800]}, "valid number"),
        ({"profiles": [[0.0] * 800]}, "no signal"),
        ({"profiles": [[1.0] * 800], "model": "mine"}, "Extra inputs"),
        ({"profiles": [[1.0]] * 513}, "at body.profiles: List should have at most 512 items"),
        ({}, "Field required"),
    ],
)
def test_bad_profiles_are_refused(address: str, body: dict[str, Any], message: str) -> None:
    answer = requests.post(f"{address}/predict", json=body, timeout=30)
    assert answer.status_code == 422
    assert re.search(message, answer.json()["detail"]), answer.text


def columns(x: np.ndarray, y: np.ndarray, header: str = "# bin centres\n") -> str:
    return header + "".join(f"{t:.6f} {v:.6e}\n" for t, v in zip(x, y, strict=True))


def gsas(tof: np.ndarray, y: np.ndarray, *headers: str) -> str:
    """The same density as counts in bins, whose lower edges the file lists; σ is constant."""
    edges = np.append((tof[1:] + tof[:-1]) / 2, tof[-1])
    counts = np.append(y[1:-1] * np.diff(edges)[:-1], [0, 0])
    rows = "".join(f"{t:15.6f} {c:15.6e} 1.0\n" for t, c in zip(edges, counts, strict=True))
    record = f"BANK 4 {len(tof)} {len(tof)} RALF 0 0 0 0.001 FXYE\n"
    return "t\n" + "".join(f"# {header}\n{record}{rows}" for header in headers)


PSEUDO_VOIGT = (1.0, 0.03, 0.006, 0.0, 40.0, 10.0, 0.0, 0.0, 0.0, *[0.0] * 12)
CALIBRATION = prm(
    records(1, 3, PSEUDO_VOIGT)
    .replace("   5000.25", "   9500.00")
    .replace("   -45.00", "   122.00")
)
ANGLES = np.linspace(10, 150, 800)
TWO_BANKS = "tth 121.0deg, DIFC 9490.0", "tth 124.0deg, DIFC 9600.0"
NOMAD = (BUILT_IN / "nomad_bank4.instprm").read_text()
OF_CONSTANT_WAVELENGTH = prm(records(1, 3, PSEUDO_VOIGT), kind="PNCR")


def measured_or_refused(path: Path, campaign: Campaign, read: ProfileOptions) -> Measurement | str:
    """What the command reads, or its sentence."""
    try:
        (measurement,) = read_measurements(path, campaign, read)
    except FILE_ERRORS as error:
        return str(error)
    return measurement


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (columns, {}),
        (columns, {"instrument": CALIBRATION}),
        (lambda t, y: columns(t / 1000, y, "# tof (ms) intensity\n"), {"instrument": NOMAD}),
        (lambda t, y: columns(t / 9500, y), {"instrument": CALIBRATION, "x_unit": "d"}),
        (columns, {"instrument": CALIBRATION, "bin_edges": True}),
        (lambda t, y: gsas(t, y, TWO_BANKS[0]), {"bin_edges": False}),
        (lambda t, y: gsas(t, y, *TWO_BANKS), {"position": 2}),
        (lambda t, y: gsas(t, y, *TWO_BANKS), {"two_theta": 121.0}),
        (columns, {"two_theta": 122.0, "instrument": CALIBRATION}),
        # refused
        (lambda t, y: gsas(t, y, *TWO_BANKS), {"bank": 4}),
        (lambda t, y: gsas(t, y, *TWO_BANKS), {"bank": 5}),
        (lambda t, y: gsas(t, y, *TWO_BANKS), {"position": 3}),
        (lambda t, y: columns(t / 9500, y), {}),
        (lambda t, y: columns(ANGLES[: len(t)], y), {}),
        (columns, {"instrument": OF_CONSTANT_WAVELENGTH}),
        (columns, {"instrument": "rubbish"}),
        (columns, {"block": "x"}),
    ],
)
def test_the_service_reads_and_refuses_what_the_command_does(
    address: str,
    bench_of_service: Bench,
    tmp_path: Path,
    write: Callable[..., str],
    options: dict[str, Any],
) -> None:
    dataset = bench_of_service.store.open("small-v1")
    text = write(dataset.tof.values, dataset.intensity[0].values)
    (tmp_path / "mine.dat").write_text(text)
    instrument = None
    if "instrument" in options:
        instrument = tmp_path / "calibration"
        instrument.write_text(options["instrument"])
    predictor = bench_of_service.predictor("multitask")
    files = [{"text": text}, {"data": base64.encodebytes(text.encode()).decode()}]
    first, second = (
        requests.post(
            f"{address}/predict/file", json={"name": "mine.dat"} | file | options, timeout=30
        )
        for file in files
    )
    assert first.json() == second.json()
    read = ProfileOptions(**options | {"instrument": instrument})
    measurement = measured_or_refused(tmp_path / "mine.dat", predictor.campaign, read)
    if isinstance(measurement, str):
        assert first.status_code == 422
        assert first.json()["detail"] == measurement.replace(f"{tmp_path}/", "")
        return
    assert first.status_code == 200, first.text
    (prediction,) = first.json()["predictions"]
    expected = predictor.predict(measurement.prepared[None].astype(np.float32)).cells[0, 0]
    assert prediction["cell"]["a"] == pytest.approx(expected, rel=1e-5)
    assert prediction["bank"] == measurement.profile.bank
    warnings = [text.replace(f"{tmp_path}/", "") for text in measurement.warnings]
    assert prediction["warnings"] == warnings


def test_a_nexus_file_in_base64_is_predicted_as_its_columns(
    address: str, bench_of_service: Bench, tmp_path: Path
) -> None:
    dataset = bench_of_service.store.open("small-v1")
    with h5py.File(tmp_path / "x.nxs", "w") as file:
        group = file.create_group("data")
        group.attrs.update({"NX_class": "NXdata", "signal": "y", "axes": "tof"})
        group["y"], group["tof"] = dataset.intensity[0].values, dataset.tof.values
        group["tof"].attrs["units"] = "us"
    data = base64.b64encode((tmp_path / "x.nxs").read_bytes()).decode()
    text = columns(dataset.tof.values, dataset.intensity[0].values)
    first, second = (
        requests.post(f"{address}/predict/file", json=body, timeout=60)
        for body in ({"data": data}, {"text": text})
    )
    assert first.status_code == 200, first.text
    cells = [answer.json()["predictions"][0]["cell"]["a"] for answer in (first, second)]
    assert cells[0] == pytest.approx(cells[1], rel=1e-4)  # the text has seven digits


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give the file as text, or its bytes as data"),
        ({"text": "1 2", "data": "MSAy"}, "give the file as text, or its bytes as data"),
        ({"data": "MSA_"}, "nonsense.xy: data is no base64"),
        ({"data": "é"}, "data is no base64"),
        ({"text": "nothing of use"}, "nonsense.xy"),
        ({"text": "\x00\x01\x02"}, "nonsense.xy"),
        ({"text": "\ud800"}, "."),
        ({"text": "1000 1\n2000 2\n3000 1\n"}, "nonsense.xy"),
        ({"text": "BANK 1 2 2 SLOG 1 2 0.1\n", "bank": 7}, "bank"),
        ({"text": "1 2", "instrument": "rubbish"}, "."),
    ],
)
def test_bad_files_are_refused_with_a_sentence(
    address: str, body: dict[str, Any], message: str
) -> None:
    answer = requests.post(
        f"{address}/predict/file", json={"name": "../../nonsense.xy", **body}, timeout=30
    )
    assert answer.status_code == 422
    assert re.search(message, answer.text), answer.text
    assert "bragg-service" not in answer.text


def test_invalid_json_and_long_bodies_are_refused(address: str) -> None:
    nan = '{"profiles": [[' + ",".join(["NaN"] * 800) + "]]}"
    for body, code in (
        (nan.encode(), 422),
        (pickle.dumps({"profiles": [[1.0]]}), 422),
        (b"{" * 1000, 422),
        (json.dumps({"profiles": [[0.123456789] * 400_000]}).encode(), 413),
    ):
        answer = requests.post(
            f"{address}/predict",
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=30,
        )
        assert answer.status_code == code, answer.text

    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b"1" * 100_000

    try:
        answer = requests.post(f"{address}/predict", data=endless(), timeout=30)
    except requests.ConnectionError:
        pass  # it may hang up before all is sent
    else:
        assert answer.status_code == 413
    assert requests.get(f"{address}/health", timeout=5).ok


def test_a_new_champion_predicts_without_restart_and_nothing_fails(
    address: str, bench_of_service: Bench
) -> None:
    profile = profiles_of(bench_of_service.store, 1).tolist()
    before, after = (bench_of_service.versions(name)[0] for name in ("multitask", "caenn"))
    expected = {
        v.uri: bench_of_service.predictor(v.tags["model"]).predict(profile).cells[0, 0]
        for v in (before, after)
    }
    end = time.monotonic() + 30

    def load(_: int) -> list[tuple[int, str, float]]:
        seen = []
        while time.monotonic() < end and len(seen) < 400:
            answer = post(address, profile)
            response = answer.json()
            a = response["predictions"][0]["cell"]["a"]
            seen.append((answer.status_code, response["model"]["uri"], a))
            if len(seen) > 50 and response["model"]["uri"] == after.uri:
                break
        return seen

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(load, k) for k in range(4)]
        time.sleep(1)
        registry.set_alias(bench_of_service.tracking, after, registry.CHAMPION)
        answers = [future.result() for future in futures]
    try:
        for seen in answers:
            assert {code for code, _, _ in seen} == {200}
            # First one version, then the next, and every response is its model's.
            uris = [uri for _, uri, _ in seen]
            assert uris == sorted(uris, key=[before.uri, after.uri].index)
            assert uris[-1] == after.uri
            for _, uri, a in seen:
                assert a == pytest.approx(expected[uri], rel=1e-5)
    finally:
        registry.set_alias(bench_of_service.tracking, before, registry.CHAMPION)


def test_without_a_model_it_is_not_ready(bench_of_service: Bench, command: Command) -> None:
    tracking = ["--tracking", bench_of_service.tracking.uri]
    code, _, errors = command(
        serve.app, "--port", free_port(), *tracking, "--model", "models:/nobody@champion"
    )
    assert code == 2
    assert "Registered models: small" in errors


def test_other_machines_need_a_token(
    bench_of_service: Bench, tmp_path: Path, command: Command
) -> None:
    tracking = ["--tracking", bench_of_service.tracking.uri]
    tokens = tmp_path / "tokens"
    tokens.write_text("short\n")
    for options, message in (
        (["--host", "0.0.0.0"], "--token-file"),
        (["--token-file", str(tokens)], "at least 16 characters"),
    ):
        code, _, errors = command(serve.app, "--port", free_port(), *tracking, *options)
        assert code == 2
        assert message in errors
        assert "Traceback" not in errors
    tokens.write_text("first-secret-of-the-lab\nsecond-secret-of-the-lab\n")
    options = ("--host", "0.0.0.0", "--token-file", str(tokens), "--workers", "0")
    printed = tmp_path / "printed"
    with (
        printed.open("wb") as out,
        server_at("pipelines.serve", *tracking, *options, answers="health", out=out) as (url, _),
    ):
        commands = re.findall("(curl .*?)(?:  |$)", printed.read_text(), re.MULTILINE)
        assert [command.rpartition("/")[2] for command in commands] == ["ready", "openapi.json"]
        for line in commands:  # as typed
            line += " --retry 20 --fail-with-body --silent"  # the model may still be loaded
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        refused = requests.get(f"{url}/model", timeout=5)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer second-secret-of-the-lab"}
        assert requests.get(f"{url}/metrics", headers=headers, timeout=5).ok
        wrong = {"Authorization": "Bearer second-secret-of-the-la"}
        assert requests.get(f"{url}/metrics", headers=wrong, timeout=5).status_code == 401


def test_it_stops_within_ten_seconds_and_answers_what_it_began(
    bench_of_service: Bench, tmp_path: Path
) -> None:
    port, profiles = free_port(), profiles_of(bench_of_service.store, 1)
    command = [sys.executable, "-m", "pipelines.serve", "--port", str(port)]
    command += ["--tracking", bench_of_service.tracking.uri, "--workers", "0"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, stderr=log) as server,
    ):
        url = f"http://127.0.0.1:{port}"
        while not answered(f"{url}/ready"):
            assert server.poll() is None
            time.sleep(0.1)
        many = np.repeat(profiles, 512, axis=0)
        with (
            socket.create_connection(("127.0.0.1", port)),  # it must not hold the stop up
            ThreadPoolExecutor(4) as pool,
        ):
            posts = [pool.submit(post_array, url, npy(many)) for _ in range(4)]
            while not metrics_of(url)["bragg_profiles_waiting"]:
                time.sleep(0.01)
            server.terminate()
            server.wait(20)  # 9 at most, and what a busy machine adds
            assert {done.result().status_code for done in posts} <= {200, 503}
    assert "POST '/predict/array' 200" in (tmp_path / "log").read_text()


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)


def test_a_fuzzer_on_the_schema_finds_no_error_of_the_server(address: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json"),
            *("--checks", CHECKS, "--max-examples", "40", "--seed", "1", "--no-color"),
            *("--generation-database", "none"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert requests.get(f"{address}/ready", timeout=5).ok


def test_damaged_requests_are_refused_with_a_sentence(address: str) -> None:
    """As `python -m tests.fuzzing.service` sends them by thousands."""
    statuses, _, faults = fuzz(address, count=200, seed=0, most_seconds=60)
    assert not faults
    assert statuses.keys() >= {200, 422}


async def asgi_post(app: Any, path: str, document: dict) -> tuple[int, dict[str, str], dict]:
    """Status, headers and JSON of a POST request in this process."""
    body = json.dumps(document).encode()
    messages: list[dict[str, Any]] = []
    headers = [
        (b"host", b"localhost:80"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    sent_before: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if sent_before:
            await asyncio.Future()  # the client stays
        sent_before.append(body)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    await app(scope, receive, send)
    start, *rest = messages
    sent = {key.decode().lower(): value.decode() for key, value in start["headers"]}
    return start["status"], sent, json.loads(b"".join(part["body"] for part in rest))


@pytest.mark.slow
def test_a_file_is_read_and_prepared_outside_of_the_event_loop(
    trained: Tracking, small_campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    prepare = preprocessing.prepare_measured

    def recorded(*values: np.ndarray) -> np.ndarray:
        threads.append(threading.current_thread())
        return prepare(*values)

    monkeypatch.setattr(preprocessing, "prepare_measured", recorded)
    tof = small_campaign.grid.tof
    y = 50 + 2000 * np.exp(-0.5 * ((tof - 9000) / 40) ** 2)
    text = "\n".join(f"{t:.4f} {v:.6e} {v**0.5:.4f}" for t, v in zip(tof, y, strict=True))

    async def main() -> None:
        app = create_app(trained)
        async with app.router.lifespan_context(app):
            end = time.monotonic() + 60
            while (answer := await asgi_post(app, "/predict/file", {"text": text}))[0] == 503:
                assert time.monotonic() < end, "no model is loaded"
                await asyncio.sleep(0.1)
        assert answer[0] == 200, answer

    asyncio.run(main())
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


@pytest.mark.training
def test_more_than_can_wait_is_refused_with_a_time_to_retry(trained: Tracking) -> None:
    async def main() -> None:
        app = create_app(trained, max_waiting=1)
        async with app.router.lifespan_context(app):
            profile = np.ones(800)
            profile[400] = 100.0
            document = {"profiles": [profile.tolist()]}
            end = time.monotonic() + 60
            while (await asgi_post(app, "/predict", document))[0] == 503:
                assert time.monotonic() < end, "no model is loaded"
                await asyncio.sleep(0.1)
            posts = [asgi_post(app, "/predict", document) for _ in range(8)]
            responses = await asyncio.gather(*posts)
        statuses = [status for status, _, _ in responses]
        assert set(statuses) == {200, 503}
        for status, headers, response in responses:
            if status == 503:
                assert headers["retry-after"] == "1"
                assert "waiting already" in response["detail"]
            else:
                assert len(response["predictions"]) == 1

    asyncio.run(main())


@pytest.mark.slow
def test_ready_reports_a_refresh_that_fails(trained: Tracking) -> None:
    """The registry breaks after the model was loaded: the model stays, the reason is shown."""
    holder = ModelHolder(trained, None)
    holder.refresh()
    assert holder.error == ""
    before, loaded = holder.refreshed_at, holder.current
    holder.tracking = BrokenTracking()
    holder.refresh()
    assert holder.current is loaded
    info = holder.ready_info()
    assert info.refresh_error == "RuntimeError."
    assert before is not None
    assert info.refreshed_at == before.isoformat("T", "seconds")
    assert info.uri == "models:/small/1"
