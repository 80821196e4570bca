"""Batches and the supervised tasks of the service."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from bragg_models.predictors import Prediction
from catalog.tracking import Tracking
from pipelines.service.batching import Batcher, FileReaders, ModelHolder, ServedModel, supervise
from pipelines.service.fairness import CLIENT, FairSlots, OverloadedError


@dataclass
class Waiting:
    """A model that predicts when it is released: a probability of its own, a as it came."""

    probability: float
    released: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)

    def predict(self, profiles: np.ndarray, calibrated: np.ndarray) -> Prediction:
        assert len(calibrated) == len(profiles)
        assert self.released.wait(20)
        self.batches.append(len(profiles))
        if (profiles < 0).any():
            raise ValueError("negative")
        n = len(profiles)
        return Prediction(
            np.full((n, 1), self.probability),
            np.zeros(n, dtype=np.intp),
            np.repeat(profiles[:, :1], 6, 1),
        )


def served(model: Waiting) -> ServedModel:
    return ServedModel(version=None, predictor=model)  # type: ignore[arg-type]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


def profiles(value: float, count: int = 1, points: int = 4) -> np.ndarray:
    return np.full((count, points), value, dtype=np.float32)


def test_a_waiting_profile_is_predicted_by_the_model_of_its_grid(
    executor: ThreadPoolExecutor,
) -> None:
    """The champion changes while profiles that were resampled for the old one wait."""

    async def main() -> None:
        batcher = Batcher(executor)
        task = asyncio.create_task(batcher.run())
        old, new = Waiting(1.0), Waiting(2.0)
        champion, successor = served(old), served(new)
        calls = [
            asyncio.create_task(batcher.predict(champion, profiles(7.0))),
            asyncio.create_task(batcher.predict(successor, profiles(8.0))),
            asyncio.create_task(batcher.predict(champion, profiles(9.0))),
        ]
        await asyncio.sleep(0.05)
        old.released.set()
        new.released.set()
        predictions = [prediction for prediction, _ in await asyncio.gather(*calls)]
        assert [float(p.probabilities[0, 0]) for p in predictions] == [1.0, 2.0, 1.0]
        assert [float(p.cells[0, 0]) for p in predictions] == [7.0, 8.0, 9.0]
        task.cancel()

    run(main)


def test_waiting_profiles_are_a_batch_and_a_bad_profile_fails_alone(
    executor: ThreadPoolExecutor,
) -> None:
    async def main() -> None:
        batcher = Batcher(executor)
        task = asyncio.create_task(batcher.run())
        model = Waiting(1.0)
        shared = served(model)
        values = [1.0, 2.0, -1.0, 3.0]
        calls = [
            asyncio.create_task(batcher.predict(shared, profiles(v), request=f"r{k}"))
            for k, v in enumerate(values)
        ]
        await asyncio.sleep(0.05)
        model.released.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, ValueError) for result in results] == [v < 0 for v in values]
        good = [result for result in results if isinstance(result, tuple)]
        assert [float(prediction.cells[0, 0]) for prediction, _ in good] == [1, 2, 3]
        # The first began before the others came; these were predicted again, each alone.
        assert [batches for _, batches in good] == [["r0:0:1"], ["r1:0:1"], ["r3:0:1"]]
        task.cancel()

    run(main)


def test_too_many_waiting_profiles_are_refused_and_the_rest_predicted(
    executor: ThreadPoolExecutor,
) -> None:
    async def main() -> None:
        batcher = Batcher(executor, max_waiting=10)
        task = asyncio.create_task(batcher.run())
        model = Waiting(1.0)
        shared = served(model)
        begun: list[int] = []
        calls = [
            asyncio.create_task(
                batcher.predict(shared, profiles(1.0, 5), on_begin=partial(begun.append, k))
            )
            for k in range(3)
        ]
        await asyncio.sleep(0.05)
        model.released.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, OverloadedError) for result in results] == [False, False, True]
        assert begun == [0, 1]
        # When they are done there is room again.
        prediction, batches = await batcher.predict(shared, profiles(1.0, 10), request="r")
        assert len(prediction.phase) == len(batches) == 10
        assert set(batches) == {"r:0:10"}
        task.cancel()

    run(main)


def test_hundreds_of_profiles_do_not_delay_a_single_profile(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        batcher = Batcher(executor)
        task = asyncio.create_task(batcher.run())
        model = Waiting(1.0)
        shared = served(model)
        many = asyncio.create_task(batcher.predict(shared, profiles(1.0, 400)))
        await asyncio.sleep(0.05)
        single = asyncio.create_task(batcher.predict(shared, profiles(2.0)))
        await asyncio.sleep(0.05)
        model.released.set()
        prediction, _ = await single
        assert prediction.cells[0, 0] == 2.0
        assert not many.done()
        assert len(model.batches) <= 3
        prediction, _ = await many
        assert prediction.cells[:, 0].tolist() == [1.0] * 400
        assert batcher.waiting == 0
        task.cancel()

    run(main)


def test_clients_get_equal_shares_of_batches(executor: ThreadPoolExecutor) -> None:
    """One client's fifty requests are one client's, not fifty."""

    async def main() -> None:
        batcher = Batcher(executor)
        model = Waiting(1.0)
        shared = served(model)

        async def call(client: str, value: float, count: int) -> Prediction:
            CLIENT.set(client)
            return (await batcher.predict(shared, profiles(value, count)))[0]

        many = [asyncio.create_task(call("many", 1.0, 20)) for _ in range(50)]
        few = asyncio.create_task(call("few", 2.0, 16))
        await asyncio.sleep(0.05)
        task = asyncio.create_task(batcher.run())
        model.released.set()
        assert (await few).cells[:, 0].tolist() == [2.0] * 16
        assert sum(model.batches) <= 48  # of 1,016
        for waiting in (*many, task):
            waiting.cancel()

    run(main)


def test_slots_go_to_clients_in_turn_and_back_from_those_that_leave() -> None:
    async def main() -> None:
        slots, order = FairSlots(1, 8, "pieces"), []
        released = asyncio.Event()

        async def work(client: str, number: int) -> None:
            CLIENT.set(client)
            async with slots.slot():
                order.append((client, number))
                await released.wait()

        tasks = [asyncio.create_task(work("a", number)) for number in range(4)]
        tasks += [asyncio.create_task(work("b", number)) for number in range(2)]
        await asyncio.sleep(0.01)
        tasks.pop(1).cancel()
        await asyncio.sleep(0.01)
        released.set()
        await asyncio.gather(*tasks)
        assert order == [("a", 0), ("b", 0), ("a", 2), ("b", 1), ("a", 3)]
        assert slots.waiting == 0

    run(main)


def test_a_client_that_fills_the_queue_leaves_room_for_the_rest() -> None:
    async def main() -> None:
        slots = FairSlots(1, 3, "pieces")
        released = asyncio.Event()

        async def work(client: str) -> None:
            CLIENT.set(client)
            async with slots.slot():
                await released.wait()

        tasks = [asyncio.create_task(work(client)) for client in "aaaabbcde"]
        await asyncio.sleep(0.01)
        released.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [c for c, r in zip("aaaabbcde", results, strict=True) if r is not None]
        assert refused == ["a", "b", "e"]  # three of a, one of each other, six in all
        assert {type(r) for r in results} == {type(None), OverloadedError}

    run(main)


def test_a_cancelled_call_is_predicted_no_further(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        batcher = Batcher(executor)
        task = asyncio.create_task(batcher.run())
        model = Waiting(1.0)
        call = asyncio.create_task(batcher.predict(served(model), profiles(1.0, 400)))
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.sleep(0.05)
        assert batcher.waiting == 0
        model.released.set()
        prediction, _ = await batcher.predict(served(model), profiles(1.0, 2))
        assert len(prediction.phase) == 2
        assert sum(model.batches) < 30
        task.cancel()

    run(main)


def test_files_that_wait_are_bounded() -> None:
    async def main() -> None:
        released = threading.Event()
        files = FileReaders(1, 2)
        calls = [asyncio.create_task(files.run(lambda: released.wait(20))) for _ in range(3)]
        await asyncio.sleep(0.05)
        released.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, OverloadedError) for result in results] == [False, False, True]
        assert await files.run(lambda: 5) == 5
        files.shutdown()

    run(main)


class BrokenTracking(Tracking):
    """A registry whose errors have no message."""

    def __init__(self) -> None:
        self.uri = "sqlite:///nowhere.db"

    @property
    def client(self) -> None:  # type: ignore[override]
        raise RuntimeError


def test_a_refresh_that_fails_without_a_message_is_recorded() -> None:
    holder = ModelHolder(BrokenTracking(), "models:/small@champion")
    holder.refresh()
    assert holder.error == "RuntimeError."
    assert holder.current is None
    assert holder.refreshed_at is None


@pytest.mark.slow
def test_a_task_that_fails_is_reported_and_runs_again() -> None:
    async def main() -> None:
        runs, reasons = [], []
        restarted = asyncio.Event()

        async def task() -> None:
            runs.append(len(runs))
            if len(runs) == 1:
                raise RuntimeError
            restarted.set()
            await asyncio.sleep(60)

        supervised = asyncio.create_task(supervise(task, reasons.append))
        await restarted.wait()
        assert reasons == ["RuntimeError"]
        assert len(runs) == 2
        supervised.cancel()

    run(main)
