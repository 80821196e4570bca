"""Samples in cans, and traces among lines whose shapes no model describes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bragg_data.crystallography.structure import Phase, phase_on_orthogonal_axes
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.result import inverse
from bragg_data.refinement.sample_refinement import is_vanadium, other_metals, refine_sample
from tests.measured_banks import bank_of, bins, nomad, structure

TOF = bins(4000.0, 17_000.0, 1.2e-3)
BROADENING = {"size": 2.0, "microstrain": 900.0}
OPTIONS = JointOptions((3e-4,), evidence=False)
TAIL, BINS_OFF = 0.2, 5
UNITS = np.array([1e6, 1e-4, 1.0])


def measured(phases: Sequence[tuple[Phase, Sequence[float], float]], counts: float) -> MeasuredBank:
    """Return a bank of phases with their cells and weights."""
    samples = [
        (phase, cell, BROADENING | {"amount": weight / phase.cell_mass})
        for phase, cell, weight in phases
    ]
    return bank_of(samples, nomad(), TOF, counts=counts)


def test_a_can_that_was_not_named_is_recognised_by_its_lines():
    """Vanadium, cold, with two phases: no part of the weights, which come out without it."""
    silicon, rutile = structure("silicon"), structure("rutile")
    (vanadium,) = (metal for metal in other_metals([]) if metal.name == "can vanadium")
    bank = measured(
        [(silicon, [5.431], 70.0), (rutile, [4.5937, 2.9587], 30.0), (vanadium, [3.020], 250.0)],
        20_000,
    )
    phases = [silicon, rutile]
    result = refine_sample([bank], phases, OPTIONS, metals=other_metals(phases))
    by_name = {phase.name: phase for phase in result.phases}
    assert by_name.keys() == {"silicon", "rutile", "can vanadium"}
    for name, weight in {"silicon": 70.0, "rutile": 30.0}.items():
        assert abs(by_name[name].weight_percent - weight) < 3 * by_name[name].su_weight_percent
    can = by_name["can vanadium"]
    assert np.isnan(can.weight_percent)
    assert abs(can.cell[0] - 3.020) < 3 * can.su[0]
    assert result.reduced_chi2 == pytest.approx(1.0, abs=0.1)


def test_traces_keep_their_cells_among_lines_with_tails():
    """A fifth of the strong lines' intensity is 0.6 % further out, as of no profile function.

    By counts alone calcite would mend these tails, its cell 0.4 % too large. No can is there.
    """
    silicon, calcite = structure("silicon"), structure("calcite")
    bank = measured([(silicon, [5.433], 98.0), (calcite, [4.995, 17.09], 2.0)], 100_000)
    tails = np.roll(bank.intensity, BINS_OFF)
    bank = replace(bank, intensity=(1 - TAIL) * bank.intensity + TAIL * tails)
    centre = 4.995 * (1 + TAIL * BINS_OFF * 1.2e-3)
    phases = [silicon, calcite]
    result = refine_sample([bank], phases, OPTIONS, metals=other_metals(phases))
    by_counts = JointRefiner([bank], phases).refine(OPTIONS)
    assert [phase.name for phase in result.phases] == ["silicon", "calcite"]
    trace, mending = result.phases[1], by_counts.phases[1]
    assert abs(trace.cell[0] / centre - 1) < 1e-3
    assert abs(mending.cell[0] / centre - 1) > 3e-3
    assert abs(trace.weight_percent - 2) < 0.5 < abs(mending.weight_percent - 2)
    # R_wp and χ² are those of counts, as is usual.
    assert by_counts.rwp < result.rwp < 1.15 * by_counts.rwp


@pytest.mark.parametrize(
    ("minor", "major", "strain"), [("rutile", "silicon", 0.008), ("calcite", "rutile", -0.014)]
)
def test_a_weak_phase_is_refined_where_its_lines_are(minor: str, major: str, strain: float):
    """From the CIFs' cells all at once its lines end between those of the strong one, at 0 %."""
    strong, weak = structure(major), structure(minor)
    true = [
        (np.array(phase.cell)[phase.lattice.free_columns] * (1 + change)).tolist()
        for phase, change in ((strong, -0.004), (weak, strain))
    ]
    bank = measured([(strong, true[0], 96.0), (weak, true[1], 4.0)], 30_000)
    lost = JointRefiner([bank], [strong, weak]).refine(OPTIONS)
    result = refine_sample([bank], [strong, weak], OPTIONS)
    assert lost.reduced_chi2 > 3
    assert result.reduced_chi2 == pytest.approx(1.0, abs=0.1)
    phase = result.phases[1]
    assert abs(phase.weight_percent - 4.0) < min(3 * phase.su_weight_percent, 0.5)
    assert abs(phase.cell[0] / true[1][0] - 1) < 3e-4


def test_metals_among_the_phases_are_no_cans():
    metals = {metal.name: metal for metal in other_metals([])}
    assert metals.keys() == {"can vanadium", "can aluminium", "can niobium"}
    foil = replace(metals["can aluminium"], name="foil")
    assert {metal.name for metal in other_metals([foil])} == metals.keys() - {"can aluminium"}
    assert [is_vanadium(metal) for metal in metals.values()] == [True, False, False]


def test_what_a_trace_does_not_determine_is_said_to_be_uncertain():
    """In 1e-6 a strain changes the pattern 1e-10 times as much as the strong phase's cell in Å."""
    silicon, rutile = structure("silicon"), structure("rutile")
    bank = measured([(silicon, [5.431], 99.7), (rutile, [4.5937, 2.9587], 0.3)], 20_000)
    result = refine_sample([bank], [silicon, rutile], OPTIONS)
    _, su = result.phases[1].parameters["microstrain"]
    assert su > 500  # a restraint of 3000 holds it, but not to nothing
    jacobian = np.random.default_rng(0).normal(size=(200, 3)) * UNITS
    exact = np.linalg.inv(jacobian.T @ jacobian / np.outer(UNITS, UNITS)) / np.outer(UNITS, UNITS)
    np.testing.assert_allclose(inverse(jacobian.T @ jacobian), exact, rtol=1e-10)
    singular = np.array([[1e12, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(inverse(singular), [[1e-12, 0.0], [0.0, 0.0]], rtol=1e-10)


def test_lines_of_a_missing_phase_are_named_where_they_are_most_of_what_is_left():
    silicon, baddeleyite = structure("silicon"), structure("baddeleyite")
    cell = np.array(baddeleyite.cell)[baddeleyite.lattice.free_columns].tolist()
    bank = measured([(silicon, [5.431], 50.0), (baddeleyite, cell, 50.0)], 20_000)
    lines = refine_sample([bank], [silicon], OPTIONS).unexplained_lines
    for d in (1.695, 1.542, 1.478, 1.324):  # 300, 301, 311 and -322 of baddeleyite
        assert min(abs(line - d) for line in lines) < 0.004


def test_a_structure_in_a_cell_beyond_those_searched_is_refused():
    bank = measured([(silicon := structure("silicon"), [5.431], 100.0)], 20_000)
    smaller = replace(silicon, cell=np.array([5.25] * 3 + [90.0] * 3))
    result = refine_sample([bank], [smaller], OPTIONS)
    assert abs(result.phases[0].cell[0] - 5.431) < 1e-3
    assert any("in a cell 3.4 % from its CIF's" in reason for reason in result.reasons)
    assert refine_sample([bank], [silicon], OPTIONS).accepted


def test_an_absorber_among_the_phases_is_named_with_the_grains_that_matter():
    """Boron nitride: 4 · 768.9 barn in 47.24 Å³; half of the weight is 40 % of the volume."""
    silicon = structure("silicon")
    atoms = "B1 B 0 0 0 0.004\nN1 N 0.25 0.25 0.25 0.004"
    nitride = phase_on_orthogonal_axes("BN", "F -4 3 m", (3.615, 3.615, 3.615), atoms)
    assert nitride.absorption == pytest.approx(65.1, abs=0.1)
    assert silicon.absorption == pytest.approx(8 * 0.171 / 160.2, rel=1e-3)
    bank = measured([(silicon, [5.431], 50.0), (nitride, [3.615], 50.0)], 20_000)
    (remark,) = refine_sample([bank], [silicon, nitride], OPTIONS).remarks
    assert "absorption of BN is +39/cm" in remark
    assert "more than 2 µm" in remark
    alone = refine_sample([bank], [nitride], OPTIONS)
    assert not any("Microabsorption" in remark for remark in alone.remarks)
