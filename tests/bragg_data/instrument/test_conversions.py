"""Converted peaks against the original functions, summed on a grid, and GSAS-II's own reading."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.special import erfc

from bragg_data.instrument.conversion import OriginalBank, peaks_of
from bragg_data.instrument.instprm import InstrumentError, read_banks
from tests.bragg_data.instrument import direct
from tests.bragg_data.instrument.test_gsas_iparm import prm, records

SHARED = Path(__file__).parents[4] / "shared"
REAL = SHARED / "real"
GEM = SHARED / "measured" / "gem_srtio3" / "SRTIO3_5K.EXP"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real profiles (shared/real)")
needs_gem = pytest.mark.skipif(not GEM.is_file(), reason="needs the measured profiles")


def differences(
    bank: OriginalBank, original: Callable[[float], direct.Peak], tof: Callable[[float], float]
) -> tuple[float, float]:
    """Largest differences of widths (relative) and maxima (in T) over the d-spacings of a bank."""
    rows = []
    for d in map(float, bank.d[::3]):
        t, y = original(d)
        width, maximum = direct.width_and_maximum(t, y)
        offset = t + tof(d) - bank.instrument.tof_from_d_spacing(d)
        ours = direct.width_and_maximum(t, peaks_of(bank.instrument)(d, offset))
        rows.append((abs(ours[0] / width - 1), abs(ours[1] - maximum) / tof(d)))
    return tuple(np.max(rows, axis=0))


def stated(bank: OriginalBank) -> tuple[float, float]:
    """The same, as the bank's last warning reports them."""
    warning = bank.instrument.warnings[-1]
    width = re.search(r"Widths differ by at most ([\d.]+) %", warning)
    maximum = re.search(r"maxima by ([\d.e-]+) of T", warning)
    assert width
    assert maximum
    return float(width[1]) / 100, float(maximum[1])


def assert_as_stated(bank: OriginalBank, width: float, maximum: float) -> None:
    assert width <= stated(bank)[0] + 2e-3
    assert maximum <= stated(bank)[1] + 5e-6


# ---- GSAS ----------------------------------------------------------------------------------------


def gsas(function: int, c: tuple[float, ...], d: float, sine: float) -> direct.Peak:
    """A peak of a profile function of GSAS, of the manual's coefficients in their order."""
    if function == 2:
        wave = 2 * d * sine
        fast, slow = 1 / (c[0] + c[1] * wave), 1 / c[2]
        variance = c[4] + c[5] * d**2 + c[6] * d**4
        share = np.exp(-81.799 / (c[3] * wave**2))
        return direct.moderator(fast, slow, share, (variance, c[7] + c[8] * d + c[9] * d**2))
    if function == 1:
        rates = c[0] + c[1] / d, c[2] + c[3] / d**4
        return direct.exponentials(rates, (c[4] + c[5] * d**2 + c[6] * d**4, 0.0))
    rates = c[0] / d, c[1] + c[2] / d**4
    if function == 4:
        return direct.exponentials(rates, (c[3] * d**2 + c[4] * d**4, c[5] * d**2), as_program=True)
    widths = c[3] + c[4] * d**2 + c[5] * d**4, c[6] + c[7] * d + c[8] * d**2
    return direct.exponentials(rates, widths, as_program=True)


ZEROS = (0.0,) * 12
COEFFICIENTS = {
    1: (0.1, 1.4, 0.03, 0.007, 4.0, 60.0, 2.0, *ZEROS[:5]),
    2: (0.5, 2.2, 33.0, 45.0, 10.0, 90.0, 4.0, 0.0, 3.0, 0.0, *ZEROS[:5]),
    3: (1.25, 0.05, 0.006, 16.0, 520.0, 88.0, 1.5, 7.25, 2.5, *ZEROS),
    4: (1.25, 0.05, 0.006, 320.0, 88.0, 2.5, *ZEROS[:6]),
    5: (0.8, 0.04, 0.002, 16.0, 220.0, 18.0, 1.5, 2.25, 2.5, *ZEROS),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", [1, 2, 3, 4, 5])
def test_the_profile_functions_of_gsas(function):
    """Bank 2 of the records stands at −90°, difC 10000.5, difA −1.5 and Zero 3.25."""
    c = COEFFICIENTS[function]
    (bank,) = read_banks(prm(records(2, function, c)))
    sine = np.sin(np.radians(45))
    width, maximum = differences(
        bank, lambda d: gsas(function, c, d, sine), lambda d: 3.25 + 10000.5 * d - 1.5 * d**2
    )
    assert width < (0.05 if function <= 2 else 0.005)
    assert maximum < (1.5e-4 if function <= 2 else 2e-5)
    if function <= 2:
        assert_as_stated(bank, width, maximum)
        ours = bank.difference()
        assert (ours[0], ours[2]) == pytest.approx(stated(bank), abs=6e-4)


def table_of_shapes(function: int) -> tuple[str, np.ndarray]:
    """Records of d, shift, α and β of a moderator that passes to thermal neutrons; the table."""
    d = np.linspace(0.3, 3.2, 60)
    share = erfc(2 * (0.9 - 1 / d)) / 2
    shift = 25 * d * share + (1 - share) * (22 * d + 9)
    rise, decay = (1 / (a * d * share + (1 - share) * b) for a, b in ((8, 14), (15, 32)))
    rows = np.round([d, shift, rise, decay], 5)
    text = f"INS  4PAB{function}     60\n"
    for k, row in enumerate(rows.T, start=1):
        text += f"INS  4PAB{function}{k:2d}" + "".join(f"{v:10.5f}" for v in row) + "\n"
    return text, rows


def test_a_table_of_shapes_and_positions_of_gsas():
    """As Mantid writes POWGEN's files: α and β among the coefficients are zero. difC is 20001."""
    lines, (spacings, shift, rise, decay) = table_of_shapes(3)
    c = (0.0, 0.0, 0.0, 0.0, 12.0, 220.0, 0.0, 2.0, 0.0, *ZEROS)
    text = prm(records(4, -3, c).replace("1.0000   23.9997", "6.4000   64.0000") + lines)
    (bank,) = read_banks(text)

    def original(d: float) -> direct.Peak:
        rates = np.interp(d, spacings, rise), np.interp(d, spacings, decay)
        return direct.exponentials(rates, (12 * d**2 + 220 * d**4, 2 * d), as_program=True)

    width, maximum = differences(
        bank,
        original,
        lambda d: 3.25 + 20001 * d - 1.5 * d**2 + float(np.interp(d, spacings, shift)),
    )
    assert width < 0.05
    assert maximum < 1e-4
    assert_as_stated(bank, width, maximum)
    with pytest.raises(InstrumentError, match=r"needs its table .*PAB3"):
        read_banks(text.replace("PAB3", "PAX3"))
    with pytest.raises(InstrumentError, match="have to be positive"):
        read_banks(text.replace(f"{decay[5]:10.5f}\n", "  -0.10000\n"))


def constants(file: Path) -> dict[int, tuple[int, list[float], tuple[float, ...], float]]:
    """Function, coefficients, Zero, difC, difA and 2θ of the banks of a file, by its columns."""
    lines: dict[str, str] = {}
    for line in file.read_text().splitlines():
        lines.setdefault(line[:12], line[12:])
    result = {}
    for number in range(1, int(lines["INS   BANK  "].split()[0]) + 1):
        bank = f"INS {number:2d}"
        c = [float(v) for k in range(1, 7) for v in lines.get(f"{bank}PRCF1{k}", "").split()]
        difc, difa, zero = (float(v) for v in lines[f"{bank} ICONS"].split()[:3])
        angle = float(lines[f"{bank}BNKPAR"].split()[1])
        result[number] = int(lines[f"{bank}PRCF1 "].split()[0]), c, (zero, difc, difa), angle
    return result


FILES = [
    "powgen_lab6/PGHR_60-2015A.prm",
    "hipd_round_robin/I22jan99.prm",
    "vulcan_steel/Vulcan.prm",
    "hippo_quartzite/hippo_sc_050819_30panel.prm",
]


@pytest.mark.slow
@needs_real
@pytest.mark.parametrize("file", FILES)
def test_widths_on_all_banks_of_real_files(file):
    banks = read_banks(REAL / file)
    expected = constants(REAL / file)
    assert len(banks) == len(expected)
    for bank in banks:
        function, c, (zero, difc, difa), angle = expected[bank.instrument.bank]
        sine = abs(np.sin(np.radians(angle / 2)))
        width, maximum = differences(
            bank,
            lambda d, f=function, c=c, s=sine: gsas(f, (*c, *ZEROS), d, s),
            lambda d, z=zero, difc=difc, difa=difa: z + difc * d + difa * d * d,
        )
        assert width < 0.01, bank.instrument.bank
        assert maximum < 6e-5, bank.instrument.bank


READ = """
import contextlib, io, json, sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
with contextlib.redirect_stdout(io.StringIO()):
    from GSASII import GSASIIscriptable as scripts
    banks = []
    for number in range(1, int(sys.argv[3]) + 1):
        reader = SimpleNamespace(powderentry=["", 0, 1], instdict={}, Sample={})
        banks.append(scripts.load_iprms(sys.argv[2], reader, number)[0])
print(json.dumps([{k: v[0] for k, v in bank.items()} for bank in banks]))
"""


@needs_real
@pytest.mark.gsas2
@pytest.mark.parametrize("file", FILES)
def test_positions_are_those_that_gsas2_reads(file, gsas2_location):
    banks = read_banks(REAL / file)
    location = Path(gsas2_location or sys.prefix)
    location = location.parent if location.name == "GSASII" else location
    command = [sys.executable, "-c", READ, str(location), str(REAL / file), str(len(banks))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for bank, theirs in zip(banks, json.loads(done.stdout.splitlines()[-1]), strict=True):
        i, d = bank.instrument, bank.d
        tof = theirs["difC"] * d + theirs["difA"] * d**2 + theirs["difB"] / d + theirs["Zero"]
        assert np.abs(i.tof_from_d_spacing(d) / tof - 1).max() < 1e-7
        assert (i.two_theta, i.flight_path) == pytest.approx((theirs["2-theta"], theirs["fltPath"]))
        assert (i.alpha, i.beta_0, i.beta_1) == pytest.approx(
            (theirs["alpha"], theirs["beta-0"], theirs["beta-1"])
        )


@pytest.mark.slow
@needs_gem
def test_the_moderator_of_a_real_refinement():
    """GEM's four banks; without weight on widths, those at 154° were 27 % off."""
    for bank in read_banks(GEM):
        i = bank.exact
        sine = abs(np.sin(np.radians(i.two_theta / 2)))
        c = (*i.moderator, i.sig_0, i.sig_1, i.sig_2, i.z, i.x, i.y)
        width, maximum = differences(
            bank, lambda d, c=c, s=sine: gsas(2, c, d, s), i.tof_from_d_spacing
        )
        assert width < 0.05
        assert maximum < 1.6e-4
        assert_as_stated(bank, width, maximum)


# ---- FullProf ------------------------------------------------------------------------------------

IRF = """  Made up for a test
! ------------------------- Bank 4  CWL = 1.3
NPROF{equals}{nprof}
!       Tof-min(us)    step      Tof-max(us)
TOFRG   {window[0]}      5.0   {window[1]}
{positions}
TWOTH    {two_theta}
SIGMA  {sigma}
GAMMA  {gamma}
ALFBE  {alfbe}
{alfbt}END
"""


def irf(nprof: int, **changes: object) -> str:
    values: dict[str, object] = {
        "equals": " ",
        "window": (3000.0, 16000.0),
        "positions": "!  Dtt1  Dtt2  Zero\nD2TOF  6600.0  -5.5  -4.5",
        "two_theta": 91.0,
        "sigma": "0.0 60.0 4.0",
        "gamma": "0.0 2.5 0.0",
        "alfbe": "0.6 32.0 2.1 48.0",
        "alfbt": "",
    }
    return IRF.format(nprof=nprof, **(values | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("two_theta", "difc", "alfbe"),
    [
        (91.0, 6600.0, (0.6, 32.0, 2.1, 48.0)),
        (154.0, 9000.0, (0.7, 33.0, 2.0, 50.0)),
        (91.0, 6600.0, (1.9, 11.0, 0.0, 46.0)),
    ],
)
def test_the_moderator_of_fullprof(two_theta, difc, alfbe):
    text = irf(
        13,
        two_theta=two_theta,
        positions=f"!  Dtt1  Dtt2  Zero\nD2TOF  {difc}  -5.5  -4.5",
        alfbe=" ".join(map(str, alfbe)),
    )
    (bank,) = read_banks(text)
    alph0, beta0, alph1, kappa = alfbe

    def original(d: float) -> direct.Peak:
        wave = 2 * d * np.sin(np.radians(two_theta / 2))
        share = np.exp(-81.799 / (kappa * wave**2))
        widths = 60 * d**2 + 4, 2.5 * d
        return direct.moderator(1 / (alph0 + alph1 * wave), 1 / beta0, share, widths)

    width, maximum = differences(bank, original, lambda d: difc * d - 5.5 * d * d - 4.5)
    assert bank.instrument.bank == 4
    assert width < 0.05
    assert maximum < 2e-4
    assert_as_stated(bank, width, maximum)


TWO_KINDS = {  # Zero, Dtt1; Zerot, Dtt1t, Dtt2t, x-cross, Width; alph0 … beta1; alph0t … beta1t
    "POWGEN-like": (
        (9800.0, 86000.0),
        (0.0, 22586.0, -42.8, 22623.0, 0.3, 0.356, 2.41),
        (1.5, 3.0, 5.5, 9.6, 86.0, 96.5, 13.4, 3.4),
        ((72.4, 10.0, 0.0), (0.0, 2.7, 0.0)),
    ),
    "switch inside a short window": (
        (9000.0, 40000.0),
        (3.0, 22580.0, -20.0, 22597.0, 0.2, 0.9, 1.9),
        (4.0, 12.0, 6.0, 9.0, 18.0, 40.0, 4.0, 9.0),
        ((150.0, 20.0, 1.0), (0.0, 3.0, 0.0)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_KINDS)
def test_epithermal_and_thermal_neutrons_of_fullprof(case):
    window, (zero, dtt1, zerot, dtt1t, dtt2t, cross, sharp), ab, (sig, gam) = TWO_KINDS[case]
    a0, b0, a1, b1, a0t, b0t, a1t, b1t = ab
    text = irf(
        10,
        window=window,
        two_theta=90.0,
        positions=f"!  Zero  Dtt1\nZD2TOF {zero} {dtt1}\n!  Zerot Dtt1t Dtt2t x-cross Width\n"
        f"ZD2TOT {zerot} {dtt1t} {dtt2t} {cross} {sharp}",
        sigma=" ".join(map(str, sig)),
        gamma=" ".join(map(str, gam)),
        alfbe=f"{a0} {b0} {a1} {b1}",
        alfbt=f"ALFBT {a0t} {b0t} {a1t} {b1t}\n",
    )
    (bank,) = read_banks(text)

    def mean(d: float, epithermal: float, thermal: float) -> float:
        n = erfc(sharp * (cross - 1 / d)) / 2
        return n * epithermal + (1 - n) * thermal

    def original(d: float) -> direct.Peak:
        rise = 1 / mean(d, a0 + a1 * d, a0t - a1t / d)
        decay = 1 / mean(d, b0 + b1 * d, b0t - b1t / d)
        variance = sig[0] * d**4 + sig[1] * d**2 + sig[2]
        return direct.exponentials((rise, decay), (variance, gam[1] * d))

    width, maximum = differences(
        bank, original, lambda d: mean(d, zero + dtt1 * d, zerot + dtt1t * d - dtt2t / d)
    )
    assert width < 0.05
    assert maximum < 2e-4
    assert_as_stated(bank, width, maximum)


@pytest.mark.slow
def test_exponentials_of_fullprof_with_a_lorentzian_part():
    """GSAS-II's Lorentzian part differs: with the same constants maxima would be 1.3e-3 off."""
    text = irf(
        9,
        window=(4000.0, 50000.0),
        positions="!  Dtt1  Dtt2  Zero\nD2TOF  4990.0  1.9  13.5",
        sigma="15.4 0.0 0.0",
        gamma="0.0 8.3 0.0",
        alfbe="0.0 0.005 0.07 0.14",
        equals=" = ",
    )
    (bank,) = read_banks(text)
    width, maximum = differences(
        bank,
        lambda d: direct.exponentials((0.07 / d, 0.005 + 0.14 / d**4), (15.4 * d**4, 8.3 * d)),
        lambda d: 13.5 + 4990 * d + 1.9 * d * d,
    )
    assert width < 0.05
    assert maximum < 1e-4


def lines_below(file: Path, *words: str) -> list[list[float]]:
    """The numbers below each comment of a .pcr file that has all words."""
    lines = file.read_text().splitlines()
    return [
        [float(v) for v in below.split()]
        for comment, below in pairwise(lines)
        if comment.startswith("!") and set(words) <= set(comment[1:].split())
    ]


@pytest.mark.slow
@needs_real
def test_the_patterns_of_a_real_refinement_with_fullprof():
    """Their phase has NPROF 9, although the patterns say 13, and a rise of two terms."""
    file = REAL / "wish_nac" / "tmpl_five_banks_p1.pcr"
    rows = zip(
        read_banks(file),
        lines_below(file, "Zero", "Dtt1"),
        lines_below(file, "Sigma-2"),
        lines_below(file, "Gamma-2"),
        lines_below(file, "alph0"),
        strict=True,
    )
    for bank, (zero, _, dtt1, _, dtt2, *_), (s2, s1, *_), (_, g1, *_), rates in rows:
        a0, b0, a1, b1 = rates[2:6]

        def original(d, a0=a0, b0=b0, a1=a1, b1=b1, s2=s2, s1=s1, g1=g1) -> direct.Peak:
            return direct.exponentials(
                (a0 + a1 / d, b0 + b1 / d**4), (s2 * d**4 + s1 * d**2, g1 * d)
            )

        width, maximum = differences(
            bank, original, lambda d, z=zero, c=dtt1, a=dtt2: z + c * d + a * d * d
        )
        assert width < 0.05, bank.instrument.bank
        assert maximum < 1.2e-4, bank.instrument.bank
