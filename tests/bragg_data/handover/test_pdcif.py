"""CIFs of refinements: read back by this project, and valid by the dictionaries."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import gemmi
import numpy as np
import pytest

from bragg_data.crystallography.structure import phase_from_cif
from bragg_data.handover.curves import curves
from bragg_data.handover.pdcif import cif_of_refinement, number_with_su
from bragg_data.measurement.readers import read_profiles
from tests.bragg_data.handover.refined import mixture

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NEW_IN_2_5 = {f"_pd_calib_d_to_tof.{name}" for name in ("id", "power", "coeff")}


@pytest.fixture(scope="module")
def text() -> str:
    return cif_of_refinement(mixture(), ["Calibration of bank 1: θ, 3.0e-4."], MOMENT)


@pytest.mark.parametrize(
    ("value", "su", "expected"),
    [
        (5.43142, 4e-5, "5.43142(4)"),
        (5.43142, 1.94e-5, "5.431420(19)"),
        (5.43142, 1.96e-5, "5.43142(2)"),
        (-0.25, 0.0095, "-0.250(10)"),
        (123.4, 12.0, "123(12)"),
        (1234.0, 195.0, "1200(200)"),
        (1 / 3, 0.0, "0.333333"),
        (90.0, 0.0, "90"),
        (-1e-9, 0.0, "0"),
    ],
)
def test_numbers_have_their_uncertainty_by_the_rule_of_19(value, su, expected):
    assert number_with_su(value, su) == expected


def test_phases_are_read_back(text):
    for phase in mixture().phases:
        again = phase_from_cif(text, "again", phase.name)
        assert again.space_group == phase.space_group
        total = np.hypot(phase.su, phase.su_calibration)
        assert np.abs(again.cell - phase.cell).max() <= 0.5 * total.max()
        assert sorted(again.symbols) == sorted(phase.structure.symbols)
        for site, refined in zip(again.sites, phase.sites, strict=True):
            assert site.label == refined.label
            su = np.maximum(refined.su_position, 1e-6)
            assert (np.abs(np.array(site.position) - refined.position) <= 0.5 * su).all()
            assert site.u_iso == pytest.approx(refined.u_iso, abs=0.5 * refined.su_u_iso)
        # The free coordinate was refined, and no other.
    free = [site.su_position > 0 for site in mixture().phases[1].sites]
    assert np.sum(free) in (1, 2)  # x and y of O2, which are one parameter


def test_cells_have_both_uncertainties_and_both_are_listed(text):
    block = gemmi.cif.read_string(text).find_block("silicon")
    phase = mixture().phases[0]
    total = float(np.hypot(phase.su[0], phase.su_calibration[0]))
    assert block.find_value("_cell_length_a") == number_with_su(float(phase.cell[0]), total)
    volume, digits = re.fullmatch(r"(\d+\.\d+)\((\d+)\)", block.find_value("_cell_volume")).groups()
    su = int(digits) * 10.0 ** -len(volume.partition(".")[2])
    assert su == pytest.approx(3 * phase.cell[0] ** 2 * total, rel=0.06)
    overall = gemmi.cif.read_string(text).find_block("overall")
    details = gemmi.cif.as_string(overall.find_value("_refine_special_details"))
    assert f"measurement {phase.su[0]:.1e}" in details
    assert f"calibration {phase.su_calibration[0]:.1e}" in details
    assert "theta" in details


def test_profiles_are_read_back(text, tmp_path):
    file = tmp_path / "refined.cif"
    file.write_text(text, encoding="ascii")
    profiles = read_profiles(file)
    assert len(profiles) == 2
    for profile, bank in zip(profiles, mixture().banks, strict=True):
        columns = curves(bank)
        np.testing.assert_allclose(profile.tof, columns["tof"], rtol=1e-7)
        np.testing.assert_allclose(profile.intensity, columns["measured"], rtol=1e-7)
        np.testing.assert_allclose(profile.sigma, columns["su"], rtol=1e-7)
        assert profile.two_theta == bank.bank.instrument.two_theta
        assert profile.difc == pytest.approx(bank.instrument.difc, rel=1e-9)
        assert profile.format == "pdCIF"


def test_curves_and_r_factors_belong_together(text):
    for number, bank in enumerate(mixture().banks, start=1):
        block = gemmi.cif.read_string(text).find_block(f"bank_{number}")
        names = (
            "proc_intensity_total",
            "calc_intensity_total",
            "proc_intensity_bkg_calc",
            "proc_ls_weight",
        )
        columns = [np.array(block.find_values(f"_pd_{n}"), dtype=float) for n in names]
        measured, calculated, background, weight = columns
        rwp = np.sqrt((weight @ (measured - calculated) ** 2) / (weight @ measured**2))
        assert float(block.find_value("_pd_proc_ls_prof_wR_factor")) == pytest.approx(rwp, rel=1e-5)
        assert rwp == pytest.approx(bank.rwp, rel=1e-5)
        assert (background <= calculated * (1 + 1e-6)).all()
        percent = [gemmi.cif.as_number(v) for v in block.find_values("_pd_phase_mass_%")]
        assert sum(percent) == pytest.approx(100, abs=0.2)


def test_blocks_are_linked_and_reflections_are_of_their_phase(text):
    document = gemmi.cif.read_string(text)
    ids = {b.name: gemmi.cif.as_string(b.find_value("_pd_block_id")) for b in document}
    assert len(set(ids.values())) == 5
    for phase in ("silicon", "srtio3"):
        links = document.find_block(phase).find_values("_pd_block_diffractogram_id")
        assert {gemmi.cif.as_string(v) for v in links} == {ids["bank_1"], ids["bank_2"]}
    block = document.find_block("bank_1")
    links = block.find_values("_pd_phase_block_id")
    assert [gemmi.cif.as_string(v) for v in links] == [ids["silicon"], ids["srtio3"]]
    table = block.find(
        [
            *(f"_refln_index_{n}" for n in "hkl"),
            "_pd_refln_phase_id",
            "_refln_d_spacing",
            "_refln_F_squared_calc",
            "_refln_symmetry_multiplicity",
        ]
    )
    silicon = [[float(v) for v in row] for row in table if row[3] == "1"]
    a = float(mixture().phases[0].cell[0])
    for h, k, l, _, d, f_squared, multiplicity in silicon:  # noqa: E741
        assert d == pytest.approx(a / np.sqrt(h * h + k * k + l * l), rel=1e-6)
        if sorted((abs(h), abs(k), abs(l))) == [0, 0, 4]:
            u = mixture().phases[0].sites[0].u_iso
            expected = (8 * 0.41491) ** 2 * np.exp(-4 * np.pi**2 * u / d**2)  # b of Si, 1e-12 cm
            assert f_squared == pytest.approx(expected, rel=2e-3)
            assert multiplicity == 6


@pytest.mark.gsas2
def test_the_dictionaries_know_all_names_and_values(text, gsas2_location):
    """The core and powder dictionaries of the IUCr, of which GSAS-II ships copies."""
    folder = Path(gsas2_location or "") / "GSASII" / "exports"
    if not folder.is_dir():
        pytest.skip("this GSAS-II ships no dictionaries")
    messages: list[str] = []
    dictionary = gemmi.cif.Ddl(messages.append)
    for name in ("cif_core.dic", "cif_pd.dic"):
        dictionary.read_ddl(gemmi.cif.read(str(folder / name)))
    assert dictionary.validate_cif(gemmi.cif.read_string(text))
    unknown = {re.sub(r".*unknown tag ", "", message) for message in messages}
    assert unknown == NEW_IN_2_5
    wrong = text.replace("_cell_angle_alpha 90", "_cell_angle_alpha right")
    assert not dictionary.validate_cif(gemmi.cif.read_string(wrong))


def test_a_phase_that_is_absent_is_left_out():
    fit = mixture()
    absent = replace(fit.phases[1], present=False)
    text = cif_of_refinement(replace(fit, phases=(fit.phases[0], absent)))
    assert [block.name for block in gemmi.cif.read_string(text)] == [
        "overall",
        "silicon",
        "bank_1",
        "bank_2",
    ]


def test_uncertainties_by_the_errors_of_the_model_are_called_so():
    fit = mixture()
    assert not fit.model_errors
    with_errors = cif_of_refinement(replace(fit, model_errors=True))
    words = "errors of the calculated lines"
    assert words in " ".join(with_errors.split())
    assert words not in " ".join(cif_of_refinement(fit).split())
