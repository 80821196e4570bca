"""What a CIF contradicts itself in is reported; and files as GSAS2CIF and MAUD write them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bragg_data.crystallography.structure import phase_from_cif
from tests.bragg_data.crystallography.test_published_structures import ROWS, cif
from tests.fuzzing.originals import complete_cif

SMALL = [name for name, row in ROWS.items() if int(row[4]) <= 24]


def report(text: str, *changes: tuple[str, str]) -> tuple[str, ...]:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return phase_from_cif(text, "x").assumptions


@pytest.mark.parametrize("name", SMALL)
def test_a_complete_cif_causes_no_report(name: str) -> None:
    assert report(complete_cif(name)) == ()


# Rutile: 62.435 Å³, two TiO2, 4.248 g/cm³.
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "_cell_length_a 4.5937\n_cell_length_b 4.5937",
            "_cell_length_a 4.5987\n_cell_length_b 4.5987",
            "encloses 62.571 Å³, and _cell_volume is 62.435",
        ),
        (
            "_cell_volume 62.435",
            "_cell_volume 62.453",
            "encloses 62.435 Å³, and _cell_volume is 62.453",
        ),
        (
            "_cell_length_c 2.9587",
            "_cell_length_c 42.9587",
            "has 1.5e+02 Å³ for each of its 6 atoms",
        ),
        ("units_Z 2", "units_Z 4", "Ti2 O4, which is not the formula 'Ti1 O2' with 4"),
        ("'Ti1 O2'", "'Ti1 O3'", "which is not the formula 'Ti1 O3' with 2 formula units"),
        (
            "diffrn 4.248",
            "diffrn 4.428",
            "density of 4.248 g/cm³, and _exptl_crystal_density_diffrn is 4.428",
        ),
        ("'Ti1 O2'", "'Ti1 O.'", "which is not the formula 'Ti1 O.'"),
        ("'Ti1 O2'", "'Ti1 O0'", "which is not the formula 'Ti1 O0'"),
        ("IT_number 136", "IT_number 163", "is number 136, not 163"),
        ("system tetragonal", "system cubic", "it is called cubic"),
        ("0.008 4", "0.008 8", "Site O1 has 4 atoms in the cell; its multiplicity is given as 8"),
        ("'-x,-y,-z'", "'-x,-y,-q'", "operation '-x,-y,-q' cannot be read"),
        ("O1 O ", "N1 O ", "Site N1 is of type O"),
        ("O1 O .3048 .3048 0 1 0.008", "O1 O .3048 .3048 0 1 0.8", "large U of 0.8 Å²"),
        ("Ti1 Ti 0 0 0 1", "Ti1 Ti 3 0 0 1", "Site Ti1 is far outside the cell"),
        ("O .3048 .3048 0 1", "O .3048 .3048 0 0", "Occupancy 0 of O1"),
        ("_atom_site_occupancy", "_atom_site_occupanncy", "and _atom_site_occupancy missing"),
        ("O1 O .3048", "O-1 O .3048", "The label O-1 is unlike all others"),
        ("_cell_volume", "_cell_volume 62.435\n_cell_volume", "Given twice: _cell_volume;"),
        (
            "_atom_site_fract_y\n_atom_site_fract_z",
            "_atom_site_fract_z\n_atom_site_fract_y",
            "x, y and z are not side by side",
        ),
    ],
)
def test_contradictions_are_reported(old: str, new: str, expected: str) -> None:
    assert any(expected in text for text in report(complete_cif("rutile"), (old, new)))


def test_atoms_that_are_too_close_are_reported() -> None:
    (text,) = report(cif("rutile"), ("O1 O .3048 .3048 0", "O1 O .12 .12 0"))
    assert text.startswith("Ti1 and O1 are closer than half")
    # 0.2 Å off the mirror plane at which the images would be one.
    (text,) = report(cif("anatase"), ("O1 O 0 .75 .3331", "O1 O .03 .75 .3331"))
    assert text.startswith("Site O1 is close to a special position")


@given(name=st.sampled_from(SMALL), factor=st.floats(1.002, 1.5), z=st.integers(5, 40))
def test_volumes_and_numbers_of_formula_units(name: str, factor: float, z: int) -> None:
    text = complete_cif(name)
    volume = float(text.split("_cell_volume ")[1].split()[0])
    sentences = report(text, (f"_cell_volume {volume:.3f}", f"_cell_volume {volume * factor:.3f}"))
    assert "_cell_volume is" in sentences[0]
    units = text.split("_cell_formula_units_Z ")[1].split()[0]
    (sentence,) = report(text, (f"units_Z {units}", f"units_Z {z * int(units)}"))
    assert "which is not the formula" in sentence


GSAS2CIF = """data_LAB6_publ
_pd_block_id 2005-01-01|LAB6||Overall
data_LAB6_overall
_refine_ls_shift/su_max 0.01
data_LAB6_phase_1
_pd_phase_name 'LaB6 660a'
_cell_length_a                   4.15689(2)
_cell_length_b                   4.15689
_cell_length_c                   4.15689
_cell_angle_alpha                90.0
_cell_angle_beta                 90.0
_cell_angle_gamma                90.0
_cell_volume                     71.830(1)
_symmetry_cell_setting           cubic
_symmetry_space_group_name_H-M   "P m -3 m"
loop_ _symmetry_equiv_pos_site_id _symmetry_equiv_pos_as_xyz
       1 +x,+y,+z
      -1 -x,-y,-z
       2 +z,+x,+y
loop_
      _atom_site_type_symbol
      _atom_site_label
      _atom_site_fract_x
      _atom_site_fract_y
      _atom_site_fract_z
      _atom_site_occupancy
      _atom_site_thermal_displace_type
      _atom_site_U_iso_or_equiv
      _atom_site_symmetry_multiplicity
LA+3 LA1  0.0 0.0 0.0 1.0 Uiso 0.0049(2) 1
B_11 B2   0.19930(8) 0.5 0.5 1.0 Uiso 0.0031(1) 6
data_LAB6_p_01
_pd_block_id 2005-01-01|LAB6_H_01||PNT
loop_ _pd_meas_time_of_flight _pd_meas_counts_total
 5000.0 10
 5002.5 12
"""


def test_an_export_of_gsas2cif() -> None:
    """Blocks of histograms, isotopes as B_11, a list of operations that begins the group."""
    phase = phase_from_cif(GSAS2CIF, "lab6")
    assert phase.space_group == "P m -3 m"
    assert sorted(phase.symbols) == ["11B"] * 6 + ["La"]
    np.testing.assert_array_equal(phase.cell, [4.15689] * 3 + [90.0] * 3)
    assert [site.u_iso for site in phase.sites] == [0.0049, 0.0031]
    assert [site.position[0] for site in phase.sites] == [0.0, 0.1993]
    assert all("only a part" in text for text in phase.assumptions)
    second = GSAS2CIF.replace("phase_1", "phase_2").replace("4.15689", "4.2")
    with pytest.raises(ValueError, match=r"choose one of its data blocks .* LAB6_phase_1, LAB6_p"):
        phase_from_cif(GSAS2CIF + second, "lab6")
    assert phase_from_cif(GSAS2CIF + second, "x", "LAB6_phase_2").cell[0] == 4.2


MAUD = """data_Corundum
_pd_phase_name Corundum
_chemical_formula_sum 'Al2 O3'
_symmetry_cell_setting trigonal
_symmetry_space_group_name_H-M R-3c:h
_cell_length_a 4.7587 #positive
_cell_length_b 4.7587 #positive
_cell_length_c 12.9929(3) #positive
_cell_angle_alpha 90.0
_cell_angle_beta 90.0
_cell_angle_gamma 120.0
_symmetry_space_group_name_H-M 'R -3 c :H'
_riet_par_strain_thermal 0
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_occupancy
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_B_iso_or_equiv
Al1 Al3+ 1.0 0 0 0.35217 0.24 #positive
O1 O2- 1.0 0.3063 0.0 0.25 0.3158273 #positive
"""


def test_a_cif_of_maud_with_a_duplicate_tag() -> None:
    phase = phase_from_cif(MAUD, "corundum")
    assert (phase.space_group, len(phase.symbols)) == ("R -3 c:H", 30)
    np.testing.assert_allclose(
        [site.u_iso for site in phase.sites], [0.24 / (8 * np.pi**2), 0.004], rtol=1e-6
    )
    (text,) = phase.assumptions
    assert text == "Given twice: _symmetry_space_group_name_h-m; the first counts."
