"""From channels to queues, topics and subscriptions; and making them."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from unibus.adapter import Inspected, Topology
from unibus.channel import DEAD_LETTER, Address, Group, Topic
from unibus.driver import all_there, no_history, only_one
from unibus.errors import NotFound, Refused
from unibus.waiting import side_by_side
from unibus_sqs import config, wire

if TYPE_CHECKING:  # the plan needs no client library
    from unibus_sqs.link import Link

log = logging.getLogger("unibus.sqs")

MAX_RECEIVES = 100  # of the redrive policy: a backstop, since the core gives up long before. Constant, so never altered
FIFO_QUEUE = {"FifoQueue": "true", "DeduplicationScope": "messageGroup", "FifoThroughputLimit": "perMessageGroupId"}
FIFO_TOPIC = {"FifoTopic": "true", "FifoThroughputScope": "MessageGroup"}


@dataclass(slots=True)
class Place:
    """A queue, or a topic of SNS."""

    address: Address
    name: str
    fifo: bool = False
    options: Any = None  # of its kind: config.QueueOptions, GroupOptions or TopicOptions
    target: str = ""  # its URL, or the ARN of a topic, once that is known
    letters: Place | None = None  # its dead-letter queue
    dead: Place | None = None  # the place whose dead letters these are
    private: bool = False  # it ends with its process
    reached_until: float = 0.0  # of a topic: it isn't worth asking whether it has groups, monotonic seconds


Places = dict[Address, Place]


def plan(topology: Topology) -> Places:
    """Pure. Raises ConfigError, Unsupported."""
    made: Places = {}
    by_name: dict[str, Place] = {}
    taken: dict[tuple[bool, str], object] = {}
    for declared in topology.channels:
        address = declared.address
        no_history("SQS", address, declared.start)
        channel = address.topic if isinstance(address, Group) else address
        of = by_name.get(declared.name.removesuffix(DEAD_LETTER)) if declared.role == "dead letter" else None
        fifo = channel.ordered or (of is not None and of.fifo)  # a FIFO queue's dead letters go to one, SQS says
        name = wire.physical(declared.name) + (".fifo" if fifo else "")
        only_one(taken, (isinstance(address, Topic), name.removesuffix(".fifo")), address, f"{name!r} on AWS")
        place = made[address] = Place(address, name, fifo, config.options(declared), dead=of)
        if not isinstance(address, Topic):
            by_name[declared.name] = place
        if of is not None:
            of.letters = place
    return made


async def create(link: Link, made: Places) -> None:
    """Make what is missing, log each. What is there stays as it is."""

    async def topic(place: Place) -> None:
        await _make_topic(link, place)

    async def queue(place: Place) -> None:
        topic = made[place.address.topic] if isinstance(place.address, Group) else None
        place.target = await link.exists(place.name) or await _make_queue(link, place, topic)
        if topic is not None:
            await subscribe(link, topic, place)

    queues = [place for place in made.values() if not isinstance(place.address, Topic)]
    await side_by_side([place for place in made.values() if isinstance(place.address, Topic)], topic)
    await side_by_side([place for place in queues if place.letters is None], queue)
    await side_by_side([place for place in queues if place.letters is not None], queue)


async def _make_topic(link: Link, place: Place) -> None:
    attributes = dict(FIFO_TOPIC) if place.fifo else {}
    if place.options.kms_key is not None:
        attributes["KmsMasterKeyId"] = place.options.kms_key
    doing = f"make topic {place.name!r} of {place.address}"
    answer = await link.call(link.sns.create_topic, doing, Name=place.name, Attributes=attributes)
    place.target = answer["TopicArn"]


async def _make_queue(link: Link, place: Place, topic: Place | None) -> str:
    attributes = {"MessageRetentionPeriod": str(place.options.retention)}
    if place.fifo:
        attributes |= FIFO_QUEUE
    if place.options.kms_key is not None:
        attributes["KmsMasterKeyId"] = place.options.kms_key
    if place.letters is not None:
        found = await link.attributes(place.letters.target, "QueueArn")
        redrive = {"deadLetterTargetArn": found["QueueArn"], "maxReceiveCount": MAX_RECEIVES}
        attributes["RedrivePolicy"] = json.dumps(redrive)
    if topic is not None:
        attributes["Policy"] = policy(topic, place)
    doing = f"make queue {place.name!r} of {place.address}"
    answer = await link.call(link.sqs.create_queue, doing, QueueName=place.name, Attributes=attributes)
    log.info("made queue %s", place.name)
    return str(answer["QueueUrl"])


def _queue_arn(topic: Place, queue: Place) -> str:
    return f"{topic.target.replace(':sns:', ':sqs:', 1).rpartition(':')[0]}:{queue.name}"


def policy(topic: Place, queue: Place) -> str:
    """What lets SNS send from this topic to this queue of the same account."""
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": "sns.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": _queue_arn(topic, queue),
        "Condition": {"ArnEquals": {"aws:SourceArn": topic.target}},
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


async def subscribe(link: Link, topic: Place, queue: Place) -> str:
    """Bind a queue to a topic, unless it is; the ARN of the subscription."""
    attributes = {"RawMessageDelivery": "true"}
    if queue.options is not None and queue.options.filter_policy is not None:
        attributes["FilterPolicy"] = json.dumps(queue.options.filter_policy)
        attributes["FilterPolicyScope"] = queue.options.filter_scope
    where = {"TopicArn": topic.target, "Protocol": "sqs", "Endpoint": _queue_arn(topic, queue)}
    try:
        answer = await link.call(
            link.sns.subscribe, f"subscribe {queue.address}", Attributes=attributes, ReturnSubscriptionArn=True, **where
        )
    except Refused:
        found = await link.subscriptions(topic.target, where["Endpoint"])
        if not found:
            raise
        log.warning("%s is subscribed with other attributes than declared; they are never altered", queue.address)
        return found[0]
    return str(answer["SubscriptionArn"])


async def inspect(link: Link, made: Places) -> list[Inspected]:
    """What is there of it, and what may lose data."""
    found = await _look(link, made)
    risks: dict[str, str] = {}

    async def risk(place: Place) -> None:
        answer = await link.attributes(place.target, "MessageRetentionPeriod")
        if (seconds := int(answer.get("MessageRetentionPeriod", config.RETENTION))) < config.RETENTION:
            risks[place.name] = f"retention {seconds / 86400:g} days of 14: after it a message goes, handled or not"

    await side_by_side([p for p in made.values() if p.target and not isinstance(p.address, Topic)], risk)
    return [replace(one, risk=risks[one.name]) if one.name in risks else one for one in found]


async def verify(link: Link, made: Places) -> None:
    """One NotFound that lists all that is missing."""
    missing = [f"{one.address} ({one.kind} {one.name})" for one in await _look(link, made) if not one.exists]
    all_there(f"SQS in {link.region}", sorted(missing))


async def _look(link: Link, made: Places) -> list[Inspected]:
    """Topics, queues, and the subscription of each group; notes the ARNs and URLs of what is there."""
    topics = [place for place in made.values() if isinstance(place.address, Topic)]
    queues = [place for place in made.values() if not isinstance(place.address, Topic)]
    bound: list[Inspected] = []

    async def topic(place: Place) -> None:
        arn = await link.topic_arn(place.name)
        with suppress(NotFound):
            await link.call(link.sns.get_topic_attributes, f"look at {place.address}", TopicArn=arn)
            place.target = arn

    async def queue(place: Place) -> None:
        place.target = await link.exists(place.name)
        if isinstance(place.address, Group):
            of = made[place.address.topic]
            there = bool(place.target and of.target and await link.subscriptions(of.target, _queue_arn(of, place)))
            name, rights = f"{of.name} -> {place.name}", "sns:Subscribe sns:ListSubscriptionsByTopic"
            bound.append(Inspected("SNS subscription", name, there, rights, place.address))

    await side_by_side(topics, topic)
    await side_by_side(queues, queue)
    found = [
        Inspected("SNS topic", place.name, bool(place.target), "sns:CreateTopic", place.address) for place in topics
    ]
    for place in queues:
        rights = "sqs:CreateQueue" + (" sqs:GetQueueAttributes" if place.letters is not None else "")
        found.append(Inspected("SQS queue", place.name, bool(place.target), rights, place.address))
    return [*found, *sorted(bound, key=lambda one: one.name)]
