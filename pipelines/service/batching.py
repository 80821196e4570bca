"""The served model and its batches: many small requests become one call of the model."""

import asyncio
import collections
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from bragg_data.arrays import Floats32, Mask
from bragg_data.errors import first_line
from bragg_models.predictors import Prediction, Predictor, load_predictor
from catalog import banks, registry
from catalog.model_files import downloaded_model
from catalog.tracking import Tracking, open_existing
from pipelines.prediction.files import PredictError
from pipelines.service.fairness import CLIENT, FairSlots, check_room
from pipelines.service.schemas import MAX_PROFILES, ModelInfo, ReadyInfo

# Profiles that wait for the model; of 2,807 points they take 46 MB.
MAX_WAITING_PROFILES = 8 * MAX_PROFILES

MAX_WAITING_FILES = 32  # files that are being read or wait for it
# Profiles of a batch, which is not interrupted: hopeless ones take up to 0.05 s each on a core.
_BATCH = 16
_RESTART_SECONDS = 1.0

_T = TypeVar("_T")


class NotReadyError(RuntimeError):
    """No model is loaded yet."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model version, ready to predict. It is replaced as a whole, never changed."""

    version: registry.ModelVersion
    predictor: Predictor

    @property
    def info(self) -> ModelInfo:
        """The facts about a model that every response states."""
        version, provenance = self.version, self.predictor.provenance
        return ModelInfo(
            uri=version.uri,
            name=version.name,
            version=version.version,
            kind=provenance.model,
            data=provenance.data.tag,
            trained_at=provenance.trained_at,
        )


class ModelHolder:
    """The models that predict now, looked up periodically: a new champion needs no restart."""

    def __init__(self, tracking: Tracking | str, uri: str | None) -> None:
        # A database by its address: there may be none yet.
        self.tracking, self._uri = tracking, uri
        # The one thread in which models are loaded and called: OpenMP keeps a team of threads for
        # each thread that ever computed, and two of them on all cores work at half speed.
        self.executor = ThreadPoolExecutor(1, "model")
        self.banks: tuple[ServedModel, ...] = ()  # one model; of an instrument's banks each its own
        self.error = ""  # of the last refresh, if that failed
        self.refreshed_at: datetime | None = None  # the last time without failure

    @property
    def current(self) -> ServedModel | None:
        """The first model, or None before it is loaded."""
        return next(iter(self.banks), None)

    @property
    def loaded_banks(self) -> tuple[ServedModel, ...]:
        """The models that predict now; raises `NotReadyError` if none is loaded yet."""
        if not self.banks:
            raise NotReadyError(self.error or "The model is being loaded.")
        return self.banks

    @property
    def loaded(self) -> ServedModel:
        """The only model; raises as `loaded_banks`, and a `PredictError` if there are several."""
        model, *further = self.loaded_banks
        if further:
            raise PredictError(
                "This service has a model for each of several banks: POST /predict/file takes "
                "files; for profiles on the grid of one bank's model, serve that (--model)."
            )
        return model

    def ready_info(self) -> ReadyInfo:
        """Return the version that predicts now, and why the registry cannot be read if so."""
        at = self.refreshed_at
        first, *further = self.loaded_banks
        return ReadyInfo(
            **first.info.model_dump(),
            other_banks=[served.version.uri for served in further],
            refreshed_at=None if at is None else at.isoformat("T", "seconds"),
            refresh_error=self.error or None,
        )

    def _versions(self) -> list[registry.ModelVersion]:
        if isinstance(self.tracking, str):
            self.tracking = open_existing(self.tracking) or self.tracking
        place = None if isinstance(self.tracking, str) else self.tracking
        if place is not None and (of_banks := banks.champions(place, self._uri)):
            return of_banks
        was_registered = self.current is not None and not self.current.version.packaged
        if self._uri is None and place is not None and was_registered:
            # A champion that is gone is an error: its clients want no model of another campaign.
            return [registry.find(place, registry.champion_uri(place))]
        return [registry.find_or_packaged(place, self._uri)]

    @property
    def tracking_uri(self) -> str:
        """Where the models are registered."""
        return self.tracking if isinstance(self.tracking, str) else self.tracking.uri

    def refresh(self) -> None:
        """Load the version that the address means now, if it has changed; keep the old one if not.

        A failure is recorded in ``error``, and the loaded version stays.
        """
        try:
            known = {served.version.uri: served for served in self.banks}
            self.banks = tuple(
                known.get(version.uri) or self._loaded_version(version)
                for version in self._versions()
            )
        except Exception as error:
            self.error = f"{first_line(error)}."
        else:
            self.error, self.refreshed_at = "", datetime.now(UTC)

    def _loaded_version(self, version: registry.ModelVersion) -> ServedModel:
        with downloaded_model(self.tracking_uri, version) as directory:
            predictor = self.executor.submit(_load_and_warm_up, directory).result()
        return ServedModel(version, predictor)


def _load_and_warm_up(directory: Path) -> Predictor:
    """Load a model and call it once: something may have to be compiled or tabulated."""
    predictor = load_predictor(directory)
    profile = np.ones((1, predictor.points), dtype=np.float32)
    profile[:, predictor.points // 2] = 100
    predictor.predict(profile)
    return predictor


async def supervise(task: Callable[[], Awaitable[None]], on_error: Callable[[str], None]) -> None:
    """Run a task that never ends until cancelled; when it fails, report why and start it again."""
    while True:
        try:
            await task()
        except Exception as error:
            on_error(first_line(error))
        await asyncio.sleep(_RESTART_SECONDS)


class FileReaders:
    """Threads for blocking work, which clients get in turn."""

    def __init__(self, threads: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "files")
        self.slots = FairSlots(threads, max_waiting, "files")

    async def run(self, function: Callable[[], _T]) -> _T:
        """Return the result of a function; raises `OverloadedError` if too many calls wait."""
        async with self.slots.slot():
            return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def shutdown(self) -> None:
        """Drop what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class _Call:
    """Profiles for a certain model: on its grid, and predicted by no later one."""

    model: ServedModel
    profiles: Floats32
    calibrated: Mask
    prediction: asyncio.Future[Prediction]
    request: str  # its id
    client: str
    on_begin: Callable[[], object]
    parts: list[Prediction] = field(default_factory=list)  # of the first profiles, predicted
    taken: int = 0  # profiles that are predicted, or in the batch that is
    batches: list[str] = field(default_factory=list)  # of each profile that is predicted

    @property
    def left(self) -> int:
        """Profiles that are not predicted yet."""
        return len(self.profiles) - sum(len(part.phase) for part in self.parts)


class _Slice(NamedTuple):
    """Profiles of a call in a batch."""

    call: _Call
    rows: slice

    @property
    def profiles(self) -> Floats32:
        return self.call.profiles[self.rows]


class _Predicted(NamedTuple):
    """What became of a slice, and the name of the batch that it was predicted in."""

    prediction: Prediction | Exception
    batch: str


class Batcher:
    """Calls the model with profiles that wait, in its thread, outside the event loop.

    A batch takes profiles of all waiting clients in turn, and of the requests of each: one with
    hundreds does not hold up the others, and a batch of hopeless profiles ends within a second. A
    request whose client left, or one profile of which was refused, is dropped.
    """

    def __init__(self, executor: Executor, *, max_waiting: int = MAX_WAITING_PROFILES) -> None:
        self._executor = executor
        self._max_waiting = max_waiting
        self._calls: collections.deque[_Call] = collections.deque()
        self._served: dict[str, int] = {}  # by waiting client, the number of its last batch
        self._batches = 0
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Profiles that wait, or are being predicted."""
        return sum(call.left for call in self._calls)

    async def predict(
        self,
        model: ServedModel,
        profiles: Floats32,
        calibrated: Mask | None = None,
        request: str = "",
        on_begin: Callable[[], object] = lambda: None,
    ) -> tuple[Prediction, list[str]]:
        """Return the predictions of profiles without background, shape (n, points).

        The model for whose grid they were prepared predicts, even if another one becomes the
        champion while they wait. ``calibrated``, shape (n,): whether each comes from a calibrated
        instrument; left out, all do. Returned is also, for each profile, the batch that it was
        predicted in, as ``REQUEST:FIRST:END`` of each part: on others, a network's result may
        differ in its last bits; ``on_begin`` is called before the first. Raises `OverloadedError`
        if too many profiles wait already.
        """
        client = CLIENT.get()
        of_client = sum(call.left for call in self._calls if call.client == client)
        check_room("profiles", len(profiles), self.waiting, of_client, self._max_waiting)
        if calibrated is None:
            calibrated = np.ones(len(profiles), dtype=bool)
        prediction: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        call = _Call(model, profiles, calibrated, prediction, request, client, on_begin)
        self._calls.append(call)
        self._arrived.set()
        try:
            return await prediction, call.batches
        finally:
            self._calls.remove(call)

    async def run(self) -> None:
        """Predict until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = self._batch()
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            predictions: list[_Predicted]
            try:
                predictions = await loop.run_in_executor(self._executor, _predict, batch)
            except Exception as error:
                predictions = [_Predicted(error, "")] * len(batch)
            for (prediction, name), (call, rows) in zip(predictions, batch, strict=True):
                if call.prediction.done():
                    continue  # the client is gone, or an earlier profile was refused
                if isinstance(prediction, Exception):
                    call.prediction.set_exception(prediction)
                    continue
                call.parts.append(prediction)
                call.batches += [name] * (rows.stop - rows.start)
                if call.taken == len(call.profiles):
                    call.prediction.set_result(Prediction.concatenated(call.parts))

    def _batch(self) -> list[_Slice]:
        """Take profiles of one model from the calls in turn, in equal shares."""
        open_calls = [
            call
            for call in self._calls
            if not call.prediction.done() and call.taken < len(call.profiles)
        ]
        if not open_calls:
            return []
        model = open_calls[0].model
        clients: dict[str, list[_Call]] = {}
        for call in open_calls:
            if call.model is model:
                clients.setdefault(call.client, []).append(call)
        last = {client: self._served.get(client, 0) for client in clients}
        self._served, self._batches = last, self._batches + 1
        batch, room, share = [], _BATCH, max(_BATCH // len(clients), 1)
        for client in sorted(clients, key=last.__getitem__):  # who waits longest first
            of_client = min(share, room)
            of_call = max(of_client // len(clients[client]), 1)
            for call in clients[client]:
                count = min(of_call, len(call.profiles) - call.taken, of_client)
                if not count:
                    break
                if not call.taken:
                    call.on_begin()
                batch.append(_Slice(call, slice(call.taken, call.taken + count)))
                call.taken += count
                of_client, room = of_client - count, room - count
                last[client] = self._batches
                self._calls.remove(call)  # to the end, behind those that wait longer
                self._calls.append(call)
        return batch


def _predict(batch: list[_Slice]) -> list[_Predicted]:
    name = " ".join(f"{call.request}:{rows.start}:{rows.stop}" for call, rows in batch)
    try:
        prediction = batch[0].call.model.predictor.predict(
            np.concatenate([part.profiles for part in batch]),
            calibrated=np.concatenate([call.calibrated[rows] for call, rows in batch]),
        )
    except Exception as error:
        if len(batch) == 1:
            return [_Predicted(error, name)]
        # One of the calls is at fault: the others get their predictions.
        return [_predict([part])[0] for part in batch]
    ends = np.cumsum([len(part.profiles) for part in batch]).tolist()
    starts = zip([0, *ends], ends, strict=False)
    return [_Predicted(prediction[low:end], name) for low, end in starts]
