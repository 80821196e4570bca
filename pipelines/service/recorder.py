"""The service's recorder: answers of the same moment become one transaction of the record."""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from bragg_models.predictors import Prediction
from pipelines.recording.input_statistics import Statistics, statistics_of, with_decisions
from pipelines.recording.record import Exchange, Origin, Record, RecordError, origin_of
from pipelines.service.batching import ServedModel
from pipelines.service.requests import BanksRequest

_OfParts = Mapping[int, Sequence[Statistics]]

logger = logging.getLogger("bragg.record")

_MOST_WAITING = 200_000_000  # bytes of requests; more come only where the disk hardly writes
_MOST_BEGUN = 50_000_000  # bytes of requests that are in a batch
_WEIGHT = 0.02  # of the newest profile in the running means: of about the last fifty


@dataclass(frozen=True, eq=False)
class Answered:
    """A request with its profiles, and, when they are predicted, predictions and answers."""

    exchange: Exchange  # its origin, and statistics of the profiles, are added by the recorder
    models: Sequence[ServedModel]
    prepared: BanksRequest | None = None
    predictions: Mapping[int, Prediction] = field(default_factory=dict)  # as the parts of prepared


@dataclass
class Counts:
    """What the record holds of this service, as Prometheus reads it."""

    recorded: int = 0
    lost: int = 0  # answers without a record, because it could not be written
    means: dict[str, float] = field(default_factory=dict)  # running ones, of the statistics

    def add(self, statistics: Statistics) -> None:
        """Count a recorded answer."""
        self.recorded += 1
        for name, value in statistics.items():
            if value is not None:
                self.means[name] = (1 - _WEIGHT) * self.means.get(name, value) + _WEIGHT * value

    def gauges(self) -> Mapping[str, float]:
        """Return the numbers by the names of their metrics."""
        means = {f"bragg_input_{name}": value for name, value in sorted(self.means.items())}
        return {"bragg_recorded": self.recorded, "bragg_not_recorded": self.lost, **means}


class Recorder:
    """Writes answers to the record in a thread of its own, before they are sent.

    With an answer all requests are written that were in its batches: the record has what an answer
    depends on before it is sent.
    """

    def __init__(self, record: Record) -> None:
        self.counts = Counts()
        self._record = record
        self._executor = ThreadPoolExecutor(1, "record")
        self._waiting: deque[tuple[Answered, asyncio.Future[bool]]] = deque()
        self._bytes = 0  # of the requests that wait
        self._begun: dict[str, Answered] = {}  # requests that are in a batch, not yet written
        self._begun_bytes = 0
        self._arrived = asyncio.Event()
        self._origins: dict[tuple[str, ...], Origin] = {}

    def begin(self, answered: Answered) -> None:
        """Keep a request, which is in a batch now, until an answer of the batch is recorded."""
        request, size = answered.exchange.request, len(answered.exchange.body)
        if request in self._begun:  # in a batch of another bank's model
            return
        while self._begun and self._begun_bytes + size > _MOST_BEGUN:  # their clients left
            self._taken(next(iter(self._begun)))
        self._begun[request] = answered
        self._begun_bytes += size

    def _taken(self, request: str) -> Answered | None:
        begun = self._begun.pop(request, None)
        self._begun_bytes -= 0 if begun is None else len(begun.exchange.body)
        return begun

    async def put(self, answered: Answered) -> bool:
        """Record a request and its answers; returns whether they are in the record now."""
        size = len(answered.exchange.body)
        if self._waiting and self._bytes + size > _MOST_WAITING:
            self.counts.lost += len(answered.exchange.answers)
            return False
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._bytes += size
        self._waiting.append((answered, future))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Write until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            group, self._waiting, self._bytes = list(self._waiting), deque(), 0
            exchanges = [answered.exchange for answered, _ in group]
            for exchange in exchanges:
                self._taken(exchange.request)
            names = {name for e in exchanges for batch in set(e.batches) for name in _names(batch)}
            with_them = [begun for name in sorted(names) if (begun := self._taken(name))]
            answered = [*with_them, *(answered for answered, _ in group)]
            try:
                written = await loop.run_in_executor(self._executor, self._write, answered)
                written = written[len(with_them) :]
            except Exception as error:
                if not isinstance(error, RecordError):
                    logger.exception("answers are not recorded")
                logger.warning("%s", error)
                written = [False] * len(group)
            for (entry, future), done in zip(group, written, strict=True):
                self.counts.lost += 0 if done else len(entry.exchange.answers)
                if not future.done():
                    future.set_result(done)

    def _write(self, group: Sequence[Answered]) -> list[bool]:
        both = zip(group, _statistics(group), strict=True)
        exchanges = [self._complete(answered, of_parts) for answered, of_parts in both]
        written = self._record.write(exchanges)
        for exchange, done in zip(exchanges, written, strict=True):
            for statistics in exchange.statistics if done else ():
                self.counts.add(statistics)
        return written

    def _complete(self, answered: Answered, of_parts: _OfParts) -> Exchange:
        """Return what is written of a request: with origin and statistics."""
        models = answered.models
        uris = tuple(model.version.uri for model in models)
        if uris not in self._origins:
            self._origins[uris] = origin_of([(m.predictor, m.version) for m in models])
        exchange = replace(answered.exchange, origin=self._origins[uris])
        if answered.prepared is None or not answered.predictions:
            return exchange
        statistics = {
            number: with_decisions(of_parts[number], prediction)
            for number, prediction in answered.predictions.items()
        }
        return replace(exchange, statistics=answered.prepared.in_order(statistics))

    def close(self) -> None:
        """Write what waits, and close the record."""
        self._executor.shutdown()
        self._record.close()


def _statistics(group: Sequence[Answered]) -> list[_OfParts]:
    """Return statistics of the parts that are predicted, of all on the same grid at once.

    Those of one profile take ten times as long as those of another one with it.
    """
    of_parts: list[dict[int, Sequence[Statistics]]] = [{} for _ in group]
    alike = defaultdict(list)
    for into, answered in zip(of_parts, group, strict=True):
        for number in answered.predictions:
            assert answered.prepared is not None  # as it is predicted
            part = answered.prepared.parts[number]
            grid, of_files = part.campaign.grid, bool(part.measurements)
            alike[grid.relative_step, grid.points, of_files].append((into, number, part))
    for (step, *_), parts in alike.items():
        profiles = np.concatenate([part.profiles for *_, part in parts])
        gridded = [profile for *_, part in parts for profile in part.gridded]
        rows = iter(statistics_of(profiles, step, gridded))
        for into, number, part in parts:
            into[number] = list(islice(rows, len(part.profiles)))
    return list(of_parts)


def _names(batch: str) -> list[str]:
    """Return the requests in a batch, which is named as by the batcher."""
    return [part.partition(".")[0] for part in batch.split()]
