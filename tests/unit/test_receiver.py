"""Receiving by hand."""

import asyncio

import pytest
from tests.unit.core_lab import DONE, EVENTS, ORDERED, ORDERS, lab, later, make_bus, spy_of, turns

from unibus import AuthenticationFailed, Closed, LeaseLost, Message, NotFound, Queue


async def test_each_delivery_is_acked_at_the_end_and_a_failure_goes_to_the_policy() -> None:
    bus = make_bus()
    async with lab(bus) as it, bus.receiver(ORDERS) as receiver:
        await bus.send_many(ORDERS, ["good", "bad", "last"])
        seen: list[str] = []
        async for delivery in receiver:
            async with delivery:
                seen.append(f"{delivery.body}{delivery.attempt}")
                if delivery.body == "bad" and delivery.attempt == 1:
                    raise ValueError("once")
            if delivery.body == "last":
                break
        await later(it, 1)
        async for delivery in receiver:
            async with delivery:
                seen.append(f"{delivery.body}{delivery.attempt}")
            break
        assert seen == ["good1", "bad1", "last1", "bad2"]
        assert (await bus.backlog(ORDERS)).ready == 0
        assert it.broker.in_flight() == 0


async def test_a_retry_at_once_inside_the_context_is_not_acked_at_its_end() -> None:
    bus = make_bus()
    async with lab(bus) as it, bus.receiver(ORDERED) as receiver:
        await bus.send(ORDERED, "x", key="k")
        for attempt in (1, 2):
            delivery = await receiver.receive(1)
            assert delivery is not None
            assert delivery.attempt == attempt
            async with delivery:
                if attempt == 1:
                    await delivery.retry(delay=0)
        assert it.broker.in_flight() == 0


async def test_a_retry_by_hand_inside_the_context_is_not_acked_at_its_end() -> None:
    bus = make_bus()
    async with lab(bus) as it, bus.receiver(ORDERED) as receiver:
        await bus.send(ORDERED, "x", key="k")
        delivery = await receiver.receive(1)
        assert delivery is not None
        async with delivery:
            await delivery.retry(delay=5)
        await later(it, 4)
        nothing = asyncio.ensure_future(receiver.receive(0))
        await later(it, 0)
        assert await nothing is None
        await later(it, 1)
        again = await receiver.receive(1)
        assert again is not None
        assert again.attempt == 2
        await again.ack()
        assert it.broker.in_flight() == 0


async def test_nothing_in_time_is_none_and_leaves_nothing_behind() -> None:
    bus = make_bus()
    async with lab(bus) as it, bus.receiver(ORDERS) as receiver:
        for _ in range(5):
            call = asyncio.ensure_future(receiver.receive(2))
            await later(it, 2)
            assert await call is None
        assert receiver._intake is not None
        assert not receiver._intake.lanes._takers
        await bus.send(ORDERS, "x")
        got = await receiver.receive(1)
        assert got is not None
        await got.ack()


async def test_what_was_not_settled_goes_back_uncounted() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        async with bus.receiver(ORDERS) as receiver:
            await bus.send_many(ORDERS, ["1", "2"])
            kept = await receiver.receive(1)
            assert kept is not None
        assert [m.body for m in it.broker.waiting(ORDERS)] == [b"1", b"2"]
        with pytest.raises(LeaseLost):
            await kept.ack()
        async with bus.receiver(ORDERS) as receiver:
            again = await receiver.receive(1)
            assert again is not None
            assert (again.attempt, again.deliveries) == (1, 1)


async def test_the_undecodable_is_not_shown() -> None:
    bus = make_bus()
    numbers = Queue[int]("numbers", int)
    bus.channels.append(numbers)
    async with lab(bus) as it, bus.receiver(numbers) as receiver:
        await bus.send(numbers, Message(b"{"))
        await bus.send(numbers, 2)
        got = await receiver.receive(1)
        assert got is not None
        assert got.body == 2
        await turns()
        assert len(it.invalid(numbers)) == 1


async def test_a_group_of_a_topic_that_is_not_there_is_an_error_and_no_hang() -> None:
    bus = make_bus()
    async with lab(bus):
        with pytest.raises(NotFound, match="nosuch"):
            async with bus.receiver(EVENTS, group="nosuch"):
                pass


async def test_who_waits_is_told_of_the_end() -> None:
    bus = make_bus()
    async with lab(bus):
        receiver = bus.receiver(ORDERS)
        async with receiver:
            waiting = asyncio.ensure_future(receiver.receive())
            await turns()
        with pytest.raises(Closed):
            await waiting
        with pytest.raises(Closed):
            await receiver.receive()
        async with bus.receiver(DONE) as other:

            async def iterate() -> int:
                return len([d async for d in other])

            iterating = asyncio.ensure_future(iterate())
            await turns()
            await bus.close()
            assert await iterating == 0


async def test_who_waits_is_told_what_ended_the_link() -> None:
    bus = make_bus()
    async with lab(bus) as it, bus.receiver(ORDERS) as receiver:
        waiting = asyncio.ensure_future(receiver.receive())
        await turns()
        spy_of(bus).always["connect"] = AuthenticationFailed("password changed")
        it.broker.cut()
        with pytest.raises(AuthenticationFailed):
            await waiting


async def test_a_cancelled_block_gives_its_delivery_back() -> None:
    bus = make_bus()
    async with lab(bus) as it, bus.receiver(ORDERS) as receiver:
        await bus.send(ORDERS, "x")

        async def work() -> None:
            delivery = await receiver.receive()
            assert delivery is not None
            async with delivery:
                await asyncio.Event().wait()

        task = asyncio.ensure_future(work())
        await turns()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        again = await receiver.receive(1)
        assert again is not None
        assert again.attempt == 1
        await again.ack()
        assert it.broker.in_flight() == 0
