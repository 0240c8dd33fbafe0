"""From channels to queues, topics and subscriptions; and making them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from unibus.adapter import Inspected, Topology
from unibus.channel import DEAD_LETTER, Address, Group, Topic
from unibus.driver import missing as not_there
from unibus.driver import no_history
from unibus.errors import ConfigError, NotFound, Refused
from unibus.waiting import side_by_side
from unibus_sqs import config, wire
from unibus_sqs.link import Link

log = logging.getLogger("unibus.sqs")

MAX_RECEIVES = 100  # of the redrive policy: a backstop, since the core gives up long before. Constant, so never altered
FIFO_QUEUE = {"FifoQueue": "true", "DeduplicationScope": "messageGroup", "FifoThroughputLimit": "perMessageGroupId"}


@dataclass(slots=True)
class Place:
    """A queue, where messages are received from."""

    address: Address
    name: str
    fifo: bool
    options: config.QueueOptions = field(default_factory=config.QueueOptions)
    letters: Place | None = None  # its dead-letter queue
    dead: Place | None = None  # the place whose dead letters these are
    url: str | None = None  # once it is known
    private: bool = False  # it ends with its process


@dataclass(slots=True)
class TopicPlace:
    """A topic of SNS. `reached_until`: as long as it is not worth asking whether it has groups, monotonic seconds."""

    address: Topic[Any]
    name: str
    fifo: bool
    options: config.TopicOptions
    arn: str | None = None
    reached_until: float = 0.0


@dataclass(slots=True)
class Plan:
    places: dict[Address, Place] = field(default_factory=dict)
    topics: dict[Address, TopicPlace] = field(default_factory=dict)


def plan(topology: Topology) -> Plan:
    """Pure. Raises ConfigError, Unsupported."""
    made = Plan()
    by_name: dict[str, Place] = {}
    taken: dict[tuple[bool, str], object] = {}
    for declared in topology.channels:
        address = declared.address
        no_history("SQS", address, declared.start)
        channel = address.topic if isinstance(address, Group) else address
        options = config.options(declared)
        of = by_name.get(declared.name.removesuffix(DEAD_LETTER)) if declared.role == "dead letter" else None
        fifo = channel.ordered or (of is not None and of.fifo)  # a FIFO queue's dead letters go to one, SQS says
        name = wire.physical(declared.name) + (".fifo" if fifo else "")
        other = taken.setdefault((isinstance(address, Topic), name.removesuffix(".fifo")), address)
        if other is not address:
            raise ConfigError(f"{other} and {address} would both be {name!r} on AWS; rename one of them")
        if isinstance(address, Topic):
            assert isinstance(options, config.TopicOptions)  # noqa: S101  # for mypy: by the kind of the address
            made.topics[address] = TopicPlace(address, name, fifo, options)
            continue
        assert isinstance(options, config.QueueOptions)  # noqa: S101  # for mypy: by the kind of the address
        place = made.places[address] = by_name[declared.name] = Place(address, name, fifo, options)
        if of is not None:
            place.dead, of.letters = of, place
    return made


async def create(link: Link, made: Plan) -> None:
    """Make what is missing, log each. What is there stays as it is."""

    async def queue(place: Place) -> None:
        place.url = await link.exists(place.name) or await _make_queue(link, made, place)

    async def topic(place: TopicPlace) -> None:
        place.arn = await _make_topic(link, place)

    async def group(place: Place) -> None:
        address = place.address
        if isinstance(address, Group) and place.url is not None:
            await subscribe(link, made.topics[address.topic], place)

    places = made.places.values()
    await side_by_side(made.topics.values(), topic)
    await side_by_side([place for place in places if place.letters is None], queue)
    await side_by_side([place for place in places if place.letters is not None], queue)
    await side_by_side(places, group)


async def _make_queue(link: Link, made: Plan, place: Place) -> str:
    attributes = {"MessageRetentionPeriod": str(place.options.retention)}
    if place.fifo:
        attributes |= FIFO_QUEUE
    if place.options.kms_key is not None:
        attributes["KmsMasterKeyId"] = place.options.kms_key
    if place.letters is not None and place.letters.url is not None:
        target = await link.queue_arn(place.letters.url)
        attributes["RedrivePolicy"] = json.dumps({"deadLetterTargetArn": target, "maxReceiveCount": MAX_RECEIVES})
    if isinstance(place.address, Group):
        attributes["Policy"] = policy(made.topics[place.address.topic], place.name)
    answer = await link.call(
        link.sqs.create_queue,
        f"make queue {place.name!r} of {place.address}",
        QueueName=place.name,
        Attributes=attributes,
    )
    log.info("made queue %s", place.name)
    return str(answer["QueueUrl"])


def policy(topic: TopicPlace, queue: str) -> str:
    """What lets SNS send from this topic to this queue of the same account."""
    assert topic.arn is not None  # noqa: S101  # for mypy: topics are made first
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": "sns.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": arn_of_queue(topic.arn, queue),
        "Condition": {"ArnEquals": {"aws:SourceArn": topic.arn}},
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def arn_of_queue(topic_arn: str, queue: str) -> str:
    return f"{topic_arn.replace(':sns:', ':sqs:', 1).rpartition(':')[0]}:{queue}"


async def _make_topic(link: Link, place: TopicPlace) -> str:
    attributes = {"FifoTopic": "true", "FifoThroughputScope": "MessageGroup"} if place.fifo else {}
    if place.options.kms_key is not None:
        attributes["KmsMasterKeyId"] = place.options.kms_key
    doing = f"make topic {place.name!r} of {place.address}"
    answer = await link.call(link.sns.create_topic, doing, Name=place.name, Attributes=attributes)
    return str(answer["TopicArn"])


async def subscribe(link: Link, topic: TopicPlace, place: Place) -> str:
    """Bind a queue to a topic, unless it is; the ARN of the subscription."""
    assert topic.arn is not None  # noqa: S101  # for mypy: topics are made, or looked for, first
    attributes = {"RawMessageDelivery": "true"}
    if isinstance(place.options, config.GroupOptions) and place.options.filter_policy is not None:
        attributes["FilterPolicy"] = json.dumps(place.options.filter_policy)
        attributes["FilterPolicyScope"] = place.options.filter_scope
    queue_arn = arn_of_queue(topic.arn, place.name)
    try:
        answer = await link.call(
            link.sns.subscribe,
            f"subscribe {place.address}",
            TopicArn=topic.arn,
            Protocol="sqs",
            Endpoint=queue_arn,
            Attributes=attributes,
            ReturnSubscriptionArn=True,
        )
    except Refused:
        found = await link.subscriptions(topic.arn, queue_arn)
        if not found:
            raise
        log.warning("%s is subscribed with other attributes than declared; they are never altered", place.address)
        return found[0]
    return str(answer["SubscriptionArn"])


async def _look(link: Link, place: TopicPlace) -> bool:
    """Is the topic there? Notes its ARN if it is."""
    arn = await link.topic_arn(place.name)
    try:
        await link.call(link.sns.get_topic_attributes, f"look at {place.address}", TopicArn=arn)
    except NotFound:
        return False
    place.arn = arn
    return True


async def inspect(link: Link, made: Plan) -> list[Inspected]:
    """Topics, queues, and the subscription of each group."""
    found: dict[str, Inspected] = {}

    async def topic(place: TopicPlace) -> None:
        there = await _look(link, place)
        found[f"t {place.name}"] = Inspected("SNS topic", place.name, there, "sns:CreateTopic", place.address)

    async def queue(place: Place) -> None:
        place.url = await link.exists(place.name)
        risk, bound = await _risk(link, place), False
        rights = "sqs:CreateQueue" + (" sqs:GetQueueAttributes" if place.letters is not None else "")
        found[f"q {place.name}"] = Inspected(
            "SQS queue", place.name, place.url is not None, rights, place.address, risk=risk
        )
        if isinstance(place.address, Group):
            arn = made.topics[place.address.topic].arn
            if arn is not None and place.url is not None:
                bound = bool(await link.subscriptions(arn, arn_of_queue(arn, place.name)))
            rights = "sns:Subscribe sns:ListSubscriptionsByTopic"
            name = f"{made.topics[place.address.topic].name} -> {place.name}"
            found[f"s {place.name}"] = Inspected("SNS subscription", name, bound, rights, place.address)

    await side_by_side(made.topics.values(), topic)
    await side_by_side(made.places.values(), queue)
    order = [f"t {place.name}" for place in made.topics.values()]
    order += [f"{kind} {place.name}" for kind in "qs" for place in made.places.values()]
    return [found[key] for key in order if key in found]


async def _risk(link: Link, place: Place) -> str:
    """A retention that is much shorter than what can be had."""
    if place.url is None:
        return ""
    doing = f"look at {place.address}"
    answer = await link.call(
        link.sqs.get_queue_attributes, doing, QueueUrl=place.url, AttributeNames=["MessageRetentionPeriod"]
    )
    seconds = int(answer.get("Attributes", {}).get("MessageRetentionPeriod", config.RETENTION))
    if seconds < config.RETENTION:
        return f"retention {seconds / 86400:g} days of 14: after it a message goes, handled or not"
    return ""


async def verify(link: Link, made: Plan) -> None:
    """One NotFound that lists all that is missing."""
    missing: list[str] = []

    async def topic(place: TopicPlace) -> None:
        if not await _look(link, place):
            missing.append(f"{place.address} (SNS topic {place.name})")

    async def queue(place: Place) -> None:
        place.url = await link.exists(place.name)
        if place.url is None:
            missing.append(f"{place.address} (SQS queue {place.name})")
        elif (
            isinstance(place.address, Group)
            and (arn := made.topics[place.address.topic].arn) is not None
            and not await link.subscriptions(arn, arn_of_queue(arn, place.name))
        ):
            missing.append(f"{place.address} (its SNS subscription)")

    await side_by_side(made.topics.values(), topic)
    await side_by_side(made.places.values(), queue)
    if missing:
        raise not_there("SQS", sorted(missing))
