"""Instrument files of GSAS, written here; real ones where they are on this machine."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bragg_data.instrument.conversion import peaks_of, represented
from bragg_data.instrument.instprm import (
    InstrumentError,
    read_banks,
    read_instrument,
    read_instruments,
)

REAL = Path(__file__).parents[4] / "shared" / "real"
GEM = Path(__file__).parents[4] / "shared" / "measured" / "gem_srtio3" / "SRTIO3_5K.EXP"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real profiles (shared/real)")

# alp, bet-0, bet-1, sig-0, sig-1, sig-2, gam-0, gam-1, gam-2 of function 3
PSEUDO_VOIGT = (1.25, 0.05, 0.006, 16.0, 520.0, 88.0, 1.5, 7.25, 2.5)


def records(number: int, function: int, coefficients: tuple[float, ...], **options) -> str:
    """Records of a bank: difC 5000·number, 2θ −45·number, and coefficients in fours."""
    kind = options.get("kind", "INS")
    style = options.get("style", "{:15.6E}")
    prefix = f"{kind} {number:2d}"
    key = "PRCF1" if kind == "INS" else "PRCF "
    text = f"{prefix} ICONS{5000.25 * number:10.2f}{-1.5:10.2f}{3.25:10.2f}    0     0.000\n"
    text += f"{prefix}BNKPAR{1.25:10.4f}{-45.0 * number:10.2f}      0.00    .00000     .3000\n"
    text += f"{prefix}I ITYP    4    1.0000   23.9997     40986\n"
    text += f"{prefix}{key} {function:5d}{len(coefficients):5d}   0.00050\n"
    for line in range(0, len(coefficients), 4):
        cells = "".join(style.format(c) for c in coefficients[line : line + 4])
        text += f"{prefix}{key}{line // 4 + 1}{cells}\n"
    return text


def prm(*banks: str, kind: str = "PNTR") -> str:
    head = f"            1234567890123456789012345678901234567890\nINS   BANK  {len(banks):5d}\n"
    return head + f"INS   FPATH1     9.0000\nINS   HTYPE   {kind}\n" + "".join(banks)


def test_positions_geometry_and_peak_shape_of_function_3():
    coefficients = (*PSEUDO_VOIGT, *[0.0] * 12)
    first, second = read_instruments(prm(*(records(n, 3, coefficients) for n in (1, 2))))
    assert (first.bank, first.two_theta, first.flight_path) == (1, -45.0, 10.25)
    assert (first.difc, first.difa, first.difb, first.tzero) == (5000.25, -1.5, 0.0, 3.25)
    assert (second.bank, second.two_theta, second.difc) == (2, -90.0, 10000.5)
    assert (first.alpha, first.beta_0, first.beta_1) == (1.25, 0.05, 0.006)
    assert (first.sig_0, first.sig_1, first.sig_2) == (16.0, 520.0, 88.0)  # GSAS-II drops σ0²
    assert (first.z, first.x, first.y) == (1.5, 7.25, 2.5)  # and the Lorentzian width
    assert first.warnings == ()
    assert read_instrument(first.text) == first


@pytest.mark.parametrize(
    ("function", "coefficients", "expected"),
    [
        (
            1,
            (0.0, 5.0, 0.03, 0.007, 4.0, 38.0, 2.0, *[0.0] * 5),
            (5.0, 0.03, 0.007, 4.0, 38.0, 2.0),
        ),
        (4, (1.25, 0.05, 0.006, 38.0, 2.0, *[0.0] * 7), (1.25, 0.05, 0.006, 0.0, 38.0, 2.0)),
        (5, (*PSEUDO_VOIGT, *[0.0] * 12), PSEUDO_VOIGT[:6]),
    ],
)
def test_coefficients_of_other_functions(function, coefficients, expected):
    i = read_instrument(prm(records(1, function, coefficients)))
    assert (i.alpha, i.beta_0, i.beta_1, i.sig_0, i.sig_1, i.sig_2) == expected


@given(
    number=st.integers(1, 99),
    style=st.sampled_from(["{:15.6E}", "{:14.5f} ", "  {:.8f}", " {:.6e}"]),
    kind=st.sampled_from(["INS", "HST"]),
    comment=st.sampled_from(["", "# made from another file\n", "INS   NSPEC     6\n"]),
    end=st.sampled_from(["\n", "  \n", "\r\n"]),
)
def test_layouts_of_the_same_bank(number, style, kind, comment, end):
    coefficients = (*PSEUDO_VOIGT, *[0.0] * 12)
    text = records(number, 3, coefficients, style=style, kind=kind)
    text = comment + ("INS   HTYPE   PNTR\n" if kind == "INS" else "EXPR  HTYP1  PNT\n") + text
    (i,) = read_instruments(text.replace("\n", end))
    assert (i.bank, i.difc, i.two_theta) == (number, round(5000.25 * number, 2), -45.0 * number)
    shape = (i.alpha, i.beta_0, i.beta_1, i.sig_0, i.sig_1, i.sig_2, i.z, i.x, i.y)
    assert shape == pytest.approx(PSEUDO_VOIGT)
    assert i.flight_path == 0.0  # without FPATH1 unknown


def test_coefficients_of_the_sample_are_reported():
    coefficients = (*PSEUDO_VOIGT, 0.0, 0.5, 0.25, *[0.0] * 9)
    (warning,) = read_instrument(prm(records(1, 3, coefficients))).warnings
    assert "2 coefficients of the sample" in warning


def test_an_incident_spectrum_is_reported():
    text = prm(records(1, 3, (*PSEUDO_VOIGT, *[0.0] * 12)))
    spectrum = "INS  1ICOFF1    .110505E+05    .717272E+08    .248796E+02    .127893E+05\n"
    (warning,) = read_instrument(text + spectrum).warnings  # four of twelve coefficients
    assert "the incident spectrum of type 4 (I ITYP) is not read, and was not used" in warning
    whole = spectrum + spectrum.replace("ICOFF1", "ICOFF2") + spectrum.replace("ICOFF1", "ICOFF3")
    (warning,) = read_instrument(text + whole).warnings
    assert "the incident spectrum (ICOFF) was not used" in warning
    of_monitor = text.replace("I ITYP    4", "I ITYP   10")
    (warning,) = read_instrument(of_monitor).warnings
    assert "the incident spectrum of type 10 (I ITYP) is not read, and was not used" in warning
    assert not read_instrument(text.replace("I ITYP    4", "I ITYP    0") + spectrum).warnings
    assert read_instrument(text + spectrum[:12] + "  .000000E+00  .000000E+00\n").warnings == ()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # GSAS Technical Manual, at T = 2 ms
        (1, 1 + 2 * np.exp(-0.1 * 2) + 3 * np.exp(-0.2 * 2**2)),
        (2, 1 + 2 * np.exp(-0.1 / 4) / 32 + 3 * np.exp(-0.2 * 2**2)),
        (4, 1 + 2 * np.exp(-0.1 / 4) / 32 + 3 * 0.0 + 0.2 * -1.0),  # at 2/T − 1 = 0
    ],
)
def test_an_incident_spectrum_is_evaluated(kind: int, expected: float) -> None:
    """Times are in ms there, and the first coefficient is the constant."""
    lines = [line for line in records(1, 3, PSEUDO_VOIGT).splitlines() if "ITYP" not in line]
    lines += [f"INS  1I ITYP    {kind}    1.0000   23.9997     40986"]
    lines += ["INS  1ICOFF1   1.0   2.0   0.1   3.0", "INS  1ICOFF2   0.2   0.0   0.0   0.0"]
    lines += ["INS  1ICOFF3   0.0   0.0   0.0   0.0"]
    (bank,) = read_banks(prm("\n".join(lines) + "\n"))
    assert bank.incident is not None
    assert bank.incident(np.array([2000.0])) == pytest.approx([expected], rel=1e-12)


def test_default_angles_are_doubted():
    """505.557 · 10.25 m · sin 75° is 5005; a default of 150° and 25 m would give 12208."""
    text = prm(records(1, 3, (*PSEUDO_VOIGT, *[0.0] * 12)))
    right = text.replace("    -45.00", "    150.00")
    assert read_instrument(right).geometry_doubt == ""
    wrong = right.replace("    9.0000", "   23.7500")
    assert "give difC 12208.3, and the file's is 5000.2" in read_instrument(wrong).geometry_doubt
    unknown = right.replace("FPATH1", "FPATHX").replace("5000.25", " 439.60")
    assert "give a flight path of 0.9 m, which no" in read_instrument(unknown).geometry_doubt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (prm(kind="PNCR"), "PNCR: constant wavelength; only time of flight is supported"),
        (prm(kind="PXCR"), "PXCR: constant wavelength; only time of flight is supported"),
        (prm(records(1, 7, PSEUDO_VOIGT)), "profile function 7; known are 1 to 5"),
        (prm(records(1, 3, PSEUDO_VOIGT[:5])), "has 5 coefficients .* 9 are needed"),
        (prm(records(1, 3, PSEUDO_VOIGT).replace("BNKPAR", "BNKPAX")), "lacks flight path and 2θ"),
        (prm(records(1, 3, PSEUDO_VOIGT).replace("PRCF", "XXXX")), "no profile function"),
        (prm(records(1, 3, PSEUDO_VOIGT).replace(" ICONS", " ICONX")), "without constants"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(InstrumentError, match=message):
        read_instruments(text)


@pytest.mark.parametrize(
    ("old", "new", "doubt"),
    [
        ("INS   BANK      2", "INS   BANK      3", "announces 3 banks (INS   BANK) and has 2"),
        ("INS   BANK      2\n", "", "announces no number of banks"),
        ("INS   FPATH1", "INS   FPATHX", "flight path (FPATH1) is missing"),
        ("INS  2PRCF11", "INS  2PRCFX1", "has 17 coefficients, another number"),
        ("INS  2PRCF11", "INS  1PRCF11", "the record 'INS  1PRCF11' occurs again"),
        ("10000.50     -1.50      3.25", "10000.50     -1.50  Z", "lacks difA or Zero"),
        ("10000.50     -1.50      3.25", "10000.50     -1.50          ", "is not in its columns"),
        ("10000.50     -1.50      3.25", "10000     -1.50      3.25", "is not in its columns"),
        ("10000.50     -1.50      3.25", "10000.50     -1.50   0 3.25", "is not in its columns"),
        ("INS  2PRCF12   5.2", "INS  2PRCF12  5.2", "profile is not in its columns"),
        ("1.2500    -90.00", "-1.250    -90.00", "its flight path of -1.25 m (BNKPAR) is negative"),
        ("INS  2I ITYP", "INS  2I ITXP", "window of times (I ITYP) is missing or incomplete"),
        ("INS  2PRCF15", "INS  2PRCF0", "the record 'INS  2PRCF0' is unknown"),
        ("INS  2PRCF15", "00\nINS  2PRCF15", "the line '00' is no record"),
        ("INS   HTYPE", "INS   HTYPX", "the type (HTYPE) is missing"),
    ],
)
def test_damage_is_reported(old, new, doubt):
    text = prm(*(records(n, 3, (*PSEUDO_VOIGT, *[0.0] * 12)) for n in (1, 2)))
    assert text.count(old) == 1
    assert doubt in " ".join(read_instruments(text.replace(old, new))[1].warnings)


@pytest.mark.parametrize("damaged", ["-1,50", "-1.5.0", "-1.5_0", "−1.50", "-1.5E+x"])
def test_damaged_numbers_are_refused(damaged):
    text = prm(records(1, 3, (*PSEUDO_VOIGT, *[0.0] * 12)))
    with pytest.raises(InstrumentError, match=r"Instrument file: .* is no number"):
        read_instruments(text.replace("-1.50", damaged))


def test_banks_come_in_the_order_of_their_numbers():
    text = prm(*(records(n, 3, (*PSEUDO_VOIGT, *[0.0] * 12)) for n in (2, 1)))
    assert [i.bank for i in read_instruments(text)] == [1, 2]


# ---- functions that are fitted -------------------------------------------------------------------


def convolved(offset: np.ndarray, rise: float, decay: float, variance: float) -> np.ndarray:
    """Back-to-back exponentials and a Gaussian, by summation."""
    t = np.linspace(-30 / rise, 30 / decay, 10001)
    pulse = np.where(t < 0, np.exp(rise * np.minimum(t, 0)), np.exp(-decay * np.maximum(t, 0)))
    pulse *= rise * decay / (rise + decay) * (t[1] - t[0])
    z = (offset[:, None] - t) ** 2 / (2 * variance)
    return (np.exp(-z) @ pulse) / np.sqrt(2 * np.pi * variance)


def width_and_maximum(offset: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    top = int(y.argmax())
    right = np.interp(-y[top] / 2, -y[top:], offset[top:])
    return right - np.interp(y[top] / 2, y[: top + 1], offset[: top + 1]), offset[top]


def test_a_rise_that_this_project_has_not_is_fitted():
    # α = 0.3 + 0.2/d, of which GSAS-II drops the first
    (bank,) = read_banks(prm(records(1, 1, (0.3, 0.2, 0.03, 0.007, 4.0, 60.0, 2.0, *[0.0] * 5))))
    i = bank.instrument
    (warning,) = i.warnings
    assert "Widths differ by at most" in warning
    theirs, ours = bank.widths()
    assert np.abs(ours / theirs - 1).max() < 0.05
    offset = np.linspace(-150, 500, 400)
    for d, width in ((bank.d[3], theirs[3]), (bank.d[12], theirs[12])):
        direct = convolved(offset, 0.3 + 0.2 / d, 0.03 + 0.007 / d**4, 4 + 60 * d**2 + 2 * d**4)
        assert width == pytest.approx(width_and_maximum(offset, direct)[0], rel=0.02)
    moved = i.tof_from_d_spacing(bank.d) / (3.25 + 5000.25 * bank.d - 1.5 * bank.d**2) - 1
    assert np.abs(moved).max() < 5e-3
    assert read_instrument(i.text) == i
    assert read_instrument(i.text).warnings == i.warnings


def ikeda_carpenter(offset: np.ndarray, d: float, sine: float, variance: float) -> np.ndarray:
    """α 2.6 λ, β 34, κ 50 of GSAS's function 2, by summation on a regular grid."""
    wave = 2 * d * sine
    a, b, share = 1 / (2.6 * wave), 1 / 34.0, np.exp(-81.799 / (50 * wave**2))
    t = np.arange(0, 600, 0.2)
    tail = np.exp(-b * t) - np.exp(-a * t) * (1 + (a - b) * t + ((a - b) * t) ** 2 / 2)
    sharp = (a * t) ** 2 * np.exp(-a * t)
    pulse = a / 2 * ((1 - share) * sharp + 2 * share * a**2 * b / (a - b) ** 3 * tail) * 0.2
    z = (offset[:, None] - t) ** 2 / (2 * variance)
    return (np.exp(-z) @ pulse) / np.sqrt(2 * np.pi * variance)


def test_the_moderator_function_is_fitted_with_its_maxima():
    coefficients = (0.0, 2.6, 34.0, 50.0, 0.0, 133.0, *[0.0] * 9)
    (bank,) = read_banks(prm(records(2, 2, coefficients)))
    i, sine = bank.instrument, np.sin(np.radians(45.0))
    exact = bank.exact
    assert exact.moderator == coefficients[:4]
    assert (exact.difc, exact.tzero, exact.sig_1, exact.warnings) == (10000.5, 3.25, 133.0, ())
    with pytest.raises(InstrumentError, match=r"no \.instprm file has"):
        _ = exact.instprm
    assert represented(exact, bank.d).difc == pytest.approx(i.difc, rel=1e-3)
    assert "function 2 (Ikeda-Carpenter) was fitted" in i.warnings[0]
    stated = float(re.search(r"differ by at most ([\d.]+) %", i.warnings[0])[1]) / 100
    assert stated < 0.1
    offset = np.linspace(-60, 240, 401)
    for d in (0.5, 1.0, 1.8):
        direct = ikeda_carpenter(offset, d, sine, 133 * d * d)
        np.testing.assert_allclose(bank.original(d, offset), direct, atol=1e-5 * direct.max())
        width, maximum = width_and_maximum(offset, direct)
        position = 3.25 + 10000.5 * d - 1.5 * d * d
        shifted = offset + position - i.tof_from_d_spacing(d)
        ours = width_and_maximum(offset, peaks_of(i)(d, shifted))
        assert abs(ours[0] / width - 1) < stated + 0.01
        assert abs(ours[1] - maximum) < 1e-3 * position


# ---- real files --------------------------------------------------------------------------------


@needs_real
@pytest.mark.parametrize(
    ("file", "banks", "angles", "difc", "flight_path"),
    [
        ("powgen_lab6/PGHR_60-2015A.prm", 6, (90.0, 90.0), (22591.86, 22570.85), 63.183),
        ("hipd_round_robin/I22jan99.prm", 8, (151.0, -14.0), (5074.11, None), 10.32567),
        ("vulcan_steel/Vulcan.prm", 2, (-90.0, 90.0), (16369.2, 16385.1), 45.754),
        (
            "hippo_quartzite/hippo_sc_050819_30panel.prm",
            30,
            (144.447, None),
            (4921.96, None),
            10.0995,
        ),
    ],
)
def test_real_files(file, banks, angles, difc, flight_path):
    instruments = read_instruments(REAL / file)
    assert [i.bank for i in instruments] == list(range(1, banks + 1))
    assert instruments[0].flight_path == pytest.approx(flight_path)
    for i, angle, value in zip((instruments[0], instruments[-1]), angles, difc, strict=True):
        assert angle is None or i.two_theta == pytest.approx(angle, abs=1)
        assert value is None or i.difc == value
    assert not [i.geometry_doubt for i in instruments if i.geometry_doubt]


@needs_real
def test_what_gsas2_drops_stays():
    lab6 = read_instrument(REAL / "powgen_lab6" / "PGHR_60-2015A.prm", 1)
    assert (lab6.sig_1, lab6.sig_2, lab6.x) == (10.0, 513.682, 10.7486)


@needs_real
@pytest.mark.parametrize("name", ["inst_d1a.prm", "INST_XRY.PRM"])
def test_real_files_of_constant_wavelength(name):
    with pytest.raises(InstrumentError, match="constant wavelength; only time of flight"):
        read_instruments(REAL / "constant_wavelength" / name)


@pytest.mark.slow
@pytest.mark.skipif(not GEM.is_file(), reason="needs the measured profiles")
def test_the_instrument_of_a_refinement():
    i = read_instrument(GEM, 4)
    assert i.two_theta == 154.46
    theirs = 9050.17 - 7.56 - 3.40
    assert i.tof_from_d_spacing(1.0) == pytest.approx(theirs, rel=3e-3)
    assert "Ikeda-Carpenter" in i.warnings[0]
