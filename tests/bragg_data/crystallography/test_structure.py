"""Phases read from CIF files, and what their atoms scatter."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import BUILT_IN
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.reflections import _coefficients, _groups
from bragg_data.crystallography.scattering import ResonanceError, scattering_length
from bragg_data.crystallography.structure import read_phase, scaled_to_volume_per_atom

RUTILE = """data_rutile
_cell_length_a 4.5937
_cell_length_b 4.5937
_cell_length_c 2.9587
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 42/m n m'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
_atom_site_U_iso_or_equiv
Ti1 Ti 0 0 0 1.0 0.006
O1 O 0.3048 0.3048 0 0.9 0.005
"""


def test_built_in_trigonal_phase_is_rhombohedral():
    phase = read_phase(BUILT_IN / "batio3_trigonal.cif", "trigonal")
    assert phase.space_group == "R 3 m:R"
    assert phase.lattice.free_parameters == ("a", "alpha")
    assert sorted(phase.symbols) == ["Ba", "O", "O", "O", "Ti"]


def test_special_positions_and_occupancy():
    phase = read_phase(RUTILE, "rutile")
    assert sorted(phase.symbols) == ["O"] * 4 + ["Ti"] * 2
    np.testing.assert_allclose(sorted(phase.scattering_lengths.real)[:2], [-0.337, -0.337])
    np.testing.assert_allclose(sorted(phase.scattering_lengths.real)[2:], [0.9 * 0.58037] * 4)


def test_anisotropic_displacements_become_their_equivalent():
    aniso = RUTILE + (
        "loop_\n_atom_site_aniso_label\n_atom_site_aniso_U_11\n_atom_site_aniso_U_22\n"
        "_atom_site_aniso_U_33\n_atom_site_aniso_U_12\n_atom_site_aniso_U_13\n"
        "_atom_site_aniso_U_23\nTi1 0.006 0.006 0.003 0 0 0\n"
    )
    with pytest.warns(UserWarning, match="equivalent isotropic"):
        phase = read_phase(aniso, "rutile")
    titanium = [u for s, u in zip(phase.symbols, phase.u_iso, strict=True) if s == "Ti"]
    np.testing.assert_allclose(titanium, 0.005)  # a third of the trace on orthogonal axes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_phase(RUTILE, "rutile")


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("nonsense", "not a readable CIF"),
        ("data_x\n_cell_length_a 4\n", "_atom_site_fract_x"),
        (RUTILE.replace("P 42/m n m", "Q 7"), "names no known space group"),
        (
            RUTILE.replace("_cell_length_b 4.5937", "_cell_length_b 4.7"),
            "b is 4.7 and must equal a",
        ),
        (RUTILE.replace("Ti1 Ti", "Po1 Po"), "no measured neutron scattering length"),
    ],
)
def test_bad_cifs_are_refused_with_the_remedy(text, remedy):
    with pytest.raises(CrystalError, match=remedy):
        read_phase(text, "phase")


def test_resonance_has_no_single_scattering_length():
    phase = read_phase(RUTILE.replace("Ti1 Ti", "Gd1 Gd"), "phase")  # GSAS-II can do it
    with pytest.raises(ResonanceError, match="--simulator gsas2"):
        phase.scattering_lengths  # noqa: B018


def test_missing_cif_is_named(tmp_path: Path):
    with pytest.raises(CrystalError, match=r"nowhere\.cif not found"):
        read_phase(tmp_path / "nowhere.cif", "phase")


def test_scattering_lengths_are_those_of_the_reference():
    assert scattering_length("Ba") == pytest.approx(0.507)
    assert scattering_length("Ti") == pytest.approx(-0.337)
    assert scattering_length("O") == pytest.approx(0.58037)
    assert scattering_length("B").imag == pytest.approx(-0.0213, abs=1e-4)
    assert scattering_length("D") == pytest.approx(0.66681)


def test_a_cell_is_scaled_to_the_volume_per_atom_of_another() -> None:
    cubic, rutile = read_phase(BUILT_IN / "batio3_cubic.cif", "cubic"), read_phase(RUTILE, "rutile")
    cell = scaled_to_volume_per_atom(rutile, cubic, np.array([4.0] * 3 + [90.0] * 3))
    assert cell[0] ** 2 * cell[2] / 6 == pytest.approx(4.0**3 / 5)
    assert cell[2] / cell[0] == pytest.approx(2.9587 / 4.5937)
    # Without volume there is no scale, and no NaN.
    with pytest.raises(CrystalError, match="encloses no volume"):
        scaled_to_volume_per_atom(rutile, cubic, np.array([4.0] * 3 + [125.0] * 3))


def test_a_window_without_reflections_has_no_structure_factors() -> None:
    phase = read_phase(BUILT_IN / "batio3_cubic.cif", "cubic")
    groups = _groups(phase)
    single = _coefficients(phase, groups, np.array([[1, 1, 0]]))
    none = _coefficients(phase, groups, np.zeros((0, 3), dtype=np.int64))
    assert single.shape[2] == none.shape[2] == len(groups.u_groups)
    assert len(none) == 0
