"""Files of FullProf: every line and number by the manual, and read again by this project."""

from dataclasses import replace

import numpy as np
import pytest

from bragg_data.crystallography.structure import phase_from_cif
from bragg_data.handover.export import Refinement, export
from bragg_data.handover.fullprof import pcr_of_refinement
from bragg_data.handover.widths import with_bin_variance, with_broadening, without_odd_terms
from bragg_data.instrument.instprm import read_banks
from bragg_data.instrument.peak_shape import peak_shape
from bragg_data.measurement.readers import read_profiles
from tests.bragg_data.handover.refined import mixture
from tests.bragg_data.handover.strict_pcr import Pcr, read_pcr

_B11 = """data_x
_cell_length_a 4.2 _cell_length_b 4.2 _cell_length_c 4.2
_cell_angle_alpha 90 _cell_angle_beta 90 _cell_angle_gamma 90
_space_group_name_H-M_alt 'P m -3 m'
loop_
_atom_site_label _atom_site_type_symbol _atom_site_fract_x _atom_site_fract_y _atom_site_fract_z
_atom_site_U_iso_or_equiv
La La 0 0 0 0.006
B 11B 0.2 0.5 0.5 0.004
"""


@pytest.fixture(scope="module")
def pcr() -> Pcr:
    return read_pcr(pcr_of_refinement(mixture(), ["a.dat", "b.dat"])[0])


def test_patterns_have_the_constants_of_their_banks(pcr):
    assert pcr.files == ["a.dat", "b.dat"]
    assert pcr.formats == [10, 10]
    for number, bank in enumerate(mixture().banks):
        i = bank.instrument
        assert pcr.jobs[number][1] == 9  # NPROF
        zero, _, dtt1, _, dtt2, _, inverse, _, two_theta = pcr.positions[number]
        assert (zero, dtt1) == pytest.approx((i.tzero, i.difc), rel=1e-7, abs=1e-5)
        assert (dtt2, inverse, two_theta) == pytest.approx((i.difa, i.difb, i.two_theta), abs=1e-3)
        first, _, last = pcr.ranges[number]
        assert (first, last) == pytest.approx(tuple(bank.bank.tof[[0, -1]]), abs=1e-3)
        nodes = np.array(pcr.backgrounds[number])
        level = np.interp(bank.bank.tof, nodes[:, 0], nodes[:, 1])
        left = (level - bank.background) / bank.bank.sigma
        assert np.sqrt(np.mean(left**2)) < 0.06
        for phase, of_phase in zip(mixture().phases, pcr.phases, strict=True):
            pattern = of_phase["patterns"][number]
            broad = with_broadening(with_bin_variance(bank), phase)
            assert pattern["sigma"] == pytest.approx(
                [broad.sig_2, broad.sig_1, broad.sig_0, 0.0], abs=1e-6
            )
            assert pattern["gamma"] == pytest.approx([broad.y, broad.x, broad.z], abs=1e-6)
            shape = [0.0, broad.beta_0, broad.alpha, broad.beta_1]
            assert pattern["shape"][2:6] == pytest.approx(shape, abs=1e-8)
            assert pattern["cell"] == pytest.approx(phase.cell, abs=1e-6)
            assert pattern["absorption"] == pytest.approx(phase.parameters["absorption"][0])
            assert pattern["extinction"] == 0


def test_phases_have_their_sites_and_masses(pcr):
    silicon, srtio3 = pcr.phases
    assert silicon["space_group"] == "F d -3 m"
    ((label, kind, *position, b_iso, occupancy),) = silicon["atoms"]
    assert (label, kind) == ("Si1", "SI")
    assert position == pytest.approx([0.125] * 3)  # origin at the centre
    assert occupancy == pytest.approx(8 / 192, abs=1e-6)
    assert b_iso == pytest.approx(8 * np.pi**2 * mixture().phases[0].sites[0].u_iso, abs=1e-5)
    assert silicon["atz"] == pytest.approx(8 * 28.085, rel=1e-3)
    assert srtio3["axes"] == [[0, 0, 1], [0, 0, 1]]
    ratio = mixture().phases[1].parameters["orientation 0 0 1"][0]
    assert srtio3["patterns"][0]["shape"][0] == pytest.approx(ratio, abs=1e-6)
    assert silicon["patterns"][0]["shape"][0] == 1
    # Hill & Howard: S·ATZ·V are the weights.
    for number, bank in enumerate(mixture().banks):
        weights = [
            phase["patterns"][number]["scale"] * phase["atz"] * np.prod(refined.cell[:3])
            for phase, refined in zip(pcr.phases, mixture().phases, strict=True)
        ]
        amounts = bank.scales * [p.structure.cell_mass for p in mixture().phases]
        assert weights[0] / sum(weights) == pytest.approx(amounts[0] / amounts.sum(), rel=1e-5)


def test_instrument_and_data_are_read_again(tmp_path):
    written = export(Refinement(mixture(), ()), tmp_path / "my sample.pcr")
    names = ["my sample.pcr", "my_sample-bank1.dat", "my_sample-bank2.dat"]
    assert [file.name for file in written.files] == names
    assert sum("NPROF 9" in note for note in written.notes) == 2
    assert any("extinction" in note for note in written.notes)
    banks = read_banks(written.files[0])
    for original, bank, file in zip(banks, mixture().banks, written.files[1:], strict=True):
        start = original.reference or original.instrument
        expected = with_broadening(with_bin_variance(bank), mixture().phases[0])
        for name in ("difc", "difa", "tzero", "alpha", "beta_0", "beta_1", "sig_1", "sig_2", "x"):
            value = getattr(expected, name)
            assert getattr(start, name) == pytest.approx(value, rel=1e-5, abs=2e-6), name
        (profile,) = read_profiles(file)
        np.testing.assert_allclose(profile.tof, bank.bank.tof, atol=1e-4)
        np.testing.assert_allclose(profile.intensity, bank.bank.intensity, rtol=1e-6)
        np.testing.assert_allclose(profile.sigma, bank.bank.sigma, atol=1e-6)
        assert profile.warnings == ()  # as σ is read, not that of these counts, which is the same


def test_the_pulse_of_a_moderator_is_handed_over():
    fit = mixture()
    moderator = (0.1, 2.4, 33.0, 50.0)
    banks = tuple(
        replace(b, bank=replace(b.bank, instrument=replace(b.bank.instrument, moderator=moderator)))
        for b in fit.banks
    )
    text, notes = pcr_of_refinement(replace(fit, banks=banks), ["a", "b"])
    assert "NPROF 13) are the same." in notes[0]
    for bank, again in zip(banks, read_banks(text), strict=True):
        expected = with_broadening(with_bin_variance(bank), fit.phases[0])
        assert again.exact.moderator == pytest.approx(moderator)
        for name in ("difc", "tzero", "sig_1", "x"):
            value = getattr(expected, name)
            assert getattr(again.exact, name) == pytest.approx(value, rel=1e-5, abs=2e-6), name


def test_isotopes_have_their_scattering_lengths():
    fit = mixture()
    phase = phase_from_cif(_B11, "hexaboride")
    sites = tuple(
        replace(fit.phases[0].sites[0], label=s.label, symbol=s.symbol) for s in phase.sites
    )
    other = replace(fit.phases[0], name="hexaboride", structure=phase, sites=sites)
    text, _ = pcr_of_refinement(replace(fit, phases=(other, fit.phases[1])), ["a", "b"])
    pcr = read_pcr(text)
    assert pcr.scatterers == {"B11": pytest.approx(0.665, abs=2e-3)}  # 1e-12 cm
    assert [atom[1] for atom in pcr.phases[0]["atoms"]] == ["LA", "B11"]


def test_terms_that_fullprof_lacks_are_fitted():
    instrument = mixture().banks[0].instrument.with_parameters(beta_q=0.004, sig_q=20.0)
    d = np.linspace(0.6, 1.8, 50)
    plain = without_odd_terms(instrument, d)
    assert plain.beta_q == plain.sig_q == 0
    ours, theirs = (peak_shape(i, d, size=np.inf, microstrain=0.0) for i in (instrument, plain))
    assert np.abs(theirs.decay / ours.decay - 1).max() < 0.05
    assert np.abs(theirs.variance / ours.variance - 1).max() < 0.1
