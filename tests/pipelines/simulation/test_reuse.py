"""Campaigns of which the store has a part: the rest is simulated, and the result is the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from distributed import LocalCluster

from bragg_data.campaign import BUILT_IN, Campaign, load_campaign
from bragg_data.simulation import gsas2
from bragg_data.simulation.gsas2 import Gsas2Options
from bragg_data.store.repository import Store
from bragg_data.store.reuse import find_reusable
from bragg_data.store.simulated import Writer, write_block
from bragg_data.store.verification import verify
from pipelines.cli.options import ClusterOptions
from pipelines.simulation.campaign import SimulationJob, simulate_campaign
from pipelines.simulation.simulators import SimulationError, build_simulator
from tests.fake_gsas2 import RecordingGsas2
from tests.small_store import simulate

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:Peaks of this instrument are narrow"),
]

HEAD = """
name = "grown"
seed = {seed}
[instrument]
file = "nomad_bank4.instprm"
[tof]
start = 9000.0
relative_step = 0.0012
points = 500
[rows_per_chunk]
gsas2 = 4
kinematic = 4
"""
CUBIC = """
[[phases]]
name = "cubic"
cif = "batio3_cubic.cif"
[phases.cell]
a = { first = 3.95, last = 4.05, step = 0.01 }
"""
TRIGONAL = """
[[phases]]
name = "trigonal"
cif = "batio3_trigonal.cif"
[phases.cell]
a = { first = 4.0, last = 4.02, step = 0.01 }
alpha = { first = 89.0, last = 89.6, step = 0.2 }
"""
TETRAGONAL = """
[[phases]]
name = "tetragonal"
cif = "batio3_tetragonal.cif"
[phases.cell]
a = { first = 3.98, last = 4.0, step = 0.01 }
c = { first = 4.03, last = 4.05, step = 0.01 }
"""
EXCLUDED = 'exclude = ["a = 3.98"]\n[phases.cell]'
N_CUBIC, N_TRIGONAL, N_TETRAGONAL = 11, 12, 9
VERSION = "1, fake"


@pytest.fixture(scope="module")
def cluster():
    """The address of a scheduler with a worker in this process, which a monkeypatch reaches."""
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        dashboard_address="127.0.0.1:0",
    ) as local:
        yield local.scheduler_address


class Bench:
    """A directory with CIFs, instrument file and the log of a replacement of GSAS-II."""

    def __init__(self, directory: Path, cluster: str, location: str | None) -> None:
        self.directory, self.cluster, self.location = directory, cluster, location
        for file in BUILT_IN.iterdir():
            if file.suffix in {".cif", ".instprm"}:
                shutil.copy(file, directory)

    def campaign(self, *phases: str, seed: int = 1) -> Campaign:
        path = self.directory / "grown.toml"
        path.write_text(HEAD.format(seed=seed) + "".join(phases), encoding="utf-8")
        return load_campaign(path)

    def store(self, name: str = "store") -> Store:
        return Store(self.directory / name, create=True)

    def simulate(
        self, campaign: Campaign, store: Store, *, limit: int | None = None, name="gsas2"
    ) -> tuple[str, int]:
        """Simulate a campaign; return its tag, and how many cells were simulated for it.

        A cell of each phase that is simulated is simulated to compare the two ways to call GSAS-II.
        """
        log = self.directory / "calls"
        log.unlink(missing_ok=True)
        options = Gsas2Options(self.location, pattern_seconds=60.0)
        where = ClusterOptions(self.cluster)
        job = SimulationJob(campaign, name, limit=limit, gsas2=options, cluster=where)
        try:
            tag = simulate_campaign(job, store).name
        finally:
            calls = log.read_text().splitlines() if log.exists() else []
            self.calls = len(calls)
        return tag, self.calls - len({call.split()[0] for call in calls})

    def check(self, campaign: Campaign, store: Store, tag: str, *, limit: int | None = None):
        """The contents are those of a run from scratch, here without a cluster."""
        fake = RecordingGsas2(
            str(self.directory), campaign.phases, campaign.instrument, campaign.grid.tof
        )
        dataset, scratch = store.open(tag), self.store(f"scratch-{tag}")
        with Writer(scratch, campaign, "gsas2", VERSION, limit=limit) as writer:
            cells = zip(writer.samples.phase.tolist(), writer.samples.cells.tolist(), strict=True)
            patterns = np.array([fake.scripting(code, cell, {}) for code, cell in cells])
            for block in writer.missing():
                rows = writer.rows(block)
                part = writer.samples[rows], patterns[rows]
                writer.commit([write_block(writer.fork(), writer.group, block, *part)])
            expected = scratch.open(writer.finish().name)
        assert verify(dataset) == expected.attrs["content_hash"]
        np.testing.assert_array_equal(dataset.intensity.values, patterns)


@pytest.fixture
def bench(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(gsas2, "_TARGET", "tests.fake_gsas2:RecordingGsas2")
    yield Bench(tmp_path, cluster, str(tmp_path))
    build_simulator.cache_clear()


def reused(store: Store, tag: str) -> list[tuple[str | None, int]]:
    """The data sets from which a tag's patterns were copied, and how many."""
    entries = json.loads(store.open(tag).attrs["reused_from"])
    assert all(entry["snapshot_id"] and entry["group"] == "grown" for entry in entries)
    return [(entry["tag"] or entry["branch"], entry["patterns"]) for entry in entries]


def test_an_added_structure_alone_is_simulated(bench, capsys):
    store = bench.store()
    first, calls = bench.simulate(bench.campaign(CUBIC, TRIGONAL), store)
    assert calls == N_CUBIC + N_TRIGONAL
    campaign = bench.campaign(CUBIC, TRIGONAL, TETRAGONAL)
    tag, calls = bench.simulate(campaign, store)
    assert calls == N_TETRAGONAL
    assert bench.calls == calls + 1  # the other phases are not checked again
    assert reused(store, tag) == [(first, N_CUBIC + N_TRIGONAL)]
    printed = capsys.readouterr().out
    assert "23 of 32 patterns are copied from grown-v1, 9 are simulated" in printed
    assert "for 9 patterns" in printed
    bench.check(campaign, store, tag)
    scratch, calls = bench.simulate(campaign, bench.store("scratch"))
    assert calls == N_CUBIC + N_TRIGONAL + N_TETRAGONAL
    expected = bench.store("scratch").open(scratch)
    assert store.open(tag).attrs["content_hash"] == expected.attrs["content_hash"]
    assert "reused_from" not in expected.attrs


def test_a_changed_structure_is_simulated_again(bench):
    store = bench.store()
    bench.simulate(bench.campaign(CUBIC, TETRAGONAL), store)
    cif = bench.directory / "batio3_cubic.cif"
    text = cif.read_text()
    cif.write_text("# the same structure, in another file\n" + text)
    campaign = bench.campaign(CUBIC, TETRAGONAL)
    tag, calls = bench.simulate(campaign, store)
    assert calls == N_CUBIC
    bench.check(campaign, store, tag)


def test_a_wider_range_adds_its_cells(bench):
    store = bench.store()
    bench.simulate(bench.campaign(CUBIC, TRIGONAL), store)
    campaign = bench.campaign(CUBIC.replace("4.05", "4.09"), TRIGONAL)
    tag, calls = bench.simulate(campaign, store)
    assert calls == 4
    bench.check(campaign, store, tag)


def test_more_samples_and_a_higher_limit(bench):
    store = bench.store()
    campaign = bench.campaign(CUBIC, TRIGONAL)
    bench.simulate(campaign, store, limit=9)
    tag, calls = bench.simulate(campaign, store, limit=18)
    assert calls == 9
    bench.check(campaign, store, tag, limit=18)
    # Fewer need nothing new, and the donor with the most patterns gives them.
    tag, calls = bench.simulate(campaign, store, limit=13)
    assert (calls, reused(store, tag)) == (0, [("grown-v2", 13)])
    bench.check(campaign, store, tag, limit=13)


def test_phases_in_another_order_and_under_another_name(bench):
    store = bench.store()
    bench.simulate(bench.campaign(CUBIC, TRIGONAL), store)
    campaign = bench.campaign(TRIGONAL.replace('"trigonal"', '"low"'), CUBIC, seed=2)
    tag, calls = bench.simulate(campaign, store)
    assert calls == 0
    bench.check(campaign, store, tag)


def test_two_donors(bench, capsys):
    store = bench.store()
    for phase in (CUBIC, TETRAGONAL):
        bench.simulate(bench.campaign(phase), store)
    campaign = bench.campaign(CUBIC, TETRAGONAL, TRIGONAL)
    tag, calls = bench.simulate(campaign, store)
    assert calls == N_TRIGONAL
    assert reused(store, tag) == [("grown-v1", N_CUBIC), ("grown-v2", N_TETRAGONAL)]
    assert "copied from grown-v1 (11) and grown-v2 (9), 12 are" in capsys.readouterr().out
    bench.check(campaign, store, tag)


@pytest.mark.parametrize(
    ("old", "new"),
    [("relative_step = 0.0012", "relative_step = 0.00121"), ("seed = 1", "seed = 1\n[broadening]")],
)
def test_another_grid_or_broadening_shares_nothing(bench, old, new):
    store = bench.store()
    bench.simulate(bench.campaign(CUBIC), store)
    path = bench.directory / "grown.toml"
    text = path.read_text().replace(old, new)
    path.write_text(text.replace("[broadening]", "[broadening]\nmicrostrain = 900.0"))
    _, calls = bench.simulate(load_campaign(path), store)
    assert calls == N_CUBIC


def test_other_simulators_and_versions_give_nothing(bench):
    store, campaign = bench.store(), bench.campaign(CUBIC, TETRAGONAL)
    simulate(store, bench.campaign(CUBIC), "fast")
    tag, calls = bench.simulate(campaign, store)
    assert calls == N_CUBIC + N_TETRAGONAL
    assert "reused_from" not in store.open(tag).attrs
    by = {"simulator": "gsas2", "simulator_version": VERSION, "call_path": "memory"}
    smaller = bench.campaign(CUBIC)
    assert find_reusable(store, smaller, by).copied
    for other in ({"simulator_version": "2, fake"}, {"call_path": "scripting"}):
        assert not find_reusable(store, smaller, by | other).copied


def test_the_fast_simulator_simulates_everything(bench):
    """The last bit of its patterns depends on how many are computed together."""
    store = bench.store()
    bench.simulate(bench.campaign(CUBIC), store, name="kinematic")
    campaign = bench.campaign(CUBIC, TETRAGONAL)
    tag, _ = bench.simulate(campaign, store, name="kinematic")
    simulate(bench.store("scratch"), campaign, "scratch")
    expected = bench.store("scratch").open("scratch").attrs["content_hash"]
    assert store.open(tag).attrs["content_hash"] == expected
    assert "reused_from" not in store.open(tag).attrs


def test_what_is_unfinished_is_copied_and_resumed(bench):
    """A cell fails: the run completes later, and a campaign without the cell copies the others."""
    store = bench.store()
    bench.simulate(bench.campaign(TRIGONAL), store)
    failing = bench.directory / "failing"
    failing.write_text("3.98")
    campaign = bench.campaign(TRIGONAL, CUBIC)
    with pytest.raises(SimulationError, match=r"1 of 6 blocks failed.*no reflections in range"):
        bench.simulate(campaign, store)
    (unfinished,) = store.unfinished()
    assert unfinished.failed_blocks == 1
    (row,) = np.flatnonzero(campaign.samples.cells[:, 0] == 3.98)
    block = campaign.samples.phase[4 * (row // 4) : 4 * (row // 4 + 1)]
    lost = int((block == 1).sum()) - 1  # cubic ones that shared the block with the failing one
    assert lost
    without = bench.campaign(TRIGONAL, CUBIC.replace("[phases.cell]", EXCLUDED))
    tag, calls = bench.simulate(without, store)
    assert calls == lost
    sources = dict(reused(store, tag))
    assert set(sources) == {"grown-v1", unfinished.branch}
    assert sum(sources.values()) == N_TRIGONAL + N_CUBIC - 1 - lost
    bench.check(without, store, tag)
    failing.unlink()
    tag, calls = bench.simulate(campaign, store)
    assert calls == 1
    assert sum(dict(reused(store, tag)).values()) == N_TRIGONAL + lost
    bench.check(campaign, store, tag)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_donor_costs_time_alone(bench, capsys, damage):
    store = bench.store()
    bench.simulate(bench.campaign(CUBIC), store)
    chunks = sorted((store.path / "chunks").iterdir(), key=lambda path: -path.stat().st_size)
    if damage == "missing":
        chunks[0].unlink()
    else:
        content = bytearray(chunks[0].read_bytes())
        content[len(content) // 2] ^= 1
        chunks[0].write_bytes(content)
    campaign = bench.campaign(CUBIC, TETRAGONAL)
    tag, _ = bench.simulate(campaign, store)
    copied = dict(reused(store, tag)).get("grown-v1", 0)
    assert 0 < copied < N_CUBIC
    assert bench.calls == 1 + N_CUBIC + N_TETRAGONAL - copied  # the new phase is checked, too
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{N_CUBIC - copied} patterns of grown-v1 are gone or damaged" in printed
    bench.check(campaign, store, tag)


def test_gsas2_itself_gives_the_same_bits(tmp_path, cluster, gsas2_location):
    bench = Bench(tmp_path, cluster, gsas2_location)
    store, scratch = bench.store(), bench.store("scratch")
    bench.simulate(bench.campaign(CUBIC), store)
    campaign = bench.campaign(CUBIC, TETRAGONAL)
    tag, _ = bench.simulate(campaign, store)
    assert reused(store, tag) == [("grown-v1", N_CUBIC)]
    expected, _ = bench.simulate(campaign, scratch)
    assert verify(store.open(tag)) == scratch.open(expected).attrs["content_hash"]
    build_simulator.cache_clear()
