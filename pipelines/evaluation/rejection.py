"""Rejection of foreign profiles by a model, and by a refinement."""

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from distributed import Client

from bragg_data.campaign import Campaign
from bragg_data.campaign_file import MeasurementEffects
from bragg_data.crystallography.structure import phase_on_orthogonal_axes
from bragg_data.instrument.diffractometer import ANGLE_TOLERANCE, angles_apart
from bragg_data.instrument.instprm import Instrument, InstrumentError, read_instruments
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    Draws,
    draw_labels,
    draw_profiles,
    simulator_for,
)
from pipelines.cluster.client import gather_with_progress
from pipelines.evaluation import draws
from pipelines.evaluation.names import EvaluateError
from pipelines.evaluation.tables import ResultTable
from pipelines.prediction.acceptance import assess_acceptance
from pipelines.registry.feature_views import RegisteredModel
from pipelines.simulation.draws import Purpose, random_stream, task_sizes
from pipelines.simulation.foreign import FOREIGN_PHASES, foreign_cells

_PER_TASK = 25  # profiles
_REFINED_SHARE = 5  # one of this number of profiles is refined

_FOREIGN_PHASES = ("silicon", "diamond", "rutile")
_GENUINE, _BACKGROUND, _SHUFFLED = "genuine", "background alone", "shuffled points"
_WRONG_DIFC, _OTHER_BANK = "difC 19 % too small", "another bank"
# Kinds of profiles whose rejection is evaluated; only the genuine ones are to be accepted.
KINDS = (*_FOREIGN_PHASES, _GENUINE, _BACKGROUND, _SHUFFLED, _WRONG_DIFC, _OTHER_BANK)


class ForeignOutcome(NamedTuple):
    """Whether a profile was rejected by the model, and after a refinement (None: not refined)."""

    by_model: bool
    refined: bool | None


def rejection_table(
    client: Client, model: RegisteredModel, count: int, other_bank: Instrument | None
) -> ResultTable:
    """Return the shares of ``count`` foreign profiles that model and refinement reject.

    They are of each kind; ``other_bank`` is a bank that is not the campaign's.
    """
    kinds = [kind for kind in KINDS if other_bank is not None or kind != _OTHER_BANK]
    sizes = task_sizes(count, _PER_TASK)
    futures = [
        client.submit(foreign_task, model, kind, task, size, other_bank, pure=False)
        for kind in kinds
        for task, size in enumerate(sizes)
    ]
    parts = gather_with_progress(futures, sizes * len(kinds), "Predicting", "profiles")
    table = ResultTable(
        f"Foreign profiles, {count} of each kind",
        ("kind", "rejected by the model", "rejected after refinement"),
        notes=[f"One profile in {_REFINED_SHARE} was refined, too."],
    )
    for number, kind in enumerate(kinds):
        of_kind = parts[number * len(sizes) : (number + 1) * len(sizes)]
        outcomes = [outcome for part in of_kind for outcome in part]
        refined = [outcome.refined for outcome in outcomes if outcome.refined is not None]
        table.add(
            kind,
            f"{np.mean([outcome.by_model for outcome in outcomes]):.1%}",
            f"{np.mean(refined):.1%}" if refined else "",
            style="bold" if kind == _GENUINE else "",
        )
    return table


def find_other_bank(path: Path, campaign: Campaign) -> Instrument:
    """Return the bank of a file that is most similar to the campaign's, but at another angle.

    Raises `EvaluateError` if there is none.
    """
    difc, angle = campaign.instrument.difc, campaign.instrument.two_theta
    # The same bank with another calibration is not another bank.
    banks = read_instruments(path)
    banks = tuple(b for b in banks if angles_apart(b.two_theta, angle) > ANGLE_TOLERANCE)
    for bank in sorted(banks, key=lambda b: abs(np.log(b.difc / difc))):
        with suppress(InstrumentError):  # no peak shape in a part of the window
            Simulator(campaign.phases, bank, campaign.grid, size=1.0, microstrain=1000.0)
            return bank
    raise EvaluateError(
        f"{path} has no bank at another angle than {angle:g}° that gives peaks at the campaign's "
        f"times of flight: name another instrument file."
    )


@lru_cache(maxsize=2)
def _foreign_simulator(model: RegisteredModel, kind: str, other: Instrument | None) -> Simulator:
    """Return the simulator of a kind of foreign profiles; building one takes seconds."""
    loaded, simulator = draws.model_and_simulator(model)
    campaign = loaded.predictor.campaign
    if kind in _FOREIGN_PHASES:
        phases = [phase_on_orthogonal_axes(kind, *FOREIGN_PHASES[kind])]
        return simulator_for(campaign, phases)
    if kind == _WRONG_DIFC:
        other = campaign.instrument.with_parameters(difc=0.81 * campaign.instrument.difc)
    elif kind != _OTHER_BANK:
        return simulator
    return simulator_for(campaign, instrument=other)


def _foreign_profiles(
    model: RegisteredModel, kind: str, task: int, count: int, other_bank: Instrument | None
) -> Draws:
    """Draw foreign profiles, as noisy as genuine ones."""
    campaign = draws.model_and_simulator(model)[0].predictor.campaign
    simulator = _foreign_simulator(model, kind, other_bank)
    stream = random_stream(Purpose.FOREIGN_PROFILES, KINDS.index(kind), task)
    generator = np.random.default_rng(stream)
    if kind in _FOREIGN_PHASES:
        (phase,) = simulator.phases
        cells = foreign_cells(phase, count, generator)
        return draw_profiles(simulator, np.zeros(count, dtype=int), cells, generator)
    of_each = -(-count // len(campaign.phases))
    code, cells = draw_labels(campaign, of_each, generator)
    chosen = generator.permutation(len(code))[:count]
    effects = campaign.measurement_effects
    if kind == _BACKGROUND:
        # A background so high that no peak is visible.
        effects = MeasurementEffects(counts=(1500.0, 60_000.0), background=(1e4, 1e6))
    drawn = draw_profiles(simulator, code[chosen], cells[chosen], generator, effects)
    if kind == _SHUFFLED:
        rows = zip(drawn.intensity, drawn.sigma, drawn.covered, strict=True)
        for intensity, sigma, covered in rows:
            points = np.flatnonzero(covered)
            order = generator.permutation(points)
            intensity[points], sigma[points] = intensity[order], sigma[order]
    return drawn


def foreign_task(
    model: RegisteredModel, kind: str, task: int, count: int, other_bank: Instrument | None
) -> list[ForeignOutcome]:
    """On a worker: predict and refine foreign profiles, one in :data:`_REFINED_SHARE` of each kind.

    A profile without signal is rejected before a model sees it, and one that cannot be refined is
    rejected by the refinement. Which profiles count as refined depends on their number alone.
    """
    loaded, _ = draws.model_and_simulator(model)
    profiles = _foreign_profiles(model, kind, task, count, other_bank)
    outcomes = []
    for row, gridded, prepared in draws.prepared_profiles(profiles):
        is_refined = row % _REFINED_SHARE == 0
        if prepared is None:
            outcomes.append(ForeignOutcome(True, True if is_refined else None))
            continue
        prediction, from_model, from_library = draws.starts_of(loaded, gridded, prepared)
        by_model = prediction.accepted is not None and not prediction.accepted[0]
        refined = None
        if is_refined:
            fits = draws.refine_or_none(loaded.refiner, gridded, from_model + from_library)
            # With free intensities it would be rejected as well, for another reason.
            refined = not fits or not assess_acceptance(prediction, 0, fits).accepted
        outcomes.append(ForeignOutcome(by_model, refined))
    return outcomes
