"""The evidence for a phase: exact where a pattern is linear, and fair to nested symmetries."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from bragg_data.refinement.evidence import log_evidence, rank_fits
from bragg_data.refinement.result import Expansion, PatternFit, RefinementResult

POINTS = 40
NOTHING = PatternFit(
    *[np.zeros(POINTS)] * 3, scale=1.0, rwp=0.1, rwp_background=0.1, reduced_chi2=1
)


def linear_fit(
    columns: np.ndarray, y: np.ndarray, spread: np.ndarray, restraint: float = 0.0, phase: int = 0
) -> RefinementResult:
    """The fit of y = columns @ x with unit noise, under restraints, where x is expected near 0."""
    normal, k = columns.T @ columns, columns.shape[1]
    x = np.linalg.solve(normal + restraint * np.eye(k), columns.T @ y)
    expansion = Expansion(
        normal=normal,
        restraint=np.full(k, restraint),
        precision=spread**-2.0,
        deviation=x,
        log_prior=-float(np.log(np.sqrt(2 * np.pi) * spread).sum()),
    )
    chi2 = float(np.square(y - columns @ x).sum())
    cell = np.full(6, 4.0)
    values = phase, cell, np.zeros(6), {}, {}, NOTHING, chi2, POINTS, k, 1.0, True
    return RefinementResult(*values, expansion=expansion)


@pytest.mark.parametrize("restraint", [0.0, 3.0])
def test_of_linear_patterns_it_is_the_exact_marginal_likelihood(restraint: float) -> None:
    generator = np.random.default_rng(0)
    columns = generator.normal(size=(POINTS, 3))
    spread = np.array([0.5, 2.0, 0.1])
    y = columns @ [0.4, -1.5, 0.05] + generator.normal(size=POINTS)
    fits, exact = [], []
    for k in (1, 2, 3):
        fits.append(linear_fit(columns[:, :k], y, spread[:k], restraint))
        covariance = np.eye(POINTS) + (columns[:, :k] * spread[:k] ** 2) @ columns[:, :k].T
        exact.append(multivariate_normal(np.zeros(POINTS), covariance).logpdf(y))
    fits = [replace(fit, n_parameters=POINTS - 1, chi2=fit.chi2) for fit in fits]
    noise = max(min(fit.chi2 for fit in fits), 1.0)  # of one degree of freedom
    scaled = [replace(fit, n_parameters=POINTS - round(noise * 1.1)) for fit in fits]
    assert max(fit.chi2 / (POINTS - fit.n_parameters) for fit in scaled[2:]) < 1
    evidence = log_evidence(scaled)
    np.testing.assert_allclose(np.diff(evidence), np.diff(exact), rtol=1e-9)


def distorted(by: float, chi2: float = 2700.0, width: float = 0.4) -> list[RefinementResult]:
    """A cubic fit, and a tetragonal one whose distortion of ``by`` su lowers χ² by its square."""
    su = 1e-3
    cubic = linear_fit(np.ones((POINTS, 1)), np.zeros(POINTS), np.ones(1))
    cubic = replace(cubic, chi2=chi2, n_points=2700, n_parameters=20)
    assert cubic.expansion is not None
    both = replace(
        cubic.expansion,
        normal=np.diag([POINTS, su**-2]),
        restraint=np.zeros(2),
        precision=np.array([1.0, 12 / width**2]),
        deviation=np.zeros(2),
        log_prior=cubic.expansion.log_prior - float(np.log(width)),
    )
    tetragonal = replace(cubic, phase=1, chi2=chi2 - by**2, n_parameters=21, expansion=both)
    return [tetragonal, cubic]


def test_a_lower_symmetry_has_to_show_a_distortion() -> None:
    for by in (0.0, 1.0, 2.0):
        assert rank_fits(distorted(by))[0].phase == 0
    for by in (4.0, 8.0):
        assert rank_fits(distorted(by))[0].phase == 1
    # Occam's factor is the ratio of the distortion's uncertainty to the range it may be in.
    tetragonal, cubic = log_evidence(distorted(0.0))
    assert tetragonal - cubic == pytest.approx(np.log(np.sqrt(2 * np.pi) * 1e-3 / 0.4), rel=1e-2)


def test_what_is_wrong_with_all_fits_counts_as_noise() -> None:
    assert rank_fits(distorted(6.0))[0].phase == 1
    assert rank_fits(distorted(6.0, chi2=27000.0))[0].phase == 0
    alike = [replace(fit, correlation=8.0) for fit in distorted(6.0)]
    assert rank_fits(alike)[0].phase == 0


def test_fits_without_an_expansion_are_compared_by_their_numbers_of_parameters() -> None:
    fits = [replace(fit, expansion=None) for fit in distorted(2.0)]
    assert rank_fits(fits)[0].phase == 0
    assert rank_fits([replace(fits[0], chi2=2600.0), fits[1]])[0].phase == 1
