"""Receiving from one address: hold deliveries up to the prefetch, hand them out, decide their fates.

What needs many messages at once lives here: admission and drain. Who runs handlers (`consumer`) or iterates by hand
(`receiver`) takes a delivery and says `finish`; `lanes` keeps those that wait, `guard` watches for those that may kill
their consumer, `settler` carries fates out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from unibus import deadletter, retry, telemetry
from unibus.adapter import Outgoing, Source, Start, Subscription
from unibus.channel import Group, Queue
from unibus.clock import Deadline, within
from unibus.delivery import Delivery
from unibus.errors import Closed, ConnectionLost, LeaseLost, NotFound, Throttled, Timeout, TransportError, UnibusError
from unibus.guard import CrashGuard
from unibus.idempotency import Once
from unibus.lanes import Lanes
from unibus.lease import Heartbeat
from unibus.report import Report
from unibus.retry import Action, RetryPolicy, Verdict
from unibus.settlement import Place, Step, beyond, onward, plan
from unibus.settler import Kit, Settler
from unibus.supervisor import FATAL, back_off
from unibus.waiting import answered
from unibus.watchdog import Watchdog, standing

log = logging.getLogger("unibus")

POLL = 5.0  # seconds a receive waits: only how often an idle loop turns
POLL_ALONE = 1.0  # the same while the crash guard is at work: an empty receive ends that
LONGEST_CLOSE = 30.0  # seconds, of a driver that doesn't come to an end with a subscription that is followed by another


class _Again(Exception):
    """Leave the receive loop and subscribe anew."""


class _Silent(Exception):
    """The watchdog has ended the receive loop."""


class Intake:
    """One address being received from. Implements `delivery.Settler`.

    `requests`: the deliveries are requests, dropped once expired. `at_most_once`: settled before they are handed out.
    `trusting`: no crash guard, for places where no handler runs.
    """

    def __init__(
        self,
        kit: Kit,
        address: Queue[Any] | Group,
        *,
        prefetch: int,
        policy: RetryPolicy,
        at_most_once: bool = False,
        requests: bool = False,
        trusting: bool = False,
        start: Start = "new",
    ) -> None:
        self.kit = kit
        self.address = address
        self.prefetch = prefetch
        self.policy = policy
        self.at_most_once = at_most_once
        self.requests = requests
        channel = address.topic if isinstance(address, Group) else address
        self.place = Place(ordered=channel.ordered, private=isinstance(address, Group) and address.ephemeral)
        self._guarded = not (trusting or self.place.private)
        self.source = Source(address, prefetch, ordered=channel.ordered, start=start, losing=self._losing)
        self.holding: dict[Delivery[Any], None] = {}  # received and not yet settled, in order of arrival
        self.lanes = Lanes(ordered=channel.ordered)  # those of them that wait
        self.running: set[Delivery[Any]] = set()  # handed out; who took it says finish
        self._report = Report(kit.counts, address, private=self.place.private)
        self._now = kit.clock.monotonic
        self._handled = kit.counts.counter(telemetry.HANDLED, address)
        self._received = kit.counts.counter(telemetry.RECEIVED, address)
        self.subscribed = asyncio.Event()
        self.begun = asyncio.Event()  # subscribed for the first time, or refused
        self.refusal: Exception | None = None  # why the first subscribe failed for good
        self.runs_handlers = False  # then each delivery's run ends with `finish`, also one that was settled by hand
        self.cancel: Callable[[set[Delivery[Any]]], None] | None = None  # the handlers of what is lost while they run
        self.trouble: str | None = None
        self.protection: Once | None = None  # of a handler that is effectively once
        self._settler = Settler(kit, address, self)
        self._stopping = False
        self._subscription: Subscription | None = None
        self._heartbeat: Heartbeat | None = None
        self._watchdog: Watchdog | None = None
        self._failures = 0  # to subscribe and receive, in a row
        self._receiving: asyncio.Task[None] | None = None  # by one subscription
        self._silent: str | None = None  # why that was cancelled, to subscribe anew
        self._deaf = False  # it was silent before, and nothing was received since
        self._moving: set[Delivery[Any]] = set()  # ordered: the next of the key waits until the move is through
        self._decided: dict[Delivery[Any], bool] = {}  # settled by hand, their run not over; True: due again then
        self._postponed: dict[Delivery[Any], float] = {}  # held uncounted, and since when, monotonic
        self._kept: set[Delivery[Any]] = set()  # parked by hand where no handlers run: settled until handed out again
        self._gone: set[Delivery[Any]] = set()  # lost while their handlers run, and that was said
        self._taken_back: set[Delivery[Any]] = set()  # at the end, from the hands of a user who had not settled them
        self._room = asyncio.Event()
        self._reserved = 0  # room given to receives under way
        self._waiters: dict[Delivery[Any], asyncio.Future[TransportError | None]] = {}
        self._emptying = False  # somebody waits until nothing runs
        self._finished = asyncio.Event()  # then: `running` became empty
        # In order a driver can't stop receiving before its hands are empty, and another consumer takes over meanwhile: what is sent
        # back for its run alone changes hands, counted, without a run. It takes as many hand-outs to be evidence as for any other.
        spare = retry.SUSPECT_AFTER - 1 if self.place.ordered else 0
        self._guard = CrashGuard(address, policy.crash_limit, self._settler, self._report, self.finish, spare=spare)
        self._task: asyncio.Task[None] | None = None

    # The loop

    def begin(self) -> None:
        self.kit.link.on_lost.add(self._link_lost)
        self._task = asyncio.create_task(self._run(), name=f"unibus receives from {self.address}")

    async def _run(self) -> None:
        """Subscribe, pull, and again after whatever broke; until stopped, or the link is given up."""
        epoch = 0
        while True:
            try:
                epoch = await self.kit.link.up()
                self._receiving = asyncio.create_task(self._receive(epoch))
                await self._ended(self._receiving)
            except _Again:
                await self._hand_over()
            except _Silent:
                await self._revive(epoch)
            except ConnectionLost as error:
                self.trouble = str(error)
                self.kit.link.lost(epoch, error)
                await self._abandon()
            except (Closed, *FATAL) as error:
                self.trouble = str(error)
                await self._abandon()
                if not isinstance(error, Closed):
                    self.kit.link.give_up(error)
                self.lanes.end(error)
                return
            except Exception as error:
                self.trouble = str(error) or type(error).__name__
                await self._abandon()
                if not self.begun.is_set() and not (isinstance(error, UnibusError) and error.retryable):
                    self.refusal = error  # at the start it is said to the caller, who waits for it
                    self.begun.set()
                    return
                wait = back_off(self._failures)
                self._failures += 1
                known = isinstance(error, UnibusError)
                log.warning(
                    "receiving from %s failed, again in %.1f s: %s", self.address, wait, error, exc_info=not known
                )
                await self.kit.clock.sleep(wait)
                if isinstance(error, NotFound):
                    await self.kit.link.redeclare()

    async def _receive(self, epoch: int) -> None:
        await self._subscribe(epoch)
        await self._pull_all(epoch)

    async def _ended(self, receiving: asyncio.Task[None]) -> None:
        """Wait for the end of a subscription; what it ended by is raised."""
        try:
            await asyncio.wait([receiving])
        finally:
            receiving.cancel()
            await asyncio.wait([receiving])
        if self._silent is not None:
            raise _Silent
        if receiving.cancelled():
            raise TransportError("the adapter cancelled its own call")  # else nobody would receive any more
        receiving.result()

    async def _subscribe(self, epoch: int) -> None:
        self.source.prefetch = 1 if self._guard.alone else self.prefetch
        subscription = await self.kit.link.adapter.subscribe(self.source)
        self._subscription = self._settler.subscription = subscription
        self._settler.epoch = epoch
        lease = self.kit.link.adapter.capabilities.lease
        if lease and lease.limit:
            self._heartbeat = Heartbeat(subscription, self.holding, lease.limit, self.kit.clock, self._lease_lost)
            self._heartbeat.start()
        self._watchdog = Watchdog(subscription, self.kit.clock, self._fell_silent)
        self._watchdog.begin()
        self.trouble = None
        self.subscribed.set()
        self.begun.set()

    async def _pull_all(self, epoch: int) -> None:
        """As many receives at once as the adapter likes, until the first of them fails."""
        capabilities = self.kit.link.adapter.capabilities
        many = min(capabilities.receivers, -(-self.source.prefetch // capabilities.receive_batch))
        if many <= 1:
            await self._pull(epoch)
            return
        pulls = [asyncio.create_task(self._pull(epoch)) for _ in range(many)]
        try:
            await asyncio.wait(pulls, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            stray = [pull for pull in pulls if pull.cancelled()]
            for pull in pulls:
                pull.cancel()
            await asyncio.wait(pulls)
        failed = [error for pull in pulls if not pull.cancelled() and (error := pull.exception()) is not None]
        if failed:  # all of them were looked at; the first is as good as any
            raise failed[0]
        if stray:
            raise asyncio.CancelledError

    def _fell_silent(self, why: str) -> None:
        if self._receiving is not None and self._silent is None and self._receiving.cancel():
            log.error("%s: %s; it is subscribed to anew", self.address, why)
            self.kit.counts.add(telemetry.RESUBSCRIBED, self.address)
            self._silent = self.trouble = why

    async def _revive(self, epoch: int) -> None:
        """Leave a silent subscription. If that was not the first time since anything was received, it may be the link."""
        if self._deaf:
            self.kit.link.lost(epoch, ConnectionLost(f"{self.address}: {self._silent}"))
        self._deaf = True
        await self._abandon()
        self._silent = None

    async def _pull(self, epoch: int) -> None:
        link, guard, subscription = self.kit.link, self._guard, self._subscription
        assert subscription is not None  # noqa: S101  # _subscribe came first
        assert self._watchdog is not None  # noqa: S101  # the same
        receiving = self._watchdog.loop()
        receive_batch = link.adapter.capabilities.receive_batch
        failures = 0
        while self._silent is None:
            if link.epoch != epoch or not link.is_up:  # it may have broken while there was no room to receive
                raise ConnectionLost(link.trouble or "the link to the broker was lost")
            room = min(self.source.prefetch - len(self.holding) - self._reserved, receive_batch)
            if room <= 0 or self._settler.stuck:
                self._room.clear()
                await self._room.wait()
                continue
            self._reserved += room
            receiving.looks = 0
            try:
                deliveries = await subscription.receive(room, POLL_ALONE if guard.alone else POLL)
            except (Throttled, Timeout) as error:  # of this call alone: what is held is still ours
                self.trouble = str(error)
                wait = back_off(failures)
                failures += 1
                log.warning("receiving from %s failed, again in %.1f s: %s", self.address, wait, error)
                await self.kit.clock.sleep(wait)
                continue
            finally:
                self._reserved -= room
                receiving.looks = None
            self._deaf = False
            self._failures = 0
            if failures:
                failures, self.trouble = 0, None
            if link.epoch != epoch or not link.is_up:
                # What came before them and waited is dropped by now: begun, these would overtake it.
                for delivery in deliveries:
                    delivery.lost = True
                continue
            if deliveries:
                self._admit(deliveries)
            nothing = not (deliveries or self.holding)
            if guard.suspects or (guard.alone and (nothing or guard.trusted >= self.prefetch)):
                raise _Again  # it has to begin its work, or there are no suspects left, as far as one can see

    def unstuck(self) -> None:
        """The settler tries again: there may be room."""
        self._room.set()

    # Admission

    def _admit(self, deliveries: Sequence[Delivery[Any]]) -> None:
        self._received.n += len(deliveries)
        plain, ready, guard = not (self.at_most_once or self.place.ordered), self.lanes.ready, self._guard
        for delivery in deliveries:
            message = delivery.message
            delivery.settler = self
            self.holding[delivery] = None
            if message.correlation_id is None:
                message.correlation_id = message.id
            crashes = 0
            if headers := message.headers:
                message.headers = MappingProxyType(dict(headers))  # a handler's edits must not reach a retry
                delivery.failures += deadletter.retry_count(headers)
                crashes = deadletter.crash_count(headers)
            if message.expires_at is not None and message.expires_at <= self.kit.clock.time():
                self._expire(delivery)
                continue
            if (crashes or (delivery.deliveries or 0) > retry.SUSPECT_AFTER) and self._guarded:
                if not guard.trusts(delivery, crashes):
                    continue
            else:
                guard.trusted += 1
            if plain:
                ready.append(delivery)
            elif self.at_most_once:
                self._settler.accept(delivery)  # `settled` hands it out
            else:
                self.lanes.enqueue(delivery)
        if ready:
            self.lanes.wake()

    async def wait(self) -> None:
        """Until something may be ready; several may wait. At the end handlers wait for ever, others get the reason."""
        await self.lanes.wait(for_ever=self.runs_handlers)

    def take(self) -> Delivery[Any]:
        """The next one. Raises IndexError when none is ready."""
        delivery = self.lanes.take()
        # The heartbeat may have had no answer, or no turn: what nobody knows to be ours is not begun.
        while (until := delivery.lease_until) is not None and until <= self._now() and not self.at_most_once:
            self._overdue(delivery)
            delivery = self.lanes.take()
        self.running.add(delivery)
        if self._kept:
            self._reopen(delivery)
        return delivery

    def take_ready(self, limit: int) -> list[Delivery[Any]]:
        """Up to `limit` of what is ready."""
        taken: list[Delivery[Any]] = []
        with suppress(IndexError):
            while len(taken) < limit:
                taken.append(self.take())
        return taken

    def _overdue(self, delivery: Delivery[Any]) -> None:
        """Its lease has ended while it waited. Given back with those behind it, since the driver still holds them."""
        self._report.overdue(delivery)
        for each in (delivery, *self.lanes.take_behind(delivery)):
            each.settled = True
            self._settler.let_go(each)

    def _reopen(self, delivery: Delivery[Any]) -> None:
        if delivery in self._kept:
            self._kept.discard(delivery)
            delivery.settled = False

    async def take_some(self, limit: int, timeout: float) -> list[Delivery[Any]]:
        """Up to `limit` of what is ready; none after `timeout` seconds without any."""
        while not (taken := self.take_ready(limit)):
            try:
                await within(self.kit.clock, timeout, self.wait())
            except TimeoutError:
                break
        return taken

    def _expire(self, delivery: Delivery[Any]) -> None:
        self._report.count(telemetry.EXPIRED)
        if self.requests:
            self._report.expired_request(delivery)
            self.finish(delivery, Verdict(Action.DISCARD, reason=retry.EXPIRED))
        else:
            self.finish(delivery, Verdict(Action.DEAD_LETTER, reason=retry.EXPIRED))

    # Fates

    def judge(self, delivery: Delivery[Any], error: BaseException | None) -> Verdict:
        """By the policy; a cancelled task gives its delivery back."""
        if isinstance(error, asyncio.CancelledError):
            return retry.RELEASE
        return retry.decide(self.policy, delivery.failures, error)

    async def settle(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Returns once the step is confirmed; the first verdict counts. Raises LeaseLost, or what hindered it."""
        if delivery in self._taken_back:
            raise LeaseLost(f"message {delivery.message.id} went back when its receiver ended; it is delivered again")
        if delivery.settled or delivery in self._decided:
            return
        waiter = self._waiters[delivery] = asyncio.get_running_loop().create_future()
        if self.runs_handlers:
            self._decided[delivery] = False
        else:
            self._hand_back(delivery)
        self._decide(delivery, verdict)
        if (error := await waiter) is not None:
            raise error

    def finish(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Decide the fate of a delivery, whose run is over; it is carried out in the background."""
        if verdict is retry.ACK and not (delivery.settled or delivery.lost or self._decided or self._emptying):
            self.running.discard(delivery)  # the usual case, without the calls below
            delivery.settled = True
            self._handled.n += 1
            self._settler.accept(delivery)
            if self.place.ordered:
                self.lanes.next_of_key(delivery)
            return
        self._hand_back(delivery)
        if self._decided and delivery in self._decided:
            self._report.too_late(delivery, verdict)
            if self._decided.pop(delivery):
                self._due(delivery)
        else:
            self._decide(delivery, verdict)

    def _decide(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        if verdict is retry.ACK and not (delivery.settled or delivery.lost):  # the usual case
            delivery.settled = True
            self._handled.n += 1
            self._settler.accept(delivery)
            if self.place.ordered:
                self.lanes.next_of_key(delivery)
            return
        if delivery.settled or delivery.lost:
            self._too_late(delivery, verdict)
            return
        if verdict.action is Action.RETRY and self._outlived(delivery, verdict.delay):
            self._report.count(telemetry.EXPIRED)
            verdict = Verdict(Action.DEAD_LETTER, reason=retry.EXPIRED, error=verdict.error)
        capabilities = self.kit.link.adapter.capabilities
        step = plan(verdict, self.place, capabilities)
        if verdict.action is Action.RETRY and (too_long := beyond(verdict.delay, step, capabilities)):
            verdict = Verdict(Action.DEAD_LETTER, reason=retry.NON_RETRYABLE, error=too_long)
            step = plan(verdict, self.place, capabilities)
        if verdict.action is Action.WAIT and self._held_too_long(delivery, verdict.delay):
            step = Step.RELEASE
        if step is Step.PARK and self._stopping:
            step = Step.RELEASE  # no time to wait for it: it comes again, elsewhere
        if step is Step.PARK:
            self._park(delivery, verdict)
            return
        delivery.settled = True
        self._report.verdict(delivery, verdict)
        if step is Step.SETTLE:
            self._settler.accept(delivery)
            self.lanes.next_of_key(delivery)
        elif step is Step.RELEASE:
            for each in (delivery, *self.lanes.take_behind(delivery)):  # they go back together, or one would overtake
                each.settled = True
                self._settler.give_back(each)
        else:
            if self.place.ordered:
                self._moving.add(delivery)
            self._settler.move(delivery, onward(delivery, verdict, self.address, self.kit.clock.time()))

    async def relocate(self, transfers: Sequence[tuple[Delivery[Any], Outgoing]]) -> None:
        """Send each message to another place, and settle it here. Raises the first error, once all are through."""
        waiters = []
        for delivery, outgoing in transfers:
            self._hand_back(delivery)
            delivery.settled = True
            self._waiters[delivery] = waiter = asyncio.get_running_loop().create_future()
            waiters.append(waiter)
            self._settler.move(delivery, outgoing)
        errors = [error for waiter in waiters if (error := await waiter) is not None]
        if errors:
            raise errors[0]

    def _hand_back(self, delivery: Delivery[Any]) -> None:
        self.running.discard(delivery)
        if self._emptying and not self.running:
            self._finished.set()

    def _too_late(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """The fate of a delivery that its handler had settled, that was settled first, or that is no longer ours."""
        if self.at_most_once and delivery.settled:
            self._report.at_most_once(delivery, verdict)
        else:
            self._report.too_late(delivery, verdict)
        if delivery.lost:
            self._resolve(
                delivery, LeaseLost(f"message {delivery.message.id} is no longer ours; it is delivered again")
            )
        if self.at_most_once or not delivery.settled:
            self._forget(delivery)
            self.lanes.next_of_key(delivery)

    def _outlived(self, delivery: Delivery[Any], delay: float) -> bool:
        expires_at = delivery.message.expires_at
        return expires_at is not None and expires_at <= self.kit.clock.time() + delay

    def _park(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Hold it here until its next attempt is due; of the others only its key waits."""
        self._report.verdict(delivery, verdict)
        if verdict.action is not Action.WAIT:
            headers = deadletter.failed(delivery, verdict.error, self.kit.clock.time())
            delivery.message.headers = MappingProxyType(headers)
            delivery.failures += 1
        if not self.runs_handlers:
            delivery.settled = True
            self._kept.add(delivery)
        self._resolve(delivery, None)
        if verdict.delay <= 0:
            self._due(delivery)
        else:
            self.lanes.parked[delivery] = self.kit.clock.call_later(verdict.delay, lambda: self._unpark(delivery))

    def _held_too_long(self, delivery: Delivery[Any], delay: float) -> bool:
        """Would this wait be longer than the broker lets a message be held? Then it gives it out anew, its count unchanged."""
        limit, now = self.kit.link.adapter.capabilities.park_limit, self.kit.clock.monotonic()
        return limit is not None and now + delay - self._postponed.setdefault(delivery, now) > limit

    def _unpark(self, delivery: Delivery[Any]) -> None:
        del self.lanes.parked[delivery]
        self._due(delivery)

    def _due(self, delivery: Delivery[Any]) -> None:
        """The next attempt, unless the run that asked for it, by hand, is not over yet."""
        if delivery in self._decided:
            self._decided[delivery] = True
        elif delivery.lost:
            self._forget(delivery)
            self.lanes.next_of_key(delivery)
        elif self._outlived(delivery, 0):
            self._reopen(delivery)
            self._expire(delivery)
        else:
            self.lanes.offer(delivery)

    # Settled

    def settled_all(self, deliveries: Sequence[Delivery[Any]]) -> None:
        """The settler is through with these, and all went well."""
        if self.at_most_once or self._waiters or self._moving:
            for delivery in deliveries:
                self.settled(delivery, None)
            return
        drop = self.holding.pop
        for delivery in deliveries:
            drop(delivery, None)
        if self._postponed:
            for delivery in deliveries:
                self._postponed.pop(delivery, None)
        self._room.set()

    def settled(self, delivery: Delivery[Any], error: TransportError | None) -> None:
        """The settler is through with a delivery."""
        if self.at_most_once and not delivery.settled and error is None:
            delivery.settled = True
            self.lanes.enqueue(delivery)
            return
        self._forget(delivery)
        self._resolve(delivery, error)
        if delivery in self._moving:
            self._moving.discard(delivery)
            self.lanes.next_of_key(delivery)

    def _forget(self, delivery: Delivery[Any]) -> None:
        self._kept.discard(delivery)
        self._postponed.pop(delivery, None)
        self._gone.discard(delivery)
        self.holding.pop(delivery, None)
        self._room.set()

    def _resolve(self, delivery: Delivery[Any], error: TransportError | None) -> None:
        if self._waiters and (waiter := self._waiters.pop(delivery, None)) is not None and not waiter.done():
            waiter.set_result(error)

    async def _hand_over(self) -> None:
        """Empty our hands, then subscribe anew: for one delivery at a time, or as usual again."""
        suspects, self._guard.suspects = self._guard.suspects, []
        try:
            if self._subscription is not None:
                await answered(self._subscription.stop())
            self._give_back_waiting()
            self._emptying = True
            while self.running:
                self._finished.clear()
                await self._finished.wait()
            self._guard.send_back(suspects)
            await self._settler.idle()
            await self._close_subscription()
        except Exception as error:  # the next subscribe meets it again
            log.warning("%s: %s", self.address, error, exc_info=not isinstance(error, UnibusError))
            await self._abandon()
        self._emptying = False
        self._guard.alone, self._guard.trusted = bool(suspects), 0

    # The end of a subscription

    def _give_back_waiting(self) -> None:
        """Release all that was not handed out."""
        self._give_back(self._take_waiting())

    def _give_back(self, deliveries: Iterable[Delivery[Any]]) -> None:
        for delivery in deliveries:
            delivery.settled = True
            self._settler.give_back(delivery)

    def _take_waiting(self) -> list[Delivery[Any]]:
        """Empty `ready`, the lanes and the parking place. A lane whose head is running stays: its key is still taken.

        What was settled first (at most once) is ours alone by now: it stays and runs.
        """
        if self.at_most_once:
            return []
        return self.lanes.empty(self.running | self._moving)

    async def _losing(self, deliveries: Sequence[Delivery[Any]], grace: float) -> None:
        """`Source.losing`: the driver gives these up. What waits is dropped; what runs may finish within `grace`."""
        losing = set(deliveries)
        self._drop_waiting(losing)
        if grace > 0:
            try:
                await within(self.kit.clock, grace, self._until_settled(losing))
            except TimeoutError:
                log.warning("%s: %d deliveries taken away while they ran", self.address, len(losing & self.running))
        self._lost(losing)

    def _lease_lost(self, deliveries: list[Delivery[Any]]) -> None:
        """The heartbeat has found these to be no longer ours. What waits is not begun."""
        losing = self.holding.keys() & deliveries  # not those that were settled meanwhile
        waiting = self._drop_waiting(losing)
        for delivery in waiting:
            self._report.lost(delivery, "it had not begun")
        self._lost(losing - waiting)

    def _drop_waiting(self, losing: set[Delivery[Any]]) -> set[Delivery[Any]]:
        """Those of `losing` that no handler has begun: they are forgotten. What was settled first is ours alone by now."""
        waiting = set() if self.at_most_once else self.lanes.remove(losing)
        for delivery in waiting:
            delivery.lost = True
            self._forget(delivery)
        return waiting

    def _lost(self, deliveries: Iterable[Delivery[Any]]) -> None:
        """These are no longer ours, and come again. Their handlers see it, or are cancelled."""
        running = set()
        for delivery in deliveries:
            undecided = delivery in self.running and not (delivery.settled or delivery in self._decided)
            if undecided and delivery not in self._gone:
                running.add(delivery)
                self._gone.add(delivery)
                self._report.lost(delivery, "its handler is cancelled" if self.cancel else "its handler goes on")
            delivery.lost = True
        if running and self.cancel is not None:
            self.cancel(running)

    async def _until_settled(self, deliveries: set[Delivery[Any]]) -> None:
        while deliveries & self.holding.keys():
            self._room.clear()
            await self._room.wait()

    def _link_lost(self) -> None:
        """At once: nothing is begun that came by it, before the loop gets to `_abandon`."""
        for delivery in self._take_waiting():
            delivery.lost = True
            self._forget(delivery)
        self._room.set()

    async def _abandon(self) -> None:
        """The link or the subscription is gone: so is all that came by it."""
        self.subscribed.clear()
        for delivery in self._take_waiting():
            self._forget(delivery)
        self._lost(self.holding)
        self._guard.suspects.clear()
        await self._close_subscription()

    async def _close_subscription(self, seconds: float = LONGEST_CLOSE) -> None:
        subscription, self._subscription = self._subscription, None
        self._settler.subscription = None
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        self._end_watch()
        if subscription is not None:
            try:
                await within(self.kit.clock, seconds, answered(subscription.close()))
            except Exception as error:  # it is over in any case
                self._disorder("close", error, seconds)

    def _end_watch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def _disorder(self, what: str, error: Exception, seconds: float) -> None:
        if isinstance(error, TimeoutError) and not isinstance(error, TransportError):
            log.error("%s: the subscription did not %s within %.3g s; left behind", self.address, what, seconds)
            return
        level = logging.DEBUG if isinstance(error, TransportError) else logging.ERROR
        trace = None if isinstance(error, TransportError) else error
        log.log(level, "%s: the subscription did not %s in order: %s", self.address, what, error, exc_info=trace)

    async def stop(self, seconds: float) -> None:
        """Take no more, and give back what was not handed out. What runs can still be settled.

        `seconds`: that the driver has to stop.
        """
        self._stopping = self._settler.stopping = True
        self._end_watch()
        self.kit.link.on_lost.discard(self._link_lost)
        # Out of the lanes at once, since the driver may take long to stop, and a handler that ends meanwhile would make room
        # for the next message. Given back only afterwards: this consumer could still get it again.
        waiting = self._take_waiting()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        waiting += self._take_waiting()
        if self._subscription is not None:
            try:
                await within(self.kit.clock, seconds, answered(self._subscription.stop()))
            except Exception as error:
                self._disorder("stop", error, seconds)
        self._give_back([*waiting, *self._take_waiting()])

    async def close(self, deadline: Deadline) -> None:
        """After `stop`: settle what finished, then end the subscription; what still runs goes back by itself.

        What a user holds by hand is given back: left to the broker it would count as a crash.
        """
        if not self.runs_handlers:
            for delivery in [held for held in self.running if not (held.settled or held.lost)]:
                self._taken_back.add(delivery)
                self.finish(delivery, retry.RELEASE)
        try:
            await within(self.kit.clock, deadline.left(), self._settler.idle())
        except TimeoutError:
            await self._give_up()
        await self._close_subscription(deadline.left())
        if self.at_most_once:
            for delivery in [*self.lanes.ready, *self.lanes.behind()]:
                self.finish(delivery, retry.RELEASE)
        self.lanes.end(Closed(f"no more is received from {self.address}"))

    async def _give_up(self) -> None:
        """The broker has not answered by the deadline: what was decided and not told comes again."""
        await self._settler.give_up()
        fate = "they come again or, at most once, never" if self.at_most_once else "they come again"
        log.error("%s: %d deliveries not settled by the end of the drain; %s", self.address, len(self.holding), fate)
        for delivery in list(self.holding):
            delivery.lost = True
            self._resolve(delivery, LeaseLost(f"message {delivery.message.id}: not settled by the end of the drain"))
            self._forget(delivery)

    # For health and tests

    def moving(self) -> bool:
        """Is anything on its way to or from a handler?"""
        return bool(self.lanes.ready or self._settler.busy())

    def busy(self) -> bool:
        """Is there anything to do now, as opposed to later?"""
        return self.moving() or bool(self.running)

    def owes(self) -> bool:
        """At most once: is there anything that was settled and has not run yet?"""
        return self.at_most_once and bool(self.lanes)

    async def idle(self) -> None:
        """Until all that was finished so far is settled."""
        await self._settler.idle()

    async def complaint(self) -> str | None:
        """Why this intake doesn't receive as it should, or None."""
        unprotected = self.protection.trouble if self.protection else None
        if (trouble := self.trouble or self._settler.complaint() or unprotected) or self._stopping:
            return trouble
        if self._emptying:
            return f"{self.address}: nothing is received until its handlers end: the next message may have killed its consumers"
        if (subscription := self._subscription) is None:
            return f"{self.address}: not subscribed to yet"
        if await standing(subscription, self.kit.clock) == "gone":
            return f"{self.address}: its subscription is gone"
        return None
