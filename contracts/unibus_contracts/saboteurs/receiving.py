"""Saboteurs of receiving: bounds that don't hold, deliveries that get lost, counts that are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from unibus.adapter import Backlog, Endpoint, Outcome, Outgoing, Source, Standing
from unibus.capabilities import native
from unibus.channel import Group, Queue
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost, Refused, Timeout
from unibus.memory_subscription import MemorySubscription
from unibus.message import RETRY_COUNT

from .base import Adapter, Deaf, Subscription, saboteur

Deliveries = Sequence[Delivery[Any]]


@saboteur(
    "A receive takes a hundred messages from the broker, whatever was asked for, and keeps the rest in a buffer.",
    "prefetch.never_exceeded",
    "competing.late_joiner_gets_share",
)
class BuffersGreedily(Subscription):
    def __init__(self, adapter: Adapter, inner: MemorySubscription) -> None:
        super().__init__(adapter, inner)
        inner.source = Source(inner.source.address, 10_000, losing=inner.source.losing)
        self.buffer: list[Delivery[Any]] = []

    async def receive(self, limit: int, timeout: float) -> Deliveries:
        if not self.buffer:
            self.buffer.extend(await self.inner.receive(100, timeout))
        given, self.buffer = self.buffer[:limit], self.buffer[limit:]
        return given


@saboteur(
    "Messages are dealt out to the consumers in turn, to the busy ones too.",
    "competing.work_is_shared",
)
class DealsMessagesOut(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        found = await super().receive(limit, timeout)
        consumers = self.inner.place.consumers
        mine = [d for d in found if consumers[d.token.seq % len(consumers)] is self.inner]
        if len(mine) < len(found):
            await self.inner.settle(Outcome.RELEASED, [d for d in found if d not in mine])
            await asyncio.sleep(0.01)
        return mine


@saboteur(
    "When another consumer comes, it gets what the others have in hand as well, as after a rebalance that waits for nobody.",
    "competing.comers_repeat_nothing",
)
class HandsOutAnewWhenAnotherComes(Subscription):
    def __init__(self, adapter: Adapter, inner: MemorySubscription) -> None:
        super().__init__(adapter, inner)
        self.others = len(inner.place.consumers)

    async def receive(self, limit: int, timeout: float) -> Deliveries:
        if len(self.inner.place.consumers) > self.others and self.inner.held:
            copies = [Outgoing(self.inner.address, delivery.message) for delivery in self.inner.held]
            await self.adapter.inner.send(copies, timeout)
        self.others = len(self.inner.place.consumers)
        return await super().receive(limit, timeout)


@saboteur(
    "A receive returns all there is, more than was asked for.",
    "consume.receive_keeps_its_limit",
    "prefetch.of_a_receiver",
    "prefetch.of_the_spi",
)
class IgnoresTheLimit(Subscription):
    def __init__(self, adapter: Adapter, inner: MemorySubscription) -> None:
        super().__init__(adapter, inner)
        inner.source = Source(inner.source.address, 10_000, losing=inner.source.losing)

    async def receive(self, limit: int, timeout: float) -> Deliveries:
        return await self.inner.receive(10_000, timeout)


@saboteur(
    "A receive waits for a whole batch before it returns any.", "prefetch.of_the_spi", "consume.empty_receive_times_out"
)
class WaitsForAWholeBatch(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        taken = list(await self.inner.receive(limit, timeout))
        while len(taken) < min(limit, 3):
            taken += await self.inner.receive(limit - len(taken), 3600)
        return taken


@saboteur(
    "A receive returns at once when nothing is there, whatever its timeout.",
    "consume.receive_keeps_its_limit",
)
class ReturnsAtOnce(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        found = await self.inner.receive(limit, 0)
        await asyncio.sleep(0 if found else 0.01)
        return found


@saboteur(
    "A consumer that once found its queue empty is never woken again.",
    "consume.empty_receive_times_out",
    "consume.ready_means_ready",
    "reply.timeout",
    "shutdown.restartable",
)
class SleepsForEver(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        if not self.inner.place.deliverable():
            await asyncio.sleep(3600)
        return await self.inner.receive(limit, timeout)


class Standby(Deaf):
    async def check(self) -> Standing:
        return "standby"


@saboteur(
    "Who consumes a queue at once when it was made gets nothing of it, and calls itself a standby.",
    "consume.roundtrip",
    "consume.receive_may_be_cancelled",
    "shutdown.error_inside_closes",
)
class StandsByForEver(Adapter):
    joined = False

    async def subscribe(self, source: Source) -> Subscription:
        made = await super().subscribe(source)
        if source.browse or self.joined:
            return made
        self.joined = True
        return Standby(self, made.inner)


@saboteur("What arrives while a receive is cancelled is lost to it.", "consume.receive_may_be_cancelled")
class LosesWhatACancelledReceiveTook(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        found = await self.inner.receive(limit, timeout)
        for _ in range(10):
            await asyncio.sleep(0)
        return found


@saboteur(
    "An empty receive is an error.",
    "consume.receive_keeps_its_limit",
    "prefetch.of_the_spi",
)
class RaisesWhenEmpty(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        found = await self.inner.receive(limit, timeout)
        if not found:
            raise Timeout("nothing there")
        return found


@saboteur(
    "Every settled delivery leaks its slot: at its prefetch a consumer stops for good.",
    "prefetch.resumes",
    "consume.roundtrip",
    "prefetch.of_a_receiver",
    "retry.none_lost_in_a_crowd",
)
class LeaksSlots(Subscription):
    taken = 0

    async def receive(self, limit: int, timeout: float) -> Deliveries:
        room = min(limit, self.inner.source.prefetch - self.taken)
        if room <= 0:
            await asyncio.sleep(timeout)
            return ()
        found = await self.inner.receive(room, timeout)
        self.taken += len(found)
        return found


@saboteur(
    "One message at a time, whatever the prefetch: the next only when the last is settled.",
    "prefetch.concurrency_is_bound_and_reached",
    "order.keys_run_at_once",
    "corr.no_leak_between_handlers",
    "reply.matched_when_shuffled",
)
class OneAtATime(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        address = source.address
        one = Source(address, 1, ordered=source.ordered, start=source.start, browse=source.browse, losing=source.losing)
        return await super().subscribe(source if source.browse else one)


@saboteur(
    "A subscription is open before it is there: it is made with the first receive, a moment later.",
    "consume.ready_means_ready",
    "fanout.broadcast_reaches_each",
)
class SubscribesLate(Adapter):
    async def subscribe(self, source: Source) -> Any:
        if isinstance(source.address, Group) and source.address.ephemeral:
            return Late(self, source)
        return await super().subscribe(source)


class Late:
    def __init__(self, adapter: Adapter, source: Source) -> None:
        self.adapter, self.source, self.address = adapter, source, source.address
        self.inner: Any = None

    async def receive(self, limit: int, timeout: float) -> Deliveries:
        if self.inner is None:
            await asyncio.sleep(0.05)
            self.inner = await self.adapter.inner.subscribe(self.source)
        found: Deliveries = await self.inner.receive(limit, timeout)
        return found

    async def stop(self) -> None:
        await (self.inner.stop() if self.inner else asyncio.sleep(0))

    async def close(self) -> None:
        await (self.inner.close() if self.inner else asyncio.sleep(0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@saboteur(
    "A consumer starts with what is sent after it came: the backlog is skipped.",
    "consume.before_subscription",
    "publish.returns_after_broker_accept",
    "fanout.offline_group_keeps_backlog",
    "fanout.declared_group_misses_nothing",
    "settle.unsettled_returns",
    "cap.refusal_leaves_messages",
    "invalid.does_not_block",
    "invalid.in_a_batch",
)
class SkipsTheBacklog(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        subscription = await super().subscribe(source)
        if not source.browse and not source.address.name.endswith((".dlq", ".invalid")):
            await subscription.inner.settle(Outcome.ACCEPTED, subscription.inner._take(10_000))
        return subscription


@saboteur(
    "The next message is delivered to each consumer of a group, as if it were a group of its own.",
    "competing.group_members_share",
    "competing.each_once",
    "fanout.default_group_is_the_service",
)
class EachConsumerGetsAll(Adapter):
    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        entry, place = delivery.token, self.inner.broker.place(self.inner._key(delivery.source.address))
        if place is not None and len(place.consumers) > entry.deliveries:
            place.put(entry)
        return delivery


@saboteur(
    "A queue takes four consumers at most; the fifth is refused.",
    "competing.surplus_is_harmless",
)
class TakesFourConsumers(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        subscription = await super().subscribe(source)
        if len(subscription.inner.place.consumers) > 4:
            raise Refused("too many consumers")
        return subscription


@saboteur(
    "The broker's count begins with 0.",
    "consume.delivery_count",
)
class CountsFromZero(Adapter):
    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        delivery.deliveries = (delivery.deliveries or 1) - 1
        return delivery


@saboteur(
    "Every delivery counts as a failed attempt, the one under way too.",
    "consume.metadata",
    "consume.foreign_ids_and_bodies",
    "retry.none",
    "retry.immediate_count",
    "retry.asked_for_counts",
    "retry.attempt_by_hand",
    "retry.broken_error_keeps_message",
    "retry.own_delay",
    "consume.batch_fails_by_message",
    "settle.by_hand",
    "settle.timeout_is_a_failure",
    "dlq.redriven_may_die_again",
    "dlq.at_once",
    "once.waits_uncounted",
)
class CountsTheFirstAttempt(Adapter):
    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        delivery.failures = delivery.deliveries or 0
        return delivery


@saboteur(
    "The broker's count is taken for the attempts, so that what a consumer gives back is a failure.",
    "settle.release_is_uncounted",
    "settle.unsettled_returns",
    "competing.leaver_hands_over",
    "shutdown.in_flight_completes",
    "shutdown.rest_is_free_at_once",
    "shutdown.deadline_then_return",
    "shutdown.restarts_kill_no_message",
    "shutdown.reopened_receivers",
    "shutdown.sigterm",
    "fault.cut_counts_no_attempt",
    "consume.delivery_count",
)
class CountsWhatIsGivenBack(Adapter):
    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        entry = delivery.token
        times = self.inner.broker.__dict__.setdefault("times", {})
        times[entry] = delivery.deliveries = times.get(entry, 0) + 1
        delivery.failures = delivery.deliveries - 1
        return delivery


@saboteur(
    "What comes again has an id of its own, as where it is made of the delivery.",
    "once.redelivered_does_not_run_again",
)
class RenamesWhatComesAgain(Adapter):
    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        times = self.inner.broker.__dict__.setdefault("handed_out", {})
        times[delivery.token] = times.get(delivery.token, 0) + 1
        if times[delivery.token] > 1:
            delivery.message = replace(delivery.message, id=f"{delivery.message.id}-{times[delivery.token]}")
        return delivery


@saboteur(
    "The receiver is told the address of its subscription instead of the queue's.",
    "consume.metadata",
    "dlq.headers",
    "invalid.undecodable_no_retry",
)
class TellsTheWrongPlace(Adapter):
    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        source, address = delivery.source, delivery.source.address
        if isinstance(address, Queue):
            delivery.source = Source(Queue.derived(address.name + ".1"), source.prefetch)
        return delivery


@saboteur("The backlog is always empty.", "consume.backlog_is_told", "dlq.after_max_attempts")
class TellsAnEmptyBacklog(Adapter):
    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        await self.inner.backlog(address)
        return Backlog(0, 0)


@saboteur("The backlog also counts what was settled.", "consume.backlog_is_told")
class TellsAnOldBacklog(Adapter):
    most = 0

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        told = await self.inner.backlog(address)
        self.most = max(self.most, told.ready + (told.in_flight or 0))
        return Backlog(told.ready or self.most, told.in_flight)


@saboteur(
    "A message that is looked at is taken.",
    "dlq.browse_leaves_everything",
    "dlq.redrive_returns_original",
    "dlq.redrive_some",
    "dlq.after_max_attempts",
)
class TakesWhatItLooksAt(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        if not self.inner.source.browse:
            return await super().receive(limit, timeout)
        found = self.inner._take(limit)
        await self.inner.settle(Outcome.ACCEPTED, found)
        return found


@saboteur("A look ends with as many messages as are taken at a time.", "dlq.browse_shows_many")
class LooksAtOnePage(Subscription):
    shown = 0

    async def receive(self, limit: int, timeout: float) -> Deliveries:
        source = self.inner.source
        found = await self.inner.receive(min(limit, source.prefetch - self.shown) if source.browse else limit, timeout)
        self.shown += len(found)
        return found


@saboteur(
    "Attempts are said to be exact, and what failed in another process is not counted.",
    "retry.count_outlives_its_process",
)
class ForgetsOthersFailures(Adapter):
    claims: ClassVar[dict[str, Any]] = {"attempt": native()}

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.own: set[str] = set()

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        if outgoing.origin is not None:
            self.own.add(outgoing.message.id)
        return (outgoing,)

    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        message = delivery.message
        if message.id not in self.own:
            rest = {name: value for name, value in message.headers.items() if name != RETRY_COUNT}
            message.headers = MappingProxyType(rest)
        return delivery


@saboteur("A subscription that is closed goes on waiting, and says that it consumes.", "health.gone_is_not_ok")
class WaitsAfterItsEnd(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        try:
            return await super().receive(limit, timeout)
        except ConnectionLost:
            await asyncio.Event().wait()
            return []

    async def check(self) -> Standing:
        return "consuming"
