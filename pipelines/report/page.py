"""The report: answers as one self-contained page that a beamline scientist can read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, cell_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.linear_fit import explained_fraction
from bragg_models.predictors import Predictor
from pipelines.cli.style import SYMBOLS, SYSTEM_COLORS, UNITS
from pipelines.prediction.predict import Answer, with_uncertainty
from pipelines.report.charts import TofAxis, chart_data, draw_chart, small_pictures, tick_label
from pipelines.report.fits import Fit, Misfit, fits_of, misfits, runner_up
from pipelines.report.numbers import fixed, grouped, miller, probability, significant, space_group

MOST_ANSWERS = 20
"""Answers on one page."""

SURE = 0.95
"""Probability from which a model counts as sure."""

WELL, PARTLY = 0.9, 0.5
"""Shares of the weighted signal above the background, from which a pattern explains the peaks."""

_LISTED, _FOREIGN = 12, 4  # places on the page, and of those without a reflection so many more
_HERE = Path(__file__).parent


def report(
    answers: Sequence[Answer], predictor: Predictor, version_uri: str, *, total: int | None = None
) -> str:
    """Return answers as a page of HTML that needs nothing beside itself.

    Parameters
    ----------
    answers
        At least one; of more than :data:`MOST_ANSWERS` the first ones are shown, which the page
        says.
    predictor, version_uri
        The model that gave them, and its address.
    total
        How many answers there are, if these are only the first of them.
    """
    shown = answers[:MOST_ANSWERS]
    sections = [
        _section(number, answer, fits, predictor)
        for number, (answer, fits) in enumerate(
            zip(shown, fits_of(shown, predictor.campaign), strict=True), start=1
        )
    ]
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    return _environment().get_template("report.html").render(
        sections=sections,
        total=total or len(answers),
        predictor=predictor,
        uri=version_uri,
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # Only this script may run: whatever a file's header says, it is no program.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colors={s.name: (c, _lightened(c)) for s, c in SYSTEM_COLORS.items()},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        bragg=metadata.version("bragg"),
        units=UNITS,
    )  # fmt: skip


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "fixed": fixed, "grouped": grouped, "probability": probability, "significant": significant,
        "symbol": lambda name: Markup(f'<i class="symbol">{SYMBOLS[name]}</i>'),
        "miller": miller, "tick": tick_label,
    }  # fmt: skip
    return environment


def _lightened(color: str) -> str:
    """Return a colour with as much white as a dark page needs."""
    rgb = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    for white in np.linspace(0, 1, 21):
        mixed = rgb + (1 - rgb) * white
        linear = np.where(mixed <= 0.04045, mixed / 12.92, ((mixed + 0.055) / 1.055) ** 2.4)
        if linear @ (0.2126, 0.7152, 0.0722) > 0.28:
            break
    return "#" + "".join(f"{round(255 * v):02x}" for v in mixed)


# ---- a section of the page ---------------------------------------------------------------------


def _section(
    number: int, answer: Answer, fits: Sequence[Fit], predictor: Predictor
) -> dict[str, Any]:
    campaign = predictor.campaign
    own = next((f for f in fits if f.source == "model"), None)
    shown = next((f for f in fits if f.overlay is not None), None)
    places = misfits(shown, answer.measurement.gridded, campaign) if shown else []
    # A peak that the cell has not says more than a strong one of its own.
    listed = places[:_LISTED] + [p for p in places[_LISTED:] if not p.hkl][:_FOREIGN]
    second = runner_up(answer, fits)
    axis = TofAxis.of(answer.measurement, campaign)
    return {
        "id": f"answer-{number}",
        "name": Path(answer.measurement.profile.source).name,
        "told": answer.to_json(),
        "lattice": _lattice(answer.phase, answer.cell),
        "space_group": space_group(answer.phase.space_group),
        "refined": _refined(answer),
        "volume": float(cell_volume(answer.cell[None])[0]) if own else None,
        "axial_ratio": float(answer.cell[2] / answer.cell[0])
        if own and {"a", "c"} <= set(answer.phase.lattice.free_parameters) else None,
        "probabilities": _probabilities(answer),
        "own": own,
        "shown": shown,
        "fits": [
            {"fit": f, "lattice": _lattice(f.phase, f.cell), "second": f is second,
             "space_group": space_group(f.phase.space_group)}
            for f in fits
        ],
        "second": second,
        "evidence": _evidence(
            answer, fits, places if shown and shown.source != "library" else [], campaign
        ),
        "places": [(place, float(axis.of_file(place.tof))) for place in listed],
        "more_places": len(places) - len(listed),
        "chart": draw_chart(answer.measurement, shown, listed, axis),
        "data": chart_data(answer.measurement, fits, listed, axis),
        **small_pictures(answer.measurement, axis),
        "measurement": answer.measurement,
        "sha256": _sha256(Path(answer.measurement.profile.source)),
    }  # fmt: skip


def _refined(answer: Answer) -> dict[str, Any] | None:
    """Return the best refinement for the template: its free parameters with uncertainties."""
    if not answer.refined:
        return None
    best = answer.refined[0]
    phase = answer.phases[best.phase]
    index = {name: CELL_PARAMETERS.index(name) for name in phase.lattice.free_parameters}
    return {
        "phase": phase,
        "cell": {n: with_uncertainty(best.cell[k], best.su[k]) for n, k in index.items()},
        "rwp": best.pattern_fit.rwp,
        "reduced_chi2": best.pattern_fit.reduced_chi2,
        "agrees": phase == answer.phase,
        "intensities": best.intensities,
    }


def _lattice(phase: Phase, cell: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return groups of equal parameters: their names, value, and whether symmetry fixes it."""
    groups: dict[str | float, dict[str, Any]] = {
        name: {"names": [name], "value": float(cell[CELL_PARAMETERS.index(name)]), "free": True}
        for name in phase.lattice.free_parameters
    }
    for name, source in phase.lattice.tied:
        value = float(cell[CELL_PARAMETERS.index(name)])
        group = groups.setdefault(source, {"names": [], "value": value, "free": False})
        group["names"].append(name)
    return list(groups.values())


def _probabilities(answer: Answer) -> list[tuple[Phase, float]]:
    values = answer.prediction.probabilities[answer.row]
    return [(answer.phases[k], float(values[k])) for k in np.argsort(-values, kind="stable")]


def _evidence(
    answer: Answer, fits: Sequence[Fit], places: Sequence[Misfit], campaign: Campaign
) -> dict[str, Any]:
    """Return what speaks for and against an answer, for the template to put in words."""
    own = next((f for f in fits if f.source == "model"), None)
    # A refinement shows what the answer comes to, where there is one.
    judged = next((f for f in fits if f.source != "library" and f.overlay), own)
    library = [f for f in fits if f.source == "library"]
    rivals = [(f.overlay.rwp, f) for f in library if f.overlay and f.phase != answer.phase]
    rwp, rival = min(rivals, key=lambda pair: pair[0], default=(np.inf, None))
    overlay = judged.overlay if judged else None
    explained = explained_fraction(overlay) if overlay else None
    ranges = _training_ranges(answer, campaign) if own else []
    return {
        "sure": float(answer.prediction.probabilities[answer.row].max()) >= SURE,
        "best": library[0] if library else None,
        "apart": {
            name: float(library[0].cell[k] - answer.cell[k])
            for k, name in enumerate(CELL_PARAMETERS)
            if own and library and name in answer.phase.lattice.free_parameters
        },
        "explained": explained,
        "explains": "good" if explained is not None and explained >= WELL
        else "care" if explained is not None and explained >= PARTLY else "against",
        "rival": rival,
        "better": overlay is not None and overlay.rwp <= rwp,
        "places": len(places),
        "foreign": sum(not place.hkl for place in places),
        "ranges": ranges,
        "inside": all(
            any(low <= value <= high for low, high in spans) for _, value, spans in ranges
        ),
    }  # fmt: skip


def _training_ranges(
    answer: Answer, campaign: Campaign
) -> list[tuple[str, float, list[tuple[float, float]]]]:
    """Return name, answered value and ranges of training of each free parameter."""
    phase = campaign.definition["phases"][int(answer.prediction.phase[answer.row])]
    return [
        (
            name,
            float(answer.cell[CELL_PARAMETERS.index(name)]),
            [(float(r["low"] or r["first"]), float(r["high"] or r["last"])) for r in ranges],
        )
        for name, ranges in phase["cell"].items()
    ]


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # moved since it was read
        return None
