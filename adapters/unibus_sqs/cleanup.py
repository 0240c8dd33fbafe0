"""For the contract suite: delete the queues and topics of a prefix. Nothing else calls this."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from unibus.driver import linked
from unibus.waiting import side_by_side
from unibus_sqs import wire
from unibus_sqs.adapter import SqsAdapter
from unibus_sqs.link import Link

_PAGE = 1000


async def delete(adapter: SqsAdapter, prefix: str, _names: Collection[str], _delays: Collection[float]) -> list[str]:
    """Topics with their subscriptions, then queues, those of processes among them."""
    link = linked(adapter._link, "SQS")
    beginnings = [wire.physical(prefix)]
    if len(own := wire.private_stem(prefix)) > len(prefix):  # else it is cut, and others' queues could begin so too
        beginnings.append(own)
    topics = [arn for arn in await _topics(link) if arn.rpartition(":")[2].startswith(tuple(beginnings))]
    queues = [url for beginning in beginnings for url in await _queues(link, beginning)]

    async def drop_topic(arn: str) -> None:
        for subscription in await _all(link, link.sns.list_subscriptions_by_topic, "Subscriptions", TopicArn=arn):
            await link.call(link.sns.unsubscribe, f"unsubscribe {arn}", SubscriptionArn=subscription["SubscriptionArn"])
        await link.call(link.sns.delete_topic, f"delete {arn}", TopicArn=arn)

    async def drop_queue(url: str) -> None:
        await link.call(link.sqs.delete_queue, f"delete {url}", QueueUrl=url)

    await side_by_side(topics, drop_topic)
    await side_by_side(queues, drop_queue)
    return sorted(place.rpartition(":")[2].rpartition("/")[2] for place in (*topics, *queues))


async def _topics(link: Link) -> list[str]:
    return [topic["TopicArn"] for topic in await _all(link, link.sns.list_topics, "Topics")]


async def _queues(link: Link, beginning: str) -> list[str]:
    return await _all(link, link.sqs.list_queues, "QueueUrls", QueueNamePrefix=beginning, MaxResults=_PAGE)


async def _all(link: Link, operation: Any, part: str, **parameters: Any) -> list[Any]:
    """All pages of a list."""
    found: list[Any] = []
    token: dict[str, str] = {}
    while True:
        answer = await link.call(operation, f"list {part}", **parameters, **token)
        found += answer.get(part) or ()
        if not answer.get("NextToken"):
            return found
        token = {"NextToken": answer["NextToken"]}
