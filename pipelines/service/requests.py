"""What clients of the service send: profiles or a file, brought to the grid of a model."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import numpy as np
from pydantic import JsonValue

from bragg_data.arrays import Floats32, Mask
from bragg_data.campaign import Campaign
from bragg_data.errors import first_line
from bragg_data.measurement.load import Measurement
from bragg_data.measurement.resampling import GriddedProfile
from bragg_models.predictors import Prediction, Predictor, PredictorError
from pipelines.prediction import workflow
from pipelines.prediction.combination import combine
from pipelines.prediction.files import PredictError
from pipelines.prediction.result import PredictionResult, to_json
from pipelines.service import schemas
from pipelines.service.inputs import measurements_from_request

PROFILES, ARRAY, FILE = "/predict", "/predict/array", "/predict/file"  # routes

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """The profiles of a request as a model takes them, and what its answers need."""

    profiles: Floats32  # without background, (n, points)
    campaign: Campaign
    model: str  # address of the version
    measurements: Sequence[Measurement] = ()  # of files, n

    @classmethod
    def of_measurements(
        cls, measurements: Sequence[Measurement], campaign: Campaign, model: str
    ) -> Self:
        """Return the request for profiles of files."""
        profiles = np.stack([m.prepared for m in measurements]).astype(np.float32)
        return cls(profiles, campaign, model, measurements)

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

    def results(self, prediction: Prediction) -> list[PredictionResult]:
        """Return the results, each profile by itself."""
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
                    file=m.profile.source,
                    bank=m.profile.bank,
                    warnings=(*m.warnings, *result.warnings),
                )
                for result, m in zip(results, self.measurements, strict=True)
            ]
        return results


@dataclass(frozen=True, eq=False)
class BanksRequest:
    """The profiles of a request for the models of one or several banks."""

    parts: Mapping[int, PreparedRequest]  # by the number of the model; of models with profiles
    order: Sequence[int]  # of each answer the number of its model; in a part they are in order

    @property
    def joint(self) -> bool:
        """Whether an answer depends on the other profiles of the request."""
        return len(self.order) > 1 and any(part.measurements for part in self.parts.values())

    def only(self, row: int) -> "BanksRequest":
        """Return the request for one of its answers."""
        number = self.order[row]
        place = list(self.order[:row]).count(number)
        return BanksRequest({number: self.parts[number].only(place)}, [number])

    def in_order(self, of_parts: Mapping[int, Sequence[_T]]) -> list[_T]:
        """Return values of the profiles of each part in the order of the answers."""
        values = {number: iter(of_part) for number, of_part in of_parts.items()}
        return [next(values[number]) for number in self.order]

    def answers(self, predictions: Mapping[int, Prediction]) -> list[dict[str, JsonValue]]:
        """Return the answers to the request, from the predictions of its parts."""
        results = self.in_order({n: self.parts[n].results(p) for n, p in predictions.items()})
        return [to_json(result) for result in together(results)]


def together(results: Sequence[PredictionResult]) -> list[PredictionResult]:
    """Return the results of a sample's files with what they show together."""
    if len(results) < 2 or results[0].file is None:  # of profiles on a grid nothing is known
        return list(results)
    combined = combine(results)
    return [replace(result, combined=combined) for result in results]


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
        measurements = [m for _, m in measurements_from_request(request, [campaign])]
        return PreparedRequest.of_measurements(measurements, campaign, model)
    rows = schemas.ProfilesRequest.model_validate_json(body).profiles
    lengths = {len(row) for row in rows}
    if lengths != {predictor.points}:
        raise PredictorError(
            f"The model predicts profiles of {predictor.points} points; got {sorted(lengths)}. GET "
            f"/model describes the grid; POST /predict/file takes a file with any grid."
        )
    return PreparedRequest(np.array(rows, dtype=np.float32), campaign, model)


def prepare_banks(route: str, body: bytes, models: Sequence[tuple[Predictor, str]]) -> BanksRequest:
    """As :func:`prepare`, for the models of one or several banks; only files have several."""
    if len(models) == 1:
        prepared = prepare(route, body, *models[0])
        return BanksRequest({0: prepared}, [0] * len(prepared.profiles))
    request = schemas.FileRequest.model_validate_json(body)
    campaigns = [predictor.campaign for predictor, _ in models]
    measurements = measurements_from_request(request, campaigns)
    order = [number for number, _ in measurements]
    parts = {
        number: PreparedRequest.of_measurements(
            [m for n, m in measurements if n == number], campaigns[number], models[number][1]
        )
        for number in sorted(set(order))
    }
    return BanksRequest(parts, order)


def array_from_npy(file: bytes, points: int) -> Floats32:
    """Return the profiles, shape (n, points), of an NPY file; nothing in it is executed.

    Raises `PredictError` if it is no NPY file, or holds no real numbers of that shape.
    """
    try:
        profiles = np.lib.format.read_array(io.BytesIO(file), allow_pickle=False)
    except Exception as error:  # those of Python's tokenizer, too, which reads the head
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
