"""The demo: sends a file of orders, waits until each has come to rest, and compares what happened with what had to.

It looks at the service from outside: at the journal of its effects, and at its dead letters. So it is the same whether
the handlers run in this process or in others that are killed and started again meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from examples.orders.generate import CATALOGUE, expectations
from examples.orders.payments import Journal
from examples.orders.service import Ask, Order, Price, Repaired, bus, orders, quotes, repaired
from unibus import Message, RemoteError, deadletter
from unibus.message import DLQ_REASON, ORIGINAL_ERROR

CHUNK = 500
QUOTES = 200
UNKNOWN = 5  # quotes for articles that don't exist
POLL = 0.05
QUIET = 0.5  # seconds without an effect, after which it is worth to look at the dead letters
STALLED = 20.0  # seconds without any change, after which there is no hope

# What a dead letter died of -> its row in the table.
REASONS = {"retries_exhausted": "failed", "non_retryable": "refused", "expired": "expired"}


@dataclass
class Result:
    """What happened. Ids are counted once, however often a message was delivered."""

    sent: int = 0
    invalid: int = 0
    left: int = 0  # dead letters after the redrive
    answered: int = 0
    answered_with_error: int = 0
    seconds: float = 0.0


class Stalled(Exception):
    """Nothing changes any more, and not everything has come to rest."""


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line a second, when there is news."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._last, self._at = "", 0.0

    def show(self, text: str) -> None:
        if text == self._last or (not self._live and time.monotonic() < self._at + 1):
            return
        self._last, self._at = text, time.monotonic()
        print(f"\r\033[K  {text}" if self._live else f"  {text}", end="" if self._live else "\n", flush=True)

    def done(self, text: str) -> None:
        print(f"\r\033[K{text}" if self._live else text, flush=True)


class Demo:
    def __init__(self, file: Path, journal: Journal, *, handlers: bool) -> None:
        self.expected: Mapping[str, int] = json.loads(expectations(file).read_text(encoding="utf-8"))
        self.lines = file.read_bytes().splitlines()
        self.journal = journal
        self.result = Result()
        self._handlers = handlers
        self._progress = Progress()

    async def run(self) -> bool:
        """True when the numbers add up."""
        started = time.monotonic()
        stalled = None
        async with self._open():
            try:
                await self._send()
                await self._wait_for_all()
                await self._redrive()
                await self._ask()
            except Stalled as error:
                stalled = error
        self.result.seconds = time.monotonic() - started
        good = self._table()
        if stalled is not None:
            print(f"stalled: {stalled}")
        return good and stalled is None

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        if self._handlers:
            async with bus.running():
                yield
        else:  # they run in other processes: this one only sends, asks and looks
            async with bus:
                yield

    # The steps

    async def _send(self) -> None:
        for at in range(0, len(self.lines), CHUNK):
            batch = [_outgoing(number, line) for number, line in enumerate(self.lines[at : at + CHUNK], start=at + 1)]
            self.result.sent += len(await bus.send_many(orders, batch))
            self._progress.show(f"{self.result.sent} of {len(self.lines)} sent, {self._work()}")
        self._progress.done(f"sent: {self.result.sent} lines, each confirmed by the broker")

    async def _wait_for_all(self) -> None:
        async def all_at_rest() -> bool:
            letters, _ = await self._letters()
            self.result.invalid = await self._invalid()
            return self._at_rest(letters)

        await self._until(all_at_rest)
        self._progress.done(f"handled: {self._work()}")
        letters, errors = await self._letters()
        for which, row in letters.items():  # into the journal, so that a run that is continued knows of them
            if which not in self.journal.of(f"dead-{row}"):
                self.journal.add(f"dead-{row}", which)
        print("dead letters:")
        for (row, error), n in sorted(errors.items()):
            print(f"  {n:4} {row}: {error}")

    async def _redrive(self) -> None:
        await bus.publish(repaired, Repaired(by="the demo"))
        await self._until(lambda: _true(self.journal.of("repaired")))
        n = await deadletter.redrive(
            bus, orders, where=lambda letter: letter.message.headers.get(DLQ_REASON) == "retries_exhausted"
        )

        async def none_failed() -> bool:
            letters, _ = await self._letters()
            self.result.left = len(letters)
            return "failed" not in letters.values() and self._at_rest(letters)

        await self._until(none_failed)
        self._progress.done(f"redriven: {n} dead letters, after the payment provider was repaired")

    async def _ask(self) -> None:
        rng = random.Random(1)  # noqa: S311  # no secret
        asks = [Ask(sku=rng.choice(sorted(CATALOGUE)), quantity=rng.randint(1, 20)) for _ in range(QUOTES)]
        asks += [Ask(sku=f"no-such-{n}", quantity=1) for n in range(UNKNOWN)]
        for answer in await asyncio.gather(*map(_answer, asks)):
            self.result.answered += answer is True
            self.result.answered_with_error += answer is False
        self._progress.done(f"answered: {self.result.answered} quotes, asked all at once")

    # Looking

    def _count(self, what: str) -> int:
        return len(self.journal.of(what))

    def _work(self) -> str:
        self.journal.read()
        return ", ".join(f"{self._count(what)} {what}" for what in ("charged", "billed", "shipped", "retried"))

    def _at_rest(self, letters: Mapping[str, str]) -> bool:
        """Has each line come to rest, and have both groups heard of each payment?"""
        orders_at_rest = self.journal.of("charged").keys() | self.journal.of("discarded").keys() | letters.keys()
        if len(orders_at_rest) + self.result.invalid < self.result.sent:
            return False
        return self._count("charged") == self._count("billed") == self._count("shipped")

    def _redriven(self) -> int:
        """Orders that were charged after all."""
        return len(self.journal.of("dead-failed").keys() & self.journal.of("charged").keys())

    async def _letters(self) -> tuple[dict[str, str], Counter[tuple[str, str]]]:
        """Order id -> row of the table, and how many died of what."""
        letters: dict[str, str] = {}
        errors: Counter[tuple[str, str]] = Counter()
        async for letter in deadletter.browse(bus, orders):
            headers = letter.message.headers
            row = REASONS.get(headers[DLQ_REASON], headers[DLQ_REASON])
            if letter.body.id not in letters:
                errors[row, headers.get(ORIGINAL_ERROR, "its time to pay was over")] += 1
            letters[letter.body.id] = row
        return letters, errors

    async def _invalid(self) -> int:
        return len({letter.message.id async for letter in deadletter.browse(bus, orders, invalid=True)})

    async def _until(self, there: Callable[[], Awaitable[bool]]) -> None:
        """Poll; raises Stalled when nothing has changed for too long."""
        changed = looked = time.monotonic()
        lines = -1
        while True:
            self._progress.show(self._work())
            now = time.monotonic()
            if self.journal.lines != lines:
                lines, changed = self.journal.lines, now
            if now - max(changed, looked) >= QUIET or lines == 0:
                if await there():
                    return
                looked = time.monotonic()
            if now - changed > STALLED:
                health = await bus.health()
                raise Stalled(f"no change for {STALLED:g} s; the bus is {health.status} {' '.join(health.reasons)}")
            await asyncio.sleep(POLL)

    # The end

    def rows(self) -> list[tuple[str, int, int]]:
        """Name, expected, actual."""
        result, expected, count = self.result, self.expected, self._count
        dead = expected["failed"] + expected["refused"] + expected["expired"]
        return [
            ("sent", expected["sent"], result.sent),
            ("handled: charged", expected["charged"], count("charged")),
            ("handled: discarded, nothing to pay", expected["discarded"], count("discarded")),
            ("invalid, not readable as an order", expected["invalid"], result.invalid),
            ("retried", expected["retried"], count("retried")),
            ("dead-lettered", dead, sum(count(f"dead-{row}") for row in REASONS.values())),
            ("  payment failed each time", expected["failed"], count("dead-failed")),
            ("  refused by the handler", expected["refused"], count("dead-refused")),
            ("  expired before it was handled", expected["expired"], count("dead-expired")),
            ("redriven, and charged then", expected["failed"], self._redriven()),
            ("dead letters that stay", dead - expected["failed"], result.left),
            ("billed", expected["charged"], count("billed")),
            ("shipped", expected["charged"], count("shipped")),
            ("charged twice", 0, self.journal.repeated("charged")),
            ("answered", QUOTES, result.answered),
            ("answered with an error", UNKNOWN, result.answered_with_error),
        ]

    def again(self) -> int:
        """Messages that were handled more than once: legal, since delivery is at least once."""
        return self.journal.of("asked-again").total() + sum(
            self.journal.repeated(what) for what in ("billed", "shipped", "discarded")
        )

    def _table(self) -> bool:
        """Print it. True when expected and actual are the same in all rows."""
        self.journal.read()
        result, count, rows = self.result, self._count, self.rows()
        print(f"\n{'':36} {'expected':>9} {'actual':>9}")
        for name, want, got in rows:
            print(f"{name:36} {want:9} {got:9}{'' if want == got else '   <- differs'}")
        print(f"{'delivered more than once':36} {'':9} {self.again():9}   legal: delivery is at least once")
        rest = count("charged") + count("discarded") + result.invalid + result.left
        whole = rest == result.sent
        print(f"\n{rest} of {result.sent} lines came to rest in {result.seconds:.1f} s")
        good = whole and all(want == got for _, want, got in rows)
        print("the numbers add up" if good else "THE NUMBERS DO NOT ADD UP")
        return good


def _outgoing(number: int, line: bytes) -> Order | Message:
    """A line as it is sent: an order as an object, all else as the bytes that it is."""
    try:
        order = Order.model_validate_json(line)
    except ValidationError:
        return Message(line, id=f"line-{number}", content_type="application/json")
    expires_at = order.pay_before.timestamp() if order.pay_before is not None else None
    return Message(order, key=order.customer, expires_at=expires_at)


async def _answer(ask: Ask) -> bool | None:
    """True: the right price; False: an error, as it should be; None: neither."""
    try:
        price: Price = await bus.request(quotes, ask, timeout=20)
    except RemoteError as error:
        return False if error.type == "LookupError" and ask.sku not in CATALOGUE else None
    except TimeoutError:
        return None
    return True if price.total == CATALOGUE[ask.sku] * ask.quantity else None


async def _true(value: object) -> bool:
    return bool(value)
