"""Kill a worker at a random moment of a simulation, again and again, and see how each run ends.

    python benchmarks/killed_workers.py [--times 20] [--workers 1 2 8]

A run has to finish with the content of an undisturbed one, or end with one sentence, within two
minutes. Prints a line per run; the exit code is 1 if one did neither.
"""

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import typer

from tests.servers import ROOT, dask_workers
from tests.tiny_campaign import write_campaign

SECONDS = 120.0  # for a run, which takes 10 to 20


def candidates(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the workers, those that start included, below a driver."""
    try:
        return dask_workers(psutil.Process(process.pid))
    except psutil.Error:
        return []


def ended(directory: Path, campaign: Path, workers: int, delay: float | None) -> tuple[str, str]:
    """Run a simulation and kill a worker some seconds after the first is there; None: no worker.

    Returned are how it ended, and the content hash or the reason.
    """
    command = [sys.executable, "-m", "pipelines.simulate", "--simulator", "kinematic"]
    command += ["--campaign", str(campaign), "--store", str(directory / "store")]
    command += ["--workers", str(workers)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if delay is not None:
            while not (before := candidates(process)) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
            with suppress(psutil.NoSuchProcess, IndexError):
                (candidates(process) or before)[-1].send_signal(signal.SIGKILL)
        try:
            out, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()
            return "hangs", ""
    if process.returncode == 0:
        return "finished", re.search(r"[0-9a-f]{64}", out)[0]
    sentence = errors.strip().splitlines()[-1:] or [""]
    if process.returncode == 2 and sentence[0].startswith("Error: ") and "Traceback" not in errors:
        return "sentence", sentence[0]
    return "fails", errors[-1500:]


def main(times: int = 20, workers: tuple[int, int, int] = (1, 2, 8), seed: int = 0) -> None:
    rng = random.Random(seed)
    results: Counter[tuple[int, str]] = Counter()
    with tempfile.TemporaryDirectory() as place:
        campaign = write_campaign(Path(place), rows=2, last=4.1)
        expected = ended(Path(place), campaign, 2, None)
        assert expected[0] == "finished", expected
        for count in workers:
            for _ in range(times):
                delay = rng.choice([0.0, rng.uniform(0, 0.5), rng.uniform(0, 4)])
                with tempfile.TemporaryDirectory() as directory:
                    began = time.monotonic()
                    how, detail = ended(Path(directory), campaign, count, delay)
                if how == "finished" and detail != expected[1]:
                    how = "different content"
                results[count, how] += 1
                print(count, how, f"{time.monotonic() - began:.1f} s", detail[-900:], flush=True)
    print({f"{count} workers, {how}": number for (count, how), number in results.items()})
    raise typer.Exit(int(any(how not in ("finished", "sentence") for _, how in results)))


if __name__ == "__main__":
    typer.run(main)
