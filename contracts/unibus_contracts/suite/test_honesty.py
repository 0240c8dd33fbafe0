"""Honesty: what an adapter declares is what it does, what it can't do is refused at start, and nothing is half done."""

from __future__ import annotations

import pytest

from unibus import Bus, ConfigError, DeadLetter, Delivery, Discard, NotFound, Queue, RetryPolicy
from unibus.tooling import attached, topology_of
from unibus_contracts.contract import contract
from unibus_contracts.kit import Kit, Seen, bodies, leftover, until
from unibus_contracts.refusals import REFUSALS, refused_at_start


@contract(
    "cap.undeclared_is_refused", "Every feature that is declared refused is refused, at start, and nothing is lost."
)
async def test_undeclared(kit: Kit) -> None:
    features = (await kit.capabilities()).features()
    for name, refusal in REFUSALS.items():
        if not features[name]:
            await refusal(kit)


@contract("cap.every_level_is_explained", "Each feature has a level, and says how it is emulated or why it is refused.")
async def test_explained(kit: Kit) -> None:
    capabilities = await kit.capabilities()
    assert capabilities.adapter
    for name, support in capabilities.features().items():
        assert support.level in ("native", "emulated", "refused"), name
        assert support.level == "native" or support.how, f"{name} is {support.level}, and nothing says how or why"


@contract(
    "cap.refusal_leaves_messages", "A service that is refused at start takes no message and leaves all in their queue."
)
async def test_leaves_messages(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as sender:
        await sender.send_many(queue, [b"1", b"2"])
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    @bus.consumer(kit.queue())
    async def wrong(body: bytes, unresolvable: int) -> None: ...

    with pytest.raises(ConfigError, match="unresolvable"):
        async with bus.running():
            pass
    async with kit.bus(queue) as reader:
        assert bodies(await leftover(reader, queue)) == [b"1", b"2"]
    assert seen.all == []


@contract("cap.longest_delay_is_true", "A retry that waits longer than the adapter can delay is refused at start.")
async def test_longest_delay(kit: Kit) -> None:
    capabilities = await kit.capabilities()
    bus = waiting(kit, kit.queue(), (capabilities.delay.limit or 86400.0) + 60)
    if not capabilities.delay or capabilities.delay.limit is not None:
        await refused_at_start(bus)
    else:
        async with bus:
            pass


@contract(
    "cap.longest_park_is_true", "A retry in place that waits longer than a message may be held is refused at start."
)
async def test_longest_park(kit: Kit) -> None:
    capabilities = await kit.capabilities()
    bus = waiting(kit, kit.queue(ordered=True), (capabilities.park_limit or 86400.0) + 60)
    if not capabilities.order or capabilities.park_limit is not None:
        await refused_at_start(bus)
    else:
        async with bus:
            pass


def waiting(kit: Kit, queue: Queue[bytes], seconds: float) -> Bus:
    bus = kit.bus()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=1, backoff=seconds, max_backoff=seconds))
    async def handle(body: bytes) -> None: ...

    return bus


@contract("cap.jitter_fits_the_delays", "Jitter is refused where delays come in steps, and taken where they don't.")
async def test_jitter(kit: Kit) -> None:
    capabilities = await kit.capabilities()
    bus = kit.bus()

    @bus.consumer(kit.queue(), retry=RetryPolicy(max_retries=1, backoff=1, jitter=0.5))
    async def handle(body: bytes) -> None: ...

    if capabilities.delay_steps or not capabilities.delay:
        await refused_at_start(bus)
    else:
        async with bus:
            pass


@contract(
    "declare.verify_tells_all_missing", "verify raises one NotFound that names every missing channel, and makes none."
)
async def test_verify(kit: Kit) -> None:
    one, two, topic, there = kit.queue(), kit.queue(), kit.topic(), kit.queue()
    async with kit.bus(there):
        pass
    for _ in range(2):  # the second time shows that the first one made nothing
        with pytest.raises(NotFound) as caught:
            async with kit.bus(one, two, (topic, "g"), there, declare="verify"):
                pass
        assert all(name in str(caught.value) for name in (one.name, two.name, topic.name))
        assert there.name not in str(caught.value)


@contract("declare.verify_accepts_what_is_there", "verify opens a bus whose channels all exist, and it works.")
async def test_verify_present(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    async with kit.bus(queue, (topic, "g")):
        pass
    async with kit.bus(queue, (topic, "g"), declare="verify") as bus:
        await bus.send(queue, b"x")
        await bus.publish(topic, b"y")
        assert bodies(await leftover(bus, queue)) == [b"x"]
        assert bodies(await leftover(bus, (topic, "g"))) == [b"y"]


@contract("declare.again_keeps_everything", "Declaring what exists changes nothing: messages and groups stay.")
async def test_again(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    async with kit.bus(queue, (topic, "g")) as bus:
        await bus.send(queue, b"x")
        await bus.publish(topic, b"y")
    for _ in range(3):
        async with kit.bus(queue, (topic, "g")):
            pass
    async with kit.bus(queue, (topic, "g")) as bus:
        assert bodies(await leftover(bus, queue)) == [b"x"]
        assert bodies(await leftover(bus, (topic, "g"))) == [b"y"]


@contract(
    "declare.policy_may_change", "A consumer may come back with another retry policy; its queue and messages stay."
)
async def test_policy(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as sender:
        await sender.send(queue, b"x")
    for policy in (RetryPolicy(max_retries=0), RetryPolicy(max_retries=9, backoff=1, multiplier=1, max_backoff=1)):
        bus = kit.bus()

        @bus.consumer(queue, retry=policy, prefetch=7)
        async def handle(body: bytes) -> None: ...

        async with bus:
            pass
    async with kit.bus(queue) as reader:
        assert bodies(await leftover(reader, queue)) == [b"x"]


@contract(
    "declare.assume_makes_nothing", "Under assume the bus opens without asking, and works where the channels exist."
)
async def test_assume(kit: Kit) -> None:
    there, missing = kit.queue(), kit.queue()
    async with kit.bus(there):
        pass
    async with kit.bus(there, missing, declare="assume") as bus:
        await bus.send(there, b"x")
        assert bodies(await leftover(bus, there)) == [b"x"]
    with pytest.raises(NotFound, match=missing.name):
        async with kit.bus(missing, declare="verify"):
            pass


@contract("obs.counts_equal_what_happened", "Sent, handled, retried, dead-lettered and discarded are counted exactly.")
async def test_counts(kit: Kit) -> None:
    queue = kit.queue()
    bus = kit.bus()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=1, backoff=0))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        if body == b"discard":
            raise Discard("x")
        if body == b"dead":
            raise DeadLetter("x")
        if body == b"fails" or (body == b"again" and delivery.attempt == 1):
            raise OSError("x")

    async with bus.running():
        await bus.send_many(queue, [b"good"] * 5 + [b"discard"] * 2 + [b"dead"] * 3 + [b"fails"] * 2 + [b"again"] * 4)
        expected = {"handled": 9, "discarded": 2, "dead_lettered": 5, "retried": 6}
        await until(lambda: all(bus.counts.get(event, 0) >= n for event, n in expected.items()), f"{expected}")
        counts = bus.counts
        assert {event: counts[event] for event in expected} == expected
        assert counts["received"] == 16
        assert bus.counts_of(queue)["sent"] == 16


@contract("obs.health_is_ok", "An open bus says that it is well, and a closed one that it is not.")
async def test_health(kit: Kit) -> None:
    queue = kit.queue()
    bus = kit.bus()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None: ...

    assert (await bus.health()).status == "down"
    async with bus.running():
        assert (await bus.health()).status == "ok"
        assert (await bus.adapter.check()).up
    assert (await bus.health()).status == "down"


@contract(
    "cap.inspect_tells_what_is_there",
    "What a service needs on the broker, and whether it is there, can be seen without making any of it.",
)
async def test_inspect(kit: Kit) -> None:
    queue, topic, group = kit.queue(), kit.topic(), "g"
    async with kit.bus(queue, (topic, group)) as there:
        known = kit.bus(queue, (topic, group), kit.queue(label="new"))
        topology = topology_of(there)
        found = await there.adapter.inspect(topology)
        made = [one for one in found if one.rights]
        assert made, "nothing is declared"
        assert all(one.exists is not False for one in made), "what was declared is not seen"
        assert any(one.exists for one in made), "nothing is seen"
        addresses = {one.address for one in made}
        assert {d.address for d in topology.channels} <= addresses, "objects without their channel"
        for _ in range(2):  # the second look would see what the first one has made
            async with attached(known) as tool:
                seen = await tool.adapter.inspect(topology_of(tool))
                missing = {one.address for one in seen if one.exists is False}
                new = {d.address for d in topology_of(tool).channels} - addresses
                assert missing == new, "not exactly what is new is missing"
                for address in new:
                    if isinstance(address, Queue):
                        with pytest.raises(NotFound):
                            await tool.adapter.backlog(address)
