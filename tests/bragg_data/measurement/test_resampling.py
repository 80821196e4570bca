import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from bragg_data.instrument.instprm import Instrument, TofGrid, read_instrument, read_instruments
from bragg_data.measurement.readers import Profile, ProfileError, read_profiles
from bragg_data.measurement.resampling import (
    match_bank,
    measurement_warnings,
    nominal_calibration,
    resample_to_grid,
)

SHARED = Path(__file__).parents[4] / "shared"
MEASURED = SHARED / "measured"
needs_measured = pytest.mark.skipif(not MEASURED.is_dir(), reason="needs the measured profiles")

GRID = TofGrid(1360.0, 0.0009381, 2807)
NOMAD = Instrument(bank=4, two_theta=122.0, difc=9496.17, difa=19.21, tzero=4.84, alpha=0.167)
OTHER = Instrument(bank=4, two_theta=120.4, difc=9068.55, difa=-23.08, tzero=-3.2, alpha=0.1)


# ---- texts of files ----------------------------------------------------------------------------


def fxye(points: int = 30, bank: int = 1, *, comment: str = "") -> str:
    """Bins from 1000 µs, each 1 % wider; counts i + 1 with deviation 0.5."""
    edges = 1000 * 1.01 ** np.arange(points)
    rows = "".join(f"{t:20.9f}{i + 1.0:20.9f}{0.5:20.9f}\n" for i, t in enumerate(edges))
    return f"{comment}BANK {bank} {points} {points} SLOG 1000 {edges[-1]:.0f} 0.01 0 FXYE\n{rows}"


def fixed(cells: list[str], per_line: int) -> str:
    return "".join("".join(cells[i : i + per_line]) + "\n" for i in range(0, len(cells), per_line))


def alt(points: int = 30, bank: int = 1) -> str:
    edges = np.round(32 * 1000 * 1.01 ** np.arange(points)).astype(int)
    cells = [f"{t:8d}{1000 * (i + 1):7d}{500:5d}" for i, t in enumerate(edges)]
    head = f"BANK {bank} {points} {-(-points // 4)} RALF 32000 320 32000 0.01000 ALT\n"
    return head + fixed(cells, 4)


def esd(points: int = 30, binning: str = "SLOG 1000 1400 0.01 0") -> str:
    cells = [f"{i + 1.0:8.2f}{0.5:8.3f}" for i in range(points)]
    return f"BANK 1 {points} {-(-points // 5)} {binning} ESD\n" + fixed(cells, 5)


def std(points: int = 30, binning: str = "CONST 1000 10 0 0", detectors: int = 1) -> str:
    cells = [f"{detectors:2d}{i + 1.0:6.1f}" for i in range(points)]
    return f"BANK 1 {points} {-(-points // 10)} {binning} STD\n" + fixed(cells, 10)


def xye(points: int = 30) -> str:
    tof = 1000 * 1.01 ** np.arange(points)
    return "# tof intensity sigma\n" + "".join(
        f"{t:.6f} {i + 1.0:.3f} 0.5\n" for i, t in enumerate(tof)
    )


def read(tmp_path: Path, text: str, name: str = "profile.gsa", bank: int | None = None) -> Profile:
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    (profile,) = read_profiles(path, bank)
    return profile


EDGES = 1000 * 1.01 ** np.arange(30)
WIDTHS = np.diff(EDGES)
COUNTS = np.arange(1.0, 30.0)


# ---- GSAS files --------------------------------------------------------------------------------


def test_counts_in_bins_become_a_density_at_bin_centres(tmp_path: Path) -> None:
    profile = read(tmp_path, "A title\n" + fxye())
    np.testing.assert_allclose(profile.tof, EDGES[:-1] + WIDTHS / 2, rtol=1e-9)
    np.testing.assert_allclose(profile.intensity, COUNTS / WIDTHS, rtol=1e-9)
    np.testing.assert_allclose(profile.sigma, 0.5 / WIDTHS, rtol=1e-9)
    assert (profile.bank, profile.title) == (1, "A title")


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        pytest.param(alt(), 5e-3, id="ALT: times in 1/32 µs, rounded"),
        pytest.param(alt().replace("\n", "\r\n"), 5e-3, id="ALT with DOS line ends"),
        pytest.param(esd(), 1e-9, id="ESD on SLOG: no times in the file"),
    ],
)
def test_every_gsas_data_type_is_read_alike(tmp_path: Path, text: str, tolerance: float) -> None:
    expected = read(tmp_path, "title\n" + fxye())
    profile = read(tmp_path, "title\n" + text, "other.gss")
    for name in ("tof", "intensity", "sigma"):
        np.testing.assert_allclose(getattr(profile, name), getattr(expected, name), rtol=tolerance)


def test_the_first_bins_of_an_isis_file(tmp_path: Path) -> None:
    # 81743 / 32 = 2554.46875 µs, 81808 / 32 = 2556.5 µs; 2.988 counts in 2.03125 µs
    text = alt(20).splitlines()
    text[1] = "   81743   2988   83   81808   3159   84   81874   3474   89   81939   3648   89"
    rows = [text[1]]
    start = 82005
    for _ in range(4):
        rows.append("".join(f"{start + 65 * i:8d}{4000:7d}{90:5d}" for i in range(4)))
        start += 260
    profile = read(tmp_path, "\n".join(["GT  SrTiO3", text[0], *rows]))
    assert profile.tof[0] == pytest.approx((2554.46875 + 2556.5) / 2)
    assert profile.intensity[0] == pytest.approx(2.988 / 2.03125)
    assert profile.sigma[0] == pytest.approx(0.083 / 2.03125)


def test_counts_of_several_detectors_are_their_mean(tmp_path: Path) -> None:
    single = read(tmp_path, "t\n" + std())
    four = read(tmp_path, "t\n" + std(detectors=4))
    np.testing.assert_allclose(single.tof, 1005 + 10 * np.arange(29))
    np.testing.assert_allclose(single.intensity, COUNTS / 10)
    np.testing.assert_allclose(single.sigma, np.sqrt(COUNTS) / 10)
    np.testing.assert_allclose(four.sigma, single.sigma / 2)


def test_time_map(tmp_path: Path) -> None:
    # 10 channels of 20 clock ticks from 10000, then of 40; a tick is 100 ns
    time_map = "TIME_MAP 1 7 1 TIME_MAP 100\n 1 10000 20 11 10200 40 11000\n"
    profile = read(tmp_path, "t\n" + std(binning="TIME_MAP 1") + time_map)
    edges = np.concatenate([1000 + 2.0 * np.arange(10), 1020 + 4.0 * np.arange(20)])
    np.testing.assert_allclose(profile.tof, (edges[:-1] + edges[1:]) / 2)
    np.testing.assert_allclose(profile.intensity, COUNTS / np.diff(edges))


def test_fxy_has_poisson_deviations(tmp_path: Path) -> None:
    lines = fxye().replace("FXYE", "FXY").splitlines()
    text = "\n".join([lines[0], *(" ".join(line.split()[:2]) for line in lines[1:])])
    profile = read(tmp_path, "t\n" + text)
    np.testing.assert_allclose(profile.sigma, np.sqrt(COUNTS) / WIDTHS)


MANTID = (
    "Sample Run: 127827 Vanadium Run: 122827 Wavelength: 1.5 A\nMonitor: 1\n"
    "# Diamond_in_UTube at temperature 1375.0 C.\n# Instrument: NOMAD\n#\n"
    "# Total flight path 21.51m, tth 15.1deg, DIFC 1428.82\n# Data for spectrum :0\n"
    + fxye(bank=1)
    + "# Total flight path 20.61m, tth 120.4deg, DIFC 9041.7\n# Data for spectrum :3\n"
    + fxye(25, bank=4)
)


def test_each_bank_has_a_header(tmp_path: Path) -> None:
    path = tmp_path / "two.gsa"
    path.write_text(MANTID)
    first, second = read_profiles(path)
    assert [(p.bank, p.two_theta, p.difc, len(p.tof)) for p in (first, second)] == [
        (1, 15.1, 1428.82, 29),
        (4, 120.4, 9041.7, 24),
    ]
    assert first.title.startswith("Sample Run: 127827")
    assert second.header["instrument"] == "NOMAD"
    assert second.header["total flight path"] == "20.61"
    assert second.header["comment"] == "Diamond_in_UTube at temperature 1375.0 C."
    assert [p.bank for p in read_profiles(path, bank=4)] == [4]
    with pytest.raises(ProfileError, match=r"has no bank 3. It holds banks 1, 4"):
        read_profiles(path, bank=3)


def test_a_broken_bank_does_not_hide_another(tmp_path: Path) -> None:
    path = tmp_path / "two.gsa"
    path.write_text(MANTID[: len(MANTID) // 4].rsplit("\n", 1)[0] + "\n" + fxye(bank=4))
    assert read_profiles(path, bank=4)[0].bank == 4
    with pytest.raises(ProfileError, match="bank 1, is truncated"):
        read_profiles(path)


# ---- columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", ", " ; "])
@pytest.mark.parametrize("comment", ["# ", "! ", "' ", "#"])
def test_columns(tmp_path: Path, separator: str, comment: str) -> None:
    rows = [f"{t}{separator}{y}{separator}0.5" for t, y in zip(EDGES, range(30), strict=True)]
    text = f"{comment}Ba Ti O3, 300 K\n" + "\n".join(rows)
    profile = read(tmp_path, text, "p.xye")
    np.testing.assert_array_equal(profile.tof, EDGES)  # as they stand: no bins, no division
    np.testing.assert_array_equal(profile.intensity, np.arange(30.0))
    np.testing.assert_array_equal(profile.sigma, np.full(30, 0.5))
    assert (profile.title, profile.bank) == ("Ba Ti O3, 300 K", None)


def test_names_order_the_columns(tmp_path: Path) -> None:
    rows = [f"{i},{4.0},{t},9" for i, t in enumerate(EDGES)]
    text = "yobs,weight,tof_us,ycalc\n" + "\n".join(rows)
    profile = read(tmp_path, text, "p.csv", bank=3)
    np.testing.assert_array_equal(profile.tof, EDGES)
    np.testing.assert_array_equal(profile.intensity, np.arange(30.0))
    np.testing.assert_array_equal(profile.sigma, np.full(30, 0.5))  # 1/√4
    assert profile.bank == 3  # as requested: a file of columns has no bank


def test_missing_deviations_are_those_of_counts(tmp_path: Path) -> None:
    counts = np.array([0.0, 4.0, 9.0, 25.0] * 8)
    text = "\n".join(f"{1000 + 2 * i} {y}" for i, y in enumerate(counts))
    profile = read(tmp_path, text, "p.xy")
    np.testing.assert_allclose(profile.sigma, np.sqrt(np.maximum(counts, 4.0)))


def test_points_without_information_have_no_deviation(tmp_path: Path) -> None:
    lines = xye().splitlines()
    lines[5] = lines[5].rsplit(" ", 2)[0] + " nan 0.5"
    lines[6] = lines[6].rsplit(" ", 1)[0] + " -1"
    lines[7] = lines[7].rsplit(" ", 1)[0] + " 0"
    profile = read(tmp_path, "\n".join(lines), "p.xye")
    assert np.flatnonzero(profile.sigma == 0).tolist() == [4, 5, 6]
    assert np.isfinite(profile.intensity).all()


def test_header_of_columns(tmp_path: Path) -> None:
    profile = read(tmp_path, "# 2theta = 122.0\n# DIFC: 9496.2\n# title: BaTiO3\n" + xye(), "p.xye")
    assert (profile.two_theta, profile.difc, profile.title) == (122.0, 9496.2, "BaTiO3")


# ---- refusals ----------------------------------------------------------------------------------


def columns(tof: np.ndarray, y: np.ndarray | None = None) -> str:
    y = np.arange(1.0, len(tof) + 1) if y is None else y
    return "".join(f"{t} {v}\n" for t, v in zip(tof, y, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x89HDF\r\n\x1a\n\0\0\0", "is a damaged HDF5 file"),
        (b"\x89PNG\r\n\0\0\0", r"is a binary file\. Give GSAS"),
        (b"some words\nand more\n", "holds no numbers. Expected: columns of time of flight"),
        (b"1000\n" * 30, "one column"),
        (xye(10).encode(), "has 10 points; it needs at least 20"),
        (columns(np.linspace(1.3, 19, 40)).encode(), r"runs from 1.3 to 19: .* in µs is expected"),
        (b"d intensity\n" + columns(EDGES).encode(), "d lies between 0 and 500"),
        (columns(EDGES[::-1]).encode(), "do not ascend: .* at point 2"),
        (columns(np.append(EDGES, EDGES[-1])).encode(), "do not ascend: .* at point 31"),
        (columns(EDGES, np.zeros(30)).encode(), "holds no intensity: all 30 values are zero"),
        (columns(EDGES, -np.ones(30)).encode(), "holds no positive intensity"),
        (columns(EDGES, np.full(30, np.nan)).encode(), "no number as intensity .* at 30 of 30"),
        (columns(EDGES, np.full(30, 1e300)).encode(), "intensity over"),
        (columns(EDGES - 1100).encode(), "between 0 and"),
        (columns(np.append(EDGES, np.nan)).encode(), "not a number"),
        ((xye() + "1500 three 0.5\n").encode(), "line 32: '1500 three 0.5' is not numbers"),
        ((xye() + "1500 3\n").encode(), "2 columns at line 32, not 3"),
        ("\n".join(f"t\n{fxye()}".split("\n")[:14]).encode(), "is truncated: .* 30 .* and 12 are"),
        (f"t\n{fxye()}"[:-50].encode(), "without 3 numbers"),
        (f"t\n{fxye()}".replace("BANK 1", "BANK one").encode(), "bank record that cannot be read"),
        (f"t\n{alt()}".replace("32000", "3x000").encode(), "ALT data|record that cannot be read"),
        (f"t\n{esd(binning='RALF 1 2 3 4')}".encode(), "without times .* Save it as FXYE"),
        (f"t\n{std(binning='TIME_MAP 1')}".encode(), "30 channels and a time map of 0"),
        (f"t\n{std()}TIME_MAP 1 7 1 TIME_MAP 100\n1 0 0 9 9 9 9\n".encode(), "time map"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=message) as caught:
        read_profiles(path)
    assert str(path) in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="not found"):
        read_profiles(tmp_path / "none.gsa")
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profiles(tmp_path)


_BASES = [
    MANTID,
    "t\n" + alt(),
    "t\n" + esd(),
    "t\n" + std() + "TIME_MAP 1 7 1 TIME_MAP 100\n 1 10000 20 11 10200 40 11000\n",
    "t\n"
    + std(binning="TIME_MAP 1")
    + "TIME_MAP 1 7 1 TIME_MAP 100\n 1 10000 20 11 10200 40 99000",
    xye(),
]
_WORDS = ["nan", "inf", "-inf", "1e400", "-1", "0", "", "1e-320", "BANK", "TIME_MAP", "9" * 25, "²"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    text = draw(st.sampled_from(_BASES))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["byte", "cut", "drop", "repeat", "word"]))
        lines = text.split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        if kind == "byte":
            where = draw(st.integers(0, max(len(text) - 1, 0)))
            text = text[:where] + chr(draw(st.integers(0, 255))) + text[where + 1 :]
        elif kind == "cut":
            text = text[: draw(st.integers(0, len(text)))]
        elif kind == "drop":
            text = "\n".join(lines[:at] + lines[at + 1 :])
        elif kind == "repeat":
            text = "\n".join(lines[: at + 1] + lines[at:])
        else:
            words = lines[at].split(" ")
            words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(_WORDS))
            text = "\n".join([*lines[:at], " ".join(words), *lines[at + 1 :]])
    return text.encode("latin-1", errors="replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@pytest.mark.slow
@settings(max_examples=600)
@given(content=mutated())
def test_a_damaged_file_is_read_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "damaged.gsa"
    path.write_bytes(content)
    try:
        profiles = read_profiles(path)
    except ProfileError:
        return
    assert profiles
    grid = TofGrid(1000.0, 0.005, 60)
    for profile in profiles:
        assert len(profile.tof) == len(profile.intensity) == len(profile.sigma) >= 19
        assert (np.diff(profile.tof) > 0).all()
        assert np.isfinite([profile.tof, profile.intensity, profile.sigma]).all()
        assert (profile.sigma >= 0).all()
        try:
            gridded = resample_to_grid(profile, grid, NOMAD, OTHER)
        except ProfileError:
            continue
        assert np.isfinite([gridded.intensity, gridded.sigma]).all()


# ---- onto the grid -----------------------------------------------------------------------------


def profile_of(tof: np.ndarray, y: np.ndarray, sigma: np.ndarray | None = None) -> Profile:
    sigma = np.ones_like(y) if sigma is None else sigma
    return Profile(tof, y, sigma, None, "", None, None, {}, "made.xye")


def peaks(tof: np.ndarray, calibration: Instrument) -> np.ndarray:
    """Three gaussian peaks in d, 0.005 Å wide, of area 1, as a density per µs."""
    d = calibration.d_spacing_from_tof(tof)
    per_angstrom = sum(norm.pdf(d, centre, 0.005) for centre in (0.9, 1.2, 1.6))
    return per_angstrom / (calibration.difc + 2 * calibration.difa * d)


def test_a_profile_on_the_grid_of_the_campaign_stays_as_it_is() -> None:
    rng = np.random.default_rng(3)
    y, sigma = rng.normal(5, 1, GRID.points), rng.uniform(1, 2, GRID.points)
    for calibration in (None, NOMAD):
        gridded = resample_to_grid(profile_of(GRID.tof, y, sigma), GRID, NOMAD, calibration)
        inner = slice(1, -1)
        assert gridded.covered[inner].all()
        np.testing.assert_allclose(gridded.intensity[inner], y[inner], atol=1e-6)
        np.testing.assert_allclose(gridded.sigma[inner], sigma[inner], rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "tolerance"),
    [
        pytest.param(0.0001, 0.02, id="nine measured points to a step: averaged"),
        pytest.param(0.0004471, 0.02, id="two to a step: averaged"),
        pytest.param(0.0009381, 1e-3, id="about one: interpolated"),
        pytest.param(0.002, 0.01, id="coarser: interpolated"),
    ],
)
def test_peaks_move_to_where_their_d_spacing_belongs(step: float, tolerance: float) -> None:
    measured = 1100 * np.exp(step * np.arange(int(np.log(18000 / 1100) / step)))
    gridded = resample_to_grid(profile_of(measured, peaks(measured, OTHER)), GRID, NOMAD, OTHER)
    # The same peaks as the campaign's instrument sees them, area conserved.
    expected = peaks(GRID.tof, NOMAD)
    np.testing.assert_allclose(gridded.intensity, expected, atol=tolerance * expected.max())
    for d in (0.9, 1.2, 1.6):
        near = np.abs(GRID.tof - NOMAD.tof_from_d_spacing(d)) < 6 * 0.005 * NOMAD.difc
        weight = (gridded.intensity * np.gradient(GRID.tof))[near]
        assert weight.sum() == pytest.approx(1.0, abs=2e-3)
        centre = (weight * GRID.tof[near]).sum() / weight.sum()
        # A hundredth of a step of the grid is 4e-5 Å in a length of 4 Å.
        assert centre == pytest.approx(NOMAD.tof_from_d_spacing(d), rel=0.01 * GRID.relative_step)


def test_averaging_lowers_the_noise_and_its_deviation() -> None:
    rng = np.random.default_rng(8)
    measured = 1300 * np.exp(0.0001 * np.arange(27000))
    noise = rng.normal(0, 3, len(measured))
    gridded = resample_to_grid(
        profile_of(measured, 100 + noise, np.full(27000, 3.0)), GRID, NOMAD, None
    )
    inner = gridded.covered
    assert gridded.sigma[inner].mean() == pytest.approx(3 / np.sqrt(9.381), rel=0.02)
    pull = (gridded.intensity[inner] - 100) / gridded.sigma[inner]
    assert pull.std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("step", [0.0002, 0.0009381, 0.0015])
def test_a_dead_range_is_not_covered_and_does_not_leak(step: float) -> None:
    measured = 1300 * np.exp(step * np.arange(int(2.7 / step)))
    alive = (measured < 17500) & ~((measured > 5000) & (measured < 5500))
    gridded = resample_to_grid(
        profile_of(measured, np.where(alive, 7.0, 1e6), alive.astype(float)), GRID, NOMAD, None
    )
    gap = ((GRID.tof > 5015) & (GRID.tof < 5485)) | (GRID.tof > 17530)
    assert not gridded.covered[gap].any()
    assert (gridded.intensity[~gridded.covered] == 0).all()
    np.testing.assert_allclose(gridded.intensity[gridded.covered], 7.0, rtol=1e-9)
    assert gridded.covered[(GRID.tof > 5530) & (GRID.tof < 17400)].all()


def test_a_profile_elsewhere_is_refused_with_both_ranges() -> None:
    tof = np.linspace(500, 2000, 4000)
    with pytest.raises(
        ProfileError, match=r"500–2000 µs .* the model needs 1360–18912 µs \(0.143–1.983 Å\)"
    ):
        resample_to_grid(profile_of(tof, np.ones(4000)), GRID, NOMAD, None)
    coarse = np.linspace(1300, 19000, 60)
    with pytest.raises(ProfileError, match=r"grid points are covered and 562 are needed"):
        resample_to_grid(profile_of(coarse, np.ones(60)), GRID, NOMAD, None)


def test_a_calibration_that_turns_back_is_refused() -> None:
    calibration = NOMAD.with_parameters(difa=-4000.0)
    with pytest.raises(ProfileError, match="does not grow with d"):
        resample_to_grid(profile_of(GRID.tof, np.ones(GRID.points)), GRID, NOMAD, calibration)


# ---- banks and warnings ------------------------------------------------------------------------

BANKS = (
    Instrument(bank=6, two_theta=9.39, difc=747.0),
    Instrument(bank=1, two_theta=150.0, difc=1439.6),  # the angle is wrong, difC right
    Instrument(bank=4, two_theta=120.4, difc=9068.6),
    Instrument(bank=5, two_theta=150.1, difc=9912.1),
    Instrument(bank=6, two_theta=170.0, difc=9990.0),
)


def headed(bank: int | None, two_theta: float | None, difc: float | None) -> Profile:
    y = np.ones(GRID.points)
    return Profile(GRID.tof, y, y, bank, "", two_theta, difc, {}, "made.gsa")


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (headed(1, 15.1, 1428.82), 1),
        (headed(1, 150.1, 9910.5), 5),
        (headed(1, 120.9, None), 4),
        (headed(4, None, None), 4),
        (headed(4, 170.0, None), 6),
    ],
)
def test_the_bank_is_identified_by_its_geometry(profile: Profile, expected: int) -> None:
    assert match_bank(profile, BANKS).bank == expected


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (headed(4, 90.0, None), "at 2θ 90°, which no bank of the instrument file has"),
        (headed(4, 90.0, 7500.0), "at difC 7500, which no bank"),
        (headed(7, None, None), r"does not say at which angle .* 4 \(2θ 120.4°"),
        (headed(None, None, None), "does not say at which angle"),
        (headed(6, None, None), "does not say at which angle"),
    ],
)
def test_a_bank_that_cannot_be_identified_is_refused(profile: Profile, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        match_bank(profile, BANKS)


def test_numbers_decide_between_frames_of_an_angle() -> None:
    frames = [
        Instrument(bank=n, two_theta=90.0, difc=difc, flight_path=63.18)
        for n, difc in ((1, 22591.86), (2, 22581.63), (4, 22575.86))
    ]
    for number, expected in ((1, 1), (2, 2), (4, 4), (7, 2), (None, 2)):
        assert match_bank(headed(number, 90.0, 22585.8), frames).bank == expected
        assert match_bank(headed(number, 90.0, 22591.86), frames).bank == 1  # its very difC


def test_a_single_bank_needs_no_number() -> None:
    assert match_bank(headed(None, None, None), BANKS[2:3]).bank == 4


# 505.557 µs/Å per metre: 21 m give 2743 at 30°, 9129 at 118.7°, 10255 at 150°.
NOMAD_BANKS = (
    Instrument(bank=1, two_theta=150.0, difc=1439.6, flight_path=25.0),  # defaults; truly 15°
    Instrument(bank=2, two_theta=31.0, difc=2851.1, flight_path=21.18),
    Instrument(bank=5, two_theta=150.1, difc=10300.0, flight_path=21.1),
)


def test_an_angle_that_difc_contradicts_chooses_no_bank() -> None:
    assert match_bank(headed(None, 150.0, None), NOMAD_BANKS).bank == 5
    assert match_bank(headed(None, 15.1, 1428.8), NOMAD_BANKS).bank == 1
    with pytest.raises(ProfileError, match=r"1 \(2θ 150° in doubt, difC 1439.6\)"):
        match_bank(headed(None, 150.0, None), NOMAD_BANKS[:2])
    # A file of one bank leaves no choice.
    assert match_bank(headed(None, 150.0, None), NOMAD_BANKS[:1]).bank == 1


def test_banks_confirm_their_angles_where_the_flight_path_is_a_default() -> None:
    banks = [i.with_parameters(flight_path=5.0) for i in NOMAD_BANKS]
    assert all(i.geometry_doubt for i in banks)
    assert match_bank(headed(None, 31.5, None), banks).bank == 2


def test_a_geometry_in_doubt_is_a_warning() -> None:
    profile, bank = headed(1, 15.1, 1428.8), NOMAD_BANKS[0]
    whole = resample_to_grid(headed(4, 122.0, 9496.0), GRID, NOMAD, NOMAD)
    doubt, other_difc, angle = measurement_warnings(profile, whole, NOMAD, bank)
    assert "flight path 25 m give difC 12208.3, and the file's is 1439.6" in doubt
    assert "more than 5 %" in other_difc
    assert "measured at 2θ 15.1°" in angle
    assert (
        measurement_warnings(headed(2, 31.0, 2860.0), whole, NOMAD_BANKS[1], NOMAD_BANKS[1]) == []
    )


@pytest.mark.parametrize(
    ("angle", "expected"), [(-90.0, 1), (90.0, 2), (-89.5, 1), (151.0, 3), (-151.5, 3)]
)
def test_banks_on_both_sides_of_the_beam(angle: float, expected: int) -> None:
    banks = (
        Instrument(bank=1, two_theta=-90.0, difc=16369.2),
        Instrument(bank=2, two_theta=90.0, difc=16385.1),
        Instrument(bank=3, two_theta=-151.0, difc=22400.0),
    )
    assert match_bank(headed(None, angle, None), banks).bank == expected
    model = NOMAD.with_parameters(two_theta=-122.0)
    profile = headed(None, 122.0, 9496.0)
    whole = resample_to_grid(profile, GRID, NOMAD, NOMAD)
    assert measurement_warnings(profile, whole, NOMAD, model) == []
    assert measurement_warnings(profile, whole, model, NOMAD) == []


def test_warnings() -> None:
    profile = headed(4, 122.0, 9496.0)
    whole = resample_to_grid(profile, GRID, NOMAD, NOMAD)
    assert measurement_warnings(profile, whole, NOMAD, NOMAD) == []
    (uncalibrated,) = measurement_warnings(profile, whole, NOMAD, None)
    assert "0.004 to 0.016 Å in 4 Å" in uncalibrated
    _, far = measurement_warnings(headed(4, 122.0, 9041.7), whole, NOMAD, None)
    assert "-4.8 %" in far
    (number,) = measurement_warnings(headed(4, None, None), whole, NOMAD, NOMAD)
    assert "bank 4 stands" in number
    other = measurement_warnings(
        headed(5, 150.1, 9910.0), whole, NOMAD.with_parameters(difc=4000.0), BANKS[3]
    )
    assert any("differ by more than 5 %" in text for text in other)
    assert any("stands at 122°" in text for text in other)
    half = resample_to_grid(profile_of(GRID.tof[:1500], np.ones(1500)), GRID, NOMAD, None)
    assert "covers 53 %" in measurement_warnings(profile, half, NOMAD, NOMAD)[-1]
    (mixed,) = measurement_warnings(headed(4, 154.5, 9500.0), whole, NOMAD, NOMAD)
    assert "header says 2θ 154.5°" in mixed


def test_the_headers_nominal_calibration() -> None:
    profile = headed(4, 120.4, 9041.7)
    calibration = nominal_calibration(profile, NOMAD)
    assert calibration is not None
    assert calibration.tof_from_d_spacing(1.5) == pytest.approx(1.5 * 9041.7)
    gridded = resample_to_grid(profile, GRID, NOMAD, calibration)
    warning = measurement_warnings(profile, gridded, NOMAD, calibration, nominal=True)[0]
    assert "nominal difC 9041.7 was used" in warning
    assert nominal_calibration(headed(4, None, None), NOMAD) is None


# ---- real files --------------------------------------------------------------------------------


@needs_measured
@pytest.mark.parametrize(
    ("name", "bank", "points", "first", "last", "sigma", "dead"),
    [
        ("gem_srtio3/gem05984.gss", 1, 2719, 2555.484, 22461.30, 0.0408615, 0),
        ("gem_srtio3/gem05984.gss", 4, 2719, 2032.500, 17864.67, 0.0178462, 0),
        ("nomad_diamond/NOM_127827.gsa", 1, 5999, 743.2943, 8969.142, 0.0187499, 0),
        ("nomad_diamond/NOM_127827.gsa", 4, 5999, 1175.947, 17173.36, 0.00440126, 0),
        ("nomad_diamond/NOM_127827.gsa", 6, 5999, 858.4714, 10268.51, 0.0346535, 0),
        ("nomad_si640e/bank3_pattern.csv", None, 2998, 735.1457, 21979.49, 0.00873142, 51),
        ("nomad_si640e/bank4_pattern.csv", None, 2998, 1137.814, 18910.28, 0.00306404, 92),
    ],
)
def test_measured_files(
    name: str, bank: int | None, points: int, first: float, last: float, sigma: float, dead: int
) -> None:
    (profile,) = read_profiles(MEASURED / name, bank)
    assert len(profile.tof) == points
    assert profile.tof[[0, -1]] == pytest.approx([first, last], rel=1e-6)
    assert profile.sigma[0] == pytest.approx(sigma, rel=1e-5)
    assert (profile.sigma == 0).sum() == dead


@needs_measured
def test_every_bank_of_the_measured_files_reads() -> None:
    assert [p.bank for p in read_profiles(MEASURED / "gem_srtio3/gem05984.gss")] == [1, 2, 3, 4]
    diamond = read_profiles(MEASURED / "nomad_diamond/NOM_127827.gsa")
    assert [p.difc for p in diamond] == [1428.82, 2861.51, 5606.56, 9041.7, 9910.54, 817.254]


@needs_measured
@pytest.mark.parametrize("h2", [4, 8, 12, 16])
def test_srtio3_peaks_lie_where_the_published_cell_puts_them(h2: int) -> None:
    # Pseudo-cubic (200), (220), (222), (400) of the mean side; bank 4's constants from the
    # refinement of this cell. A peak's maximum comes after its position, as neutrons leave the
    # moderator with a delay: here by 1.3 to 2.1 in 1,000. A wrong unit of time would be far off.
    gem = Instrument(bank=4, two_theta=154.46, difc=9050.17, difa=-7.56, tzero=-3.40)
    (profile,) = read_profiles(MEASURED / "gem_srtio3/gem05984.gss", bank=4)
    position = gem.tof_from_d_spacing(3.8990 / np.sqrt(h2))
    near = np.abs(profile.tof - position) < 0.01 * position
    top = profile.tof[near][np.argmax(profile.intensity[near])]
    assert 0 < top / position - 1 < 3e-3


@needs_measured
def test_silicon_peaks_move_to_the_campaigns_axis() -> None:
    folder = MEASURED / "nomad_si640e"
    calibration = read_instrument(next(folder.glob("*.instprm")), 4)
    (profile,) = read_profiles(folder / "bank4_pattern.csv", bank=4)
    assert match_bank(profile, read_instruments(next(folder.glob("*.instprm")))).bank == 4
    gridded = resample_to_grid(profile, GRID, NOMAD, calibration)
    for d in (1.357795, 1.2459981, 1.108635, 0.91803698):
        measured = np.abs(profile.tof - calibration.tof_from_d_spacing(d)) < 60
        top = profile.tof[measured][np.argmax(profile.intensity[measured])]
        expected = NOMAD.tof_from_d_spacing(calibration.d_spacing_from_tof(np.array(top)))
        near = np.abs(GRID.tof - NOMAD.tof_from_d_spacing(d)) < 60
        maximum = GRID.tof[near][np.argmax(gridded.intensity[near])]
        assert maximum == pytest.approx(expected, rel=1.1 * GRID.relative_step)
