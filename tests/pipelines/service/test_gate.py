"""What requests pass first: clients that leave, bodies that are long or do not come."""

import asyncio
import signal
import subprocess
import sys
from typing import Any

import pytest

from pipelines.service import gate
from pipelines.service.gate import Gate, Metrics, Rules
from tests.servers import ROOT, free_port

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/predict",
    "client": ("127.0.0.1", 1),
    "headers": [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")],
}
PART = {"type": "http.request", "body": b"1" * 10, "more_body": True}
LAST = {"type": "http.request", "body": b"1", "more_body": False}


class Work:
    """An application that works until it is released or cancelled."""

    def __init__(self) -> None:
        self.body = b""
        self.begun, self.released = asyncio.Event(), asyncio.Event()
        self.cancelled = False

    async def __call__(self, _: Any, receive: Any, send: Any) -> None:
        self.body = (await receive())["body"]
        self.begun.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


def handled(
    rules: Rules, *messages: dict[str, Any], stays: bool
) -> tuple[Work, list[Any], Metrics]:
    """Return the application, what was sent, and the metrics, after a request was handled."""

    async def main() -> tuple[Work, list[Any], Metrics]:
        work, sent, metrics = Work(), [], Metrics()
        waiting = list(messages)

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop(0)
            if stays:
                work.released.set()
                await asyncio.Future()
            await work.begun.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        gated = Gate(work, rules, metrics)
        await asyncio.wait_for(gated(dict(SCOPE), receive, send), 10)  # type: ignore[arg-type]
        return work, sent, metrics

    return asyncio.run(main())


def test_a_request_is_answered_with_its_body() -> None:
    work, sent, metrics = handled(Rules(), PART, LAST, stays=True)
    assert work.body == b"1" * 11
    assert [message.get("status") for message in sent] == [200, None]
    assert metrics.requests == {("other", 200): 1}
    assert metrics.active == 0


def test_the_work_for_a_client_that_leaves_ends() -> None:
    work, sent, metrics = handled(Rules(), PART, LAST, stays=False)
    assert work.cancelled
    assert sent == []
    assert metrics.requests == {("other", 499): 1}


def test_a_body_that_grows_too_long_is_refused_before_its_end() -> None:
    work, sent, _ = handled(Rules(max_bytes=25), *[PART] * 1000, stays=True)
    assert sent[0]["status"] == 413
    assert not work.begun.is_set()


def test_a_body_that_does_not_come_is_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_BODY_SECONDS", 0.05)
    work, sent, metrics = handled(Rules(), PART, stays=True)
    assert sent[0]["status"] == 408
    assert not work.begun.is_set()
    assert metrics.active == 0


ENDLESS = """
import sys, time
import uvicorn
from pipelines.service import gate
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    print("ready", flush=True)
    await receive()
    time.sleep(300)
gate._STOP_SECONDS = 0.5
gate.PunctualServer(uvicorn.Config(app, port=int(sys.argv[1]), log_level="error")).run()
"""


def test_it_stops_whatever_still_computes() -> None:
    command = [sys.executable, "-c", ENDLESS, str(free_port())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        server.terminate()
        assert server.wait(60) == 128 + signal.SIGTERM
