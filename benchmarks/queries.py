"""Measure the README's five queries on a tagged data set.

python benchmarks/queries.py [--tag batio3-nomad-v1] [--store data/store] [--repeats 5]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer
import xarray as xr
from rich.console import Console
from rich.table import Table

from bragg_data.store.repository import DEFAULT_URI, open_snapshot


def by_system(ds: xr.Dataset) -> str:
    trigonal = ds.sel(sample=ds.crystal_system == 2)
    return f"{trigonal.sizes['sample']:,} trigonal samples, intensities not read"


def all_labels(ds: xr.Dataset) -> str:
    labels = ds.drop_vars("intensity").load()
    return f"{labels.sizes['sample']:,} samples, {len(labels.data_vars)} variables"


def box(ds: xr.Dataset) -> str:
    inside = (ds.crystal_system == 1) & (abs(ds.a - 4.0) < 0.0165) & (abs(ds.c - 4.03) < 0.0165)
    patterns = ds.sel(sample=inside).isel(sample=slice(1000)).intensity.load()
    return f"{patterns.sizes['sample']:,} patterns read"


def nearest(ds: xr.Dataset) -> str:
    distance = (ds.a - 3.994) ** 2 + (ds.c - 4.034) ** 2
    best = ds.isel(sample=int(distance.where(ds.crystal_system == 1).argmin("sample")))
    return f"a {float(best.a):.3f}, c {float(best.c):.3f}, pattern of {best.intensity.load().size}"


def counts(ds: xr.Dataset) -> str:
    names = ds.crystal_system.attrs["flag_meanings"].split()
    numbers = np.bincount(ds.crystal_system, minlength=len(names))
    return ", ".join(f"{n} {c:,}" for n, c in zip(names, numbers, strict=True) if c)


QUERIES: dict[str, Callable[[xr.Dataset], str]] = {
    "labels of all samples": all_labels,
    "by crystal system": by_system,
    "1,000 samples of a cell-parameter box": box,
    "nearest cell and its pattern": nearest,
    "counts": counts,
}


def main(
    tag: Annotated[str, typer.Option()] = "batio3-nomad-v1",
    store: Annotated[str, typer.Option()] = DEFAULT_URI,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    table = Table(title=f"Queries on {tag}, median of {repeats}, snapshot opened each time")
    table.add_column("query")
    table.add_column("seconds", justify="right")
    table.add_column("result")
    for name, query in QUERIES.items():
        seconds, result = [], ""
        for _ in range(repeats):
            began = time.perf_counter()
            result = query(open_snapshot(tag, store))
            seconds.append(time.perf_counter() - began)
        table.add_row(name, f"{np.median(seconds):.3f}", result)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
