"""The rights in docs/brokers/sqs.md are enough, each for what it is said to be, and all of them are used.

On ministack, which checks the IAM policies of users; what AWS says to them has not been tried. Which actions are used is
read from the requests as they go out, whatever the emulator thinks of them.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import pytest
from aiobotocore.httpsession import AIOHTTPSession
from tests.integration.sqs_kit import SOON, Bench, at, broker_url, eventually

import unibus_sqs.private
from unibus import Bus, DeadLetter, Queue, RetryPolicy, Topic, deadletter, tooling
from unibus.errors import PermissionDenied

PAGE = Path(__file__).parents[2] / "docs/brokers/sqs.md"

ORDERS, ASKS, CHARGED = Queue("orders", int), Queue("asks", str, reply=str), Topic("charged", int)
ONCE_MORE = RetryPolicy(max_retries=1, backoff=1)
Right = tuple[str, str]  # the name of a queue or topic, a pattern with `*`; the action
Role = Callable[["Shop"], Awaitable[None]]


def documented() -> dict[str, set[Right]]:
    """By what they are for."""
    page = PAGE.read_text().partition("## Least rights")[2].partition("\n## ")[0]
    roles: dict[str, set[Right]] = {}
    role = ""
    for row in page.split("```")[1].splitlines()[2:]:
        role = row[:10].strip() or role
        name, *actions = row[10:].split()
        roles.setdefault(role, set()).update((name, action) for action in actions)
    return roles


DOCUMENTED = documented()


class Shop:
    """A bench, and on it services of the administrator and of a user who has rights of the page."""

    def __init__(self, lab: Bench, iam: Any) -> None:
        self.lab = lab
        self.iam = iam
        self.user = f"u{secrets.token_hex(4)}"
        self.key = self.limited = ""
        self.numbers = itertools.count()
        self.used: set[Right] = set()

    async def open(self) -> None:
        await self.iam.create_user(UserName=self.user)
        made = (await self.iam.create_access_key(UserName=self.user))["AccessKey"]
        self.key = made["AccessKeyId"]
        server = self.lab.url.rpartition("@")[2]
        self.limited = f"sqs://{self.key}:{quote(made['SecretAccessKey'], safe='')}@{server}"
        async with self.whole(self.lab.url, declare="create"):
            pass

    def rights(self, role: str) -> set[Right]:
        """For names on this bench."""
        public, private = self.lab.prefix.replace(".", "_-"), self.lab.prefix.replace(".", "-")
        return {
            (re.sub(r"^shop_-", public, re.sub(r"^shop-", private, name)), action) for name, action in DOCUMENTED[role]
        }

    async def give(self, rights: set[Right]) -> None:
        """These from now on, and no others. AWS has no actions for batches, the emulator has no others for them."""
        statements: list[dict[str, Any]] = [
            {
                "Effect": "Allow",
                "Action": [action, action + "Batch"],
                "Resource": "*" if name == "*" else arn(name, action),
            }
            for name, action in rights
        ]
        statements.append({"Effect": "Deny", "Action": "iam:*", "Resource": "*"})  # no policy is empty
        document = json.dumps({"Version": "2012-10-17", "Statement": statements})
        await self.iam.put_user_policy(UserName=self.user, PolicyName="rights", PolicyDocument=document)

    def seen(self, request: Any) -> None:
        """A request as it goes out."""
        if self.key not in text(request.headers["Authorization"]):
            return
        if target := text(request.headers.get("X-Amz-Target", "")):
            service, action, given = "sqs", target.rpartition(".")[2], json.loads(request.body)
        else:  # the older protocol
            given = {name: values[0] for name, values in parse_qs(text(request.body)).items()}
            service, action = "sns", given["Action"]
        if action == "GetCallerIdentity" or (action == "ListQueues" and "QueueNamePrefix" not in given):
            return  # needs no right; to connect, a refusal is an answer too
        place = next((given[key] for key in ("QueueUrl", "QueueName", "TopicArn", "Name") if key in given), "*")
        name = re.split("[:/]", place)[-1]
        self.used.add((name, f"{service}:{action.removesuffix('Batch')}"))

    def mine(self, *channels: Any, declare: Any = "assume", **settings: Any) -> Bus:
        """A bus of the limited user."""
        return self._bus(self.limited, *channels, declare=declare, **settings)

    def bus(self, *channels: Any, **settings: Any) -> Bus:
        """One of the administrator."""
        return self._bus(self.lab.url, *channels, **{"declare": "verify", **settings})

    def _bus(self, url: str, *channels: Any, **settings: Any) -> Bus:
        given: dict[str, Any] = {
            "service": "svc",
            "prefix": self.lab.prefix,
            "config": False,
            "environ": {},
            **settings,
        }
        return Bus(url, channels=channels, **given)

    def whole(self, url: str, declare: Any) -> Bus:
        """A service that does all that the page speaks of; it never runs."""
        bus = self._bus(url, declare=declare)
        for add in (add_consumer, add_subscriber, add_responder):
            add(bus)
        return bus

    async def send_raw(self, name: str) -> None:
        await self.lab.sqs.send_message(QueueUrl=await self.lab.url_of(name), MessageBody="no json")


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def arn(name: str, action: str) -> str:
    return f"arn:aws:{action.partition(':')[0]}:*:*:{name}"


def add_consumer(bus: Bus) -> None:
    @bus.consumer(ORDERS, retry=ONCE_MORE)
    async def on_order(body: int) -> None:
        raise OSError("always")


def add_subscriber(bus: Bus) -> None:
    @bus.subscriber(CHARGED, group="billing", retry=ONCE_MORE)
    async def on_charged(body: int) -> None:
        raise OSError("always")


def add_responder(bus: Bus) -> None:
    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return body.upper()


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    async with at(broker_url()) as lab:
        made = Shop(lab, await lab.client("iam"))
        through: Callable[[Any, Any], Awaitable[Any]] = AIOHTTPSession.send

        async def watched(session: Any, request: Any) -> Any:
            made.seen(request)
            return await through(session, request)

        monkeypatch.setattr(unibus_sqs.private, "BEAT", 0.1)
        await made.open()
        monkeypatch.setattr(AIOHTTPSession, "send", watched)
        yield made


# What each role does


async def declare(shop: Shop) -> None:
    n = next(shop.numbers)  # what is not there yet
    bus = shop.mine(Queue(f"queue{n}"), declare="create")

    @bus.subscriber(Topic(f"topic{n}"), group="g")
    async def handle(body: bytes) -> None: ...

    async with bus:
        pass


async def verify(shop: Shop) -> None:
    async with shop.whole(shop.limited, "verify"):
        pass


async def send(shop: Shop) -> None:
    async with shop.mine(ORDERS) as bus:
        await bus.send(ORDERS, 1)


async def publish(shop: Shop) -> None:
    async with shop.mine(CHARGED) as bus:
        await bus.publish(CHARGED, 1)


async def consume(shop: Shop) -> None:
    bus = shop.mine()
    add_consumer(bus)
    async with bus, shop.bus(ORDERS) as sender:
        await sender.send(ORDERS, 1)
        async with bus.receiver(ORDERS) as receiver:
            delivery = await receiver.receive(timeout=SOON)
            assert delivery is not None
            await delivery.release()
        await shop.send_raw("orders")
        async with bus.running():
            await handled(bus)


async def subscribe(shop: Shop) -> None:
    bus = shop.mine()
    add_subscriber(bus)
    async with bus, shop.bus(CHARGED) as sender:
        await sender.publish(CHARGED, 1)
        async with bus.receiver(CHARGED, group="billing") as receiver:
            delivery = await receiver.receive(timeout=SOON)
            assert delivery is not None
            await delivery.release()
        await shop.send_raw("charged_-billing")
        async with bus.running():
            await handled(bus)


async def handled(bus: Bus) -> None:
    async def done() -> bool:
        return bus.counts.get("dead_lettered") == bus.counts.get("invalid") == 1

    await eventually(done)


async def broadcast(shop: Shop) -> None:
    bus, seen = shop.mine(CHARGED), list[int]()

    @bus.subscriber(CHARGED, broadcast=True)
    async def on_all(body: int) -> None:
        seen.append(body)

    async def done() -> bool:
        return seen == [1]

    dead = await left_behind(shop)
    async with shop.bus(CHARGED) as sender, bus.running():
        await sender.publish(CHARGED, 1)
        await eventually(done)
        await tidied(shop, dead)


async def request(shop: Shop) -> None:
    responder = shop.bus()
    add_responder(responder)
    dead = await left_behind(shop)
    async with responder.running(), shop.mine(ASKS, service="web") as bus:
        assert await bus.request(ASKS, "x", timeout=SOON) == "X"
        await tidied(shop, dead)


async def left_behind(shop: Shop) -> str:
    """A queue of a process that died; its name."""
    name = f"{shop.lab.prefix.replace('.', '-')}unibus__reply_{secrets.token_hex(8)}"
    await shop.lab.sqs.create_queue(QueueName=name, tags={unibus_sqs.private.ALIVE: "1"})
    return name


async def tidied(shop: Shop, dead: str) -> None:
    """It is gone, and the process has given a sign of life."""

    async def done() -> bool:
        found = await shop.lab.sqs.list_queues(QueueNamePrefix=dead)
        return not found.get("QueueUrls") and any(action == "sqs:TagQueue" for _, action in shop.used)

    await eventually(done)


async def respond(shop: Shop) -> None:
    responder = shop.mine()
    add_responder(responder)
    async with responder.running(), shop.bus(ASKS, service="web") as bus:
        assert await bus.request(ASKS, "x", timeout=SOON) == "X"


async def browse(shop: Shop) -> None:
    await die(shop, 1)
    async with shop.mine(ORDERS) as bus:
        assert [letter async for letter in deadletter.browse(bus, ORDERS)]


async def redrive(shop: Shop) -> None:
    await die(shop, 1, 2)
    async with shop.mine(ORDERS) as bus:
        assert await deadletter.redrive(bus, ORDERS, where=lambda letter: letter.body == 1) == 1


async def die(shop: Shop, *bodies: int) -> None:
    """So that there are these dead letters."""
    bus = shop.bus()

    @bus.consumer(ORDERS)
    async def kill(body: int) -> None:
        raise DeadLetter("always")

    async def done() -> bool:
        return bus.counts.get("dead_lettered") == len(bodies)

    async with bus.running():
        await bus.send_many(ORDERS, bodies)
        await eventually(done)


async def look(shop: Shop) -> None:
    async with shop.whole(shop.limited, "assume") as bus:
        assert [one.name for one in await tooling.inspect(bus) if not one.exists] == []
        await bus.backlog(ORDERS)


ROLES: tuple[Role, ...] = (
    *(declare, verify, send, publish, consume, subscribe, broadcast, request, respond, browse, redrive, look),
)


def test_each_role_of_the_page_is_tried() -> None:
    assert {role.__name__ for role in ROLES} == set(DOCUMENTED)


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.__name__)
async def test_the_rights_of_the_page_are_enough_and_all_are_used(shop: Shop, role: Role) -> None:
    rights = shop.rights(role.__name__)
    await shop.give(rights)
    await role(shop)
    assert {right for right in rights if not any(covers(right, used) for used in shop.used)} == set()
    assert {used for used in shop.used if not any(covers(right, used) for right in rights)} == set()


def covers(right: Right, used: Right) -> bool:
    return right[1] == used[1] and fnmatchcase(used[0], right[0])


@pytest.mark.parametrize("role", [declare, verify, send, publish, look], ids=lambda role: role.__name__)
async def test_a_right_that_is_missing_is_named(shop: Shop, role: Role) -> None:
    rights = shop.rights(role.__name__)
    if role is publish:
        rights -= {
            right for right in rights if right[1] == "sns:GetTopicAttributes"
        }  # as the page says, it can do without
    for missing in sorted(rights):
        await shop.give(rights - {missing})
        with pytest.raises(PermissionDenied, match=f"not authorized to perform: {missing[1]}"):
            await role(shop)
