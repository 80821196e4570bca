"""Identification of phases in simulated mixtures of structures of a folder.

    python benchmarks/identify.py FOLDER [--mixtures 100] [--foreign 0] [--seed 0] [--json]

Each mixture has two to five structures, drawn at random, with weight fractions from a flat
Dirichlet distribution, none below 1 %. On NOMAD's bank 4, with counts, background, cells up to 1 %
from the CIFs', displacements, size and strain of its own. A phase counts as found if it, or a
structure that it is named to be hard to tell from, is identified. Errors of fractions are of
mixtures in which every phase was identified by its own name. Structures with displacement
parameters above 0.08 Å², which no refinement allows, are left out.

With ``--foreign`` as many samples of one or two structures follow, of which the main one is not
among those that are searched, nor is any with a pattern like its (in a cell within 3 %). They are
identified, and refined with the structure that explains most of them. A sample is explained away
if the result is accepted and names no unexplained line.
"""

import json
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.files import user_cache
from bragg_data.instrument.instprm import Instrument, TofGrid, read_instruments
from bragg_data.measurement.readers import Profile
from bragg_data.refinement.identification import identify
from bragg_data.refinement.joint_refinement import JointOptions
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.measured_bank import MeasuredBank, measured_bank
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.retrieval import PatternLibrary, pattern_library
from bragg_data.refinement.sample_refinement import other_metals, refine_sample
from bragg_data.simulation.kinematic import Simulator
from pipelines.refinement.inputs import read_known_structures

INSTRUMENT = Path(__file__).parents[1] / "bragg_data" / "campaigns" / "nomad_bank4.instprm"
TOF = 4500 * np.exp(8e-4 * np.arange(int(np.log(25_000 / 4500) / 8e-4)))
GRID = TofGrid(float(TOF[0]) * 0.97, 3e-4, int(np.log(TOF[-1] / TOF[0] * 1.06) / 3e-4))
ALIKE = 0.9  # correlation of blurred patterns, from which identification names alternatives
console = Console()


class Mixture(NamedTuple):
    """What a bank measured."""

    fractions: dict[str, float]  # weight per cent by phase
    bank: MeasuredBank


def usable(phase: Phase, instrument: Instrument) -> bool:
    """Return whether a structure can be simulated and refined."""
    try:
        _ = phase.at_angle(instrument.two_theta).scattering_lengths
    except CrystalError:
        return False
    return bool((phase.u_iso >= 0).all() and (phase.u_iso < 0.08).all())


def mixture(
    phases: list[Phase], instrument: Instrument, seed: int, counts: tuple[int, int] = (2, 5)
) -> Mixture:
    """Return a random mixture of some phases, from the least to the largest of ``counts``."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(counts[0], counts[1] + 1))
    chosen = rng.choice(len(phases), count, replace=False)
    weights = np.maximum(rng.dirichlet(np.ones(count)), 0.01)
    weights /= weights.sum()
    total = np.zeros(GRID.points)
    for place, weight in zip(chosen, weights, strict=True):
        phase = phases[place]
        free = np.array(phase.cell)[phase.lattice.free_columns]
        length = np.array([name in "abc" for name in phase.lattice.free_parameters])
        strain = rng.uniform(-0.008, 0.008) + rng.normal(0, 0.001, len(free))
        free = np.where(length, free * (1 + strain), free + rng.normal(0, 0.1, len(free)))
        simulator = Simulator([phase], instrument, GRID, 10.0, 300.0, width_range=(-0.2, 1.0))
        (pattern,) = simulator.simulate(
            np.zeros(1, dtype=int),
            phase.lattice.cells(free[None]),
            u_scale=rng.uniform(0.8, 1.3, 1),
            size=rng.uniform(0.3, 3, 1),
            microstrain=rng.uniform(200, 1500, 1),
        )
        total += weight / phase.cell_mass * pattern
    peaks = np.interp(TOF, GRID.tof, total)
    height, x = 10 ** rng.uniform(3.7, 4.7), np.linspace(-1, 1, len(TOF))
    expected = height * (peaks / peaks.max() + 0.06 * (1 + 0.3 * x - 0.2 * x**2))
    y = rng.poisson(expected).astype(np.float64)
    profile = Profile(TOF, y, np.sqrt(np.maximum(y, 1)), bank=4)
    names = [phases[place].name for place in chosen]
    fractions = dict(zip(names, (100 * weights).tolist(), strict=True))
    return Mixture(fractions, measured_bank(profile, instrument))


def foreign(
    library: PatternLibrary, instrument: Instrument, seed: int
) -> tuple[str, dict[str, JointResult]]:
    """Return the name of a sample's main phase, which is unknown, and the results without it."""
    sample = mixture(list(library.phases), instrument, seed, (1, 2))
    main_phase = max(sample.fractions, key=lambda name: sample.fractions[name])
    names = [phase.name for phase in library.phases]
    alike = library.similar(names.index(main_phase), 1.0, [sample.bank], ALIKE)
    unknown = {place for place, _ in alike}
    remaining = [k for k in range(len(names)) if k not in unknown]
    rest = replace(
        library,
        phases=tuple(library.phases[k] for k in remaining),
        banks=tuple(patterns[remaining] for patterns in library.banks),
    )
    results = {"identify": identify([sample.bank], rest, JointOptions((1e-4,))).result}
    (place, _), *_ = rest.candidates([sample.bank], 1)
    wrong = rest.phases[place]
    with suppress(RefinementError):
        results["refine"] = refine_sample(
            [sample.bank], [wrong], JointOptions((1e-4,)), metals=other_metals([wrong])
        )
    return main_phase, results


def of_mixtures(
    phases: list[Phase], library: PatternLibrary, instrument: Instrument, seed: int, mixtures: int
) -> dict[str, float]:
    """Return how well phases of mixtures are identified."""
    identified_count = missed = wrong = named = 0
    errors: list[float] = []
    scores: list[float] = []
    seconds: list[float] = []
    for number in range(seed, seed + mixtures):
        sample = mixture(phases, instrument, number)
        result, alternatives = identify([sample.bank], library, JointOptions((1e-4,)))
        seconds.append(result.seconds)
        identified = {phase.name: phase for phase in result.phases}
        matched: dict[str, str] = {name: name for name in identified if name in sample.fractions}
        for name in identified.keys() - matched.values():
            like = [n for n in alternatives.get(name, ()) if n in sample.fractions.keys() - matched]
            if like:
                matched[like[0]] = name
        large = [name for name, percent in sample.fractions.items() if percent >= 2]
        identified_count += sum(name in matched for name in large)
        lost = [name for name in large if name not in matched]
        missed += len(lost)
        extra = identified.keys() - matched.values()
        wrong += len(extra)
        named += len(identified)
        if identified.keys() == sample.fractions.keys():
            for name, phase in identified.items():
                errors.append(float(phase.weight_percent) - sample.fractions[name])
                scores.append(errors[-1] / float(phase.su_weight_percent))
        if lost or extra:
            console.print(f"{number}: not found {lost}, wrong {sorted(extra)}")
    return {
        "mixtures": mixtures,
        "identified": identified_count / max(identified_count + missed, 1),
        "wrong": wrong / max(named, 1),
        "fractions_rms": float(np.sqrt(np.mean(np.square(errors)))),
        "fractions_z_rms": float(np.sqrt(np.mean(np.square(scores)))),
        "fractions_compared": len(errors),
        "seconds_median": float(np.median(seconds)),
        "seconds_largest": float(np.max(seconds)),
    }


def of_foreign(
    library: PatternLibrary, instrument: Instrument, seed: int, samples: int
) -> dict[str, float]:
    """Return what becomes of samples whose main phase is unknown."""
    counts = Counter[str]()
    for number in range(seed, seed + samples):
        name, results = foreign(library, instrument, number)
        for command, result in results.items():
            fate = "refused" if not result.accepted else "lines_named"
            if result.accepted and not result.unexplained_lines:
                fate = "explained_away"
                phases = {p.name: round(float(p.weight_percent), 1) for p in result.phases}
                console.print(f"{number}: {name} explained away by {command}: {phases}")
            counts[f"{command}_{fate}"] += 1
            counts[f"{command}_samples"] += 1
    return dict(sorted(counts.items()))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of CIFs.")],
    mixtures: Annotated[int, typer.Option(min=0)] = 100,
    foreign_samples: Annotated[int, typer.Option("--foreign", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the first mixture; the others follow.")] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Identify the phases of simulated mixtures."""
    warnings.simplefilter("ignore")
    (instrument,) = read_instruments(INSTRUMENT)
    structures, _ = read_known_structures([folder])
    phases = [phase for phase in structures if usable(phase, instrument)]
    bank = mixture(phases, instrument, seed).bank
    library, _ = pattern_library(phases, [bank], user_cache())
    row: dict[str, float] = {"structures": len(library.phases)}
    if mixtures:
        row |= of_mixtures(phases, library, instrument, seed, mixtures)
    if foreign_samples:
        row |= of_foreign(library, instrument, seed, foreign_samples)
    if as_json:
        print(json.dumps(row, indent=2))
        return
    table = Table("what", "measured")
    for name, value in row.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
