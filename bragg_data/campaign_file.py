"""The schema of a campaign file (TOML), which :mod:`bragg_data.campaign` resolves."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)


class CampaignError(ValueError):
    """A campaign file, or a list of cells, that cannot be simulated."""


class Table(BaseModel):
    """A table of the file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Table):
    """A grid (first, last, step; both ends included) or a continuous interval (low, high)."""

    first: Decimal | None = None
    last: Decimal | None = None
    step: Annotated[Decimal, Field(gt=0)] | None = None
    low: Decimal | None = None
    high: Decimal | None = None

    @model_validator(mode="after")
    def _check(self) -> Range:
        grid = (self.first, self.last, self.step)
        interval = (self.low, self.high)
        if None not in grid and interval == (None, None):
            first, last, step = self.grid
            if last < first:
                raise ValueError(f"a range ends ({last}) before it begins ({first})")
            if (last - first) % step:
                raise ValueError(f"{last} is not a whole number of steps of {step} from {first}")
        elif None not in interval and grid == (None, None, None):
            low, high = self.interval
            if high < low:
                raise ValueError(f"an interval ends ({high}) before it begins ({low})")
        else:
            raise ValueError("a range is either {first, last, step} or {low, high}")
        return self

    @property
    def is_grid(self) -> bool:
        """Whether it is a grid, not an interval."""
        return self.first is not None

    @property
    def grid(self) -> tuple[Decimal, Decimal, Decimal]:
        """first, last and step of a grid."""
        return self.first or Decimal(0), self.last or Decimal(0), self.step or Decimal(1)

    @property
    def interval(self) -> tuple[Decimal, Decimal]:
        """Low and high of an interval."""
        return self.low or Decimal(0), self.high or Decimal(0)

    def values(self) -> NDArray[np.float64]:
        """Return all points of a grid: decimals are exact, so rounding never moves its end."""
        first, last, step = self.grid
        count = int((last - first) / step) + 1
        return np.array([float(first + step * i) for i in range(count)])


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


class PhaseTable(Table):
    """One ``[[phases]]``: a structure, and the cells to be simulated.

    Attributes
    ----------
    name
        Name of the phase in this campaign.
    cif
        Its CIF file, relative to the campaign file.
    cell
        Ranges of each free cell parameter (a, b, c in ångström; alpha, beta, gamma in degrees).
    exclude
        Rules such as ``a = c``: cells that meet one are left out.
    samples
        Number of cells, with Sobol sampling.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")]
    cif: str
    cell: dict[str, Annotated[tuple[Range, ...], BeforeValidator(_as_list), Field(min_length=1)]]
    exclude: tuple[str, ...] = ()
    samples: Annotated[int, Field(gt=0)] | None = None


class InstrumentTable(Table):
    """``[instrument]``: a bank of a ``.instprm`` file, relative to the campaign file."""

    file: str
    bank: int | None = None


class TofTable(Table):
    """``[tof]``: the grid of the patterns, T_i = start · exp(relative_step · i), start in µs."""

    start: Annotated[Decimal, Field(gt=0)]
    relative_step: Annotated[Decimal, Field(gt=0)]
    points: Annotated[int, Field(ge=64, le=100_000)]


class BroadeningTable(Table):
    """``[broadening]``: isotropic Lorentzian crystallite size in µm and microstrain in 1e-6."""

    size: Annotated[Decimal, Field(gt=0)] = Decimal("1.0")
    microstrain: Annotated[Decimal, Field(ge=0)] = Decimal("1000.0")


class RowsPerChunk(Table):
    """``[rows_per_chunk]``: patterns per chunk, which is the unit of work, by simulator."""

    kinematic: Annotated[int, Field(gt=0)] = 512
    gsas2: Annotated[int, Field(gt=0)] = 16


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Spread = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Ends = Annotated[
    tuple[_Positive, _Positive],
    AfterValidator(lambda ends: ends if ends[0] <= ends[1] else _refuse("low is above high")),
]


def _refuse(reason: str) -> Any:
    raise ValueError(reason)


class MeasurementEffectsTable(Table):
    """``[measurement_effects]``: ranges for domain randomisation; the default where left out.

    See :class:`bragg_data.simulation.measurement_effects.MeasurementEffects` for each range.
    """

    u_scale: _Ends | None = None
    shift: _Spread | None = None
    size: _Ends | None = None
    microstrain: _Ends | None = None
    counts: _Ends | None = None
    background: _Ends | None = None
    spectrum: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    spectrum_error: _Spread | None = None
    signal_end: _Ends | None = None
    end: _Ends | None = None  # deprecated: µs, for signal_end
    signal_start: Annotated[
        _Share | None, Field(validation_alias=AliasChoices("signal_start", "begin"))  # deprecated
    ] = None
    impurity: _Share | None = None
    impurity_probability: Annotated[
        _Share | None,
        Field(validation_alias=AliasChoices("impurity_probability", "impure")),  # deprecated
    ] = None
    difc: _Spread | None = None
    tzero: _Spread | None = None


class CampaignFile(Table):
    """The schema of a campaign file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    seed: int
    sampling: Literal["grid", "sobol"] = "grid"
    instrument: InstrumentTable
    tof: TofTable
    broadening: BroadeningTable = BroadeningTable()
    rows_per_chunk: RowsPerChunk = RowsPerChunk()
    measurement_effects: Annotated[
        MeasurementEffectsTable,
        Field(validation_alias=AliasChoices("measurement_effects", "nuisance")),  # deprecated
    ] = MeasurementEffectsTable()
    phases: Annotated[tuple[PhaseTable, ...], Field(min_length=1, max_length=127)]

    @model_validator(mode="after")
    def _phases_fit_sampling(self) -> CampaignFile:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError("two phases have the same name")
        if self.measurement_effects.end and self.measurement_effects.signal_end:  # deprecated end
            raise ValueError("measurement_effects: give signal_end or end, not both")  # deprecated
        for phase in self.phases:
            grid = all(r.is_grid for ranges in phase.cell.values() for r in ranges)
            interval = all(not r.is_grid for ranges in phase.cell.values() for r in ranges)
            if self.sampling == "grid" and not (grid and phase.samples is None):
                raise ValueError(
                    f"phase '{phase.name}': grid sampling takes ranges of first, last and step, "
                    f"and no number of samples"
                )
            if self.sampling == "sobol" and not (interval and phase.samples is not None):
                raise ValueError(
                    f"phase '{phase.name}': sobol sampling takes intervals of low and high, "
                    f"and the number of samples"
                )
        return self


def parse_campaign_file(toml: str) -> CampaignFile:
    """Return the content of a campaign file.

    Raises
    ------
    CampaignError
        If the text is not valid TOML, or breaks the schema; the first wrong place is named.
    """
    try:
        # Decimals keep 0.001 exact, so that grids are built from integers.
        return CampaignFile.model_validate(tomllib.loads(toml, parse_float=Decimal))
    except tomllib.TOMLDecodeError as error:
        raise CampaignError(f"The campaign file is not valid TOML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise CampaignError(f"The campaign file is wrong at {place}: {reason}.") from error
