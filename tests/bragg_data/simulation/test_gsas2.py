"""GSAS-II in its own process. What surrounds it is tested without it, with another occupant."""

import gc
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gemmi
import numpy as np
import psutil
import pytest

from bragg_data.campaign import BUILT_IN, Samples, load_campaign
from bragg_data.crystallography.cell import CrystalError, CrystalSystem
from bragg_data.crystallography.structure import Phase, read_phase
from bragg_data.instrument.instprm import TofGrid, read_instrument
from bragg_data.simulation import gsas2, gsas2_process, kinematic
from bragg_data.simulation.gsas2 import Gsas2Error, Gsas2Options, PatternsError, Simulator
from bragg_data.simulation.gsas2_process import commit_of_repository, operations_of, setting
from bragg_data.store import schema
from bragg_data.store.repository import Store, open_dataset
from bragg_data.store.simulated import BlockResult, Writer, write_block
from bragg_data.store.verification import verify
from pipelines.simulation.simulators import build_simulator, recipe_of, simulate_block
from tests import fake_gsas2
from tests.bragg_data.crystallography.test_published_structures import cif as published
from tests.servers import dask_workers, samples_done
from tests.tiny_campaign import tiny_campaign

DATA = Path(__file__).parents[2] / "data"
STRUCTURES = DATA / "structures"
PROJECT = Path(__file__).parents[3]


INSTALLED = Gsas2Options(os.environ.get("BRAGG_GSAS2_PATH"))


def installed() -> bool:
    try:
        gsas2.installed_version(INSTALLED.location)
    except Gsas2Error:
        return False
    return True


needs_gsas2 = [
    pytest.mark.gsas2,
    pytest.mark.skipif(not installed(), reason="GSAS-II (conda package gsas2pkg) is not installed"),
]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A directory for temporary files that nothing may be left in, nor in the working directory."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    yield directory
    build_simulator.cache_clear()
    gc.collect()  # the traceback of an error may hold a simulator
    assert list(directory.glob("bragg-*")) == []  # Dask keeps a directory of its own
    assert list(working.iterdir()) == []


def simulator_of(campaign, **options) -> Simulator:
    setup = campaign.phases, campaign.instrument, campaign.grid
    broadening = {"size": campaign.size, "microstrain": campaign.microstrain}
    return Simulator(*setup, **broadening, options=Gsas2Options(**options))


def gsas2_of(campaign, **options) -> Simulator:
    return simulator_of(campaign, location=INSTALLED.location, **options)


def fast(campaign) -> kinematic.Simulator:
    setup = campaign.phases, campaign.instrument, campaign.grid
    return kinematic.Simulator(*setup, size=campaign.size, microstrain=campaign.microstrain)


# -- without GSAS-II -----------------------------------------------------------------------------


@pytest.fixture
def occupant(monkeypatch):
    """Let another object live in the process in place of GSAS-II."""
    monkeypatch.setattr(gsas2, "_TARGET", "tests.fake_gsas2:FakeGsas2")


occupied = pytest.mark.usefixtures("occupant")


def cubes(*lengths: float) -> Samples:
    n = len(lengths)
    cells = np.array([[a, a, a, 90, 90, 90] for a in lengths], dtype=float)
    return Samples(np.zeros(n, np.int8), np.zeros(n, np.int8), cells)


@occupied
def test_patterns_come_back_in_order_and_quietly(tmp_path, scratch, capfd):
    simulator = simulator_of(tiny_campaign(tmp_path))
    samples = cubes(3.96, 3.95)
    patterns = simulator.simulate(samples.phase, samples.cells)
    assert patterns.dtype == np.float32
    np.testing.assert_array_equal(patterns[:, 0], np.float32([3.96, 3.95]))
    (directory,) = scratch.iterdir()
    assert directory.name.startswith("bragg-gsas2-")
    assert (directory / "rubbish.gpx").exists()
    simulator.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@occupied
def test_failures_are_reported_pattern_by_pattern(tmp_path):
    samples = cubes(3.95, fake_gsas2.SLOW, fake_gsas2.FAILING, fake_gsas2.CRASHING, 3.96)
    simulator = simulator_of(tiny_campaign(tmp_path), pattern_seconds=2.0)
    with pytest.raises(PatternsError, match=r"^3 patterns failed; the first, number 1: ") as caught:
        simulator.simulate(samples.phase, samples.cells)
    simulator.close()
    assert caught.value.reasons[1] == "it took longer than 2 s to answer"
    assert caught.value.reasons[2] == "no reflections in range"
    assert "its process was ended by SIGABRT; its last words: noise" in caught.value.reasons[3]
    assert set(caught.value.reasons) == {1, 2, 3}


@occupied
def test_a_crash_costs_a_second_try(tmp_path):
    simulator = simulator_of(tiny_campaign(tmp_path), location=str(tmp_path))
    samples = cubes(3.95, fake_gsas2.CRASHING_ONCE)
    patterns = simulator.simulate(samples.phase, samples.cells)
    assert (tmp_path / "crashed").exists()
    np.testing.assert_array_equal(patterns[:, 0], np.float32([3.95, fake_gsas2.CRASHING_ONCE]))
    simulator.close()


@occupied
def test_threads_take_turns(tmp_path):
    simulator = simulator_of(tiny_campaign(tmp_path))
    lengths = np.round(3.5 + 0.001 * np.arange(80), 3)

    def height(length: float) -> float:
        samples = cubes(length)
        return float(simulator.simulate(samples.phase, samples.cells)[0, 0])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(height, lengths)) == np.float32(lengths).tolist()
    simulator.close()


@occupied
def test_a_death_at_the_start_costs_a_try_and_not_the_campaign(tmp_path, monkeypatch):
    campaign = tiny_campaign(tmp_path)
    store = Store(tmp_path / "store", create=True)
    recipe = recipe_of(campaign, "gsas2", "1, fake")
    with Writer(store, campaign, "gsas2", "1, fake") as writer:
        samples = writer.samples[writer.rows(0)]
        monkeypatch.setattr(gsas2, "_TARGET", "tests.fake_gsas2:DyingGsas2")
        result = simulate_block(recipe, writer.group, 0, samples, writer.fork())
        assert isinstance(result, BlockResult)
        assert (result.status == schema.FAILED).all()
        assert "does not run: its process ended" in result.reason
        assert not result.final
        monkeypatch.setattr(gsas2, "_TARGET", "tests.fake_gsas2:FakeGsas2")
        result = simulate_block(recipe, writer.group, 0, samples, writer.fork())
        assert (result.status == schema.DONE).all()


@occupied
def test_failed_patterns_are_recorded_in_the_store(tmp_path):
    """Then the block is still to be done, and doing it well makes the data set complete."""
    campaign = tiny_campaign(tmp_path)  # its cubic cells are at 3.95, 3.955 … 4.05
    options = Gsas2Options(pattern_seconds=2.0)
    recipe = recipe_of(campaign, "gsas2", "1, fake", options)
    store = Store(tmp_path / "store", create=True)
    good = np.setdiff1d(np.arange(67), np.flatnonzero(campaign.samples.cells[:, 0] > 4.007))
    samples = campaign.samples[np.concatenate([good[:3], [0]])]
    samples.cells[3] = [fake_gsas2.FAILING] * 3 + [90] * 3
    samples.phase[3] = samples.crystal_system[3] = 0
    campaign.__dict__["samples"] = samples
    with Writer(store, campaign, "gsas2", "1, fake", provenance={"call_path": "memory"}) as writer:
        result = simulate_block(recipe, writer.group, 0, writer.samples, writer.fork())
        assert result.status.tolist() == [schema.PENDING] * 3 + [schema.FAILED]
        assert result.final  # it would refuse that cell again
        writer.commit([result])
    with Writer(
        store, campaign, "gsas2", "1, fake", provenance={"call_path": "scripting"}
    ) as writer:
        assert writer.missing() == [0]
        assert writer.failures == {
            0: "cell (4.04, 4.04, 4.04, 90, 90, 90): no reflections in range"
        }
        samples.cells[3, :3] = 4.0
        result = simulate_block(recipe, writer.group, 0, writer.samples, writer.fork())
        assert (result.status == schema.DONE).all()
        writer.commit([result])
        assert writer.failures == {}
        # Nobody's patterns are none: that is seen before they get a tag.
        with pytest.raises(schema.SchemaError, match="have peaks where their cell puts none"):
            writer.finish()
        session = store.repository.readonly_session(branch=writer.branch)
    dataset = open_dataset(session, "tiny")
    assert (dataset.status == schema.DONE).all()
    assert dataset.attrs["call_path"] == "memory scripting"
    assert dataset.attrs["simulator_version"] == "1, fake"


@occupied
def test_wrong_cells_are_refused_before_anything_starts(tmp_path, scratch):
    simulator = simulator_of(tiny_campaign(tmp_path))
    with pytest.raises(CrystalError, match="b is 5 and must equal a"):
        simulator.simulate(np.array([0]), np.array([[4.0, 5, 4, 90, 90, 90]]))
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@occupied
def test_check_measures_the_difference_of_the_two_call_paths(tmp_path):
    simulator = simulator_of(tiny_campaign(tmp_path), pattern_seconds=2.0)
    check = simulator.check(0, cubes(4.0).cells[0])
    assert check.difference == pytest.approx(1e-3, rel=0.01)
    assert check.call_path == "scripting"
    assert min(check.memory_seconds, check.scripting_seconds) > 0
    with pytest.raises(Gsas2Error, match="fails on phase 'cubic': it took longer than"):
        simulator.check(0, cubes(fake_gsas2.SLOW).cells[0])
    simulator.close()


def test_missing_gsas2_is_a_single_message(tmp_path):
    with pytest.raises(Gsas2Error) as caught:
        gsas2.installed_version(str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"There is no GSAS-II in {tmp_path}. Install the conda package gsas2")
    for expected in ("--gsas2-path", "BRAGG_GSAS2_PATH", "--simulator kinematic"):
        assert expected in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("from nowhere import pypowder", "ModuleNotFoundError: No module named 'nowhere'"),
        ("raise SystemExit('no binaries')", "SystemExit: no binaries"),
        ("import os; os._exit(7)", "ended with exit code 7"),
    ],
)
def test_broken_gsas2_is_a_single_message(tmp_path, text, reason):
    package = tmp_path / "GSASII"
    package.mkdir()
    for name in ("__init__", "GSASIIscriptable"):
        (package / f"{name}.py").touch()
    (package / "GSASIIpath.py").write_text(text)
    with pytest.raises(Gsas2Error, match=reason) as caught:
        gsas2.installed_version(str(package))  # the package itself may be named as well
    assert str(caught.value).endswith("none of it with --simulator kinematic.")


def test_commit_of_a_checkout_is_read_without_git(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    assert commit_of_repository(tmp_path / ".git") == ""
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    expected = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    for command in (["status"], ["pack-refs", "--all"], ["checkout", "-q", "--detach"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
        assert commit_of_repository(tmp_path / ".git") == expected.stdout.strip()


def test_first_origin_choice_is_moved_to_the_centre():
    """By what gemmi knows of both choices, for every space group that has two."""
    groups = [group for group in gemmi.spacegroup_table() if group.ext == "1"]
    assert len(groups) > 20
    for group in groups:
        phase = read_phase(STRUCTURES / "silicon_origin1.cif", "silicon")
        object.__setattr__(phase, "space_group", group.xhm())
        symbol, shift = setting(phase)
        second = gemmi.find_spacegroup_by_name(f"{symbol}:2").operations()
        moved = operations_of(group.operations(), shift)
        assert moved == operations_of(second, np.zeros(3)), group.xhm()


# -- with GSAS-II --------------------------------------------------------------------------------


def largest_difference(phase: Phase) -> float:
    """Between the patterns of the fast simulator and of GSAS-II, over the maximum."""
    campaign = load_campaign("batio3-nomad")
    grid = TofGrid(4000.0, campaign.grid.relative_step, 1500)
    what = [phase], campaign.instrument, grid
    simulator = Simulator(*what, size=1.0, microstrain=1000.0, options=INSTALLED)
    expected = simulator.simulate(np.array([0]), np.array([phase.cell]))[0]
    simulator.close()
    fast = kinematic.Simulator(*what, size=1.0, microstrain=1000.0)
    pattern = fast.simulate(np.array([0]), np.array([phase.cell]))[0]
    return float(np.abs(pattern - expected).max() / expected.max())


class TestGsas2:
    pytestmark = needs_gsas2

    @pytest.fixture
    def simulator(self):
        simulator = gsas2_of(load_campaign("batio3-nomad"))
        yield simulator
        simulator.close()

    def test_version_names_the_commit(self, simulator):
        assert gsas2.installed_version(INSTALLED.location) == simulator.version
        assert simulator.version.startswith(f"{gsas2_process.VERSION}, GSAS-II ")
        assert len(simulator.version.split()) == 5

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    @pytest.mark.parametrize("call_path", ["memory", "scripting"])
    def test_reference_patterns(self, call_path):
        campaign = load_campaign("batio3-nomad")
        with np.load(DATA / "gsas2_reference_nomad_bank4.npz") as file:
            reference = {name: file[name] for name in file}
        phase = np.array([CrystalSystem[str(s)].value for s in reference["crystal_system"]])
        cells = np.empty((len(phase), 6))
        for code, of_campaign in enumerate(campaign.phases):
            free = of_campaign.lattice.free_parameters
            rows = phase == code
            cells[rows] = of_campaign.lattice.cells(
                np.stack([reference[name][rows] for name in free], axis=1)
            )
        simulators = [gsas2_of(campaign, call_path=call_path) for _ in range(2)]
        parts = [np.arange(36)[k::2] for k in range(2)]
        with ThreadPoolExecutor(2) as pool:
            patterns_of_parts = pool.map(
                lambda simulator, rows: simulator.simulate(phase[rows], cells[rows]),
                simulators,
                parts,
            )
        for rows, patterns in zip(parts, patterns_of_parts, strict=True):
            expected = reference["y"][rows]
            difference = np.abs(patterns - expected).max(axis=1) / expected.max(axis=1)
            assert difference.max() < 1e-5
        for simulator in simulators:
            simulator.close()
        assert len(cells) == 36

    def test_both_call_paths_agree(self, simulator):
        campaign = load_campaign("batio3-nomad")
        check = simulator.check(0, campaign.phases[0].cell)
        assert check.difference == 0
        assert check.call_path == "memory"

    def test_every_vector_means_what_it_means_in_the_fast_simulator(self, tmp_path):
        campaign = tiny_campaign(tmp_path)
        samples = campaign.samples[:6]
        vectors = {
            "u_scale": np.linspace(0.7, 1.4, 6),
            "size": np.linspace(0.4, 2.0, 6),
            "microstrain": np.linspace(2500.0, 400.0, 6),
            "tzero": np.linspace(0.0, 9.0, 6),
            "difc": 9496.17 * np.linspace(0.999, 1.001, 6),
        }
        simulator = gsas2_of(campaign)
        nominal = simulator.simulate(samples.phase, samples.cells)
        for names in ([name] for name in vectors):
            chosen = {name: vectors[name] for name in names}
            patterns = simulator.simulate(samples.phase, samples.cells, **chosen)
            expected = fast(campaign).simulate(samples.phase, samples.cells, **chosen)
            top = patterns.max(axis=1, keepdims=True)
            assert (np.abs(patterns - expected) / top).max() < 1e-3, names
            assert (np.abs(patterns - nominal) / top).max() > 1e-3, names
        again = simulator.simulate(samples.phase, samples.cells)
        np.testing.assert_array_equal(again, nominal)  # nothing of the vectors stays behind
        simulator.close()

    def test_all_crystal_systems(self):
        campaign = load_campaign(STRUCTURES / "structures.toml")
        simulator = gsas2_of(campaign)
        for code in range(len(campaign.phases)):
            rows = np.flatnonzero(campaign.samples.phase == code)
            sample = campaign.samples[rows]
            patterns = simulator.simulate(sample.phase, sample.cells)
            expected = fast(campaign).simulate(sample.phase, sample.cells)
            difference = np.abs(patterns - expected).max(axis=1) / patterns.max(axis=1)
            assert difference.max() < 1e-3, campaign.phases[code].name
        simulator.close()

    @pytest.mark.parametrize(
        ("cif", "like"), [("silicon_origin1", "silicon"), ("batio3_it160", None)]
    )
    def test_settings_that_gsas2_reads_otherwise(self, tmp_path, cif, like):
        """Another origin, and a table number that would mean hexagonal axes."""
        campaign = tiny_campaign(tmp_path)
        phases = [read_phase(STRUCTURES / f"{cif}.cif", "phase")]
        if like:
            phases.append(read_phase(STRUCTURES / f"{like}.cif", "like"))
        else:
            phases.append(campaign.phases[2])
        cells = np.array([phase.cell for phase in phases])
        broadening = {"size": 1.0, "microstrain": 1000.0}
        simulator = Simulator(
            phases, campaign.instrument, campaign.grid, **broadening, options=INSTALLED
        )
        patterns = simulator.simulate(np.arange(2), cells)
        assert patterns[1].max() > 100 * patterns[1].min()
        np.testing.assert_allclose(patterns[0], patterns[1], rtol=1e-5)
        simulator.close()

    @pytest.mark.parametrize(
        ("symbol", "words"), [("P 21 n m", "reads as"), ("I 2 2 2a", "does not know")]
    )
    def test_settings_that_it_does_not_know_are_refused(self, symbol, words):
        campaign = load_campaign("batio3-nomad")
        phase = campaign.phases[0]
        object.__setattr__(phase, "space_group", symbol)
        simulator = Simulator(
            [phase], campaign.instrument, campaign.grid, size=1, microstrain=1e3, options=INSTALLED
        )
        with pytest.raises(
            Gsas2Error, match=f"has the space group {symbol}, which GSAS-II {words}"
        ):
            simulator.simulate(np.array([0]), np.array([phase.cell]))
        simulator.close()

    def test_special_positions_need_digits(self, tmp_path):
        text = (STRUCTURES / "hydroxyapatite.cif").read_text()
        campaign = tiny_campaign(tmp_path)
        phase = read_phase(text, "apatite")
        assert len(phase.symbols) == 48
        object.__setattr__(phase, "symbols", phase.symbols[:-1])
        simulator = Simulator(
            [phase], campaign.instrument, campaign.grid, size=1, microstrain=1e3, options=INSTALLED
        )
        with pytest.raises(Gsas2Error, match="47 atoms in the cell, but GSAS-II counts 48"):
            simulator.simulate(np.array([0]), np.array([phase.cell]))
        simulator.close()

    def test_an_instrument_file_may_leave_out_what_is_zero(self, tmp_path):
        campaign = tiny_campaign(tmp_path)
        keys = ("Type", "2-theta", "difC", "alpha", "beta-0", "sig-1")
        lines = campaign.instprm.splitlines()
        text = "\n".join(line for line in lines if line.startswith(("#", *keys)))
        instrument = read_instrument(text)
        assert instrument.tzero == 0
        sample = campaign.samples[:2]
        broadening = {"size": 1.0, "microstrain": 1000.0}
        what = campaign.phases, instrument.with_parameters(sig_2=119.951), campaign.grid
        simulator = Simulator(*what, **broadening, options=INSTALLED)
        patterns = simulator.simulate(sample.phase, sample.cells)
        simulator.close()
        expected = kinematic.Simulator(*what, **broadening).simulate(sample.phase, sample.cells)
        assert (np.abs(patterns - expected).max(axis=1) / patterns.max(axis=1)).max() < 1e-3

    def test_a_bank_on_the_other_side_of_the_beam(self, tmp_path):
        campaign = tiny_campaign(tmp_path)
        sample = campaign.samples[:2]
        broadening = {"size": 1.0, "microstrain": 1000.0}
        angle = -campaign.instrument.two_theta
        bank = campaign.instrument.with_parameters(two_theta=angle)
        what = campaign.phases, bank, campaign.grid
        simulator = Simulator(*what, **broadening, options=INSTALLED)
        patterns = simulator.simulate(sample.phase, sample.cells)
        simulator.close()
        expected = kinematic.Simulator(*what, **broadening).simulate(sample.phase, sample.cells)
        assert (np.abs(patterns - expected).max(axis=1) / patterns.max(axis=1)).max() < 5e-4

    def test_as_many_points_as_a_campaign_may_have(self, tmp_path):
        campaign = tiny_campaign(tmp_path)
        grid = TofGrid(11000.0, 1e-5, 30_000)
        what = campaign.phases, campaign.instrument, grid
        simulator = Simulator(*what, size=1.0, microstrain=1000.0, options=INSTALLED)
        sample = campaign.samples[:1]
        check = simulator.check(int(sample.phase[0]), sample.cells[0])
        simulator.close()
        assert check.difference == 0

    def test_a_resonance_is_no_obstacle(self, tmp_path):
        text = (STRUCTURES / "baddeleyite.cif").read_text().replace("Zr", "Gd")
        phase = read_phase(text, "phase")
        campaign = tiny_campaign(tmp_path)
        what = [phase], campaign.instrument, campaign.grid
        simulator = Simulator(*what, size=1.0, microstrain=1000.0, options=INSTALLED)
        pattern = simulator.simulate(np.array([0]), np.array([phase.cell]))
        simulator.close()
        assert pattern.max() > 0
        unknown = campaign.instrument.with_parameters(flight_path=0.0)
        simulator = Simulator(
            [phase], unknown, campaign.grid, size=1.0, microstrain=1000.0, options=INSTALLED
        )
        with pytest.raises(Gsas2Error, match="lacks the flight path"):
            simulator.simulate(np.array([0]), np.array([phase.cell]))
        simulator.close()

    @pytest.mark.parametrize(
        ("symbol", "limit"),
        [("Er", 1e-3), ("Gd", 5e-3), ("Yb", 1.2e-2), ("Eu", 2e-2), ("Sm", 3.5e-2), ("Lu", 7e-3)],
    )
    @pytest.mark.filterwarnings("ignore:Scattering lengths of")
    def test_resonant_elements_are_those_of_the_fast_simulator(self, symbol, limit):
        """Up to GSAS-II's Breit-Wigner terms, which are fitted to Lynn & Seeger's tables."""
        text = (STRUCTURES / "baddeleyite.cif").read_text().replace("Zr", symbol)
        assert largest_difference(read_phase(text, "phase")) < limit

    def test_an_isotope_is_that_of_gsas2(self):
        assert largest_difference(read_phase(published("lab6"), "lab6")) < 1e-4

    def test_time_limit(self):
        campaign = load_campaign("batio3-nomad")
        simulator = gsas2_of(campaign, pattern_seconds=0.2)
        sample = campaign.samples[:1]
        with pytest.raises(PatternsError, match=r"took longer than 0.2 s"):
            simulator.simulate(sample.phase, sample.cells)
        simulator.options = INSTALLED
        assert np.isfinite(simulator.simulate(sample.phase, sample.cells)).all()
        simulator.close()

    def test_the_user_s_settings_of_gsas2_do_not_count(self, tmp_path, monkeypatch):
        """Its windows can be set to use several processes."""
        home = tmp_path / "home"
        (home / ".GSASII").mkdir(parents=True)
        (home / ".GSASII" / "config.ini").write_text(
            "[GUI settings]\nMultiprocessing_cores = 4\ndebug = True\nShow_timing = True\n"
        )
        monkeypatch.setenv("HOME", str(home))
        campaign = tiny_campaign(tmp_path)
        sample = campaign.samples[:1]
        simulator = gsas2_of(campaign)
        patterns = simulator.simulate(sample.phase, sample.cells)
        simulator.close()
        monkeypatch.undo()
        assert np.isfinite(patterns).all()
        assert [path.name for path in (home / ".GSASII").iterdir()] == ["config.ini"]

    @pytest.mark.slow
    @pytest.mark.slurm
    def test_campaign_on_slurm_equals_serial_though_a_worker_dies(self, tmp_path, slurm):
        """Seven structures in blocks of two patterns; the killed worker takes GSAS-II along."""
        text = (STRUCTURES / "structures.toml").read_text()
        text = text.replace("[[phases]]", "[rows_per_chunk]\ngsas2 = 2\n\n[[phases]]", 1)
        text = text.replace("../../../bragg_data/campaigns", str(BUILT_IN))
        text = text.replace('cif = "', f'cif = "{STRUCTURES}/')
        toml = tmp_path / "structures.toml"
        toml.write_text(text)
        campaign = load_campaign(toml)

        serial = Store(tmp_path / "serial", create=True)
        simulator = gsas2_of(campaign)
        with Writer(serial, campaign, "gsas2", simulator.version) as writer:
            for block in writer.missing():
                samples = writer.samples[writer.rows(block)]
                patterns = simulator.simulate(samples.phase, samples.cells)
                fork = writer.fork()
                writer.commit([write_block(fork, writer.group, block, samples, patterns)])
            writer.finish()
        simulator.close()

        store = tmp_path / "store"
        options = "--cluster slurm --jobs 2:2 --cores 1 --walltime 01:00:00 --host 127.0.0.1"
        options += " --directive --exclusive"
        command = [sys.executable, "-m", "pipelines.simulate", "--campaign", toml, "--store", store]
        command += [*options.split(), "--memory", "1 GB", "--shared-directory", slurm]
        command += ["--environment", f"TMPDIR={tempfile.gettempdir()}"]
        process = subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while samples_done(store) < 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        nannies = [
            candidate
            for candidate in psutil.process_iter(["cmdline"])
            if "distributed.cli.dask_worker" in (candidate.info["cmdline"] or ())
        ]
        workers = [worker for nanny in nannies for worker in dask_workers(nanny)]
        assert len(workers) == 2
        workers[0].kill()
        out, err = process.communicate(timeout=280)
        assert (process.returncode, err) == (0, "")
        assert "Simulator auto is gsas2: every worker" in out
        dataset = Store(store).open("structures-v1")
        assert verify(dataset) == serial.open("structures-v1").attrs["content_hash"]
        assert dataset.attrs["call_path"] == "memory"
