"""The result of a prediction: plain values, the same for commands, report, service and Python.

Computation happens on arrays; what leaves it is a :class:`PredictionResult`. JSON is written by
:func:`to_json` alone, and :func:`json_schema` describes it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, NamedTuple, TextIO, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, JsonValue, TypeAdapter, computed_field

from bragg_data.crystallography.cell import CELL_PARAMETERS
from pipelines.cli.style import UNITS

SCHEMA_FILE = "docs/reference/prediction-result.schema.json"
"""The published schema, relative to the root of the repository."""


@dataclass(frozen=True)
class Cell:
    """Cell parameters: a, b, c in ångström; alpha, beta, gamma in degrees. Null: not predicted."""

    a: float | None
    b: float | None
    c: float | None
    alpha: float | None
    beta: float | None
    gamma: float | None

    @classmethod
    def from_array(cls, values: ArrayLike) -> Cell:
        """Return the cell of an array of shape (6,), where NaN stands for no value."""
        array = np.asarray(values, dtype=np.float64)
        return cls(*(float(value) if np.isfinite(value) else None for value in array))

    def to_array(self) -> NDArray[np.float64]:
        """Return an array of shape (6,), NaN where there is no value."""
        return np.array(list(self.values().values()), dtype=np.float64)

    def values(self) -> dict[str, float | None]:
        """Return the parameters by their names."""
        return {name: getattr(self, name) for name in CELL_PARAMETERS}


class Interval(NamedTuple):
    """The ends of an interval, in the unit of its parameter."""

    low: float
    high: float


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
class PredictionResult:
    """Crystal system and cell of one measured profile, and what supports them."""

    crystal_system: str
    phase: str
    probabilities: Annotated[
        Mapping[str, float], Field(description="Of each phase of the model's campaign.")
    ]
    cell: Cell
    model: Annotated[str, Field(description="Address of the model version.")]
    file: str | None = None
    bank: int | None = None
    warnings: tuple[str, ...] = ()
    interval_estimates: Annotated[Intervals | None, Field(exclude=True)] = None
    acceptance: Acceptance = Acceptance()
    library_match: LibraryMatch | None = None
    refined: Refinement | None = None

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
        """Probability of the predicted phase."""
        return max(self.probabilities.values())

    @property
    def name(self) -> str:
        """File and bank."""
        return f"{self.file}" + ("" if self.bank is None else f", bank {self.bank}")

    def _repr_html_(self) -> str:
        """Return tables, as notebooks show them."""
        from pipelines.prediction.render import html_from_result

        return html_from_result(self)


@cache
def _adapter() -> TypeAdapter[PredictionResult]:
    return TypeAdapter(PredictionResult)


def to_json(result: PredictionResult) -> dict[str, JsonValue]:
    """Return a result as plain JSON values, described by :func:`json_schema`."""
    # Through the text: it is there that NaN becomes null.
    document = json.loads(_adapter().dump_json(result))
    if document["library_match"] is not None:
        document["library_match"] = _with_best(document["library_match"])
    if document["refined"] is not None:
        refined = document["refined"]
        for candidate in refined["candidates"]:
            # deprecated: the parameters among the other keys, and others_su
            candidate |= {**candidate["parameters"], "others_su": candidate["parameters_su"]}
        document["refined"] = _with_best(refined)
    return cast("dict[str, JsonValue]", document)


def _with_best(document: dict[str, JsonValue]) -> dict[str, JsonValue]:
    candidates = cast("list[dict[str, JsonValue]]", document["candidates"])
    return {**candidates[0], **document}


def json_schema() -> dict[str, JsonValue]:
    """Return the JSON schema of what :func:`to_json` writes."""
    schema = _adapter().json_schema(mode="serialization")
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


def schema_text() -> str:
    """Return the text of :data:`SCHEMA_FILE`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def table_row(result: PredictionResult) -> dict[str, str | float | int | bool | None]:
    """Return a result as a row of a table for spreadsheets, with units in the column names."""
    row: dict[str, str | float | int | bool | None] = {
        "file": result.file,
        "bank": result.bank,
        "crystal system": result.crystal_system,
        "phase": result.phase,
        "probability": result.probability,
        **_cell_columns("", result.cell),
    }
    if result.library_match is not None:
        best = result.library_match.candidates[0]
        row |= {
            "library crystal system": best.crystal_system,
            "library correlation": best.correlation,
            **_cell_columns("library ", best.cell),
        }
    for name, interval in (result.intervals or {}).items():
        low, high = interval or (None, None)
        row |= {f"{name} low ({UNITS[name]})": low, f"{name} high ({UNITS[name]})": high}
    if result.accepted is not None:
        row["accepted"] = result.accepted
    return row | {"model": result.model, "warnings": " ".join(result.warnings)}


def _cell_columns(prefix: str, cell: Cell) -> dict[str, float | None]:
    return {f"{prefix}{name} ({UNITS[name]})": value for name, value in cell.values().items()}


def write_csv(results: Sequence[PredictionResult], stream: TextIO) -> None:
    """Write results as comma-separated values, a row for each (:func:`table_row`)."""
    rows = [table_row(result) for result in results]
    longest = max(range(len(rows)), key=lambda row: len(rows[row]), default=0)
    names = list(rows[longest]) if rows else []
    names += dict.fromkeys(name for row in rows for name in row if name not in names)
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
