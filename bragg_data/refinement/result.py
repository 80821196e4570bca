"""What a refinement returns, and its uncertainties."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.measurement.resampling import GriddedProfile

# Mean square of sums over runs of one sign over that of single values, of independent normal ones:
# runs have a mean length of 2 with variance 2, absolute values a mean of √(2/π).
_INDEPENDENT = 1 + 4 / np.pi
_WINDOW = 24  # points of a campaign's grid, a few widths of a peak


class RefinementError(ValueError):
    """A profile to which no pattern can be fitted."""


def fitted_points(gridded: GriddedProfile, fewest: int) -> Mask:
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

    Patterns have shape (points,), on the campaign's grid, in the measurement's units; NaN where not
    fitted.
    """

    calculated: Array  # with the background
    background: Array
    difference: Array  # measured minus calculated
    scale: float  # factor on the simulated intensity; 0 where the best one is negative
    rwp: float  # weighted profile R factor sqrt(sum w (y - c)² / sum w y²), w = 1/sigma²
    rwp_background: float  # the same with the background subtracted from y in the denominator
    reduced_chi2: float  # weighted sum of squared differences over the points less the parameters


def pattern_fit_on_grid(
    gridded: GriddedProfile,
    fitted: Mask,
    curves: Sequence[Array],
    scale: float,
    chi2: float,
    reduced_chi2: float,
) -> PatternFit:
    """Return a fit from calculated, background and difference at the fitted points."""
    y, sigma = gridded.intensity[fitted], gridded.sigma[fitted]
    above = float(np.square((y - curves[1]) / sigma).sum())
    on_grid = np.full((3, len(fitted)), np.nan)
    on_grid[:, fitted] = curves
    return PatternFit(
        calculated=on_grid[0],
        background=on_grid[1],
        difference=on_grid[2],
        scale=scale,
        rwp=float(np.sqrt(chi2 / np.square(y / sigma).sum())),
        rwp_background=float(np.sqrt(chi2 / max(above, 1e-300))),
        reduced_chi2=reduced_chi2,
    )


@dataclass(frozen=True, eq=False)
class Expansion:
    """A fit near its minimum, and what was expected, of k free parameters: the cell's first."""

    normal: Array  # (k, k) JᵀJ of the weighted differences, without restraints
    restraint: Array  # (k,) inverse variances of the restraints that the fit was under
    precision: Array  # (k,) inverse variances of what is expected
    deviation: Array  # (k,) from the expected values; 0 where any value is as likely
    log_prior: float  # logarithm of the prior density at deviations of 0


@dataclass(frozen=True, eq=False)
class RefinementResult:
    """The refined structure, or lattice, of one phase.

    The parameters next to the cell are ``u_scale`` (factor on the displacement parameters),
    ``size`` (µm), ``microstrain`` (1e-6), ``tzero`` (µs, if refined), and ``shift_1`` … along the
    phase's free coordinates (Å;
    :func:`bragg_data.crystallography.structure.free_coordinates`). Standard uncertainties
    are scaled by the square root of the reduced χ², as is usual, and of the correlation.
    """

    phase: int
    cell: Array  # (6,) a, b, c in ångström, angles in degrees
    su: Array  # (6,) standard uncertainties; 0 where fixed
    parameters: Mapping[str, float]
    parameters_su: Mapping[str, float]
    pattern_fit: PatternFit
    chi2: float  # weighted sum of squares
    n_points: int
    n_parameters: int
    # Factor, at least 1, on variances because neighbouring residuals are alike, which is so where a
    # fit is systematically wrong.
    correlation: float
    converged: bool  # whether the minimisation ended by itself
    # structure: calculated from the atoms; free: one for each reflection (free_intensities.py).
    intensities: str = "structure"
    expansion: Expansion | None = None  # to compare phases by (evidence.py)


def uncertainties(
    jacobian: Array, residual: Array, n_parameters: int
) -> tuple[Array, float, float]:
    """Return standard uncertainties (k,), reduced χ² and correlation at a minimum.

    From the derivatives (n, k) and residuals (points,) there, and the number of all parameters.
    They are those of the noise or, where larger, of what is wrong where a parameter is determined,
    such as another phase's line: from sums over windows, within which residuals may be alike
    (Huber 1967; White, Econometrica 48 (1980) 817).
    """
    points = len(residual)
    reduced = float(residual @ residual) / max(points - n_parameters, 1)
    covariance = inverse(jacobian.T @ jacobian)
    slopes = jacobian[:points] * residual[:, None]  # which sum up to 0 at the minimum
    moves = np.add.reduceat(slopes, np.arange(0, points, _WINDOW)) @ covariance
    variances = np.maximum(np.diag(covariance) * max(reduced, 1.0), np.square(moves).sum(axis=0))
    return np.sqrt(np.maximum(variances, 0)), reduced, serial_correlation(residual)


def inverse(normal: Array) -> Array:
    """Return the pseudoinverse (k, k) of the normal matrix of parameters in different units.

    Cells in Å change a pattern 1e9 times as much as strains in 1e-6: without scaling, what is
    determined well but in small units would count as not determined at all, its uncertainty as 0.
    """
    scale = np.sqrt(np.diag(normal))
    scale = np.where(scale > 0, scale, 1.0)
    scaled = np.linalg.pinv(normal / np.outer(scale, scale), hermitian=True)
    return np.asarray(scaled / np.outer(scale, scale), dtype=np.float64)


def serial_correlation(residual: Array) -> float:
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
