"""Where the search of a joint refinement stands: a model, its minimum, its background."""

from dataclasses import dataclass, replace

import numpy as np

from bragg_data.arrays import Array
from bragg_data.refinement.joint_model import BankFit, JointModel
from bragg_data.refinement.levenberg_marquardt import Minimum, minimise
from bragg_data.refinement.result import inverse, serial_correlation

# Decrease of χ² over the noise that a step still has to promise.
ROUGHLY = 1.0
NEARBY = 0.2
CONVERGED = 0.02
_TERMS = (4, 6, 8, 10, 12, 15, 18, 22, 26, 30, 36)
_TRACE = 0.05  # share of the calculated signal, below which a phase is a trace


@dataclass(frozen=True, eq=False)
class State:
    """A model, and where its search stands."""

    model: JointModel
    minimum: Minimum | None = None

    @property
    def chi2(self) -> float:
        """Sum of squared residuals, restraints included."""
        assert self.minimum is not None
        return float(self.minimum.residual @ self.minimum.residual)

    @property
    def fits(self) -> tuple[BankFit, ...]:
        """Where each bank stands at the minimum."""
        assert self.minimum is not None
        fits: tuple[BankFit, ...] = self.minimum.of_model
        return fits

    @property
    def explained(self) -> float:
        """Share of the signal above noise that the minimum explains."""
        assert self.minimum is not None
        return self.model.explained(self.minimum.residual[: self.model.n_points])

    @property
    def covariance(self) -> Array:
        """Covariance (k, k) of the parameters, scaled by the noise."""
        assert self.minimum is not None
        jacobian = self.minimum.jacobian
        return inverse(jacobian.T @ jacobian) * self.model.noise

    def share(self, code: int) -> float:
        """Return the share of a phase in the calculated signal."""
        mine = total = 0.0
        for fit in self.fits:
            signal = np.abs(fit.columns).sum(axis=0) * fit.scales
            mine, total = mine + float(signal[code]), total + float(signal.sum())
        return mine / max(total, 1e-300)

    def minimised(self, tolerance: float, noise: float = 1.0) -> "State":
        """Return the state after a search down to a promise of ``tolerance`` times the noise.

        That is the reduced χ², or the factor ``noise`` on variances if it is larger.
        """
        model, n = self.model, self.model.n_points

        def at(chi2: float) -> float:
            return tolerance * max(chi2 / n, noise)

        low, high = model.bounds
        reach = 1e-9 * (high - low)
        start = np.clip(model.start, low + reach, high - reach)
        minimum = minimise(model.evaluate, start, model.bounds, at, longest=model.longest_step)
        values = minimum.point.tolist()
        parameters = tuple(
            replace(p, start=v) for p, v in zip(model.parameters, values, strict=True)
        )
        noise = _noise(minimum.residual[:n], n - len(values))
        return State(replace(model, parameters=parameters, noise=noise), minimum)

    def finished(self) -> "State":
        """Return the state after the last search.

        Rounding of the derivatives may keep it from an exact minimum in a direction that the data
        leave open. Then it has converged where a fifth of the noise is promised at most: half a
        standard uncertainty.
        """
        state = self.minimised(CONVERGED)
        assert state.minimum is not None
        if state.minimum.converged:
            return state
        return state.minimised(NEARBY, state.model.noise)

    def is_trace(self, code: int) -> bool:
        """Return whether a phase gives little of the calculated signal."""
        return self.share(code) < _TRACE

    def searched_again(self) -> "State":
        """Return the minimum roughly, with as many background terms as the banks show."""
        return self.with_terms().minimised(ROUGHLY)

    def with_terms(self) -> "State":
        """Return the state with the number of background terms of each bank that it shows."""
        banks = tuple(
            replace(bank, terms=_terms(self.model, b, self.model.start))
            for b, bank in enumerate(self.model.banks)
        )
        if [b.terms for b in banks] == [b.terms for b in self.model.banks]:
            return self
        return State(replace(self.model, banks=banks), None)


def _noise(residual: Array, degrees: int) -> float:
    """Return the factor on variances that a residual shows: reduced χ² times correlation."""
    reduced = float(residual @ residual) / max(degrees, 1)
    return max(reduced, 1.0) * serial_correlation(residual)


def _terms(model: JointModel, number: int, point: Array) -> int:
    """Return the number of background terms of a bank by Akaike's criterion."""
    of_bank = model.banks[number]
    patterns = [
        of_bank.bank.at_points(model.simulated(number, code, point, slopes=False)[0])
        for code in range(len(model.phases))
    ]
    columns = np.concatenate([*patterns, of_bank.bank.polynomials(_TERMS[-1])], axis=1)
    weights = of_bank.weights
    q, _ = np.linalg.qr(columns * weights[:, None])
    y = of_bank.bank.intensity * weights
    squares = (q.T @ y) ** 2
    n, fixed = len(y), len(patterns)
    left = np.array([y @ y - squares[: fixed + terms].sum() for terms in _TERMS])
    residual = y - q @ (q.T @ y)
    # Of neighbouring residuals alone is correlated what no background would change.
    noise = max(float(residual @ residual) / (n - len(squares)), 1.0)
    # Smooth terms cannot imitate lines, so that Akaike's weaker penalty (IEEE Trans. Autom. Control
    # 19 (1974) 716) is safe; a background that is too stiff biases what overlaps.
    best = int(np.argmin(left / noise + 2.0 * np.array(_TERMS)))
    return _TERMS[best]
