"""Settling in groups: while one call is in flight, collect; copies are confirmed before their originals are settled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unibus import deadletter, telemetry
from unibus.adapter import Move, Outcome, Outgoing, Subscription
from unibus.channel import Group, Queue
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.errors import Closed, ConnectionLost, LeaseLost, NotFound, TransportError, UnibusError, Unsupported
from unibus.publisher import Publisher
from unibus.retry import handed_out_often
from unibus.supervisor import Link, back_off
from unibus.telemetry import Counts, names_of
from unibus.watchdog import Calls

log = logging.getLogger("unibus")

SETTLE_TRIES = 6
LAST_WORD = 1.0  # seconds that a call of the adapter has to end once it is cancelled
LONGEST_SETTLE = 90.0  # seconds; drivers and clients give up before (RabbitMQ's heartbeat after 60), unless they hang
FIRST_MOVE_WAIT = 3  # in doublings of the shortest back-off: a dead-letter channel rarely comes back at once

Transfer = tuple[Delivery[Any], Outgoing]


@dataclass(frozen=True, slots=True)
class Kit:
    """What all parts of one open bus share."""

    link: Link
    publisher: Publisher
    clock: Clock
    counts: Counts


class Holder(Protocol):
    """Who holds the deliveries, and hears what became of them: of each exactly once."""

    def settled(self, delivery: Delivery[Any], error: TransportError | None) -> None: ...

    def settled_all(self, deliveries: Sequence[Delivery[Any]]) -> None:
        """The same for many without an error."""
        ...

    def unstuck(self) -> None:
        """Copies that could not be sent are tried again."""
        ...


class Settler:
    """Carries out what an intake decided."""

    def __init__(self, kit: Kit, address: Queue[Any] | Group, holder: Holder) -> None:
        self.subscription: Subscription | None = None
        self.epoch = 0  # of the link that it came by: there may be another one when it says that its own is gone
        self.stopping = False
        self.stuck = 0  # groups of copies that can't be sent now
        self.trouble: str | None = None
        self._kit = kit
        self._address = address
        self._holder = holder
        channel = address.topic if isinstance(address, Group) else address
        private = isinstance(address, Group) and address.ephemeral
        self._counted = kit.link.adapter.capabilities.release_counts and not (channel.ordered or private)
        self._done: list[Delivery[Any]] = []
        self._returns: list[Delivery[Any]] = []
        self._moves: list[Transfer] = []
        self._task: asyncio.Task[None] | None = None
        self._moving: set[asyncio.Task[None]] = set()
        self._troubled: set[object] = set()  # those of them that have failed and are not through
        self._calls = Calls(kit.clock)

    def accept(self, delivery: Delivery[Any]) -> None:
        self._done.append(delivery)
        if self._task is None:
            self._start()

    def give_back(self, delivery: Delivery[Any]) -> None:
        """Where the broker counts that, what was handed out often goes back as a copy.

        Its count would make it a suspect of the crash guard, for nothing but restarts. In order nothing is copied: the
        copy would be the last of its key.
        """
        if self._counted and handed_out_often(delivery):
            again = deadletter.copy(delivery.message, delivery.message.headers)
            self.move(delivery, Outgoing(self._address, again, None, delivery))
        else:
            self.let_go(delivery)

    def let_go(self, delivery: Delivery[Any]) -> None:
        """Give back what may be another's by now: never as a copy, which would be one message more."""
        self._returns.append(delivery)
        if self._task is None:
            self._start()

    def move(self, delivery: Delivery[Any], outgoing: Outgoing) -> None:
        self._moves.append((delivery, outgoing))
        if self._task is None:
            self._start()

    def busy(self) -> bool:
        return self._task is not None or bool(self._moving)

    async def idle(self) -> None:
        """Until all is settled. Ends: every call has a deadline, and moves give up once `stopping` is set."""
        while True:
            if self._task is not None and self._task.done():  # cancelled before it began, with all tasks of the loop
                self._task = None
                if self._done or self._returns or self._moves:
                    self._start()
            waiting = [task for task in (self._task, *self._moving) if task is not None]
            if not waiting:
                return
            await asyncio.wait(waiting)

    async def give_up(self) -> None:
        """Leave what is under way."""
        for task in (running := [task for task in (self._task, *self._moving) if task is not None]):
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=LAST_WORD)
        self._done.clear()
        self._returns.clear()
        self._moves.clear()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while self._done or self._returns or self._moves:
                if self._moves:
                    moves, self._moves = self._moves, []
                    task = asyncio.get_running_loop().create_task(self._carry_out(moves))
                    self._moving.add(task)
                    task.add_done_callback(self._moving.discard)
                if self._done:
                    done, self._done = self._done, []
                    await self._settle(Outcome.ACCEPTED, done)
                if self._returns:
                    returns, self._returns = self._returns, []
                    await self._settle(Outcome.RELEASED, returns)
        finally:
            self._task = None

    async def _settle(self, outcome: Outcome, deliveries: list[Delivery[Any]]) -> None:
        limit = self._kit.link.adapter.capabilities.settle_batch
        for at in range(0, len(deliveries), limit):
            part = deliveries[at : at + limit]
            results = await self._settle_part(outcome, part)
            if not any(results):
                self._holder.settled_all(part)
                continue
            for delivery, error in zip(part, results, strict=True):
                self._holder.settled(delivery, error)

    async def _settle_part(self, outcome: Outcome, deliveries: list[Delivery[Any]]) -> Sequence[TransportError | None]:
        """One result each. What the broker puts off is tried again; what can't be settled is counted: it comes again."""
        subscription, epoch = self.subscription, self.epoch
        results: list[TransportError | None] = [None] * len(deliveries)
        waiting = list(range(len(deliveries)))
        for failures in range(SETTLE_TRIES):
            part = [deliveries[i] for i in waiting]
            if subscription is None or subscription is not self.subscription:
                gone = ConnectionLost("the subscription that the delivery came by is over")
                for i in waiting:
                    results[i] = _lease_lost(deliveries[i], gone)
                break
            try:
                answers = await self._calls.bounded(subscription.settle(outcome, part), LONGEST_SETTLE)
            except ConnectionLost as error:
                self._kit.link.lost(epoch, error)
                answers = [_lease_lost(delivery, error) for delivery in part]
            except TransportError as error:
                answers = [error] * len(part)
            except Exception as error:  # a fault of the adapter: the messages come again
                log.exception("the adapter failed to settle %d messages of %s", len(part), self._address)
                answers = [_lease_lost(delivery, error) for delivery in part]
            for i, answer in zip(waiting, answers, strict=True):
                results[i] = answer
            waiting = [i for i in waiting if (result := results[i]) is not None and result.retryable]
            if not waiting:
                break
            await self._kit.clock.sleep(back_off(failures))
        self._tell([(d, result) for d, result in zip(deliveries, results, strict=True) if result is not None])
        return results

    def _tell(self, failed: list[tuple[Delivery[Any], TransportError]]) -> None:
        if failed:
            delivery, error = failed[0]
            self._kit.counts.add(telemetry.LEASE_LOST, self._address, len(failed))
            more = {**names_of(self._address), "number": len(failed), "message_id": delivery.message.id}
            text = "%s: %d deliveries not settled, they come again: %s"
            log.warning(text, self._address, len(failed), error, extra=more)

    def complaint(self) -> str | None:
        """Why messages that were handled stay in our hands, or None."""
        if self.trouble is None and (seconds := self._calls.slow()) is not None:
            return f"{self._address}: its messages are not settled: the adapter has not answered for {seconds:g} s"
        return self.trouble

    async def _carry_out(self, moves: list[Transfer]) -> None:
        """Move, again until it succeeds; meanwhile the messages are kept, and `stuck` says to take in no more."""
        try:
            await self._keep_moving(moves)
        finally:
            self._troubled.discard(asyncio.current_task())
            if not self._troubled:
                self.trouble = None

    async def _keep_moving(self, moves: list[Transfer]) -> None:
        failures = 0
        while True:
            for delivery, _ in moves:
                if delivery.lost:  # it comes again, and needs no copy
                    self._tell([(delivery, gone := _lease_lost(delivery, None))])
                    self._holder.settled(delivery, gone)
            moves = [move for move in moves if not move[0].lost]
            if not moves:
                return
            errors = await self._try(moves)
            failed = [(move, error) for move, error in zip(moves, errors, strict=True) if error is not None]
            if not failed:
                return
            moves = [move for move, _ in failed]
            to, error = moves[0][1].to, failed[0][1]
            if isinstance(error, NotFound):  # a channel of ours was deleted
                await self._kit.link.redeclare()
            if self.stopping and failures:
                log.error("%s: %d messages given back, since %s takes none: %s", self._address, len(moves), to, error)
                await self._settle(Outcome.RELEASED, [delivery for delivery, _ in moves])
                return
            wait = back_off(failures + FIRST_MOVE_WAIT)
            failures += 1
            self.trouble = f"{to} takes no messages from {self._address}: {error}"
            self._troubled.add(asyncio.current_task())
            log.error("%s; they are kept, again in %.1f s", self.trouble, wait)
            self.stuck += 1
            try:
                await self._kit.clock.sleep(wait)
            finally:
                self.stuck -= 1
                self._holder.unstuck()

    async def _try(self, moves: list[Transfer]) -> list[UnibusError | None]:
        """One try of each, in one step where the adapter can; else send, confirm, settle. What succeeded is settled."""
        results: list[UnibusError | None] = [None] * len(moves)
        rest = list(range(len(moves)))
        subscription = self.subscription
        if subscription is not None and self._kit.link.adapter.capabilities.atomic_move:
            epoch = self.epoch
            answers: Sequence[TransportError | Unsupported | None]
            try:
                timeout = self._kit.publisher.timeout
                call = subscription.move([Move(d, [out]) for d, out in moves], timeout)
                answers = await self._calls.bounded(call, timeout + LONGEST_SETTLE)
            except TransportError as error:
                answers = [error] * len(moves)
            except Exception as error:  # a fault of the adapter: the messages are kept, and it is tried again
                log.exception("the adapter failed to move %d messages of %s", len(moves), self._address)
                answers = [TransportError(f"the adapter failed: {type(error).__name__}")] * len(moves)
            rest = []
            if broken := next((answer for answer in answers if isinstance(answer, ConnectionLost)), None):
                self._kit.link.lost(epoch, broken)  # moved or not, what came by it is no longer ours
                answers = [
                    _lease_lost(d, a) if isinstance(a, ConnectionLost) else a
                    for (d, _), a in zip(moves, answers, strict=True)
                ]
            for i, answer in enumerate(answers):
                if isinstance(answer, Unsupported):
                    rest.append(i)
                elif answer is None or isinstance(answer, LeaseLost):
                    self._holder.settled(moves[i][0], answer)
                else:
                    results[i] = answer
            self._tell([(d, a) for (d, _), a in zip(moves, answers, strict=True) if isinstance(a, LeaseLost)])
        if rest:
            errors: Sequence[UnibusError | None]
            try:
                errors = await self._kit.publisher.send_all([moves[i][1] for i in rest])
            except Closed as error:
                errors = [error] * len(rest)
            for i, sent in zip(rest, errors, strict=True):
                results[i] = sent
            await self._settle(Outcome.ACCEPTED, [moves[i][0] for i in rest if results[i] is None])
        return results


def _lease_lost(delivery: Delivery[Any], cause: BaseException | None) -> LeaseLost:
    error = LeaseLost(f"message {delivery.message.id} is no longer ours; it is delivered again, here or elsewhere")
    error.__cause__ = cause
    return error
