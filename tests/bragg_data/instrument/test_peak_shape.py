from pathlib import Path

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erfcx

from bragg_data.instrument.exponential_integral import scaled_exp1
from bragg_data.instrument.instprm import read_instrument
from bragg_data.instrument.peak_shape import (
    FWHM_PER_SIGMA,
    PeakShape,
    erfcx_blended,
    erfcx_gsas2,
    gaussian_part,
    lorentzian_part,
    mixing,
    parts,
    peak,
    peak_shape,
)

SILICON = Path(__file__).parents[4] / "shared" / "measured" / "nomad_si640e"
RISE, DECAY, WIDTH = 0.11, 0.27, 70.0


def convolved(offset: float, line) -> float:
    """The textbook convolution with back-to-back exponentials, by quadrature."""
    norm = RISE * DECAY / (RISE + DECAY)
    left = quad(lambda t: np.exp(RISE * t) * line(offset - t), -np.inf, 0)[0]
    right = quad(lambda t: np.exp(-DECAY * t) * line(offset - t), 0, np.inf)[0]
    return norm * (left + right)


@pytest.mark.parametrize("offset", [-200.0, -60.0, 0.0, 35.0, 300.0])
def test_both_parts_are_the_convolutions(offset):
    sigma = WIDTH / FWHM_PER_SIGMA
    args = (np.array([offset]), np.array(RISE), np.array(DECAY), np.array(WIDTH))
    gauss = convolved(
        offset, lambda t: np.exp(-0.5 * (t / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    )
    np.testing.assert_allclose(gaussian_part(*args)[0], gauss, rtol=1e-7, atol=1e-14)
    lorentz = convolved(offset, lambda t: 0.5 * WIDTH / np.pi / (t * t + 0.25 * WIDTH**2))
    np.testing.assert_allclose(lorentzian_part(*args, "textbook")[0], lorentz, rtol=1e-7)


def pulse(t: float, fast: float, slow: float, share: float) -> float:
    """Ikeda & Carpenter: t² e^(-αt), and that convolved with e^(-βt), by quadrature."""
    prompt = fast**3 / 2 * t**2 * np.exp(-fast * t)
    stored = quad(lambda x: x**2 * np.exp(-fast * x - slow * (t - x)), 0, t)[0]
    return (1 - share) * prompt + share * slow * fast**3 / 2 * stored


@pytest.mark.parametrize(("fast", "slow", "share"), [(0.5, 0.03, 0.4), (0.04, 0.028, 0.9)])
def test_a_moderators_pulse_is_convolved(fast, slow, share):
    offset = np.array([-150.0, 0.0, 40.0, 400.0])
    shape = PeakShape(*(np.array(v) for v in (fast, slow, 0.0, 0.0, share)))
    gauss, lorentz = parts(offset, shape, np.array(WIDTH))
    sigma, end = WIDTH / FWHM_PER_SIGMA, 30 / slow
    t, weight = np.polynomial.legendre.leggauss(400)
    t, weight = (t + 1) * end / 2, weight * end / 2
    weight *= [pulse(x, fast, slow, share) for x in t]
    z = offset[:, None] - t
    expected = np.exp(-0.5 * (z / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi)) @ weight
    np.testing.assert_allclose(gauss, expected, rtol=1e-6, atol=1e-12)
    expected = 0.5 * WIDTH / np.pi / (z * z + 0.25 * WIDTH**2) @ weight
    np.testing.assert_allclose(lorentz, expected, rtol=1e-6)


def test_nearly_equal_rates_of_a_moderator_do_not_cancel():
    offset = np.linspace(-100, 600, 71)
    curves = [
        parts(offset, PeakShape(*(np.array(v) for v in (0.05, slow, 0.0, 0.0, 1.0))), np.array(9.0))
        for slow in (0.0498, 0.05, 0.0502)
    ]
    for below, same, above in zip(*curves, strict=True):
        np.testing.assert_allclose(same, (below + above) / 2, atol=2e-3 * same.max())


def test_scaled_exponential_integral_far_out():
    # Δ so large that e^p and E1(p) over- and underflow on their own
    offset = np.array([-9000.0, 9000.0])
    value = lorentzian_part(offset, np.array(RISE), np.array(DECAY), np.array(WIDTH))
    norm = RISE * DECAY / (2 * (RISE + DECAY))
    with mpmath.workdps(40):
        for x, got in zip(offset, value, strict=True):
            terms = [mpmath.mpc(-r * x, r * WIDTH / 2) for r in (RISE, DECAY)]
            exact = -2 * norm / mpmath.pi * sum((mpmath.exp(z) * mpmath.e1(z)).imag for z in terms)
            assert got == pytest.approx(float(exact), rel=1e-9)


def test_scaled_exponential_integral_everywhere():
    """Over all angles, most of them close to the cut, and distances through both switches."""
    rng = np.random.default_rng(0)
    size = np.concatenate([np.geomspace(1e-3, 80, 200), [0.999, 1.0, 39.999, 40.0]])
    angle = np.pi - np.pi * rng.random(len(size)) ** 3
    z = size * np.exp(1j * angle)
    z[::5] = z[::5].conj()
    with mpmath.workdps(40):
        exact = [complex(mpmath.exp(v) * mpmath.e1(v)) for v in map(mpmath.mpc, z)]
    error = scaled_exp1(z) - exact
    assert np.abs(error / exact)[size < 39].max() < 1e-13
    assert np.abs(error / exact).max() < 3e-10


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["gsas2", "textbook"])
def test_unit_area(convention):
    offset = np.linspace(-60_000, 60_000, 1_200_001)
    shape = PeakShape(*(np.array([v]) for v in (0.08, 0.27, 1200.0, 25.0)))
    area = peak(offset, shape, convention).sum() * (offset[1] - offset[0])
    assert area == pytest.approx(1.0, abs=1e-3)


def test_mixing_limits():
    width, eta = mixing(np.array([100.0, 0.0]), np.array([0.0, 7.0]))
    np.testing.assert_allclose(width, [FWHM_PER_SIGMA * 10, 7.0], rtol=1e-4)
    np.testing.assert_allclose(eta, [0.0, 1.0], atol=1e-4)


def test_gsas2s_erfcx_steps_up_at_six():
    y = np.array([5.999999, 6.0])
    assert erfcx_gsas2(y)[0] == erfcx(y[0])
    assert erfcx_gsas2(y)[1] / erfcx(6.0) == pytest.approx(1.0047, abs=2e-4)
    # the blend is GSAS-II's away from the step, and smooth across it
    np.testing.assert_array_equal(erfcx_blended(np.array([4.0])), erfcx(4.0))
    np.testing.assert_allclose(erfcx_blended(np.array([7.5])), erfcx_gsas2(np.array([7.5])))
    fine = erfcx_blended(np.linspace(5.9, 6.1, 2001))
    assert np.abs(np.diff(fine)).max() < 1e-5


@pytest.fixture(scope="module")
def silicon():
    if not SILICON.is_dir():
        pytest.skip("the measured profiles (shared/measured) are not on this machine")
    (instprm,) = SILICON.glob("*.instprm")
    return (
        read_instrument(instprm, 4),
        np.loadtxt(SILICON / "bank4_reflections_Silicon.csv", delimiter=","),
        np.loadtxt(SILICON / "bank4_pattern.csv", delimiter=","),
    )


def test_positions_and_widths_of_a_real_refinement(silicon):
    instrument, reflections, _ = silicon
    d, position, variance = reflections[:, 4], reflections[:, 5], reflections[:, 6]
    np.testing.assert_allclose(instrument.tof_from_d_spacing(d), position, rtol=1e-6)
    shape = peak_shape(instrument, d, size=1e9, microstrain=0.0)
    np.testing.assert_allclose(shape.variance, variance, atol=1e-3)
    np.testing.assert_allclose(shape.rise, reflections[:, 12], rtol=1e-6)
    np.testing.assert_allclose(shape.decay, reflections[:, 13], rtol=1e-6)


def test_profile_sum_of_a_real_refinement(silicon):
    _, reflections, pattern = silicon
    position, variance, fwhm, f_squared, intensity, rise, decay = reflections[
        :, [5, 6, 7, 9, 11, 12, 13]
    ].T
    tof, calculated, background = pattern[:, 0], pattern[:, 3], pattern[:, 4]
    shape = PeakShape(*(v[:, None] for v in (rise, decay, variance, fwhm)))
    ours = (intensity * f_squared) @ peak(tof - position[:, None], shape)
    refined = calculated != 0
    difference = (ours - (calculated - background))[refined]
    assert np.abs(difference).max() < 1e-4 * calculated.max()
