"""The bus: open and closed, running, signals, lifespan, handlers of other modules, several types on one channel."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from tests.unit.core_lab import DONE, EVENTS, ORDERS, Spy, lab, make_bus, spy_of, spying, tidy, turns, until

from unibus import AuthenticationFailed, Bus, Closed, ConfigError, Handlers, Queue, Timeout
from unibus.adapter import Source
from unibus.memory_subscription import MemorySubscription


def test_making_a_bus_does_nothing() -> None:
    for url in ("nonsense", "nosuch://host", "memory://u:p@x:1/y"):
        assert repr(Bus(url)) == "<Bus closed>"


async def test_an_open_bus_sends_and_runs_no_handler() -> None:
    bus = make_bus()
    runs: list[str] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        runs.append(body)

    async with tidy(), bus:
        await bus.send(ORDERS, "x")
        await turns(50)
        assert runs == []
        assert (await bus.backlog(ORDERS)).ready == 1
        assert (await bus.health()).status == "ok"
        async with bus.running():  # nests
            await until(lambda: runs == ["x"])
            with pytest.raises(ConfigError, match="runs already"):
                async with bus.running():
                    pass
        await bus.send(ORDERS, "y")
        await turns(50)
        assert runs == ["x"]
    assert (await bus.health()).status == "down"
    await bus.close()  # once more does no harm


async def test_a_bus_can_be_opened_again() -> None:
    bus = make_bus()
    for _ in range(2):
        async with tidy(), bus:
            await bus.send(ORDERS, "x")
    with pytest.raises(Closed):
        _ = bus.counts


async def test_opening_twice_is_refused() -> None:
    bus = make_bus()
    async with tidy(), bus:
        with pytest.raises(ConfigError, match="open already"):
            async with bus:
                pass
        await bus.send(ORDERS, "x")


async def test_the_value_of_the_lifespan_is_the_state() -> None:
    trace: list[str] = []

    @asynccontextmanager
    async def resources(bus: Bus) -> AsyncIterator[dict[str, int]]:
        await bus.send(DONE, "from the lifespan")  # the bus is open by then
        trace.append("up")
        yield {"n": 1}
        await bus.send(DONE, "and still")
        trace.append("down")

    bus = make_bus(lifespan=resources)

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        trace.append(f"handler {bus.state['n']}")

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await it.idle()
        broker = it.broker
    assert trace == ["up", "handler 1", "down"]
    assert bus.state is None
    assert len(broker.waiting(DONE)) == 2


@pytest.mark.parametrize("late", [False, True])
async def test_a_lifespan_that_fails_closes_the_bus(late: bool) -> None:
    @asynccontextmanager
    async def resources(bus: Bus) -> AsyncIterator[None]:
        if not late:
            raise RuntimeError("no database")
        yield
        raise RuntimeError("no database")

    bus = make_bus(lifespan=resources)
    async with tidy():
        with pytest.raises(RuntimeError, match="no database"):
            async with bus:
                assert late
    assert repr(bus) == "<Bus closed>"


async def test_handlers_of_another_module_and_functions_stay_callable() -> None:
    handlers = Handlers()

    @handlers.consumer(ORDERS)
    async def handle(body: str) -> None:
        seen.append(body)

    seen: list[str] = []
    await handle("by hand")
    bus = make_bus()
    bus.include(handlers)
    async with lab(bus) as it:
        await bus.send(ORDERS, "by bus")
        await it.idle()
    assert seen == ["by hand", "by bus"]


class Paid(BaseModel):
    kind: Literal["paid"] = "paid"
    amount: int


class Refunded(BaseModel):
    kind: Literal["refunded"] = "refunded"
    reason: str


async def test_several_types_on_one_channel() -> None:
    queue = Queue[Any]("money", Annotated[Paid | Refunded, Field(discriminator="kind")])
    bus = make_bus(channels=[queue])
    seen: list[object] = []

    @bus.consumer(queue, concurrency=1)
    async def handle(event: Paid | Refunded) -> None:
        seen.append(event)

    async with lab(bus) as it:
        await bus.send_many(queue, [Paid(amount=1), Refunded(reason="late")])
        await it.idle()
    assert seen == [Paid(amount=1), Refunded(reason="late")]


@dataclass
class Order:
    id: int


async def test_two_handlers_on_one_queue_are_refused_before_anything_is_opened() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def one(body: str) -> None: ...

    @bus.consumer(ORDERS)
    async def two(body: str) -> None: ...

    made: list[Spy] = []
    with spying(made):
        with pytest.raises(ConfigError, match=r"orders.*two handlers.*one.*two"):
            async with bus:
                pass
        assert all(not spy.calls for spy in made)


async def test_a_cancelled_running_drains_and_leaves_nothing() -> None:
    bus = make_bus()
    began = asyncio.Event()
    done: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        began.set()
        await go.wait()
        done.append(body)

    async def serve() -> None:
        async with bus.running():
            await bus.send(ORDERS, "x")
            await asyncio.Event().wait()

    async with tidy():
        task = asyncio.ensure_future(serve())
        await began.wait()
        task.cancel()
        await turns()
        assert not task.done()
        go.set()
        await asyncio.wait([task])
        assert task.cancelled()
    assert done == ["x"]


async def test_a_running_cancelled_twice_is_gone_at_once() -> None:
    bus = make_bus()
    began = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        began.set()
        await asyncio.Event().wait()

    async def serve() -> None:
        async with bus.running():
            await bus.send(ORDERS, "x")
            await asyncio.Event().wait()

    async with tidy():
        task = asyncio.ensure_future(serve())
        await began.wait()
        task.cancel()
        await turns()
        task.cancel()
        await asyncio.wait([task])
        await turns()
    assert repr(bus) == "<Bus closed>"


async def test_run_ends_with_stop() -> None:
    bus = make_bus()
    done: list[str] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        done.append(body)
        bus.stop()

    @asynccontextmanager
    async def first_message(bus: Bus) -> AsyncIterator[None]:
        await bus.send(ORDERS, "x")
        yield

    bus._lifespan = first_message
    async with tidy():
        await bus.run()
    assert done == ["x"]


async def test_run_ends_with_what_ended_the_link() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    with spying([]):
        async with tidy():
            run = asyncio.ensure_future(bus.run())
            await until(lambda: repr(bus) == "<Bus running>")
            spy_of(bus).always["connect"] = AuthenticationFailed("password changed")
            spy_of(bus).broker.cut()
            with pytest.raises(AuthenticationFailed, match="password changed"):
                await run


PROGRAM = """
import asyncio
from unibus import Bus, Queue
q = Queue("q", str)
bus = Bus("memory://", config=False, environ={}, service="s")

@bus.consumer(q)
async def handle(body: str) -> None:
    print("began", flush=True)
    await asyncio.sleep(0.05)
    print("done", flush=True)

async def main() -> None:
    async with bus:
        await bus.send(q, "x")
        await bus.run()
    print("closed", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_the_process(number: signal.Signals) -> None:
    process = subprocess.Popen(  # our own program
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "src"}
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        process.send_signal(number)
        assert process.stdout.read() == "done\nclosed\n"
        assert process.wait() == 0


async def test_a_start_that_hangs_is_broken_off_by_stop() -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(bus: Bus) -> AsyncIterator[None]:
        try:
            events.append("waits for a database")
            await asyncio.Event().wait()
            yield
        finally:
            events.append("cleaned up")

    bus = make_bus(lifespan=lifespan)
    running = asyncio.ensure_future(bus.run())
    await until(lambda: events, "it starts")
    bus.stop()
    await running
    assert events == ["waits for a database", "cleaned up"]
    assert repr(bus) == "<Bus closed>"


async def test_a_subscription_that_does_not_come_to_stand_does_not_keep_the_others_at_work() -> None:
    bus, handled = make_bus(), list[str]()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        handled.append(body)

    @bus.consumer(DONE)
    async def other(body: str) -> None: ...

    made: list[Spy] = []
    with spying(made):
        async with tidy():
            running = asyncio.ensure_future(bus.run())
            await until(lambda: made, "the adapter is made")
            subscribe = made[0].subscribe

            async def refuse(source: Source) -> MemorySubscription:
                if source.address == DONE:
                    raise Timeout("not now")
                return await subscribe(source)

            made[0].subscribe = refuse  # type: ignore[method-assign]  # of this one
            await until(lambda: bus._session is not None and bus._session.intakes, "the handlers begin")
            await bus.send(ORDERS, "x")
            await until(lambda: handled, "one of them is at work")
            bus.stop()
            await running
    assert handled == ["x"]
    assert repr(bus) == "<Bus closed>"


async def test_who_cancels_a_run_while_it_stops_sees_it_cancelled() -> None:
    bus = make_bus(lifespan=hanging)
    running = asyncio.ensure_future(bus.run())
    await until(lambda: bus._session is not None, "it starts")
    bus.stop()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await bus.close()


@asynccontextmanager
async def hanging(_: Bus) -> AsyncIterator[None]:
    await asyncio.Event().wait()
    yield


async def test_counts_and_names() -> None:
    bus = make_bus(name="analytics")
    assert repr(bus) == "<Bus analytics closed>"

    @bus.subscriber(EVENTS, group="g")
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        await bus.publish(EVENTS, "x")
        await it.idle()
        assert bus.counts_of(EVENTS) == {"sent": 1}
        assert bus.counts_of(EVENTS, group="g")["handled"] == 1
        assert bus.capabilities.adapter == "memory"
