"""Signs of damage in a profile are reported, and regular profiles cause no report."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bragg_data.measurement.readers import ProfileError, read_profiles
from bragg_data.measurement.readers.checks import warnings_of_axis, warnings_of_values
from tests.fuzzing.originals import PROFILES

LOG = 2000.0 * 1.004 ** np.arange(200)
LINEAR = 2000.0 + 8.0 * np.arange(200)
MIXED = np.concatenate([LINEAR, LINEAR[-1] + np.cumsum(16.0 * np.ones(100))])  # a step that doubles
COUNTS = 400.0 + 50.0 * np.sin(np.arange(200))


def messages(tmp_path: Path, kind: str, *changes: tuple[str, str]) -> list[str]:
    text = PROFILES[kind]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / f"profile.{kind}"
    path.write_text(text)
    return [warning for profile in read_profiles(path) for warning in profile.warnings]


@given(st.sampled_from([LOG, LINEAR, MIXED]), st.integers(1, 3), st.sampled_from([0, 1, 2]))
def test_axes_as_they_are_written_cause_no_report(x, decimals, last) -> None:
    x = np.round(x, decimals)
    x[-1] -= last  # a last bin that is cut off
    assert warnings_of_axis(x, "µs") == []


@given(st.sampled_from([LOG, LINEAR, MIXED]), st.integers(2, 190))
def test_a_missing_line_is_reported_where_it_is(x, row) -> None:
    (warning,) = warnings_of_axis(np.delete(x, row), "µs")
    assert f"first between {x[row - 1]:.6g} and {x[row + 1]:.6g} µs" in warning


@given(st.sampled_from([LOG, LINEAR]), st.integers(2, 190), st.sampled_from([-3.0, 2.0, 5.0]))
def test_a_time_with_a_wrong_digit_is_reported(x, row, off) -> None:
    changed = x.copy()
    changed[row] += off
    assert "irregular at 2 of 199 places" in warnings_of_axis(changed, "µs")[0]


def test_an_axis_without_regularity_is_not_checked() -> None:
    rng = np.random.default_rng(1)
    assert warnings_of_axis(2000 + np.cumsum(rng.uniform(1, 9, 200)), "µs") == []


@given(st.integers(2, 197), st.sampled_from([0.0, -1.0, 4.0, 40.0]))
def test_a_count_far_below_its_neighbours_is_reported(row, value) -> None:
    y = COUNTS.copy()
    y[row] = value
    report = warnings_of_values(LINEAR, y, np.sqrt(COUNTS))
    assert any("far below" in text and f"at {LINEAR[row]:.6g}" in text for text in report)
    assert warnings_of_values(LINEAR, COUNTS, np.sqrt(COUNTS)) == []


@given(st.integers(0, 199), st.sampled_from([0.5, 1.05, 10.0]))
def test_a_deviation_that_is_not_the_root_of_counts_is_reported(row, factor) -> None:
    sigma = np.sqrt(COUNTS) / 3
    sigma[row] *= factor
    (warning,) = warnings_of_values(LINEAR, COUNTS, sigma)
    assert warning.startswith("1 of 200 points")
    assert "not the roots of their counts" in warning
    assert warnings_of_values(LINEAR, COUNTS, 1.0 + sigma / 9 * np.arange(200)) == []


@pytest.mark.parametrize(
    ("kind", "old", "new", "expected"),
    [
        ("xye", "2008.00 60.00000", "2008.00 nan", "have no number as intensity"),
        ("csv", "0.059524,0", "-0.059524,0", "negative standard deviation"),
        ("csv", "yobs,weight", "yobs,weigt", "No column is named as standard deviation"),
        ("csv", "# tof_us,yobs,weight,ycalc (none)\n", "", "4 columns have no names"),
        ("csv", "ycalc (none)", "sigma", "as standard deviation and as weight"),
        ("csv", "tof_us", "tof_ms", "reach 2.5 s: check the unit"),
        ("xye", "\n2008.00", "\n*2008.00", "was left out"),
        ("fxye", "DIFC 9113.1", "DIFC 9331.1", "give difC 9113"),
        ("fxye", "SLOG 2000 2541.3 0.004", "SLOG 2000 2541.3 0.005", "not those of the bank's"),
        ("fxye", "SLOG 2000 ", "SLOG 2200 ", "not those of the bank's record"),
        ("esd", "BANK 1 60", "BANK 1 30", "promises 30 channels, and there are lines for 60"),
        ("xy", "2000.0 400", "2000.0(400", "was left out"),
        ("fxye", "0.004 0 FXYE", "0.004 0 FXY", "its lines have more than 2 numbers"),
        ("fxye", "SLOG 2000 2541.3", "SLOG 2000 inf", "not those of the bank's record"),
        ("fxye", "2541.3 0.004", "2541.3 -1", "not those of the bank's record"),
        ("fxye", "2541.3 0.004", "-5 0", "not those of the bank's record"),
        ("fxye", "BANK 1 60 60", "BANK 1 60 61", "promises 61 lines, and 60 are there"),
        ("esd", "   414.0  10.173", "  414.0  10.173", "differ from the others in length"),
        ("std", " 0 0 STD", " 0 0", "names no type of data: STD is assumed"),
        ("esd", "CONST 2000", "CONST 2 2000", "has other values than up to four"),
        ("time_map", "1 STD", "STD 1", "has other values than up to four"),
        ("time_map", " 22400 80 ", " 22400 30 ", "has 60 channels, and its time map 110"),
        ("std", "BANK", " 2 3 4 5\nBANK", "A line of numbers stands outside of any bank"),
        ("time_map", "TIME_MAP 1 STD", "TIME_MAP 7 STD", "refers to time map '7': '1' is used"),
    ],
)
def test_contradictions_of_files_are_reported(
    tmp_path: Path, kind: str, old: str, new: str, expected: str
) -> None:
    assert any(expected in text for text in messages(tmp_path, kind, (old, new)))


@pytest.mark.parametrize(
    ("kind", "old", "new", "expected"),
    [
        ("fxye", "BANK 1 60", "BAN 1 60", "looks like a bank record"),
        ("fxy", "BANK 1 60", "tof 1 60", "looks like a bank record"),
        ("fxye", "\n     2008.0000 ", "\n     2008.0000 7 ", "rows of 3 numbers and others"),
        ("fxye", "BANK 1 60", "BANK -1 60", "bank record that cannot be read"),
        ("esd", "CONST 2000 8", "CONST 2000 1_0", "bank record that cannot be read"),
        ("xye", "60.00000", "6_0.00000", "cannot be read at line 4"),
        ("fxye", "420.0000", "4_0.0000", "line 2 behind its record"),
        ("xye", "2008.00 60", "2008.00; 60", "in different ways"),
        ("time_map", " 31 22400", " 33 22400", "contradicts itself"),
    ],
)
def test_damage_that_makes_a_profile_unclear_is_refused(
    tmp_path: Path, kind: str, old: str, new: str, expected: str
) -> None:
    with pytest.raises(ProfileError, match=expected):
        messages(tmp_path, kind, (old, new))


@pytest.mark.parametrize("kind", PROFILES)
def test_the_originals_cause_no_report(tmp_path: Path, kind: str) -> None:
    assert messages(tmp_path, kind) == []
