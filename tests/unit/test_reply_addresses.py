"""A reply address comes from outside: whatever is not the shape of an inbox is refused, by each adapter, before anything is sent."""

from __future__ import annotations

import pytest

from unibus.adapter import Adapter, Endpoint
from unibus.clock import SystemClock
from unibus.errors import Refused
from unibus.registry import adapter_factory
from unibus.url import parse

URLS = {
    "rabbitmq": "amqp://me:secret@b1/shop",
    "kafka": "kafka://b1",
    "redis": "redis://b1",
    "sqs": "sqs://eu-west-1",
    "memory": "memory://",
}
TOKEN = "0123456789abcdef"
INBOXES = {
    "rabbitmq": f"shop.unibus.reply.billing.{TOKEN}",
    "kafka": "shop.unibus.reply.billing:0:billing.reply.abc",
    "redis": f"shop.unibus:reply:billing:{TOKEN}",
    "sqs": f"shop-unibus__reply_{TOKEN}",
}
HOSTILE = {
    "nothing": "",
    "a space": " ",
    "a queue of another service": "orders",
    "its dead letters": "orders.dlq",
    "a queue with a prefix": "shop.orders",
    "a consumer group's stream": "{orders}",
    "a topic": "order.charged",
    "an exchange and a key": "amq.topic/orders",
    "the server's own": "amq.rabbitmq.reply-to",
    "a forged pseudo-queue": "amq.rabbitmq.reply-to.g1h2AA5yZXBseUAyNzY4OTM4OQAAABsAAAAAYJ",
    "a queue of the system": "__consumer_offsets:0:x",
    "another vhost": f"/other/unibus.reply.billing.{TOKEN}",
    "a whole url": f"amqp://me:secret@evil.example/shop?q=unibus.reply.billing.{TOKEN}",
    "a URL of SQS": f"https://sqs.eu-west-1.amazonaws.com/123456789012/unibus__reply_{TOKEN}",
    "another host": f"https://evil.example/123456789012/unibus__reply_{TOKEN}",
    "the metadata service": "http://169.254.169.254/latest/meta-data",
    "an ARN of another account": f"arn:aws:sqs:eu-west-1:999999999999:unibus__reply_{TOKEN}",
    "an ARN of SNS": "arn:aws:sns:eu-west-1:123456789012:order-charged",
    "huge": f"{'a' * 1_000_000}unibus.reply.billing.{TOKEN}",
    "a prefix that is too long": f"{'a' * 61}unibus.reply.billing.{TOKEN}",
    "a path": f"../unibus.reply.billing.{TOKEN}",
    "a wildcard": f"unibus.reply.*.{TOKEN}",
    "digits that are none": "unibus.reply.billing:\u0663:abc",
    "a partition that can't be": "unibus.reply.billing:9999999:abc",
    "below zero": "unibus.reply.billing:-1:abc",
}
# Put into an address that would be right without it.
SPOILERS = (
    "\0",
    "\n",
    "\r\n",
    "\t",
    " ",
    "\x1b[31m",
    "\u200b",
    "\ud800",
    "\u00e9",
    "%00",
    "?",
    "#",
    "*",
    ">",
    "/",
    "\\",
    "'",
    '"',
    ";",
    "{",
    "}",
    "@",
)


def adapter(name: str) -> Adapter:
    url = parse(URLS[name])
    return adapter_factory(url.scheme)(Endpoint(url, "svc", "i", SystemClock()))


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("name", URLS)
async def test_what_is_no_inbox_is_refused(name: str, what: str) -> None:
    with pytest.raises(Refused) as caught:
        adapter(name).reply_to(HOSTILE[what])
    assert len(str(caught.value)) < 500
    assert "evil" not in str(caught.value)  # nor are its words repeated in the log


@pytest.mark.parametrize("name", INBOXES)
async def test_an_inbox_is_one_as_a_whole_or_not_at_all(name: str) -> None:
    here, mine = adapter(name), INBOXES[name]
    here.reply_to(mine)
    for spoiler in SPOILERS:
        for at in (0, len(mine) // 2, len(mine)):
            with pytest.raises(Refused):
                here.reply_to(mine[:at] + spoiler + mine[at:])


@pytest.mark.parametrize("name", INBOXES)
async def test_an_inbox_of_another_broker_is_none(name: str) -> None:
    here = adapter(name)
    for other, address in INBOXES.items():
        if other != name:
            with pytest.raises(Refused):
                here.reply_to(address)
