"""Entries of a .instprm file that are missing, unknown or impossible are reported or refused."""

import pytest

from bragg_data.instrument.instprm import InstrumentError, read_instruments
from tests.fuzzing.originals import INSTPRM


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("sig-1:284.9\n", "", "bank 1 lacks sig-1: zero is used."),
        ("sig-1:", "sig1:", "bank 1 has the unknown entry 'sig1', which was not read."),
        ("difB:0.25", "difB 0.25", "'difB 0.25' is no entry"),
        ("sig-1:284.9", "sig-1:-284.9", "The variance of bank 1 is negative at d = "),
        ("beta-0:0.27", "beta-0:-0.27", "The decay of bank 1 is negative"),
        ("Y:1.3", "Y:-1.3", "The Lorentzian width of bank 1 is negative"),
        ("difA:-1.5", "difA:-150", "shift positions by"),
        ("2-theta:31.0", "2-theta:310", "are no geometry of a diffractometer"),
        ("Bank:1\n", "Bank:3\n", "heading names bank 1, and its entry bank 3"),
        ("Type:PNT\n", "", "bank 1 lacks Type, which other banks of the file have."),
        ("Azimuth:0.0", "Azimuth:", "bank 1 has no number as Azimuth"),
        ("#Bank 1:", "#Bank *:", "The heading '#Bank *: GSAS-II ins' numbers no bank"),
        ("Type:PNT", "#Bank 1: x\nType:PNT", "The heading of bank 1 has no entries below it."),
    ],
)
def test_doubtful_entries_are_reported(old: str, new: str, expected: str) -> None:
    assert old in INSTPRM
    first, second = read_instruments(INSTPRM.replace(old, new, 1))
    assert any(expected in warning for warning in first.warnings)
    assert second.warnings == ()


def test_complete_banks_cause_no_report_and_keep_their_text() -> None:
    first, second = read_instruments(INSTPRM)
    assert first.warnings == second.warnings == ()
    old = INSTPRM.replace("Z:0.4\n", "").replace("Azimuth:0.0\n", "")  # of before 2019
    assert [bank.warnings for bank in read_instruments(old)] == [(), ()]
    (lacking, _) = read_instruments(INSTPRM.replace("sig-1:284.9\n", "", 1))
    assert "lacks" not in lacking.text  # by whose digest campaigns know the instrument


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("difC:2784.5", "difC:27_84.5", "where a number is needed"),
        (INSTPRM[INSTPRM.index("#Bank 4") + 20 :], "", "behind the heading of bank 4"),
    ],
)
def test_damage_is_refused(old: str, new: str, expected: str) -> None:
    with pytest.raises(InstrumentError, match=expected):
        read_instruments(INSTPRM.replace(old, new))
