"""The report: predictions as a self-contained HTML page that a beamline scientist can read."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from bragg_data.crystallography.cell import CELL_PARAMETERS, cell_volume, encloses_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.linear_fit import explained_fraction
from bragg_models.predictors import Predictor
from pipelines.cli.style import SYSTEM_COLORS, UNITS, with_uncertainty
from pipelines.prediction.result import NOT_DETERMINED, Interval, PredictionResult
from pipelines.prediction.workflow import PredictedProfile
from pipelines.refinement.output import cell_texts
from pipelines.refinement.result import JointRefinement
from pipelines.report.charts import TofAxis, chart_data, draw_chart, draw_preparation
from pipelines.report.environment import both_shades, new_environment
from pipelines.report.fits import CandidateFit, Misfit, candidate_fits, find_misfits, runner_up
from pipelines.report.joint import banks_sections
from pipelines.report.refinement import COLORS, sample_section

MAX_SECTIONS = 20  # predictions on one page
CONFIDENT = 0.95  # probability from which a model counts as confident
# Fractions of the weighted signal above the background, from which a pattern explains the peaks.
WELL, PARTLY = 0.9, 0.5
# Misfits on the page, and how many more of those without a reflection nearby.
_MAX_PLACES, _MAX_FOREIGN = 12, 4
_DIRECTORY = Path(__file__).parent
# Of fits. The bank's own refinement is drawn where the cell is that of all banks.
_SOURCES = {
    "model": "model",
    "library": "library",
    "refinement": "refined",
    "joint refinement": "refined",
}


def render_report(
    profiles: Sequence[PredictedProfile], *predictors: Predictor, total: int | None = None
) -> str:
    """Return predictions, at least one, as a page of HTML that loads nothing from anywhere.

    The predictors are those that made them. What several banks of a sample show together comes
    first, then what samples consist of that no phase explains by itself. Of more than
    :data:`MAX_SECTIONS` the first ones are shown, which the page states; these may
    themselves be the first of a ``total``.
    """
    shown = profiles[:MAX_SECTIONS]
    script = (_DIRECTORY / "report.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("report.html")
        .render(
            sections=[_section(number, profile) for number, profile in enumerate(shown, start=1)],
            total=total or len(profiles),
            banks=banks_sections(shown),
            mixtures=[sample_section(mixture) for mixture in _mixtures(shown)],
            predictors=predictors,
            uris=[
                next((p.model for p in profiles if p.campaign == predictor.campaign), None)
                for predictor in predictors
            ],
            style=Markup((_DIRECTORY / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            # Only this script may run, whatever the header of a file contains.
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            colors={
                name: both_shades(color)
                for name, color in ({s.name: c for s, c in SYSTEM_COLORS.items()} | COLORS).items()
            },
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            bragg=metadata.version("bragg"),
            units=UNITS,
            not_determined=NOT_DETERMINED,
        )
    )


@cache
def _environment() -> Environment:
    environment = new_environment()
    environment.filters |= {"decimals": _decimals, "groups": _parameter_groups}
    return environment


def _section(number: int, profile: PredictedProfile) -> dict[str, object]:
    campaign, measurement = profile.campaign, profile.measurement
    result, fits = profile.result(), candidate_fits(profile)
    decided = _decided(result, fits)
    fits.sort(key=lambda fit: fit is not decided)
    shown = next((fit for fit in fits if fit.pattern_fit is not None), None)
    places = find_misfits(shown, measurement.gridded, campaign) if shown else []
    # A peak without a reflection of the cell is worth more attention than a strong one with it.
    listed = places[:_MAX_PLACES]
    listed += [place for place in places[_MAX_PLACES:] if not place.hkl][:_MAX_FOREIGN]
    axis = TofAxis.from_measurement(measurement, campaign)
    phase, cell = _phase_of(profile, result.phase), result.cell.to_array()
    has_volume = bool(encloses_volume(cell[None])[0])
    is_axial = has_volume and {"a", "c"} <= set(phase.lattice.free_parameters)
    source = Path(measurement.profile.source)
    return {
        "id": f"prediction-{number}",
        "name": source.name,
        "result": result,
        "predicted": profile,
        "phase": phase,  # the decided one
        "refined": _refined_summary(profile),
        # The free parameters with both uncertainties, if the cell is that of all banks.
        "joint": _joint_texts(profile),
        "volume": float(cell_volume(cell[None])[0]) if has_volume else None,
        "axial_ratio": float(cell[2] / cell[0]) if is_axial else None,
        "probabilities": [
            (_phase_of(profile, name), p)
            for name, p in sorted(result.probabilities.items(), key=lambda item: -item[1])
        ],
        "parts": [
            (part, CandidateFit(part.source, 0, of, part.cell.to_array(), 0.0))
            for part in result.evidence
            for of in [_phase_of(profile, part.phase)]
        ],
        "fits": fits,
        "decided": decided,
        "shown": shown,  # in the large chart
        "runner_up": runner_up(profile, fits),
        "evidence": collect_evidence(
            profile, fits, places if shown and shown.source != "library" else []
        ),
        # Misfits with their times in the file, in µs.
        "places": [(place, float(axis.tof_in_file(place.tof))) for place in listed],
        "n_more_places": len(places) - len(listed),
        "chart": draw_chart(measurement, shown, listed, axis),
        "data": chart_data(measurement, fits, listed, axis),
        "preparation": draw_preparation(measurement, axis),
        "measurement": measurement,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else None,
    }


def _mixtures(profiles: Sequence[PredictedProfile]) -> list[JointRefinement]:
    """Return what samples consist of, each once."""
    by_sample = {profile.sample: profile.mixture for profile in profiles}
    return [mixture for mixture in by_sample.values() if mixture is not None]


def _phase_of(profile: PredictedProfile, name: str) -> Phase:
    return next(phase for phase in profile.phases if phase.name == name)


def _decided(result: PredictionResult, fits: Sequence[CandidateFit]) -> CandidateFit | None:
    source = _SOURCES[result.cell_from]
    return next((f for f in fits if f.source == source and f.phase.name == result.phase), None)


def _decimals(ends: Interval) -> int:
    return max(1 - int(np.floor(np.log10(max(ends.high - ends.low, 1e-9)))), 0)


def _refined_summary(profile: PredictedProfile) -> dict[str, object] | None:
    best = profile.fit
    if best is None:
        return None
    phase = profile.phases[best.phase]
    columns = {name: CELL_PARAMETERS.index(name) for name in phase.lattice.free_parameters}
    return {
        "phase": phase,
        "cell": {n: with_uncertainty(best.cell[k], best.su[k]) for n, k in columns.items()},
        "fit": best.pattern_fit,
        "agrees": phase.name == profile.result().phase,
        "intensities": best.intensities,
    }


def _joint_texts(profile: PredictedProfile) -> dict[str, str]:
    phase = profile.together.decides if profile.together else None
    return {} if phase is None else cell_texts(phase)


def _parameter_groups(fit: CandidateFit) -> list[tuple[list[str], float, bool]]:
    """Return groups of equal parameters, their value, and whether it is free: free ones first."""
    lattice = fit.phase.lattice
    names: dict[str | float, list[str]] = {name: [name] for name in lattice.free_parameters}
    for name, source in lattice.tied:
        names.setdefault(source, []).append(name)
    return [
        (group, float(fit.cell[CELL_PARAMETERS.index(group[0])]), isinstance(source, str))
        for source, group in names.items()
    ]


def collect_evidence(
    profile: PredictedProfile, fits: Sequence[CandidateFit], places: Sequence[Misfit]
) -> dict[str, object]:
    """Return the evidence for and against a prediction, which the page puts in words.

    ``fits`` are those of the refined, the predicted and the library's cells, ``places`` the misfits
    of the best of them.
    """
    result = profile.result()
    phase, cell = _phase_of(profile, result.phase), result.cell.to_array()
    judged = _decided(result, fits)
    library = [fit for fit in fits if fit.source == "library"]
    rivals = [
        (fit.pattern_fit.rwp, fit) for fit in library if fit.pattern_fit and fit.phase != phase
    ]
    rwp, rival = min(rivals, key=lambda pair: pair[0], default=(np.inf, None))
    pattern_fit = judged.pattern_fit if judged else None
    explained = explained_fraction(pattern_fit) if pattern_fit else None
    share = explained or 0.0
    ranges = profile.campaign.parameter_ranges(profile.phases.index(phase))
    values = dict(zip(CELL_PARAMETERS, cell.tolist(), strict=True))
    return {
        "confident": result.probability >= CONFIDENT and not result.not_determined,
        "library": library[0] if library else None,
        # The library's cell minus the decided one.
        "difference": {
            name: float(library[0].cell[k] - cell[k])
            for k, name in enumerate(CELL_PARAMETERS)
            if judged and library and name in phase.lattice.free_parameters
        },
        "explained": explained,
        "grade": "good" if share >= WELL else "care" if share >= PARTLY else "against",
        "rwp": pattern_fit.rwp if pattern_fit else None,
        "rival": rival,  # the best fit of another phase
        "fits_best": pattern_fit is not None and pattern_fit.rwp <= rwp,
        "n_places": len(places),
        "n_foreign": sum(not place.hkl for place in places),
        "ranges": ranges if judged else {},  # of training
        "is_inside": all(
            any(low <= values[name] <= high for low, high in of_name)
            for name, of_name in ranges.items()
        ),
    }
