"""The HTTP service: profiles or a file in, crystal systems and cells out, by the champion."""

import asyncio
import base64
import io
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError

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
from pipelines.prediction.gate import RETRY_SECONDS, Gate, Metrics, Rules
from pipelines.prediction.result import PredictionResult, to_json

_NPY = "What numpy.save writes of real numbers, shape (n, points). No parsing of text: fast."
_FILE_THREADS = 2
_SHORT = 200_000  # bytes of a body that is parsed in less time than it takes to ask a thread
_FEW = 8  # profiles, the results of which are written in as short a time
_DOCS = Path(__file__).with_name("service_docs.html")

_Request = TypeVar("_Request", bound=BaseModel)
_Route = TypeVar("_Route", bound=Callable[..., object])


class Service:
    """The state of the service: the model, its batches, and the threads that read files."""

    def __init__(self, holder: ModelHolder, refresh_seconds: float, max_waiting: int) -> None:
        self.holder = holder
        self.metrics = Metrics()
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
        prediction = await self._batcher.predict(model, profiles)
        return await self._response(model, prediction, partial(_results, model, prediction))

    async def predict_file(self, request: schemas.FileRequest) -> JSONResponse:
        """Return the response for a measured file."""
        model = self.holder.loaded
        read = partial(measurements_from_request, request, model.predictor.campaign)
        measurements = await self._files.run(read)
        prepared = np.stack([m.prepared for m in measurements]).astype(np.float32)
        calibrated = np.array([m.calibration is not None and not m.nominal for m in measurements])
        prediction = await self._batcher.predict(model, prepared, calibrated)
        half_bins = np.array([m.half_bin for m in measurements])

        def named() -> list[PredictionResult]:
            return [
                replace(
                    result,
                    file=request.name,
                    bank=m.profile.bank,
                    warnings=(*m.warnings, *result.warnings),
                )
                for result, m in zip(
                    _results(model, prediction.widened(half_bins)), measurements, strict=True
                )
            ]

        return await self._response(model, prediction, named)

    async def _response(
        self,
        model: ServedModel,
        prediction: Prediction,
        results: Callable[[], Sequence[PredictionResult]],
    ) -> JSONResponse:
        self.metrics.profiles += len(prediction.phase)

        def written() -> JSONResponse:
            return _response(model, results())

        few = len(prediction.phase) <= _FEW
        return written() if few else await asyncio.to_thread(written)

    def metrics_text(self) -> str:
        """Return the metrics of the service as Prometheus reads them."""
        return self.metrics.text(
            {
                "bragg_profiles_waiting": self._batcher.waiting,
                "bragg_files_waiting": self._files.waiting,
                "bragg_model_loaded": float(self.holder.current is not None),
            }
        )


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
    rules: Rules | None = None,
    max_waiting: int = batching.MAX_WAITING_PROFILES,
) -> FastAPI:
    """Return the service of the model at ``uri``, of the only champion, or of the packaged model.

    ``tracking`` is a database, or its address, where it may be created later. The version that the
    address means is looked up every ``refresh_seconds``. Requests are let in by ``rules``; while
    ``max_waiting`` profiles wait, they get 503 and Retry-After.
    """
    service = Service(ModelHolder(tracking, uri), refresh_seconds, max_waiting)
    app = FastAPI(
        title="Bragg",
        summary="From a measured Bragg profile to crystal system and cell.",
        version="1",
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Gate, rules=rules or Rules(), metrics=service.metrics)
    unavailable = (batching.NotReadyError, batching.OverloadedError)
    for kind in (*workflow.FILE_ERRORS, ValidationError, *unavailable):
        app.add_exception_handler(kind, _refuse)
    _add_routes(app, service)
    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Return the response for an error that is the request's, or due to the load."""
    detail, status, headers = str(error), 422, {}
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in ("body", *first["loc"]))
        # The input is not sent back: it may be long, or no text at all.
        detail = f"The request is wrong at {place}: {first['msg']}."
    elif isinstance(error, batching.NotReadyError):
        status = 503
    elif isinstance(error, batching.OverloadedError):
        status, headers = 503, {"Retry-After": str(RETRY_SECONDS)}
    text = detail.encode(errors="replace").decode()
    return JSONResponse({"detail": text}, status_code=status, headers=headers)


async def _parsed(request: Request, kind: type[_Request]) -> _Request:
    """Return the JSON of a request; a long one is parsed outside the event loop."""
    body = await request.body()
    if len(body) < _SHORT:
        return kind.model_validate_json(body)
    return await asyncio.to_thread(kind.model_validate_json, body)


def _add_routes(app: FastAPI, service: Service) -> None:
    problem: dict[str, Any] = {"model": schemas.Problem}
    problems: dict[int | str, dict[str, Any]] = dict.fromkeys(
        (400, 401, 408, 413, 422, 503), problem
    )
    of_model: dict[int | str, dict[str, Any]] = {401: problem, 503: problem}

    def post(
        path: str, summary: str, media_type: str, schema: dict[str, Any]
    ) -> Callable[[_Route], _Route]:
        body = {"required": True, "content": {media_type: {"schema": schema}}}
        decorator: Callable[[_Route], _Route] = app.post(
            path,
            summary=summary,
            responses=problems,
            response_model=schemas.PredictionsResponse,
            openapi_extra={"requestBody": body},
        )
        return decorator

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

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_DOCS)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics_text(), media_type="text/plain; version=0.0.4")

    as_json, array = "application/json", {"type": "string", "format": "binary", "description": _NPY}

    @post(
        "/predict",
        "Predict profiles on the grid.",
        as_json,
        schemas.ProfilesRequest.model_json_schema(),
    )
    async def predict(request: Request) -> JSONResponse:
        profiles = (await _parsed(request, schemas.ProfilesRequest)).profiles
        loaded = service.holder.loaded
        points = loaded.predictor.points
        lengths = {len(profile) for profile in profiles}
        if lengths != {points}:
            raise PredictorError(
                f"The model predicts profiles of {points} points; got {sorted(lengths)}. GET "
                f"/model describes the grid; POST /predict/file takes a file with any grid."
            )
        return await service.predict(loaded, np.array(profiles, dtype=np.float32))

    @post("/predict/array", "Predict profiles in an NPY file.", "application/octet-stream", array)
    async def predict_array(request: Request) -> JSONResponse:
        loaded = service.holder.loaded
        profiles = array_from_npy(await request.body(), loaded.predictor.points)
        return await service.predict(loaded, profiles)

    @post(
        "/predict/file",
        "Predict a measured file.",
        as_json,
        schemas.FileRequest.model_json_schema(),
    )
    async def predict_file(request: Request) -> JSONResponse:
        return await service.predict_file(await _parsed(request, schemas.FileRequest))


# ---- what clients send -------------------------------------------------------------------------


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
