"""Queues that belong to one process: inboxes and broadcast groups. Made when subscribed to, deleted at the end.

SQS has no queue that ends with its consumer. So each carries the time when its process was last seen alive, as a tag, and
a process that makes one deletes those of the same prefix that were left behind by processes which died.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Mapping
from typing import Any

from unibus.adapter import Endpoint
from unibus.channel import Group, Inbox
from unibus.errors import NotFound, UnibusError
from unibus.inboxes import plain
from unibus_sqs import topology, wire
from unibus_sqs.link import Link

log = logging.getLogger("unibus.sqs")

ALIVE, SERVICE, SUBSCRIPTION = "unibus-alive", "unibus-service", "unibus-subscription"  # tags; ALIVE in epoch seconds
BEAT = 300.0  # seconds between two signs of life
DEAD = 4 * BEAT  # without any
_RETENTION = "3600"
_MOST_LOOKED_AT = 100  # queues of other processes, at one clean-up


class Private:
    """Those of one adapter."""

    def __init__(self, link: Link, endpoint: Endpoint) -> None:
        self._link = link
        self._service = plain(endpoint.service)[:200]
        self._clock = endpoint.clock
        self._stem = wire.private_stem(endpoint.prefix)
        self._beats: dict[str, asyncio.Task[None]] = {}  # by URL
        self._cleaning: asyncio.Task[None] | None = None

    async def make(self, address: Inbox | Group, topic: topology.TopicPlace | None) -> topology.Place:
        """The queue of an inbox, or of an ephemeral group of this topic."""
        link = self._link
        fifo = topic is not None and topic.fifo
        name = f"{self._stem}{'all' if topic else 'reply'}_{secrets.token_hex(8)}{'.fifo' if fifo else ''}"
        place = topology.Place(Inbox(name) if topic is None else address, name, fifo, private=True)
        attributes = {"MessageRetentionPeriod": _RETENTION, **(topology.FIFO_QUEUE if fifo else {})}
        if topic is not None:
            attributes["Policy"] = topology.policy(topic, name)
        doing = f"make queue {name!r}, of this process alone"
        answer = await link.call(
            link.sqs.create_queue,
            doing,
            QueueName=name,
            Attributes=attributes,
            tags={**self._alive(), SERVICE: self._service},
        )
        url = place.url = str(answer["QueueUrl"])
        if topic is not None:
            try:
                arn = await topology.subscribe(link, topic, place)
            except BaseException:
                await self._delete(url, {})
                raise
            await link.call(link.sqs.tag_queue, doing, QueueUrl=url, Tags={SUBSCRIPTION: arn})
        self._beats[url] = asyncio.create_task(self._beat(url))
        if self._cleaning is None:
            self._cleaning = asyncio.create_task(self._logged(self._clean_up(), "clean up after processes that died"))
        return place

    def _alive(self) -> dict[str, str]:
        return {ALIVE: f"{self._clock.time():.0f}"}

    async def _beat(self, url: str) -> None:
        while True:
            await self._clock.sleep(BEAT)
            await self._logged(
                self._link.call(self._link.sqs.tag_queue, f"tag {url}", QueueUrl=url, Tags=self._alive()), f"tag {url}"
            )

    async def _clean_up(self) -> None:
        link = self._link
        doing = "look for queues of processes that died"
        found = await link.call(link.sqs.list_queues, doing, QueueNamePrefix=self._stem, MaxResults=_MOST_LOOKED_AT)
        for url in found.get("QueueUrls") or ():
            if url in self._beats:
                continue
            try:
                tags = (await link.call(link.sqs.list_queue_tags, doing, QueueUrl=url)).get("Tags") or {}
                alive = tags.get(ALIVE, "")
                if alive.isdecimal() and int(alive) < self._clock.time() - DEAD:
                    await self._delete(url, tags)
                    log.info("deleted %s, which a process that died has left", url.rpartition("/")[2])
            except NotFound:
                continue  # its owner was quicker

    async def drop(self, url: str) -> None:
        """The end of a queue of ours."""
        if (beat := self._beats.pop(url, None)) is not None:
            beat.cancel()
        doing = f"delete {url}"
        await self._logged(self._gone(url, doing), doing)

    async def _gone(self, url: str, doing: str) -> None:
        tags = await self._link.call(self._link.sqs.list_queue_tags, doing, QueueUrl=url)
        await self._delete(url, tags.get("Tags") or {})

    async def _delete(self, url: str, tags: Mapping[str, str]) -> None:
        link = self._link
        if SUBSCRIPTION in tags:
            await link.call(link.sns.unsubscribe, f"unsubscribe {url}", SubscriptionArn=tags[SUBSCRIPTION])
        await link.call(link.sqs.delete_queue, f"delete {url}", QueueUrl=url)

    async def _logged(self, work: Coroutine[Any, Any, Any], doing: str) -> None:
        """What others will do again: a failure is no more than a line in the log."""
        try:
            await work
        except UnibusError as error:
            log.debug("%s: %s", doing, error)

    async def close(self) -> None:
        tasks = [task for task in (*self._beats.values(), self._cleaning) if task is not None]
        self._beats.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
