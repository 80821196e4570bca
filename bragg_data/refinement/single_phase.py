"""The fit of one phase to one measurement: parameters, bounds, residuals and their derivatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bragg_data.arrays import AnyFloats, Array
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CrystalError
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.levenberg_marquardt import Evaluation, minimise
from bragg_data.refinement.linear_fit import background_basis, fit_scale_and_background
from bragg_data.refinement.result import (
    Expansion,
    RefinementError,
    RefinementResult,
    serial_correlation,
    uncertainties,
)
from bragg_data.simulation.kinematic import Simulator

HOPELESS = 1.5  # ratio of χ² to the best phase's, above which another phase's fit is not finished
ROUGHLY = 3.0  # decrease of χ² over the noise, below which nominal widths are precise enough
_CONVERGED = 0.02  # decrease of χ² over the noise that a step still has to promise
_RIVAL = 0.5  # the same for a phase that is only compared with the best one
_DARING = 3.0  # times what a step promises a fit may still gain, so that it is worth while
_FAR = 0.04  # relative change of a length, or of an angle in rad, beyond which a fit has run away
_LOOSE = 0.05  # Å: coordinates are restrained to the CIF's with this standard uncertainty
_MOST_COORDINATES = 12  # of a phase with more, a powder's profile does not determine them


# Lowest and highest value.
_RANGES = {
    "u_scale": (0.1, 5.0),
    "inverse_size": (0.0, 6.0),  # 1/µm: the width is proportional to it
    "microstrain": (0.0, 4000.0),  # 1e-6
    "tzero": (-np.inf, np.inf),  # µs
}
_SHIFT = (-0.3, 0.3)  # of a free coordinate, in Å
# What the others' values are expected in. All phases have the same, so that it cancels.
_WIDTHS = {"u_scale": 4.9, "inverse_size": 6.0, "microstrain": 4000.0, "tzero": 10.0}
_LEAST_SPREAD = 0.005  # Å of coordinates, below which a CIF is never right
_LEAST_INVERSE = 1e-3  # 1/µm


def runaway_bounds(free_parameters: Sequence[str], free: Array, far: float) -> tuple[Array, Array]:
    """Return what a fit may reach: relative changes ``far`` of lengths, of angles in rad."""
    change = np.where([name in "abc" for name in free_parameters], far * free, np.degrees(far))
    return free - change, free + change


@dataclass(frozen=True, eq=False)
class PhaseFit:
    """Where the search of one phase ended."""

    phase: int
    free: Array  # (n_free,) cell parameters
    names: tuple[str, ...]  # of the other parameters
    values: Array  # (n,) of the other parameters
    residual: Array  # (points,) weighted differences
    jacobian: Array  # (points and restraints, n_free + n)
    pattern: AnyFloats  # (points of the grid,) on the simulator's scale
    converged: bool  # whether it ended by itself

    @property
    def chi2(self) -> float:
        """Weighted sum of squared differences."""
        return float(self.residual @ self.residual)

    @property
    def parameters(self) -> dict[str, float]:
        """The other parameters by their names."""
        return dict(zip(self.names, map(float, self.values), strict=True))


class WeightedProfile:
    """One measurement, weighted and with its background projected out."""

    def __init__(self, campaign: Campaign, simulator: Simulator, gridded: GriddedProfile) -> None:
        self.campaign, self.simulator = campaign, simulator
        self._gridded, self._fitted = gridded, np.flatnonzero(gridded.informative)
        self._weight = 1 / gridded.sigma[self._fitted]
        self._basis = background_basis(gridded)
        (self.y,) = self._weighted(gridded.intensity[None])
        self.signal = float(self.y @ self.y)  # χ² of a background alone

    def _weighted(self, simulated: AnyFloats) -> Array:
        """Return patterns (n, points of the grid) at (n, points), weighted, without background."""
        weighted = simulated.take(self._fitted, axis=1) * self._weight
        weighted -= weighted @ self._basis @ self._basis.T
        return np.asarray(weighted)

    def linearised(
        self, phase: int, free: Array, names: Sequence[str], values: Array
    ) -> tuple[Array, AnyFloats]:
        """Return the weighted pattern and its derivatives (1 + n, points), and the pattern."""
        of_simulator = _of_simulator(names, values)
        simulated = self.simulator.linearise(phase, free, *of_simulator)
        if "inverse_size" in names:
            index = names.index("inverse_size")
            simulated[1 + len(free) + index] *= -(of_simulator[1][index] ** 2)
        return self._weighted(simulated), simulated[0]

    def scale(self, pattern: Array) -> float:
        """Return the factor on a pattern with which it fits best, at least 0."""
        length = float(pattern @ pattern)
        return max(float(pattern @ self.y) / length, 0.0) if length > 0 else 0.0

    def chi2(self, phase: int, free: Array, parameters: Mapping[str, float] | None = None) -> Array:
        """Return χ² of n cells as they are, with nominal or with other broadening, shape (n,).

        Infinite for a cell that cannot be simulated, because it encloses no volume, or has too many
        reflections in the window or none.
        """
        used = {n: v for n, v in (parameters or {}).items() if n in _RANGES}
        arguments = dict(
            zip(*_of_simulator(tuple(used), np.array(list(used.values()))), strict=True)
        )
        cells = self.campaign.phases[phase].lattice.cells(free)
        try:
            simulated = self.simulator.simulate(np.full(len(free), phase), cells, **arguments)
        except CrystalError:
            if len(free) == 1:
                return np.array([np.inf])
            return np.concatenate([self.chi2(phase, row[None], parameters) for row in free])
        patterns = self._weighted(simulated)
        return np.array([((self.y - self.scale(p) * p) ** 2).sum() for p in patterns])

    def search(
        self,
        start: tuple[int, Array],
        names: tuple[str, ...],
        initial: Mapping[str, float],
        *,
        coordinates: bool = True,
        rival: PhaseFit | None = None,
        tolerance: float | None = None,
    ) -> PhaseFit:
        """Search for the best cell and other parameters from a phase code and free cell (n_free,).

        Of the parameters ``names``, ``initial`` has values that are better than the nominal ones;
        ``coordinates`` adds the free atomic coordinates. A ``rival`` is another phase's best fit:
        the search ends early where it is not going to beat it. It also ends where a step promises
        less than ``tolerance`` times the noise. A RefinementError is raised if the start cannot be
        simulated.
        """
        phase, free = start
        modes = len(self.simulator.free_coordinates(phase)) if coordinates else 0
        shifts = tuple(f"shift_{k + 1}" for k in range(modes if modes <= _MOST_COORDINATES else 0))
        model = _Model(self, start, (*names, *shifts), initial)
        to_beat, hopeless = np.inf, np.inf
        if rival is not None:
            # A fit with more parameters than its rival has to fit better to be more plausible.
            noise = max(rival.chi2 / len(self.y), 1.0) * serial_correlation(rival.residual)
            more = len(model.start) - len(rival.free) - len(rival.names)
            to_beat = rival.chi2 - noise * more * float(np.log(len(self.y)))
            hopeless = HOPELESS * rival.chi2

        def tolerance_at(chi2: float) -> float:
            # A rival that does not win only has to be compared.
            promise = tolerance or (_RIVAL if to_beat < chi2 else _CONVERGED)
            return promise * max(chi2 / len(self.y), 1.0)

        def give_up(chi2: float, predicted: float) -> bool:
            if chi2 > hopeless:
                return chi2 - predicted > hopeless
            return chi2 - _DARING * predicted > to_beat

        try:
            minimum = minimise(model.evaluate, model.start, model.bounds, tolerance_at, give_up)
        except CrystalError as error:
            raise RefinementError(
                f"Phase {self.campaign.phases[phase].name} cannot be refined: {error}"
            ) from error
        cell, values = np.split(minimum.point, [len(free)])
        residual, jacobian = minimum.residual[: len(self.y)], minimum.jacobian
        of_fit = residual, jacobian, minimum.of_model, minimum.converged
        return PhaseFit(phase, cell, model.names, values, *of_fit)

    def result(self, fit: PhaseFit) -> RefinementResult:
        """Return a fit with uncertainties and its pattern.

        A RefinementError is raised if the pattern has no peak in the fitted points.
        """
        lattice = self.campaign.phases[fit.phase].lattice
        count = len(fit.free)
        n_parameters = count + len(fit.names) + 1 + self._basis.shape[1]
        su, _, correlation = uncertainties(fit.jacobian, fit.residual, n_parameters)
        cell = lattice.cells(fit.free[None])[0]
        moved = lattice.cells((fit.free + su[:count])[None])[0]
        names, values = _of_simulator(fit.names, fit.values)
        parameters = dict(zip(names, values.tolist(), strict=True))
        parameters_su = dict(zip(fit.names, map(float, su[count:]), strict=True))
        if "size" in parameters:
            parameters_su["size"] = parameters_su.pop("inverse_size") * parameters["size"] ** 2
        return RefinementResult(
            phase=fit.phase,
            cell=cell,
            su=np.abs(moved - cell),
            parameters=parameters,
            parameters_su=parameters_su,
            pattern_fit=fit_scale_and_background(self._gridded, fit.pattern, self._basis),
            chi2=fit.chi2,
            n_points=len(self.y),
            n_parameters=n_parameters,
            correlation=correlation,
            converged=fit.converged,
            expansion=self._expansion(fit),
        )

    def _expansion(self, fit: PhaseFit) -> Expansion:
        """Return what the evidence for a fit is calculated from (evidence.py).

        Coordinates are expected where the CIF has them, as far off as those of the samples that
        models are trained on; of all else any value of the range is as likely.
        """
        is_shift = np.array([False] * len(fit.free) + [name not in _RANGES for name in fit.names])
        phase, ranges = self.campaign.phases[fit.phase], self.campaign.parameter_ranges(fit.phase)
        low, high = runaway_bounds(phase.lattice.free_parameters, fit.free, _FAR)
        widths = [
            float(np.ptp(ranges.get(name, 0.0))) or far
            for name, far in zip(phase.lattice.free_parameters, high - low, strict=True)
        ]
        widths += [_WIDTHS.get(name, 1.0) for name in fit.names]
        spread = max(self.campaign.measurement_effects.shift, _LEAST_SPREAD)
        density = np.where(is_shift, np.sqrt(2 * np.pi) * spread, widths)
        jacobian = fit.jacobian[: len(self.y)]
        return Expansion(
            normal=jacobian.T @ jacobian,
            restraint=is_shift / _LOOSE**2,
            precision=np.where(is_shift, 1 / spread**2, 12 / np.square(widths)),
            deviation=is_shift * np.concatenate([fit.free, fit.values]),
            log_prior=-float(np.log(density).sum()),
        )


class _Model:
    """Residuals of one phase as :func:`minimise` takes them: free cell parameters, then others."""

    def __init__(
        self,
        profile: WeightedProfile,
        start: tuple[int, Array],
        names: tuple[str, ...],
        initial: Mapping[str, float],
    ) -> None:
        campaign, (phase, free) = profile.campaign, start
        self._profile, self._phase = profile, phase
        self.names, self._count = names, len(free)
        values = {
            "u_scale": 1.0,
            "inverse_size": 1 / campaign.size,
            "microstrain": campaign.microstrain,
            "tzero": campaign.instrument.tzero,
            **initial,
        }
        ranges = np.array([_RANGES.get(name, _SHIFT) for name in names]).reshape(-1, 2).T
        low, high = runaway_bounds(campaign.phases[phase].lattice.free_parameters, free, _FAR)
        self.bounds = np.concatenate([low, ranges[0]]), np.concatenate([high, ranges[1]])
        point = np.concatenate([free, [values.get(name, 0.0) for name in names]])
        self.start = np.clip(point, self.bounds[0] + 1e-9, self.bounds[1] - 1e-9)
        restrained = [0.0 if name in _RANGES else 1 / _LOOSE for name in names]
        self._restraint = np.array([0.0] * len(free) + restrained)

    def evaluate(self, point: Array) -> Evaluation:
        """Return the residuals at a point, restraints last; a CrystalError if it has no pattern.

        Derivatives are those at the best scale (Kaufman).
        """
        free, values = np.split(point, [self._count])
        rows, simulated = self._profile.linearised(self._phase, free, self.names, values)
        pattern, slopes = rows[0], rows[1:]
        scale, points = self._profile.scale(pattern), len(pattern)
        residual = np.concatenate([self._profile.y - scale * pattern, self._restraint * point])
        jacobian = np.zeros((len(point), len(residual)))
        projections = slopes @ pattern / max(float(pattern @ pattern), 1e-300)
        np.multiply(slopes, -scale, out=jacobian[:, :points])
        jacobian[:, :points] += np.outer(scale * projections, pattern)
        np.fill_diagonal(jacobian[:, points:], self._restraint)
        return Evaluation(residual, jacobian.T, simulated)


def _of_simulator(names: Sequence[str], values: Array) -> tuple[list[str], Array]:
    """Return names and values (n,) of parameters as the simulator takes them: sizes in µm."""
    inverse = np.array([name == "inverse_size" for name in names], dtype=bool)
    sizes = 1 / np.maximum(values, _LEAST_INVERSE)
    return [n.removeprefix("inverse_") for n in names], np.where(inverse, sizes, values)
