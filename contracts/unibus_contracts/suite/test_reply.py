"""Request and reply: each requester gets its own answer, whatever order the answers come in."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from unibus import Message, Queue, RemoteError, RetryPolicy
from unibus.adapter import Outgoing
from unibus.errors import NotFound, Unroutable
from unibus_contracts.contract import contract
from unibus_contracts.kit import SOON, Kit, Seen, leftover, until


def answering(kit: Kit) -> Queue[Any]:
    return kit.queue(str, reply=str)


@contract("reply.roundtrip", "A request is answered with what the responder returned.", needs="reply")
async def test_roundtrip(kit: Kit) -> None:
    queue = answering(kit)
    responder, requester = kit.bus(service="responder"), kit.bus(queue, service="requester")

    @responder.responder(queue)
    async def answer(body: str) -> str:
        return body.upper()

    async with responder.running(), requester:
        assert await requester.request(queue, "ä", timeout=SOON) == "Ä"
        assert await requester.request(queue, "", timeout=SOON) == ""
        assert await responder.request(queue, "itself", timeout=SOON) == "ITSELF"
        await until(lambda: responder.counts.get("replied") == 3, "three replies")


@contract("reply.matched_when_shuffled", "A hundred requests answered in reverse each get their own.", needs="reply")
async def test_shuffled(kit: Kit) -> None:
    queue = answering(kit)
    responder, requester = kit.bus(), kit.bus(queue)
    gates, entered = [asyncio.Event() for _ in range(100)], Seen[int]()

    @responder.responder(queue, concurrency=100)
    async def answer(body: str) -> str:
        entered(int(body))
        await gates[int(body)].wait()
        if int(body):
            gates[int(body) - 1].set()
        return f"answer {body}"

    async with responder.running(), requester:
        tasks = [asyncio.create_task(requester.request(queue, str(n), timeout=SOON)) for n in range(100)]
        await entered.reach(100)
        gates[99].set()
        assert await asyncio.gather(*tasks) == [f"answer {n}" for n in range(100)]


@contract(
    "reply.many_from_one_handler",
    "A hundred requests of one handler, answered in reverse, get their own.",
    needs="reply",
)
async def test_from_handler(kit: Kit) -> None:
    queue, work = answering(kit), kit.queue()
    responder, requester = kit.bus(), kit.bus(queue)
    gates, entered, seen = [asyncio.Event() for _ in range(100)], Seen[str | None](), Seen[list[str]]()

    @responder.responder(queue, concurrency=100)
    async def answer(body: str, message: Message) -> str:
        entered(message.correlation_id)  # one conversation: it can't be what replies are matched by
        if len(entered) == 100:
            gates[99].set()
        await gates[int(body)].wait()
        if int(body):
            gates[int(body) - 1].set()
        return f"answer {body}"

    @requester.consumer(work)
    async def handle(body: bytes) -> None:
        seen(await asyncio.gather(*(requester.request(queue, str(n), timeout=SOON) for n in range(100))))

    async with responder.running(), requester.running():
        id = await requester.send(work, b"go")
        await seen.reach(1)
    assert seen.all == [[f"answer {n}" for n in range(100)]]
    assert set(entered.all) == {id}


@contract(
    "reply.timeout", "An unanswered request raises TimeoutError, not early; its late reply is dropped.", needs="reply"
)
async def test_timeout(kit: Kit) -> None:
    queue = answering(kit)
    responder, requester = kit.bus(), kit.bus(queue)
    gate, entered = asyncio.Event(), Seen[str]()

    @responder.responder(queue)
    async def answer(body: str) -> str:
        entered(body)
        if body == "slow":
            await gate.wait()
        return body

    async with responder.running(), requester:
        assert await requester.request(queue, "warm", timeout=SOON) == "warm"
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            await requester.request(queue, "slow", timeout=1)
        assert 0.99 < time.monotonic() - begun < SOON
        assert "slow" in entered.all
        gate.set()
        # By the requester if it was sent, by the responder if it was not, since its time was over; or by both.
        await until(
            lambda: requester.counts.get("late_replies", 0) + responder.counts.get("replies_failed", 0) >= 1,
            "the late reply is counted",
        )
        assert await requester.request(queue, "next", timeout=SOON) == "next"


@contract("reply.private", "Two requesters of one service at once get their own answers only.", needs="reply")
async def test_private(kit: Kit) -> None:
    queue = answering(kit)
    responder, one, two = kit.bus(), kit.bus(queue), kit.bus(queue)

    @responder.responder(queue)
    async def answer(body: str) -> str:
        return f"answer {body}"

    async with responder.running(), one, two:
        asked = [(bus, f"{name} {n}") for n in range(20) for name, bus in (("one", one), ("two", two))]
        answers = await asyncio.gather(*(bus.request(queue, body, timeout=SOON) for bus, body in asked))
        assert answers == [f"answer {body}" for _, body in asked]
        assert one.counts.get("late_replies", 0) == two.counts.get("late_replies", 0) == 0


@contract(
    "reply.address_survives_retry",
    "A responder that fails once and is retried still reaches its requester.",
    needs="reply",
)
async def test_retry(kit: Kit) -> None:
    queue = answering(kit)
    responder, requester = kit.bus(), kit.bus(queue)
    seen = Seen[str]()

    @responder.responder(queue, retry=RetryPolicy(max_retries=2, backoff=1, multiplier=1))
    async def answer(body: str) -> str:
        seen(body)
        if len(seen) == 1:
            raise OSError("first")
        return "second"

    async with responder.running(), requester:
        assert await requester.request(queue, "x", timeout=SOON) == "second"
    assert seen.all == ["x", "x"]


@contract(
    "reply.errors_are_answered",
    "A responder's exception is answered at once as RemoteError, not retried.",
    needs="reply",
)
async def test_remote_error(kit: Kit) -> None:
    queue = answering(kit)
    responder, requester = kit.bus(), kit.bus(queue)
    seen = Seen[str]()

    @responder.responder(queue)
    async def answer(body: str) -> str:
        seen(body)
        raise ValueError(f"bad {body}")

    async with responder.running(), requester:
        with pytest.raises(RemoteError) as caught:
            await requester.request(queue, "x", timeout=SOON)
        assert caught.value.type == "ValueError"
        assert caught.value.message == "bad x"
        with pytest.raises(RemoteError):
            await requester.request(queue, "y", timeout=SOON)
    assert seen.all == ["x", "y"]


@contract(
    "reply.expired_request_is_dropped", "A request whose time is over is not worked on; it is counted.", needs="reply"
)
async def test_expired(kit: Kit) -> None:
    queue = answering(kit)
    responder, requester = kit.bus(), kit.bus(queue)
    seen = Seen[str]()

    @responder.responder(queue, concurrency=1)
    async def answer(body: str) -> str:
        seen(body)
        return body

    async with responder:  # the queue is there, and nobody answers
        pass
    async with requester:
        with pytest.raises(TimeoutError):
            await requester.request(queue, "too late", timeout=0.3)
        async with responder.running():
            assert await requester.request(queue, "in time", timeout=SOON) == "in time"
            # A broker that expires natively may never hand it out: the count is of what was handed out.
            assert responder.counts.get("expired", 0) <= 1
    assert seen.all == ["in time"]


@contract(
    "reply.without_return_address",
    "What is merely sent to a responder's queue is handled once and not answered.",
    needs="reply",
)
async def test_no_address(kit: Kit) -> None:
    queue = answering(kit)
    bus, seen = kit.bus(), Seen[str | None]()

    @bus.responder(queue)
    async def answer(body: str, message: Message) -> str:
        seen(message.reply_to)
        return body

    async with bus.running():
        await bus.send(queue, "x")
        await seen.reach(1)
        assert await bus.request(queue, "y", timeout=SOON) == "y"
    assert seen.all[0] is None
    assert len(seen) == 2


@contract("reply.address_is_untrusted", "A reply address that names anything but an inbox gets nothing.", needs="reply")
async def test_untrusted(kit: Kit) -> None:
    queue, victim = answering(kit), kit.queue(label="victim")
    bus, requester, seen = kit.bus(victim), kit.bus(queue), Seen[str]()
    prefix = getattr(kit.harness, "prefix", "")

    @bus.responder(queue)
    async def answer(body: str) -> str:
        seen(body)
        return "loot"

    addresses = [victim.name, prefix + victim.name, f"queue:{victim.name}", "../x", "a" * 5000, "\U0001f98a", " "]
    async with bus.running(), requester:
        for n, address in enumerate(addresses):
            await bus.send(queue, Message(str(n), reply_to=address))
        await seen.reach(len(addresses))
        assert await requester.request(queue, "honest", timeout=SOON) == "loot"
        await until(lambda: bus.counts.get("replies_failed") == len(addresses), "refused addresses counted")
        assert await leftover(bus, victim) == []
    assert sorted(seen.all) == sorted([*map(str, range(len(addresses))), "honest"])


@contract("reply.inbox_ends_with_its_process", "The inbox of a requester that has left takes no reply.", needs="inbox")
async def test_inbox_gone(kit: Kit) -> None:
    queue = answering(kit)
    responder, requester = kit.bus(), kit.bus(queue)
    addresses = Seen[str | None]()

    @responder.responder(queue)
    async def answer(body: str, message: Message) -> str:
        addresses(message.reply_to)
        return body

    async with responder.running():
        async with requester:
            await requester.request(queue, "x", timeout=SOON)
        (text,) = addresses.all
        assert text
        inbox = responder.adapter.reply_to(text)
        (error,) = await responder.adapter.send([Outgoing(inbox, Message(b"late", id="late"))], SOON)
        assert isinstance(error, NotFound | Unroutable), f"the inbox took a reply, or answered {error!r}"
