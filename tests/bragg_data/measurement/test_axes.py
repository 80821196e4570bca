"""Axes, bins, time maps and commas of profiles: read with the right times, or refused by name."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.measurement.load import load_measurements
from bragg_data.measurement.readers import Profile, ProfileError, Reading, read_profiles
from bragg_data.measurement.resampling import (
    doubt_of_d_spacings,
    in_time_of_flight,
    match_bank,
    measurement_warnings,
    resample_to_grid,
)
from bragg_data.refinement.linear_fit import simulator_of

SHARED = Path(__file__).parents[4] / "shared"
needs_real = pytest.mark.skipif(
    not (SHARED / "real").is_dir(), reason="the real profiles (shared/real) are not on this machine"
)

N = 40
TOF = 2000 * 1.01 ** np.arange(N)  # to 2948 µs
COUNTS = np.arange(1.0, N + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axes")


def read(folder: Path, text: str, bank: int | None = None, **reading: object) -> Profile:
    path = folder / "profile.dat"
    path.write_text(text, encoding="utf-8")
    (profile,) = read_profiles(path, bank, Reading(**reading))  # type: ignore[arg-type]
    return profile


def fxye(x: np.ndarray = TOF, number: int = 1, binning: str = "SLOG 2000 2948 0.01 0") -> str:
    rows = "".join(f"{t:16.6f}{y:12.4f}{0.5:10.4f}\n" for t, y in zip(x, COUNTS, strict=False))
    return f"BANK {number} {len(x)} {len(x)} {binning} FXYE\n{rows}"


def std(counts: np.ndarray, record: str) -> str:
    cells = [f"{count:8.0f}" for count in counts]
    rows = ("".join(cells[i : i + 10]) + "\n" for i in range(0, len(cells), 10))
    return record + "\n" + "".join(rows)


def columns(x: np.ndarray, header: str = "", digits: int = 6) -> str:
    return header + "".join(f"{t:.{digits}f} {y} 0.5\n" for t, y in zip(x, COUNTS, strict=False))


# ---- records of banks --------------------------------------------------------------------------

BINS = {"tof": (TOF[1:] + TOF[:-1]) / 2, "intensity": COUNTS[:-1] / np.diff(TOF)}
STEPS = std(COUNTS, f"BANK 1 {N} 4 CONST 2000 10 0 0 STD")


@settings(max_examples=60)
@given(
    indent=st.sampled_from(["", " ", "  ", "\t", " " * 7]),
    case=st.sampled_from([str.upper, str.lower, str.title]),
    data_too=st.booleans(),
    fixed=st.booleans(),
)
def test_a_record_that_is_indented_or_in_lower_case_begins_a_bank(
    folder: Path, indent: str, case: object, data_too: bool, fixed: bool
) -> None:
    record, _, rows = (STEPS if fixed else fxye()).partition("\n")
    assert callable(case)
    if data_too:
        rows = "".join(indent + line + "\n" for line in rows.splitlines())
    profile = read(folder, f"title\n{indent}{case(record)}\n{rows}")
    if fixed:
        np.testing.assert_allclose(profile.tof, 2005 + 10 * np.arange(N - 1))
        np.testing.assert_allclose(profile.intensity, COUNTS[:-1] / 10)
    else:
        np.testing.assert_allclose(profile.tof, BINS["tof"], rtol=1e-8)
        np.testing.assert_allclose(profile.intensity, BINS["intensity"], rtol=1e-4)


def test_a_bank_in_the_title_of_columns_is_no_record(folder: Path) -> None:
    profile = read(folder, columns(TOF, "Bank 4 of NOMAD\n"))
    np.testing.assert_allclose(profile.tof, TOF, rtol=1e-8)


# ---- commas ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    separator=st.sampled_from([" ", "\t", ";", "  ; "]),
    digits=st.integers(1, 6),
    padded=st.booleans(),
    width=st.sampled_from([2, 3]),
)
def test_decimal_commas(
    folder: Path, separator: str, digits: int, padded: bool, width: int
) -> None:
    cells = zip(TOF, COUNTS, np.full(N, 1.5), strict=True)
    rows = [[f"{t:.{digits}f}", f"{y:.0f}", f"{s:.1f}"][:width] for t, y, s in cells]
    text = "".join(" " * padded + separator.join(row).replace(".", ",") + "\n" for row in rows)
    profile = read(folder, text)
    np.testing.assert_allclose(profile.tof, [float(row[0]) for row in rows], rtol=1e-12)
    np.testing.assert_allclose(profile.intensity, COUNTS)
    if width == 3:
        np.testing.assert_allclose(profile.sigma, 1.5)


@pytest.mark.parametrize(
    "row",
    [
        "{t},00000,{y},1,0",  # decimal, and separators, too
        "{t},00,{y}",
        "2,{k:03d} {y} 1",  # thousands, or 2.031 ms
        "{t}.5,{y} 1.0",
        "{t},5, {y},5, 1,0",
    ],
)
def test_ambiguous_commas_are_refused(folder: Path, row: str) -> None:
    rows = (row.format(t=2000 + 11 * k, y=k + 10, k=k) for k in range(N))
    with pytest.raises(ProfileError, match="commas that may be decimal"):
        read(folder, "\n".join(rows))


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{2000 + 11 * k},{k + 100},{10 + k % 3}\n" for k in range(N)),
        "".join(f"{2000 + 11 * k}.0, {k + 100},{10 + k % 3}\n" for k in range(N)),
        "tof,y,e,w\n" + "".join(f"{2000 + 11 * k},{k + 100},{10 + k % 3},0\n" for k in range(N)),
    ],
)
def test_commas_between_columns(folder: Path, text: str) -> None:
    profile = read(folder, text)
    np.testing.assert_array_equal(profile.tof, 2000 + 11 * np.arange(N))
    np.testing.assert_array_equal(profile.intensity, np.arange(N) + 100)
    np.testing.assert_array_equal(profile.sigma, 10 + np.arange(N) % 3)


# ---- constant wavelength -----------------------------------------------------------------------

ANGLES = 10 + 0.05 * np.arange(2901)  # to 155°


def plain(x: np.ndarray, header: str = "") -> str:
    return header + "".join(f"{v:.4f} {100 + i % 7}\n" for i, v in enumerate(x))


CONSTANT_WAVELENGTH = {
    "std in hundredths": std(np.full(2901, 200), "t\nBANK 1 2901 291 CONST 1000 5 0 0 STD"),
    "no data type": std(np.full(2901, 200), "t\nBANK 1 2901 291 CONST 1000 5 0 0"),
    "fxye": "t\nBANK 1 2901 2901 CONS 1000. 5. 0 0 FXYE\n"
    + "".join(f"{100 * v:.2f} 200 14\n" for v in ANGLES),
    "degrees": plain(ANGLES),
    "rounded degrees": "".join(f"{v:.2f} 5\n" for v in np.linspace(10, 155, 5800)),
    "hundredths": plain(100 * ANGLES),
    "named": plain(np.sort(np.sin(ANGLES)) * 72.5 + 82.5, "2Theta Intensity\n"),
    "named with a unit": plain(ANGLES, "# two_theta (deg), I(obs)\n"),
    "header": plain(ANGLES, "# The X-axis unit is: Degrees, The Y-axis unit is: Counts\n"),
    "greek": plain(ANGLES, "2θ,counts\n"),
    "FullProf": plain(ANGLES, "! Scattering variable: 2theta\n"),
}


@pytest.mark.parametrize("kind", CONSTANT_WAVELENGTH)
def test_constant_wavelength_is_refused_by_name(folder: Path, kind: str) -> None:
    with pytest.raises(
        ProfileError, match=r"constant wavelength, 2θ 10–155°; only time of flight is supported"
    ):
        read(folder, CONSTANT_WAVELENGTH[kind])


@settings(max_examples=20)
@given(
    start=st.floats(0.5, 30),
    stop=st.floats(60, 175),
    step=st.sampled_from([0.01, 0.02, 0.025, 0.05, 0.1]),
    hundredths=st.booleans(),
)
def test_regular_angles_are_recognised(
    folder: Path, start: float, stop: float, step: float, hundredths: bool
) -> None:
    x = np.round((100 if hundredths else 1) * np.arange(start, stop, step), 3)
    with pytest.raises(ProfileError, match="constant wavelength, 2θ"):
        read(folder, plain(x))


def test_regular_times_within_18_ms_are_read_where_something_names_them(folder: Path) -> None:
    x = 1000 + 5.0 * np.arange(3000)
    for text, unit in (
        (plain(x, "# time of flight, counts\n"), None),
        (plain(x, "tof_us y\n"), None),
        (plain(x), "us"),
        ("t\n# DIFC 9000\n" + std(np.full(3000, 9), "BANK 1 3000 300 CONST 1000 5 0 0 STD"), None),
    ):
        profile = read(folder, text, x_unit=unit)
        assert profile.tof[0] == pytest.approx(1002.5 if "BANK" in text else 1000)
    with pytest.raises(ProfileError, match="if the axis is another one, name it with --x-unit"):
        read(folder, plain(x))


@pytest.mark.parametrize("text", ["Type:PNC\n", "INS   HTYPE   PXCR \nINS   BANK      1\n"])
def test_an_instrument_of_constant_wavelength_is_refused(tmp_path: Path, text: str) -> None:
    profile, instrument = tmp_path / "p.xye", tmp_path / "i.prm"
    profile.write_text(columns(TOF))
    instrument.write_text(text)
    with pytest.raises(ProfileError, match=r"i\.prm is an instrument of constant wavelength \(P"):
        load_measurements(profile, load_campaign("batio3-nomad"), instrument)


# ---- units -------------------------------------------------------------------------------------

FACTORS = {"us": 1.0, "ms": 1e-3, "s": 1e-6}
WIDE = 2000 * 1.05 ** np.arange(N)  # to 13,410 µs
LONG = 20_000 * 1.05 ** np.arange(N)  # to 134 ms, as of HRPD and WISH


@pytest.mark.parametrize(
    ("header", "unit"),
    [
        ("# tof_ms y e\n", "ms"),
        ("TOF(ms),Intensity,Error\n", "ms"),
        ("Time of flight [ms]; Intensity; Error\n", "ms"),
        ("# t/ms y e\n", "ms"),
        ("# tof (s) y e\n", "s"),
        ("# tof (µs) y e\n", "us"),
        ("# tof (us) y e\n", "us"),
        ("# X-axis unit: milliseconds\n", "ms"),
    ],
)
def test_a_unit_of_time_that_is_named(folder: Path, header: str, unit: str) -> None:
    profile = read(folder, columns(WIDE * FACTORS[unit], header, 9))
    np.testing.assert_allclose(profile.tof, WIDE, rtol=1e-6)
    np.testing.assert_array_equal(profile.intensity, COUNTS)
    assert profile.warnings == ()


def test_a_unit_of_time_is_inferred_where_it_is_safe_and_reported(folder: Path) -> None:
    milliseconds = read(folder, columns(LONG / 1e3))  # to 134: no d-spacing, no µs
    seconds = read(folder, columns(LONG / 1e6, digits=9))
    named = read(folder, columns(WIDE / 1e3, "# tof y e\n"))
    in_bins = read(folder, "t\n" + fxye(LONG / 1e3))
    np.testing.assert_allclose(milliseconds.tof, LONG, rtol=1e-6)
    np.testing.assert_allclose(seconds.tof, LONG, rtol=1e-6)
    np.testing.assert_allclose(named.tof, WIDE, rtol=1e-6)
    np.testing.assert_allclose(in_bins.tof, (LONG[1:] + LONG[:-1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(in_bins.intensity, COUNTS[:-1] / np.diff(LONG), rtol=1e-4)
    for profile, unit in ((milliseconds, "ms"), (seconds, "s"), (named, "ms"), (in_bins, "ms")):
        *_, warning = profile.warnings
        assert f"taken as {unit}" in warning


def test_a_unit_that_may_be_several_is_requested(folder: Path) -> None:
    text = columns(WIDE / 1e3)  # 2 to 13.4: ms, or Å
    with pytest.raises(ProfileError, match=r"runs from 2 to 13\.\d+: .* Name the unit .* --x-unit"):
        read(folder, text)
    profile = read(folder, text, x_unit="ms")
    np.testing.assert_allclose(profile.tof, WIDE, rtol=1e-6)
    assert (profile.unit, profile.warnings) == ("us", ())


@pytest.mark.parametrize("header", ["wavelength y e\n", "# Energy(meV) y e\n"])
def test_other_axes_are_refused(folder: Path, header: str) -> None:
    with pytest.raises(ProfileError, match="neither time of flight nor d-spacing nor Q"):
        read(folder, columns(WIDE / 1e3, header))


D_SPACINGS = 0.3 * 1.05 ** np.arange(N)  # to 2.01 Å
GEM = Instrument(bank=4, two_theta=154.46, difc=9050.17, difa=-7.56, difb=1.5, tzero=-3.4)


@pytest.mark.parametrize(
    ("header", "unit"),
    [
        ("# d y e\n", None),
        ("d-Spacing (A),I,E\n", None),
        ("", "d"),
        ("# Q y e\n", None),
        ("Q [1/A] y e\n", None),
        ("", "Q"),
    ],
)
def test_d_and_q_become_time_of_flight_by_the_calibration(
    folder: Path, header: str, unit: str | None
) -> None:
    is_q = "Q" in (*header, unit)
    x = 2 * np.pi / D_SPACINGS[::-1] if is_q else D_SPACINGS
    profile = read(folder, columns(x, header, 9), x_unit=unit)
    assert profile.unit == "d"
    np.testing.assert_allclose(profile.tof, D_SPACINGS, rtol=1e-6)
    converted = in_time_of_flight(profile, GEM)
    d = D_SPACINGS
    np.testing.assert_allclose(converted.tof, 9050.17 * d - 7.56 * d**2 + 1.5 / d - 3.4, rtol=1e-6)
    np.testing.assert_array_equal(converted.intensity, COUNTS[::-1] if is_q else COUNTS)
    with pytest.raises(ProfileError, match=r"0\.3–2\.011 Å, where .* does not grow with d"):
        in_time_of_flight(profile, GEM.with_parameters(difa=-9000.0))


@pytest.mark.parametrize("axis", ["d", "Q"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_profile_over_d_or_q_is_that_over_time_of_flight(
    tmp_path: Path, campaign: Campaign, axis: str, calibrated: bool
) -> None:
    grid, instrument = campaign.grid, campaign.instrument
    cell = np.array([[3.99, 3.99, 4.03, 90, 90, 90.0]])
    (pattern,) = simulator_of(campaign).simulate(np.array([1]), cell).astype(float)
    y = 1000 * pattern / pattern.max() + 50
    d = instrument.d_spacing_from_tof(grid.tof)
    x = d if axis == "d" else 2 * np.pi / d
    path, calibration = tmp_path / "profile.xye", tmp_path / "mine.instprm"
    calibration.write_text(instrument.with_parameters(difc=9100.0).instprm)
    rows = sorted(zip(x, y, np.sqrt(y), strict=True))
    np.savetxt(path, rows, fmt="%.9f", header=f"{axis} y e")
    (measurement,) = load_measurements(path, campaign, calibration if calibrated else None)
    inner = slice(2, -2)
    np.testing.assert_allclose(measurement.gridded.intensity[inner], y[inner] * 1.0, rtol=0.05)
    peak = int(np.argmax(y))
    assert abs(int(np.argmax(measurement.gridded.intensity)) - peak) <= 1
    assert any("is over d-spacing" in text for text in measurement.warnings)
    assert not any("No calibration was given" in text for text in measurement.warnings)


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return load_campaign("batio3-nomad")


# ---- time maps, numbers of banks, channels ------------------------------------------------------

# 20 channels of 20 ticks from 20,000, then of 40; a tick is 100 ns: 2000, 2002, … 2040, 2044 µs
MAP = "TIME_MAP{0} 7 1 TIME_MAP 100\n       1   20000      20      21   20400      40   60000\n"
MAP_EDGES = np.concatenate([2000 + 2.0 * np.arange(20), 2040 + 4.0 * np.arange(20)])


def mapped(number: int, of: str) -> str:
    return std(COUNTS, f"BANK {number} {N} 4 TIME_MAP {of} STD")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", [" 1", "10", " 7"])
def test_a_time_map_before_or_after_its_banks(folder: Path, name: str, before: bool) -> None:
    banks = mapped(1, "1") + mapped(2, "2")  # as HIPD numbers them
    text = MAP.format(name) + banks if before else banks + MAP.format(name)
    path = folder / "map.gda"
    path.write_text("title\nInstrument parameter file:X.PRM\n" + text)
    for profile in read_profiles(path):
        np.testing.assert_allclose(profile.tof, (MAP_EDGES[1:] + MAP_EDGES[:-1]) / 2)
        np.testing.assert_allclose(profile.intensity, COUNTS[:-1] / np.diff(MAP_EDGES))


def test_several_time_maps(folder: Path) -> None:
    second = MAP.format(" 2").replace("TIME_MAP 100", "TIME_MAP 200")
    text = "t\n" + MAP.format(" 1") + mapped(1, "1") + second + mapped(2, "2") + mapped(3, "1")
    path = folder / "maps.gda"
    path.write_text(text)
    assert [p.tof[0] for p in read_profiles(path)] == [2001, 4002, 2001]
    path.write_text(text + mapped(4, "5"))
    with pytest.raises(ProfileError, match="bank 4, refers to time map '5'; the file holds 1, 2"):
        read_profiles(path)
    path.write_text(text + MAP.format(" 2") + mapped(4, "2"))
    with pytest.raises(ProfileError, match="two different time maps of the number 2"):
        read_profiles(path)


@pytest.mark.parametrize("end", ["END\n", "end", " END \n\n", "\x1a", "END\nof file\n"])
@pytest.mark.parametrize("bank", [fxye(), STEPS])
def test_what_ends_a_file(folder: Path, bank: str, end: str) -> None:
    expected = read(folder, "t\n" + bank)
    profile = read(folder, "t\n" + bank + end)
    np.testing.assert_array_equal(profile.tof, expected.tof)
    np.testing.assert_array_equal(profile.intensity, expected.intensity)
    assert profile.warnings == ()


def test_fewer_channels_than_announced_are_read_with_a_warning(folder: Path) -> None:
    profile = read(folder, "t\n" + STEPS.replace(f" {N} 4 ", f" {N + 3} 5 "))
    assert len(profile.tof) == N - 1
    assert "promises 5 lines, and 4 are there" in profile.warnings[0]
    assert "promises 43 channels and 40 are there" in profile.warnings[1]
    padded = read(folder, "t\n" + STEPS.replace(f" {N} 4 ", f" {N - 3} 4 "))
    np.testing.assert_allclose(padded.tof, 2005 + 10 * np.arange(N - 4))


def test_banks_of_the_same_number_are_chosen_by_place_or_angle(
    folder: Path, campaign: Campaign
) -> None:
    path, tof = folder / "repeated.gsa", campaign.grid.tof
    comb = np.where(np.arange(len(tof)) % 100 == 0, 500.0, 10.0)
    bank = f"BANK 1 {len(tof)} {len(tof)} SLOG 1360 18900 0.0009 0 FXYE\n" + "".join(
        f"{t:.4f} {y:.1f} {np.sqrt(y):.3f}\n" for t, y in zip(tof, comb, strict=True)
    )
    heads = [f"# Total flight path 21m, tth {angle}deg, DIFC 9496\n" for angle in (121, 123)]
    path.write_text("t\n" + heads[0] + bank + heads[1] + bank)
    assert [p.two_theta for p in read_profiles(path)] == [121, 123]
    assert [p.two_theta for p in read_profiles(path, 1, Reading(position=2))] == [123]
    (by_place,) = load_measurements(path, campaign, bank=1, reading=Reading(position=2))
    (by_angle,) = load_measurements(path, campaign, bank=1, two_theta=124)
    assert by_place.profile.two_theta == by_angle.profile.two_theta == 123
    for number in (1, None):
        with pytest.raises(ProfileError, match=r"bank 1, 2θ 121°, .*; bank 1, 2θ 123°.*--position"):
            load_measurements(path, campaign, bank=number)
    with pytest.raises(ProfileError, match=r"no bank at position 3\. It holds banks 1, 1"):
        read_profiles(path, None, Reading(position=3))


def test_negative_angles_are_those_of_the_other_side() -> None:
    banks = [Instrument(bank=k, two_theta=a, difc=5000.0) for k, a in ((1, -90.0), (2, 90.0))]
    y = np.ones(N)
    for angle, expected in ((-90.0, 1), (90.0, 2), (-89.0, 1)):
        assert match_bank(Profile(TOF, y, y, two_theta=angle), banks).bank == expected
    assert match_bank(Profile(TOF, y, y, two_theta=90.0), banks[:1]).bank == 1


def test_the_sign_of_an_angle_in_a_header(folder: Path) -> None:
    head = "t\n# Total flight path 43.7m, tth -90deg, DIFC 15000\n"
    assert read(folder, head + fxye()).two_theta == -90


# ---- edges or centres --------------------------------------------------------------------------


def test_columns_are_centres_or_edges(folder: Path) -> None:
    text = columns(TOF)
    centres, edges = read(folder, text), read(folder, text, bin_edges=True)
    np.testing.assert_allclose(centres.tof, TOF, rtol=1e-8)
    # As GSAS-II: half a bin later, without the last point; a density stays as it is.
    np.testing.assert_allclose(edges.tof, BINS["tof"], rtol=1e-8)
    np.testing.assert_array_equal(edges.intensity, COUNTS[:-1])
    header = "# times are lower bin edges\n"
    np.testing.assert_array_equal(read(folder, header + text).tof, edges.tof)
    assert "bin edges" in read(folder, header + text).warnings[0]
    np.testing.assert_array_equal(read(folder, header + text, bin_edges=False).tof, centres.tof)


def test_counts_at_bin_centres(folder: Path) -> None:
    profile = read(folder, "t\n" + fxye(), bin_edges=False)
    np.testing.assert_allclose(profile.tof, TOF, rtol=1e-8)
    widths = np.gradient(TOF)
    np.testing.assert_allclose(profile.intensity, COUNTS / widths, rtol=1e-6)


def test_what_was_chosen_is_reported(folder: Path) -> None:
    mantid = read(folder, "t\n# File generated by Mantid:\n" + fxye())
    assert "lower bin edges, half a bin (0.5 %) later" in mantid.warnings[0]
    assert read(folder, "t\n# File generated by Mantid:\n" + fxye(), bin_edges=True).warnings == ()
    assert (mantid.maybe_centres, mantid.maybe_edges) == (True, False)

    grid = TofGrid(2030.0, 0.00995, 30)

    def reports(profile: Profile) -> list[str]:
        nearby = GEM.with_parameters(two_theta=154.0)
        gridded = resample_to_grid(profile, grid, GEM, nearby)
        return measurement_warnings(profile, gridded, GEM, nearby)

    (report,) = reports(read(folder, columns(TOF)))
    assert "half a bin (0.5 % of every length) later" in report
    for header in ("# bin centres\n", "# tof yobs ycalc\n", "! File saved from WinPLOTR-2006\n"):
        assert reports(read(folder, columns(TOF, header))) == []
    for choice in (True, False):
        assert reports(read(folder, columns(TOF), bin_edges=choice)) == []


FULLPROF = """! Bank 4
NPROF 9
TOFRG 1000.0 5.0 20000.0
D2TOF 9050.17 -7.56 -3.4
TWOTH 154.46
SIGMA 2.0 33.0 3.0
GAMMA 0.5 2.5 0.1
ALFBE  0.0 0.04 0.6 0.01
END
"""
HALF = 0.5 * 0.000938  # of the grid's steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "fullprof", "choice", "half"),
    [
        ("", False, None, HALF),
        ("# File generated by Mantid\n", False, None, HALF),
        ("", True, None, 0.0),  # which reads centres
        ("", False, True, 0.0),
        ("", False, False, 0.0),
        ("", True, True, 0.0),
        ("# bin centres\n", False, None, 0.0),
        ("# tof yobs ycalc\n", False, None, 0.0),
        ("! File saved from WinPLOTR-2006\n", False, None, 0.0),
    ],
)
def test_half_a_bin_counts_as_uncertainty_where_it_is_unclear(
    tmp_path: Path,
    campaign: Campaign,
    header: str,
    fullprof: bool,
    choice: bool | None,
    half: float,
) -> None:
    """Half a bin of these files is 4.7e-4 of every length."""
    tof, instrument = campaign.grid.tof, campaign.instrument
    comb = np.where(np.arange(len(tof)) % 100 == 0, 500.0, 10.0)
    path, calibration = tmp_path / "profile.xye", tmp_path / "calibration"
    rows = zip(tof, comb, np.sqrt(comb), strict=True)
    path.write_text(header + "".join(f"{t:.4f} {y} {s:.3f}\n" for t, y, s in rows))
    calibration.write_text(instrument.instprm)
    if fullprof:
        numbers = f"{instrument.difc} {instrument.difa} {instrument.tzero}"
        text = FULLPROF.replace("9050.17 -7.56 -3.4", numbers)
        calibration.write_text(text.replace("154.46", f"{instrument.two_theta}"))
    (measurement,) = load_measurements(
        path, campaign, calibration, reading=Reading(bin_edges=choice)
    )
    expected = tof[:-1] + np.diff(tof) / 2 if choice else tof
    np.testing.assert_allclose(measurement.profile.tof, expected, rtol=1e-7)
    assert measurement.half_bin == pytest.approx(half, rel=0.01)
    notes = [text for text in measurement.warnings if "intervals of lengths hold for both" in text]
    assert len(notes) == (half > 0)
    assert all("half a bin (0.047 % of every length) later" in note for note in notes)


def test_the_centres_of_mantid_in_a_gsas_file_are_unclear(
    tmp_path: Path, campaign: Campaign
) -> None:
    tof = campaign.grid.tof
    comb = np.where(np.arange(len(tof)) % 100 == 0, 500.0, 10.0)
    path, calibration = tmp_path / "profile.gsa", tmp_path / "mine.instprm"
    rows = "".join(f"{t:.4f} {y:.1f} {np.sqrt(y):.3f}\n" for t, y in zip(tof, comb, strict=True))
    head = "t\n# File generated by Mantid:\n# Total flight path 21m, tth 122deg, DIFC 9300\n"
    path.write_text(f"{head}BANK 1 {len(tof)} {len(tof)} SLOG 1 2 0.0009 0 FXYE\n{rows}")
    calibration.write_text(campaign.instrument.instprm)
    for choice, half in ((None, HALF), (True, 0.0), (False, 0.0)):
        reading = Reading(bin_edges=choice)
        (measurement,) = load_measurements(path, campaign, calibration, reading=reading)
        assert measurement.half_bin == pytest.approx(half, rel=0.01)
        notes = [
            text for text in measurement.warnings if "intervals of lengths hold for both" in text
        ]
        assert len(notes) == (half > 0)


@pytest.mark.parametrize("difc", [9050.0, 900.0, 9.0, 1e5, 3e5])
def test_d_spacings_that_are_not_measured(difc: float) -> None:
    """Times of 2000 to 20,000 µs are 2 to 22 Å, 222 to 2222 Å, 0.02 to 0.2 Å … by difC."""
    tof = np.linspace(2000, 20_000, N)
    profile = Profile(tof, np.ones(N), np.where(tof < 3000, 0.0, 1.0))
    calibration = GEM.with_parameters(difc=difc, difa=0.0, difb=0.0, tzero=0.0)
    d = tof[tof > 3000] / difc
    share = ((d < 0.05) | (d > 100)).mean()
    if share > 0.5:
        with pytest.raises(ProfileError, match=r"powders are measured between 0\.05 and 100 Å"):
            doubt_of_d_spacings(profile, calibration)
    else:
        assert bool(doubt_of_d_spacings(profile, calibration)) == (share > 0)


# ---- real files --------------------------------------------------------------------------------


@needs_real
def test_every_constant_wavelength_file_is_refused() -> None:
    paths = sorted((SHARED / "real" / "constant_wavelength").glob("*"))
    ranges = {"PBSO4.CWN": "10–155.9", "PBSO4.XRA": "10–160"}
    ranges |= {path.name: "2.025–124.9" for path in paths if path.suffix == ".gss"}
    for name, expected in ranges.items():
        with pytest.raises(ProfileError, match=rf"constant wavelength, 2θ {expected}°; only time"):
            read_profiles(SHARED / "real" / "constant_wavelength" / name)


# Banks, points, first and last centre (µs), worked out from the text: a map's channel k is
# t + s (k - k0) ticks of 50 or 100 ns, the first and the last two edges averaged.
REAL = {
    "hipd_round_robin/6719.dat": (6, 7549, 599.35, 23993.675),
    "hipd_round_robin/6722.dat": (4, 7549, 599.35, 23993.675),
    "hippo_quartzite/14445.gda": (30, 9092, 750.1, 23988.25),
    "sepd_si/arg_si.dat": (1, 5599, 2002.5, 29992.5),
    "vulcan_steel/435.gda": (2, 2486, None, None),
    "wish_nac/55025-5_6raw.gss": (1, 4122, 7269.910395, 103451.00174),
    "powgen_nac/PG3_22048.gsa": (1, 6824, 6778.43695822, 103793.99950403),
    "nomad_nano3/GSAS_NaNO3_230C.gsa": (6, 2998, None, None),
    "powgen_mn3o4/PG3_20256-2_60K.xye": (1, None, 7004.38458, 102618.47037),
    "sepd_si/arg_si.xys": (1, 5600, 2000.0, 29995.0),
    "nomad_si/Si_test-1.xye": (1, None, None, 30204.18323),
}


@needs_real
@pytest.mark.parametrize("name", REAL)
def test_real_files_have_the_right_times(name: str) -> None:
    banks, points, first, last = REAL[name]
    profiles = read_profiles(SHARED / "real" / name)
    assert len(profiles) == banks
    profile = profiles[0]
    assert points in (None, len(profile.tof))
    if first is not None:
        assert profile.tof[0] == pytest.approx(first, rel=1e-7)
    if last is not None:
        assert profile.tof[-1] == pytest.approx(last, rel=1e-7)
