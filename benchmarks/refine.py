"""Joint refinement: how often it reaches the minimum from cells 2 % away, and how long it takes.

    python benchmarks/refine.py [--draws 20] [--only NAME …] [--json]

Published structures of all seven crystal systems on NOMAD's bank 4, and on six banks from 15° to
155° with NOMAD's resolution. Each draw has a cell, displacements, broadening and counts of
its own, and starts from another cell, each length and angle up to 2 % away. The right minimum is
the refinement's from the true cell: its reduced χ² to within 0.01.
"""

import json
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.crystallography.structure import Phase, read_phase
from bragg_data.instrument.instprm import Instrument, TofGrid, read_instruments
from bragg_data.measurement.readers import Profile
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.measured_bank import MeasuredBank, measured_bank
from bragg_data.simulation.kinematic import Simulator

ROOT = Path(__file__).resolve().parents[1]
STRUCTURES = {
    "silicon": "cubic",
    "batio3_cubic": "cubic",
    "rutile": "tetragonal",
    "srtio3": "tetragonal",
    "batio3_amm2": "orthorhombic",
    "batio3_it160": "trigonal",
    "calcite": "trigonal",
    "hydroxyapatite": "hexagonal",
    "baddeleyite": "monoclinic",
    "kyanite": "triclinic",
}
_ANGLES = (155.0, 120.0, 90.0, 65.0, 35.0, 15.0)
_FAR = 0.02  # of lengths; of angles in rad
console = Console()


def _structure(name: str) -> Phase:
    folders = ROOT / "tests" / "data" / "structures", ROOT / "bragg_data" / "campaigns"
    (file,) = (path for folder in folders if (path := folder / f"{name}.cif").exists())
    return read_phase(file, name)


def _banks(count: int) -> list[tuple[Instrument, TofGrid]]:
    (nomad,) = read_instruments(ROOT / "bragg_data" / "campaigns" / "nomad_bank4.instprm")
    sine = np.sin(np.radians(nomad.two_theta / 2))
    banks = []
    for number, angle in enumerate(_ANGLES[:count] if count > 1 else (nomad.two_theta,)):
        ratio = float(np.sin(np.radians(angle / 2)) / sine)
        bank = nomad.with_parameters(bank=number + 1, two_theta=angle, difc=nomad.difc * ratio)
        start = 4200.0 * ratio
        banks.append((bank, TofGrid(start, 4e-4, int(np.log(16_500 / 4200) / 4e-4))))
    return banks


@lru_cache(maxsize=8)
def _simulator(phase: Phase, instrument: Instrument, grid: TofGrid) -> Simulator:
    return Simulator([phase], instrument, grid, 10.0, 300.0, width_range=(-0.2, 1.5))


def _measured(
    phase: Phase, cell: np.ndarray, banks: list[tuple[Instrument, TofGrid]], seed: int
) -> list[MeasuredBank]:
    random = np.random.default_rng([seed, 1])
    sample = {
        "u_scale": random.uniform(0.6, 1.8),
        "size": random.uniform(0.3, 4.0),
        "microstrain": random.uniform(300.0, 2000.0),
    }
    measured = []
    for instrument, fine in banks:
        simulator = _simulator(phase, instrument, fine)
        (pattern,) = simulator.simulate(np.zeros(1, dtype=int), cell[None], **sample)
        tof = fine.tof[12:-12:2]
        x = np.linspace(-1, 1, len(tof))
        peaks = pattern[12:-12:2] / pattern.max()
        counts = random.uniform(2e3, 2e4)
        expected = counts * (peaks + 0.1 * (1 + 0.4 * x - 0.3 * x**2))
        y = random.poisson(expected).astype(np.float64)
        profile = Profile(tof, y, np.sqrt(np.maximum(y, 1)), bank=instrument.bank)
        measured.append(measured_bank(profile, instrument))
    return measured


def _moved(phase: Phase, cell: np.ndarray, far: float, random: np.random.Generator) -> np.ndarray:
    free = cell[phase.lattice.free_columns]
    is_length = np.array([name in "abc" for name in phase.lattice.free_parameters])
    reach = np.where(is_length, far * free, np.degrees(far))
    moved = free + random.uniform(-1, 1, len(free)) * reach
    return np.asarray(phase.lattice.cells(moved[None])[0])


def main(
    draws: Annotated[int, typer.Option(min=1, help="Of each structure.")] = 20,
    only: Annotated[list[str] | None, typer.Option(help="Structure (repeatable).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    warnings.simplefilter("ignore")
    rows = []
    for name in only or STRUCTURES:
        phase = _structure(name)
        right, far_off, seconds = 0, [], []
        for draw in range(draws):
            random = np.random.default_rng([draw, 0])
            cell = _moved(phase, phase.cell, 0.01, random)
            refiner = JointRefiner(_measured(phase, cell, _banks(1), draw), [phase])
            options = JointOptions((3e-4,))
            truth = refiner.refine(options, [cell])
            start = _moved(phase, cell, _FAR, random)
            began = time.perf_counter()
            result = refiner.refine(options, [start])
            seconds.append(time.perf_counter() - began)
            allowed = truth.reduced_chi2 + 0.01
            right += result.converged and result.reduced_chi2 <= allowed
            far_off.append(result.accepted and result.reduced_chi2 > allowed)
        rows.append(
            {
                "structure": name,
                "system": STRUCTURES[name],
                "right": int(right),
                "draws": draws,
                "accepted_but_wrong": int(sum(far_off)),
                "median_ms": round(1e3 * float(np.median(seconds)), 1),
            }
        )
        console.print(rows[-1]) if not as_json else None
    rutile = _structure("rutile")
    joint = JointRefiner(_measured(rutile, rutile.cell, _banks(6), 0), [rutile])
    joint.refine(JointOptions((3e-4,) * 6))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        joint.refine(JointOptions((3e-4,) * 6))
        times.append(time.perf_counter() - began)
    total = {
        "right": sum(row["right"] for row in rows) / sum(row["draws"] for row in rows),
        "structures": rows,
        "one_bank_ms": float(np.median([row["median_ms"] for row in rows])),
        "six_banks_ms": round(1e3 * float(np.median(times)), 1),
    }
    if as_json:
        print(json.dumps(total, indent=2))
        return
    table = Table("structure", "system", "right minimum", "accepted, wrong", "median (ms)")
    for row in rows:
        share = f"{row['right']} of {row['draws']}"
        table.add_row(row["structure"], row["system"], share, f"{row['accepted_but_wrong']}",
                      f"{row['median_ms']:.0f}")  # fmt: skip
    console.print(table)
    console.print(f"right {100 * total['right']:.1f} %; six banks {total['six_banks_ms']:.0f} ms")


if __name__ == "__main__":
    typer.run(main)
