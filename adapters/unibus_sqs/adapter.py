"""SQS and SNS behind the SPI."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Results, Source, Topology
from unibus.capabilities import Capabilities
from unibus.channel import Address, Group, Inbox, Queue, Topic
from unibus.driver import as_result, by, linked, no_history, place_of
from unibus.errors import (
    MessageTooLarge,
    PermissionDenied,
    Timeout,
    TransportError,
    UnibusError,
    Unroutable,
)
from unibus_sqs import config, errors, topology, wire
from unibus_sqs.capabilities import LIMIT, RESERVE, TOPIC_LIMIT, known
from unibus_sqs.link import Link
from unibus_sqs.private import Private
from unibus_sqs.subscription import BATCH, LONGEST_DELAY, SqsSubscription

_REACHED = 60.0  # seconds for which a topic that had a group is taken to have one
_READY, _IN_FLIGHT = "ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"
_DELAYED = "ApproximateNumberOfMessagesDelayed"
_MOST_INBOXES = 1000  # whose URLs are kept


class SqsAdapter:
    """One client of SQS, one of SNS."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._clock = endpoint.clock
        self._settings = config.settings(endpoint.settings)
        config.region(endpoint.url)
        self.capabilities: Capabilities = known(lease=float(self._settings.lease))
        self._link: Link | None = None
        self._plan = topology.Plan()
        self._inboxes: dict[str, str] = {}  # name -> URL
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
        if self._private is not None:
            await self._private.close()
            self._private = None
        if link is not None:
            await link.close()

    def _linked(self) -> Link:
        return linked(self._link, "SQS")

    async def declare(self, topology_: Topology) -> None:
        link = self._linked()
        made = topology.plan(topology_)
        if topology_.mode == "create":
            await topology.create(link, made)
        elif topology_.mode == "verify":
            await topology.verify(link, made)
        self._plan = made

    async def inspect(self, topology_: Topology) -> list[Inspected]:
        return await topology.inspect(self._linked(), topology.plan(topology_))

    # -- send

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        link = self._linked()
        results: list[TransportError | None] = [None] * len(batch)
        by_address = by(range(len(batch)), lambda i: batch[i].to)
        work = [self._send_to(link, to, batch, indexes, results) for to, indexes in by_address.items()]
        try:
            async with asyncio.timeout(timeout):
                await (work[0] if len(work) == 1 else asyncio.gather(*work))
        except TimeoutError:
            for i, outgoing in enumerate(batch):
                if isinstance(results[i], _Pending):
                    results[i] = Timeout(f"no answer from AWS to a message to {outgoing.to} in time")
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
        for i in indexes:
            results[i] = _Pending()
        try:
            target, fifo, dead = await self._target(link, to)
        except UnibusError as error:
            for i in indexes:
                results[i] = as_result(error)
            return
        is_topic = isinstance(to, Topic)
        topic = self._plan.topics[to] if is_topic else None
        limit = TOPIC_LIMIT if is_topic else LIMIT
        reserved = 0 if is_topic else RESERVE  # a retry of a group's message goes to its queue, which carries more
        chunks: list[tuple[list[int], list[dict[str, Any]]]] = []
        room = 0
        for i in indexes:
            outgoing = batch[i]
            entry, size = self._entry(outgoing, fifo, dead, topic)
            if size > limit - (reserved if outgoing.origin is None else 0):
                results[i] = MessageTooLarge(
                    f"{to}: the message has {size} bytes with its headers, as {'SNS' if is_topic else 'SQS'} counts them; "
                    f"{limit} is its limit, of which {reserved} are kept for the headers of a retry"
                )
                continue
            if not chunks or size > room or len(chunks[-1][0]) == BATCH:
                chunks.append(([], []))
                room = limit
            room -= size
            chunks[-1][0].append(i)
            chunks[-1][1].append({"Id": str(i), **entry})
        nobody = topic is not None and not await self._reaches(link, topic)
        requests = [self._request(link, to, target, part, entries, results) for part, entries in chunks]
        if len(requests) == 1:
            await requests[0]
        else:
            await asyncio.gather(*requests)
        if nobody:
            for i in indexes:
                results[i] = results[i] or Unroutable(f"{to} has no group")

    def _entry(
        self, outgoing: Outgoing, fifo: bool, dead: bool, topic: topology.TopicPlace | None
    ) -> tuple[dict[str, Any], int]:
        """An entry of a batch, and its size."""
        message, not_before, seconds = outgoing.message, outgoing.not_before, 0
        if not_before is not None:
            seconds = math.ceil(round(not_before - self._clock.time(), 6))
            if seconds <= 0:
                not_before = None
        hops = not_before is not None and (topic is not None or fifo or seconds > LONGEST_DELAY)
        body, attributes, size = wire.encode(
            outgoing, not_before if hops else None, topic.options.attributes if topic is not None else ()
        )
        entry: dict[str, Any] = {"Message" if topic else "MessageBody": body, "MessageAttributes": attributes}
        if fifo:
            # Dead letters are nobody's order: one that is looked at must not hide the others of its key.
            key = message.key if message.key is not None and not dead else message.id
            entry |= {"MessageGroupId": wire.group_id(key), "MessageDeduplicationId": wire.dedup_id(message)}
        elif topic is None and seconds > 0:
            entry["DelaySeconds"] = min(seconds, LONGEST_DELAY)
        return entry, size

    async def _request(
        self,
        link: Link,
        to: Address,
        target: str,
        indexes: list[int],
        entries: list[dict[str, Any]],
        results: list[TransportError | None],
    ) -> None:
        doing = f"send to {to}"
        try:
            if isinstance(to, Topic):
                answer = await link.call(
                    link.sns.publish_batch, doing, TopicArn=target, PublishBatchRequestEntries=entries
                )
            else:
                answer = await link.call(link.sqs.send_message_batch, doing, QueueUrl=target, Entries=entries)
        except UnibusError as error:
            for i in indexes:
                results[i] = as_result(error)
            return
        for i in indexes:
            results[i] = None
        for failed in answer.get("Failed") or ():
            results[int(failed["Id"])] = errors.of_entry(failed, doing)

    async def _reaches(self, link: Link, topic: topology.TopicPlace) -> bool:
        """Has the topic any group? SNS takes a message either way. Asked rarely, unless the answer was no."""
        now = self._clock.monotonic()
        if now < topic.reached_until:
            return True
        try:
            answer = await link.call(link.sns.get_topic_attributes, f"look at {topic.address}", TopicArn=topic.arn)
        except PermissionDenied:
            topic.reached_until = math.inf
            return True
        except TransportError:
            return True  # the send itself will tell
        if int(answer["Attributes"].get("SubscriptionsConfirmed", 1)) == 0:
            return False
        topic.reached_until = now + _REACHED
        return True

    async def _target(self, link: Link, to: Address) -> tuple[str, bool, bool]:
        """URL or ARN; is it FIFO; are these dead letters?"""
        if isinstance(to, Topic):
            topic = self._topic(to)
            if topic.arn is None:
                topic.arn = await link.topic_arn(topic.name)
            return topic.arn, topic.fifo, False
        if isinstance(to, Inbox):
            if to.name not in self._inboxes:
                if len(self._inboxes) >= _MOST_INBOXES:
                    self._inboxes.clear()
                self._inboxes[to.name] = await link.queue_url(to.name)
            return self._inboxes[to.name], False, False
        place = self._place(to)
        if place.url is None:
            place.url = await link.queue_url(place.name)
        return place.url, place.fifo, place.dead is not None

    def _place(self, address: Address) -> topology.Place:
        return place_of(self._plan.places, address)

    def _topic(self, address: Topic[Any]) -> topology.TopicPlace:
        return place_of(self._plan.topics, address)

    # -- receive

    async def subscribe(self, source: Source) -> SqsSubscription:
        link = self._linked()
        assert self._private is not None  # noqa: S101  # for mypy: made with the link
        address: Address = source.address
        no_history("SQS", address, source.start)
        if isinstance(address, Inbox):
            place = await self._private.make(address, None)
        elif isinstance(address, Group) and address.ephemeral:
            await self._target(link, address.topic)
            place = await self._private.make(address, self._plan.topics[address.topic])
        else:
            place = self._place(address)
            place.url = await link.queue_url(place.name)
        subscription = SqsSubscription(source, place, link, self._clock, self._settings, self._ended)
        self._subscriptions.add(subscription)
        return subscription

    async def _ended(self, subscription: SqsSubscription) -> None:
        self._subscriptions.discard(subscription)
        if subscription.private and self._private is not None:
            await self._private.drop(subscription.url)

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        link = self._linked()
        url, _, _ = await self._target(link, address)
        answer = await link.call(
            link.sqs.get_queue_attributes,
            f"look at {address}",
            QueueUrl=url,
            AttributeNames=[_READY, _IN_FLIGHT, _DELAYED],
        )
        found = answer["Attributes"]
        delayed = int(found.get(_DELAYED, 0))
        return Backlog(int(found[_READY]), int(found[_IN_FLIGHT]), exact=False, delayed=delayed)

    async def check(self) -> Health:
        return Health(self._link is not None and self._link.trouble is None)

    def reply_to(self, text: str) -> Address:
        return wire.inbox(text)


class _Pending(TransportError):
    """The result of a message whose request is under way."""
