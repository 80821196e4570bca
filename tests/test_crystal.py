import pickle
import warnings
from pathlib import Path

import gemmi
import numpy as np
import pytest
from hypothesis import given

from bragg_data.campaign import BUILT_IN
from bragg_data.crystal import (
    CELL_PARAMETERS,
    CrystalError,
    CrystalSystem,
    cell_volume,
    check_volume,
    d_spacing,
    lattice_of,
    read_phase,
    reciprocal_metric,
    scattering_length,
)
from tests.strategies import cells

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


@given(cells)
def test_reciprocal_metric_inverts_the_direct_one(cell):
    a, b, c, alpha, beta, gamma = cell
    ca, cb, cg = np.cos(np.radians([alpha, beta, gamma]))
    direct = np.array(
        [
            [a * a, a * b * cg, a * c * cb],
            [a * b * cg, b * b, b * c * ca],
            [a * c * cb, b * c * ca, c * c],
        ]
    )
    inverse = np.linalg.inv(direct)
    m = reciprocal_metric(cell[None])[0]
    expected = [*np.diag(inverse), 2 * inverse[0, 1], 2 * inverse[0, 2], 2 * inverse[1, 2]]
    np.testing.assert_allclose(m, expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(
        cell_volume(cell[None])[0], np.sqrt(np.linalg.det(direct)), rtol=1e-8
    )


@given(cells)
def test_d_spacing_agrees_with_gemmi(cell):
    hkl = np.array([[1, 0, 0], [0, 2, 1], [-1, 3, 2], [4, -4, 5]])
    theirs = [gemmi.UnitCell(*cell).calculate_d(list(map(int, h))) for h in hkl]
    np.testing.assert_allclose(d_spacing(hkl, cell[None])[0], theirs, rtol=1e-9)


def test_textbook_d_spacings():
    cubic = np.array([[4.0, 4.0, 4.0, 90, 90, 90]])
    np.testing.assert_allclose(
        d_spacing(np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]]), cubic)[0],
        [4.0, 4.0 / np.sqrt(2), 4.0 / np.sqrt(3)],
    )
    hexagonal = np.array([[3.0, 3.0, 5.0, 90, 90, 120]])  # 1/d² = 4(h²+hk+k²)/3a² + l²/c²
    np.testing.assert_allclose(
        d_spacing(np.array([[1, 1, 2]]), hexagonal)[0, 0] ** -2, 4 * 3 / 27 + 4 / 25
    )


@pytest.mark.parametrize(
    ("symbol", "system", "free"),
    [
        ("P m -3 m", "cubic", ("a",)),
        ("I 4/m c m", "tetragonal", ("a", "c")),
        ("R 3 m:R", "trigonal", ("a", "alpha")),
        ("R 3 m:H", "trigonal", ("a", "c")),
        ("P 31 2 1", "trigonal", ("a", "c")),
        ("P 63/m m c", "hexagonal", ("a", "c")),
        ("A m m 2", "orthorhombic", ("a", "b", "c")),
        ("P 1 21/c 1", "monoclinic", ("a", "b", "c", "beta")),
        ("P 1 1 21/b", "monoclinic", ("a", "b", "c", "gamma")),
        ("P -1", "triclinic", CELL_PARAMETERS),
    ],
)
def test_free_parameters_follow_the_setting(symbol, system, free):
    lattice = lattice_of(gemmi.find_spacegroup_by_name(symbol))
    assert lattice.crystal_system is CrystalSystem[system]
    assert lattice.free_parameters == free
    values = {"a": 4.0, "b": 5.0, "c": 6.0, "alpha": 80.0, "beta": 100.0, "gamma": 110.0}
    cell = lattice.cells(np.array([[values[name] for name in free]]))
    lattice.check(cell)  # what it makes, it accepts
    assert [cell[0, CELL_PARAMETERS.index(name)] for name in free] == [values[n] for n in free]


def test_codes_of_the_crystal_systems_never_change():
    assert [s.name for s in sorted(CrystalSystem)] == (
        ["cubic", "tetragonal", "trigonal", "hexagonal", "orthorhombic", "monoclinic", "triclinic"]
    )


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
        (RUTILE.replace("P 42/m n m", "Q 7"), "names no space group"),
        (
            RUTILE.replace("_cell_length_b 4.5937", "_cell_length_b 4.7"),
            "b is 4.7 and must equal a",
        ),
        (RUTILE.replace("Ti1 Ti", "Gd1 Gd"), "--simulator gsas2"),
        (RUTILE.replace("Ti1 Ti", "Po1 Po"), "no measured neutron scattering length"),
    ],
)
def test_bad_cifs_are_refused_with_the_remedy(text, remedy):
    with pytest.raises(CrystalError, match=remedy):
        read_phase(text, "phase")


def test_missing_cif_is_named(tmp_path: Path):
    with pytest.raises(CrystalError, match=r"nowhere\.cif not found"):
        read_phase(tmp_path / "nowhere.cif", "phase")


@pytest.mark.parametrize(
    ("cell", "remedy"),
    [
        ((4, 4, 4, 120, 120, 120), "alpha < 120°"),
        ((4, 4, 4, 60, 60, 150), "smaller than the sum"),
        ((4, -4, 4, 90, 90, 90), "positive numbers"),
        ((4, np.nan, 4, 90, 90, 90), "positive numbers"),
    ],
)
def test_cells_without_volume_are_refused(cell, remedy):
    with pytest.raises(CrystalError, match=remedy) as caught:
        check_volume(np.array([cell], dtype=float))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_metrically_cubic_cells_are_refused():
    tetragonal = lattice_of(gemmi.find_spacegroup_by_name("P 4 m m"))
    with pytest.raises(CrystalError, match="a = c, which is cubic"):
        tetragonal.check(np.array([[4.0, 4.0, 4.0, 90, 90, 90]]))
    rhombohedral = lattice_of(gemmi.find_spacegroup_by_name("R 3 m:R"))
    with pytest.raises(CrystalError, match="alpha = 90°, which is cubic"):
        rhombohedral.check(np.array([[4.0, 4.0, 4.0, 90, 90, 90]]))


def test_scattering_lengths_are_those_of_the_reference():
    assert scattering_length("Ba") == pytest.approx(0.507)
    assert scattering_length("Ti") == pytest.approx(-0.337)
    assert scattering_length("O") == pytest.approx(0.58037)
    assert scattering_length("B").imag == pytest.approx(-0.0213, abs=1e-4)
    assert scattering_length("D") == pytest.approx(0.66681)


@pytest.mark.parametrize(
    ("symbol", "terms"),
    [
        ("P m -3 m", [(0, 1, 2)]),
        ("P 4 m m", [(0, 1), (2,)]),
        ("P 63/m m c", [(0, 1, 3), (2,)]),
        ("R 3 m:R", [(0, 1, 2), (3, 4, 5)]),
        ("A m m 2", [(0,), (1,), (2,)]),
        ("P 1 21/c 1", [(0,), (1,), (2,), (4,)]),
        ("P -1", [(0,), (1,), (2,), (3,), (4,), (5,)]),
    ],
)
def test_independent_terms_of_the_metric(symbol, terms):
    assert list(lattice_of(gemmi.find_spacegroup_by_name(symbol)).metric_terms) == terms
