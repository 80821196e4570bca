"""The fast simulator: GSAS-II's kinematic time-of-flight pattern as a linear operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import cell_volume, check_volume, reciprocal_metric
from bragg_data.crystallography.displacement_modes import displaced, free_coordinates
from bragg_data.crystallography.reflections import Lines, lines_from_reflections, unique_reflections
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.instrument.peak_shape import Convention
from bragg_data.simulation.deposition import deposit, deposit_varied
from bragg_data.simulation.deposition_tables import Tables, build_tables
from bragg_data.simulation.line_selection import ALIKE, SelectedLines, select
from bragg_data.simulation.peak_response import VERSION, PeakResponse
from bragg_data.simulation.reference import HISTOGRAM_SCALE, largest_indices
from bragg_data.simulation.sample_parameters import SampleParameters, parameters_per_sample
from bragg_data.simulation.width_interpolation import WidthInterpolation, WidthOperators

__all__ = ["VERSION", "Simulator"]


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
        operators are built once; left out, the samples of each call decide.
    cache
        Directory for these operators, which take seconds to build; None for none. Its files can be
        deleted at any time.

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
        self.response = PeakResponse(
            instrument, grid, size=size, microstrain=microstrain, convention=convention
        )
        self._widths = WidthInterpolation(self.response, width_range, cache)
        self._nominal = {
            "u_scale": 1.0,
            "difc": instrument.difc,
            "tzero": instrument.tzero,
            "size": size,
            "microstrain": microstrain,
            "width_scale": 1.0,
        }
        self._lines = lru_cache(maxsize=4 * len(self.phases))(self._make_lines)
        self._modes: dict[int, NDArray[np.float64]] = {}

    def simulate(
        self,
        phase: NDArray[np.integer],
        cells: NDArray[np.float64],
        *,
        shifts: NDArray[np.float64] | None = None,
        **parameters: Unpack[SampleParameters],
    ) -> NDArray[np.float32]:
        """Return the patterns of samples.

        Parameters
        ----------
        phase : shape (n,)
            Index of each sample's phase.
        cells : shape (n, 6)
            Unit cells, in ångström and degrees.
        shifts : shape (n, m), optional
            Displacements along the free coordinates (:meth:`free_coordinates`) of the phase, in Å
            of its CIF's cell: all samples are of one phase then. Each different row takes a few
            milliseconds.
        **parameters : shape (n,) each
            Displacement factor, broadening and calibration of each sample, as
            :class:`~bragg_data.simulation.sample_parameters.SampleParameters`.

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
        per_sample = parameters_per_sample(parameters, self._nominal, len(cells))
        patterns = np.empty((len(cells), self.grid.points), dtype=np.float32)
        # Displacement factors alone change no peak shape.
        varied = self._widths.operators(per_sample) if parameters.keys() - {"u_scale"} else None
        for code in np.unique(phase):
            rows = np.flatnonzero(phase == code)
            self.phases[code].lattice.check_tied(cells[rows])
            # Cells of a like shape are neighbours: they share a tight selection of lines.
            metric = self._metric(code, cells[rows])
            relative = metric / metric[:, :1]
            if shifts is None:
                order = np.argsort(relative[:, np.ptp(relative, axis=0).argmax()], kind="stable")
            else:
                order = np.lexsort(shifts[rows].T) if shifts.shape[1] else np.arange(len(rows))
            rows = rows[order]
            # Small batches keep deposits in the cache while operators pass over them.
            for batch in np.array_split(rows, -(-len(rows) // (32 if varied else 128))):
                of_batch = {name: value[batch] for name, value in per_sample.items()}
                displacements = None if shifts is None else shifts[batch]
                patterns[batch] = self._batch(
                    int(code), cells[batch], of_batch, varied, displacements
                )
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
        varied: WidthOperators | None,
        shifts: NDArray[np.float64] | None,
    ) -> NDArray[np.float32]:
        n = len(cells)
        whole, tables = self._phase_lines(code, cells, per_sample)
        patterns = np.zeros((n, self.grid.points), dtype=np.float32)
        scale = HISTOGRAM_SCALE * np.sin(np.radians(self.instrument.two_theta / 2))
        metric = self._metric(code, cells)
        scale = scale / cell_volume(cells)
        operators = (self.response.operator,) if varied is None else varied.operators
        deposits = np.zeros((len(operators), n, self.response.n_source), dtype=np.float32)
        for rows, lines, n_lines in self._lines_of_rows(
            code, whole, shifts, metric, per_sample["difc"]
        ):
            out = patterns[rows]
            calibration = (per_sample["difc"][rows], per_sample["tzero"][rows])
            common = (metric[rows], lines, n_lines, per_sample["u_scale"][rows], *calibration)
            of_grid = (self.response.target, tables)
            if varied is None:
                shapes = self.response.shapes
                deposit(deposits[0, rows], out, *common, scale[rows], *of_grid, shapes)
            else:
                widths = (per_sample[k][rows] for k in ("size", "microstrain", "width_scale"))
                shapes, broadening = self.response.log_shapes, self.response.broadening
                nodes = (varied.nodes, varied.barycentric, varied.mixing)
                operator_arguments = (*of_grid, shapes, broadening, *nodes)
                deposit_varied(
                    deposits[:, rows], out, *common, scale[rows], *widths, *operator_arguments
                )
        for operator, part in zip(operators, deposits, strict=True):
            operator.add(part, patterns)
        return patterns

    def _lines_of_rows(
        self,
        code: int,
        lines: Lines,
        shifts: NDArray[np.float64] | None,
        metric: NDArray[np.float64],
        difc: NDArray[np.float64],
    ) -> Iterator[tuple[slice, SelectedLines, int]]:
        """Yield a few rows at a time, the lines that they have in common, and their number."""
        for group, strengths in self._strengths_of_rows(code, lines, shifts, metric, difc):
            of_group = SelectedLines(lines.products, strengths)
            selected = SelectedLines(np.empty_like(lines.products), np.empty_like(strengths))
            for low in range(group.start, group.stop, ALIKE):
                rows = slice(low, min(low + ALIKE, group.stop))
                q_high = (difc[rows].max() / self.grid.start) ** 2
                yield rows, selected, select(metric[rows], q_high, of_group, selected)

    def _strengths_of_rows(
        self,
        code: int,
        lines: Lines,
        shifts: NDArray[np.float64] | None,
        metric: NDArray[np.float64],
        difc: NDArray[np.float64],
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield runs of rows with equal displacements, and the strengths of the lines there."""
        n = len(metric)
        if shifts is None:
            yield slice(0, n), lines.strengths
            return
        # A little more than is deposited.
        q_high = 1.01 * float((difc.max() / self.grid.start) ** 2)
        needed = (metric @ lines.products).min(axis=0) <= q_high
        ends = np.flatnonzero(np.any(np.diff(shifts, axis=0), axis=1)) + 1
        for low, high in pairwise([0, *ends.tolist(), n]):
            phase = displaced(self.phases[code], self.free_coordinates(code), shifts[low])
            yield slice(low, high), lines.strengths_of(phase, needed)

    def _phase_lines(
        self, code: int, cells: NDArray[np.float64], per_sample: dict[str, NDArray[np.float64]]
    ) -> tuple[Lines, Tables]:
        difc = float(per_sample["difc"].max())
        limits = largest_indices(cells, self.grid.start / difc)
        # Rounded up, so that a few lists serve all cells; the rows alone decide which one.
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
