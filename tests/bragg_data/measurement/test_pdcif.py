"""Profiles in powder CIFs: read with the right numbers, or refused by name."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bragg_data.crystallography.structure import read_phase
from bragg_data.measurement.readers import Profile, ProfileError, Reading, read_profiles

N = 40
TOF = 4001 + 14.0 * np.arange(N)
COUNTS = np.arange(100, 100 + N)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pdcif")


def loop(columns: dict[str, list[str]]) -> str:
    rows = zip(*columns.values(), strict=True)
    return (
        "loop_\n" + "".join(f"{tag}\n" for tag in columns) + "\n".join(map(" ".join, rows)) + "\n"
    )


def block(x: str, y: str, extra: str = "", name: str = "powder", **columns: list[str]) -> str:
    values = {x: [f"{t:.4f}" for t in TOF], y: [str(count) for count in COUNTS]}
    return f"data_{name}\n{extra}\n{loop(values | columns)}"


def read(folder: Path, text: str, **reading: object) -> Profile:
    path = folder / "profile.cif"
    path.write_text(text, encoding="utf-8")
    (profile,) = read_profiles(path, None, Reading(**reading))  # type: ignore[arg-type]
    return profile


TIME, TOTAL = "_pd_meas_time_of_flight", "_pd_meas_intensity_total"


@settings(max_examples=60)
@given(
    x=st.sampled_from([TIME, "_pd_meas.time_of_flight", "_PD_meas_Time_of_flight"]),
    y=st.sampled_from([TOTAL, "_pd_proc_intensity_total", "_pd_proc.intensity_norm"]),
    kind=st.sampled_from(["su", "brackets", "decimals", "weight", "none"]),
    comment=st.booleans(),
    calculated=st.booleans(),
)
def test_a_profile_in_a_loop(
    folder: Path, x: str, y: str, kind: str, comment: bool, calculated: bool
) -> None:
    values = {
        "su": {f"{y}_su": ["2.5"] * N},
        "brackets": {y: [f"{count}(4)" for count in COUNTS]},
        "decimals": {y: [f"{count}.25(15)" for count in COUNTS]},
        "weight": {"_pd_proc_ls_weight": ["0.25"] * N},
        "none": {},
    }[kind]
    if calculated:
        values |= {
            "_pd_calc_intensity_total": ["7.0"] * N,
            "_pd_proc_intensity_bkg_calc": ["1"] * N,
        }
    text = block(x, y, "_pd_block_id '2026-11-27|bank 1'\n", **values)
    profile = read(folder, "# of a program\n\n" * comment + text)
    np.testing.assert_allclose(profile.tof, TOF)
    np.testing.assert_allclose(profile.intensity, COUNTS + 0.25 * (kind == "decimals"))
    sigma = {"su": 2.5, "brackets": 4, "decimals": 0.15, "weight": 2, "none": np.sqrt(COUNTS)}[kind]
    np.testing.assert_allclose(profile.sigma, np.broadcast_to(sigma, N))
    assert (profile.unit, profile.title, profile.maybe_edges) == ("us", "powder", False)
    assert profile.warnings == ()


def test_counts_become_a_density(folder: Path) -> None:
    profile = read(folder, block(TIME, "_pd_meas_counts_total"))
    np.testing.assert_allclose(profile.intensity, COUNTS / 14)
    np.testing.assert_allclose(profile.sigma, np.sqrt(COUNTS) / 14)
    assert "divided by the distance" in profile.warnings[0]
    edges = read(folder, block(TIME, "_pd_meas_counts_total"), bin_edges=True)
    np.testing.assert_allclose(edges.tof, TOF[:-1] + 7)


def test_gaps_and_points_that_a_refinement_left_out(folder: Path) -> None:
    weights, values = ["0.25"] * N, [str(count) for count in COUNTS]
    weights[0], values[1], values[2] = "0.0", "?", "."
    profile = read(folder, block(TIME, OTHER, **{TOTAL: values, "_pd_proc_ls_weight": weights}))
    assert profile.sigma[:4].tolist() == [0, 0, 0, 2]
    brackets = [f"{count}(4)" for count in COUNTS[:-3]] + [str(count) for count in COUNTS[-3:]]
    profile = read(folder, block(TIME, TOTAL, **{TOTAL: brackets}))
    assert profile.sigma[-4:].tolist() == [4, 0, 0, 0]
    assert f"3 points of {N} have no standard uncertainty" in profile.warnings[0]
    with pytest.raises(ProfileError, match=r"has '\?' as _pd_meas_time_of_flight at point 2"):
        read(folder, block("_x", TOTAL, **{TIME: ["1000", "?", *values[2:]]}))


def test_place_holders_of_a_template_are_no_intensities(folder: Path) -> None:
    text = block(TIME, "_pd_meas_intensity_net", "_pd_proc_intensity_total ?\n")
    np.testing.assert_allclose(read(folder, text).intensity, COUNTS)
    with pytest.raises(ProfileError, match="a CIF without a measured profile"):
        read(folder, "data_x\n_pd_proc_intensity_total ?\n_pd_meas_counts_total 5\n")


@pytest.mark.parametrize("descending", [True, False])
def test_d_and_q(folder: Path, descending: bool) -> None:
    d = 0.5 + 0.05 * np.arange(N)
    order = slice(None, None, -1) if descending else slice(None)
    y = [str(count) for count in COUNTS[order]]
    for tag, x, in_d in (
        ("_pd_proc_d_spacing", d, COUNTS),
        ("_pd_proc_recip_len_Q", 2 * np.pi / d[::-1], COUNTS[::-1]),
    ):
        profile = read(folder, "data_x\n" + loop({tag: [f"{v:.9f}" for v in x[order]], TOTAL: y}))
        np.testing.assert_allclose(profile.tof, d, rtol=1e-8)
        np.testing.assert_allclose(profile.intensity, in_d)
        assert profile.unit == "d"


RANGE = "_pd_meas_2theta_range_min {}\n_pd_meas_2theta_range_max {}\n_pd_meas_2theta_range_inc {}\n"


OTHER = "_other_name"


@pytest.mark.parametrize(
    ("x", "extra", "message"),
    [
        ("_pd_meas_2theta_scan", "", r"constant wavelength, 2θ 40\.01–45\.47°"),
        (
            OTHER,
            RANGE.format("10.0", "29.5", "0.5"),
            r"constant wavelength, 2θ 10–29\.5°; only time",
        ),
        (OTHER, RANGE.format("10.0", "90", "0.5"), "has 40 intensities and .* for 161 points"),
        (OTHER, "_pd_meas_number_of_points 40", "nothing that they are over"),
        (
            "_pd_proc_d_spacing",
            "_diffrn_radiation_wavelength 1.54(1)",
            r"wavelength, 1\.54 Å; only",
        ),
        (TIME, "_diffrn_radiation_probe x-ray", "was measured with x-ray"),
        ("_pd_proc_energy_detection", "", "neither time of flight nor d-spacing nor Q"),
    ],
)
def test_other_axes_are_refused(folder: Path, x: str, extra: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        read(folder, block(x, TOTAL, extra))


def test_times_that_fullprof_calls_angles(folder: Path) -> None:
    profile = read(folder, block(OTHER, TOTAL, RANGE.format("4001.0", "4547.0", "14.0")))
    np.testing.assert_allclose(profile.tof, TOF)
    assert "is no angle: taken as time of flight" in profile.warnings[0]


def test_geometry_and_calibration_of_a_block(folder: Path) -> None:
    """As cryspy and EasyDiffraction write them, and as the dictionary defines them."""
    cryspy = "_pd_instr.2theta_bank 90.0\n_pd_instr.dtt1 10050.037(2)\n"
    table = loop(
        {
            "_pd_calib_d_to_tof.id": ["ZERO", "DIFC", "DIFA"],
            "_pd_calib_d_to_tof.power": ["0", "1", "2"],
            "_pd_calib_d_to_tof.coeff": ["-1.9", "10050.037", "-0.5"],
        }
    )
    for extra in (cryspy, "_pd_meas_2theta_fixed 90.0\n" + table):
        profile = read(folder, block(TIME, TOTAL, extra))
        assert (profile.two_theta, profile.difc) == (90.0, 10050.037)


CELL = "".join(
    f"_cell_length_{n} 4.0\n_cell_angle_{a} 90\n"
    for n, a in zip("abc", ("alpha", "beta", "gamma"), strict=True)
)
STRUCTURE = (
    "_space_group_name_H-M_alt 'P m -3 m'\n"
    + CELL
    + loop(
        {
            "_atom_site_label": ["Ni1"],
            "_atom_site_type_symbol": ["Ni"],
            "_atom_site_fract_x": ["0"],
            "_atom_site_fract_y": ["0"],
            "_atom_site_fract_z": ["0"],
            "_atom_site_U_iso_or_equiv": ["0.005"],
        }
    )
)


@pytest.mark.parametrize("apart", [True, False])
def test_a_cif_with_structure_and_profile_is_either(folder: Path, apart: bool) -> None:
    path = folder / "both.cif"
    text = block(TIME, TOTAL)
    path.write_text(text + ("data_nickel\n" if apart else "") + STRUCTURE)
    (profile,) = read_profiles(path, 3)
    assert (profile.bank, len(profile.tof)) == (3, N)
    assert read_phase(path, "nickel").cell[0] == 4.0
    path.write_text("data_nickel\n" + STRUCTURE)
    with pytest.raises(ProfileError, match="is a CIF without a measured profile"):
        read_profiles(path)


def test_several_blocks_are_banks(folder: Path) -> None:
    path = folder / "banks.cif"
    path.write_text(
        "data_global\n_audit_creation_method 'x'\n"
        + block(TIME, TOTAL, name="a")
        + block(TIME, TOTAL, name="b")
    )
    profiles = read_profiles(path)
    assert [(p.bank, p.title) for p in profiles] == [(1, "a"), (2, "b")]
    assert read_profiles(path, 2)[0].title == "b"
    assert read_profiles(path, reading=Reading(position=1))[0].title == "a"
    assert read_profiles(path, reading=Reading(block="data_B"))[0].title == "b"
    with pytest.raises(ProfileError, match="has no block 'c' with a measured profile"):
        read_profiles(path, reading=Reading(block="c"))
    with pytest.raises(ProfileError, match=r"has no bank 3\. It holds banks 1, 2"):
        read_profiles(path, 3)


def test_what_is_no_cif(folder: Path) -> None:
    with pytest.raises(ProfileError, match="is not a readable CIF"):
        read(folder, block(TIME, TOTAL) + "loop_\n_a\n_b\n1 2 3\n")
    rows = "".join(f"{t} {y}\n" for t, y in zip(TOF, COUNTS, strict=True))
    assert len(read(folder, "data_of_today\tand more\n" + rows).tof) == N  # a title of columns
