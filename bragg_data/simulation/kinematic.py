"""The fast simulator: GSAS-II's kinematic time-of-flight pattern as a linear operator."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import cell_volume, check_volume
from bragg_data.crystallography.reflections import (
    Lines,
    displacement_groups,
    largest_indices,
    unique_lines,
)
from bragg_data.crystallography.scattering import is_resonant, resonance_range
from bragg_data.crystallography.structure import Phase, free_coordinates
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.instrument.peak_shape import Convention
from bragg_data.kernels import kernel
from bragg_data.simulation.deposition import deposit, deposit_varied
from bragg_data.simulation.deposition_tables import Tables, build_tables
from bragg_data.simulation.derivatives import (
    LineFactors,
    cell_slopes,
    damping_of,
    deposit_with_slopes,
    no_factors,
    row_kinds,
)
from bragg_data.simulation.peak_response import VERSION as VERSION
from bragg_data.simulation.peak_response import WIDTH_PARAMETERS, Widths, peak_response
from bragg_data.simulation.sample_parameters import (
    SampleParameters,
    checked_samples,
    nominal_sample,
)
from bragg_data.threads import single_threaded

HISTOGRAM_SCALE = 1e5  # GSAS-II's default histogram scale factor
_ALIKE = 16  # samples that share one selection of lines
_AT_REST = 1 << 20  # derivatives of strengths (8 MB) of undisplaced atoms

if TYPE_CHECKING:
    from torch import Tensor

_Array = NDArray[np.float64]
_Selected = tuple[NDArray[np.float32], NDArray[np.float32]]  # products and strengths of Lines


class Simulator:
    """Patterns of a campaign's phases on one instrument, thousands per second.

    The first one on an instrument takes about a second. It holds no state that results depend on:
    the same rows in one call give the same bits, whatever was simulated before. It warns if peaks
    are so narrow on the grid that patterns are good to worse than 3e-4 of a peak; an
    InstrumentError is raised if the instrument's constants give peaks no decay somewhere on it.

    Size in µm and microstrain in 1e-6 are the nominal isotropic Lorentzian broadening.
    ``width_range``, of ln(W / W nominal), is prepared for samples with widths of their own, so that
    their basis of peak shapes is built once; left out, the samples of each call decide.

    With a ``device`` of torch, such as ``cuda``, patterns are computed there, in batches that pay
    from a few thousand samples on; ``compiled`` makes that several times as fast on a GPU, after up
    to a minute of compilation, and needs a C compiler. A DeviceError is raised if there is no such
    device.
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
        device: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.phases = tuple(phase.at_angle(instrument.two_theta) for phase in phases)
        self.instrument, self.grid = instrument, grid
        self._warn_of_wavelengths()
        of_peaks = peak_response(instrument, grid, size, microstrain, convention, width_range)
        self.response, self._widths = of_peaks
        self._nominal = nominal_sample(instrument, size, microstrain) | {"width_scale": 1.0}
        self._lines = lru_cache(maxsize=8 * len(self.phases))(unique_lines)
        self._tables = lru_cache(maxsize=None)(self._make_tables)
        self._scale = HISTOGRAM_SCALE * abs(np.sin(np.radians(instrument.two_theta / 2)))
        self._on_device = None
        if device is not None:  # torch, which takes seconds to load, is for those who ask
            from bragg_data.simulation.response_on_device import ResponseOnDevice

            self._on_device = ResponseOnDevice(*of_peaks, device, compiled=compiled)

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
        if self._on_device is not None:
            on_device = self.simulate_on_device(phase, cells, shifts=shifts, **parameters)
            return self._on_device.device.to_host(on_device)
        samples = checked_samples(self.phases, phase, cells, parameters, self._nominal)
        phase, cells, per_sample = samples
        patterns = np.empty((len(cells), self.grid.points), dtype=np.float32)
        with single_threaded():
            # Displacement factors alone change no peak shape.
            varied = self._widths.widths(per_sample) if parameters.keys() - {"u_scale"} else None
            # Small batches keep deposits in the cache while operators pass over them.
            for code, rows in self._batches(phase, cells, shifts, 64 if varied else 128):
                of_batch = {name: value[rows] for name, value in per_sample.items()}
                displacements = None if shifts is None else shifts[rows]
                patterns[rows] = self._batch(code, cells[rows], of_batch, varied, displacements)
        return patterns

    def simulate_on_device(
        self,
        phase: NDArray[np.integer],
        cells: _Array,
        *,
        shifts: _Array | None = None,
        **parameters: Unpack[SampleParameters],
    ) -> "Tensor":
        """Return :meth:`simulate`'s patterns as a tensor that stays on the device, float32.

        Work on the device may still be under way when this returns. Raises a TypeError if the
        simulator was made without a device.
        """
        response = self._on_device
        if response is None:
            raise TypeError("Give Simulator() the device of torch to simulate on, such as 'cuda'.")
        samples = checked_samples(self.phases, phase, cells, parameters, self._nominal)
        phase, cells, per_sample = samples
        varied = response.widths(per_sample) if parameters.keys() - {"u_scale"} else None
        patterns = response.device.zeros(len(cells), self.grid.points)
        for code, rows in self._batches(phase, cells, shifts, response.batch(varied)):
            of_batch = {name: value[rows] for name, value in per_sample.items()}
            displacements = None if shifts is None else shifts[rows]
            of_rows = self._batch(code, cells[rows], of_batch, varied, displacements)
            patterns[response.device.send(rows)] = of_rows
        return patterns

    def _batches(
        self, phase: NDArray[np.integer], cells: _Array, shifts: _Array | None, size: int
    ) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Yield phases and up to ``size`` of their rows, of which cells or shifts are alike."""
        for code in np.unique(phase).tolist():
            rows = np.flatnonzero(phase == code)
            # Cells of a like shape are neighbours: they share a tight selection of lines.
            metric = self.phases[code].lattice.independent_metric(cells[rows])
            relative = metric / metric[:, :1]
            if shifts is None:
                order = np.argsort(relative[:, np.ptp(relative, axis=0).argmax()], kind="stable")
            else:
                order = np.lexsort(shifts[rows].T) if shifts.shape[1] else np.arange(len(rows))
            for batch in np.array_split(rows[order], -(-len(rows) // size)):
                yield code, batch

    def linearise(
        self,
        code: int,
        free: _Array,
        names: Sequence[str],
        values: _Array,
        *,
        slopes: bool = True,
        precision: type[np.floating] = np.float32,
        factors: Callable[[Lines], LineFactors] | None = None,
        known: Mapping[str, float] = MappingProxyType({}),
    ) -> NDArray[np.floating]:
        """Return the pattern of one sample of a phase, and its derivatives: (1 + n, points).

        By the free cell parameters (n_free,), in Å and degrees, and by the parameters ``names``:
        those of :class:`SampleParameters`; ``difa``; ``u_iso_1`` …, the displacement parameters of
        the phase's groups in Å²; ``shift_1`` …, displacements along all free coordinates in Å; and
        ``factor_1`` …, by which the ``factors`` on the intensities of lines change. Parameters of
        :class:`SampleParameters` that are ``known`` have no derivatives. Without
        ``slopes`` it is the pattern alone, (1, points). It agrees with :meth:`simulate` to single
        precision. Only the step of GSAS-II's erfcx, and reflections that cross an end of the
        window, have no part in the derivatives. Raises a CrystalError if the cell encloses no
        volume.
        """
        lattice = self.phases[code].lattice
        cells = lattice.cells(free[None])
        check_volume(cells)
        given = {**known, **dict(zip(names, values.tolist(), strict=True))}
        sample = {name: given.get(name, nominal) for name, nominal in self._nominal.items()}
        per_sample = {name: np.array([value]) for name, value in sample.items()}
        response, varied = self.response, {"difa", *WIDTH_PARAMETERS} & given.keys()
        nominal = precision == np.float32 and not varied
        if nominal:
            n_source, target, rates = response.n_source, response.target, response.shapes[2:]
        else:
            widths = self._widths.widths(per_sample)
            if precision == np.float64:
                widths = widths._replace(basis=widths.basis.as_double())
            n_source, rates = widths.basis.n_source, widths.rates
            target = widths.target._replace(difa=given.get("difa", widths.target.difa))
        lines, tables = self._lines_of_cells(code, cells, sample["difc"]), self._tables(code)
        metric = lattice.independent_metric(cells)[0]
        strengths, moved = lines.strengths.astype(np.float64), np.zeros((0, *lines.strengths.shape))
        shifts = np.array([value for name, value in given.items() if name.startswith("shift_")])
        if len(shifts):
            if slopes and not shifts.any() and len(shifts) * strengths.size < _AT_REST:
                strengths, moved = lines.undisplaced  # where most searches begin
            else:
                needed = metric @ lines.products <= self._needed(sample["difc"])
                directions = self.free_coordinates(code) if slopes else None
                positions = self._positions(code, shifts)
                strengths, moved = lines.strengths_of(positions, needed, directions)
        metric_slopes, volume_slopes = cell_slopes(lattice, free)
        kinds = row_kinds(len(free), names) if slopes else row_kinds(0, ())
        deposits = np.zeros((n_source, len(kinds)))
        step = np.zeros(self.grid.points, dtype=np.float32)
        of_lines = factors(lines) if factors else no_factors(strengths.shape[1])
        structure = (metric, metric_slopes, lines.products, strengths, moved, of_lines)
        of_sample = tuple(sample[name] for name in ("u_scale", *WIDTH_PARAMETERS))
        scale = self._scale / cell_volume(cells)[0]
        damping = damping_of(self.phases[code], tables, given)
        of_grid = (target, tables, damping, rates, response.broadening)
        deposit_with_slopes(deposits, step, kinds, *structure, of_sample, scale, *of_grid)
        rows = np.ascontiguousarray(deposits.T, dtype=precision)
        if nominal:
            patterns = np.zeros((len(rows), self.grid.points), dtype=np.float32)
            response.operator.add(rows, patterns)
        else:
            of_widths = self._widths.coefficients(widths, per_sample, derivatives=slopes)[0]
            coefficients = np.zeros((len(kinds), *of_widths.shape[1:]), dtype=precision)
            coefficients[0] = of_widths[0]
            for row, name in enumerate(names if slopes else (), start=1 + len(free)):
                if name in WIDTH_PARAMETERS:
                    coefficients[row] = of_widths[1 + WIDTH_PARAMETERS.index(name)]
            patterns = widths.basis.linearise(rows, coefficients)
        if slopes:
            patterns[1 : 1 + len(free)] -= np.outer(volume_slopes, patterns[0])
        patterns[0] += step
        return patterns

    def free_coordinates(self, code: int) -> _Array:
        """Return the displacement modes of a phase; see :func:`free_coordinates`."""
        return free_coordinates(self.phases[code])

    def _needed(self, difc: float) -> float:
        """Return up to which 1/d² strengths are computed: a little more than is deposited."""
        return 1.01 * (difc / self.grid.start) ** 2

    def _positions(self, code: int, shifts: _Array) -> _Array:
        """Return the fractional positions of displaced atoms, (n_atoms, 3)."""
        modes = self.free_coordinates(code)
        return np.asarray(self.phases[code].positions + np.tensordot(shifts, modes, axes=1))

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
    ) -> Any:
        """Return the patterns of samples of one phase: on the device, if there is one."""
        difc, response = per_sample["difc"], self.response
        whole, tables = self._lines_of_cells(code, cells, float(difc.max())), self._tables(code)
        scale = self._scale / cell_volume(cells)
        metric = self.phases[code].lattice.independent_metric(cells)
        runs = self._strengths_of_rows(code, whole, shifts, metric, difc)
        if self._on_device is not None:
            of_cells = metric, scale, per_sample, tables
            return self._on_device.patterns(runs, whole, *of_cells, varied)
        patterns = np.zeros((len(cells), self.grid.points), dtype=np.float32)
        n_source = response.n_source if varied is None else varied.basis.n_source
        deposits = np.zeros((len(cells), n_source), dtype=np.float32)
        for rows, lines, n_lines in self._lines_of_rows(runs, whole, metric, difc):
            calibrated = (per_sample[name][rows] for name in ("u_scale", "difc", "tzero"))
            common = (patterns[rows], metric[rows], lines, n_lines, *calibrated, scale[rows])
            if varied is None:
                deposit(deposits[rows], *common, response.target, tables, response.shapes)
            else:
                widths = (per_sample[name][rows] for name in WIDTH_PARAMETERS[2:])
                of_grid = (varied.target, tables, varied.rates, response.broadening)
                deposit_varied(deposits[rows], *common, *widths, *of_grid)
        if varied is None:
            response.operator.add(deposits, patterns)
            return patterns
        coefficients = self._widths.coefficients(varied, per_sample)
        patterns += varied.basis.convolve(deposits, coefficients[:, 0])
        return patterns

    def _strengths_of_rows(
        self, code: int, lines: Lines, shifts: _Array | None, metric: _Array, difc: _Array
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield rows and the strengths of the lines: runs of rows of equal displacements."""
        if shifts is None:
            yield slice(0, len(metric)), lines.strengths
            return
        ends = np.flatnonzero(np.any(np.diff(shifts, axis=0), axis=1)) + 1
        needed = (metric @ lines.products).min(axis=0) <= self._needed(float(difc.max()))
        for low, high in pairwise([0, *ends.tolist(), len(metric)]):
            strengths = lines.strengths_of(self._positions(code, shifts[low]), needed)[0]
            yield slice(low, high), strengths.astype(np.float32)

    def _lines_of_rows(
        self,
        runs: Iterator[tuple[slice, NDArray[np.float32]]],
        lines: Lines,
        metric: _Array,
        difc: _Array,
    ) -> Iterator[tuple[slice, _Selected, int]]:
        """Yield a few rows at a time, the lines that they have in common, and their number."""
        for run, strengths in runs:
            selected = (np.empty_like(lines.products), np.empty_like(strengths))
            for first in range(run.start, run.stop, _ALIKE):
                rows = slice(first, min(first + _ALIKE, run.stop))
                q_high = (difc[rows].max() / self.grid.start) ** 2
                count = _select(metric[rows], q_high, (lines.products, strengths), selected)
                yield rows, selected, count

    def _lines_of_cells(self, code: int, cells: _Array, difc: float) -> Lines:
        """Return all lines that cells may have in the window, with values of difC up to this."""
        # Rounded up, so that a few lists serve all cells; the rows alone decide which one.
        limits = largest_indices(cells, self.grid.start / difc)
        h, k, l = (4 * -(-limit // 4) for limit in limits)  # noqa: E741
        return self._lines(self.phases[code], (h, k, l))

    def _make_tables(self, code: int) -> Tables:
        # A little more than any calibration of samples puts into the window.
        window = np.array([self.grid.start, self.grid.stop])
        low, high = self.instrument.d_spacing_from_tof(window)
        return build_tables(
            *displacement_groups(self.phases[code]), (0.9 * float(low), 1.1 * float(high))
        )


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
