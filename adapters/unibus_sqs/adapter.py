"""SQS and SNS behind the SPI."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Results, Source, Topology
from unibus.capabilities import Capabilities
from unibus.channel import Address, Group, Inbox, Queue, Topic
from unibus.driver import as_result, by, linked, no_history, nobody, place_of
from unibus.errors import PermissionDenied, Timeout, TransportError, UnibusError
from unibus_sqs import config, topology, wire
from unibus_sqs.capabilities import LIMIT, TOPIC_LIMIT, known
from unibus_sqs.link import BATCH, Link
from unibus_sqs.private import Private
from unibus_sqs.subscription import LONGEST_DELAY, SqsSubscription
from unibus_sqs.topology import Place

_REACHED = 60.0  # seconds for which a topic that had a group is taken to have one
_READY, _IN_FLIGHT = "ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"
_DELAYED = "ApproximateNumberOfMessagesDelayed"
_MOST_INBOXES = 1000  # whose URLs are kept
_UNDECIDED = TransportError("its request is under way")


class SqsAdapter:
    """One client of SQS, one of SNS."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._clock = endpoint.clock
        self._settings = config.settings(endpoint.settings)
        config.region(endpoint.url)
        self.capabilities: Capabilities = known(lease=float(self._settings.lease))
        self._link: Link | None = None
        self._places: topology.Places = {}
        self._inboxes: dict[Inbox, Place] = {}  # of other processes
        self._private: Private | None = None
        self._subscriptions: set[SqsSubscription] = set()

    @property
    def native(self) -> object:
        """The client of aiobotocore for SQS, or None while there is none."""
        return None if self._link is None else self._link.sqs

    async def connect(self) -> None:
        await self.close()
        link = Link(self._endpoint.url, self._settings)
        try:
            await link.open()
        except BaseException:
            await link.close()
            raise
        self._link = link
        self._private = Private(link, self._endpoint)

    async def close(self) -> None:
        await asyncio.gather(*(subscription.close() for subscription in self._subscriptions))
        link, self._link = self._link, None
        private, self._private = self._private, None
        if private is not None:
            await private.close()
        if link is not None:
            await link.close()

    async def declare(self, topology_: Topology) -> None:
        link = linked(self._link, "SQS")
        made = topology.plan(topology_)
        if topology_.mode == "create":
            await topology.create(link, made)
        elif topology_.mode == "verify":
            await topology.verify(link, made)
        self._places = made

    async def inspect(self, topology_: Topology) -> list[Inspected]:
        return await topology.inspect(linked(self._link, "SQS"), topology.plan(topology_))

    async def _place(self, link: Link, address: Address) -> Place:
        """With its URL or ARN."""
        if isinstance(address, Inbox):
            if len(self._inboxes) >= _MOST_INBOXES:
                self._inboxes.clear()
            place = self._inboxes.setdefault(address, Place(address, address.name))
        else:
            place = place_of(self._places, address)
        if not place.target:
            look_up = link.topic_arn if isinstance(address, Topic) else link.queue_url
            place.target = await look_up(place.name)
        return place

    # -- send

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        link = linked(self._link, "SQS")
        results: list[TransportError | None] = [_UNDECIDED] * len(batch)
        by_address = by(range(len(batch)), lambda i: batch[i].to)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(self._send_to(link, to, batch, at, results) for to, at in by_address.items()))
        for i, result in enumerate(results):
            if result is _UNDECIDED:
                results[i] = Timeout(f"no answer from AWS to a message to {batch[i].to} in time")
        return results

    async def _send_to(
        self,
        link: Link,
        to: Address,
        batch: Sequence[Outgoing],
        indexes: list[int],
        results: list[TransportError | None],
    ) -> None:
        """All messages of one destination, by tens, side by side."""
        try:
            place = await self._place(link, to)
        except UnibusError as error:
            for i in indexes:
                results[i] = as_result(error)
            return
        is_topic = isinstance(to, Topic)
        operation, name, where, limit = link.send_message_batch, "Entries", "QueueUrl", LIMIT
        if is_topic:
            operation, name, where = link.sns.publish_batch, "PublishBatchRequestEntries", "TopicArn"
            limit = TOPIC_LIMIT
        chunks: list[tuple[list[int], list[dict[str, Any]]]] = []
        room = 0
        for i in indexes:
            entry, size = self._entry(batch[i], place)
            if too_large := wire.too_large(batch[i], size):
                results[i] = too_large
                continue
            if not chunks or size > room or len(chunks[-1][0]) == BATCH:
                chunks.append(([], []))
                room = limit
            room -= size
            chunks[-1][0].append(i)
            chunks[-1][1].append(entry)
        unheard = is_topic and not await self._reaches(link, place)

        async def request(part: list[int], entries: list[dict[str, Any]]) -> None:
            answers = await link.batch(operation, f"send to {to}", name, entries, **{where: place.target})
            for i, answer in zip(part, answers, strict=True):
                results[i] = answer or (nobody(to) if unheard else None)

        await asyncio.gather(*(request(part, entries) for part, entries in chunks))

    def _entry(self, outgoing: Outgoing, place: Place) -> tuple[dict[str, Any], int]:
        """An entry of a batch, and its size."""
        message, not_before, seconds = outgoing.message, outgoing.not_before, 0
        is_topic = isinstance(place.address, Topic)
        if not_before is not None:
            seconds = math.ceil(round(not_before - self._clock.time(), 6))
            if seconds <= 0 or not (is_topic or place.fifo or seconds > LONGEST_DELAY):
                not_before = None  # SQS does it alone
        promoted = place.options.attributes if is_topic else ()
        body, attributes, size = wire.encode(outgoing, not_before, promoted)
        entry: dict[str, Any] = {"Message" if is_topic else "MessageBody": body, "MessageAttributes": attributes}
        if place.fifo:
            # Dead letters are nobody's order: one that is looked at must not hide the others of its key.
            key = message.key if message.key is not None and place.dead is None else message.id
            entry |= {"MessageGroupId": wire.group_id(key), "MessageDeduplicationId": wire.dedup_id(message)}
        elif seconds > 0 and not is_topic:
            entry["DelaySeconds"] = min(seconds, LONGEST_DELAY)
        return entry, size

    async def _reaches(self, link: Link, topic: Place) -> bool:
        """Has the topic any group? SNS takes a message either way. Asked rarely, unless the answer was no."""
        now = self._clock.monotonic()
        if now < topic.reached_until:
            return True
        try:
            answer = await link.call(link.sns.get_topic_attributes, f"look at {topic.address}", TopicArn=topic.target)
        except PermissionDenied:
            topic.reached_until = math.inf
            return True
        except TransportError:
            return True  # the send itself will tell
        if int(answer["Attributes"].get("SubscriptionsConfirmed", 1)) == 0:
            return False
        topic.reached_until = now + _REACHED
        return True

    # -- receive

    async def subscribe(self, source: Source) -> SqsSubscription:
        link, private = linked(self._link, "SQS"), self._private
        assert private is not None  # noqa: S101  # for mypy: made with the link
        address: Address = source.address
        no_history("SQS", address, source.start)
        if isinstance(address, Inbox):
            place = await private.make(address, None)
        elif isinstance(address, Group) and address.ephemeral:
            place = await private.make(address, await self._place(link, address.topic))
        else:
            place = place_of(self._places, address)
            place.target = await link.queue_url(place.name)

        async def closed(subscription: SqsSubscription) -> None:
            self._subscriptions.discard(subscription)
            if place.private:
                await private.drop(place.target)

        subscription = SqsSubscription(source, place, link, self._clock, self._settings, closed)
        self._subscriptions.add(subscription)
        return subscription

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        link = linked(self._link, "SQS")
        place = await self._place(link, address)
        found = await link.attributes(place.target, _READY, _IN_FLIGHT, _DELAYED)
        delayed = int(found.get(_DELAYED, 0))
        return Backlog(int(found[_READY]), int(found[_IN_FLIGHT]), exact=False, delayed=delayed)

    async def check(self) -> Health:
        return Health(self._link is not None and self._link.trouble is None, mends=True)

    def reply_to(self, text: str) -> Address:
        return wire.reply_address(text)
