"""The raw clients as somebody would write them who has one queue and takes care: what unibus has to stand beside.

They write and read the same properties as unibus, wait for confirms, publish mandatory, and ack a message only after its
handler. Many deliveries are acked at once where all before them are finished, every `every` or after a few
milliseconds: the best that aio-pika can do without losing a message.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from datetime import UTC, datetime
from time import time
from typing import Any, Self

import aio_pika
import aiormq
from aio_pika.abc import AbstractIncomingMessage
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic

from benchmarks.flows import Flow, Raw
from benchmarks.load import BODY, Handled, flood, round_trips
from benchmarks.watch import Watch

CONTENT_TYPE = "application/octet-stream"
PREFETCH = 200
_SOON = 0.01  # seconds an ack waits for others


class Acks:
    """One ack for all up to the first unfinished one, every so many, and `_SOON` after a burst has ended."""

    def __init__(self, channel: AbstractChannel, every: int) -> None:
        self._channel = channel
        self._every = every
        self._upto = self._acked = 0  # a channel's tags count from 1
        self._ahead: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def finished(self, tag: int) -> None:
        if self._every == 1:
            await self._channel.basic_ack(tag, wait=False)
            return
        self._ahead.add(tag)
        while self._upto + 1 in self._ahead:
            self._upto += 1
            self._ahead.remove(self._upto)
        if self._upto - self._acked >= self._every:
            await self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SOON, self._burst_over)

    def _burst_over(self) -> None:
        self._timer = None
        task = asyncio.get_running_loop().create_task(self.flush())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._upto > self._acked:
            self._acked = self._upto
            await self._channel.basic_ack(self._upto, multiple=True, wait=False)


class AioPika(Raw):
    """aio-pika, one connection. `every`: how many deliveries are acked at once."""

    def __init__(self, name: str, url: str, *, every: int) -> None:
        self.name = name
        self._url = url
        self._every = every
        self._ids = map(f"{secrets.token_hex(8)}-%x".__mod__, itertools.count(1))

    async def __aenter__(self) -> Self:
        self._connection = await aio_pika.connect(self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    def _message(self, body: bytes = BODY, headers: dict[str, Any] | None = None) -> aio_pika.Message:
        return aio_pika.Message(
            body,
            headers=headers,
            content_type=CONTENT_TYPE,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=next(self._ids),
            timestamp=int(time()),
        )

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        publish, message, headers = channel.default_exchange.publish, self._message, dict(flow.headers) or None

        watch.start()
        await flood(lambda: publish(message(flow.body, headers), queue, mandatory=True), messages, flow.in_flight)
        watch.stop()
        await channel.close()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        channel = await self._connection.channel(publisher_confirms=False)
        prefetch = flow.prefetch or PREFETCH
        await channel.set_qos(prefetch_count=prefetch)
        source = await channel.get_queue(queue, ensure=False)
        acks = Acks(await channel.get_underlay_channel(), min(self._every, max(1, prefetch // 2)))
        handled = Handled(messages, watch)

        async def on_message(message: AbstractIncomingMessage) -> None:
            handled.handle(message.body, message.message_id, message.content_type, message.timestamp, message.headers)
            await acks.finished(message.delivery_tag or 0)
            handled.settled()

        watch.start()
        await source.consume(on_message)
        await handled.all.wait()
        await acks.flush()
        watch.stop()
        await channel.close()
        return handled.count

    async def requests(self, queue: str, count: int, watch: Watch) -> list[float]:
        """Round trips, seconds: request confirmed, answered, the answer confirmed, the request acked."""
        asking = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        answering = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        inbox = await asking.declare_queue(exclusive=True, auto_delete=True)
        source = await answering.get_queue(queue, ensure=False)
        waiting: dict[str | None, asyncio.Future[bytes]] = {}

        async def answer(request: AbstractIncomingMessage) -> None:
            reply = self._message()
            reply.correlation_id = request.correlation_id
            await answering.default_exchange.publish(reply, request.reply_to or "", mandatory=True)
            await request.ack()

        async def answered(reply: AbstractIncomingMessage) -> None:
            waiting[reply.correlation_id].set_result(reply.body)
            await reply.ack()

        async def ask() -> None:
            request = self._message()
            request.reply_to = inbox.name
            request.correlation_id = request.message_id
            request.headers = {"x-expires-at": f"{time() + 30:.3f}"}
            future = waiting[request.message_id] = asyncio.get_running_loop().create_future()
            sent = asyncio.ensure_future(asking.default_exchange.publish(request, queue, mandatory=True))
            try:
                await future
                await sent
            finally:
                del waiting[request.message_id]

        await inbox.consume(answered)
        await source.consume(answer)
        times = await round_trips(ask, count, watch)
        await asking.close()
        await answering.close()
        return times


class Aiormq(Raw):
    """aiormq, the client below aio-pika: for whoever gives up aio-pika's objects for speed."""

    name = "aiormq"

    def __init__(self, url: str, *, every: int) -> None:
        self._url = url
        self._every = every
        self._ids = map(f"{secrets.token_hex(8)}-%x".__mod__, itertools.count(1))

    async def __aenter__(self) -> Self:
        self._connection = await aiormq.connect(self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        publish: Any = channel.basic_publish  # its declared type lacks `wait`
        ids = self._ids
        table: Any = dict(flow.headers) or None

        def one() -> Any:
            properties = Basic.Properties(
                content_type=CONTENT_TYPE, headers=table, delivery_mode=2, message_id=next(ids), timestamp=_now()
            )
            return publish(flow.body, routing_key=queue, properties=properties, mandatory=True, wait=False)

        watch.start()
        await flood(one, messages, flow.in_flight)
        watch.stop()
        await channel.close()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        channel = await self._connection.channel(publisher_confirms=False)
        prefetch = flow.prefetch or PREFETCH
        await channel.basic_qos(prefetch_count=prefetch)
        acks = Acks(channel, min(self._every, max(1, prefetch // 2)))
        handled = Handled(messages, watch)

        async def on_message(message: DeliveredMessage) -> None:
            p = message.header.properties
            handled.handle(message.body, p.message_id, p.content_type, p.timestamp, p.headers or {})
            await acks.finished(message.delivery_tag or 0)
            handled.settled()

        watch.start()
        await channel.basic_consume(queue, on_message)
        await handled.all.wait()
        await acks.flush()
        watch.stop()
        await channel.close()
        return handled.count


def _now() -> datetime:
    """As pamqp wants it."""
    return datetime.fromtimestamp(int(time()), UTC)
