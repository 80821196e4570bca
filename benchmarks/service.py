"""Measure the prediction service: latency and throughput of a registered model.

    python benchmarks/service.py [--model URI]

Medians and 95th percentiles; the machine should be idle.
"""

import io
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Annotated

import numpy as np
import requests
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.store.repository import open_snapshot
from pipelines.prediction.interface import load_model


@contextmanager
def serving(uri: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.serve", "--port", str(port), "--model", uri]
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


def main(model: Annotated[str | None, typer.Option(help="Default: the champion.")] = None) -> None:
    loaded = load_model(model)
    predictor, data = loaded.predictor, loaded.predictor.provenance.data
    dataset = open_snapshot(data.tag, data.uri)
    some = np.random.default_rng(0).choice(dataset.sizes["sample"], 512, replace=False)
    profiles = dataset.intensity[np.sort(some)].values
    table = Table("what", "median", "95th percentile", "profiles/s", title=loaded.version.uri)

    def measure(what: str, function: Callable[[int], object], times: int, count: int = 1) -> None:
        seconds = []
        for k in range(-1, times):  # the first call does not count
            began = time.perf_counter()
            function(k)
            seconds.append(time.perf_counter() - began)
        middle, slow = np.percentile(seconds[1:], [50, 95])
        durations = f"{1e3 * middle:.1f} ms", f"{1e3 * slow:.1f} ms"
        table.add_row(what, *durations, f"{count / middle:,.0f}")

    measure("in Python, one profile", lambda k: predictor.predict(profiles[[k]]), 200)
    measure("in Python, 512 profiles", lambda _: predictor.predict(profiles), 8, 512)
    written = io.BytesIO()
    np.save(written, profiles)
    npy = {"data": written.getvalue(), "headers": {"Content-Type": "application/octet-stream"}}
    bodies = [{"profiles": [profile.tolist()]} for profile in profiles[:300]]
    together = {"profiles": profiles.tolist()}
    with serving(loaded.version.uri) as address, requests.Session() as session:

        def post(path: str = "predict", **body: object) -> None:
            session.post(f"{address}/{path}", **body).raise_for_status()

        measure("service, one profile", lambda k: post(json=bodies[k]), 300)
        measure("service, 512 profiles, JSON", lambda _: post(json=together), 8, 512)
        measure("service, 512 profiles, NPY", lambda _: post("predict/array", **npy), 8, 512)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
