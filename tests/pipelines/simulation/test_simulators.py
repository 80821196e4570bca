"""The choice of a simulator, without GSAS-II, whether it is installed or not."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bragg_data.simulation import gsas2, kinematic
from bragg_data.simulation.gsas2 import Gsas2Options
from bragg_data.store.repository import DataSet, Store, StoreError
from bragg_data.store.simulated import Writer, write_block
from bragg_data.store.verification import verify
from pipelines import simulate
from pipelines.simulation.simulators import (
    Probe,
    SimulationError,
    build_simulator,
    check_call_paths,
    check_resume,
    choose,
    common_version,
    confirm,
    gsas2_options,
    recipe_of,
    simulate_samples,
    simulator_of_data_sets,
)
from tests.tiny_campaign import tiny_campaign, tiny_patterns, write_campaign

PROJECT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:Peaks of this instrument are narrow")
THEIRS = "1, GSAS-II 9999 v9.9.9 0123abcd"


@pytest.fixture
def nowhere(tmp_path):
    """A directory without GSAS-II."""
    directory = tmp_path / "nowhere"
    directory.mkdir()
    return directory


@pytest.fixture
def broken(tmp_path):
    """A package that has GSAS-II's name and cannot be imported."""
    package = tmp_path / "broken" / "GSASII"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "GSASIIscriptable.py").touch()
    (package / "GSASIIpath.py").write_text("from . import pypowder\n")
    return package.parent


def begin(store: Store, campaign, simulator: str, version: str) -> None:
    """Write the first block of a data set and stop."""
    with Writer(store, campaign, simulator, version) as writer:
        samples = writer.samples[writer.rows(0)]
        recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
        intensity = simulate_samples(recipe, samples)
        writer.commit([write_block(writer.fork(), writer.group, 0, samples, intensity)])


@pytest.mark.cluster
def test_auto_is_kinematic_if_a_worker_has_no_gsas2(tmp_path, nowhere, command):
    toml, store = write_campaign(tmp_path), tmp_path / "store"
    place = "--campaign", toml, "--store", store
    code, out, err = command(simulate.app, *place, "--workers", 2, "--gsas2-path", nowhere)
    assert (code, err) == (0, "")
    because = rf"Simulator auto is kinematic, .* because on \S+ There is no GSAS-II in {nowhere}\n"
    assert re.search(because, out)
    assert re.search(r"Estimate: \S+ core-hours for 67 patterns", out)
    assert Store(store).open("tiny-v1").attrs["simulator"] == "kinematic"
    _, out, _ = command(simulate.app, *place)
    assert "auto is kinematic, with which this campaign was begun" in out
    assert "in the store already, as tiny-v1" in out


@pytest.mark.cluster
def test_missing_gsas2_is_a_single_sentence(tmp_path, nowhere, command):
    toml, store = write_campaign(tmp_path), tmp_path / "store"
    place = "--campaign", toml, "--store", store, "--workers", 1
    code, _, err = command(simulate.app, *place, "--simulator", "gsas2", "--gsas2-path", nowhere)
    assert code == 2
    message = (
        rf"Error: On worker \S+: There is no GSAS-II in {nowhere}\. .*--simulator kinematic.*\n"
    )
    assert re.fullmatch(message, err)
    assert Store(store).unfinished() == []


@pytest.mark.slow
def test_broken_gsas2_is_a_single_sentence(tmp_path, broken):
    campaign = tiny_campaign(tmp_path)
    options = Gsas2Options(str(broken))
    with pytest.raises(SimulationError, match=r"^The GSAS-II at .* is broken .*pypowder"):
        choose("gsas2", campaign, campaign.samples, options)
    assert choose("auto", campaign, campaign.samples, options)[0].simulator == "kinematic"


@pytest.mark.cluster
def test_resume_with_another_simulator_is_refused(tmp_path, command):
    toml, campaign = write_campaign(tmp_path), tiny_campaign(tmp_path)
    store = Store(tmp_path / "store", create=True)
    begin(store, campaign, "kinematic", kinematic.VERSION)
    place = "--campaign", toml, "--store", store.path
    code, _, err = command(simulate.app, *place, "--simulator", "gsas2")
    assert code == 2
    assert re.fullmatch(
        r"Error: This campaign was begun with the simulator kinematic \(1\), which has done 8 of "
        r"67 patterns; gsas2 cannot resume it.*Use --simulator kinematic, or "
        r"another --store\.\n",
        err,
    )
    code, out, err = command(simulate.app, *place, "--workers", 1)
    assert (code, err) == (0, "")
    assert "Simulator auto is kinematic, with which this campaign was begun" in out
    assert "Resuming: 8 patterns are there, 8 blocks are missing" in out
    verify(store.open("tiny-v1"))


def test_kinematic_does_not_resume_gsas2(tmp_path):
    campaign = tiny_campaign(tmp_path)
    store = Store(tmp_path / "store", create=True)
    begin(store, campaign, "gsas2", THEIRS)
    known = store.data_sets_of(campaign)
    assert [(s.simulator, s.version, s.tag) for s in known] == [("gsas2", THEIRS, None)]
    assert (known[0].done, known[0].total) == (16, 67)
    with pytest.raises(SimulationError, match=r"begun with the simulator gsas2 .*16 of 67"):
        simulator_of_data_sets(known, "kinematic")
    for requested in ("auto", "gsas2"):
        assert simulator_of_data_sets(known, requested) == "gsas2"
    check_resume(known, recipe_of(campaign, "gsas2", THEIRS))
    with pytest.raises(SimulationError, match=r"the workers have 1, GSAS-II 8888, .*would mix"):
        check_resume(known, recipe_of(campaign, "gsas2", "1, GSAS-II 8888"))
    assert store.data_sets_of(campaign, 20) == []  # fewer samples are another data set


def test_each_simulator_has_its_tag(tmp_path):
    campaign = tiny_campaign(tmp_path)
    store = Store(tmp_path / "store", create=True)
    for simulator, version in (("kinematic", "1"), ("gsas2", THEIRS)):
        with Writer(store, campaign, simulator, version) as writer:
            for block in writer.missing():
                samples = writer.samples[writer.rows(block)]
                intensity = tiny_patterns(samples)
                writer.commit([write_block(writer.fork(), "tiny", block, samples, intensity)])
            writer.finish()
    assert [tag.name for tag in store.tags()] == ["tiny-v1", "tiny-v2"]
    known = store.data_sets_of(campaign)
    assert {s.simulator: s.tag for s in known} == {"kinematic": "tiny-v1", "gsas2": "tiny-v2"}
    # An unfinished data set is no obstacle where the other simulator has finished.
    unfinished = DataSet("gsas2", THEIRS, 16, 67, None)
    assert simulator_of_data_sets([known[0], unfinished], "kinematic") == "kinematic"
    hashes = {store.open(tag).attrs["content_hash"] for tag in ("tiny-v1", "tiny-v2")}
    assert len(hashes) == 2
    with pytest.raises(StoreError, match="exists already"):
        store.check_new_tag("tiny-v2")


def test_workers_with_different_versions_are_refused():
    older, newer = Probe("node1", "1, GSAS-II 5837", ""), Probe("node2", "1, GSAS-II 5838", "")
    assert common_version([older, older]) == "1, GSAS-II 5837"
    with pytest.raises(SimulationError, match=r"different versions .*5837; 1, GSAS-II 5838"):
        common_version([older, newer])


class TestCallPath:
    """With a replacement of GSAS-II, whose two ways to be called differ by 1e-3."""

    @pytest.fixture(autouse=True)
    def fake_gsas2(self, monkeypatch):
        monkeypatch.setattr(gsas2, "_TARGET", "tests.fake_gsas2:FakeGsas2")
        yield
        build_simulator.cache_clear()

    def test_the_scripting_interface_is_used_where_they_differ(self, tmp_path, capsys):
        campaign = tiny_campaign(tmp_path)
        few = campaign.samples[:10]
        with pytest.warns(UserWarning, match=r"\(differs by 1.0e-03 .*scripting interface is used"):
            recipe, seconds = choose("auto", campaign, few, Gsas2Options(pattern_seconds=60.0))
        assert recipe.simulator == "gsas2"
        assert recipe.version == "1, fake"
        assert recipe.gsas2.call_path == "scripting"
        assert (seconds[np.unique(few.phase)] > 0).all()
        assert "Simulator auto is gsas2: this Python can import GSAS-II" in capsys.readouterr().out
        patterns = simulate_samples(recipe, few)
        np.testing.assert_allclose(patterns[:, 0], 1.001 * few.cells[:, 0], rtol=1e-6)

    def test_call_paths_are_compared_phase_by_phase(self, tmp_path):
        campaign = tiny_campaign(tmp_path)
        recipe = recipe_of(campaign, "gsas2", "1, fake")
        code, check = check_call_paths(recipe, 2, campaign.phases[2].cell)
        assert code == 2
        assert check.problem == ""

    def test_another_version_than_the_driver_s_is_refused(self, tmp_path):
        campaign = tiny_campaign(tmp_path)
        with pytest.raises(SimulationError, match="worker has version 1, fake of the simulator"):
            build_simulator(recipe_of(campaign, "gsas2", THEIRS))


@pytest.mark.parametrize("seconds", [0, 0.5, float("nan"), float("inf"), 1e7])
def test_a_time_limit_that_is_none_is_refused(seconds):
    with pytest.raises(SimulationError, match=r"--pattern-limit .* between 1 and 86,400 s"):
        gsas2_options(None, seconds)


def test_a_path_means_the_same_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gsas2_options(Path("~/GSAS-II"), 60).location == str(tmp_path / "GSAS-II")
    assert gsas2_options(Path("GSAS-II"), 60).location == str(Path.cwd() / "GSAS-II")
    assert gsas2_options(None, 60).location is None


def test_long_campaigns_ask_first(monkeypatch):
    confirm(0.99, yes=False)
    confirm(300.0, yes=True)
    with Path(os.devnull).open() as null:
        monkeypatch.setattr(sys, "stdin", null)
        with pytest.raises(SimulationError, match=r"more than 1 core-hour.*--yes.*--limit N"):
            confirm(1.5, yes=False)


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1)])
def test_the_question_at_a_terminal(answer, code):
    script = "from pipelines.simulation.simulators import confirm; confirm(170.2, yes=False)"
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    os.close(ours)
    os.close(theirs)
    assert "Spend about 170 core-hours? [y/N]" in done.stdout
    assert done.returncode == code
    assert ("Not begun" in done.stderr) is (code == 1)
