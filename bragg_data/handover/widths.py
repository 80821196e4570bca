"""Bins of a measurement and broadening of a sample as parts of the peak width.

For programs that calculate at points, and hold the widths of a phase in one set of constants.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from bragg_data.arrays import Array
from bragg_data.instrument.conversion import OriginalBank, peaks_of
from bragg_data.instrument.instprm import Instrument
from bragg_data.instrument.peak_shape import peak_shape
from bragg_data.refinement.joint_parameters import LEAST_INVERSE
from bragg_data.refinement.joint_result import RefinedBank, RefinedPhaseResult


def with_bin_variance(bank: RefinedBank) -> Instrument:
    """Return a bank's calibration with the variance of its bins, Δ²/12, added to its peaks'.

    The mean of a peak over a bin of width Δ is its convolution with a box, which has this variance;
    of a peak as wide as the bin it differs by 1 % of the height from that of a Gaussian.
    """
    measured, instrument = bank.bank, bank.instrument
    variance = np.diff(measured.edges, axis=1)[:, 0] ** 2 / 12
    shape = peak_shape(instrument, measured.d, size=np.inf, microstrain=0.0)
    weight = 1 / (shape.variance + variance)
    added = _coefficients(variance, weight, measured.d, (0, 2, 4))
    sigmas = zip((instrument.sig_0, instrument.sig_1, instrument.sig_2), added, strict=True)
    return instrument.with_parameters(
        **dict(zip(("sig_0", "sig_1", "sig_2"), map(sum, sigmas), strict=True))
    )


def size_and_strain(phase: RefinedPhaseResult) -> tuple[float, float]:
    """Return the size in µm and the microstrain in 1e-6 of a phase."""
    values = {name: value for name, (value, _) in phase.parameters.items()}
    return 1 / max(values.get("1/size", 0.0), LEAST_INVERSE), values.get("microstrain", 0.0)


def with_broadening(instrument: Instrument, phase: RefinedPhaseResult) -> Instrument:
    """Return a calibration whose Lorentzian width contains that of a phase."""
    size, microstrain = size_and_strain(phase)
    return instrument.with_parameters(
        x=instrument.x + 1e-6 * instrument.difc * microstrain,
        y=instrument.y + 1e-4 * instrument.difc / size,
    )


def without_odd_terms(instrument: Instrument, d: Array) -> Instrument:
    """Return a calibration without beta_q and sig_q, which are fitted by the other terms over d."""
    changes = {"beta_q": 0.0, "sig_q": 0.0}
    shape = peak_shape(instrument, d, size=np.inf, microstrain=0.0)
    if instrument.beta_q:
        beta = _coefficients(shape.decay, 1 / shape.decay, d, (0, -4))
        changes |= dict(zip(("beta_0", "beta_1"), beta, strict=True))
    if instrument.sig_q:
        sigma = _coefficients(shape.variance, 1 / shape.variance, d, (0, 2, 4))
        changes |= dict(zip(("sig_0", "sig_1", "sig_2"), sigma, strict=True))
    return instrument.with_parameters(**changes)


def difference_of_peaks(
    ours: Instrument, theirs: Instrument, phases: Sequence[RefinedPhaseResult], d: Array
) -> str:
    """Return how far peaks of exact convolutions are from this project's, as the end of a sentence.

    Over d-spacings (n,), with the broadening of the phases. The Lorentzian part of this project's
    peaks is GSAS-II's (:data:`bragg_data.instrument.peak_shape.Convention`).
    """
    spacings = np.geomspace(float(d.min()), float(d.max()), 12)
    heights, maxima = [0.0], [0.0]
    for phase in phases:
        broad = with_broadening(theirs, phase)
        exact = peaks_of(broad, convention="textbook")
        pair = OriginalBank(with_broadening(ours, phase), exact, spacings, broad)
        _, height, maximum = pair.difference()
        heights.append(height)
        maxima.append(maximum)
    if max(heights) < 5e-4:
        return "are the same."
    return (
        f"differ by up to {100 * max(heights):.1f} % of their maximum, and the maxima by "
        f"{max(maxima):.1e} of T."
    )


def _coefficients(
    values: Array, weight: Array, d: Array, powers: tuple[int, ...]
) -> tuple[float, ...]:
    """Return non-negative coefficients of powers of d for values, (n,) each."""
    columns = np.stack([d**power for power in powers], axis=1) * weight[:, None]
    length = np.linalg.norm(columns, axis=0)
    return tuple((nnls(columns / length, values * weight)[0] / length).tolist())
