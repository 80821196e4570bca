"""Functions of Linux that macOS lacks: what happens without them."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.rietveld import Refiner
from pipelines.simulation.campaign import reserve_space


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module os as on macOS."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)


@pytest.mark.usefixtures("macos")
def test_space_for_a_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        reserve_space(file, 1000)
        with pytest.raises(OSError, match="No space left") as error:
            reserve_space(file, 2**62)
    assert error.value.errno == errno.ENOSPC


def test_refinement(small_campaign: Campaign, request: pytest.FixtureRequest) -> None:
    refiner = Refiner(small_campaign)
    phase, cell = np.array([0, 0]), np.array([[4.0, 4.0, 4.0, 90, 90, 90]] * 2)
    # With widths of each sample, so that operators are built before the functions are gone.
    pattern = refiner.simulator.simulate(phase, cell, size=np.array([1.0, 1.0]))[0].astype(float)
    intensity = 1000 * pattern / pattern.max() + 50
    gridded = GriddedProfile(intensity, np.sqrt(intensity), np.ones(len(intensity), dtype=bool))
    request.getfixturevalue("macos")
    starts = [(0, np.array([4.003] * 3 + [90.0] * 3)), (1, np.array([4, 4, 4.02, 90, 90, 90.0]))]
    fits = refiner.refine(gridded, starts)
    assert fits[0].phase == 0
    assert fits[0].cell[0] == pytest.approx(4.0, abs=3e-4)
