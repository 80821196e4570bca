from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bragg_data.campaign import BUILT_IN
from bragg_data.instrument.instprm import (
    Instrument,
    InstrumentError,
    TofGrid,
    read_instrument,
    read_instruments,
)

MEASURED = Path(__file__).parents[4] / "shared" / "measured"
NOMAD = BUILT_IN / "nomad_bank4.instprm"


def test_the_papers_instrument():
    instrument = read_instrument(NOMAD)
    assert (instrument.bank, instrument.two_theta) == (4, 122.0)
    assert (instrument.difc, instrument.difa, instrument.tzero) == (9496.17, 19.21, 4.84)
    assert (instrument.alpha, instrument.beta_0, instrument.beta_1) == (0.167, 0.274811, 1e-5)
    assert (instrument.sig_1, instrument.sig_2) == (284.918, 119.951)


@given(
    d=st.floats(0.1, 5.0),
    difc=st.floats(700, 20000),
    difa=st.floats(-30, 30),
    difb=st.floats(-3, 3),
    tzero=st.floats(-10, 10),
)
def test_tof_to_d_and_back(d, difc, difa, difb, tzero):
    instrument = Instrument(1, 90.0, difc, difa, difb, tzero)
    tof = np.array([instrument.tof_from_d_spacing(d)])
    np.testing.assert_allclose(instrument.d_spacing_from_tof(tof), d, rtol=1e-9)


def test_tof_without_a_d_spacing_is_refused():
    with pytest.raises(InstrumentError, match="corresponds to no d-spacing"):
        Instrument(1, 90.0, 5000.0, tzero=10.0).d_spacing_from_tof(np.array([5.0]))


def test_grid_is_the_papers():
    grid = TofGrid(1360.0, 0.0009381, 2807)
    assert len(grid.tof) == 2807
    assert grid.tof[0] == 1360.0
    assert grid.tof[-1] == pytest.approx(18911.93680612, abs=1e-6)
    assert grid.stop == pytest.approx(grid.tof[-1])


def test_text_round_trip():
    instrument = read_instrument(NOMAD)
    assert read_instrument(instrument.text) == instrument


def test_several_banks():
    path = MEASURED / "gem_srtio3" / "GEM.instprm"
    if not path.is_file():
        pytest.skip("the measured profiles (shared/measured) are not on this machine")
    assert [b.bank for b in read_instruments(path)] == [6, 1, 4, 2, 3, 6]
    assert read_instrument(path, 3).two_theta == 91.37
    with pytest.raises(InstrumentError, match="Renumber one of them"):
        read_instrument(path, 6)
    with pytest.raises(InstrumentError, match="name one of them"):
        read_instrument(path)
    with pytest.raises(InstrumentError, match="It holds: "):
        read_instrument(path, 9)


def test_the_bank_is_also_read_from_the_headline():
    text = NOMAD.read_text().replace("Bank:4\n", "")
    assert read_instrument(text).bank == 4


BANK_A = "Type:PNT\n2-theta:-90.0\ndifC:5000.0\nalpha:1.5\nsig-1:20.0\n"
BANK_B = "Type:PNT\n2-theta:90.0\ndifC:5010.0\nalpha:1.5\nsig-1:30.0\n"


@given(
    headings=st.sampled_from(
        [
            ("#Bank 3: GSAS-II instrument parameter file", "#Bank 7: GSAS-II instrument"),
            ("Bank 3: GSAS-II instrument parameter file", "Bank 7: GSAS-II instrument"),
            ("#Bank 3: all items", "#Bank 7:"),
            ("  bank 3", "  BANK 7"),
            ("Bank:3", "Bank:7"),
            ("#GSAS-II instrument parameter file\nBank:3", "Bank:7"),
        ]
    ),
    end=st.sampled_from(["\n", "\r\n", "  \n", ";"]),
)
def test_sections_of_banks_are_recognised_with_and_without_headings(headings, end):
    banks = (section.replace("\n", end).rstrip(";") for section in (BANK_A, BANK_B))
    text = "\n".join(line for pair in zip(headings, banks, strict=True) for line in pair)
    first, second = read_instruments(text)
    assert (first.bank, first.two_theta, first.difc, first.sig_1) == (3, -90.0, 5000.0, 20.0)
    assert (second.bank, second.two_theta, second.difc, second.sig_1) == (7, 90.0, 5010.0, 30.0)
    assert read_instrument(second.text) == second


def test_banks_without_any_number_are_counted():
    assert [b.bank for b in read_instruments(BANK_A + BANK_B)] == [1, 2]


def test_a_value_that_occurs_twice():
    assert read_instrument(BANK_A + "alpha:1.5\n").alpha == 1.5
    with pytest.raises(InstrumentError, match=r"'alpha' several times .* \(1.5 and 2.5\)"):
        read_instrument(BANK_A + "alpha:2.5\n")


def test_the_geometry_is_checked():
    # 505.557 · 21.5 · sin 61° = 9506.6
    nomad = read_instrument(NOMAD)
    assert nomad.flight_path_of_difc == pytest.approx(21.4764, abs=1e-3)
    assert nomad.geometry_doubt == ""
    assert nomad.with_parameters(two_theta=-122.0).geometry_doubt == ""
    assert nomad.with_parameters(flight_path=0.0).geometry_doubt == ""
    assert nomad.with_parameters(flight_path=17.0).geometry_doubt == ""  # nominal
    default = nomad.with_parameters(two_theta=150.0, flight_path=25.0, difc=1439.6)
    assert "give difC 12208.3, and the file's is 1439.6" in default.geometry_doubt


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (("Type:PNT", "Type:PXC"), "constant wavelength; only time of flight is supported"),
        (("Type:PNT", "Type:PNE"), "only PNT"),
        (("difC:9496.17", ""), "lacks 'difC'"),
        (("difC:9496.17", "difC:much"), "where a number is needed"),
        (("difC:9496.17", "difC:-1"), "must be positive"),
        (("alpha:0.167", "alpha:0"), "the rise"),
    ],
)
def test_bad_instrument_files(tmp_path, change, remedy):
    path = tmp_path / "bad.instprm"
    path.write_text(NOMAD.read_text().replace(*change))
    with pytest.raises(InstrumentError, match=remedy):
        read_instrument(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(InstrumentError, match="not found"):
        read_instrument(tmp_path / "no.instprm")
    (tmp_path / "other.txt").write_text("hello\n")
    with pytest.raises(InstrumentError, match="no line is 'key:value'"):
        read_instrument(tmp_path / "other.txt")
