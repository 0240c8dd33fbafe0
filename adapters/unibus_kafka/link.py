"""The connection: one idempotent producer, and through its client all that is asked of the cluster beside it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, TypeVar

from aiokafka import TopicPartition
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.conn import create_conn
from aiokafka.errors import (
    InvalidReplicationFactorError,
    KafkaError,
    NodeNotReadyError,
    NoError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)
from aiokafka.partitioner import murmur2
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest, ListGroupsRequest
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from unibus.errors import ConnectionLost
from unibus.translation import first_that_answers, of_host
from unibus_kafka import config, errors
from unibus_kafka.engine import Engine, Producer

log = logging.getLogger("unibus.kafka")
T = TypeVar("T")

TIMEOUT = 20.0  # of what has no deadline of its own
_DOUBT = 2.0  # seconds without a sign of a new topic, after which that is said
_STOP = 2.0  # of each step of a stop
EARLIEST, LATEST = -2, -1  # times, as the protocol spells them
_TOPIC = 2  # a resource, as the protocol spells it
_RISKY = (
    *("min.insync.replicas", "unclean.leader.election.enable", "cleanup.policy", "retention.bytes", "retention.ms"),
)
_WEEK = 7 * 86_400_000  # ms; what a broker keeps unless told otherwise

hash_of = lru_cache(maxsize=10_000)(murmur2)  # in Python it costs more than all else of a send


class Link:
    """One producer, from `open` to `close`. `options`: what every client is made with."""

    def __init__(self, options: dict[str, Any], producer: Producer) -> None:
        self.options = options
        self.producer = producer
        self._client: Any = producer.client
        self._next = 0
        self._seen: Any = None
        self._spread: dict[str, tuple[list[TopicPartition], list[TopicPartition]]] = {}  # all, and those with a leader

    @classmethod
    async def open(cls, options: dict[str, Any], given: config.Settings, engine: Engine) -> Link:
        """By the first host that answers; the client library itself would not say why none did."""
        more = {key: value for key, value in options.items() if key not in {"bootstrap_servers", "metadata_max_age_ms"}}
        limit = round(given.connect_timeout * 1000)

        async def look(server: str) -> None:
            host, _, port = server.rpartition(":")
            try:
                connection: Any = await create_conn(host.strip("[]"), int(port), request_timeout_ms=limit, **more)
            except Exception as exc:
                raise of_host(errors.translate(exc, f"connect to Kafka at {server}")) from exc
            connection.close()

        await first_that_answers(options["bootstrap_servers"], look)
        link = cls(options, engine.producer(options, given))
        try:
            async with asyncio.timeout(given.connect_timeout):
                await link.producer.start()
        except BaseException as exc:
            await link.close()
            if not isinstance(exc, Exception):
                raise
            raise of_host(errors.translate(exc, "connect to Kafka")) from exc
        return link

    async def close(self) -> None:
        """What was not confirmed by now is given up: its senders have been told."""
        await self.producer.close()

    async def up(self) -> bool:
        """One server that answers is enough: the others' partitions will have found new leaders, or will."""
        nodes = [broker.nodeId for broker in self._client.cluster.brokers()]
        random.shuffle(nodes)
        for node in nodes:
            if await self._client.ready(node):
                return True
        return False

    # Topics

    async def missing(self, topics: Iterable[str], *, fresh: bool = False) -> set[str]:
        """Those that are not there, or that we may not see. `fresh`: don't trust what we know."""
        client = self._client
        names = {name for name in topics if fresh or not client.cluster.partitions_for_topic(name)}
        if not names:
            return names
        there, _ = await self.patiently(partial(look_up, client, names), "look for topics")
        if there - client._topics:  # whatever else was asked for is not looked up ever after
            await client.set_topics(client._topics | there)
        if any(client.cluster.partitions_for_topic(name) for name in names - there):  # deleted since it last looked
            await client.force_metadata_update()

        async def learnt() -> None:
            if unknown := {name for name in there if not client.cluster.partitions_for_topic(name)}:
                raise ConnectionLost(f"the broker that was asked does not know {sorted(unknown)} yet")

        await self.patiently(learnt, "look for topics")
        return names - there

    async def risks(self, topics: Sequence[str]) -> dict[str, str]:
        """Topic -> which of its settings can lose messages; what this user may not see stays unsaid."""
        found = {}
        request = DescribeConfigsRequest([(_TOPIC, topic, list(_RISKY)) for topic in topics])
        node = self._client.get_random_node()
        response = await self.patiently(lambda: self._client.send(node, request), "look at the settings of topics")
        for code, _, _, topic, entries in response.resources:
            values = {} if code else {name: value for name, value, *_ in entries}
            replicas = [len(p.replicas) for p in self._client.cluster._partitions[topic].values()]
            words = []
            if min(replicas, default=0) == 1:
                words.append("one replica: its messages are lost with that disk")
            elif values.get("min.insync.replicas") == "1":
                words.append("min.insync.replicas = 1: what one broker alone has confirmed is lost with it")
            if values.get("unclean.leader.election.enable") == "true":
                words.append("unclean.leader.election.enable: a leader that has missed messages drops them")
            if "compact" in values.get("cleanup.policy", ""):
                words.append("cleanup.policy = compact: only the last message of each key is kept")
            if int(values.get("retention.bytes") or -1) >= 0:
                words.append(f"retention.bytes = {values['retention.bytes']}: what is beyond goes, read or not")
            if 0 <= (ms := int(values.get("retention.ms") or -1)) < _WEEK:
                words.append(f"retention.ms = {ms}: after {ms / 86_400_000:g} days a message goes, read or not")
            if words:
                found[topic] = "; ".join(words)
        return found

    def partitions(self, topic: str) -> list[TopicPartition]:
        """Ascending; empty where the topic is not known."""
        return [TopicPartition(topic, n) for n in sorted(self._client.cluster.partitions_for_topic(topic) or ())]

    def partition(self, topic: str, key: bytes | None, number: int | None = None) -> TopicPartition | None:
        """The one of this number, or of this key as every Kafka client has it; else one after the other. None: it is not there."""
        cluster = self._client.cluster
        if self._seen is not cluster._partitions:  # a new one with each answer about the cluster
            self._seen = cluster._partitions
            self._spread.clear()
        if (spread := self._spread.get(topic)) is None:
            known = self.partitions(topic)
            led = cluster.available_partitions_for_topic(topic) or ()
            spread = self._spread[topic] = known, [tp for tp in known if tp.partition in led] or known
        known, led = spread
        if number is not None:
            return known[number] if number < len(known) else None
        if not known:
            return None
        if key is not None:
            return known[(hash_of(key) & 0x7FFFFFFF) % len(known)]
        self._next += 1
        return led[self._next % len(led)]

    async def create(self, topics: Mapping[str, config.TopicOptions]) -> None:
        """Make what is not there; returns once each has a leader."""
        gone = await self.missing(topics)
        wanted = {name: options for name, options in topics.items() if name in gone}
        if not wanted:
            return
        entries: list[Any] = [
            (name, o.partitions or -1, o.replication or -1, [], list(o.config.items())) for name, o in wanted.items()
        ]
        request = CreateTopicsRequest(entries, round(TIMEOUT * 1000), validate_only=False)

        async def ask() -> Any:
            response = await self._client.send(self._client.cluster.controller.nodeId, request)
            for _, code, *text in response.topic_errors:
                # No broker to put it on: the controller has not heard of any for some seconds, and will again.
                if for_code(code) is InvalidReplicationFactorError and "fenced" in "".join(filter(None, text)):
                    raise ConnectionLost(f"create topics: {text[0]}")
            return response

        response = await self.patiently(ask, "create topics")
        for name, code, *text in response.topic_errors:
            error = for_code(code)
            if error is NoError:
                log.info("created topic %s", name)
            elif error is not TopicAlreadyExistsError:  # by another process, in this moment
                native = error(name) if error is TopicAuthorizationFailedError else error(*filter(None, text))
                words = f" ({text[0]})" if text and text[0] else ""
                raise errors.translate(native, f"create topic {name!r}{words}", "Create") from native

        async def led() -> None:
            leader = self._client.cluster.leader_for_partition
            if gone := await self.missing(wanted, fresh=True):
                raise ConnectionLost(f"topics {gone} are not there yet")
            await self._client.force_metadata_update()
            if any(leader(tp) in {None, -1} for name in wanted for tp in self.partitions(name)):
                raise ConnectionLost("not all new topics have a leader yet")

        names = ", ".join(map(repr, wanted))
        unseen = "waiting for the new topics %s; a user who may not Describe them never sees them"
        doubt = asyncio.get_running_loop().call_later(_DOUBT, log.warning, unseen, names)
        try:
            await self.patiently(led, f"wait for the new topics {names}, which this user may lack Describe on")
        finally:
            doubt.cancel()

    # Offsets

    async def offsets(self, tps: Iterable[TopicPartition], at: int) -> dict[TopicPartition, int]:
        """EARLIEST, LATEST, or the first record of a time, milliseconds (-1: there is none so late)."""

        async def ask() -> dict[TopicPartition, int]:
            by_node: dict[Any, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
            for tp in tps:
                by_node[self._client.cluster.leader_for_partition(tp)][tp.topic].append((tp.partition, at))
            found = {}
            for node, topics in by_node.items():
                response = await self._client.send(node, OffsetRequest(-1, 0, list(topics.items())))
                for topic, partitions in response.topics:
                    for partition, code, _, offset in partitions:
                        _check(code, topic)
                        found[TopicPartition(topic, partition)] = offset
            return found

        return await self.patiently(ask, "read offsets")

    async def committed(self, group: str) -> dict[TopicPartition, tuple[int, str]]:
        """Offset and metadata of every partition for which the group has committed one."""
        response = await self._coordinator(
            group, OffsetFetchRequest(group, None), f"read the offsets of group {group!r}", "Describe"
        )
        return {
            TopicPartition(topic, partition): (offset, metadata or "")
            for topic, partitions in response.topics
            for partition, offset, metadata, code in partitions
            if offset >= 0 and not code
        }

    async def commit(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """For a group without members: where it begins."""
        by_topic: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for tp, offset in offsets.items():
            by_topic[tp.topic].append((tp.partition, offset, ""))
        request = OffsetCommitRequest(group, -1, "", -1, list(by_topic.items()))
        await self._coordinator(group, request, f"begin group {group!r}")

    async def leave(self, group: str, member: str) -> None:
        """In the name of a member that is no more, so that the group need not wait for the end of its session."""
        await self._coordinator(group, LeaveGroupRequest(group, member), f"leave group {group!r}")

    async def _coordinator(self, group: str, request: Any, doing: str, right: str = "Read") -> Any:
        async def ask() -> Any:
            node = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._client.send(node, request, group=ConnectionGroup.COORDINATION)
            _check(getattr(response, "error_code", 0), group)
            for topic, partitions in getattr(response, "topics", ()):
                for *_, code in partitions:
                    _check(code, topic)
            return response

        return await self.patiently(ask, doing, right)

    async def groups(self) -> set[str]:
        """The ids of all groups that we may see."""
        found = set()
        for broker in self._client.cluster.brokers():
            response = await self.patiently(
                partial(self._client.send, broker.nodeId, ListGroupsRequest()), "list groups"
            )
            found |= {group for group, *_ in response.groups}
        return found

    async def patiently(self, call: Callable[[], Awaitable[T]], doing: str, right: str = "Describe") -> T:
        """Leaders and coordinators take a moment to be there, of what is new above all; no error says when they are.

        `right`: what a user needs for it.
        """
        try:
            async with asyncio.timeout(TIMEOUT):
                while True:
                    try:
                        return await call()
                    except (KafkaError, ConnectionLost) as exc:
                        if not getattr(exc, "retriable", True):
                            raise
                        await asyncio.sleep(0.05)
                        await self._client.force_metadata_update()
        except Exception as exc:
            raise errors.translate(exc, doing, right) from exc


async def look_up(client: Any, topics: Collection[str]) -> tuple[set[str], Any]:
    """Those that any broker knows, and the answer of the one that knows most; until one knows them all.

    Of a cluster, some have not heard yet of a topic that another has just made. Raises what the last one said, where none answers.
    """
    nodes = [broker.nodeId for broker in client.cluster.brokers()]
    random.shuffle(nodes)
    failure: KafkaError = NodeNotReadyError("no broker is known")
    there, most, best = set[str](), -1, None
    for node in nodes:
        try:
            answer = await client.send(node, MetadataRequest(sorted(topics), False))
        except KafkaError as exc:  # of that node
            failure = exc
            continue
        known = {topic for error, topic, _, partitions in answer.topics if partitions and not error}
        there |= known
        if len(known) > most:
            most, best = len(known), answer
        if most == len(topics):
            break
    if best is None:
        raise failure
    return there, best


def by_name(client: Any) -> Any:
    """Let a client of the library look up its topics by name; it would make those that are missing, or ask for all.

    It also believes the first broker that it asks: a consumer whose topic that one had not heard of yet got no partition, and
    asked again after `metadata_max_age`. So the others are asked, too: `look_up`.
    """
    everything = client._metadata_update

    async def update(cluster: Any, topics: set[str]) -> bool:
        if topics:
            with suppress(KafkaError):  # of all of them; the library tries once more, and says so
                _, answer = await look_up(client, topics)
                cluster.update_metadata(answer)
                return True
        return bool(await everything(cluster, ()))

    client._metadata_update = update
    return client


async def put_away(*steps: Callable[[], Awaitable[None]]) -> None:
    """Stop a client of the library: the first step does it all, unless it hangs or fails; the others do its parts.

    In tasks of their own, since the library lets the cancellation of its own tasks out, which would pass for ours.
    """
    for step in steps:
        task = asyncio.ensure_future(step())
        await asyncio.wait([task], timeout=_STOP)
        if task.done() and not task.cancelled() and task.exception() is None:
            if step is steps[0]:
                return
            continue
        task.cancel()
        await asyncio.wait([task], timeout=_STOP)


def _check(code: int, name: str) -> None:
    """`name`: of the topic or group that it is about."""
    if code:
        raise for_code(code)(name)
