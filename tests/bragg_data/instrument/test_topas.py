"""Positions of TOPAS, written here, with the peak shape of another file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bragg_data.instrument.instprm import InstrumentError, read_banks, read_instrument
from bragg_data.instrument.topas import read_topas_positions, recognised

INP = """r_wp 4.2
macro TOF_x_axis_calibration(t0, t0v, t1, t1v, t2, t2v) {{ }}
xdd "bank3.xye"
  neutron_data
  ' TOF_x_axis_calibration(t0, 1, t1, 2, t2, 3)
  /* an older one: TOF_x_axis_calibration(t0, 1, t1, 2, t2, 3) */
  TOF_x_axis_calibration({t0}, {v0}, {t1}, {v1}, {t2}, {v2})
  TOF_PV(@, 50, @, 0.3, t1)
"""
PLAIN = {"t0": "t0", "t1": "t1", "t2": "t2", "v0": "3.25", "v1": "5010.5", "v2": "-1.5"}

WIDTHS = """#Bank 3: GSAS-II instrument parameter file
Type:PNT
Bank:3
2-theta:-90.0
difC:5000.0
difA:7.0
difB:0.5
Zero:1.0
alpha:1.5
beta-0:0.03
sig-1:20.0
#Bank 4: GSAS-II instrument parameter file
Type:PNT
Bank:4
2-theta:40.0
difC:2500.0
alpha:1.0
"""


@pytest.fixture
def widths(tmp_path: Path) -> Path:
    file = tmp_path / "other.instprm"
    file.write_text(WIDTHS)
    return file


def inp(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.inp"
    file.write_text(text)
    return file


def test_positions_of_topas_with_the_peak_shape_of_another_file(tmp_path, widths):
    (bank,) = read_banks(inp(tmp_path, INP.format(**PLAIN)), widths)
    i = bank.instrument
    assert (i.difc, i.difa, i.difb, i.tzero) == (5010.5, -1.5, 0.0, 3.25)
    assert (i.bank, i.two_theta, i.alpha, i.beta_0, i.sig_1) == (3, -90.0, 1.5, 0.03, 20.0)
    assert i.tof_from_d_spacing(2.0) == pytest.approx(3.25 + 2 * 5010.5 - 1.5 * 4)
    assert "whose difC is 0.21 % off" in " ".join(i.warnings)
    assert read_instrument(i.text) == i


@given(
    flags=st.lists(st.sampled_from(["", "!", "@ ", "bank_1_"]), min_size=3, max_size=3),
    errors=st.lists(
        st.sampled_from(["", "`", "`_0.0012", "_LIMIT_MIN_0", "`_0.1_LIMIT_MAX_9", " \n  "]),
        min_size=3,
        max_size=3,
    ),
    zero=st.sampled_from(["3.25", "+3.25", "325e-2", "0.325E+1"]),
)
def test_spellings_of_the_macro(flags, errors, zero):
    names = {f"t{k}": f"{flag}t{k}" for k, flag in enumerate(flags)}
    values = (zero, "5010.5", "-1.5")
    values = {f"v{k}": v + e for k, (v, e) in enumerate(zip(values, errors, strict=True))}
    text = INP.format(**names, **values)
    assert recognised(text)
    assert read_topas_positions(text, "file") == [(3.25, 5010.5, -1.5)]


@pytest.mark.parametrize(
    "text",
    [
        "t0 3.25\nt1 5010.5\nt2 -1.5\n",
        "prm !t0 3.25`_0.1\nprm t1  5010.5`_0.3\nprm !t2 -1.5\n",
        "' bank 3\nt0 = 3.25;\nt1 = 5010.5;\nt2 = -1.5;",
    ],
)
def test_constants_alone(text):
    assert recognised(text)
    assert read_topas_positions(text, "file") == [(3.25, 5010.5, -1.5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v1": "=5000 + a;"}, "needs three names, each with a number"),
        ({"v1": "-5010.5"}, "t1 is -5010.5 µs/Å, and must be positive"),
        ({"v1": "9000.0"}, r"within 5 % of it \(it has 5000, 2500\)"),
    ],
)
def test_positions_that_cannot_be_used(tmp_path, widths, change, message):
    with pytest.raises(InstrumentError, match=message):
        read_banks(inp(tmp_path, INP.format(**PLAIN | change)), widths)


def test_widths_are_requested_and_refused(tmp_path, widths):
    file = inp(tmp_path, INP.format(**PLAIN))
    message = r"positions \(difC 5010.5, difA -1.5, Zero 3.25\), .*--widths OTHER.instprm"
    with pytest.raises(InstrumentError, match=message):
        read_instrument(file)
    with pytest.raises(InstrumentError, match="has peak widths itself"):
        read_banks(widths, widths)
    twice = inp(tmp_path, INP.format(**PLAIN) * 2)
    with pytest.raises(InstrumentError, match="two datasets have a t1 near"):
        read_banks(twice, widths)
