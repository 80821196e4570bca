"""The report: predictions as a self-contained HTML page that a beamline scientist can read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CELL_PARAMETERS, cell_volume, encloses_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.load import Measurement
from bragg_models.predictors import Predictor
from pipelines.cli.style import SYMBOLS, SYSTEM_COLORS, UNITS
from pipelines.prediction.render import NOT_DETERMINED, with_uncertainty
from pipelines.prediction.result import PredictionResult
from pipelines.prediction.workflow import PredictedProfile
from pipelines.report.charts import Chart, ChartData, TofAxis, chart_data, draw_chart, tick_label
from pipelines.report.evidence import Evidence, collect_evidence
from pipelines.report.fits import CandidateFit, Misfit, candidate_fits, find_misfits, runner_up
from pipelines.report.numbers import fixed, grouped, miller, probability, significant, space_group
from pipelines.report.preparation import Preparation, draw_preparation

MAX_SECTIONS = 20
"""Predictions on one page."""

# Misfits on the page, and how many more of those without a reflection nearby.
_MAX_PLACES, _MAX_FOREIGN = 12, 4
_DIRECTORY = Path(__file__).parent


def render_report(
    profiles: Sequence[PredictedProfile], predictor: Predictor, *, total: int | None = None
) -> str:
    """Return predictions as a page of HTML that loads nothing from anywhere.

    Parameters
    ----------
    profiles
        At least one; of more than :data:`MAX_SECTIONS` the first ones are shown, which the page
        states.
    predictor
        The model of the predictions.
    total
        Number of predictions, if these are only the first of them.
    """
    shown = profiles[:MAX_SECTIONS]
    sections = [
        _section(number, profile, fits)
        for number, (profile, fits) in enumerate(
            zip(shown, candidate_fits(shown, predictor.campaign), strict=True), start=1
        )
    ]
    script = (_DIRECTORY / "report.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("report.html")
        .render(
            sections=sections,
            total=total or len(profiles),
            predictor=predictor,
            uri=profiles[0].model,
            style=Markup((_DIRECTORY / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            # Only this script may run, whatever the header of a file contains.
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            colors={s.name: (c, _lightened(c)) for s, c in SYSTEM_COLORS.items()},
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            bragg=metadata.version("bragg"),
            units=UNITS,
            not_determined=NOT_DETERMINED,
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_DIRECTORY),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "fixed": fixed,
        "grouped": grouped,
        "probability": probability,
        "significant": significant,
        "symbol": lambda name: Markup(f'<i class="symbol">{SYMBOLS[name]}</i>'),
        "miller": miller,
        "tick": tick_label,
    }
    return environment


def _lightened(color: str) -> str:
    """Return a colour, mixed with white until it is bright enough on a dark page."""
    rgb = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    for white in np.linspace(0, 1, 21):
        mixed = rgb + (1 - rgb) * white
        linear = np.where(mixed <= 0.04045, mixed / 12.92, ((mixed + 0.055) / 1.055) ** 2.4)
        if linear @ (0.2126, 0.7152, 0.0722) > 0.28:
            break
    return "#" + "".join(f"{round(255 * v):02x}" for v in mixed)


# ---- a section of the page ---------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterGroup:
    """Cell parameters that symmetry makes equal, and whether their value is free."""

    names: tuple[str, ...]
    value: float
    free: bool


@dataclass(frozen=True)
class RefinedSummary:
    """The best refinement: its free parameters with uncertainties."""

    phase: Phase
    cell: dict[str, str]
    rwp: float
    reduced_chi2: float
    agrees: bool
    intensities: str


@dataclass(frozen=True, eq=False)
class FitRow:
    """A row of the table of fits."""

    fit: CandidateFit
    lattice: list[ParameterGroup]
    is_runner_up: bool
    space_group: Markup


@dataclass(frozen=True, eq=False)
class Section:
    """What the template shows of one prediction.

    ``model_fit`` is the fit of the predicted cell, ``shown`` the one in the large chart, ``rows``
    are all of them; ``places`` are misfits with their times in the file, in µs.
    """

    id: str
    name: str
    result: PredictionResult
    lattice: list[ParameterGroup]
    space_group: Markup
    refined: RefinedSummary | None
    volume: float | None
    axial_ratio: float | None
    probabilities: list[tuple[Phase, float]]
    model_fit: CandidateFit | None
    shown: CandidateFit | None
    rows: list[FitRow]
    runner_up: CandidateFit | None
    evidence: Evidence
    places: list[tuple[Misfit, float]]
    n_more_places: int
    chart: Chart
    data: ChartData
    preparation: Preparation
    measurement: Measurement
    sha256: str | None


def _section(number: int, profile: PredictedProfile, fits: Sequence[CandidateFit]) -> Section:
    campaign, measurement = profile.campaign, profile.measurement
    model_fit = next((fit for fit in fits if fit.source == "model"), None)
    shown = next((fit for fit in fits if fit.pattern_fit is not None), None)
    places = find_misfits(shown, measurement.gridded, campaign) if shown else []
    # A peak without a reflection of the cell is worth more attention than a strong one with it.
    listed = places[:_MAX_PLACES]
    listed += [place for place in places[_MAX_PLACES:] if not place.hkl][:_MAX_FOREIGN]
    second = runner_up(profile, fits)
    axis = TofAxis.from_measurement(measurement, campaign)
    has_volume = bool(encloses_volume(profile.cell[None])[0])
    probabilities = profile.prediction.probabilities[profile.row]
    free = set(profile.phase.lattice.free_parameters)
    result = profile.result()
    return Section(
        id=f"prediction-{number}",
        name=Path(measurement.profile.source).name,
        result=result,
        lattice=_parameter_groups(profile.phase, profile.cell),
        space_group=space_group(profile.phase.space_group),
        refined=_refined_summary(profile),
        volume=float(cell_volume(profile.cell[None])[0]) if has_volume else None,
        axial_ratio=float(profile.cell[2] / profile.cell[0])
        if has_volume and {"a", "c"} <= free
        else None,
        probabilities=[
            (profile.phases[code], float(probabilities[code]))
            for code in np.argsort(-probabilities, kind="stable")
        ],
        model_fit=model_fit,
        shown=shown,
        rows=[
            FitRow(
                fit,
                _parameter_groups(fit.phase, fit.cell),
                fit is second,
                space_group(fit.phase.space_group),
            )
            for fit in fits
        ],
        runner_up=second,
        evidence=collect_evidence(
            profile, result, fits, places if shown and shown.source != "library" else []
        ),
        places=[(place, float(axis.tof_in_file(place.tof))) for place in listed],
        n_more_places=len(places) - len(listed),
        chart=draw_chart(measurement, shown, listed, axis),
        data=chart_data(measurement, fits, listed, axis),
        preparation=draw_preparation(measurement, axis),
        measurement=measurement,
        sha256=_sha256(Path(measurement.profile.source)),
    )


def _refined_summary(profile: PredictedProfile) -> RefinedSummary | None:
    if not profile.refined:
        return None
    best = profile.refined[0]
    phase = profile.phases[best.phase]
    columns = {name: CELL_PARAMETERS.index(name) for name in phase.lattice.free_parameters}
    return RefinedSummary(
        phase=phase,
        cell={n: with_uncertainty(best.cell[k], best.su[k]) for n, k in columns.items()},
        rwp=best.pattern_fit.rwp,
        reduced_chi2=best.pattern_fit.reduced_chi2,
        agrees=phase == profile.phase,
        intensities=best.intensities,
    )


def _parameter_groups(phase: Phase, cell: NDArray[np.float64]) -> list[ParameterGroup]:
    """Return groups of equal parameters: the free ones first, then those that symmetry fixes."""
    names: dict[str | float, list[str]] = {name: [name] for name in phase.lattice.free_parameters}
    for name, source in phase.lattice.tied:
        names.setdefault(source, []).append(name)
    return [
        ParameterGroup(
            tuple(group), float(cell[CELL_PARAMETERS.index(group[0])]), isinstance(source, str)
        )
        for source, group in names.items()
    ]


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # moved since it was read, or no file at all
        return None
