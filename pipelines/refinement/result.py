"""The result of a joint refinement: plain values, the same for commands, report and Python.

JSON is written by :func:`to_json` alone, and :func:`json_schema` describes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Self, cast

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.refinement.result import RefinementError
from pipelines.cli.style import finite_or_null

if TYPE_CHECKING:
    import xarray as xr

    from bragg_data.handover.export import Written
    from bragg_data.refinement.joint_result import JointResult, RefinedBank, RefinedPhaseResult
    from pipelines.refinement.inputs import Sample

_SCHEMA = "joint-refinement.schema.json"
_DIGITS = 8  # of numbers


@dataclass(frozen=True)
class Cell:
    """Cell parameters: a, b, c in ångström; alpha, beta, gamma in degrees. Null: not determined."""

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

    def to_array(self) -> Array:
        """Return an array of shape (6,), NaN where there is no value."""
        return np.array(list(self.values().values()), dtype=np.float64)

    def values(self) -> dict[str, float | None]:
        """Return the parameters by their names."""
        return {name: getattr(self, name) for name in CELL_PARAMETERS}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RefinedValue(_Frozen):
    """A refined value."""

    value: float | None
    su: Annotated[float | None, Field(description="Standard uncertainty.")]


class JointPhase(_Frozen):
    """A phase, refined against all banks."""

    name: Annotated[str, Field(description="Of the CIF's file or block, or of the campaign.")]
    space_group: Annotated[str, Field(description="Hermann-Mauguin symbol.")]
    free_parameters: Annotated[tuple[str, ...], Field(description="Cell parameters left free.")]
    cell: Annotated[Cell | None, Field(description="null of a phase that was not found.")]
    su: Annotated[
        Cell | None,
        Field(
            description="Standard uncertainties of the measurement (Å, degrees), scaled by misfit "
            "and serial correlation; 0 where symmetry fixes a value."
        ),
    ]
    su_calibration: Annotated[
        Cell | None,
        Field(
            description="Standard uncertainties of the instrument's calibration (Å, degrees), to "
            "be added in quadrature."
        ),
    ]
    weight_percent: Annotated[
        float | None, Field(description="Of the sample's phases; null of what holds it (--can).")
    ]
    su_weight_percent: Annotated[
        float | None, Field(description="Standard uncertainty, of the measurement; 0 of one phase.")
    ]
    u_iso: Annotated[
        Mapping[str, float | None], Field(description="Isotropic displacement parameters (Å²).")
    ]
    parameters: Annotated[
        Mapping[str, RefinedValue],
        Field(
            description="Of the sample: 1/size (1/µm), microstrain (1e-6), shifts along free "
            "coordinates (Å); where the data show them extinction, absorption and March's ratio "
            "of a preferred orientation."
        ),
    ]

    alternatives: Annotated[
        tuple[str, ...],
        Field(
            description="Other structures that explain nearly as much, where phases are identified."
        ),
    ] = ()


class JointBank(_Frozen):
    """A bank of a joint refinement."""

    bank: Annotated[int, Field(description="Number in the file, otherwise of the instrument.")]
    two_theta: Annotated[float, Field(description="Scattering angle (degrees).")]
    d_min: Annotated[float | None, Field(description="Shortest refined d-spacing (Å).")]
    d_max: Annotated[float | None, Field(description="Longest refined d-spacing (Å).")]
    points: int
    rwp: Annotated[float | None, Field(description="Weighted profile R factor, a fraction.")]
    background_terms: int
    difc_offset: Annotated[
        float | None, Field(description="Relative error of difC that was found; 0 of one bank.")
    ]
    su_difc_offset: Annotated[
        float | None, Field(description="Its standard uncertainty; 0 where it was not refined.")
    ]
    signal: Annotated[
        float | None, Field(description="Mean of the calculated profile above the background.")
    ] = None


class JointRefinement(_Frozen):
    """Known structures, refined against all banks of one sample at once."""

    files: tuple[str, ...]
    banks: Annotated[tuple[int, ...], Field(description="Numbers of the banks.")]
    phases: tuple[JointPhase, ...]
    rwp: Annotated[
        float | None, Field(description="Weighted profile R factor of all banks, a fraction.")
    ]
    reduced_chi2: float | None
    explained: Annotated[
        float | None, Field(description="Fraction of the signal above the background.")
    ]
    accepted: Annotated[bool, Field(description="Whether the phases explain the profiles.")]
    reasons: Annotated[tuple[str, ...], Field(description="Why not; empty if accepted.")]
    converged: Annotated[bool, Field(description="Whether the gradient test was passed.")]
    unexplained_lines: Annotated[
        tuple[float, ...], Field(description="d-spacings (Å) of lines that no phase explains.")
    ]
    at_bounds: Annotated[tuple[str, ...], Field(description="Parameters at an end of their range.")]
    remarks: Annotated[
        tuple[str, ...], Field(description="Phases not found, banks that disagree, in sentences.")
    ]
    warnings: Annotated[tuple[str, ...], Field(description="Of files, calibration and CIFs.")]
    points: Annotated[int, Field(description="Of all banks.")]
    parameters: Annotated[int, Field(description="Number of refined values, background included.")]
    of_banks: tuple[JointBank, ...]
    seconds: Annotated[float, Field(description="Time of the refinement (s).")]
    calibration: Annotated[
        tuple[str, ...], Field(description="How well each bank's calibration is known, and why.")
    ]

    _fit: JointResult | None = PrivateAttr(default=None)  # no part of the JSON

    def with_fit(self, fit: JointResult) -> Self:
        """Return the result with the arrays of its fit."""
        result = self.model_copy()
        result._fit = fit
        return result

    @property
    def fit(self) -> JointResult:
        """The fit with its arrays: sites, scales, curves. Raises a RefinementError without one."""
        if self._fit is None:
            raise RefinementError(
                "This result has no arrays: it was read from JSON, or is a frame of a series or a "
                "part of a prediction. Refine the file by itself."
            )
        return self._fit

    @property
    def profiles(self) -> dict[int, xr.Dataset]:
        """Measured and calculated profiles over time of flight (µs), by the number of the bank.

        With d-spacings in Å as a coordinate. Errors are those of :attr:`fit`.
        """
        import xarray as xr

        from bragg_data.handover.curves import UNITS, curves

        profiles = {}
        for bank in self.fit.banks:
            columns = {name: ("tof", values) for name, values in curves(bank).items()}
            dataset = xr.Dataset(columns).set_coords(["tof", "d"])
            for name, unit in UNITS.items():
                dataset[name].attrs["units"] = unit
            profiles[bank.bank.number] = dataset.assign_attrs(rwp=bank.rwp)
        return profiles

    def export(self, file: str | Path, gsas2_path: str | Path | None = None) -> Written:
        """Write the refinement for another program, in the format of the suffix.

        Returns the files that were written, and sentences on what the program calculates
        differently. ``gsas2_path`` is the directory of the package GSASII, where it cannot be
        imported otherwise. Raises a HandoverError for an unknown suffix, a Gsas2Error where there
        is no GSAS-II, and the error of :attr:`fit`.
        """
        from bragg_data.handover.export import Refinement, export

        location = None if gsas2_path is None else str(gsas2_path)
        return export(Refinement(self.fit, self.calibration, location), Path(file))


def to_json(result: JointRefinement) -> dict[str, JsonValue]:
    """Return a result as plain JSON values, described by :func:`json_schema`."""
    return cast("dict[str, JsonValue]", finite_or_null(result.model_dump()))


def json_schema() -> dict[str, JsonValue]:
    """Return the JSON schema of what :func:`to_json` writes, as it is published."""
    schema = JointRefinement.model_json_schema(mode="serialization")
    identity = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": _SCHEMA}
    return cast("dict[str, JsonValue]", identity | schema)


def joint_refinement(
    sample: Sample,
    fit: JointResult,
    assumptions: Sequence[str] = (),
    alternatives: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> JointRefinement:
    """Return the plain values of a sample's refinement, null where something is not determined.

    ``assumptions`` are sentences on how its structures were read, ``alternatives`` the structures
    that a phase is hard to tell from, by its name.
    """
    return JointRefinement(
        files=tuple(str(file) for file in sample.files),
        banks=tuple(bank.bank.number for bank in fit.banks),
        phases=tuple(_phase(p, alternatives.get(p.name, ())) for p in fit.phases),
        rwp=_number(fit.rwp),
        reduced_chi2=_number(fit.reduced_chi2),
        explained=_number(fit.explained),
        accepted=fit.accepted,
        reasons=fit.reasons,
        converged=fit.converged,
        unexplained_lines=tuple(round(d, 4) for d in fit.unexplained_lines),
        at_bounds=fit.at_bounds,
        remarks=fit.remarks,
        warnings=(*assumptions, *sample.warnings),
        points=fit.n_points,
        parameters=fit.n_parameters,
        of_banks=tuple(_bank(bank) for bank in fit.banks),
        seconds=round(fit.seconds, 4),
        calibration=sample.explanations,
    )


def _bank(bank: RefinedBank) -> JointBank:
    measured = bank.bank
    return JointBank(
        bank=measured.number,
        two_theta=measured.instrument.two_theta,
        d_min=_number(float(measured.d.min())),
        d_max=_number(float(measured.d.max())),
        points=len(measured.tof),
        rwp=_number(bank.rwp),
        background_terms=bank.terms,
        difc_offset=_number(bank.offset),
        su_difc_offset=_number(bank.su_offset),
        signal=_number(float((bank.calculated - bank.background).mean())),
    )


def _phase(phase: RefinedPhaseResult, alternatives: tuple[str, ...]) -> JointPhase:
    def by_name(values: Array) -> Cell | None:
        return Cell(*map(_number, values.tolist())) if phase.present else None

    return JointPhase(
        name=phase.name,
        space_group=phase.space_group,
        free_parameters=phase.free_parameters,
        cell=by_name(phase.cell),
        su=by_name(phase.su),
        su_calibration=by_name(phase.su_calibration),
        weight_percent=_number(phase.weight_percent),
        su_weight_percent=_number(phase.su_weight_percent),
        u_iso={site: _number(value) for site, value in phase.u_iso.items()},
        parameters={
            name: RefinedValue(value=_number(value), su=_number(su))
            for name, (value, su) in phase.parameters.items()
        },
        alternatives=alternatives,
    )


def _number(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
