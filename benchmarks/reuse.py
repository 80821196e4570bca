"""Measure how long GSAS-II takes when one of three structures is added, against a run from scratch.

    python benchmarks/reuse.py [--cells 300] [--workers N]    # BRAGG_GSAS2_PATH names GSAS-II

Rutile and calcite, then orthorhombic BaTiO3 in addition: into a store that has the first two, and
into an empty one. The changed share is that of the patterns, and of the time from scratch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from bragg_data.campaign import BUILT_IN
from bragg_data.store.repository import Store

STRUCTURES = Path(__file__).parents[1] / "tests" / "data" / "structures"
NAMES = ("rutile", "calcite", "batio3_amm2")


def campaign_file(directory: Path, names: tuple[str, ...], cells: int) -> Path:
    """Write a campaign of some of the published structures, next to their CIFs."""
    head, *phases = (STRUCTURES / "structures.toml").read_text().split("[[phases]]")
    head = head.replace("../../../bragg_data/campaigns/", "")
    chosen = [text for name in names for text in phases if f'name = "{name}"' in text]
    path = directory / f"{len(names)}.toml"
    path.write_text("[[phases]]".join([head, *chosen]).replace("samples = 5", f"samples = {cells}"))
    return path


def main(
    cells: Annotated[int, typer.Option(min=1, help="Of each structure.")] = 300,
    workers: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for file in (*STRUCTURES.glob("*.cif"), BUILT_IN / "nomad_bank4.instprm"):
            shutil.copy(file, directory)

        def simulate(names: tuple[str, ...], store: str) -> float:
            campaign = campaign_file(directory, names, cells)
            options = f"-m pipelines.simulate --simulator gsas2 --yes --workers {workers}"
            paths = ["--campaign", campaign, "--store", directory / store]
            began = time.perf_counter()
            subprocess.run([sys.executable, *options.split(), *paths], check=True)
            return time.perf_counter() - began

        two, added = simulate(NAMES[:2], "store"), simulate(NAMES, "store")
        scratch = simulate(NAMES, "scratch")
        hashes = {
            Store(directory / store).open(f"structures-v{number}").attrs["content_hash"]
            for store, number in (("store", 2), ("scratch", 1))
        }
        print(
            f"Two structures {two:.0f} s, a third added {added:.0f} s, three from scratch "
            f"{scratch:.0f} s: {added / scratch:.2f}, at a changed share of 0.33 of the patterns "
            f"and {1 - two / scratch:.2f} of the time; contents "
            f"{'equal' if len(hashes) == 1 else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    typer.run(main)
