"""The result of a prediction: plain values, the same for commands, report, service and Python.

Computation happens on arrays; what leaves it is a :class:`PredictionResult`. JSON is written by
:func:`to_json` alone, and :func:`json_schema` describes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Annotated, NamedTuple, cast

import numpy as np
from pydantic import Field, JsonValue, TypeAdapter, computed_field

from pipelines.cli.style import UNITS, finite_or_null, with_uncertainty
from pipelines.prediction.combined_result import CombinedBanks
from pipelines.refinement.result import Cell as Cell
from pipelines.refinement.result import JointRefinement


class Interval(NamedTuple):
    """The ends of an interval, in the unit of its parameter."""

    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """90 % intervals of the free cell parameters.

    Attributes
    ----------
    ends
        By parameter; None where the interval is as wide as the campaign's range.
    not_determined
        Reasons, by the parameters whose ends are None.
    """

    ends: Mapping[str, Interval | None]
    not_determined: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LibraryCandidate:
    """The stored pattern of one phase that correlates best with the profile."""

    crystal_system: str
    phase: str
    correlation: Annotated[float, Field(description="Of the square roots, at most 1.")]
    cell: Cell


@dataclass(frozen=True)
class LibraryMatch:
    """The most similar stored patterns. JSON repeats the first candidate's values here."""

    snapshot: Annotated[str, Field(description="Tag of the snapshot that was searched.")]
    candidates: Annotated[
        tuple[LibraryCandidate, ...], Field(description="One per phase, the best first.")
    ]


@dataclass(frozen=True)
class RefinedPhase:
    """The refined structure of one phase."""

    crystal_system: str
    phase: str
    cell: Cell
    su: Annotated[
        Cell, Field(description="Standard uncertainties; 0 where symmetry fixes a value.")
    ]
    free_parameters: Annotated[tuple[str, ...], Field(description="Cell parameters left free.")]
    rwp: Annotated[float, Field(description="Weighted profile R factor R_wp.")]
    reduced_chi2: float
    parameters: Annotated[
        Mapping[str, float],
        Field(
            description="u_scale (factor on the displacement parameters), size (µm), microstrain "
            "(1e-6), tzero (µs), and shift_1 … (Å) along the free coordinates."
        ),
    ]
    parameters_su: Annotated[Mapping[str, float], Field(description="Standard uncertainties.")]
    explained: Annotated[
        float, Field(description="Fraction of the signal above the background that is explained.")
    ]
    intensities: Annotated[
        str,
        Field(
            description="structure: calculated from the atoms; free: every reflection has an "
            "intensity of its own."
        ),
    ]
    converged: bool
    probability: Annotated[float | None, Field(description="By refinements alone.")] = None
    interval_estimates: Annotated[Intervals | None, Field(exclude=True)] = None


@dataclass(frozen=True)
class Refinement:
    """Refined phases. JSON repeats the first candidate's values here."""

    candidates: Annotated[
        tuple[RefinedPhase, ...], Field(description="The most plausible phase first.")
    ]

    @property
    def best(self) -> RefinedPhase:
        """The most plausible phase."""
        return self.candidates[0]


@dataclass(frozen=True)
class Acceptance:
    """Whether the sample can be one of the model's phases at all."""

    accepted: Annotated[
        bool | None, Field(description="null from a model that cannot judge it, if not refined.")
    ] = None
    reasons: Annotated[
        tuple[str, ...] | None, Field(description="What speaks against it; empty if accepted.")
    ] = None
    unexplained: Annotated[
        float | None,
        Field(description="Fraction of the profile's squares that the predicted cell leaves."),
    ] = None
    limit: Annotated[
        float | None, Field(description="Fraction above which the model rejects a profile.")
    ] = None


@dataclass(frozen=True)
class Evidence:
    """What one source alone makes of a profile."""

    source: Annotated[str, Field(description="model, library or refinement.")]
    weight: Annotated[float, Field(description="In the decision; they add up to 1.")]
    crystal_system: str
    phase: str
    probabilities: Annotated[Mapping[str, float], Field(description="Of the phases that it knows.")]
    cell: Annotated[Cell, Field(description="Of its most probable phase.")]
    intervals: Annotated[
        Mapping[str, Interval | None] | None,
        Field(description="90 % intervals of the free cell parameters, null where not determined."),
    ] = None


@dataclass(frozen=True)
class PredictionResult:
    """Crystal system and cell of one measured profile, decided from all evidence."""

    crystal_system: str
    phase: str
    probabilities: Annotated[
        Mapping[str, float], Field(description="Of each phase of the model's campaign.")
    ]
    cell: Cell
    model: Annotated[
        str,
        Field(description="Address of the model version, models:/NAME/VERSION or packaged:NAME."),
    ]
    file: str | None = None
    bank: int | None = None
    warnings: tuple[str, ...] = ()
    interval_estimates: Annotated[Intervals | None, Field(exclude=True)] = None
    acceptance: Acceptance = Acceptance()
    library_match: LibraryMatch | None = None
    refined: Refinement | None = None
    combined: Annotated[
        CombinedBanks | None,
        Field(description="Of all banks of the sample; null where there is no other bank."),
    ] = None
    cell_from: Annotated[
        str,
        Field(
            description="Where cell and intervals are from: model, library, refinement, or joint "
            "refinement of all banks."
        ),
    ] = "model"
    evidence: Annotated[
        tuple[Evidence, ...], Field(description="Of each source, model first.")
    ] = ()
    mixture: Annotated[
        JointRefinement | None,
        Field(
            description="What the sample consists of, of the campaign's phases and structures that "
            "were given, where it is refined and no phase by itself; also where that is not all."
        ),
    ] = None
    id: Annotated[
        str | None,
        Field(description="Of this answer in a record of answers (--record), for bragg replay."),
    ] = None

    @computed_field  # type: ignore[prop-decorator] # mypy knows no decorated properties
    @property
    def intervals(self) -> dict[str, Interval | None] | None:
        """90 % intervals of the free cell parameters, null where not determined."""
        return None if self.interval_estimates is None else dict(self.interval_estimates.ends)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def not_determined(self) -> dict[str, str] | None:
        """Why the interval of a cell parameter is null."""
        estimates = self.interval_estimates
        return None if estimates is None else dict(estimates.not_determined)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accepted(self) -> bool | None:
        """Whether the sample can be one of the phases at all."""
        return self.acceptance.accepted

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reasons(self) -> list[str] | None:
        """What speaks against the sample being one of the phases."""
        reasons = self.acceptance.reasons
        return None if reasons is None else list(reasons)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def units(self) -> dict[str, str]:
        """Units of the cell parameters."""
        return UNITS

    @property
    def probability(self) -> float:
        """Probability of the decided phase."""
        return self.probabilities[self.phase]

    @property
    def name(self) -> str:
        """File and bank."""
        return f"{self.file}" if self.bank is None else f"{self.file}, bank {self.bank}"

    def _repr_html_(self) -> str:
        """Return tables, as notebooks show them."""
        parts = [f"<p><b>{escape(self.name)}</b></p>"]
        for headings, rows in tables_of(self):
            head = "".join(f"<th>{escape(text)}</th>" for text in headings)
            lines = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        notes = [escape(f"{label} {text}".strip()) for label, text in notes_on(self)]
        if notes:
            parts.append(f"<ul><li>{'</li><li>'.join(notes)}</li></ul>")
        return "".join(parts)


_ADAPTER = TypeAdapter(PredictionResult)


def to_json(result: PredictionResult) -> dict[str, JsonValue]:
    """Return a result as plain JSON values, described by :func:`json_schema`."""
    # Neither through the text nor as JSON, which hold no name of a file that is not UTF-8.
    document = finite_or_null(_ADAPTER.dump_python(result))
    for candidate in (document["refined"] or {}).get("candidates", ()):
        # deprecated: the parameters among the other keys, and others_su
        candidate |= {**candidate["parameters"], "others_su": candidate["parameters_su"]}
    for key in ("library_match", "refined"):
        if document[key] is not None:
            document[key] = {**document[key]["candidates"][0], **document[key]}
    return cast("dict[str, JsonValue]", document)


def json_schema() -> dict[str, JsonValue]:
    """Return the JSON schema of what :func:`to_json` writes, as it is published."""
    schema = _ADAPTER.json_schema(mode="serialization")
    definitions = schema["$defs"]
    number = {"type": "number", "deprecated": True}
    refined = definitions["RefinedPhase"]["properties"]
    for name in ("u_scale", "size", "microstrain", "tzero"):
        refined[name] = number | {"description": f"Use parameters.{name}."}
    refined["others_su"] = refined["parameters_su"] | {
        "description": "Use parameters_su.",
        "deprecated": True,
        "title": "Others Su",
    }
    for whole, candidate in (("LibraryMatch", "LibraryCandidate"), ("Refinement", "RefinedPhase")):
        properties = definitions[candidate]["properties"] | definitions[whole]["properties"]
        definitions[whole]["properties"] = properties
    identity = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "prediction-result.schema.json",
    }
    return cast("dict[str, JsonValue]", identity | schema)


# ---- as text -----------------------------------------------------------------------------------

NOT_DETERMINED = "not determined"
"""Instead of an interval that carries no information."""


def cell_texts(cell: Cell) -> list[str]:
    """Return the six parameters as text."""
    return [
        "–" if value is None else f"{value:.4f}" if name in "abc" else f"{value:.3f}"
        for name, value in cell.values().items()
    ]


def tables_of(result: PredictionResult) -> list[tuple[list[str], list[list[str]]]]:
    """Return headings and rows of tables: decision, model and library matches; refinements."""
    headings = ["", "crystal system", *(f"{n} ({unit})" for n, unit in UNITS.items()), "confidence"]
    parts = result.evidence if len(result.evidence) > 1 else ()
    confidence = f"p {result.probability:.3f}"
    rows = [
        [
            "decision" if parts else "model",
            result.crystal_system,
            *cell_texts(result.cell),
            confidence,
        ]
    ]
    if result.intervals:
        rows.append(_interval_row(result.intervals))
    for part in parts[:1]:
        confidence = f"p {part.probabilities[part.phase]:.3f}"
        rows.append(["model", part.crystal_system, *cell_texts(part.cell), confidence])
        if part.intervals and part.intervals != result.intervals:
            rows.append(_interval_row(part.intervals))
    for rank, match in enumerate(result.library_match.candidates if result.library_match else ()):
        label, correlation = "" if rank else "library match", f"r {match.correlation:.4f}"
        rows.append([label, match.crystal_system, *cell_texts(match.cell), correlation])
    refined = []
    for rank, fit in enumerate(result.refined.candidates if result.refined else ()):
        label = "best" if fit.intensities == "structure" else "positions alone"
        # What symmetry fixes or ties has no uncertainty of its own.
        cell, su = fit.cell.values(), fit.su.values()
        values = ", ".join(
            f"{name} {with_uncertainty(cell[name] or np.nan, su[name] or 0.0)} {UNITS[name]}"
            for name in fit.free_parameters
        )
        quality = f"{100 * fit.rwp:.2f} %", f"{fit.reduced_chi2:.2f}"
        refined.append(["" if rank else label, fit.crystal_system, values, *quality])
    of_refinement = ["refined", "crystal system", "cell", "Rwp", "χ² reduced"]
    return [(headings, rows), *([(of_refinement, refined)] if refined else [])]


def _interval_row(intervals: Mapping[str, Interval | None]) -> list[str]:
    half = {name: (ends.high - ends.low) / 2 for name, ends in intervals.items() if ends}
    texts = {n: f"±{value:{'.4f' if value >= 1e-4 else '.5f'}}" for n, value in half.items()}
    ends = {name: texts.get(name, NOT_DETERMINED) for name in intervals}
    return ["90 % interval", "", *(ends.get(name, "") for name in UNITS), ""]


def notes_on(result: PredictionResult) -> list[tuple[str, str]]:
    """Return what has to be known about a result: a label, which may be empty, and a sentence."""
    undetermined = (result.not_determined or {}).items()
    return [
        *(("", f"{name} is {NOT_DETERMINED}. {reason}") for name, reason in undetermined),
        *(("Not accepted:", reason) for reason in result.reasons or ()),
        *(("", warning) for warning in result.warnings),
    ]
