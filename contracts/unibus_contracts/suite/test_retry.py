"""Retry: counted exactly, delayed at least as long as asked, in nobody's way, and the message itself unchanged."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from unibus import Delivery, Message, Retry, RetryPolicy
from unibus_contracts.contract import contract
from unibus_contracts.kit import (
    AT_ONCE,
    FACTOR,
    LATER,
    NEVER,
    SOON,
    Kit,
    Seen,
    bodies,
    handed_over,
    leftover,
    letters,
    until,
)

SLACK = 4.0  # seconds that a delay may be longer than asked, for polling and steps


class Broken(Exception):
    """Cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@contract("retry.immediate_count", "With two retries a handler runs three times: attempts 1, 2 and 3, then it is dead.")
async def test_immediate(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[int]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        raise OSError("always")

    async with bus.running():
        await bus.send(queue, b"x")
        await letters(bus, queue)
        assert seen.all == [1, 2, 3]
        assert bus.counts["retried"] == 2
        assert bus.counts["dead_lettered"] == 1
        assert bus.counts.get("handled", 0) == 0


@contract("retry.none", "Without retries a handler runs once.")
async def test_none(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[int]()

    @bus.consumer(queue, retry=NEVER)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        raise OSError("always")

    async with bus.running():
        await bus.send(queue, b"x")
        await letters(bus, queue)
    assert seen.all == [1]


@contract("retry.delayed_count", "Delayed retries are counted as exactly as immediate ones.", needs="delay")
async def test_delayed(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[tuple[int, str | None]]()

    @bus.consumer(queue, retry=LATER)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((delivery.attempt, delivery.message.headers.get("x-retry-count")))
        raise OSError("always")

    async with bus.running():
        await bus.send(queue, b"x")
        await letters(bus, queue)
    assert seen.all == [(1, None), (2, "1"), (3, "2")]


@contract(
    "retry.delay_is_floor", "A retry comes after the policy's wait: never before, and not much later.", needs="delay"
)
async def test_floor(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[float]()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=2, backoff=1, multiplier=2))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(time.monotonic())
        if delivery.attempt < 3:
            raise OSError("again")

    async with bus.running():
        await bus.send(queue, b"x")
        one, two, three = await seen.reach(3)
    assert 1 <= two - one <= 1 + SLACK
    assert 2 <= three - two <= 2 + SLACK


@contract("retry.own_delay", "Retry(delay=) waits as long as it says, whatever the policy, and counts.", needs="delay")
async def test_own_delay(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[tuple[int, float]]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((delivery.attempt, time.monotonic()))
        if delivery.attempt == 1:
            raise Retry("the bank is closed", delay=1)

    async with bus.running():
        await bus.send(queue, b"x")
        (first, one), (second, two) = await seen.reach(2)
    assert (first, second) == (1, 2)
    assert 1 <= two - one <= 1 + SLACK


@contract("retry.asked_for_counts", "Retry counts as a failed attempt: when none is left, the message is dead.")
async def test_asked_for(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[int]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        raise Retry("not yet", delay=0)

    async with bus.running():
        await bus.send(queue, b"x")
        (letter,) = await letters(bus, queue)
    assert seen.all == [1, 2, 3]
    assert letter.message.headers["x-dlq-reason"] == "retries_exhausted"


@contract("retry.others_progress", "While one message waits for its retry, the others are handled.", needs="delay")
async def test_others(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    # Longer than a busy machine needs for the others.
    @bus.consumer(queue, concurrency=1, prefetch=1, retry=RetryPolicy(max_retries=1, backoff=3 * FACTOR))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(body)
        if body == b"waits" and delivery.attempt == 1:
            raise OSError("again")

    async with bus.running():
        await bus.send(queue, b"waits")
        await seen.reach(1)
        await bus.send(queue, b"0")
        await bus.send_many(queue, [b"%d" % n for n in range(1, 5)])
        await seen.reach(7)
    assert seen.all == [b"waits", b"0", b"1", b"2", b"3", b"4", b"waits"]


@contract(
    "retry.message_is_unchanged", "A retried message has the id, body, key, times and headers that it was sent with."
)
async def test_unchanged(kit: Kit) -> None:
    async def attempts(policy: RetryPolicy) -> list[tuple[Any, ...]]:
        queue = kit.queue()
        bus, seen = kit.bus(), Seen[tuple[Any, ...]]()

        @bus.consumer(queue, retry=policy)
        async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
            m = delivery.message
            own = {name: value for name, value in m.headers.items() if not name.startswith("x-")}
            # Whole seconds: it is the same stamp, but a broker's own field may be coarser than a header.
            seen((body, m.id, m.key, m.type, m.content_type, m.correlation_id, int(m.timestamp or 0), own))
            if delivery.attempt < 3:
                raise OSError("again")

        async with bus.running():
            sent = Message(bytes(range(256)), type="t", key="kéy", headers={"a": "ü", "B": ""}, correlation_id="talk")
            await bus.send(queue, sent)
            return await seen.reach(3)

    for policy in (AT_ONCE, LATER) if (await kit.capabilities()).delay else (AT_ONCE,):
        one, two, three = await attempts(policy)
        assert one == two == three
        assert (one[0], *one[2:4], one[5], one[-1]) == (
            bytes(range(256)),
            "kéy",
            "t",
            "talk",
            {"a": "ü", "B": ""},
        )


@contract(
    "retry.edits_are_rolled_back", "What a handler does to its message before it fails, the next attempt does not see."
)
async def test_edits(kit: Kit) -> None:
    queue = kit.queue(dict[str, int])
    bus, seen = kit.bus(), Seen[tuple[dict[str, int], dict[str, str]]]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: dict[str, int], delivery: Delivery[dict[str, int]]) -> None:
        own = {name: value for name, value in delivery.message.headers.items() if not name.startswith("x-")}
        seen((dict(body), own))
        body["forged"] = 1
        with suppress(TypeError):  # refused is as good as rolled back
            delivery.message.headers["forged"] = "1"  # type: ignore[index] # read-only by its type; that is the point
        if delivery.attempt < 3:
            raise OSError("again")

    async with bus.running():
        await bus.send(queue, {"n": 1}, headers={"a": "b"})
        await seen.reach(3)
    assert seen.all == [({"n": 1}, {"a": "b"})] * 3


@contract(
    "retry.sends_of_a_failed_attempt", "What an attempt sent before it failed is sent: each attempt sends its own."
)
async def test_sends(kit: Kit) -> None:
    queue, out = kit.queue(), kit.queue(label="out")
    bus, seen = kit.bus(out), Seen[int]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        await bus.send(out, b"attempt %d" % delivery.attempt)
        seen(delivery.attempt)
        if delivery.attempt < 3:
            raise OSError("after sending")

    async with bus.running():
        await bus.send(queue, b"x")
        await seen.reach(3)
        assert sorted(bodies(await leftover(bus, out))) == [b"attempt 1", b"attempt 2", b"attempt 3"]


@contract("retry.broken_error_keeps_message", "An exception that can't be printed is a failure like any other.")
async def test_broken_error(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[int]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        raise Broken

    async with bus.running():
        await bus.send(queue, b"x")
        assert bodies(await letters(bus, queue)) == [b"x"]
        await bus.send(queue, b"y")
        assert sorted(bodies(await letters(bus, queue, 2))) == [b"x", b"y"]
    assert seen.all == [1, 2, 3, 1, 2, 3]


@contract(
    "retry.only_what_the_policy_names", "An error that the policy gives up on is dead at once; others are retried."
)
async def test_kinds(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()
    policy = RetryPolicy(max_retries=2, backoff=0, retry_on=(OSError, ValueError), give_up_on=(FileNotFoundError,))

    @bus.consumer(queue, concurrency=1, retry=policy)
    async def handle(body: bytes) -> None:
        seen(body)
        raise {b"retried": OSError, b"given up": FileNotFoundError, b"unnamed": KeyError}[body]("x")

    async with bus.running():
        for body in (b"retried", b"given up", b"unnamed"):
            await bus.send(queue, body)
        found = {d.body: d.message.headers["x-dlq-reason"] for d in await letters(bus, queue, 3)}
    assert {body: seen.all.count(body) for body in found} == {b"retried": 3, b"given up": 1, b"unnamed": 1}
    assert found == {b"retried": "retries_exhausted", b"given up": "non_retryable", b"unnamed": "non_retryable"}


@contract(
    "retry.goes_on_elsewhere",
    "A message that waits for its retry is handled by another process, count kept.",
    needs="delay",
)
async def test_elsewhere(kit: Kit) -> None:
    queue = kit.queue()
    seen = Seen[tuple[str, int]]()
    first, second = kit.bus(), kit.bus()

    @first.consumer(queue, retry=LATER)
    async def fail(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(("first", delivery.attempt))
        raise OSError("again")

    @second.consumer(queue, retry=LATER)
    async def succeed(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(("second", delivery.attempt))

    async with first.running():
        await first.send(queue, b"x")
        await seen.reach(1)
        await until(lambda: first.counts.get("retried") == 1, "its retry is decided")
    async with second.running():
        await until(lambda: second.counts.get("handled") == 1, "handled elsewhere")
    assert seen.all == [("first", 1), ("second", 2)]


@contract(
    "retry.count_outlives_its_process",
    "What failed in one process is counted in the next: exactly, or told as emulated and never too high.",
    needs="attempt",
)
async def test_outlives(kit: Kit) -> None:
    exact = (await kit.capabilities()).attempt.level == "native"
    found = await handed_over(kit)
    assert found == 2 if exact else found in (1, 2), f"attempt {found} after one failure in the process before"


@contract("retry.attempt_by_hand", "By hand, retry counts one, and beyond the policy's number the message is dead.")
async def test_by_hand(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        await bus.send(queue, b"x")
        attempts = []
        while (delivery := await receiver.receive(timeout=SOON)) is not None:
            attempts.append(delivery.attempt)
            await delivery.retry("again", delay=0)
            if bus.counts.get("dead_lettered"):
                break
        (letter,) = await letters(bus, queue)
        default = RetryPolicy()
    assert attempts == list(range(1, default.max_retries + 2))
    assert letter.message.headers["x-retry-count"] == str(default.max_retries + 1)


@contract(
    "retry.none_lost_in_a_crowd",
    "A hundred messages that each fail twice are all handled, each on attempt 3.",
    needs="delay",
)
async def test_crowd(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[tuple[bytes, int]]()

    @bus.consumer(queue, concurrency=20, retry=LATER)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((body, delivery.attempt))
        if delivery.attempt < 3:
            raise OSError("again")

    async with bus.running():
        await bus.send_many(queue, [b"%d" % n for n in range(100)])
        await until(lambda: bus.counts.get("handled") == 100, "100 handled")
        assert bus.counts["retried"] == 200
        assert await letters(bus, queue, 0) == []
    assert sorted(seen.all) == sorted((b"%d" % n, attempt) for n in range(100) for attempt in (1, 2, 3))
