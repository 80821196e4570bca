"""Time-of-flight peaks: a pseudo-Voigt convolved with the pulse of a moderator.

The pulse is GSAS-II's, back-to-back exponentials, or that of Ikeda & Carpenter.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfc, erfcx

from bragg_data.arrays import Array
from bragg_data.instrument.diffractometer import Instrument
from bragg_data.instrument.exponential_integral import scaled_exp1

Convention = Literal["gsas2", "textbook"]
"""``textbook`` is the exact convolution. ``gsas2`` is what the program computes, which instrument
constants refined with it need: a minus sign in the rising exponential of the Lorentzian part
(peak maxima shift by 1.6e-4), and a bound in place of erfcx from y = 6 on."""

ERFCX_SWITCH = 6.0  # argument from which GSAS-II replaces erfcx by erfcx_bound
BLEND = 1.2  # half width, in the argument of erfcx, over which the fast simulator blends that step
FWHM_PER_SIGMA = 2.35482  # of a Gaussian, in the digits of GSAS-II
_STEEPEST = 500.0  # of α σ: a pulse as short as that is none, and its terms cancel
_APART = 0.003  # of α and β, relative: nearer ones cancel
_SMALLEST_WIDTH = 1e-5  # µs; GSAS-II clamps both widths here


_Values = NDArray[np.inexact[Any]]


class PeakShape(NamedTuple):
    """Shape parameters of a peak, each an array over peaks.

    With a share of slow neutrons the pulse is that of Ikeda & Carpenter, and ``rise`` the rate of
    the fast ones; without, it is one of back-to-back exponentials.
    """

    rise: Array  # 1/µs, as the decay
    decay: Array
    variance: Array  # of the Gaussian, µs²
    fwhm: Array  # of the Lorentzian, µs
    slow_share: Array | None = None

    def columns(self) -> "PeakShape":
        """Return the parameters with a further axis, for the points of a profile."""
        share = None if self.slow_share is None else self.slow_share[..., None]
        rise, decay, variance, fwhm = (value[..., None] for value in self[:4])
        return PeakShape(rise, decay, variance, fwhm, share)


def peak_shape(
    instrument: Instrument, d: Array, *, size: Array | float, microstrain: Array | float
) -> PeakShape:
    r"""Return the shape parameters of reflections at d-spacings in Å (any shape).

    .. math::
        \alpha_h &= \alpha / d, \quad \beta_h = \beta_0 + \beta_1/d^4 + \beta_q/d^2 \\
        \sigma_h^2 &= \sigma_0 + \sigma_1 d^2 + \sigma_2 d^4 + \sigma_q d \\
        \gamma_h &= X d + Y d^2 + Z + 10^{-4}\,\mathrm{difC}\,d^2/L
                    + 10^{-6}\,\mathrm{difC}\,d\,\varepsilon

    GSASIIstrMath.GetPowderProfileFit, isotropic and purely Lorentzian broadening. The crystallite
    size L in µm and the microstrain ε in units of 1e-6 are broadcast against d.
    """
    d2 = d * d
    d4 = d2 * d2
    i = instrument
    rise, decay, slow_share = i.alpha / d, i.beta_0 + i.beta_1 / d4 + i.beta_q / d2, None
    if i.moderator is not None:
        alpha_0, alpha_1, beta_0, kappa = i.moderator
        wavelength = 2 * d * abs(math.sin(math.radians(i.two_theta / 2)))
        rise, decay = 1 / (alpha_0 + alpha_1 * wavelength), np.full_like(d, 1 / beta_0)
        slow_share = np.exp(-81.799 / (kappa * wavelength**2))
    return PeakShape(
        rise=rise,
        decay=decay,
        variance=i.sig_0 + i.sig_1 * d2 + i.sig_2 * d4 + i.sig_q * d,
        fwhm=i.x * d + i.y * d2 + i.z + 1e-4 * i.difc * d2 / size + 1e-6 * i.difc * d * microstrain,
        slow_share=slow_share,
    )


def mixing(variance: Array, fwhm: Array) -> tuple[Array, Array]:
    r"""Return the full width W (µs) and the Lorentzian share η of the pseudo-Voigt.

    From the Gaussian variance in µs² and the Lorentzian full width in µs: Thompson, Cox & Hastings,
    J. Appl. Cryst. 20 (1987) 79; GSAS-II mixes *before* it convolves with the exponentials, and
    clamps both widths from below.
    """
    sigma = np.sqrt(np.maximum(variance, _SMALLEST_WIDTH**2))
    lorentz = np.maximum(fwhm, _SMALLEST_WIDTH)
    gauss = FWHM_PER_SIGMA * sigma
    width = (
        gauss**5
        + 2.69269 * gauss**4 * lorentz
        + 2.42843 * gauss**3 * lorentz**2
        + 4.47163 * gauss**2 * lorentz**3
        + 0.07842 * gauss * lorentz**4
        + lorentz**5
    ) ** 0.2
    r = lorentz / width
    return width, 1.36603 * r - 0.47719 * r**2 + 0.11116 * r**3


def share_at_width(ratio: Array) -> Array:
    """Return the Lorentzian share η where W is this many times the Gaussian σ: :func:`mixing`.

    It is 0 where W is below the Gaussian full width.
    """
    lorentz = np.concatenate([[0.0], np.geomspace(1e-3, 1e4, 2000)])
    width, share = mixing(np.ones(len(lorentz)), lorentz)
    return np.interp(ratio, width, share, left=0.0)


def gaussian_part(
    offset: Array,
    rise: Array,
    decay: Array,
    width: Array,
    scaled_erfc: Callable[[Array], Array] = erfcx,
) -> Array:
    r"""Return the Gaussian of full width W convolved with back-to-back exponentials, in 1/µs.

    :math:`T_G = N [h(y_1) + h(y_2)]`, :math:`y_1 = (\alpha S + \Delta)/\sqrt{2S}`,
    :math:`y_2 = (\beta S - \Delta)/\sqrt{2S}`, :math:`h(y) = e^{-\Delta^2/2S}\,\mathrm{erfcx}(y)`,
    :math:`N = \alpha\beta/2(\alpha+\beta)`. Von Dreele, Jorgensen & Windsor, J. Appl. Cryst. 15
    (1982) 581. The offset is Δ = T − T_h in µs, against which the other arguments broadcast;
    ``scaled_erfc`` is erfcx or a stand-in for it: GSAS-II's, or the blended one.
    """
    s = (width / FWHM_PER_SIGMA) ** 2
    norm = rise * decay / (rise + decay)
    falling = _falling(offset, decay, s, scaled_erfc)
    return np.asarray(norm * (_falling(-offset, rise, s, scaled_erfc) + falling))


def _falling(
    offset: Array, rate: Array, s: Array, scaled_erfc: Callable[[Array], Array] = erfcx
) -> Array:
    """Return a Gaussian of variance s, convolved with exp(−rate t) of t > 0."""
    y = (rate * s - offset) / np.sqrt(2 * s)
    # erfcx overflows for negative arguments, where e^u erfc(y) is tame: u < 0 there.
    tail = np.exp(-(offset**2) / (2 * s)) * scaled_erfc(np.maximum(y, 0.0))
    head = np.exp(np.minimum(0.5 * rate * (rate * s - 2 * offset), 0.0)) * erfc(np.minimum(y, 0.0))
    return np.asarray(0.5 * np.where(y < 0, head, tail))


def erfcx_bound(y: Array) -> Array:
    r"""Return :math:`(2/\sqrt\pi) / (y + \sqrt{y^2 + 4/\pi})`, an upper bound of erfcx(y).

    Abramowitz & Stegun 7.1.13. At y = 6 it is 0.47 % too high.
    """
    return np.asarray(2 / np.sqrt(np.pi) / (y + np.sqrt(y * y + 4 / np.pi)))


def erfcx_gsas2(y: Array) -> Array:
    """Return erfcx as GSAS-II computes it: the bound for y ≥ 6, with a step of 0.47 % there.

    Routine HFUNC of GSAS-II's Fortran. Where the decay is long compared with the width the step
    falls into the peak, and is as large as 1e-3 of its maximum.
    """
    return np.where(y >= ERFCX_SWITCH, erfcx_bound(y), erfcx(y))


def erfcx_blended(y: Array) -> Array:
    """Return :func:`erfcx_gsas2` with its step spread smoothly over y = 6 ± :data:`BLEND`."""
    z = np.clip((y - ERFCX_SWITCH) / BLEND, -1.0, 1.0)
    share = 0.5 + z * (0.9375 + z * z * (-0.625 + 0.1875 * z * z))
    exact = erfcx(y)
    return np.asarray(exact + share * (erfcx_bound(y) - exact))


def lorentzian_part(
    offset: Array, rise: Array, decay: Array, width: Array, convention: Convention = "gsas2"
) -> Array:
    r"""Return the Lorentzian of full width W convolved with back-to-back exponentials, in 1/µs.

    :math:`T_L = -(2N/\pi)\{\mathrm{Im}[e^p E_1(p)] + \mathrm{Im}[e^q E_1(q)]\}`,
    :math:`p = \mp\alpha\Delta + i\alpha W/2`, :math:`q = -\beta\Delta + i\beta W/2`. Arguments as
    those of :func:`gaussian_part`; the :data:`Convention` is the sign of p.
    """
    norm = rise * decay / (2 * (rise + decay))
    half = 0.5 * width
    sign = -1.0 if convention == "gsas2" else 1.0
    p = sign * rise * offset + 1j * (rise * half)
    q = -decay * offset + 1j * (decay * half)
    return np.asarray(-(2 / np.pi) * norm * (scaled_exp1(p).imag + scaled_exp1(q).imag))


def ikeda_carpenter_parts(offset: Array, shape: PeakShape, width: Array) -> tuple[Array, Array]:
    r"""Return Gaussian and Lorentzian of full width W convolved with a moderator's pulse, in 1/µs.

    The pulse begins at Δ = 0; with the share R of slow neutrons it is

    .. math:: \tfrac{\alpha^3}{2} \Big\{(1-R)\, t^2 e^{-\alpha t} + \frac{2 R \beta}{x^3}
        \big[e^{-\beta t} - e^{-\alpha t} (1 + x t + \tfrac{1}{2} x^2 t^2)\big]\Big\},
        \quad x = \alpha - \beta.

    Ikeda & Carpenter, Nucl. Instrum. Methods A239 (1985) 536. Convolutions with t^n e^{-αt} follow
    from that with e^{-αt} in steps of n, by parts. Arguments as of :func:`gaussian_part`.
    """
    assert shape.slow_share is not None
    s = (width / FWHM_PER_SIGMA) ** 2
    a = np.minimum(shape.rise, _STEEPEST / np.sqrt(s))
    b = np.where(np.abs(a - shape.decay) < _APART * a, (1 - _APART) * a, shape.decay)
    # Of the Gaussian, then of 1/(Δ − iW/2), whose imaginary part is π times the Lorentzian.
    of_fast = _falling(offset, a, s)
    normal = np.exp(-(offset**2) / (2 * s)) * np.sqrt(s / (2 * np.pi))
    first = normal + (offset - a * s) * of_fast
    terms = of_fast, first, (offset - a * s) * first + s * of_fast
    gauss = _of_pulse(_falling(offset, b, s), terms, a, b, shape.slow_share)
    z = offset - 0.5j * width
    pole = -scaled_exp1(-a * z)
    first_pole = z * pole - 1 / a
    poles = pole, first_pole, z * first_pole - 1 / a**2
    lorentz = _of_pulse(-scaled_exp1(-b * z), poles, a, b, shape.slow_share)
    return gauss.real, lorentz.imag / np.pi


def _of_pulse(
    slow: _Values, of_fast: tuple[_Values, _Values, _Values], a: Array, b: Array, share: Array
) -> _Values:
    """Return the sum of convolutions with e^{-bt}, and with t^n e^{-at} of n = 0, 1, 2."""
    x, (zeroth, first, second) = a - b, of_fast
    delayed = slow - zeroth - x * first - x**2 / 2 * second
    return np.asarray(a**3 * ((1 - share) / 2 * second + share * b / x**3 * delayed))


def parts(
    offset: Array,
    shape: PeakShape,
    width: Array,
    convention: Convention = "gsas2",
    scaled_erfc: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Return the Gaussian and the Lorentzian part of peaks of full width W, in 1/µs.

    At offsets in µs against which the other arguments broadcast; ``scaled_erfc`` as of
    :func:`gaussian_part`, without one that of the convention. A moderator's are exact.
    """
    if shape.slow_share is not None:
        return ikeda_carpenter_parts(offset, shape, width)
    scaled_erfc = scaled_erfc or (erfcx_gsas2 if convention == "gsas2" else erfcx)
    gauss = gaussian_part(offset, shape.rise, shape.decay, width, scaled_erfc)
    return gauss, lorentzian_part(offset, shape.rise, shape.decay, width, convention)


def peak(offset: Array, shape: PeakShape, convention: Convention = "gsas2") -> Array:
    r"""Return the whole peak of unit area, :math:`\eta T_L + (1-\eta) T_G`, in 1/µs.

    At offsets Δ = T − T_h in µs, of any shape, against which the shape's arrays broadcast.
    """
    width, eta = mixing(shape.variance, shape.fwhm)
    gauss, lorentz = parts(offset, shape, width, convention)
    return eta * lorentz + (1 - eta) * gauss
