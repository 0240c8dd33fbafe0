"""Effectively once: with a store of what was handled, no delivery makes a handler run that has succeeded before."""

from __future__ import annotations

from typing import Any

from unibus import Bus, Delivery, Message, Queue
from unibus.stores import Key, MemoryStore, Standing, StoreUnavailable
from unibus_contracts.contract import contract
from unibus_contracts.kit import LATER, Kit, Seen, leftover, until

Run = tuple[bytes, int]  # body and attempt


class Cut(MemoryStore):
    """While `cut`, it still remembers, but nobody gets its answer to that: so nothing is acked, as after a crash."""

    cut = True

    async def finish(self, key: Key, token: str) -> bool:
        done = await super().finish(key, token)
        if self.cut:
            raise StoreUnavailable("cut off by the contract")
        return done


class Elsewhere(MemoryStore):
    """While `busy`, it says that another process is at the messages of one id."""

    busy = True

    async def begin(self, key: Key, token: str) -> Standing:
        return Standing.TAKEN if self.busy and key[1].endswith("-busy") else await super().begin(key, token)


def noting(bus: Bus, queue: Queue[Any], store: MemoryStore, runs: Seen[Run], **options: Any) -> None:
    @bus.consumer(queue, idempotency=store, **options)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        runs((body, delivery.attempt))
        if body == b"fails once" and delivery.attempt == 1:
            raise OSError("once")


async def nothing_is_left(kit: Kit, queue: Queue[Any]) -> None:
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract(
    "once.redelivered_does_not_run_again",
    "A message that was handled, and comes again since its ack never reached the broker, is acked without its handler.",
)
async def test_redelivered(kit: Kit) -> None:
    queue, store, runs = kit.queue(), Cut(), Seen[Run]()
    first, second = kit.bus(), kit.bus()
    noting(first, queue, store, runs)
    noting(second, queue, store, runs)
    async with first.running():
        id = await first.send(queue, b"x")
        await runs.reach(1)
        await until(lambda: store._done, "the handler has succeeded")
    store.cut = False
    async with second.running():
        await until(lambda: second.counts.get("repeated") == 1, f"message {id} comes again and is acked without a run")
    assert runs.all == [(b"x", 1)]
    await nothing_is_left(kit, queue)


@contract("once.copies_run_once", "A message that was sent twice, with one id, runs once.")
async def test_copies(kit: Kit) -> None:
    queue, store, runs = kit.queue(), MemoryStore(), Seen[Run]()
    bus = kit.bus()
    noting(bus, queue, store, runs)
    id = f"{queue.name}-x"
    dedup = (await kit.capabilities()).dedup
    async with bus.running():
        for body in (b"x", b"x"):
            await bus.send(queue, Message(body, id=id))
        if not dedup:  # else the broker has dropped the second one
            await until(lambda: bus.counts.get("repeated") == 1, "the second one is acked without a run")
        await until(lambda: bus.counts.get("handled") == 1, "the first one is handled")
    await nothing_is_left(kit, queue)
    assert runs.all == [(b"x", 1)]


@contract(
    "once.failed_runs_again",
    "A failed attempt is followed by the next one, and its message is known by both.",
    needs="delay",
)
async def test_failed(kit: Kit) -> None:
    queue, store, runs = kit.queue(), MemoryStore(), Seen[Run]()
    bus = kit.bus()
    noting(bus, queue, store, runs, retry=LATER)
    async with bus.running():
        id = await bus.send(queue, b"fails once")
        await until(lambda: bus.counts.get("handled") == 1, "the second attempt is handled")
        await until(lambda: list(store._done) == [(bus.settings.physical(queue), id)], "it is known by its first id")
    assert runs.all == [(b"fails once", 1), (b"fails once", 2)]
    await nothing_is_left(kit, queue)


@contract(
    "once.waits_uncounted",
    "While a message is handled elsewhere, another delivery of it waits, holds up no others, and counts no attempt.",
)
async def test_waits(kit: Kit) -> None:
    queue, store, runs = kit.queue(), Elsewhere(), Seen[Run]()
    bus = kit.bus()
    noting(bus, queue, store, runs, concurrency=1)
    async with bus.running():
        await bus.send(queue, Message(b"waits", id=f"{queue.name}-busy"))
        await bus.send(queue, b"goes on")
        await runs.reach(1)
        await until(lambda: bus.counts.get("postponed", 0) >= 2, "it was looked at again")
        store.busy = False  # the run elsewhere has failed
        await runs.reach(2)
        await until(lambda: bus.counts.get("handled") == 2, "both are handled")
    assert runs.all == [(b"goes on", 1), (b"waits", 1)]
    await nothing_is_left(kit, queue)
