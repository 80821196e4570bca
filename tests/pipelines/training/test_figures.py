"""Figures show what they are given: read back from the figures' own objects."""

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
from matplotlib.figure import Figure

from bragg_data.crystallography.cell import CrystalSystem
from catalog.tracking import Tracking
from pipelines.cli.style import SYSTEM_COLORS
from pipelines.training import figures

FREE = {0: ("a",), 1: ("a", "c"), 2: ("a", "alpha")}


@pytest.fixture
def cells() -> np.ndarray:
    return np.random.default_rng(0).uniform([3.8] * 3 + [80] * 3, [4.2] * 3 + [88] * 3, (300, 6))


@pytest.fixture
def systems() -> np.ndarray:
    return np.repeat([0, 1, 2], 100)


def drawn(figure: Figure) -> bytes:
    """Draw as PNG; a warning on the way is an error in these tests."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


def test_learning_curves_of_two_stages() -> None:
    history = {
        "auto-encoder": [{"training_loss": 0.5, "validation_loss": 0.6}] * 3,
        "regressor": [
            {
                "epoch": e,
                "training_loss": 1 / e,
                "validation_loss": 2 / e,
                "accuracy": min(1.0, 0.9 + 0.05 * e),
                "mse_paper": 10.0**-e,
            }
            for e in range(1, 5)
        ],
    }
    figure = figures.learning_curves(history)
    assert drawn(figure)
    grid = np.array(figure.axes).reshape(2, 3)
    training, validation = grid[1, 0].lines
    np.testing.assert_allclose(training.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(validation.get_ydata(), [2, 1, 2 / 3, 1 / 2])
    np.testing.assert_allclose(grid[1, 1].lines[0].get_ydata(), [5, 0, 0, 0], atol=1e-12)
    assert grid[1, 2].get_yscale() == "log"
    assert [axis.get_visible() for axis in grid[0]] == [True, False, False]
    assert grid[0, 0].lines[0].get_xdata().tolist() == [1, 2, 3]


@pytest.mark.parametrize("history", [{}, {"multitask": []}, {"m": [{"training_loss": 1.0}]}])
def test_learning_curves_of_hardly_anything(history: dict[str, list[dict[str, float]]]) -> None:
    assert drawn(figures.learning_curves(history))


def test_reconstructions_and_their_errors() -> None:
    tof = np.linspace(2000, 18000, 200)
    profiles = np.random.default_rng(1).random((5, 200))
    figure = figures.reconstructions(
        tof, profiles, profiles + 0.1, [f"profile {n}" for n in range(5)], np.array([0, 0, 1, 1, 2])
    )
    assert drawn(figure)
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False]
    assert figure.axes[4].get_title(loc="left") == "profile 4"
    assert figure.axes[4].texts[0].get_text() == "mean squared error 1.0e-02"
    np.testing.assert_array_equal(figure.axes[4].lines[1].get_ydata(), profiles[4] + 0.1)
    assert drawn(figures.reconstructions(tof, profiles[:1], profiles[:1], ["one"], np.array([0])))


def test_parity_shows_free_parameters_only(cells: np.ndarray, systems: np.ndarray) -> None:
    figure = figures.parity(cells, cells, systems, FREE)
    assert drawn(figure)
    grid = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_ylabel() for axis in grid[0]] == [
        "predicted a / Å",
        "predicted c / Å",
        "predicted α / °",
    ]
    named = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in grid[0]]
    assert sorted(named[0]) == ["cubic", "tetragonal", "trigonal"]
    assert named[1:] == [["tetragonal"], ["trigonal"]]
    assert grid[0, 2].lines[0].get_xdata().tolist() == cells[systems == 2, 3].tolist()


def test_confusion_counts() -> None:
    figure = figures.confusion(np.array([[98, 2], [0, 400]]), ["cubic", "tetragonal"])
    assert drawn(figure)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == [
        "98\n98.00%",
        "2\n2.00%",
        "0",
        "400\n100.00%",
    ]
    assert axis.get_title().startswith("2 of 500 wrong")


def test_error_map(cells: np.ndarray, systems: np.ndarray) -> None:
    squared = np.random.default_rng(2).lognormal(-12, 2, 300)
    squared[5] = 0.0  # an exact answer has its place, too
    figure = figures.error_map(cells, squared, systems, FREE)
    assert drawn(figure)
    assert [axis.get_xlabel() for axis in figure.axes[:3]] == ["a / Å"] * 3
    assert [axis.get_ylabel() for axis in figure.axes[1:3]] == ["c / Å", "α / °"]
    assert len(figure.axes) == 4  # with the scale of colours
    cubic = systems == 0
    alone = figures.error_map(cells[cubic], squared[cubic], systems[cubic], FREE)
    assert drawn(alone)
    assert len(alone.axes) == 1


def test_every_system_has_its_colour() -> None:
    assert len(set(SYSTEM_COLORS.values())) == len(CrystalSystem)


def test_no_display_is_looked_for() -> None:
    code = "import sys, pipelines.training.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_keeps_figures(tmp_path: Path, tracking_in: Callable[[Path], Tracking]) -> None:
    tracking = tracking_in(tmp_path)
    with tracking.run("figures", "one", {}) as run_:
        run_.log_figure(figures.confusion(np.eye(2, dtype=int), ["a", "b"]), "figures/one.png")
    (folder,) = tracking.client.list_artifacts(run_.id)
    (file,) = tracking.client.list_artifacts(run_.id, folder.path)
    local = Path(tracking.client.download_artifacts(run_.id, file.path, str(tmp_path)))
    assert local.read_bytes().startswith(b"\x89PNG")
