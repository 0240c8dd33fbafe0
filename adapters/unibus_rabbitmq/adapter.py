"""RabbitMQ behind the SPI."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from yarl import URL

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Results, Source, Topology
from unibus.capabilities import Capabilities
from unibus.channel import Address, Group, Inbox, Queue, stem
from unibus.config_tables import check_table
from unibus.driver import linked, no_history, place_of, send_all, topic_of
from unibus.errors import Unsupported
from unibus.inboxes import inbox_name
from unibus.translation import first_that_answers
from unibus_rabbitmq import config, declaring, errors, topology, wire
from unibus_rabbitmq.capabilities import known
from unibus_rabbitmq.link import Link
from unibus_rabbitmq.publisher import Publisher
from unibus_rabbitmq.subscription import Browser, RabbitMQSubscription

log = logging.getLogger("unibus.rabbitmq")

_TIMEOUT = 20.0  # of what has no deadline of its own


class RabbitMQAdapter:
    """Two connections: publishing may be blocked by an alarm of the server, and acks must not wait behind it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.capabilities: Capabilities = known()
        self._endpoint = endpoint
        self._clock = endpoint.clock
        self._settings = check_table(config.Settings, endpoint.settings, "rabbitmq")
        self._names = topology.Names(endpoint.prefix)
        self._publishing: Link | None = None
        self._consuming: Link | None = None
        self._publisher: Publisher | None = None
        self._plan = topology.Plan()
        self._subscriptions: set[RabbitMQSubscription] = set()
        self._send_back = partial(send_all, self.send, timeout=_TIMEOUT)

    @property
    def native(self) -> object:
        """aio-pika's connection for publishing, or None while there is none."""
        return None if self._publishing is None else self._publishing.connection

    async def connect(self) -> None:
        await self.close()
        given = self._settings
        context = await asyncio.get_running_loop().run_in_executor(None, config.tls, self._endpoint.url, given)
        try:
            self._publishing = await self._open("publish", context)
            self._consuming = await self._open("consume", context)
        except BaseException:
            await self.close()
            raise
        self.capabilities = known(self._publishing.version)
        self._publisher = Publisher(self._publishing, self._names, self._clock, self.capabilities.max_body or 0)

    async def _open(self, role: str, context: Any) -> Link:
        """The first host that answers."""
        url, timeout = self._endpoint.url, self._settings.connect_timeout

        async def open_(target: URL) -> Link:
            link = Link(target, context)
            try:
                await link.open(timeout)
            except Exception as exc:
                where = f"{target.host}:{target.port}"
                raise errors.connecting(exc, where, url.path or "/", timeout, link.said) from exc
            return link

        return await first_that_answers(config.urls(url, self._settings, self._endpoint.service, role), open_)

    async def close(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        self._subscriptions.clear()
        links = [link for link in (self._consuming, self._publishing) if link is not None]
        self._publisher = self._publishing = self._consuming = None
        for link in links:
            await link.close()

    async def declare(self, topology_: Topology) -> None:
        link = self._link(self._consuming)
        made = topology.plan(topology_, self._endpoint.prefix, link.version)
        if topology_.mode == "create":
            await declaring.declare(link, made, _TIMEOUT)
        elif topology_.mode == "verify":
            await declaring.verify(link, made, _TIMEOUT)
        self._plan = made

    async def inspect(self, topology_: Topology) -> list[Inspected]:
        link = self._link(self._consuming)
        return await declaring.inspect(link, topology.plan(topology_, self._endpoint.prefix, link.version), _TIMEOUT)

    def _link(self, link: Link | None) -> Link:
        return linked(link, "RabbitMQ")

    def _route(self, address: Address) -> topology.Route:
        if isinstance(address, Inbox):
            return topology.Route("", address.name, address.name)
        return place_of(self._plan.routes, address)

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        self._link(self._publishing)
        assert self._publisher is not None  # noqa: S101  # for mypy: made with the link
        return await self._publisher.send(batch, self._route, self._plan.steps, timeout)

    async def subscribe(self, source: Source) -> RabbitMQSubscription:
        link = self._link(self._consuming)
        no_history("RabbitMQ", source.address, source.start)
        if source.early:
            raise Unsupported(f"{source.address}: a hold queue does not tell when its messages are due")
        place = self._plan.places.get(source.address)
        try:
            async with asyncio.timeout(_TIMEOUT):
                channel = await link.channel()
                if place is None:
                    place = await self._private_place(channel, source.address)
        except Exception as exc:
            raise errors.translate(exc, f"subscribe to {source.address}") from exc
        made = Browser if source.browse else RabbitMQSubscription
        subscription = made(
            source, place, link, channel, self._clock, self._plan, self._send_back, self._subscriptions.discard
        )
        try:
            await subscription.consume()
        except BaseException:
            await subscription.close()
            raise
        self._subscriptions.add(subscription)
        return subscription

    async def _private_place(self, channel: Any, address: Queue[Any] | Group | Inbox) -> topology.Place:
        """An exclusive queue that ends with the connection: of an inbox or an ephemeral group."""
        if isinstance(address, Inbox):
            name = inbox_name(self._endpoint.prefix, self._endpoint.service, secrets.token_hex(8))
        elif isinstance(address, Group) and address.ephemeral:
            name = f"{self._endpoint.prefix}{stem(address)}.{secrets.token_hex(8)}"
        else:
            return place_of(self._plan.places, address)
        config.check_name(name, address)
        await channel.queue_declare(
            name, durable=False, exclusive=True, auto_delete=True, arguments={"x-queue-type": "classic"}
        )
        if isinstance(address, Group):
            exchange, kind, key = topic_of(self._plan.topics, address)
            await channel.queue_bind(name, exchange, topology.group_key(kind, key))
            if address.topic.delayed:  # what comes for its next hop goes back to this queue alone
                await channel.queue_bind(name, self._names.returns, name)
            self._plan.routes[address] = topology.Route("", name, name)
        return topology.Place(name, counted=False)

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        link = self._link(self._consuming)
        place = place_of(self._plan.places, address)
        try:
            async with asyncio.timeout(_TIMEOUT):
                channel = await link.channel()  # a fresh one: a queue that is missing closes it
                found = await channel.queue_declare(place.queue, passive=True)
                await channel.close()
        except Exception as exc:
            raise errors.translate(exc, f"backlog of {address}") from exc
        return Backlog(ready=found.message_count or 0)

    async def check(self) -> Health:
        links = (self._publishing, self._consuming)
        up = all(link is not None and link.lost is None for link in links)
        blocked = self._publishing.blocked if self._publishing is not None else None
        return Health(up, f"RabbitMQ blocks publishing: {blocked}" if up and blocked is not None else None)

    def reply_to(self, text: str) -> Address:
        return wire.reply_address(text)
