r"""Cells from the positions of peaks alone, for a sample whose structure factors are another's.

After Le Bail, Duroy & Fourquet, Materials Research Bulletin 23 (1988) 447: every line that the
lattice and the space group allow has an intensity of its own. Here the intensities are the
non-negative least squares solution (Lawson & Hanson, *Solving Least Squares Problems*, 1974), not
iterated, so that only cell and broadening are searched for. It says nothing of the atoms: what it
finds is a lattice in which the peaks have a place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, reciprocal_metric
from bragg_data.crystallography.reflections import lines_from_reflections, unique_reflections
from bragg_data.crystallography.structure import Phase, scaled_to_volume_per_atom
from bragg_data.instrument.peak_shape import mixing, peak, peak_shape
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import PatternFit
from bragg_data.refinement.rietveld import (
    RefinementError,
    RefinementResult,
    rank_fits,
    serial_correlation,
)

_Array = NDArray[np.float64]

_MOST_LINES = 60  # of a lattice, those with the largest d: further down they overlap
_FEWEST = 100  # points
_REACH = 15.0  # full widths to either side, over which a peak is followed
_TERMS = 8  # of the background, over a part of the window
_SCAN = 2e-3  # relative step of the search for a lattice's size: less than a peak is wide
_STEPS = {name: 2e-4 if name in "abc" else 4e-3 for name in CELL_PARAMETERS}
_BROADENING = (("inverse_size", 0.0, 6.0, 0.05), ("microstrain", 0.0, 6000.0, 50.0))
_FAR = 0.02  # relative change of the cell, or of an angle in rad, beyond which it has run away


def refine_lattices(
    campaign: Campaign,
    gridded: GriddedProfile,
    starts: Sequence[tuple[int, NDArray[np.float64]]],
) -> list[RefinementResult]:
    """Refine the lattice of each phase with free intensities; the most plausible one first.

    Parameters
    ----------
    campaign
        Phases, instrument, grid, nominal broadening.
    gridded
        The measurement on the campaign's grid, with its background.
    starts
        Phase codes and cells (6,). Other sizes in the campaign's range are tried, too.

    Returns
    -------
    Fits whose ``intensities`` are ``free``; points that they leave out are NaN in their overlays.

    Raises
    ------
    RefinementError
        If too few points are covered.
    """
    codes = sorted({code for code, _ in starts})
    # On the same points for all, that they can be compared.
    shortest = max(_shortest(campaign, gridded, code) for code in codes)
    lattices = [_Lattice(campaign, gridded, code, shortest) for code in codes]
    lattices.sort(key=lambda one: len(one.columns))
    found: list[RefinementResult] = []
    for one in lattices:
        cells = [cell for phase, cell in starts if phase == one.code]
        if not found:  # the one with the fewest parameters finds the size
            cells += one.sizes()
        # A lattice of the same size in another system is a start, too.
        cells += [
            scaled_to_volume_per_atom(one.phase, campaign.phases[fit.phase], fit.cell)
            for fit in found
        ]
        found.append(one.refined(one.likeliest(cells)))
    return rank_fits(found)


def _covered(gridded: GriddedProfile) -> NDArray[np.bool_]:
    covered = gridded.covered & (gridded.sigma > 0)
    if covered.sum() < _FEWEST:
        raise RefinementError(
            f"{covered.sum()} points are covered, too few to refine anything on ({_FEWEST})."
        )
    return np.asarray(covered)


def _spacings(phase: Phase, products: _Array, cell: _Array) -> _Array:
    terms = [group[0] for group in phase.lattice.metric_terms]
    return np.asarray((reciprocal_metric(cell[None])[0, terms] @ products) ** -0.5)


def _products(phase: Phase, cell: _Array, shortest: float) -> _Array:
    h, k, l = (int(np.ceil(1.2 * x / shortest)) for x in cell[:3])  # noqa: E741
    return np.asarray(
        lines_from_reflections(phase, unique_reflections(phase, (h, k, l))).products, dtype=float
    )


def _largest(campaign: Campaign, code: int) -> _Array:
    cells = campaign.samples.cells[campaign.samples.phase == code]
    return np.asarray(cells[np.prod(cells[:, :3], axis=1).argmax()])


def _shortest(campaign: Campaign, gridded: GriddedProfile, code: int) -> float:
    """Return the d-spacing down to which a phase's largest cell has so many lines."""
    tof, phase = campaign.grid.tof[_covered(gridded)], campaign.phases[code]
    ends = campaign.instrument.d_spacing_from_tof(tof[[0, -1]])
    cell, shortest = _largest(campaign, code), 0.5 * float(ends[1])
    while True:
        d = _spacings(phase, _products(phase, cell, shortest), cell)
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
        self.columns = [CELL_PARAMETERS.index(name) for name in self.phase.lattice.free_parameters]
        self.products = _products(self.phase, _largest(campaign, code), shortest)
        self.tof = campaign.grid.tof
        covered = _covered(gridded)
        self.shortest = shortest
        end = self.tof[covered][-1:]
        self.longest = float(campaign.instrument.d_spacing_from_tof(end)[0])
        low = float(campaign.instrument.tof_from_d_spacing(shortest))
        self.known = covered & (self.tof >= low)
        self.sigma = gridded.sigma[self.known]
        x = np.linspace(-1, 1, int(self.known.sum()))
        self.polynomials = np.asarray(chebyshev.chebvander(x, _TERMS - 1)) / self.sigma[:, None]
        self.basis, _ = np.linalg.qr(self.polynomials)
        self.y = self._projected(gridded.intensity[self.known] / self.sigma)

    def _projected(self, values: _Array) -> _Array:
        return np.asarray(values - self.basis @ (self.basis.T @ values))

    def _cell(self, free: _Array) -> _Array:
        return np.asarray(self.phase.lattice.cells(free[None])[0])

    def peaks(self, cell: _Array, inverse_size: float, microstrain: float) -> _Array:
        """Return weighted peaks of unit area, shape (points, lines), of the lines inside."""
        instrument, tof = self.campaign.instrument, self.tof[self.known]
        d = _spacings(self.phase, self.products, cell)
        d = d[(d > self.shortest * (1 - _FAR)) & (d < self.longest * (1 + _FAR))]
        shape = peak_shape(instrument, d, size=1 / max(inverse_size, 1e-3), microstrain=microstrain)
        at = instrument.tof_from_d_spacing(d)
        width = mixing(shape.variance, shape.fwhm)[0] + 1 / shape.rise + 1 / shape.decay
        # Grid points about each line, as many for all of them.
        middle = np.searchsorted(tof, at)
        last = np.searchsorted(tof, at + _REACH * width)
        reach = int(np.clip((last - middle).max(initial=1), 1, len(tof)))
        rows = np.clip(middle + np.arange(-reach, reach + 1)[:, None], 0, len(tof) - 1)
        found = np.zeros((len(tof), len(d)))
        # Points beyond the ends fall on the last ones, again and again with the same value.
        np.put_along_axis(found, rows, peak(tof[rows] - at, shape), axis=0)
        return np.asarray(found[:, found.any(axis=0)] / self.sigma[:, None])

    def solved(self, cell: _Array, broadening: Sequence[float]) -> tuple[_Array, _Array, _Array]:
        """Return the residual of the best intensities, the weighted peaks, the intensities."""
        peaks = self.peaks(cell, *broadening)
        if not peaks.size:
            return self.y, peaks, np.zeros(0)
        columns = self._projected(peaks)
        norm = np.maximum(np.linalg.norm(columns, axis=0), 1e-30)
        q, r = np.linalg.qr(columns / norm)
        intensities, _ = nnls(r, q.T @ self.y, maxiter=20 * r.shape[1])
        return self.y - columns @ (intensities / norm), peaks, intensities / norm

    def chi2(self, cell: _Array) -> float:
        """Return χ² with nominal broadening."""
        residual, *_ = self.solved(cell, (1 / self.campaign.size, self.campaign.microstrain))
        return float(residual @ residual)

    def sizes(self) -> list[_Array]:
        """Return the CIF's cell in all sizes of the campaign's range."""
        samples = self.campaign.samples
        sizes = np.cbrt(np.prod(samples.cells[samples.phase == self.code, :3], axis=1))
        shape = np.array(self.phase.cell, dtype=np.float64)
        steps = int(np.log(sizes.max() / sizes.min()) / _SCAN) + 1
        scales = np.geomspace(sizes.min(), sizes.max(), steps) / np.cbrt(np.prod(shape[:3]))
        return [np.concatenate([scale * shape[:3], shape[3:]]) for scale in scales]

    def likeliest(self, cells: Sequence[_Array]) -> _Array:
        """Return the likeliest of some cells, few lines being likelier than many."""
        penalty = float(np.log(len(self.y)))

        def score(cell: _Array) -> float:
            d = _spacings(self.phase, self.products, cell)
            lines = int(((d > self.shortest) & (d < self.longest)).sum())
            return self.chi2(cell) + penalty * lines

        return min(cells, key=score)

    def refined(self, cell: _Array) -> RefinementResult:
        """Refine cell and broadening from a start."""
        names = self.phase.lattice.free_parameters
        free = cell[self.columns]
        scale = np.array([_STEPS[n] for n in names] + [step for *_, step in _BROADENING])
        begin = np.concatenate([free, [1 / self.campaign.size, self.campaign.microstrain]])
        far = np.array([_FAR * v if n in "abc" else np.degrees(_FAR)
                        for n, v in zip(names, free, strict=True)])  # fmt: skip
        low = np.concatenate([free - far, [lowest for _, lowest, *_ in _BROADENING]])
        high = np.concatenate([free + far, [highest for *_, highest, _ in _BROADENING]])

        def residual(x: _Array) -> _Array:
            point = x * scale
            return self.solved(self._cell(point[: len(free)]), point[len(free) :].tolist())[0]

        def jacobian(x: _Array) -> _Array:
            here = residual(x)
            steps = np.where(x + 1 < high / scale, 1.0, -1.0)
            moved = [residual(x + np.eye(len(x))[k] * steps[k]) for k in range(len(x))]
            return np.stack(moved, axis=1) / steps - here[:, None] / steps

        start = np.clip(begin, low + 1e-9, high - 1e-9) / scale
        fit = least_squares(
            residual, start, jacobian, bounds=(low / scale, high / scale), max_nfev=25, xtol=1e-4,
            ftol=1e-6,
        )  # fmt: skip
        point = fit.x * scale
        return self._told(point, np.asarray(fit.jac) / scale, bool(fit.success))

    def _told(self, point: _Array, jacobian: _Array, converged: bool) -> RefinementResult:
        count = len(self.columns)
        cell, broadening = self._cell(point[:count]), point[count:]
        residual, peaks, intensities = self.solved(cell, broadening.tolist())
        chi2, points = float(residual @ residual), len(residual)
        parameters = len(point) + int((intensities > 0).sum()) + self.basis.shape[1]
        correlation = serial_correlation(residual)
        reduced = chi2 / max(points - parameters, 1)
        covariance = np.linalg.pinv(jacobian.T @ jacobian) * reduced * correlation
        su = np.sqrt(np.maximum(np.diag(covariance), 0))
        moved = self._cell(point[:count] + su[:count])
        others = {"size": 1 / max(broadening[0], 1e-3), "microstrain": float(broadening[1])}
        others_su = {"size": float(su[count] * others["size"] ** 2), "microstrain": float(su[-1])}
        overlay = self._overlay(peaks @ intensities * self.sigma, chi2, reduced)
        return RefinementResult(
            self.code, cell, np.abs(moved - cell), others, others_su, overlay, chi2, points,
            parameters, correlation, converged, intensities="free",
        )  # fmt: skip

    def _overlay(self, pattern: _Array, chi2: float, reduced: float) -> PatternFit:
        y = self.gridded.intensity[self.known]
        rest = (y - pattern) / self.sigma
        weights, *_ = np.linalg.lstsq(self.polynomials, rest, rcond=None)
        background = self.polynomials @ weights * self.sigma
        values = {}
        for name, own in (("calculated", pattern + background), ("background", background),
                          ("difference", y - pattern - background)):  # fmt: skip
            values[name] = np.full(len(self.tof), np.nan)
            values[name][self.known] = own
        above = float((((y - background) / self.sigma) ** 2).sum())
        return PatternFit(
            **values, scale=1.0, rwp=float(np.sqrt(chi2 / ((y / self.sigma) ** 2).sum())),
            rwp_background=float(np.sqrt(chi2 / max(above, 1e-300))), reduced_chi2=reduced,
        )  # fmt: skip
