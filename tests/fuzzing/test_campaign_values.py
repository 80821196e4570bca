"""Any value in a campaign file gives a campaign or one sentence: soon, and in little memory."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bragg_data.campaign import BUILT_IN, CampaignError, load_campaign
from tests.fuzzing.test_designs import check_sentence

SECONDS, BYTES = 10.0, 1 << 30
EXAMPLES = int(os.environ.get("BRAGG_FUZZ_EXAMPLES", "150"))
"""Of campaign files."""

VALUES = {
    "name": '"x"',
    "seed": "1",
    "sampling": '"sobol"',
    "instrument.file": f'"{BUILT_IN}/nomad_bank4.instprm"',
    "instrument.bank": "4",
    "tof.start": "2000.0",
    "tof.relative_step": "0.001",
    "tof.points": "2000",
    "broadening.size": "1.0",
    "broadening.microstrain": "1000.0",
    "rows_per_chunk.kinematic": "512",
    "rows_per_chunk.gsas2": "16",
    "measurement_effects.counts": "[1000.0, 2000.0]",
    "measurement_effects.signal_end": "[0.9, 1.1]",
    "measurement_effects.difc": "3e-4",
}
PHASE = {
    "name": '"t"',
    "cif": f'"{BUILT_IN}/batio3_tetragonal.cif"',
    "samples": "100",
    "exclude": '["a = c"]',
    "cell.a.low": "3.9",
    "cell.a.high": "4.1",
    "cell.c.low": "4.2",
    "cell.c.high": "4.3",
}
GRID = {"sampling": '"grid"', "cell.a": "{first = 3.9, last = 4.0, step = 0.01}"}
GRID |= {"cell.c": "{first = 4.1, last = 4.2, step = 0.01}"}
"""In place of Sobol sampling."""

integers = (
    st.integers(-5, 5)
    | st.integers(-(10**20), 10**20)
    | st.integers(0, 22).map(lambda power: 10**power)
)
decimals = st.builds("{}.{}e{}".format, st.integers(-9, 9), st.integers(0, 99), integers)
extremes = st.sampled_from(["nan", "-inf", "9" * 900, "0." + "0" * 900 + "1"])
numbers = integers.map(str) | decimals | extremes
names = st.sampled_from(
    ["/dev/zero", "/dev/stdin", ".", "", "a\0b", "n" * 900, "pipe", "large.cif"]
)
strings = (st.text(max_size=20) | names).map(json.dumps)
scalars = numbers | strings | st.sampled_from(["true", "1979-05-27", "[", "{}"])
values = (
    scalars
    | st.lists(scalars, max_size=4).map(lambda some: f"[{', '.join(some)}]")
    | st.builds("{{first = {}, last = {}, step = {}}}".format, numbers, numbers, numbers)
    | st.builds("{{low = {}, high = {}}}".format, numbers, numbers)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipe, and a CIF of 3 GB that takes no space."""
    directory = tmp_path_factory.mktemp("campaign")
    os.mkfifo(directory / "pipe")
    with (directory / "large.cif").open("wb") as file:
        file.truncate(3_000_000_000)
    return directory


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    changes=st.dictionaries(st.sampled_from([*VALUES, *PHASE, *GRID]), values, max_size=3),
    grid=st.booleans(),
)
@example(changes={"cif": '"/dev/zero"'}, grid=False)
@example(changes={"cif": '"large.cif"'}, grid=False)
@example(changes={"instrument.file": '"pipe"'}, grid=False)
@example(changes={"samples": "100_000_000"}, grid=False)
@example(changes={"samples": "1_000_000_000_000"}, grid=False)
@example(changes={"cell.a": "{first = 2.0, last = 4.0, step = 1e-12}"}, grid=True)
@example(changes={"rows_per_chunk.kinematic": "10_000_000_000"}, grid=True)
@example(changes={"tof.start": "1e300"}, grid=False)
@example(changes={"tof.relative_step": "1e300"}, grid=False)
@example(changes={"tof.relative_step": "1e-999999999"}, grid=False)
@example(changes={"seed": "9" * 5000}, grid=False)
@example(changes={"name": '"' + "n" * 1_000_000 + '"'}, grid=False)
@example(changes={"exclude": "[" * 900}, grid=False)
@pytest.mark.filterwarnings("ignore")
def test_values(folder: Path, changes: dict[str, str], *, grid: bool) -> None:
    names = ("cell.a", "cell.c") if grid else ()
    phase = {k: v for k, v in PHASE.items() if not (grid and (k.startswith(("cell", "samples"))))}
    phase |= {k: GRID[k] for k in names}
    top = VALUES | ({"sampling": GRID["sampling"]} if grid else {})
    for key, value in changes.items():
        (top if key in VALUES else phase)[key] = value
    lines = [f"{key} = {value}" for key, value in sorted(top.items(), key=lambda kv: "." in kv[0])]
    lines += ["[[phases]]", *(f"{key} = {value}" for key, value in phase.items())]
    file = folder / "campaign.toml"
    file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    tracemalloc.start()
    began = time.process_time()
    try:
        campaign = load_campaign(file)
        assert len(campaign.samples) <= 3_500_000
        assert campaign.identity("kinematic", "1")
        assert campaign.grid.tof[-1] < 1.1e7
    except CampaignError as error:
        check_sentence(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - began < SECONDS
    assert peak < BYTES


@pytest.mark.parametrize("text", ["a." * 100_000 + "a = 1", 'x = "' + "y" * 200_000_000 + '"'])
def test_long_lines(tmp_path: Path, text: str) -> None:
    file = tmp_path / "long.toml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(CampaignError, match=r"1,000 characters|larger than 0\.5 MB"):
        load_campaign(file)
    assert time.process_time() - began < 1
