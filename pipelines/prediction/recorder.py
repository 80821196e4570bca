"""The service's recorder: answers of the same moment become one transaction of the record."""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from bragg_models.predictors import Prediction
from pipelines.prediction.batching import ServedModel
from pipelines.prediction.input_statistics import Statistics, statistics_of, with_decisions
from pipelines.prediction.record import Exchange, Origin, Record, RecordError, origin_of
from pipelines.prediction.requests import PreparedRequest

logger = logging.getLogger("bragg.record")

_MOST_WAITING = 200_000_000  # bytes of requests; more come only where the disk hardly writes
_WEIGHT = 0.02  # of the newest profile in the running means: of about the last fifty


@dataclass(frozen=True, eq=False)
class Answered:
    """A request with its profiles, and, when they are predicted, prediction and answers."""

    exchange: Exchange  # its origin and statistics are added by the recorder
    model: ServedModel
    prepared: PreparedRequest
    prediction: Prediction | None = None


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

    A request is written when its first profile is in a batch, so that the record has all of the
    batch before any answer, and its answers are added.
    """

    def __init__(self, record: Record) -> None:
        self.counts = Counts()
        self._record = record
        self._executor = ThreadPoolExecutor(1, "record")
        self._waiting: deque[tuple[Answered, asyncio.Future[bool]]] = deque()
        self._bytes = 0  # of the requests that wait
        self._arrived = asyncio.Event()
        self._origins: dict[str, Origin] = {}

    async def put(self, answered: Answered) -> bool:
        """Record a request and its answers; returns whether they are in the record now."""
        return await self.put_soon(answered)

    def put_soon(self, answered: Answered) -> asyncio.Future[bool]:
        """Record a request, and its answers if it has any, before what is put later."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        size = len(answered.exchange.body)
        if self._waiting and self._bytes + size > _MOST_WAITING:
            self.counts.lost += len(answered.exchange.answers)
            future.set_result(False)
            return future
        self._bytes += size
        self._waiting.append((answered, future))
        self._arrived.set()
        return future

    async def run(self) -> None:
        """Write until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            group, self._waiting, self._bytes = list(self._waiting), deque(), 0
            try:
                written = await loop.run_in_executor(self._executor, self._write, group)
            except Exception as error:
                if not isinstance(error, RecordError):
                    logger.exception("answers are not recorded")
                logger.warning("%s", error)
                written = [False] * len(group)
            for (answered, future), done in zip(group, written, strict=True):
                self.counts.lost += 0 if done else len(answered.exchange.answers)
                if not future.done():
                    future.set_result(done)

    def _write(self, group: Sequence[tuple[Answered, object]]) -> list[bool]:
        exchanges = [self._complete(answered) for answered, _ in group]
        written = self._record.write(exchanges)
        for exchange, done in zip(exchanges, written, strict=True):
            for statistics in exchange.statistics if done else ():
                self.counts.add(statistics)
        return written

    def _complete(self, answered: Answered) -> Exchange:
        """Return what is written of a request: with origin and statistics."""
        uri, predictor = answered.model.version.uri, answered.model.predictor
        if uri not in self._origins:
            self._origins[uri] = origin_of(predictor, answered.model.version)
        exchange = replace(answered.exchange, origin=self._origins[uri])
        if answered.prediction is None:
            return exchange
        step = predictor.campaign.grid.relative_step
        statistics = statistics_of(answered.prepared.profiles, step, answered.prepared.gridded)
        return replace(exchange, statistics=with_decisions(statistics, answered.prediction))

    def close(self) -> None:
        """Write what waits, and close the record."""
        self._executor.shutdown()
        self._record.close()
