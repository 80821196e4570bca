"""The report's charts, as SVG paths for its template and data for its script, and its numbers.

Not Bokeh: BokehJS alone is larger than a page with several charts, shows nothing without scripts
or on paper, and its scripts could not be pinned by the page's content security policy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from markupsafe import Markup

from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.load import Measurement
from bragg_data.preprocessing import background_subtracted

if TYPE_CHECKING:
    from pipelines.report.fits import CandidateFit, Misfit

_BACKGROUND_STEP = 16  # grid points between the page's values of a fitted background

_Value = TypeVar("_Value", float, Array)


@dataclass(frozen=True, eq=False)
class TofAxis:
    """The time axis of a measurement's file, on which its charts are drawn."""

    instrument: Instrument  # the calibration of that axis
    grid: Array  # shape (points,), the campaign's, in µs
    tof: Array  # shape (points,), the same points in the file, in µs
    stretch: Array  # from a density per µs of the file to one of the campaign

    @classmethod
    def from_measurement(cls, measurement: Measurement, campaign: Campaign) -> TofAxis:
        """Return the axis of a measurement."""
        grid = campaign.grid.tof
        calibration = measurement.calibration
        if calibration is None:
            return cls(campaign.instrument, grid, grid, np.ones(len(grid)))
        tof = calibration.tof_from_d_spacing(campaign.instrument.d_spacing_from_tof(grid))
        return cls(calibration, grid, tof, np.gradient(tof) / np.gradient(grid))

    def tof_in_file(self, tof: Array | float) -> Array:
        """Return the time in the file, in µs, of a time on the campaign's axis."""
        return np.asarray(np.interp(tof, self.grid, self.tof))

    def scale(self, start: float, stop: float) -> Scale:
        """Return the scale of the times in the file, between two positions in pixels."""
        return Scale(float(self.tof[0]), float(self.tof[-1]), start, stop)


@dataclass(frozen=True)
class Scale:
    """A linear scale from values to positions in a chart, in pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: _Value) -> _Value:
        """Return the position of a value, or those of an array."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about ``count`` round values."""
        rough = (self.high - self.low) / count
        power = 10.0 ** np.floor(np.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = int(np.ceil(self.low / step - 1e-9))
        return [k * step for k in range(first, int(np.floor(self.high / step + 1e-9)) + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """Format a tick's value with as many digits as its neighbours need."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    return fixed(value, max(0, -int(np.floor(np.log10(step) + 1e-9))))


def line(x: Array, y: Array) -> str:
    """Return an SVG path through points, interrupted where they are not finite."""
    drawn, down = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if b == b:  # no NaN
            drawn.append(f"{'L' if down else 'M'}{a:.1f} {b:.1f}")
        down = b == b
    return "".join(drawn)


# ---- numbers, Miller indices and space groups in HTML, as crystallographers write them ----------

_THIN = "\u202f"  # between a number and its unit, and between thousands


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Format a number with ``digits`` decimals, a minus sign and spaces between thousands."""
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace(",", _THIN)
    return text.replace("-", "−")


def significant(value: float, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits, without an exponent."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return fixed(value, max(digits - 1 - int(np.floor(np.log10(abs(value)))), 0))


def probability(value: float) -> str:
    """Format a probability; none is shown as 0 or 1."""
    if value > 0.9995:
        return f">{_THIN}0.999"
    return f"<{_THIN}0.001" if value < 0.0005 else f"{value:.3f}"


def miller(hkl: Iterable[int]) -> str:
    """Format Miller indices, negative ones with a bar above."""
    return "\u2009".join("".join(f"{c}\u0305" for c in str(-n)) if n < 0 else str(n) for n in hkl)


def space_group(symbol: str) -> Markup:
    """Format a Hermann-Mauguin symbol: italic letters, bars above, screw axes' indices below."""
    written = ""
    for part in re.findall(r"-\d|[2346][1-5](?=/|\s|:|$)|[A-Za-z]|\d|/", symbol.split(":")[0]):
        if part[0] == "-":
            written += f'<span class="bar">{part[1]}</span>'
        elif len(part) == 2:
            written += f"{part[0]}<sub>{part[1]}</sub>"
        else:
            written += f"<i>{part}</i>" if part.isalpha() else part
    return Markup(written)


# ---- the large chart ---------------------------------------------------------------------------

_LEFT, _RIGHT = 66, 1068  # pixels of the large chart; from top to bottom:
_TOP, _MAIN, _TICKS, _UPPER, _BOTTOM = 44, 344, 362, 388, 492
_FACTORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)  # of the difference


@dataclass(frozen=True, eq=False)
class Curves:
    """A measured profile and its fit over time of flight in µs; NaN where there is nothing."""

    tof: Array  # shape (n,)
    measured: Array
    calculated: Array | None = None
    background: Array | None = None


def draw_chart(
    measurement: Measurement, fit: CandidateFit | None, places: Sequence[Misfit], axis: TofAxis
) -> dict[str, object]:
    """Draw measurement, fit if any, its reflections, difference and misfits, as SVG paths."""
    gridded, pattern_fit = measurement.gridded, fit.pattern_fit if fit else None
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    curves, reflections = Curves(axis.tof, measured), np.empty(0)
    if fit is not None and pattern_fit is not None:
        calculated, background = pattern_fit.calculated, pattern_fit.background
        curves = Curves(axis.tof, measured, calculated / axis.stretch, background / axis.stretch)
        reflections = axis.tof_in_file(fit.tof)
    chart, x = draw_curves(curves, axis.instrument, [reflections]), axis.scale(_LEFT, _RIGHT)
    edges = np.flatnonzero(np.diff(np.pad(gridded.covered, 1, constant_values=True)))
    ends = x(axis.tof[np.minimum(edges, len(axis.tof) - 1)]).reshape(-1, 2)
    return chart | {
        "gaps": ends.tolist(),  # where nothing was measured
        "places": [float(x(axis.tof_in_file(place.tof))) for place in places],
    }


def draw_curves(
    curves: Curves, instrument: Instrument, reflections: Sequence[Array]
) -> dict[str, object]:
    """Draw a profile, its fit if any, and the difference, as SVG paths.

    With the reflections of each phase, in µs, in a row of its own.
    """
    tof, measured, calculated = curves.tof, curves.measured, curves.calculated
    shown = [measured, *([] if calculated is None else [calculated])]
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    margin = 0.04 * (high - low)
    x = Scale(float(tof[0]), float(tof[-1]), _LEFT, _RIGHT)
    y = Scale(low - margin, high + margin, _MAIN, _TOP)
    d_low, d_high = instrument.d_spacing_from_tof(tof[[0, -1]]).tolist()
    d_ticks = Scale(d_low, d_high, 0, 1).ticks(10)
    positions = x(instrument.tof_from_d_spacing(np.array(d_ticks))).tolist()
    points = zip(x(tof).tolist(), y(measured).tolist(), strict=True)
    chart: dict[str, object] = {
        "x": x,
        "y": y,
        "d_ticks": [(at, tick_label(d, d_ticks)) for at, d in zip(positions, d_ticks, strict=True)],
        "gaps": [],
        "places": [],
        "measured": "".join(f"M{a:.1f} {b:.1f}h0" for a, b in points if b == b),  # dots
    }
    if calculated is None or curves.background is None:
        return chart
    difference = measured - calculated
    # On the scale of the chart above, or magnified by a round factor: small looks small.
    span = (y.high - y.low) * (_BOTTOM - _UPPER) / (_MAIN - _TOP) / 2
    largest = float(np.nanmax(np.abs(difference)))
    factor = max((f for f in _FACTORS if largest * f <= span), default=_FACTORS[0])
    scale = Scale(-span / factor, span / factor, _BOTTOM, _UPPER)
    return chart | {
        "calculated": line(x(tof), y(calculated)),
        "background": line(x(tof), y(curves.background)),
        "difference": line(x(tof), scale(difference)),
        "reflections": _ticks([x(of_phase) for of_phase in reflections]),
        "difference_scale": scale,
        "factor": factor,  # of the difference
    }


def _ticks(positions: Sequence[Array]) -> list[str]:
    """Return a path of ticks for each row of positions, which share the height for one or more."""
    low, high = _MAIN + 6, _TICKS - 2
    high += min(len(positions) - 1, 2) * 8
    step = (high - low) / max(len(positions), 1)
    return [
        "".join(
            f"M{t:.1f} {low + k * step:.1f}v{step - 1 if k + 1 < len(positions) else step:.1f}"
            for t in row.tolist()
        )
        for k, row in enumerate(positions)
    ]


def chart_data(
    measurement: Measurement, fits: Sequence[CandidateFit], places: Sequence[Misfit], axis: TofAxis
) -> dict[str, object]:
    """Return the JSON values from which the page's script draws fits, and the first's misfits."""
    gridded, instrument = measurement.gridded, axis.instrument
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    # Five digits of the largest value are more than a screen shows.
    digits = 5 - int(np.ceil(np.log10(max(float(np.nanmax(np.abs(measured))), 1e-12))))

    def rounded(values: Array, decimals: int = digits) -> list[float | None]:
        # JSON has no NaN, and needs no point where there are no decimals.
        return [
            None if value != value else value if decimals > 0 else int(value)
            for value in np.round(values, decimals).tolist()
        ]

    def fit_data(fit: CandidateFit) -> dict[str, object]:
        assert fit.pattern_fit is not None
        background = (fit.pattern_fit.background / axis.stretch)[::_BACKGROUND_STEP]
        return {
            "calculated": rounded(fit.pattern_fit.calculated / axis.stretch),
            "background": rounded(background),
            "tof": rounded(axis.tof_in_file(fit.tof), 1),
            "hkl": [miller(hkl) for hkl in fit.hkl.tolist()],
        }

    return {
        "tof": rounded(axis.tof, 1),
        "calibration": [instrument.difc, instrument.difa, instrument.difb, instrument.tzero],
        "measured": rounded(measured),
        "sigma": rounded(np.where(gridded.covered, gridded.sigma, np.nan) / axis.stretch),
        "every": _BACKGROUND_STEP,
        "fits": [fit_data(fit) for fit in fits if fit.pattern_fit is not None],
        "places": rounded(axis.tof_in_file(np.array([place.tof for place in places])), 1),
    }


# ---- three small charts ------------------------------------------------------------------------


def draw_preparation(measurement: Measurement, axis: TofAxis) -> dict[str, object]:
    """Draw how the baseline was subtracted, the times calibrated, and the intensities clipped."""
    gridded, prepared = measurement.gridded, measurement.prepared
    known = gridded.covered & (gridded.sigma > 0)
    signal = background_subtracted(gridded.intensity, np.where(known, gridded.sigma, 0.0))
    baseline = np.where(known, gridded.intensity - signal, np.nan) / axis.stretch
    measured = np.where(known, gridded.intensity, np.nan) / axis.stretch
    # The chart is about the baseline: the strongest peaks are cut off.
    top = min(float(np.nanmax(measured)), 3 * float(np.nanmax(np.abs(baseline))))
    shift = axis.grid - axis.tof
    margin = max(0.08 * float(np.ptp(shift)), 0.5)
    lowest, highest = min(float(shift.min()), 0.0), max(float(shift.max()), 0.0)
    clipped = known & (signal < 0)
    x_scale, unit_scale = axis.scale(46, 346), Scale(-0.02, 1.02, 150, 14)
    intensity_scale = Scale(min(float(np.nanmin(measured)), 0.0), top, 150, 14)
    shift_scale = Scale(lowest - margin, highest + margin, 150, 14)
    x = x_scale(axis.tof)
    return {
        "x": x_scale,
        "intensity": intensity_scale,
        "measured": line(x, intensity_scale(np.minimum(measured, top))),
        "baseline": line(x[::4], intensity_scale(baseline)[::4]),
        "baseline_share": float(np.nansum(baseline) / np.nansum(measured)),
        "baseline_range": (float(np.nanmin(baseline)), float(np.nanmax(baseline))),
        "shift": shift_scale,
        "shift_path": line(x[::16], shift_scale(shift)[::16]),
        "shift_range": (float(shift[0]), float(shift[-1])),  # µs, at the ends of the grid
        "unit": unit_scale,
        "prepared": line(x, unit_scale(np.where(known, prepared, np.nan))),
        "clipped": "".join(f"M{t:.1f} 150v5" for t in x[clipped].tolist()),
        "n_below": int(clipped.sum()),
        "n_above": int((known & (prepared >= 1)).sum()) - 1,
        "n_missing": int((~known).sum()),
    }
