"""What exists while a bus is open: the link, the publisher, the inbox, the consumers. Built at start, gone at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from unibus.adapter import Adapter, Outgoing
from unibus.capabilities import checked
from unibus.channel import Group, Inbox, Queue, Topic, stem
from unibus.clock import Clock, Deadline, within
from unibus.codec import BodyCodec, Bounded, codec_for, codec_of
from unibus.consumer import Consumer
from unibus.correlation import correlate, handling
from unibus.delivery import Delivery
from unibus.errors import CodecError, ConfigError, Timeout, UnknownChannel, Unsupported
from unibus.handlers import Getter, Handler, resolve
from unibus.idempotency import Once, Store
from unibus.intake import Intake
from unibus.layers import Handling, Layer, compose
from unibus.message import NO_HEADERS, Message, check_headers, new_id
from unibus.publisher import Lane, Publisher, check_limits
from unibus.reply import Requester, Responder
from unibus.settler import Kit
from unibus.supervisor import Link
from unibus.telemetry import Counts
from unibus.threads import Threads
from unibus.topology import Channels, Station, build, check

if TYPE_CHECKING:
    from unibus.config import Settings

log = logging.getLogger("unibus")

# Seconds after `shutdown_timeout` for what the handlers leave behind: their messages settled, their sends confirmed. With the
# default both are less than the 30 s after which Kubernetes kills.
WIND_UP = 3.0


class Route:
    """All that a send to one channel needs, looked up once."""

    __slots__ = ("channel", "content_type", "delayed", "encode", "is_topic", "lane", "priorities")

    def __init__(self, channel: Queue[Any] | Topic[Any], lane: Lane) -> None:
        codec = codec_for(channel)
        self.channel = channel
        self.lane = lane
        self.is_topic = isinstance(channel, Topic)
        self.encode = codec.encode
        self.content_type = codec.content_type
        self.priorities = channel.priorities
        self.delayed = channel.delayed


class Session:
    """One open bus."""

    def __init__(
        self,
        adapter: Adapter,
        settings: Settings,
        channels: Channels,
        stations: Sequence[Station],
        *,
        clock: Clock,
        layers: Sequence[Layer],
        instance: str,
        groups: Sequence[Group] = (),
    ) -> None:
        counts = Counts()
        self.settings = settings
        self.channels = channels
        self.topology = build(channels, stations, settings, groups)
        link = Link(adapter, self.topology, clock, counts)
        self.kit = Kit(link, Publisher(link, clock, counts, settings.send_timeout), clock, counts)
        self.consumers: list[Consumer] = []
        self.intakes: list[Intake] = []
        self.running = False
        self._limited = True  # has the broker any limits to check messages against?
        self._time = clock.time
        self._stations = stations
        self._draining = asyncio.Lock()
        self._layers = layers
        self._threads: list[Threads] = []
        self._stores = _stores(stations)
        self._open_stores: list[Store] = []
        self._routes: dict[Queue[Any] | Topic[Any] | str, Route] = {}
        self._requester = Requester(self.kit, Inbox(f"{settings.service}.reply.{instance}"))
        # Mistakes in handlers come out here, before any I/O.
        self._once = [_once(station, settings, clock) for station in stations]
        self._handlers = [_resolved(*both, layers) for both in zip(stations, self._once, strict=True)]
        self._chosen = list(range(len(stations)))

    def choose(self, only: Iterable[str] | None) -> None:
        """Which handlers `start` starts: those of these channels, or groups as `topic.group`. Raises UnknownChannel."""
        names = [{s.channel.name, stem(s.address)} for s in self._stations]
        wanted = None if only is None else {only} if isinstance(only, str) else set(only)
        for name in sorted(wanted or ()):
            if not any(name in own for own in names):
                error = UnknownChannel(name, known := tuple(sorted(set().union(*names))))
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are handlers of {', '.join(known) or 'none'}"
                error.args = (f"only={name}: no handler is at work there; {hint}",)
                raise error
        self._chosen = [n for n, own in enumerate(names) if wanted is None or own & wanted]

    async def open(self) -> None:
        """Connect and declare. Raises what the broker says, or Unsupported."""
        link = self.kit.link
        check(self.channels, self._stations, checked(link.adapter.capabilities))
        await link.open()
        try:
            # The server's version may know less than the newest one.
            capabilities = checked(link.adapter.capabilities)
            check(self.channels, self._stations, capabilities)
            for store in self._stores:
                store.open(self.kit.clock)
                self._open_stores.append(store)
            if self.settings.declare == "create":
                await self.create_stores()
            elif self.settings.declare == "verify":
                await self.verify_stores()
        except BaseException:
            await self._close_stores()
            await link.close()
            raise
        limits = (capabilities.max_body, capabilities.max_key, capabilities.max_headers, capabilities.max_header_bytes)
        self._limited = any(limit is not None for limit in limits)

    async def create_stores(self) -> None:
        """Make what the stores of effectively-once handlers need. Raises StoreUnavailable."""
        for store in self._stores:
            await store.create()

    async def verify_stores(self) -> None:
        """Raises ConfigError for what they lack, StoreUnavailable."""
        for store in self._stores:
            await store.verify()

    async def _close_stores(self) -> None:
        while self._open_stores:
            store = self._open_stores.pop()
            try:
                await store.close()
            except Exception as error:  # the end of the bus is not hindered by it
                log.warning("%r did not close in order: %s", store, error, exc_info=True)

    # Sending

    def route(self, channel: Queue[Any] | Topic[Any] | str) -> Route:
        try:
            return self._routes[channel]
        except KeyError:
            known = self.channels.find(channel)
            route = self._routes[channel] = Route(known, self.kit.publisher.lane(known))
            return route

    def outgoing(
        self,
        route: Route,
        body: Any,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | None = None,
        expires_in: float | None = None,
        priority: int | None = None,
    ) -> Outgoing:
        """The message as it goes out. Raises CodecError, Unsupported, MessageTooLarge."""
        now = self._time()
        if type(body) is Message:
            message = self._from_message(route, body, now)
        else:
            message = Message(
                *(route.encode(body), new_id(), None, route.content_type, NO_HEADERS),
                *(None, None, None, None, now),  # key, correlation, causation, reply_to, timestamp
            )
        if key is not None:
            message.key = key
        if headers:
            message.headers = MappingProxyType({**message.headers, **headers})
        if message.headers is not NO_HEADERS:
            check_headers(message.headers)
        if message.key is not None:
            _check_key(message.key, route.channel)
        if (cause := handling.get()) is not None:
            correlate(message, cause)
        if expires_in is not None:
            if not 0 <= expires_in < float("inf"):
                raise CodecError(f"expires_in={expires_in}: use seconds, 0 or more")
            message.expires_at = now + expires_in
        if priority is not None:
            message.priority = priority
        if message.priority is not None and not (route.priorities and 0 <= message.priority < route.priorities):
            raise Unsupported(_no_priority(route.channel, message.priority))
        not_before = None
        if delay is not None or (delay := message.delay) is not None:
            not_before = now + self._checked_delay(route, delay)
            message.delay = None
        if self._limited:
            check_limits(message, self.kit.link.adapter.capabilities, route.channel)
        return Outgoing(route.channel, message, not_before)

    def _from_message(self, route: Route, given: Message, now: float) -> Message:
        """A Message of the caller's own: a body in bytes is sent as it is; what is open is filled in."""
        raw = isinstance(given.body, bytes)
        return Message(
            given.body if raw else route.encode(given.body),
            _one_line(given.id, "id") or new_id(),
            _one_line(given.type, "type"),
            _one_line(given.content_type, "content_type") or route.content_type,
            MappingProxyType(dict(given.headers)) if given.headers else NO_HEADERS,
            given.key,
            _one_line(given.correlation_id, "correlation_id"),
            _one_line(given.causation_id, "causation_id"),
            _one_line(given.reply_to, "reply_to"),
            now if given.timestamp is None else given.timestamp,
            given.expires_at,
            # 0 is what many clients write for none: what was received from them can be sent on.
            None if given.priority == 0 and not route.priorities else given.priority,
            given.delay,
        )

    def _checked_delay(self, route: Route, delay: float) -> float:
        if not route.delayed:
            raise Unsupported(
                f"{route.channel} was not declared with delayed=True, so a message to it can't be delayed"
            )
        if not 0 <= delay < float("inf"):
            raise CodecError(f"delay={delay}: use seconds, 0 or more")
        limit = self.kit.link.adapter.capabilities.delay.limit
        if limit is not None and delay > limit:
            raise Unsupported(f"{route.channel}: delay={delay:g} s is beyond what the broker can do, {limit:g} s")
        return delay

    async def request(self, queue: Queue[Any] | str, body: Any, timeout: float | None, **more: Any) -> Any:
        route = self.route(queue)
        reply = getattr(route.channel, "reply", None)
        if reply is None:
            raise Unsupported(f"{route.channel} was not declared with reply=..., so nobody answers")
        if timeout is None:
            timeout = self.settings.request_timeout
        codec = Bounded(codec_of(reply), self.settings.max_body)
        try:
            return await self._requester.request(self.outgoing(route, body, **more), codec, timeout)
        except Timeout as error:
            raise error.with_traceback(None) from error.__cause__

    # Receiving

    def codec(self, channel: Queue[Any] | Topic[Any] | str) -> BodyCodec:
        """For what is received."""
        return Bounded(codec_for(self.channels.find(channel)), self.settings.max_body)

    def start(self) -> None:
        """Start the handlers."""
        self.running = True
        for n in self._chosen:
            consumer = self._consumer(self._stations[n], self._handlers[n], self._once[n])
            self.consumers.append(consumer)
            self.intakes.append(consumer.intake)
            consumer.begin()

    async def started(self, intakes: Sequence[Intake]) -> None:
        """Until these subscriptions stand: what is sent from now on arrives. Raises what ended the link."""
        link = self.kit.link
        for intake in intakes:
            begun = asyncio.ensure_future(intake.begun.wait())
            failed = asyncio.ensure_future(link.failed.wait())
            try:
                await asyncio.wait((begun, failed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                begun.cancel()
                failed.cancel()
            if link.failure is not None:
                raise link.failure
            if intake.refusal is not None:
                raise intake.refusal

    def _consumer(self, station: Station, handler: Handler, once: Once | None) -> Consumer:
        settings, registration = station.settings, station.registration
        requests = registration.kind == "responder"
        intake = Intake(
            self.kit,
            station.address,
            prefetch=max(settings.prefetch, registration.batch),  # less would make every batch a smaller one
            policy=settings.retry,
            at_most_once=settings.guarantee == "at-most-once",
            requests=requests,
            start=registration.start,
        )
        call: Handling = handler.call
        if not handler.is_async:
            call = self._in_threads(handler, settings.concurrency)
        call = compose(call, self._layers)
        if once is not None:
            call = once.around(call, transactional=bool(handler.asks), in_thread=not handler.is_async)
            intake.protection = once
            once.start()
        undecodable = timed_out = None
        if requests and isinstance(station.address, Queue):
            policy = settings.retry if "retry" in registration.options else None
            responder = Responder(self.kit, station.address, codec_of(station.address.reply), call, policy)
            call, undecodable, timed_out = responder, responder.undecodable, responder.timed_out
        return Consumer(
            intake,
            call,
            self.codec(station.channel),
            name=handler.name,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            batch=registration.batch,
            in_thread=not handler.is_async,
            cancel_lost=settings.on_lease_lost == "cancel",
            undecodable=undecodable,
            timed_out=timed_out,
        )

    def _in_threads(self, handler: Handler, size: int) -> Handling:
        threads = Threads(size, handler.name)
        self._threads.append(threads)
        call = handler.call

        def handle(delivery: Delivery[Any]) -> Any:
            return threads.run(lambda: call(delivery))

        return handle

    def address(self, channel: Queue[Any] | Topic[Any] | str, group: str | None) -> Queue[Any] | Group:
        """What is received from: the queue, or a group of the topic, by default the service's."""
        known = self.channels.find(channel)
        if isinstance(known, Topic):
            return Group(known, group or self.settings.service)
        if group is not None:
            raise ConfigError(f"{known} has no groups; drop group={group!r}")
        return known

    def intake(self, address: Queue[Any] | Group, prefetch: int, *, trusting: bool = False) -> Intake:
        """For a receiver by hand, or a redrive."""
        settings = self.settings.consumer(address, {"prefetch": prefetch})
        intake = Intake(self.kit, address, prefetch=prefetch, policy=settings.retry, trusting=trusting)
        self.intakes.append(intake)
        return intake

    # The end

    def deadline(self) -> Deadline:
        """By when all has to be over that begins to end now, whatever the broker does."""
        return Deadline(self.kit.clock, self.settings.shutdown_timeout + WIND_UP)

    async def drain(self, deadline: Deadline) -> None:
        """Stop the handlers: no new messages, those under way get `shutdown_timeout` seconds, all is settled."""
        async with self._draining:  # who comes second waits, too, before it closes the link
            consumers, self.consumers = self.consumers, []
            self.running = False
            try:
                await asyncio.gather(
                    *(consumer.drain(self.settings.shutdown_timeout, deadline) for consumer in consumers)
                )
            finally:
                for threads in self._threads:
                    threads.close()
                self._threads.clear()
                for consumer in consumers:
                    if consumer.intake.protection is not None:
                        await consumer.intake.protection.stop()
            for consumer in consumers:
                self.intakes.remove(consumer.intake)

    async def close(self, deadline: Deadline) -> None:
        await self.drain(deadline)
        for intake in list(self.intakes):
            await self.end(intake, deadline)
        try:
            await within(self.kit.clock, deadline.left(), self.kit.publisher.drain())
        except TimeoutError:
            log.warning("messages were not confirmed before the end; their senders are told")
        await self._requester.close()
        await self.kit.publisher.close()
        await self._close_stores()
        try:
            await within(self.kit.clock, deadline.left(), self.kit.link.close())
        except TimeoutError:
            log.warning("the link to the broker did not close in time; left behind")

    async def end(self, intake: Intake, deadline: Deadline | None = None) -> None:
        """Of a receiver by hand: what it holds goes back."""
        if intake in self.intakes:
            self.intakes.remove(intake)
            deadline = deadline or self.deadline()
            await intake.stop(self.settings.shutdown_timeout)
            await intake.close(deadline)

    async def complaints(self) -> list[str]:
        """What is wrong with receiving, handling or sending, as far as this process knows."""
        told = [await intake.complaint() for intake in self.intakes]
        told += [consumer.complaint() for consumer in self.consumers]
        return [text for text in (*told, self._requester.complaint(), *self.kit.publisher.complaints()) if text]

    def moving(self) -> bool:
        """Is anything under way besides handlers that wait for something? A thread may always be at work."""
        return (
            self.kit.publisher.busy()
            or any(intake.moving() for intake in self.intakes)
            or any(consumer.in_thread and consumer.running() for consumer in self.consumers)
        )

    def busy(self) -> bool:
        """Is there anything under way, as opposed to waiting for its time?"""
        return self.kit.publisher.busy() or any(intake.busy() for intake in self.intakes)


def _stores(stations: Sequence[Station]) -> list[Store]:
    """Each one once, though several handlers may share it."""
    return list({id(store): store for s in stations if (store := s.registration.idempotency) is not None}.values())


def _once(station: Station, settings: Settings, clock: Clock) -> Once | None:
    """What makes the handler effectively once, if it has a store. Raises ConfigError where that can't be."""
    registration, store = station.registration, station.registration.idempotency
    if store is None:
        return None
    what = f"{registration} of {station.address}: idempotency={store!r}"
    if not callable(getattr(store, "begin", None)) or isinstance(store, type):
        raise ConfigError(f"{what}; use a store of unibus.stores, such as MemoryStore()")
    if registration.kind == "responder":
        raise ConfigError(f"{what}, but a request that comes again needs its answer again, and no store keeps answers")
    if registration.batch:
        raise ConfigError(
            f"{what}, but batch={registration.batch}: messages are told apart one by one; drop one of them"
        )
    if registration.broadcast:
        raise ConfigError(
            f"{what}, but a broadcast is handled in every process, and never comes again; drop one of them"
        )
    if station.settings.guarantee == "at-most-once":
        raise ConfigError(f"{what}, but guarantee='at-most-once' never runs a message twice as it is; drop one of them")
    return Once(store, settings.physical(station.address), clock)


def _resolved(station: Station, once: Once | None, layers: Sequence[Layer]) -> Handler:
    registration, store = station.registration, station.registration.idempotency
    provided: dict[type, Getter] = {}
    if once is not None and (type_ := getattr(store, "provides", None)) is not None:  # see Transactional
        provided[type_] = once.resources.__getitem__
    handler = resolve(
        registration.function,
        kind=registration.kind,
        channel=station.channel,
        batch=registration.batch,
        provided=provided,
    )
    if handler.asks and not handler.is_async:
        asked = ", ".join(type_.__name__ for type_ in handler.asks)
        raise ConfigError(f"{registration}: it asks for {asked}, which a plain function can't use; make it async def")
    if registration.batch and layers:
        raise ConfigError(f"{registration}: batch={registration.batch}, but layers wrap the handling of one message")
    if station.settings.on_lease_lost == "cancel" and not handler.is_async:
        raise ConfigError(
            f'{registration}: on_lease_lost="cancel", but a plain function can\'t be cancelled; use "mark"'
        )
    return handler


def _check_key(key: object, channel: Queue[Any] | Topic[Any]) -> None:
    if not isinstance(key, str):
        raise CodecError(f"{channel}: a key is a str, not {type(key).__name__}; convert it first")
    if not key or "\0" in key:
        raise CodecError(f"{channel}: a key is not empty and holds no NUL; use None for no key")


def _one_line(text: str | None, field: str) -> str | None:
    if text is None:
        return None
    given: object = text
    if not isinstance(given, str):
        raise CodecError(f"Message.{field} is a str, not {type(given).__name__}")
    if any(c in text for c in "\r\n\0"):
        raise CodecError(f"Message.{field} holds a line break or NUL")
    return text


def _no_priority(channel: Queue[Any] | Topic[Any], priority: int) -> str:
    if channel.priorities:
        return f"{channel}: priority={priority}; it was declared with 0 to {channel.priorities - 1}"
    return f"{channel} was not declared with priorities=n, so its messages have no priority"
