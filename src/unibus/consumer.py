"""Running handlers: a fixed number of slots that take deliveries from an intake.

A slot is one long-lived task, not a task per message. The handler runs in it directly, so that timeouts inside a
handler work; a slot whose handler left something in the context (a context variable) is replaced by a fresh one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from typing import Any, Literal

from unibus import retry
from unibus.clock import Deadline, Timer, within
from unibus.codec import BodyCodec
from unibus.correlation import handling, place
from unibus.delivery import Delivery
from unibus.errors import CodecError
from unibus.handlers import InvalidHeader
from unibus.intake import Intake
from unibus.retry import Action, BatchFailed, Verdict
from unibus.telemetry import OVERDUE

log = logging.getLogger("unibus")

SLOW = 60.0  # seconds that every handler has run, until the health tells that nothing else is begun
LAST_WORD = 1.0  # seconds that a cancelled handler has to end
TURN = 64  # messages a slot takes in a row: a handler that never waits would keep all else of the loop from going on

Batch = list[Delivery[Any]]


class HandlerTimeout(Exception):  # what happened, as its name in x-error-type should read
    """The handler ran longer than its timeout and was cancelled. A failed attempt like any other."""


class _Slot:
    """One place to run a handler in. `started`: monotonic, None while idle."""

    __slots__ = ("cut", "held", "released", "reported", "started", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.started: float | None = None
        self.held: Delivery[Any] | Batch | None = None
        self.cut: Literal["timeout", "lost"] | None = None  # why its handler was cancelled
        self.released = False  # cancelled by the end of the drain
        self.reported = False  # a thread beyond its timeout, said once


class Consumer:
    """The slots of one handler.

    `call` takes one delivery (with all layers applied); with `batch` it takes a list. `in_thread`: it can't be stopped.
    `cancel_lost`: the handler is cancelled when its message is no longer ours.
    `undecodable` is awaited for a message that can't be decoded, before it goes to the invalid-message channel;
    `timed_out` for one whose handler was cancelled by its timeout, and says what becomes of it.
    """

    def __init__(
        self,
        intake: Intake,
        call: Callable[[Any], Awaitable[object]],
        codec: BodyCodec,
        *,
        name: str,
        concurrency: int,
        timeout: float | None,
        batch: int = 0,
        in_thread: bool = False,
        cancel_lost: bool = False,
        undecodable: Callable[[Delivery[Any], CodecError], Awaitable[None]] | None = None,
        timed_out: Callable[[Delivery[Any], Verdict], Awaitable[Verdict]] | None = None,
    ) -> None:
        self.intake = intake
        intake.runs_handlers = True
        if cancel_lost:
            intake.cancel = self._cancel
        self.name = name
        self._call = call
        self._decode = codec.decode
        self._concurrency = concurrency
        self._timeout = timeout
        self._batch = batch
        self.in_thread = in_thread
        self._undecodable = undecodable
        self._timed_out = timed_out
        self._clock = intake.kit.clock
        self._slots: set[_Slot] = set()
        self._timer: Timer | None = None
        self._draining = False
        self._progress = asyncio.Event()  # while draining: a run has ended
        self._context: Context = copy_context()

    def begin(self) -> None:
        self._context = copy_context()
        self._context.run(place.set, self.intake.address)
        for _ in range(self._concurrency):
            self._open_slot()
        self.intake.begin()

    def _open_slot(self) -> None:
        slot = _Slot()
        self._slots.add(slot)
        work = self._work_batches if self._batch else self._work
        context = self._context.copy()
        slot.task = asyncio.get_running_loop().create_task(work(slot), name=f"unibus {self.name}", context=context)

    async def _work(self, slot: _Slot) -> None:
        intake, call, decode, finish = self.intake, self._call, self._decode, self.intake.finish
        monotonic = self._clock.monotonic
        handling.set(None)
        clean = copy_context()
        left = TURN
        while True:
            try:
                delivery = intake.take()
            except IndexError:
                await intake.wait()
                continue
            message = delivery.message
            try:
                delivery.body = decode(message.body, message.content_type)
            except CodecError as error:
                await self._invalid(delivery, error)
                continue
            slot.started = monotonic()
            slot.held = delivery
            if self._timer is None:
                self._watch()
            token = handling.set(message)
            try:
                await call(delivery)
            except InvalidHeader as error:
                await self._invalid(delivery, error)
            except BaseException as error:
                verdict = self._verdict(slot, delivery, error)
                if self._timed_out is not None and isinstance(verdict.error, HandlerTimeout):
                    verdict = await self._timed_out(delivery, verdict)
                finish(delivery, verdict)
            else:
                finish(delivery, retry.ACK)
            handling.reset(token)
            slot.started = slot.held = None
            if (slot.cut or slot.released or slot.reported or self._draining) and self._rest(slot):
                break
            if copy_context() != clean:  # what the handler set there must not reach the next message
                break
            left -= 1
            if not left:
                left = TURN
                await asyncio.sleep(0)  # what is handled is settled, and more received, while the rest is handled
        self._close_slot(slot)

    def _rest(self, slot: _Slot) -> bool:
        """Between two runs. Is the slot to be closed?"""
        slot.started = slot.held = None
        slot.reported = False
        if slot.cut:
            slot.cut = None
            if slot.task is not None:
                slot.task.uncancel()
        if self._draining:
            self._progress.set()
        return slot.released

    def _close_slot(self, slot: _Slot) -> None:
        self._slots.discard(slot)
        if not slot.released:
            self._open_slot()

    async def _invalid(self, delivery: Delivery[Any], error: CodecError) -> None:
        if self._undecodable is not None:
            await self._undecodable(delivery, error)
        self.intake.finish(delivery, Verdict(Action.INVALID, reason=retry.UNDECODABLE, error=error))

    def _verdict(self, slot: _Slot, delivery: Delivery[Any], error: BaseException) -> Verdict:
        """On what came out of the handler. A cancellation of ours is the timeout or the end of the drain."""
        if isinstance(error, KeyboardInterrupt):
            self.intake.finish(delivery, retry.RELEASE)
            self._slots.discard(slot)  # it ends here, and the loop with it
            raise error
        if isinstance(error, asyncio.CancelledError) and slot.task is not None:
            if slot.cut == "lost":
                return retry.RELEASE  # it is given back already
            if slot.cut == "timeout":
                error = HandlerTimeout(f"{self.name} ran longer than {self._timeout:g} s")
            elif slot.released or slot.task.cancelling():  # or somebody ends our task: give the message back and go
                slot.released = True
                return retry.RELEASE
        return retry.decide(self.intake.policy, delivery.failures, error)

    async def _work_batches(self, slot: _Slot) -> None:
        intake = self.intake
        handling.set(None)  # a batch has no single cause
        clean = copy_context()
        while True:
            batch: Batch = intake.take_ready(self._batch)
            if not batch:
                await intake.wait()
                continue
            batch = await self._decode_all(batch)
            if not batch:
                continue
            slot.started = self._clock.monotonic()
            slot.held = batch
            if self._timer is None:
                self._watch()
            try:
                await self._call(batch)
            except BatchFailed as failed:
                verdicts = self._verdicts(batch, failed)
            except BaseException as error:
                verdicts = [self._verdict(slot, delivery, error) for delivery in batch]
            else:
                verdicts = [retry.ACK] * len(batch)
            for delivery, verdict in zip(batch, verdicts, strict=True):
                intake.finish(delivery, verdict)
            if self._rest(slot) or copy_context() != clean:
                break
        self._close_slot(slot)

    async def _decode_all(self, batch: Batch) -> Batch:
        good = []
        for delivery in batch:
            try:
                delivery.body = self._decode(delivery.message.body, delivery.message.content_type)
            except CodecError as error:
                await self._invalid(delivery, error)
            else:
                good.append(delivery)
        return good

    def _verdicts(self, batch: Batch, failed: BatchFailed) -> list[Verdict]:
        """Those that BatchFailed names failed; an index that doesn't exist fails them all, since it hides another."""
        strays = [index for index in failed.errors if not 0 <= index < len(batch)]
        if strays:
            error = IndexError(f"BatchFailed names {strays[0]}, and the batch has {len(batch)} messages")
            return [retry.decide(self.intake.policy, delivery.failures, error) for delivery in batch]
        errors = failed.errors
        return [retry.decide(self.intake.policy, delivery.failures, errors.get(i)) for i, delivery in enumerate(batch)]

    # The timeout: one timer for all slots

    def _watch(self) -> None:
        if self._timeout is not None:
            self._timer = self._clock.call_later(self._timeout, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        timeout = self._timeout
        if timeout is None:
            return
        now = self._clock.monotonic()
        earliest = None
        for slot in self._slots:
            if slot.started is None or slot.task is None or slot.cut or slot.reported:
                continue
            left = slot.started + timeout - now
            if left > 0:
                earliest = left if earliest is None else min(earliest, left)
            elif self.in_thread:
                slot.reported = True
                self.intake.kit.counts.add(OVERDUE, self.intake.address)
                text = "%s has run for %g s and can't be stopped, since it is a thread; its slot stays taken"
                log.error(text, self.name, timeout)
            else:
                slot.cut = "timeout"
                slot.task.cancel()
        if earliest is not None:
            self._timer = self._clock.call_later(earliest, self._sweep)

    def _cancel(self, lost: set[Delivery[Any]]) -> None:
        """The handlers of what is no longer ours; that of a batch when all of it is."""
        for slot in self._slots:
            held = slot.held if isinstance(slot.held, list) else [slot.held] if slot.held else []
            if slot.task is None or slot.cut or slot.released or lost.isdisjoint(held):
                continue
            if all(delivery.lost or delivery.settled for delivery in held):
                slot.cut = "lost"
                slot.task.cancel()

    # The end

    def running(self) -> int:
        """Slots with a handler at work."""
        return sum(slot.started is not None for slot in self._slots)

    def complaint(self) -> str | None:
        """Messages wait, and no handler has ended for a long time."""
        waiting, now = len(self.intake.lanes.ready), self._clock.monotonic()
        runs = [now - slot.started for slot in self._slots if slot.started is not None]
        if not waiting or len(runs) < self._concurrency or (shortest := min(runs)) < SLOW:
            return None
        return (
            f"{self.intake.address}: {waiting} messages wait: each of {len(runs)} handlers has run for {shortest:.0f} s"
        )

    async def drain(self, timeout: float, deadline: Deadline) -> None:
        """Take no more, let what runs finish within `timeout` seconds, cancel the rest; settle, and end the subscription.

        All of it by the `deadline`, also where the broker doesn't answer.
        """
        self._draining = True
        until = self._clock.monotonic() + timeout  # to stop may take seconds, and the handlers have them too
        try:
            await self.intake.stop(timeout)
            try:
                await within(self._clock, max(0.0, until - self._clock.monotonic()), self._until_quiet())
            except TimeoutError:
                await self._cut_short()
        finally:  # also when we are cancelled: nothing of ours stays behind
            idle = self._end_slots()
        if idle:
            await asyncio.wait(idle)
        await self.intake.close(deadline)

    def _end_slots(self) -> list[asyncio.Task[None]]:
        """The tasks of idle slots, which end at once; a busy one may not listen."""
        if self._timer is not None:
            self._timer.cancel()
        idle = []
        for slot in self._slots:
            slot.released = True
            if slot.task is not None:
                slot.task.cancel()
                if slot.started is None:
                    idle.append(slot.task)
        return idle

    async def _until_quiet(self) -> None:
        if self.intake.at_most_once:
            await self.intake.idle()  # what is being settled first has still to run
        while self.running() or self.intake.owes():
            self._progress.clear()
            await self._progress.wait()

    async def _cut_short(self) -> None:
        busy = [slot for slot in self._slots if slot.started is not None]
        log.warning("%s: %d handlers cut short by the end of the drain; their messages go back", self.name, len(busy))
        for slot in busy:
            slot.released = True
            if slot.task is not None:
                slot.task.cancel()
        if not (tasks := {slot.task for slot in busy if slot.task is not None}):
            return
        _, stuck = await asyncio.wait(tasks, timeout=LAST_WORD)
        for slot in busy:
            if slot.task in stuck:
                log.error("%s: a handler doesn't react to its cancellation; left behind", self.name)
                for delivery in slot.held if isinstance(slot.held, list) else [slot.held]:
                    if delivery is not None:
                        self.intake.finish(delivery, retry.RELEASE)
