"""The envelope as headers of text: what is set is written, what was written comes back, what is foreign harms nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibus.envelope import JSON, is_bare, packed, packed_bare, read, read_time, time_text, write
from unibus.message import ENVELOPE_HEADERS, NO_HEADERS, NOT_BEFORE, Message

FULL = Message(
    b"x", "id-1", "order", "text/csv", {"tenant": "acme"}, "k", "conversation", "cause", "inbox", 1.25, 1700000000.123
)


def written(message: Message, timestamp: float | None = None, *, brief: bool = False) -> dict[str, str]:
    headers: dict[str, str] = {}
    write(message, headers, timestamp, brief=brief)
    return headers


def test_what_is_set_is_written_in_one_order() -> None:
    assert list(written(FULL, FULL.timestamp).items()) == [
        ("x-message-id", "id-1"),
        ("x-type", "order"),
        ("x-content-type", "text/csv"),
        ("x-key", "k"),
        ("x-correlation-id", "conversation"),
        ("x-causation-id", "cause"),
        ("x-reply-to", "inbox"),
        ("x-timestamp", "1.250"),
        ("x-expires-at", "1700000000.123"),
    ]
    assert written(Message(b"", "m")) == {"x-message-id": "m"}


@given(st.dictionaries(st.text(), st.text(st.characters(exclude_categories=[])), max_size=4))
def test_packed_headers_are_json_in_ascii(headers: dict[str, str]) -> None:
    assert packed(headers) == json.dumps(headers, separators=(",", ":"))
    assert packed(headers).isascii()


@given(st.text(st.characters(exclude_categories=[])), st.none() | st.text(st.characters(exclude_categories=[])))
def test_a_bare_message_is_packed_as_any_other(id: str, content_type: str | None) -> None:
    assert packed_bare(id, content_type) == packed(written(Message(b"", id, content_type=content_type)))


def test_bare_is_what_has_nothing_to_write_but_what_every_message_has() -> None:
    assert is_bare(Message(b"x", "id-1", None, "text/csv", {"tenant": "acme"}, "k", timestamp=1.25, priority=1))
    for name in ("type", "correlation_id", "causation_id", "reply_to"):
        more: dict[str, Any] = {name: ""}
        assert not is_bare(Message(b"x", "id-1", **more))
    assert not is_bare(Message(b"x", "id-1", expires_at=0.0))


def test_brief_leaves_out_what_the_adapter_writes_and_the_correlation_id_that_says_nothing() -> None:
    message = Message(b"", "m", content_type=JSON, key="k", correlation_id="m")
    assert written(message, brief=True) == {"x-message-id": "m"}
    message.correlation_id = "c"
    assert written(message, brief=True) == {"x-message-id": "m", "x-correlation-id": "c"}


def test_what_was_written_comes_back_and_leaves_the_headers_of_the_user() -> None:
    headers = {**FULL.headers, **written(FULL, FULL.timestamp), NOT_BEFORE: "99.250"}
    assert set(headers) == {"tenant", *ENVELOPE_HEADERS}
    found = Message(b"x")
    assert read(headers, found) == 99.25
    assert found == FULL


@pytest.mark.parametrize("headers", [{}, {"x-message-id": "i"}, {"x-type": "t"}])
def test_without_headers_of_the_user_none_are_kept(headers: dict[str, str]) -> None:
    found = Message(b"")
    assert read(headers, found) is None
    assert found.headers is NO_HEADERS


def test_a_header_of_ours_wins_over_the_broker_s_own_field() -> None:
    found = Message(b"", "native", "native", "native", key="native", timestamp=1.0, correlation_id="native")
    read({"x-message-id": "", "x-type": "ours", "x-key": "ours", "x-timestamp": "2.000"}, found)
    assert (found.id, found.type, found.content_type, found.key) == ("native", "ours", "native", "ours")
    assert (found.timestamp, found.correlation_id) == (2.0, "native")


def test_a_foreign_header_of_our_name_is_no_time() -> None:
    found = Message(b"", timestamp=1.0)
    assert read({"x-expires-at": "soon", "x-timestamp": "nan", "x-not-before": "inf"}, found) is None
    assert (found.expires_at, found.timestamp) == (None, 1.0)


@pytest.mark.parametrize("value", [None, "", "soon", "nan", "-inf", [], {}, b"\xff"])
def test_no_time(value: Any) -> None:
    assert read_time(value) is None


def test_times_are_kept_to_the_millisecond() -> None:
    assert time_text(1700000000.12345) == "1700000000.123"
    assert read_time(time_text(1700000000.123)) == 1700000000.123
    assert read_time(12) == 12.0, "an AMQP table may hold a number"
