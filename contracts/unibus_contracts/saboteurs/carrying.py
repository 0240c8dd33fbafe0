"""Saboteurs of carrying: body, headers and envelope arrive, but not as they were sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from unibus.adapter import Outgoing, Results
from unibus.channel import Inbox, Queue
from unibus.message import Message

from .base import Adapter, changed, saboteur


@saboteur(
    "Bodies are decoded as UTF-8 on the way, with a replacement for what is none.",
    "body.bytes_exact",
    "dlq.headers",
    "retry.message_is_unchanged",
    "invalid.undecodable_no_retry",
    "invalid.per_group",
)
class DecodesBodies(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, body=outgoing.message.body.decode("utf-8", "replace").encode()),)


@saboteur(
    "Bodies are text in ASCII: any other character is a question mark.",
    "body.types_roundtrip",
    "body.unicode_roundtrip",
    "reply.roundtrip",
)
class BodiesAreAscii(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, body=outgoing.message.body.decode("utf-8", "replace").encode("ascii", "replace")),)


@saboteur("White space at both ends of a body is stripped.", "body.bytes_exact")
class StripsBodies(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, body=outgoing.message.body.strip()),)


@saboteur("An empty body is not stored.", "body.bytes_exact", "invalid.undecodable_no_retry", "headers.exact")
class DropsEmptyBodies(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (outgoing,) if outgoing.message.body else ()


@saboteur("A body above a mebibyte is cut off there.", "size.at_max")
class CutsLargeBodies(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, body=outgoing.message.body[: 1 << 20]),)


@saboteur("Header names are in lower case.", "headers.names_exact", "headers.case_is_kept_or_refused", "headers.exact")
class LowersHeaderNames(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        headers = {name.lower(): value for name, value in outgoing.message.headers.items()}
        return (changed(outgoing, headers=headers and {**headers, "case": "lower"}),)


@saboteur("Header names above 100 characters are cut off.", "headers.names_exact")
class CutsHeaderNames(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, headers={name[:100]: v for name, v in outgoing.message.headers.items()}),)


@saboteur("Header values above 128 characters are cut off.", "headers.exact")
class CutsHeaderValues(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, headers={name: v[:128] for name, v in outgoing.message.headers.items()}),)


@saboteur("Header values are stripped of the space around them.", "headers.exact")
class StripsHeaderValues(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, headers={name: v.strip() for name, v in outgoing.message.headers.items()}),)


@saboteur("A header whose value looks like a number is one: 1.10 arrives as 1.1.", "headers.exact")
class ReadsNumbers(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        items = outgoing.message.headers.items()
        return (
            changed(
                outgoing,
                headers={
                    n: str(float(v))
                    if "." in v and v[:1].isdigit() and v.count(".") == 1 and v.replace(".", "").isdigit()
                    else v
                    for n, v in items
                },
            ),
        )


@saboteur(
    "A header without a value is dropped.",
    "headers.exact",
    "headers.to_parameters",
    "dlq.headers",
    "retry.message_is_unchanged",
)
class DropsEmptyHeaders(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, headers={name: v for name, v in outgoing.message.headers.items() if v}),)


@saboteur(
    "Only the first ten headers of a message are kept.", "headers.many", "headers.exact", "dlq.redriven_may_die_again"
)
class KeepsTenHeaders(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, headers=dict(itertools.islice(outgoing.message.headers.items(), 10))),)


@saboteur(
    "Header values are in Latin-1: what is not there is a question mark.",
    "headers.exact",
    "body.unicode_roundtrip",
)
class HeadersAreLatin(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        items = outgoing.message.headers.items()
        return (changed(outgoing, headers={n: v.encode("latin-1", "replace").decode("latin-1") for n, v in items}),)


@saboteur(
    "The trace of the sender is replaced by one of the driver's own.",
    "headers.trace_context_verbatim",
)
class TracesByItself(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        headers = dict(outgoing.message.headers)
        if "traceparent" in headers:
            headers["traceparent"] = "00-" + "1" * 32 + "-" + "2" * 16 + "-00"
        return (changed(outgoing, headers=headers),)


@saboteur(
    "Headers of the sender are lost.",
    "headers.senders_own_copy",
    "headers.to_parameters",
    "settle.unsettled_returns",
    "settle.release_is_uncounted",
    "delay.needs_no_consumer",
)
class LosesHeaders(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        kept = {name: v for name, v in outgoing.message.headers.items() if name.startswith("x-")}
        return (changed(outgoing, headers=kept),)


@saboteur("The driver adds a header of its own.", "headers.exact", "consume.metadata", "dlq.headers")
class AddsAHeader(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, headers={**outgoing.message.headers, "x-driver": "1"}),)


@saboteur(
    "The key is lost.",
    "size.keys",
    "order.one_key",
    "order.kept_over_retries",
    "order.of_a_group",
    "retry.message_is_unchanged",
)
class LosesTheKey(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, key=None),)


@saboteur("Keys are cut off at 128 characters.", "size.keys")
class CutsKeys(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, key=outgoing.message.key and outgoing.message.key[:128]),)


@saboteur("Type and content type of a message are lost.", "body.envelope_roundtrip", "dlq.redrive_returns_original")
class LosesTypes(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, type=None, content_type=None),)


@saboteur(
    "A message is stamped anew with each step, so a retry looks younger than it is.",
    "body.envelope_roundtrip",
    "dlq.redrive_returns_original",
    "retry.message_is_unchanged",
)
class StampsAnew(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, timestamp=self.inner.broker.clock.time()),)


@saboteur("The time of sending is lost.", "consume.metadata", "body.envelope_roundtrip")
class LosesTheTime(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, timestamp=None),)


@saboteur(
    "The expiry of a message is lost.",
    "ttl.is_told",
    "ttl.expired_is_not_handled",
    "body.envelope_roundtrip",
    "reply.expired_request_is_dropped",
    "dlq.expired_are_kept",
)
class LosesTheExpiry(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, expires_at=None),)


@saboteur(
    "The correlation id is lost.",
    "corr.preserved_or_begun",
    "corr.handlers_messages_inherit",
    "corr.threads_inherit",
    "corr.no_leak_between_handlers",
    "corr.survives_retry_dead_letter_redrive",
    "obs.failed_attempt_is_one_record",
    "obs.ids_on_records_of_a_handler",
)
class LosesTheCorrelation(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, correlation_id=None),)


@saboteur(
    "The id of the cause is lost.",
    "corr.handlers_messages_inherit",
    "corr.preserved_or_begun",
    "corr.threads_inherit",
    "reply.timeout",
    "reply.roundtrip",
)
class LosesTheCause(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, causation_id=None),)


@saboteur("The headers of an answer are lost, and with them that it is an error.", "reply.errors_are_answered")
class LosesTheReplyStatus(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, headers={}),) if isinstance(outgoing.to, Inbox) else (outgoing,)


@saboteur("A copy, as of a retry, loses the return address.", "reply.address_survives_retry")
class LosesTheReturnAddress(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (outgoing,) if outgoing.origin is None else (changed(outgoing, reply_to=None),)


@saboteur(
    "Every message gets a return address, whether an answer was asked for or not.", "reply.without_return_address"
)
class AddsAReturnAddress(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        to = outgoing.message.reply_to or "inbox.everybody"
        return (changed(outgoing, reply_to=to if isinstance(outgoing.to, Queue) else None),)


@saboteur(
    "A copy gets a new id: of a retry, a dead letter and a redrive alike.",
    "dlq.headers",
    "dlq.redrive_returns_original",
    "invalid.redrive_after_repair",
    "retry.message_is_unchanged",
    "corr.survives_retry_dead_letter_redrive",
    "once.failed_runs_again",
)
class RenamesCopies(Adapter):
    count = itertools.count(1)

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (outgoing,) if outgoing.origin is None else (changed(outgoing, id=f"copy-{next(self.count)}"),)


@saboteur(
    "A copy loses the correlation id.",
    "corr.survives_retry_dead_letter_redrive",
    "retry.message_is_unchanged",
    "dlq.redrive_returns_original",
)
class LosesTheCorrelationOfCopies(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (outgoing,) if outgoing.origin is None else (changed(outgoing, correlation_id=None),)


@saboteur(
    "A copy keeps only the sender's headers: the story of the failure is lost.",
    "retry.delayed_count",
    "dlq.headers",
    "dlq.headers_of_a_group",
    "dlq.at_once",
    "retry.goes_on_elsewhere",
    "retry.asked_for_counts",
    "retry.only_what_the_policy_names",
    "retry.attempt_by_hand",
    "dlq.redriven_may_die_again",
)
class ForgetsTheStory(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        own = {name: v for name, v in outgoing.message.headers.items() if not name.startswith("x-")}
        return (outgoing,) if outgoing.origin is None else (changed(outgoing, headers=own),)


@saboteur("The headers of a policy are cut off at ten characters.", "dlq.headers", "dlq.at_once")
class CutsTheStory(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        headers = {n: v[:10] if n.startswith("x-") else v for n, v in outgoing.message.headers.items()}
        return (changed(outgoing, headers=headers),)


@saboteur(
    "A bare message is no message of ours, and dropped.",
    "consume.foreign_ids_and_bodies",
    "publish.missing_among_present",
)
class DropsForeignMessages(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        return await super().send(batch, timeout)

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        bare = outgoing.message == Message(outgoing.message.body, id=outgoing.message.id)
        return () if bare else (outgoing,)
