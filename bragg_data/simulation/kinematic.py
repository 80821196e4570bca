"""The fast simulator: GSAS-II's kinematic time-of-flight pattern as a linear operator."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import BSpline
from scipy.special import erfcx

from bragg_data.crystallography.cell import cell_volume, check_volume, d_spacing, reciprocal_metric
from bragg_data.crystallography.displacement_modes import displaced, free_coordinates
from bragg_data.crystallography.reflections import Lines, lines_from_reflections, unique_reflections
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument, InstrumentError, TofGrid
from bragg_data.instrument.peak_shape import (
    BLEND,
    ERFCX_SWITCH,
    FWHM_PER_SIGMA,
    Convention,
    PeakShape,
    erfcx_blended,
    gaussian_part,
    lorentzian_part,
    mixing,
    peak,
    peak_shape,
)
from bragg_data.simulation.deposition import REACH, Selected, deposit, deposit_varied
from bragg_data.simulation.deposition_tables import Broadening, Tables, Target, build_tables
from bragg_data.simulation.peak_operator import (
    PAD,
    PeakOperator,
    build_operator,
    independent,
    load_operators,
    save_operators,
)

VERSION = "1"
"""Version of the mathematics, part of a data set's identity: it grows when patterns change."""

_TOLERANCE = 3e-4  # of a single peak's maximum; sums of peaks come out several times better

# Widths between which operators are interpolated: so many, and so many more per factor e.
_NODES = (4, 4)

# Of a peak: operators that differ by less from a mixture of others are left out.
_INDEPENDENT = 2e-4

HISTOGRAM_SCALE = 1e5
"""GSAS-II's default histogram scale factor."""


def exact_pattern(
    phase: Phase,
    cell: ArrayLike,
    instrument: Instrument,
    tof: NDArray[np.float64],
    *,
    size: float,
    microstrain: float,
    u_scale: float = 1.0,
    convention: Convention = "gsas2",
) -> NDArray[np.float64]:
    r"""Return one pattern, evaluated peak by peak in double precision: slow, and the yardstick.

    .. math:: y(T) = \sum_h A_h P(T - T_h), \quad
              A_h = S\, m_h |F_h|^2 \sin\theta\, d_h^4 / V

    Parameters
    ----------
    phase, cell : cell of shape (6,)
        Structure, and the cell in ångström and degrees.
    instrument, tof : tof of shape (points,)
        Calibration and peak shape, and the ascending times of flight in µs. A reflection counts
        only between the first and the last.
    size, microstrain
        Isotropic Lorentzian broadening in µm and 1e-6.
    u_scale
        Factor on all displacement parameters.
    convention
        See :data:`bragg_data.instrument.peak_shape.Convention`.

    Returns
    -------
    shape (points,)
        Intensity per µs.
    """
    cells = np.asarray(cell, dtype=np.float64)[None]
    check_volume(cells)
    reflections = unique_reflections(phase, _limits(cells, tof[0] / instrument.difc))
    d = d_spacing(reflections.hkl, cells)[0]
    position = instrument.tof_from_d_spacing(d)
    inside = (position > tof[0]) & (position < tof[-1]) & (d >= tof[0] / instrument.difc)
    amplitude = (
        HISTOGRAM_SCALE
        * reflections.multiplicity
        * reflections.f_squared(d, u_scale)
        * np.sin(np.radians(instrument.two_theta / 2))
        * d**4
        / cell_volume(cells)[0]
    )
    shape = peak_shape(instrument, d, size=size, microstrain=microstrain)
    pattern = np.zeros(len(tof))
    for rows in np.array_split(np.flatnonzero(inside), inside.sum() // 256 + 1):
        of_rows = PeakShape(*(np.asarray(value)[rows, None] for value in shape))
        pattern += amplitude[rows] @ peak(tof - position[rows, None], of_rows, convention)
    return pattern


def _limits(cells: NDArray[np.float64], d_min: float) -> tuple[int, int, int]:
    """Largest Miller indices with d ≥ d_min: |h| ≤ a/d_min, since h = g·a and |g| = 1/d."""
    h, k, l = np.floor(cells[:, :3].max(axis=0) / d_min + 1e-9).astype(int)  # noqa: E741
    return int(h), int(k), int(l)


class _Varied(NamedTuple):
    """Operators of the Gaussian, then the Lorentzian part, at nodes of ln(W / W nominal).

    They are alike: ``mixing`` (2 * n_nodes, n) tells how each is made of fewer ``operators``.
    """

    nodes: NDArray[np.float64]
    barycentric: NDArray[np.float64]
    mixing: NDArray[np.float64]
    operators: tuple[PeakOperator, ...]


class Simulator:
    """Patterns of a campaign's phases on one instrument, thousands per second.

    Building it takes about a second. It holds no state that results depend on: the same rows in
    one call give the same bits, whatever was simulated before.

    Parameters
    ----------
    phases
        The structures, by their code.
    instrument, grid
        Calibration and peak shape; the pattern's points.
    size, microstrain
        Nominal isotropic Lorentzian broadening in µm and 1e-6.
    convention
        See :data:`bragg_data.instrument.peak_shape.Convention`.
    width_range
        Range of ln(W / W nominal) that is prepared for samples with widths of their own, so that
        nothing is built anew for each question; left out, the samples of each call decide.
    cache
        Directory where what such samples need is kept, which takes seconds to build; None for none.
        What is there can be deleted at any time.

    Raises
    ------
    InstrumentError
        If the instrument's constants give peaks no decay somewhere on the grid.

    Warns
    -----
    UserWarning
        If peaks are so narrow on this grid that patterns are good to worse than 3e-4 of a peak.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        instrument: Instrument,
        grid: TofGrid,
        *,
        size: float,
        microstrain: float,
        convention: Convention = "gsas2",
        width_range: tuple[float, float] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.phases = tuple(phases)
        self.instrument = instrument
        self.grid = grid
        self.size = size
        self.microstrain = microstrain
        self.convention = convention
        self.width_range = width_range
        self._cache = cache
        self._erfcx = erfcx_blended if convention == "gsas2" else erfcx
        self._lines = lru_cache(maxsize=4 * len(self.phases))(self._make_lines)
        self._varied = lru_cache(maxsize=2)(self._make_varied)
        self._modes: dict[int, NDArray[np.float64]] = {}
        self._tof = grid.tof
        self._oversampling, self._band = self._resolution()

    def simulate(
        self,
        phase: NDArray[np.integer],
        cells: NDArray[np.float64],
        *,
        u_scale: ArrayLike | None = None,
        size: ArrayLike | None = None,
        microstrain: ArrayLike | None = None,
        tzero: ArrayLike | None = None,
        difc: ArrayLike | None = None,
        width_scale: ArrayLike | None = None,
        shifts: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float32]:
        """Return the patterns of samples.

        Parameters
        ----------
        phase : shape (n,)
            Index of each sample's phase.
        cells : shape (n, 6)
            Unit cells, in ångström and degrees.
        u_scale : shape (n,), optional
            Factor on the displacement parameters of the phase.
        size, microstrain : shape (n,), optional
            Broadening of each sample in µm and 1e-6; the nominal one if left out.
        tzero, difc : shape (n,), optional
            Calibration of each sample's measurement, in µs and µs/Å; the instrument's if left out.
        width_scale : shape (n,), optional
            Factor on the widths of all peaks.
        shifts : shape (n, m), optional
            Displacements along the free coordinates (:meth:`free_coordinates`) of the phase, in Å
            of its CIF's cell: all samples are of one phase then. Each different row takes a few
            milliseconds.

        Returns
        -------
        shape (n, points), float32
            Intensity per µs.

        Raises
        ------
        CrystalError
            If a cell encloses no volume, or is not of its phase's lattice.
        """
        phase = np.asarray(phase)
        cells = np.asarray(cells, dtype=np.float64)
        check_volume(cells)
        own_widths = any(v is not None for v in (size, microstrain, tzero, difc, width_scale))
        given_and_nominal = {
            "u_scale": (u_scale, 1.0),
            "difc": (difc, self.instrument.difc),
            "tzero": (tzero, self.instrument.tzero),
            "size": (size, self.size),
            "microstrain": (microstrain, self.microstrain),
            "width_scale": (width_scale, 1.0),
        }
        per_sample = {
            name: np.full(len(cells), nominal if given is None else given, dtype=np.float64)
            for name, (given, nominal) in given_and_nominal.items()
        }
        patterns = np.empty((len(cells), self.grid.points), dtype=np.float32)
        varied = self._varied(*self._width_range(per_sample)) if own_widths else None
        for code in np.unique(phase):
            rows = np.flatnonzero(phase == code)
            # Cells of a like shape side by side: they share a tight selection of lines.
            self.phases[code].lattice.check_tied(cells[rows])
            metric = self._metric(code, cells[rows])
            relative = metric / metric[:, :1]
            if shifts is None:
                order = np.argsort(relative[:, np.ptp(relative, axis=0).argmax()], kind="stable")
            else:
                order = np.lexsort(shifts[rows].T) if shifts.shape[1] else np.arange(len(rows))
            rows = rows[order]
            # Small batches keep deposits in the cache while operators pass over them.
            for batch in np.array_split(rows, -(-len(rows) // (32 if varied else 128))):
                some = {name: value[batch] for name, value in per_sample.items()}
                moved = None if shifts is None else shifts[batch]
                patterns[batch] = self._batch(int(code), cells[batch], some, varied, moved)
        return patterns

    def free_coordinates(self, code: int) -> NDArray[np.float64]:
        """Return the displacement modes of a phase; see :func:`free_coordinates`."""
        if code not in self._modes:
            self._modes[code] = free_coordinates(self.phases[code])
        return self._modes[code]

    def _batch(
        self,
        code: int,
        cells: NDArray[np.float64],
        per_sample: dict[str, NDArray[np.float64]],
        varied: _Varied | None,
        shifts: NDArray[np.float64] | None,
    ) -> NDArray[np.float32]:
        n = len(cells)
        whole, tables = self._phase_lines(code, cells, per_sample)
        patterns = np.zeros((n, self.grid.points), dtype=np.float32)
        scale = HISTOGRAM_SCALE * np.sin(np.radians(self.instrument.two_theta / 2))
        metric = self._metric(code, cells)
        scale = scale / cell_volume(cells)
        operators = (self._operator,) if varied is None else varied.operators
        deposits = np.zeros((len(operators), n, self._n_source), dtype=np.float32)
        # A little more than the deposit takes.
        q_high = 1.01 * float((per_sample["difc"].max() / self.grid.start) ** 2)
        for rows, lines in self._lines_of_rows(code, whole, shifts, metric, q_high):
            common = (
                metric[rows], lines, per_sample["u_scale"][rows], per_sample["difc"][rows],
                per_sample["tzero"][rows], scale[rows],
            )  # fmt: skip
            if varied is None:
                deposit(
                    deposits[0, rows], patterns[rows], *common, self._target, tables, self._shapes
                )
            else:
                widths = (per_sample[k][rows] for k in ("size", "microstrain", "width_scale"))
                deposit_varied(
                    deposits[:, rows], patterns[rows], *common, *widths, self._target, tables,
                    self._log_shapes, self._broadening, varied.nodes, varied.barycentric,
                    varied.mixing,
                )  # fmt: skip
        for operator, part in zip(operators, deposits, strict=True):
            operator.add(part, patterns)
        return patterns

    def _lines_of_rows(
        self,
        code: int,
        lines: Lines,
        shifts: NDArray[np.float64] | None,
        metric: NDArray[np.float64],
        q_high: float,
    ) -> Iterator[tuple[slice, Selected]]:
        """Yield the lines of rows that have them in common, up to this 1/d² if they are moved."""
        n = len(metric)
        if shifts is None:
            yield slice(0, n), Selected(lines.products, lines.strengths)
            return
        wanted = (metric @ lines.products).min(axis=0) <= q_high
        ends = np.flatnonzero(np.any(np.diff(shifts, axis=0), axis=1)) + 1
        for low, high in pairwise([0, *ends.tolist(), n]):
            moved = displaced(self.phases[code], self.free_coordinates(code), shifts[low])
            yield slice(low, high), Selected(lines.products, lines.strengths_of(moved, wanted))

    def _phase_lines(
        self, code: int, cells: NDArray[np.float64], per_sample: dict[str, NDArray[np.float64]]
    ) -> tuple[Lines, Tables]:
        difc = float(per_sample["difc"].max())
        limits = _limits(cells, self.grid.start / difc)
        # Rounded up, so that a few lists serve all cells; which one, the rows alone decide.
        h, k, l = (4 * -(-limit // 4) for limit in limits)  # noqa: E741
        x_max = (difc / self.grid.start) ** 2 * float(per_sample["u_scale"].max())
        return self._lines(code, (h, k, l), 2.0 ** np.ceil(np.log2(max(x_max, 1.0))))

    def _make_lines(
        self, code: int, limits: tuple[int, int, int], x_max: float
    ) -> tuple[Lines, Tables]:
        phase = self.phases[code]
        lines = lines_from_reflections(phase, unique_reflections(phase, limits))
        tables = build_tables(lines.u_groups, x_max, self.grid.start, self.grid.stop)
        return lines, tables

    def _metric(self, code: int, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Independent terms of the reciprocal metric, shape (n, n_terms)."""
        first = [group[0] for group in self.phases[code].lattice.metric_terms]
        return np.ascontiguousarray(reciprocal_metric(cells)[:, first])

    # -- the peak shape over the window ---------------------------------------------------------

    def _d_at(self, position: NDArray[np.float64]) -> NDArray[np.float64]:
        tof = self.grid.start * np.exp(self.grid.relative_step * position)
        return self.instrument.d_spacing_from_tof(tof)

    def _shape_at(self, position: NDArray[np.float64]) -> PeakShape:
        # Beyond the window no peak ever stands: there the shape only has to be smooth.
        d = self._d_at(np.clip(position, 0, self.grid.points - 1))
        return peak_shape(self.instrument, d, size=self.size, microstrain=self.microstrain)

    def _kernel(self, part: str, width_factor: float = 1.0) -> Callable[..., NDArray[np.float64]]:
        """Return the exact profile as :data:`~bragg_data.simulation.peak_operator.Kernel`."""

        def kernel(position: NDArray[np.float64], points: slice) -> NDArray[np.float64]:
            tof = self.grid.start * np.exp(self.grid.relative_step * position)
            offset = self._tof[points] - tof[:, None]
            shape = self._shape_at(position)
            width, eta = (
                v[:, None] * f
                for v, f in zip(
                    mixing(shape.variance, shape.fwhm), (width_factor, 1.0), strict=True
                )
            )
            rise, decay = shape.rise[:, None], shape.decay[:, None]
            value = np.zeros(offset.shape)
            if part != "lorentzian":
                share = 1 - eta if part == "both" else 1.0
                value += share * gaussian_part(offset, rise, decay, width, self._erfcx)
            if part != "gaussian":
                share = eta if part == "both" else 1.0
                value += share * lorentzian_part(offset, rise, decay, width, self.convention)
            return value

        return kernel

    def _resolution(self) -> tuple[int, int]:
        """Choose how fine the source grid is and how wide the near field.

        Raises
        ------
        InstrumentError
            If the instrument's constants give no peak shape somewhere in the window.
        """
        position = np.linspace(0, self.grid.points - 1, 257)
        shape = self._shape_at(position)
        bad = ~((shape.rise > 0) & (shape.decay > 0))
        if bad.any():
            tof = self.grid.start * np.exp(self.grid.relative_step * position[bad])
            raise InstrumentError(
                f"Bank {self.instrument.bank} gives peaks no decay between {tof.min():.0f} and "
                f"{tof.max():.0f} µs (d = {self._d_at(position[bad]).min():.3f} to "
                f"{self._d_at(position[bad]).max():.3f} Å): beta-0 + beta-1/d⁴ + beta-q/d² is not "
                f"positive there. Choose a grid without this range."
            )
        step = (
            self.grid.start * np.exp(self.grid.relative_step * position) * self.grid.relative_step
        )
        width = mixing(shape.variance, shape.fwhm)[0] / step
        tail = 1 / np.minimum(shape.rise, shape.decay) / step
        # A quintic spline with 1.9 nodes per σ is good to about 1e-5 of the peak.
        oversampling = int(np.clip(np.ceil(1.9 * FWHM_PER_SIGMA / width.min()), 1, 8))
        band = int(np.ceil(max(16 * np.max(width), 10 * min(np.max(tail), 50.0), 48.0)))
        return oversampling, min(band, self.grid.points)

    @property
    def _n_source(self) -> int:
        return (self.grid.points - 1) * self._oversampling + 1 + 2 * PAD

    @cached_property
    def _shapes(self) -> NDArray[np.float64]:
        shape = self._shape_at((np.arange(self._n_source) - PAD) / self._oversampling)
        return np.stack([*mixing(shape.variance, shape.fwhm), shape.rise, shape.decay])

    @cached_property
    def _log_shapes(self) -> NDArray[np.float64]:
        return np.concatenate([np.log(self._shapes[:1]), self._shapes[1:]])

    @cached_property
    def _broadening(self) -> Broadening:
        i = self.instrument
        return Broadening(i.sig_0, i.sig_1, i.sig_2, i.sig_q, i.x, i.y, i.z)

    @cached_property
    def _target(self) -> Target:
        low = high = 0.0
        if self.convention == "gsas2":
            width, _, rise, decay = self._shapes
            sigma = width / FWHM_PER_SIGMA
            d = self._d_at((np.arange(self._n_source) - PAD) / self._oversampling)
            falls = np.zeros(len(d), dtype=bool)
            for rate in (rise, decay):
                middle = np.abs(ERFCX_SWITCH * np.sqrt(2) - rate * sigma)
                falls |= middle - BLEND * np.sqrt(2) < REACH
            if falls.any():
                low, high = 0.99 * d[falls].min(), 1.01 * d[falls].max()
        return Target(
            tof_low=self.grid.start,
            tof_high=self.grid.stop,
            grid_step=self.grid.relative_step,
            source_step=self.grid.relative_step / self._oversampling,
            pad=PAD,
            difa=self.instrument.difa,
            difb=self.instrument.difb,
            d_step_low=low,
            d_step_high=high,
        )

    @cached_property
    def _operator(self) -> PeakOperator:
        operator = self._build("both")
        error = self.interpolation_error(operator)
        if error > _TOLERANCE:
            warnings.warn(
                f"Peaks of this instrument are narrow on this grid: patterns of the fast simulator "
                f"are within {error:.1e} of a peak's maximum, not {_TOLERANCE:g}. "
                f"A finer grid helps.",
                stacklevel=4,
            )
        return operator

    def _build(self, part: str, width_factor: float = 1.0) -> PeakOperator:
        kernel = self._kernel(part, width_factor)
        return build_operator(kernel, self.grid.points, self._oversampling, self._band)

    def interpolation_error(self, operator: PeakOperator | None = None) -> float:
        """Largest error of the operator for single peaks, relative to each peak's maximum."""
        operator = operator or self._operator
        position = np.random.default_rng(0).uniform(0, self.grid.points - 1, 40)
        deposits = np.zeros((len(position), self._n_source), dtype=np.float32)
        node = position * self._oversampling + PAD
        for row, (x, j) in enumerate(zip(*np.modf(node), strict=True)):
            weights = [_QUINTIC(x + 5 - k) for k in range(6)]
            deposits[row, int(j) - 2 : int(j) + 4] = weights
        patterns = np.zeros((len(position), self.grid.points), dtype=np.float32)
        operator.add(deposits, patterns)
        exact = self._kernel("both")(position, slice(0, self.grid.points))
        return float((np.abs(patterns - exact).max(axis=1) / exact.max(axis=1)).max())

    # -- widths that differ from sample to sample -----------------------------------------------

    def _width_range(self, per_sample: dict[str, NDArray[np.float64]]) -> tuple[float, float]:
        """Range of ln(W / W nominal) over samples and the window, rounded outwards."""
        d, nominal = self._stations
        low, high = np.inf, -np.inf
        for relative in (per_sample["difc"].min(), per_sample["difc"].max()):
            instrument = self.instrument.with_parameters(difc=float(relative))
            shape = peak_shape(
                instrument,
                d,
                size=per_sample["size"][:, None],
                microstrain=per_sample["microstrain"][:, None],
            )
            variance = np.broadcast_to(shape.variance, shape.fwhm.shape)
            width, _ = mixing(variance, shape.fwhm)
            ratio = np.log(width * per_sample["width_scale"][:, None] / nominal)
            low, high = min(low, ratio.min()), max(high, ratio.max())
        parts = 10
        if self.width_range:
            if self.width_range[0] <= low and high <= self.width_range[1]:
                return self.width_range
            parts = 2  # coarser, so that what is built for these samples serves the next ones
        low, high = np.floor((low - 0.01) * parts), np.ceil((high + 0.01) * parts)
        return float(low / parts), float(high / parts)

    @cached_property
    def _stations(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return d-spacings all over the window and the nominal widths there, in µs."""
        position = np.linspace(0, self.grid.points - 1, 65)
        return self._d_at(position), mixing(*self._shape_at(position)[2:])[0]

    def _make_varied(self, low: float, high: float) -> _Varied:
        count = _NODES[0] + int(np.ceil(_NODES[1] * (high - low)))
        angle = (2 * np.arange(count) + 1) * np.pi / (2 * count)
        nodes = 0.5 * (low + high) + 0.5 * (high - low) * np.cos(angle)
        barycentric = np.where(np.arange(count) % 2, -1.0, 1.0) * np.sin(angle)
        kept = None if self._cache is None else self._cache / f"{self._key(low, high)}.npz"
        known = None if kept is None else load_operators(kept)
        if known is not None:
            return _Varied(nodes, barycentric, *known)
        kinds = [(part, float(np.exp(node))) for part in ("gaussian", "lorentzian")
                 for node in nodes]  # fmt: skip
        with ThreadPoolExecutor() as pool:
            operators = list(pool.map(lambda kind: self._build(*kind), kinds))
        found = independent(operators, _INDEPENDENT)
        if kept is not None:
            with suppress(OSError):  # it is built again the next time
                kept.parent.mkdir(parents=True, exist_ok=True)
                save_operators(kept, *found)
        return _Varied(nodes, barycentric, *found)

    def _key(self, low: float, high: float) -> str:
        """Return a name for the operators of a range of widths, and all that they depend on."""
        told = (
            VERSION, self.instrument, self.grid, self.size, self.microstrain, self.convention, low,
            high, _NODES, _INDEPENDENT,
        )  # fmt: skip
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


_QUINTIC = BSpline.basis_element(np.arange(7.0))
"""The quintic B-spline on [0, 6]."""
