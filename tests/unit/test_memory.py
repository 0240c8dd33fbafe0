"""The in-memory broker: what it does with messages, leases, delays, groups and keys. Its faults: test_memory_faults."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.memory_lab import ALL, DONE, EVENTS, LONELY, ORDERED, ORDERS, URGENT, A, B, Lab, declared, got, ids

from unibus.adapter import Declared, Move, Outcome, Outgoing, Topology
from unibus.channel import Address, Group, Inbox, Queue, Topic
from unibus.delivery import Delivery
from unibus.errors import LeaseLost, MessageTooLarge, NotFound, Refused, Unroutable, Unsupported
from unibus.memory_subscription import MemorySubscription
from unibus.message import Message


@pytest.fixture
async def lab() -> Lab:
    return await Lab().start()


async def test_a_message_arrives_as_sent_and_is_nobody_elses(lab: Lab) -> None:
    headers = {"tenant": "t"}
    sent = Message(b"x", "1", "T", "c", headers, "k", "co", "ca", "inbox.r", 1.0, 2.0, 1)
    await lab.adapter.send([Outgoing(EVENTS, sent)], 5)
    copy = Message(b"x", "1", "T", "c", {"tenant": "t"}, "k", "co", "ca", "inbox.r", 1.0, 2.0, 1)
    headers["tenant"] = sent.id = "changed"
    for group in (A, B, A):
        subscription = await lab.subscribe(group)
        [delivery] = await subscription.receive(10, 0)
        assert delivery.message == copy
        delivery.message.id = "changed"
        delivery.message.headers["tenant"] = "changed"  # type: ignore[index]  # what no handler should do
        await subscription.close()


async def test_a_delay_is_a_floor_on_a_machine_that_is_busy_elsewhere(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time passes between two looks at the clock, as it does where the process has to wait for its turn."""
    look = lab.clock.time
    due = look() + 1

    def slow() -> float:
        lab.clock.move(0.1)
        return look()

    monkeypatch.setattr(lab.clock, "time", slow)
    await lab.adapter.send([Outgoing(ORDERS, Message(b"x", "x"), due)], 5)
    rest = due - look()
    lab.clock.move(rest - 0.01)
    subscription = await lab.subscribe(ORDERS)
    assert await got(subscription) == ""
    lab.clock.move(0.01)
    assert await got(subscription) == "x"


async def test_first_in_first_out_and_settled_is_gone(lab: Lab) -> None:
    await lab.send(ORDERS, "1", "2", "3")
    one, two = await lab.subscribe(ORDERS), await lab.subscribe(ORDERS)
    first = await one.receive(2, 0)
    assert (ids(first), await got(two)) == ("1 2", "3")
    assert await one.settle(Outcome.ACCEPTED, first) == [None, None]
    again = await one.settle(Outcome.ACCEPTED, first)
    assert [type(e) for e in again] == [LeaseLost, LeaseLost]
    assert lab.broker.ready() == 0
    assert lab.broker.in_flight() == 1


async def test_prefetch_bounds_what_is_held_and_settling_wakes(lab: Lab) -> None:
    await lab.send(ORDERS, "1", "2", "3")
    subscription = await lab.subscribe(ORDERS, prefetch=2)
    held = await subscription.receive(10, 0)
    assert ids(held) == "1 2"
    waiting = asyncio.ensure_future(subscription.receive(10, 60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    await subscription.settle(Outcome.ACCEPTED, held[:1])
    assert ids(await waiting) == "3"


async def test_receive_waits_for_a_send_and_times_out(lab: Lab) -> None:
    subscription = await lab.subscribe(ORDERS)
    waiting = asyncio.ensure_future(subscription.receive(10, 5))
    await lab.send(ORDERS, "1")
    assert ids(await waiting) == "1"
    waiting = asyncio.ensure_future(subscription.receive(10, 5))
    for _ in range(3):
        await asyncio.sleep(0)
    lab.clock.move(5)
    assert await waiting == ()


async def test_a_cancelled_receive_loses_nothing(lab: Lab) -> None:
    subscription = await lab.subscribe(ORDERS)
    waiting = asyncio.ensure_future(subscription.receive(10, 5))
    for _ in range(3):
        await asyncio.sleep(0)
    await lab.send(ORDERS, "1")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await got(subscription) == "1"


async def test_a_lease_that_ends_redelivers_and_counts() -> None:
    lab = await Lab(lease="7").start()
    lost: list[Delivery[Any]] = []

    async def losing(deliveries: Sequence[Delivery[Any]], grace: float) -> None:
        assert grace == 0
        lost.extend(deliveries)

    subscription = await lab.subscribe(ORDERS, losing=losing)
    assert lab.adapter.capabilities.lease.limit == 7
    await lab.send(ORDERS, "1", "2")
    [first] = await subscription.receive(1, 0)
    assert (first.deliveries, first.lease_until) == (1, 7)
    lab.clock.move(6.999)
    assert await got(subscription) == "2"
    lab.clock.move(0.001)
    assert first.lost
    [again] = await subscription.receive(10, 0)
    assert (again.message.id, again.deliveries) == ("1", 2)
    assert lost == [first]
    for late in (
        await subscription.settle(Outcome.ACCEPTED, [first]),
        await subscription.settle(Outcome.RELEASED, [first]),
        await subscription.extend([first], 9),
        await subscription.move([Move(first, ())], 5),
    ):
        assert isinstance(late[0], LeaseLost)
    assert await subscription.settle(Outcome.ACCEPTED, [again]) == [None]


async def test_extend_keeps_longer_or_shorter(lab: Lab) -> None:
    subscription = await lab.subscribe(ORDERS)
    await lab.send(ORDERS, "long", "short", "plain")
    long, short, plain = await subscription.receive(3, 0)
    assert await subscription.extend([long], 100) == [None]
    assert await subscription.extend([short], 1) == [None]
    seen = []
    for seconds in (1, 29, 69, 1):
        lab.clock.move(seconds)
        seen.append([d.message.id for d in (long, short, plain) if d.lost])
    assert seen == [["short"], ["short", "plain"], ["short", "plain"], ["long", "short", "plain"]]
    assert await got(subscription) == "long short plain"


async def test_a_release_is_uncounted_and_a_delay_is_a_floor(lab: Lab) -> None:
    subscription = await lab.subscribe(ORDERS)
    await lab.send(ORDERS, "1", "2", "3")
    held = await subscription.receive(3, 0)
    await subscription.settle(Outcome.RELEASED, held, delays=[0, 5, 0])
    back = await subscription.receive(3, 0)
    assert ids(back) == "1 3"
    assert [d.deliveries for d in back] == [1, 1]
    assert lab.broker.delayed() == 1
    lab.clock.move(4.999)
    assert await got(subscription) == ""
    lab.clock.move(0.001)
    [late] = await subscription.receive(3, 0)
    assert (late.message.id, late.deliveries) == ("2", 1)


async def test_what_was_given_back_is_first_again(lab: Lab) -> None:
    subscription = await lab.subscribe(ORDERS)
    await lab.send(ORDERS, *"12345")
    one, two, three = await subscription.receive(3, 0)
    for delivery in (two, one, three):
        await subscription.settle(Outcome.RELEASED, [delivery])
    assert await got(subscription) == "1 2 3 4 5"


async def test_not_before_holds_a_message_back_in_order_of_its_time(lab: Lab) -> None:
    subscription = await lab.subscribe(A)
    await lab.send(EVENTS, "late", wait=10)
    await lab.send(A, "soon", wait=0.1)
    await lab.send(A, "now", wait=-1)
    assert await got(subscription) == "now"
    lab.clock.move(0.1)
    assert await got(subscription) == "soon"
    lab.clock.move(9.899)
    assert await got(subscription) == ""
    lab.clock.move(0.001)
    assert await got(subscription) == "late"


async def test_each_group_gets_a_copy_and_a_retry_reaches_one_group(lab: Lab) -> None:
    a, b = await lab.subscribe(A), await lab.subscribe(B)
    await lab.send(EVENTS, "1")
    [mine] = await a.receive(9, 0)
    await a.settle(Outcome.RELEASED, [mine])
    assert await got(b) == "1"
    await lab.send(A, "retry")
    assert (await got(a), await got(b)) == ("1 retry", "")


async def test_a_group_begins_when_it_is_declared(lab: Lab) -> None:
    late = Group(EVENTS, "late")
    await lab.send(EVENTS, "before")
    await lab.adapter.declare(declared(EVENTS, late))
    await lab.send(EVENTS, "after")
    assert await got(await lab.subscribe(late)) == "after"


async def test_an_ephemeral_group_ends_with_its_subscription(lab: Lab) -> None:
    group = Group(EVENTS, "broadcast-1", ephemeral=True)
    subscription = await lab.subscribe(group)
    await lab.send(EVENTS, "1")
    assert await got(subscription) == "1"
    await subscription.close()
    with pytest.raises(NotFound, match="broadcast-1"):
        await lab.adapter.backlog(group)
    await lab.send(EVENTS, "2")
    assert await got(await lab.subscribe(group)) == ""


async def test_priorities_and_first_in_first_out_within(lab: Lab) -> None:
    for name, priority in (("a", None), ("b", 2), ("c", 1), ("d", 2), ("e", 9)):
        await lab.send(URGENT, name, priority=priority)
    subscription = await lab.subscribe(URGENT)
    held = await subscription.receive(2, 0)
    assert ids(held) == "b d"
    await subscription.settle(Outcome.RELEASED, held)
    assert await got(subscription) == "b d e c a"


async def test_one_message_of_a_key_is_out_at_a_time(lab: Lab) -> None:
    one, two = await lab.subscribe(ORDERED), await lab.subscribe(ORDERED)
    await lab.send(ORDERED, "x1", "x2", key="x")
    await lab.send(ORDERED, "y1", key="y")
    await lab.send(ORDERED, "n1", "n2")
    held = await one.receive(9, 0)
    assert ids(held) == "x1 y1 n1 n2"
    assert await got(two) == ""
    assert (await lab.adapter.backlog(ORDERED)).ready == 1
    assert lab.broker.ready() == 0
    await one.settle(Outcome.RELEASED, held[:1], delays=[5])
    assert await got(two) == ""  # the whole key waits
    lab.clock.move(5)
    [again] = await two.receive(9, 0)
    assert again.message.id == "x1"
    await two.settle(Outcome.ACCEPTED, [again])
    assert await got(one) == "x2"


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["accept", "release", "delay", "expire"])), max_size=40),
)
def test_order_by_key_whatever_consumers_do(keys: list[str], steps: list[tuple[int, str]]) -> None:
    """Each key is accepted in the order of sending and never out twice, over competing consumers."""

    async def run() -> None:
        lab = await Lab().start()
        consumers = [await lab.subscribe(ORDERED) for _ in range(2)]
        for i, key in enumerate(keys):
            await lab.send(ORDERED, f"{i}", key=key)
        accepted: dict[str, list[int]] = {}
        out: list[tuple[MemorySubscription, Delivery[Any]]] = []
        for n, (who, what) in enumerate(steps + [(0, "accept"), (1, "accept")] * len(keys)):
            out += [(consumers[who], d) for d in await consumers[who].receive(n % 3 + 1, 0)]
            out = [(s, d) for s, d in out if not d.lost]
            busy = [d.message.key for _, d in out]
            assert len(busy) == len(set(busy))
            if not out:
                lab.clock.move(3)
                continue
            subscription, delivery = out[n % len(out)]
            if what == "expire":
                lab.clock.move(30)
                continue
            out.remove((subscription, delivery))
            if what == "accept":
                await subscription.settle(Outcome.ACCEPTED, [delivery])
                accepted.setdefault(str(delivery.message.key), []).append(int(delivery.message.id))
            else:
                await subscription.settle(Outcome.RELEASED, [delivery], delays=[3] if what == "delay" else ())
        for key, numbers in accepted.items():
            assert numbers == [i for i, k in enumerate(keys) if k == key][: len(numbers)]

    asyncio.run(run())


@pytest.mark.parametrize(("queue", "done"), [(ORDERS, "2"), (ORDERED, "2")])
async def test_a_move_is_all_or_nothing(lab: Lab, queue: Queue[Any], done: str) -> None:
    subscription, target = await lab.subscribe(queue), await lab.subscribe(DONE)
    await lab.send(queue, "1", "2", key="k")
    [first] = await subscription.receive(1, 0)
    good, bad = Outgoing(DONE, Message(b"", "copy")), Outgoing(Queue("absent"), Message(b"", "x"))
    [error] = await subscription.move([Move(first, [good, bad])], 5)
    assert isinstance(error, NotFound)
    assert await got(target) == ""
    assert await subscription.move([Move(first, [good, Outgoing(LONELY, Message(b"", "x"))])], 5) == [None]
    assert await got(target) == "copy"
    assert await got(subscription) == done
    assert isinstance((await subscription.settle(Outcome.ACCEPTED, [first]))[0], LeaseLost)


async def test_browsing_settles_nothing(lab: Lab) -> None:
    await lab.send(URGENT, "1", "2", "3", priority=1)
    await lab.send(URGENT, "first", priority=2)
    browser = await lab.subscribe(URGENT, browse=True)
    seen = await browser.receive(2, 0)
    assert ids(seen) == "1 2"
    assert seen[0].deliveries == 0
    assert isinstance((await browser.settle(Outcome.ACCEPTED, seen))[0], LeaseLost)
    assert (await got(browser), await got(browser)) == ("3 first", "")
    await lab.send(URGENT, "4")
    assert await got(browser) == "4"
    assert lab.broker.ready() == 0  # nobody consumes
    consumer = await lab.subscribe(URGENT)
    assert lab.broker.ready() == 5
    assert [d.deliveries for d in await consumer.receive(9, 0)] == [1] * 5


@pytest.mark.parametrize("queue", [ORDERS, ORDERED, URGENT])
async def test_the_backlog_is_exact(lab: Lab, queue: Queue[Any]) -> None:
    empty = await lab.adapter.backlog(queue)
    assert (empty.ready, empty.in_flight, empty.oldest, empty.exact) == (0, 0, None, True)
    await lab.send(queue, "1", "2")
    lab.clock.move(3)
    await lab.send(queue, "3")
    await lab.send(queue, "delayed", wait=60)
    lab.clock.move(2)
    full = await lab.adapter.backlog(queue)
    assert (full.ready, full.in_flight, full.oldest) == (3, 0, 5)
    subscription = await lab.subscribe(queue)
    await subscription.receive(2, 0)
    rest = await lab.adapter.backlog(queue)
    assert (rest.ready, rest.in_flight, rest.oldest) == (1, 2, 2)


@pytest.mark.parametrize(
    ("to", "error", "text"),
    [
        (Queue("absent"), NotFound, "queue 'absent' does not exist"),
        (Topic("absent"), NotFound, "topic 'absent' does not exist"),
        (Group(EVENTS, "absent"), NotFound, "group 'absent' of topic 'events' does not exist"),
        (LONELY, Unroutable, "topic 'lonely' has no group"),
        (Inbox("inbox.gone"), Unroutable, "inbox 'inbox.gone' is gone"),
    ],
)
async def test_a_bad_destination_fails_its_own_message_only(lab: Lab, to: Address, error: type, text: str) -> None:
    batch = [Outgoing(a, Message(b"", "m")) for a in (ORDERS, to, ORDERS)]
    first, second, third = await lab.adapter.send(batch, 5)
    assert (first, third) == (None, None)
    assert isinstance(second, error)
    assert text in str(second)


async def test_max_body_is_per_message() -> None:
    lab = await Lab(max_body="3").start()
    assert lab.adapter.capabilities.max_body == 3
    results = await lab.send(ORDERS, "123", "1234")
    assert results[0] is None
    assert isinstance(results[1], MessageTooLarge)
    subscription = await lab.subscribe(ORDERS)
    [held] = await subscription.receive(9, 0)
    [error] = await subscription.move([Move(held, [Outgoing(DONE, Message(b"1234"))])], 5)
    assert isinstance(error, MessageTooLarge)


async def test_an_inbox_lives_as_long_as_its_subscription(lab: Lab) -> None:
    inbox = await lab.subscribe(Inbox("shop.1"))
    address = lab.adapter.reply_to(inbox.address.name)
    assert address == inbox.address == Inbox("inbox.shop.1")
    assert await lab.send(address, "reply") == [None]
    assert await got(inbox) == "reply"
    await inbox.close()
    assert isinstance((await lab.send(address, "late"))[0], Unroutable)


@pytest.mark.parametrize("text", ["orders", "", "inbox.", "inbox.a b", "inbox.a\n", "INBOX.a", "inbox." + "x" * 201])
async def test_an_untrusted_reply_address_can_only_be_an_inbox(lab: Lab, text: str) -> None:
    with pytest.raises(Refused):
        lab.adapter.reply_to(text)


async def test_verify_lists_all_that_is_missing_and_makes_nothing(lab: Lab) -> None:
    x, t = Queue[bytes]("x"), Topic[bytes]("t")
    topology = declared(ORDERS, x, t, Group(t, "g"), Group(EVENTS, "new"), mode="verify")
    with pytest.raises(NotFound, match=r"queue 'x', topic 't', group 'g' of topic 't', group 'new' of topic 'events'"):
        await lab.adapter.declare(topology)
    assert isinstance((await lab.send(x, "1"))[0], NotFound)
    await lab.adapter.declare(declared(*ALL, mode="verify"))


async def test_assume_believes_and_finds_what_another_makes_later(lab: Lab) -> None:
    x = Queue[bytes]("x")
    await lab.adapter.declare(declared(x, mode="assume"))
    assert isinstance((await lab.send(x, "1"))[0], NotFound)
    with pytest.raises(NotFound, match="queue 'x'"):
        await lab.subscribe(x)
    await lab.adapter.declare(declared(x))
    assert await lab.send(x, "1") == [None]


DECLARE_ERRORS: list[tuple[Callable[[], Declared], type, str]] = [
    (lambda: Declared(Queue("orders", ordered=True), "orders"), Refused, "ordered=False.* not True"),
    (lambda: Declared(Queue("urgent"), "urgent"), Refused, "priorities=3.* not 0"),
    (lambda: Declared(Queue("q"), "events"), Refused, "'events' is a topic"),
    (lambda: Declared(Group(EVENTS, "old"), "old", start="all"), Unsupported, "no history"),
    (lambda: Declared(Queue("q"), "q", options={"quorum": 1}), Exception, "no setting 'quorum'"),
    (lambda: Declared(Group(Topic("t"), "g"), "g"), Exception, "declare topic 't' before its groups"),
]


@pytest.mark.parametrize(("make", "error", "text"), DECLARE_ERRORS)
async def test_declare_refuses(lab: Lab, make: Callable[[], Declared], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        await lab.adapter.declare(Topology(channels=(make(),)))


async def test_replay_is_refused(lab: Lab) -> None:
    assert not lab.adapter.capabilities.replay
    with pytest.raises(Unsupported, match="no history"):
        await lab.subscribe(A, start="all")
