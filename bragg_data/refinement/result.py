"""What a refinement returns, and how refinements of one profile are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bragg_data.measurement.resampling import GriddedProfile

# Mean square of sums over runs of one sign over that of single values, of independent normal ones:
# runs have a mean length of 2 with variance 2, absolute values a mean of √(2/π).
_INDEPENDENT = 1 + 4 / np.pi


class RefinementError(ValueError):
    """A profile to which no pattern can be fitted."""


def fitted_points(gridded: GriddedProfile, fewest: int) -> NDArray[np.bool_]:
    """Return the points (points,) that can be fitted; a RefinementError if they are too few."""
    fitted = gridded.informative
    if fitted.sum() < fewest:
        raise RefinementError(
            f"{fitted.sum()} points are covered, too few to refine anything on ({fewest})."
        )
    return fitted


@dataclass(frozen=True, eq=False)
class PatternFit:
    """A calculated pattern with the background and scale that fit a measurement best.

    Attributes
    ----------
    calculated, background, difference : shape (points,)
        Pattern and background, background, and measured minus calculated intensities on the
        campaign's grid, in the measurement's units; NaN where not fitted.
    scale
        Factor on the simulated intensity; 0 where the best one is negative.
    rwp, rwp_background
        Weighted profile R factor sqrt(sum w (y - c)² / sum w y²), w = 1/sigma²; the same with the
        background subtracted from y in the denominator.
    reduced_chi2
        Weighted sum of squared differences over the points less the parameters.
    """

    calculated: NDArray[np.float64]
    background: NDArray[np.float64]
    difference: NDArray[np.float64]
    scale: float
    rwp: float
    rwp_background: float
    reduced_chi2: float


@dataclass(frozen=True, eq=False)
class RefinementResult:
    """The refined structure, or lattice, of one phase.

    Attributes
    ----------
    cell, su : shape (6,)
        a, b, c in ångström, angles in degrees, and their standard uncertainties (0 where fixed),
        scaled by the square root of the reduced χ², as is usual, and of the correlation.
    parameters, parameters_su
        The other refined parameters and their standard uncertainties: ``u_scale`` (factor on the
        displacement parameters), ``size`` (µm), ``microstrain`` (1e-6), ``tzero`` (µs, if refined),
        and ``shift_1`` … along the phase's free coordinates (Å;
        :func:`bragg_data.crystallography.displacement_modes.free_coordinates`).
    chi2, n_points, n_parameters
        Weighted sum of squares, the number of points and of fitted parameters.
    correlation
        Factor, at least 1, on variances because neighbouring residuals are alike, which is so
        where a fit is systematically wrong (:func:`serial_correlation`).
    converged
        Whether the minimisation ended by itself.
    intensities
        ``structure``: calculated from the atoms; ``free``: one for each reflection
        (:mod:`bragg_data.refinement.free_intensities`).
    """

    phase: int
    cell: NDArray[np.float64]
    su: NDArray[np.float64]
    parameters: Mapping[str, float]
    parameters_su: Mapping[str, float]
    pattern_fit: PatternFit
    chi2: float
    n_points: int
    n_parameters: int
    correlation: float
    converged: bool
    intensities: str = "structure"


def serial_correlation(residual: NDArray[np.float64]) -> float:
    """Return the factor by which correlated residuals (n,) enlarge variances, at least 1.

    From sums over runs of residuals of the same sign, compared with what they are where residuals
    are independent (after Bérar & Lelann, J. Appl. Cryst. 24 (1991) 1).
    """
    square = float(residual @ residual)
    if not square > 0:
        return 1.0
    begins = np.flatnonzero(np.diff(np.signbit(residual), prepend=not np.signbit(residual[0])))
    sums = np.add.reduceat(residual, begins)
    return max(float(sums @ sums) / square / _INDEPENDENT, 1.0)


def rank_fits(fits: Sequence[RefinementResult]) -> list[RefinementResult]:
    """Order fits of one profile by an information criterion, the most plausible first.

    By χ²/s + k ln n (Schwarz, Annals of Statistics 6 (1978) 461) with k parameters, n points and
    the noise s, which is the best fit's reduced χ² where that is above 1, times its correlation: a
    lower symmetry has to fit clearly better.
    """

    def reduced(fit: RefinementResult) -> float:
        return fit.chi2 / max(fit.n_points - fit.n_parameters, 1)

    best = min(fits, key=reduced)
    # What is wrong with all of them does not count.
    noise = max(reduced(best), 1.0) * best.correlation

    def criterion(fit: RefinementResult) -> float:
        return fit.chi2 / noise + fit.n_parameters * float(np.log(fit.n_points))

    return sorted(fits, key=criterion)
