"""What every request to the service passes: host, token, size, time, an id, log and metrics."""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from bragg_data.arrays import Mask
from pipelines.service.fairness import CLIENT

logger = logging.getLogger("bragg.access")

DRAIN_SECONDS = 6
"""For requests that are in work when the service is asked to stop."""

_STOP_SECONDS = 9.0  # then it ends, whatever still computes

RETRY_SECONDS = 1
_SHORTEST_TOKEN = 16
_BODY_SECONDS, _SEND_SECONDS = 60.0, 60.0
_HEAD_SECONDS = 10.0  # for the head of a request, from the connection or the request before
_BODIES = 8  # of the largest size, that are held at the same time
_CLIENT_GONE = 499  # nginx's status in logs
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # seconds


class GateError(ValueError):
    """A service that would be open to everyone."""


class PunctualServer(uvicorn.Server):
    """Ends its process within ten seconds of being asked to, also on a machine with other work.

    Threads cannot be interrupted, and Python may wait for what they compute for nobody any more.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, and set the time limit."""
        limit = threading.Timer(_STOP_SECONDS, os._exit, (128 + sig,))
        limit.daemon = True
        limit.start()
        super().handle_exit(sig, frame)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections on which no request begins within some seconds."""

    _idle_since: float | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.loop.call_later(0, self._look)  # then it has its connection

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > _HEAD_SECONDS:
            self.transport.close()
            return
        self.loop.call_later(_HEAD_SECONDS / 4, self._look)


@dataclass
class Metrics:
    """Counts since the start, as Prometheus reads them."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and status
    seconds: Counter[tuple[str, float]] = field(default_factory=Counter)  # by route and bucket
    total_seconds: dict[str, float] = field(default_factory=dict)
    profiles: int = 0  # predicted
    rejected: int = 0  # of these
    active: int = 0  # requests

    def add(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests[route, status] += 1
        self.total_seconds[route] = self.total_seconds.get(route, 0.0) + seconds
        for bucket in (*_BUCKETS, float("inf")):
            self.seconds[route, bucket] += seconds <= bucket

    def add_profiles(self, accepted: Mask | None, count: int) -> None:
        """Count predicted profiles, and those that a model, if it can, does not accept."""
        self.profiles += count
        self.rejected += 0 if accepted is None else int((~accepted).sum())

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return all counts, and the values of some moment, in Prometheus's format of text."""
        lines = ["# TYPE bragg_requests_total counter"]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'bragg_requests_total{{path="{route}",status="{status}"}} {count}')
        lines.append("# TYPE bragg_request_seconds histogram")
        for route in sorted(self.total_seconds):
            counts = [(b, self.seconds[route, b]) for b in (*_BUCKETS, float("inf"))]
            for bucket, count in counts:
                le = "+Inf" if bucket == float("inf") else f"{bucket:g}"
                lines.append(f'bragg_request_seconds_bucket{{path="{route}",le="{le}"}} {count}')
            total = self.total_seconds[route]
            lines.append(f'bragg_request_seconds_sum{{path="{route}"}} {total:.6f}')
            lines.append(f'bragg_request_seconds_count{{path="{route}"}} {counts[-1][1]}')
        for name, total in (("profiles", self.profiles), ("rejected_profiles", self.rejected)):
            lines += [f"# TYPE bragg_{name}_total counter", f"bragg_{name}_total {total}"]
        now = {
            "bragg_requests_active": self.active,
            "process_resident_memory_bytes": psutil.Process().memory_info().rss,
            **gauges,
        }
        for name, value in now.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Rules:
    """Which requests are let in."""

    max_bytes: int = 32_000_000
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "::1"})  # "*": any
    tokens: Sequence[str] = ()  # none: no authentication

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuse a request that is not let in, before its body is read."""
        host = headers.get(b"host", b"").decode("latin-1").rpartition("]")
        name = (host[0].lstrip("[") if host[1] else host[2].partition(":")[0]).lower()
        if "*" not in self.hosts and name not in self.hosts:
            raise _RefusedError(
                400, "This host name is not served. Start the service with --allowed-host NAME."
            )
        if self.tokens and path != "/health":
            sent = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not any(hmac.compare_digest(sent, token.encode()) for token in self.tokens):
                raise _RefusedError(
                    401, "Send the header Authorization: Bearer TOKEN, of this service's tokens."
                )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.max_bytes:
            raise _RefusedError(413, self.too_long)

    def client(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """Return who sent a request: the token if there are any, otherwise the address."""
        sent = headers.get(b"authorization", b"") if self.tokens else b""
        return sent.decode("latin-1") or str((scope.get("client") or ("-",))[0])

    @property
    def too_long(self) -> str:
        """The reason for refusing a body."""
        return f"The body is larger than {self.max_bytes / 1e6:g} MB. Send fewer profiles."


def rules_of(host: str, hosts: Sequence[str], token_file: Path | None, *, max_bytes: int) -> Rules:
    """Return the rules for a service that listens on an address.

    Raises a GateError if other machines reach it and there are no tokens, or for short tokens.
    """
    lines = [] if token_file is None else token_file.read_text(encoding="utf-8").split()
    if any(len(token) < _SHORTEST_TOKEN for token in lines) or (token_file and not lines):
        raise GateError(
            f"{token_file} needs tokens of at least {_SHORTEST_TOKEN} characters, one a line, as "
            f"'openssl rand -hex 32' makes them."
        )
    if not lines and not _is_local(host):
        raise GateError(
            f"Other machines can reach {host}: name a file of tokens with --token-file, or listen "
            f"on 127.0.0.1."
        )
    return Rules(max_bytes, Rules.hosts | {host.lower(), *map(str.lower, hosts)}, tuple(lines))


def local_address(host: str, port: int) -> str:
    """Return the address at which a service is reached from this machine."""
    any_of = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # no address to send anything to
    name = any_of.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def log_requests() -> None:
    """Write a line for each request to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _RefusedError(Exception):
    """Status and reason of a request that is sent up."""


class Gate:
    """Lets requests in by rules, reads their bodies, and ends their work when the client leaves."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._bytes = 0  # of bodies that are held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        number = headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(number):
            number = secrets.token_hex(8).encode()
        began, status, length, started = time.monotonic(), _CLIENT_GONE, 0, False

        async def counted(message: Message) -> None:
            nonlocal status, length, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), (b"x-request-id", number)],
                }
            length += len(message.get("body", b""))
            await asyncio.wait_for(send(message), _SEND_SECONDS)

        self._metrics.active += 1
        try:
            self._rules.check(scope["path"], headers)
            async with self._body(headers, receive) as body:
                CLIENT.set(self._rules.client(scope, headers))
                await self._run(scope, body, receive, counted)
        except _RefusedError as error:
            await _refuse(counted, *error.args)
        except TimeoutError:
            if not started:
                await _refuse(counted, 408, "The request did not come within a minute.")
        except Exception:
            logger.exception("%s failed", number.decode())
            if not started:
                await _refuse(counted, 500, "This is an error of the service; its log has more.")
        finally:
            self._metrics.active -= 1
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.add(route, status, seconds)
            client = (scope.get("client") or ("-",))[0]
            logger.info(
                "%s %s %s %r %d %d B %.0f ms",
                *(number.decode(), client, scope["method"], scope["path"][:200]),
                *(status, length, 1e3 * seconds),
            )

    @contextlib.asynccontextmanager
    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> AsyncIterator[bytes]:
        """Read the body of a request, while there is room for it in memory."""
        length = headers.get(b"content-length", b"")
        chunked = b"transfer-encoding" in headers
        most = int(length) if length.isdigit() else self._rules.max_bytes if chunked else 0
        if self._bytes and self._bytes + most > _BODIES * self._rules.max_bytes:
            raise _RefusedError(503, "Too many requests are being read. Try again later.")
        self._bytes += most
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _read(receive, self._rules)
            yield body
        finally:
            self._bytes -= most

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Handle a request whose body was read, until its client leaves."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        work = asyncio.ensure_future(self._app(scope, replayed, send))
        left = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)


async def _read(receive: Receive, rules: Rules) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _RefusedError(_CLIENT_GONE, "The client left.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > rules.max_bytes:
            raise _RefusedError(413, rules.too_long)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Callable[[Message], Awaitable[None]], status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"%d" % RETRY_SECONDS))
    if status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
