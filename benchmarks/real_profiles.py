"""Measure predictions for real profiles: silicon, diamond and SrTiO3, from TOML to cell.

    python benchmarks/real_profiles.py MEASURED_FOLDER [--work DIR]

MEASURED_FOLDER holds nomad_si640e, nomad_diamond and gem_srtio3. For each profile a campaign is
written and simulated, a model trained, the profile ingested, validated and predicted, by the
commands that a user types. The remaining error is traced to the calibration by single lines and by
refining with several calibrations: ``campaign`` is the campaign's, ``header`` the file's nominal
difC, ``file`` (GEM) the positions of the instrument file instead of those of the .EXP file, and
``converted`` those of the .EXP file, converted from the profile function that they were refined
with to that of this project.
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
from scipy.optimize import least_squares

from bragg_data.campaign import load_campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.instrument.instprm import Instrument, read_instruments
from bragg_data.instrument.peak_shape import peak, peak_shape
from bragg_data.measurement.load import Measurement, load_measurements
from bragg_data.refinement.linear_fit import reflection_positions
from bragg_data.refinement.result import RefinementResult
from bragg_data.refinement.rietveld import Refiner
from pipelines.prediction.result import with_uncertainty

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
    # Instead of the instrument file's, and α1, β0, κ, σ² of the peaks that they were refined with.
    difc_difa_zero: tuple[float, float, float] | None = None
    ikeda: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


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
_GEM = "gem_srtio3/gem05984.gss", "gem_srtio3/GEM.instprm"
_BANK_3 = (6644.63, -3.99, -3.79), (2.614, 33.74, 49.57, 133.107)
_BANK_4 = (9050.17, -7.56, -3.40), (2.008, 32.13, 56.73, 60.325)
_SILICON, _DIAMOND = _diamond_like("Si", 5.43118, 0.0059), _diamond_like("C", 3.56713, 0.0020)
CASES = (
    Case("silicon", "nomad_si640e/bank4_pattern.csv", *_NOMAD, _SILICON),
    Case("diamond", "nomad_diamond/NOM_127827.gsa", *_NOMAD, _DIAMOND),
    Case("srtio3-bank3", *_GEM, 3, 91.37, (2260.0, 0.001, 2160), 500.0, _SRTIO3, *_BANK_3),
    Case("srtio3-bank4", *_GEM, 4, 154.46, (2040.0, 0.0008, 2710), 500.0, _SRTIO3, *_BANK_4),
)


def write_campaign(case: Case, measured: Path, directory: Path) -> None:
    """Write campaign, CIFs and calibrations; cells lie within 3 % of the known ones."""
    directory.mkdir(parents=True, exist_ok=True)
    banks = read_instruments(measured / case.instrument)
    (bank,) = (b for b in banks if abs(b.two_theta - case.two_theta) < 0.1)
    calibration = of_file = bank.with_parameters(bank=case.bank)
    if case.difc_difa_zero is not None:
        difc, difa, zero = case.difc_difa_zero
        calibration = of_file.with_parameters(difc=difc, difa=difa, tzero=zero)
        (directory / "file.instprm").write_text(of_file.instprm)
        (directory / "converted.instprm").write_text(converted(calibration, case.ikeda).instprm)
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


def predict(case: Case, measured: Path, directory: Path, figures: Path) -> list[dict[str, Any]]:
    """Go from a campaign file to refined cells, for each calibration of the table."""
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
    rows = []
    for name in ("campaign", "converted") if case.difc_difa_zero else ("campaign",):
        options = f"--instrument {here}/{name}.instprm --refine --json --plot {images}-{name}.png"
        (prediction,) = json.loads(command("predict", f"{profile} {options} {tracking}"))
        row = {"case": case.name, "calibration": name, "prediction": prediction}
        times = {"seconds": seconds, "all_seconds": time.perf_counter() - began}
        rows.append(row | times | {"warned": warned})
    same = validated["predictions"]["guided"], rows[0]["prediction"]
    assert abs(same[0]["cell"]["a"] / same[1]["cell"]["a"] - 1) < 1e-5, "validate, predict differ"
    return rows


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
    cases = {case.name: case for case in CASES}
    for row in rows:
        case, prediction = cases[row["case"]], row["prediction"]
        three = prediction, prediction["library_match"], prediction["refined"]
        all_errors = [errors_of(case, cell["phase"], cell["cell"]) for cell in three]
        worst = [f"{max(errors, key=abs):+.2f}" for errors in all_errors]
        fit, right = prediction["refined"], case.phases[0].name
        cell = " ".join(
            f"{p} {with_uncertainty(fit['cell'][p], fit['su'][p])}" for p in fit["free_parameters"]
        )
        name = case.name + (f", {row['calibration']}" if case.difc_difa_zero else "")
        starts = f"{prediction['phase']} {worst[0]}", f"{three[1]['phase']} {worst[1]}"
        quality = f"{100 * fit['rwp']:.2f} %", f"{fit['reduced_chi2']:.1f}"
        refined = f"{fit['phase']} {cell} Å", worst[2], f"{all_errors[2].mean():+.2f}", *quality
        accurate = ", ".join("yes" if cell["phase"] == right else "no" for cell in three)
        table.add_row(name, right, *starts, *refined, accurate, f"{row['all_seconds']:.0f}")
    console.print(table)


def fitted(instrument: Instrument, d: np.ndarray, tof: np.ndarray) -> Instrument:
    """Return the instrument with difC, difA and Zero that put these spacings at these times."""
    columns = np.stack([d, d * d, np.ones_like(d)], axis=1) / tof[:, None]
    difc, difa, zero = np.linalg.lstsq(columns, np.ones_like(d), rcond=None)[0].tolist()
    return instrument.with_parameters(difc=difc, difa=difa, tzero=zero)


def converted(instrument: Instrument, ikeda: tuple[float, ...]) -> Instrument:
    """Convert positions of GSAS's profile function 2 (Ikeda & Carpenter) to this peak shape.

    There a peak begins at its position, here its maximum is near it. This peak is fitted to that
    one, with the constants of both and independent of the cell.
    """
    d, (rise, slow, kappa, variance) = np.geomspace(0.3, 2.0, 20), ikeda
    moved = []
    for spacing in d:
        sigma = spacing * variance**0.5
        wave = 2 * spacing * np.sin(np.radians(instrument.two_theta / 2))
        x = np.arange(-8 * sigma - 50, 8 * sigma + 500, min(sigma / 8, 0.5))
        t, a, b = np.maximum(x, 0), 1 / (rise * wave), 1 / slow
        share = np.exp(-81.799 / (kappa * wave**2))  # of neutrons that were moderated
        tail = np.exp(-b * t) - np.exp(-a * t) * (1 + (a - b) * t + ((a - b) * t) ** 2 / 2)
        sharp = (a * t) ** 2 * np.exp(-a * t)
        theirs = a / 2 * ((1 - share) * sharp + 2 * share * a**2 * b / (a - b) ** 3 * tail)
        gauss = np.exp(-((x[np.abs(x) < 6 * sigma] / sigma) ** 2) / 2)
        theirs = np.convolve(theirs, gauss / gauss.sum(), mode="same")
        shape = peak_shape(instrument, np.array([spacing]), size=1.0, microstrain=500.0)

        def difference(p, x=x, shape=shape, theirs=theirs):
            return p[1] * peak(x - p[0], shape) - theirs

        moved.append(least_squares(difference, [0.3 * sigma, 1.0], x_scale=[sigma, 1.0]).x[0])
    return fitted(instrument, d, instrument.tof_from_d_spacing(d) + np.array(moved))


def single_lines(
    refiner: Refiner, measured: Measurement, fit: RefinementResult, known: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return known spacings and measured times of a cubic phase's lines that stand alone.

    A line's displacement δ from the fit by linear least squares of the fit, its slope, and a
    straight background: y = s P - s δ P' + b + c ln T.
    """
    campaign, log_tof = refiner.campaign, np.log(refiner.campaign.grid.tof)
    parameters = {
        name: np.array([fit.parameters[name]]) for name in ("u_scale", "size", "microstrain")
    }
    phase, y = np.array([fit.phase]), measured.gridded
    pattern = refiner.simulator.simulate(phase, fit.cell[None], **parameters)[0].astype(float)
    columns = np.stack([pattern, np.gradient(pattern, log_tof), log_tof**0, log_tof], axis=1)
    tof, _ = reflection_positions(campaign.phases[fit.phase], fit.cell, campaign, visible=0.01)
    tof = tof[np.append(True, np.diff(np.log(tof)) > 1e-6)]  # 333 and 511 coincide
    lines = []
    for place in np.log(tof):
        near = np.abs(log_tof - place) < 0.008
        if (np.abs(np.log(tof) - place) < 0.012).sum() == 1 and y.covered[near].all():
            weighted = np.column_stack([columns, y.intensity])[near] / y.sigma[near, None]
            scale, slope = np.linalg.lstsq(weighted[:, :4], weighted[:, 4], rcond=None)[0][:2]
            lines.append((np.exp(place), -slope / scale))
    tof, moved = np.array(lines).T
    return campaign.instrument.d_spacing_from_tof(tof) * known / fit.cell[0], tof * (1 + moved)


def explain(case: Case, measured: Path, directory: Path, table: Table) -> str:
    """Refine with several calibrations; return a sentence on the positions of single lines."""
    refiner, sentence = Refiner(load_campaign(directory / "campaign.toml")), ""
    campaign, instrument = refiner.campaign, refiner.campaign.instrument
    # Not from the known cells, where a fit may stop at once.
    cells = [phase.cell * np.repeat([1.001, 1.0], 3) for phase in campaign.phases]
    cubic = [phase.a == phase.c for phase in case.phases].index(True)
    angle = None if case.file.endswith(".gsa") else case.two_theta
    names = ("campaign", "file", "converted") if case.difc_difa_zero else ("campaign", "header")
    for name in names[: 1 if case.name == "silicon" else None]:
        path = None if name == "header" else directory / f"{name}.instprm"
        (profile,) = load_measurements(measured / case.file, campaign, path, case.bank, angle)
        assert profile.calibration is not None
        for zero in (False, True) if name == "campaign" else (False,):
            (fit,) = refiner.refine(profile.gridded, [(0, cells[0])], tzero=zero)
            cell = dict(zip(CELL_PARAMETERS, fit.cell.tolist(), strict=True))
            errors = errors_of(case, case.phases[0].name, cell)
            table.add_row(
                case.name,
                name + ", Zero refined" * zero,
                f"{profile.calibration.difc:.2f}",
                *(f"{value:+.2f}" for value in (errors[0], errors[2], errors.mean())),
                f"{100 * fit.pattern_fit.rwp:.2f} %",
            )
        if name == "campaign":
            (fit,) = refiner.refine(profile.gridded, [(cubic, cells[cubic])])
            d, tof = single_lines(refiner, profile, fit, case.phases[cubic].a)
            off = 1e4 * (instrument.d_spacing_from_tof(tof) / d - 1)
            best = fitted(instrument, d, tof)
            left, rms = (1e4 * (best.d_spacing_from_tof(tof) / d - 1)).std(), (off**2).mean() ** 0.5
            constants = [f"{i.difc:.2f}, {i.difa:.2f}, {i.tzero:.2f}" for i in (best, instrument)]
            sentence = (
                f"{case.name}: {len(d)} single lines stand {off.min():+.1f} to {off.max():+.1f} "
                f"(mean {off.mean():+.1f}, rms {rms:.1f}) 1e-4 from where the known cell has them; "
                f"difC, difA, Zero of {constants[0]} instead of {constants[1]} would leave an rms "
                f"of {left:.1f}: these three take up {1 - left / rms:.0%}."
            )
    return sentence


def main(
    measured: Annotated[Path, typer.Argument(help="Folder of the measured profiles.")],
    work: Annotated[Path | None, typer.Option(help="By default a temporary directory.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = work or Path(temporary)
        (work / "figures").mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for case in CASES:
            rows += predict(case, measured, work / case.name, work / "figures")
            console.print(f"{case.name}: seconds {rows[-1]['seconds']}", soft_wrap=True)
        show(rows)
        for warning in dict.fromkeys(text for row in rows for text in row["warned"]):
            console.print(warning, soft_wrap=True)
        headings = ("profile", "calibration", "difC", "a", "c", "mean", "Rwp")
        table = Table(*headings, title="From the known cell, under other calibrations")
        causes = [explain(case, measured, work / case.name, table) for case in CASES]
        console.print(table)
        for cause in causes:
            console.print(cause, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
