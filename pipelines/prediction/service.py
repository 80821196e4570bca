"""The HTTP service: profiles or a file in, crystal systems and cells out, by the champion."""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem
from bragg_data.errors import first_line
from bragg_data.instrument.instprm import InstrumentError
from bragg_data.measurement.load import load_measurements
from bragg_data.measurement.readers import ProfileError
from bragg_data.preprocessing import PreprocessingError
from bragg_models.predictors import Prediction, Predictor, PredictorError, load_predictor
from catalog import registry
from catalog.model_files import downloaded_model
from catalog.tracking import Tracking
from pipelines.prediction.acceptance import verdict_json
from pipelines.prediction.predict import PredictError

MOST = 512
"""Profiles in one request, and in one question to the model."""

_NPY = (
    "What numpy.save writes of real numbers, shape (n, points). No parsing of text: the fast way."
)

_REFUSED = (PredictorError, PredictError, ProfileError, InstrumentError, PreprocessingError)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProfilesRequest(_Request):
    """Profiles on the model's grid, without background, in any scale."""

    profiles: Annotated[
        list[Annotated[list[FiniteFloat], Field(min_length=1, max_length=100_000)]],
        Field(min_length=1, max_length=MOST),
    ]


class FileRequest(_Request):
    """The text of a measured profile's file, and of its calibration."""

    text: Annotated[str, Field(min_length=1, description="GSAS file or columns, as a text.")]
    name: Annotated[str, Field(max_length=200, description="What errors call it.")] = "profile"
    instrument: Annotated[
        str | None, Field(description="The measurement's own GSAS-II .instprm, as a text.")
    ] = None
    bank: Annotated[int | None, Field(ge=0, le=10_000)] = None
    two_theta: Annotated[FiniteFloat | None, Field(gt=0, lt=180, description="Degrees.")] = None


class Model(BaseModel):
    """Who answered."""

    uri: str
    name: str
    version: str
    kind: str
    data: str
    trained_at: str


class One(BaseModel):
    """The answer for one profile."""

    crystal_system: str
    phase: str
    probabilities: dict[str, float]
    cell: Annotated[dict[str, float | None], Field(description="a, b, c in Å; angles in degrees.")]
    intervals: Annotated[
        dict[str, tuple[float, float]] | None,
        Field(description="90 % intervals of the free parameters, from models that know them."),
    ] = None
    accepted: Annotated[
        bool | None, Field(description="Whether the sample can be one of the phases at all.")
    ] = None
    reasons: list[str] | None = None
    bank: int | None = None
    warnings: list[str] = []


class Answers(BaseModel):
    """The answers, and who gave them: all of one request are by the same model version."""

    model: Model
    answers: list[One]


class About(BaseModel):
    """What the model wants and tells."""

    model: Model
    points: int
    tof: Annotated[dict[str, float], Field(description="T_i = start · exp(relative_step · i), µs.")]
    phases: dict[str, str]
    units: dict[str, str]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


@dataclass(frozen=True)
class Loaded:
    """A model version, ready to answer. It is replaced as a whole, never changed."""

    version: registry.ModelVersion
    predictor: Predictor

    @property
    def about(self) -> Model:
        """What every answer says of it."""
        p = self.predictor.provenance
        return Model(
            uri=self.version.uri, name=self.version.name, version=self.version.version,
            kind=p.model, data=p.data.tag, trained_at=p.trained_at,
        )  # fmt: skip


class Holder:
    """The model that answers now, looked up again and again: a new champion needs no restart."""

    def __init__(self, tracking: Tracking, uri: str | None) -> None:
        self._tracking, self._uri = tracking, uri
        # Models are read and asked in one thread alone: OpenMP keeps a team of threads for each
        # thread that ever computed, and with two of them on all cores each waits at half the speed.
        self.asking = ThreadPoolExecutor(1, "asking")
        self.current: Loaded | None = None
        self.problem = ""

    def refresh(self) -> None:
        """Load the version that the address means now, if it is another one."""
        try:
            uri = self._uri or registry.champion_uri(self._tracking)
            found = registry.find(self._tracking, uri)
            if self.current is None or self.current.version.uri != found.uri:
                with downloaded_model(self._tracking.uri, found) as directory:
                    predictor = self.asking.submit(_ready, directory).result()
                self.current = Loaded(found, predictor)
            self.problem = ""
        except Exception as error:  # whoever answered goes on answering
            self.problem = f"{first_line(error)}."


def _ready(directory: Path) -> Predictor:
    """Read a model and ask it once: something may have to be compiled or filled."""
    predictor = load_predictor(directory)
    profile = np.ones((1, predictor.points), dtype=np.float32)
    profile[:, predictor.points // 2] = 100
    predictor.predict(profile)
    return predictor


@dataclass(frozen=True)
class _Question:
    profiles: NDArray[np.float32]
    calibrated: NDArray[np.bool_]
    answered: asyncio.Future[tuple[Prediction, Loaded]]


class Batcher:
    """Asks the model about what waits together, beside the loop: many small questions at once."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._waiting: asyncio.Queue[_Question] = asyncio.Queue()

    async def ask(
        self, profiles: NDArray[np.float32], calibrated: NDArray[np.bool_] | None = None
    ) -> tuple[Prediction, Loaded]:
        """Return the answers for profiles (n, points), and the version that gave all of them.

        ``calibrated`` (n,) tells which come from a calibrated instrument; all if it is left out.
        """
        if calibrated is None:
            calibrated = np.ones(len(profiles), dtype=bool)
        answered: asyncio.Future[tuple[Prediction, Loaded]] = (
            asyncio.get_running_loop().create_future()
        )
        await self._waiting.put(_Question(profiles, calibrated, answered))
        return await answered

    async def run(self) -> None:
        """Answer until cancelled."""
        left: _Question | None = None
        while True:
            first = left or await self._waiting.get()
            together, count, left = [first], len(first.profiles), None
            while not self._waiting.empty():
                one = self._waiting.get_nowait()
                if count + len(one.profiles) > MOST or (
                    one.profiles.shape[1] != first.profiles.shape[1]
                ):
                    left = one
                    break
                together.append(one)
                count += len(one.profiles)
            loaded = self._holder.current
            assert loaded is not None  # nothing is asked before the service is ready
            found = await asyncio.get_running_loop().run_in_executor(
                self._holder.asking, _answered, loaded, together
            )
            for answers, one in zip(found, together, strict=True):
                if one.answered.done():
                    continue  # who asked has gone
                if isinstance(answers, Exception):
                    one.answered.set_exception(answers)
                else:
                    one.answered.set_result((answers, loaded))


def _answered(loaded: Loaded, together: list[_Question]) -> list[Prediction | Exception]:
    try:
        answers = loaded.predictor.predict(
            np.concatenate([q.profiles for q in together]),
            calibrated=np.concatenate([q.calibrated for q in together]),
        )
    except Exception as error:
        if len(together) == 1:
            return [error]
        # One of them is to blame: the others get their answers.
        return [_answered(loaded, [question])[0] for question in together]
    parts: list[Prediction | Exception] = []
    low = 0
    for question in together:
        rows = slice(low, low + len(question.profiles))
        parts.append(answers[rows])
        low = rows.stop
    return parts


class _BodyLimit:
    """Refuse bodies that are too long, before they are in memory."""

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"")
        # What is announced is what comes: the server sees to that.
        announced = int(told) if told.isdigit() else 0
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            if announced <= self._most:
                message = await receive()
                seen += len(message.get("body", b""))
                if seen <= self._most:
                    return message
            raise HTTPException(
                413, f"The body is larger than {self._most / 1e6:g} MB. Send fewer profiles."
            )

        await self._app(scope, counted, send)


def create_app(
    tracking: Tracking,
    uri: str | None = None,
    *,
    refresh_seconds: float = 5.0,
    max_bytes: int = 32_000_000,
) -> FastAPI:
    """Return the service.

    Parameters
    ----------
    tracking
        Where the model is registered.
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None for the only champion.
    refresh_seconds
        How often it is looked up which version the address means.
    max_bytes
        Longest body.
    """
    holder = Holder(tracking, uri)
    batcher: list[Batcher] = []

    async def refreshed() -> None:
        while True:
            await asyncio.to_thread(holder.refresh)
            await asyncio.sleep(refresh_seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.append(Batcher(holder))
        tasks = [asyncio.create_task(refreshed()), asyncio.create_task(batcher[0].run())]
        yield
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
        holder.asking.shutdown(cancel_futures=True)

    app = FastAPI(
        title="Bragg",
        summary="From a measured Bragg profile to crystal system and cell.",
        version="1",
        lifespan=lifespan,
    )
    app.add_middleware(_BodyLimit, most=max_bytes)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    for kind in _REFUSED:
        app.add_exception_handler(kind, refused)

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        # What was sent is not sent back: it may be long, or no text at all.
        detail = f"The request is wrong at {place}: {first['msg']}.".encode(errors="replace")
        return JSONResponse({"detail": detail.decode()}, status_code=422)

    app.add_exception_handler(RequestValidationError, malformed)

    def loaded() -> Loaded:
        if holder.current is None:
            raise _NotReadyError(holder.problem or "The model is being loaded.")
        return holder.current

    async def not_ready(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=503)

    app.add_exception_handler(_NotReadyError, not_ready)
    problems: dict[int | str, dict[str, Any]] = {
        code: {"model": Problem} for code in (400, 413, 422, 503)
    }

    @app.get("/health", summary="The process lives.")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="A model answers.", responses={503: {"model": Problem}})
    async def ready() -> Model:
        return loaded().about

    @app.get("/model", summary="Grid, phases, units.", responses={503: {"model": Problem}})
    async def model() -> About:
        one = loaded()
        campaign = one.predictor.campaign
        grid = campaign.grid
        return About(
            model=one.about,
            points=one.predictor.points,
            tof={"start": grid.start, "relative_step": grid.relative_step},
            phases={p.name: p.crystal_system.name for p in campaign.phases},
            units={p: "Å" if p in "abc" else "degree" for p in CELL_PARAMETERS},
        )

    @app.post("/predict", summary="Answer for profiles on the grid.", responses=problems)
    async def predict(request: ProfilesRequest) -> Answers:
        points = loaded().predictor.points
        lengths = {len(profile) for profile in request.profiles}
        if lengths != {points}:
            raise PredictorError(
                f"The model answers for profiles of {points} points; got {sorted(lengths)}. GET "
                f"/model tells the grid; POST /predict/file takes a file with a grid of its own."
            )
        prediction, by = await batcher[0].ask(np.array(request.profiles, dtype=np.float32))
        return _told(prediction, by)

    @app.post("/predict/array", summary="Answer for profiles in an NPY file.", responses=problems)
    async def predict_array(
        file: Annotated[bytes, Body(media_type="application/octet-stream", description=_NPY)],
    ) -> Answers:
        return _told(*await batcher[0].ask(_array(file, loaded().predictor.points)))

    @app.post("/predict/file", summary="Answer for a measured file.", responses=problems)
    async def predict_file(request: FileRequest) -> Answers:
        campaign = loaded().predictor.campaign
        measured = await asyncio.to_thread(_measured, request, campaign)
        prepared = np.stack([m.prepared for m in measured]).astype(np.float32)
        calibrated = np.array([m.calibration is not None and not m.nominal for m in measured])
        answers = _told(*await batcher[0].ask(prepared, calibrated))
        for one, m in zip(answers.answers, measured, strict=True):
            one.bank, one.warnings = m.profile.bank, list(m.warnings)
        return answers

    return app


class _NotReadyError(RuntimeError):
    """There is no model yet."""


def _array(file: bytes, points: int) -> NDArray[np.float32]:
    """Read profiles (n, points) from an NPY file; nothing in it is executed or believed."""
    stream = io.BytesIO(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, by_column, dtype = read_header[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, EOFError) as error:
        raise PredictError(
            "The body is no NPY file. Send what numpy.save writes, or JSON to POST /predict."
        ) from error
    rows = shape[0] if len(shape) == 2 else 0
    if dtype.kind != "f" or by_column or not 1 <= rows <= MOST or shape[1] != points:
        raise PredictError(
            f"Wanted are real numbers of shape (n, {points}), in C order, n at most {MOST}; the "
            f"file holds {dtype} of shape {shape}{', in Fortran order' if by_column else ''}."
        )
    values = stream.read()
    if len(values) != rows * points * dtype.itemsize:
        raise PredictError(
            f"The NPY file is cut off or too long: {len(values)} bytes follow its header, "
            f"{rows * points * dtype.itemsize} were to."
        )
    with np.errstate(over="ignore"):  # what is too large is told as not finite
        return np.frombuffer(values, dtype).reshape(rows, points).astype(np.float32)


def _measured(request: FileRequest, campaign: Any) -> list[Any]:
    name = Path(request.name).name or "profile"
    with tempfile.TemporaryDirectory(prefix="bragg-service-") as directory:
        path = Path(directory) / "".join(c if c.isalnum() or c in "._- " else "_" for c in name)
        calibration = None
        try:
            path.write_text(request.text, encoding="utf-8")
            if request.instrument is not None:
                calibration = path.with_name("calibration.instprm")
                calibration.write_text(request.instrument, encoding="utf-8")
            return load_measurements(path, campaign, calibration, request.bank, request.two_theta)
        except UnicodeEncodeError as error:
            raise PredictError(f"{name} is not a text: {error.reason}.") from error
        except _REFUSED as error:
            # Whose directory this is matters to nobody.
            raise PredictError(str(error).replace(f"{directory}/", "")) from error


def _told(prediction: Prediction, by: Loaded) -> Answers:
    names = by.predictor.phase_names
    systems = by.predictor.targets.crystal_systems
    answers = []
    for row, code in enumerate(prediction.phase):
        cell = prediction.cells[row]
        answers.append(
            One(
                crystal_system=CrystalSystem(int(systems[code])).name,
                phase=names[code],
                probabilities={
                    name: float(p) for name, p in zip(names, prediction.probabilities[row],
                                                      strict=True)
                },
                cell={
                    name: float(v) if np.isfinite(v) else None
                    for name, v in zip(CELL_PARAMETERS, cell, strict=True)
                },
                **verdict_json(prediction, row),
            )
        )  # fmt: skip
    return Answers(model=by.about, answers=answers)
