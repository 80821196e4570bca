"""Single peaks of any width, anywhere in a window, against the closed form."""

import numpy as np
import pytest

from bragg_data.campaign import load_campaign
from bragg_data.instrument import peak_shape as shapes
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.simulation.peak_operator import QUINTIC
from bragg_data.simulation.peak_response import PeakResponse, WidthInterpolation
from bragg_data.simulation.shape_basis import MARGIN

SAMPLES = 60


def largest_error(instrument: Instrument, grid: TofGrid) -> float:
    """Return the largest error of peaks all over the window, relative to each peak's maximum."""
    response = PeakResponse(instrument, grid, 1.0, 1000.0, "textbook")
    rng = np.random.default_rng(3)
    ends = [0.0, 0.4, grid.points - 1.3, grid.points - 1.0]
    position = np.concatenate([ends, rng.uniform(0, grid.points - 1, SAMPLES - len(ends))])
    sample = {
        "difc": np.full(SAMPLES, instrument.difc),
        "tzero": np.full(SAMPLES, instrument.tzero),
        "size": rng.uniform(0.3, 3.0, SAMPLES),
        "microstrain": rng.uniform(0.0, 3000.0, SAMPLES),
        "width_scale": rng.uniform(0.9, 1.1, SAMPLES),
    }
    interpolation = WidthInterpolation(response, None)
    widths = interpolation.widths(sample)
    basis = widths.basis
    deposits = np.zeros((SAMPLES, basis.n_source), dtype=np.float32)
    fraction, node = np.modf((position + MARGIN) * basis.oversampling)
    for row, (x, j) in enumerate(zip(fraction, node.astype(int), strict=True)):
        deposits[row, j - 2 : j + 4] = [QUINTIC(x + 5 - k) for k in range(6)]
    patterns = basis.convolve(deposits, interpolation.coefficients(widths, sample)[:, 0])
    tof = grid.start * np.exp(grid.relative_step * position)
    shape = shapes.peak_shape(
        instrument,
        instrument.d_spacing_from_tof(tof),
        size=sample["size"],
        microstrain=sample["microstrain"],
    )
    scale = sample["width_scale"]
    wider = shape._replace(variance=shape.variance * scale**2, fwhm=shape.fwhm * scale)
    columns = wider.columns()
    exact = shapes.peak(grid.tof - tof[:, None], columns, "textbook")
    return float((np.abs(patterns - exact).max(axis=1) / exact.max(axis=1)).max())


# Less than a block, less than a zone of blocks, and several zones of which the last is cut.
@pytest.mark.parametrize(("start", "points"), [(9000.0, 40), (6000.0, 300), (2000.0, 1700)])
def test_peaks_are_right_all_over_the_window(start: float, points: int) -> None:
    campaign = load_campaign("batio3-nomad")
    grid = TofGrid(start, campaign.grid.relative_step, points)
    assert largest_error(campaign.instrument, grid) < 3e-4


@pytest.mark.parametrize(("two_theta", "difc"), [(63.62, 4839.1), (154.46, 9050.2)])
def test_peaks_of_a_moderator_are_right(two_theta: float, difc: float) -> None:
    bank = Instrument(
        1, two_theta, difc, tzero=-3.0, sig_1=60.0, x=3.0, moderator=(0.1, 2.4, 33.0, 50.0)
    )
    assert largest_error(bank, TofGrid(2200.0, 1e-3, 2000)) < 3e-4


def test_sharp_peaks_with_long_decays_are_right() -> None:
    """Peaks of a long flight path: 1.3 to 8 points wide, and decays of up to 40 points."""
    bank = load_campaign("batio3-nomad").instrument.with_parameters(
        difc=22_580.0, difa=-1.5, tzero=-8.0, alpha=0.7, beta_0=0.01, beta_1=0.03,
        beta_q=0.01, sig_0=10.0, sig_1=40.0, sig_2=15.0,
    )  # fmt: skip
    assert largest_error(bank, TofGrid(12_000.0, 8e-4, 2200)) < 3e-4
