"""Send damaged requests to the prediction service: JSON, NPY, multipart, and files in JSON.

    python -m tests.fuzzing.service [--count 10000] [--seed 1]

Nothing may be answered with 5xx (but 503), with something else than one sentence, or later than
after 10 s; no process may take more than 1 GiB, and the log may hold no traceback.
"""

import base64
import io
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import requests
import typer

from bragg_data.campaign import BUILT_IN
from tests.fuzzing.__main__ import BYTES, SECONDS
from tests.fuzzing.formats import INSTRUMENTS
from tests.fuzzing.mutations import mutated
from tests.fuzzing.originals import PROFILES
from tests.servers import server_at

_REFINED = 0.02  # share of files
_STRANGE = (
    *(None, True, -1, 0, 1e308, 10**40, float("nan"), "", "\0", "\ud800", "../x", "9" * 5000),
    *([], [[]], {}, [[1]], {"a": {}}, [0.0] * 3000),
)
_NAMES = "text", "data", "name", "instrument", "bank", "two_theta", "position", "x_unit", "block"
_INSTRUMENT = (BUILT_IN / "nomad_bank4.instprm").read_text(encoding="utf-8")


def _text(original: str, rng: random.Random) -> str:
    """Return a text, damaged three times in four."""
    content = original.encode()
    if rng.random() < 0.75:
        content = mutated(content, rng)[0]
    return content.decode("latin-1")


def _file(rng: random.Random, tof: np.ndarray) -> dict[str, object]:
    """Return a measured file of any format, or one that a model can predict."""
    counts = rng.random() * 1e4 * np.exp(-np.square((tof - rng.choice(tof)) / 30)) + 100
    rows = zip(tof.tolist(), counts.tolist(), np.sqrt(counts).tolist(), strict=True)
    covering = "".join(f"{t:.3f} {y:.2f} {e:.3f}\n" for t, y, e in rows)
    text = _text(rng.choice([covering, *PROFILES.values()]), rng)
    if rng.random() < 0.2:
        data = base64.b64encode(text.encode("latin-1"))
        return {"data": (mutated(data, rng)[0] if rng.random() < 0.3 else data).decode("latin-1")}
    return {"text": text}


def _file_request(rng: random.Random, tof: np.ndarray) -> dict[str, object]:
    document = _file(rng, tof)
    if rng.random() < 0.2:
        document = {"files": [_file(rng, tof) for _ in range(rng.randint(1, 3))]}
    if rng.random() < 0.7:
        texts = [text for _, text, _ in INSTRUMENTS.values()]
        document["instrument"] = _text(rng.choice([_INSTRUMENT, *texts]), rng)
    if rng.random() < 0.5:
        document["bank"] = rng.choice([1, 2, 4, 9])
    document["refine"] = rng.random() < _REFINED
    for _ in range(rng.choice([0, 0, 1, 2])):
        document[rng.choice(_NAMES)] = rng.choice(_STRANGE)
    return document


def _request(rng: random.Random, tof: np.ndarray) -> tuple[str, str, bytes]:
    """Return path, media type and body."""
    kind = rng.choice(["json", "npy", "file", "file", "multipart"])
    shape = rng.randint(1, 3), rng.choice([len(tof), len(tof), len(tof) - 1, 1])
    profiles = np.random.default_rng(rng.randrange(2**32)).random(shape)
    if kind == "npy":
        stream = io.BytesIO()
        np.save(stream, profiles.astype(rng.choice(["<f4", "<f8", ">f4", "<i2", "<c8", "<U3"])))
        head, rest = stream.getvalue()[:128], stream.getvalue()[128:]
        whole = mutated(head, rng)[0] + rest if rng.random() < 0.8 else mutated(head + rest, rng)[0]
        return "predict/array", "application/octet-stream", whole
    document: dict[str, object] = {"profiles": profiles.tolist()}
    if rng.random() < 0.3:
        document[rng.choice(["profiles", "more"])] = rng.choice(_STRANGE)
    if kind == "file" or (kind == "multipart" and rng.random() < 0.5):
        document = _file_request(rng, tof)
    path = "predict/file" if kind == "file" else "predict"
    body = json.dumps(document).encode()
    if kind == "multipart":
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        return path, "multipart/form-data; boundary=x", mutated(head + body + b"\r\n--x--", rng)[0]
    return path, "application/json", mutated(body, rng)[0] if rng.random() < 0.5 else body


def fuzz(
    address: str, count: int, seed: int, most_seconds: float = SECONDS
) -> tuple[Counter[int], float, list[str]]:
    """Return how often each status came, the longest time in s, and the faults."""
    about = requests.get(f"{address}/model", timeout=30).json()
    tof = about["tof"]["start"] * np.exp(about["tof"]["relative_step"] * np.arange(about["points"]))
    statuses, longest, faults = Counter[int](), 0.0, []
    with requests.Session() as session:
        for number in range(count):
            path, media_type, body = _request(random.Random(f"{seed} {number}"), tof)
            began, headers = time.monotonic(), {"Content-Type": media_type}
            answer = session.post(f"{address}/{path}", data=body, headers=headers, timeout=120)
            seconds = time.monotonic() - began
            statuses[answer.status_code] += 1
            longest = max(longest, seconds)
            text = "." if answer.ok else str(answer.json().get("detail"))
            is_sentence = text.endswith(".") and "\n" not in text and "Traceback" not in text
            if answer.status_code not in (200, 400, 413, 422, 503) or not is_sentence:
                faults.append(f"{number} {path}: {answer.status_code} {answer.text[:300]}")
            if seconds > most_seconds:
                faults.append(f"{number} {path}: {seconds:.1f} s")
    return statuses, longest, faults


def main(count: int = 10_000, seed: int = 1, model: str = "packaged:batio3-nomad") -> None:
    """Send damaged requests to a service that is started, and print what came of them."""
    with tempfile.TemporaryFile() as log:
        arguments = "pipelines.serve", "--model", model
        with server_at(*arguments, answers="ready", log=log) as (address, server):
            statuses, longest, faults = fuzz(address, count, seed)
            first = psutil.Process(server.pid)
            peaks = [peak_memory(p.pid) for p in (first, *first.children(recursive=True))]
        log.seek(0)
        faults += re.findall(r"Traceback[^\x00]*?\n(?=\S)(?!Traceback).*", log.read().decode())
    if max(peaks) > BYTES:
        faults.append(f"{max(peaks) / 2**20:.0f} MiB")
    print(*faults, sep="\n")
    print(
        f"{count} requests: {dict(statuses)}, longest {longest:.1f} s, memory of the processes "
        f"{', '.join(f'{peak / 2**20:.0f}' for peak in peaks)} MiB, {len(faults)} faults"
    )
    sys.exit(bool(faults))


def peak_memory(pid: int) -> int:
    """Return the most memory in bytes that a process had."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    typer.run(main)
