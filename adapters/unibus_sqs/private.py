"""Queues that belong to one process: inboxes and broadcast groups. Made when subscribed to, deleted at the end.

SQS has no queue that ends with its consumer. So each carries the time when its process was last seen alive, as a tag, and
a process that makes one deletes those of the same prefix that were left behind by processes which died.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from typing import Any

from unibus.adapter import Endpoint
from unibus.channel import Group, Inbox
from unibus.errors import UnibusError
from unibus_sqs import topology, wire
from unibus_sqs.link import Link
from unibus_sqs.topology import Place

log = logging.getLogger("unibus.sqs")

ALIVE, SUBSCRIPTION = "unibus-alive", "unibus-subscription"  # tags: epoch seconds; the ARN that goes with the queue
BEAT = 300.0  # seconds between two signs of life
DEAD = 4 * BEAT  # without any
_RETENTION = "3600"
_MOST_LOOKED_AT = 100  # queues of other processes, at one clean-up


class Private:
    """Those of one adapter."""

    def __init__(self, link: Link, endpoint: Endpoint) -> None:
        self._link = link
        self._clock = endpoint.clock
        self._stem = wire.private_stem(endpoint.prefix)
        self._mine: dict[str, str | None] = {}  # URL -> the ARN of its subscription
        self._keeper: asyncio.Task[None] | None = None

    async def make(self, address: Inbox | Group, topic: Place | None) -> Place:
        """The queue of an inbox, or of an ephemeral group of this topic."""
        link, fifo = self._link, topic is not None and topic.fifo
        name = f"{self._stem}{'all' if topic else 'reply'}_{secrets.token_hex(8)}{'.fifo' if fifo else ''}"
        place = Place(Inbox(name) if topic is None else address, name, fifo, private=True)
        attributes = {"MessageRetentionPeriod": _RETENTION, **(topology.FIFO_QUEUE if fifo else {})}
        if topic is not None:
            attributes["Policy"] = topology.policy(topic, place)
        doing = f"make queue {name!r}, of this process alone"
        answer = await link.call(
            link.sqs.create_queue, doing, QueueName=name, Attributes=attributes, tags=self._alive()
        )
        place.target = url = answer["QueueUrl"]
        self._mine[url] = None
        if topic is not None:
            try:
                arn = self._mine[url] = await topology.subscribe(link, topic, place)
                await link.call(link.sqs.tag_queue, doing, QueueUrl=url, Tags={SUBSCRIPTION: arn})
            except BaseException:
                await self.drop(url)
                raise
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        return place

    def _alive(self) -> dict[str, str]:
        return {ALIVE: f"{self._clock.time():.0f}"}

    async def _keep(self) -> None:
        """Look after the dead once, then give signs of life."""
        await _tried(self._clean_up())
        while True:
            await self._clock.sleep(BEAT)
            for url in tuple(self._mine):
                await _tried(self._link.call(self._link.sqs.tag_queue, f"tag {url}", QueueUrl=url, Tags=self._alive()))

    async def _clean_up(self) -> None:
        sqs, doing = self._link.sqs, "look for queues of processes that died"
        found = await self._link.call(sqs.list_queues, doing, QueueNamePrefix=self._stem, MaxResults=_MOST_LOOKED_AT)
        for url in found.get("QueueUrls") or ():
            if url not in self._mine:
                await _tried(self._clean(url, doing))

    async def _clean(self, url: str, doing: str) -> None:
        tags = (await self._link.call(self._link.sqs.list_queue_tags, doing, QueueUrl=url)).get("Tags") or {}
        alive = tags.get(ALIVE, "")
        if alive.isdecimal() and int(alive) < self._clock.time() - DEAD:
            await self._delete(url, tags.get(SUBSCRIPTION))
            log.info("deleted %s, which a process that died has left", url.rpartition("/")[2])

    async def drop(self, url: str) -> None:
        """The end of a queue of ours."""
        await _tried(self._delete(url, self._mine.pop(url, None)))

    async def _delete(self, url: str, subscription: str | None) -> None:
        link = self._link
        if subscription is not None:
            await link.call(link.sns.unsubscribe, f"unsubscribe {url}", SubscriptionArn=subscription)
        await link.call(link.sqs.delete_queue, f"delete {url}", QueueUrl=url)

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])


async def _tried(work: Coroutine[Any, Any, Any]) -> None:
    """What others will do again: a failure is no more than a line in the log."""
    try:
        await work
    except UnibusError as error:
        log.debug("%s", error)
