"""Measure the prediction service: latency, throughput, a change of champions under load.

    python benchmarks/service.py [--model URI] [--other URI] [--requests 2000]

On a copy of the registry, whose champion changes instead of yours. Medians and 95th percentiles;
the machine should be idle.
"""

import io
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import requests
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.store.repository import open_snapshot
from catalog import registry
from catalog.tracking import Tracking
from pipelines.registry.registration import load_version

console = Console()


@contextmanager
def serving(tracking: Tracking, model: str, *options: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.serve", "--port", str(port)]
    command += ["--tracking", tracking.uri, "--model", model, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        try:
            ready = False
            while not ready:
                assert server.poll() is None, "the service ended"
                time.sleep(0.2)
                with suppress(requests.ConnectionError):
                    ready = requests.get(f"{address}/ready", timeout=5).ok
            yield address
        finally:
            server.terminate()


def timed(function, times: int) -> np.ndarray:
    seconds = []
    for k in range(times):
        began = time.perf_counter()
        function(k)
        seconds.append(time.perf_counter() - began)
    return np.array(seconds)


def main(
    model: Annotated[str | None, typer.Option(help="By default the only champion.")] = None,
    other: Annotated[str | None, typer.Option(help="Changed to; by default the newest.")] = None,
    requests_: Annotated[int, typer.Option("--requests", help="While champions change.")] = 2000,
) -> None:
    home = Tracking()
    with tempfile.TemporaryDirectory() as directory:
        database = Path(directory) / "mlflow.db"
        shutil.copy(home.uri.removeprefix("sqlite:///"), database)
        tracking = Tracking(f"sqlite:///{database}")
        champion = registry.find(tracking, model or registry.champion_uri(tracking))
        versions = [v for v in registry.versions(tracking, champion.name) if v.uri != champion.uri]
        successor = registry.find(tracking, other) if other else versions[0]
        registry.set_alias(tracking, champion, registry.CHAMPION)
        predictor = load_version(tracking.uri, champion)
        data = predictor.provenance.data
        dataset = open_snapshot(data.tag, data.uri)
        some = np.random.default_rng(0).choice(dataset.sizes["sample"], 512, replace=False)
        profiles = dataset.intensity[np.sort(some)].values
        table = Table("what", "median", "95th percentile", "profiles/s", title=champion.uri)

        def row(what: str, seconds: np.ndarray, count: int) -> None:
            middle, slow = np.percentile(seconds, [50, 95])
            times = f"{1e3 * middle:.1f} ms", f"{1e3 * slow:.1f} ms"
            table.add_row(what, *times, f"{count / middle:,.0f}")

        predictor.predict(profiles)
        single = timed(lambda k: predictor.predict(profiles[k : k + 1]), 200)
        row("in Python, one profile", single, 1)
        row("in Python, 512 profiles", timed(lambda _: predictor.predict(profiles), 8), 512)
        alias = f"models:/{champion.name}@{registry.CHAMPION}"
        with serving(tracking, alias) as address:
            session = requests.Session()
            bodies = [{"profiles": [profile.tolist()]} for profile in profiles[:300]]
            session.post(f"{address}/predict", json=bodies[0]).raise_for_status()
            single = timed(lambda k: session.post(f"{address}/predict", json=bodies[k]), 300)
            row("service, one profile", single, 1)
            written = io.BytesIO()
            np.save(written, profiles)
            npy = {"Content-Type": "application/octet-stream"}
            for name, path, body in (
                ("JSON", "predict", {"json": {"profiles": profiles.tolist()}}),
                ("NPY", "predict/array", {"data": written.getvalue(), "headers": npy}),
            ):
                post = partial(session.post, f"{address}/{path}", **body)
                post().raise_for_status()
                row(f"service, 512 profiles, {name}", timed(lambda _, post=post: post(), 8), 512)
        console.print(table)
        with serving(tracking, alias, "--refresh", "0.5") as address:
            swap(tracking, address, champion, successor, bodies, requests_)


def swap(tracking, address, champion, other, bodies, count: int) -> None:
    expected = {
        v.uri: load_version(tracking.uri, v).predict([b["profiles"][0] for b in bodies]).cells
        for v in (champion, other)
    }
    ended = threading.Event()

    def request(k: int) -> tuple[int, str, bool]:
        row = k % len(bodies)
        response = requests.post(f"{address}/predict", json=bodies[row], timeout=60)
        if response.status_code != 200:
            return response.status_code, "", False
        content = response.json()
        cell, uri = content["predictions"][0]["cell"], content["model"]["uri"]
        right = np.allclose([cell[n] for n in cell], expected[uri][row], rtol=1e-4)
        return 200, uri, bool(right)

    def change() -> int:
        changes = 0
        while not ended.wait(3.0):
            changes += 1
            registry.set_alias(tracking, (champion, other)[changes % 2], registry.CHAMPION)
        return changes

    with ThreadPoolExecutor(5) as pool:
        changing = pool.submit(change)
        answers = list(pool.map(request, range(count)))
        ended.set()
    failed = sum(code != 200 for code, _, _ in answers)
    mixed = sum(not right for code, _, right in answers if code == 200)
    by = {uri: sum(u == uri for _, u, _ in answers) for uri in expected}
    console.print(
        f"{count:,} requests by 4 clients, {changing.result()} changes of the champion: {failed} "
        f"failed, {mixed} differ from the model that they name; by model: {by}"
    )


if __name__ == "__main__":
    typer.run(main)
