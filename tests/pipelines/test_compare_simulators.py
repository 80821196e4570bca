"""The comparison of simulators: its numbers, its picture, and its message without GSAS-II."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bragg_data.campaign import load_campaign
from bragg_data.simulation.gsas2 import installed_version
from pipelines import compare_simulators
from pipelines.cli.console import run
from pipelines.simulation.comparison import Comparison, draw_cells, draw_extremes
from tests.tiny_campaign import tiny_campaign, write_campaign

CALM = pytest.mark.filterwarnings("ignore:Peaks of this instrument are narrow")
pytestmark = CALM


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run(compare_simulators.app, [*map(str, arguments)])
    return (int(exit_.value.code or 0), *capsys.readouterr())


def test_cells_are_drawn_by_the_seed_from_each_phase(tmp_path):
    campaign = tiny_campaign(tmp_path)
    drawn = draw_cells(campaign, 4, np.random.default_rng(0))
    assert drawn.phase.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(np.unique(drawn.cells, axis=0)) == 12
    known = {tuple(cell) for cell in campaign.samples.cells}
    assert all(tuple(cell) in known for cell in drawn.cells)
    again = draw_cells(campaign, 4, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.cells, again.cells)
    assert (drawn.cells != draw_cells(campaign, 4, np.random.default_rng(1)).cells).any()
    assert len(draw_cells(campaign, 999, np.random.default_rng(0))) == len(campaign.samples)


def test_differences_are_relative_to_the_reference(tmp_path):
    campaign = tiny_campaign(tmp_path)
    samples = campaign.samples[:2]
    reference = np.tile(np.float32([0, 4, 3]), (2, 1))
    fast = reference + np.float32([[0, 0, 0], [0.5, 0, 0]])
    comparison = Comparison(samples, fast, reference, np.ones(2), np.ones(2), "1, GSAS-II 1")
    np.testing.assert_allclose(comparison.maximum, [0, 0.125])
    np.testing.assert_allclose(comparison.l2, [0, 0.1])
    assert comparison.gsas2 == "GSAS-II 1"


def test_the_picture_shows_best_and_worst(tmp_path):
    campaign = tiny_campaign(tmp_path)
    samples = campaign.samples[:3]
    reference = np.random.default_rng(0).random((3, 256), dtype=np.float32)
    fast = reference * np.float32([[1.0], [1.01], [1.1]])
    comparison = Comparison(samples, fast, reference, np.ones(3), np.ones(3), "1, GSAS-II 1")
    draw_extremes(campaign, comparison, tmp_path / "comparison.png")
    assert imread(tmp_path / "comparison.png").shape == (1200, 1500, 4)


@pytest.mark.cluster
def test_missing_gsas2_is_a_single_sentence(tmp_path, capsys):
    toml, png = write_campaign(tmp_path), tmp_path / "comparison.png"
    nowhere = tmp_path / "nowhere"
    code, _, err = command(
        capsys,
        "--campaign",
        toml,
        "--cells",
        1,
        "--workers",
        1,
        "--png",
        png,
        "--gsas2-path",
        nowhere,
    )
    assert code == 2
    assert re.search(rf"Error: On worker \S+: There is no GSAS-II in {nowhere}\. .*\n$", err)
    assert not png.exists()


def test_a_directory_that_does_not_exist_is_refused_first(tmp_path, capsys):
    code, _, err = command(capsys, "--png", tmp_path / "missing" / "x.png")
    assert code == 2
    assert "in a directory that exists" in err


def test_table_and_picture(tmp_path, capsys, gsas2_location):
    version = installed_version(gsas2_location)
    structures = Path(__file__).parents[1] / "data" / "structures" / "structures.toml"
    png = tmp_path / "comparison.png"
    code, out, _ = command(capsys, "--campaign", structures, "--cells", 1, "--png", png)
    assert code == 0
    assert version.partition(", ")[2] in out
    for phase in load_campaign(structures).phases:
        assert phase.name in out
    worst = float(re.search(r"Largest difference: (\S+) of the maximum", out)[1])
    assert worst < 1e-3
    assert png.stat().st_size > 10_000
