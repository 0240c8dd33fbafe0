"""The headers of retries, dead letters and redrives."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibus import deadletter, retry
from unibus import message as names
from unibus.adapter import Source
from unibus.channel import Group, Inbox, Queue, Topic
from unibus.delivery import Delivery
from unibus.message import BROKER_HEADERS, Message

NOW = 1_700_000_000.0
LATER = NOW + 61.5
NOW_TEXT, LATER_TEXT = "2023-11-14T22:13:20.000Z", "2023-11-14T22:14:21.500Z"
ORDERS: Queue[bytes] = Queue("orders")
BILLING = Group(Topic("order.charged"), "billing")


class BankClosed(Exception):
    class Holiday(Exception):
        pass


def delivery(headers: dict[str, str] | None = None, *, failures: int = 0, address: Any = ORDERS) -> Delivery[bytes]:
    message = Message(b"body", "id-1", headers=headers or {}, key="k")
    return Delivery(message, Source(address), None, failures=failures, position="orders/3@1207")


def raised(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def fail(text: str = "no money") -> None:
    raise ValueError(text)


def test_a_retry_copy_tells_of_its_failure() -> None:
    headers = deadletter.failed(delivery({"tenant": "t1"}), raised(fail), NOW)
    digest = headers.pop(names.ERROR_STACK_DIGEST)
    assert len(digest) == 16
    assert headers == {
        "tenant": "t1",
        names.RETRY_COUNT: "1",
        names.ORIGINAL_ERROR: "no money",
        names.ERROR_TYPE: "ValueError",
        names.FIRST_FAILED_AT: NOW_TEXT,
        names.LAST_FAILED_AT: NOW_TEXT,
    }


def test_the_next_failure_keeps_the_first_time_and_replaces_the_error() -> None:
    first = deadletter.failed(delivery(), raised(fail), NOW)
    second = deadletter.failed(delivery(first, failures=1), BankClosed.Holiday(), LATER)
    assert second[names.RETRY_COUNT] == "2"
    assert second[names.FIRST_FAILED_AT] == NOW_TEXT
    assert second[names.LAST_FAILED_AT] == LATER_TEXT
    assert second[names.ERROR_TYPE] == f"{__name__}.BankClosed.Holiday"
    assert names.ORIGINAL_ERROR not in second  # it has no text, and the old one is not its text
    assert names.ERROR_STACK_DIGEST not in second  # it was never raised


def test_a_retry_keeps_crash_and_redrive_counts_and_drops_what_is_not_its_own() -> None:
    old = dict.fromkeys(BROKER_HEADERS, "x") | {
        names.CRASH_COUNT: "1",
        names.REDRIVE_COUNT: "2",
        names.DLQ_REASON: "crash_loop",
        names.ORIGINAL_DESTINATION: "elsewhere",
    }
    kept = deadletter.failed(delivery(old), None, NOW)
    assert kept == {
        names.CRASH_COUNT: "1",
        names.REDRIVE_COUNT: "2",
        names.RETRY_COUNT: "1",
        names.FIRST_FAILED_AT: NOW_TEXT,
        names.LAST_FAILED_AT: NOW_TEXT,
    }


@pytest.mark.parametrize(
    ("address", "destination", "subscription"),
    [
        (ORDERS, "orders", "orders"),
        (BILLING, "order.charged", "billing"),
        (Inbox("reply-1"), "reply-1", "reply-1"),
    ],
    ids=str,
)
def test_a_dead_letter_says_where_it_was(address: Any, destination: str, subscription: str) -> None:
    headers = deadletter.dead(delivery(address=address), retry.RETRIES_EXHAUSTED, raised(fail), NOW)
    assert headers[names.ORIGINAL_DESTINATION] == destination
    assert headers[names.ORIGINAL_SUBSCRIPTION] == subscription
    assert headers[names.ORIGINAL_POSITION] == "orders/3@1207"
    assert headers[names.MOVED_TO_DLQ_AT] == NOW_TEXT
    assert headers[names.DLQ_REASON] == "retries_exhausted"
    assert headers[names.ORIGINAL_ERROR] == "no money"


@pytest.mark.parametrize(
    ("reason", "count"),
    [
        (retry.RETRIES_EXHAUSTED, "3"),
        (retry.NON_RETRYABLE, "3"),
        (retry.UNDECODABLE, "2"),
        (retry.EXPIRED, "2"),
        (retry.CRASH_LOOP, "2"),
        (retry.BROKER_LIMIT, "2"),
    ],
)
def test_only_a_run_counts_as_a_failed_attempt(reason: str, count: str) -> None:
    headers = deadletter.dead(delivery(failures=2), reason, None, NOW)
    assert headers[names.RETRY_COUNT] == count
    assert (names.LAST_FAILED_AT in headers) is (count == "3")


def test_a_dead_letter_without_a_run_keeps_the_story_of_the_last_one() -> None:
    before = deadletter.failed(delivery(), raised(fail), NOW)
    headers = deadletter.dead(delivery(before, failures=1), retry.EXPIRED, None, LATER)
    assert headers[names.ORIGINAL_ERROR] == "no money"
    assert headers[names.LAST_FAILED_AT] == NOW_TEXT
    assert headers[names.MOVED_TO_DLQ_AT] == LATER_TEXT


def test_an_undecodable_message_carries_the_error() -> None:
    headers = deadletter.dead(delivery({"a": "b"}), retry.UNDECODABLE, raised(fail), NOW)
    assert headers["a"] == "b"
    assert headers[names.ORIGINAL_ERROR] == "no money"
    assert headers[names.RETRY_COUNT] == "0"


def test_the_original_headers_are_left_alone() -> None:
    one = delivery({"a": "b"})
    deadletter.failed(one, None, NOW)["c"] = "d"
    deadletter.dead(one, retry.EXPIRED, None, NOW)
    assert one.message.headers == {"a": "b"}


def test_no_position_no_header() -> None:
    one = delivery()
    one.position = ""
    assert names.ORIGINAL_POSITION not in deadletter.dead(one, retry.EXPIRED, None, NOW)


def test_a_redrive_resets_the_counts_and_keeps_the_message() -> None:
    message = Message(
        b"body",
        "id-1",
        type="Order",
        content_type="application/json",
        key="k",
        correlation_id="c",
        causation_id="d",
        reply_to="r",
        timestamp=NOW,
        expires_at=NOW + 1,
        priority=2,
    )
    message.headers = {"tenant": "t", names.CRASH_COUNT: "2", "x-death": "x"}
    one: Delivery[bytes] = Delivery(message, Source(ORDERS), None, failures=5, position="p")
    letter = deadletter.copy(message, deadletter.dead(one, retry.RETRIES_EXHAUSTED, raised(fail), NOW))
    again = deadletter.redriven(letter)
    assert again.headers == {"tenant": "t", names.REDRIVE_COUNT: "1"}
    assert again.expires_at is None
    for name in ("id", "type", "content_type", "key", "correlation_id", "causation_id", "reply_to", "timestamp"):
        assert getattr(again, name) == getattr(message, name)
    assert again.priority == 2
    assert again.body is message.body
    assert deadletter.redriven(again).headers[names.REDRIVE_COUNT] == "2"
    assert letter.expires_at == NOW + 1  # the letter itself is untouched


def test_a_copy_takes_every_field_but_the_delay() -> None:
    fields = {name: f"its {name}" for name in Message.__slots__}
    message = Message(**fields)  # type: ignore[arg-type]  # the types don't matter to a copy
    again = deadletter.copy(message, {"a": "b"})
    for name in fields:
        expected: object = {"headers": {"a": "b"}, "delay": None}.get(name, f"its {name}")
        assert getattr(again, name) == expected
    assert deadletter.copy(message, {}, delay=3.0, id="other").id == "other"
    with pytest.raises(AttributeError):
        deadletter.copy(message, {}, unknown=1)


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("0", 0),
        ("3", 3),
        ("999999999", 999_999_999),
        ("1e3", 0),
        ("-1", 0),
        ("", 0),
        (" 1", 0),
        ("٣", 0),
        ("9" * 10, 0),
    ],
)
def test_counts_of_foreign_headers(value: str, count: int) -> None:
    assert deadletter.retry_count({names.RETRY_COUNT: value}) == count
    assert deadletter.crash_count({names.CRASH_COUNT: value}) == count


def test_counts_default_to_none() -> None:
    assert deadletter.retry_count({}) == deadletter.crash_count({}) == 0


def test_a_dead_letter_moved_back_by_the_brokers_own_tool_starts_again() -> None:
    headers = deadletter.dead(delivery({names.CRASH_COUNT: "4"}, failures=5), retry.CRASH_LOOP, None, NOW)
    assert headers[names.RETRY_COUNT] == "5"
    assert deadletter.retry_count(headers) == deadletter.crash_count(headers) == 0
    again = deadletter.failed(delivery(headers), None, NOW)
    assert deadletter.retry_count(again) == 1
    assert names.DLQ_REASON not in again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\r\nlines\tand\x00more", "two lines and more"),
        ("\u2028x\ufffe\ud800y", "x y"),
        ("grüße 🐘", "grüße 🐘"),
        ("x" * 2000, "x" * 1024),
        ("ü" * 2000, "ü" * 512),
        ("a" + "🐘" * 2000, "a" + "🐘" * 255),
        ("can't reach amqp://user:p%40ss@host:5672/shop now", "can't reach amqp://****@host:5672/shop now"),
        ("redis://:p@ss/word@host", "redis://****@host"),
        ("a https://x.io/y and sqs://k:s@eu", "a https://x.io/y and sqs://****@eu"),
        ("\n", None),
    ],
)
def test_error_texts_are_one_clean_short_line(text: str, expected: str | None) -> None:
    assert deadletter.failed(delivery(), ValueError(text), NOW).get(names.ORIGINAL_ERROR) == expected


def test_a_credential_at_the_edge_of_what_is_read_is_not_shown() -> None:
    for padding in range(8150, 8200):
        text = deadletter.error_text(ValueError(" " * padding + "amqp://user:hunter2@host"))
        assert "hunter" not in text or "@" not in text[: text.find("hunter")]
        assert "hunter2" not in text


def test_a_long_hostile_text_costs_little() -> None:
    started = time.thread_time()
    deadletter.error_text(ValueError("://" * 1_000_000))
    assert time.thread_time() - started < 2


def test_an_error_that_can_not_be_printed() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert deadletter.failed(delivery(), Broken(), NOW)[names.ORIGINAL_ERROR] == "(its text can't be had)"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (None, "no error"),
        (ValueError("a\nb"), "ValueError: a b"),
        (KeyError(), "KeyError"),
        (retry.Retry("bank is closed"), "Retry: bank is closed"),
    ],
)
def test_description_for_logs(error: BaseException | None, text: str) -> None:
    assert deadletter.describe(error) == text


def test_one_path_one_digest() -> None:
    def handler(text: str) -> None:
        fail(text)

    def other() -> None:
        fail()

    one, same = raised(lambda: handler("a")), raised(lambda: handler("b"))
    assert deadletter.stack_digest(one) == deadletter.stack_digest(same) != ""
    assert deadletter.stack_digest(raised(other)) != deadletter.stack_digest(one)


def test_the_depth_of_a_recursion_is_not_part_of_the_digest() -> None:
    def deeper(n: int) -> None:
        if not n:
            fail()
        deeper(n - 1)

    assert deadletter.stack_digest(raised(lambda: deeper(3))) == deadletter.stack_digest(raised(lambda: deeper(30)))


def test_frames_of_unibus_and_of_worker_threads_are_not_part_of_the_digest() -> None:
    direct = raised(fail)
    scope: dict[str, Any] = {"__name__": "unibus.consumer", "fail": fail}
    exec("def run():\n    fail()", scope)  # noqa: S102  # a frame that belongs to a module of unibus
    through = raised(scope["run"])
    assert deadletter.stack_digest(through) == deadletter.stack_digest(direct)
    assert deadletter.stack_digest(ValueError()) == ""


@pytest.mark.parametrize(
    ("now", "text"), [(0.0, "1970-01-01T00:00:00.000Z"), (NOW, NOW_TEXT), (LATER, LATER_TEXT), (NOW + 0.0009, NOW_TEXT)]
)
def test_stamps_are_rfc_3339(now: float, text: str) -> None:
    assert deadletter.stamp(now) == text


@given(st.text(), st.integers(4, 200))
def test_one_line_is_legal_on_every_broker(text: str, limit: int) -> None:
    line = deadletter.one_line(text, limit)
    assert line.isprintable()
    assert len(line.encode()) <= limit
    assert line == line.strip()
