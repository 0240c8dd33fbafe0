"""Saboteurs of sending: what was confirmed is not there, is there twice, or the wrong call is told."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from unibus.adapter import Endpoint, Outgoing, Results
from unibus.channel import Inbox, Queue, Topic
from unibus.errors import ConnectionLost, NotFound, Throttled, Unroutable

from .base import Adapter, changed, saboteur


@saboteur(
    "Every hundredth message is confirmed, and not stored.",
    "consume.roundtrip",
    "competing.each_once",
    "publish.many_publishers",
)
class DropsTheHundredth(Adapter):
    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.count = itertools.count(1)

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return () if next(self.count) % 100 == 0 else (outgoing,)


@saboteur("What is sent while there is no link is confirmed.", "fault.cut_loses_nothing")
class ConfirmsWithoutALink(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        try:
            return await super().send(batch, timeout)
        except ConnectionLost:
            return [None] * len(batch)


@saboteur(
    "A send is confirmed before it is stored; what is not stored yet when the link is closed is lost.",
    "publish.returns_after_broker_accept",
    "publish.from_synchronous_code",
    "shutdown.sends_are_decided",
    "consume.before_subscription",
)
class ConfirmsBeforeItStores(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        self.task = asyncio.create_task(self.later(batch, timeout))
        return [None] * len(batch)

    async def later(self, batch: Sequence[Outgoing], timeout: float) -> None:
        await asyncio.sleep(0.1)
        try:
            await self.inner.send(batch, timeout)
        except ConnectionLost:
            return


@saboteur(
    "A time of sending that does not fit into 32 bits can't be written, so such a message can go nowhere once it has failed.",
    "dlq.any_time_of_sending",
)
class WritesTimesOf32Bits(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        if outgoing.origin is not None:
            struct.pack(">I", int(outgoing.message.timestamp or 0))
        return (outgoing,)


@saboteur(
    "Every tenth message is stored twice, as by a client that sends again after a confirm that was only late.",
    "competing.each_once",
    "publish.many_returns_ids",
    "obs.counts_equal_what_happened",
    "consume.batch_handler",
    "prefetch.resumes",
    "retry.none_lost_in_a_crowd",
)
class StoresEveryTenthTwice(Adapter):
    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.count = itertools.count(1)

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (outgoing,) * (2 if next(self.count) % 10 == 0 else 1)


@saboteur(
    "Each call is put on the wire twice, as by a client library that retries by itself.",
    "publish.closed_raises",
    "publish.unknown_name_raises",
    "publish.cancel_is_indeterminate",
    "settle.cancelled_handler_never_acks",
    "retry.edits_are_rolled_back",
    "reply.without_return_address",
    "declare.verify_accepts_what_is_there",
    "declare.policy_may_change",
)
class SendsTwice(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        await self.inner.send(batch, timeout)
        return await self.inner.send(batch, timeout)


@saboteur(
    "Of a call with more than a thousand messages, or exactly as many, the last one is forgotten.",
    "publish.batches_are_split",
)
class ForgetsTheLastOfAFullBatch(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        if len(batch) < 1000:
            return await super().send(batch, timeout)
        return [*await super().send(batch[:-1], timeout), None]


@saboteur(
    "A queue that is missing is made by the first send to it.",
    "publish.missing_destination_raises",
    "publish.missing_topic_raises",
    "publish.missing_among_present",
    "publish.missing_destination_same_id",
)
class MakesWhatIsMissing(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        for outgoing in batch:
            key = self.inner._key(outgoing.to)
            if key is not None and not self.inner.broker.has(key):
                self.inner.broker.make(key, outgoing.to)
        return await super().send(batch, timeout)


@saboteur(
    "A message to a queue that is missing is dropped without a word.",
    "publish.missing_destination_raises",
    "publish.missing_among_present",
    "dlq.missing_target_keeps_message",
    "invalid.missing_target_keeps_message",
)
class DropsTheUnroutable(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        missing = isinstance(self.inner.route(outgoing)[1], NotFound)
        return () if missing else (outgoing,)


@saboteur("A publish to a topic that is missing is taken for one without groups.", "publish.missing_topic_raises")
class TakesMissingTopicsForEmpty(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        results = await super().send(batch, timeout)
        empty = [isinstance(out.to, Topic) and isinstance(e, NotFound) for out, e in zip(batch, results, strict=True)]
        return [Unroutable("no group") if e else result for e, result in zip(empty, results, strict=True)]


@saboteur(
    "Results are looked up by the message's id, so that of several with one id only the last has an error.",
    "publish.missing_destination_same_id",
)
class FindsResultsById(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        results = await super().send(batch, timeout)
        last = {outgoing.message.id: n for n, outgoing in enumerate(batch)}
        return [e if last[out.message.id] == n else None for n, (out, e) in enumerate(zip(batch, results, strict=True))]


@saboteur(
    "The first error of a call is the result of all its messages.",
    "publish.missing_among_present",
)
class BlamesTheWholeBatch(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        results = await super().send(batch, timeout)
        return [next((error for error in results if error is not None), None)] * len(batch)


@saboteur(
    "An error of the broker is swallowed: every send has succeeded.",
    "publish.missing_destination_raises",
    "publish.missing_topic_raises",
    "publish.missing_destination_same_id",
    "publish.no_group_is_counted",
    "fanout.broadcast_leaves_nothing",
    "reply.inbox_ends_with_its_process",
)
class SwallowsErrors(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        await super().send(batch, timeout)
        return [None] * len(batch)


@saboteur(
    "The first send of a call is throttled after it was stored, so it is sent again.",
    "publish.ids_are_kept",
    "publish.many_returns_ids",
    "body.bytes_exact",
    "size.one_of_many",
)
class ThrottlesWhatItHasStored(Adapter):
    throttled: frozenset[str] = frozenset()

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        results = await super().send(batch, timeout)
        first = batch[0].message.id
        if first in self.throttled:
            return results
        self.throttled |= {first}
        return [Throttled("slow down"), *results[1:]]


@saboteur(
    "Each message gets a new id on its way.",
    "publish.returns_after_broker_accept",
    "publish.ids_are_kept",
    "publish.many_returns_ids",
    "consume.metadata",
    "consume.foreign_ids_and_bodies",
    "body.envelope_roundtrip",
    "corr.survives_retry_dead_letter_redrive",
    "reply.roundtrip",
    "settle.unsettled_returns",
    "once.copies_run_once",
)
class GivesNewIds(Adapter):
    count = itertools.count(1)

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, id=f"new-{next(self.count)}"),)


@saboteur(
    "The messages of one call all get the headers of the first one, since the object is shared.",
    "publish.many_publishers",
)
class SharesHeadersInABatch(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        shared = batch[0].message.headers
        return await super().send([changed(outgoing, headers=shared) for outgoing in batch], timeout)


@saboteur(
    "The messages of one call all get the correlation of the first one, since the object is shared.",
    "corr.no_leak_between_handlers",
)
class SharesCorrelationInABatch(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        first = batch[0].message
        same = {"correlation_id": first.correlation_id, "causation_id": first.causation_id}
        return await super().send([changed(outgoing, **same) for outgoing in batch], timeout)


@saboteur(
    "The messages of one call are stored in reverse.",
    "order.of_one_call",
)
class StoresBatchesInReverse(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        return list(reversed(await super().send(batch[::-1], timeout)))


@saboteur(
    "Calls overtake each other: every third one is stored a moment after it was confirmed.",
    "order.one_key",
    "order.per_publisher",
    "order.of_a_group",
    "order.sends_not_awaited",
    "order.of_send_many",
    "order.per_key_competing",
)
class LetsCallsOvertake(Adapter):
    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.calls: list[asyncio.Task[Results]] = []

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        self.calls.append(asyncio.create_task(self.later(batch, timeout, 0.0 if len(self.calls) % 3 else 0.02)))
        return [None] * len(batch) if len(self.calls) % 3 == 1 else await self.calls[-1]

    async def later(self, batch: Sequence[Outgoing], timeout: float, wait: float) -> Results:
        await asyncio.sleep(wait)
        return await super().send(batch, timeout)


@saboteur(
    "Whatever has the same correlation id was sent already, and is dropped.",
    "retry.sends_of_a_failed_attempt",
    "corr.handlers_messages_inherit",
    "reply.many_from_one_handler",
)
class DeduplicatesByCorrelation(Adapter):
    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.seen: set[Any] = set()

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        known = outgoing.to, outgoing.message.correlation_id
        new = outgoing.message.correlation_id is None or outgoing.origin is not None or known not in self.seen
        self.seen.add(known)
        return (outgoing,) if new else ()


@saboteur(
    "What is sent stays in this process: only its own consumers get it.",
    "publish.returns_after_broker_accept",
    "consume.before_subscription",
    "publish.from_synchronous_code",
    "reply.roundtrip",
    "fanout.offline_group_keeps_backlog",
)
class KeepsToItself(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        local = any(s.source.address == outgoing.to for s in self.inner._subscriptions)
        return (outgoing,) if local or outgoing.origin is not None else ()


@saboteur(
    "Replies go to the inbox that was opened first.",
    "reply.private",
    "reply.roundtrip",
)
class AnswersTheWrongRequester(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        inboxes = [key[1] for key in self.inner.broker._places if key[0] == "inbox"]
        if isinstance(outgoing.to, Inbox) and inboxes:
            outgoing.to = Inbox(inboxes[0])
        return (outgoing,)


@saboteur(
    "Answers that are on their way at once come back in each other's place.",
    "reply.matched_when_shuffled",
    "reply.many_from_one_handler",
)
class MixesUpAnswers(Adapter):
    last: Outgoing | None = None

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        if not isinstance(outgoing.to, Inbox):
            return (outgoing,)
        before, self.last = self.last, outgoing
        return (outgoing,) if before is None else (changed(outgoing, body=before.message.body),)


@saboteur("A name longer than forty characters is refused by the broker.", "unicode.destination_names")
class RefusesLongNames(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return () if isinstance(outgoing.to, Queue) and len(outgoing.to.name) > 40 else (outgoing,)
