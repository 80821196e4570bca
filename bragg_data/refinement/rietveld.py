r"""Whole-pattern refinement of a measured profile on the fast simulator, in tenths of a second.

The measured intensities y on a campaign's grid are fitted by

.. math:: c_i = s\,P_i(\theta) + \sum_k b_k T_k(x_i)

with P the simulated pattern of a cell, displacement factor, broadening and free atomic coordinates
θ, and Chebyshev polynomials T of the background. Scale s and background b are linear: they are
solved for exactly at every step (variable projection; Golub & Pereyra, SIAM Journal on Numerical
Analysis 10 (1973) 413, with Kaufman's Jacobian, BIT 15 (1975) 49), so that only θ, a dozen numbers,
is searched for: by Levenberg and Marquardt's method with a Jacobian that is kept as long as it
foretells the steps well, since one costs as much as ten patterns.

Phases are compared by a penalised criterion that knows that more parameters fit better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalError
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.operating_system import available_cores
from bragg_data.refinement.linear_fit import (
    BACKGROUND_TERMS,
    PatternFit,
    PatternFitError,
    fit_scale_and_background,
)
from bragg_data.simulation.kinematic import Simulator

_WIDTHS = (-0.3, 0.7)  # ln(W / W nominal) that broadening reaches in practice
_FEWEST = 60  # covered points
_HOPELESS = 1.5  # χ² over the best phase's, above which a rival's fit is not finished
_FAR = 0.04  # relative change of a length, or of an angle in rad, beyond which a fit has run away
_LOOSE = 0.05  # Å: coordinates are restrained to the CIF's with this standard uncertainty
_MOST_COORDINATES = 12  # of a phase with more, a powder's profile does not tell them

_NEARLY_CUBIC = 0.012  # relative distortion, up to which the opposite one is tried, too
_STEPS_AT_MOST = 60
# Mean square of sums over runs of one sign over that of single values, of independent normal ones:
# runs have a mean length of 2 with variance 2, absolute values a mean of √(2/π).
_INDEPENDENT = 1 + 4 / np.pi
_ARRIVED = 0.02  # χ² over the noise that a step still promises
_ROUGHLY = 3.0  # the same where widths are still the nominal ones
_NEARLY = 0.5  # the same for what has a rival already
_DARING = 3.0  # times what a step promises the search may still gain, so that it is worth while
_TRUSTED = 0.5  # share of what was promised that came, below which the Jacobian is made anew

# Of the parameters beside the cell: start, lowest, highest, step of the derivative.
_OTHERS = {
    "u_scale": (1.0, 0.1, 5.0, 0.01),
    "inverse_size": (None, 0.0, 6.0, 0.05),  # 1/µm: the width is proportional to it
    "microstrain": (None, 0.0, 4000.0, 30.0),  # 1e-6
    "tzero": (None, -np.inf, np.inf, 0.3),  # µs
}
_SHIFT = (0.0, -0.3, 0.3, 0.003)  # the same of a free coordinate, in Å
_STEPS = {name: 1e-4 if name in "abc" else 2e-3 for name in CELL_PARAMETERS}


_Vector = NDArray[np.float64]


class RefinementError(ValueError):
    """A profile that cannot be refined."""


@dataclass(frozen=True, eq=False)
class RefinementResult:
    """The refined structure of one phase.

    Attributes
    ----------
    phase
        Code of the phase.
    cell, su : shape (6,)
        a, b, c in ångström, angles in degrees, and their standard uncertainties (0 where fixed),
        scaled by the square root of the reduced χ², as is usual, and of the correlation.
    parameters, parameters_su
        The other refined parameters and their standard uncertainties: ``u_scale`` (factor on the
        displacement parameters), ``size`` (µm), ``microstrain`` (1e-6), ``tzero`` (µs, if refined),
        and ``shift_1`` … along the phase's free coordinates (Å;
        :func:`bragg_data.crystallography.displacement_modes.free_coordinates`).
    pattern_fit
        Calculated pattern, background, difference, R_wp, reduced χ².
    chi2, n_points, n_parameters
        Weighted sum of squares, the number of points and of fitted parameters.
    correlation
        Factor, at least 1, on variances because neighbouring residuals are alike, which is so
        where a fit is systematically wrong (:func:`serial_correlation`).
    converged
        Whether the search ended by itself.
    intensities
        ``structure``: the atoms make them; ``free``: every line has its own
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


class Refiner:
    """Refines profiles on a campaign's grid. Building it takes seconds, a refinement tenths.

    Parameters
    ----------
    campaign
        Phases, instrument, grid, nominal broadening.
    terms
        Of the background.
    cache
        Directory where the simulator keeps what takes seconds to build; None for none.
    """

    def __init__(
        self, campaign: Campaign, *, terms: int = BACKGROUND_TERMS, cache: Path | None = None
    ) -> None:
        self.campaign = campaign
        self.simulator = Simulator(
            campaign.phases, campaign.instrument, campaign.grid, size=campaign.size,
            microstrain=campaign.microstrain, width_range=_WIDTHS, cache=cache,
        )  # fmt: skip
        self._libraries = ThreadpoolController().select(user_api="blas")
        x = np.linspace(-1, 1, campaign.grid.points)
        self._polynomials = np.asarray(chebyshev.chebvander(x, terms - 1), dtype=np.float64)

    def refine(
        self,
        gridded: GriddedProfile,
        starts: Sequence[tuple[int, NDArray[np.float64]]],
        *,
        tzero: bool = False,
    ) -> list[RefinementResult]:
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
        coarse = [
            state
            for phase in dict.fromkeys(phase for phase, _ in starts)
            if (state := self._coarse(problem, phase, [c for p, c in starts if p == phase]))
        ]
        if not coarse:
            raise RefinementError(
                "No start gives a fit: the cells have no peaks where it was measured."
            )
        names = ("u_scale", "inverse_size", "microstrain", *(("tzero",) if tzero else ()))
        first, *others = sorted(coarse, key=_chi2_of)
        best = problem.search(first.phase, first.free, names, first.others)

        def rival(state: _State) -> _State:
            # Broadening is the sample's, whatever its phase, and so is the lattice, nearly.
            start = self._nearer(problem, state, best)
            return problem.search(state.phase, start, names, best.others, rival=best)

        # Threads of linear algebra would wait for each other.
        with self._libraries.limit(limits=1), ThreadPoolExecutor(_threads()) as pool:
            found = [best, *pool.map(rival, others)]
            best = min(found, key=_chi2_of)
            found = list(pool.map(lambda fit: self._with_twin(problem, fit, names, best), found))
        return rank_fits([problem.refined(state) for state in found])

    def _coarse(
        self, problem: _Problem, phase: int, cells: Sequence[NDArray[np.float64]]
    ) -> _State | None:
        """Refine cell and displacement factor with nominal widths, which are simulated fastest."""
        free = np.asarray(cells, dtype=np.float64)[:, self._columns(phase)]
        try:
            if len(free) > 1:
                free = free[[problem.chi2_of(phase, free).argmin()]]
            return problem.search(
                phase, free[0], ("u_scale",), {}, coordinates=False, arrived=_ROUGHLY
            )
        except (PatternFitError, CrystalError):
            return None

    def _nearer(self, problem: _Problem, state: _State, best: _State) -> _Vector:
        """Return a phase's start, or the best fit's cell in its lattice if that is nearer."""
        lattice = self.campaign.phases[state.phase].lattice
        cell = self.campaign.phases[best.phase].lattice.cells(best.free[None])[0]
        tied = dict(lattice.tied)
        # Parameters that are equal in it take the mean.
        other = [
            cell[[p for p, n in enumerate(CELL_PARAMETERS) if tied.get(n, n) == name]].mean()
            for name in lattice.free_parameters
        ]
        both = np.stack([state.free, np.array(other)])
        try:
            nearest = int(problem.chi2_of(state.phase, both, best.others).argmin())
        except CrystalError:
            return state.free
        return np.asarray(both[nearest])

    def _with_twin(
        self, problem: _Problem, fit: _State, names: tuple[str, ...], best: _State
    ) -> _State:
        """Return a fit, or the one from the cell that is distorted the other way if it is better.

        Of a lattice that is nearly cubic. Lines that split by less than their widths may be split
        either way: both fit well, and a search does not get from one to the other.
        """
        lattice = self.campaign.phases[fit.phase].lattice
        cell = lattice.cells(fit.free[None])[0]
        cubic = np.where(np.arange(6) < 3, cell[:3].mean(), 90.0)
        distortion = float(np.abs(cell / cubic - 1).max())
        if not 0 < distortion < _NEARLY_CUBIC or fit.chi2 > _HOPELESS * best.chi2:
            return fit
        twin = (2 * cubic - cell)[self._columns(fit.phase)]
        other = problem.search(fit.phase, twin, names, fit.others, rival=best)
        return min(fit, other, key=_chi2_of)

    def _columns(self, phase: int) -> list[int]:
        names = self.campaign.phases[phase].lattice.free_parameters
        return [CELL_PARAMETERS.index(name) for name in names]


def _simulated(given: dict[str, _Vector]) -> dict[str, _Vector]:
    """Return parameters as the simulator wants them: the size, and all shifts in one array."""
    if "inverse_size" in given:
        given["size"] = 1 / np.maximum(given.pop("inverse_size"), 1e-3)
    shifts = [given.pop(name) for name in list(given) if name.startswith("shift_")]
    if shifts:
        given["shifts"] = np.stack(shifts, axis=1)
    return given


def serial_correlation(residual: NDArray[np.float64]) -> float:
    """Return by what factor correlated residuals make variances larger, at least 1.

    From sums over runs of residuals of the same sign, compared with what they are where residuals
    are independent (after Bérar & Lelann, J. Appl. Cryst. 24 (1991) 1).

    Parameters
    ----------
    residual : shape (n,)
        Differences over their standard deviations.
    """
    square = float(residual @ residual)
    if not square > 0:
        return 1.0
    begins = np.flatnonzero(np.diff(np.signbit(residual), prepend=not np.signbit(residual[0])))
    sums = np.add.reduceat(residual, begins)
    return max(float(sums @ sums) / square / _INDEPENDENT, 1.0)


def rank_fits(found: Sequence[RefinementResult]) -> list[RefinementResult]:
    """Order fits of one profile: the most plausible first.

    By χ²/s + k ln n (Schwarz, Annals of Statistics 6 (1978) 461) with k parameters, n points and
    the noise s, which is the best fit's reduced χ² where that is above 1, times its correlation: a
    lower symmetry has to fit clearly better.
    """

    def reduced(one: RefinementResult) -> float:
        return one.chi2 / max(one.n_points - one.n_parameters, 1)

    best = min(found, key=reduced)
    # What is wrong with all of them does not count.
    noise = max(reduced(best), 1.0) * best.correlation

    def criterion(one: RefinementResult) -> float:
        return one.chi2 / noise + one.n_parameters * float(np.log(one.n_points))

    return sorted(found, key=criterion)


def _bounded_step(
    normal: _Vector, right: _Vector, damping: float, low: _Vector, high: _Vector
) -> _Vector:
    """Return Levenberg and Marquardt's step within bounds: what meets one stays, the others go on.

    Cut off at its bounds the step of all together may well lead uphill.
    """
    diagonal = np.diag(normal) + 1e-12 * np.trace(normal)
    system = normal + damping * np.diag(diagonal)
    step = np.zeros(len(right))
    going = np.ones(len(right), dtype=bool)
    while going.any():
        rest = right[going] - normal[np.ix_(going, ~going)] @ step[~going]
        step[going] = np.linalg.solve(system[np.ix_(going, going)], rest)
        beyond = going & ((step < low) | (step > high))
        if not beyond.any():
            break
        step = np.clip(step, low, high)
        going &= ~beyond
    return step


@dataclass(frozen=True, eq=False)
class _State:
    phase: int
    free: NDArray[np.float64]
    names: tuple[str, ...]
    values: NDArray[np.float64]
    residual: NDArray[np.float64]
    jacobian: NDArray[np.float64]
    converged: bool

    @property
    def chi2(self) -> float:
        return float(self.residual @ self.residual)

    @property
    def others(self) -> dict[str, float]:
        return dict(zip(self.names, map(float, self.values), strict=True))


def _threads() -> int:
    # A pattern is a few large matrices that pass through one core.
    return min(available_cores(), 4)


def _chi2_of(state: _State) -> float:
    return state.chi2


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
        given = _simulated(dict(zip(names, values.T, strict=True)))
        simulated = self._refiner.simulator.simulate(
            np.full(len(free), phase), lattice.cells(free), **given
        )
        weighted = simulated[:, self._known].astype(np.float64).T * self._weight[:, None]
        return self._without_background(weighted)

    def chi2_of(
        self, phase: int, free: NDArray[np.float64], others: Mapping[str, float] | None = None
    ) -> NDArray[np.float64]:
        """χ² of some cells as they are, with nominal or with other broadening, shape (n,)."""
        given = {n: v for n, v in (others or {}).items() if n in _OTHERS}
        values = np.tile(list(given.values()), (len(free), 1))
        patterns = self._patterns(phase, free, tuple(given), values)
        return np.array([((self._y - self._scale(p) * p) ** 2).sum() for p in patterns.T])

    def search(
        self,
        phase: int,
        free: NDArray[np.float64],
        names: tuple[str, ...],
        begin: Mapping[str, float],
        *,
        coordinates: bool = True,
        rival: _State | None = None,
        arrived: float | None = None,
    ) -> _State:
        """Search for the best cell and other parameters from a start.

        ``begin`` holds values of the others that are known better than the nominal ones. The search
        ends early where it is not going to beat a ``rival``, and ends where a step promises less
        than ``arrived`` times the noise.
        """
        campaign = self._refiner.campaign
        of_cell = campaign.phases[phase].lattice.free_parameters
        modes = len(self._refiner.simulator.free_coordinates(phase)) if coordinates else 0
        shifts = tuple(f"shift_{k + 1}" for k in range(modes if modes <= _MOST_COORDINATES else 0))
        names = (*names, *shifts)
        nominal = {"inverse_size": 1 / campaign.size, "microstrain": campaign.microstrain,
                   "tzero": campaign.instrument.tzero}  # fmt: skip
        rules = [_SHIFT if n in shifts else _OTHERS[n] for n in names]
        others = np.array(
            [nominal.get(n, rule[0]) if n in shifts else begin.get(n, nominal.get(n, rule[0]))
             for n, rule in zip(names, rules, strict=True)], dtype=np.float64
        )  # fmt: skip
        count = len(of_cell)
        steps = np.array([_STEPS[n] for n in of_cell] + [rule[3] for rule in rules])
        far = np.array([_FAR * v if n in "abc" else np.degrees(_FAR)
                        for n, v in zip(of_cell, free, strict=True)])  # fmt: skip
        low = np.concatenate([free - far, [rule[1] for rule in rules]])
        high = np.concatenate([free + far, [rule[2] for rule in rules]])
        restraint = np.array([0.0] * (len(low) - len(shifts)) + [1 / _LOOSE] * len(shifts))

        def patterns(points: NDArray[np.float64]) -> NDArray[np.float64]:
            return self._patterns(phase, points[:, :count], names, points[:, count:])

        def residual(point: NDArray[np.float64], pattern: NDArray[np.float64]) -> _Vector:
            return np.concatenate([self._y - self._scale(pattern) * pattern, restraint * point])

        def jacobian(point: NDArray[np.float64], pattern: NDArray[np.float64]) -> _Vector:
            forward = np.where(point + steps < high, steps, -steps)
            change = (patterns(point + np.diag(forward)) - pattern[:, None]) / forward
            length = max(float(pattern @ pattern), 1e-300)
            of_pattern = change - np.outer(pattern, pattern @ change) / length
            return np.concatenate([-self._scale(pattern) * of_pattern, np.diag(restraint)])

        x = np.clip(np.concatenate([free, others]), low + 1e-9, high - 1e-9)
        pattern = patterns(x[None])[:, 0]
        r = residual(x, pattern)
        j, fresh = jacobian(x, pattern), True
        # No more is wanted of a rival than that it is one.
        end = arrived or (_ARRIVED if rival is None else _NEARLY)
        to_beat = np.inf if rival is None else self._to_beat(rival, count + len(names))
        # Where one step after the other leads uphill, damping rises faster and faster.
        damping, rise, converged = 1e-3, 10.0, False
        for _ in range(_STEPS_AT_MOST):
            normal, right = j.T @ j, -(j.T @ r)
            if not np.trace(normal) > 0:
                break  # nothing of the pattern is in the measurement
            step = _bounded_step(normal, right, damping, low - x, high - x)
            promised = float(2 * right @ step - step @ normal @ step)
            chi2 = float(r @ r)
            noise = max(chi2 / len(self._y), 1.0)
            if promised < end * noise:  # in a bound's corner, hardly below zero
                converged = fresh
                if fresh:
                    break
                j, fresh = jacobian(x, pattern), True
                continue
            if rival is not None:
                hopeless = _HOPELESS * rival.chi2
                if chi2 > hopeless and chi2 - promised > hopeless:
                    break
                if fresh and chi2 <= hopeless and chi2 - _DARING * promised > to_beat:
                    break
            trial = patterns((x + step)[None])[:, 0]
            found = residual(x + step, trial)
            gained = chi2 - float(found @ found)
            if gained > 0:
                x, r, pattern = x + step, found, trial
                damping, rise = max(0.1 * damping, 1e-5), 10.0
                fresh = False
            if gained < _TRUSTED * promised:
                if fresh:
                    damping, rise = min(rise * damping, 1e6), 10 * rise
                else:
                    j, fresh = jacobian(x, pattern), True
        return _State(phase, x[:count], names, x[count:], r[: len(self._y)], j, converged)

    def _to_beat(self, rival: _State, parameters: int) -> float:
        """Return the χ² below which a fit with so many parameters is the more plausible one."""
        points = len(self._y)
        noise = max(rival.chi2 / points, 1.0) * serial_correlation(rival.residual)
        more = parameters - len(rival.free) - len(rival.names)
        return rival.chi2 - noise * more * float(np.log(points))

    def _scale(self, pattern: NDArray[np.float64]) -> float:
        length = float(pattern @ pattern)
        return max(float(pattern @ self._y) / length, 0.0) if length > 0 else 0.0

    def refined(self, state: _State) -> RefinementResult:
        """Return a state with uncertainties and its overlay."""
        campaign = self._refiner.campaign
        lattice = campaign.phases[state.phase].lattice
        count = len(state.free)
        points = int(self._known.sum())
        parameters = len(state.free) + len(state.names) + 1 + self._basis.shape[1]
        reduced = state.chi2 / max(points - parameters, 1)
        correlation = serial_correlation(state.residual)
        covariance = np.linalg.pinv(state.jacobian.T @ state.jacobian) * reduced * correlation
        su = np.sqrt(np.maximum(np.diag(covariance), 0))
        cell = lattice.cells(state.free[None])[0]
        moved = lattice.cells((state.free + su[:count])[None])[0]
        given = _simulated(dict(zip(state.names, state.values[:, None], strict=True)))
        shifts = given.pop("shifts", None)
        others = {name: float(value[0]) for name, value in given.items()}
        others |= {n: v for n, v in state.others.items() if n.startswith("shift_")}
        others_su = dict(zip(state.names, map(float, su[count:]), strict=True))
        if "size" in others:
            others_su["size"] = others_su.pop("inverse_size") * others["size"] ** 2
        (pattern,) = self._refiner.simulator.simulate(
            np.array([state.phase]), cell[None], **given, shifts=shifts
        )
        overlay = fit_scale_and_background(self._gridded, pattern, terms=self._basis.shape[1])
        return RefinementResult(
            state.phase, cell, np.abs(moved - cell), others, others_su, overlay, state.chi2, points,
            parameters, correlation, state.converged,
        )  # fmt: skip
