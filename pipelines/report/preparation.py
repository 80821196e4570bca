"""How a measurement was prepared for the model: three small charts of the report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bragg_data.measurement.load import Measurement
from bragg_data.preprocessing import background_subtracted
from pipelines.report.charts import Scale, TofAxis, line


@dataclass(frozen=True)
class Preparation:
    """Scales and SVG paths of three small charts, in pixels, and the numbers below them.

    Attributes
    ----------
    x
        Time of flight, of all three.
    intensity, measured, baseline
        Scale and paths of the chart of the baseline.
    shift, shift_path
        Scale and path of the chart of the calibration.
    unit, prepared, clipped
        Scale and paths of the chart of the scaled profile.
    baseline_share, baseline_range
        Share of the intensity that the baseline is, and its lowest and highest value.
    shift_range
        Shift in µs at the ends of the grid.
    n_below, n_above, n_missing
        Points clipped at 0 and at 1, and points that were not measured.
    """

    x: Scale
    intensity: Scale
    measured: str
    baseline: str
    shift: Scale
    shift_path: str
    unit: Scale
    prepared: str
    clipped: str
    baseline_share: float
    baseline_range: tuple[float, float]
    shift_range: tuple[float, float]
    n_below: int
    n_above: int
    n_missing: int


def draw_preparation(measurement: Measurement, axis: TofAxis) -> Preparation:
    """Draw how the baseline was subtracted, the times calibrated, and the intensities clipped."""
    gridded = measurement.gridded
    known = gridded.covered & (gridded.sigma > 0)
    signal = background_subtracted(gridded.intensity, np.where(known, gridded.sigma, 0.0))
    baseline = np.where(known, gridded.intensity - signal, np.nan) / axis.stretch
    measured = np.where(known, gridded.intensity, np.nan) / axis.stretch
    x = Scale(float(axis.tof[0]), float(axis.tof[-1]), 46, 346)
    # The chart is about the baseline: the strongest peaks are cut off.
    top = min(float(np.nanmax(measured)), 3 * float(np.nanmax(np.abs(baseline))))
    intensity = Scale(min(float(np.nanmin(measured)), 0.0), top, 150, 14)
    shift = axis.grid - axis.tof
    margin = max(0.08 * float(np.ptp(shift)), 0.5)
    lowest, highest = min(float(shift.min()), 0.0), max(float(shift.max()), 0.0)
    shift_scale = Scale(lowest - margin, highest + margin, 150, 14)
    unit = Scale(-0.02, 1.02, 150, 14)
    clipped = known & (signal < 0)
    prepared = measurement.prepared
    return Preparation(
        x=x,
        intensity=intensity,
        measured=line(x(axis.tof), intensity(np.minimum(measured, top))),
        baseline=line(x(axis.tof)[::4], intensity(baseline)[::4]),
        shift=shift_scale,
        shift_path=line(x(axis.tof)[::16], shift_scale(shift)[::16]),
        unit=unit,
        prepared=line(x(axis.tof), unit(np.where(known, prepared, np.nan))),
        clipped="".join(f"M{t:.1f} 150v5" for t in x(axis.tof[clipped]).tolist()),
        baseline_share=float(np.nansum(baseline) / np.nansum(measured)),
        baseline_range=(float(np.nanmin(baseline)), float(np.nanmax(baseline))),
        shift_range=(float(shift[0]), float(shift[-1])),
        n_below=int(clipped.sum()),
        n_above=int((known & (prepared >= 1)).sum()) - 1,
        n_missing=int((~known).sum()),
    )
