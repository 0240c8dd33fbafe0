"""Every decoder of foreign input: no exception but the documented ones, whatever comes.

`make fuzz INPUTS=100000 SEED=7` runs more of it. An input that has failed is made again by its seed and number, which the error
names; what was found has its case below.
"""

from __future__ import annotations

import base64
import os
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.fuzz_lab import NOW, ORDERS
from tests.unit.fuzz_mappings import MAPPINGS

from unibus.adapter import Outgoing
from unibus.channel import Inbox
from unibus.message import Message
from unibus_kafka import offsets
from unibus_rabbitmq import link
from unibus_rabbitmq import wire as rabbitmq
from unibus_sqs import wire as sqs

INPUTS = int(os.environ.get("UNIBUS_TEST_FUZZ_INPUTS", "4000"))
SEED = int(os.environ.get("UNIBUS_TEST_FUZZ_SEED", "1"))

assert len(MAPPINGS) == 10


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MAPPINGS)
def test_no_input_raises_what_is_not_documented(name: str) -> None:
    mapping, begun = MAPPINGS[name], time.process_time()
    for number in range(INPUTS):
        mapping.run(SEED, number)
    seconds = time.process_time() - begun
    print(f"{name}: {INPUTS} inputs, seed {SEED}, {seconds:.1f} s of a processor")  # noqa: T201  # `make fuzz` shows it


@pytest.mark.parametrize("name", MAPPINGS)
def test_nor_one_that_hypothesis_finds(name: str) -> None:
    """Shrunk to the smallest that fails."""
    mapping = MAPPINGS[name]

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(st.randoms(use_true_random=False))
    def feed(rng: random.Random) -> None:
        try:
            mapping.use(mapping.make(rng))
        except mapping.allowed:
            return

    feed()


# What was found


def received(headers: bytes, flags: int = 0x2000) -> rabbitmq.Received:
    """With this table, its length in front, as the only property."""
    method = b"\0<\0<\x03tag" + (7).to_bytes(8) + b"\0\x02ex\x02rk"
    return rabbitmq.Received(method, b"\0" * 12 + flags.to_bytes(2) + headers)


@pytest.mark.parametrize(
    "header", [b"", b"\0", b"\0\0\0\x09\x01hS\0\0\0", b"\0\0\0\x02\x01h", b"\xff\xff\xff\xff\x01h"]
)
def test_rabbitmq_properties_that_are_cut_off_hide_no_message(header: bytes) -> None:
    """IndexError, struct.error: the subscription would have begun anew, with the same message first, for ever."""
    assert rabbitmq.decode(received(header), inbox=False, fallback="q@7").id == "q@7"


def test_rabbitmq_headers_nested_without_end_are_a_header_like_others() -> None:
    """RecursionError, out of the client library's decoder; the same loop."""
    value = b""
    for _ in range(20_000):
        value = b"A" + len(value).to_bytes(4) + value if value else b"V"
        if len(value) > 100_000:
            break
    table = b"\x03fooS\0\0\0\x01x" + b"\x01h" + value
    native = received(len(table).to_bytes(4) + table)
    assert dict(rabbitmq.decode(native, inbox=False, fallback="q@7").headers) == {"foo": "x"}
    assert native.raw_headers() == {"h": value}


@pytest.mark.parametrize("timestamp", [-1.0, 1e308, float(2**64), -0.5])
def test_rabbitmq_carries_any_time_that_a_foreign_header_names(timestamp: float) -> None:
    """struct.error, not caught: a failed message with `x-timestamp: -1` could go neither to a retry nor to its dead letters."""
    properties = rabbitmq.encode(Outgoing(ORDERS, Message(b"", "m", timestamp=timestamp)), "m", None, NOW)
    method_and_header = received(b"")
    native = rabbitmq.Received(method_and_header._method, b"\0" * 12 + properties)
    assert rabbitmq.decode(native, inbox=False, fallback="q@7").timestamp == timestamp


@pytest.mark.parametrize("expires_at", [99_999_999_999.0, 1e308, -5.0])
def test_rabbitmq_answers_with_an_expiration_that_the_server_takes(expires_at: float) -> None:
    """For one above 32 bits it closes the channel: a request that expires in the year 5138 would take other replies down."""
    properties = rabbitmq.encode(Outgoing(Inbox("i"), Message(b"", "m", expires_at=expires_at)), "m", None, NOW)
    native = rabbitmq.Received(received(b"")._method, b"\0" * 12 + properties)
    assert 0 <= int(native.properties["expiration"]) < 1 << 32


@pytest.mark.parametrize("payload", [b"\0\n\x002", b"\0\n\0<"], ids=["no reason to close", "no reason to block"])
async def test_rabbitmq_frames_that_are_cut_off_end_the_connection(payload: bytes) -> None:
    """IndexError; as a ConnectionError the event loop ends the connection without a word of its own."""
    control: Any = SimpleNamespace(unblocked=SimpleNamespace(clear=lambda: None))
    tap = link._Tap({0: lambda kind, data: link.Link._control(control, kind, data)})
    frame = link._head.pack(link.METHOD, 0, len(payload)) + payload + b"\xce"
    with pytest.raises(link.Malformed):
        tap.feed_data(frame)


def test_kafka_metadata_of_somebody_else_is_not_ours() -> None:
    """Legal base64 and checksum, and no number in it, or one beyond the highest: IndexError, ValueError."""
    for data in (b"", b"\xff", b"\x02\x20"):
        text = "u2:" + base64.b64encode(data + offsets._checksum(5, data)).decode()
        assert offsets.decode(5, text) is None
        assert offsets.Partition(SimpleNamespace(topic="t", partition=0), 5, text).point() == (5, "")


def test_sqs_bodies_that_only_claim_to_be_base64_may_hold_anything() -> None:
    """UnicodeEncodeError, of a lone surrogate that an emulator lets through."""
    encoding = {"DataType": "String", "StringValue": "base64"}
    native = {"MessageId": "m", "Body": "\udcff", "MessageAttributes": {"unibus-encoding": encoding}}
    assert sqs.decode(native)[0].body == b"\xed\xb3\xbf"
