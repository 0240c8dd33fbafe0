"""Bus, the portable type: what a service is written against, whatever the broker."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from unibus.adapter import Adapter, Backlog, DeclareMode, Endpoint, Outgoing, Secret
from unibus.blocking import Blocking
from unibus.capabilities import Capabilities
from unibus.channel import Group, Queue, Topic, dead_letter_queue, invalid_queue
from unibus.clock import Clock, Deadline, SystemClock
from unibus.deadletter import describe
from unibus.errors import Closed, ConfigError, ConnectionLost, SendFailed, UnibusError
from unibus.layers import Layer
from unibus.message import Message
from unibus.receiver import Receiver
from unibus.registrations import Handlers
from unibus.registry import adapter_factory
from unibus.session import Session
from unibus.topology import Channels, stations
from unibus.waiting import answered

if TYPE_CHECKING:
    from unibus.config import Settings

log = logging.getLogger("unibus")

T = TypeVar("T")
NOT_OPEN = "the bus is not open; use `async with bus:`, `bus.running()` or `bus.run()`"
Lifespan = Callable[["Bus"], AbstractAsyncContextManager[Any]]


@dataclass(frozen=True, slots=True)
class BusHealth:
    """`ok`: connected and, where handlers run, consuming. `degraded`: at work with difficulties. `down`: no link."""

    status: Literal["ok", "degraded", "down"]
    reasons: tuple[str, ...] = ()


class Bus(Handlers):
    """One service's connection to its broker, and its handlers.

    Making one does no I/O: settings are read and checked when it starts. Settings given here stand below the environment
    and unibus.toml. `channels`: those that the service only sends to, or receives from by hand; channels with a handler
    are known anyway. `lifespan(bus)`: an async context manager around the open bus; its value is `bus.state`.
    `layers`: handler -> handler, around each handler, outermost first. `config`: a file, False for none, None for
    what UNIBUS_CONFIG names or unibus.toml. `name`: another bus of the same process, `[bus.<name>]` in the file.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        name: str | None = None,
        channels: Iterable[Queue[Any] | Topic[Any]] = (),
        lifespan: Lifespan | None = None,
        layers: Sequence[Layer] = (),
        config: str | Path | Literal[False] | None = None,
        environ: Mapping[str, str] | None = None,
        service: str | None = None,
        username: str | None = None,
        password: str | None = None,
        prefix: str | None = None,
        declare: DeclareMode | None = None,
        delays: Sequence[float] | None = None,
        send_timeout: float | None = None,
        request_timeout: float | None = None,
        shutdown_timeout: float | None = None,
        max_body: int | None = None,
        defaults: Mapping[str, object] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = list(channels)
        self.state: Any = None
        self._lifespan = lifespan
        self._layers = tuple(layers)
        self._config = config
        self._environ = environ
        self._code: dict[str, object] = {
            key: value
            for key, value in {
                "url": None if url is None else Secret(url),  # it may hold a password, and `vars(bus)` is soon printed
                "service": service,
                "username": username,
                "password": None if password is None else Secret(password),
                "prefix": prefix,
                "declare": declare,
                "delays": delays,
                "send_timeout": send_timeout,
                "request_timeout": request_timeout,
                "shutdown_timeout": shutdown_timeout,
                "max_body": max_body,
                "defaults": defaults,
                "settings": settings,
            }.items()
            if value is not None
        }
        self._clock: Clock = SystemClock()
        self._session: Session | None = None
        self._opening = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0  # where it was opened
        self._stack = AsyncExitStack()
        self._run: _Run | None = None
        self._tool: tuple[Group, ...] | None = (
            None  # of a tool's copy (`tooling`): groups it asks for beside the handlers'
        )

    def __repr__(self) -> str:
        state = "closed" if self._session is None else "running" if self._session.running else "open"
        return f"<Bus {self.name or ''} {state}>".replace("  ", " ")

    @property
    def bus(self) -> Bus:
        """Itself: handlers find their bus in the same way, wherever they were collected."""
        return self

    def include(self, handlers: Handlers) -> None:
        """Take in the handlers of another module. Raises ConfigError if they are another bus' already."""
        if handlers._bus not in (None, self):
            raise ConfigError("these handlers are included in another bus; collect them in two Handlers()")
        handlers._bus = self
        self.registrations.extend(handlers.registrations)

    # Open and closed

    async def __aenter__(self) -> Self:
        """Connect and declare: send, publish, request, receive. No handler runs."""
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @asynccontextmanager
    async def running(self, *, only: Iterable[str] | None = None) -> AsyncIterator[Bus]:
        """Open, with the handlers at work in the background; at the end they are drained. Nests in an open bus.

        `only`: the handlers of these channels, or of single groups as `topic.group`; UnknownChannel for one without any.
        """
        opened, deadline = self._session is None, None
        if opened:
            await self._open(only)
        try:
            session = self._opened()
            if session.running:
                raise ConfigError("this bus runs already")
            if not opened:
                session.choose(only)
            session.start()
            try:
                await session.started(session.intakes)
                yield self
            finally:
                deadline = session.deadline()
                await session.drain(deadline)
        finally:
            if opened:
                await self._close(deadline)

    async def run(self, *, only: Iterable[str] | None = None) -> None:
        """Run the handlers until SIGTERM or SIGINT, or `stop()`; then drain. A second signal ends the process at once.

        A start that is still under way is broken off by them. `only`: as for `running`. Raises what ended the link for good,
        such as AuthenticationFailed.
        """
        self._run = run = _Run()
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if run.stopping.is_set():
                os._exit(128 + number)
            log.info("%s: draining", signal.Signals(number).name)
            run.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        try:
            with run:
                async with self.running(only=only):
                    run.starting = False
                    session = self._opened()
                    link = session.kit.link
                    log.info(
                        "at work: %s",
                        ", ".join(str(consumer.intake.address) for consumer in session.consumers) or "no handlers",
                    )
                    waits = [asyncio.ensure_future(run.stopping.wait()), asyncio.ensure_future(link.failed.wait())]
                    try:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for wait in waits:
                            wait.cancel()
                    if link.failure is not None:
                        raise link.failure
            log.info("drained")
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """End `run()` as a signal would."""
        if self._run is not None:
            self._run.stop()

    async def _open(self, only: Iterable[str] | None = None) -> None:
        if self._session is not None or self._opening:
            raise ConfigError("this bus is open already")
        self._opening = True
        try:
            session = self._prepare()
            session.choose(only)
            await session.open()
        finally:
            self._opening = False
        self._session, self._loop, self._pid = session, asyncio.get_running_loop(), os.getpid()
        try:
            if self._lifespan is not None:
                self.state = await self._stack.enter_async_context(self._lifespan(self))
        except BaseException:
            await self.close()
            raise

    def _prepare(self) -> Session:
        """Everything that can be found wrong without I/O is found here. Raises ConfigError, Unsupported."""
        settings, channels = self._load()
        instance = secrets.token_hex(4)
        factory = adapter_factory(settings.url.scheme)
        adapter = factory(
            Endpoint(settings.url, settings.service, instance, self._clock, settings.prefix, settings.driver)
        )
        places = stations(self.registrations, channels, settings, instance)
        return Session(
            *(adapter, settings, channels, places),
            clock=self._clock,
            layers=self._layers,
            instance=instance,
            groups=self._tool or (),
        )

    def _load(self) -> tuple[Settings, Channels]:
        from unibus.config import load  # costs more than all the rest: paid at start, not at import

        named = [r.channel for r in self.registrations if not isinstance(r.channel, str)]
        channels = Channels([*named, *self.channels])
        topics = {c.name: c for c in channels if isinstance(c, Topic)}
        groups = [
            Group(topic, r.group)
            for r in self.registrations
            if r.group is not None and (topic := topics.get(getattr(r.channel, "name", str(r.channel)))) is not None
        ]
        settings = load(
            self._code, bus=self.name, channels=channels, groups=groups, environ=self._environ, file=self._config
        )
        if self._tool is not None:
            settings = replace(settings, declare="assume")
        for channel in settings.declared_channels():
            channels.add(channel)
        return settings, channels

    async def close(self) -> None:
        """Drain the handlers, finish the sends under way, disconnect. Idempotent.

        Ends within `shutdown_timeout` and 3 seconds, not counting `lifespan`, also where the broker doesn't answer.
        """
        await self._close(None)

    async def _close(self, deadline: Deadline | None) -> None:
        session = self._session
        if session is None:
            return
        deadline = deadline or session.deadline()
        try:
            await session.drain(deadline)
            await self._stack.aclose()
        finally:
            self._session = None
            self.state = None
            await session.close(deadline)

    def _opened(self) -> Session:
        if self._session is None:
            raise Closed(NOT_OPEN)
        return self._session

    # Sending

    async def send(
        self,
        queue: Queue[T] | str,
        body: T | Message,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | None = None,
        expires_in: float | None = None,
        priority: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """Send to a queue; the message's id, once the broker has confirmed it.

        `key`: messages of one key keep their order on an ordered queue. `delay`, `expires_in`, `timeout`: seconds. A `Message`
        in place of the body sets the other fields of the envelope. What fails in passing is sent again until `timeout`
        (`send_timeout`, 30); a duplicate is possible then, a loss is not. Raises CodecError, UnknownChannel, Unsupported,
        MessageTooLarge, NotFound, Refused, Timeout, ConnectionLost, Closed.
        """
        outgoing, sent = self._submit(False, queue, body, key, headers, delay, expires_in, priority, timeout)
        if (error := await sent) is not None:
            raise error.with_traceback(None)
        return outgoing.message.id

    async def publish(
        self,
        topic: Topic[T] | str,
        body: T | Message,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | None = None,
        expires_in: float | None = None,
        priority: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """Publish to every group of a topic; as `send` otherwise. With no group it succeeds, is counted, and said once."""
        outgoing, sent = self._submit(True, topic, body, key, headers, delay, expires_in, priority, timeout)
        if (error := await sent) is not None:
            raise error.with_traceback(None)
        return outgoing.message.id

    def _submit(
        self,
        is_topic: bool,
        channel: Queue[Any] | Topic[Any] | str,
        body: Any,
        key: str | None,
        headers: Mapping[str, str] | None,
        delay: float | None,
        expires_in: float | None,
        priority: int | None,
        timeout: float | None,
    ) -> tuple[Outgoing, asyncio.Future[UnibusError | None]]:
        session = self._session
        if session is None:
            raise Closed(NOT_OPEN)
        route = session.route(channel)
        if route.is_topic is not is_topic:
            raise ConfigError(_wrong_verb(route.channel))
        outgoing = session.outgoing(route, body, key, headers, delay, expires_in, priority)
        return outgoing, route.lane.submit(outgoing, timeout)

    async def send_many(
        self,
        queue: Queue[T] | str,
        bodies: Iterable[T | Message],
        *,
        key: Callable[[T], str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> list[str]:
        """Send many to a queue; their ids, in order. `key` is called with each body.

        Raises SendFailed (`.sent`, `.failed` by index) unless all were confirmed; the others were.
        """
        return await self._send_many(False, queue, bodies, key, headers, timeout)

    async def publish_many(
        self,
        topic: Topic[T] | str,
        bodies: Iterable[T | Message],
        *,
        key: Callable[[T], str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> list[str]:
        """Publish many to a topic; as `send_many` otherwise."""
        return await self._send_many(True, topic, bodies, key, headers, timeout)

    async def _send_many(
        self,
        is_topic: bool,
        channel: Queue[Any] | Topic[Any] | str,
        bodies: Iterable[Any],
        key: Callable[[Any], str | None] | None,
        headers: Mapping[str, str] | None,
        timeout: float | None,
    ) -> list[str]:
        session = self._opened()
        route = session.route(channel)
        if route.is_topic is not is_topic:
            raise ConfigError(_wrong_verb(route.channel))
        failed: dict[int, UnibusError] = {}
        batch, indices = [], []
        index = -1
        for index, body in enumerate(bodies):  # the count is needed after the loop
            plain = body.body if isinstance(body, Message) else body
            try:
                batch.append(session.outgoing(route, body, key(plain) if key is not None else None, headers))
            except UnibusError as error:
                failed[index] = error
            else:
                indices.append(index)
        results = await session.kit.publisher.send_all(batch, timeout)
        sent: dict[int, str] = {}
        for at, outgoing, result in zip(indices, batch, results, strict=True):
            if result is None:
                sent[at] = outgoing.message.id
            else:
                failed[at] = result
        if failed:
            raise SendFailed(sent, dict(sorted(failed.items())))
        return [sent[i] for i in range(index + 1)]

    async def request(
        self,
        queue: Queue[T] | str,
        body: T | Message,
        *,
        timeout: float | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send a request and await its reply, decoded as the queue's `reply` type.

        `timeout`: seconds (`request_timeout`, 30); it travels with the request, which is dropped once it is over. Raises Timeout
        (a TimeoutError), RemoteError with what the responder raised, ConnectionLost when the inbox was lost, CodecError.
        """
        return await self._opened().request(queue, body, timeout, key=key, headers=headers)

    def blocking(self) -> Blocking:
        """send, publish, request and their kin for synchronous code: `with bus.blocking() as sender: ...`.

        Uses the open bus from another thread (a handler that is a plain function); opens it in a thread of its own otherwise.
        """
        return Blocking(self)

    # Receiving by hand

    def receiver(self, channel: Queue[T] | Topic[T] | str, *, group: str | None = None, prefetch: int = 20) -> Receiver:
        """Receive by hand: `async with bus.receiver(orders) as receiver: async for delivery in receiver: ...`.

        `group`: of a topic, by default the service's name; it has to be declared already. `prefetch`: the most messages held.
        """
        return Receiver(self._opened(), channel, group, prefetch)

    # What is going on

    @property
    def counts(self) -> dict[str, int]:
        """Event -> count since the bus was opened; see `unibus.telemetry` for the events."""
        return self._opened().kit.counts.totals()

    def counts_of(self, channel: Queue[Any] | Topic[Any] | str, *, group: str | None = None) -> dict[str, int]:
        """Event -> count of one channel, or of one group of a topic."""
        session = self._opened()
        known = session.channels.find(channel)
        return session.kit.counts.of(Group(known, group) if group is not None and isinstance(known, Topic) else known)

    @property
    def settings(self) -> Settings:
        """The settings in force; `settings.effective()` says where each came from."""
        return self._opened().settings

    @property
    def adapter(self) -> Adapter:
        return self._opened().kit.link.adapter

    @property
    def native(self) -> object:
        """The broker's client, for what unibus does not cover."""
        return self.adapter.native

    @property
    def capabilities(self) -> Capabilities:
        """What the connected broker can do."""
        return self.adapter.capabilities

    async def backlog(
        self,
        channel: Queue[Any] | Topic[Any] | str,
        *,
        group: str | None = None,
        of: Literal["channel", "dead letters", "invalid"] = "channel",
    ) -> Backlog:
        """How much waits in a queue, or in one group of a topic (default: the service's); or among its failed messages."""
        session = self._opened()
        address = session.address(channel, group)
        if of != "channel":
            address = dead_letter_queue(address) if of == "dead letters" else invalid_queue(address)
        link = session.kit.link
        return await link.ask(lambda: link.adapter.backlog(address))

    async def health(self) -> BusHealth:
        """Is it at work? Never raises."""
        session = self._session
        if session is None:
            return BusHealth("down", ("the bus is not open",))
        link = session.kit.link
        if not link.is_up or link.failure is not None:
            return BusHealth("down", (str(link.failure or link.trouble),))
        epoch = link.epoch
        reasons = await session.complaints()
        try:
            state = await answered(link.adapter.check())
        except Exception as error:
            return BusHealth("down", (f"the link can't be checked: {describe(error)}",))
        if state.blocked:
            reasons.append(f"the broker takes no messages: {state.blocked}")
        if not state.up:
            # In a process that only sends, nobody else may look; and one that is never ready is never asked to send again.
            if not state.mends:
                link.lost(epoch, ConnectionLost("a health check found the link to the broker broken"))
            return BusHealth("down", tuple(reasons) or ("the link to the broker is down",))
        return BusHealth("degraded" if reasons else "ok", tuple(reasons))


class _Run:
    """One `run()`: what asks it to stop, also while it still starts."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.starting = True
        self._task = asyncio.current_task()
        self._broken_off = False

    def stop(self) -> None:
        if self.starting and not self.stopping.is_set() and self._task is not None:
            self._broken_off = True
            self._task.cancel()  # there is no other way out of a `lifespan`, or of a subscription that does not come to stand
        self.stopping.set()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.starting = False
        if not self._broken_off or self._task is None:
            return False
        others = self._task.uncancel()
        return kind is asyncio.CancelledError and not others


def _wrong_verb(channel: Queue[Any] | Topic[Any]) -> str:
    verb = "publish" if isinstance(channel, Topic) else "send"
    return f"{channel}: use bus.{verb}(...) for a {type(channel).__name__.lower()}"
