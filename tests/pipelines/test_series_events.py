"""Events of a series: what is named, and at which frame."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bragg_data.refinement.calibration_uncertainty import CalibrationKind
from bragg_data.refinement.joint_refinement import JointOptions
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.series import SeriesRefiner
from pipelines.refinement.events import events
from pipelines.refinement.expansion import expansions
from pipelines.refinement.frames import FrameResult
from pipelines.refinement.inputs import Sample
from pipelines.refinement.result import Cell, JointRefinement, joint_refinement
from pipelines.refinement.series import relative_to, values_of_files
from tests.measured_banks import bank_of, bins, nomad, structure

TOF = bins(8000.0, 23_000.0, 1.5e-3)
CELLS = [
    5.4310,
    5.4313,
    5.4316,
    5.4319,
    5.4422,
    5.4425,
    5.4428,
    5.4431,
    5.4434,
    5.4437,
    5.4440,
    5.4443,
]


def frame(
    cell: float, rutile: float, microstrain: float, *, seed: int, factor: float
) -> MeasuredBank:
    sample = {"size": 1.0, "microstrain": microstrain}
    samples = [(structure("silicon"), [cell], sample)]
    if rutile:
        samples.append((structure("rutile"), [4.594, 2.9587], sample | {"amount": rutile}))
    bank = bank_of(samples, nomad(), TOF, counts=10_000, seed=seed)
    return replace(bank, intensity=bank.intensity * factor, sigma=bank.sigma * factor)


@pytest.fixture(scope="module")
def results() -> list[JointRefinement]:
    """Silicon that grows: a blank frame, a jump of the cell and of the signal, rutile, strain."""
    banks = [
        frame(cell, 0.15 * (k >= 8), 2500.0 if k >= 10 else 700.0, seed=k, factor=1 + (k >= 6))
        for k, cell in enumerate(CELLS)
    ]
    noise = np.random.default_rng(1).poisson(400.0, len(banks[2].tof)).astype(float)
    banks[2] = replace(banks[2], intensity=noise, sigma=np.full(len(noise), 20.0))
    refiner = SeriesRefiner([structure("silicon"), structure("rutile")])
    options = JointOptions((1e-4,), evidence=False)
    return [
        joint_refinement(
            Sample((Path(f"{k}.gsa"),), (bank,), CalibrationKind.SAME, ()),
            refiner.refine([bank], options),
        )
        for k, bank in enumerate(banks)
    ]


def test_events_are_named_at_their_frames(results):
    listed = events(results)
    kinds = [(event.frame, event.kind) for event in listed]
    known = [(2, "blank"), (4, "jump"), (6, "scale"), (8, "phase appears")]
    # Of silicon: what little there is of rutile does not show its broadening before.
    known += [(10, "broadening")]
    assert kinds == known
    texts = [event.text for event in listed]
    assert texts[1].startswith("silicon: a jumps from 5.43")
    assert texts[2] == "The signal changes by a factor of 2."
    assert texts[3] == "rutile appears."
    assert texts[4].startswith("silicon: microstrain changes from ")


def test_a_frame_without_data_is_blank(results):
    listed = events([results[0], None, *results[1:2]])
    assert [(event.frame, event.kind) for event in listed] == [(1, "blank")]
    assert events([]) == []


def test_a_step_over_missing_frames_is_no_jump(results):
    """Steps of 3e-4 Å, ten times their uncertainty, and two frames that are missing."""
    frames: list[JointRefinement | None] = []
    for k in range(12):
        silicon = results[0].phases[0]
        cell = Cell.from_array([5.43 + 3e-4 * k] * 3 + [90] * 3)
        phase = silicon.model_copy(update={"cell": cell, "su": Cell.from_array([2e-5] * 6)})
        frames.append(results[0].model_copy(update={"phases": (phase,)}))
    frames[5] = frames[6] = None
    assert {event.kind for event in events(frames)} == {"blank"}


def test_a_phase_that_is_seen_once_is_no_event(results):
    some = [results[0], results[1], results[9], results[3]]
    assert "phase appears" not in {event.kind for event in events(some)}


def test_strain_is_relative_to_a_frame(results):
    frames = [FrameResult(k, Path(f"{k}"), k, result) for k, result in enumerate(results)]
    strains = relative_to(frames, 1)
    assert strains[1, 0, "silicon"]["a"] == (0.0, 0.0)
    strain = strains[5, 0, "silicon"]["a"]
    assert strain.value == pytest.approx(5.4425 / 5.4313 - 1, abs=4 * strain.su)
    assert 0 < strain.su < 1e-4
    assert (2, 0, "silicon") not in strains  # blank
    # A frame without the phase is no reference: the first one that has it.
    assert relative_to(frames, 2)[0, 0, "silicon"]["a"].value == 0.0


@pytest.mark.parametrize("times", [1, 4])
def test_thermal_expansion_has_the_right_coefficient(results, times):
    """Cells of 12e-6 per K that bend a little, with errors of 2e-5 Å, and a blank frame."""
    random = np.random.default_rng(3)
    kelvin = np.repeat(np.arange(100.0, 400.0, 10.0), times)
    cells = 5.43 * (1 + 12e-6 * (kelvin - 100) + 5e-9 * (kelvin - 100) ** 2)
    silicon = results[0].phases[0]
    frames = [FrameResult(0, Path("blank"), 95.0, None, "blank")]
    for number, (x, a) in enumerate(zip(kelvin, cells, strict=True), start=1):
        measured = Cell.from_array([a + 2e-5 * random.normal()] * 3 + [90] * 3)
        phase = silicon.model_copy(update={"cell": measured, "su": Cell.from_array([2e-5] * 6)})
        result = results[0].model_copy(update={"phases": (phase,)})
        frames.append(FrameResult(number, Path(f"{x}"), float(x), result))
    (curve,) = expansions(frames)
    assert (curve.phase, curve.length) == ("silicon", "a")
    expected = np.log(cells[-1] / cells[0]) / (kelvin[-1] - kelvin[0])
    assert abs(curve.coefficient - expected) < 3 * curve.su
    assert 7e-9 / times**0.5 < curve.su < 1.3e-8 / times**0.5
    assert np.abs(curve.curve - np.interp(curve.x, kelvin, cells)).max() < 3e-5


@pytest.mark.parametrize(
    ("text", "value"),
    [("3.0000E+02 K", 300.0), ("1.5e2", 150.0), ("-.5", -0.5), ("= 20. K", 20.0), ("7", 7.0)],
)
def test_numbers_of_headers_have_exponents(tmp_path, text, value):
    file = tmp_path / "frame.gsa"
    file.write_text(f"# Temperature: {text}\n", encoding="utf-8")
    assert values_of_files([file], None, "temperature") == [value]
