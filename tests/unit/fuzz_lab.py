"""Foreign input for decoders: what real clients and we ourselves have sent, mutated.

Each input is made from (seed, mapping, number) alone, so that one that fails can be made again by itself. A `Mapping` makes an
input and uses it as the product does: decode, look at what only dead letters have, then encode the copies that a retry, a
dead letter and a redrive would be. Only what `allowed` names may be raised; anything else is a bug.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from unibus import deadletter, retry
from unibus.adapter import Outgoing, Source
from unibus.channel import Inbox, Queue
from unibus.delivery import Delivery
from unibus.message import ENVELOPE_HEADERS, POLICY_HEADERS, Message

ORDERS: Queue[bytes] = Queue("orders")
NOW = 1_700_000_000.0
CAPTURED = Path(__file__).with_name("captured") / "foreign.json"

_BYTES = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xc3",
    b"\xed\xa0\x80",
    b"{",
    b'"',
    b"[[[[",
)
TEXTS = (
    *("99999999999", "1e15", "", "\0", " ", "\n", "null", "{}", "[]", "true", "nan", "-inf", "1e308", "-1e308", "1e400", "0", "-1", "1.5", "9" * 400, "9" * 5000),
    *("\u0663", "\ud800", "\udcff", "\ufffe", "\U0001f600", "a\r\nb: c", "x" * 70, "\u00e9" * 200, "y" * 300, "[" * 2000, '{"a":' * 2000),
    *("1700000000.000", "2023-11-14T22:13:20.000Z", "error", "expired", "base64", "empty", "application/json", "orders"),
)  # fmt: skip
NAMES = (
    *sorted(ENVELOPE_HEADERS | POLICY_HEADERS),
    "x-death",
    "x-delivery-count",
    "body",
    "headers",
    "unibus",
    "h",
    "",
    "\u00e9",
)


def mangled(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """`data` with one to three changes. `other`: of which a part may be put in."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
        elif kind == 1:
            new = rng.choice(_BYTES)
            data = data[:at] + new + data[at + len(new) :]
        elif kind == 2:
            data = data[:at] + rng.choice(_BYTES) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + rng.randrange(1, 9) :]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            data = data[:at] + data[max(0, at - rng.randrange(1, 40)) :]
        elif other:
            start = rng.randrange(len(other))
            data = data[:at] + other[start : start + rng.randrange(1, 60)] + data[at:]
    return data


def text(rng: random.Random, given: str = "") -> str:
    """A text that somebody may have put there."""
    kind = rng.randrange(3)
    if kind == 0 or not given:
        return rng.choice(TEXTS)
    at = rng.randrange(len(given) + 1)
    return given[:at] + (rng.choice(TEXTS)[:20] if kind == 1 else chr(rng.randrange(0x11000))) + given[at + 1 :]


def pairs(rng: random.Random, given: dict[str, str]) -> dict[str, str]:
    """Headers with a few added, changed or taken off."""
    found = dict(given)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(NAMES) if not found or rng.random() < 0.7 else rng.choice(list(found))
        if rng.random() < 0.15:
            found.pop(name, None)
        else:
            found[name] = text(rng, found.get(name, ""))
    return found


def message(rng: random.Random) -> Message:
    """One of ours, as it leaves the core."""
    some: Callable[[str], str | None] = lambda word: word if rng.random() < 0.3 else None  # noqa: E731  # three lines of it
    made = Message(rng.choice((b"", b"{}", b'{"id": 1}', b"\xff\0", "\u20ac".encode() * 9)), f"id-{rng.randrange(999)}")
    made.type, made.content_type = some("order"), some("application/json")
    made.key, made.correlation_id, made.causation_id = some("c42"), some("talk"), some("cause")
    made.reply_to = some("unibus.reply.svc.0123456789abcdef")
    made.timestamp = NOW - rng.randrange(100_000)
    made.expires_at = NOW + 60 if rng.random() < 0.2 else None
    headers = {"tenant": "north"} if rng.random() < 0.5 else {}
    if rng.random() < 0.3:
        headers |= {"x-retry-count": "2", "x-original-error": "broken disk", "x-first-failed-at": deadletter.stamp(NOW)}
    made.headers = headers
    return made


def check(found: Message) -> None:
    """What the core may rely on."""
    assert type(found.body) is bytes
    assert type(found.id) is str
    assert found.id
    for name in ("type", "content_type", "key", "correlation_id", "causation_id", "reply_to"):
        assert isinstance(getattr(found, name), str | None), name
    for name in ("timestamp", "expires_at"):
        value = getattr(found, name)
        assert value is None or (type(value) is float and isfinite(value)), (name, value)
    assert found.priority is None or type(found.priority) is int
    assert all(type(name) is str and type(value) is str for name, value in found.headers.items())
    assert not ENVELOPE_HEADERS & found.headers.keys()
    assert 0 <= deadletter.retry_count(found.headers) < 10**9
    assert 0 <= deadletter.crash_count(found.headers) < 10**9


_SOURCE = Source(ORDERS)
_ERROR = OSError("broken disk")


def copies(found: Message, native: object, position: str, inbox: str = "inbox") -> Iterator[Outgoing]:
    """What becomes of it: an answer, a retry, and a dead letter that is redriven."""
    answer = Message(b"{}", "r-1", None, "application/json", {"x-reply-status": "error"})
    answer.correlation_id, answer.causation_id, answer.expires_at = found.correlation_id, found.id, found.expires_at
    answer.timestamp = NOW
    yield Outgoing(Inbox(inbox), answer)
    delivery: Delivery[Any] = Delivery(found, _SOURCE, None, native=native, position=position)
    yield Outgoing(ORDERS, deadletter.copy(found, deadletter.failed(delivery, _ERROR, NOW)), NOW + 5, delivery)
    dead = deadletter.copy(found, deadletter.dead(delivery, retry.RETRIES_EXHAUSTED, _ERROR, NOW))
    yield Outgoing(ORDERS, deadletter.redriven(dead), None, delivery)


@dataclass(frozen=True)
class Mapping:
    """`make(rng)`: an input; `use(input)`: what the product does with it. `allowed`: what that may raise, and it is documented."""

    name: str
    make: Callable[[random.Random], Any]
    use: Callable[[Any], object]
    allowed: tuple[type[Exception], ...] = ()

    def run(self, seed: int, number: int) -> None:
        """Raises AssertionError that says how to make the input again."""
        given = self.make(random.Random(f"{seed}/{self.name}/{number}"))  # noqa: S311  # to be made again
        try:
            self.use(given)
        except self.allowed:
            return
        except Exception as error:
            shown = repr(given)
            text = f"{self.name}: seed {seed}, input {number}: {type(error).__name__}: {error}\n{shown[:2000]}"
            raise AssertionError(text) from error


MAPPINGS: dict[str, Mapping] = {}


def mapping(name: str, make: Callable[[random.Random], Any], *allowed: type[Exception]) -> Callable[[Any], Any]:
    def enlist(use: Callable[[Any], object]) -> Callable[[Any], object]:
        MAPPINGS[name] = Mapping(name, make, use, allowed)
        return use

    return enlist


def captured(broker: str) -> list[Any]:
    """What the real libraries have sent."""
    document = json.loads(CAPTURED.read_text())
    return [one for name, found in document.items() if name != "_" for one in found.get(broker, ())]
