"""The page of bragg monitor: each signal over the answers, with its limits and alarms."""

from datetime import UTC, datetime
from importlib import metadata

import numpy as np
from markupsafe import Markup

from bragg_data.arrays import Array
from pipelines.monitoring.monitor import Observation
from pipelines.report.charts import Scale, line
from pipelines.report.environment import DIRECTORY, both_shades, new_environment

_ALONG, _HEIGHT = (86.0, 1068.0), (160.0, 14.0)  # of a chart, in pixels
_MEAN = 20  # answers of the running mean or median
_MOST = 2000  # points of a chart
_LABELS = {
    "rejections": "share of rejected profiles",
    "calibration": "shift of the lengths of known cells / 10⁻⁴",
    "width": "width of the peaks Δd/d / 10⁻³",
    "background": "background / highest peak",
}


def render_monitor(seen: Observation) -> str:
    """Return what was observed as a page of HTML that loads nothing from anywhere."""
    s = seen.signals
    values = {
        "rejections": 1 - s.accepted,
        "calibration": 1e4 * s.shift,
        "width": 1e3 * np.exp(s.logs["width"]),
        "background": np.exp(s.logs["background"]),
    }
    charts = [
        _chart(name, of_signal, seen)
        for name, of_signal in values.items()
        if np.isfinite(of_signal).any()
    ]
    times = [datetime.fromtimestamp(s.answers[k].at, UTC) for k in (0, -1)]
    values_of_page = {
        "seen": seen,
        "charts": charts,
        "times": [f"{time:%Y-%m-%d %H:%M} UTC" for time in times],
        "style": Markup((DIRECTORY / "report.css").read_text(encoding="utf-8")),
        "colors": {"fit": both_shades("#D55E00")},
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "bragg": metadata.version("bragg"),
        "units": {},
    }
    return new_environment().get_template("monitor.html").render(values_of_page)


def _chart(name: str, values: Array, seen: Observation) -> dict[str, object]:
    known = np.flatnonzero(np.isfinite(values))
    mean = np.mean if name == "rejections" else np.median
    lately = (known[max(k - _MEAN + 1, 0) : k + 1] for k in range(len(known)))
    smooth = np.array([mean(values[rows]) for rows in lately], dtype=np.float64)
    band = np.empty(0)
    if name in seen.draws:
        band = np.exp(np.nanquantile(seen.draws[name], (0.025, 0.975)))
        band *= 1e3 if name == "width" else 1.0
    shown = smooth if name == "rejections" else values[known]
    ends = np.concatenate([np.quantile(shown, (0.005, 0.995)), band])
    margin = 0.08 * float(np.ptp(ends)) or 0.01
    y = Scale(float(ends.min()) - margin, float(ends.max()) + margin, *_HEIGHT)
    x = Scale(1.0, float(max(len(values), 2)), *_ALONG)
    every = known[:: -(-len(known) // _MOST)] if name != "rejections" else ()
    inside = np.clip(values, y.low, y.high)
    return {
        "label": _LABELS[name],
        "x": x,
        "y": y,
        "points": "".join(f"M{x(k + 1.0):.1f} {y(float(inside[k])):.1f}h.01" for k in every),
        "mean": line(x(known.astype(np.float64) + 1), y(np.clip(smooth, y.low, y.high))),
        "band": [y(float(value)) for value in band],
        "alarms": [x(alarm.at + 1.0) for alarm in seen.alarms if alarm.signal == name],
    }
