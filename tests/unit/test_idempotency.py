"""Handlers that are effectively once: every race of a message with its own copies, and of a store that fails. Virtual time."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from tests.unit.core_lab import ASKS, EVENTS, ORDERED, ORDERS, lab, later, make_bus, spy_of, turns, until

from unibus import Bus, ConfigError, DeadLetter, Delivery, Discard, Message, RetryPolicy, deadletter
from unibus.adapter import Outcome
from unibus.clock import VirtualClock
from unibus.idempotency import KEEP, LEASE
from unibus.memory_broker import MemoryBroker
from unibus.retry import Action, Postponed, Repeated, decide
from unibus.stores import Key, MemoryStore, Standing, StoreUnavailable
from unibus.supervisor import LONGEST_WAIT
from unibus.testing import Lab

if TYPE_CHECKING:
    from tests.unit.test_idempotency import Session as Hidden

KEY = ("orders", "m1")
AGAIN = RetryPolicy(max_retries=2, backoff=1)


class Store(MemoryStore):
    """Notes what is asked of it, and fails on demand: `down` names the methods that do."""

    def __init__(self) -> None:
        super().__init__()
        self.down: dict[str, Exception] = {}
        self.log: list[str] = []
        self.stuck = asyncio.Event()
        self.stuck.set()

    async def _step(self, name: str) -> None:
        self.log.append(name)
        await asyncio.sleep(0)  # as a store elsewhere would, it lets others run
        if name == "finish":
            await self.stuck.wait()
        if (error := self.down.get(name)) is not None:
            raise error

    async def begin(self, key: Key, token: str) -> Standing:
        await self._step("begin")
        return await super().begin(key, token)

    async def renew(self, keys: Sequence[Key], token: str) -> Sequence[bool]:
        await self._step("renew")
        return await super().renew(keys, token)

    async def finish(self, key: Key, token: str) -> bool:
        await self._step("finish")
        return await super().finish(key, token)

    async def free(self, key: Key, token: str) -> None:
        await self._step("free")
        await super().free(key, token)

    def fail(self, *names: str) -> None:
        self.down = dict.fromkeys(names, StoreUnavailable("no answer"))


class Session:
    """What a transactional store gives to its handlers here: effects that count once they are committed."""

    def __init__(self, effects: list[str]) -> None:
        self.effects = effects
        self.pending: list[str] = []


class Ledger(Store):
    """Transactional."""

    provides = Session

    def __init__(self) -> None:
        super().__init__()
        self.effects: list[str] = []

    def transaction(self, key: Key, token: str) -> AbstractAsyncContextManager["Ledger.Work"]:
        @asynccontextmanager
        async def begun() -> AsyncIterator[Ledger.Work]:
            yield self.Work(self, key, token)

        return begun()

    class Work:
        def __init__(self, ledger: "Ledger", key: Key, token: str) -> None:
            self.resource = Session(ledger.effects)
            self.of = ledger, key, token

        async def commit(self) -> bool:
            ledger, key, token = self.of
            await ledger._step("commit")
            if not await MemoryStore.finish(ledger, key, token):
                return False
            ledger.effects += self.resource.pending
            if "after commit" in ledger.down:
                raise ledger.down["after commit"]
            return True


def counting(bus: Bus, store: Any, channel: Any = ORDERS, **options: Any) -> list[tuple[str, int]]:
    """A consumer that notes body and attempt of each run."""
    runs: list[tuple[str, int]] = []

    @bus.consumer(channel, idempotency=store, **options)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append((body, delivery.attempt))

    return runs


def held(bus: Bus, store: Any, **options: Any) -> tuple[list[int], asyncio.Event]:
    """A consumer whose runs wait for the event; the attempts that have begun."""
    runs, gate = list[int](), asyncio.Event()

    @bus.consumer(ORDERS, idempotency=store, **options)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.attempt)
        await gate.wait()

    return runs, gate


def copy(body: str = "x", id: str = "m1", **more: Any) -> Message:
    return Message(body, id=id, **more)


def gone(it: Lab) -> bool:
    broker = it.broker
    assert isinstance(broker, MemoryBroker)
    return not (broker.ready() or it.bus._opened().intakes[0].holding)


# Copies of a message


async def test_a_copy_of_what_was_handled_is_acked_without_its_handler(caplog: pytest.LogCaptureFixture) -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store)
    caplog.set_level(logging.DEBUG, "unibus")
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await it.idle()
        await bus.send(ORDERS, copy())
        await bus.send(ORDERS, copy("other", id="m2"))
        await it.idle()
        assert runs == [("x", 1), ("other", 1)]
        assert bus.counts_of(ORDERS)["handled"] == 2
        assert bus.counts_of(ORDERS)["repeated"] == 1
        assert gone(it)
    said = [record for record in caplog.records if "handled before" in record.getMessage()]
    assert [(record.levelname, "m1" in record.getMessage()) for record in said] == [("INFO", True)]
    assert all(record.levelno <= logging.INFO for record in caplog.records)


async def test_the_mark_is_there_before_the_ack() -> None:
    bus, store = make_bus(), Store()
    counting(bus, store)
    store.stuck.clear()
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await until(lambda: "finish" in store.log)
        await turns()
        assert spy_of(bus).settled == []
        store.stuck.set()
        await it.idle()
        assert spy_of(bus).settled == [(Outcome.ACCEPTED, ["x"])]


async def test_each_group_and_queue_has_keys_of_its_own() -> None:
    bus, store = make_bus(), Store()
    seen: list[str] = []

    @bus.subscriber(EVENTS, group="a", idempotency=store)
    async def one(body: str) -> None:
        seen.append("a")

    @bus.subscriber(EVENTS, group="b", idempotency=store)
    def two(body: str) -> None:
        seen.append("b")

    async with lab(bus) as it:
        for _ in range(2):
            await bus.publish(EVENTS, copy())
            await it.idle()
    assert sorted(seen) == ["a", "b"]


async def test_a_mark_is_forgotten_after_its_time() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store)
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await it.idle()
        it.clock.move(KEEP - 1)
        await bus.send(ORDERS, copy())
        await it.idle()
        assert len(runs) == 1
        it.clock.move(2)
        await bus.send(ORDERS, copy())
        await it.idle()
        assert len(runs) == 2


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_copy_waits_while_the_message_is_handled(elsewhere: bool) -> None:
    """Here or in another process; it counts no attempt, and is acked once the other has succeeded."""
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store, retry=RetryPolicy(max_retries=0))
    async with lab(bus) as it:
        if elsewhere:
            await store.begin(KEY, "another process")
        else:
            await bus.send(ORDERS, copy())
            await until(lambda: runs)
        before = len(runs)
        await bus.send(ORDERS, copy())
        await turns()
        for _ in range(5):
            await later(it, 2)
            if elsewhere:
                await store.renew([KEY], "another process")
        assert len(runs) == before
        assert bus.counts_of(ORDERS)["postponed"] > 3
        assert not it.dead_letters(ORDERS)
        if elsewhere:
            await store.finish(KEY, "another process")
        gate.set()
        await later(it, 2)
        assert len(runs) == before
        assert bus.counts_of(ORDERS)["repeated"] == 1
        assert gone(it)


async def test_copies_that_arrive_together_run_once() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store, concurrency=10)
    async with lab(bus) as it:
        await bus.send_many(ORDERS, [copy() for _ in range(20)])
        await it.advance(2)
        assert runs == [("x", 1)]
        assert bus.counts_of(ORDERS)["repeated"] == 19


async def test_a_waiting_copy_takes_no_slot_and_others_go_on() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store, concurrency=1)
    async with lab(bus) as it:
        await store.begin(KEY, "another process")
        await bus.send(ORDERS, copy())
        await bus.send(ORDERS, copy("free", id="m2"))
        await it.idle()
        assert runs == [("free", 1)]
        await store.free(KEY, "another process")  # the other run has failed
        await later(it, 2)
        assert runs == [("free", 1), ("x", 1)]


async def test_in_order_its_key_waits_with_it() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store, ORDERED)
    async with lab(bus) as it:
        await store.begin(("ordered", "m1"), "another process")
        await bus.send(ORDERED, copy("first", key="a"))
        await bus.send(ORDERED, copy("second", id="m2", key="a"))
        await bus.send(ORDERED, copy("other", id="m3", key="b"))
        await it.idle()
        assert [body for body, _ in runs] == ["other"]
        await store.free(("ordered", "m1"), "another process")
        await later(it, 2)
        assert [body for body, _ in runs] == ["other", "first", "second"]


# Leases


async def test_after_a_crash_the_message_runs_when_the_lease_has_ended() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store)
    async with lab(bus) as it:
        await store.begin(KEY, "a process that was killed")
        await bus.send(ORDERS, copy())
        await later(it, LEASE - 2)
        assert runs == []
        await later(it, 4)
        assert runs == [("x", 1)]


async def test_the_lease_is_renewed_while_the_handler_runs() -> None:
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store, timeout=0)
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        for _ in range(20):
            await later(it, LEASE / 2)
            assert await MemoryStore.begin(store, KEY, "another process") is Standing.TAKEN
        gate.set()
        await it.idle()
        assert await MemoryStore.begin(store, KEY, "another process") is Standing.DONE


async def test_who_comes_too_late_overwrites_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store, timeout=0)
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        store.fail("renew")
        await later(it, LEASE + 1)
        assert await MemoryStore.begin(store, KEY, "another process") is Standing.OURS
        store.fail()
        gate.set()
        await turns()
        assert await MemoryStore.renew(store, [KEY], "another process") == [True]
        assert not gone(it)  # the other has the say
        await MemoryStore.finish(store, KEY, "another process")
        await later(it, 2)
        assert gone(it)
        assert len(runs) == 1
    assert "another's by now" in caplog.text


async def test_a_lost_lease_is_said_while_the_handler_runs(caplog: pytest.LogCaptureFixture) -> None:
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store, timeout=0)
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        store._taken[KEY] = ("another process", it.clock.time() + LEASE)
        await later(it, LEASE / 2)
        assert "has ended while it is handled" in caplog.text
        await MemoryStore.finish(store, KEY, "another process")
        gate.set()
        await later(it, 2)
        assert gone(it)


# Handlers that do not succeed


@pytest.mark.parametrize("plain", [False, True])
async def test_a_failed_handler_frees_its_message(plain: bool) -> None:
    bus, store = make_bus(), Store()
    runs: list[int] = []

    def fail_once(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.attempt)
        if delivery.attempt == 1:
            raise OSError("once")

    async def fail_once_async(body: str, delivery: Delivery[str]) -> None:
        fail_once(body, delivery)

    bus.consumer(ORDERS, idempotency=store, retry=AGAIN)(fail_once if plain else fail_once_async)
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await it.idle()
        assert await MemoryStore.begin(store, KEY, "another process") is Standing.OURS  # at once, not after a lease
        await MemoryStore.free(store, KEY, "another process")
        await it.advance(1)
        await it.idle()
        await bus.send(ORDERS, copy())
        await it.idle()
        assert runs == [1, 2]
        assert bus.counts["handled"] == 1


async def test_a_dead_letter_that_is_sent_back_runs_again() -> None:
    bus, store = make_bus(), Store()
    runs: list[int] = []

    @bus.consumer(ORDERS, idempotency=store)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.attempt)
        if len(runs) == 1:
            raise DeadLetter("not yet")

    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await it.idle()
        assert len(it.dead_letters(ORDERS)) == 1
        await deadletter.redrive(bus, ORDERS)
        await it.idle()
        assert runs == [1, 1]
        assert gone(it)


async def test_what_was_discarded_is_free() -> None:
    bus, store = make_bus(), Store()

    @bus.consumer(ORDERS, idempotency=store)
    async def handle(body: str) -> None:
        raise Discard("nothing to do")

    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await it.idle()
        assert bus.counts["discarded"] == 1
        assert await MemoryStore.begin(store, KEY, "another process") is Standing.OURS


async def test_a_handler_beyond_its_timeout_frees_its_message() -> None:
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store, timeout=5, retry=AGAIN)
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        await later(it, 5)
        gate.set()
        await later(it, 1)
        await it.idle()
        assert runs == [1, 2]
        assert gone(it)


async def test_a_drain_frees_what_it_cuts_short() -> None:
    bus, store = make_bus(shutdown_timeout=1), Store()
    runs, _ = held(bus, store)
    async with lab(bus):
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
    assert await store.begin(KEY, "the heir") is Standing.OURS


async def test_a_thread_that_a_drain_leaves_behind_keeps_its_message_for_the_lease() -> None:
    bus, store = make_bus(shutdown_timeout=1), Store()
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()

    @bus.consumer(ORDERS, idempotency=store)
    def handle(body: str) -> None:
        begun.set()
        gate.wait(60)
        ended.set()

    try:
        async with lab(bus) as it:
            await bus.send(ORDERS, copy())
            await until(begun.is_set)
            clock = it.clock
        assert await store.begin(KEY, "the heir") is Standing.TAKEN
        clock.move(LEASE + 1)
        assert await store.begin(KEY, "the heir") is Standing.OURS
    finally:
        gate.set()
        assert ended.wait(60)


async def test_who_settles_by_hand_is_told_not_to() -> None:
    """An ack before the mark would undo what the store is for."""
    bus, store = make_bus(), Store()
    verbs: list[Callable[[Delivery[str]], Any]] = [Delivery.ack, Delivery.retry, Delivery.dead_letter, Delivery.release]

    @bus.consumer(ORDERS, idempotency=store, retry=RetryPolicy(max_retries=0))
    async def handle(body: str, delivery: Delivery[str]) -> None:
        await verbs[int(body)](delivery)

    async with lab(bus) as it:
        for n in range(len(verbs)):
            await bus.send(ORDERS, str(n))
        await it.idle()
        letters = it.dead_letters(ORDERS)
        assert len(letters) == len(verbs)
        assert all("by hand" in letter.headers["x-original-error"] for letter in letters)


# Stores that fail


@pytest.mark.parametrize("error", [StoreUnavailable("no answer"), RuntimeError("a bug of the store")])
async def test_without_its_store_nothing_runs_and_nothing_is_lost(error: Exception) -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store, retry=RetryPolicy(max_retries=0))
    async with lab(bus) as it:
        store.down = {"begin": error}
        await bus.send_many(ORDERS, [copy(id=f"m{n}") for n in range(30)])
        await later(it, 60)
        assert runs == []
        assert (
            len(store.log) < 30 * 60 / LONGEST_WAIT / 2
        )  # left alone between two tries: not each message asks for itself
        health = await bus.health()
        assert health.status == "degraded"
        assert str(error) in health.reasons[0]
        store.fail()
        await later(it, 20)
        assert runs == [("x", 1)] * 30
        assert (await bus.health()).status == "ok"
        assert not it.dead_letters(ORDERS)
        assert gone(it)


async def test_a_store_that_is_back_is_well_though_nobody_asks_it_any_more() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store, concurrency=1, prefetch=1)
    async with lab(bus) as it:
        store.fail("begin", "renew", "free")
        await bus.send(ORDERS, copy())
        await turns()
        intake = bus._opened().intakes[0]
        (waits,) = intake.holding
        assert intake._subscription is not None
        async with bus.receiver(ORDERS, prefetch=1) as other:  # the message ends elsewhere
            await intake._subscription.settle(Outcome.RELEASED, [waits])
            taken = await other.receive(timeout=1)
            assert taken is not None
            await later(it, 25)
            await taken.ack()
        await later(it, 100)
        assert (await bus.health()).status == "degraded"
        store.fail()
        await later(it, 21)
        assert ((await bus.health()).status, runs) == ("ok", [])
        await bus.send(ORDERS, copy(id="m2"))
        await it.idle()
        assert runs == [("x", 1)]


async def test_while_messages_ask_it_nothing_else_says_that_a_store_is_well() -> None:
    bus, store = make_bus(), Store()
    counting(bus, store)
    async with lab(bus) as it:
        store.fail("begin")  # it would answer to anything else
        await bus.send(ORDERS, copy())
        for _ in range(60):
            await later(it, 1)
            assert (await bus.health()).status == "degraded"
        assert "free" not in store.log


async def test_what_was_handled_and_could_not_be_recorded_is_recorded_later() -> None:
    """It waits, unacked, and does not run again. Of the same process: the beat tells the store, or the next try does."""
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store, retry=RetryPolicy(max_retries=0))
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        store.fail("begin", "finish", "renew", "free")
        gate.set()
        await later(it, 3 * LEASE)
        assert not gone(it)
        assert (await bus.health()).status == "degraded"
        store.fail()
        await later(it, 20)
        assert runs == [1]
        assert gone(it)
        assert bus.counts["repeated"] == 1


async def test_what_could_not_be_recorded_is_recorded_though_the_message_went_elsewhere() -> None:
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store)
    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        store.fail("finish")
        gate.set()
        await until(lambda: "finish" in store.log)
        await turns()
        store.down = {"begin": StoreUnavailable("only for those who ask for this message")}
        await later(it, LEASE)
        assert await MemoryStore.begin(store, KEY, "another process") is Standing.DONE


async def test_the_end_of_a_process_is_the_last_chance_to_record() -> None:
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store)
    async with lab(bus):
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        store.fail("finish")
        gate.set()
        await until(lambda: store.log.count("finish") == 1)
        await turns()
        store.fail()
    assert await store.begin(KEY, "the heir") is Standing.DONE


async def test_what_could_never_be_recorded_is_said_and_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    bus, store = make_bus(), Store()
    runs, gate = held(bus, store)
    async with lab(bus) as it:
        clock = it.clock
        await bus.send(ORDERS, copy())
        await until(lambda: runs)
        store.fail("finish")
        gate.set()
        await until(lambda: "finish" in store.log)
        await turns()
    assert "1 messages were handled, and their store could not be told" in caplog.text
    store.fail()
    assert await store.begin(KEY, "the heir") is Standing.TAKEN
    clock.move(LEASE + 1)
    assert await store.begin(KEY, "the heir") is Standing.OURS


async def test_a_failed_handler_whose_store_is_down_runs_again_all_the_same() -> None:
    bus, store = make_bus(), Store()
    runs: list[int] = []

    @bus.consumer(ORDERS, idempotency=store, retry=AGAIN)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.attempt)
        if delivery.attempt == 1:
            store.fail("begin", "finish", "free", "renew")
            raise OSError("both at once")

    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await later(it, 10)
        assert runs == [1]
        store.fail()
        await later(it, 20)
        assert runs == [1, 2]  # the failure counts, the wait does not
        assert gone(it)


async def test_what_waits_for_longer_than_the_broker_allows_goes_back_uncounted() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store, retry=RetryPolicy(max_retries=0))
    async with lab(bus, park_limit=30.0) as it:
        store.fail("begin")
        await bus.send(ORDERS, copy())
        await later(it, 100)
        assert 2 <= spy_of(bus).settled.count((Outcome.RELEASED, ["x"])) <= 5  # 30 s each, less the last wait
        store.fail()
        await later(it, 20)
        assert runs == [("x", 1)]
        assert not bus._opened().intakes[0]._postponed


async def test_at_the_end_what_waits_goes_back() -> None:
    bus, store = make_bus(), Store()
    runs = counting(bus, store)
    async with lab(bus) as it:
        spy = spy_of(bus)
        store.fail("begin")
        await bus.send(ORDERS, copy())
        await later(it, 1)
        assert spy.settled == []
    assert runs == []
    assert spy.settled == [(Outcome.RELEASED, ["x"])]


# The handler's own transaction


async def test_effects_and_mark_are_committed_together() -> None:
    bus, ledger = make_bus(), Ledger()
    attempts: list[int] = []

    @bus.consumer(ORDERS, idempotency=ledger, retry=AGAIN)
    async def handle(body: str, session: Annotated[Session, "anything"], *, delivery: Delivery[str]) -> None:
        attempts.append(delivery.attempt)
        session.pending.append(f"{body} {delivery.attempt}")
        assert ledger.effects == []
        if delivery.attempt == 1:
            raise OSError("rolled back")

    async with lab(bus) as it:
        for _ in range(2):
            await bus.send(ORDERS, copy())
            await it.advance(1)
            await it.idle()
        assert attempts == [1, 2]
        assert ledger.effects == ["x 2"]
        assert "finish" not in ledger.log
        once = bus._opened()._once[0]
        assert once is not None
        assert once.resources == {}


@pytest.mark.parametrize("fault", ["commit", "after commit"])
async def test_a_commit_without_an_answer_is_looked_up(fault: str) -> None:
    """Whether it was committed or not, the effect is there once, and no attempt is counted."""
    bus, ledger = make_bus(), Ledger()

    @bus.consumer(ORDERS, idempotency=ledger, retry=RetryPolicy(max_retries=0))
    async def handle(body: str, session: Session) -> None:
        session.pending.append(body)

    async with lab(bus) as it:
        ledger.fail(fault)
        await bus.send(ORDERS, copy())
        await until(lambda: "commit" in ledger.log)
        await turns()
        ledger.fail()
        await later(it, 20)
        assert ledger.effects == ["x"]
        assert gone(it)
        assert not it.dead_letters(ORDERS)


async def test_a_commit_that_comes_too_late_has_no_effect() -> None:
    bus, ledger = make_bus(), Ledger()
    gate, begun = asyncio.Event(), asyncio.Event()

    @bus.consumer(ORDERS, idempotency=ledger)
    async def handle(body: str, session: Session) -> None:
        session.pending.append(body)
        begun.set()
        await gate.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, copy())
        await begun.wait()
        ledger._taken[KEY] = ("another process", it.clock.time() + LEASE)
        gate.set()
        await until(lambda: "commit" in ledger.log)
        await MemoryStore.finish(ledger, KEY, "another process")
        await later(it, 2)
        assert ledger.effects == []
        assert gone(it)


async def test_names_that_are_only_there_for_type_checkers() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, idempotency=Ledger())
    async def handle(body: str, session: "Session") -> None: ...

    def other(body: str, hidden: "Hidden") -> None: ...

    async with lab(bus):
        assert bus._opened()._handlers[0].asks == {Session}
    wrong = make_bus()
    wrong.consumer(ORDERS, idempotency=Ledger())(other)
    with pytest.raises(ConfigError, match="only under TYPE_CHECKING"):
        async with wrong.running():
            pass


# What makes no sense


async def refused(bus: Bus, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        async with bus.running():
            pass


async def test_what_can_not_be_effectively_once_is_refused_at_start() -> None:
    async def one(body: str) -> None: ...
    async def many(bodies: list[str]) -> None: ...
    async def answer(body: str) -> str:
        return body

    store: Any = MemoryStore()
    bus = make_bus()
    bus.consumer(ORDERS, idempotency=store, batch=5)(many)
    await refused(bus, "batch=5")
    bus = make_bus()
    bus.responder(ASKS, idempotency=store)(answer)
    await refused(bus, "needs its answer again")
    bus = make_bus()
    bus.subscriber(EVENTS, broadcast=True, idempotency=store)(one)
    await refused(bus, "broadcast")
    bus = make_bus()
    bus.consumer(ORDERS, guarantee="at-most-once", idempotency=store)(one)
    await refused(bus, "at-most-once")
    for wrong in (True, "redis://", MemoryStore):
        bus = make_bus()
        bus.consumer(ORDERS, idempotency=wrong)(one)  # type: ignore[arg-type]  # the mistake that is meant
        await refused(bus, "use a store of unibus.stores")


async def test_a_resource_that_nobody_provides_is_refused_at_start() -> None:
    async def handle(body: str, session: Session) -> None: ...
    def plain(body: str, session: Session) -> None: ...

    bus = make_bus()
    bus.consumer(ORDERS, idempotency=MemoryStore())(handle)
    await refused(bus, "'session' is a Session, which unibus can't fill; .* or what the store of idempotency=")
    bus = make_bus()
    bus.consumer(ORDERS, idempotency=Ledger())(plain)
    await refused(bus, "asks for Session, which a plain function can't use")


@pytest.mark.parametrize(("lease", "keep"), [(0, 5), (-1, 5), (5, 0), (5, float("inf")), (float("nan"), 5), (60, 5)])
def test_times_that_can_not_be(lease: float, keep: float) -> None:
    with pytest.raises(ConfigError, match=r"MemoryStore\("):
        MemoryStore(lease=lease, keep=keep)


def test_the_verdicts() -> None:
    policy = RetryPolicy(max_retries=0)
    assert decide(policy, 0, Repeated()).action is Action.ACK
    waits = decide(policy, 7, Postponed(2.5, "why"))
    assert (waits.action, waits.delay, waits.reason) == (Action.WAIT, 2.5, "why")


async def test_a_memory_store_forgets_what_is_old() -> None:
    store, clock = MemoryStore(lease=10, keep=100), VirtualClock()
    store.open(clock)
    for n in range(10):
        assert await store.begin(("q", f"{n}"), "a") is Standing.OURS
        assert await store.begin(("q", f"open {n}"), "a") is Standing.OURS
        assert await store.finish(("q", f"{n}"), "a")
        clock.move(10)
    await store.tidy()
    assert (len(store._done), len(store._taken)) == (9, 0)
