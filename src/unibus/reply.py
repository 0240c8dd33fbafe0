"""Request and reply (EIP: Request-Reply, Return Address, Correlation Identifier).

A reply is matched by the id of the request's message, never by the conversation's correlation id. Each process has one
inbox, opened with its first request. A return address comes from outside and is not trusted.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from unibus import deadletter, retry, telemetry
from unibus.adapter import Outcome, Outgoing, Source, Subscription
from unibus.channel import Inbox, Queue
from unibus.clock import within
from unibus.codec import BodyCodec
from unibus.delivery import Delivery
from unibus.errors import Closed, CodecError, ConnectionLost, RemoteError, Timeout, TransportError, UnibusError
from unibus.handlers import InvalidHeader
from unibus.intake import LONGEST_CLOSE
from unibus.layers import Handling
from unibus.message import REPLY_ERROR, REPLY_STATUS, Message, new_id
from unibus.report import ANSWERED, extra
from unibus.retry import Action, RetryPolicy, Verdict
from unibus.settler import Kit
from unibus.supervisor import FATAL, back_off
from unibus.waiting import answered
from unibus.watchdog import Receiving, Watchdog

log = logging.getLogger("unibus")

ERROR = "error"  # the only x-reply-status that is written: a reply without one is a result
INBOX_PREFETCH = 1000
POLL = 5.0


class Requester:
    """The inbox of a process, and who waits for what in it."""

    def __init__(self, kit: Kit, inbox: Inbox) -> None:
        self._kit = kit
        self._source = Source(inbox, INBOX_PREFETCH)
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._address: str | None = None  # what goes into reply_to, while the inbox is open
        self._open = asyncio.Event()
        self._failure: UnibusError | None = None
        self._task: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._deaf = False  # it fell silent, and no receive has returned since

    async def request(self, outgoing: Outgoing, codec: BodyCodec, timeout: float) -> Any:
        """Send, and wait for the reply. Raises Timeout, RemoteError, ConnectionLost, CodecError, or what send raises."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        clock, message = self._kit.clock, outgoing.message
        sent: asyncio.Future[UnibusError | None] | None = None
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        where = outgoing.to

        def expire() -> None:
            if not future.done():
                future.set_exception(Timeout(f"no reply from {where} within {timeout:g} s"))

        ends = clock.time() + timeout  # not later: what opens the inbox is part of the wait
        timer = clock.call_later(timeout, expire)
        self._waiting[message.id] = future
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._run(), name="unibus inbox")
            await self._opened(future)
            message.reply_to = self._address
            message.expires_at = ends
            sent = self._kit.publisher.submit(outgoing, timeout)
            await asyncio.wait((sent, future), return_when=asyncio.FIRST_COMPLETED)
            if sent.done() and (error := sent.result()) is not None:
                raise error
            reply = await future
        finally:
            timer.cancel()
            if sent is not None and not sent.done():
                sent.cancel()  # nobody waits for the answer any more
            self._waiting.pop(message.id, None)
            if future.done() and not future.cancelled():
                future.exception()  # seen
            else:
                future.cancel()
        if reply.headers.get(REPLY_STATUS) == ERROR:
            kind, _, text = reply.headers.get(REPLY_ERROR, "").partition(": ")
            raise RemoteError(kind or "Error", text)
        return codec.decode(reply.body, reply.content_type)

    async def _opened(self, future: asyncio.Future[Message]) -> None:
        """Until the inbox is open, or the request's time is over."""
        if self._open.is_set():
            return
        opened = asyncio.ensure_future(self._open.wait())
        try:
            await asyncio.wait((opened, future), return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
        if future.done():
            future.result()
        if self._failure is not None:
            raise self._failure

    async def _run(self) -> None:
        """Keep the inbox open. Losing it fails the requests under way at once: their replies can't arrive any more."""
        link, failures = self._kit.link, 0
        while True:
            subscription: Subscription | None = None
            epoch = 0
            try:
                epoch = await link.up()
                subscription = await answered(link.adapter.subscribe(self._source))
                address = subscription.address
                self._address = address.name if isinstance(address, Inbox) else str(address)
                self._open.set()
                failures = 0
                if not self._deaf:
                    self._trouble = None
                await self._watched(subscription, epoch)
            except (Closed, *FATAL) as error:
                self._trouble = str(error)
                self._lose(error)
                self._failure = error
                self._open.set()
                return
            except Exception as error:
                self._trouble = str(error) or type(error).__name__
                if isinstance(error, ConnectionLost):
                    link.lost(epoch, error)
                else:
                    log.warning("the inbox failed: %s", error, exc_info=not isinstance(error, UnibusError))
                    await self._kit.clock.sleep(back_off(failures))
                    failures += 1
                lost = ConnectionLost("the inbox is gone, and with it the reply; the request may have been handled")
                lost.__cause__ = error
                self._lose(lost)
            finally:
                self._open.clear()
                if subscription is not None:
                    await self._leave(subscription)

    async def _watched(self, subscription: Subscription, epoch: int) -> None:
        """Receive. Raises what ends it; that it has fallen silent, too: if that was not the first time it may be the link."""
        why: list[str] = []
        receiving: asyncio.Task[None]

        def fell_silent(said: str) -> None:
            if not receiving.done():
                why.append(said)
                receiving.cancel()

        watchdog = Watchdog(subscription, self._kit.clock, fell_silent)
        receiving = asyncio.create_task(self._receive(subscription, watchdog.loop()))
        watchdog.begin()
        try:
            await asyncio.wait([receiving])
        finally:
            watchdog.stop()
            receiving.cancel()
            await asyncio.wait([receiving])
        if why:
            error = TransportError(f"nothing is received from it: {why[0]}")
            if self._deaf:
                self._kit.link.lost(epoch, error)
            self._deaf = True
            self._kit.counts.add(telemetry.RESUBSCRIBED, None)
            raise error
        receiving.result()

    async def _receive(self, subscription: Subscription, receiving: Receiving) -> None:
        while True:
            receiving.looks = 0
            deliveries = await answered(subscription.receive(INBOX_PREFETCH, POLL))
            if self._deaf:
                self._deaf, self._trouble = False, None
            for delivery in deliveries:
                future = self._waiting.get(delivery.message.causation_id or "")
                if future is None or future.done():
                    self._late(delivery)
                else:
                    future.set_result(delivery.message)
            if deliveries:
                await answered(subscription.settle(Outcome.ACCEPTED, deliveries))

    def complaint(self) -> str | None:
        """Why no reply can arrive, or None. Without a request so far there is no inbox, and nothing is missed."""
        if self._trouble is not None:
            return f"the inbox for replies: {self._trouble}"
        return "the inbox for replies is not open yet" if self._task is not None and not self._open.is_set() else None

    def _late(self, delivery: Delivery[Any]) -> None:
        self._kit.counts.add(telemetry.LATE_REPLIES, None)
        text = "reply %s came when nobody waited for it any more, to request %s; dropped"
        more = extra(self._source.address, delivery, Action.DISCARD.value, None, reason="late reply")
        log.info(text, delivery.message.id, delivery.message.causation_id, extra=more)

    def _lose(self, error: UnibusError) -> None:
        self._address = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    async def close(self) -> None:
        self._lose(Closed("the bus was closed before the reply came"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _leave(self, subscription: Subscription) -> None:
        try:
            await within(self._kit.clock, LONGEST_CLOSE, answered(subscription.close()))
        except TransportError as error:
            log.debug("the inbox did not close in order: %s", error)
        except TimeoutError:
            log.error("the inbox did not close within %g s; left behind", LONGEST_CLOSE)  # noqa: TRY400  # no fault of ours


class Responder:
    """Makes a consumer's handling of a handler that answers: result or error to the requester, then ack.

    An exception is answered at once. Only with a policy of its own (`retry=` was given) is the request tried again, and
    only as long as the next attempt starts before the requester's deadline. A reply that can't be sent never brings the
    request back: it was handled.
    """

    def __init__(
        self, kit: Kit, queue: Queue[Any], codec: BodyCodec, answer: Handling, policy: RetryPolicy | None
    ) -> None:
        self._kit = kit
        self._queue = queue
        self._codec = codec
        self._answer = answer
        self._policy = policy

    async def __call__(self, delivery: Delivery[Any]) -> None:
        try:
            result = await self._answer(delivery)
            body = self._codec.encode(result)
        except InvalidHeader:
            raise  # answered by `undecodable`
        except retry.DeadLetter as error:
            await self._reply_error(delivery, error)
            raise
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # not the handler's own: its timeout or the end of the drain
            if self._may_retry(delivery, error):
                raise
            await self._reply_error(delivery, error)
            if isinstance(error, retry.Discard):
                raise
            self._answered(delivery, error)
        else:
            await self._reply(delivery, Message(body, content_type=self._codec.content_type))

    async def timed_out(self, delivery: Delivery[Any], verdict: Verdict) -> Verdict:
        """The handler took too long: answered like any other failure."""
        error = verdict.error
        if error is None or self._may_retry(delivery, error):
            return verdict
        await self._reply_error(delivery, error)
        self._answered(delivery, error)
        return retry.ACK

    async def undecodable(self, delivery: Delivery[Any], error: CodecError) -> None:
        """A request that can't be read is answered too, so that its sender need not wait."""
        await self._reply_error(delivery, error)

    def _answered(self, delivery: Delivery[Any], error: BaseException) -> None:
        text = "%s: attempt %d of request %s failed and is answered with its error: %s"
        what, more = deadletter.describe(error), extra(self._queue, delivery, ANSWERED, error)
        log.warning(text, self._queue, delivery.attempt, delivery.message.id, what, exc_info=error, extra=more)

    def _may_retry(self, delivery: Delivery[Any], error: BaseException) -> bool:
        if self._policy is None:
            return False
        verdict = retry.decide(self._policy, delivery.failures, error)
        expires_at = delivery.message.expires_at
        in_time = expires_at is None or self._kit.clock.time() + verdict.delay < expires_at
        return verdict.action is Action.RETRY and in_time

    async def _reply_error(self, delivery: Delivery[Any], error: BaseException) -> None:
        text = deadletter.one_line(f"{type(error).__name__}: {deadletter.error_text(error)}", 1024)
        headers = {REPLY_STATUS: ERROR, REPLY_ERROR: text}
        await self._reply(delivery, Message(b"", headers=headers))

    async def _reply(self, delivery: Delivery[Any], reply: Message) -> None:
        request, counts = delivery.message, self._kit.counts
        if request.reply_to is None:
            more = extra(self._queue, delivery, Action.DISCARD.value, None, reason="no return address")
            text = "%s: request %s has no return address; its answer is dropped"
            log.warning(text, self._queue, request.id, extra=more)
            counts.add(telemetry.REPLIES_FAILED, self._queue)
            return
        clock = self._kit.clock
        reply.id = new_id()
        reply.causation_id = request.id
        reply.correlation_id = request.correlation_id
        reply.timestamp = clock.time()
        reply.expires_at = request.expires_at
        timeout = None
        if request.expires_at is not None:
            timeout = max(0.0, min(request.expires_at - reply.timestamp, self._kit.publisher.timeout))
        error: UnibusError | None
        try:
            to = self._kit.link.adapter.reply_to(request.reply_to)
            error = await self._kit.publisher.submit(Outgoing(to, reply), timeout)
        except UnibusError as refused:
            error = refused
        except Exception as broken:  # the address is untrusted, and the request was handled
            log.exception("%s: the adapter failed on the return address of request %s", self._queue, request.id)
            error = UnibusError(f"the adapter failed: {type(broken).__name__}")
        if error is None:
            counts.add(telemetry.REPLIED, self._queue)
        else:
            counts.add(telemetry.REPLIES_FAILED, self._queue)
            more = extra(self._queue, delivery, Action.DISCARD.value, error, reason="reply not delivered")
            text = "%s: the reply to request %s was not delivered: %s"
            log.warning(text, self._queue, request.id, error, extra=more)
