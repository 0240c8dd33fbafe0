"""Requests that the SQS adapter signs itself are those that botocore would have signed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import pytest
from botocore import auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials

from unibus_sqs.signature import Pattern, pattern

FIRST = ReadOnlyCredentials("AKIAFIRST", "a/secret+1", None)
ROLE = ReadOnlyCredentials("ASIAROLE", "another", "token/of+the==role")
NOON = dt.datetime(2026, 11, 22, 12, 0, 0, tzinfo=dt.UTC)
HEADERS = {
    "X-Amz-Target": "AmazonSQS.SendMessageBatch",
    "Content-Type": "application/x-amz-json-1.0",
    "x-amzn-query-mode": "true",
    "User-Agent": "aiobotocore/9 md/Botocore",
}
URLS = (
    "https://sqs.eu-west-1.amazonaws.com/",
    "https://sqs.eu-west-1.amazonaws.com:443/",
    "http://127.0.0.1:4566/",
    "http://Localhost:80/",
    "http://[::1]:4566/",
)


def by_botocore(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    body: bytes,
    credentials: ReadOnlyCredentials,
    at: dt.datetime = NOON,
    more: Mapping[str, str] = {},
) -> Any:
    """A prepared request."""
    monkeypatch.setattr(auth, "get_current_datetime", lambda: at)
    request = AWSRequest("POST", url, {**HEADERS, **more}, body)
    auth.SigV4Auth(credentials, "sqs", "eu-west-1").add_auth(request)
    return request.prepare()


def texts(headers: Any) -> dict[str, str]:
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in headers.items()}


def pattern_of(request: Any) -> Pattern:
    found = pattern(request)
    assert found is not None
    return found


def signed(made: Pattern, body: bytes, by: ReadOnlyCredentials, at: dt.datetime = NOON) -> dict[str, str]:
    return made.signed(body, by.access_key, by.secret_key, by.token, at.timestamp())


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("first", [FIRST, ROLE])
def test_a_request_is_signed_as_botocore_does(
    url: str, first: ReadOnlyCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pattern_of(by_botocore(monkeypatch, url, b"{}", first))
    for credentials in (FIRST, ROLE, FIRST):  # they may be refreshed to others, and a role's have a token
        for later in (dt.timedelta(), dt.timedelta(seconds=7), dt.timedelta(days=40)):
            for body in (b"{}", b'{"a":"\xc3\xbc"}' * 1000):
                expected = texts(by_botocore(monkeypatch, url, body, credentials, NOON + later).headers)
                expected.pop("Content-Length")  # that the HTTP client writes
                assert signed(made, body, credentials, NOON + later) == expected


def test_headers_of_one_request_are_not_those_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"amz-sdk-invocation-id": "1", "X-Amzn-Trace-Id": "Root=1"}  # neither of them is signed
    request = by_botocore(monkeypatch, URLS[0], b"{}", FIRST)
    for name, value in more.items():
        request.headers[name] = value
    assert more.keys().isdisjoint(signed(pattern_of(request), b"{}", FIRST))


def test_without_a_query_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older clients don't send it."""
    monkeypatch.delitem(HEADERS, "x-amzn-query-mode")
    made = pattern_of(by_botocore(monkeypatch, URLS[0], b"{}", ROLE))
    expected = texts(by_botocore(monkeypatch, URLS[0], b"1", ROLE).headers)
    assert signed(made, b"1", ROLE)["Authorization"] == expected["Authorization"]


@pytest.mark.parametrize(
    ("url", "more"),
    [
        ("https://proxy/aws/", {}),
        ("https://sqs.eu-west-1.amazonaws.com/?a=b", {}),
        (URLS[0], {"x-amz-checksum-crc32": "of the body"}),
    ],
)
def test_a_request_that_may_be_another_the_next_time_is_left_to_the_client(
    url: str, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pattern(by_botocore(monkeypatch, url, b"{}", FIRST, more=more)) is None


@pytest.mark.parametrize(
    "authorization", ["", "Bearer t", "AWS4-ECDSA-P256-SHA256 Credential=a/20261122/sqs/aws4_request"]
)
def test_a_request_that_is_signed_in_another_way_is_left_to_the_client(
    authorization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = by_botocore(monkeypatch, URLS[0], b"{}", FIRST)
    request.headers["Authorization"] = authorization
    assert pattern(request) is None


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pattern_of(by_botocore(monkeypatch, URLS[0], b"{}", ROLE))
    signed(made, b"{}", ROLE)
    assert "another" not in repr(made)
    assert "token/of" not in repr(made)
