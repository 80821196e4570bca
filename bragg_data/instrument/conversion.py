"""Peaks of other programs' profile functions, brought to this project's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from bragg_data.arrays import Array
from bragg_data.instrument.diffractometer import Instrument, InstrumentError, instrument_of_entries
from bragg_data.instrument.incident import IncidentSpectrum
from bragg_data.instrument.peak_shape import (
    FWHM_PER_SIGMA,
    Convention,
    PeakShape,
    erfcx_gsas2,
    gaussian_part,
    mixing,
    peak,
    peak_shape,
)

Density = Callable[[float, Array], Array]
"""Peak of unit area in 1/µs, of a d-spacing in Å and offsets in µs from its position, any shape."""

_SAME = 0.005  # relative difference of a tabulated value up to which coefficients represent it
_SAME_WIDTH = 0.02  # relative, and
_SAME_POSITION = 3e-5  # of T: differences of peaks up to which coefficients are kept
_FARTHEST = 5e-4  # of T: difference of maxima from which a fit is refused
_SPACINGS = 12  # at which peaks are fitted
_OFFSETS = np.linspace(-4.0, 8.0, 121)  # at which, in rough widths
# Weights of relative widths and of maxima in T, where heights differ by 1. Tuned on WISH (five
# banks) and GEM (four): widths within 5 % and maxima within 1.5e-4, with peaks 1 to 12 % apart.
# Without the first, widths at GEM's 154° are 27 % off; with 1e4 as second, peaks differ by 34 %.
_OF_WIDTH, _OF_MAXIMUM = 10.0, 4e3
_FASTEST = 1.0  # beta in µs and kappa, of a moderator; GEM has 32 to 37, and 43 to 57
_SHARPEST = 20.0  # alpha in Å/µs, beyond which a rise is a step
_WAVELENGTHS = 0.5, 5.0  # Å, where a file does not limit them
_USUAL_D = 0.2, 10.0  # Å, to which the times of a file's window are limited


@dataclass(frozen=True, eq=False)
class OriginalBank:
    """A bank as an instrument file defines it, and as this project represents it."""

    instrument: Instrument
    original: Density
    d: Array  # (n,) Å, ascending, over which the original is used
    reference: Instrument | None = None  # of whose positions the original is, if of another's
    window: tuple[float, float] | None = None  # first and last time in µs, where a file states them
    incident: IncidentSpectrum | None = None  # by which profiles have to be divided, if stated

    @property
    def exact(self) -> Instrument:
        """The instrument whose peaks this project draws: with its moderator, if it states one."""
        reference = self.reference
        return reference if reference and reference.moderator else self.instrument

    def widths(self) -> tuple[Array, Array]:
        """Return full widths at half maximum in µs, of the original and of this project, (n,)."""
        theirs, ours = self._widths_and_maxima()
        return theirs[0], ours[0]

    def maxima(self) -> tuple[Array, Array]:
        """Return times of the maxima in µs, of the original and of this project, (n,)."""
        theirs, ours = self._widths_and_maxima()
        return theirs[1], ours[1]

    def difference(self) -> tuple[float, float, float]:
        """Return the largest differences of widths and heights, relative, and of maxima in T."""
        (widths, maxima), (our_widths, our_maxima) = self._widths_and_maxima()
        i, reference = self.instrument, self.reference or self.instrument
        heights = 0.0
        for d in self.d:
            x = _OFFSETS * _rough_width(i, d)
            theirs = self.original(float(d), x)
            ours = peaks_of(i)(
                float(d), x + float(reference.tof_from_d_spacing(d) - i.tof_from_d_spacing(d))
            )
            heights = max(heights, float(np.abs(ours / ours.max() - theirs / theirs.max()).max()))
        return (
            float(np.abs(our_widths / widths - 1).max()),
            heights,
            float(np.abs(our_maxima / maxima - 1).max()),
        )

    def _widths_and_maxima(self) -> tuple[Array, Array]:
        """Widths and maxima of both, each (2, n)."""
        reference = self.reference or self.instrument
        sides = ((reference, self.original), (self.instrument, peaks_of(self.instrument)))
        theirs, ours = (
            np.array([_width_and_maximum(density, i, float(d)) for d in self.d]).T
            for i, density in sides
        )
        return theirs, ours


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


def peaks_of(
    instrument: Instrument, alpha_0: float = 0.0, convention: Convention = "gsas2"
) -> Density:
    """Return the peaks of an instrument, whose rise (1/µs) may have a term alpha_0, too."""

    def density(d: float, offset: Array) -> Array:
        shape = peak_shape(instrument, np.array(d), size=math.inf, microstrain=0.0)
        return peak(offset, shape._replace(rise=shape.rise + alpha_0), convention)

    return density


def tabulated(d: Array, shape: PeakShape, convention: Convention = "gsas2") -> Density:
    """Return peaks whose shape is interpolated between d-spacings (n,), ascending, in Å."""

    def density(spacing: float, offset: Array) -> Array:
        of_peak = PeakShape(*(np.interp(np.array(spacing), d, v) for v in shape[:4]))
        return peak(offset, of_peak, convention)

    return density


def bank_of_moderator(exact: Instrument, d: Array, function: str) -> OriginalBank:
    """Fit peaks of back-to-back exponentials to those of a moderator, which the bank keeps.

    Raises an InstrumentError if the moderator has no decay.
    """
    assert exact.moderator is not None
    alpha_0, alpha_1, slow, switch = exact.moderator
    sine = abs(math.sin(math.radians(exact.two_theta / 2)))
    fast = alpha_0 + 2 * sine * alpha_1 * d
    if not (min(slow, switch) >= _FASTEST and sine > 0 and fast.min() > 0):
        raise InstrumentError(
            f"Bank {exact.bank}: {function} has no moderator that could be (alpha {alpha_0:g} and "
            f"{alpha_1:g}, beta {slow:g}, kappa {switch:g} at 2θ {exact.two_theta:g}°): beta is a "
            f"time in µs, some tens, and so is kappa."
        )
    rise = 1 / (alpha_0 + 2 * sine * alpha_1)
    begin = replace(exact, moderator=None, alpha=max(rise, 0.01), beta_0=1 / slow, beta_1=0.01)
    return replace(fitted_bank(peaks_of(exact), begin, d, function), reference=exact)


def represented(instrument: Instrument, d: Array) -> Instrument:
    """Return an instrument with back-to-back exponentials, as other programs need them, over d."""
    return _represented(instrument, float(d.min()), float(d.max()))


@lru_cache(maxsize=64)
def _represented(instrument: Instrument, shortest: float, longest: float) -> Instrument:
    if instrument.moderator is None:
        return instrument
    d = spacings_between(np.array([shortest, longest]), instrument.two_theta)
    return bank_of_moderator(instrument, d, "the peak of Ikeda & Carpenter").instrument


def bank_of_functions(
    start: Instrument,
    d: Array,
    functions: tuple[Callable[[Array], Array], Callable[[Array], PeakShape]],
    function: str,
    convention: Convention = "gsas2",
) -> OriginalBank:
    """Fit positions in µs and peak shapes that are any functions of the d-spacing, over d (n,)."""
    tof, shape = functions
    terms = np.stack([np.ones_like(d), d, d**2, 1 / d], axis=1) / tof(d)[:, None]
    zero, linear, square, inverse = np.linalg.lstsq(terms, np.ones_like(d), rcond=None)[0].tolist()
    positions = {"tzero": zero, "difc": linear, "difa": square, "difb": inverse}
    begin = start.with_parameters(**positions, **shape_parameters(d, shape(d)))

    def original(x: float, offset: Array) -> Array:
        at = np.array(x)
        return peak(offset + begin.tof_from_d_spacing(at) - tof(at), shape(at), convention)

    return fitted_bank(original, begin, d, function)


def fitted_if_different(bank: OriginalBank, function: str) -> OriginalBank:
    """Return the bank if its peaks are those of the original, or else fit them."""
    width, _, maximum = bank.difference()
    if width <= _SAME_WIDTH and maximum <= _SAME_POSITION:
        return with_warnings(bank, bank.instrument.warnings)
    return fitted_bank(bank.original, bank.instrument, bank.d, function)


def fitted_bank(original: Density, start: Instrument, d: Array, function: str) -> OriginalBank:
    """Fit this project's peaks to others over d (n,), and report the remaining difference.

    Rise, decay and widths are free, and a shift of the positions by the terms of difC, difA, difB
    and Zero. Differences of whole peaks, of their widths and of their maxima are minimised.
    ``start`` has the positions from which the offsets of the original count, and a rough shape;
    ``function`` names the original. Raises an InstrumentError if no fit succeeds.
    """
    from scipy.optimize import least_squares  # slow to import, and seldom needed

    spacings = np.geomspace(d[0], d[-1], _SPACINGS)
    tof = start.tof_from_d_spacing(spacings)
    offsets = _rough_width(start, spacings)[:, None] * _OFFSETS
    target = np.array([original(s, x) for s, x in zip(spacings, offsets, strict=True)])
    top = target.max(axis=1, keepdims=True)
    weights = np.repeat([1.0, _OF_WIDTH, _OF_MAXIMUM], [target.size, len(spacings), len(spacings)])
    names = ["alpha", "beta_0", "beta_1", "beta_q", "sig_0", "sig_1", "sig_2", "sig_q"]
    lorentzian = max(start.x, start.y, start.z) > 0
    names += ["x", "y", "z"] if lorentzian else []
    powers = spacings[:, None] ** np.array([0, 1, 2, -1])

    def shaped(p: Array) -> Instrument:
        return start.with_parameters(**dict(zip(names, map(float, p), strict=False)))

    def difference(p: Array, weights: Array) -> Array:
        shape = peak_shape(shaped(p), spacings[:, None], size=math.inf, microstrain=0.0)
        shifted = offsets - (powers @ p[-4:])[:, None]
        if lorentzian:
            y = peak(shifted, shape) / top
        else:
            width = FWHM_PER_SIGMA * np.sqrt(np.maximum(shape.variance, 1e-10))
            y = gaussian_part(shifted, shape.rise, shape.decay, width, erfcx_gsas2) / top
        ours = np.array([_measured(*pair) for pair in zip(offsets, y, strict=True)]).T
        relative = (y - target).ravel(), ours[0] / theirs[0] - 1, (ours[1] - theirs[1]) / tof
        return np.asarray(weights * np.concatenate(relative))

    first = np.array([*(getattr(start, name) for name in names), *[0.0] * 4])
    low = np.array([1e-3 * start.alpha, *[0.0] * (len(names) - 1), *[-np.inf] * 4])
    high = np.full(len(first), np.inf)
    high[0] = max(_SHARPEST, 2 * start.alpha)
    first = np.maximum(first, low)
    fails = InstrumentError(
        f"Bank {start.bank}: no peak of this project could be fitted to {function}. Give an "
        f"instrument file of GSAS-II (.instprm)."
    )
    if not (np.isfinite(target).all() and (top > 0).all()):
        raise fails
    target /= top
    theirs = np.array([_measured(*pair) for pair in zip(offsets, target, strict=True)]).T
    if not ((theirs[0] > 0).all() and np.isfinite(difference(first, weights)).all()):
        raise fails
    limits = low, high
    try:
        for of_stage, tolerance in ((np.minimum(weights, 1.0), 1e-3), (weights, 1e-4)):
            fit = least_squares(
                difference,
                first,
                args=(of_stage,),
                bounds=limits,
                x_scale="jac",
                ftol=tolerance,
                xtol=tolerance,
                max_nfev=60,
            )
            first = fit.x
    except ValueError as error:  # of values that are not finite
        raise fails from error
    zero, linear, square, inverse = (float(v) for v in fit.x[-4:])
    instrument = shaped(fit.x).with_parameters(
        tzero=start.tzero + zero,
        difc=start.difc + linear,
        difa=start.difa + square,
        difb=start.difb + inverse,
    )
    shift = np.abs(instrument.tof_from_d_spacing(d) / start.tof_from_d_spacing(d) - 1).max()
    bank = OriginalBank(instrument, original, d, start)
    width, height, maximum = bank.difference()
    if not maximum <= _FARTHEST:
        raise InstrumentError(
            f"Bank {start.bank}: {function} cannot be represented over d {d[0]:.2f}–{d[-1]:.2f} Å: "
            f"maxima would be off by {maximum:.1e} of T. Limit the window of times in the file, or "
            f"give an instrument file of GSAS-II (.instprm)."
        )
    warning = (
        f"bank {start.bank}: {function} was fitted over d {d[0]:.2f}–{d[-1]:.2f} Å. Widths differ "
        f"by at most {100 * width:.1f} %, peaks by {100 * height:.1f} % of their maximum, and "
        f"maxima by {maximum:.1e} of T; difC, difA, difB and Zero changed by {shift:.1e} of T."
    )
    return with_warnings(bank, (*start.warnings, warning))


def bank_of_table(
    start: Instrument, d: Array, shape: PeakShape, function: str, convention: Convention = "gsas2"
) -> OriginalBank:
    """Represent peak shapes at d (n,), ascending, by coefficients, or fit peaks to them."""
    instrument = start.with_parameters(**shape_parameters(d, shape))
    original = tabulated(d, shape, convention)
    ours = peak_shape(instrument, d, size=math.inf, microstrain=0.0)
    for table, values in zip(shape[:4], ours[:4], strict=True):
        if (np.abs(values - table) > _SAME * np.maximum(np.abs(table), 1e-9)).any():
            return fitted_bank(original, instrument, d, function)
    warning = f"bank {start.bank}: {function} was represented by coefficients to {100 * _SAME:g} %."
    bank = with_warnings(OriginalBank(instrument, original, d), (*start.warnings, warning))
    return bank if convention == "gsas2" else fitted_if_different(bank, function)


def with_warnings(bank: OriginalBank, warnings: tuple[str, ...]) -> OriginalBank:
    """Return a bank whose text holds its own values, and the warnings."""
    lines = bank.instrument.instprm.splitlines()[1:]
    entries = dict(line.split(":", 1) for line in lines)
    instrument = instrument_of_entries(entries, 1, "Instrument file", warnings)
    return replace(bank, instrument=instrument)


def shape_parameters(d: Array, shape: PeakShape) -> dict[str, float]:
    """Return the parameters of an instrument that come near to peak shapes at d (n,)."""
    ones = np.ones(len(d))
    terms = {
        ("beta_0", "beta_1", "beta_q"): (shape.decay, (ones, d**-4, d**-2)),
        ("sig_0", "sig_1", "sig_2"): (shape.variance, (ones, d**2, d**4)),
        ("z", "x", "y"): (shape.fwhm, (ones, d, d**2)),
    }
    parameters = {"alpha": float(np.mean(shape.rise * d))}
    for names, (values, of_d) in terms.items():
        coefficients = _coefficients(values, *of_d) if values.any() else (0.0,) * 3
        parameters |= dict(zip(names, coefficients, strict=True))
    return parameters


def _coefficients(values: Array, *terms: Array) -> tuple[float, ...]:
    """Return non-negative coefficients of terms for values, in relative least squares."""
    from scipy.optimize import nnls

    scale = np.abs(values)
    scale = np.maximum(scale, 1e-3 * scale.max())  # some may be zero
    return tuple(nnls(np.stack(terms, axis=1) / scale[:, None], values / scale)[0].tolist())


def _rough_width(instrument: Instrument, d: Array) -> Array:
    shape = peak_shape(instrument, d, size=math.inf, microstrain=0.0)
    return np.asarray(mixing(shape.variance, shape.fwhm)[0] + 1 / shape.rise + 1 / shape.decay)


def _width_and_maximum(density: Density, instrument: Instrument, d: float) -> tuple[float, float]:
    """Return the full width at half maximum, and the time of the maximum, of one peak."""
    x = np.linspace(-6.0, 12.0, 901) * _rough_width(instrument, np.array(d))
    width, maximum = _measured(x, density(d, x))
    return width, maximum + instrument.tof_from_d_spacing(d)


def _measured(x: Array, y: Array) -> tuple[float, float]:
    """Return the full width at half maximum, and the position of the maximum (of a parabola)."""
    top = min(max(int(np.argmax(y)), 1), len(y) - 2)
    left = np.interp(y[top] / 2, y[: top + 1], x[: top + 1])
    right = np.interp(-y[top] / 2, -y[top:], x[top:])
    before, at, behind = y[top - 1 : top + 2]
    curvature = before - 2 * at + behind
    step = 0.0 if curvature == 0 else (before - behind) / (2 * curvature)
    return float(right - left), float(x[top] + (x[1] - x[0]) * step)
