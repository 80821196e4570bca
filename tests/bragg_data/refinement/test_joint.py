"""Joint refinement: cells, displacements, fractions and calibrations that were put in come out."""

from dataclasses import replace

import numpy as np
import pytest

from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.peak_shape import peak_shape
from bragg_data.refinement.joint_model import JointModel, bank_model
from bragg_data.refinement.joint_parameters import (
    broadening,
    cell_parameters,
    coordinates,
    displacements,
    factor,
    intensities,
    offsets,
    site_displacements,
    widths,
    with_site_groups,
)
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import merged
from bragg_data.refinement.measured_bank import MeasuredBank, measured_bank
from bragg_data.refinement.result import RefinementError
from tests.exact_pattern import exact_pattern
from tests.measured_banks import bank_of, bins, nomad, profile, structure

TOF = bins(4000.0, 17_000.0, 1.2e-3)
SAMPLE = {"size": 2.0, "microstrain": 900.0}
OPTIONS = JointOptions((3e-4,))
STEPS = {  # of differences, where patterns in single precision need larger ones
    "microstrain": 5.0,
    "inverse_size": 0.02,
    "extinction": 0.02,
    "absorption": 3e-3,
    "orientation 0 0 1": 3e-3,
    "shift_1": 1e-3,
    "width_scale": 3e-3,
}


def other_bank(angle: float) -> MeasuredBank:
    """Return a bank at another angle that measured silicon, with an error of its difC."""
    i = nomad()
    sine = np.sin(np.radians(angle / 2)) / np.sin(np.radians(i.two_theta / 2))
    instrument = i.with_parameters(bank=2, two_theta=angle, difc=i.difc * sine)
    sample = [(structure("silicon"), [5.4331], SAMPLE)]
    return bank_of(sample, instrument, TOF * sine, seed=3, true_difc=8e-4)


@pytest.fixture(scope="module")
def silicon() -> Phase:
    return structure("silicon")


@pytest.fixture(scope="module")
def silicon_bank(silicon: Phase) -> MeasuredBank:
    return bank_of([(silicon, [5.4331], SAMPLE)], nomad(), TOF)


def test_patterns_are_averaged_over_the_measured_bins(silicon: Phase) -> None:
    """Coarse bins of any spacing, against the exact pattern integrated within each of them."""
    tof = np.concatenate([bins(5000.0, 8000.0, 2.5e-3), np.arange(8020.0, 15_000.0, 30.0)])
    bank = measured_bank(profile(tof, np.ones(len(tof)), counts=100, seed=0), nomad())
    model = bank_model(bank, [silicon], 4)
    cell = np.array([5.431])
    simulated = model.simulators[0].linearise(0, cell, (), np.zeros(0), slopes=False)
    shares = (np.arange(32) + 0.5) / 32
    fine = bank.edges[:, :1] + np.diff(bank.edges, axis=1) * shares
    exact = exact_pattern(
        silicon, [5.431] * 3 + [90.0] * 3, nomad(), np.sort(fine.ravel()), size=10.0,
        microstrain=300.0,
    )  # fmt: skip
    expected = exact.reshape(len(fine), 32).mean(axis=1)
    error = bank.at_points(simulated)[:, 0] - expected
    error = error[30:-30]  # the exact pattern has no lines outside of the bins
    assert np.abs(error).max() < 3e-4 * expected.max()


def test_derivatives_are_those_of_the_model() -> None:
    """Every kind of parameter, on a structure with free coordinates and three displacements."""
    phase = with_site_groups(structure("srtio3"))
    bank = bank_of([(phase, [5.511, 7.805], SAMPLE)], nomad(), TOF)
    parameters = [
        *cell_parameters(0, phase, phase.cell),
        *broadening(0, phase, [bank]),
        *displacements(0, phase),
        *site_displacements(0, phase),
        *coordinates(0, phase),
        factor("orientation 0 0 1", 0, "srtio3"),
        factor("extinction", 0, "srtio3"),
        factor("absorption", None, "sample"),
        *intensities(0, phase, [bank], 4)[2:],  # of lines well within the window
        *offsets([bank], [1e-3]),
        *widths([bank]),
    ]
    model = JointModel((bank_model(bank, [phase], 6),), (phase,), tuple(parameters))
    point = model.start.copy()
    moves = {"orientation 0 0 1": 0.05, "extinction": 0.5, "absorption": 0.05, "shift_1": 0.01}
    steps = np.zeros(len(point))
    for k, parameter in enumerate(parameters):
        point[k] += moves.get(parameter.keys[0], 0.0)
        steps[k] = STEPS.get(parameter.keys[0], 1e-4)
    jacobian = model.evaluate(point).jacobian
    n = model.n_points
    for k, parameter in enumerate(parameters):
        step = np.zeros(len(point))
        step[k] = steps[k]
        change = (model.residual(point + step) - model.residual(point - step)) / (2 * steps[k])
        # Kaufman's Jacobian leaves out a part that lies within the linear parameters' columns.
        fit = model.fit_bank(0, point)
        q, _ = np.linalg.qr(fit.columns)
        change -= q @ (q.T @ change)
        error = np.abs(jacobian[:n, k] - change).max()
        assert error < 5e-3 * np.abs(change).max(), parameter.name


def test_a_bank_may_have_other_widths_than_its_calibration(silicon: Phase) -> None:
    """Two banks, of which the second has peaks 1.3 times as wide as its file states."""
    sample = {"size": 2.0, "microstrain": 300.0}
    first, second = (
        bank_of([(silicon, [5.4331], sample | {"width_scale": w})], nomad(), TOF, seed=k)
        for k, w in enumerate((1.0, 1.3))
    )
    result = JointRefiner([first, second], [silicon]).refine(JointOptions((3e-4, 3e-4)))
    assert [bank.width for bank in result.banks] == pytest.approx([1.0, 1.3], abs=0.03)
    assert result.reduced_chi2 == pytest.approx(1.0, abs=0.1)
    (remark,) = result.remarks
    assert f"{result.banks[1].width:.2f} times as wide" in remark
    # With the sample's broadening added as it is, other programs draw the same widths.
    d, (_, bank) = np.array([0.7, 1.5]), result.banks
    size, strain = (
        1 / result.phases[0].parameters["1/size"][0],
        (result.phases[0].parameters["microstrain"][0]),
    )
    theirs = peak_shape(bank.instrument, d, size=size, microstrain=strain)
    ours = peak_shape(nomad(), d, size=size, microstrain=strain)
    np.testing.assert_allclose(theirs.variance, bank.width**2 * ours.variance)
    np.testing.assert_allclose(theirs.fwhm, bank.width * ours.fwhm, rtol=1e-3)


def test_a_cell_is_refined_from_two_per_cent_away(
    silicon: Phase, silicon_bank: MeasuredBank
) -> None:
    refiner = JointRefiner([silicon_bank], [silicon])
    for scale in (0.98, 1.0, 1.02):
        result = refiner.refine(OPTIONS, [silicon.cell * np.repeat([scale, 1.0], 3)])
        (phase,) = result.phases
        assert result.accepted
        assert result.converged
        assert abs(phase.cell[0] - 5.4331) < 4 * phase.su[0]
        assert phase.su[0] < 2e-4
        assert phase.su_calibration[0] == pytest.approx(3e-4 * 5.4331, rel=1e-3)
        assert result.reduced_chi2 == pytest.approx(1.0, abs=0.1)
        assert not result.unexplained_lines
        assert not result.at_bounds


def test_displacements_of_sites_where_the_cif_states_none() -> None:
    truth = structure("rutile")
    groups = with_site_groups(truth)
    sample = groups.with_displacement_groups(groups.displacement_groups or (), [0.004, 0.012])
    bank = bank_of([(sample, [4.60, 2.962], SAMPLE)], nomad(), TOF, counts=50_000)
    result = JointRefiner([bank], [truth]).refine(OPTIONS)
    (phase,) = result.phases
    assert phase.u_iso["Ti1"] == pytest.approx(0.004, abs=6e-4)
    assert phase.u_iso["O1"] == pytest.approx(0.012, abs=6e-4)


def test_banks_are_refined_together_and_a_wrong_calibration_is_named(
    silicon: Phase, silicon_bank: MeasuredBank
) -> None:
    banks = [silicon_bank, other_bank(90.0)]
    result = JointRefiner(banks, [silicon]).refine(JointOptions((1e-4, 2e-4)))
    (phase,) = result.phases
    assert abs(phase.cell[0] - 5.4331) < 3 * np.hypot(phase.su[0], phase.su_calibration[0])
    # Their difference is known; which one is wrong, the calibrations' uncertainties say.
    first, second = (bank.offset for bank in result.banks)
    assert second - first == pytest.approx(8e-4, abs=6e-5)
    assert second / first == pytest.approx(-4.0, rel=0.15)
    assert any("bank 2 disagrees" in remark for remark in result.remarks)


def test_weight_fractions_of_a_mixture() -> None:
    """Of a tenth and less; a phase that is not there gets nothing, and is said to be absent."""
    phases = [structure("silicon"), structure("rutile"), structure("calcite")]
    amounts = np.array([1.0, 0.35])
    masses = np.array([phase.cell_mass for phase in phases[:2]])
    expected = 100 * amounts * masses / (amounts @ masses)
    sample = [
        (phases[0], [5.431], SAMPLE | {"amount": amounts[0]}),
        (phases[1], [4.5937, 2.9587], SAMPLE | {"amount": amounts[1]}),
    ]
    bank = bank_of(sample, nomad(), TOF, counts=20_000)
    result = JointRefiner([bank], phases).refine(OPTIONS)
    for phase, weight in zip(result.phases, expected, strict=False):
        assert abs(phase.weight_percent - weight) < max(4 * phase.su_weight_percent, 0.3)
    assert result.phases[2].weight_percent < 0.5
    assert result.accepted


def test_what_holds_the_sample_is_no_part_of_its_weight() -> None:
    phases = [structure("silicon"), structure("rutile"), structure("diamond")]
    amounts = np.array([1.0, 0.5])
    masses = np.array([phase.cell_mass for phase in phases[:2]])
    cells = [5.431], [4.5937, 2.9587], [3.5671]
    sample = [
        (phase, cell, SAMPLE | {"amount": amount})
        for phase, cell, amount in zip(phases, cells, (*amounts, 2.0), strict=True)
    ]
    bank = bank_of(sample, nomad(), TOF, counts=20_000)
    result = JointRefiner([bank], phases).refine(replace(OPTIONS, cans=("diamond",)))
    assert result.accepted
    *of_sample, can = result.phases
    for phase, weight in zip(of_sample, 100 * amounts * masses / (amounts @ masses), strict=True):
        assert abs(phase.weight_percent - weight) < 4 * phase.su_weight_percent
    assert np.isnan(can.weight_percent)
    assert np.isnan(can.su_weight_percent)
    assert abs(can.cell[0] - 3.5671) < 4 * can.su[0]
    alone = JointRefiner([bank], phases[::2]).refine(replace(OPTIONS, cans=("diamond",)))
    assert alone.phases[0].weight_percent == 100
    assert alone.phases[0].su_weight_percent == 0


def test_errors_that_banks_have_in_common_do_not_cancel_in_fractions() -> None:
    """The same measurement twice determines weights by the root of 2 better, and no more."""
    phases = [structure("silicon"), structure("rutile")]
    sample = [
        (phases[0], [5.4312], SAMPLE | {"amount": 0.02}),
        (phases[1], [4.5937, 2.9587], SAMPLE),
    ]
    bank = bank_of(sample, nomad(), TOF)
    su = [
        JointRefiner([bank] * n, phases)
        .refine(JointOptions((1e-4,) * n, evidence=False))
        .phases[0]
        .su_weight_percent
        for n in (1, 2)
    ]
    assert su[1] / su[0] == pytest.approx(np.sqrt(0.5), rel=0.02)


def test_the_certified_cell_of_a_phase_calibrates_all_banks() -> None:
    phases = [
        replace(structure("silicon"), cell=np.array([5.4312] * 3 + [90.0] * 3)),
        structure("rutile"),
    ]
    sample = [
        (phases[0], [5.4312], SAMPLE),
        (phases[1], [4.5991, 2.9510], SAMPLE | {"amount": 2.0}),
    ]
    i = nomad()
    sine = np.sin(np.radians(45)) / np.sin(np.radians(i.two_theta / 2))
    second = i.with_parameters(bank=2, two_theta=90.0, difc=i.difc * sine)
    banks = [bank_of(sample, i, TOF, true_difc=3e-3)]
    banks += [bank_of(sample, second, TOF * sine, seed=1, true_difc=-8e-4)]
    for some in (banks[:1], banks):
        options = JointOptions((3e-4,) * len(some), evidence=False, standard="silicon")
        result = JointRefiner(some, phases).refine(options)
        assert result.accepted
        silicon, rutile = result.phases
        assert silicon.cell.tolist() == [5.4312] * 3 + [90.0] * 3
        assert silicon.su_calibration.tolist() == [0.0] * 6
        su = np.hypot(rutile.su, rutile.su_calibration)
        assert (np.abs(rutile.cell - [4.5991, 4.5991, 2.9510, 90, 90, 90])[:3] < 4 * su[:3]).all()
        assert (su[:3] < 1e-4 * rutile.cell[:3]).all()
        for bank, true in zip(result.banks, (3e-3, -8e-4), strict=False):
            assert abs(bank.offset - true) < 4 * bank.su_offset < 2e-4
    little = bank_of([sample[0], (phases[1], sample[1][1], SAMPLE | {"amount": 500.0})], i, TOF)
    with pytest.raises(RefinementError, match=r"The standard silicon gives .* at least 5 % are"):
        JointRefiner([little], phases).refine(JointOptions((3e-4,), standard="silicon"))


def test_lines_of_another_phase_are_reported(silicon: Phase) -> None:
    sample = [
        (silicon, [5.431], SAMPLE),
        (structure("rutile"), [4.5937, 2.9587], SAMPLE | {"amount": 0.2}),
    ]
    bank = bank_of(sample, nomad(), TOF, counts=50_000)
    result = JointRefiner([bank], [silicon]).refine(OPTIONS)
    assert any(abs(d - 1.170) < 0.008 for d in result.unexplained_lines)  # 321 of rutile


def test_a_foreign_sample_is_not_accepted(silicon: Phase) -> None:
    bank = bank_of([(structure("calcite"), [4.9896, 17.061], SAMPLE)], nomad(), TOF)
    result = JointRefiner([bank], [silicon]).refine(OPTIONS)
    assert not result.accepted
    assert "explain" in result.reasons[0]
    assert result.unexplained_lines


def test_a_profile_without_peaks_converges_to_nothing_that_is_accepted(silicon: Phase) -> None:
    """Zero scale: no uncertainty of zero, no acceptance."""
    flat = measured_bank(profile(TOF, np.full(len(TOF), 1e-9), counts=300, seed=4), nomad())
    flat = replace(flat, intensity=np.full(len(flat.tof), 100.0))
    result = JointRefiner([flat], [silicon]).refine(OPTIONS)
    assert not result.accepted
    assert not result.phases[0].present


def test_too_few_points_are_refused() -> None:
    with pytest.raises(RefinementError, match="too few"):
        measured_bank(profile(TOF[:40], np.ones(40), counts=10, seed=0), nomad())


def test_lines_seen_by_several_banks_are_listed_once() -> None:
    assert merged([1.93, 3.16, 1.931, 1.60]) == (3.16, 1.931, 1.60)
