"""Series of frames: cells that follow the sample, phases that come and go, transitions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bragg_data.crystallography.structure import Phase, read_phase
from bragg_data.refinement import series
from bragg_data.refinement.joint_refinement import JointOptions
from bragg_data.refinement.measured_bank import with_wide_bins
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.series import EVERY, SeriesRefiner
from tests.measured_banks import bank_of, bins, nomad, structure

CAMPAIGNS = Path(__file__).parents[3] / "bragg_data" / "campaigns"
TOF = bins(8000.0, 23_000.0, 1.5e-3)
SAMPLE = {"size": 1.0, "microstrain": 700.0}
OPTIONS = JointOptions((1e-4,), evidence=False)


def batio3(name: str) -> Phase:
    return read_phase(CAMPAIGNS / f"batio3_{name}.cif", name)


def test_cells_follow_and_a_phase_is_identified_where_it_is() -> None:
    silicon, rutile = structure("silicon"), structure("rutile")
    refiner = SeriesRefiner([silicon, rutile])
    amounts = [0.0, 0.0, 0.15, 0.15, 0.0]
    for k, (cell, amount) in enumerate(
        zip([5.4310, 5.4313, 5.4316, 5.4422, 5.4425], amounts, strict=True)
    ):
        samples = [(silicon, [cell], SAMPLE)]
        if amount:  # in a cell that is 0.3 % larger than that of the CIF
            samples.append((rutile, [4.607, 2.967], SAMPLE | {"amount": amount}))
        bank = bank_of(samples, nomad(), TOF, counts=10_000, seed=k)
        of_silicon, of_rutile = refiner.refine([bank], OPTIONS).phases
        assert abs(of_silicon.cell[0] - cell) < 4 * of_silicon.su[0]
        assert of_rutile.present == bool(amount)
        if amount:
            assert abs(of_rutile.cell[0] - 4.607) < 4 * of_rutile.su[0]
        else:
            assert of_rutile.weight_percent == pytest.approx(0, abs=0.3)


def test_a_blank_frame_costs_no_search_and_is_forgotten() -> None:
    silicon = structure("silicon")
    refiner = SeriesRefiner([silicon])
    frame = bank_of([(silicon, [5.431], SAMPLE)], nomad(), TOF, counts=10_000)
    refiner.refine([frame], OPTIONS)
    before = refiner.before
    noise = np.random.default_rng(1).poisson(400.0, len(frame.tof)).astype(float)
    blank = replace(frame, intensity=noise, sigma=np.full(len(noise), 20.0))
    result = refiner.refine([blank], OPTIONS)
    assert not result.accepted
    assert not any(phase.present for phase in result.phases)
    assert refiner.before is before


def test_a_frame_that_cannot_be_compared_keeps_its_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 32nd frame is compared with all structures; here none of them can be refined."""
    silicon, rutile = structure("silicon"), structure("rutile")
    refiner = SeriesRefiner([silicon, rutile], single=True)
    frame = bank_of([(silicon, [5.431], SAMPLE)], nomad(), TOF, counts=10_000)
    refiner.refine([frame], OPTIONS)
    assert refiner.before is not None
    banks = [with_wide_bins(frame)]
    fit = refiner._continued(banks, OPTIONS, refiner.before)

    def fails(*_: object) -> None:
        raise RefinementError("too few points")

    monkeypatch.setattr(series.JointRefiner, "summarised", fails)
    assert refiner._compared(banks, OPTIONS, fit) is fit


def test_a_frame_holds_a_structure_in_a_can() -> None:
    silicon, rutile, can = structure("silicon"), structure("rutile"), structure("diamond")
    samples = [(silicon, [5.431], SAMPLE), (can, [3.5671], SAMPLE)]
    bank = bank_of(samples, nomad(), TOF, counts=10_000)
    refiner = SeriesRefiner([rutile, silicon], [can], single=True)
    result = refiner.refine([bank], replace(OPTIONS, cans=("diamond",)))
    assert result.accepted
    assert [phase.name for phase in result.phases] == ["silicon", "diamond"]
    assert result.phases[0].weight_percent == 100


@pytest.mark.parametrize("heating", [True, False])
def test_a_transition_is_noticed_where_it_happens(heating: bool) -> None:
    cubic, tetragonal = batio3("cubic"), batio3("tetragonal")
    states: list[tuple[Phase, list[float]]] = [
        *((tetragonal, [3.995 + 0.001 * k, 4.03 - 0.002 * k]) for k in range(3)),
        *((cubic, [4.008 + 0.001 * k]) for k in range(3)),
    ]
    order = states if heating else states[::-1]
    # They exclude each other although nothing demands it: nearly the same lines, one composition.
    refiner = SeriesRefiner([cubic, tetragonal])
    frames = [
        ([bank_of([(phase, cell, SAMPLE)], nomad(), TOF, seed=k)], OPTIONS)
        for k, (phase, cell) in enumerate(order)
    ]
    names = [[phase.name for phase in result.phases] for result in refiner.refine_all(frames)]
    assert names == [[phase.name] for phase, _ in order]


def test_a_change_that_no_fit_shows_is_dated_back() -> None:
    """Cubic frames explained by a tetragonal cell, until the structures are compared."""
    cubic, tetragonal = batio3("cubic"), batio3("tetragonal")
    frames = [
        ([bank_of([(cubic, [4.008], SAMPLE)], nomad(), TOF, seed=k)], OPTIONS) for k in range(3)
    ]
    refiner = SeriesRefiner([tetragonal, cubic])
    refiner.refine(*frames[0])
    assert refiner.before is not None
    values = {"tetragonal: a": 4.008, "tetragonal: c": 4.0081}
    refiner.before = replace(
        refiner.before,
        choice=0,
        present=("tetragonal",),
        values=values,
        steps={},
        reduced_chi2=2.0,
        age=EVERY - 1,
    )
    results = refiner.refine_all(frames)
    assert refiner.before.choice == 1
    assert [[p.name for p in result.phases] for result in results] == [["cubic"]] * 3


def test_bins_far_finer_than_peaks_are_joined() -> None:
    bank = bank_of([(structure("silicon"), [5.431], SAMPLE)], nomad(), bins(8000.0, 23_000.0, 2e-4))
    wide = with_wide_bins(bank)
    assert len(bank.tof) / 8 < len(wide.tof) < len(bank.tof) / 3
    area, of_wide = (float(b.intensity @ np.diff(b.edges, axis=1)[:, 0]) for b in (bank, wide))
    assert of_wide == pytest.approx(area, rel=1e-12)
    widths = np.diff(bank.edges, axis=1)[:, 0]
    assert float(
        (wide.sigma * np.diff(wide.edges, axis=1)[:, 0])
        @ (wide.sigma * np.diff(wide.edges, axis=1)[:, 0])
    ) == pytest.approx(float((bank.sigma * widths) @ (bank.sigma * widths)), rel=1e-12)
    exact, joined = (
        SeriesRefiner([structure("silicon")]).refine([b], OPTIONS) for b in (wide, bank)
    )
    assert exact.phases[0].cell[0] == pytest.approx(joined.phases[0].cell[0], abs=1e-6)
    part = replace(
        bank,
        tof=bank.tof[::2],
        intensity=bank.intensity[::2],
        sigma=bank.sigma[::2],
        edges=bank.edges[::2],
    )
    assert len(with_wide_bins(part).tof) == len(part.tof)  # bins that do not touch stay apart
