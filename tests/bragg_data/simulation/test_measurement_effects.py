"""Draws of measurement effects: reproducible, in range, and like measured profiles."""

import numpy as np
import pytest

from bragg_data.campaign import Campaign, CampaignError, load_campaign
from bragg_data.campaign_file import MeasurementEffects
from bragg_data.instrument.instprm import TofGrid
from bragg_data.refinement.linear_fit import simulator_of
from bragg_data.simulation.kinematic import Simulator
from bragg_data.simulation.measurement_effects import (
    Draws,
    draw_cells,
    draw_profiles,
    simulator_for,
)

QUIET = MeasurementEffects(
    u_scale=(1.0, 1.0),
    shift=0.0,
    size=(1.0, 1.0),
    microstrain=(1000.0, 1000.0),
    counts=(1e9, 1e9),
    background=(0.1, 0.1),
    spectrum=1.0,
    spectrum_error=0.0,
    signal_end=(1.01, 1.01),
    signal_start=0.0,
    impurity_probability=0.0,
)


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
    return draw_profiles(simulator, *some(campaign, 12, 0), np.random.default_rng(1))


@pytest.mark.slow
def test_the_same_generator_gives_the_same_draws(
    campaign: Campaign, simulator: Simulator, draws: Draws
) -> None:
    again = draw_profiles(simulator, *some(campaign, 12, 0), np.random.default_rng(1))
    np.testing.assert_array_equal(again.intensity, draws.intensity)
    np.testing.assert_array_equal(again.covered, draws.covered)
    other = draw_profiles(simulator, *some(campaign, 12, 0), np.random.default_rng(2))
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


@pytest.mark.slow
def test_without_effects_a_draw_is_the_simulated_pattern(
    campaign: Campaign, simulator: Simulator
) -> None:
    phase, cells = some(campaign, 2, 4)
    draws = draw_profiles(simulator, phase, cells, np.random.default_rng(0), QUIET)
    pattern = simulator_of(campaign).simulate(phase, cells).astype(float)
    pattern /= pattern.max(axis=1, keepdims=True)
    for row, expected in zip(draws.intensity, pattern, strict=True):
        # What remains is a smooth background.
        rest = row / 1e9 - expected
        x = np.linspace(-1, 1, len(rest))
        rest -= np.polynomial.chebyshev.chebval(x, np.polynomial.chebyshev.chebfit(x, rest, 12))
        assert np.abs(rest).max() < 1e-3


@pytest.mark.slow
def test_a_drifted_calibration_moves_all_peaks(campaign: Campaign, simulator: Simulator) -> None:
    phase, cells = some(campaign, 1, 5)
    drifted = MeasurementEffects(**{**QUIET.to_json(), "difc": 2e-3, "tzero": 0.0})  # type: ignore[arg-type]
    moved = draw_profiles(
        simulator, phase, cells, np.random.default_rng(0), drifted, calibrated=False
    )
    true = draw_profiles(simulator, phase, cells, np.random.default_rng(0), drifted)
    assert (moved.intensity.argmax(axis=1) != true.intensity.argmax(axis=1)).any()


@pytest.mark.slow
def test_draws_have_the_properties_of_measurements(campaign: Campaign, draws: Draws) -> None:
    tof = campaign.grid.tof
    assert not draws.covered[:, tof > 19_520].any()
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


@pytest.mark.slow
def test_a_profile_without_signal_is_zero(draws: Draws) -> None:
    flat = Draws(
        np.full((1, draws.intensity.shape[1]), -1.0),
        np.ones((1, draws.intensity.shape[1])),
        np.ones((1, draws.intensity.shape[1]), dtype=bool),
        draws.phase[:1],
        draws.cells[:1],
    )
    prepared = flat.prepared()
    assert prepared.shape == flat.intensity.shape
    assert np.isfinite(prepared).all()


@pytest.fixture(scope="module")
def bare() -> Campaign:
    """A campaign without a table of measurement effects."""
    return load_campaign("batio3-continuous")


def with_effects(campaign: Campaign, table: str) -> Campaign:
    return Campaign(f"{campaign.toml}\n{table}\n", campaign.cifs, campaign.instprm)


def test_ranges_of_a_campaign_replace_the_default(campaign: Campaign, bare: Campaign) -> None:
    assert campaign.measurement_effects == MeasurementEffects()
    assert bare.measurement_effects == MeasurementEffects()
    table = "[measurement_effects]\ncounts = [500, 800]\nimpurity_probability = 0.0"
    changed = with_effects(bare, table)
    assert changed.measurement_effects == MeasurementEffects(
        counts=(500.0, 800.0), impurity_probability=0.0
    )
    # What is simulated is the same.
    assert changed.identity("kinematic", "1") == bare.identity("kinematic", "1")


def test_deprecated_keys_of_a_campaign_mean_the_same(bare: Campaign) -> None:
    old = with_effects(
        bare,
        "[nuisance]\nend = [1360.0, 18_912.0]\n"  # deprecated
        "begin = 0.2\nimpure = 0.5\ncounts = [500, 800]",
    )
    effects = old.measurement_effects
    # The grid ends at 1360 µs · exp(0.0009381 · 2806) = 18,912.2 µs.
    assert effects.signal_end == pytest.approx((0.0, 1.0), abs=1e-5)
    assert (effects.signal_start, effects.impurity_probability) == (0.2, 0.5)
    assert effects.counts == (500.0, 800.0)


def test_end_of_the_signal_is_a_share_of_any_window(campaign: Campaign) -> None:
    """By default nearly the whole window is covered, wherever the grid is."""
    shifted = Simulator(
        campaign.phases[:1],
        campaign.instrument,
        TofGrid(20_000.0, 2e-3, 200),
        size=1.0,
        microstrain=1000.0,
    )
    phase = np.zeros(40, dtype=int)
    cells = draw_cells(campaign, 0, 40, np.random.default_rng(0)) * ([3] * 3 + [1] * 3)
    draws = draw_profiles(shifted, phase, cells, np.random.default_rng(1))
    assert draws.covered.mean() > 0.9
    assert draws.covered.mean(axis=1).min() > 0.8
    half = MeasurementEffects(signal_end=(0.5, 0.5), signal_start=0.0)
    draws = draw_profiles(shifted, phase, cells, np.random.default_rng(1), half)
    assert draws.covered.sum(axis=1).tolist() == [100] * 40


def test_default_end_on_the_nomad_grid_is_near_17_500_microseconds(campaign: Campaign) -> None:
    start, stop = campaign.grid.start, campaign.grid.stop
    ends = start * (stop / start) ** np.array(MeasurementEffects().signal_end)
    np.testing.assert_allclose(ends, [17_200.0, 19_500.0], rtol=1e-3)


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("counts = [800, 500]", "counts: low is above high"),
        ("counts = 500", "counts"),
        ("impurity_probability = 1.5", "impurity_probability"),
        ("noise = 1.0", "noise"),
        ("difc = -1e-4", "difc"),
        ("signal_end = [0, 1]", "signal_end"),
    ],
)
def test_bad_ranges_are_refused(bare: Campaign, line: str, place: str) -> None:
    bad = with_effects(bare, f"[measurement_effects]\n{line}")
    with pytest.raises(CampaignError, match=f"wrong at measurement_effects.{place}"):
        _ = bad.measurement_effects


def test_both_names_of_the_table_at_once_are_refused(bare: Campaign) -> None:
    table = "[measurement_effects]\nshift = 0.0\n[nuisance]\nshift = 0.1"  # deprecated
    with pytest.raises(CampaignError, match="nuisance"):  # deprecated
        _ = with_effects(bare, table).measurement_effects
    table = "[measurement_effects]\nsignal_end = [1, 1]\nend = [1000, 2000]"
    with pytest.raises(CampaignError, match="not both"):
        _ = with_effects(bare, table).measurement_effects
