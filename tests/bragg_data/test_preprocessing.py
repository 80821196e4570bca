import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bragg_data.campaign import load_campaign
from bragg_data.measurement.readers import read_profiles
from bragg_data.measurement.resampling import resample_to_grid
from bragg_data.preprocessing import (
    PREPROCESSING,
    PreprocessingError,
    background_subtracted,
    cropped,
    minmax,
    prepare_measured,
    preprocessing,
    smoothed,
    sqrt_unit,
)
from bragg_data.simulation.kinematic import Simulator

SHARED = Path(__file__).parents[3] / "shared"
POINTS = 2807
X = np.linspace(-1, 1, POINTS)


def peaks(rng: np.random.Generator) -> np.ndarray:
    """Sixty peaks of 2 to 4 points' width on a flat zero, highest 1."""
    index = np.arange(POINTS)
    y = np.zeros(POINTS)
    for centre in rng.uniform(200, 2600, 60):
        y += rng.uniform(0.02, 1) * np.exp(-(((index - centre) / rng.uniform(2, 4)) ** 2) / 2)
    return y / y.max()


def bent(rng: np.random.Generator) -> np.ndarray:
    """An incident spectrum's slope and bend, 0.1 to 1 high."""
    return 0.3 + 0.15 * X + 0.2 * np.exp(-(((X - rng.uniform(-0.7, 0.7)) / 0.4) ** 2))


profiles = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(320, 400)),
    elements=st.floats(-1e6, 1e6, width=32),
)


@settings(max_examples=50)
@given(profiles)
def test_minmax_spans_0_to_1_and_undoes_scale_and_offset(rows: np.ndarray) -> None:
    rows = rows + np.linspace(0, 10, rows.shape[1])  # never constant
    scaled = minmax(rows)
    np.testing.assert_array_equal(scaled.min(axis=1), 0)
    np.testing.assert_array_equal(scaled.max(axis=1), 1)
    np.testing.assert_allclose(minmax(3 * rows + 7), scaled, atol=1e-9)
    np.testing.assert_array_equal(minmax(rows[:1]), scaled[:1])  # a row does not know its batch


def test_cropped_leaves_the_papers_points() -> None:
    ramp = np.arange(POINTS, dtype=np.float64)[None]
    cut = cropped(ramp)
    assert cut.shape == (1, 2496)
    assert cut[0, 0] == 256 / 2806
    assert cut[0, -1] == (2806 - 55) / 2806
    with pytest.raises(PreprocessingError, match="Use profile_minmax@1"):
        cropped(ramp[:, :300])


@settings(max_examples=50)
@given(profiles)
def test_smoothed_is_a_share_of_the_signal_whatever_its_scale(rows: np.ndarray) -> None:
    rows = rows.copy()
    rows[:, 100] = 1e6  # some signal
    shares = smoothed(rows)
    assert shares.shape == (len(rows), 140)
    assert shares.min() > -1e-12
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(smoothed(4 * rows), shares, atol=1e-12)
    np.testing.assert_array_equal(smoothed(rows[:1]), shares[:1])  # a row does not know its batch
    assert smoothed(rows.astype(np.float32)).dtype == np.float32


def test_smoothed_spreads_a_peak_by_its_width_and_moves_with_it() -> None:
    rows = np.zeros((2, 2800))
    rows[0, 1400:1410] = 1  # one whole bin, number 140
    rows[1, 1407:1417] = 1  # 0.7 of a bin further
    of_bin = np.arange(0, 280, 2) + 0.5
    first, second = smoothed(rows)
    np.testing.assert_allclose(second @ of_bin - first @ of_bin, 0.7, atol=1e-6)
    spread = np.sqrt(first @ (of_bin - first @ of_bin) ** 2)
    assert spread == pytest.approx(np.sqrt(3 * (8**2 - 1) / 12), rel=1e-3)
    with pytest.raises(PreprocessingError, match="280 bins"):
        smoothed(np.ones((1, 279)))
    with pytest.raises(PreprocessingError, match="no signal"):
        smoothed(np.zeros((1, 300)))


@settings(max_examples=50)
@given(profiles)
def test_similarity_of_a_profile_with_itself_is_1_and_less_with_different_ones(
    rows: np.ndarray,
) -> None:
    rows = rows.copy()
    rows[:, 0] = 1.0  # some signal
    unit = sqrt_unit(rows)
    similarity = unit @ unit.T
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-9)
    assert similarity.max() <= 1 + 1e-9
    np.testing.assert_allclose(sqrt_unit(4 * rows), unit, atol=1e-9)


def test_sqrt_unit_in_numbers() -> None:
    np.testing.assert_allclose(sqrt_unit(np.array([[9.0, 16.0, -5.0]])), [[0.6, 0.8, 0.0]])


@pytest.mark.parametrize("function", [minmax, cropped, sqrt_unit])
def test_a_profile_without_signal_is_refused(function) -> None:  # type: ignore[no-untyped-def]
    rows = np.vstack([np.arange(400.0), np.zeros(400)])
    with pytest.raises(PreprocessingError, match="Profile 1 of 2 has no signal"):
        function(rows)


@pytest.mark.parametrize("key", list(PREPROCESSING))
def test_every_entry_keeps_rows_and_precision(key: str) -> None:
    rows = np.random.default_rng(1).random((3, 500), dtype=np.float32) + 1
    before = rows.copy()
    entry = preprocessing(key)
    result = entry.function(rows)
    assert (result.shape[0], result.dtype) == (3, np.float32)
    np.testing.assert_array_equal(rows, before)
    assert f"{entry.name}@{entry.version}" == key
    assert entry.description.endswith(".")


def test_an_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(PreprocessingError, match=r"'profile_minmax'. Known: profile_"):
        preprocessing("profile_minmax")


# ---- background --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_sigma", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_background_goes_and_the_peaks_stay(seed: int, *, with_sigma: bool) -> None:
    rng = np.random.default_rng(seed)
    signal, sigma = peaks(rng), 0.002 + 0.03 * np.exp(-4 * (X + 1))
    measured = signal + bent(rng) + rng.normal(0, sigma)
    result = background_subtracted(measured, sigma if with_sigma else None)
    assert result.shape == measured.shape
    # In units of the noise, smoothed over far more points than a peak has.
    error = np.convolve((result - signal) / sigma, np.ones(201) / 201, mode="valid")
    assert np.sqrt(np.mean(error**2)) < 0.25
    assert np.abs((result - signal)[signal > 0.3]).max() < 0.05


def test_a_dead_range_neither_bends_the_background_nor_counts() -> None:
    rng = np.random.default_rng(4)
    signal, sigma = peaks(rng), np.full(POINTS, 0.005)
    measured = signal + bent(rng) + rng.normal(0, sigma)
    whole = background_subtracted(measured, sigma)
    dead = (np.arange(POINTS) >= 2650) | ((np.arange(POINTS) > 900) & (np.arange(POINTS) < 940))
    measured[dead], sigma[dead] = 0, 0
    result = background_subtracted(measured, sigma)
    assert (result[dead] == 0).all()
    np.testing.assert_allclose(result[~dead], whole[~dead], atol=0.02)
    # Without deviations the zeros themselves tell.
    tail = background_subtracted(measured)
    assert (tail[dead] == 0).all()
    np.testing.assert_allclose(tail[~dead], whole[~dead], atol=0.03)


def test_rows_are_treated_alone() -> None:
    rng = np.random.default_rng(5)
    rows = np.array([peaks(rng) + bent(rng) for _ in range(2)])
    both = background_subtracted(rows)
    np.testing.assert_array_equal(both[1], background_subtracted(rows[1]))


@settings(max_examples=60)
@given(
    hnp.arrays(np.float64, 120, elements=st.floats(-1e9, 1e9)),
    hnp.arrays(np.float64, 120, elements=st.floats(0, 1e9)),
)
def test_any_numbers_give_numbers(intensity: np.ndarray, sigma: np.ndarray) -> None:
    assert np.isfinite(background_subtracted(intensity, sigma)).all()
    assert np.isfinite(background_subtracted(intensity)).all()
    try:
        prepared = prepare_measured(intensity, sigma, np.arange(120) > 20)
    except PreprocessingError:
        return
    assert prepared.min() >= 0
    assert prepared.max() <= 1


def test_a_prepared_measurement_looks_like_a_simulation() -> None:
    rng = np.random.default_rng(6)
    signal, sigma = peaks(rng), np.full(POINTS, 0.004)
    sigma[-200:-150] = 5.0  # a wild point at the edge of the spectrum must not set the scale
    covered = np.arange(POINTS) < POINTS - 150
    measured = 40 * (signal + bent(rng) + rng.normal(0, sigma))
    prepared = prepare_measured(measured, 40 * sigma, covered)
    assert (prepared[~covered] == 0).all()
    assert prepared.min() == 0
    assert prepared.max() == 1
    calm = sigma < 1
    np.testing.assert_allclose(prepared[calm & covered], signal[calm & covered], atol=0.03)


def test_nothing_above_the_background_is_refused() -> None:
    with pytest.raises(PreprocessingError, match="no signal above background"):
        prepare_measured(np.zeros(300), np.ones(300), np.ones(300, dtype=bool))


# ---- real and realistic profiles ---------------------------------------------------------------


@pytest.mark.skipif(
    not (SHARED / "measured").is_dir(), reason="the measured profiles are not next to the project"
)
def test_the_background_of_silicon_is_gsas2s() -> None:
    path = SHARED / "measured/nomad_si640e/bank4_pattern.csv"
    tof, observed, weight, _, background, _ = np.genfromtxt(path, delimiter=",").T
    sigma = np.where(weight > 0, 1 / np.sqrt(np.where(weight > 0, weight, 1)), 0)
    refined = (tof > 2050) & (tof < 15900)
    result = (observed - background_subtracted(observed, sigma))[refined]
    highest = (observed - background)[refined].max()
    assert np.sqrt(np.mean((result - background[refined]) ** 2)) < 2e-3 * highest


@pytest.mark.skipif(
    not (SHARED / "reference").is_dir(), reason="the reference patterns are not next to the project"
)
def test_the_library_match_knows_a_reference_cell_under_noise() -> None:
    folder = SHARED / "reference"
    library = np.load(folder / "gsas2_reference_nomad_bank4.npz")
    unit = sqrt_unit(library["y"])
    rng = np.random.default_rng(7)
    for i, y in enumerate(library["y"]):
        spectrum = np.where(library["tof"] < 17600, np.exp(-((X - 0.1) ** 2) / 0.4), 0.0)
        scale = 3000 / (y * spectrum).max()
        counts = rng.poisson((y * scale + 300 * bent(rng)) * spectrum)
        alive = spectrum > 0
        safe = np.where(alive, spectrum, 1)
        sigma = np.where(alive, np.sqrt(np.maximum(counts, 1)) / safe, 0)
        prepared = prepare_measured(counts / safe, sigma, alive)
        similarity = (unit * alive) @ np.sqrt(prepared) / np.sqrt((unit**2) @ alive)
        assert np.argmax(similarity) == i


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "reference").is_dir(), reason="the pseudo-experiments are not next to the project"
)
def test_the_library_match_finds_the_cells_of_noisy_experiments(tmp_path: Path) -> None:
    # From a file, through its calibration and the background, to the nearest of the patterns of
    # 441 cells within 0.02 Å (or 0.5°) of the true one: simulated here, GSAS-II's there.
    campaign = load_campaign("batio3_nomad")
    simulator = Simulator(*campaign.setup)
    codes = {phase.crystal_system.name: i for i, phase in enumerate(campaign.phases)}
    folder = SHARED / "reference"
    data = np.load(folder / "pseudo_experiment_dev.npz")
    offsets = np.stack(np.meshgrid(*2 * [np.arange(-10, 11) * 0.002]), axis=-1).reshape(-1, 2)
    errors = []
    labels = json.loads((folder / "pseudo_experiment_dev.json").read_text())
    for i in range(0, len(labels), 3):
        label = labels[i]
        path = tmp_path / f"{i}.xye"
        np.savetxt(path, np.stack([data["tof"], data["y"][i], data["sigma"][i]], axis=1))
        (profile,) = read_profiles(path)
        calibration = campaign.instrument.with_parameters(difc=label["difC"], tzero=label["Zero"])
        gridded = resample_to_grid(profile, campaign.grid, campaign.instrument, calibration)
        prepared = prepare_measured(gridded.intensity, gridded.sigma, gridded.covered)
        code = codes[label["crystal_system"]]
        scale = [1, 25] if label["crystal_system"] == "trigonal" else [1, 1]
        free = [label["a"], label["alpha" if scale[1] > 1 else "c"]] + offsets * scale
        cells = campaign.phases[code].lattice.cells(free)
        unit = sqrt_unit(simulator.simulate(np.full(len(cells), code), cells))
        similarity = unit @ np.sqrt(prepared) / np.sqrt(np.square(unit) @ gridded.covered)
        errors.append(offsets[np.argmax(similarity)])
    # 0.002 Å is the step of these cells.
    assert np.sqrt(np.mean(np.square(errors))) < 0.002
    assert np.abs(errors).max() <= 0.006
