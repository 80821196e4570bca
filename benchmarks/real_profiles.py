"""Measure predictions for real profiles: silicon, diamond and SrTiO3, from TOML to cell.

    python benchmarks/real_profiles.py MEASURED_FOLDER [--work DIR]

MEASURED_FOLDER holds nomad_si640e, nomad_diamond and gem_srtio3. For each profile a campaign is
written and simulated, a model trained, the profile ingested, validated and predicted, by the
commands that a user types. The remaining error is traced to the calibration by refining with others
than the campaign's: the header's nominal difC, or (GEM) the instrument file of another cycle.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.campaign import load_campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.instrument.instprm import read_instruments
from bragg_data.measurement.load import load_measurements
from bragg_data.refinement.rietveld import Refiner
from pipelines.cli.style import with_uncertainty

console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)


@dataclass(frozen=True)
class Structure:
    """A phase of a campaign. Its cell is the truth, or that of a rival structure."""

    name: str
    group: str
    a: float
    c: float
    atoms: str  # label, element, x, y, z, Uiso (Å²)

    @property
    def known(self) -> dict[str, float]:
        return {"a": self.a} if self.a == self.c else {"a": self.a, "c": self.c}


@dataclass(frozen=True)
class Case:
    """A measured profile: its bank, a campaign's grid, the right phase, and a rival."""

    name: str
    file: str
    instrument: str
    bank: int
    two_theta: float
    grid: tuple[float, float, int]  # start (µs), relative step, points
    microstrain: float
    phases: tuple[Structure, Structure]


def _diamond_like(element: str, a: float, u: float) -> tuple[Structure, Structure]:
    """Return diamond's structure, and lonsdaleite's, whose layers are the same, stacked ABAB."""
    cubic = f"{element}1 {element} 0.125 0.125 0.125 {u}"
    hexagonal = f"{element}1 {element} 0.333333 0.666667 0.0625 {u}"
    return (
        Structure("cubic", "F d -3 m:2", a, a, cubic),
        Structure("hexagonal", "P 63/m m c", a / 2**0.5, a * 2 / 3**0.5, hexagonal),
    )


_A, _C = 5.511663, 7.804635
_MEAN = (_A * _A * _C / 4) ** (1 / 3)
_TETRAGONAL = """Sr1 Sr 0 0.5 0.25 0.0021
Ti1 Ti 0 0 0 0.0021
O1 O 0 0 0.25 0.0040
O2 O 0.244 0.744 0 0.0030"""
_CUBIC = """Sr1 Sr 0 0 0 0.0021
Ti1 Ti 0.5 0.5 0.5 0.0021
O1 O 0.5 0.5 0 0.0040"""
_SRTIO3 = (
    Structure("tetragonal", "I 4/m c m", _A, _C, _TETRAGONAL),
    Structure("cubic", "P m -3 m", _MEAN, _MEAN, _CUBIC),
)
_NOMAD = (
    "nomad_si640e/NOMAD_2023A_five_banks_Shifter_Si_640e_instrument_file.instprm",
    4,
    120.4,
    # The paper's steps from 2,000 to 16,000 µs, where GSAS-II refined this instrument file: below,
    # it has no Gaussian width; above, the profiles end in a cut line.
    (2000.0, 0.0009381, 2217),
    1000.0,
)
_GEM = "gem_srtio3/gem05984.gss", "gem_srtio3/SRTIO3_5K.EXP"
_GEM_OF_ANOTHER_CYCLE = "gem_srtio3/GEM.instprm"
_SILICON, _DIAMOND = _diamond_like("Si", 5.43118, 0.0059), _diamond_like("C", 3.56713, 0.0020)
CASES = (
    Case("silicon", "nomad_si640e/bank4_pattern.csv", *_NOMAD, _SILICON),
    Case("diamond", "nomad_diamond/NOM_127827.gsa", *_NOMAD, _DIAMOND),
    Case("srtio3-bank3", *_GEM, 3, 91.37, (2260.0, 0.001, 2160), 500.0, _SRTIO3),
    Case("srtio3-bank4", *_GEM, 4, 154.46, (2040.0, 0.0008, 2710), 500.0, _SRTIO3),
)


def write_campaign(case: Case, measured: Path, directory: Path) -> None:
    """Write campaign, CIFs and calibrations; cells lie within 3 % of the known ones."""
    directory.mkdir(parents=True, exist_ok=True)
    banks = read_instruments(measured / case.instrument)
    (bank,) = (b for b in banks if abs(b.two_theta - case.two_theta) < 0.1)
    calibration = bank.with_parameters(bank=case.bank)
    (directory / "campaign.instprm").write_text(calibration.instprm)
    start, step, points = case.grid
    toml = f"""name = "{case.name}"
seed = 1
sampling = "sobol"
instrument.file = "campaign.instprm"
tof = {{ start = {start}, relative_step = {step}, points = {points} }}
broadening.microstrain = {case.microstrain}
"""
    for phase in case.phases:
        ranges = "\n".join(
            f"cell.{name} = {{ low = {0.97 * value:.5f}, high = {1.03 * value:.5f} }}"
            for name, value in phase.known.items()
        )
        toml += f"""
[[phases]]
name = "{phase.name}"
cif = "{phase.name}.cif"
samples = {1000 if len(phase.known) == 1 else 3000}
{ranges}
"""
        gamma = 120 if phase.name == "hexagonal" else 90
        (directory / f"{phase.name}.cif").write_text(
            f"data_{phase.name}\n_symmetry_space_group_name_H-M '{phase.group}'\n"
            f"_cell_length_a {phase.a:.6f}\n_cell_length_b {phase.a:.6f}\n"
            f"_cell_length_c {phase.c:.6f}\n"
            f"_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma {gamma}\nloop_\n"
            f"_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n"
            f"_atom_site_fract_z\n_atom_site_U_iso_or_equiv\n{phase.atoms}\n"
        )
    (directory / "campaign.toml").write_text(toml)


def predict(case: Case, measured: Path, directory: Path, figures: Path) -> dict[str, Any]:
    """Go from a campaign file to the refined cell."""
    began, seconds, warned = time.perf_counter(), dict[str, float](), list[str]()
    file, right = measured / case.file, case.phases[0]
    here, images = shlex.quote(str(directory)), shlex.quote(str(figures / case.name))
    data = f"--store {here}/store"
    tracking = f"--tracking {shlex.quote(f'sqlite:///{directory.absolute()}/mlflow.db')}"
    bank = f"--bank {case.bank}"
    if file.suffix != ".gsa":  # whose header states the angle
        bank += f" --two-theta {case.two_theta}"

    def command(name: str, line: str) -> str:
        words, start = [sys.executable, "-m", f"pipelines.{name}"], time.perf_counter()
        words += shlex.split(line)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}")
        seconds[name] = round(time.perf_counter() - start, 1)
        warned.extend(f"{name}: {t}" for t in done.stderr.splitlines() if "Warning" in t)
        return done.stdout

    write_campaign(case, measured, directory)
    (directory / "labels.csv").write_text(
        f"file,bank,phase,{','.join(right.known)}\n"
        f"{file.name},{case.bank},{right.name},{','.join(map(str, right.known.values()))}\n"
    )
    profile = f"{shlex.quote(str(file))} {bank}"
    campaign = f"--campaign {here}/campaign.toml"
    command("simulate", f"{campaign} --yes {data}")
    command("train", f"guided --preset quick --state {here}/training {data} {tracking}")
    calibration = f"--instrument {here}/campaign.instprm --labels {here}/labels.csv"
    command("ingest", f"{profile} {calibration} --into measured {campaign} {data}")
    written = f"--json {here}/validation.json --figures {images}"
    command("validate", f"--data measured-v1 {written} {data} {tracking}")
    (validated,) = json.loads((directory / "validation.json").read_text())[0]["samples"]
    options = f"--instrument {here}/campaign.instprm --refine --json --plot {images}.png"
    (prediction,) = json.loads(command("predict", f"{profile} {options} {tracking}"))
    same = validated["predictions"]["guided"], prediction
    assert abs(same[0]["cell"]["a"] / same[1]["cell"]["a"] - 1) < 1e-5, "validate, predict differ"
    times = {"seconds": seconds, "all_seconds": time.perf_counter() - began}
    return {"case": case, "prediction": prediction, **times, "warned": warned}


def errors_of(case: Case, phase: str, cell: dict[str, float]) -> np.ndarray:
    """Return the relative errors of a, b and c in 1e-4."""
    known = next(p.known for p in case.phases if p.name == phase)
    return np.array([1e4 * (cell[name] / known.get(name, known["a"]) - 1) for name in "abc"])


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Relative errors in 1e-4, of the length that is furthest off")
    headings = "profile,is,model,library,refined,error,mean,Rwp,χ² red.,system right,s"
    for name in headings.split(","):
        left = name in ("profile", "is", "refined")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        case, prediction = row["case"], row["prediction"]
        model = prediction["evidence"][0]
        three = model, prediction["library_match"], prediction["refined"]
        all_errors = [errors_of(case, cell["phase"], cell["cell"]) for cell in three]
        worst = [f"{max(errors, key=abs):+.2f}" for errors in all_errors]
        fit, right = prediction["refined"], case.phases[0].name
        cell = " ".join(
            f"{p} {with_uncertainty(fit['cell'][p], fit['su'][p])}" for p in fit["free_parameters"]
        )
        starts = f"{model['phase']} {worst[0]}", f"{three[1]['phase']} {worst[1]}"
        quality = f"{100 * fit['rwp']:.2f} %", f"{fit['reduced_chi2']:.1f}"
        refined = f"{fit['phase']} {cell} Å", worst[2], f"{all_errors[2].mean():+.2f}", *quality
        accurate = ", ".join("yes" if cell["phase"] == right else "no" for cell in three)
        table.add_row(case.name, right, *starts, *refined, accurate, f"{row['all_seconds']:.0f}")
    console.print(table)


def explain(case: Case, measured: Path, directory: Path, table: Table) -> None:
    """Refine with several calibrations, a row of the table for each."""
    refiner = Refiner(load_campaign(directory / "campaign.toml"))
    campaign, right = refiner.campaign, case.phases[0]
    # Not from the known cell, where a fit may stop at once.
    start = campaign.phases[0].cell * np.repeat([1.001, 1.0], 3)
    angle = None if case.file.endswith(".gsa") else case.two_theta
    calibrations: dict[str, Path | None] = {"campaign": directory / "campaign.instprm"}
    if case.name == "diamond":
        calibrations["header"] = None
    elif case.name != "silicon":
        calibrations["another cycle"] = measured / _GEM_OF_ANOTHER_CYCLE
    for name, path in calibrations.items():
        (profile,) = load_measurements(measured / case.file, campaign, path, case.bank, angle)
        assert profile.calibration is not None
        for zero in (False, True) if name == "campaign" else (False,):
            (fit,) = refiner.refine(profile.gridded, [(0, start)], tzero=zero)
            cell = dict(zip(CELL_PARAMETERS, fit.cell.tolist(), strict=True))
            errors = errors_of(case, right.name, cell)
            table.add_row(
                case.name,
                name + ", Zero refined" * zero,
                f"{profile.calibration.difc:.2f}",
                *(f"{value:+.2f}" for value in (errors[0], errors[2], errors.mean())),
                f"{100 * fit.pattern_fit.rwp:.2f} %",
            )


def main(
    measured: Annotated[Path, typer.Argument(help="Folder of the measured profiles.")],
    work: Annotated[Path | None, typer.Option(help="By default a temporary directory.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = work or Path(temporary)
        (work / "figures").mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for case in CASES:
            rows.append(predict(case, measured, work / case.name, work / "figures"))
            console.print(f"{case.name}: seconds {rows[-1]['seconds']}", soft_wrap=True)
        show(rows)
        for warning in dict.fromkeys(text for row in rows for text in row["warned"]):
            console.print(warning, soft_wrap=True)
        headings = ("profile", "calibration", "difC", "a", "c", "mean", "Rwp")
        table = Table(*headings, title="From the known cell, under other calibrations")
        for case in CASES:
            explain(case, measured, work / case.name, table)
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
