"""What the RabbitMQ tests work with: an adapter behind the SPI, a raw aio-pika client, and a proxy that breaks the link."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from unibus.adapter import Declared, Endpoint, Outcome, Outgoing, Secret, Source, Subscription, Topology, Url
from unibus.channel import Group, Queue, Topic
from unibus.clock import SystemClock
from unibus.delivery import Delivery
from unibus.message import Message, new_id
from unibus.url import parse
from unibus_rabbitmq import RabbitMQAdapter

SOON = 10.0
URL = "UNIBUS_TEST_RABBITMQ_URL"


def broker_url() -> str:
    url = os.environ.get(URL)
    if not url:
        pytest.fail(f"{URL} is not set; `make brokers-up` starts a broker and prints it")
    return url


class Bench:
    """Names of its own, and what is made with them; all of it is deleted in the end."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"it-{secrets.token_hex(4)}."
        self.adapters: list[RabbitMQAdapter] = []
        self.stack = contextlib.AsyncExitStack()

    def endpoint(self, url: Url | None = None, **settings: object) -> Endpoint:
        return Endpoint(url or parse(self.url), "svc", secrets.token_hex(4), SystemClock(), self.prefix, settings)

    async def adapter(self, *channels: Declared, endpoint: Endpoint | None = None, **topology: Any) -> RabbitMQAdapter:
        """Connected, with these channels declared."""
        adapter = RabbitMQAdapter(endpoint or self.endpoint())
        self.adapters.append(adapter)
        await adapter.connect()
        if channels:
            await adapter.declare(Topology(channels=channels, **topology))
        return adapter

    def name(self, name: str) -> str:
        return self.prefix + name

    def queue(self, name: str = "q", options: dict[str, object] | None = None, **features: Any) -> Declared:
        return Declared(Queue(name, **features), self.name(name), options=options or {})

    def topic(self, name: str = "t", options: dict[str, object] | None = None, **features: Any) -> Declared:
        return Declared(Topic(name, **features), self.name(name), options=options or {})

    def group(self, topic: Declared, name: str = "g", options: dict[str, object] | None = None) -> Declared:
        assert isinstance(topic.address, Topic)
        return Declared(Group(topic.address, name), f"{topic.name}.{name}", options=options or {})

    async def raw(self) -> AbstractChannel:
        """A channel of a client that knows nothing of unibus."""
        connection = await self.stack.enter_async_context(await aio_pika.connect(self.url))
        return await connection.channel(on_return_raises=True)

    async def close(self) -> None:
        for adapter in self.adapters:
            await adapter.close()
        channel = await self.raw()
        for plan in [adapter._plan for adapter in self.adapters]:
            for queue in plan.queues:
                await channel.queue_delete(queue)
            for exchange in plan.exchanges:
                await channel.exchange_delete(exchange)
        await self.stack.aclose()


def out(to: Declared, body: bytes = b"x", not_before: float | None = None, **fields: Any) -> Outgoing:
    fields.setdefault("id", new_id())
    return Outgoing(to.address, Message(body, **fields), not_before)


def source(declared: Declared, **options: Any) -> Source:
    assert not isinstance(declared.address, Topic)
    return Source(declared.address, **options)


async def take(subscription: Subscription, count: int = 1, within: float = SOON) -> list[Delivery[Any]]:
    """Exactly `count` deliveries, not settled."""
    found: list[Delivery[Any]] = []
    async with asyncio.timeout(within):
        while len(found) < count:
            found += await subscription.receive(count - len(found), 1.0)
    return found


async def drink(subscription: Subscription, count: int = 1) -> list[Message]:
    """The messages of `count` deliveries, accepted."""
    found = await take(subscription, count)
    assert not any(await subscription.settle(Outcome.ACCEPTED, found))
    return [delivery.message for delivery in found]


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)
    assert condition(), what


class Proxy:
    """TCP in between. `cut` ends all links at once; `freeze` holds back what clients send, `hang` all; `say` speaks for the server."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None) -> None:
        parts = parse(url)
        host, port = parts.hosts[0]
        self._target = (host, port or 5672)
        self._parts = parts
        self._context = context
        self._links: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()  # to the server
        self._open.set()
        self._answers = asyncio.Event()  # from the server
        self._answers.set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        return self

    async def __aexit__(self, *args: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        self.thaw()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def url(self) -> Url:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return replace(self._parts, scheme="amqps" if self._context else "amqp", hosts=(("127.0.0.1", port),))

    def cut(self) -> None:
        for pair in self._links:
            for writer in pair:
                writer.transport.abort()
        self._links.clear()

    def freeze(self) -> None:
        self._open.clear()

    def hang(self) -> None:
        """Neither side hears of the other, not even that it is gone."""
        self._open.clear()
        self._answers.clear()

    def thaw(self) -> None:
        self._open.set()
        self._answers.set()

    def say(self, frame: bytes) -> None:
        """To every client; only while the server is silent, since frames must stay whole."""
        for client, _ in self._links:
            client.write(frame)

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _link(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection(*self._target)
        self._links.append((client, server))
        await asyncio.gather(self._pump(reader, server, self._open), self._pump(answers, client, self._answers))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        try:
            while data := await reader.read(65536):
                await gate.wait()
                writer.write(data)
                await writer.drain()
            await gate.wait()
        except OSError:
            writer.transport.abort()
        finally:
            writer.close()


def secret(url: Url, password: str) -> Url:
    return replace(url, password=Secret(password))


def errors_of(results: Sequence[object]) -> list[str]:
    return [type(error).__name__ for error in results]


@contextlib.asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    made = Bench(broker_url())
    try:
        yield made
    finally:
        await made.close()
