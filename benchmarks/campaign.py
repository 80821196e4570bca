"""Measure a whole campaign: time from an empty directory to the tag, and memory of each process.

    python benchmarks/campaign.py [--times 1] [--times 3] [--workers N]

``--times 3`` simulates a campaign three times as large (the tetragonal grid is three times as
dense). Memory is the largest anonymous resident memory (RssAnon) seen in the driver and in any
worker, sampled four times a second.
"""

import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.campaign import BUILT_IN, load_campaign

DENSER = (
    "a = { first = 3.800, last = 4.200, step = 0.001 }\n"
    "c = { first = 3.800, last = 4.200, step = 0.001 }"
)


def campaign_file(times: int, directory: Path) -> Path:
    """Write the paper's campaign with the tetragonal grid ``times`` as dense, and return it."""
    for file in BUILT_IN.iterdir():
        if file.is_file():
            (directory / file.name).write_bytes(file.read_bytes())
    path = directory / "batio3_nomad.toml"
    if times > 1:
        steps = round(400 * times**0.5 * 1.09)
        step = round(0.4 / steps, 6)
        dense = DENSER.replace("0.001", f"{step:.6f}").replace("4.200", f"{3.8 + step * steps:.6f}")
        path.write_text(path.read_text().replace(DENSER, dense))
    return path


def anonymous_memory(process: psutil.Process) -> int:
    """RssAnon of a process in bytes; 0 if it is gone."""
    with suppress(psutil.Error):
        memory = process.memory_info()
        return memory.rss - memory.shared
    return 0


def watch(process: psutil.Popen) -> tuple[int, int]:
    """Wait for a driver; return the largest memory of it and of any of its workers, in bytes."""
    driver = worker = 0
    while process.poll() is None:
        driver = max(driver, anonymous_memory(process))
        with suppress(psutil.NoSuchProcess):
            children = process.children(recursive=True)
            worker = max([worker, *map(anonymous_memory, children)])
        time.sleep(0.25)
    return driver, worker


def main(
    times: Annotated[list[int] | None, typer.Option(min=1)] = None,
    workers: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    table = Table(title=f"Whole campaign, {workers} workers")
    for column in ("patterns", "seconds", "patterns/s", "driver (MiB)", "largest worker (MiB)"):
        table.add_column(column, justify="right")
    for factor in times or [1]:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            campaign = campaign_file(factor, directory)
            count = len(load_campaign(campaign).samples)
            options = f"-m pipelines.simulate --simulator kinematic --workers {workers}"
            paths = ["--campaign", campaign, "--store", directory / "store"]
            began = time.perf_counter()
            process = psutil.Popen([sys.executable, *options.split(), *paths])
            driver, worker = watch(process)
            seconds = time.perf_counter() - began
            if process.returncode:
                raise SystemExit(process.returncode)
            mib = f"{driver / 2**20:.0f}", f"{worker / 2**20:.0f}"
            table.add_row(f"{count:,}", f"{seconds:.0f}", f"{count / seconds:,.0f}", *mib)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
