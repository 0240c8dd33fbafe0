"""The in-memory broker as a stage for faults: links, crashes, deletions, refusals; shared brokers and settings."""

import asyncio
from typing import Any

import pytest
from tests.unit.memory_lab import ALL, DONE, EVENTS, ORDERED, ORDERS, Lab, declared, got, ids

from unibus.adapter import Endpoint, Outcome, Source, Url
from unibus.channel import Group, Inbox, Queue
from unibus.clock import SystemClock, VirtualClock
from unibus.errors import ConfigError, ConnectionLost, LeaseLost, NotFound, Throttled, Unroutable
from unibus.memory import MemoryAdapter


@pytest.fixture
async def lab() -> Lab:
    return await Lab().start()


async def test_a_cut_breaks_everything_until_connected_again(lab: Lab) -> None:
    lost: list[Any] = []

    async def losing(deliveries: Any, grace: float) -> None:
        lost.extend(deliveries)

    subscription = await lab.subscribe(ORDERS, losing=losing)
    inbox = await lab.subscribe(Inbox("me"))
    await lab.send(ORDERS, "1")
    held = await subscription.receive(9, 0)
    waiting = asyncio.ensure_future(subscription.receive(9, 60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lab.broker.cut()
    for call in (
        waiting,
        subscription.receive(1, 0),
        subscription.settle(Outcome.ACCEPTED, held),
        subscription.extend(held, 9),
        subscription.move([], 5),
        inbox.receive(1, 0),
        lab.send(ORDERS, "2"),
        lab.adapter.subscribe(Source(ORDERS)),
        lab.adapter.backlog(ORDERS),
        lab.adapter.declare(declared(ORDERS)),
    ):
        with pytest.raises(ConnectionLost, match="cut"):
            await call
    assert (held[0].lost, lost) == (True, list(held))
    assert await subscription.check() == "gone"
    assert not (await lab.adapter.check()).up
    await lab.adapter.connect()
    assert (await lab.adapter.check()).up
    [again] = await (await lab.subscribe(ORDERS)).receive(9, 0)
    assert (again.message.id, again.deliveries) == ("1", 2)
    assert isinstance((await lab.send(Inbox("inbox.me"), "reply"))[0], Unroutable)


async def test_while_down_nobody_connects(lab: Lab) -> None:
    lab.broker.cut(down=True)
    with pytest.raises(ConnectionLost, match="down"):
        await lab.adapter.connect()
    lab.broker.down = False
    await lab.adapter.connect()


@pytest.mark.parametrize("queue", [ORDERS, ORDERED])
async def test_what_a_killed_consumer_held_comes_back_when_its_lease_ends(lab: Lab, queue: Queue[Any]) -> None:
    victim, survivor = await lab.subscribe(queue), await lab.subscribe(queue)
    await lab.send(queue, "1", "2", key="k")
    [held] = await victim.receive(1, 0)
    lab.broker.kill(victim)
    assert lab.broker.subscriptions == [survivor]
    assert lab.broker.in_flight() == 0
    assert (await lab.adapter.backlog(queue)).in_flight == 1
    with pytest.raises(ConnectionLost, match="killed"):
        await victim.receive(1, 0)
    assert await got(survivor) == ("2" if queue is ORDERS else "")
    lab.clock.move(30)
    back = await survivor.receive(1, 0)
    assert (ids(back), back[0].deliveries, held.lost) == ("1", 2, True)
    assert (await lab.adapter.backlog(queue)).in_flight == 1  # the survivor's lease on 2 has ended too


async def test_a_killed_consumer_takes_its_ephemeral_group_along(lab: Lab) -> None:
    group = Group(EVENTS, "mine", ephemeral=True)
    subscription = await lab.subscribe(group)
    await lab.send(EVENTS, "1", "2")
    await subscription.receive(1, 0)
    lab.broker.kill(subscription)
    with pytest.raises(NotFound):
        await lab.adapter.backlog(group)
    assert not lab.broker._holders


async def test_stop_takes_no_more_and_still_settles_close_gives_back_uncounted(lab: Lab) -> None:
    subscription, other = await lab.subscribe(ORDERS), await lab.subscribe(ORDERS)
    await lab.send(ORDERS, "1", "2", "3")
    held = await subscription.receive(2, 0)
    waiting = asyncio.ensure_future((await lab.subscribe(DONE)).receive(1, 60))
    await asyncio.sleep(0)
    await subscription.stop()
    assert await got(subscription) == ""
    assert await subscription.extend(held, 60) == [None, None]
    assert await subscription.settle(Outcome.ACCEPTED, held[:1]) == [None]
    await subscription.close()
    await subscription.close()
    back = await other.receive(9, 0)
    assert (ids(back), [d.deliveries for d in back]) == ("2 3", [1, 1])
    assert held[1].lost
    await lab.adapter.close()
    with pytest.raises(ConnectionLost, match="closed"):
        await waiting


async def test_stop_ends_a_waiting_receive(lab: Lab) -> None:
    subscription = await lab.subscribe(ORDERS)
    waiting = asyncio.ensure_future(subscription.receive(1, 60))
    for _ in range(3):
        await asyncio.sleep(0)
    await subscription.stop()
    assert await waiting == ()


async def test_messages_outlive_close_and_connect_of_their_adapter(lab: Lab) -> None:
    await lab.send(ORDERS, "1")
    await lab.send(ORDERS, "later", wait=5)
    await lab.adapter.close()
    await lab.adapter.close()
    with pytest.raises(ConnectionLost, match="closed"):
        await lab.send(ORDERS, "2")
    lab.clock.move(5)
    await lab.adapter.connect()
    assert await got(await lab.subscribe(ORDERS)) == "1 later"


async def test_a_deleted_queue_is_not_found_and_can_be_declared_again(lab: Lab) -> None:
    subscription = await lab.subscribe(ORDERS)
    await lab.send(ORDERS, "1")
    await lab.send(ORDERS, "2", wait=5)
    held = await subscription.receive(9, 0)
    lab.broker.delete(ORDERS)
    assert await subscription.check() == "gone"
    with pytest.raises(NotFound, match="queue 'orders' was deleted"):
        await subscription.receive(1, 0)
    assert isinstance((await subscription.settle(Outcome.ACCEPTED, held))[0], LeaseLost)
    assert isinstance((await lab.send(ORDERS, "3"))[0], NotFound)
    await subscription.close()
    await lab.adapter.declare(declared(*ALL))
    lab.clock.move(5)
    await lab.send(ORDERS, "4")
    assert await got(await lab.subscribe(ORDERS)) == "4"


async def test_refusals_count_messages(lab: Lab) -> None:
    busy = Throttled("busy")
    lab.broker.refuse(ORDERS, busy, times=2)
    assert await lab.send(ORDERS, "1", "2", "3") == [busy, busy, None]
    lab.broker.refuse(ORDERS, busy)
    assert await lab.send(ORDERS, "4", "5") == [busy, busy]
    assert await lab.send(DONE, "6") == [None]
    lab.broker.refuse(ORDERS, None)
    assert await lab.send(ORDERS, "7") == [None]
    assert await got(await lab.subscribe(ORDERS)) == "3 7"


async def test_the_recorder_sees_what_the_broker_took(lab: Lab) -> None:
    taken: list[str] = []
    lab.broker.on_send = lambda outgoing: taken.append(f"{outgoing.to} {outgoing.message.id}")
    await lab.send(ORDERS, "1")
    await lab.send(Queue("absent"), "2")
    await lab.send(Inbox("inbox.gone"), "3")
    await lab.send(EVENTS, "4", wait=5)
    assert taken == ["queue 'orders' 1", "topic 'events' 4"]


def adapter(clock: Any, *hosts: Any, path: str = "", prefix: str = "", **settings: Any) -> MemoryAdapter:
    return MemoryAdapter(Endpoint(Url("memory", hosts, path), "s", "i", clock, prefix, settings))


async def test_brokers_are_private_or_shared_by_name_and_clock() -> None:
    clock = VirtualClock()
    named = adapter(clock, ("n", None))
    assert adapter(clock, path="n").broker is named.broker is named.native
    others = [adapter(clock), adapter(clock), adapter(clock, ("m", None)), adapter(VirtualClock(), ("n", None))]
    assert len({id(a.broker) for a in [named, *others]}) == 5
    assert adapter(SystemClock(), ("n", None)).broker is adapter(SystemClock(), ("n", None)).broker


async def test_two_clients_of_one_broker() -> None:
    clock = VirtualClock()
    one, two, apart = adapter(clock, ("s", None)), adapter(clock, ("s", None)), adapter(clock, ("s", None), prefix="x.")
    for client in (one, two, apart):
        await client.connect()
    await one.declare(declared(ORDERS))
    await two.declare(declared(ORDERS, mode="verify"))
    subscription = await two.subscribe(Source(ORDERS))
    inbox = await apart.subscribe(Source(Inbox("r")))
    assert inbox.address == Inbox("inbox.x.r")
    lab = Lab()
    lab.adapter = one
    assert await lab.send(ORDERS, "1") == await lab.send(one.reply_to("inbox.x.r"), "2") == [None]
    assert (await got(subscription), await got(inbox)) == ("1", "2")
    await one.close()
    assert await (await two.subscribe(Source(ORDERS))).check() == "consuming"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"leese": 1}, "memory.leese: .* did you mean 'lease'"),
        ({"profile": "sqs"}, r"memory.profile: .* it stands in the URL: memory://\?profile="),
        ({"lease": 0}, "memory.lease = 0: use a number above 0"),
        ({"lease": "soon"}, "memory.lease = 'soon'"),
        ({"max_body": True}, "memory.max_body = True"),
        ({"max_body": "nan"}, "memory.max_body = 'nan'"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adapter(VirtualClock(), **settings)


@pytest.mark.parametrize(
    "url",
    [
        Url("memory", (("a", None), ("b", None))),
        Url("memory", (("a", 1),)),
        Url("memory", (("a", None),), "b"),
    ],
)
def test_a_url_is_a_name_and_no_more(url: Url) -> None:
    with pytest.raises(ConfigError, match=r"use memory:// or memory://name"):
        MemoryAdapter(Endpoint(url, "s", "i", VirtualClock()))


def test_a_named_broker_outlives_an_event_loop() -> None:
    """The timer of a loop that is closed must not be waited for."""

    async def send() -> None:
        client = adapter(SystemClock(), ("loops", None), lease=0.05)
        await client.connect()
        await client.declare(declared(ORDERS))
        subscription = await client.subscribe(Source(ORDERS))
        lab = Lab()
        lab.adapter = client
        await lab.send(ORDERS, "1")
        assert await got(subscription) == "1"
        client.broker.kill(subscription)

    async def receive() -> None:
        client = adapter(SystemClock(), ("loops", None))
        await client.connect()
        await client.declare(declared(ORDERS))
        assert ids(await (await client.subscribe(Source(ORDERS))).receive(1, 10)) == "1"

    asyncio.run(send())
    asyncio.run(receive())
