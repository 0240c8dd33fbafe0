"""Sending from synchronous code."""

import asyncio
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from tests.unit.core_lab import ASKS, DONE, EVENTS, ORDERS, lab, make_bus, tidy, until

from unibus import Closed, CodecError, ConfigError, RemoteError, SendFailed


async def in_thread(function: Any) -> Any:
    return await asyncio.to_thread(function)


def test_a_program_without_a_loop_opens_the_bus_for_itself() -> None:
    bus = make_bus(url="memory://blocking")
    with bus.blocking() as sender:
        first = sender.send(ORDERS, "1")
        more = sender.send_many(ORDERS, ["2", "3"])
        sender.publish(EVENTS, "e")
        sender.publish_many(EVENTS, ["f"])
        assert len({first, *more}) == 3
        assert len([m.body for m in _broker(bus).waiting(ORDERS)]) == 3
    assert repr(bus) == "<Bus closed>"
    assert not [t for t in threading.enumerate() if t.name == "unibus blocking"]


def _broker(bus: Any) -> Any:
    return bus.native


def test_errors_come_through() -> None:
    bus = make_bus()
    wrong: Any = 5
    with bus.blocking() as sender:
        with pytest.raises(CodecError):
            sender.send(ORDERS, wrong)
        with pytest.raises(SendFailed):
            sender.send_many(ORDERS, ["1", wrong])
        with pytest.raises(TimeoutError):
            sender.request(ASKS, "x", timeout=0.01)


def test_a_bus_that_can_not_be_opened_says_so() -> None:
    with pytest.raises(ConfigError, match="url"):
        make_bus(url="nosuch://x").blocking().__enter__()
    assert not [t for t in threading.enumerate() if t.name == "unibus blocking"]


async def test_from_a_thread_of_an_open_bus_all_verbs() -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        if body == "bad":
            raise ValueError("no")
        return body.upper()

    def work() -> list[str]:
        with bus.blocking() as sender:
            sender.send(ORDERS, "x")
            answers = [sender.request(ASKS, "x")]
            with pytest.raises(RemoteError):
                sender.request(ASKS, "bad")
            return answers

    async with lab(bus) as it:
        assert await in_thread(work) == ["X"]
        assert len(it.broker.waiting(ORDERS)) == 1


PROGRAM = """
import atexit, os
from contextlib import ExitStack
from unibus import Bus, Closed, Queue

orders = Queue("orders", str)
bus = Bus("memory://", channels=[orders])
stack = ExitStack()
sender = stack.enter_context(bus.blocking())
"""


def run_program(rest: str) -> str:
    """Its output, once it has ended by itself."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM + rest],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_a_program_can_end_inside_of_the_block() -> None:
    assert run_program("sender.send(orders, 'x'); print('sent')") == "sent\n"


def test_an_exit_handler_can_leave_the_block() -> None:
    assert run_program("atexit.register(lambda: print(bus)); atexit.register(stack.close)") == "<Bus closed>\n"


def test_a_bus_that_was_opened_before_a_fork_is_an_error_and_no_hang() -> None:
    told = run_program("""
if os.fork() == 0:
    for use in (lambda: sender.send(orders, "x"), bus.blocking().__enter__):
        try:
            use()
        except Closed as error:
            print(error, flush=True)
    os._exit(0)
os.wait()
sender.send(orders, "x")
print("the parent goes on")
""").splitlines()
    assert told[-1] == "the parent goes on"
    assert len(told) == 3
    assert all("after the fork" in line for line in told[:2])


async def test_in_the_thread_of_a_loop_it_is_refused() -> None:
    bus = make_bus()
    async with lab(bus):
        with pytest.raises(Closed, match="use `await"):
            bus.blocking().__enter__()


async def test_a_sender_taken_into_a_loop_is_refused() -> None:
    bus = make_bus()
    async with lab(bus):
        sender = bus.blocking()
        await in_thread(sender.__enter__)
        with pytest.raises(Closed, match="use `await"):
            sender.send(ORDERS, "x")


def test_after_the_block_it_is_closed() -> None:
    bus = make_bus()
    with bus.blocking() as sender:
        pass
    with pytest.raises(Closed, match=r"with bus\.blocking"):
        sender.send(ORDERS, "x")


async def test_a_bus_that_closes_meanwhile_is_an_error_and_no_hang() -> None:
    bus = make_bus()
    inside = threading.Event()
    told: list[BaseException] = []

    def work() -> None:
        with bus.blocking() as sender:
            inside.set()
            try:
                sender.request(ASKS, "x")
            except BaseException as error:
                told.append(error)

    async with lab(bus):
        thread = threading.Thread(target=work)
        thread.start()
        await until(lambda: inside.is_set() and bus._opened()._requester._waiting)
    await until(lambda: not thread.is_alive())
    assert isinstance(told[0], Closed)


def test_a_loop_that_is_gone_is_an_error_and_no_hang() -> None:
    bus = make_bus()
    sender = bus.blocking()

    async def main() -> None:
        async with tidy(), bus:
            await in_thread(sender.__enter__)

    asyncio.run(main())
    with pytest.raises(Closed):
        sender.send(DONE, "x")
