"""The HTTP service, as a process of its own: what it answers, refuses, how it changes models."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import requests

from bragg_data.store.repository import Store
from catalog import registry
from tests.servers import ROOT, free_port, serving

if TYPE_CHECKING:
    from tests.small_bench import Bench


@pytest.fixture(scope="module")
def bench_of_service(bench: Bench, everything: str) -> Bench:
    assert everything
    registry.set_alias(bench.tracking, bench.versions("multitask")[0], registry.CHAMPION)
    return bench


@pytest.fixture(scope="module")
def address(bench_of_service: Bench) -> Iterator[str]:
    with serving(
        "pipelines.serve", "--tracking", bench_of_service.tracking.uri, "--threads", "1",
        "--refresh", "0.2", "--max-megabytes", "2", answers="ready",
    ) as found:  # fmt: skip
        yield found


def profiles_of(store: Store, count: int) -> np.ndarray:
    return np.asarray(store.open("small-v1").intensity[:count].values)


def ask(address: str, profiles: Any, path: str = "predict") -> requests.Response:
    return requests.post(f"{address}/{path}", json={"profiles": profiles}, timeout=30)


def test_it_tells_what_it_is(address: str, bench_of_service: Bench) -> None:
    assert requests.get(f"{address}/health", timeout=5).json() == {"status": "alive"}
    who = requests.get(f"{address}/ready", timeout=5).json()
    assert who["uri"] == bench_of_service.versions("multitask")[0].uri
    about = requests.get(f"{address}/model", timeout=5).json()
    assert (about["points"], about["tof"]["start"]) == (800, 6000.0)
    assert about["phases"] == {n: n for n in ("cubic", "tetragonal", "trigonal")}
    assert about["units"]["a"] == "Å"
    paths = requests.get(f"{address}/openapi.json", timeout=5).json()["paths"]
    asked = {"/predict", "/predict/array", "/predict/file"}
    assert set(paths) == {"/health", "/ready", "/model", *asked}


def ask_array(address: str, body: bytes) -> requests.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(f"{address}/predict/array", data=body, headers=headers, timeout=30)


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def test_an_array_is_answered_as_its_json_is(address: str, bench_of_service: Bench) -> None:
    profiles = profiles_of(bench_of_service.store, 5)
    wanted = ask(address, profiles.tolist()).json()
    assert ask_array(address, npy(profiles)).json() == wanted
    assert ask_array(address, npy(profiles.astype(np.float64))).json() == wanted


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "wrong at body"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "no NPY file"),
        (npy(np.array([{}, 1], dtype=object), allow_pickle=True), "the file holds object"),
        (pickle.dumps([1.0] * 800), "no NPY file"),
        (npy(np.ones((2, 801))), "of shape \\(2, 801\\)"),
        (npy(np.ones((0, 800))), "of shape \\(0, 800\\)"),
        (npy(np.asfortranarray(np.ones((2, 800)))), "Fortran order"),
        (npy(np.ones((2, 800), dtype=int)), "the file holds int64"),
        (npy(np.full((2, 800), np.nan)), "not finite"),
        (npy(np.full((2, 800), 1e300)), "not finite"),
        (npy(np.ones((2, 800)))[:-1], "cut off"),
        (npy(np.ones((2, 800))).replace(b"(2, 800)", b"(9, 800)"), "cut off"),
    ],
)
def test_a_bad_array_is_refused(address: str, body: bytes, said: str) -> None:
    answer = ask_array(address, body)
    assert answer.status_code == 422
    assert re.search(said, answer.json()["detail"])


def test_it_answers_as_the_model_does(address: str, bench_of_service: Bench) -> None:
    profiles = profiles_of(bench_of_service.store, 5)
    wanted = bench_of_service.predictor("multitask").predict(profiles)
    found = ask(address, profiles.tolist()).json()
    assert found["model"]["kind"] == "multitask"
    assert len(found["answers"]) == 5
    for row, one in enumerate(found["answers"]):
        cell = [one["cell"][n] for n in ("a", "b", "c", "alpha", "beta", "gamma")]
        np.testing.assert_allclose(cell, wanted.cells[row], rtol=1e-5)
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert one["phase"] == ("cubic", "tetragonal", "trigonal")[wanted.phase[row]]


def test_many_small_questions_at_once_get_their_own_answers(
    address: str, bench_of_service: Bench
) -> None:
    profiles = profiles_of(bench_of_service.store, 40)
    wanted = bench_of_service.predictor("multitask").predict(profiles)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda row: ask(address, [profiles[row].tolist()]), range(40)))
    for row, answer in enumerate(found):
        assert answer.status_code == 200
        a = answer.json()["answers"][0]["cell"]["a"]
        assert a == pytest.approx(wanted.cells[row, 0], rel=1e-5)


def test_a_file_with_a_grid_of_its_own(address: str, bench_of_service: Bench) -> None:
    dataset = bench_of_service.store.open("small-v1")
    columns = np.column_stack([dataset.tof.values, dataset.intensity[0].values])
    text = "\n".join(f"{t:.4f} {y:.6e}" for t, y in columns)
    body = {"text": text, "name": "sample.xy"}
    found = requests.post(f"{address}/predict/file", json=body, timeout=30)
    assert found.status_code == 200, found.text
    (one,) = found.json()["answers"]
    assert one["cell"]["a"] > 0
    assert any("calibration" in warning for warning in one["warnings"])


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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": "nothing of use"}, "nonsense.xy"),
        ({"text": "\x00\x01\x02"}, "nonsense.xy"),
        ({"text": "\ud800"}, "."),
        ({"text": "1000 1\n2000 2\n3000 1\n"}, "nonsense.xy"),
        ({"text": "BANK 1 2 2 SLOG 1 2 0.1\n", "bank": 7}, "bank"),
        ({"text": "1 2", "instrument": "rubbish"}, "."),
    ],
)
def test_bad_files_are_refused_in_one_sentence(
    address: str, body: dict[str, Any], message: str
) -> None:
    answer = requests.post(
        f"{address}/predict/file", json={"name": "../../nonsense.xy", **body}, timeout=30
    )
    assert answer.status_code == 422
    assert re.search(message, answer.text), answer.text
    assert "bragg-service" not in answer.text


def test_what_is_no_json_or_too_long_is_refused(address: str) -> None:
    nan = '{"profiles": [[' + ",".join(["NaN"] * 800) + "]]}"
    for body, code in (
        (nan.encode(), 422),
        (pickle.dumps({"profiles": [[1.0]]}), 400),
        (b"{" * 1000, 422),
        (json.dumps({"profiles": [[0.123456789] * 400_000]}).encode(), 413),
    ):
        answer = requests.post(
            f"{address}/predict", data=body, headers={"Content-Type": "application/json"},
            timeout=30,
        )  # fmt: skip
        assert answer.status_code == code, answer.text

    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b"1" * 100_000

    try:
        answer = requests.post(f"{address}/predict", data=endless(), timeout=30)
    except requests.ConnectionError:
        pass  # it may hang up before it is told everything
    else:
        assert answer.status_code == 413
    assert requests.get(f"{address}/health", timeout=5).ok


def test_a_new_champion_answers_without_restart_and_nothing_fails(
    address: str, bench_of_service: Bench
) -> None:
    profile = profiles_of(bench_of_service.store, 1).tolist()
    before, after = (bench_of_service.versions(name)[0] for name in ("multitask", "caenn"))
    wanted = {
        v.uri: bench_of_service.predictor(v.tags["model"]).predict(profile).cells[0, 0]
        for v in (before, after)
    }
    end = time.monotonic() + 30

    def load(_: int) -> list[tuple[int, str, float]]:
        seen = []
        while time.monotonic() < end and len(seen) < 400:
            answer = ask(address, profile)
            told = answer.json()
            seen.append((answer.status_code, told["model"]["uri"], told["answers"][0]["cell"]["a"]))
            if len(seen) > 50 and told["model"]["uri"] == after.uri:
                break
        return seen

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(load, k) for k in range(4)]
        time.sleep(1)
        registry.set_alias(bench_of_service.tracking, after, registry.CHAMPION)
        answers = [future.result() for future in asked]
    try:
        for seen in answers:
            assert {code for code, _, _ in seen} == {200}
            # First the one, then the other, and every answer is its own model's.
            uris = [uri for _, uri, _ in seen]
            assert uris == sorted(uris, key=[before.uri, after.uri].index)
            assert uris[-1] == after.uri
            for _, uri, a in seen:
                assert a == pytest.approx(wanted[uri], rel=1e-5)
    finally:
        registry.set_alias(bench_of_service.tracking, before, registry.CHAMPION)


def test_without_a_model_it_is_not_ready(bench_of_service: Bench) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pipelines.serve", "--port", str(port), "--tracking",
               bench_of_service.tracking.uri, "--model", "models:/nobody@champion"]  # fmt: skip
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "Registered models: small" in found.stderr


def test_a_port_that_is_taken_is_one_sentence(bench_of_service: Bench) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-m", "pipelines.serve", "--port", port, "--tracking",
                   bench_of_service.tracking.uri]  # fmt: skip
        found = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
        )
    assert found.returncode == 2
    assert "Name another with --port" in found.stderr


def test_a_fuzzer_on_the_schema_finds_no_error_of_the_server(address: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json",
         "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
         "response_schema_conformance",
         "--max-examples", "40", "--seed", "1", "--no-color", "--generation-database", "none"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert requests.get(f"{address}/ready", timeout=5).ok
