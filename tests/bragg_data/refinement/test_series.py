"""Series of frames: cells that follow the sample, and the events of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bragg_data.crystallography.structure import Phase, read_phase
from bragg_data.refinement.joint_refinement import JointOptions
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.series import SeriesRefiner, events
from tests.measured_banks import bank_of, bins, nomad, structure

CAMPAIGNS = Path(__file__).parents[3] / "bragg_data" / "campaigns"
TOF = bins(8000.0, 23_000.0, 1.5e-3)
SAMPLE = {"size": 1.0, "microstrain": 700.0}
OPTIONS = JointOptions((1e-4,), evidence=False)


def frame(cell: float, rutile: float = 0.0, *, seed: int, factor: float = 1.0) -> MeasuredBank:
    samples = [(structure("silicon"), [cell], SAMPLE)]
    if rutile:
        samples.append((structure("rutile"), [4.594, 2.9587], SAMPLE | {"amount": rutile}))
    bank = bank_of(samples, nomad(), TOF, counts=10_000, seed=seed)
    return replace(bank, intensity=bank.intensity * factor, sigma=bank.sigma * factor)


def blank(like: MeasuredBank) -> MeasuredBank:
    noise = np.random.default_rng(1).poisson(400.0, len(like.tof)).astype(float)
    return replace(like, intensity=noise, sigma=np.full(len(noise), 20.0))


@pytest.fixture(scope="module")
def results() -> list[JointResult]:
    """Silicon that grows, with a blank frame, a jump of the cell, of the signal, and rutile."""
    cells = [5.4310, 5.4313, 5.4316, 5.4319, 5.4422, 5.4425, 5.4428, 5.4431, 5.4434, 5.4437]
    banks = [
        frame(cell, 0.15 * (k >= 8), seed=k, factor=2.0 if k >= 6 else 1.0)
        for k, cell in enumerate(cells)
    ]
    banks[2] = blank(banks[2])
    refiner = SeriesRefiner([structure("silicon"), structure("rutile")])
    fits = [refiner.refine([bank], OPTIONS) for bank in banks]
    for fit, cell in zip(fits, cells, strict=True):
        silicon = fit.phases[0]
        assert not silicon.present or abs(silicon.cell[0] - cell) < 4 * silicon.su[0]
    return fits


def test_events_are_named_at_their_frames(results):
    listed = [(event.frame, event.kind) for event in events(results)]
    assert listed == [(2, "blank"), (4, "jump"), (6, "scale"), (8, "phase appears")]
    texts = [event.text for event in events(results)]
    assert texts[1].startswith("silicon: a jumps from 5.43")
    assert texts[2] == "The signal changes by a factor of 2."
    assert texts[3] == "rutile appears."


def test_a_frame_without_data_is_blank(results):
    listed = events([results[0], None, *results[1:2]])
    assert [(event.frame, event.kind) for event in listed] == [(1, "blank")]
    assert events([]) == []


def test_a_phase_that_is_seen_once_is_no_event(results):
    some = [results[0], results[1], results[9], results[3]]
    assert "phase appears" not in {event.kind for event in events(some)}


def test_a_frame_holds_a_structure_in_a_can() -> None:
    silicon, rutile, can = structure("silicon"), structure("rutile"), structure("diamond")
    samples = [(silicon, [5.431], SAMPLE), (can, [3.5671], SAMPLE)]
    bank = bank_of(samples, nomad(), TOF, counts=10_000)
    refiner = SeriesRefiner([rutile, silicon], [can], single=True)
    result = refiner.refine([bank], replace(OPTIONS, cans=("diamond",)))
    assert result.accepted
    assert [phase.name for phase in result.phases] == ["silicon", "diamond"]
    assert result.phases[0].weight_percent == 100


def test_a_transition_between_structures() -> None:
    cubic, tetragonal = (
        read_phase(CAMPAIGNS / f"batio3_{name}.cif", name) for name in ("cubic", "tetragonal")
    )
    states: list[tuple[Phase, list[float]]] = [
        *((tetragonal, [3.995 + 0.001 * k, 4.03 - 0.002 * k]) for k in range(3)),
        *((cubic, [4.008 + 0.001 * k]) for k in range(3)),
    ]
    refiner = SeriesRefiner([cubic, tetragonal], single=True)
    fits = [
        refiner.refine([bank_of([(phase, cell, SAMPLE)], nomad(), TOF, seed=k)], OPTIONS)
        for k, (phase, cell) in enumerate(states)
    ]
    assert [fit.phases[0].name for fit in fits] == ["tetragonal"] * 3 + ["cubic"] * 3
    (event,) = events(fits)
    assert (event.frame, event.kind) == (3, "transition")
    assert event.text == "tetragonal turns into cubic."
