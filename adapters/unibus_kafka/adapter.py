"""Kafka behind the SPI."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiokafka import TopicPartition

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Results, Source, Start, Topology
from unibus.capabilities import Capabilities
from unibus.channel import Address, Group, Inbox, Queue, Topic
from unibus.driver import all_there, linked, nobody, place_of, send_all
from unibus.errors import (
    ConfigError,
    NotFound,
    Timeout,
    TransportError,
    UnibusError,
    Unroutable,
)
from unibus_kafka import config, errors, topology, wire
from unibus_kafka.capabilities import known
from unibus_kafka.engine import Batch, engine_of
from unibus_kafka.link import EARLIEST, LATEST, TIMEOUT, Link
from unibus_kafka.offsets import decode
from unibus_kafka.subscription import KafkaSubscription, Kit
from unibus_kafka.topology import Place

log = logging.getLogger("unibus.kafka")

_JOIN = 5.0  # seconds; a group that is busy rebalancing may need longer, and then this member stands by meanwhile
_LOOK = 1.0  # seconds without a confirmation after which the topics are looked at
_REPLIES = {"retention.ms": "3600000", "cleanup.policy": "delete"}
_HIDDEN = "; what this user may not Describe looks missing to it"

Route = tuple[str, int | None, bool]  # topic; partition, where it is given; whether the message waits there


class KafkaAdapter:
    """One producer, and one consumer for each subscription."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._clock = endpoint.clock
        self._settings = config.settings(endpoint.settings)
        self._engine = engine_of(endpoint.url.scheme)
        self.capabilities: Capabilities = known(max_request_size=self._settings.max_request_size)
        self._link: Link | None = None
        self._plan = topology.Plan()
        self._subscriptions: set[KafkaSubscription] = set()
        self._routed: dict[str, float] = {}  # topic -> until when it needs no look whether it has a group

    @property
    def native(self) -> object:
        """The client library's producer, or None while there is none."""
        return None if self._link is None else self._link.producer.native

    async def connect(self) -> None:
        await self.close()
        url, given = self._endpoint.url, self._settings
        context = await asyncio.get_running_loop().run_in_executor(None, config.tls, url, given)
        options = config.client(url, given, context, self._endpoint.service)
        self._link = await Link.open(options, given, self._engine)

    async def close(self) -> None:
        await asyncio.gather(*(subscription.close() for subscription in list(self._subscriptions)))
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    def _linked(self) -> Link:
        return linked(self._link, "Kafka")

    def _place(self, address: Address) -> Place:
        return place_of(self._plan.places, address)

    # Declaring

    async def declare(self, topology_: Topology) -> None:
        link, made = self._linked(), topology.plan(topology_, self._settings)
        if topology_.mode != "assume":
            gone = await link.missing(made.topics, fresh=True)
            if topology_.mode == "verify":
                await self._verify(link, made, gone)
            else:
                witnesses = {witness for _, _, witness in made.groups.values()}
                await link.create({name: o for name, o in made.topics.items() if name not in witnesses})
                for group, (place, start, witness) in made.groups.items():
                    await self._begin(link, group, place, start, known_before=bool(witness) and witness not in gone)
                await link.create(made.topics)
        self._plan.places |= made.places
        self._plan.topics |= made.topics
        self._plan.groups |= made.groups

    async def inspect(self, topology_: Topology) -> list[Inspected]:
        link, made = self._linked(), topology.plan(topology_, self._settings)
        gone = await link.missing(made.topics, fresh=True)
        risks = await link.risks([name for name in made.topics if name not in gone])
        owners = {topic: address for address, place in reversed(made.places.items()) for topic in place.topics}
        owners |= {place.name: address for address, place in made.places.items() if not isinstance(address, Group)}
        found = [
            Inspected(
                "topic", name, name not in gone, f"Create on topic {name}", owners.get(name), risk=risks.get(name, "")
            )
            for name in made.topics
        ]
        for group, (place, _, _) in made.groups.items():
            exists = place.topic not in gone and bool(await link.committed(group))
            found.append(Inspected("group", group, exists, f"Read on group {group} and its topics", place.address))
        return found

    async def _begin(self, link: Link, group: str, place: Place, start: Start, *, known_before: bool) -> None:
        """Where a new group begins, committed now: what is sent from now on is its. One that is known is left alone.

        Kafka forgets the offsets of a group without members after a week. Its dead-letter topic is the witness that it is
        not new: then it reads from the beginning, since skipping what it has not seen would lose it.
        """
        if known_before or await link.committed(group):
            return
        topics = [topic for topic in place.topics if topic not in _own(place)]
        await link.missing(topics)  # a broker of a cluster may have told us meanwhile that it does not know them yet
        tps = [tp for topic in topics for tp in link.partitions(topic)]
        at = int(start * 1000) if isinstance(start, float) else EARLIEST if start == "all" else LATEST
        offsets = await link.offsets(tps, at)
        if late := [tp for tp, offset in offsets.items() if offset < 0]:  # nothing since that time
            offsets |= await link.offsets(late, LATEST)
        if isinstance(start, tuple):
            offsets |= await self._positions(link, place, start, offsets)
        await link.commit(group, offsets)
        log.info("created group %s", group)

    @staticmethod
    async def _positions(
        link: Link, place: Place, start: tuple[str, ...], ends: dict[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        begins, found = await link.offsets(ends, EARLIEST), {}
        for text in start:
            topic, number, offset = wire.parsed_position(text) or ("", 0, 0)
            tp = TopicPartition(topic, number)
            if topic != place.topic or tp not in ends or not begins[tp] <= offset <= ends[tp]:
                has = ", ".join(f"{t.topic}/{t.partition}@{begins[t]} to {e}" for t, e in ends.items())
                raise ConfigError(f"{place.address}: start={text!r} is no position of its topic, which has {has}")
            found[tp] = offset
        return found

    async def _verify(self, link: Link, made: topology.Plan, gone: set[str]) -> None:
        lacking = [f"topic {name!r}" for name in made.topics if name in gone]
        for group, (place, _, _) in made.groups.items():
            if place.topic not in gone and not await link.committed(group):
                lacking.append(f"group {group!r}")
        all_there("Kafka", lacking, _HIDDEN)

    # Sending

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        link, now = self._linked(), self._clock.time()
        results: list[TransportError | None] = [None] * len(batch)
        routes, looked_up = self._routes(batch, now)
        gone = await link.missing({topic for _, (topic, _, _) in looked_up})
        batches: dict[TopicPartition, list[Batch]] = defaultdict(list)
        most = self._settings.max_request_size
        for i, (outgoing, (topic, number, later)) in enumerate(zip(batch, routes, strict=True)):
            key, value, headers, at = record = wire.encode(outgoing, now, later=later)
            tp = link.partition(topic, key, number)
            if tp is None or topic in gone:
                results[i] = self._missing(outgoing, topic)
            elif too_large := wire.too_large(outgoing, record, most):
                results[i] = too_large
            else:
                of_partition = batches[tp]
                if not of_partition or not of_partition[-1].append(i, key, value, headers, at):
                    of_partition.append(new := link.producer.batch(tp))
                    new.append(i, key, value, headers, at)
        delivered = [self._deliver(link, tp, made, timeout, results) for tp, made in batches.items()]
        if len(delivered) == 1:  # without the turns of the loop that a task more takes
            await delivered[0]
        else:
            await asyncio.gather(*delivered)
        for topic in {topic for to, (topic, _, later) in looked_up if later or type(to) is Group}:
            for subscription in self._subscriptions:
                subscription.sent(topic)
        if any(isinstance(to, Topic) for to, _ in looked_up):
            for i, outgoing in enumerate(batch):
                to = outgoing.to
                if isinstance(to, Topic) and results[i] is None and not await self._has_group(link, to):
                    results[i] = nobody(to)
        return results

    def _routes(self, batch: Sequence[Outgoing], now: float) -> tuple[list[Route], list[tuple[Address, Route]]]:
        """`_route` of each; and those that were looked up: most of a batch go to one place, and only the first of these is."""
        to: Address | None = None  # of the one before, where it goes at once
        routes, looked_up = [], []
        for outgoing in batch:
            if outgoing.to is not to or outgoing.not_before is not None:
                route = self._route(outgoing, now)
                looked_up.append((outgoing.to, route))
                to = outgoing.to if outgoing.not_before is None else None
            routes.append(route)
        return routes, looked_up

    def _route(self, outgoing: Outgoing, now: float) -> Route:
        if isinstance(outgoing.to, Inbox):
            topic, number, _ = wire.reply_address(outgoing.to.name)
            return topic, number, False
        wait = -1.0 if outgoing.not_before is None else outgoing.not_before - now
        topic, later = self._place(outgoing.to).route(wait)
        return topic, None, later

    @staticmethod
    def _missing(outgoing: Outgoing, topic: str) -> TransportError:
        if isinstance(outgoing.to, Inbox):
            return Unroutable(f"the inbox is gone: its topic {topic!r} does not exist, or this user lacks Write on it")
        return NotFound(
            f"{outgoing.to} does not exist on Kafka (topic {topic!r}), or this user lacks Write on it; declare it"
        )

    async def _deliver(
        self, link: Link, tp: TopicPartition, made: list[Batch], timeout: float, results: list[Any]
    ) -> None:
        """The batches of one partition, one after the other; behind one that may be sent again the others wait for that."""
        deadline = asyncio.get_running_loop().time() + timeout
        error: UnibusError | None = None
        for batch in made:
            if error is not None and error.retryable:
                for i in batch.indices:
                    results[i] = error
                continue
            error = None
            try:
                async with asyncio.timeout_at(deadline):
                    confirmed = await batch.send()
                    confirmed.add_done_callback(_seen)
                    while not (await asyncio.wait([confirmed], timeout=_LOOK))[0]:
                        if await link.missing({tp.topic}, fresh=True):  # the producer alone would try for ever
                            raise NotFound(f"topic {tp.topic!r} was deleted")
                    confirmed.result()
            except TimeoutError as exc:
                error = Timeout(f"send to {tp.topic!r}: not confirmed within {timeout:g} s; it may or may not be there")
                error.__cause__ = exc
            except Exception as exc:
                error = _failed(exc, tp)
            if error is not None:
                for i in batch.indices:
                    results[i] = error
            for i, failure in batch.failed.items():
                results[i] = _failed(failure, tp)

    async def _has_group(self, link: Link, topic: Topic[Any]) -> bool:
        """By name: `<topic>.<group>`. What was found holds on; what was not is looked for again soon."""
        place, now = self._place(topic), asyncio.get_running_loop().time()
        until = self._routed.get(place.name, 0.0)  # negative: until when it counts as having none
        if any(p.topic == place.name for p, _, _ in self._plan.groups.values()) or until > now:
            return True
        if -until > now:
            return False
        found = any(group.startswith(place.name + ".") for group in await link.groups())
        self._routed[place.name] = float("inf") if found else -(now + _LOOK)
        return found

    # Receiving

    async def subscribe(self, source: Source) -> KafkaSubscription:
        link, address, given = self._linked(), source.address, self._settings
        token = wire.inbox_token(address.name) if isinstance(address, Inbox) else ""
        if isinstance(address, Inbox):
            name = wire.inbox_topic(self._endpoint.prefix, self._endpoint.service)
            await link.create({name: config.TopicOptions(replication=given.replication, config=_REPLIES)})
            place = Place(Queue.derived(name), name, name, {name: 0.0})
        elif isinstance(address, Group) and address.ephemeral:
            above = self._place(address.topic)
            place = Place(address, address.name, above.topic, above.topics)
        else:
            place = self._place(address)
        gone = sorted(await link.missing(place.topics))
        all_there("Kafka", (f"{address} (topic {name!r})" for name in gone), _HIDDEN)
        group = None if source.browse or place not in self._plan.places.values() else place.name
        consumer = self._engine.consumer(link.options, given, group)
        hop = partial(send_all, self.send, timeout=TIMEOUT)
        kit = Kit(link, self._clock, given, hop, self._subscriptions.discard)
        subscription = KafkaSubscription(source, place, consumer, kit, group, token)
        self._subscriptions.add(subscription)
        try:
            await consumer.start()
            if group is not None:
                consumer.subscribe(list(place.topics), subscription)
                subscription.begin()
                await subscription.joined(_JOIN)
            else:
                await self._assign(link, subscription, place, token, browse=source.browse)
                subscription.begin()
        except BaseException as exc:
            await subscription.close()
            if not isinstance(exc, Exception):
                raise
            raise errors.translate(exc, f"subscribe to {address}") from exc
        return subscription

    async def _assign(
        self, link: Link, subscription: KafkaSubscription, place: Place, token: str, *, browse: bool
    ) -> None:
        """Without a group: what is there for a browser, what comes from now on for everybody else."""
        tps = [tp for topic in place.topics for tp in link.partitions(topic)]
        if token:
            tps = [tps[sum(token.encode()) % len(tps)]]
            subscription.address = Inbox(f"{tps[0].topic}:{tps[0].partition}:{token}")
        starts = {tp: (at, "") for tp, at in (await link.offsets(tps, EARLIEST if browse else LATEST)).items()}
        if browse:
            starts |= {tp: at for tp, at in (await link.committed(place.name)).items() if tp in starts}
        await subscription.assign(starts)

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        link, place = self._linked(), self._place(address)
        gone = await link.missing(place.topics)
        needed = sorted(name for name in gone if not place.topics[name])  # rungs that are missing hold nothing
        all_there("Kafka", (f"{address} (topic {name!r})" for name in needed), _HIDDEN)
        tps = [tp for topic in place.topics if topic not in gone for tp in link.partitions(topic)]
        committed = await link.committed(place.name)  # first: what moves meanwhile counts twice, and not never
        begins, ends = await link.offsets(tps, EARLIEST), await link.offsets(tps, LATEST)
        ready = delayed = 0
        for tp, end in ends.items():
            at, metadata = committed.get(tp, (0, ""))
            at = max(at, begins[tp])
            beyond = decode(at, metadata)
            left = end - at if beyond is None else end - beyond[0] - 1 + len(beyond[1])
            if place.topics[tp.topic]:
                delayed += left
            else:
                ready += left
        return Backlog(ready, exact=place.letters, delayed=delayed)  # what consumers have in hand is in it

    async def check(self) -> Health:
        return Health(self._link is not None and await self._link.up(), mends=True)

    def reply_to(self, text: str) -> Address:
        wire.reply_address(text)
        return Inbox(text)


def _failed(exc: Exception, tp: TopicPartition) -> UnibusError:
    error = errors.translate(exc, f"send to {tp.topic!r}", "Write")
    error.__cause__ = None if error is exc else exc
    return error


def _seen(confirmed: asyncio.Future[Any]) -> None:
    """Also of what comes when nobody waits for it any more."""
    if not confirmed.cancelled():
        confirmed.exception()


def _own(place: Place) -> set[str | None]:
    """The topics that only this group has: it reads them from their beginning."""
    return {place.lane, *(topic for _, topic in place.rungs)}
