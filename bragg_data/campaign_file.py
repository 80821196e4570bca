"""The schema of a campaign file (TOML), which :mod:`bragg_data.campaign` resolves."""

import math
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

import numpy as np
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

from bragg_data.arrays import Array
from bragg_data.errors import first_line

MOST_BYTES = 500_000  # of a file; 127 phases with comments take less than half of it
_LONGEST_LINE = 1_000  # characters: TOML's parser takes the square of a key's length in memory
_MOST_SAMPLES = 3_500_000  # of all phases, before cells are excluded: they are listed in memory
_MOST_CHUNK_BYTES = 256_000_000  # every worker holds a few chunks

# In Å or degrees. Values of grids are exact in double precision up to 12 decimal places.
_Number = Annotated[Decimal, Field(ge=-1_000, le=1_000)]
_OfGrid = Annotated[Decimal, Field(ge=-1_000, le=1_000, decimal_places=12)]

_SCALE = 10**12
_MOST_EXPONENT = 40  # of ten
_LONGEST_TOF = 10_000_000  # µs; a pulse lasts 100,000 µs at the slowest source


class CampaignError(ValueError):
    """A campaign file, or a list of cells, that cannot be simulated."""


class Table(BaseModel):
    """A table of the file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Table):
    """A grid (first, last, step; both ends included) or a continuous interval (low, high)."""

    first: _OfGrid | None = None
    last: _OfGrid | None = None
    step: Annotated[_OfGrid, Field(gt=0)] | None = None
    low: _Number | None = None
    high: _Number | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
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
    def grid(self) -> tuple[Decimal, Decimal, Decimal]:
        """first, last and step of a grid."""
        return self.first or Decimal(0), self.last or Decimal(0), self.step or Decimal(1)

    @property
    def interval(self) -> tuple[Decimal, Decimal]:
        """Low and high of an interval."""
        return self.low or Decimal(0), self.high or Decimal(0)

    @property
    def ends(self) -> tuple[Decimal, Decimal]:
        """Lowest and highest value, of a grid too."""
        return self.interval if self.first is None else self.grid[:2]

    def __len__(self) -> int:
        """Return the number of points of a grid."""
        first, last, step = self.grid
        return int((last - first) / step) + 1

    def values(self) -> Array:
        """Return all points of a grid: decimals are exact, so rounding never moves its end."""
        first, _, step = (int(number * _SCALE) for number in self.grid)
        # Integers below 2^53, divided once: the floating-point numbers next to the decimals.
        return np.asarray((first + step * np.arange(len(self))) / _SCALE)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


class PhaseTable(Table):
    """One ``[[phases]]``: a structure, and the cells to be simulated."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.-]+$")]
    cif: str  # relative to the campaign file
    block: str | None = None  # the data block, of a CIF with several structures
    # Ranges of each free parameter (a, b, c in ångström; alpha, beta, gamma in degrees).
    cell: dict[str, Annotated[tuple[Range, ...], BeforeValidator(_as_list), Field(min_length=1)]]
    exclude: tuple[str, ...] = ()  # rules such as a = c: cells that meet one are left out
    samples: Annotated[int, Field(gt=0)] | None = None  # with Sobol sampling

    @property
    def n_samples(self) -> int:
        """Samples before any are excluded."""
        sizes = (sum(len(r) for r in ranges) for ranges in self.cell.values())
        return math.prod(sizes) if self.samples is None else self.samples


class InstrumentTable(Table):
    """``[instrument]``: a bank of a ``.instprm`` file, relative to the campaign file."""

    file: str
    bank: int | None = None


class TofTable(Table):
    """``[tof]``: the grid of the patterns, T_i = start · exp(relative_step · i), start in µs."""

    start: Annotated[Decimal, Field(ge=1, le=1_000_000)]
    relative_step: Annotated[Decimal, Field(ge=Decimal("1e-6"), le=Decimal("0.1"))]
    points: Annotated[int, Field(ge=64, le=100_000)]

    @model_validator(mode="after")
    def _ends(self) -> Self:
        # In logarithms: the last point itself may exceed all numbers.
        stop = math.log(self.start) + float(self.relative_step) * (self.points - 1)
        if stop > math.log(_LONGEST_TOF):
            raise ValueError(
                f"the grid ends beyond {_LONGEST_TOF:,} µs: make relative_step or points smaller"
            )
        return self


class BroadeningTable(Table):
    """``[broadening]``: isotropic Lorentzian crystallite size in µm and microstrain in 1e-6."""

    size: Annotated[Decimal, Field(ge=Decimal("1e-4"), le=1_000_000)] = Decimal("1.0")
    microstrain: Annotated[Decimal, Field(ge=0, le=1_000_000)] = Decimal("1000.0")


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


class MeasurementEffects(Table):
    """``[measurement_effects]``: ranges for domain randomisation; pairs are the ends of a range.

    They do not change the simulation. :mod:`bragg_data.simulation.measurement_effects` draws from
    them: what is *even* in the logarithm is drawn so.
    """

    # Factor on all displacement parameters, even in the logarithm: published isotropic parameters
    # of BaTiO3 differ by half (Kwei et al., J. Phys. Chem. 97 (1993) 2368, and later ones).
    u_scale: _Ends = (0.6, 1.7)
    # Standard deviation of free coordinates about the CIF's, in Å: a quarter of the titanium's
    # displacement of 0.09 Å.
    shift: _Spread = 0.02
    # In µm and 1e-6, even in the logarithm: from sintered ceramics to powders that were milled.
    size: _Ends = (0.3, 3.0)
    microstrain: _Ends = (250.0, 3000.0)
    # At the highest peak, even in the logarithm: from a minute's run to hardly any noise.
    counts: _Ends = (1500.0, 200_000.0)
    # Mean background in units of the highest peak, even in the logarithm; half of it varies
    # smoothly over the window.
    background: _Ends = (0.01, 0.5)
    # Ratio of the incident spectrum between its maximum and the window's ends, up to this; standard
    # deviation of ln ε, smooth over the window.
    spectrum: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 8.0
    spectrum_error: _Spread = 0.1
    # Where the signal ends, as a share of the window in ln T: 1 is the last point of the grid,
    # beyond it nothing is lost. On the grid of NOMAD's bank 4, whose signal ends near 17,500 µs,
    # the default is 17,200 to 19,500 µs.
    signal_end: _Ends = (0.964, 1.012)
    end: Annotated[_Ends | None, Field(repr=False)] = None  # deprecated: µs, for signal_end
    # Share of the window, in ln T, that may be missing at short times.
    signal_start: Annotated[
        _Share, Field(validation_alias=AliasChoices("signal_start", "begin"))  # deprecated
    ] = 0.1
    # Highest peak of an impurity, in units of the highest of all; share of samples that have one.
    impurity: _Share = 0.05
    impurity_probability: Annotated[
        _Share, Field(validation_alias=AliasChoices("impurity_probability", "impure"))  # deprecated
    ] = 0.2
    # Standard deviations of a calibration that has drifted: relative, and in µs. Diamond and Si on
    # NOMAD, of other cycles than their calibration, are off by 3e-4 to 1e-3.
    difc: _Spread = 3e-4
    tzero: _Spread = 1.5

    def to_json(self) -> Mapping[str, object]:
        """Return plain JSON values."""
        return self.model_dump(mode="json", exclude={"end"})


class CampaignFile(Table):
    """The schema of a campaign file."""

    name: Annotated[str, Field(max_length=100, pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    sampling: Literal["grid", "sobol"] = "grid"
    instrument: InstrumentTable
    tof: TofTable
    broadening: BroadeningTable = BroadeningTable()
    rows_per_chunk: RowsPerChunk = RowsPerChunk()
    measurement_effects: Annotated[
        MeasurementEffects,
        Field(validation_alias=AliasChoices("measurement_effects", "nuisance")),  # deprecated
    ] = MeasurementEffects()
    phases: Annotated[tuple[PhaseTable, ...], Field(min_length=1, max_length=127)]

    @model_validator(mode="after")
    def _phases_fit_sampling(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError("two phases have the same name")
        if {"end", "signal_end"} <= self.measurement_effects.model_fields_set:  # deprecated end
            raise ValueError("measurement_effects: give signal_end or end, not both")  # deprecated
        for phase in self.phases:
            grids = {r.first is not None for ranges in phase.cell.values() for r in ranges}
            if self.sampling == "grid" and (False in grids or phase.samples is not None):
                raise ValueError(
                    f"phase '{phase.name}': grid sampling takes ranges of first, last and step, "
                    f"and no number of samples"
                )
            if self.sampling == "sobol" and (True in grids or phase.samples is None):
                raise ValueError(
                    f"phase '{phase.name}': sobol sampling takes intervals of low and high, "
                    f"and the number of samples"
                )
        if (samples := sum(phase.n_samples for phase in self.phases)) > _MOST_SAMPLES:
            raise ValueError(
                f"the phases have {samples:,} samples; at most {_MOST_SAMPLES:,} fit: make "
                f"ranges shorter, steps longer, or several campaigns"
            )
        for simulator, rows in self.rows_per_chunk:
            if 4 * rows * self.tof.points > _MOST_CHUNK_BYTES:
                most = _MOST_CHUNK_BYTES // (4 * self.tof.points)
                raise ValueError(
                    f"rows_per_chunk.{simulator} is {rows:,}; a chunk of 256 MB holds {most:,} "
                    f"patterns of {self.tof.points:,} points"
                )
        return self


def _decimal(text: str) -> Decimal:
    """Keep 0.001 exact, so that grids are built from integers."""
    number = Decimal(text)
    # Beyond that, converting it to an integer may take all memory.
    if not number.is_finite() or (number and abs(number.adjusted()) > _MOST_EXPONENT):
        raise ValueError(f"{text[:40]} is no number from 1e-{_MOST_EXPONENT} to 1e{_MOST_EXPONENT}")
    return number


def parse_campaign_file(toml: str) -> CampaignFile:
    """Return the content of a campaign file.

    A text that is not valid TOML, or breaks the schema, raises a CampaignError that names the first
    wrong place.
    """
    if long := next((n for n, t in enumerate(toml.split("\n"), 1) if len(t) > _LONGEST_LINE), 0):
        raise CampaignError(
            f"The campaign file has a line of more than {_LONGEST_LINE:,} characters ({long}): "
            f"write lists on several lines."
        )
    try:
        content = tomllib.loads(toml, parse_float=_decimal)
    except RecursionError as error:
        raise CampaignError("The campaign file is not valid TOML: too deeply nested.") from error
    except (ValueError, ArithmeticError) as error:  # integers of thousands of digits, too
        raise CampaignError(f"The campaign file is not valid TOML: {first_line(error)}.") from error
    try:
        return CampaignFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise CampaignError(f"The campaign file is wrong at {place}: {reason}.") from error
