"""A simulated series through all phases of BaTiO3: time, events, and errors of cells.

    python benchmarks/series.py [--frames 1000] [--workers 2] [--instrument FILE] [--keep FOLDER]
                                [--seed 0] [--json]

Frames on NOMAD's five banks from 480 K down to 80 K: cubic, tetragonal, orthorhombic and
rhombohedral, with first-order transitions and smooth thermal expansion, coordinates that are not
the CIFs', displacements and broadening that follow the temperature, counting statistics, and for
each bank a background, an incident spectrum, its error, and one of the calibration. A frame is
blank, the signal falls by 40 % at another, and CeO2 grows from 0.5 to 3 wt %. GSAS files are
written and ``bragg series`` refines them; reading counts. Errors of cells are over their standard
uncertainties, less the mean error of all frames, which is the calibration's.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table
from scipy.interpolate import make_interp_spline

from bragg_data.arrays import Array
from bragg_data.crystallography.structure import Phase, phase_on_orthogonal_axes, read_phase
from bragg_data.instrument.band import fwhm
from bragg_data.instrument.instprm import Instrument, TofGrid, read_instruments
from bragg_data.simulation.counting import TERMS, Measurements, count_neutrons
from bragg_data.simulation.kinematic import Simulator

ROOT = Path(__file__).resolve().parents[1]
CIFS = {
    "cubic": ROOT / "bragg_data" / "campaigns" / "batio3_cubic.cif",
    "tetragonal": ROOT / "bragg_data" / "campaigns" / "batio3_tetragonal.cif",
    "orthorhombic": ROOT / "tests" / "data" / "structures" / "batio3_amm2.cif",
    "rhombohedral": ROOT / "bragg_data" / "campaigns" / "batio3_trigonal.cif",
}
CEO2 = "Ce1 Ce 0 0 0 0.004\nO1 O 0.25 0.25 0.25 0.006"
HOT, COLD = 480.0, 80.0  # K
TRANSITIONS = {"tetragonal": 393.0, "orthorhombic": 278.0, "rhombohedral": 183.0}  # K, below
BLANK, APPEARS, DROP = 0.11, 0.37, 0.64  # of the series: where the other events are
# Angles of NOMAD's banks, and first and last time in µs of 2,999 bins each (as in GSAS_NaNO3_230C).
BANKS = {150.1: (1245, 15_554), 120.4: (1136, 18_919), 65.0: (704, 21_991), 31.0: (719, 19_521),
         15.0: (448, 19_491)}  # fmt: skip
BINS = 2999
COUNTS, SPECTRUM_ERROR, SHIFT, DIFC = 8000.0, 0.02, 0.01, 1e-4
POINTS = 8  # simulated ones, for the narrowest peak's full width
_SAMPLE = {"size": 1.0, "microstrain": 700.0}
console = Console()


@dataclass(frozen=True)
class Truth:
    """What a frame holds."""

    kelvin: float
    phase: str
    free: tuple[float, ...]
    impurity: float  # wt %
    counts: float


def truth(frame: int, frames: int) -> Truth:
    """Return what is simulated for a frame."""
    place = frame / frames
    kelvin = HOT + (COLD - HOT) * place
    phase = next((n for n, t in reversed(TRANSITIONS.items()) if kelvin < t), "cubic")
    below = (TRANSITIONS.get(phase, HOT) - kelvin) / 100
    bend = 0.0004 * below**2
    free = {
        "cubic": (4.0130 - 0.0048 * below + bend,),
        "tetragonal": (4.0003 - 0.0062 * below + 2 * bend, 4.0235 + 0.0110 * below - 3 * bend),
        "orthorhombic": (3.9850 - 0.0022 * below, 5.6740 - 0.004 * below, 5.6915 - 0.002 * below),
        "rhombohedral": (4.0035 - 0.0032 * below + 2 * bend, 89.860 - 0.010 * below),
    }[phase]
    growing = (place - APPEARS) / (1 - APPEARS)
    impurity = 0.5 + 2.5 * growing if frame >= round(APPEARS * frames) else 0.0
    counts = COUNTS * (0.6 if frame >= round(DROP * frames) else 1.0)
    blank = frame == round(BLANK * frames)
    return Truth(kelvin, phase, free, impurity, 0.0 if blank else counts)


def expected_events(frames: int) -> list[tuple[int, str]]:
    """Return the frames at which something happens, and its kind."""
    phases = [truth(frame, frames).phase for frame in range(frames)]
    changes = [(k, "transition") for k in range(1, frames) if phases[k] != phases[k - 1]]
    kinds = (BLANK, "blank"), (APPEARS, "phase appears"), (DROP, "scale")
    return sorted([*changes, *((round(place * frames), kind) for place, kind in kinds)])


def instruments(file: Path | None) -> list[Instrument]:
    """Return the five banks: those of a file, or with the peaks of NOMAD's bank 4."""
    if file is not None:
        return read_instruments(file)
    (nomad,) = read_instruments(ROOT / "bragg_data" / "campaigns" / "nomad_bank4.instprm")
    sine = np.sin(np.radians(nomad.two_theta / 2))
    banks = []
    for number, angle in enumerate(BANKS, start=1):
        # The moderator's pulse depends on the wavelength, which is so much shorter at a given d.
        ratio = float(np.sin(np.radians(angle / 2)) / sine)
        pulse = {
            "alpha": nomad.alpha * ratio,
            "beta_1": nomad.beta_1 / ratio**4,
            "sig_2": nomad.sig_2 * ratio**4,
        }
        of_bank = {"bank": number, "two_theta": angle, "difc": nomad.difc * ratio, "difa": 0.0}
        banks.append(nomad.with_parameters(**of_bank, **pulse))
    return banks


def simulate(
    frames: int, banks: list[Instrument], phases: dict[str, Phase], seed: int
) -> list[list[Array]]:
    """Return columns (bins, 3) of time in µs, counts and their σ, for each frame and bank."""
    truths = [truth(frame, frames) for frame in range(frames)]
    of_frames: list[list[Array]] = [[] for _ in truths]
    rng = np.random.default_rng([seed, 0])
    shifts = {
        name: rng.normal(0, SHIFT, 30)  # Å, the same in all frames
        for name in phases
    }
    for number, bank in enumerate(banks):
        rng = np.random.default_rng([seed, 1, number])
        limits = BANKS.get(bank.two_theta, (0.13 * bank.difc, 2.2 * bank.difc))
        edges = np.geomspace(*limits, BINS + 1)
        bins = np.sqrt(edges[1:] * edges[:-1])
        d = np.geomspace(*bank.d_spacing_from_tof(edges[[0, -1]]), 100)
        step = float((fwhm(bank, d) / bank.tof_from_d_spacing(d)).min()) / POINTS
        grid = TofGrid(0.98 * edges[0], step, int(np.log(1.04 * edges[-1] / edges[0]) / step))
        true = bank.with_parameters(difc=bank.difc * (1 + DIFC * rng.normal()))
        patterns = np.zeros((frames, BINS), dtype=np.float32)
        for name, phase in phases.items():
            simulator = Simulator([phase], true, grid, 10.0, 300.0, width_range=(-0.2, 1.0))
            modes = len(simulator.free_coordinates(0))
            rows = [k for k, t in enumerate(truths) if t.phase == name]
            if name == "ceo2":
                rows = [k for k, t in enumerate(truths) if t.impurity]
            for part in np.array_split(rows, -(-len(rows) // 64)):
                some = [truths[k] for k in part]
                free = [
                    (5.409 + 6e-5 * (t.kelvin - 293),) if name == "ceo2" else t.free for t in some
                ]
                kelvin = np.array([t.kelvin for t in some])
                sample = {key: np.full(len(some), value) for key, value in _SAMPLE.items()}
                sample["u_scale"] = 0.3 + 0.7 * kelvin / 293
                fine = simulator.simulate(
                    np.zeros(len(some), dtype=int),
                    phase.lattice.cells(np.array(free)),
                    shifts=np.tile(shifts[name][:modes], (len(some), 1)) if modes else None,
                    **sample,
                )
                total = make_interp_spline(np.log(grid.tof), fine, k=5, axis=1).antiderivative()
                share = np.array([t.impurity / 100 for t in some])
                weight = (share if name == "ceo2" else 1 - share) / phase.cell_mass
                patterns[part] += weight[:, None] * np.diff(total(np.log(edges)), axis=1)
        # Counts follow the amount of sample: the highest line of the first frame has the most.
        highest = patterns.max(axis=1)
        counts = np.array([t.counts for t in truths]) * highest / highest[0]
        background = 0.08 * highest[0] / highest
        is_blank = counts == 0
        patterns[is_blank] = 0.0
        common = {
            "background_terms": rng.normal(0, 0.3, TERMS) / np.arange(1, TERMS + 1),
            "error_terms": rng.normal(0, SPECTRUM_ERROR, TERMS) / np.arange(1, TERMS + 1),
        }
        measured = Measurements(
            counts=np.where(is_blank, COUNTS * 0.08, counts),
            impurity=np.zeros(frames),
            background=np.where(is_blank, 1.0, background),
            summit=np.full(frames, rng.uniform(0.4, 0.7)),
            fall=np.full(frames, np.log(5.0)),
            **{name: np.tile(terms, (frames, 1)) for name, terms in common.items()},
        )
        intensity, sigma = count_neutrons(patterns, bins, measured, rng)
        for k in range(frames):
            of_bins = [np.diff(edges) * values[k] for values in (intensity, sigma)]
            of_frames[k].append(np.stack([edges[:-1], *of_bins], axis=1))
    return of_frames


def write(columns: list[Array], banks: list[Instrument], kelvin: float, file: Path) -> None:
    """Write a frame as a GSAS file of logarithmic bins."""
    lines = [f"BaTiO3 at temperature {kelvin:.2f} K".ljust(80)]
    for bank, data in zip(banks, columns, strict=True):
        first, last, step = data[0, 0], data[-1, 0], np.log(data[1, 0] / data[0, 0])
        n = len(data)
        lines.append(f"# Total flight path {bank.difc:.1f}")
        head = f"BANK {bank.bank} {n} {n} SLOG {first:.4f} {last:.4f} {step:.8f} 0 FXYE"
        lines.append(head.ljust(80))
        lines += [f"{t:15.4f} {y:15.6f} {su:15.6f}" for t, y, su in data.tolist()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    frames: Annotated[int, typer.Option(min=60)] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    instrument: Annotated[Path | None, typer.Option(help="Of five banks.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the files, and for its output.")
    ] = None,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Refine a simulated series, and compare it with the truth."""
    warnings.simplefilter("ignore")
    banks = instruments(instrument)
    phases = {name: read_phase(file, name) for name, file in CIFS.items()}
    phases["ceo2"] = phase_on_orthogonal_axes("ceo2", "F m -3 m", (5.411,) * 3, CEO2)
    with tempfile.TemporaryDirectory() if keep is None else nullcontext(keep) as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ceo2.cif").write_text(phases["ceo2"].cif, encoding="utf-8")
        (folder / "nomad.instprm").write_text("\n".join(b.section for b in banks), "utf-8")
        files = []
        for number, columns in enumerate(simulate(frames, banks, phases, seed)):
            kelvin = truth(number, frames).kelvin
            files.append(folder / f"frame{number:04d}_{kelvin:.2f}.gsa")
            write(columns, banks, kelvin, files[-1])
        for name, file in CIFS.items():
            (folder / f"{name}.cif").write_text(file.read_text("utf-8"), "utf-8")
        entries, seconds = refined(folder, workers)
    report(entries, frames, seconds, as_json=as_json)


def refined(folder: Path, workers: int) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """Refine the files of a folder by the command; return its entries, and seconds.

    Those that passed, and those of processors, which say more on a busy machine.
    """
    files = sorted(file.name for file in folder.glob("frame*.gsa"))
    words = [word for name in (*CIFS, "ceo2") for word in ("--cif", f"{name}.cif")]
    words += ["--instrument", "nomad.instprm", "--bin-edges", "--along", "kelvin"]
    words += ["--workers", f"{workers}", "--csv", "series.csv", "--json"]
    command = [sys.executable, "-m", "pipelines.series", *files, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    of_processes: dict[int, float] = {}
    began = time.perf_counter()
    with (folder / "series.json").open("w", encoding="utf-8") as stream:
        running = psutil.Popen(command, cwd=folder, env=environment, stdout=stream)
        while running.poll() is None:
            with suppress(psutil.Error):
                for process in (running, *running.children(recursive=True)):
                    of_processes[process.pid] = sum(process.cpu_times()[:2])
            time.sleep(0.3)
    seconds = time.perf_counter() - began
    if running.returncode:
        raise SystemExit(running.returncode)
    entries = json.loads((folder / "series.json").read_text("utf-8"))
    return entries, (seconds, sum(of_processes.values()))


def report(
    entries: list[dict[str, Any]], frames: int, seconds: tuple[float, float], *, as_json: bool
) -> None:
    """Print how a series compares with the truth."""
    *results, last = entries
    events = [(event["frame"], event["kind"]) for event in last["events"]]
    missed, false = list(expected_events(frames)), []
    for frame, kind in events:
        near = [e for e in missed if e[1] == kind and abs(e[0] - frame) <= 2]
        missed.remove(near[0]) if near else false.append((frame, kind))
    relative, su, of_calibration, wrong, share = [], [], [], 0, []
    for number, entry in enumerate(results):
        true = truth(number, frames)
        if not true.counts:
            continue
        phase = {p["name"]: p for p in entry["phases"]}.get(true.phase)
        if phase is None or phase["cell"] is None:
            wrong += 1
            continue
        for name, value in zip(phase["free_parameters"], true.free, strict=True):
            relative.append(phase["cell"][name] / value - 1 if name in "abc" else np.nan)
            su.append(phase["su"][name] / value)
            of_calibration.append(phase["su_calibration"][name] / value)
            if name not in "abc":
                relative[-1] = phase["cell"][name] / value - 1
        other = {p["name"]: p for p in entry["phases"]}.get("ceo2")
        if true.impurity and other and other["weight_percent"] and other["su_weight_percent"]:
            share.append((other["weight_percent"] - true.impurity) / other["su_weight_percent"])
    errors, of_su = np.array(relative), np.array(su)
    common = float(np.average(errors, weights=1 / of_su**2))
    z = (errors - common) / of_su
    row = {
        "frames": frames,
        "seconds": round(seconds[0], 1),
        "processor_seconds": round(seconds[1], 1),
        "frames_per_second": round(frames / seconds[0], 2),
        "events_expected": len(expected_events(frames)),
        "events_missed": missed,
        "events_false": false,
        "wrong_phase": wrong,
        "cells_z_rms": round(float(np.sqrt(np.mean(z**2))), 3),
        "cells_z_above_4": int((np.abs(z) > 4).sum()),
        "cells_median_su": float(np.median(of_su)),
        "common_error": common,
        "fraction_z_rms": round(float(np.sqrt(np.mean(np.square(share)))), 3) if share else None,
    }
    if as_json:
        print(json.dumps(row, indent=2))
        return
    table = Table("what", "measured")
    for name, value in row.items():
        table.add_row(name.replace("_", " "), f"{value}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
