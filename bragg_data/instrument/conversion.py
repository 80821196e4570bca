"""Peaks of other programs' profile functions, brought to this project's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from bragg_data.instrument.diffractometer import Instrument, InstrumentError, instrument_of_entries
from bragg_data.instrument.peak_shape import FWHM_PER_SIGMA, PeakShape, mixing, peak, peak_shape

Array = NDArray[np.float64]
Density = Callable[[float, Array], Array]
"""Peak of unit area in 1/µs, of a d-spacing in Å and offsets in µs from its position, any shape."""

_SAME = 0.005  # relative difference of a tabulated value up to which coefficients represent it
_SPACINGS = 12  # at which peaks are fitted
_OFFSETS = np.linspace(-4.0, 8.0, 81)  # at which, in rough widths
_SHARPEST = 20.0  # alpha in Å/µs, beyond which a rise is a step
_WAVELENGTHS = 0.5, 5.0  # Å, where a file does not limit them
_USUAL_D = 0.2, 10.0  # Å, to which the times of a file's window are limited


@dataclass(frozen=True, eq=False)
class OriginalBank:
    """A bank as an instrument file defines it, and as this project represents it."""

    instrument: Instrument
    original: Density
    d: Array  # (n,) Å, ascending, over which the original is used

    def widths(self) -> tuple[Array, Array]:
        """Full widths at half maximum in µs of the original and of this project's peak, (n,)."""
        ours = back_to_back(self.instrument)
        return (
            np.array([_full_width(self.original, self.instrument, d) for d in self.d]),
            np.array([_full_width(ours, self.instrument, d) for d in self.d]),
        )


def usual_spacings(two_theta: float, points: int = 25) -> Array:
    """Return d-spacings (points,) in Å that usual wavelengths reach at an angle in degrees."""
    sine = max(abs(math.sin(math.radians(two_theta / 2))), 0.02)
    low, high = _WAVELENGTHS
    return np.geomspace(low / (2 * sine), high / (2 * sine), points)


def spacings_between(ends: Array, two_theta: float) -> Array:
    """Return d-spacings (25,) in Å between two, or those of usual wavelengths if these are close.

    The angle is in degrees.
    """
    low, high = np.clip(ends, *_USUAL_D)
    return np.geomspace(low, high, 25) if high > 1.5 * low else usual_spacings(two_theta)


def back_to_back(instrument: Instrument, alpha_0: float = 0.0) -> Density:
    """Return the peaks of an instrument, whose rise (1/µs) may have a term alpha_0, too."""

    def density(d: float, offset: Array) -> Array:
        shape = peak_shape(instrument, np.array(d), size=math.inf, microstrain=0.0)
        return peak(offset, shape._replace(rise=shape.rise + alpha_0))

    return density


def tabulated(d: Array, shape: PeakShape) -> Density:
    """Return peaks whose shape is interpolated between d-spacings (n,), ascending, in Å."""

    def density(spacing: float, offset: Array) -> Array:
        return peak(offset, PeakShape(*(np.interp(np.array(spacing), d, v) for v in shape)))

    return density


@dataclass(frozen=True)
class IkedaCarpenter:
    """Peak of a moderator (GSAS's function 2), convolved with the instrument's pseudo-Voigt.

    Fast decay 1/(alpha_0 + alpha_1 λ) and slow decay 1/slow in 1/µs, with the share
    exp(−81.799/(switch λ²)) of slow neutrons. Ikeda & Carpenter, Nucl. Instrum. Methods A239
    (1985) 536; GSAS Technical Manual, time-of-flight profile function 2. The peak begins at its
    position.
    """

    instrument: Instrument  # angle, variance and Lorentzian width
    alpha_0: float
    alpha_1: float
    slow: float
    switch: float

    def __call__(self, d: float, offset: Array) -> Array:
        """Return the density at offsets in µs (any shape)."""
        wavelength = 2 * d * abs(math.sin(math.radians(self.instrument.two_theta / 2)))
        a, b = 1 / (self.alpha_0 + self.alpha_1 * wavelength), 1 / self.slow
        share = math.exp(-81.799 / (self.switch * wavelength**2))
        u = np.linspace(0.0, math.log1p(70 * a * (self.slow + 1 / a)), 800)
        t = np.expm1(u) * 0.2 / a
        sharp = (a * t) ** 2 * np.exp(-a * t)
        x = (a - b) * t
        tail = np.exp(-b * t) - np.exp(-a * t) * (1 + x + x**2 / 2)
        weight = a / 2 * ((1 - share) * sharp + 2 * share * a**2 * b / (a - b) ** 3 * tail)
        weight *= np.gradient(t)
        shape = peak_shape(self.instrument, np.array(d), size=math.inf, microstrain=0.0)
        width, eta = mixing(shape.variance, shape.fwhm)
        z = (np.asarray(offset)[..., None] - t) / width
        gauss = np.exp(-((z * FWHM_PER_SIGMA) ** 2) / 2) * FWHM_PER_SIGMA / math.sqrt(2 * math.pi)
        line = (eta * 2 / math.pi / (1 + 4 * z * z) + (1 - eta) * gauss) / width
        return np.asarray((line * weight).sum(axis=-1))


def fitted_bank(original: Density, start: Instrument, d: Array, function: str) -> OriginalBank:
    """Fit this project's peaks to others over d (n,), and report the remaining difference.

    The rise, decay and widths are free, and a shift of the positions that is a polynomial in d.
    ``start`` has the positions of the original, and a rough shape; ``function`` names the original.
    Raises an InstrumentError if no fit succeeds.
    """
    spacings = np.geomspace(d[0], d[-1], _SPACINGS)
    offsets = _rough_width(start, spacings)[:, None] * _OFFSETS
    target = np.array([original(s, x) for s, x in zip(spacings, offsets, strict=True)])
    target /= (top := target.max(axis=1, keepdims=True))
    names = ["alpha", "beta_0", "beta_1", "beta_q", "sig_0", "sig_1", "sig_2"]
    names += [name for name in ("x", "y", "z") if getattr(start, name) > 0]
    powers = spacings[:, None] ** np.arange(3)

    def shaped(p: Array) -> Instrument:
        return start.with_parameters(**dict(zip(names, map(float, p), strict=False)))

    def difference(p: Array) -> Array:
        shape = peak_shape(shaped(p), spacings[:, None], size=math.inf, microstrain=0.0)
        shifted = offsets - (powers @ p[-3:])[:, None]
        return np.asarray(peak(shifted, shape) / top - target).ravel()

    first = np.array([*(getattr(start, name) for name in names), 0.0, 0.0, 0.0])
    low = np.array([1e-3 * start.alpha, *[0.0] * (len(names) - 1), *[-np.inf] * 3])
    high = np.full(len(first), np.inf)
    high[0] = max(_SHARPEST, 2 * start.alpha)
    limits = low, high
    first = np.maximum(first, low)
    if not (np.isfinite(target).all() and np.isfinite(difference(first)).all()):
        raise InstrumentError(
            f"Bank {start.bank}: no peak of this project could be fitted to {function}. Give an "
            f"instrument file of GSAS-II (.instprm)."
        )
    fit = least_squares(
        difference, first, bounds=limits, x_scale="jac", ftol=1e-5, xtol=1e-5, max_nfev=60
    )
    zero, linear, square = (float(v) for v in fit.x[-3:])
    instrument = shaped(fit.x).with_parameters(
        tzero=start.tzero + zero, difc=start.difc + linear, difa=start.difa + square
    )
    shift = np.abs(powers @ fit.x[-3:] / start.tof_from_d_spacing(spacings)).max()
    bank = OriginalBank(instrument, original, spacings)
    theirs, ours = bank.widths()
    warning = (
        f"bank {start.bank}: {function} was fitted over d {d[0]:.2f}–{d[-1]:.2f} Å. Widths differ "
        f"by at most {100 * np.abs(ours / theirs - 1).max():.1f} % and peaks by "
        f"{100 * np.abs(fit.fun).max():.1f} % of their maximum; positions were shifted by at most "
        f"{shift:.1e} of T, so that the peaks coincide."
    )
    return with_warnings(OriginalBank(instrument, original, d), (*start.warnings, warning))


def bank_of_table(start: Instrument, d: Array, shape: PeakShape, function: str) -> OriginalBank:
    """Represent peak shapes at d (n,), ascending, by coefficients, or fit peaks to them."""
    ones = np.ones(len(d))
    alpha = float(np.mean(shape.rise * d))
    decay = _coefficients(shape.decay, ones, d**-4)
    variance = _coefficients(shape.variance, ones, d**2, d**4)
    lorentz = _coefficients(shape.fwhm, ones, d, d**2) if shape.fwhm.any() else (0.0, 0.0, 0.0)
    instrument = start.with_parameters(
        alpha=alpha,
        **dict(zip(("beta_0", "beta_1"), decay, strict=True)),
        **dict(zip(("sig_0", "sig_1", "sig_2"), variance, strict=True)),
        **dict(zip(("z", "x", "y"), lorentz, strict=True)),
    )
    original = tabulated(d, shape)
    ours = peak_shape(instrument, d, size=math.inf, microstrain=0.0)
    for table, values in zip(shape, ours, strict=True):
        if (np.abs(values - table) > _SAME * np.maximum(np.abs(table), 1e-9)).any():
            return fitted_bank(original, instrument, d, function)
    warning = f"bank {start.bank}: {function} was represented by coefficients to {100 * _SAME:g} %."
    return with_warnings(OriginalBank(instrument, original, d), (*start.warnings, warning))


def with_warnings(bank: OriginalBank, warnings: tuple[str, ...]) -> OriginalBank:
    """Return a bank whose text holds its own values, and the warnings."""
    lines = bank.instrument.instprm.splitlines()[1:]
    entries = dict(line.split(":", 1) for line in lines)
    instrument = instrument_of_entries(entries, 1, "Instrument file", warnings)
    return OriginalBank(instrument, bank.original, bank.d)


def _coefficients(values: Array, *terms: Array) -> tuple[float, ...]:
    """Return non-negative coefficients of terms for values, in relative least squares."""
    weighted = np.stack(terms, axis=1) / values[:, None]
    return tuple(float(c) for c in nnls(weighted, np.ones(len(values)))[0])


def _rough_width(instrument: Instrument, d: Array) -> Array:
    shape = peak_shape(instrument, d, size=math.inf, microstrain=0.0)
    return np.asarray(mixing(shape.variance, shape.fwhm)[0] + 1 / shape.rise + 1 / shape.decay)


def _full_width(density: Density, instrument: Instrument, d: float) -> float:
    x = np.linspace(-6.0, 12.0, 451) * _rough_width(instrument, np.array(d))
    y = density(float(d), x)
    top = int(np.argmax(y))
    left = np.interp(y[top] / 2, y[: top + 1], x[: top + 1])
    right = np.interp(-y[top] / 2, -y[top:], x[top:])
    return float(right - left)
