"""`unibus run --probe HOST:PORT`: /live and /ready over HTTP, for whoever watches the process (Kubernetes, a load balancer).

200 or 503, and why as JSON: `{"ready": false, "reasons": ["link to the broker lost"]}`. Live: the event loop answers, of each
worker too. Ready: all handlers are at work and `bus.health()` is ok, in each worker. Written out: it is two fixed answers, and
an HTTP server would be one more thing to install.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus

from unibus.bus import Bus, BusHealth
from unibus.cli.output import say
from unibus.errors import ConfigError

PATIENCE = 2.0  # seconds that the broker may take to answer a health check
SILENCE = 10.0  # seconds without a word after which the loop of a worker counts as blocked
_EVERY = 1.0  # seconds between two words of a worker
_MOST, _LONGEST = 8, 300  # reasons, and characters of each, that a worker tells: a line fits into the pipe at once
_HEAD = 8192  # bytes of a request, at most
_READ = 5.0  # seconds until it has come

Reasons = Sequence[str]  # why not; none: all is well


class OfBus:
    """The state of a bus in this process."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._asking: asyncio.Task[BusHealth] | None = None  # one at a time, also if nobody waits for it any more

    async def unready(self) -> Reasons:
        session = self._bus._session
        if session is None or not session.running:
            return ["the handlers are not at work: it starts, drains or has ended"]
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._bus.health())
        done, _ = await asyncio.wait([self._asking], timeout=PATIENCE)
        if not done:
            return [f"the broker has not answered a health check within {PATIENCE:g} s"]
        health = self._asking.result()
        if health.status != "ok":
            return health.reasons or [health.status]
        return [f"{each.address}: not subscribed yet" for each in session.intakes if not each.subscribed.is_set()]

    async def unalive(self) -> Reasons:
        return []  # this very answer is the proof


class OfWorkers:
    """The state of workers, as they tell it: each a line of JSON a second through a pipe."""

    def __init__(self, count: int) -> None:
        self._told: dict[int, tuple[float, Reasons] | None] = dict.fromkeys(range(1, count + 1))

    async def listen(self, worker: int, pipe: int) -> None:
        """To one process, until it ends."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb"))
        try:
            while line := await reader.readline():
                with suppress(ValueError):  # cut off by its end
                    self._told[worker] = time.monotonic(), json.loads(line)
        finally:
            self._told[worker] = None
            transport.close()

    async def unready(self) -> Reasons:
        found = []
        for worker, told in self._told.items():
            reasons = ["not up yet"] if told is None else told[1]
            found += [f"worker {worker}: {reason}" for reason in reasons]
        return [*found, *await self.unalive()]

    async def unalive(self) -> Reasons:
        """One that has not said anything yet may have much to import."""
        now = time.monotonic()
        silent = {n: now - told[0] for n, told in self._told.items() if told is not None}
        return [f"worker {n}: its event loop is blocked, for {s:.0f} s" for n, s in silent.items() if s > SILENCE]


async def tell(bus: Bus, pipe: int) -> None:
    """In a worker: say how it is, for `OfWorkers`, until cancelled."""
    os.set_blocking(pipe, False)
    os.set_inheritable(pipe, False)  # what the application starts must not keep it open
    state = OfBus(bus)
    while True:
        line = json.dumps([reason[:_LONGEST] for reason in (await state.unready())[:_MOST]]) + "\n"
        with suppress(BlockingIOError, BrokenPipeError):  # nobody listens; whose end that is, stdin tells
            os.write(pipe, line.encode())
        await asyncio.sleep(_EVERY)


def address(option: str) -> tuple[str, int]:
    """Of `--probe HOST:PORT`. Port 0: any that is free. Raises ConfigError."""
    host, colon, port = option.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ConfigError(f"--probe {option}: write HOST:PORT, as in 0.0.0.0:8080 or [::1]:8080")
    return host, int(port)


@asynccontextmanager
async def serving(option: str, state: OfBus | OfWorkers) -> AsyncIterator[None]:
    """Answer at HOST:PORT. Raises ConfigError that names the option when that can't be."""
    host, port = address(option)
    answers: dict[bytes, tuple[str, Callable[[], Awaitable[Reasons]]]] = {
        b"/live": ("live", state.unalive),
        b"/ready": ("ready", state.unready),
    }

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # whoever asked has gone
            try:
                status, body, wants_body = await _answer(reader, answers)
                writer.write(_response(status, body, wants_body))
                await writer.drain()
            finally:
                writer.close()

    try:
        server = await asyncio.start_server(answer, host, port, limit=_HEAD)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no host name"
        raise ConfigError(f"--probe {option}: can't listen there: {why}") from error
    port = server.sockets[0].getsockname()[1]
    say(f"unibus: /live and /ready at http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        yield
    finally:
        server.close()


async def _answer(
    reader: asyncio.StreamReader, answers: dict[bytes, tuple[str, Callable[[], Awaitable[Reasons]]]]
) -> tuple[HTTPStatus, dict[str, object], bool]:
    """Status, body, and whether the body is wanted."""
    try:
        async with asyncio.timeout(_READ):
            head = await reader.readuntil(b"\r\n\r\n")
        method, target, version = head.partition(b"\r\n")[0].split(b" ")
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
        return HTTPStatus.BAD_REQUEST, {"error": "no HTTP request"}, True
    if not version.startswith(b"HTTP/1."):
        return HTTPStatus.BAD_REQUEST, {"error": "no HTTP/1 request"}, True
    if method not in (b"GET", b"HEAD"):
        return HTTPStatus.METHOD_NOT_ALLOWED, {"error": "use GET or HEAD"}, True
    if (found := answers.get(target.partition(b"?")[0])) is None:
        return HTTPStatus.NOT_FOUND, {"error": "there are /live and /ready"}, method == b"GET"
    name, ask = found
    reasons = list(await ask())
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return status, {name: not reasons, "reasons": reasons}, method == b"GET"


def _response(status: HTTPStatus, body: dict[str, object], wants_body: bool) -> bytes:
    content = json.dumps(body).encode()
    allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        f"{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (content if wants_body else b"")
