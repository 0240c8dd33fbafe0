"""`unibus move` and what is under it, on two memory brokers; brokers of all kinds are in tests/integration/test_move_brokers.py."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.unit.cli_lab import Cli

from unibus import Bus, ConfigError, Message, NotFound, Queue, Refused, RetryPolicy, Timeout, Topic, Unsupported
from unibus.adapter import Backlog, Inspected, Outcome, Outgoing, Source
from unibus.channel import Group, dead_letter_queue
from unibus.clock import VirtualClock
from unibus.errors import ConnectionLost
from unibus.memory import MemoryAdapter
from unibus.memory_broker import MemoryBroker
from unibus.move import HELD, look, move, refuse_the_same
from unibus.tooling import attached

ORDERS: Queue[bytes] = Queue("orders", ordered=True)
PLAN: Queue[bytes] = Queue("plan", delayed=True, priorities=3)
CHARGED: Topic[bytes] = Topic("charged", delayed=True)
BILLING = Group(CHARGED, "billing")


def make(url: str, clock: VirtualClock) -> Bus:
    """A service with a queue in order, one with delays and priorities, and a topic."""
    bus = Bus(url, service="billing", channels=[PLAN], config=False, environ={})
    bus._clock = clock

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=1, backoff=60))
    async def handle(body: bytes) -> None: ...

    @bus.subscriber(CHARGED)
    async def bill(body: bytes) -> None: ...

    return bus


T = TypeVar("T")


class Two:
    """Two brokers on one clock, a service's bus on each, and tools on each."""

    def __init__(self, more: str = "") -> None:
        self.clock = VirtualClock()  # brokers are shared by those of one clock
        self.old = make("memory://old", self.clock)
        self.new = make(f"memory://new{more}", self.clock)
        self.ends = make("memory://old", self.clock), make(f"memory://new{more}", self.clock)  # for tools

    def broker(self, bus: Bus) -> MemoryBroker:
        broker = bus.adapter.native
        assert isinstance(broker, MemoryBroker)
        return broker

    async def passing(self, work: Awaitable[T]) -> T:
        """While it runs, time goes to whatever is waited for."""
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(20):
                await asyncio.sleep(0)
            if not task.done() and (due := self.clock.next_due()) is not None:
                self.clock.move(min(due, 1.0))
        return task.result()

    async def move(self, *names: str) -> list[Any]:
        async def work() -> list[Any]:
            async with attached(self.ends[0]) as source, attached(self.ends[1]) as target:
                places = await look(source, names)
                await move(source, target, places)
                return places

        return await self.passing(work())


@pytest.fixture
async def two() -> Any:
    lab = Two()
    async with lab.old, lab.new:
        yield lab


def moved(places: list[Any]) -> dict[str, int]:
    return {place.name: place.moved for place in places if place.moved}


async def test_everything_of_a_message_stays_what_it_was(two: Two) -> None:
    message = Message(
        b"\x00\xff body",
        "id-1",
        type="Order",
        content_type="application/x",
        headers={"tenant": "grün"},
        key="c42",
        correlation_id="conversation",
        causation_id="cause",
        reply_to="inbox.1",
        timestamp=two.clock.time() - 1000,
        expires_at=two.clock.time() + 1000,
        priority=2,
    )
    await two.old.send(PLAN, message)
    (stored,) = two.broker(two.old).waiting(PLAN)
    assert moved(await two.move()) == {"plan": 1}
    assert two.broker(two.new).waiting(PLAN) == [stored]
    assert two.broker(two.old).waiting(PLAN) == []


async def test_what_is_delayed_is_due_when_it_would_have_been(two: Two) -> None:
    begun = two.clock.time()
    await two.old.send(PLAN, b"later", delay=100)
    await two.old.publish(CHARGED, b"event", delay=50)
    await two.old.send(PLAN, b"soon", delay=1)
    assert moved(await two.move()) == {"plan": 2, "charged.billing": 1}
    assert two.broker(two.old).delayed() == 0
    at = {}
    async with two.new.receiver(PLAN) as plan, two.new.receiver(CHARGED) as charged:
        for receiver, n in ((plan, 2), (charged, 1)):
            for _ in range(n):
                delivery = await two.passing(receiver.receive(timeout=300))
                assert delivery is not None
                at[delivery.body] = two.clock.time() - begun
                await delivery.ack()
    assert at[b"later"] >= 100
    assert at[b"event"] >= 50
    assert 1 <= at[b"soon"] < 50


async def test_attempts_and_dead_letters_keep_their_story(two: Two) -> None:
    headers = {"x-retry-count": "1", "x-crash-count": "2", "x-original-error": "boom", "tenant": "a"}
    dead = {**headers, "x-dlq-reason": "retries_exhausted", "x-moved-to-dlq-at": "2026-01-01T00:00:00.000Z"}
    letters = dead_letter_queue(BILLING)
    retry, letter = Message(b"r", "r", headers=headers), Message(b"d", "d", headers=dead)
    await two.old.adapter.send([Outgoing(ORDERS, retry), Outgoing(letters, letter)], 1)
    assert moved(await two.move()) == {"orders": 1, "charged.billing.dlq": 1}
    assert [m.headers for m in two.broker(two.new).waiting(ORDERS)] == [headers]
    assert [m.headers for m in two.broker(two.new).waiting(letters)] == [dead]


async def test_the_order_of_a_key_is_kept(two: Two) -> None:
    await two.old.send_many(ORDERS, [b"%d" % n for n in range(300)], key=lambda body: f"k{int(body) % 3}")
    assert moved(await two.move()) == {"orders": 300}
    numbers = [(m.key, int(m.body)) for m in two.broker(two.new).waiting(ORDERS)]
    for key in ("k0", "k1", "k2"):
        of_key = [n for k, n in numbers if k == key]
        assert of_key == sorted(of_key)
        assert len(of_key) == 100


async def test_only_what_was_named(two: Two) -> None:
    await two.old.send(ORDERS, b"1", key="k")
    await two.old.send(PLAN, b"2")
    assert moved(await two.move("plan")) == {"plan": 1}
    assert len(two.broker(two.old).waiting(ORDERS)) == 1


async def test_what_the_target_can_not_carry_stays_and_is_named() -> None:
    two = Two("?max_body=10")
    async with two.old, two.new:
        await two.old.send_many(PLAN, [b"short", b"far too long for it", b"tiny"])
        (place,) = [place for place in await two.move() if place.moved]
        assert (place.moved, place.left) == (2, 1)
        assert [type(one.error).__name__ for one in place.stayed] == ["MessageTooLarge"]
        (left,) = two.broker(two.old).waiting(PLAN)
        assert (left.body, left.id) == (b"far too long for it", place.stayed[0].id)


@pytest.mark.parametrize("error", [Refused("no"), ConnectionLost("gone")])
async def test_nothing_is_settled_that_was_not_confirmed(two: Two, error: Any) -> None:
    await two.old.send_many(PLAN, [b"%d" % n for n in range(5)])
    await two.old.send(PLAN, b"late", delay=1000)
    two.broker(two.new).refuse(PLAN, error)
    if error.retryable:
        with pytest.raises(Timeout, match="gone"):
            await two.move()
    else:
        (place,) = [place for place in await two.move() if place.stayed]
        assert place.left == 6
    assert len(two.broker(two.old).waiting(PLAN)) == 5
    assert two.broker(two.old).delayed() == 1
    two.broker(two.new).refuse(PLAN, None)
    assert moved(await two.move()) == {"plan": 6}


async def test_interrupted_and_run_again(two: Two) -> None:
    """Killed between the confirmation and the settling: what was on its way is there twice, by one id; nothing is lost."""
    ids = set(await two.old.send_many(PLAN, [b"%d" % n for n in range(20)]))
    await two.old.send(PLAN, Message(b"late", "late"), delay=1000)

    async def die(*_: object, **__: object) -> Any:
        raise ConnectionLost("the source is gone")

    async def broken() -> None:
        async with attached(two.ends[0]) as source, attached(two.ends[1]) as target:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("unibus.memory_subscription.MemorySubscription.settle", die)
                await move(source, target, await look(source))

    with pytest.raises(ConnectionLost):
        await two.passing(broken())
    assert len(two.broker(two.old).waiting(PLAN)) == 20
    assert two.broker(two.old).delayed() == 1
    assert moved(await two.move()) == {"plan": 21}
    found = [m.id for m in two.broker(two.new).waiting(PLAN)]
    assert set(found) == ids
    assert len(found) == 40


async def test_an_early_source_gives_nothing_back_too_early(two: Two) -> None:
    await two.old.send(PLAN, b"late", delay=100)
    for end in ("settle", "close", "kill"):
        subscription: Any = await two.old.adapter.subscribe(Source(PLAN, early=True))
        (delivery,) = await subscription.receive(5, 0)
        assert 0 < delivery.message.delay <= 100
        if end == "settle":
            await subscription.settle(Outcome.RELEASED, [delivery])
        if end == "kill":
            two.broker(two.old).kill(subscription)
            two.clock.move(31)
        await subscription.close()
        assert two.broker(two.old).waiting(PLAN) == []
        assert two.broker(two.old).delayed() == 1
    two.clock.move(70)
    assert len(two.broker(two.old).waiting(PLAN)) == 1


async def test_cancelled_it_gives_everything_back(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    await two.old.send_many(PLAN, [b"%d" % n for n in range(20)])
    await two.old.send(PLAN, b"late", delay=1000)
    sending = asyncio.Event()

    async def hang(*_: object) -> Any:
        sending.set()
        await asyncio.Event().wait()

    async with attached(two.ends[0]) as source, attached(two.ends[1]) as target:
        with monkeypatch.context() as patch:
            patch.setattr(target.adapter, "send", hang)
            moving = asyncio.create_task(move(source, target, await look(source)))
            await sending.wait()
            assert two.broker(two.old).in_flight() == 20
            moving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await moving
            assert two.broker(two.old).in_flight() == 0
            assert len(two.broker(two.old).waiting(PLAN)) == 20
            two.clock.move(31)  # the send gives up
    assert moved(await two.move()) == {"plan": 21}


async def test_where_nothing_can_be_taken_early(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    subscribe = MemoryAdapter.subscribe

    async def not_early(self: MemoryAdapter, source: Source) -> Any:
        if source.early:
            raise Unsupported("not here")
        return await subscribe(self, source)

    monkeypatch.setattr(MemoryAdapter, "subscribe", not_early)
    await two.old.send(PLAN, b"late", delay=30)
    await two.old.send(PLAN, b"now")
    (place,) = [place for place in await two.move("plan") if place.moved]
    assert (place.moved, place.left) == (1, 1)

    async def waiting() -> list[Any]:
        async with attached(two.ends[0]) as source, attached(two.ends[1]) as target:
            places = await look(source, ["plan"])
            await move(source, target, places, wait=60)
            return places

    (place,) = [place for place in await two.passing(waiting()) if place.moved]
    assert (place.moved, place.left) == (1, 0)
    assert two.clock.time() < 1_700_000_000 + 60  # and no longer than that


async def test_one_broker_by_two_names_comes_to_an_end(two: Two) -> None:
    """Nodes of one cluster: nothing in their URLs tells. What was moved would come round again for ever."""
    await two.old.send_many(PLAN, [b"%d" % n for n in range(600)])
    await two.old.send_many(ORDERS, [b"%d" % n for n in range(7)], key=lambda body: "k")
    await two.old.send(PLAN, b"late", delay=1000)
    two.ends = make("memory://old", two.clock), make("memory:///old", two.clock)
    async with asyncio.timeout(20):
        places = await two.move()
    assert moved(places) == {"plan": 601, "orders": 7}
    assert {place.name: (place.full, place.left) for place in places if place.moved} == {
        "plan": (True, 601),
        "orders": (True, 7),
    }
    assert [int(m.body) for m in two.broker(two.old).waiting(ORDERS)] == [*range(7)]
    assert two.broker(two.old).delayed() == 1


@pytest.mark.parametrize("exact", [True, False])
async def test_where_producers_go_on_it_ends_by_the_count(
    two: Two, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An estimate may be too low, of none even: then a place is good for a few more."""
    backlog, send = MemoryAdapter.backlog, MemoryAdapter.send

    async def estimated(self: MemoryAdapter, address: Any) -> Backlog:
        found = await backlog(self, address)
        return found if exact else replace(found, ready=0, exact=False)

    async def and_another(self: MemoryAdapter, batch: Any, timeout: float) -> Any:
        if self.broker is two.broker(two.new):
            await two.old.send_many(PLAN, [b"more"] * len(batch))
        return await send(self, batch, timeout)

    await two.old.send_many(PLAN, [b"%d" % n for n in range(20)])
    monkeypatch.setattr(MemoryAdapter, "backlog", estimated)
    monkeypatch.setattr(MemoryAdapter, "send", and_another)
    async with asyncio.timeout(20):
        (place,) = [place for place in await two.move() if place.moved]
    monkeypatch.undo()
    expected = 20 if exact else HELD
    assert (place.moved, place.full) == (expected, True)
    assert len(two.broker(two.new).waiting(PLAN)) == expected
    assert len(two.broker(two.old).waiting(PLAN)) == 20


async def test_what_is_held_for_all_channels_is_counted_in(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where delays wait in places that channels share, nobody knows how many come to which."""
    backlog, inspected = MemoryAdapter.backlog, MemoryAdapter.inspect

    async def no_delays(self: MemoryAdapter, address: Any) -> Backlog:
        return replace(await backlog(self, address), delayed=None)

    async def shared(self: MemoryAdapter, topology: Any) -> Any:
        return [*await inspected(self, topology), Inspected("hold", "h", True, messages=self.broker.delayed())]

    monkeypatch.setattr(MemoryAdapter, "backlog", no_delays)
    monkeypatch.setattr(MemoryAdapter, "inspect", shared)
    await two.old.send_many(PLAN, [b"1", b"2"])
    for body in (b"3", b"4"):
        await two.old.send(PLAN, body, delay=50)
    assert moved(await two.move("plan")) == {"plan": 4}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("memory://a", "memory://a", True),
        ("memory://a", "memory://b", False),
        ("amqp://u:p@rabbit/shop", "amqps://rabbit:5671/shop", True),
        ("amqp://rabbit/shop", "amqp://rabbit/other", False),
        ("amqp://rabbit:5672", "amqp://rabbit:5673", False),
        ("redis://localhost:6379/0", "redis://127.0.0.1:6379/1", False),
        ("redis://localhost:6379/0", "redis://127.0.0.1:6379", True),
        ("kafka://k1:9092,k2:9092", "kafka://k2:9092", True),
        ("kafka://k1:9092", "amqp://k1:9092", False),
        ("amqp://Rabbit.Example.:5672", "amqp://rabbit.example:5672", True),
        ("amqp://127.0.1.1:5672", "amqp://[::ffff:127.0.0.1]:5672", True),
        (f"amqp://{socket.gethostname()}:5672", "amqp://localhost:5672", True),
        ("amqp://[fe80::1]:5672", "amqp://[fe80:0:0::1]:5672", True),
        ("amqp://[fe80::1]:5672", "amqp://[fe80::2]:5672", False),
        ("memory:///folder/../old.db", "memory:///old.db", True),
        ("memory:///old.db", f"memory:///{Path.cwd()}/old.db", True),
        ("memory:///old.db", "memory:////old.db", False),
        ("amqp://rabbit/a/../b", "amqp://rabbit/b", False),
        ("sqs://eu-west-1", "sqs://eu-west-1", True),
        ("sqs://eu-west-1", "sqs://eu-west-1?endpoint_url=http://127.0.0.1:4566", False),
    ],
)
def test_one_broker_as_both_ends_is_refused(one: str, other: str, same: bool) -> None:
    buses = [Bus(url, config=False, environ={}) for url in (one, other)]
    if same:
        with pytest.raises(ConfigError, match="name the same broker"):
            refuse_the_same(*buses)
    else:
        refuse_the_same(*buses)


async def test_what_the_target_lacks_is_told_before_anything_moves() -> None:
    two = Two()
    async with two.old:
        await two.old.send(PLAN, b"x")
        with pytest.raises(NotFound, match=r"missing at the target: charged.billing, .*orders.*; make them"):
            await two.move()
        assert len(two.broker(two.old).waiting(PLAN)) == 1


# The command

FROM, TO = ("--from", "memory://cli-from"), ("--to", "memory://cli-to")
Run = Callable[..., Any]


@pytest.fixture
def run(cli: Cli) -> Run:
    app = cli.app()

    def run(*arguments: str, text: str | None = None) -> Any:
        return cli(*arguments, "--app", app, text=text, url=None)

    for url in (FROM[1], TO[1]):
        assert run("declare", "--url", url).code == 0
    return run


def test_the_command_moves_and_says_so(run: Run) -> None:
    lines = "".join(json.dumps({"id": f"o-{n}", "body": {"id": str(n)}}) + "\n" for n in range(3))
    assert run("send", "orders", "--url", FROM[1], text=lines).code == 0
    dry = run("move", *FROM, *TO, "--dry-run", "--json")
    assert dry.code == 0
    assert {p["place"]: p["ready"] for p in dry.lines[0]["places"] if p["ready"]} == {"orders": 3}
    assert dry.lines[0]["moved"] == 0
    done = run("move", "orders", *FROM, *TO)
    assert (done.code, done.err) == (0, "3 messages moved\n")
    assert [line["id"] for line in run("peek", "orders", "--url", TO[1]).lines] == ["o-0", "o-1", "o-2"]
    again = run("move", *FROM, *TO, "--json")
    assert (again.code, again.lines[0]["moved"]) == (0, 0)


def test_the_command_says_where_both_ends_may_be_one(run: Run) -> None:
    assert run("send", "orders", "--url", FROM[1], text='{"id": "o-1", "body": {"id": "1"}}\n').code == 0
    done = run("move", *FROM, "--to", "memory:///cli-from")
    assert done.code == 1
    said = "1 message moved, 1 still at the source: more arrived meanwhile, or both ends are one broker; run it again\n"
    assert done.err == said


def test_the_command_names_what_stays(run: Run) -> None:
    line = '{"id": "o-1", "body": {"id": "far too long for it"}}\n'
    assert run("send", "orders", "--url", FROM[1], text=line).code == 0
    done = run("move", *FROM, "--to", "memory://cli-to?max_body=5")
    assert done.code == 1
    assert "o-1" in done.out
    assert "MessageTooLarge" in done.out
    assert "0 messages moved, 1 stay" in done.err
    assert len(run("receive", "orders", "--ack", "--url", FROM[1]).lines) == 1


def test_names_that_nobody_declares(cli: Cli) -> None:
    cli.toml("[queues.a]\n[topics.t.groups]\ng = {}\n")
    for url in (FROM[1], TO[1]):
        assert cli("declare", url=url).code == 0
    assert cli("publish", "t", '"x"', url=FROM[1]).code == 0
    (cli.folder / "unibus.toml").unlink()
    done = cli("move", "a", "t/g", *FROM, *TO, "--json", url=None)
    assert (done.code, done.lines[0]["moved"]) == (0, 1)
    assert cli("move", "nobody", *FROM, *TO, url=None).code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((*FROM, "--to", FROM[1]), 2, "name the same broker"),
        ((*FROM, "--to", "nonsense"), 2, "there is no scheme"),
        ((*FROM, "--to", "memory://cli-elsewhere"), 1, "missing at the target"),
        ((*FROM, "--to", "memory://cli-elsewhere", "--dry-run"), 1, "missing at the target"),
        (("nobody", *FROM, *TO), 1, "queue 'nobody' does not exist at the source"),
    ],
)
def test_what_the_command_refuses(run: Run, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run("move", *arguments)
    assert done.code == code
    assert says in done.err
