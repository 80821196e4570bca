"""Measure the service under load: single profiles next to noise and requests of 512 profiles.

    python benchmarks/service_load.py [--clients 64] [--seconds 60] [--model URI] [--pairs N]

One client in eight sends 16 profiles of noise or 512 profiles at a time, the others single ones:
first without and then with those, which leave 5 s after the end; then SIGTERM. Prints JSON.
Clients and service share the machine. With --pairs the cost of a record (serve --record) instead:
two services get the single profiles in turn, for --seconds each, the order of every pair reversed.
Processor time for a request, of all threads of the service, is what other work on the machine
disturbs least.
"""

import io
import itertools
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import psutil
import requests
import typer

from bragg_data.arrays import Floats32
from bragg_data.simulation.kinematic import Simulator
from pipelines.prediction.interface import load_model
from tests.servers import server_at

HEADERS = {"Content-Type": "application/octet-stream"}


def npy(profiles: Floats32) -> bytes:
    """Return the bytes that numpy.save writes."""
    file = io.BytesIO()
    np.save(file, profiles)
    return file.getvalue()


def send(address: str, bodies: Iterator[bytes], end: float, into: list[tuple[int, float]]) -> None:
    """Send bodies one after the other until a time; an error of the connection counts as 0."""
    with requests.Session() as session:
        for body in bodies:
            began = time.monotonic()
            if began > end:
                return
            try:
                reply = session.post(
                    f"{address}/predict/array", data=body, headers=HEADERS, timeout=end - began + 5
                )
                status = reply.status_code
                wait = float(reply.headers.get("retry-after", 0))
            except requests.ReadTimeout:  # it leaves
                return
            except requests.RequestException:
                status, wait = 0, 0.0
            into.append((status, time.monotonic() - began))
            time.sleep(min(wait, max(end - time.monotonic(), 0)))


def load(
    address: str, bodies_of: list[list[bytes]], n_good: int, seconds: float
) -> dict[str, object]:
    """Return statuses, throughput and times of a load by clients, of whom the first are good."""
    good: list[tuple[int, float]] = []
    hard: list[tuple[int, float]] = []
    end = time.monotonic() + seconds
    threads = []
    for k, bodies in enumerate(bodies_of):
        first = k % len(bodies)
        in_turn = itertools.cycle(bodies[first:] + bodies[:first])
        arguments = (address, in_turn, end, good if k < n_good else hard)
        threads.append(threading.Thread(target=send, args=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = [seconds for status, seconds in good if status == 200]
    median, last = np.percentile(times, [50, 99])
    return {
        "good": dict(Counter(status for status, _ in good)),
        "hard": dict(Counter(status for status, _ in hard)),
        "good_per_s": round(len(times) / seconds, 1),
        "median_s": round(float(median), 3),
        "p99_s": round(float(last), 3),
        "slowest_hard_s": round(max((s for _, s in hard), default=0.0), 2),
    }


def memory(address: str) -> int:
    """Return the service's memory in MB."""
    lines = requests.get(f"{address}/metrics", timeout=10).text.splitlines()
    (text,) = (line for line in lines if line.startswith("process_resident"))
    return round(float(text.split()[1]) / 1e6)


def cost_of_record(model: str, bodies: list[list[bytes]], pairs: int, seconds: float) -> None:
    """Print processor time for a request with a record over that without, of pairs of loads."""
    services = "pipelines.serve", "--model", model, "--workers", "0"
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as log,
        server_at(*services, answers="ready", log=log) as plain,
        server_at(*services, "--record", folder, answers="ready", log=log) as recording,
    ):
        costs = []
        for pair in range(-1, pairs):  # the first is to warm up
            both = {}
            for address, process in (plain, recording)[:: 1 if pair % 2 else -1]:
                began = processor_seconds(process.pid)
                rate = float(str(load(address, bodies, len(bodies), seconds)["good_per_s"]))
                used = processor_seconds(process.pid) - began
                both[address] = 1e3 * used / (rate * seconds), rate
            costs.append((both[plain[0]], both[recording[0]]))
            names = "without_ms", "without_per_s", "with_ms", "with_per_s"
            values = (round(value, 3) for of_service in costs[-1] for value in of_service)
            print(json.dumps(dict(zip(names, values, strict=True))), flush=True)
    for place, name in enumerate(("processor_time", "throughput")):
        ratio = np.array([b[place] / a[place] for a, b in costs[1:]])
        error = ratio.std(ddof=1) / np.sqrt(len(ratio))
        median = round(float(np.median(ratio)), 4)
        result = {"ratio": round(ratio.mean(), 4), "standard_error": round(error, 4)}
        print(json.dumps({"of": name, **result, "median": median}))


def processor_seconds(process: int) -> float:
    """Return what all threads of a process have used."""
    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


def main(
    clients: Annotated[int, typer.Option(min=8)] = 64,
    seconds: Annotated[float, typer.Option(help="Of each of the two loads.")] = 60.0,
    model: str = "packaged:batio3-nomad",
    pairs: Annotated[int, typer.Option(help="Of loads without and with a record.")] = 0,
) -> None:
    loaded = load_model(model)
    campaign = loaded.predictor.campaign
    samples = campaign.samples[slice(512)]
    simulator = Simulator(
        campaign.phases,
        campaign.instrument,
        campaign.grid,
        size=campaign.size,
        microstrain=campaign.microstrain,
    )
    patterns = simulator.simulate(samples.phase, samples.cells).astype(np.float32)
    rng = np.random.default_rng(0)
    noise = [rng.random((16, patterns.shape[1])), rng.exponential(size=(16, patterns.shape[1]))]
    single = [npy(pattern[None]) for pattern in patterns]
    hard = [npy(noise[0].astype(np.float32)), npy(patterns), npy(noise[1].astype(np.float32))]
    if pairs:
        cost_of_record(model, [single] * clients, pairs, seconds)
        return
    result: dict[str, object] = {"model": loaded.version.uri, "cores": os.cpu_count()}
    with tempfile.TemporaryFile() as log:
        arguments = ("pipelines.serve", "--model", model, "--workers", "0")
        with server_at(*arguments, answers="ready", log=log) as (address, server):
            good = clients - clients // 8
            mixed = [single] * good + [hard] * (clients // 8)
            load(address, mixed, good, 5)  # warm
            result["memory_before_MB"] = memory(address)
            result["without"] = load(address, [single] * good, good, seconds)
            result["with"] = load(address, mixed, good, seconds)
            result["memory_after_MB"] = memory(address)
            body = hard[1]
            late = [
                threading.Thread(
                    target=lambda: requests.post(
                        f"{address}/predict/array", data=body, headers=HEADERS, timeout=60
                    )
                )
                for _ in range(4)
            ]
            for thread in late:
                thread.start()
            time.sleep(1)
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            server.wait(60)
            result["drained_s"] = round(time.monotonic() - began, 1)
            for thread in late:
                thread.join()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
