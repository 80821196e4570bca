"""The report on joint refinements: samples with their phases and banks, or frames of a series."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
from markupsafe import Markup

from bragg_data.handover.pdcif import number_with_su
from bragg_data.refinement.joint_result import JointResult, RefinedBank
from bragg_data.refinement.linear_fit import reflections_within
from pipelines.cli.style import SYMBOLS, UNITS
from pipelines.refinement.events import Event
from pipelines.refinement.frames import FrameResult
from pipelines.refinement.output import bank_texts, cell_texts, sample_text, weight_text
from pipelines.refinement.result import JointPhase, JointRefinement
from pipelines.report.charts import Curves, Scale, draw_curves
from pipelines.report.environment import DIRECTORY, both_shades, new_environment

_FIT = "#D55E00"  # of calculated profiles
_PHASES = "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
COLORS = {"fit": _FIT} | {f"phase{k}": color for k, color in enumerate(_PHASES, start=1)}
"""Of calculated profiles and of the phases, by the names of the templates."""

_MOST_PHASES = len(_PHASES)  # that have a colour of their own
_ALONG, _HEIGHT = (86.0, 1068.0), (160.0, 14.0)  # of a trend's chart, in pixels


@dataclass(frozen=True, eq=False)
class _PhaseRow:
    phase: JointPhase
    cell: dict[str, str]  # free parameters with both uncertainties
    weight: str
    sample: str


def render_refinements(results: Sequence[JointRefinement]) -> str:
    """Return refinements with their fits as a page of HTML that loads nothing from anywhere."""
    samples = [sample_section(result) for result in results]
    title = ", ".join(str(sample["name"]) for sample in samples)
    return _rendered(title=title, samples=samples, frames=[])


def render_series(frames: Sequence[FrameResult], events: Sequence[Event], along: str) -> str:
    """Return the frames of a series as a page of HTML; ``along`` is what they run along."""
    results = [frame.result for frame in frames]
    names = list(dict.fromkeys(p.name for r in results if r for p in r.phases))
    rows = [
        {
            "value": frame.value,
            "name": frame.file.name,
            "phases": [(p.name, cell_texts(p)) for p in frame.result.phases if p.cell]
            if frame.result
            else [],
            "reason": frame.reason or "no phase",
            "rwp": frame.result.rwp if frame.result else None,
        }
        for frame in frames
    ]
    return _rendered(
        title=f"{len(frames)} frames",
        samples=[],
        frames=rows,
        events=events,
        along=along,
        names=names,
        trends=_trends(frames, events, names),
    )


def _rendered(**values: object) -> str:
    environment = new_environment()
    return environment.get_template("refinement.html").render(
        values
        | {
            "style": Markup((DIRECTORY / "report.css").read_text(encoding="utf-8")),
            "colors": {name: both_shades(color) for name, color in COLORS.items()},
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "bragg": metadata.version("bragg"),
            "units": UNITS,
        }
    )


def sample_section(result: JointRefinement) -> dict[str, object]:
    """Return the phases, banks and fits of a refinement as the pages' templates take them."""
    fit = result.fit
    return {
        "name": ", ".join(Path(file).name for file in result.files),
        "result": result,
        "phases": [
            _PhaseRow(p, cell_texts(p), weight_text(p), sample_text(p)) for p in result.phases
        ],
        "sites": [
            (
                phase.name,
                site.label,
                *(
                    number_with_su(float(v), float(su), 5)
                    for v, su in zip(site.position, site.su_position, strict=True)
                ),
                f"{site.occupancy:g}",
                number_with_su(site.u_iso, site.su_u_iso, 5),
            )
            for phase in fit.phases
            for site in phase.sites
        ],
        "banks": [
            [text.replace("-", "−") for text in bank_texts(bank)] for bank in result.of_banks
        ],
        "charts": [
            (f"{bank.bank.label}, 2θ {bank.bank.instrument.two_theta:g}°", chart_of_bank(bank, fit))
            for bank in fit.banks
        ],
        "calibration": list(dict.fromkeys(result.calibration)),
    }


def chart_of_bank(bank: RefinedBank, fit: JointResult) -> dict[str, object]:
    """Draw a bank on its measured points, with a row of reflections for each phase."""
    measured = bank.bank
    ends = float(measured.tof[0]), float(measured.tof[-1])
    reflections = [
        reflections_within(phase.structure, phase.cell, bank.instrument, ends)[0]
        if phase.present
        else np.empty(0)
        for phase in fit.phases[:_MOST_PHASES]
    ]
    curves = Curves(measured.tof, measured.intensity, bank.calculated, bank.background)
    return draw_curves(curves, bank.instrument, reflections)


def _trends(
    frames: Sequence[FrameResult], events: Sequence[Event], names: Sequence[str]
) -> list[dict[str, object]]:
    """Draw free cell parameters, weight fractions and R_wp along a series, with their su."""
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    for frame in frames:
        if frame.result is None:
            continue
        for phase in frame.result.phases:
            index = names.index(phase.name) + 1
            for name in phase.free_parameters if phase.cell and phase.su else ():
                of_phase = f"{phase.name}, " if len(names) > 1 else ""
                label = f"{of_phase}{SYMBOLS[name]} / {UNITS[name]}"
                value, su = getattr(phase.cell, name), getattr(phase.su, name)
                series.setdefault(label, []).append((index, frame.value, value, su))
            if len(names) > 1 and phase.weight_percent is not None:
                point = index, frame.value, phase.weight_percent, phase.su_weight_percent or 0.0
                series.setdefault("wt %", []).append(point)
        if frame.result.rwp is not None:
            point = 0, frame.value, 100 * frame.result.rwp, 0.0
            series.setdefault("R_wp / %", []).append(point)
    series |= {label: series.pop(label) for label in ("wt %", "R_wp / %") if label in series}
    along = [frame.value for frame in frames]
    x = _padded(min(along), max(along), _ALONG)
    values = {frame.number: frame.value for frame in frames}
    at_events = [float(x(values[event.frame])) for event in events]
    trends = []
    for label, points in series.items():
        y = _padded(min(v - s for *_, v, s in points), max(v + s for *_, v, s in points), _HEIGHT)
        paths = [
            (
                index,
                "".join(
                    _mark(x(at), y(v - s), y(v), y(v + s)) for k, at, v, s in points if k == index
                ),
            )
            for index in dict.fromkeys(k for k, *_ in points)
        ]
        trends.append({"label": label, "x": x, "y": y, "paths": paths, "events": at_events})
    return trends


def _padded(low: float, high: float, pixels: tuple[float, float]) -> Scale:
    margin = 0.06 * (high - low) or max(abs(low) * 1e-3, 1e-3)
    return Scale(low - margin, high + margin, *pixels)


def _mark(x: float, low: float, middle: float, high: float) -> str:
    """Return a point with its error bar as a path."""
    bar = f"M{x:.1f} {low:.1f}V{high:.1f}"
    return f"{bar}M{x - 2:.1f} {middle:.1f}a2 2 0 1 0 4 0a2 2 0 1 0 -4 0"
