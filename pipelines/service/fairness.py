"""Clients get in turn what they wait for, however much each of them has asked for."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""Who sent the request in work: its token, or its address."""


class OverloadedError(RuntimeError):
    """More requests than the service can hold."""


def check_room(what: str, new: int, waiting: int, of_client: int, most: int) -> None:
    """Raise an `OverloadedError` if ``most`` would wait, or twice that for a client without any."""
    if waiting and waiting + new > (most if of_client else 2 * most):
        raise OverloadedError(f"{waiting} {what} are waiting already. Try again later.")


class FairSlots:
    """Places for work, which clients that wait get in turn, each client's requests in order.

    At most ``most`` pieces of work run or wait, and some more of clients without any; one more is
    an `OverloadedError`.
    """

    def __init__(self, slots: int, most: int, what: str) -> None:
        self._free, self._most, self._what = slots, most, what
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # the next client first
        self._held: dict[str, int] = {}  # by client, running or waiting

    @property
    def waiting(self) -> int:
        """How much runs or waits."""
        return sum(self._held.values())

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a place, and hold it."""
        client = CLIENT.get()
        held = self._held.get(client, 0)
        check_room(self._what, 1, self.waiting, held, self._most)
        self._held[client] = held + 1
        try:
            await self._turn(client)
            try:
                yield
            finally:
                self._free += 1
                self._next()
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

    async def _turn(self, client: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the place came as the client left
                self._free += 1
                self._next()
            raise

    def _next(self) -> None:
        """Give free places to those whose turn it is."""
        while self._free and self._queues:
            client, queue = next(iter(self._queues.items()))
            del self._queues[client]
            turn = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind the others
            if not turn.done():  # its client is there
                self._free -= 1
                turn.set_result(None)
