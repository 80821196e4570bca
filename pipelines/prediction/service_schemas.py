"""Requests and responses of the HTTP service; predictions are those of every other interface."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from bragg_data.measurement.readers import Unit
from pipelines.prediction.result import PredictionResult

MAX_PROFILES = 512
"""Profiles in one request, and in one batch for the model."""


_INSTRUMENT = "The measurement's instrument file as text: GSAS-II, GSAS (.prm, .EXP) or FullProf."


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProfilesRequest(_Request):
    """Profiles on the model's grid, without background, in any scale."""

    profiles: Annotated[
        list[Annotated[list[FiniteFloat], Field(min_length=1, max_length=100_000, fail_fast=True)]],
        Field(min_length=1, max_length=MAX_PROFILES, fail_fast=True),
    ]


class FileRequest(_Request):
    """A measured profile's file, and its calibration."""

    text: str | None = Field(
        None, min_length=1, description="GSAS file, columns or powder CIF, as text."
    )
    data: str | None = Field(
        None, min_length=1, description="The file's bytes in base64, of NeXus (HDF5) or any kind."
    )
    name: str = Field("profile", max_length=200, description="File name, for results and errors.")
    instrument: str | None = Field(None, description=_INSTRUMENT)
    bank: int | None = Field(None, ge=0, le=10_000)
    two_theta: FiniteFloat | None = Field(None, gt=-180, lt=180, description="Degrees.")
    position: int | None = Field(None, ge=1, description="Place of the bank in the file.")
    x_unit: Unit | None = Field(None, description="Of the axis, where the file does not name it.")
    bin_edges: bool | None = Field(None, description="Whether times are lower bin edges.")
    block: str | None = Field(None, max_length=200, description="Data block, of a CIF.")

    @model_validator(mode="after")
    def _file_once(self) -> Self:
        if (self.text is None) == (self.data is None):
            raise ValueError("give the file as text, or its bytes as data")
        return self


PROFILES_SCHEMA = ProfilesRequest.model_json_schema()
FILE_SCHEMA = FileRequest.model_json_schema()


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
    refresh_error: str | None = Field(description="Why the registry cannot be read, or null.")


class PredictionsResponse(BaseModel):
    """Predictions of a request, all by the same model version."""

    model: ModelInfo
    predictions: list[PredictionResult]
    answers: list[PredictionResult] = Field(deprecated=True, description="Use predictions.")


class ModelDescription(BaseModel):
    """Grid, phases and units of the model."""

    model: ModelInfo
    points: int
    tof: dict[str, float] = Field(description="T_i = start · exp(relative_step · i), µs.")
    phases: dict[str, str]
    units: dict[str, str]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str
