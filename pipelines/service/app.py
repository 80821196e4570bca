"""The HTTP service: profiles or a file in, crystal systems and cells out, by the champion."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic import JsonValue, ValidationError

from bragg_data.crystallography.cell import CELL_PARAMETERS
from catalog.tracking import Tracking
from pipelines.prediction import workflow
from pipelines.prediction.combination import CombinationError
from pipelines.recording.record import Exchange, Record, answer_id, new_id
from pipelines.service import batching, schemas
from pipelines.service.batching import ModelHolder, ServedModel
from pipelines.service.fairness import OverloadedError
from pipelines.service.gate import RETRY_SECONDS, Gate, Metrics, Rules
from pipelines.service.recorder import Answered, Recorder
from pipelines.service.refining import RefinementLostError, RefinementWorkers, Setup
from pipelines.service.requests import ARRAY, FILE, PROFILES, BanksRequest, prepare_banks

_NPY = "What numpy.save writes of real numbers, shape (n, points). No parsing of text: fast."
_FILE_THREADS = 2
_SHORT = 200_000  # bytes of a body that is parsed in less time than it takes to ask a thread
_FEW = 8  # profiles, the results of which are written in as short a time
_DOCS = Path(__file__).with_name("docs.html")

_Route = TypeVar("_Route", bound=Callable[..., object])


class Service:
    """The state of the service: the model, its batches, and the threads that read files."""

    def __init__(
        self,
        holder: ModelHolder,
        refresh_seconds: float,
        max_waiting: int,
        workers: RefinementWorkers,
        record: Record | None = None,
    ) -> None:
        self.holder, self.workers = holder, workers
        self.metrics = Metrics()
        self._refresh_seconds = refresh_seconds
        self._batcher = batching.Batcher(holder.executor, max_waiting=max_waiting)
        self._files = batching.FileReaders(_FILE_THREADS, batching.MAX_WAITING_FILES)
        self._recorder = None if record is None else Recorder(record)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Refresh the model and predict batches as long as the service runs."""

        def on_error(reason: str) -> None:
            self.holder.error = f"{reason}."

        work = [self._refresh, self._batcher.run]
        work += [self._recorder.run] if self._recorder else []
        tasks = [asyncio.create_task(batching.supervise(task, on_error)) for task in work]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._files.shutdown()
        await asyncio.to_thread(self.workers.shutdown)
        self.holder.executor.shutdown(wait=False, cancel_futures=True)
        if self._recorder is not None:
            self._recorder.close()

    async def _refresh(self) -> None:
        while True:
            await asyncio.to_thread(self.holder.refresh)
            if self.holder.banks and not self.workers.ready:
                versions = [served.version for served in self.holder.banks]
                await asyncio.to_thread(self.workers.start, self.holder.tracking_uri, versions)
            await asyncio.sleep(self._refresh_seconds)

    async def predict_file(self, body: bytes) -> JSONResponse:
        """Return the response to the files of a sample, recorded as those of :meth:`predict`.

        With a search for structures of the service they are not: a record does not hold these.
        """
        began = time.monotonic()
        parse = partial(schemas.FileRequest.model_validate_json, body)
        request = parse() if len(body) < _SHORT else await asyncio.to_thread(parse)
        if not request.refine:
            return await self.predict(FILE, body)
        models = self.holder.loaded_banks
        versions = [model.version for model in models]
        refined = await self.workers.predict(self.holder.tracking_uri, versions, request)
        self.metrics.profiles += len(refined.answers)
        ids: list[str] = []
        if not request.phases:
            exchange = Exchange(
                new_id(),
                FILE,
                body,
                answers=refined.answers,
                statistics=refined.statistics,
                batches=[self.workers.setup.batch] * len(refined.answers),
                seconds=time.monotonic() - began,
            )
            ids = await self._recorded(Answered(exchange, models))
        return _response(models[0], refined.answers, ids)

    async def predict(self, route: str, body: bytes) -> JSONResponse:
        """Return the response to a request; its answers are in the record before, if there is one.

        Errors are those of :func:`pipelines.service.requests.prepare`, and of an overload.
        """
        began = time.monotonic()
        models = self.holder.loaded_banks if route == FILE else (self.holder.loaded,)
        request = await self._prepared(route, body, models)
        exchange = Exchange(new_id(), route, body)
        answered, recorder = Answered(exchange, models, request), self._recorder

        def begin() -> None:
            if recorder is not None:  # others may be computed together with it
                recorder.begin(answered)

        predicted = await asyncio.gather(
            *(
                self._batcher.predict(
                    *(models[number], part.profiles, part.calibrated),
                    f"{exchange.request}.{number}",
                    begin,
                )
                for number, part in request.parts.items()
            )
        )
        predictions = {n: p for n, (p, _) in zip(request.parts, predicted, strict=True)}
        for prediction in predictions.values():
            self.metrics.add_profiles(prediction.accepted, len(prediction.phase))
        few = len(request.order) <= _FEW
        written = partial(request.answers, predictions)
        answers = written() if few else await asyncio.to_thread(written)
        ids: list[str] = []
        if recorder is not None:
            names = {n: batches for n, (_, batches) in zip(request.parts, predicted, strict=True)}
            batches, seconds = request.in_order(names), time.monotonic() - began
            exchange = replace(exchange, answers=answers, batches=batches, seconds=seconds)
            ids = await self._recorded(
                replace(answered, exchange=exchange, predictions=predictions)
            )
        response = partial(_response, models[0], answers, ids)
        return response() if few else await asyncio.to_thread(response)

    async def _recorded(self, answered: Answered) -> list[str]:
        """Return the ids of answers that are in the record now, if there is one."""
        if self._recorder is None or not await self._recorder.put(answered):
            return []
        exchange = answered.exchange
        return [answer_id(exchange.request, row) for row in range(len(exchange.answers))]

    async def _prepared(
        self, route: str, body: bytes, models: Sequence[ServedModel]
    ) -> BanksRequest:
        """Read a request; what takes long is read outside the event loop."""
        of_models = [(model.predictor, model.version.uri) for model in models]
        read = partial(prepare_banks, route, body, of_models)
        if route == FILE:
            return await self._files.run(read)
        if route == ARRAY or len(body) < _SHORT:
            return read()
        return await asyncio.to_thread(read)

    def metrics_text(self) -> str:
        """Return the metrics of the service as Prometheus reads them."""
        return self.metrics.text(
            {
                "bragg_profiles_waiting": self._batcher.waiting,
                "bragg_files_waiting": self._files.slots.waiting,
                "bragg_refinements_waiting": self.workers.slots.waiting,
                "bragg_model_loaded": float(self.holder.current is not None),
                **(self._recorder.counts.gauges() if self._recorder else {}),
            }
        )


def _response(
    model: ServedModel, answers: Sequence[Mapping[str, JsonValue]], ids: Sequence[str]
) -> JSONResponse:
    names: Sequence[str | None] = ids or [None] * len(answers)
    predictions = [{**answer, "id": name} for answer, name in zip(answers, names, strict=True)]
    documents = {"predictions": predictions, "answers": predictions}  # deprecated: answers
    of_ids = ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}" if ids else ""
    return JSONResponse(
        {"model": model.info.model_dump(), **documents},
        headers={"X-Answer-Id": of_ids} if ids else None,
    )


def create_app(
    tracking: Tracking | str,
    uri: str | None = None,
    *,
    refresh_seconds: float = 5.0,
    rules: Rules | None = None,
    max_waiting: int = batching.MAX_WAITING_PROFILES,
    record: Record | None = None,
    workers: RefinementWorkers | None = None,
) -> FastAPI:
    """Return the service of the model at ``uri``, of the only champion, or of the packaged model.

    ``tracking`` is a database, or its address, where it may be created later. The version that the
    address means is looked up every ``refresh_seconds``. Requests are let in by ``rules``; while
    ``max_waiting`` profiles wait, they get 503 and Retry-After. With a ``record`` an answer is in
    it before it is sent, but for searches of structures. ``workers`` refine, if there are any.
    """
    workers = workers or RefinementWorkers(0, Setup())
    service = Service(ModelHolder(tracking, uri), refresh_seconds, max_waiting, workers, record)
    app = FastAPI(
        title="Bragg",
        summary="From a measured Bragg profile to crystal system and cell.",
        version="1",
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Gate, rules=rules or Rules(), metrics=service.metrics)
    unavailable = (batching.NotReadyError, RefinementLostError, OverloadedError)
    for kind in (*workflow.FILE_ERRORS, CombinationError, ValidationError, *unavailable):
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
    elif isinstance(error, RefinementLostError | OverloadedError):
        status, headers = 503, {"Retry-After": str(RETRY_SECONDS)}
    text = detail.encode(errors="replace").decode()
    return JSONResponse({"detail": text}, status_code=status, headers=headers)


def _description(model: ServedModel) -> schemas.ModelDescription:
    campaign, grid = model.predictor.campaign, model.predictor.campaign.grid
    return schemas.ModelDescription(
        model=model.info,
        points=model.predictor.points,
        tof={"start": grid.start, "relative_step": grid.relative_step},
        phases={phase.name: phase.crystal_system.name for phase in campaign.phases},
        units={name: "Å" if name in "abc" else "degree" for name in CELL_PARAMETERS},
    )


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

    @app.get("/ready", summary="A model is loaded, and refinements can begin.", responses=of_model)
    async def ready() -> schemas.ReadyInfo:
        info = service.holder.ready_info()
        if not service.workers.ready:
            raise batching.NotReadyError(
                service.holder.error or "The processes for refinements are starting."
            )
        return info

    @app.get("/model", summary="Grid, phases, units.", responses=of_model)
    async def model() -> schemas.ModelDescription:
        first, *further = (_description(model) for model in service.holder.loaded_banks)
        searched = [phase.name for phase in service.workers.setup.phases]
        return first.model_copy(update={"other_banks": further, "searched": searched})

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
        return await service.predict(PROFILES, await request.body())

    @post("/predict/array", "Predict profiles in an NPY file.", "application/octet-stream", array)
    async def predict_array(request: Request) -> JSONResponse:
        return await service.predict(ARRAY, await request.body())

    @post(
        "/predict/file",
        "Predict a measured file, or the files of a sample, and refine it.",
        as_json,
        schemas.FileRequest.model_json_schema(),
    )
    async def predict_file(request: Request) -> JSONResponse:
        return await service.predict_file(await request.body())
