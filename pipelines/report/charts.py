"""The pictures of the report, as SVG and as data for its script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.load import Measurement
from bragg_data.preprocessing import background_subtracted
from pipelines.report.fits import Fit, Misfit
from pipelines.report.numbers import fixed, miller

_SAMPLED = 16  # grid points between the page's values of a fitted background


@dataclass(frozen=True, eq=False)
class TofAxis:
    """The time axis of a measurement's own file, on which its pictures are drawn.

    Attributes
    ----------
    instrument
        The calibration of that axis.
    grid, tof : shape (points,)
        The campaign's grid, and the same points in the file, in µs.
    stretch : shape (points,)
        Of a density per µs of the file, to one per µs of the campaign.
    """

    instrument: Instrument
    grid: NDArray[np.float64]
    tof: NDArray[np.float64]
    stretch: NDArray[np.float64]

    @classmethod
    def of(cls, measurement: Measurement, campaign: Campaign) -> TofAxis:
        """Return the axis of a measurement."""
        own, grid = measurement.calibration or campaign.instrument, campaign.grid.tof
        tof = grid
        if measurement.calibration is not None:
            tof = own.tof_from_d_spacing(campaign.instrument.d_spacing_from_tof(grid))
        return cls(own, grid, tof, np.gradient(tof) / np.gradient(grid))

    def of_file(self, tof: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Return where in the file a time of the campaign's axis is, in µs."""
        return np.asarray(np.interp(tof, self.grid, self.tof))


@dataclass(frozen=True)
class Scale:
    """From values to places in a picture, linearly."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: Any) -> Any:
        """Return the place of a value, or those of an array."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return some round values, about so many."""
        rough = (self.high - self.low) / count
        power = 10.0 ** np.floor(np.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = int(np.ceil(self.low / step - 1e-9))
        return [k * step for k in range(first, int(np.floor(self.high / step + 1e-9)) + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """Write a tick's value with as many digits as its neighbours need."""
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
    return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True)
                   if b == b)  # fmt: skip


_WIDTH, _LEFT, _RIGHT = 1080, 66, 1068  # of the large picture; its parts from top to bottom:
_TOP, _MAIN, _TICKS, _UPPER, _BOTTOM = 44, 344, 362, 388, 492
_FACTORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)  # of the difference


def draw_chart(
    measurement: Measurement, fit: Fit | None, places: Sequence[Misfit], axis: TofAxis
) -> dict[str, Any]:
    """Return the large picture, without scripts: what the template draws, in its pixels."""
    gridded, overlay = measurement.gridded, fit.overlay if fit else None
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    curves = [measured, *([overlay.calculated / axis.stretch] if overlay else [])]
    low, high = (float(f(curves)) for f in (np.nanmin, np.nanmax))
    room = 0.04 * (high - low)
    x = Scale(float(axis.tof[0]), float(axis.tof[-1]), _LEFT, _RIGHT)
    y = Scale(low - room, high + room, _MAIN, _TOP)
    d_ends = axis.instrument.d_spacing_from_tof(axis.tof[[0, -1]])
    d_ticks = Scale(float(d_ends[0]), float(d_ends[1]), 0, 1).ticks(10)
    edges = np.flatnonzero(np.diff(np.pad(gridded.covered, 1, constant_values=True)))
    ends = x(axis.tof[np.minimum(edges, len(axis.tof) - 1)]).reshape(-1, 2)
    drawn: dict[str, Any] = {
        "x": x, "x_ticks": x.ticks(9), "y": y, "y_ticks": y.ticks(5), "gaps": ends.tolist(),
        "d_ticks": [(float(x(axis.instrument.tof_from_d_spacing(d))), tick_label(d, d_ticks))
                    for d in d_ticks],
        "measured": dots(x(axis.tof), y(measured)),
    }  # fmt: skip
    if fit and overlay:
        difference = overlay.difference / axis.stretch
        # On the scale of the picture above, or by a round factor: what is small looks small.
        span = (y.high - y.low) * (_BOTTOM - _UPPER) / (_MAIN - _TOP) / 2
        most = float(np.nanmax(np.abs(difference)))
        factor = max((f for f in _FACTORS if most * f <= span), default=_FACTORS[0])
        below = Scale(-span / factor, span / factor, _BOTTOM, _UPPER)
        drawn |= {
            "calculated": line(x(axis.tof), y(overlay.calculated / axis.stretch)),
            "background": line(x(axis.tof), y(overlay.background / axis.stretch)),
            "difference": line(x(axis.tof), below(difference)),
            "places": [float(x(axis.of_file(place.tof))) for place in places],
            "below": below, "below_ticks": below.ticks(4), "factor": factor,
            "reflections": "".join(f"M{t:.1f} {_MAIN + 6}V{_TICKS - 2}"
                                   for t in x(axis.of_file(fit.tof)).tolist()),
        }  # fmt: skip
    return drawn


def chart_data(
    measurement: Measurement, fits: Sequence[Fit], places: Sequence[Misfit], axis: TofAxis
) -> dict[str, Any]:
    """Return what the page's script draws from, as JSON values."""
    gridded, own = measurement.gridded, axis.instrument
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    # Five digits of the largest value are more than a screen shows.
    digits = 5 - int(np.ceil(np.log10(max(float(np.nanmax(np.abs(measured))), 1e-12))))

    def listed(values: NDArray[np.float64], decimals: int = digits) -> list[float | None]:
        rounded = np.round(values, decimals).tolist()
        # JSON has no NaN, and needs no point where there are no decimals.
        return [None if v != v else v if decimals > 0 else int(v) for v in rounded]

    return {
        "tof": listed(axis.tof, 1),
        "calibration": [own.difc, own.difa, own.difb, own.tzero],
        "measured": listed(measured),
        "sigma": listed(np.where(gridded.covered, gridded.sigma, np.nan) / axis.stretch),
        "every": _SAMPLED,
        "fits": [
            {
                "calculated": listed(f.overlay.calculated / axis.stretch),
                "background": listed((f.overlay.background / axis.stretch)[::_SAMPLED]),
                "tof": listed(axis.of_file(f.tof), 1),
                "hkl": [miller(hkl) for hkl in f.hkl.tolist()],
            }
            for f in fits if f.overlay is not None
        ],
        "places": listed(axis.of_file(np.array([p.tof for p in places])), 1),
    }  # fmt: skip


def small_pictures(measurement: Measurement, axis: TofAxis) -> dict[str, Any]:
    """Return what was done to the data: three small pictures, and their numbers."""
    g = measurement.gridded
    known = g.covered & (g.sigma > 0)
    signal = background_subtracted(g.intensity, np.where(known, g.sigma, 0.0))
    baseline = np.where(known, g.intensity - signal, np.nan) / axis.stretch
    measured = np.where(known, g.intensity, np.nan) / axis.stretch
    x = Scale(float(axis.tof[0]), float(axis.tof[-1]), 46, 346)
    # The baseline is what is shown: the strongest peaks leave the picture.
    top = min(float(np.nanmax(measured)), 3 * float(np.nanmax(np.abs(baseline))))
    y = Scale(min(float(np.nanmin(measured)), 0.0), top, 150, 14)
    shift = axis.grid - axis.tof
    room = max(0.08 * float(np.ptp(shift)), 0.5)
    shifts = Scale(
        min(float(shift.min()), 0.0) - room, max(float(shift.max()), 0.0) + room, 150, 14
    )
    unit = Scale(-0.02, 1.02, 150, 14)
    clipped = known & (signal < 0)
    return {
        "small": {
            "x": x,
            "background": {
                "y": y, "measured": line(x(axis.tof), y(np.minimum(measured, top))),
                "baseline": line(x(axis.tof)[::4], y(baseline)[::4]),
            },
            "calibration": {"y": shifts, "shift": line(x(axis.tof)[::16], shifts(shift)[::16])},
            "clipping": {
                "y": unit,
                "prepared": line(x(axis.tof), unit(np.where(known, measurement.prepared, np.nan))),
                "clipped": "".join(f"M{t:.1f} 150v5" for t in x(axis.tof[clipped]).tolist()),
            },
        },
        "done": {
            "share": float(np.nansum(baseline) / np.nansum(measured)),
            "low": float(np.nanmin(baseline)), "high": float(np.nanmax(baseline)),
            "shift": (float(shift[0]), float(shift[-1])),
            "below": int(clipped.sum()),
            "above": int((known & (measurement.prepared >= 1)).sum()) - 1,
            "missing": int((~known).sum()),
        },
    }  # fmt: skip
