"""Items of an iterable, computed ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class prefetched(Generic[Item]):  # noqa: N801 - used like a function
    """Compute the items of an iterable in a background thread, a few ahead.

    A context manager whose target is an iterator. At most ``depth`` items are computed, or being
    computed, before they are requested. An exception of the iterable is raised in place of its
    item. Leaving the context ends the thread.
    """

    def __init__(self, iterable: Iterable[Item], depth: int) -> None:
        self._iterable = iterable
        self._ready: queue.SimpleQueue[tuple[bool, Item | BaseException | None]]
        self._ready = queue.SimpleQueue()
        self._permits = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._consume()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._permits.release()
        self._thread.join()

    def _produce(self) -> None:
        try:
            iterator = iter(self._iterable)
            while True:
                self._permits.acquire()
                if self._stopped.is_set():
                    return
                item = next(iterator)
                self._ready.put((True, item))
                del item  # only the queue holds it, so that it is freed once used
        except StopIteration:
            self._ready.put((False, None))
        except BaseException as error:  # raised again in the caller's thread
            self._ready.put((False, error))

    def _consume(self) -> Iterator[Item]:
        while True:
            is_item, value = self._ready.get()
            if not is_item:
                if value is not None:
                    raise value  # type: ignore[misc]
                return
            self._permits.release()
            yield value  # type: ignore[misc]
            del value
