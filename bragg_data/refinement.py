r"""Whole-pattern refinement of a measured profile on the fast simulator, in tenths of a second.

The measured intensities y on a campaign's grid are fitted by

.. math:: c_i = s\,P_i(\theta) + \sum_k b_k T_k(x_i)

with P the simulated pattern of a cell, displacement factor and broadening θ, and Chebyshev
polynomials T of the background. Scale s and background b are linear: they are solved for exactly at
every step (variable projection; Golub & Pereyra, SIAM Journal on Numerical Analysis 10 (1973) 413,
with Kaufman's Jacobian, BIT 15 (1975) 49), so that only θ, at most a dozen numbers, is searched
for.

Phases are compared by a penalised criterion that knows that more parameters fit better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from scipy.optimize import least_squares

from bragg_data.campaign import Campaign
from bragg_data.crystal import CELL_PARAMETERS, CrystalError
from bragg_data.kinematic import Simulator
from bragg_data.measured import GriddedProfile
from bragg_data.overlay import BACKGROUND_TERMS, Overlay, OverlayError, lay_over

_WIDTHS = (-0.3, 0.7)  # ln(W / W nominal) that broadening reaches in practice
_FEWEST = 60  # covered points
_HOPELESS = 4.0  # χ² of a phase over the best one's, above which its fit is not finished
_FAR = 0.04  # relative change of a length, or of an angle in rad, beyond which a fit has run away

_EVALUATIONS = (10, 20)  # of a coarse search at most, and of one that has nearly arrived

# Of the parameters beside the cell: start, lowest, highest, step of the derivative.
_OTHERS = {
    "u_scale": (1.0, 0.1, 5.0, 0.01),
    "inverse_size": (None, 0.0, 6.0, 0.05),  # 1/µm: the width is proportional to it
    "microstrain": (None, 0.0, 4000.0, 30.0),  # 1e-6
    "tzero": (None, -np.inf, np.inf, 0.3),  # µs
}
_STEPS = {name: 1e-4 if name in "abc" else 2e-3 for name in CELL_PARAMETERS}


class RefinementError(ValueError):
    """A profile that cannot be refined."""


@dataclass(frozen=True, eq=False)
class Refined:
    """The refined structure of one phase.

    Attributes
    ----------
    phase
        Code of the phase.
    cell, su : shape (6,)
        a, b, c in ångström, angles in degrees, and their standard uncertainties (0 where fixed),
        scaled by the square root of the reduced χ², as is usual.
    others, others_su
        The other parameters: ``u_scale`` (factor on the displacement parameters), ``size`` (µm),
        ``microstrain`` (1e-6), ``tzero`` (µs, if refined).
    overlay
        The fit: calculated pattern, background, difference, Rwp, reduced χ².
    chi2, points, parameters
        Weighted sum of squares, over how many points, with how many parameters.
    converged
        Whether the search ended by itself.
    """

    phase: int
    cell: NDArray[np.float64]
    su: NDArray[np.float64]
    others: Mapping[str, float]
    others_su: Mapping[str, float]
    overlay: Overlay
    chi2: float
    points: int
    parameters: int
    converged: bool


class Refiner:
    """Refines profiles on a campaign's grid. Building it takes seconds, a refinement tenths.

    Parameters
    ----------
    campaign
        Phases, instrument, grid, nominal broadening.
    terms
        Of the background.
    """

    def __init__(self, campaign: Campaign, *, terms: int = BACKGROUND_TERMS) -> None:
        self.campaign = campaign
        self.simulator = Simulator(
            campaign.phases, campaign.instrument, campaign.grid, size=campaign.size,
            microstrain=campaign.microstrain, width_range=_WIDTHS,
        )  # fmt: skip
        x = np.linspace(-1, 1, campaign.grid.points)
        self._polynomials = np.asarray(chebyshev.chebvander(x, terms - 1), dtype=np.float64)

    def refine(
        self,
        gridded: GriddedProfile,
        starts: Sequence[tuple[int, NDArray[np.float64]]],
        *,
        tzero: bool = False,
    ) -> list[Refined]:
        """Refine a profile from several starts; one answer for each phase, the best first.

        Parameters
        ----------
        gridded
            The measurement on the campaign's grid, with its background.
        starts
            Phase codes and cells (6,): at least one for each phase that is plausible.
        tzero
            Refine the zero point, too: where the calibration is in doubt.

        Raises
        ------
        RefinementError
            If too few points are covered, or no start gives a fit.
        """
        known = gridded.covered & (gridded.sigma > 0)
        if known.sum() < _FEWEST:
            raise RefinementError(
                f"{known.sum()} points are covered, too few to refine anything on ({_FEWEST})."
            )
        problem = _Problem(self, gridded, known)
        coarse = [c for c in (self._coarse(problem, *start) for start in starts) if c is not None]
        if not coarse:
            raise RefinementError(
                "No start gives a fit: the cells have no peaks where it was measured."
            )
        best_chi2 = min(c.chi2 for c in coarse)
        by_phase: dict[int, _State] = {}
        for state in sorted(coarse, key=lambda c: c.chi2):
            by_phase.setdefault(state.phase, state)
        names = ("u_scale", "inverse_size", "microstrain", *(("tzero",) if tzero else ()))
        found = []
        for state in by_phase.values():
            hopeless = state.chi2 > _HOPELESS * best_chi2
            finished = None if hopeless else problem.search(state.phase, state.free, names, state)
            found.append(problem.refined(finished or state))
        return ranked(found)

    def _coarse(self, problem: _Problem, phase: int, cell: NDArray[np.float64]) -> _State | None:
        """Cell and displacement factor with nominal widths, which the simulator does fastest."""
        index = [
            CELL_PARAMETERS.index(p) for p in self.campaign.phases[phase].lattice.free_parameters
        ]
        try:
            return problem.search(phase, np.asarray(cell, dtype=np.float64)[index], ("u_scale",))
        except (OverlayError, CrystalError):
            return None


def _with_size(given: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Put the size, which the simulator wants, in the place of its inverse."""
    if "inverse_size" in given:
        given["size"] = 1 / np.maximum(given.pop("inverse_size"), 1e-3)
    return given


def ranked(found: Sequence[Refined]) -> list[Refined]:
    """Order fits of one profile: the most plausible first.

    By χ²/s + k ln n (Schwarz, Annals of Statistics 6 (1978) 461) with k parameters, n points and
    the noise s, which is the best fit's reduced χ² where that is above 1: a lower symmetry has to
    fit clearly better.
    """
    best = min(one.chi2 / max(one.points - one.parameters, 1) for one in found)

    def criterion(one: Refined) -> float:
        # The best fit's reduced χ² is the noise: what is wrong with all of them does not count.
        return one.chi2 / max(best, 1.0) + one.parameters * float(np.log(one.points))

    return sorted(found, key=criterion)


@dataclass(frozen=True, eq=False)
class _State:
    phase: int
    free: NDArray[np.float64]
    names: tuple[str, ...]
    values: NDArray[np.float64]
    chi2: float
    jacobian: NDArray[np.float64]
    converged: bool


class _Problem:
    """One measurement: its weights, and its background projected out."""

    def __init__(self, refiner: Refiner, gridded: GriddedProfile, known: NDArray[np.bool_]) -> None:
        self._refiner, self._gridded, self._known = refiner, gridded, known
        self._weight = 1 / gridded.sigma[known]
        self._basis, _ = np.linalg.qr(refiner._polynomials[known] * self._weight[:, None])
        self._y = self._without_background(gridded.intensity[known] * self._weight)

    def _without_background(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values - self._basis @ (self._basis.T @ values)

    def _patterns(
        self,
        phase: int,
        free: NDArray[np.float64],
        names: Sequence[str],
        values: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Weighted patterns without background, shape (points, n), of n rows of parameters."""
        lattice = self._refiner.campaign.phases[phase].lattice
        given = _with_size(dict(zip(names, values.T, strict=True)))
        simulated = self._refiner.simulator.simulate(
            np.full(len(free), phase), lattice.cells(free), **given
        )
        weighted = simulated[:, self._known].astype(np.float64).T * self._weight[:, None]
        return self._without_background(weighted)

    def search(
        self,
        phase: int,
        free: NDArray[np.float64],
        names: tuple[str, ...],
        begin: _State | None = None,
    ) -> _State:
        """Search for the best cell and other parameters from a start."""
        campaign = self._refiner.campaign
        of_cell = campaign.phases[phase].lattice.free_parameters
        nominal = {"inverse_size": 1 / campaign.size, "microstrain": campaign.microstrain,
                   "tzero": campaign.instrument.tzero}  # fmt: skip
        known = {} if begin is None else dict(zip(begin.names, begin.values, strict=True))
        others = np.array(
            [known.get(n, nominal.get(n, _OTHERS[n][0])) for n in names], dtype=np.float64
        )
        count = len(of_cell)
        steps = np.array([_STEPS[n] for n in of_cell] + [_OTHERS[n][3] for n in names])
        start = np.concatenate([free, others])
        far = np.array([_FAR * v if n in "abc" else np.degrees(_FAR)
                        for n, v in zip(of_cell, free, strict=True)])  # fmt: skip
        low = np.concatenate([free - far, [_OTHERS[n][1] for n in names]])
        high = np.concatenate([free + far, [_OTHERS[n][2] for n in names]])
        start = np.clip(start, low + 1e-9, high - 1e-9)

        # The patterns of a point and of its neighbours at once: a batch takes hardly longer.
        last: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None = None

        def around(
            point: NDArray[np.float64],
        ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            nonlocal last
            if last is None or not np.array_equal(last[0], point):
                forward = np.where(point + steps < high, steps, -steps)
                points = np.concatenate([point[None], point + np.diag(forward)])
                patterns = self._patterns(phase, points[:, :count], names, points[:, count:])
                pattern = patterns[:, 0]
                last = point.copy(), pattern, (patterns[:, 1:] - pattern[:, None]) / forward
            return last[1], last[2]

        def residual(point: NDArray[np.float64]) -> NDArray[np.float64]:
            pattern, _ = around(point)
            return self._y - self._scale(pattern) * pattern

        def jacobian(point: NDArray[np.float64]) -> NDArray[np.float64]:
            pattern, change = around(point)
            length = max(float(pattern @ pattern), 1e-300)
            return -self._scale(pattern) * (change - np.outer(pattern, pattern @ change) / length)

        done = least_squares(
            residual, start, jac=jacobian, bounds=(low, high), x_scale=10 * steps, method="trf",
            xtol=1e-6, ftol=1e-5, gtol=None, max_nfev=_EVALUATIONS[begin is not None],
        )  # fmt: skip
        return _State(
            phase, done.x[:count], names, done.x[count:], 2 * float(done.cost),
            np.asarray(done.jac, dtype=np.float64),
            bool(done.success and done.status > 0),
        )  # fmt: skip

    def _scale(self, pattern: NDArray[np.float64]) -> float:
        length = float(pattern @ pattern)
        return max(float(pattern @ self._y) / length, 0.0) if length > 0 else 0.0

    def refined(self, state: _State) -> Refined:
        """Return a state with uncertainties and its overlay."""
        campaign = self._refiner.campaign
        lattice = campaign.phases[state.phase].lattice
        count = len(state.free)
        points = int(self._known.sum())
        parameters = len(state.free) + len(state.names) + 1 + self._basis.shape[1]
        reduced = state.chi2 / max(points - parameters, 1)
        covariance = np.linalg.pinv(state.jacobian.T @ state.jacobian) * reduced
        su = np.sqrt(np.maximum(np.diag(covariance), 0))
        cell = lattice.cells(state.free[None])[0]
        moved = lattice.cells((state.free + su[:count])[None])[0]
        given = _with_size(dict(zip(state.names, state.values[:, None], strict=True)))
        others = {name: float(value[0]) for name, value in given.items()}
        others_su = dict(zip(state.names, map(float, su[count:]), strict=True))
        if "size" in others:
            others_su["size"] = others_su.pop("inverse_size") * others["size"] ** 2
        pattern = self._refiner.simulator.simulate(np.array([state.phase]), cell[None], **given)[0]
        overlay = lay_over(self._gridded, pattern, terms=self._basis.shape[1])
        return Refined(
            state.phase, cell, np.abs(moved - cell), others, others_su, overlay, state.chi2, points,
            parameters, state.converged,
        )  # fmt: skip
