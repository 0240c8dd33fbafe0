"""For the contract suite: delete the topics and groups of a prefix. Nothing else calls this."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.errors import GroupIdNotFound, UnknownTopicOrPartitionError, for_code
from aiokafka.protocol.admin import DeleteGroupsRequest, DeleteTopicsRequest
from aiokafka.protocol.metadata import MetadataRequest

from unibus.driver import linked
from unibus.errors import ConnectionLost
from unibus_kafka.adapter import KafkaAdapter
from unibus_kafka.link import TIMEOUT, Link

_AT_ONCE = 50  # topics a request; each is some files on every broker
_GONE = (GroupIdNotFound, UnknownTopicOrPartitionError)


async def delete(adapter: KafkaAdapter, prefix: str, _names: Collection[str], _delays: Collection[float]) -> list[str]:
    """Groups and topics. A group that still has members, of a process that was killed, is waited for until they are given up."""
    link = linked(adapter._link, "Kafka")
    groups = sorted(group for group in await link.groups() if group.startswith(prefix))
    for group in groups:
        await _delete_group(link, group)
    topics = await _topics(link, prefix)
    for n in range(0, len(topics), _AT_ONCE):
        await _delete_topics(link, topics[n : n + _AT_ONCE])

    async def gone() -> None:  # it is confirmed before every broker knows
        if left := await _topics(link, prefix):
            raise ConnectionLost(f"topics {left} are still there")

    await link.patiently(gone, "wait for topics to be gone")
    return [*groups, *topics]


async def _topics(link: Link, prefix: str) -> list[str]:
    client: Any = link._client
    found = await link.patiently(
        lambda: client.send(client.get_random_node(), MetadataRequest(None, False)), "list topics"
    )
    return sorted(topic for error, topic, *_ in found.topics if topic.startswith(prefix) and not error)


async def _delete_group(link: Link, group: str) -> None:
    client: Any = link._client

    async def ask() -> None:
        node = await client.coordinator_lookup(CoordinationType.GROUP, group)
        response = await client.send(node, DeleteGroupsRequest([group]), group=ConnectionGroup.COORDINATION)
        _check(code for _, code in response.results)

    await link.patiently(ask, f"delete group {group!r}")


async def _delete_topics(link: Link, topics: list[str]) -> None:
    client: Any = link._client

    async def ask() -> None:
        request = DeleteTopicsRequest(topics, round(TIMEOUT * 1000))
        response = await client.send(client.cluster.controller.nodeId, request)
        _check(code for _, code in response.topic_error_codes)

    await link.patiently(ask, "delete topics")


def _check(codes: Any) -> None:
    for code in codes:
        if code and (error := for_code(code)) not in _GONE:
            raise error
