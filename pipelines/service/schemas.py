"""Requests and responses of the HTTP service; predictions are those of every other interface."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from bragg_data.measurement.readers import Unit
from pipelines.prediction.result import PredictionResult

MAX_PROFILES = 512
"""Profiles in one request, and in one batch for the model."""

MAX_FILES = 64
"""Files of one sample."""


_INSTRUMENT = "The measurement's instrument file as text: GSAS-II, GSAS (.prm, .EXP) or FullProf."


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProfilesRequest(_Request):
    """Profiles on the model's grid, without background, in any scale."""

    profiles: Annotated[
        list[Annotated[list[FiniteFloat], Field(min_length=1, max_length=100_000, fail_fast=True)]],
        Field(min_length=1, max_length=MAX_PROFILES, fail_fast=True),
    ]


class SampleFile(_Request):
    """A measured file."""

    text: str | None = Field(
        None, min_length=1, description="GSAS file, columns or powder CIF, as text."
    )
    data: str | None = Field(
        None, min_length=1, description="The file's bytes in base64, of NeXus (HDF5) or any kind."
    )
    name: str = Field("profile", max_length=200, description="File name, for results and errors.")

    @model_validator(mode="after")
    def _file_once(self) -> Self:
        if self._n_contents != 1:
            raise ValueError("give the file as text, or its bytes as data")
        return self

    @property
    def _n_contents(self) -> int:
        return (self.text is not None) + (self.data is not None)


class FileRequest(SampleFile):
    """A measured file, or the files of one sample, its calibration, and what is to be done."""

    files: Annotated[list[SampleFile], Field(min_length=1, max_length=MAX_FILES)] | None = Field(
        None, description="Files of the same sample, in place of text or data."
    )
    instrument: str | None = Field(None, description=_INSTRUMENT)
    bank: int | None = Field(None, ge=0, le=10_000)
    two_theta: FiniteFloat | None = Field(None, gt=-180, lt=180, description="Degrees.")
    position: int | None = Field(None, ge=1, description="Place of the bank in the file.")
    x_unit: Unit | None = Field(None, description="Of the axis, where the file does not name it.")
    bin_edges: bool | None = Field(None, description="Whether times are lower bin edges.")
    block: str | None = Field(None, max_length=200, description="Data block, of a CIF.")
    refine: bool = Field(False, description="Refine each plausible phase; search for mixtures.")
    phases: bool = Field(
        False,
        description="With refine: search for the structures that the service was started with, "
        "too (GET /model lists them).",
    )

    @property
    def _n_contents(self) -> int:
        return super()._n_contents + (self.files is not None)

    @model_validator(mode="after")
    def _refined_phases(self) -> Self:
        if self.phases and not self.refine:
            raise ValueError("phases are searched for with refine: set it to true")
        return self

    @property
    def all_files(self) -> list[SampleFile]:
        """The files of the sample."""
        return [self] if self.files is None else list(self.files)

    @property
    def how_read(self) -> dict[str, Any]:
        """The options of reading, as those of the command."""
        read = {"bank", "two_theta", "position", "x_unit", "bin_edges", "block"}
        return self.model_dump(include=read)


class ModelInfo(BaseModel):
    """The model version of a prediction."""

    uri: str
    name: str
    version: str
    kind: str
    data: str
    trained_at: str


class ReadyInfo(ModelInfo):
    """The model version that predicts now, and whether newer ones can be found."""

    refreshed_at: str | None = Field(description="When the registry last named it, ISO 8601.")
    other_banks: list[str] = Field(default_factory=list, description="Addresses of their models.")
    refresh_error: str | None = Field(description="Why the registry cannot be read, or null.")


class PredictionsResponse(BaseModel):
    """Predictions of a request, all by the same model version."""

    model: ModelInfo
    predictions: list[PredictionResult]
    answers: list[PredictionResult] = Field(deprecated=True, description="Use predictions.")


class ModelDescription(BaseModel):
    """Grid, phases and units of a model."""

    model: ModelInfo
    points: int
    tof: dict[str, float] = Field(description="T_i = start · exp(relative_step · i), µs.")
    phases: dict[str, str]
    units: dict[str, str]
    other_banks: list["ModelDescription"] = Field(
        default_factory=list, description="Of an instrument's banks, each with a model of its own."
    )
    searched: list[str] = Field(
        default_factory=list, description="Structures that phases of a request stands for."
    )


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str
