"""Instrument files of FullProf, written here; real ones where they are on this machine."""

from pathlib import Path

import numpy as np
import pytest

from bragg_data.instrument.instprm import (
    InstrumentError,
    read_banks,
    read_instrument,
    read_instruments,
)

REAL = Path(__file__).parents[4] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real profiles (shared/real)")

HEAD = """  Instrumental Resolution Parameters for TOF
! ------------------------------- Bank 3
NPROF   {nprof}
!       Tof-min(us)       step      Tof-max(us)
TOFRG    2000.0       5.0   20000.0
!             Dtt1              Dtt2       Dtt_1overD         Zero
D2TOF      5000.5        -1.5         0.25        -9.0
!     TOF-TWOTH of the bank
TWOTH     144.0
"""
COEFFICIENTS = """SIGMA   2.0  33.0  3.0
GAMMA   0.5  2.5  0.1
ALFBE   {alph0}  0.04  0.6  0.009
END
"""


def table(shift: float = 0.0, alph0: float = 0.0) -> str:
    """d, σ², γ, α, β and shift of the coefficients above."""
    rows = "LIST_SIG_GAM_ALF_BET_SHIFT  30\n"
    for d in np.geomspace(0.4, 4.0, 30):
        shape = (3 + 33 * d**2 + 2 * d**4, 0.1 + 2.5 * d + 0.5 * d**2)
        exponentials = alph0 + 0.6 / d, 0.04 + 0.009 / d**4
        rows += "".join(f"{v:16.8f}" for v in (d, *shape, *exponentials, shift)) + "\n"
    return rows


PCR = """COMM  made up
!Job Npr Nph Nba Nex
  -1   {job}   1   0   0
!NCY  Eps    TOF-min      <Step>       TOF-max
 15  0.05    2000.0      5.0  20000.0
!    Zero       Code      Dtt1      Code       Dtt2     Code  Dtt_1overd    Code  2ThetaBank
    -9.0       141.00  5000.5        0.00    -1.5       0.00     0.25        0.00   144.0
!Nat Dis Ang Npr More
   1   0   0   {npr}   0
!  Scale          Extinc       Bov
 0.7100414        0.0093    0.0000
!      Sigma-2       Sigma-1       Sigma-0       Sigma-Q
        2.0      33.0     3.0      {sigma_q}
          0.00         91.00        131.00          0.00
!      Gamma-2       Gamma-1       Gamma-0
        0.5        2.5        0.1
!      Pref1      Pref2        alph0       beta0       alph1       beta1
    0.0    0.0    {alph0}    0.04    0.6    0.009
"""


def pcr(npr: int = 9, sigma_q: float = 0.0, alph0: float = 0.0) -> str:
    return PCR.format(job=13, npr=npr, sigma_q=sigma_q, alph0=alph0)


@pytest.mark.parametrize(
    ("text", "bank"),
    [
        (HEAD.format(nprof=9) + COEFFICIENTS.format(alph0=0.0), 3),
        (HEAD.format(nprof=9) + table(), 3),
        (pcr(), 1),
    ],
)
def test_the_same_bank_in_every_form(text, bank):
    i = read_instrument(text)
    assert (i.bank, i.two_theta) == (bank, 144.0)
    assert (i.difc, i.difa, i.difb, i.tzero) == (5000.5, -1.5, 0.25, -9.0)
    shape = (i.alpha, i.beta_0, i.beta_1, i.sig_0, i.sig_1, i.sig_2, i.z, i.x, i.y)
    assert shape == pytest.approx((0.6, 0.04, 0.009, 3.0, 33.0, 2.0, 0.1, 2.5, 0.5), rel=1e-4)
    assert read_instrument(i.text) == i


@pytest.mark.slow
def test_the_moderator_and_two_kinds_of_neutrons_in_a_refinement():
    moderator = pcr(npr=13, alph0=0.5).replace("beta1", "kappa").replace("0.009\n", "48.0\n")
    moderator = moderator.replace("    0.04    0.6", "    32.0    2.1")
    (bank,) = read_banks(moderator)
    assert bank.exact.moderator == (0.5, 2.1, 32.0, 48.0)
    assert "profile function 13 (Ikeda-Carpenter) was fitted" in bank.instrument.warnings[0]
    two_kinds = pcr(npr=10, alph0=4.0).replace("    0.04    0.6    0.009", "    9.0    6.0    9.0")
    two_kinds = two_kinds.replace("-1.5       0.00     0.25", "0.0       0.00     0.0")
    two_kinds += "!   Zerot  Code  Dtt1t  Code  Dtt2t  Code  xcross  Code  Width  Code\n"
    two_kinds += "  -9.5 0.0 5001.0 0.0 0.1 0.0 0.9 0.0 1.9 0.0\n"
    two_kinds += "!   alph0t  beta0t  alph1t  beta1t\n  8.0  20.0  1.0  2.0\n"
    (bank,) = read_banks(two_kinds)
    theirs, ours = bank.maxima()
    # At 3.5 Å nearly all are thermal: erfc(1.9 (0.9 - 1/3.5))/2 = 0.0495
    expected = 0.0495 * (-9 + 5000.5 * 3.5) + 0.9505 * (-9.5 + 5001 * 3.5 - 0.1 / 3.5)
    assert bank.reference.tof_from_d_spacing(3.5) == pytest.approx(expected, rel=3e-5)
    assert np.abs(ours / theirs - 1).max() < 1e-4


@pytest.mark.slow
def test_incomplete_and_repeated_lines():
    """A table with widths of zero, a window without its end, a bank that is named twice."""
    head, lines = HEAD.format(nprof=9), table().splitlines()
    lines[1:4] = [f"{line[:32]}{0:16.8f}{line[48:]}" for line in lines[1:4]]
    (bank,) = read_banks(head + "\n".join(lines))
    assert np.isfinite(bank.difference()).all()
    cut = pcr().replace("2000.0      5.0  20000.0", "2000.0      5.0  oo")
    assert read_instrument(cut).difc == pytest.approx(5000.5, rel=2e-4)
    again = head.replace("NPROF", "! Bank 3\nNPROF") + COEFFICIENTS.format(alph0=0.0)
    assert read_instrument(again).bank == 1
    for row, message in (("nan", "four lines or more, of six"), ("-1.0", "have to be positive")):
        with pytest.raises(InstrumentError, match=message):
            read_instrument(head + "\n".join([*lines, f"5.0 {row} 1.0 0.1 0.1 0.0"]))


def test_an_angle_that_the_other_banks_contradict():
    """Dtt1 5000.5 at 144° is a path of 10.4 m; at 30° it would be 38 m."""
    banks = [HEAD.format(nprof=9) + COEFFICIENTS.format(alph0=0.0) for _ in range(3)]
    banks[2] = banks[2].replace("144.0", "30.0")
    (first, _, last) = read_instruments("".join(banks))
    assert [i.bank for i in (first, last)] == [1, 3]  # each says 3
    assert "are numbered in their order" in first.warnings[0]
    assert len(first.warnings) == 1
    assert "a flight path of 38.2 m, and the median of the banks is 10.4 m" in last.warnings[1]
    (alone,) = read_instruments(banks[0].replace("144.0", "0.0"))
    assert "which no diffractometer has" in alone.geometry_doubt


IRF = HEAD.format(nprof=9) + COEFFICIENTS.format(alph0=0.0)


@pytest.mark.parametrize(
    ("text", "old", "new", "doubt"),
    [
        (IRF, "GAMMA ", "GAMMAx ", "the keyword 'GAMMAX' is unknown"),
        (IRF, "GAMMA   0.5  2.5  0.1\n", "", "lacks GAMMA: the file may be cut off"),
        (IRF, "2.5  0.1", "2.5  0 .1", "GAMMA has 4 values where 3 are read"),
        (IRF, "SIGMA", "GAMMA 0.5 2.5 0.1\nSIGMA", "has a keyword twice"),
        (IRF, "END\n", "", "lacks END"),
        (HEAD.format(nprof=9) + table(), "SHIFT  30", "SHIFT  31", "31 points and has 30"),
        (pcr(), "Gamma-0", "Gamma0", "bank 1 lacks gamma-0"),
        (pcr(), "2.0      33.0     3.0", "2.0      33.0     3,0", "bank 1 lacks sigma-0"),
        (pcr(), "2.5        0.1", "2.5        0 .1", "do not fit"),
        (pcr(), "          0.00         91.00        131.00", "2.0 33.0 3.0", "do not fit"),
        (pcr(), "        2.0      33.0     3.0      0.0\n", "", "do not fit"),
        (IRF, "0.25        -9.0", "0.25", "D2TOF has 3 of 4 values"),
        (IRF, "Bank 3", "Bank 3_0", "no comment numbers each bank"),
        (IRF, "  Instrumental Resolution Parameters for TOF\n", "", "one title has to be"),
        (
            IRF,
            "Resolution Parameters",
            "Resolution" + 60 * "\n" + "Parameters",
            "one title has to be",
        ),
        (IRF, "END\n", "END\nGAMMA   0.5  2.5  0.1\nEND\n", "lines behind END"),
        (IRF, "END\n", "END\nEND\n", "lines behind END"),
        (pcr(), "33.0     3.0", "33.0", "do not fit"),
        (pcr(), "0.0093", "\n0.0093", "other values than names below"),
    ],
)
def test_damage_is_reported(text, old, new, doubt):
    assert text.count(old) == 1
    assert doubt in " ".join(read_instrument(text.replace(old, new)).warnings)


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (IRF, "2.5  0.1", "2,5  0.1", "'2,5' of GAMMA is no number"),
        (IRF, "0.25        -9.0", "0.25        =9.0", "'=9.0' of D2TOF is no number"),
        (IRF, "Dtt_1overD ", "Dtt_1overX ", "names the values unlike FullProf"),
        (pcr(), "Code      Dtt1      Code  ", "Code      Dtt1      ", "a code stands before"),
        (pcr(), "Dtt_1overd", "Dtt_1us", "names the values unlike"),
        (pcr(), "Sigma-0", "9 Sigma-0", "names the values unlike"),
        (pcr(), "Gamma-1       Gamma-0", "Gamma-0       Gamma-1", "names the values unlike"),
    ],
)
def test_damage_is_refused(text, old, new, message):
    with pytest.raises(InstrumentError, match=message):
        read_instruments(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [pcr(alph0=-0.02), HEAD.format(nprof=9) + table(alph0=-0.02)], ids=["pcr", "table"]
)
def test_a_rise_that_this_project_has_not_is_fitted(text):
    (bank,) = read_banks(text)
    theirs, ours = bank.widths()
    assert np.abs(ours / theirs - 1).max() < 0.05
    assert "Widths differ by at most" in bank.instrument.warnings[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (pcr(npr=13), "no moderator that could be .*kappa 0.009.*a time in µs"),
        (pcr(npr=10), "NPROF 10 needs zerot, dtt1t, .*ZD2TOT and ALFBT"),
        (HEAD.format(nprof=10) + table(), "a table of peak shapes is converted of NPROF 9 only"),
        (HEAD.format(nprof=7), "constant wavelength; only time of flight is supported"),
        (pcr(sigma_q=0.5), "sigma-q is 0.5"),
        (HEAD.format(nprof=9) + table(shift=1.0), "shifts peaks"),
        (HEAD.format(nprof=9), "no peak shape"),
        (HEAD.format(nprof="9x"), "NPROF is no number of a profile function"),
        (HEAD.format(nprof="1e999"), "NPROF is no number of a profile function"),
        ("!Job Npr Nph\n 0 7 1\n! Lambda1  Lambda2\n 1.54 1.54\n", "constant wavelength"),
        (pcr().replace("!    Zero", "!    Nought").replace("Dtt1", "C1"), "no comment names Zero"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(InstrumentError, match=message):
        read_instruments(text)


PDABC = "\n".join(
    f"{d:.4f}, {5000 * d:.1f}, {0.6 / d:.8f}, {0.04 + 0.009 / d**4:.8f}, {33 * d * d:.6f}"
    for d in np.round(np.geomspace(3.0, 0.4, 20), 4)
)


def test_a_table_of_gsas2_replaces_the_coefficients():
    text = "#GSAS-II instrument parameter file\nType:PNT\n2-theta:90.0\ndifC:5000.0\nalpha:1.0\n"
    text += f'sig-0:3.0\npdabc:"""{PDABC}"""\nZero:2.5\n'
    i = read_instrument(text)
    assert (i.alpha, i.beta_0, i.beta_1) == pytest.approx((0.6, 0.04, 0.009), rel=1e-3)
    assert (i.sig_0, i.sig_1, i.sig_2) == pytest.approx((3.0, 33.0, 0.0), rel=1e-3, abs=1e-3)
    assert (i.difc, i.tzero) == (5000.0, 2.5)
    assert "table pdabc" in i.warnings[0]
    with pytest.raises(InstrumentError, match="five numbers in each line"):
        read_instrument(text.replace(", 5", "; 5", 1))


@needs_real
def test_real_files():
    ours = read_instrument(REAL / "sepd_si" / "sepd_si.instprm")
    table, pattern = (
        read_instrument(REAL / "sepd_si" / name) for name in ("TOF_irf_file.irf", "arg_si.pcr")
    )
    d = np.geomspace(0.3, 4.0, 20)
    for other in (table, pattern):
        relative = other.tof_from_d_spacing(d) / ours.tof_from_d_spacing(d) - 1
        assert np.abs(relative).max() < 1e-4
        exponentials = (other.alpha, other.beta_0, other.beta_1)
        assert exponentials == pytest.approx((0.5971, 0.04221, 0.00946), rel=2e-3)
    assert (pattern.sig_0, pattern.sig_1, pattern.x) == (3.0148, 33.3451, 2.5489)


@pytest.mark.slow
@needs_real
def test_the_patterns_of_a_real_refinement():
    instruments = read_instruments(REAL / "wish_nac" / "tmpl_five_banks_p1.pcr")
    assert [i.two_theta for i in instruments] == [152.827, 121.66, 90.0, 58.33, 27.081]
    ours = read_instrument(REAL / "wish_nac" / "wish_ncaf_bank5_6.instprm")
    relative = instruments[0].tof_from_d_spacing(1.5) / ours.tof_from_d_spacing(1.5) - 1
    assert abs(relative) < 5e-4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Sigma-Q", "Sigma-us"),
        (" 0.7100414        0.0093    0.0000\n", ""),
        ("!Nat", "!Nat Dis Ang Npr More\n!Nat"),
        ("!  Scale", "!  Scale          Extinc       Bov\n 0.71  0.0\n!  Scale"),
    ],
)
def test_lines_and_names_that_do_not_fit_are_reported(old, new):
    assert not read_instrument(pcr()).warnings
    assert read_instrument(pcr().replace(old, new)).warnings
