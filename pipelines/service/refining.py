"""Refinements of the service: in processes of their own, one after the other, under time limits."""

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Self, cast

import numpy as np
from pydantic import JsonValue

from bragg_data.crystallography.structure import Phase
from bragg_data.isolated_process import (
    IsolatedProcess,
    IsolatedProcessError,
    IsolatedProcessTimeoutError,
)
from bragg_data.measurement.load import measurement_from_profile
from bragg_data.measurement.readers import profile_from_arrays
from bragg_data.refinement.time_limit import time_limit, time_limit_per_profile
from catalog import registry
from pipelines.prediction import workflow
from pipelines.prediction.combination import CombinationError
from pipelines.prediction.distributed import predict_here
from pipelines.prediction.files import PredictError
from pipelines.prediction.mixture import with_mixtures
from pipelines.prediction.result import to_json
from pipelines.prediction.workflow import LoadedModel
from pipelines.recording.input_statistics import Statistics, statistics_of_predicted
from pipelines.registry.registration import load_version
from pipelines.service.fairness import FairSlots
from pipelines.service.inputs import as_files, left_out, renamed
from pipelines.service.schemas import FileRequest

PROFILE_SECONDS = 10.0
"""For the refinement of a profile, which takes tenths, or seconds where no phase is in it."""

Answer = dict[str, JsonValue]
"""A result as JSON values."""

REFINED = "refined"
"""How the batch of a refined answer begins in a record: its request, by itself."""

_WHOLE = 6  # times as long may all refinements of a request take
_REST_SECONDS = 30.0  # to read and predict, beyond which the process is ended
_MOST_WAITING = 32  # requests


class RefinementLostError(RuntimeError):
    """A process that died, or is not there yet."""


@dataclass(frozen=True)
class Setup:
    """What a process refines with."""

    phases: tuple[Phase, ...] = ()  # that are searched for on request
    seconds: float = PROFILE_SECONDS  # of a profile

    @property
    def most_seconds(self) -> float:
        """Of all refinements of a request."""
        return _WHOLE * self.seconds

    @property
    def batch(self) -> str:
        """What a record names with a refined answer: the time limit, which it depends on."""
        return f"{REFINED} {self.seconds!r}"

    @classmethod
    def of_batch(cls, batch: str) -> Self:
        """Return that of a recorded answer; of an old record's the limit is the usual one."""
        return cls(seconds=float(batch.removeprefix(REFINED) or PROFILE_SECONDS))


# ---- in its process ----------------------------------------------------------------------------


class _ClientLeft(BaseException):
    """No error, which would be handled within."""


class Refined(NamedTuple):
    """The answers to a request, and the statistics of their profiles."""

    answers: list[Answer]
    statistics: list[Statistics]


def refine_request(request: FileRequest, models: Sequence[LoadedModel], setup: Setup) -> Refined:
    """Predict and refine the files of a request; errors are those of the files."""
    phases = setup.phases if request.phases else ()
    limits = time_limit(setup.most_seconds), time_limit_per_profile(setup.seconds)
    with limits[0], limits[1], as_files(request) as (names, options):
        profiles, failures = predict_here(
            list(names), options, models, refine=True, further=phases, same_sample=True
        )
        if not profiles:
            raise next(iter(failures.values()))
        notes = left_out(failures)
        results = [profile.result() for profile in profiles]
        results = [replace(r, warnings=(*r.warnings, *notes)) for r in results]
        answers = [cast("Answer", _renamed(to_json(result), names)) for result in results]
        return Refined(answers, statistics_of_predicted(profiles))


class RefinementProcess:
    """Predicts and refines requests; ready when it has refined a calculated profile."""

    def __init__(
        self, setup: Setup, tracking_uri: str, versions: Sequence[registry.ModelVersion]
    ) -> None:
        self._setup, self._tracking_uri = setup, tracking_uri
        self._working = False
        self._load = lru_cache(maxsize=max(len(versions), 1))(self._loaded)
        signal.signal(signal.SIGUSR1, self._leave)
        for version in versions:
            _warm_up(self._load(version), setup.phases)

    def _leave(self, _: int, __: FrameType | None) -> None:
        if self._working:
            raise _ClientLeft

    def _loaded(self, version: registry.ModelVersion) -> LoadedModel:
        predictor = load_version(self._tracking_uri, version)
        return LoadedModel(predictor, version, self._tracking_uri, use_library=False)

    def predict(
        self, versions: Sequence[registry.ModelVersion], request: FileRequest
    ) -> Refined | str:
        """Return the results of a request as JSON values, or why it is refused."""
        try:
            self._working = True
            models = [self._load(version) for version in versions]
            return refine_request(request, models, self._setup)
        except (*workflow.FILE_ERRORS, CombinationError) as error:
            return str(error)
        except _ClientLeft:
            return "The client left."
        finally:
            self._working = False


def _renamed(value: JsonValue, names: dict[Path, str]) -> JsonValue:
    if isinstance(value, str):
        return renamed(value, names)
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    if isinstance(value, dict):
        return {key: _renamed(part, names) for key, part in value.items()}
    return value


def _warm_up(model: LoadedModel, phases: Sequence[Phase]) -> None:
    """Refine a calculated profile, and search it for phases: much is compiled, tabulated, cached.

    In the model's grid and range of cells anything may be hopeless: this is no error.
    """
    campaign = model.predictor.campaign
    with contextlib.suppress(*workflow.FILE_ERRORS):
        codes, cells = np.zeros(1, dtype=int), campaign.phases[0].cell[None]
        (pattern,) = model.refiner.simulator.simulate(codes, cells)
        counts = 1e4 * pattern / pattern.max() + 100.0
        measured = profile_from_arrays(campaign.grid.tof, counts, np.sqrt(counts))
        measurements = [measurement_from_profile(measured, campaign)]
        profiles = workflow.predict_measurements(measurements, model)
        refined = workflow.refine_predictions(profiles, model.refiner)
        with_mixtures(refined, None, phases or campaign.phases)


# ---- in the service's process ------------------------------------------------------------------


class _Worker:
    """A process for refinements, started again when it is lost."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.process: IsolatedProcess | None = None

    def start(self, tracking_uri: str, versions: Sequence[registry.ModelVersion]) -> None:
        self.process = IsolatedProcess(
            f"{__name__}:{RefinementProcess.__name__}",
            *(self._setup, tracking_uri, tuple(versions)),
            name="refine",
        )

    def predict(
        self, tracking_uri: str, versions: Sequence[registry.ModelVersion], request: FileRequest
    ) -> Refined:
        seconds = self._setup.most_seconds + _REST_SECONDS
        try:
            if self.process is None or not self.process.alive:
                self.start(tracking_uri, versions)
            process = cast("IsolatedProcess", self.process)
            outcome = process.call("predict", tuple(versions), request, seconds=seconds)
        except IsolatedProcessTimeoutError as error:
            raise PredictError(
                f"{request.name}: {error}, and was ended. Send fewer banks, or without refine."
            ) from error
        except IsolatedProcessError as error:
            raise RefinementLostError(
                f"The refinement was lost: {error}. Try again, or without refine."
            ) from error
        if isinstance(outcome, str):
            raise PredictError(outcome)
        return cast("Refined", outcome)

    def leave(self) -> None:
        """End what is in work, of which nobody needs the result."""
        if self.process is not None and self.process.alive:
            self.process.process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        if self.process is not None:
            self.process.close()


class RefinementWorkers:
    """Processes for refinements, which clients get in turn."""

    def __init__(self, count: int, setup: Setup) -> None:
        self.setup = setup
        self.slots = FairSlots(count, _MOST_WAITING, "refinements")
        self._workers = [_Worker(setup) for _ in range(count)]
        self._idle = list(self._workers)
        self._threads = ThreadPoolExecutor(max(count, 1), "refinements")
        self.ready = not count

    def start(self, tracking_uri: str, versions: Sequence[registry.ModelVersion]) -> None:
        """Start the processes; raises an IsolatedProcessError."""
        list(self._threads.map(lambda w: w.start(tracking_uri, versions), self._workers))
        self.ready = True

    async def predict(
        self, tracking_uri: str, versions: Sequence[registry.ModelVersion], request: FileRequest
    ) -> Refined:
        """Return the results of a request as JSON values.

        Raises `PredictError` for one that is refused or takes too long, `RefinementLostError`, and
        `OverloadedError` if too many wait.
        """
        if not self._workers:
            raise PredictError("This service does not refine: it was started with --workers 0.")
        if request.phases and not self.setup.phases:
            raise PredictError(
                "This service has no structures to search for. Start it with --phases FOLDER, or "
                "leave phases out."
            )
        if not self.ready:
            raise RefinementLostError("The processes for refinements are starting.")
        async with self.slots.slot():
            worker = self._idle.pop()
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(
                self._threads, worker.predict, tracking_uri, versions, request
            )
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                worker.leave()
                with contextlib.suppress(Exception):
                    await work
                raise
            finally:
                self._idle.append(worker)

    def shutdown(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
