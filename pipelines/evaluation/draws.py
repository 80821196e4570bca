"""Models tried on fresh draws: how sure they are, what they refuse, where refinements end.

The draws' seeds are none that a model learns from, so that what is counted here is what a user
meets who has such measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase, phase_on_orthogonal_axes
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import PreprocessingError, prepare_measured
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    Draws,
    MeasurementEffects,
    draw_labels,
    draw_profiles,
    effects_from_campaign,
    simulator_for,
)
from bragg_models.metrics import prediction_sets
from bragg_models.networks.robust import COVERAGE
from bragg_models.predictors import Predictor
from pipelines.cli.style import SYSTEM_COLORS
from pipelines.cluster.client import gather_with_progress
from pipelines.evaluation.tables import Sheet
from pipelines.prediction.acceptance import verdict_json
from pipelines.prediction.predict import INDICES, Library, library_of, match
from pipelines.registry.feature_views import RegisteredModel
from pipelines.registry.registration import load_version

_SEED = 77_000
_PER_TASK = 50  # draws of each phase that a model is asked about
_OFFERED_PER_TASK = 25  # foreign profiles
_REFINED_PER_TASK = 4  # draws that are refined
_SOME = 5  # one in so many foreign profiles is refined
_FEWEST = 5  # draws of which a share is drawn
_GROUPS = 8  # of intervals, by width
_BINS = 15  # of the calibration error
_AS_GOOD = 1.001, 1.0  # factor and addend on χ² of the fit from the truth: the same minimum

STARTS = {
    "both": "the model's cell and the library's",
    "model": "the model's cell alone",
    "library": "the library's cells of each phase",
    "centre": "the middle of the campaign's ranges",
    "random": "a cell of the campaign at random",
}
"""From where refinements begin."""

_FOREIGN = {
    "silicon": ("F d -3 m:2", (5.4311, 5.4311, 5.4311), "Si1 Si 0.125 0.125 0.125 0.006"),
    "diamond": ("F d -3 m:2", (3.5671, 3.5671, 3.5671), "C1 C 0.125 0.125 0.125 0.002"),
    "rutile": ("P 42/m n m", (4.5937, 4.5937, 2.9587),
               "Ti1 Ti 0 0 0 0.005\nO1 O 0.3048 0.3048 0 0.005"),
}  # fmt: skip
_WRONG_DIFC = "difC 19 % too small"
_OTHERS = ("genuine", "background alone", "shuffled points", _WRONG_DIFC)
_OTHER_BANK = "another bank"


@dataclass(frozen=True, eq=False)
class Sureness:
    """What a model says of n draws, and the truth.

    Attributes
    ----------
    probabilities : shape (n, n_phases)
    phase, cells : shapes (n,), (n, 6)
        The truth.
    intervals : shape (n, 6, 2)
        In Å and degrees; NaN where not free.
    accepted : shape (n,)
    """

    probabilities: NDArray[np.float64]
    phase: NDArray[np.intp]
    cells: NDArray[np.float64]
    intervals: NDArray[np.float64]
    accepted: NDArray[np.bool_]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the most probable phase is the truth, shape (n,)."""
        return np.asarray(self.probabilities.argmax(axis=1) == self.phase)

    @property
    def covered(self) -> NDArray[np.bool_]:
        """Whether parameters are inside their intervals, shape (n, 6)."""
        low, high = np.moveaxis(self.intervals, -1, 0)
        return np.asarray((self.cells >= low) & (self.cells <= high))

    def reliability(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return mean probability, share that is right, and number in each bin that is not empty.

        Of the first answer's probability, in fifteen bins.
        """
        sure = self.probabilities.max(axis=1)
        bins = np.clip((sure * _BINS).astype(int), 0, _BINS - 1)
        used = np.unique(bins)
        means = [(sure[bins == b].mean(), self.right[bins == b].mean()) for b in used]
        told, true = np.array(means).T
        return told, true, np.array([(bins == b).sum() for b in used], dtype=np.float64)


def sureness(client: Client, model: RegisteredModel, count: int) -> dict[str, Sureness]:
    """Ask a model about so many draws of each phase, of calibrated and of drifted instruments."""
    found = {}
    for calibrated in (True, False):
        counts = [min(_PER_TASK, count - low) for low in range(0, count, _PER_TASK)]
        tasks = [(model, seed, n, calibrated) for seed, n in enumerate(counts)]
        name = "calibrated" if calibrated else "drifted"
        parts = _done(client, _asked, tasks, f"Asking, {name}", [t[2] for t in tasks], "draws")
        fields = zip(*parts, strict=True)
        found[name] = Sureness(*(np.concatenate(values) for values in fields))
    return found


def sureness_sheets(found: dict[str, Sureness], phases: Sequence[Phase]) -> list[Sheet]:
    """Return how right and how sure a model is, and how often its intervals hold the truth."""
    count = len(next(iter(found.values())).phase)
    sure = Sheet(
        f"Fresh draws, {count:,} for each kind of instrument",
        ("instrument", "systems right", "expected\ncalibration error", "size of the\n90 % set",
         "truth in it", "accepted"),
    )  # fmt: skip
    free = [(code, p, n) for code, p in enumerate(phases) for n in p.lattice.free_parameters]
    inside = Sheet(
        "Inside their 90 % intervals, of draws whose system is right",
        ("instrument", *(f"{p.name} {name}" for _, p, name in free)),
    )
    for name, one in found.items():
        told, true, number = one.reliability()
        size, kept = prediction_sets(one.probabilities, one.phase)
        sure.add(
            name, f"{one.right.mean():.1%}", f"{(number * abs(told - true)).sum() / count:.4f}",
            f"{size.mean():.2f}", f"{kept.mean():.1%}", f"{one.accepted.mean():.1%}",
        )  # fmt: skip
        shares = []
        for code, _, parameter in free:
            own = one.right & (one.phase == code)
            column = one.covered[own, CELL_PARAMETERS.index(parameter)]
            shares.append(f"{column.mean():.1%}" if len(column) else "")
        inside.add(name, *shares)
    return [sure, inside]


def sureness_figure(found: dict[str, Sureness], phases: Sequence[Phase]) -> Figure:
    """Draw how reliable probabilities and intervals are.

    Three panels: the share of right first answers over what the model gives them; the share of
    parameters inside their 90 % intervals; and the same over the width of the interval, as wide
    ones should hold the truth no oftener than narrow ones.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    reliable, inside, wide = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))
    free = [(code, p, n) for code, p in enumerate(phases) for n in p.lattice.free_parameters]
    reliable.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for axis in (inside, wide):
        axis.axhspan(0.88, 0.92, color="0.92")
        axis.axhline(COVERAGE, color="0.6", linewidth=1)
        axis.set_ylim(0.7, 1.0)
        axis.set_ylabel("share inside the 90 % interval")
    for number, (name, one) in enumerate(found.items()):
        marker, fill = "os"[number % 2], "full" if number == 0 else "none"
        told, true, size = one.reliability()
        spread = np.sqrt(true * (1 - true) / size)
        reliable.errorbar(told, true, spread, fmt=marker, fillstyle=fill, color="#0072B2",
                          label=name, markersize=5)  # fmt: skip
        for place, (code, phase, parameter) in enumerate(free):
            own = one.right & (one.phase == code)
            column = CELL_PARAMETERS.index(parameter)
            held, color = one.covered[own, column], SYSTEM_COLORS[phase.crystal_system]
            if len(held) < _FEWEST:
                continue
            share = held.mean()
            inside.errorbar(place + 0.2 * number - 0.1, share,
                            np.sqrt(share * (1 - share) / len(held)), fmt=marker, fillstyle=fill,
                            color=color, markersize=6)  # fmt: skip
            if number:
                continue
            width = np.diff(one.intervals[own, column])[:, 0]
            order = np.array_split(np.argsort(width), min(_GROUPS, len(width) // _FEWEST))
            unit = "Å" if parameter in "abc" else "°"
            wide.plot([np.median(width[g]) / 2 for g in order], [held[g].mean() for g in order],
                      marker="o", markersize=4, color=color, linestyle="-" if parameter == "a"
                      else "--", label=f"{phase.name} {parameter} ({unit})")  # fmt: skip
    reliable.set_xlabel("probability of the first answer")
    reliable.set_ylabel("share that is right")
    reliable.legend(frameon=False)
    inside.set_xticks(range(len(free)), [f"{p.name}\n{n}" for _, p, n in free])
    wide.set_xscale("log")
    wide.set_xlabel("half width of the interval")
    wide.legend(frameon=False, fontsize=8, loc="lower right")
    for axis in (reliable, inside, wide):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


class Amount(NamedTuple):
    """How much is tried: draws of each phase, profiles of each foreign kind, refined draws."""

    draws: int = 0
    foreign: int = 0
    refined: int = 0
    other: Instrument | None = None


def tried(
    client: Client, model: RegisteredModel, phases: Sequence[Phase], label: str, amount: Amount
) -> tuple[list[Sheet], Figure | None]:
    """Try a model on fresh draws, show what is found, and return it."""
    sheets: list[Sheet] = []
    figure = None

    def add(*found: Sheet) -> None:
        for sheet in found:
            sheets.append(replace(sheet, title=f"{label}: {sheet.title}"))
            sheets[-1].show()

    if amount.draws:
        told = sureness(client, model, amount.draws)
        add(*sureness_sheets(told, phases))
        figure = sureness_figure(told, phases)
    if amount.foreign:
        add(refusal(client, model, amount.foreign, other=amount.other))
    if amount.refined:
        add(convergence(client, model, amount.refined, phases))
    return sheets, figure


class Offered(NamedTuple):
    """What happened to a profile: refused by the model, and after a refinement (or None)."""

    by_model: bool
    refined: bool | None


def refusal(
    client: Client, model: RegisteredModel, count: int, *, other: Instrument | None = None
) -> Sheet:
    """Offer foreign profiles to a model, so many of each kind, and refine them.

    Parameters
    ----------
    client, model
        Whom to ask where.
    count
        Of each kind.
    other
        A bank that is not the campaign's.
    """
    kinds = [*_FOREIGN, *_OTHERS, *([_OTHER_BANK] if other else [])]
    sizes = [min(_OFFERED_PER_TASK, count - low) for low in range(0, count, _OFFERED_PER_TASK)]
    tasks = [
        (model, kind, seed, n, other) for kind in kinds for seed, n in enumerate(sizes)
    ]  # fmt: skip
    parts = _done(client, _offered, tasks, "Offering", [t[3] for t in tasks], "profiles")
    sheet = Sheet(
        f"What is foreign, {count} profiles of each kind",
        ("offered", "refused by the model", "refused after refinement"),
        notes=[f"One in {_SOME} was refined, too."],
    )
    for kind in kinds:
        found = [one for task, part in zip(tasks, parts, strict=True) if task[1] == kind
                 for one in part]  # fmt: skip
        after = [one.refined for one in found if one.refined is not None]
        sheet.add(
            kind, f"{np.mean([one.by_model for one in found]):.1%}",
            f"{np.mean(after):.1%}" if after else "", style="bold" if kind == "genuine" else "",
        )  # fmt: skip
    return sheet


class Ended(NamedTuple):
    """Where a refinement ended."""

    start: str
    phase: int
    found: bool
    first: bool
    seconds: float


def convergence(
    client: Client, model: RegisteredModel, count: int, phases: Sequence[Phase]
) -> Sheet:
    """Return where refinements of so many draws of each phase end, from which start, how fast."""
    sizes = [min(_REFINED_PER_TASK, count - low) for low in range(0, count, _REFINED_PER_TASK)]
    tasks = [(model, seed, n) for seed, n in enumerate(sizes)]
    parts = _done(client, _refined, tasks, "Refining", [n * len(phases) for n in sizes], "draws")
    rows = [one for part in parts for one in part]
    sheet = Sheet(
        f"Right minimum found by the refinement, {count} draws of each phase",
        ("from", *(p.name for p in phases), "all", "right phase\nfirst", "median s", "95 % s"),
        notes=[
            f"The right minimum fits as well as the one that the truth itself leads to. From other "
            f"starts than the first, one draw in {_REFINED_PER_TASK}."
        ],
    )
    for start, told in STARTS.items():
        own = [one for one in rows if one.start == start]
        if not own:
            continue
        of_phase = [[one.found for one in own if one.phase == c] for c in range(len(phases))]
        seconds = [one.seconds for one in own]
        sheet.add(
            told, *(f"{np.mean(some):.1%}" if some else "" for some in of_phase),
            f"{np.mean([one.found for one in own]):.1%}",
            f"{np.mean([one.first for one in own]):.1%}", f"{np.median(seconds):.2f}",
            f"{np.percentile(seconds, 95):.2f}", style="bold" if start == "both" else "",
        )  # fmt: skip
    return sheet


def _done(
    client: Client,
    task: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    doing: str,
    sizes: Sequence[int],
    unit: str,
) -> list[Any]:
    """Return what tasks return, in their order."""
    return gather_with_progress(
        [client.submit(task, *one, pure=False) for one in arguments], sizes, doing, unit
    )  # fmt: skip


# ---- tasks of a worker -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _known(model: RegisteredModel) -> tuple[Predictor, Simulator]:
    predictor = load_version(model.tracking_uri, model.version)
    return predictor, simulator_for(predictor.campaign, cache=INDICES)


@lru_cache(maxsize=1)
def _refiner(model: RegisteredModel) -> tuple[Refiner, Library | None]:
    predictor, _ = _known(model)
    return Refiner(predictor.campaign, cache=INDICES), library_of(predictor)


def _fresh(
    model: RegisteredModel, seed: Sequence[int], count: int, calibrated: bool = True
) -> Draws:
    predictor, simulator = _known(model)
    campaign = predictor.campaign
    generator = np.random.default_rng([_SEED, *seed])
    phase, cells = draw_labels(campaign, count, generator)
    return draw_profiles(
        simulator, phase, cells, generator, effects_from_campaign(campaign), calibrated=calibrated
    )  # fmt: skip


def _asked(model: RegisteredModel, seed: int, count: int, calibrated: bool) -> tuple[Any, ...]:
    draws = _fresh(model, [seed, int(calibrated)], count, calibrated)
    prepared = draws.prepared()
    kept = prepared.max(axis=1) > 0
    told = _known(model)[0].predict(prepared[kept], calibrated=np.full(kept.sum(), calibrated))
    return told.probabilities, draws.phase[kept], draws.cells[kept], told.intervals, told.accepted


def _profiles(
    draws: Draws,
) -> Iterator[tuple[int, GriddedProfile, NDArray[np.float64] | None]]:
    """Yield row, profile, and what a model is asked about; None where there is no question."""
    for row, values in enumerate(zip(draws.intensity, draws.sigma, draws.covered, strict=True)):
        try:
            prepared = prepare_measured(*values)
        except PreprocessingError:
            prepared = None
        yield row, GriddedProfile(*values), prepared


def _starts(
    model: RegisteredModel, gridded: GriddedProfile, prepared: NDArray[np.float64]
) -> tuple[Any, list[tuple[int, NDArray[np.float64]]], list[tuple[int, NDArray[np.float64]]]]:
    """Return the model's answer, and starts from it and from the library."""
    predictor, _ = _known(model)
    _, library = _refiner(model)
    told = predictor.predict(prepared[None])
    own = [(int(told.phase[0]), told.cells[0])]
    if library is None:
        return told, own, []
    return told, own, match(library, prepared[None], gridded.covered[None]).starts(0)


@lru_cache(maxsize=2)
def _simulator_of(model: RegisteredModel, kind: str, other: Instrument | None) -> Simulator:
    """Return the simulator of a kind of foreign profiles; building one takes seconds."""
    predictor, own = _known(model)
    campaign = predictor.campaign
    if kind in _FOREIGN:
        phases = [phase_on_orthogonal_axes(kind, *_FOREIGN[kind])]
        return simulator_for(campaign, phases, cache=INDICES)
    if kind == _WRONG_DIFC:
        difc = 0.81 * campaign.instrument.difc
        other = campaign.instrument.with_parameters(difc=difc)
    elif kind != _OTHER_BANK:
        return own
    return simulator_for(campaign, instrument=other, cache=INDICES)


def _foreign(
    model: RegisteredModel, kind: str, seed: int, count: int, other: Instrument | None
) -> Draws:
    """Draw what is foreign, as noisy as what is not."""
    campaign = _known(model)[0].campaign
    simulator = _simulator_of(model, kind, other)
    generator = np.random.default_rng([_SEED, 1, seed])
    if kind in _FOREIGN:
        (phase,) = simulator.phases
        lengths = generator.normal(1, 1e-3, (count, 1))
        cells = phase.cell * np.where(np.arange(6) < 3, lengths, 1)
        return draw_profiles(simulator, np.zeros(count, dtype=int), cells, generator)
    phases = len(campaign.phases)
    code, cells = draw_labels(campaign, -(-count // phases), generator)
    some = generator.permutation(len(code))[:count]
    code, cells = code[some], cells[some]
    if kind == "background alone":
        # So much of it that no peak is seen.
        quiet = MeasurementEffects(counts=(1500.0, 60_000.0), background=(1e4, 1e6))
        return draw_profiles(simulator, code, cells, generator, quiet)
    draws = draw_profiles(simulator, code, cells, generator, effects_from_campaign(campaign))
    if kind == "shuffled points":
        for values in zip(draws.intensity, draws.sigma, draws.covered, strict=True):
            where = np.flatnonzero(values[2])
            order = generator.permutation(where)
            for one in values[:2]:
                one[where] = one[order]
    return draws


def _offered(
    model: RegisteredModel, kind: str, seed: int, count: int, other: Instrument | None
) -> list[Offered]:
    refiner, _ = _refiner(model)
    found = []
    for row, gridded, prepared in _profiles(_foreign(model, kind, seed, count, other)):
        if prepared is None:  # nothing stands above the background: the question is refused
            found.append(Offered(True, True))
            continue
        told, own, stored = _starts(model, gridded, prepared)
        by_model = told.accepted is not None and not told.accepted[0]
        if row % _SOME:
            found.append(Offered(by_model, None))
            continue
        try:
            fits = refiner.refine(gridded, own + stored)
        except RefinementError:
            found.append(Offered(by_model, None))
            continue
        # With free intensities it would be refused as well, for another reason.
        found.append(Offered(by_model, not verdict_json(told, 0, fits)["accepted"]))
    return found


def _refined(model: RegisteredModel, seed: int, count: int) -> list[Ended]:
    refiner, _ = _refiner(model)
    draws = _fresh(model, [seed, 2], count)
    campaign = _known(model)[0].campaign
    generator = np.random.default_rng([_SEED, 3, seed])
    samples = campaign.samples
    codes = range(len(campaign.phases))
    of = [samples.cells[samples.phase == code] for code in codes]
    found = []
    for row, gridded, prepared in _profiles(draws):
        if prepared is None:
            continue
        phase, cell = int(draws.phase[row]), draws.cells[row]
        _, own, stored = _starts(model, gridded, prepared)
        starts = {
            "both": own + stored,
            "model": own,
            "library": stored,
            "centre": [(c, np.median(of[c], axis=0)) for c in codes],
            "random": [(c, of[c][generator.integers(len(of[c]))]) for c in codes],
        }
        truth = refiner.refine(gridded, [(phase, cell)])[0]
        for name, begin in starts.items():
            if begin and (name == "both" or row % count == 0):  # one of each phase in a task
                found.append(_ended(refiner, gridded, name, begin, phase, truth.chi2))
    return found


def _ended(
    refiner: Refiner,
    gridded: GriddedProfile,
    name: str,
    begin: Sequence[tuple[int, NDArray[np.float64]]],
    phase: int,
    wanted: float,
) -> Ended:
    began = time.perf_counter()
    try:
        fits = refiner.refine(gridded, begin)
    except RefinementError:
        return Ended(name, phase, False, False, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    of_phase = [fit for fit in fits if fit.phase == phase]
    factor, addend = _AS_GOOD
    there = bool(of_phase) and of_phase[0].chi2 < factor * wanted + addend
    return Ended(name, phase, there, fits[0].phase == phase, seconds)
