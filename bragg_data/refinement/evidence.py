r"""How strongly fits of several phases to one profile support each of them.

A phase of lower symmetry has more parameters and always fits better. What counts is the evidence:
the likelihood, averaged over what the parameters may be (MacKay, Neural Computation 4 (1992) 415).
By Laplace's approximation, with δ the deviations from what was expected, P their inverse variances,
:math:`\pi_0` the prior density there, and :math:`H = J^\mathsf{T}J/s + P`,

.. math:: \ln Z = -\tfrac12 \Big(\frac{\chi^2}{s} + \delta^\mathsf{T} P \delta
          - g^\mathsf{T} H^{-1} g\Big) + \ln \pi_0 - \tfrac12 \ln\det\frac{H}{2\pi} .

Cells are expected anywhere in the campaign's range, coordinates near those of the CIF. A distortion
that is not larger than its uncertainty thus costs the lower symmetry the ratio of both ranges
(Occam's factor), and the atoms of a polar structure in the places of a centrosymmetric one cost
what so large a displacement is improbable.

The noise s is what is wrong with all of the fits: the best one's reduced χ², at least 1, times the
factor by which residuals that are alike enlarge variances. Where all of them are bad, a difference
between them is no good reason to prefer one: ln Z is divided by the square root of s, too.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bragg_data.arrays import Array
from bragg_data.refinement.result import Expansion, RefinementResult

# Chosen for probabilities that are right on 1,500 draws (BaTiO3 on NOMAD): with 0 the refinement of
# a cubic sample with an impurity that the model of a lower symmetry mimics is too sure of it.
_DISTRUST = 0.5


class Fitted(Protocol):
    """What a fit shows of how good it is."""

    @property
    def chi2(self) -> float:
        """Weighted sum of squares."""

    @property
    def n_points(self) -> int:
        """Number of points."""

    @property
    def n_parameters(self) -> int:
        """Number of parameters."""

    @property
    def correlation(self) -> float:
        """Factor on variances by residuals that are alike, at least 1."""


def log_evidence(fits: Sequence[RefinementResult]) -> Array:
    """Return the logarithms of the evidence for each of n fits to one profile, shape (n,).

    Only their differences have a meaning. Where a fit has no expansion, all are compared by
    :func:`schwarz_evidence`.
    """
    expansions = [fit.expansion for fit in fits if fit.expansion is not None]
    if len(expansions) < len(fits):
        return schwarz_evidence(fits)
    noise, pairs = _noise(fits), zip(fits, expansions, strict=True)
    values = np.array([_laplace(fit.chi2, expansion, noise) for fit, expansion in pairs])
    return np.asarray(values / noise**_DISTRUST)


def schwarz_evidence(fits: Sequence[Fitted]) -> Array:
    """Return the evidence as :func:`log_evidence` by Schwarz's approximation, shape (n,).

    It is -(χ²/s + k ln n)/2 with k parameters and n points (Annals of Statistics 6 (1978) 461).
    """
    noise = _noise(fits)
    penalties = np.array([fit.n_parameters * np.log(fit.n_points) for fit in fits])
    values = -(np.array([fit.chi2 for fit in fits]) / noise + penalties) / 2
    return np.asarray(values / noise**_DISTRUST)


def rank_fits(fits: Sequence[RefinementResult]) -> list[RefinementResult]:
    """Order fits of one profile by their evidence, the most plausible first."""
    order = np.argsort(-log_evidence(fits), kind="stable")
    return [fits[k] for k in order]


def _noise(fits: Sequence[Fitted]) -> float:
    best = min(fits, key=_reduced_chi2)
    return max(_reduced_chi2(best), 1.0) * best.correlation


def _reduced_chi2(fit: Fitted) -> float:
    return fit.chi2 / max(fit.n_points - fit.n_parameters, 1)


def _laplace(chi2: float, expansion: Expansion, noise: float) -> float:
    precision, deviation = expansion.precision, expansion.deviation
    curvature = expansion.normal / noise + np.diag(precision)
    # At the fit's minimum the measurement and the fit's restraints, which may be others than the
    # prior, are in balance.
    gradient = (precision - expansion.restraint / noise) * deviation
    least = chi2 / noise + float(deviation @ (precision * deviation))
    least -= float(gradient @ np.linalg.solve(curvature, gradient))
    _, log_determinant = np.linalg.slogdet(curvature / (2 * np.pi))
    return float(expansion.log_prior - (least + log_determinant) / 2)
