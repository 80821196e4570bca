"""The fast simulator: GSAS-II's kinematic time-of-flight pattern as a linear operator."""

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import cell_volume
from bragg_data.crystallography.reflections import Lines, largest_indices, unique_lines
from bragg_data.crystallography.scattering import is_resonant, resonance_range
from bragg_data.crystallography.structure import Phase, displaced, free_coordinates
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.instrument.peak_shape import Convention
from bragg_data.kernels import kernel
from bragg_data.simulation.deposition import coefficients, deposit, deposit_varied
from bragg_data.simulation.deposition_tables import Tables, build_tables
from bragg_data.simulation.peak_response import VERSION as VERSION
from bragg_data.simulation.peak_response import PeakResponse, WidthInterpolation, Widths
from bragg_data.simulation.sample_parameters import (
    SampleParameters,
    checked_samples,
    nominal_sample,
)

HISTOGRAM_SCALE = 1e5  # GSAS-II's default histogram scale factor
_ALIKE = 16  # samples that share one selection of lines

_Array = NDArray[np.float64]
_Selected = tuple[NDArray[np.float32], NDArray[np.float32]]  # products and strengths of Lines


class Simulator:
    """Patterns of a campaign's phases on one instrument, thousands per second.

    Building it takes about a second. It holds no state that results depend on: the same rows in
    one call give the same bits, whatever was simulated before. It warns if peaks are so narrow on
    the grid that patterns are good to worse than 3e-4 of a peak; an InstrumentError is raised if
    the instrument's constants give peaks no decay somewhere on it.

    Size in µm and microstrain in 1e-6 are the nominal isotropic Lorentzian broadening.
    ``width_range``, of ln(W / W nominal), is prepared for samples with widths of their own, so that
    their basis of peak shapes is built once; left out, the samples of each call decide.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        instrument: Instrument,
        grid: TofGrid,
        size: float,
        microstrain: float,
        *,
        convention: Convention = "gsas2",
        width_range: tuple[float, float] | None = None,
    ) -> None:
        self.phases = tuple(phase.at_angle(instrument.two_theta) for phase in phases)
        self.instrument, self.grid = instrument, grid
        self._warn_of_wavelengths()
        self.response = PeakResponse(instrument, grid, size, microstrain, convention)
        self._widths = WidthInterpolation(self.response, width_range)
        self._nominal = nominal_sample(instrument, size, microstrain) | {"width_scale": 1.0}
        self._lines = lru_cache(maxsize=4 * len(self.phases))(self._make_lines)

    def simulate(
        self,
        phase: NDArray[np.integer],
        cells: _Array,
        *,
        shifts: _Array | None = None,
        **parameters: Unpack[SampleParameters],
    ) -> NDArray[np.float32]:
        """Return the patterns of samples: intensity per µs, shape (n, points).

        Of phase codes (n,), cells (n, 6) in ångström and degrees, and parameters of each sample,
        (n,). ``shifts``, (n, m), are displacements along the free coordinates
        (:meth:`free_coordinates`) of the phase, in Å of its CIF's cell: all samples are of one
        phase then. Each different row takes a few milliseconds. Raises a CrystalError if a cell
        encloses no volume, or is not of its phase's lattice.
        """
        samples = checked_samples(self.phases, phase, cells, parameters, self._nominal)
        phase, cells, per_sample = samples
        patterns = np.empty((len(cells), self.grid.points), dtype=np.float32)
        # Displacement factors alone change no peak shape.
        varied = self._widths.widths(per_sample) if parameters.keys() - {"u_scale"} else None
        for code in np.unique(phase).tolist():
            rows = np.flatnonzero(phase == code)
            # Cells of a like shape are neighbours: they share a tight selection of lines.
            metric = self.phases[code].lattice.independent_metric(cells[rows])
            relative = metric / metric[:, :1]
            if shifts is None:
                order = np.argsort(relative[:, np.ptp(relative, axis=0).argmax()], kind="stable")
            else:
                order = np.lexsort(shifts[rows].T) if shifts.shape[1] else np.arange(len(rows))
            rows = rows[order]
            # Small batches keep deposits in the cache while operators pass over them.
            for batch in np.array_split(rows, -(-len(rows) // (64 if varied else 128))):
                of_batch = {name: value[batch] for name, value in per_sample.items()}
                displacements = None if shifts is None else shifts[batch]
                patterns[batch] = self._batch(code, cells[batch], of_batch, varied, displacements)
        return patterns

    def free_coordinates(self, code: int) -> _Array:
        """Return the displacement modes of a phase; see :func:`free_coordinates`."""
        return free_coordinates(self.phases[code])

    def _warn_of_wavelengths(self) -> None:
        """Warn of wavelengths beyond the tables of resonant elements."""
        resonant = {s for p in self.phases if p.two_theta is not None for s in set(p.symbols)}
        for symbol in sorted(filter(is_resonant, resonant)):
            low, high = resonance_range(symbol)
            d = self.instrument.d_spacing_from_tof(np.array([self.grid.start, self.grid.stop]))
            used = 2 * abs(np.sin(np.radians(self.instrument.two_theta / 2))) * d
            if used[0] < low or used[1] > high:
                warnings.warn(
                    f"Scattering lengths of {symbol} are tabulated from {low:.2f} to {high:.2f} Å; "
                    f"the window has {used[0]:.2f} to {used[1]:.2f} Å: the last values are used "
                    f"beyond.",
                    stacklevel=3,
                )

    def _batch(
        self,
        code: int,
        cells: _Array,
        per_sample: dict[str, _Array],
        varied: Widths | None,
        shifts: _Array | None,
    ) -> NDArray[np.float32]:
        difc, response = per_sample["difc"], self.response
        # Rounded up, so that a few lists serve all cells; the rows alone decide which one.
        limits = largest_indices(cells, self.grid.start / float(difc.max()))
        h, k, l = (4 * -(-limit // 4) for limit in limits)  # noqa: E741
        x_max = (float(difc.max()) / self.grid.start) ** 2 * float(per_sample["u_scale"].max())
        whole, tables = self._lines(code, (h, k, l), 2.0 ** np.ceil(np.log2(max(x_max, 1.0))))
        patterns = np.zeros((len(cells), self.grid.points), dtype=np.float32)
        scale = HISTOGRAM_SCALE * abs(np.sin(np.radians(self.instrument.two_theta / 2)))
        scale = scale / cell_volume(cells)
        metric = self.phases[code].lattice.independent_metric(cells)
        n_source = response.n_source if varied is None else varied.basis.n_source
        deposits = np.zeros((len(cells), n_source), dtype=np.float32)
        names = ("difc", "tzero", "size", "microstrain", "width_scale")
        for rows, lines, n_lines in self._lines_of_rows(code, whole, shifts, metric, difc):
            calibrated = (per_sample[name][rows] for name in ("u_scale", "difc", "tzero"))
            common = (patterns[rows], metric[rows], lines, n_lines, *calibrated, scale[rows])
            if varied is None:
                deposit(deposits[rows], *common, response.target, tables, response.shapes)
            else:
                widths = (per_sample[name][rows] for name in names[2:])
                of_grid = (varied.target, tables, varied.rates, response.broadening)
                deposit_varied(deposits[rows], *common, *widths, *of_grid)
        if varied is None:
            response.operator.add(deposits, patterns)
            return patterns
        members = varied.basis.members
        shares = np.empty((len(cells), *members.shape[1:]), dtype=np.float32)
        of_widths = (varied.target, varied.stations, response.broadening)
        interpolation = (varied.nodes, varied.barycentric, members)
        coefficients(shares, *(per_sample[name] for name in names), *of_widths, *interpolation)
        patterns += varied.basis.convolve(deposits, shares)
        return patterns

    def _lines_of_rows(
        self, code: int, lines: Lines, shifts: _Array | None, metric: _Array, difc: _Array
    ) -> Iterator[tuple[slice, _Selected, int]]:
        """Yield a few rows at a time, the lines that they have in common, and their number.

        With displacements, of runs of rows in which they are equal.
        """
        ends, strengths = [0, len(metric)], lines.strengths
        if shifts is not None:
            ends[1:1] = (np.flatnonzero(np.any(np.diff(shifts, axis=0), axis=1)) + 1).tolist()
            # A little more than is deposited.
            q_high = 1.01 * float((difc.max() / self.grid.start) ** 2)
            needed = (metric @ lines.products).min(axis=0) <= q_high
        for low, high in pairwise(ends):
            if shifts is not None:
                phase = displaced(self.phases[code], self.free_coordinates(code), shifts[low])
                strengths = lines.strengths_of(phase, needed)
            selected = (np.empty_like(lines.products), np.empty_like(strengths))
            for first in range(low, high, _ALIKE):
                rows = slice(first, min(first + _ALIKE, high))
                q_high = (difc[rows].max() / self.grid.start) ** 2
                count = _select(metric[rows], q_high, (lines.products, strengths), selected)
                yield rows, selected, count

    def _make_lines(
        self, code: int, limits: tuple[int, int, int], x_max: float
    ) -> tuple[Lines, Tables]:
        phase = self.phases[code]
        lines = unique_lines(phase, limits)
        tof = self.grid.start, self.grid.stop
        if not lines.reflections.resonances:
            return lines, build_tables(lines.u_groups, x_max, tof)
        # A little more than any calibration of samples puts into the window.
        low, high = self.instrument.d_spacing_from_tof(np.array(tof))
        d = 0.9 * float(low), 1.1 * float(high)
        return lines, build_tables(lines.u_groups, x_max, tof, lines.reflections.resonances, d)


@kernel()
def _select(metrics, q_high, lines, room):  # type: ignore[no-untyped-def] # pragma: no cover
    """Copy the lines with 1/d² ≤ q_high (Å⁻²) for some metric within the range of these ones.

    The bound takes the smallest and largest value of each term of the metrics, (n, n_terms) in Å⁻²,
    after a common scale is divided out, so it is sharp where the cells differ little but in size.
    Products and strengths of lines are copied to arrays like them; returns how many.
    """
    products, strengths = lines
    n_terms, n_lines = products.shape
    low = np.full(n_terms, np.inf)
    high = np.full(n_terms, -np.inf)
    smallest = np.inf
    for i in range(len(metrics)):
        size = metrics[i, 0]  # of a diagonal element, so it is positive
        smallest = min(smallest, size)
        for t in range(n_terms):
            low[t] = min(low[t], metrics[i, t] / size)
            high[t] = max(high[t], metrics[i, t] / size)
    limit = np.float32(q_high / smallest * (1.0 + 1e-5))
    bound = np.zeros(n_lines, np.float32)
    for t in range(n_terms):
        low32 = np.float32(low[t])
        high32 = np.float32(high[t])
        for r in range(n_lines):
            p = products[t, r]
            bound[r] += min(low32 * p, high32 * p)
    count = 0
    for r in range(n_lines):
        if bound[r] <= limit:
            for t in range(n_terms):
                room[0][t, count] = products[t, r]
            for pair in range(len(strengths)):
                room[1][pair, count] = strengths[pair, r]
            count += 1
    return count
