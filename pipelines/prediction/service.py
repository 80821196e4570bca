"""The HTTP service: profiles or a file in, crystal systems and cells out, by the champion."""

import asyncio
import base64
import io
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bragg_data.arrays import Floats32
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.errors import first_line
from bragg_data.measurement.load import Measurement
from bragg_models.predictors import Prediction, PredictorError
from catalog.tracking import Tracking
from pipelines.cli.options import ProfileOptions
from pipelines.prediction import batching, workflow
from pipelines.prediction import service_schemas as schemas
from pipelines.prediction.batching import ModelHolder, ServedModel
from pipelines.prediction.files import PredictError
from pipelines.prediction.result import PredictionResult, to_json

_NPY = "What numpy.save writes of real numbers, shape (n, points). No parsing of text: fast."
_RETRY_SECONDS = 1
_FILE_THREADS = 2


class BodyLimit:
    """Refuses bodies that are too long, before they are in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count the bytes of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = dict(scope["headers"]).get(b"content-length", b"")
        # The server makes sure that no more comes than is announced.
        announced = int(header) if header.isdigit() else 0
        received = 0

        async def counted() -> Message:
            nonlocal received
            if announced <= self._max_bytes:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= self._max_bytes:
                    return message
            raise HTTPException(
                413, f"The body is larger than {self._max_bytes / 1e6:g} MB. Send fewer profiles."
            )

        await self._app(scope, counted, send)


class Service:
    """The state of the service: the model, its batches, and the threads that read files."""

    def __init__(self, holder: ModelHolder, refresh_seconds: float, max_waiting: int) -> None:
        self.holder = holder
        self._refresh_seconds = refresh_seconds
        self._batcher = batching.Batcher(holder.executor, max_waiting=max_waiting)
        self._files = batching.BoundedExecutor(_FILE_THREADS, batching.MAX_WAITING_FILES)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Refresh the model and predict batches as long as the service runs."""

        def on_error(reason: str) -> None:
            self.holder.error = f"{reason}."

        tasks = [
            asyncio.create_task(batching.supervise(task, on_error))
            for task in (self._refresh, self._batcher.run)
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._files.shutdown()
        self.holder.executor.shutdown(cancel_futures=True)

    async def _refresh(self) -> None:
        while True:
            await asyncio.to_thread(self.holder.refresh)
            await asyncio.sleep(self._refresh_seconds)

    async def predict(self, model: ServedModel, profiles: Floats32) -> JSONResponse:
        """Return the response for profiles on the grid of a model, shape (n, points)."""
        return _response(model, _results(model, await self._batcher.predict(model, profiles)))

    async def predict_file(self, request: schemas.FileRequest) -> JSONResponse:
        """Return the response for a measured file."""
        model = self.holder.loaded
        read = partial(measurements_from_request, request, model.predictor.campaign)
        measurements = await self._files.run(read)
        prepared = np.stack([m.prepared for m in measurements]).astype(np.float32)
        calibrated = np.array([m.calibration is not None and not m.nominal for m in measurements])
        prediction = await self._batcher.predict(model, prepared, calibrated)
        half_bins = np.array([m.half_bin for m in measurements])
        results = _results(model, prediction.widened(half_bins))
        named = [
            replace(
                result,
                file=request.name,
                bank=m.profile.bank,
                warnings=(*m.warnings, *result.warnings),
            )
            for result, m in zip(results, measurements, strict=True)
        ]
        return _response(model, named)


def _results(model: ServedModel, prediction: Prediction) -> list[PredictionResult]:
    campaign, uri = model.predictor.campaign, model.version.uri
    rows = range(len(prediction.phase))
    return [workflow.result_from_prediction(prediction, row, campaign, uri) for row in rows]


def _response(model: ServedModel, results: Sequence[PredictionResult]) -> JSONResponse:
    predictions = [to_json(result) for result in results]
    documents = {"predictions": predictions, "answers": predictions}  # deprecated: answers
    return JSONResponse({"model": model.info.model_dump(), **documents})


def create_app(
    tracking: Tracking | str,
    uri: str | None = None,
    *,
    refresh_seconds: float = 5.0,
    max_bytes: int = 32_000_000,
    max_waiting: int = batching.MAX_WAITING_PROFILES,
) -> FastAPI:
    """Return the service of the model at ``uri``, of the only champion, or of the packaged model.

    ``tracking`` is a database, or its address, where it may be created later. The version that the
    address means is looked up every ``refresh_seconds``. A body has at most
    ``max_bytes``; while ``max_waiting`` profiles wait, requests get 503 and Retry-After.
    """
    service = Service(ModelHolder(tracking, uri), refresh_seconds, max_waiting)
    app = FastAPI(
        title="Bragg",
        summary="From a measured Bragg profile to crystal system and cell.",
        version="1",
        lifespan=service.lifespan,
    )
    app.add_middleware(BodyLimit, max_bytes=max_bytes)
    unavailable = (batching.NotReadyError, batching.OverloadedError)
    for kind in (*workflow.FILE_ERRORS, RequestValidationError, *unavailable):
        app.add_exception_handler(kind, _refuse)
    _add_routes(app, service)
    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Return the response for an error that is the request's, or due to the load."""
    detail, status, headers = str(error), 422, {}
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        # The input is not sent back: it may be long, or no text at all.
        detail = f"The request is wrong at {place}: {first['msg']}."
    elif isinstance(error, batching.NotReadyError):
        status = 503
    elif isinstance(error, batching.OverloadedError):
        status, headers = 503, {"Retry-After": str(_RETRY_SECONDS)}
    text = detail.encode(errors="replace").decode()
    return JSONResponse({"detail": text}, status_code=status, headers=headers)


def _add_routes(app: FastAPI, service: Service) -> None:
    problem: dict[str, Any] = {"model": schemas.Problem}
    problems: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 413, 422, 503), problem)
    of_model: dict[int | str, dict[str, Any]] = {503: problem}
    post = partial(app.post, responses=problems, response_model=schemas.PredictionsResponse)

    @app.get("/health", summary="The process is alive.")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="A model is loaded.", responses=of_model)
    async def ready() -> schemas.ReadyInfo:
        return service.holder.ready_info()

    @app.get("/model", summary="Grid, phases, units.", responses=of_model)
    async def model() -> schemas.ModelDescription:
        loaded = service.holder.loaded
        campaign, grid = loaded.predictor.campaign, loaded.predictor.campaign.grid
        return schemas.ModelDescription(
            model=loaded.info,
            points=loaded.predictor.points,
            tof={"start": grid.start, "relative_step": grid.relative_step},
            phases={phase.name: phase.crystal_system.name for phase in campaign.phases},
            units={name: "Å" if name in "abc" else "degree" for name in CELL_PARAMETERS},
        )

    @post("/predict", summary="Predict profiles on the grid.")
    async def predict(request: schemas.ProfilesRequest) -> JSONResponse:
        loaded = service.holder.loaded
        points = loaded.predictor.points
        lengths = {len(profile) for profile in request.profiles}
        if lengths != {points}:
            raise PredictorError(
                f"The model predicts profiles of {points} points; got {sorted(lengths)}. GET "
                f"/model describes the grid; POST /predict/file takes a file with any grid."
            )
        return await service.predict(loaded, np.array(request.profiles, dtype=np.float32))

    @post("/predict/array", summary="Predict profiles in an NPY file.")
    async def predict_array(
        file: Annotated[bytes, Body(media_type="application/octet-stream", description=_NPY)],
    ) -> JSONResponse:
        loaded = service.holder.loaded
        return await service.predict(loaded, array_from_npy(file, loaded.predictor.points))

    @post("/predict/file", summary="Predict a measured file.")
    async def predict_file(request: schemas.FileRequest) -> JSONResponse:
        return await service.predict_file(request)


# ---- what clients send -------------------------------------------------------------------------


def array_from_npy(file: bytes, points: int) -> Floats32:
    """Return the profiles, shape (n, points), of an NPY file; nothing in it is executed.

    Raises `PredictError` if it is no NPY file, or holds no real numbers of that shape.
    """
    try:
        profiles = np.lib.format.read_array(io.BytesIO(file), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
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
