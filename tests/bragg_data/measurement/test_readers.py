"""Readers of profiles and instruments: real files to the last point, damaged ones in a sentence."""

import random
import re
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bragg_data.instrument.instprm import (
    Instrument,
    InstrumentError,
    read_instrument,
    read_instruments,
)
from bragg_data.measurement.readers import Profile, ProfileError, read_profiles
from bragg_data.measurement.readers.common import MINIMUM_POINTS

MEASURED = Path(__file__).parents[4] / "shared" / "measured"
GEM, DIAMOND = "gem_srtio3/gem05984.gss", "nomad_diamond/NOM_127827.gsa"
SILICON = "nomad_si640e/bank{}_pattern.csv"

# Points, first and last time (µs), first and last sigma, sum of sigma, points without information.
# Worked out in decimal arithmetic from the text of the files, without the reader: n lower edges
# are n - 1 centres, sigma is that of the counts over the bin's width, and 1/√weight in the csv.
MEASURED_BANKS = {
    (GEM, 1): (2719, 2555.484375, 22461.296875, 0.0408615385, 0.117370435, 105.555478, 0),
    (GEM, 2): (2719, 2464.421875, 21660.953125, 0.0579047619, 0.126789189, 90.6649667, 0),
    (GEM, 3): (2719, 2250.640625, 19781.90625, 0.0151578947, 0.0407272727, 37.5403754, 0),
    (GEM, 4): (2719, 2032.5, 17864.671875, 0.0178461538, 0.0209365427, 38.0429942, 0),
    (DIAMOND, 1): (5999, 743.2943404, 8969.142362, 0.0187499134, 0.00685914132, 60.4231142, 0),
    (DIAMOND, 2): (5999, 887.5120435, 17962.26693, 0.00624430665, 0.00769021717, 24.4236771, 0),
    (DIAMOND, 3): (5999, 1009.674617, 19054.25312, 0.00489180524, 0.00603525656, 18.965156, 0),
    (DIAMOND, 4): (5999, 1175.947274, 17173.36494, 0.00440126079, 0.00736317768, 16.3070646, 0),
    (DIAMOND, 5): (5999, 1288.900803, 15257.91154, 0.00321267178, 0.00601852441, 11.9354599, 0),
    (DIAMOND, 6): (5999, 858.4713544, 10268.51066, 0.0346535228, 0.00975354045, 100.913747, 0),
    (SILICON.format(3), None): (2998, 735.14568, 21979.491, 0.00873141628, 0, 5.61966743, 51),
    (SILICON.format(4), None): (2998, 1137.8138, 18910.284, 0.00306403583, 0, 5.85231885, 92),
}


@pytest.mark.skipif(
    not MEASURED.is_dir(), reason="the measured profiles (shared/measured) are not on this machine"
)
def test_every_bank_of_the_measured_files_is_read_to_its_last_point() -> None:
    results = {
        (name, p.bank): (
            len(p.tof),
            *p.tof[[0, -1]],
            *p.sigma[[0, -1]],
            p.sigma.sum(),
            (p.sigma == 0).sum(),
        )
        for name in dict.fromkeys(name for name, _ in MEASURED_BANKS)
        for p in read_profiles(MEASURED / name)
    }
    assert list(results) == list(MEASURED_BANKS)
    for key, expected in MEASURED_BANKS.items():
        assert results[key] == pytest.approx(expected, rel=1e-8), key


# ---- small files that are right ----------------------------------------------------------------

POINTS = 24
TIMES = [1000 + 10 * i for i in range(POINTS)]
HEADER = (
    "Sample Run: 1 Wavelength: 1.5 A\n# Instrument: NOMAD\n# Total flight path 20.61m, tth {}deg, "
    "DIFC {}\n"
)


def in_lines(cells: list[str], per_line: int) -> str:
    return "".join("".join(cells[i : i + per_line]) + "\n" for i in range(0, len(cells), per_line))


def bank(number: int, binning: str, kind: str, rows: str) -> str:
    return f"BANK {number} {POINTS} {rows.count(chr(10))} {binning} {kind}\n{rows}"


FXYE = "".join(f"{t:14.4f}{t / 100:14.4f}{0.5:10.4f}\n" for t in TIMES)
ALT = in_lines([f"{32 * t:8d}{10 * t:7d}{500:5d}" for t in TIMES], 4)
ESD = in_lines([f"{t / 100:8.2f}{0.5:8.3f}" for t in TIMES], 5)
STD = in_lines([f" 1{t / 100:6.1f}" for t in TIMES], 10)
VALID = {
    "fxye": HEADER.format(122, 9496.2)
    + bank(1, "SLOG 1000 1230 0.01 0", "FXYE", FXYE)
    + HEADER.format(31, 2861.5).partition("\n")[2]
    + bank(2, "SLOG 1000 1230 0.01 0", "FXYE", FXYE),
    "fxy": "title\n" + bank(1, "SLOG 1000 1230 0.01 0", "FXY", re.sub(" +0.5000", "", FXYE)),
    "alt": "title\r\n" + bank(1, "RALF 32000 320 32000 0.01", "ALT", ALT).replace("\n", "\r\n"),
    "esd": "title\n" + bank(1, "SLOG 1000 1230 0.01 0", "ESD", ESD),
    "std": "title\n" + bank(1, "CONST 1000 10 0 0", "STD", STD),
    "time_map": "title\n"
    + bank(1, "TIME_MAP 1", "STD", STD)
    + "TIME_MAP 1 7 1 TIME_MAP 100\n 1 10000 100 11 11000 200 40000\n",
    "xy": "# a title\n" + "".join(f"{t} {t / 100}\n" for t in TIMES),
    "xye": "# 2theta = 122.0\n" + "".join(f"{t} {t / 100} 0.5\n" for t in TIMES),
    "csv": "# tof_us,yobs,weight,ycalc (none)\n" + "".join(f"{t},{t / 100},4,0\n" for t in TIMES),
    "instprm": "".join(
        f"#Bank {number}: GSAS-II instrument parameter file; do not add/delete items!\n"
        f"Type:PNT\nBank:{number}.0\nfltPath:20.6\n2-theta:{angle}\ndifC:{difc}\ndifA:-1.5\n"
        f"difB:0.0\nZero:4.8; alpha:0.2\nbeta-0:0.27\nbeta-1:1e-05\nsig-1:284.9\nX:0.1\n"
        for number, angle, difc in ((1, 31.0, 2851.1), (4, 122.0, 9496.2))
    ),
}


def read(path: Path) -> list[Profile] | list[Instrument]:
    if path.suffix != ".instprm":
        return read_profiles(path)
    return [read_instrument(path, bank.bank) for bank in read_instruments(path)]


@pytest.mark.parametrize("kind", VALID)
def test_the_small_files_are_right(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"valid.{kind}"
    path.write_bytes(VALID[kind].encode())
    results = read(path)
    assert len(results) == (2 if kind in ("fxye", "instprm") else 1)
    for result in results:
        check(result)
        if isinstance(result, Profile):  # a bin begins at its time, a point of columns lies there
            assert result.tof[0] == pytest.approx(1000 if kind in ("xy", "xye", "csv") else 1005)


# ---- and damaged -------------------------------------------------------------------------------

EXAMPLES = 400  # of each kind of file
SECONDS, BYTES = 2.0, 64e6  # of the processor and of memory, for files of a few kilobytes
PIECES = [
    b"nan",
    b"-inf",
    b"1e400",
    b"1e308",
    b"-1e308",
    b"1e-320",
    b"-5",
    b"0",
    b"1e12",
    b"10" * 6,
    b"9" * 25,
    b"9" * 5000,
    b"1_0",
    b"1.2.3",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xb2",
    b"\xe9",
    b"\x85",
    b"\x1b[2J",
    b"\x0c",
    b"\r",
    b"\n",
    b"\n\n",
    b" ",
    b"",
    b",",
    b"#",
    b":",
    b"(" * 300,
    b"BANK",
    b"BANK 1 1000000000000 1 SLOG 1000 9 0.01 0 STD\n",
    b"TIME_MAP",
    b"SLOG",
    b"CONST",
    b"ALT",
    b"STD",
    b"Bank:inf\n",
    b"difC:1e308\n",
    b"\xc2\xb5",
]
KINDS = "cut out,repeat,insert,replace,number,number,word,truncate,shuffle,swap".split(",")  # noqa: SIM905


def damaged(content: bytes, kind: str, where: int, length: int, piece: bytes) -> bytes:
    at = where % (len(content) + 1)
    before, hit, after = content[:at], content[at : at + length], content[at + length :]
    lines = content.splitlines(keepends=True)
    if kind == "cut out":
        return before + after
    if kind == "repeat":
        return before + hit + hit + after
    if kind == "insert":
        return before + piece + hit + after
    if kind == "replace":
        return before + piece + after
    if kind in ("number", "word"):
        words = list(re.finditer(rb"[-+\d.e]+" if kind == "number" else rb"[^\s,;:]+", content))
        word = words[where % len(words)].span() if words else (at, at)
        return content[: word[0]] + piece + content[word[1] :]
    if kind == "truncate":
        return before
    if kind == "shuffle":
        random.Random(where).shuffle(lines)
    elif lines:
        first, second = where % len(lines), length % len(lines)
        lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


pieces = st.sampled_from(PIECES) | st.binary(max_size=12)
damages = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 5000), st.integers(1, 60), pieces),
    min_size=1,
    max_size=4,
)


def outcome(path: Path, content: bytes) -> str:
    """Read a file and check the result: valid data, or a one-sentence error message."""
    path.write_bytes(content)
    expected = InstrumentError if path.suffix == ".instprm" else ProfileError
    started = time.process_time()
    tracemalloc.start()
    try:
        for result in read(path):
            check(result)
        message = ""
    except expected as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - started < SECONDS
    assert peak < BYTES
    if not message:
        return "read"
    assert str(path) in message
    assert message.isprintable()
    assert message.endswith(".")
    assert 5 < len(message) - len(str(path)) < 400
    return message


def check(result: Profile | Instrument) -> None:
    if isinstance(result, Instrument):
        numbers = [value for value in vars(result).values() if isinstance(value, float)]
        assert np.isfinite(numbers).all()
        assert min(result.difc, result.alpha) > 0
        return
    assert len(result.tof) == len(result.intensity) == len(result.sigma) >= MINIMUM_POINTS - 1
    assert np.isfinite([result.tof, result.intensity, result.sigma]).all()
    assert result.tof[0] > 0
    assert (np.diff(result.tof) > 0).all()
    assert (result.sigma >= 0).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALID)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(folder: Path, kind: str) -> None:
    outcomes: Counter[str] = Counter()
    path, valid = folder / f"damaged.{kind}", VALID[kind].encode()

    @settings(max_examples=EXAMPLES, derandomize=True)
    @given(changes=damages)
    def damage(changes: list[tuple[str, int, int, bytes]]) -> None:
        content = valid
        for change in changes:
            content = damaged(content, *change)
        outcomes["read" if outcome(path, content) == "read" else "refused"] += 1

    damage()
    assert outcomes.total() >= EXAMPLES
    assert min(outcomes["read"], outcomes["refused"]) >= 5, outcomes


@pytest.mark.parametrize("suffix", ["gsa", "instprm"])
def test_random_bytes_are_refused_in_a_sentence(folder: Path, suffix: str) -> None:
    @settings(max_examples=EXAMPLES, derandomize=True)
    @given(content=st.binary(max_size=300))
    def check_bytes(content: bytes) -> None:
        assert outcome(folder / f"random.{suffix}", content) != "read"

    check_bytes()


# What chance finds seldom: (kind, what to replace, by what, what comes of it)
NUMBERS = [
    ("fxye", " 24 24 ", " 1000000000000 24 ", "truncated: its record promises 1000000000000"),
    ("alt", " 24 6 ", " 1000000000000 6 ", "truncated: its record promises 1000000000000"),
    ("esd", " 24 5 ", " 1000000000000 5 ", "truncated: its record promises 1000000000000"),
    ("std", " 24 3 ", " 1000000000000 3 ", "truncated: its record promises 1000000000000"),
    ("std", " 24 3 ", f" {10**400} 3 ", "bank record that cannot be read"),
    ("std", "BANK 1 ", f"BANK {10**400} ", "bank record that cannot be read"),
    ("std", " 1000 10 ", " 1000 1e400 ", "time of flight that is not a number"),
    ("std", " 1000 10 ", " 1000 1e308 ", "time of flight that is not a number"),
    ("esd", " 1000 1230 ", " 1e308 1230 ", "times of flight lie between"),
    ("time_map", " 7 1 ", " 1000000000000 1 ", "time map that contradicts itself"),
    ("time_map", "40000", "1000000000000", "times do not ascend in steps"),
    ("time_map", " 200 ", f" {10**25} ", "unreadable time map"),
    ("time_map", " 200 ", f" {10**400} ", "unreadable time map"),
    ("time_map", "MAP 100", "MAP 1e400", "not a number"),
    ("time_map", "MAP 100", "MAP 1e308", "not a number"),
    ("fxye", "1000.0000", "-1e308", "times of flight lie between"),
    ("xye", "1010 ", "1e308 ", "times of flight lie between"),
    ("fxy", "     1010.0000", "1000.0000000001", "do not ascend"),
    ("xy", "1010 10.1", "1010 1e400", "read"),  # a point without information
    ("xy", "1010 10.1", "1010 1e308", "intensity over 1e+30"),
    ("csv", "1010,10.1,4", "1010,10.1,1e-320", "intensity over 1e+30"),
    ("csv", "1010,10.1,4", "1010,-10.1,-4", "read"),
    ("instprm", "Bank:1.0", "Bank:1e400", "give a whole number"),
    ("instprm", "Bank:1.0", "Bank:1e300", "give a whole number"),
    ("instprm", "difA:-1.5", "difA:1e308", "all values numbers below"),
    ("instprm", "difA:-1.5", "difA:nan", "all values numbers below"),
    ("instprm", "difA:-1.5", "difA:\0\x1b" + 99 * "x", "where a number is needed"),
]


@pytest.mark.parametrize(("kind", "old", "new", "expected"), NUMBERS)
def test_numbers_beyond_reason(
    tmp_path: Path, kind: str, old: str, new: str, expected: str
) -> None:
    path = tmp_path / f"huge.{kind}"
    assert old in VALID[kind]
    content = VALID[kind].replace(old, new, 1).encode()
    assert expected in outcome(path, content)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALID)
def test_a_long_line_does_not_hang(tmp_path: Path, kind: str) -> None:
    for piece in ("(", "[", " ", "9", "9 ", "a ", "#", ";"):
        for where in ("{}\n{}", "{1}{0}"):
            content = where.format("# " + 50_000 * piece, VALID[kind]).encode()
            outcome(tmp_path / f"long.{kind}", content)


@pytest.mark.parametrize("kind", VALID)
def test_the_mark_of_utf8_is_no_part_of_the_file(tmp_path: Path, kind: str) -> None:
    plain, marked = tmp_path / f"plain.{kind}", tmp_path / f"marked.{kind}"
    content = VALID[kind].removeprefix("# a title\n").removeprefix("# ")
    plain.write_bytes(content.encode())
    marked.write_bytes(b"\xef\xbb\xbf" + content.encode())
    for without, with_mark in zip(read(plain), read(marked), strict=True):
        for name, value in vars(without).items():
            if name != "source":
                np.testing.assert_array_equal(getattr(with_mark, name), value)
