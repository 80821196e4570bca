"""The large chart of the report, as SVG paths and as data for its script.

Not Bokeh: BokehJS alone is larger than a page with several charts, shows nothing without scripts
or on paper, and its scripts could not be pinned by the page's content security policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.load import Measurement
from pipelines.report.fits import CandidateFit, Misfit
from pipelines.report.numbers import fixed, miller

_BACKGROUND_STEP = 16  # grid points between the page's values of a fitted background


@dataclass(frozen=True, eq=False)
class TofAxis:
    """The time axis of a measurement's file, on which its charts are drawn.

    Attributes
    ----------
    instrument
        The calibration of that axis.
    grid, tof : shape (points,)
        The campaign's grid, and the same points in the file, in µs.
    stretch : shape (points,)
        Factor from a density per µs of the file to one per µs of the campaign.
    """

    instrument: Instrument
    grid: NDArray[np.float64]
    tof: NDArray[np.float64]
    stretch: NDArray[np.float64]

    @classmethod
    def from_measurement(cls, measurement: Measurement, campaign: Campaign) -> TofAxis:
        """Return the axis of a measurement."""
        grid = campaign.grid.tof
        calibration = measurement.calibration
        if calibration is None:
            return cls(campaign.instrument, grid, grid, np.ones(len(grid)))
        tof = calibration.tof_from_d_spacing(campaign.instrument.d_spacing_from_tof(grid))
        return cls(calibration, grid, tof, np.gradient(tof) / np.gradient(grid))

    def tof_in_file(self, tof: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Return the time in the file, in µs, of a time on the campaign's axis."""
        return np.asarray(np.interp(tof, self.grid, self.tof))


@dataclass(frozen=True)
class Scale:
    """A linear scale from values to positions in a chart, in pixels."""

    low: float
    high: float
    start: float
    stop: float

    @overload
    def __call__(self, value: float) -> float: ...
    @overload
    def __call__(self, value: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def __call__(self, value: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
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


def line(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return an SVG path through points, interrupted where they are not finite."""
    drawn, down = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if b == b:  # no NaN
            drawn.append(f"{'L' if down else 'M'}{a:.1f} {b:.1f}")
        down = b == b
    return "".join(drawn)


def dots(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return an SVG path that is a dot at each point."""
    points = zip(x.tolist(), y.tolist(), strict=True)
    return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in points if b == b)


_LEFT, _RIGHT = 66, 1068  # pixels of the large chart; from top to bottom:
_TOP, _MAIN, _TICKS, _UPPER, _BOTTOM = 44, 344, 362, 388, 492
_FACTORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)  # of the difference


@dataclass(frozen=True)
class ChartFit:
    """SVG paths of a fit; ``factor`` magnifies the difference, ``places`` are misfits."""

    calculated: str
    background: str
    difference: str
    reflections: str
    places: list[float]
    difference_scale: Scale
    difference_ticks: list[float]
    factor: float


@dataclass(frozen=True)
class Chart:
    """The large chart without scripts: scales, ticks and SVG paths, in pixels."""

    x: Scale
    x_ticks: list[float]
    y: Scale
    y_ticks: list[float]
    d_ticks: list[tuple[float, str]]
    gaps: list[list[float]]
    measured: str
    fit: ChartFit | None


def draw_chart(
    measurement: Measurement, fit: CandidateFit | None, places: Sequence[Misfit], axis: TofAxis
) -> Chart:
    """Draw measurement, calculated pattern, reflections and difference.

    Parameters
    ----------
    measurement, axis
        The measurement, and the time axis of its file.
    fit, places
        The fit that is drawn, or None, and its misfits.
    """
    gridded, pattern_fit = measurement.gridded, fit.pattern_fit if fit else None
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    curves = [measured, *([pattern_fit.calculated / axis.stretch] if pattern_fit else [])]
    low, high = float(np.nanmin(curves)), float(np.nanmax(curves))
    margin = 0.04 * (high - low)
    x = Scale(float(axis.tof[0]), float(axis.tof[-1]), _LEFT, _RIGHT)
    y = Scale(low - margin, high + margin, _MAIN, _TOP)
    d_ends = axis.instrument.d_spacing_from_tof(axis.tof[[0, -1]])
    d_values = Scale(float(d_ends[0]), float(d_ends[1]), 0, 1).ticks(10)
    d_positions = x(axis.instrument.tof_from_d_spacing(np.array(d_values)))
    edges = np.flatnonzero(np.diff(np.pad(gridded.covered, 1, constant_values=True)))
    ends = x(axis.tof[np.minimum(edges, len(axis.tof) - 1)]).reshape(-1, 2)
    return Chart(
        x=x,
        x_ticks=x.ticks(9),
        y=y,
        y_ticks=y.ticks(5),
        d_ticks=[
            (position, tick_label(value, d_values))
            for position, value in zip(d_positions.tolist(), d_values, strict=True)
        ],
        gaps=ends.tolist(),
        measured=dots(x(axis.tof), y(measured)),
        fit=_draw_fit(fit, places, axis, x, y) if fit else None,
    )


def _draw_fit(
    fit: CandidateFit, places: Sequence[Misfit], axis: TofAxis, x: Scale, y: Scale
) -> ChartFit | None:
    pattern_fit = fit.pattern_fit
    if pattern_fit is None:
        return None
    difference = pattern_fit.difference / axis.stretch
    # On the scale of the chart above, or magnified by a round factor: small looks small.
    span = (y.high - y.low) * (_BOTTOM - _UPPER) / (_MAIN - _TOP) / 2
    largest = float(np.nanmax(np.abs(difference)))
    factor = max((f for f in _FACTORS if largest * f <= span), default=_FACTORS[0])
    scale = Scale(-span / factor, span / factor, _BOTTOM, _UPPER)
    positions = x(axis.tof_in_file(fit.tof)).tolist()
    return ChartFit(
        calculated=line(x(axis.tof), y(pattern_fit.calculated / axis.stretch)),
        background=line(x(axis.tof), y(pattern_fit.background / axis.stretch)),
        difference=line(x(axis.tof), scale(difference)),
        reflections="".join(f"M{t:.1f} {_MAIN + 6}V{_TICKS - 2}" for t in positions),
        places=[float(x(axis.tof_in_file(place.tof))) for place in places],
        difference_scale=scale,
        difference_ticks=scale.ticks(4),
        factor=factor,
    )


class FitData(TypedDict):
    """A fit for the page's script; the background only at every ``every``-th point."""

    calculated: list[float | None]
    background: list[float | None]
    tof: list[float | None]
    hkl: list[str]


class ChartData(TypedDict):
    """The large chart for the page's script, as JSON values."""

    tof: list[float | None]
    calibration: list[float]
    measured: list[float | None]
    sigma: list[float | None]
    every: int
    fits: list[FitData]
    places: list[float | None]


def chart_data(
    measurement: Measurement, fits: Sequence[CandidateFit], places: Sequence[Misfit], axis: TofAxis
) -> ChartData:
    """Return the data from which the page's script draws.

    Parameters
    ----------
    measurement, axis
        The measurement, and the time axis of its file.
    fits, places
        All fits, and the misfits of the first.
    """
    gridded, instrument = measurement.gridded, axis.instrument
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    # Five digits of the largest value are more than a screen shows.
    digits = 5 - int(np.ceil(np.log10(max(float(np.nanmax(np.abs(measured))), 1e-12))))

    def rounded(values: NDArray[np.float64], decimals: int = digits) -> list[float | None]:
        # JSON has no NaN, and needs no point where there are no decimals.
        return [
            None if value != value else value if decimals > 0 else int(value)
            for value in np.round(values, decimals).tolist()
        ]

    return {
        "tof": rounded(axis.tof, 1),
        "calibration": [instrument.difc, instrument.difa, instrument.difb, instrument.tzero],
        "measured": rounded(measured),
        "sigma": rounded(np.where(gridded.covered, gridded.sigma, np.nan) / axis.stretch),
        "every": _BACKGROUND_STEP,
        "fits": [
            {
                "calculated": rounded(fit.pattern_fit.calculated / axis.stretch),
                "background": rounded(
                    (fit.pattern_fit.background / axis.stretch)[::_BACKGROUND_STEP]
                ),
                "tof": rounded(axis.tof_in_file(fit.tof), 1),
                "hkl": [miller(hkl) for hkl in fit.hkl.tolist()],
            }
            for fit in fits
            if fit.pattern_fit is not None
        ],
        "places": rounded(axis.tof_in_file(np.array([place.tof for place in places])), 1),
    }
