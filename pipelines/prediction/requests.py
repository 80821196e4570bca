"""What clients of the service send: profiles or a file, brought to the grid of a model."""

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from bragg_data.arrays import Floats32, Mask
from bragg_data.campaign import Campaign
from bragg_data.errors import first_line
from bragg_data.measurement.load import Measurement
from bragg_data.measurement.resampling import GriddedProfile
from bragg_models.predictors import Prediction, Predictor, PredictorError
from pipelines.cli.options import ProfileOptions
from pipelines.prediction import service_schemas as schemas
from pipelines.prediction import workflow
from pipelines.prediction.files import PredictError
from pipelines.prediction.result import to_json

PROFILES, ARRAY, FILE = "/predict", "/predict/array", "/predict/file"  # routes


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """The profiles of a request as a model takes them, and what its answers need."""

    profiles: Floats32  # without background, (n, points)
    campaign: Campaign
    model: str  # address of the version
    measurements: Sequence[Measurement] = ()  # of a file, n
    name: str | None = None  # of the file

    @property
    def calibrated(self) -> Mask:
        """Whether each profile comes from a calibrated instrument, (n,)."""
        if not self.measurements:
            return np.ones(len(self.profiles), dtype=bool)
        return np.array([m.calibration is not None and not m.nominal for m in self.measurements])

    @property
    def gridded(self) -> list[GriddedProfile]:
        """The profiles of a file with their background."""
        return [measurement.gridded for measurement in self.measurements]

    def only(self, row: int) -> "PreparedRequest":
        """Return one of the profiles."""
        rows = slice(row, row + 1)
        return replace(self, profiles=self.profiles[rows], measurements=self.measurements[rows])

    def answers(self, prediction: Prediction) -> list[dict[str, JsonValue]]:
        """Return the answers to the request, from the predictions of its profiles."""
        if self.measurements:
            prediction = prediction.widened(np.array([m.half_bin for m in self.measurements]))
        rows = range(len(prediction.phase))
        results = [
            workflow.result_from_prediction(prediction, row, self.campaign, self.model)
            for row in rows
        ]
        if self.measurements:
            results = [
                replace(
                    result,
                    file=self.name,
                    bank=m.profile.bank,
                    warnings=(*m.warnings, *result.warnings),
                )
                for result, m in zip(results, self.measurements, strict=True)
            ]
        return [to_json(result) for result in results]


def prepare(route: str, body: bytes, predictor: Predictor, model: str) -> PreparedRequest:
    """Read the body of a request to one of the routes, for a model and its address.

    Raises pydantic's `ValidationError`, or one of `workflow.FILE_ERRORS`, if it cannot be read or
    does not fit the model.
    """
    campaign = predictor.campaign
    if route == ARRAY:
        return PreparedRequest(array_from_npy(body, predictor.points), campaign, model)
    if route == FILE:
        request = schemas.FileRequest.model_validate_json(body)
        measurements = measurements_from_request(request, campaign)
        profiles = np.stack([m.prepared for m in measurements]).astype(np.float32)
        return PreparedRequest(profiles, campaign, model, measurements, request.name)
    rows = schemas.ProfilesRequest.model_validate_json(body).profiles
    lengths = {len(row) for row in rows}
    if lengths != {predictor.points}:
        raise PredictorError(
            f"The model predicts profiles of {predictor.points} points; got {sorted(lengths)}. GET "
            f"/model describes the grid; POST /predict/file takes a file with any grid."
        )
    return PreparedRequest(np.array(rows, dtype=np.float32), campaign, model)


def array_from_npy(file: bytes, points: int) -> Floats32:
    """Return the profiles, shape (n, points), of an NPY file; nothing in it is executed.

    Raises `PredictError` if it is no NPY file, or holds no real numbers of that shape.
    """
    try:
        profiles = np.lib.format.read_array(io.BytesIO(file), allow_pickle=False)
    except (ValueError, TypeError, EOFError, OverflowError, MemoryError) as error:
        raise PredictError(
            f"The body is no NPY file ({first_line(error)}). Send what numpy.save writes of real "
            f"numbers, or JSON to POST /predict."
        ) from error
    most, shape = schemas.MAX_PROFILES, profiles.shape
    if profiles.dtype.kind != "f" or shape[1:] != (points,) or not 1 <= len(profiles) <= most:
        raise PredictError(
            f"Real numbers of shape (n, {points}) are expected, n at most {most}; the file holds "
            f"{profiles.dtype} of shape {shape}."
        )
    with np.errstate(over="ignore"):  # the model refuses infinity with a message of its own
        return np.ascontiguousarray(profiles, dtype=np.float32)


def _content(request: schemas.FileRequest) -> bytes:
    if request.data is None:
        return str(request.text).encode()
    try:
        return base64.b64decode("".join(request.data.split()), validate=True)
    except ValueError as error:
        raise PredictError(
            f"{request.name}: data is no base64. Send the file's bytes in base64, or as text."
        ) from error


def measurements_from_request(
    request: schemas.FileRequest, campaign: Campaign
) -> list[Measurement]:
    """Read the profiles of a request and bring them to the campaign's grid.

    Its name is used in messages only: on disk it could be a directory, too long, or the
    calibration's. Raises `PredictError` if the texts cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="bragg-service-") as directory:
        path, calibration = Path(directory) / "profile", None
        try:
            path.write_bytes(_content(request))
            if request.instrument is not None:
                calibration = Path(directory) / "calibration"
                calibration.write_text(request.instrument, encoding="utf-8")
            chosen = request.model_dump(exclude={"text", "data", "name", "instrument"})
            options = ProfileOptions(calibration, **chosen)
            return workflow.read_measurements(path, campaign, options)
        except UnicodeEncodeError as error:
            raise PredictError(f"{request.name} is not a text: {error.reason}.") from error
        except workflow.FILE_ERRORS as error:
            # The temporary directory is of no use to the client.
            message = str(error).replace(str(path), request.name)
            raise PredictError(message.replace(f"{directory}/", "")) from error
