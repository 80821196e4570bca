"""Measure the service under load: single profiles next to noise and requests of 512 profiles.

    python benchmarks/service_load.py [--clients 64] [--seconds 60] [--model URI] [--pairs N]

One client in eight sends 16 profiles of noise or 512 profiles at a time, the others single ones:
first without and then with those, which leave 5 s after the end; then SIGTERM. Prints JSON.
Clients and service share the machine. With --pairs the cost of a record (serve --record) instead:
in this process two services, one with a record, predict 128 of the single profiles in turn, the
order of every pair reversed. Processor time for a request, of all threads, without HTTP, is what
other work on the machine disturbs least.
"""

import asyncio
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
from pathlib import Path
from typing import Annotated

import numpy as np
import requests
import typer
from fastapi import FastAPI

from bragg_data.arrays import Floats32
from bragg_data.simulation.kinematic import Simulator
from pipelines.prediction.interface import load_model
from pipelines.recording.record import Record
from pipelines.service import batching
from pipelines.service.app import Service
from pipelines.service.refining import RefinementWorkers, Setup
from pipelines.service.requests import ARRAY
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


async def cost_of_record(model: str, bodies: list[bytes], clients: int, pairs: int) -> None:
    """Print processor time for a request with a record over that without, of pairs of loads."""
    holder, nobody = batching.ModelHolder("sqlite:///none.db", model), RefinementWorkers(0, Setup())
    holder.refresh()
    n_requests = 128

    async def processor_ms(service: Service) -> float:
        left, began = iter(range(n_requests)), time.process_time()

        async def client() -> None:
            for k in left:
                await service.predict(ARRAY, bodies[k])

        await asyncio.gather(*(client() for _ in range(clients)))
        return 1e3 * (time.process_time() - began) / n_requests

    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder), create=True)
        services = [
            Service(holder, 1e9, batching.MAX_WAITING_PROFILES, nobody, of) for of in (None, record)
        ]
        async with services[0].lifespan(FastAPI()), services[1].lifespan(FastAPI()):
            costs = []
            for pair in range(-1, pairs):  # the first is to warm up
                order = (0, 1)[:: 1 if pair % 2 else -1]
                both = {which: await processor_ms(services[which]) for which in order}
                costs.append([both[0], both[1]])
        without, recorded = np.array(costs[1:]).T
    ratio, added = recorded / without, recorded - without
    result = {
        "without_ms": np.median(without),
        "added_ms": np.median(added),
        "ratio": ratio.mean(),
        "standard_error": ratio.std(ddof=1) / np.sqrt(pairs),
        "median": np.median(ratio),
    }
    print(json.dumps({name: round(float(value), 4) for name, value in result.items()}))


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
        asyncio.run(cost_of_record(model, single, clients, pairs))
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
