"""The virtual clock moves only when told to, and fires in order; `within` is a deadline on any clock."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibus.clock import Deadline, SystemClock, VirtualClock, within


@given(st.lists(st.floats(0, 100), max_size=20), st.lists(st.floats(0, 50), max_size=5))
def test_timers_fire_once_in_order_and_never_early(delays: list[float], moves: list[float]) -> None:
    clock = VirtualClock()
    fired: list[tuple[float, int]] = []
    for i, delay in enumerate(delays):
        clock.call_later(delay, lambda i=i: fired.append((clock.monotonic(), i)))  # type: ignore[misc]  # a default is no parameter here
    for seconds in [*moves, 0.0]:
        clock.move(seconds)
    assert [i for _, i in fired] == sorted(
        (i for i, d in enumerate(delays) if round(d, 9) <= clock.monotonic()), key=lambda i: (round(delays[i], 9), i)
    )
    assert all(at >= delays[i] - 1e-9 for at, i in fired)


def test_a_timer_set_by_a_timer_fires_in_the_same_move_if_due() -> None:
    clock = VirtualClock()
    fired: list[float] = []

    def again() -> None:
        fired.append(clock.monotonic())
        clock.call_later(1.0, again)

    clock.call_later(1.0, again)
    clock.move(3.5)
    assert fired == [1.0, 2.0, 3.0]
    assert clock.next_due() == pytest.approx(0.5)
    assert clock.time() == 1_700_000_003.5


def test_many_small_moves_add_up() -> None:
    """A hundred times 0.1 s is 10 s, although the floats say 9.99999999999998."""
    clock = VirtualClock()
    fired: list[float] = []
    clock.call_later(10.0, lambda: fired.append(clock.monotonic()))
    for _ in range(99):
        clock.move(0.1)
    assert fired == []
    clock.move(0.1)
    assert fired == [10.0]


def test_a_cancelled_timer_neither_fires_nor_counts() -> None:
    clock = VirtualClock()
    clock.call_later(1.0, pytest.fail).cancel()
    assert clock.next_due() is None
    clock.move(2.0)


async def test_sleep_ends_when_the_clock_gets_there() -> None:
    clock = VirtualClock()
    sleeper = asyncio.ensure_future(clock.sleep(5.0))
    await asyncio.sleep(0)
    clock.move(4.9)
    await asyncio.sleep(0)
    assert not sleeper.done()
    clock.move(0.1)
    await sleeper


async def test_a_cancelled_sleep_leaves_no_timer() -> None:
    clock = VirtualClock()
    sleeper = asyncio.ensure_future(clock.sleep(5.0))
    await asyncio.sleep(0)
    sleeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeper
    assert clock.next_due() is None


async def _value(value: Any) -> Any:
    return value


async def test_within_passes_results_and_errors_on() -> None:
    clock = VirtualClock()
    assert await within(clock, 1.0, _value(3)) == 3
    assert await within(clock, None, _value(4)) == 4

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await within(clock, 1.0, fail())
    assert clock.next_due() is None


async def test_within_times_out_and_cancels_what_it_awaits() -> None:
    clock = VirtualClock()
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(within(clock, 5.0, forever()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the inner task has started
    clock.move(5.0)
    with pytest.raises(TimeoutError):
        await waiting
    assert ended.is_set()


async def test_within_cancelled_from_outside_is_no_timeout() -> None:
    clock = VirtualClock()
    inner = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(within(clock, 5.0, inner))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert inner.cancelled()
    assert clock.next_due() is None


async def test_within_cancelled_while_timing_out_is_cancelled() -> None:
    clock = VirtualClock()
    waiting = asyncio.ensure_future(within(clock, 5.0, asyncio.Event().wait()))
    await asyncio.sleep(0)
    clock.move(5.0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_the_system_clock_calls_back_and_sleeps() -> None:
    clock = SystemClock()
    before = clock.monotonic()
    called = asyncio.Event()
    clock.call_later(0.0, called.set)
    await called.wait()
    await clock.sleep(0.0)
    assert clock.monotonic() >= before
    assert clock.time() > 1_600_000_000


def test_who_is_woken_a_rounding_error_too_early_waits_for_the_rest_and_not_for_ever() -> None:
    clock = VirtualClock()
    fired: list[float] = []

    def wake() -> None:
        fired.append(clock.monotonic())
        if fired[-1] <= 1 and len(fired) < 10:
            clock.call_later(1e-12, wake)

    clock.call_later(1, wake)
    clock.move(2)
    assert len(fired) == 2
    assert 1 < fired[1] < 1.001


async def test_within_times_out_in_a_task_that_cleans_up_after_its_cancellation() -> None:
    clock, cut = VirtualClock(), list[str]()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await within(clock, 5.0, asyncio.Event().wait())
            except TimeoutError:
                cut.append("clean-up")

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    task.cancel()
    for _ in range(4):
        await asyncio.sleep(0)
    clock.move(5.0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cut == ["clean-up"]


def test_the_steps_of_a_deadline_share_what_is_left() -> None:
    clock = VirtualClock()
    deadline = Deadline(clock, 3.0)
    assert deadline.left() == 3.0
    clock.move(2.5)
    assert deadline.left() == 0.5
    clock.move(60.0)
    assert deadline.left() == Deadline.LEAST
