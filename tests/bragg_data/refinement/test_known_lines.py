"""Which profiles show lines of anything that a refinement could find in them."""

import numpy as np
import pytest

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.crystallography.structure import Phase, phase_on_orthogonal_axes
from bragg_data.instrument.peak_shape import peak, peak_shape
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.known_lines import KnownLines
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import draw_labels, draw_profiles, simulator_for
from tests.bragg_data.refinement.test_free_intensities import CHLORIDE, SILICON, ZIRCONATE


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    """With all lines of the bank."""
    return load_campaign("batio3-nomad")


@pytest.fixture(scope="module")
def known(campaign: Campaign) -> KnownLines:
    return KnownLines(campaign)


def counted(signal: np.ndarray, seed: int = 0, counts: float = 3000.0) -> GriddedProfile:
    expected = counts * signal / signal.max() + 100.0
    y = np.random.default_rng(seed).poisson(expected).astype(float)
    return GriddedProfile(y, np.sqrt(np.maximum(y, 1)), np.ones(len(y), dtype=bool))


def pattern(campaign: Campaign, phase: Phase, microstrain: float = 900.0) -> np.ndarray:
    setup = campaign.instrument, campaign.grid
    simulator = Simulator([phase], *setup, size=1.0, microstrain=microstrain)
    (simulated,) = simulator.simulate(np.zeros(1, dtype=int), np.array([phase.cell]))
    return np.asarray(simulated, dtype=np.float64) / simulated.max()


def random_lines(campaign: Campaign, count: int, seed: int) -> np.ndarray:
    rng, tof = np.random.default_rng(seed), campaign.grid.tof
    d = rng.uniform(*campaign.instrument.d_spacing_from_tof(tof[[0, -1]]), count)
    shape = peak_shape(campaign.instrument, d, size=2.0, microstrain=900.0)
    position = campaign.instrument.tof_from_d_spacing(d)
    heights = rng.exponential(size=count) * position
    return np.asarray((peak(tof[:, None] - position, shape) * heights).sum(axis=1))


@pytest.mark.parametrize("count", [10, 40])
def test_random_lines_resemble_nothing(known: KnownLines, campaign: Campaign, count: int) -> None:
    profiles = [counted(random_lines(campaign, count, seed), seed) for seed in range(20)]
    assert sum(known.resemble(profile) for profile in profiles) <= 3


@pytest.mark.parametrize("structure", [ZIRCONATE, CHLORIDE])
@pytest.mark.parametrize("microstrain", [900.0, 4000.0])
def test_other_compounds_with_such_a_lattice_remain(
    known: KnownLines, campaign: Campaign, structure: tuple, microstrain: float
) -> None:
    phase = phase_on_orthogonal_axes("x", *structure)
    assert known.resemble(counted(pattern(campaign, phase, microstrain)))


def test_mixtures_and_cans_remain_but_no_further_structure(
    known: KnownLines, campaign: Campaign
) -> None:
    cubic = pattern(campaign, campaign.phases[0])
    silicon = pattern(campaign, phase_on_orthogonal_axes("x", *SILICON))
    can = phase_on_orthogonal_axes("x", "I m -3 m", (3.03, 3.03, 3.03), "V V 0 0 0 0.007")
    vanadium = pattern(campaign, can)
    assert known.resemble(counted(0.2 * cubic + 0.8 * silicon))
    assert known.resemble(counted(0.1 * cubic + 0.9 * vanadium))
    assert not known.resemble(counted(silicon))
    # Hidden by noise, nobody knows.
    assert known.resemble(counted(silicon, counts=200.0))


def test_draws_as_measured_remain(known: KnownLines, campaign: Campaign) -> None:
    """Angles are anywhere between 60° and 120°: near to the cell that a model predicts."""
    rng = np.random.default_rng(0)
    codes, cells = draw_labels(campaign, 20, rng)
    drawn = draw_profiles(simulator_for(campaign), codes, cells, rng)
    lengths_off = cells * np.repeat([1.002, 1.0], 3)
    rows = zip(drawn.intensity, drawn.sigma, drawn.covered, codes, lengths_off, strict=True)
    for *row, code, cell in rows:
        assert known.resemble(GriddedProfile(*row), [(code, cell)])
