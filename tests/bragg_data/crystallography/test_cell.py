import pickle

import gemmi
import numpy as np
import pytest
from hypothesis import given

from bragg_data.crystallography.cell import (
    CELL_PARAMETERS,
    CrystalError,
    CrystalSystem,
    cell_volume,
    check_volume,
    d_spacing,
    encloses_volume,
    lattice_from_space_group,
    reciprocal_metric,
)
from tests.strategies import cells


@given(cells)
def test_reciprocal_metric_is_the_inverse_of_the_direct_metric(cell):
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
    lattice = lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol))
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
    tetragonal = lattice_from_space_group(gemmi.find_spacegroup_by_name("P 4 m m"))
    with pytest.raises(CrystalError, match="a = c, which is cubic"):
        tetragonal.check(np.array([[4.0, 4.0, 4.0, 90, 90, 90]]))
    rhombohedral = lattice_from_space_group(gemmi.find_spacegroup_by_name("R 3 m:R"))
    with pytest.raises(CrystalError, match="alpha = 90°, which is cubic"):
        rhombohedral.check(np.array([[4.0, 4.0, 4.0, 90, 90, 90]]))


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
    assert (
        list(lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol)).metric_terms) == terms
    )


def test_cells_that_enclose_volume():
    cells = np.array(
        [
            [4, 4, 4, 90, 90, 90],
            [4, 4, 4, 119.9, 119.9, 119.9],
            [4, 4, 4, 120, 120, 120],
            [4, 4, 4, 125, 125, 125],
            [4, 4, 4, 60, 60, 150],
            [4, 4, 4, 250, 250, 250],  # its cosines are those of 110°
            [0, 4, 4, 90, 90, 90],
            [4, np.inf, 4, 90, 90, 90],
            [4, np.nan, 4, 90, 90, 90],
            [4, 4, 4, 90, np.nan, 90],
        ]
    )
    assert encloses_volume(cells).tolist() == [True, True] + [False] * 8
    assert encloses_volume(cells[:0]).shape == (0,)


def test_clipped_parameters_enclose_volume():
    rhombohedral = lattice_from_space_group(gemmi.find_spacegroup_by_name("R 3 m:R"))
    free = np.array([[4.0, 119.9], [4.0, 125.0], [-1.0, 89.0], [4.0, -3.0], [np.inf, 90.0]])
    clipped = rhombohedral.clip_to_domain(free)
    np.testing.assert_allclose(clipped[1], [4.0, 90 + 89.5 / 3])
    np.testing.assert_array_equal(clipped[0], free[0])
    np.testing.assert_array_equal(clipped[2], [1.0, 89.0])
    assert encloses_volume(rhombohedral.cells(clipped)).all()
    np.testing.assert_array_equal(rhombohedral.clip_to_domain(clipped), clipped)
    assert np.isnan(rhombohedral.clip_to_domain([[np.nan, 90.0]])[0, 0])


@pytest.mark.parametrize("symbol", ["P m -3 m", "P 63/m m c", "R 3 m:R", "P 1 21/c 1", "P -1"])
def test_clipping_changes_only_cells_without_volume(symbol):
    lattice = lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol))
    generator = np.random.default_rng(0)
    low = [-1.0 if name in "abc" else -50.0 for name in lattice.free_parameters]
    high = [9.0 if name in "abc" else 250.0 for name in lattice.free_parameters]
    free = generator.uniform(low, high, (500, len(low)))
    good = encloses_volume(lattice.cells(free))
    assert 0 < good.sum() < 500
    clipped = lattice.clip_to_domain(free)
    np.testing.assert_array_equal(clipped[good], free[good])
    cells = lattice.cells(clipped)
    check_volume(cells)
    lattice.check_tied(cells)
    assert (cell_volume(cells[~good]) > 1e-5).all()
