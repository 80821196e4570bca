"""Damaged files: refused, reported, or exact files of their format (`python -m tests.fuzzing`)."""

import random
from pathlib import Path

import pytest

from tests.fuzzing.__main__ import fuzz, outcome
from tests.fuzzing.formats import FORMATS
from tests.fuzzing.mutations import MUTATIONS
from tests.fuzzing.originals import PROFILES
from tests.fuzzing.strict_profiles import profiles

EXAMPLES = {"cif": 60, "irf": 120, "pcr": 80}  # of 200: structures and fits take longer


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damage_is_not_silent(name: str, tmp_path: Path) -> None:
    counts, faults = fuzz(FORMATS[name](), EXAMPLES.get(name, 200), 0, tmp_path)
    assert not faults
    assert min(counts["same"], counts["refused"], counts["warned"]) > 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_change_files(name: str) -> None:
    rng = random.Random(1)
    original = PROFILES["fxye"].encode()
    assert sum(MUTATIONS[name](original, rng) != original for _ in range(50)) > 5


def test_strict_parsers_accept_other_numbers_and_no_damage() -> None:
    content = PROFILES["xye"].encode()
    lines = content.splitlines(keepends=True)
    other = profiles(content.replace(b"2008.00 60.00000", b"2008.00 61.00000"), "xye")
    assert other is not None
    assert other[0].y[1] == 61.0
    assert profiles(b"".join(lines[:-3]), "xye") is not None  # nothing counts the lines
    for damaged in (
        b"".join(lines[:20] + lines[21:]),
        content.replace(b"2008.00", b"2003.00"),
        content.replace(b"60.00000", b"6O.00000"),
        content.replace(b" 2.90694", b""),
        content.replace(b" 2.90694", b" 2.9_694"),
    ):
        assert profiles(damaged, "xye") is None
    fxye = PROFILES["fxye"].encode()
    for old, new in ((b" 60 60 ", b" 60 61 "), (b" 60 60 ", b" 61 60 "), (b"0.004 0", b"0.005 0")):
        assert profiles(fxye.replace(old, new), "fxye") is None


def test_a_silent_change_is_noticed(tmp_path: Path) -> None:
    """Of a reader that takes other numbers than the file has."""
    form = FORMATS["xy"]()
    path = tmp_path / "x.xy"
    content = PROFILES["xy"].encode().replace(b"2008.0 420", b"2008.0 421")
    assert outcome(form, content, form.numbers[0], path) == "valid"
    read = form.read

    def forgetful(path: Path):
        ((*head, intensity, sigma),), messages = read(path)
        return [(*head, intensity + 1, sigma)], messages

    form.read = forgetful
    assert outcome(form, content, form.numbers[0], path) == "SILENT"
