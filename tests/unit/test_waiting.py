"""Waiting, and work in the background."""

from __future__ import annotations

import asyncio

import pytest

from unibus.clock import VirtualClock
from unibus.errors import ConnectionLost
from unibus.waiting import Tasks, Waiter, answered, happens, side_by_side


async def test_a_wake_lets_all_go_on() -> None:
    clock = VirtualClock()
    waiter = Waiter(clock)
    waiter.wake()  # nobody waits: nothing is kept
    both = [asyncio.create_task(waiter.wait(10)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in both)
    waiter.wake()
    await asyncio.gather(*both)
    assert clock.next_due() is None, "no timer is left behind"


async def test_a_wait_ends_by_itself() -> None:
    clock = VirtualClock()
    task = asyncio.create_task(Waiter(clock).wait(10))
    await asyncio.sleep(0)
    clock.move(9)
    await asyncio.sleep(0)
    assert not task.done()
    clock.move(1)
    await task


async def test_one_who_leaves_takes_nobody_along() -> None:
    waiter = Waiter(VirtualClock())
    leaves, stays = (asyncio.create_task(waiter.wait(10)) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    assert not stays.done()
    waiter.wake()
    await stays


async def test_an_event_happens_or_not() -> None:
    event = asyncio.Event()
    assert not await happens(event, 0.001)
    event.set()
    assert await happens(event, 10)


async def test_a_task_that_fails_is_told_once_and_forgotten() -> None:
    told: list[BaseException] = []
    tasks = Tasks(told.append)
    go = asyncio.Event()

    async def fail() -> None:
        await go.wait()
        raise LookupError("x")

    failing, cancelled = tasks.start(fail()), tasks.start(fail())
    assert set(tasks) == {failing, cancelled}
    await asyncio.sleep(0)
    cancelled.cancel()
    go.set()
    await asyncio.wait([failing, cancelled])
    await asyncio.sleep(0)
    assert [type(error) for error in told] == [LookupError]
    assert not set(tasks)


async def test_side_by_side_is_bounded_and_does_all() -> None:
    running = most = 0
    done: list[int] = []

    async def act(item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done.append(item)

    await side_by_side(range(10), act, at_once=3)
    assert most == 3
    assert sorted(done) == list(range(10))


async def test_the_first_failure_is_raised_once_nothing_runs() -> None:
    ended: list[int] = []

    async def act(item: int) -> None:
        if item == 0:
            raise LookupError("first")
        await asyncio.sleep(0)
        ended.append(item)

    with pytest.raises(LookupError):
        await side_by_side(range(4), act, at_once=2)
    assert ended == [1, 2, 3]


async def test_a_cancellation_asked_for_just_before_a_call_is_no_error_of_the_call() -> None:
    """As by Ctrl-C while the task was at work: the error comes with the next wait, which is the call's."""

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await answered(asyncio.Event().wait())

    task = asyncio.ensure_future(work())
    await asyncio.wait([task])
    assert task.cancelled()


async def test_what_a_call_cancels_by_itself_is_its_error() -> None:
    async def call() -> None:
        raise asyncio.CancelledError

    with pytest.raises(ConnectionLost, match="cancelled its own call"):
        await answered(call())
