r"""Lattices from peak positions alone, for a sample whose atoms are not those of a campaign.

A structureless whole-pattern fit (Pawley, J. Appl. Cryst. 14 (1981) 357; Le Bail, Duroy & Fourquet,
Materials Research Bulletin 23 (1988) 447): every line that lattice and space group allow has a free
intensity, the non-negative least squares solution (Lawson & Hanson, *Solving Least Squares
Problems*, 1974) at every step, so that only cell and broadening are searched for.
"""

from collections.abc import Sequence

import numpy as np
from numpy.polynomial import chebyshev
from scipy.optimize import least_squares, nnls

from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, encloses_volume
from bragg_data.crystallography.reflections import unique_lines
from bragg_data.crystallography.structure import Phase, scaled_to_volume_per_atom
from bragg_data.instrument.peak_shape import mixing, peak, peak_shape
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.evidence import rank_fits
from bragg_data.refinement.result import (
    RefinementResult,
    fitted_points,
    pattern_fit_on_grid,
    uncertainties,
)
from bragg_data.refinement.rietveld import usable_starts
from bragg_data.refinement.single_phase import runaway_bounds
from bragg_data.refinement.time_limit import check_time

_MOST_LINES = 60  # of a lattice, those with the largest d: further down they overlap
_FEWEST = 100  # points
_REACH = 15.0  # full widths to either side, over which a peak is calculated
_TERMS = 8  # of the background, over a part of the window
_SCAN = 2e-3  # relative step of the search for a lattice's size: less than a peak is wide
_STEPS = {name: 2e-4 if name in "abc" else 4e-3 for name in CELL_PARAMETERS}
_BROADENING = (("inverse_size", 0.0, 6.0, 0.05), ("microstrain", 0.0, 6000.0, 50.0))
_FAR = 0.02  # relative change of the cell, or of an angle in rad, beyond which it has run away


def refine_lattices(
    campaign: Campaign, gridded: GriddedProfile, starts: Sequence[tuple[int, Array]]
) -> list[RefinementResult]:
    """Refine the lattice of each phase with free intensities; the most plausible one first.

    Starts are phase codes and cells (6,); cells that enclose no volume are left out, other sizes in
    the campaign's range are starts, too. The fits' ``intensities`` are ``free``; points that they
    leave out are NaN in their patterns. A RefinementError is raised if too few points are covered,
    or no start encloses a volume.
    """
    starts = usable_starts(campaign.phases, starts)
    codes = sorted({code for code, _ in starts})
    # All are fitted to the same points, so that they can be compared.
    shortest = max(_shortest(campaign, gridded, code) for code in codes)
    lattices = [_Lattice(campaign, gridded, code, shortest) for code in codes]
    lattices.sort(key=lambda lattice: len(lattice.columns))
    fits: list[RefinementResult] = []
    for lattice in lattices:
        cells = [cell for code, cell in starts if code == lattice.code]
        if not fits:  # the lattice with the fewest parameters determines the size
            cells += lattice.sizes()
        # A lattice of the same size in another system is a start, too.
        cells += [
            scaled_to_volume_per_atom(lattice.phase, campaign.phases[fit.phase], fit.cell)
            for fit in fits
        ]
        fits.append(lattice.refined(lattice.likeliest(cells)))
    return rank_fits(fits)


def _d_spacings(phase: Phase, products: Array, cell: Array) -> Array:
    return np.asarray((phase.lattice.independent_metric(cell[None])[0] @ products) ** -0.5)


def _products(phase: Phase, cell: Array, shortest: float) -> Array:
    h, k, l = (int(np.ceil(1.2 * x / shortest)) for x in cell[:3])  # noqa: E741
    return np.asarray(unique_lines(phase, (h, k, l)).products, dtype=float)


def _largest_cell(campaign: Campaign, code: int) -> Array:
    cells = campaign.samples.cells[campaign.samples.phase == code]
    return np.asarray(cells[np.prod(cells[:, :3], axis=1).argmax()])


def _shortest(campaign: Campaign, gridded: GriddedProfile, code: int) -> float:
    """Return the d-spacing above which a phase's largest cell has the number of lines to fit."""
    tof, phase = campaign.grid.tof[fitted_points(gridded, _FEWEST)], campaign.phases[code]
    ends = campaign.instrument.d_spacing_from_tof(tof[[0, -1]])
    cell, shortest = _largest_cell(campaign, code), 0.5 * float(ends[1])
    while True:
        d = _d_spacings(phase, _products(phase, cell, shortest), cell)
        inside = np.sort(d[(d < ends[1]) & (d >= shortest)])[::-1]
        if len(inside) >= _MOST_LINES:
            return float(inside[_MOST_LINES - 1])
        if shortest <= ends[0]:
            return float(ends[0])
        shortest = max(0.85 * shortest, float(ends[0]))


class _Lattice:
    """One phase's lines over one measurement."""

    def __init__(
        self, campaign: Campaign, gridded: GriddedProfile, code: int, shortest: float
    ) -> None:
        self.campaign, self.gridded, self.code = campaign, gridded, code
        self.phase: Phase = campaign.phases[code]
        self.columns = self.phase.lattice.free_columns
        self.products = _products(self.phase, _largest_cell(campaign, code), shortest)
        self.tof = campaign.grid.tof
        fitted = fitted_points(gridded, _FEWEST)
        self.shortest = shortest
        end = self.tof[fitted][-1:]
        self.longest = float(campaign.instrument.d_spacing_from_tof(end)[0])
        low = float(campaign.instrument.tof_from_d_spacing(shortest))
        self.fitted = fitted & (self.tof >= low)
        self.sigma = gridded.sigma[self.fitted]
        x = np.linspace(-1, 1, int(self.fitted.sum()))
        self.polynomials = np.asarray(chebyshev.chebvander(x, _TERMS - 1)) / self.sigma[:, None]
        self.basis, _ = np.linalg.qr(self.polynomials)
        self.y = self._without_background(gridded.intensity[self.fitted] / self.sigma)

    def _without_background(self, values: Array) -> Array:
        return np.asarray(values - self.basis @ (self.basis.T @ values))

    def _cell(self, free: Array) -> Array:
        return np.asarray(self.phase.lattice.cells(free[None])[0])

    def peaks(self, cell: Array, inverse_size: float, microstrain: float) -> Array:
        """Return weighted peaks of unit area, shape (points, lines), of the lines inside."""
        instrument, tof = self.campaign.instrument, self.tof[self.fitted]
        d = _d_spacings(self.phase, self.products, cell)
        d = d[(d > self.shortest * (1 - _FAR)) & (d < self.longest * (1 + _FAR))]
        shape = peak_shape(instrument, d, size=1 / max(inverse_size, 1e-3), microstrain=microstrain)
        position = instrument.tof_from_d_spacing(d)
        width = mixing(shape.variance, shape.fwhm)[0] + 1 / shape.rise + 1 / shape.decay
        # Grid points about each line, the same number for all of them.
        middle = np.searchsorted(tof, position)
        last = np.searchsorted(tof, position + _REACH * width)
        reach = int(np.clip((last - middle).max(initial=1), 1, len(tof)))
        rows = np.clip(middle + np.arange(-reach, reach + 1)[:, None], 0, len(tof) - 1)
        columns = np.zeros((len(tof), len(d)))
        # Points beyond the ends fall on the last ones, again and again with the same value.
        np.put_along_axis(columns, rows, peak(tof[rows] - position, shape), axis=0)
        return np.asarray(columns[:, columns.any(axis=0)] / self.sigma[:, None])

    def solved(self, cell: Array, broadening: Sequence[float]) -> tuple[Array, Array, Array]:
        """Return residual, weighted peaks and intensities; no peaks for a cell without volume."""
        check_time()
        if not encloses_volume(cell[None])[0]:
            return self.y, np.zeros((len(self.y), 0)), np.zeros(0)
        peaks = self.peaks(cell, *broadening)
        if not peaks.size:
            return self.y, peaks, np.zeros(0)
        columns = self._without_background(peaks)
        norm = np.maximum(np.linalg.norm(columns, axis=0), 1e-30)
        q, r = np.linalg.qr(columns / norm)
        intensities, _ = nnls(r, q.T @ self.y, maxiter=20 * r.shape[1])
        return self.y - columns @ (intensities / norm), peaks, intensities / norm

    def sizes(self) -> list[Array]:
        """Return the CIF's cell in all sizes of the campaign's range."""
        samples = self.campaign.samples
        sizes = np.cbrt(np.prod(samples.cells[samples.phase == self.code, :3], axis=1))
        shape = np.array(self.phase.cell, dtype=np.float64)
        steps = int(np.log(sizes.max() / sizes.min()) / _SCAN) + 1
        scales = np.geomspace(sizes.min(), sizes.max(), steps) / np.cbrt(np.prod(shape[:3]))
        return [np.concatenate([scale * shape[:3], shape[3:]]) for scale in scales]

    def likeliest(self, cells: Sequence[Array]) -> Array:
        """Return the likeliest of some cells, few lines being likelier than many."""
        penalty = float(np.log(len(self.y)))
        nominal = 1 / self.campaign.size, self.campaign.microstrain

        def score(cell: Array) -> float:
            d = _d_spacings(self.phase, self.products, cell)
            lines = int(((d > self.shortest) & (d < self.longest)).sum())
            residual, *_ = self.solved(cell, nominal)
            return float(residual @ residual) + penalty * lines

        return min(cells, key=score)

    def refined(self, cell: Array) -> RefinementResult:
        """Refine cell and broadening from a start."""
        names = self.phase.lattice.free_parameters
        free = cell[self.columns]
        scale = np.array([_STEPS[n] for n in names] + [step for *_, step in _BROADENING])
        begin = np.concatenate([free, [1 / self.campaign.size, self.campaign.microstrain]])
        low, high = runaway_bounds(names, free, _FAR)
        low = np.concatenate([low, [lowest for _, lowest, *_ in _BROADENING]])
        high = np.concatenate([high, [highest for *_, highest, _ in _BROADENING]])

        def residual(x: Array) -> Array:
            point = x * scale
            return self.solved(self._cell(point[: len(free)]), point[len(free) :].tolist())[0]

        def jacobian(x: Array) -> Array:
            here = residual(x)
            steps = np.where(x + 1 < high / scale, 1.0, -1.0)
            moved = [residual(x + np.eye(len(x))[k] * steps[k]) for k in range(len(x))]
            return np.stack(moved, axis=1) / steps - here[:, None] / steps

        start, bounds = np.clip(begin, low + 1e-9, high - 1e-9) / scale, (low / scale, high / scale)
        fit = least_squares(residual, start, jacobian, bounds, max_nfev=25, xtol=1e-4, ftol=1e-6)
        return self._result(fit.x * scale, np.asarray(fit.jac) / scale, bool(fit.success))

    def _result(self, point: Array, jacobian: Array, converged: bool) -> RefinementResult:
        count = len(self.columns)
        cell, broadening = self._cell(point[:count]), point[count:]
        residual, peaks, intensities = self.solved(cell, broadening.tolist())
        chi2, points = float(residual @ residual), len(residual)
        n_parameters = len(point) + int((intensities > 0).sum()) + self.basis.shape[1]
        su, reduced, correlation = uncertainties(jacobian, residual, n_parameters)
        moved = self._cell(point[:count] + su[:count])
        size = 1 / max(broadening[0], 1e-3)
        y, pattern = self.gridded.intensity[self.fitted], peaks @ intensities * self.sigma
        rest = (y - pattern) / self.sigma
        weights, *_ = np.linalg.lstsq(self.polynomials, rest, rcond=None)
        background = self.polynomials @ weights * self.sigma
        curves = pattern + background, background, y - pattern - background
        return RefinementResult(
            phase=self.code,
            cell=cell,
            su=np.abs(moved - cell),
            parameters={"size": size, "microstrain": float(broadening[1])},
            parameters_su={"size": float(su[count] * size**2), "microstrain": float(su[-1])},
            pattern_fit=pattern_fit_on_grid(self.gridded, self.fitted, curves, 1.0, chi2, reduced),
            chi2=chi2,
            n_points=points,
            n_parameters=n_parameters,
            correlation=correlation,
            converged=converged,
            intensities="free",
        )
