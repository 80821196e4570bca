"""The part of an instrument's range that a campaign simulates, and its grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bragg_data.arrays import Array
from bragg_data.campaign_design.cells import PhaseRanges
from bragg_data.campaign_design.options import DesignError
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.reflections import largest_indices, unique_lines
from bragg_data.crystallography.scattering import ResonanceError
from bragg_data.instrument.band import SHORTEST, Band
from bragg_data.instrument.diffractometer import TofGrid
from bragg_data.instrument.peak_shape import peak_shape

_LINES = 120  # of the phase with the fewest: networks compare up to 80
_FEWEST = 60  # of it, where peaks overlap so much that more would show nothing
_MOST = 2000  # of any phase: more take long to simulate, and overlap
_SPAN = 3.0  # longest over shortest d at least, where no other limit is in the way …
_LEAST_SPAN = 1.3  # … but the band's
_OVERLAP = 0.4  # distance of neighbouring lines over FWHM below which they show nothing
_SIGNIFICANT = 0.005  # height of a line, over the highest, that the window has to contain
_PER_FWHM = 5.0  # points of the grid; NOMAD's bank 4 has 5.8 in the paper's campaign
_PER_FWHM_OF_MANY, _MANY = 4.0, 6000  # where that were more points than this
_MOST_POINTS = 12_000
_FEWEST_POINTS, _LEAST_POINTS = 256, 64  # by the choice of the step, and of a campaign file
_FINEST, _COARSEST = 10.0, 1.8  # points per FWHM of a measured file whose points are all taken
_REGULAR = 0.02  # relative scatter of the steps of a logarithmic binning


@dataclass(frozen=True, eq=False)
class LineTable:
    """Lines of a phase in the cell of its CIF, from long to short d, and in its largest cell."""

    d: Array  # (n,) Å
    longest: Array  # (n,) Å in any cell of the ranges
    strength: Array  # (n,) multiplicity times |F|²

    def within(self, shortest: float, longest: float) -> Array:
        """Return the d-spacings in Å of the lines between two."""
        return self.d[(self.d >= shortest) & (self.d <= longest)]


def lines_of(phase: PhaseRanges, two_theta: float) -> LineTable:
    """Return the lines of a phase down to 0.3 Å, or 2000 of them."""
    structure, cells = phase.phase.at_angle(two_theta), phase.cells
    table = LineTable(*np.zeros((3, 0)))
    shortest = float(cells[:, :3].max())
    while shortest > SHORTEST and len(table.d) < _MOST:
        shortest = max(0.8 * shortest, SHORTEST)
        try:
            lines = unique_lines(structure, largest_indices(cells, shortest))
        except ResonanceError:
            raise
        except CrystalError:  # none yet, or more than memory takes
            if len(table.d):
                break
            continue
        metric = structure.lattice.independent_metric(cells)
        d = (metric @ np.asarray(lines.products, dtype=np.float64)) ** -0.5
        of_reflections = d[0][lines.member]
        f_squared = lines.reflections.f_squared(of_reflections)
        weights = lines.reflections.multiplicity * f_squared
        strength = np.bincount(lines.member, weights=weights).astype(np.float64)
        seen = (d[0] >= shortest) & (strength > 1e-6 * strength.max())
        order = np.flatnonzero(seen)[np.argsort(-d[0][seen])]
        table = LineTable(d[0][order], d[:, order].max(axis=0), strength[order])
    return table


@dataclass(frozen=True, eq=False)
class Window:
    """The d-spacings in Å that a campaign simulates on a bank."""

    band: Band
    shortest: float
    longest: float
    complete: bool  # whether the line of longest d is inside
    lines: tuple[int, ...]  # of each phase

    @property
    def tof(self) -> tuple[float, float]:
        """The ends in µs."""
        ends = self.band.instrument.tof_from_d_spacing(np.array([self.shortest, self.longest]))
        return float(ends[0]), float(ends[1])

    @property
    def is_doubtful(self) -> bool:
        """Whether the bank's angle, or a Lorentzian width in the window, cannot be right."""
        i, d = self.band.instrument, np.geomspace(self.shortest, self.longest, 40)
        shape = peak_shape(i, d, size=math.inf, microstrain=0.0)
        return bool(i.geometry_doubt) or bool(shape.fwhm.min() < 0)

    @cached_property
    def widths(self) -> Array:
        """FWHM over T, without broadening by the sample, over the window."""
        return self.band.relative_width(np.geomspace(self.shortest, self.longest, 40))


def window_of(band: Band, tables: Sequence[LineTable]) -> Window | None:
    """Return the window that the lines of all phases need, within a band; None without lines.

    It ends behind the significant line of longest d, in the largest cell, and begins where the
    phase with the fewest lines has 120 of them, or the lines are no longer resolved.
    """
    heights = [_heights(band, table) for table in tables]
    if not all(h.any() for h in heights):
        return None
    ends = [
        t.longest[h > _SIGNIFICANT * h.max()].max() for t, h in zip(tables, heights, strict=True)
    ]
    width = float(band.relative_width(np.array([max(ends)]))[0])
    beyond = any((t.strength[t.longest > band.longest] > 0).any() for t in tables)
    longest = band.longest if beyond else min(max(ends) * (1.01 + 3 * width), band.longest)
    begins = [_begin(band, table.within(band.shortest, longest)) for table in tables]
    enough = [
        float(inside[_MOST - 1]) if len(inside) >= _MOST else 0.0
        for inside in (table.within(band.shortest, longest) for table in tables)
    ]
    sufficient = min(*begins, longest / _SPAN)
    shortest = max(sufficient, *enough, SHORTEST, band.shortest)
    shortest = max(min(shortest, longest / _LEAST_SPAN), band.shortest)
    counts = tuple(len(table.within(shortest, longest)) for table in tables)
    return Window(band, shortest, longest, not beyond, counts)


def _heights(band: Band, table: LineTable) -> Array:
    """Return the heights of lines, |F|² m d⁴ over the FWHM; 0 outside the band."""
    inside = (table.d >= max(band.shortest, SHORTEST)) & (table.d <= band.longest)
    return np.where(inside, table.strength * table.d**3 / band.relative_width(table.d), 0.0)


def _begin(band: Band, d: Array) -> float:
    """Return the d-spacing in Å from which the lines (n,), descending, are enough."""
    if len(d) <= _FEWEST:
        return SHORTEST
    distance = np.convolve(-np.diff(np.log(d)), np.full(15, 1 / 15), "same")
    overlapping = np.flatnonzero(distance < _OVERLAP * band.relative_width(d[1:]))
    overlapping = overlapping[overlapping >= _FEWEST]
    last = min([_LINES, len(d), *overlapping[:1].tolist()]) - 1
    return float(d[last]) * 0.99 if last < len(d) - 1 else SHORTEST


def best_window(windows: Sequence[Window]) -> Window:
    """Return the window of the best resolution among those that see enough lines.

    Banks of which a Lorentzian width or the geometry is impossible come last.
    """
    most = max(min(w.lines) for w in windows)
    enough = [w for w in windows if min(w.lines) >= min(_FEWEST, 0.7 * most)]
    return min(enough, key=lambda w: (w.is_doubtful, float(np.median(w.widths))))


def grid_of(window: Window, width: float, times: Array | None) -> tuple[TofGrid, int]:
    """Return a grid for peaks of FWHM over T ``width``, and which of ``times`` it has: every n-th.

    Those, (n,) in µs, of a measured file are taken, within the window, if they are logarithmic and
    resolve the peaks; otherwise n is 0. Raises a DesignError if no grid of at most 12,000 points
    resolves the peaks.
    """
    start, stop = window.tof
    span, digits, measured = math.log(stop / start), 5, _regular_step(times)
    step = min(width / _PER_FWHM_OF_MANY, max(width / _PER_FWHM, span / _MANY))
    step = max(step, span / (_MOST_POINTS - 1))
    if step > width / 2:
        raise DesignError(
            f"Peaks of bank {window.band.instrument.bank} are {width:.1e} of T wide: a grid of "
            f"{_MOST_POINTS:,} points from {start:.0f} to {stop:.0f} µs does not resolve them. "
            f"Choose another bank (--bank)."
        )
    step = float(f"{min(step, span / (_FEWEST_POINTS - 1)):.4g}")
    every = 0
    if times is not None and measured is not None and measured < width / _COARSEST:
        finest = max(width / _FINEST, span / (_MOST_POINTS - 1))
        fewest = math.ceil(span / (_MOST_POINTS - 1) / measured)
        every = 1 if measured >= finest else max(math.floor(step / measured), fewest)
        start, step, digits = float(times[times >= start][0]), every * measured, 9
    start = float(f"{start:.{digits}g}")
    points = int(math.log(stop / start) / step) + 1
    return TofGrid(start, step, max(min(points, _MOST_POINTS), _LEAST_POINTS)), every


def _regular_step(times: Array | None) -> float | None:
    """Return the relative step of times (n,), if it is the same all over."""
    if times is None:
        return None
    steps = np.diff(np.log(times))
    usual = float(np.median(steps))
    regular = np.abs(steps / usual - 1) < _REGULAR
    return float(f"{steps[regular].mean():.8g}") if regular.mean() > 0.9 else None
