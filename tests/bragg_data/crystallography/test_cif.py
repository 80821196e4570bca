"""What CIFs leave open or have twice: read with a report, or refused with the remedy."""

import json
from pathlib import Path

import gemmi
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bragg_data.campaign import BUILT_IN, load_campaign
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.cif import DEFAULT_U
from bragg_data.crystallography.scattering import scatterer
from bragg_data.crystallography.structure import phase_from_cif, read_phase
from bragg_data.store.schema import labelled
from tests.bragg_data.crystallography.test_published_structures import ROWS, cif
from tests.bragg_data.crystallography.test_structure import RUTILE
from tests.tiny_campaign import write_campaign

REAL = Path(__file__).parents[4] / "shared" / "real"


def _u(text: str) -> tuple[list[float], tuple[str, ...]]:
    phase = phase_from_cif(text, "rutile")
    return [site.u_iso for site in phase.sites], phase.assumptions


@pytest.mark.parametrize("unknown", ["?", ".", "unknown"])
def test_a_missing_displacement_parameter_is_the_default_and_reported(unknown: str) -> None:
    values, assumptions = _u(RUTILE.replace("0.9 0.005", f"0.9 {unknown}"))
    assert values == [0.006, DEFAULT_U] == [0.006, 0.005]
    assert assumptions == ("No displacement parameter of O1: U = 0.005 Å² is assumed.",)


def test_a_cif_without_the_column_of_displacement_parameters() -> None:
    text = RUTILE.replace("_atom_site_U_iso_or_equiv\n", "")
    text = text.replace("1.0 0.006", "1.0").replace("0.9 0.005", "0.9")
    values, assumptions = _u(text)
    assert values == [0.005, 0.005]
    assert assumptions == ("No displacement parameter of Ti1, O1: U = 0.005 Å² is assumed.",)


def test_a_negative_displacement_parameter_is_zero_and_reported() -> None:
    values, assumptions = _u(RUTILE.replace("0.9 0.005", "0.9 -0.0004(3)"))
    assert values == [0.006, 0.0]
    assert assumptions == ("Negative displacement parameter of O1: 0 is used.",)


def test_b_becomes_u() -> None:
    both = RUTILE.replace("_U_iso_or_equiv", "_U_iso_or_equiv\n_atom_site_B_iso_or_equiv")
    both = both.replace("0.006", "? 0.4738").replace("0.9 0.005", "0.9 0.005 9.0")
    values, assumptions = _u(both)
    np.testing.assert_allclose(values, [0.4738 / (8 * np.pi**2), 0.005], rtol=1e-12)
    assert assumptions == ()
    aniso = (
        RUTILE
        + "loop_\n_atom_site_aniso_label\n"
        + "".join(f"_atom_site_aniso_B_{ij}\n" for ij in ("11", "22", "33", "12", "13", "23"))
    )
    values, _ = _u(aniso + "Ti1 0.3 0.3 0.6 0 0 0\n")
    np.testing.assert_allclose(values[0], 0.4 / (8 * np.pi**2), rtol=1e-12)


@given(st.floats(0.0, 0.2), st.integers(1, 99))
def test_a_displacement_parameter_is_read_as_it_stands(u: float, su: int) -> None:
    values, assumptions = _u(RUTILE.replace("0.9 0.005", f"0.9 {u:.5f}({su})"))
    assert values == [0.006, float(f"{u:.5f}")]
    assert assumptions == ()


def test_occupancies() -> None:
    phase = phase_from_cif(RUTILE.replace(" 0.9 ", " 1.04(3) "), "rutile")
    assert phase.sites[1].occupancy == 1.04
    assert phase.assumptions == ("Occupancy above 1 of O1: used as it is.",)
    phase = phase_from_cif(RUTILE.replace(" 0.9 ", " ? "), "rutile")
    assert phase.sites[1].occupancy == 1.0
    assert phase.assumptions == ("No occupancy of O1: 1 is assumed.",)
    phase = phase_from_cif(RUTILE.replace(" 0.9 ", " -0.1 "), "rutile")
    assert [site.symbol for site in phase.sites] == ["Ti"]
    with pytest.raises(CrystalError, match="the occupancy of O1 is 4; it must be between 0 and 1"):
        phase_from_cif(RUTILE.replace(" 0.9 ", " 4 "), "rutile")


def test_an_atom_that_is_listed_twice_is_reported() -> None:
    line = "O1 O 0.3048 0.3048 0 0.9 0.005\n"
    phase = phase_from_cif(
        RUTILE + line.replace("O1", "O2").replace("0.3048 0.3", "-0.3048 -0.3"), "x"
    )
    assert phase.assumptions == ("O1 and O2 are at the same place: both are used.",)
    shared = RUTILE.replace(" 0.9 ", " 0.5 ") + line.replace("O1 O", "F1 F").replace("0.9", "0.5")
    assert phase_from_cif(shared, "x").assumptions == ()


def test_a_cell_without_volume_is_refused() -> None:
    with pytest.raises(CrystalError, match="encloses no volume"):
        phase_from_cif(RUTILE.replace("_cell_angle_beta 90", "_cell_angle_beta 0"), "x")


def test_columns_of_two_lists_of_atoms_are_refused() -> None:
    tags = "_label _type_symbol _fract_x _fract_y _fract_z"
    cell, atoms = RUTILE[: RUTILE.index("loop_")], RUTILE[RUTILE.index("loop_") :]
    first = "loop_\n" + tags.replace("_", "_atom_site_", 1).replace(" _", "\n_atom_site_") + "\n"
    with pytest.raises(CrystalError, match="_atom_site_occupancy has other rows than the labels"):
        phase_from_cif(cell + first + "Ti1 Ti 0 0 0\n" + atoms, "x")


def test_an_origin_that_fits_both_ways_is_refused() -> None:
    # Cuprite without a formula: read at the other origin it is CuO2, with the same distances.
    with pytest.raises(CrystalError, match=r"'P n -3 m:1' or 'P n -3 m:2'"):
        phase_from_cif(cif("cuprite", "P n -3 m"), "cuprite")


def test_operations_count_more_than_a_symbol() -> None:
    lower = cif("rutile", "P n a m") + "loop_\n_space_group_symop_operation_xyz\nx,y,z\n-x,-y,-z\n"
    phase = phase_from_cif(lower, "rutile")
    assert phase.space_group == "P -1"
    assert "those of P -1, not of 'P n a m'" in phase.assumptions[0]
    group = gemmi.find_spacegroup_by_name("C 1 2/c 1")
    operations = "\n".join(f"'{op.triplet()}'" for op in group.operations())
    loop = f"loop_\n_space_group_symop_operation_xyz\n{operations}\n"
    assert not phase_from_cif(cif("diopside") + loop, "diopside").assumptions
    other_axis = phase_from_cif(cif("diopside", "C 2/c 1 1") + loop, "diopside")
    assert other_axis.space_group == "C 1 2/c 1"
    assert "those of C 1 2/c 1, not of 'C 2/c 1 1'" in other_axis.assumptions[0]


def test_a_list_of_all_atoms_is_not_multiplied() -> None:
    """All eight atoms of rock salt with the operations of P 1, and the symbol of before."""
    faces = ["0 0 0", ".5 .5 0", ".5 0 .5", "0 .5 .5"]
    edges = [".5 .5 .5", "0 0 .5", "0 .5 0", ".5 0 0"]
    lines = [f"Mg{i} Mg {x} 1 0.004" for i, x in enumerate(faces)]
    lines += [f"O{i} O {x} 1 0.004" for i, x in enumerate(edges)]
    text = cif("periclase").split("Mg1 Mg")[0] + "\n".join(lines)
    phase = phase_from_cif(text + "\nloop_\n_space_group_symop_operation_xyz\nx,y,z\n", "x")
    assert (phase.space_group, len(phase.symbols)) == ("P 1", 8)
    assert "those of P 1, not of 'F m -3 m'" in phase.assumptions[0]


def test_blocks_are_chosen_by_name() -> None:
    both = cif("rutile") + cif("anatase")
    with pytest.raises(CrystalError, match=r"choose one of its data blocks .* rutile, anatase"):
        phase_from_cif(both, "titania")
    assert len(phase_from_cif(both, "titania", "anatase").symbols) == 12
    assert len(phase_from_cif(both, "titania", "data_rutile").symbols) == 6
    with pytest.raises(CrystalError, match="no block 'brookite'"):
        phase_from_cif(both, "titania", "brookite")
    assert len(phase_from_cif("data_global\n_audit 1\n" + cif("rutile"), "x").symbols) == 6


def test_a_cell_is_completed_by_its_crystal_system() -> None:
    text = "\n".join(
        line
        for line in RUTILE.splitlines()
        if not line.startswith(("_cell_angle", "_cell_length_b"))
    )
    phase = phase_from_cif(text, "rutile")
    np.testing.assert_array_equal(phase.cell, [4.5937, 4.5937, 2.9587, 90, 90, 90])
    assert phase.assumptions[0].startswith("The cell lacks b, alpha, beta, gamma")
    with pytest.raises(CrystalError, match="lacks c"):
        phase_from_cif(RUTILE.replace("_cell_length_c 2.9587\n", ""), "rutile")


def test_a_tag_with_two_values_is_reported() -> None:
    phase = phase_from_cif(
        RUTILE.replace("_cell_length_a", "_cell_length_c 2.9587\n_cell_length_a").replace(
            "_cell_length_c 2.9587\n_cell_angle", "_cell_length_c 3.1\n_cell_angle"
        ),
        "x",
    )
    assert phase.cell[2] == 2.9587
    assert phase.assumptions == ("Given twice: _cell_length_c; the first counts.",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Si4+", "Si"),
        ("O2-", "O"),
        ("O-2", "O"),
        ("Fe+3", "Fe"),
        ("CA2+", "Ca"),
        ("11B", "11B"),
        ("B_11", "11B"),
        ("Li-7", "7Li"),
        ("157Gd3+", "157Gd"),
        ("1H", "1H"),
        ("2H", "D"),
        ("D1+", "D"),
        ("Xx", None),
        ("?", None),
    ],
)
def test_atom_types(text: str, expected: str | None) -> None:
    assert scatterer(text) == expected


def test_labels_name_elements_alone() -> None:
    assert scatterer("OW1", label=True) == "O"
    assert scatterer("B11", label=True) == "B"
    assert scatterer("Ca1", label=True) == "Ca"


def test_assumptions_go_with_a_campaign_and_change_no_identity(tmp_path: Path) -> None:
    file = write_campaign(tmp_path)
    before = load_campaign(file)
    assert before.assumptions == ()
    stored = labelled(before, before.samples, "kinematic", "1", "x")
    assert "structure_assumptions" not in stored.attrs
    assert "block" not in before.definition["phases"][0]
    text = (BUILT_IN / "batio3_cubic.cif").read_text().replace("_U_iso_or_equiv", "_calc_flag")
    (tmp_path / "cubic.cif").write_text(text)
    file.write_text(file.read_text().replace(f"{BUILT_IN}/batio3_cubic.cif", "cubic.cif"))
    with pytest.warns(UserWarning, match=r"\.cif: No displacement parameter"):
        after = load_campaign(file)
    (sentence,) = {text.split(": ", 1)[1] for text in after.assumptions}
    assert sentence.startswith("No displacement parameter of")
    stored = labelled(after, after.samples, "kinematic", "1", "x")
    assert json.loads(stored.attrs["structure_assumptions"]) == list(after.assumptions)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the public data sets in shared/real")
@pytest.mark.parametrize(
    ("file", "group", "atoms"),
    [
        ("imateria_ceo2/ceo2.cif", "F m -3 m", 12),
        ("hipd_round_robin/zincite.cif", "P 63 m c", 4),
        ("hipd_round_robin/corundum.cif", "R -3 c:H", 30),
        ("hipd_round_robin/fluorite.cif", "F m -3 m", 12),
        ("powgen_mn3o4/Mn3O4-Hausmannite.cif", "I 41/a m d:2", 28),
        ("constant_wavelength/PbSO4-Wyckoff.cif", "P n m a", 24),
        ("nomad_si/si_srm640c.cif", "F d -3 m:2", 8),
        ("sepd_si/arg_si.cif", "F d -3 m:2", 8),
        ("powgen_nac/CaF2.cif", "F m -3 m", 12),
        ("powgen_nac/NAC.cif", "I 21 3", 84),
        ("powgen_lab6/lab6_srm660b.cif", "P m -3 m", 7),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_real_cifs(file: str, group: str, atoms: int) -> None:
    phase = read_phase(REAL / file, "real")
    assert (phase.space_group, len(phase.symbols)) == (group, atoms)


def test_a_damaged_operation_is_reported() -> None:
    group = gemmi.find_spacegroup_by_name("R 3 c:H")
    listed = [op.triplet() for op in group.operations()]
    loop = "loop_\n_space_group_symop_operation_xyz\n" + "\n".join(f"'{x}'" for x in listed)
    damaged = loop.replace("'-y+2/3,", "'-y+2/2,", 1)
    assert damaged != loop
    name = next(n for n, row in ROWS.items() if row[1] == "R 3 c:H")
    assert not phase_from_cif(cif(name) + loop, name).assumptions
    (note,) = phase_from_cif(cif(name) + damaged, name).assumptions
    assert "incomplete or damaged: R 3 c:H is used" in note
