"""Ids, headers and the envelope."""

import subprocess
import sys
from typing import Any

import pytest

from unibus.errors import CodecError
from unibus.message import (
    BROKER_HEADERS,
    ENVELOPE_HEADERS,
    POLICY_HEADERS,
    RESERVED_HEADERS,
    Message,
    check_headers,
    new_id,
)


def test_ids_are_unique_and_share_a_prefix() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert len({i.partition("-")[0] for i in ids}) == 1
    assert all(i.isascii() and i.isprintable() and len(i) < 64 for i in ids)


def test_a_forked_process_has_a_prefix_of_its_own() -> None:
    code = """
import os, sys
from unibus.message import new_id
mine, (reader, writer) = new_id(), os.pipe()
if not (child := os.fork()):
    os.write(writer, new_id().encode())
    os._exit(0)
os.waitpid(child, 0)
assert os.read(reader, 100).decode().partition("-")[0] != mine.partition("-")[0]
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # our own interpreter and code


def test_two_processes_have_two_prefixes() -> None:
    code = "from unibus.message import new_id; print(new_id())"
    outputs = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout  # as above
        for _ in range(2)
    }
    assert len(outputs) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"tenant": "t1", "x-own": ""},
        {"a": "grüße 🐘 with spaces and ; = , \" '"},
        {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        {"n" * 128: "v" * 10_000},
        {"a": "tab\tis fine"},
    ],
)
def test_legal_headers(headers: dict[str, str]) -> None:
    check_headers(headers)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"a": 5}, "'a': names and values are str, not int"),
        ({"a": b"x"}, "not bytes"),
        ({"a": None}, "not NoneType"),
        ({5: "a"}, "header 5: names and values are str, not int"),
        ({"": "a"}, "1 to 128 printable ASCII"),
        ({"n" * 129: "a"}, "1 to 128 printable ASCII"),
        ({"with space": "a"}, "without spaces"),
        ({"grüße": "a"}, "ASCII"),
        ({"a\n": "a"}, "printable"),
        ({"a": "SECRET\n"}, "'a': the value holds a line break or NUL"),
        ({"a": "SECRET\r"}, "line break"),
        ({"a": "SECRET\0"}, "NUL"),
        ({"a": "SECRET\ud800"}, "lone surrogate"),
        ({"ok": "ok", "x-retry-count": "SECRET"}, "'x-retry-count' is reserved"),
    ],
)
def test_illegal_headers_are_named_and_not_shown(headers: dict[Any, Any], said: str) -> None:
    with pytest.raises(CodecError, match=said) as caught:
        check_headers(headers)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", sorted(RESERVED_HEADERS))
def test_reserved_headers(name: str) -> None:
    with pytest.raises(CodecError, match="reserved for unibus and the brokers; use another name"):
        check_headers({name: "1"})


def test_the_names_on_the_wire() -> None:
    assert sorted(ENVELOPE_HEADERS | POLICY_HEADERS) == sorted(
        [
            "x-message-id",
            "x-key",
            "x-correlation-id",
            "x-causation-id",
            "x-reply-to",
            "x-type",
            "x-content-type",
            "x-timestamp",
            "x-expires-at",
            "x-not-before",
            "x-retry-count",
            "x-crash-count",
            "x-original-error",
            "x-error-type",
            "x-error-stack-digest",
            "x-first-failed-at",
            "x-last-failed-at",
            "x-moved-to-dlq-at",
            "x-dlq-reason",
            "x-original-destination",
            "x-original-subscription",
            "x-original-position",
            "x-redrive-count",
            "x-reply-status",
            "x-reply-error",
        ]
    )
    assert not ENVELOPE_HEADERS & POLICY_HEADERS
    assert not BROKER_HEADERS & (ENVELOPE_HEADERS | POLICY_HEADERS)


def test_an_envelope_starts_empty() -> None:
    message = Message(b"x")
    assert message.id == ""
    assert message.headers == {}
    rest = set(Message.__slots__) - {"body", "id", "headers"}
    assert all(getattr(message, name) is None for name in rest)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Message(b"SECRET", "id-1"), "<Message id-1 6 bytes>"),
        (Message({"card": "SECRET"}, headers={"a": "SECRET"}), "<Message (no id yet) dict>"),
    ],
)
def test_a_repr_shows_no_contents(message: Message, text: str) -> None:
    assert repr(message) == text
