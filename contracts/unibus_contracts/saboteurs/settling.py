"""Saboteurs of settling: acks that are none, acks of the wrong message, and what a consumer leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from unibus.adapter import Move, Outcome, Results
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost

from .base import Adapter, Subscription, saboteur

Deliveries = Sequence[Delivery[Any]]


@saboteur(
    "An ack does nothing: the message comes again when its consumer has gone.",
    "settle.ack_consumes",
    "settle.discard_is_final",
    "settle.by_hand",
    "settle.context_manager",
    "settle.iteration",
    "settle.handler_decides_once",
    "settle.timeout_is_a_failure",
    "settle.at_most_once",
    "settle.from_another_task",
    "settle.out_of_order_is_safe",
    "settle.extend_prolongs",
    "consume.roundtrip",
    "consume.batch_handler",
    "consume.plain_functions_run_in_threads",
    "competing.leaver_hands_over",
    "shutdown.in_flight_completes",
    "shutdown.concurrent_closes",
    "shutdown.error_inside_closes",
    "fanout.settle_is_per_group",
    "ttl.expired_is_not_handled",
)
class AcksNothing(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        if outcome is Outcome.RELEASED:
            return await self.inner.settle(outcome, deliveries, delays=delays)
        return [None] * len(deliveries)


@saboteur(
    "A message is acked when it is handed out, before its handler has run.",
    "settle.unsettled_returns",
    "settle.out_of_order_is_safe",
    "settle.individually",
    "shutdown.deadline_then_return",
    "shutdown.prefetched_returned_at_once",
    "competing.leaver_hands_over",
)
class AcksBeforeTheHandler(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        found = await super().receive(limit, timeout)
        await self.inner.settle(Outcome.ACCEPTED, found if not self.inner.source.browse else ())
        return found

    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        return [None] * len(deliveries)


@saboteur(
    "An ack settles all that was received before it, too.",
    "settle.out_of_order_is_safe",
    "settle.individually",
    "consume.batch_fails_by_message",
)
class AcksUpTo(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        held = list(self.inner.held)
        if outcome is Outcome.ACCEPTED and held:
            last = max((held.index(d) for d in deliveries if d in held), default=-1)
            await self.inner.settle(outcome, [d for d in held[:last] if d not in deliveries])
        return await self.inner.settle(outcome, deliveries, delays=delays)


@saboteur(
    "An ack settles the message next to the one that was meant.",
    "settle.out_of_order_is_safe",
    "settle.individually",
    "settle.twice_is_harmless",
)
class AcksTheWrongOne(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        held = list(self.inner.held)
        wrong = [held[held.index(d) - 1] if d in held else d for d in deliveries]
        return await self.inner.settle(outcome, wrong, delays=delays)


@saboteur(
    "Only the first ack of a call reaches the broker.",
    "settle.individually",
    "settle.is_confirmed",
    "settle.from_another_task",
    "prefetch.of_the_spi",
    "consume.batch_handler",
)
class AcksTheFirstOfACall(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        await self.inner.settle(outcome, deliveries[:1], delays=delays[:1])
        return [None] * len(deliveries)


@saboteur("A second ack of the same message closes the link.", "settle.twice_is_harmless")
class SecondAckCutsTheLink(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        if any(delivery not in self.inner.held for delivery in deliveries):
            self.inner.end("unknown delivery tag")
            raise ConnectionLost("unknown delivery tag")
        return await self.inner.settle(outcome, deliveries, delays=delays)


@saboteur("A settle returns before the broker has it.", "settle.is_confirmed")
class SettlesLater(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        asyncio.get_running_loop().call_later(0.05, self.now, outcome, list(deliveries))
        return [None] * len(deliveries)

    def now(self, outcome: Outcome, deliveries: Deliveries) -> None:
        if self.inner.over is None:
            self.task = asyncio.create_task(self.inner.settle(outcome, deliveries))


@saboteur(
    "What is given back is dropped.",
    "settle.release_is_uncounted",
    "shutdown.rest_is_free_at_once",
    "shutdown.deadline_then_return",
    "shutdown.in_flight_completes",
    "shutdown.restarts_kill_no_message",
    "shutdown.held_by_hand",
    "shutdown.sigterm",
    "competing.leaver_hands_over",
)
class DropsWhatIsGivenBack(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        return await self.inner.settle(Outcome.ACCEPTED, deliveries)


@saboteur(
    "What is given back stays with its consumer until that one is closed.",
    "settle.release_is_uncounted",
    "shutdown.rest_is_free_at_once",
)
class GivesBackAtTheEnd(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        if outcome is Outcome.ACCEPTED:
            return await self.inner.settle(outcome, deliveries)
        return [None] * len(deliveries)


@saboteur(
    "A subscription that is closed gives nothing back: what it held comes again when the leases end.",
    "shutdown.prefetched_returned_at_once",
    "settle.unsettled_returns",
    "settle.out_of_order_is_safe",
    "settle.individually",
    "shutdown.reopened_receivers",
)
class LeavesItToTheLeases(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        return [None] * len(deliveries) if outcome is Outcome.RELEASED else await super().settle(outcome, deliveries)

    async def close(self) -> None:
        self.inner.end("closed", give_back=False)


@saboteur(
    "What a subscription holds when it is closed is lost.",
    "settle.unsettled_returns",
    "shutdown.prefetched_returned_at_once",
    "settle.out_of_order_is_safe",
    "settle.individually",
)
class LosesWhatItHolds(Subscription):
    async def close(self) -> None:
        if self.inner.over is None:
            await self.inner.settle(Outcome.ACCEPTED, list(self.inner.held))
        await self.inner.close()

    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        return [None] * len(deliveries) if outcome is Outcome.RELEASED else await super().settle(outcome, deliveries)


@saboteur(
    "A subscription that stops gives back what its handlers are still at.",
    "shutdown.in_flight_completes",
    "shutdown.sigterm",
    "order.kept_over_takeover",
)
class GivesBackWhatIsRunning(Subscription):
    async def stop(self) -> None:
        await self.inner.stop()
        await self.inner.settle(Outcome.RELEASED, list(self.inner.held))


@saboteur("What a subscription gives back it takes again at once.", "shutdown.rest_is_free_at_once")
class TakesAgainWhatItGaveBack(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        results = await self.inner.settle(outcome, deliveries, delays=delays)
        if outcome is Outcome.RELEASED:
            self.inner._take(len(deliveries))
        return results


@saboteur("To cancel a receive takes a quarter of a minute.", "shutdown.receiver_ends")
class IsSlowToCancel(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        try:
            return await super().receive(limit, timeout)
        except asyncio.CancelledError:
            await asyncio.sleep(15)
            raise


@saboteur("Each connection starts a task that nobody ends.", "shutdown.leaves_nothing_behind")
class LeaksATask(Adapter):
    async def connect(self) -> None:
        await super().connect()
        self.task = asyncio.create_task(asyncio.sleep(3600))


@saboteur("Closing takes a dozen seconds, and can't be called off.", "shutdown.deadline_then_return")
class ClosesSlowly(Adapter):
    async def close(self) -> None:
        slow = asyncio.ensure_future(asyncio.sleep(12))
        while not slow.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(slow)
        await self.inner.close()


@saboteur("Closing a second time is an error.", "shutdown.concurrent_closes")
class ClosesOnce(Adapter):
    closed = False

    async def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True
        await self.inner.close()


@saboteur(
    "A move sends its messages, and leaves the delivery where it was.",
    "settle.move_is_one_step",
    "dlq.after_max_attempts",
)
class MovesWithoutSettling(Subscription):
    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        return await self.adapter.send([send for move in moves for send in move.sends], timeout)


@saboteur(
    "A move settles the delivery, and sends nothing.",
    "settle.move_is_one_step",
    "dlq.after_max_attempts",
    "dlq.one_queue_each",
    "fanout.dead_letters_are_per_group",
    "invalid.undecodable_no_retry",
    "retry.delayed_count",
    "obs.every_end_is_logged",
    "sec.payload_not_logged",
    "retry.broken_error_keeps_message",
)
class MovesNothing(Subscription):
    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        return await self.inner.settle(Outcome.ACCEPTED, [move.delivery for move in moves])


@saboteur("What was settled can be moved once more.", "settle.move_is_one_step")
class MovesTwice(Subscription):
    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        again = [m for m in moves if m.delivery not in self.inner.held]
        await self.adapter.send([send for move in again for send in move.sends], timeout)
        results = await super().move(moves, timeout)
        return [None if move in again else result for move, result in zip(moves, results, strict=True)]


@saboteur(
    "A dead letter is sent twice.",
    "dlq.after_max_attempts",
    "dlq.one_queue_each",
    "dlq.browse_leaves_everything",
    "retry.broken_error_keeps_message",
    "settle.by_hand",
)
class BuriesTwice(Subscription):
    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        twice = [Move(m.delivery, [*m.sends, *(s for s in m.sends if str(s.to).endswith(".dlq'"))]) for m in moves]
        return await super().move(twice, timeout)


@saboteur("Extending a lease does nothing.", "settle.extend_prolongs", "lease.lost_is_told")
class ExtendsNothing(Subscription):
    async def extend(self, deliveries: Deliveries, seconds: float) -> Results:
        return [None] * len(deliveries)


@saboteur("A lease is extended by a tenth of what was asked for.", "settle.extend_prolongs")
class ExtendsTooLittle(Subscription):
    async def extend(self, deliveries: Deliveries, seconds: float) -> Results:
        return await self.inner.extend(deliveries, seconds / 10)


@saboteur("What was settled can be extended, and is held again.", "settle.extend_prolongs", "lease.lost_is_told")
class ExtendsWhatIsGone(Subscription):
    async def extend(self, deliveries: Deliveries, seconds: float) -> Results:
        await self.inner.extend(deliveries, seconds)
        return [None] * len(deliveries)


@saboteur(
    "A delivery whose message has expired meanwhile can't be moved: it is acked.",
    "dlq.expired_are_kept",
)
class BuriesNoExpired(Subscription):
    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        now = self.inner._broker.clock.time()
        late = [Move(m.delivery, []) if (m.delivery.message.expires_at or now) < now else m for m in moves]
        return await super().move(late, timeout)


@saboteur("A lease that is gone is said of all that are extended with it.", "lease.lost_is_told")
class LosesAllLeasesWithOne(Subscription):
    async def extend(self, deliveries: Deliveries, seconds: float) -> Results:
        results = await self.inner.extend(deliveries, seconds)
        return [next((error for error in results if error is not None), None)] * len(deliveries)


@saboteur("To ack what is somebody else's by now breaks the link.", "lease.late_ack_is_harmless")
class BreaksOnALateAck(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        if any(delivery not in self.inner.held for delivery in deliveries):
            raise ConnectionLost("a delivery that is not known closes the channel")
        return await self.inner.settle(outcome, deliveries, delays=delays)


@saboteur("A late ack settles the message that has come again.", "lease.late_ack_is_harmless")
class SettlesTheNextRun(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        now = {delivery.token: delivery for delivery in self.inner.held}
        return await self.inner.settle(outcome, [now.get(d.token, d) for d in deliveries], delays=delays)


@saboteur(
    "What is taken before it is due and given back is delivered at once.",
    "delay.early_goes_back_to_its_time",
)
class ForgetsThatItWasEarly(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        if outcome is Outcome.RELEASED:
            self.inner._early.clear()
        return await self.inner.settle(outcome, deliveries, delays=delays)


@saboteur(
    "What was taken before it was due is delivered at once when its subscription is closed.",
    "delay.early_goes_back_to_its_time",
)
class HurriesWhatItHeldEarly(Subscription):
    async def close(self) -> None:
        self.inner._early.clear()
        await self.inner.close()


@saboteur(
    "What is accepted before it is due comes all the same when it is.",
    "delay.early_accepted_is_gone",
)
class KeepsWhatWasAcceptedEarly(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Deliveries, *, delays: Sequence[float] = ()) -> Results:
        early = [delivery for delivery in deliveries if delivery in self.inner._early]
        if outcome is Outcome.ACCEPTED and early:
            await self.inner.settle(Outcome.RELEASED, early)
            rest = await self.inner.settle(outcome, [d for d in deliveries if d not in early])
            results = iter(rest)
            return [None if delivery in early else next(results) for delivery in deliveries]
        return await self.inner.settle(outcome, deliveries, delays=delays)


@saboteur(
    "A message that is taken before it is due does not tell how long it has to wait.",
    "delay.early_goes_back_to_its_time",
    "delay.early_accepted_is_gone",
)
class HidesTheRestOfTheWait(Subscription):
    async def receive(self, limit: int, timeout: float) -> Deliveries:
        found = await super().receive(limit, timeout)
        for delivery in found:
            delivery.message.delay = None
        return found
