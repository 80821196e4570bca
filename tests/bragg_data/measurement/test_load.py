"""Measurements are prepared when they are read: what has no peaks is refused by its name."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.measurement.load import has_significant_peaks, load_each_bank, load_measurements
from bragg_data.measurement.readers import ProfileError, read_profiles
from bragg_data.preprocessing import prepare_measured
from bragg_data.refinement.linear_fit import simulator_of

SHARED = Path(__file__).parents[4] / "shared"


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return load_campaign("batio3-nomad")


def write(path: Path, *columns: np.ndarray) -> Path:
    np.savetxt(path, np.column_stack(columns), fmt="%.6f")
    return path


def expected_counts(campaign: Campaign, peak: float, background: float | np.ndarray) -> np.ndarray:
    cell = np.array([[3.99, 3.99, 4.03, 90, 90, 90.0]])
    (pattern,) = simulator_of(campaign).simulate(np.array([1]), cell).astype(float)
    return np.asarray(peak * pattern / pattern.max() + background)


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
@pytest.mark.parametrize("with_sigma", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_flat_profile_is_refused(
    campaign: Campaign, tmp_path: Path, seed: int, with_sigma: bool, scale: float
) -> None:
    """Of 100 ± 10 counts, also where they are scaled and the file has no standard deviation."""
    y = scale * np.random.default_rng(seed).normal(100, 10, campaign.grid.points)
    columns = [campaign.grid.tof, y, *([np.full(len(y), 10 * scale)] if with_sigma else [])]
    path = write(tmp_path / "flat.xye", *columns)
    with pytest.raises(ProfileError, match="has no significant peaks") as caught:
        load_measurements(path, campaign)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("counts", [0.05, 0.3, 3, 10_000])
def test_counting_noise_has_no_peaks(counts: float) -> None:
    y = np.random.default_rng(1).poisson(counts, 2807).astype(float)
    assert not has_significant_peaks(y, np.sqrt(np.maximum(y, 1)))


_X = np.linspace(0, 1, 2807)
SMOOTH = {
    "line": 1 - 0.9 * _X,
    "polynomial": 1.5 + np.polynomial.chebyshev.chebval(2 * _X - 1, [0, 0.3, -0.4, 0.3, 0.2, -0.2]),
    "exponential": np.exp(-3 * _X),
    "rising": np.exp(5 * (_X - 1)),
    "steep": np.exp(-8 * _X),
    "power": (0.07 + _X) ** -4 * 0.07**4,
    "step": 1 / (1 + np.exp((_X - 0.5) / 0.05)),
    "hump": np.exp(-0.5 * ((_X - 0.5) / 0.2) ** 2) + 0.02,
    "hump at an end": np.exp(-0.5 * (_X / 0.15) ** 2) + 0.02,
    "Maxwell": _X**2 * np.exp(-((_X / 0.3) ** 2)) / 0.033,
}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("counts", [1, 30, 1000, 1e5, 1e7])
@pytest.mark.parametrize("shape", SMOOTH)
def test_a_smooth_curve_has_no_peaks(shape: str, counts: float, noisy: bool) -> None:
    """Without noise, or steep with the noise of counts."""
    y = counts * SMOOTH[shape]
    if noisy:
        y = np.random.default_rng(0).poisson(y).astype(float)
    assert not has_significant_peaks(y, np.sqrt(np.maximum(y, 1)))
    assert not has_significant_peaks(y / 4400, np.sqrt(np.maximum(y, 1) / 4400))  # too large


@pytest.mark.parametrize("sigma", [1e-3, 1.0])
@pytest.mark.parametrize("shape", SMOOTH)
def test_a_smooth_curve_with_any_deviations_has_no_peaks(shape: str, sigma: float) -> None:
    y = np.round(1000 * SMOOTH[shape], 2)
    assert not has_significant_peaks(y, np.full(len(y), sigma))


@pytest.mark.parametrize("shape", SMOOTH)
def test_peaks_on_a_smooth_background_are_significant(campaign: Campaign, shape: str) -> None:
    background = 2000 * SMOOTH[shape] + 20
    y = np.random.default_rng(0).poisson(expected_counts(campaign, 2000, background)).astype(float)
    assert has_significant_peaks(y, np.sqrt(np.maximum(y, 1)))


@pytest.mark.parametrize("shape", ["polynomial", "exponential", "hump"])
def test_a_smooth_file_is_refused_by_its_name(
    campaign: Campaign, tmp_path: Path, shape: str
) -> None:
    path = write(tmp_path / "smooth.xy", campaign.grid.tof, 100 * SMOOTH[shape])
    with pytest.raises(ProfileError, match=r"smooth\.xy has no significant peaks"):
        load_measurements(path, campaign)


def test_a_constant_profile_is_refused_where_it_is_read(campaign: Campaign, tmp_path: Path) -> None:
    tof = campaign.grid.tof
    path = write(tmp_path / "constant.xye", tof, np.full(len(tof), 5.0), np.ones(len(tof)))
    with pytest.raises(ProfileError, match=r"constant\.xye has no significant peaks"):
        load_measurements(path, campaign)


def test_peaks_outside_of_the_window_do_not_count(campaign: Campaign, tmp_path: Path) -> None:
    grid = campaign.grid
    tof = np.concatenate([grid.tof, grid.tof[-1] + np.arange(1, 200) * 20])
    y = np.random.default_rng(0).poisson(100, len(tof)) + np.where(tof > grid.tof[-1] + 100, 1e4, 0)
    with pytest.raises(ProfileError, match="no significant peaks between 1360 and 18912 µs"):
        load_measurements(write(tmp_path / "far.xye", tof, y, np.sqrt(y)), campaign)


@pytest.mark.parametrize(("peak", "background"), [(60, 100), (30, 10), (8, 0.5)])
def test_a_weak_profile_is_accepted(
    campaign: Campaign, tmp_path: Path, peak: float, background: float
) -> None:
    counts = expected_counts(campaign, peak, background)
    y = np.random.default_rng(2).poisson(counts).astype(float)
    path = write(tmp_path / "weak.xye", campaign.grid.tof, y, np.sqrt(np.maximum(y, 1)))
    (measurement,) = load_measurements(path, campaign)
    gridded = measurement.gridded
    expected = prepare_measured(gridded.intensity, gridded.sigma, gridded.covered)
    np.testing.assert_array_equal(measurement.prepared, expected)
    loaded = pickle.loads(pickle.dumps(measurement))
    np.testing.assert_array_equal(loaded.prepared, expected)


def test_a_normalised_profile_without_deviations_is_accepted(
    campaign: Campaign, tmp_path: Path
) -> None:
    y = np.random.default_rng(3).poisson(expected_counts(campaign, 4000, 400)) / 4400
    (measurement,) = load_measurements(write(tmp_path / "unit.xy", campaign.grid.tof, y), campaign)
    assert measurement.prepared.max() == 1


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the measured profiles")
@pytest.mark.parametrize("folder", ["measured", "real"])
def test_all_measured_profiles_have_peaks(folder: str) -> None:
    checked = 0
    for path in sorted((SHARED / folder).rglob("*")):
        if path.suffix not in (".gss", ".gsa", ".gda", ".xye", ".csv", ".dat"):
            continue
        try:
            profiles = read_profiles(path)
        except ProfileError:  # of another method, or a table
            continue
        for profile in profiles:
            assert has_significant_peaks(profile.intensity, profile.sigma), profile.name
            checked += 1
    assert checked > 10


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the reference profiles")
@pytest.mark.parametrize("name", ["pseudo_experiment_dev", "pseudo_experiment_wide_dev"])
def test_all_pseudo_experiments_have_peaks(name: str) -> None:
    values = np.load(SHARED / "reference" / f"{name}.npz")
    for intensity, sigma in zip(values["y"], values["sigma"], strict=True):
        assert has_significant_peaks(intensity, sigma)


# ---- several banks, each with a campaign of its own --------------------------------------------


def other_bank(campaign: Campaign, number: int, angle: float, scale: float) -> Campaign:
    """The same campaign on a bank at another angle, whose times are shorter by a factor."""
    difc = scale * campaign.instrument.difc
    instprm = campaign.instprm.replace("Bank:4", f"Bank:{number}").replace(
        "#Bank 4", f"#Bank {number}"
    )
    instprm = instprm.replace("2-theta:122.0", f"2-theta:{angle}")
    instprm = instprm.replace("difC:9496.17", f"difC:{difc:.4f}").replace("Zero:4.84", "Zero:0")
    toml = campaign.toml.replace("start = 1360.0\n", f"start = {scale * 1360.0:.6f}\n")
    toml = toml.replace("bank = 4", f"bank = {number}")
    return Campaign(toml, campaign.cifs, instprm)


def banks_file(path: Path, campaigns: dict[int, Campaign], header: bool, flat: int = 0) -> Path:
    """A GSAS file with a bank for each campaign; one of them flat."""
    lines = ["Banks"]
    for number, campaign in campaigns.items():
        tof, i = campaign.grid.tof, campaign.instrument
        y = expected_counts(campaign, 5000, 100)
        y = np.full(len(y), 100.0) if number == flat else y
        y = np.random.default_rng(number).poisson(y).clip(1)
        if header:
            lines.append(f"# Total flight path 21.51m, tth {i.two_theta}deg, DIFC {i.difc:.2f}")
        lines.append(
            f"BANK {number} {len(tof)} {len(tof)} SLOG {tof[0]:.0f} {tof[-1]:.0f} 0.0012 0 FXYE"
        )
        # Lower edges, as of GSAS.
        edges = np.concatenate([tof[:1] - np.diff(tof)[:1] / 2, (tof[1:] + tof[:-1]) / 2])
        columns = zip(edges, y, np.sqrt(y), strict=True)
        lines += [f"{t:20.6f}{v:20.6f}{s:20.6f}" for t, v, s in columns]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def banks(campaign: Campaign) -> dict[int, Campaign]:
    return {3: other_bank(campaign, 3, 65.0, 0.6), 4: campaign}


@pytest.mark.parametrize("header", [True, False])
def test_each_bank_goes_to_its_campaign(
    banks: dict[int, Campaign], tmp_path: Path, header: bool
) -> None:
    """By the angles of the header, or else by the numbers, whatever the order of the campaigns."""
    file = banks_file(tmp_path / "banks.gsa", banks, header)
    instprm = tmp_path / "all.instprm"
    instprm.write_text("".join(c.instprm for c in banks.values()))
    for calibration in (None, instprm):
        read = load_each_bank(file, [banks[4], banks[3]], calibration)
        assert [(number, m.profile.bank) for number, m in read] == [(1, 3), (0, 4)]
        for number, measurement in read:
            first = [banks[4], banks[3]][number]
            expected = expected_counts(first, 1, 0)
            least = 0.6 if calibration is None else 0.95  # by the header's nominal difC
            assert np.corrcoef(measurement.prepared, expected)[0, 1] > least
    (only,) = load_each_bank(file, [banks[4], banks[3]], instprm, bank=3)
    assert only[0] == 1


def test_banks_that_cannot_be_used_are_named(banks: dict[int, Campaign], tmp_path: Path) -> None:
    file = banks_file(tmp_path / "banks.gsa", banks, header=True)
    ((number, measurement),) = load_each_bank(file, [banks[4]])
    assert (number, measurement.profile.bank) == (0, 4)
    left_out = f"Another bank was left out: {file}, bank 3 is of no bank that has a model"
    assert any(warning.startswith(left_out) for warning in measurement.warnings)
    flat = banks_file(tmp_path / "flat.gsa", banks, header=True, flat=4)
    ((number, measurement),) = load_each_bank(flat, [banks[4], banks[3]])
    assert number == 1
    assert "has no significant peaks" in measurement.warnings[-1]
    with pytest.raises(ProfileError, match="bank 3 is of no bank that has a model; these have: 4"):
        load_each_bank(flat, [banks[4]])
