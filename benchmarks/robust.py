"""Measure answers on draws of measured-looking profiles: sureness, refusal, convergence.

    python benchmarks/robust.py [--model URI] [--draws 5000] [--foreign 200] [--refined 500]
                                [--other FILE.instprm]

Draws are fresh: their seeds are none that a model learns from. The first table says how right and
how sure the model is, the second what it refuses, the third from which starts the refinement finds
the right minimum, and how long that takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from bragg_data.campaign import Campaign
from bragg_data.crystal import CELL_PARAMETERS
from bragg_data.instrument import read_instruments
from bragg_data.kinematic import Simulator
from bragg_data.measured import GriddedProfile
from bragg_data.nuisance import Draws, Nuisance, draw, draw_labels, nuisance_of, simulator_for
from bragg_data.preprocessing import prepare_measured
from bragg_data.refinement import RefinementError, Refiner
from bragg_data.structure import read_phase
from bragg_models.predictors import Predictor
from catalog import models, runs
from pipelines.answers import library_of
from pipelines.registration import load_version

console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
SEED = 77_000
STARTS = ("both", "model", "library", "centre", "random")

CIF = """data_x
_cell_length_a {a}
_cell_length_b {a}
_cell_length_c {c}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt '{group}'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_U_iso_or_equiv
{atoms}
"""
FOREIGN = {
    "Si": ("F d -3 m:2", 5.4311, 5.4311, "Si1 Si 0.125 0.125 0.125 0.006"),
    "diamond": ("F d -3 m:2", 3.5671, 3.5671, "C1 C 0.125 0.125 0.125 0.002"),
    "rutile": ("P 42/m n m", 4.5937, 2.9587,
               "Ti1 Ti 0 0 0 0.005\nO1 O 0.3048 0.3048 0 0.005"),
}  # fmt: skip


@cache
def known(uri: str | None) -> tuple[Predictor, Campaign, Simulator]:
    tracking = runs.Tracking()
    version = models.find(tracking, uri or models.champion_uri(tracking))
    predictor = load_version(tracking.uri, version)
    return predictor, predictor.campaign, simulator_for(predictor.campaign)


def fresh(uri: str | None, seed: int, per_phase: int, calibrated: bool = True) -> Draws:
    _, campaign, simulator = known(uri)
    generator = np.random.default_rng([SEED, seed, calibrated])
    phase, cells = draw_labels(campaign, per_phase, generator)
    return draw(
        simulator, phase, cells, generator, nuisance_of(campaign),
        calibrated=calibrated,
    )  # fmt: skip


def asked(uri: str | None, seed: int, per_phase: int, calibrated: bool):
    with threadpool_limits(limits=1):
        draws = fresh(uri, seed, per_phase, calibrated)
        prepared = draws.prepared()
        predictor = known(uri)[0]
        kept = prepared.max(axis=1) > 0
        told = predictor.predict(prepared[kept], calibrated=np.full(kept.sum(), calibrated))
    return told, draws.phase[kept], draws.cells[kept]


def sureness(pool, uri: str | None, count: int) -> None:
    campaign = known(uri)[1]
    table = Table("draws", "n", "right", "ECE", "set", "in set", "accepted", "coverage of 90 %",
                  title="Fresh draws")  # fmt: skip
    for calibrated in (True, False):
        tasks = range(-(-count // 100))
        found = list(pool.map(asked, repeat(uri), tasks, repeat(100), repeat(calibrated)))
        p = np.concatenate([t.probabilities for t, _, _ in found])
        phase = np.concatenate([f[1] for f in found])
        cells = np.concatenate([f[2] for f in found])
        intervals = np.concatenate([t.intervals for t, _, _ in found])
        accepted = np.concatenate([t.accepted for t, _, _ in found])
        best = p.argmax(axis=1)
        right, sure = best == phase, p.max(axis=1)
        bins = np.clip((sure * 15).astype(int), 0, 14)
        ece = sum(
            (bins == b).mean() * abs(sure[bins == b].mean() - right[bins == b].mean())
            for b in np.unique(bins)
        )
        order = np.argsort(-p, axis=1)
        total = np.cumsum(np.take_along_axis(p, order, axis=1), axis=1)
        size = (total < 0.9).sum(axis=1) + 1
        inside = [phase[i] in order[i, : size[i]] for i in range(len(phase))]
        texts = []
        for code, one in enumerate(campaign.phases):
            own = right & (phase == code)
            covered = (cells >= intervals[..., 0]) & (cells <= intervals[..., 1])
            texts += [
                f"{one.name} {name} {covered[own, CELL_PARAMETERS.index(name)].mean():.1%}"
                for name in one.lattice.free_parameters
            ]
        table.add_row(
            "calibrated" if calibrated else "drifted", f"{len(p):,}", f"{right.mean():.2%}",
            f"{ece:.4f}", f"{size.mean():.2f}", f"{np.mean(inside):.2%}",
            f"{accepted.mean():.2%}", ", ".join(texts),
        )  # fmt: skip
    console.print(table)


def refusal(uri: str | None, count: int, other: Path | None) -> None:
    predictor, campaign, simulator = known(uri)
    generator = np.random.default_rng([SEED, 1])
    table = Table("offered", "n", "refused", title="What is foreign")
    kinds: dict[str, Draws | np.ndarray] = {}
    for name, (group, a, c, atoms) in FOREIGN.items():
        phase = read_phase(CIF.format(a=a, c=c, group=group, atoms=atoms), name)
        foreign = Simulator([phase], campaign.instrument, campaign.grid, size=campaign.size,
                          microstrain=campaign.microstrain, width_range=(-0.4, 1.0))  # fmt: skip
        cells = phase.cell * np.where(np.arange(6) < 3, generator.normal(1, 1e-3, (count, 1)), 1)
        kinds[name] = draw(foreign, np.zeros(count, dtype=int), cells, generator)
    own = fresh(uri, 10**6, -(-count // len(campaign.phases)))
    prepared = own.prepared()
    kinds["shuffled"] = generator.permuted(prepared, axis=1)
    quiet = Nuisance(counts=(1500.0, 60_000.0), background=(1e4, 1e6))
    rows = np.arange(len(own.phase))[:count]
    kinds["background"] = draw(simulator, own.phase[rows], own.cells[rows], generator, quiet)
    # At another angle the same spacings come at other times, and peaks are wider.
    instrument = campaign.instrument.moved(difc=0.81 * campaign.instrument.difc)
    if other is not None:
        banks = [i for i in read_instruments(other) if i.bank != campaign.instrument.bank]
        instrument = max(
            (i for i in banks if i.difc < campaign.instrument.difc), key=lambda i: i.difc
        )
    bank = Simulator(campaign.phases, instrument, campaign.grid, size=campaign.size,
                     microstrain=campaign.microstrain, width_range=(-0.4, 1.0))  # fmt: skip
    kinds["another bank"] = draw(bank, own.phase[rows], own.cells[rows], generator)
    for name, draws in kinds.items():
        values = draws.prepared() if isinstance(draws, Draws) else draws
        # Where nothing stands above the background, the question itself is refused.
        kept = values.max(axis=1) > 0
        refused = (~kept).sum() + (~predictor.predict(values[kept]).accepted).sum()
        table.add_row(name, f"{len(values):,}", f"{refused / len(values):.1%}")
    console.print(table)


def refined(uri: str | None, seed: int, per_phase: int):
    """For each start: whether the right minimum was found, whether the right phase, seconds."""
    with threadpool_limits(limits=1):
        predictor, campaign, _ = known(uri)
        refiner, library = _refiner(uri)
        draws = fresh(uri, 2 * 10**6 + seed, per_phase)
        generator = np.random.default_rng([SEED, 2, seed])
        rows = []
        for k, (phase, cell) in enumerate(zip(draws.phase, draws.cells, strict=True)):
            gridded = GriddedProfile(draws.intensity[k], draws.sigma[k], draws.covered[k])
            prepared = prepare_measured(gridded.intensity, gridded.sigma, gridded.covered)
            codes = range(len(campaign.phases))
            answer = predictor.predict(prepared[None])
            matches = library.index.match(prepared[None], gridded.covered[None])
            samples = campaign.samples
            of = [samples.cells[samples.phase == code] for code in codes]
            own = [(int(answer.phase[0]), answer.cells[0])]
            stored = [(c, matches.cells[0, c]) for c in codes]
            starts = {
                "both": own + stored,
                "model": own,
                "library": stored,
                "centre": [(c, np.median(of[c], axis=0)) for c in codes],
                "random": [(c, of[c][generator.integers(len(of[c]))]) for c in codes],
            }
            truth = refiner.refine(gridded, [(int(phase), cell)])[0]
            for name, begin in starts.items():
                began = time.perf_counter()
                try:
                    fits = refiner.refine(gridded, begin)
                except RefinementError:
                    rows.append((name, phase, False, False, time.perf_counter() - began))
                    continue
                seconds = time.perf_counter() - began
                own = [f for f in fits if f.phase == phase]
                # As good as from the truth itself, to a thousandth.
                found = bool(own) and own[0].chi2 < 1.001 * truth.chi2 + 1
                rows.append((name, phase, found, fits[0].phase == phase, seconds))
    return rows


@cache
def _refiner(uri: str | None):
    predictor, campaign, _ = known(uri)
    return Refiner(campaign), library_of(predictor)


def convergence(pool, uri: str | None, count: int) -> None:
    _, campaign, _ = known(uri)
    tasks = range(-(-count // 5))
    rows = [r for part in pool.map(refined, repeat(uri), tasks, repeat(5)) for r in part]
    table = Table("from", *(p.name for p in campaign.phases), "right phase first",
                  "median s", "95 % s", title="Right minimum found")  # fmt: skip
    for name in STARTS:
        own = [r for r in rows if r[0] == name]
        shares = [np.mean([r[2] for r in own if r[1] == c]) for c in range(len(campaign.phases))]
        seconds = [r[4] for r in own]
        table.add_row(
            name, *(f"{s:.1%}" for s in shares), f"{np.mean([r[3] for r in own]):.1%}",
            f"{np.median(seconds):.2f}", f"{np.percentile(seconds, 95):.2f}",
        )  # fmt: skip
    console.print(table, f"{count} draws of each phase")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the only champion")
    parser.add_argument("--draws", type=int, default=5000, help="of each phase")
    parser.add_argument("--foreign", type=int, default=200, help="of each kind")
    parser.add_argument("--other", type=Path, help=".instprm with another bank to offer")
    parser.add_argument("--refined", type=int, default=500, help="of each phase")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        if options.draws:
            sureness(pool, options.model, options.draws)
        if options.foreign:
            refusal(options.model, options.foreign, options.other)
        if options.refined:
            convergence(pool, options.model, options.refined)


if __name__ == "__main__":
    main()
