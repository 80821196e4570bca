r"""Phases against several banks at once: residuals and exact derivatives.

On each bank :math:`c_i = \sum_p s_p\,P_{pi}(\theta) + \sum_k b_k T_k(x_i)`, with the patterns P of
all phases, averaged over the measured bins. The scales (not negative) and the background of a bank
are solved for at every step (variable projection; Golub & Pereyra, SIAM Journal on Numerical
Analysis 10 (1973) 413, with Kaufman's Jacobian, BIT 15 (1975) 49).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.sparse import csr_array

from bragg_data.arrays import AnyFloats, Array
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.refinement.joint_parameters import LEAST_INVERSE, Parameter
from bragg_data.refinement.levenberg_marquardt import Evaluation
from bragg_data.refinement.line_factors import is_factor, line_factors
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.simulation.kinematic import Simulator

_SIZE, _MICROSTRAIN = 10.0, 300.0  # µm, 1e-6: around which widths are prepared
# Of ln(W / W nominal), prepared from where a sample does not broaden, or from the first one on.
_NARROWEST, _BROADEST = -1.0, 0.9


@dataclass(frozen=True, eq=False)
class BankModel:
    """A bank, the simulators of the phases on it, and the number of its background terms."""

    bank: MeasuredBank
    simulators: tuple[Simulator, ...]  # of each phase by itself
    terms: int
    blur: float = 0.0  # full width in µs over the peak's, by which everything is blurred
    error: Array | None = None  # (n,) of the points with the model's own, over their statistical

    @cached_property
    def weights(self) -> Array:
        """1/σ of each row, (n,)."""
        sigma = self.bank.sigma if self.error is None else self.bank.sigma * self.error
        return np.asarray(1 / self._blurred(sigma[:, None])[:, 0])

    @cached_property
    def basis(self) -> Array:
        """Orthonormal weighted background polynomials, (n, terms)."""
        polynomials = self._blurred(self.bank.polynomials(self.terms))
        return np.asarray(np.linalg.qr(polynomials * self.weights[:, None])[0])

    @cached_property
    def y(self) -> Array:
        """Weighted intensities without background, (n,)."""
        return self._projected(self._blurred(self.bank.intensity[:, None]))[:, 0]

    def weighted(self, patterns: AnyFloats) -> Array:
        """Return patterns (m, points of the grid) as columns like :attr:`y`, (n, m)."""
        return self.weighted_points(self.bank.at_points(patterns))

    def weighted_points(self, patterns: Array) -> Array:
        """Return patterns at the points of the bank, (n, m), as columns like :attr:`y`."""
        return self._projected(self._blurred(patterns))

    def _projected(self, values: Array) -> Array:
        weighted = values * self.weights[:, None]
        return np.asarray(weighted - self.basis @ (self.basis.T @ weighted))

    def _blurred(self, values: Array) -> Array:
        return values if not self.blur else np.asarray(self._blurring @ values)

    @cached_property
    def _blurring(self) -> csr_array:
        """Gaussian means around a few points for each of their widths, (n, points)."""
        x = np.log(self.bank.tof)
        sigma = self.blur * float(np.median(self.bank.full_width / self.bank.tof)) / 2.355
        middle = np.linspace(x[0], x[-1], int(np.clip(np.ptp(x) / (0.7 * sigma), 40, len(x))))
        first, last = np.searchsorted(x, [middle - 4 * sigma, middle + 4 * sigma])
        rows = np.repeat(np.arange(len(middle)), last - first)
        columns = np.concatenate([np.arange(*ends) for ends in zip(first, last, strict=True)])
        kernel = np.exp(-0.5 * ((x[columns] - middle[rows]) / sigma) ** 2)
        kernel /= np.bincount(rows, kernel, len(middle))[rows]
        return csr_array((kernel, (rows, columns)), shape=(len(middle), len(x)))


def blurred(models: Sequence[BankModel], blur: float) -> tuple[BankModel, ...]:
    """Return the models of banks with everything blurred, to ``blur`` widths of the peaks."""
    return tuple(replace(model, blur=blur) for model in models)


def bank_model(bank: MeasuredBank, phases: Sequence[Phase], terms: int) -> BankModel:
    """Return the model of a bank; the first one of its kind takes about a second to build."""
    simulators = tuple(_known_simulator(phase, bank.instrument, bank.grid) for phase in phases)
    return BankModel(bank, simulators, terms)


def simulator_of(phase: Phase, instrument: Instrument, grid: TofGrid) -> Simulator:
    """Return a simulator of a phase by itself, prepared for samples' widths."""
    d = instrument.d_spacing_from_tof(grid.tof)
    nominal, least = (
        mixing(shape.variance, shape.fwhm)[0]
        for shape in (
            peak_shape(instrument, d, size=_SIZE, microstrain=_MICROSTRAIN),
            peak_shape(instrument, d, size=1 / LEAST_INVERSE, microstrain=0.0),
        )
    )
    narrowest = float(np.log(least / nominal).min())
    widths = max(float(np.floor(10 * narrowest)) / 10, _NARROWEST), _BROADEST
    return Simulator([phase], instrument, grid, _SIZE, _MICROSTRAIN, width_range=widths)


# Frames of a series have banks alike, and mixtures phases.
_known_simulator = lru_cache(maxsize=256)(simulator_of)


class BankFit(NamedTuple):
    """Where a bank stands at a point: residual, scales and weighted patterns of the phases."""

    residual: Array  # (n,)
    scales: Array  # (n_phases,)
    columns: Array  # (n, n_phases)
    patterns: Array  # (n, n_phases) as they are, without weights
    jacobian: Array  # (n, k); empty if not asked for
    of_scales: Array  # (n_phases, k) how scales follow the parameters; empty if not asked for


@dataclass(frozen=True, eq=False)
class JointModel:
    """Residuals of all banks as a function of the values of the parameters.

    ``noise`` is the factor on variances that the misfit shows, by which restraints are weighted
    like the data. ``offsets`` are relative errors of the banks' difC where these are known.
    """

    banks: tuple[BankModel, ...]
    phases: tuple[Phase, ...]
    parameters: tuple[Parameter, ...]
    noise: float = 1.0
    offsets: tuple[float, ...] | None = None

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest values, (k,) each."""
        low, high = np.array([(p.low, p.high) for p in self.parameters]).reshape(-1, 2).T
        return low, high

    @property
    def start(self) -> Array:
        """The start of each parameter, (k,)."""
        return np.array([p.start for p in self.parameters])

    def longest_step(self, point: Array) -> Array:
        """Return how much each parameter may change in a step from a point, (k,)."""
        return np.array(
            [p.longest_step(float(v)) for p, v in zip(self.parameters, point, strict=True)]
        )

    @property
    def n_points(self) -> int:
        """Number of rows of all banks, without restraints."""
        return sum(len(model.y) for model in self.banks)

    @cached_property
    def _restraint(self) -> Array:
        su = np.array([p.su for p in self.parameters])
        return np.asarray(np.sqrt(self.noise) / su)

    def evaluate(self, point: Array) -> Evaluation:
        """Return residuals, restraints last, and their derivatives; a CrystalError if undefined."""
        fits = [self.fit_bank(b, point) for b in range(len(self.banks))]
        expected = np.array([p.expected for p in self.parameters])
        restrained = np.flatnonzero(self._restraint)
        rows = np.diag(self._restraint)[restrained]
        return Evaluation(
            np.concatenate([*(f.residual for f in fits), rows @ (point - expected)]),
            np.concatenate([*(f.jacobian for f in fits), rows]),
            tuple(fits),
        )

    def residual(self, point: Array) -> Array:
        """Return the residuals of all banks alone, (n_points,)."""
        banks = range(len(self.banks))
        return np.concatenate([self.fit_bank(b, point, slopes=False).residual for b in banks])

    def explained(self, residual: Array) -> float:
        """Return the share of the signal above noise that a fit of residuals (n,) explains."""
        signal = sum(float(bank.y @ bank.y) for bank in self.banks)
        n = len(residual)
        return 1 - max(float(residual @ residual) - n, 0.0) / max(signal - n, 1e-9)

    def fit_bank(self, number: int, point: Array, *, slopes: bool = True) -> BankFit:
        """Return a bank's residual at a point (k,), with its derivatives if asked for."""
        model = self.banks[number]
        changes = []
        columns = np.empty((len(model.y), len(self.phases)))
        patterns = np.empty((len(model.bank.tof), len(self.phases)))
        for code in range(len(self.phases)):
            simulated, entries = self.simulated(number, code, point, slopes=slopes)
            at_points = model.bank.at_points(simulated)
            patterns[:, code] = at_points[:, 0]
            weighted = model.weighted_points(at_points)
            columns[:, code] = weighted[:, 0]
            changes.append((weighted[:, 1:], entries))
        length = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
        scales = nnls(columns / length, model.y)[0] / length
        residual = model.y - columns @ scales
        jacobian = np.zeros((len(residual), len(self.parameters) if slopes else 0))
        of_scales = np.zeros((len(self.phases), jacobian.shape[1]))
        if slopes:
            for (change, entries), scale in zip(changes, scales, strict=True):
                for k, place, slope in entries:
                    jacobian[:, k] -= scale * slope * change[:, place]
            present = scales > 0
            q, r = np.linalg.qr(columns[:, present])
            along = q.T @ jacobian
            of_scales[present] = np.linalg.lstsq(r, along)[0]
            jacobian -= q @ along
        return BankFit(residual, scales, columns, patterns, jacobian, of_scales)

    def cell(self, code: int, point: Array) -> Array:
        """Return the cell (6,) of a phase at a point, in Å and degrees."""
        return np.asarray(self.phases[code].lattice.cells(self._free(code, point)[None])[0])

    def _free(self, code: int, point: Array) -> Array:
        phase = self.phases[code]
        free = np.array(phase.cell, dtype=np.float64)[phase.lattice.free_columns]
        for k, parameter in enumerate(self.parameters):
            if parameter.phase == code and (key := parameter.keys[0]).startswith("cell_"):
                free[int(key.removeprefix("cell_"))] = point[k]
        return free

    def simulated(
        self, number: int, code: int, point: Array, *, slopes: bool
    ) -> tuple[AnyFloats, list[tuple[int, int, float]]]:
        """Return a phase's pattern on a bank's grid, with derivatives, (1 + m, points).

        Also which parameter each derivative belongs to, its place, and the factor on it.
        """
        model, phase = self.banks[number], self.phases[code]
        free = self._free(code, point)
        given: dict[str, float] = {}
        entries: list[tuple[int, str, float]] = []
        for k, parameter in enumerate(self.parameters):
            if parameter.phase not in (None, code) or parameter.bank not in (None, number):
                continue
            for key in parameter.keys:
                name, value, slope = _of_simulator(key, float(point[k]), model.bank)
                if not name.startswith("cell_"):  # of an element and of a site: their sum counts
                    given[name] = given.get(name, 0.0) + value
                entries.append((k, name, slope))
        # With a difC the simulator does not build what draws nominal peaks alone.
        off = self.offsets[number] if self.offsets is not None else 0.0
        known = {"difc": model.bank.instrument.difc * (1 + off)}
        given = {n: max(v, 0.0) if n.startswith("u_iso") else v for n, v in given.items()}
        factors = {name: value for name, value in given.items() if is_factor(name)}
        plain = [name for name in given if name not in factors]
        names = plain + [f"factor_{k + 1}" for k in range(len(factors))]
        values = np.array([given[name] for name in (*plain, *factors)])
        on_lines = None
        if factors:
            cell = phase.lattice.cells(free[None])[0]
            on_lines = line_factors(factors, cell, model.bank.sin_theta)
        simulated = model.simulators[code].linearise(
            0, free, names, values, slopes=slopes, factors=on_lines, known=known
        )
        place = {name: len(free) + k for k, name in enumerate((*plain, *factors))}
        place |= {f"cell_{k}": k for k in range(len(free))}
        return simulated, [(k, place[name], slope) for k, name, slope in entries]


def _of_simulator(key: str, value: float, bank: MeasuredBank) -> tuple[str, float, float]:
    """Return what the simulator calls a parameter, its value there, and its slope."""
    if key == "inverse_size":
        size = 1 / max(value, LEAST_INVERSE)
        return "size", size, -(size**2)
    if key == "offset":
        return "difc", bank.instrument.difc * (1 + value), bank.instrument.difc
    return key, value, 1.0
