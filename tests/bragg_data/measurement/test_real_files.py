"""Every file of real profiles is read with the right numbers, or refused by what it is."""

from pathlib import Path

import numpy as np
import pytest

from bragg_data.measurement.readers import ProfileError, read_profiles

SHARED = Path(__file__).parents[4] / "shared"

pytestmark = pytest.mark.skipif(
    not ((SHARED / "real").is_dir() and (SHARED / "measured").is_dir()),
    reason="the real profiles (shared/real, shared/measured) are not on this machine",
)

# Worked out from the text of the files, without the readers: banks; points of the first; its first
# time (µs), intensity and standard deviation; the last ones of the last bank; whether σ is the
# file's, or the root of the counts. n lower edges are n - 1 centres; channel k of a time map begins
# at t + s (k - k0) ticks of 50 or 100 ns; counts are divided by the width of their bin (of ALT by
# 1000, too); σ of a bin without counts is that of one, and 0 where a weight is.
READ = """
real/hipd_round_robin/6719.dat     6 7549 599.35 16523.33333 234.6867 23993.675 1.171548 0.313109 -
real/hipd_round_robin/6722.dat     4 7549 599.35 10033.33333 182.8782 23993.675 0.251046 0.144941 -
real/hipd_round_robin/6725.dat     4 7549 599.35 10450 186.6369 23993.675 0.669456 0.236688 -
real/hipd_round_robin/6727.dat     4 7549 599.35 10046.66667 182.9997 23993.675 0.836820 0.264626 -
real/hippo_quartzite/14445.gda     30 9092 750.1 0 5 23973.75 0.0348432 0.0348432 -
real/imateria_ceo2/imateria.cif    1 6984 4001 0.078983 0.004937 40014 0.020464 0.002807 σ
real/nomad_nano3/GSAS_NaNO3_230C.gsa 6 2998 449.7242176715 7.53328e-07 0.0402008 \
    26213.5699305465 5.49746e-05 3.92753e-06 σ
real/nomad_si/Si_test-1.xye        1 5768 300.12 0 0 30204.18323 0 0 σ
real/nomad_si/Si_test-2.xye        1 5768 300.12 0 0 30204.18323 0 0 σ
real/nomad_si/Si_test-3.xye        1 5768 300.12 0 0 30204.18323 0 0 σ
real/nomad_si/Si_test-4.xye        1 5768 300.12 0 0 30204.18323 1.90839324 9.69643263 σ
real/powgen_lab6/PG3_17541.gsa     1 6824 6778.4369582105 27.94173 2.204385 \
    103793.9994994135 26.96463 7.800499 σ
real/powgen_nac/PG3_22048.gsa      1 6824 6778.4369582105 43.21139 1.937708 \
    103793.9994994135 8.254597 4.655762 σ
real/powgen_mn3o4/PG3_20256-2_60K.xye 1 3358 7004.38458 50.89862082 1.3819519 \
    102618.47037 83.15671819 10.72363116 σ
real/powgen_mn3o4/PG3_20269-4_60K.xye 1 2572 25984.0073 18.78762259 0.99491171 \
    203037.45524 26.8617273 7.31664059 σ
real/sepd_si/arg_si.dat            1 5599 2002.5 0.04276 0.00066 29992.5 0.03322 0.01174 σ
real/sepd_si/arg_si.xys            1 5600 2000 213.8 3.3 29995 249.3 72 σ
real/vulcan_steel/435.gda          2 2486 5002.5 0 0 59968.05 0 0 σ
real/vulcan_steel/455.gda          2 2486 5002.5 0 0 59968.05 0 0 σ
real/vulcan_steel/495.gda          2 2486 5002.5 0 0 59968.05 0 0 σ
real/wish_nac/55025-4_7raw.gss     1 4044 7465.93998 0.322115 0.166166 \
    109119.67991 0.131596 0.0803099 σ
real/wish_nac/55025-5_6raw.gss     1 4122 7269.910395 0 0 103451.001705 0.277657 0.0738351 σ
measured/gem_srtio3/gem05984.gss   4 2719 2555.484375 1.471015 0.0408615 \
    17864.671875 1.428027 0.0209365 σ
measured/nomad_diamond/NOM_127827.gsa 6 5999 743.2943404155 0.638652 0.0187499 \
    10268.5106635905 0.276824 0.00975354 σ
measured/nomad_si640e/bank3_pattern.csv 1 2998 735.14568 1.1998508e-08 0.00873142 21979.491 0 0 σ
measured/nomad_si640e/bank4_pattern.csv 1 2998 1137.8138 0.12653402 0.00306404 18910.284 0 0 σ
"""
ROWS = {words[0]: words[1:] for line in READ.split("\n") if (words := line.split())}

INSTRUMENT, STRUCTURE = "is an instrument file, no profile", "a CIF without a measured profile"
WAVELENGTH = "is constant wavelength, 2θ {}°; only time of flight is supported"
REFUSED = {
    "real/constant_wavelength/PBSO4.CWN": WAVELENGTH.format("10–155.9"),
    "real/constant_wavelength/PBSO4.XRA": WAVELENGTH.format("10–160"),
    "real/constant_wavelength/Er2Ge2O7_op2112_Ge113_0p5K.gss": WAVELENGTH.format("2.025–124.9"),
    "real/constant_wavelength/Er2Ge2O7_op2112_Ge113_2K.gss": WAVELENGTH.format("2.025–124.9"),
    "measured/nomad_si640e/bank3_reflections_Silicon.csv": "is a list of reflections",
    "measured/nomad_si640e/bank4_reflections_Silicon.csv": "is a list of reflections",
    "real/vulcan_steel/28902sampleenv_chopped_mean.txt": "holds no numbers",  # a table of loads
}
REST = {".cif": STRUCTURE, ".instprm": INSTRUMENT, ".prm": INSTRUMENT, ".irf": INSTRUMENT}
REST |= {
    ".pcr": INSTRUMENT,
    ".exp": INSTRUMENT,
    ".md": "holds no numbers",
    ".toml": "holds no numbers",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_real_file_is_read_right(name: str) -> None:
    banks, points, *values, sigma = ROWS[name]
    first, last = np.array(values, dtype=float).reshape(2, 3)
    profiles = read_profiles(SHARED / name)
    assert len(profiles) == int(banks)
    assert {(p.unit, p.sigma_known) for p in profiles} == {("us", sigma == "σ")}
    p, q = profiles[0], profiles[-1]
    assert len(p.tof) == int(points)
    np.testing.assert_allclose((p.tof[0], q.tof[-1]), (first[0], last[0]), rtol=1e-9)
    np.testing.assert_allclose((p.intensity[0], p.sigma[0]), first[1:], rtol=5e-6)
    np.testing.assert_allclose((q.intensity[-1], q.sigma[-1]), last[1:], rtol=5e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_a_real_file_is_refused_by_what_it_is(name: str) -> None:
    with pytest.raises(ProfileError, match=REFUSED[name]):
        read_profiles(SHARED / name)


def test_no_real_file_is_left_out() -> None:
    for path in (
        p for folder in ("real", "measured") for p in sorted((SHARED / folder).rglob("*"))
    ):
        if path.is_file() and str(path.relative_to(SHARED)) not in {*ROWS, *REFUSED}:
            with pytest.raises(ProfileError, match=REST[path.suffix.lower()]):
                read_profiles(path)
