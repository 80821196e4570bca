"""The HTTP service: profiles or a file in, crystal systems and cells out, by the champion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_models.predictors import Prediction, PredictorError
from catalog.tracking import Tracking
from pipelines.prediction.batching import (
    MAX_WAITING_FILES,
    MAX_WAITING_PROFILES,
    Batcher,
    BoundedExecutor,
    ModelHolder,
    OverloadedError,
    ServedModel,
    supervise,
)
from pipelines.prediction.result import PredictionResult, to_json
from pipelines.prediction.service_input import array_from_npy, measurements_from_request
from pipelines.prediction.service_schemas import (
    FileRequest,
    ModelDescription,
    ModelInfo,
    PredictionsResponse,
    Problem,
    ProfilesRequest,
    ReadyInfo,
)
from pipelines.prediction.workflow import FILE_ERRORS, result_from_prediction

_NPY = (
    "What numpy.save writes of real numbers, shape (n, points). No parsing of text: the fast way."
)
_RETRY_SECONDS = 1
_FILE_THREADS = 2


class NotReadyError(RuntimeError):
    """No model is loaded yet."""


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
        self._batcher = Batcher(holder.executor, max_waiting=max_waiting)
        self._files = BoundedExecutor(_FILE_THREADS, MAX_WAITING_FILES)

    @property
    def model(self) -> ServedModel:
        """The model that predicts now."""
        return loaded_model(self.holder)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Refresh the model and predict batches as long as the service runs."""

        def on_error(reason: str) -> None:
            self.holder.error = f"{reason}."

        tasks = [
            asyncio.create_task(supervise(task, on_error))
            for task in (self._refresh, self._batcher.run)
        ]
        yield
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        self._files.shutdown()
        self.holder.executor.shutdown(cancel_futures=True)

    async def _refresh(self) -> None:
        while True:
            await asyncio.to_thread(self.holder.refresh)
            await asyncio.sleep(self._refresh_seconds)

    async def predict(self, model: ServedModel, profiles: NDArray[np.float32]) -> JSONResponse:
        """Return the response for profiles on the grid of a model, shape (n, points)."""
        prediction = await self._batcher.predict(model, profiles)
        return _response(model, _results(model, prediction))

    async def predict_file(self, request: FileRequest) -> JSONResponse:
        """Return the response for a measured file."""
        model = self.model
        read = partial(measurements_from_request, request, model.predictor.campaign)
        measurements = await self._files.run(read)
        prepared = np.stack([m.prepared for m in measurements]).astype(np.float32)
        calibrated = np.array([m.calibration is not None and not m.nominal for m in measurements])
        prediction = await self._batcher.predict(model, prepared, calibrated)
        results = [
            replace(
                result,
                file=request.name,
                bank=measurement.profile.bank,
                warnings=tuple(measurement.warnings),
            )
            for result, measurement in zip(_results(model, prediction), measurements, strict=True)
        ]
        return _response(model, results)


def create_app(
    tracking: Tracking,
    uri: str | None = None,
    *,
    refresh_seconds: float = 5.0,
    max_bytes: int = 32_000_000,
    max_waiting: int = MAX_WAITING_PROFILES,
) -> FastAPI:
    """Return the service.

    Parameters
    ----------
    tracking
        The MLflow database or server where the model is registered.
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None for the only champion.
    refresh_seconds
        Interval at which the version that the address means is looked up.
    max_bytes
        Size of the longest body.
    max_waiting
        Profiles that may wait for the model; further requests get 503 and Retry-After.
    """
    service = Service(ModelHolder(tracking, uri), refresh_seconds, max_waiting)
    app = FastAPI(
        title="Bragg",
        summary="From a measured Bragg profile to crystal system and cell.",
        version="1",
        lifespan=service.lifespan,
    )
    app.add_middleware(BodyLimit, max_bytes=max_bytes)
    _add_error_handlers(app)
    _add_routes(app, service)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    def handler(status: int, **headers: str) -> ExceptionHandler:
        async def handle(_: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"detail": str(error)}, status_code=status, headers=headers)

        return handle

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            raise error
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        # The input is not sent back: it may be long, or no text at all.
        detail = f"The request is wrong at {place}: {first['msg']}.".encode(errors="replace")
        return JSONResponse({"detail": detail.decode()}, status_code=422)

    for kind in FILE_ERRORS:
        app.add_exception_handler(kind, handler(422))
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(NotReadyError, handler(503))
    overloaded = handler(503, **{"Retry-After": str(_RETRY_SECONDS)})
    app.add_exception_handler(OverloadedError, overloaded)


def _add_routes(app: FastAPI, service: Service) -> None:
    problems: dict[int | str, dict[str, Any]] = {
        code: {"model": Problem} for code in (400, 413, 422, 503)
    }

    @app.get("/health", summary="The process is alive.")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="A model is loaded.", responses={503: problems[503]})
    async def ready() -> ReadyInfo:
        return ready_info(service.holder)

    @app.get("/model", summary="Grid, phases, units.", responses={503: problems[503]})
    async def model() -> ModelDescription:
        predictor = service.model.predictor
        grid = predictor.campaign.grid
        return ModelDescription(
            model=model_info(service.model),
            points=predictor.points,
            tof={"start": grid.start, "relative_step": grid.relative_step},
            phases={phase.name: phase.crystal_system.name for phase in predictor.campaign.phases},
            units={name: "Å" if name in "abc" else "degree" for name in CELL_PARAMETERS},
        )

    @app.post(
        "/predict",
        summary="Predict profiles on the grid.",
        responses=problems,
        response_model=PredictionsResponse,
    )
    async def predict(request: ProfilesRequest) -> JSONResponse:
        model = service.model
        points = model.predictor.points
        lengths = {len(profile) for profile in request.profiles}
        if lengths != {points}:
            raise PredictorError(
                f"The model predicts profiles of {points} points; got {sorted(lengths)}. GET "
                f"/model describes the grid; POST /predict/file takes a file with any grid."
            )
        return await service.predict(model, np.array(request.profiles, dtype=np.float32))

    @app.post(
        "/predict/array",
        summary="Predict profiles in an NPY file.",
        responses=problems,
        response_model=PredictionsResponse,
    )
    async def predict_array(
        file: Annotated[bytes, Body(media_type="application/octet-stream", description=_NPY)],
    ) -> JSONResponse:
        model = service.model
        return await service.predict(model, array_from_npy(file, model.predictor.points))

    @app.post(
        "/predict/file",
        summary="Predict a measured file.",
        responses=problems,
        response_model=PredictionsResponse,
    )
    async def predict_file(request: FileRequest) -> JSONResponse:
        return await service.predict_file(request)


def loaded_model(holder: ModelHolder) -> ServedModel:
    """Return the model that predicts now.

    Raises
    ------
    NotReadyError
        If none is loaded yet, or the first one cannot be loaded.
    """
    if holder.current is None:
        raise NotReadyError(holder.error or "The model is being loaded.")
    return holder.current


def ready_info(holder: ModelHolder) -> ReadyInfo:
    """Return the model version that predicts now, and why the registry cannot be read if so."""
    info, refreshed_at = model_info(loaded_model(holder)), holder.refreshed_at
    return ReadyInfo(
        **info.model_dump(),
        refreshed_at=None if refreshed_at is None else refreshed_at.isoformat("T", "seconds"),
        refresh_error=holder.error or None,
    )


def model_info(model: ServedModel) -> ModelInfo:
    """Return the facts about a model that every response states."""
    provenance = model.predictor.provenance
    return ModelInfo(
        uri=model.version.uri,
        name=model.version.name,
        version=model.version.version,
        kind=provenance.model,
        data=provenance.data.tag,
        trained_at=provenance.trained_at,
    )


def _results(model: ServedModel, prediction: Prediction) -> list[PredictionResult]:
    campaign = model.predictor.campaign
    return [
        result_from_prediction(prediction, row, campaign, model.version.uri)
        for row in range(len(prediction.phase))
    ]


def _response(model: ServedModel, results: Sequence[PredictionResult]) -> JSONResponse:
    predictions = [to_json(result) for result in results]
    return JSONResponse(
        {
            "model": model_info(model).model_dump(),
            "predictions": predictions,
            "answers": predictions,  # deprecated
        }
    )
