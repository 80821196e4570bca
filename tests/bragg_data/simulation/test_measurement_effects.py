"""Draws of what differs between simulated and measured profiles: reproducible, in range, like."""

from __future__ import annotations

import numpy as np
import pytest

from bragg_data.campaign import Campaign, CampaignError, load_campaign
from bragg_data.refinement.linear_fit import simulator_of
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    Draws,
    Nuisance,
    draw,
    draw_cells,
    nuisance_of,
    simulator_for,
)

QUIET = Nuisance(
    u_scale=(1.0, 1.0), shift=0.0, size=(1.0, 1.0), microstrain=(1000.0, 1000.0),
    counts=(1e9, 1e9), background=(0.1, 0.1), spectrum=1.0, spectrum_error=0.0,
    end=(19_000.0, 19_000.0), begin=0.0, impure=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return load_campaign("batio3-nomad")


@pytest.fixture(scope="module")
def simulator(campaign: Campaign) -> Simulator:
    return simulator_for(campaign)


def some(campaign: Campaign, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    phase = np.repeat(np.arange(3), count)
    cells = [draw_cells(campaign, code, count, generator) for code in range(3)]
    return phase, np.concatenate(cells)


@pytest.fixture(scope="module")
def draws(campaign: Campaign, simulator: Simulator) -> Draws:
    return draw(simulator, *some(campaign, 12, 0), np.random.default_rng(1))


def test_the_same_generator_gives_the_same_draws(
    campaign: Campaign, simulator: Simulator, draws: Draws
) -> None:
    again = draw(simulator, *some(campaign, 12, 0), np.random.default_rng(1))
    np.testing.assert_array_equal(again.intensity, draws.intensity)
    np.testing.assert_array_equal(again.covered, draws.covered)
    other = draw(simulator, *some(campaign, 12, 0), np.random.default_rng(2))
    assert (other.intensity != draws.intensity).any(axis=1).all()


def test_cells_cover_the_range_and_come_near_to_cubic(campaign: Campaign) -> None:
    generator = np.random.default_rng(3)
    tetragonal = draw_cells(campaign, 1, 4000, generator)
    assert 3.8 <= tetragonal[:, [0, 2]].min() < 3.81
    assert 4.19 < tetragonal[:, [0, 2]].max() <= 4.2
    apart = np.abs(tetragonal[:, 0] - tetragonal[:, 2])
    assert 0.25 < (apart < 0.03).mean() < 0.5
    assert apart.min() < 1e-3
    trigonal = draw_cells(campaign, 2, 4000, generator)
    # Through the hole of the paper's grid.
    assert 0.2 < (np.abs(trigonal[:, 3] - 90) < 0.5).mean() < 0.5
    for code, cells in ((1, tetragonal), (2, trigonal)):
        campaign.phases[code].lattice.check_tied(cells)


def test_nothing_differs_where_nothing_is_drawn(campaign: Campaign, simulator: Simulator) -> None:
    phase, cells = some(campaign, 2, 4)
    found = draw(simulator, phase, cells, np.random.default_rng(0), QUIET)
    pattern = simulator_of(campaign).simulate(phase, cells).astype(float)
    pattern /= pattern.max(axis=1, keepdims=True)
    for row, wanted in zip(found.intensity, pattern, strict=True):
        # What remains is a smooth background.
        rest = row / 1e9 - wanted
        x = np.linspace(-1, 1, len(rest))
        rest -= np.polynomial.chebyshev.chebval(x, np.polynomial.chebyshev.chebfit(x, rest, 12))
        assert np.abs(rest).max() < 1e-3


def test_a_drifted_calibration_moves_all_peaks(campaign: Campaign, simulator: Simulator) -> None:
    phase, cells = some(campaign, 1, 5)
    drifted = Nuisance(**{**QUIET.to_json(), "difc": 2e-3, "tzero": 0.0})  # type: ignore[arg-type]
    one = draw(simulator, phase, cells, np.random.default_rng(0), drifted, calibrated=False)
    other = draw(simulator, phase, cells, np.random.default_rng(0), drifted)
    assert (one.intensity.argmax(axis=1) != other.intensity.argmax(axis=1)).any()


def test_they_look_like_measurements(campaign: Campaign, draws: Draws) -> None:
    tof = campaign.grid.tof
    assert not draws.covered[:, tof > 19_500].any()
    assert (draws.intensity[~draws.covered] == 0).all()
    assert (draws.sigma[draws.covered] > 0).all()
    prepared = draws.prepared()
    assert prepared.min() == 0
    assert prepared.max(axis=1) == pytest.approx(1)
    assert (prepared[~draws.covered] == 0).all()
    # The noise is what sigma says: second differences of neighbours, where there are no peaks.
    begin = slice(700, 1100)
    second = np.diff(draws.intensity[:, begin], n=2, axis=1) / np.sqrt(6)
    ratio = np.median(np.abs(second), axis=1) / 0.6745 / draws.sigma[:, begin].mean(axis=1)
    inside = draws.covered[:, begin].all(axis=1)
    assert np.median(ratio[inside]) == pytest.approx(1, abs=0.25)


def test_a_profile_without_signal_is_zero(draws: Draws) -> None:
    flat = Draws(
        np.full((1, draws.intensity.shape[1]), -1.0), np.ones((1, draws.intensity.shape[1])),
        np.ones((1, draws.intensity.shape[1]), dtype=bool), draws.phase[:1], draws.cells[:1],
    )  # fmt: skip
    prepared = flat.prepared()
    assert prepared.shape == flat.intensity.shape
    assert np.isfinite(prepared).all()


@pytest.fixture(scope="module")
def bare() -> Campaign:
    """A campaign that says nothing of measurements."""
    return load_campaign("batio3-continuous")


def test_a_campaign_names_ranges_of_its_own(campaign: Campaign, bare: Campaign) -> None:
    assert nuisance_of(campaign) == Nuisance()
    assert nuisance_of(bare) == Nuisance()
    toml = bare.toml + "\n[nuisance]\ncounts = [500, 800]\nimpure = 0.0\n"
    own = Campaign(toml, bare.cifs, bare.instprm)
    assert nuisance_of(own) == Nuisance(counts=(500.0, 800.0), impure=0.0)
    # What is simulated is the same.
    assert own.identity("kinematic", "1") == bare.identity("kinematic", "1")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("counts = [800, 500]", "wrong at nuisance.counts: low is above high"),
        ("counts = 500", "wrong at nuisance.counts"),
        ("impure = 1.5", "wrong at nuisance.impure"),
        ("noise = 1.0", "wrong at nuisance.noise"),
        ("difc = -1e-4", "wrong at nuisance.difc"),
    ],
)
def test_bad_ranges_are_refused(bare: Campaign, line: str, said: str) -> None:
    bad = Campaign(f"{bare.toml}\n[nuisance]\n{line}\n", bare.cifs, bare.instprm)
    with pytest.raises(CampaignError, match=said):
        nuisance_of(bad)
