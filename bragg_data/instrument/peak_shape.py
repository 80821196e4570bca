"""The time-of-flight peak of GSAS-II: a pseudo-Voigt convolved with back-to-back exponentials."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import erfc, erfcx

from bragg_data.arrays import Array
from bragg_data.instrument.diffractometer import Instrument
from bragg_data.instrument.exponential_integral import scaled_exp1_imag

Convention = Literal["gsas2", "textbook"]
"""``textbook`` is the exact convolution. ``gsas2`` is what the program computes, which instrument
constants refined with it need: a minus sign in the rising exponential of the Lorentzian part
(peak maxima shift by 1.6e-4), and a bound in place of erfcx from y = 6 on."""

ERFCX_SWITCH = 6.0  # argument from which GSAS-II replaces erfcx by erfcx_bound
BLEND = 1.2  # half width, in the argument of erfcx, over which the fast simulator blends that step
FWHM_PER_SIGMA = 2.35482  # of a Gaussian, in the digits of GSAS-II
_SMALLEST_WIDTH = 1e-5  # µs; GSAS-II clamps both widths here


class PeakShape(NamedTuple):
    """Shape parameters of a peak, each an array over peaks."""

    rise: Array  # 1/µs, as the decay
    decay: Array
    variance: Array  # of the Gaussian, µs²
    fwhm: Array  # of the Lorentzian, µs


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
    return PeakShape(
        rise=i.alpha / d,
        decay=i.beta_0 + i.beta_1 / d4 + i.beta_q / d2,
        variance=i.sig_0 + i.sig_1 * d2 + i.sig_2 * d4 + i.sig_q * d,
        fwhm=i.x * d + i.y * d2 + i.z + 1e-4 * i.difc * d2 / size + 1e-6 * i.difc * d * microstrain,
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
    root = np.sqrt(2 * s)
    norm = rise * decay / (2 * (rise + decay))
    total = np.zeros(np.broadcast_shapes(offset.shape, s.shape))
    for y, u in (
        ((rise * s + offset) / root, 0.5 * rise * (rise * s + 2 * offset)),
        ((decay * s - offset) / root, 0.5 * decay * (decay * s - 2 * offset)),
    ):
        # erfcx overflows for negative arguments, where e^u erfc(y) is tame: u < 0 there.
        tail = np.exp(-(offset**2) / (2 * s)) * scaled_erfc(np.maximum(y, 0.0))
        head = np.exp(np.minimum(u, 0.0)) * erfc(np.minimum(y, 0.0))
        total += np.where(y < 0, head, tail)
    return np.asarray(norm * total)


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
    return np.asarray(-(2 / np.pi) * norm * (scaled_exp1_imag(p) + scaled_exp1_imag(q)))


def peak(offset: Array, shape: PeakShape, convention: Convention = "gsas2") -> Array:
    r"""Return the whole peak of unit area, :math:`\eta T_L + (1-\eta) T_G`, in 1/µs.

    At offsets Δ = T − T_h in µs, of any shape, against which the shape's arrays broadcast.
    """
    width, eta = mixing(shape.variance, shape.fwhm)
    lorentz = lorentzian_part(offset, shape.rise, shape.decay, width, convention)
    scaled_erfc = erfcx_gsas2 if convention == "gsas2" else erfcx
    gauss = gaussian_part(offset, shape.rise, shape.decay, width, scaled_erfc)
    return eta * lorentz + (1 - eta) * gauss
