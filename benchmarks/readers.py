"""Measure how fast profiles are read: processor time of a call, in a table.

python benchmarks/readers.py [--repeats 9]

Files are generated: FXYE and columns of 60,000 points; 45 banks of STD data over time maps, as
HIPPO's; a powder CIF and a processed workspace of Mantid with as many points. The processor time of
NeXus includes that of the process in which it is read.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.measurement.readers import read_profiles

POINTS, BANKS, CHANNELS = 60_000, 45, 9000
BARS = {"FXYE": 0.050, "HIPPO": 0.5}  # s


def fxye(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    rows = "".join(f"{t:15.5f}{c:18.8f}{s:18.8f}\n" for t, c, s in zip(x, y, y**0.5, strict=True))
    record = f"BANK 1 {len(x)} {len(x)} SLOG {x[0]:.1f} {x[-1]:.1f} 0.00004 0 FXYE\n"
    path.write_text("title\n# a comment\n" + record + rows)


def columns(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    np.savetxt(path, np.stack([x, y, np.sqrt(y)], axis=1), fmt="%.5f", header="tof y e")


def pdcif(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    rows = "".join(f"{t:.5f} {c:.0f}({s:.0f})\n" for t, c, s in zip(x, y, np.sqrt(y), strict=True))
    tags = "_pd_meas_time_of_flight\n_pd_meas_intensity_total\n"
    path.write_text(f"data_powder\nloop_\n{tags}{rows}")


def mantid(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("mantid_workspace_1/workspace")
        group["values"], group["errors"], group["axis1"] = y[None], np.sqrt(y)[None], x
        group["axis1"].attrs["units"] = "TOF"


def hippo(path: Path, _: np.ndarray, y: np.ndarray) -> None:
    """Banks of counts (I2, F6.0) over a time map of steps of 10 ticks of 50 ns."""
    rows = [f"{count:8.0f}" for count in np.resize(y, CHANNELS)]
    data = "".join("".join(rows[k : k + 10]) + "\n" for k in range(0, CHANNELS, 10))
    text = f"title\nTIME_MAP 1 4 1 TIME_MAP 50\n       1   20000      10{20000 + 10 * CHANNELS:8}\n"
    for bank in range(1, BANKS + 1):
        text += f"BANK {bank:2} {CHANNELS} {CHANNELS // 10} TIME_MAP 1 STD\n" + data
    path.write_text(text)


KINDS: dict[str, Callable[[Path, np.ndarray, np.ndarray], None]] = {
    "FXYE": fxye,
    "columns": columns,
    "pdCIF": pdcif,
    "NeXus": mantid,
    "HIPPO": hippo,
}


def processor_time() -> float:
    """Return the processor time of this process, and of its children that have ended, in s."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(path: Path, repeats: int) -> list[float]:
    """Return the processor time of each of some calls."""
    result = []
    for _ in range(repeats + 1):  # the first one imports
        began = processor_time()
        read_profiles(path)
        result.append(processor_time() - began)
    return result[1:]


def main(repeats: Annotated[int, typer.Option(min=1, help="Calls of each kind.")] = 9) -> None:
    x = 1000 * 1.00004 ** np.arange(POINTS)
    y = np.random.default_rng(1).poisson(300, POINTS).astype(float) + 1
    table = Table(title="Reading of a file, processor time in ms")
    for column in ("kind", "points", "size, MB", "median", "least", "bar"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    with tempfile.TemporaryDirectory() as directory:
        for kind, write in KINDS.items():
            path = Path(directory) / kind
            write(path, x, y)
            points = sum(len(p.tof) for p in read_profiles(path))
            measured = 1e3 * np.array(seconds(path, repeats))
            figures = f"{np.median(measured):.0f}", f"{measured.min():.0f}"
            bar = f"{1e3 * BARS[kind]:.0f}" if kind in BARS else ""
            table.add_row(kind, f"{points}", f"{path.stat().st_size / 1e6:.1f}", *figures, bar)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
