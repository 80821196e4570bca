"""Damage of one number or line, which the reader has to report: the rest of the file shows it."""

from pathlib import Path

import numpy as np
import pytest

from bragg_data.measurement.readers import ProfileError, read_profiles
from bragg_data.measurement.readers.digits import warnings_of_digits
from tests.fuzzing.originals import COUNTS, LINEAR, PROFILES

DAMAGE = {  # kind of file, text, what stands in its place, what is reported
    "a digit is missing": ("xye", "2048.48 ", "2048.4 ", "'2048.4' in column 1 has 1 digits"),
    "digits are doubled": ("xye", " 57.14286 ", " 57.1428686 ", "'57.1428686' in column 2"),
    "the decimals are missing": ("xy", "2472.0 419", "2470 419", "'2470' in column 1 has 0 digits"),
    "weight and fit are exchanged": ("csv", ",0.065617,0\n", ",0,0.065617\n", "only '0.065617'"),
    "a time is overflown": ("xye", "2531.16 ", "******** ", "looks like a row was left out"),
    "blanks do not break": ("xye", " 59.14286 ", "\xa059.14289 ", "non-breaking spaces"),
    "the first step": (
        "alt",
        "64000 256 64000",
        "64000 25 64000",
        "not those of the bank's record",
    ),
    "the last time": ("alt", "   80997 ", "   80947 ", "not those of the bank's record"),
    "the clock": ("time_map", "TIME_MAP 100", "TIME_MAP 10", "end at 247.2 µs"),
    "a row behind a mark": ("esd", "\n   420.0", "\n#  420.0", "stands outside of any bank"),
}


def warnings_of(kind: str, text: str, folder: Path) -> str:
    path = folder / f"profile.{kind}"
    path.write_bytes(text.encode("latin-1"))
    return " ".join(text for profile in read_profiles(path) for text in profile.warnings)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_reported(name: str, tmp_path: Path) -> None:
    kind, old, new, message = DAMAGE[name]
    original = PROFILES[kind]
    assert old in original
    assert message not in warnings_of(kind, original, tmp_path)
    assert message in warnings_of(kind, original.replace(old, new, 1), tmp_path)


def test_numbers_beyond_the_damage_are_right(tmp_path: Path) -> None:
    path = tmp_path / "profile.xy"
    path.write_text(PROFILES["xy"].replace("2072.0 404", "2072.0 404.5"))
    (profile,) = read_profiles(path)
    assert "'404.5' in column 2 has 1 digits" in " ".join(profile.warnings)
    np.testing.assert_array_equal(profile.tof, LINEAR)
    np.testing.assert_array_equal(np.delete(profile.intensity, 9), np.delete(COUNTS, 9))
    assert profile.intensity[9] == 404.5


def test_a_time_map_of_other_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="contradicts itself"):
        warnings_of("time_map", PROFILES["time_map"].replace("1 7 1 T", "1 7 11 T"), tmp_path)


@pytest.mark.parametrize(
    "column",
    [
        [f"{x:.7g}" for x in np.linspace(9950.123, 10000.9, 60)],  # all of seven digits
        [repr(float(x)) for x in np.linspace(1.5, 7.25, 60)],  # no form
        [f"{x:.3e}" for x in np.linspace(0.5, 70, 60)],
        ["0", *(f"{x:.3f}" for x in np.linspace(0.5, 70, 60)), "0.0"],
        [f"{x:g}" for x in np.arange(0.5, 60.0, 0.25)],
    ],
)
def test_ways_of_writing_are_no_damage(column: list[str]) -> None:
    assert warnings_of_digits([[word] for word in column]) == []
