"""Dead letters: the headers that failed messages carry, which is pure; and looking at and redriving them."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from math import ceil
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Never

from unibus import message as names
from unibus.adapter import Outgoing, Source
from unibus.channel import Address, Group, Queue, Topic, dead_letter_queue, invalid_queue, stem
from unibus.codec import BodyCodec
from unibus.delivery import Delivery
from unibus.errors import CodecError, ConfigError, Unsupported
from unibus.message import Message
from unibus.retry import BROKER_LIMIT, CRASH_LOOP, EXPIRED, UNDECODABLE, Action, Verdict
from unibus.telemetry import PURGED, REDRIVEN

if TYPE_CHECKING:
    from unibus.bus import Bus
    from unibus.intake import Intake
    from unibus.session import Session

ERROR_BYTES = 1024  # with all the other headers it must fit an AMQP frame and the attributes of SQS
_READ_CHARS = 8192  # of an error's text, which may hold a whole body
_CREDENTIALS = re.compile(r"://\S{1,2048}@")  # bounded: with `+` a text full of "://" takes quadratic time

# Reasons for which no handler ran: nothing is added to the failed attempts.
_NOT_RUN = frozenset((UNDECODABLE, EXPIRED, CRASH_LOOP, BROKER_LIMIT))
# Frames between the core and the handler. The last two lie there when a plain function runs in a thread.
_NOT_APP = frozenset(("unibus", "asyncio", "concurrent"))

_STORY = frozenset(  # of one life of a message; a redrive begins a new one
    (
        names.RETRY_COUNT,
        names.CRASH_COUNT,
        names.ORIGINAL_ERROR,
        names.ERROR_TYPE,
        names.ERROR_STACK_DIGEST,
        names.FIRST_FAILED_AT,
        names.LAST_FAILED_AT,
    )
)
_DEATH = frozenset(
    (
        names.MOVED_TO_DLQ_AT,
        names.DLQ_REASON,
        names.ORIGINAL_DESTINATION,
        names.ORIGINAL_SUBSCRIPTION,
        names.ORIGINAL_POSITION,
    )
)
_NOT_ON_A_RETRY = names.BROKER_HEADERS | _DEATH
_NOT_ON_A_REDRIVE = names.BROKER_HEADERS | _DEATH | _STORY


def retry_count(headers: Mapping[str, str]) -> int:
    """Failed attempts that count: `x-retry-count`, or 0 where it is no number.

    Also 0 on a message that came back from a dead-letter channel by the broker's own tools, which reset nothing: it
    would be dead again after one failure.
    """
    return 0 if names.MOVED_TO_DLQ_AT in headers else _number(headers.get(names.RETRY_COUNT))


def crash_count(headers: Mapping[str, str]) -> int:
    """How often the message is suspected to have killed its consumer: `x-crash-count`, by the rules of `retry_count`."""
    return 0 if names.MOVED_TO_DLQ_AT in headers else _number(headers.get(names.CRASH_COUNT))


def failed(delivery: Delivery[Any], error: BaseException | None, now: float) -> dict[str, str]:
    """The headers of a retry copy, after a run that failed. `now`: epoch seconds.

    The user's headers stay; the count is one more than the delivery's `failures`.
    """
    headers = {k: v for k, v in delivery.message.headers.items() if k not in _NOT_ON_A_RETRY}
    headers[names.RETRY_COUNT] = str(delivery.failures + 1)
    _tell(headers, error, now)
    return headers


def dead(delivery: Delivery[Any], reason: str, error: BaseException | None, now: float) -> dict[str, str]:
    """All headers of a dead letter or an invalid message. `reason`: a value of `x-dlq-reason`; `now`: epoch seconds.

    The user's headers and the redrive count stay. Where no handler ran (expired, undecodable, a crash loop) the count of
    failed attempts is what it was, and without an error the last one's story stays.
    """
    ran = reason not in _NOT_RUN or (reason == EXPIRED and error is not None)  # the latter: no time left for a retry
    headers = {k: v for k, v in delivery.message.headers.items() if k not in _NOT_ON_A_RETRY}
    headers[names.RETRY_COUNT] = str(delivery.failures + ran)
    if ran or error is not None:
        _tell(headers, error, now)
    headers[names.MOVED_TO_DLQ_AT] = stamp(now)
    headers[names.DLQ_REASON] = one_line(reason, 128)
    headers |= origin(delivery.source.address)
    if delivery.position:
        headers[names.ORIGINAL_POSITION] = one_line(delivery.position, 256)
    return headers


def origin(address: Address) -> dict[str, str]:
    """Where a dead letter failed, as its headers say it."""
    where = stem(address.topic if isinstance(address, Group) else address)
    return {names.ORIGINAL_DESTINATION: where, names.ORIGINAL_SUBSCRIPTION: address.name}


def explain(message: Message, reason: str, at: float | None, source: Address | str) -> None:
    """Of what the broker itself has moved here: the headers that the core would have given it, where it has none.

    `source`: the address that it was a message of, or the broker's name where nobody knows more.
    """
    if names.DLQ_REASON in message.headers:
        return
    added = {names.ORIGINAL_DESTINATION: source} if isinstance(source, str) else origin(source)
    if at is not None:
        added[names.MOVED_TO_DLQ_AT] = stamp(at)
    message.headers = {**message.headers, **added, names.DLQ_REASON: reason}


def copy(message: Message, headers: Mapping[str, str], **changes: Any) -> Message:
    """The same message with other headers, and `changes` to other fields. The body is shared, not copied.

    `delay` is not taken over: it was the first sender's, and has passed.
    """
    again = Message(
        message.body,
        message.id,
        message.type,
        message.content_type,
        headers,
        message.key,
        message.correlation_id,
        message.causation_id,
        message.reply_to,
        message.timestamp,
        message.expires_at,
        message.priority,
    )
    for name, value in changes.items():
        setattr(again, name, value)
    return again


def redriven(message: Message) -> Message:
    """A dead letter as it goes back to where it failed: id, body, key and the user's headers the same, all counts at 0.

    `x-redrive-count` is one more. An expiry is taken off: who redrives an expired message wants it to be handled.
    """
    headers = {k: v for k, v in message.headers.items() if k not in _NOT_ON_A_REDRIVE}
    headers[names.REDRIVE_COUNT] = str(_number(message.headers.get(names.REDRIVE_COUNT)) + 1)
    return copy(message, headers, expires_at=None)


def stamp(now: float) -> str:
    """Epoch seconds as RFC 3339, UTC, milliseconds: `2023-11-14T22:13:20.000Z`."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe(error: BaseException | None) -> str:
    """Class and text of an error in one line, for logs: short, no credentials of URLs."""
    if error is None:
        return "no error"
    text = error_text(error)
    return f"{type(error).__qualname__}: {text}" if text else type(error).__qualname__


def error_text(error: BaseException) -> str:
    """The text of an error as a header value: one line, 1 KiB at most, credentials in URLs masked."""
    try:
        text = str(error)
    except Exception:  # a broken __str__ must not hide the failure itself
        return "(its text can't be had)"
    if len(text) > _READ_CHARS:
        text = text[:_READ_CHARS].rpartition(" ")[0] or text[:_READ_CHARS]  # half a URL would not be recognised
    return one_line(_CREDENTIALS.sub("://****@", text), ERROR_BYTES)


def one_line(text: str, limit: int) -> str:
    """What every broker carries: printable, no line breaks, at most `limit` bytes of UTF-8."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) * 4 <= limit:
        return line
    return line.encode()[:limit].decode(errors="ignore").rstrip()


def _tell(headers: dict[str, str], error: BaseException | None, now: float) -> None:
    """Put the story of one failure into `headers`: the newest error replaces the one before."""
    at = stamp(now)
    headers.setdefault(names.FIRST_FAILED_AT, at)
    headers[names.LAST_FAILED_AT] = at
    for name in (names.ORIGINAL_ERROR, names.ERROR_TYPE, names.ERROR_STACK_DIGEST):
        headers.pop(name, None)
    if error is None:
        return
    kind = type(error)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    headers[names.ERROR_TYPE] = one_line(module + kind.__qualname__, 256)
    if text := error_text(error):
        headers[names.ORIGINAL_ERROR] = text
    if digest := stack_digest(error):
        headers[names.ERROR_STACK_DIGEST] = digest


def stack_digest(error: BaseException) -> str:
    """16 hex digits that are the same for failures of the same path through the code; empty if it was never raised.

    Of (file, function) of each frame below the handler's call, libraries included, unibus and asyncio left out. Not of
    line numbers: an edit elsewhere in the file must not split a group of dead letters. A recursion counts once.
    """
    frames: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if root not in _NOT_APP:
            code = frame.f_code
            entry = f"{PurePath(code.co_filename).name}:{code.co_name}"
            if not frames or frames[-1] != entry:
                frames.append(entry)
        trace = trace.tb_next
    return hashlib.sha256("\n".join(frames).encode()).hexdigest()[:16] if frames else ""


def _number(text: str | None) -> int:
    """A count from a header that anybody may have written."""
    return int(text) if text and len(text) <= 9 and text.isascii() and text.isdecimal() else 0


# Looking and redriving

PAGE = 100  # deliveries at a time
QUIET = 5.0  # seconds without a message that mean that there are no more
MOST_HELD = 10_000  # dead letters that one redrive holds back because `where` didn't choose them


def browse(
    bus: Bus, channel: Queue[Any] | Topic[Any] | str, *, group: str | None = None, invalid: bool = False
) -> AsyncGenerator[Delivery[Any], None]:
    """Look at the dead letters of a queue, or of one group of a topic, without taking them.

    `invalid`: look at its invalid-message channel instead. The bodies are decoded where that is possible, else bytes. Where the
    broker can't look, the messages are taken and handed back (`bus.capabilities.browse` says so), which reorders them.
    """
    session = bus._opened()
    address = session.address(channel, group)
    queue = invalid_queue(address) if invalid else dead_letter_queue(address)
    return look(session, queue, session.codec(channel))


async def look(
    session: Session, address: Queue[Any] | Group, codec: BodyCodec, page: int = PAGE
) -> AsyncGenerator[Delivery[Any], None]:
    """What waits at an address, as `browse` shows it. `page`: how many are looked at in one go."""
    link = session.kit.link
    support = link.adapter.capabilities.browse
    if not support:  # also where there is nothing to be seen
        raise Unsupported(f"{link.adapter.capabilities.adapter} can't look at messages: {support.how}")
    waiting = await link.ask(lambda: link.adapter.backlog(address))
    left = waiting.ready if waiting.exact else float("inf")
    if not left:
        return
    subscription = await link.ask(lambda: link.adapter.subscribe(Source(address, page, browse=True)))
    try:
        while left > 0 and (deliveries := await subscription.receive(page, QUIET)):
            for delivery in deliveries:
                left -= 1
                delivery.settler = _LOOKING
                if delivery.message.correlation_id is None:  # its own conversation, as a handler sees it
                    delivery.message.correlation_id = delivery.message.id
                delivery.body = readable(codec, delivery.message)
                yield delivery
    finally:
        await subscription.stop()
        await subscription.close()


async def redrive(
    bus: Bus,
    channel: Queue[Any] | Topic[Any] | str,
    *,
    group: str | None = None,
    invalid: bool = False,
    where: Callable[[Delivery[Any]], bool] | None = None,
    limit: int | None = None,
    rate: float | None = None,
) -> int:
    """Send dead letters back to the queue or group where they failed, counts reset; the number of those sent.

    Each is gone from the dead-letter channel once its copy is confirmed: interrupted, it loses nothing, and can be run
    again. `where` chooses by the delivery, as `browse` shows it; `limit`: how many at most; `rate`: how many a second at most;
    `invalid`: from the invalid-message channel. What is not chosen stays.
    """
    address = bus._opened().address(channel, group)

    async def send_back(intake: Intake, chosen: Sequence[Delivery[Any]]) -> None:
        await intake.relocate([(d, Outgoing(address, redriven(d.message), None, d)) for d in chosen])

    return await _empty(bus, channel, group, send_back, REDRIVEN, invalid, where, limit, rate)


async def purge(
    bus: Bus,
    channel: Queue[Any] | Topic[Any] | str,
    *,
    group: str | None = None,
    invalid: bool = False,
    where: Callable[[Delivery[Any]], bool] | None = None,
    limit: int | None = None,
    rate: float | None = None,
) -> int:
    """Delete dead letters for good, each with its record in the log; the number of those deleted. Parameters as for `redrive`."""

    async def delete(intake: Intake, chosen: Sequence[Delivery[Any]]) -> None:
        discard = Verdict(Action.DISCARD, reason=PURGED)  # each is logged with its id, as all that is discarded
        await asyncio.gather(*(intake.settle(delivery, discard) for delivery in chosen))

    return await _empty(bus, channel, group, delete, PURGED, invalid, where, limit, rate)


async def _empty(
    bus: Bus,
    channel: Queue[Any] | Topic[Any] | str,
    group: str | None,
    act: Callable[[Intake, Sequence[Delivery[Any]]], Awaitable[None]],
    event: str,
    invalid: bool,
    where: Callable[[Delivery[Any]], bool] | None,
    limit: int | None,
    rate: float | None,
) -> int:
    """Take the dead letters, and `act` on those that are chosen; the others go back in the end."""
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"rate={rate}: use messages a second, above 0")
    session = bus._opened()
    address = session.address(channel, group)
    queue = invalid_queue(address) if invalid else dead_letter_queue(address)
    link = session.kit.link
    waiting = await link.ask(lambda: link.adapter.backlog(queue))
    left = waiting.ready if waiting.exact else MOST_HELD
    if limit is not None and where is None:
        left = min(left, limit)
    if left <= 0:
        return 0
    codec, clock = session.codec(channel), session.kit.clock
    page = PAGE if rate is None else min(PAGE, ceil(rate))
    done, begun = 0, clock.monotonic()
    seen: set[str] = set()  # where the broker only estimates, what dies again meanwhile would be sent back for ever
    intake = session.intake(queue, min(left, MOST_HELD), trusting=True)
    intake.begin()
    try:
        while left > 0 and (limit is None or done < limit):
            if rate is not None and (early := begun + done / rate - clock.monotonic()) > 0:
                await clock.sleep(early)
            batch = await intake.take_some(min(left, page), QUIET)
            if not batch:
                break
            left -= len(batch)
            for delivery in batch:
                delivery.body = readable(codec, delivery.message)
            chosen = [d for d in batch if d.message.id not in seen and (where is None or where(d))]
            if limit is not None:
                del chosen[limit - done :]
            await act(intake, chosen)
            done += len(chosen)
            if not waiting.exact:
                seen.update(d.message.id for d in chosen)
            session.kit.counts.add(event, address, len(chosen))
    finally:
        await session.end(intake)
    return done


class _Looking:
    """The settler of a delivery that was only looked at."""

    async def settle(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        self.judge(delivery, None)

    def judge(self, delivery: Delivery[Any], error: BaseException | None) -> Never:
        raise Unsupported(f"message {delivery.message.id} was only looked at; redrive it, or receive from its queue")


_LOOKING = _Looking()


def readable(codec: BodyCodec, message: Message) -> Any:
    """The decoded body, or the bytes if they can't be decoded."""
    try:
        return codec.decode(message.body, message.content_type)
    except CodecError:
        return message.body
